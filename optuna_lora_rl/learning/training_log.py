"""A training run's metrics: ``metrics.jsonl``, TensorBoard where it is installed, and a figure."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Panels of the figure: title, and the metrics drawn in it.
_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Lead over each group's best opponent (log10 regret, validation)",
        ("lead_usual_scale", "lead_other_scale", "lead_measured", "lead_not_lora"),
    ),
    (
        "Gain over the start (log10 regret, validation)",
        ("gain_low", "validation_gain", "gain_high"),
    ),
    ("Reward a study", ("reward",)),
    ("Imitation loss", ("imitation_loss",)),
    ("Entropy of the policy (nats)", ("entropy",)),
    ("approx_kl and clipfrac", ("approx_kl", "clipfrac")),
    ("Explained variance of the critic", ("explained_variance",)),
    ("Learning rate", ("learning_rate",)),
)
_WINDOW = 25


class TrainingLog:
    """Appends to the files of a run; a run that goes on drops what it will do again.

    Args:
        folder: of the run.
        update: updates that the run has done.
    """

    def __init__(self, folder: Path, update: int) -> None:
        self.folder = folder
        kept = [entry for entry in read_metrics(folder) if entry["update"] <= update]
        lines = "".join(json.dumps(entry) + "\n" for entry in kept)
        partial = folder / "metrics.partial"
        partial.write_text(lines)
        partial.replace(folder / "metrics.jsonl")
        self._file = (folder / "metrics.jsonl").open("a")
        self._board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=update + 1)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Append the metrics of an update; ``metrics["update"]`` is its number, from 1."""
        self._file.write(json.dumps({k: round(v, 5) for k, v in metrics.items()}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                if name != "update":
                    self._board.add_scalar(name, value, int(metrics["update"]))

    def close(self) -> None:
        """Write everything out."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The metrics of each update of a run, in order; none before it has begun."""
    file = folder / "metrics.jsonl"
    entries = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            # Torn by a kill; that update is not in the checkpoint either.
            continue
    return entries


def draw(folder: Path) -> Path:
    """Draw a run's metrics to ``training.html`` in its folder, and return that file."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    entries = read_metrics(folder)
    figure = make_subplots(
        rows=4, cols=2, subplot_titles=[title for title, _ in _PANELS], vertical_spacing=0.07
    )
    for place, (_, names) in enumerate(_PANELS):
        row, column = divmod(place, 2)
        for name in names:
            x = [entry["update"] for entry in entries if name in entry]
            y = [entry[name] for entry in entries if name in entry]
            if not y:
                continue
            rare = len(y) < 0.5 * len(entries)
            line = go.Scatter(
                x=x,
                y=y if rare else _smooth(y),
                name=name,
                mode="lines+markers" if rare else "lines",
                legend=f"legend{place + 1}" if place else "legend",
                showlegend=len(names) > 1,
            )
            figure.add_trace(line, row=row + 1, col=column + 1)
    _mark_phases(figure, entries)
    for place in range(len(_PANELS)):
        axes = (figure.layout[f"{axis}axis{place + 1 if place else ''}"] for axis in "xy")
        x_axis, y_axis = axes
        # What rises to a level leaves the lower corner free, what falls the upper one.
        low = place < 2
        legend = {"x": x_axis.domain[1], "xanchor": "right", "bgcolor": "rgba(0,0,0,0)"}
        legend |= {"y": y_axis.domain[0 if low else 1], "yanchor": "bottom" if low else "top"}
        figure.update_layout({f"legend{place + 1}" if place else "legend": legend})
    figure.update_layout(height=1300, template="plotly_white", title="Training of the policy")
    figure.update_xaxes(title_text="update", row=4)
    target = folder / "training.html"
    figure.write_html(str(target), include_plotlyjs=True)
    return target


def _mark_phases(figure: Any, entries: Sequence[Mapping[str, float]]) -> None:
    """A line where PPO takes over from imitation."""
    imitating = [entry["update"] for entry in entries if "imitation_loss" in entry]
    if imitating and imitating[-1] < entries[-1]["update"]:
        for row in range(1, 5):
            for column in (1, 2):
                figure.add_vline(x=imitating[-1], line_dash="dot", row=row, col=column)


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over the last values: studies of a rollout are long or short, and so is its reward."""
    windows = (values[max(0, i + 1 - _WINDOW) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
