"""A budget of ranks or parameters, shared out among layers.

Notations
---------
w_i       importance of layer i
c_i       what one rank of it costs: 1, or d_i + k_i parameters
l_i, h_i  its smallest and largest rank; h_i <= min(d_i, k_i)
x_i       its share before rounding: clip(t w_i, l_i, h_i), with t such that sum c_i x_i = budget

So ranks are in proportion to importance wherever the bounds allow. Shares are rounded down, and
what is left goes one rank at a time to the layers with the largest remainders (Hamilton's method),
as far as it reaches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank.spectrum import Spectrum

Unit = Literal["rank", "parameters"]


@dataclass(frozen=True)
class Allocation:
    """Ranks by layer.

    Attributes:
        ranks: The rank of each layer.
        unit: What the budget counts.
        budget: The budget.
        left: What of it is left. None of a budget of ranks; of parameters less than one more
            rank of any layer below its maximum costs.
    """

    ranks: dict[str, int]
    unit: Unit
    budget: int
    left: int


@dataclass(frozen=True)
class Patterns:
    """A ``LoraConfig``'s words for ranks by layer.

    Attributes:
        rank_pattern: Ranks, by keys that PEFT matches to one module each.
        alpha_pattern: Alphas, such that all layers have the scale of the reference rank.
    """

    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]


def allocate(
    importance: Mapping[str, float],
    *,
    budget: int,
    unit: Unit = "rank",
    shapes: Mapping[str, tuple[int, int]],
    minimum: int = 1,
    maximum: int | Mapping[str, int] | None = None,
) -> Allocation:
    """Shares a budget out in proportion to importance.

    Args:
        importance: A number of at least 0 for each layer; all 0 means all alike.
        budget: The sum of the ranks, or of their adapters' parameters.
        unit: What the budget counts.
        shapes: (d, k) of each layer.
        minimum: The smallest rank of a layer.
        maximum: The largest, of all layers or of each; None for min(d, k), which bounds it in
            any case.

    Raises:
        UserError: When an importance is no such number, a layer has no shape, or the budget is
            less than the minima or, of ranks, more than the maxima.
    """
    names = list(importance)
    weights = _weights(importance)
    for name in names:
        if name not in shapes:
            raise UserError(f"there is no layer {name!r} to give a rank to")
    if minimum < 1:
        raise UserError(f"the minimum rank is at least 1, not {minimum}")
    bounds = maximum if isinstance(maximum, Mapping) else dict.fromkeys(names, maximum)
    for bound in bounds.values():
        if bound is not None and bound < minimum:
            raise UserError(f"the maximum rank {bound} is less than the minimum rank {minimum}")
    high = [min(*shapes[name], bounds[name] or min(shapes[name])) for name in names]
    low = [min(minimum, most) for most in high]
    cost = [1 if unit == "rank" else sum(shapes[name]) for name in names]
    _check_budget(budget, unit, cost, low, high)
    shares = _shares(weights, cost, low, high, budget)
    ranks, left = _rounded(shares, weights, cost, high, budget)
    return Allocation(dict(zip(names, ranks, strict=True)), unit, budget, left)


def patterns(
    ranks: Mapping[str, int], *, rank: int, alpha: float, use_rslora: bool = False
) -> Patterns:
    """Says ranks in PEFT's words.

    Args:
        ranks: The rank of each layer.
        rank: The rank for which ``alpha`` is meant.
        alpha: ``lora_alpha`` at that rank; other ranks get one of equal scale, alpha / r, or
            alpha / sqrt(r) with rsLoRA.
        use_rslora: Whether the adapter is rank-stabilised.
    """
    scaling = layers.scaling_of(alpha, rank, use_rslora)
    return Patterns(
        rank_pattern={layers.exactly(name): r for name, r in ranks.items()},
        alpha_pattern={
            layers.exactly(name): layers.alpha_of(scaling, r, use_rslora)
            for name, r in ranks.items()
        },
    )


def _weights(importance: Mapping[str, float]) -> list[float]:
    if not importance:
        raise UserError("there are no layers to share the budget out among")
    for name, value in importance.items():
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"the importance of {name} is {value}, not a number of at least 0")
    largest = max(importance.values())
    # Less than this says nothing against the largest, and would only lose digits.
    return [
        value / largest if largest and value / largest > 1e-12 else 0.0
        for value in importance.values()
    ]


def _check_budget(
    budget: int, unit: Unit, cost: Sequence[int], low: Sequence[int], high: Sequence[int]
) -> None:
    least = sum(c * n for c, n in zip(cost, low, strict=True))
    most = sum(c * n for c, n in zip(cost, high, strict=True))
    what = "ranks" if unit == "rank" else "parameters"
    if budget < least:
        raise UserError(
            f"a budget of {budget} {what} is less than the {least} that the smallest ranks of "
            f"{len(cost)} layers take"
        )
    # Ranks must sum exactly; parameters may be left over.
    if unit == "rank" and budget > most:
        raise UserError(
            f"a budget of {budget} {what} is more than the {most} that {len(cost)} layers can take"
        )


def _shares(
    weights: Sequence[float],
    cost: Sequence[int],
    low: Sequence[int],
    high: Sequence[int],
    budget: int,
) -> list[float]:
    if sum(c * n for c, n in zip(cost, high, strict=True)) <= budget:
        return [float(n) for n in high]
    # Layers without importance have their minimum, unless the others cannot take the budget.
    taken = sum(c * (h if w else n) for w, c, n, h in zip(weights, cost, low, high, strict=True))
    if taken <= budget:
        low = [h if w else n for w, n, h in zip(weights, low, high, strict=True)]
        weights = [0.0 if w else 1.0 for w in weights]

    def at(t: float) -> list[float]:
        return [min(max(t * w, n), h) for w, n, h in zip(weights, low, high, strict=True)]

    def spent(t: float) -> float:
        return sum(c * x for c, x in zip(cost, at(t), strict=True))

    # sum c_i x_i is piecewise linear in t, with knots where a layer leaves or meets a bound.
    knots = sorted(
        {0.0, *(b / w for w, n, h in zip(weights, low, high, strict=True) if w for b in (n, h))}
    )
    before = max((t for t in knots if spent(t) <= budget), default=0.0)
    after = min((t for t in knots if spent(t) > budget), default=before)
    rise = spent(after) - spent(before)
    t = before + (after - before) * (budget - spent(before)) / rise if rise else before
    return at(t)


def _rounded(
    shares: Sequence[float],
    weights: Sequence[float],
    cost: Sequence[int],
    high: Sequence[int],
    budget: int,
) -> tuple[list[int], int]:
    # A share that is whole but for rounding errors must not be rounded down by one.
    ranks = [math.floor(x + 1e-9) for x in shares]
    left = budget - sum(c * r for c, r in zip(cost, ranks, strict=True))

    def claim(i: int) -> tuple[float, float, int]:
        return shares[i] - ranks[i], weights[i], -i

    while True:
        open_ = [i for i in range(len(ranks)) if ranks[i] < high[i] and cost[i] <= left]
        if not open_:
            return ranks, left
        best = max(open_, key=claim)
        ranks[best] += 1
        left -= cost[best]


def importance_of_spectra(spectra: Mapping[str, Spectrum]) -> dict[str, float]:
    """Effective rank * log(1 + largest singular value).

    Of the base weights this is the importance called ``weight``, of the updates of an adapter
    already trained it is ``delta``.
    """
    return {
        name: one.effective_rank * float(np.log1p(one.spectral_norm))
        for name, one in spectra.items()
    }


def importance_of_gradients(spectra: Mapping[str, Spectrum]) -> dict[str, float]:
    """The energy of each layer's gradient, sum of sigma^2: how fast its weight could improve."""
    return {name: one.energy for name, one in spectra.items()}


def importance_of_activations(spectra: Mapping[str, Spectrum], budget: int) -> dict[str, float]:
    """How many of the ``budget`` largest components of all layers' inputs a layer has.

    Components are compared by the share of their layer's energy that they explain (EVA, Paischer
    et al. 2024, arXiv 2410.07170, section 3.2). With ``budget`` the number of ranks to be shared
    out, these are EVA's ranks; unlike PEFT's they count inputs as they are, not less their mean.

    Raises:
        UserError: When the budget is less than 1.
    """
    if budget < 1:
        raise UserError(f"the budget is at least 1, not {budget}")
    names = list(spectra)
    shares = [one.values**2 / (one.energy or 1.0) for one in spectra.values()]
    owners = np.repeat(np.arange(len(names)), [len(share) for share in shares])
    largest = np.argsort(-np.concatenate(shares), kind="stable")[:budget]
    counts = np.bincount(owners[largest], minlength=len(names))
    return {name: float(count) for name, count in zip(names, counts, strict=True)}


def uniform_importance(names: Iterable[str]) -> dict[str, float]:
    """The same for all."""
    return dict.fromkeys(names, 1.0)
