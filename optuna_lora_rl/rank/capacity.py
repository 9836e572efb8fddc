"""What an adapter of a given rank can hold, and what it takes."""

from __future__ import annotations

import html
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna_lora_rl.errors import UserError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Memory:
    """What training an adapter holds, in bytes.

    Attributes:
        base: The frozen weights.
        factors: A and B of all layers, in float32.
        gradients: Theirs.
        moments: The optimizer's.
        activations: What one micro-batch keeps for the backward pass, and its logits.
    """

    base: float
    factors: float
    gradients: float
    moments: float
    activations: float

    @property
    def total(self) -> float:
        return self.base + self.factors + self.gradients + self.moments + self.activations


@dataclass(frozen=True)
class Capacity:
    """An adapter on a layer of d outputs by k inputs, or the sum of several.

    Attributes:
        rank: r.
        dense: d k, the parameters of the layer's weight.
        parameters: r (d + k), the parameters of its adapter.
        expressible: min(r, d, k), the largest rank of an update; of several layers the sum.
        largest: min(d, k), the rank of an update without bounds; of several layers the sum.
    """

    rank: int
    dense: int
    parameters: int
    expressible: int
    largest: int

    @property
    def compression(self) -> float:
        """dk / (r (d + k)): how many times fewer parameters than the weight."""
        return self.dense / self.parameters

    @property
    def coverage(self) -> float:
        """The expressible rank as a share of the largest."""
        return self.expressible / self.largest


def of_layer(shape: tuple[int, int], rank: int) -> Capacity:
    """Counts for one layer of shape (d, k).

    Raises:
        UserError: When the rank is less than 1.
    """
    if rank < 1:
        raise UserError(f"the rank of an adapter is at least 1, not {rank}")
    d, k = shape
    return Capacity(
        rank=rank,
        dense=d * k,
        parameters=rank * (d + k),
        expressible=min(rank, d, k),
        largest=min(d, k),
    )


def of_layers(shapes: Mapping[str, tuple[int, int]], rank: int) -> Capacity:
    """Counts for several layers that have the same rank.

    Raises:
        UserError: When there is no layer, or the rank is less than 1.
    """
    if not shapes:
        raise UserError("there are no layers to adapt")
    each = [of_layer(shape, rank) for shape in shapes.values()]
    return Capacity(
        rank=rank,
        dense=sum(one.dense for one in each),
        parameters=sum(one.parameters for one in each),
        expressible=sum(one.expressible for one in each),
        largest=sum(one.largest for one in each),
    )


def break_even(shape: tuple[int, int]) -> int:
    """Returns the largest rank whose adapter has fewer parameters than the weight; 0 for none."""
    d, k = shape
    return (d * k - 1) // (d + k)


def over_ranks(shapes: Mapping[str, tuple[int, int]], ranks: Iterable[int]) -> list[Capacity]:
    """Counts for each rank.

    Raises:
        UserError: When there is no layer or no rank, or a rank is less than 1.
    """
    counted = [of_layers(shapes, rank) for rank in ranks]
    if not counted:
        raise UserError("there are no ranks to count for")
    return counted


def figure(capacities: Iterable[Capacity], title: str = "") -> Figure:
    """Draws parameters, compression and coverage over rank."""
    from plotly.subplots import make_subplots

    known = sorted(capacities, key=lambda one: one.rank)
    ranks = [one.rank for one in known]
    panels = {
        "Adapter parameters": [one.parameters for one in known],
        "Times fewer than the weights": [one.compression for one in known],
        "Expressible share of the rank": [one.coverage for one in known],
    }
    drawn = make_subplots(rows=1, cols=len(panels), subplot_titles=list(panels))
    for column, (panel, values) in enumerate(panels.items(), start=1):
        drawn.add_scatter(x=ranks, y=values, name=panel, mode="lines+markers", row=1, col=column)
        drawn.update_xaxes(title_text="rank", type="log", tickvals=ranks, row=1, col=column)
    for column in (1, 2):
        drawn.update_yaxes(type="log", dtick=1, row=1, col=column)
    drawn.update_yaxes(tickformat=".0%", row=1, col=3)
    drawn.add_hline(y=1, line_dash="dot", row=1, col=2)
    # Annotations on a logarithmic axis stand at the logarithm.
    drawn.add_annotation(
        text="as large as the weights",
        showarrow=False,
        x=0.02,
        y=0,
        xref="x2 domain",
        yref="y2",
        xanchor="left",
        yanchor="bottom",
    )
    # As text: plotly reads tags in it.
    heading = html.escape(title, quote=False)
    drawn.update_layout(title=heading, showlegend=False, template="plotly_white", height=420)
    return drawn
