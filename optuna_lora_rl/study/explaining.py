"""Why a study's trials were proposed, and what the study has taught about each parameter."""

from __future__ import annotations

import html
import json
import math
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from optuna_lora_rl import samplers
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.samplers.explanation import Explanation
from optuna_lora_rl.samplers.explanation import Origin
from optuna_lora_rl.samplers.explanation import Parameter
from optuna_lora_rl.samplers.explanation import explain
from optuna_lora_rl.samplers.explanation import origin
from optuna_lora_rl.samplers.explanation_figure import log_ticks
from optuna_lora_rl.study import charts
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import output
from optuna_lora_rl.study import wording

if TYPE_CHECKING:
    from pathlib import Path

    import optuna
    from optuna.trial import FrozenTrial
    from rich.console import Console

    from optuna_lora_rl.study.spec import StudySpec

FILE = "explanation.html"
_PANEL = (400, 230)
# What a proposal keeps, in words.
_MEANINGS = {
    "mean": "expected score, in deviations from the average of the trials before it",
    "std": "how uncertain that was, in the same unit",
    "log_ei": "log of the expected improvement on the best of them",
    "log_prior": "log-density of what is usual in LoRA runs",
    "log_feasible": "log-probability that it works and keeps the constraints",
    "residual": "what improvement and prior together gave it (logit)",
    "network": "what the network added to that",
    "logit": "the sum, by which the candidates were ranked",
    "trust": "how far earlier studies were believed, from 0 to 1",
}


def show(
    console: Console,
    study: optuna.Study,
    spec: StudySpec,
    number: int | None = None,
    *,
    found: Explanation | None = None,
) -> Path | None:
    """Prints where each trial came from and what it taught, and writes the figure.

    Args:
        console: where to.
        study: whose trials.
        spec: of the study.
        number: of the one trial to explain, or None for all.
        found: the study's explanation, where there is one already.

    Returns:
        The figure's file; None for one trial, or with fewer than three results.

    Raises:
        UserError: there is no such trial.
    """
    trials = study.get_trials(deepcopy=False)
    if number is not None:
        trial = _numbered(trials, number)
        _one(console, trial, _origin(trial))
        return None
    found = found or explain(study)
    for reason in found.reasons:
        console.print(f"Before the first trial: {reason}.")
    console.print(_origins(trials))
    if not found.parameters:
        console.print("Three results or more are needed to say what they taught.")
        return None
    console.print(_parameters(found))
    opening.claim(spec)
    path = spec.folder / FILE
    page = found.figure().to_html(include_plotlyjs=True, config={"displayModeBar": False})
    output.write(path, page)
    return path


def _origin(trial: FrozenTrial) -> Origin:
    if outcome.RETRY_OF in trial.user_attrs:
        return Origin(f"trial {trial.user_attrs[outcome.RETRY_OF]} again, which was cut short")
    return origin(trial)


def _one(console: Console, trial: FrozenTrial, said: Origin) -> None:
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column(overflow="fold")
    score = wording.score(outcome.final_score(trial))
    rows.add_row("trial", f"{trial.number} ({trial.state.name.lower()}, score {score})")
    rows.add_row("configuration", outcome.configuration(trial))
    rows.add_row("from", str(said))
    console.print(rows, highlight=False)
    proposal = samplers.proposal(trial) or {}
    numbers = [(key, proposal[key]) for key in _MEANINGS if key in proposal]
    if not numbers:
        return
    table = _table("kept of the proposal", "", "meaning")
    for key, value in numbers:
        table.add_row(key, f"{value:+.3f}", _MEANINGS[key])
    console.print(table)


def as_json(study: optuna.Study, number: int | None = None) -> str:
    """The same for programs, as JSON.

    Raises:
        UserError: there is no such trial.
    """
    trials = study.get_trials(deepcopy=False)
    if number is not None:
        trials = [_numbered(trials, number)]
    found = explain(study)
    parameters = [
        {
            "name": p.name,
            "importance": p.importance,
            "best": p.best,
            "values": list(p.values),
            "mean": p.mean.tolist(),
            "low": p.low.tolist(),
            "high": p.high.tolist(),
        }
        for p in found.parameters
    ]
    origins = [
        {
            "trial": trial.number,
            "source": said.source,
            "expected": said.expected,
            "remarks": said.remarks,
        }
        for trial, said in ((trial, _origin(trial)) for trial in trials)
    ]
    importance = "PED-ANOVA over the completed trials"
    known = {"importance": importance, "parameters": parameters, "trials": origins}
    return json.dumps(known, indent=2)


def _numbered(trials: list[FrozenTrial], number: int) -> FrozenTrial:
    trial = outcome.numbered(trials, number)
    if trial is None:
        raise UserError(
            f"--trial is {number}, but the study's trials are 0 to {trials[-1].number}"
            if trials
            else f"--trial is {number}, but the study has no trials yet"
        )
    return trial


def _origins(trials: list[FrozenTrial]) -> Table:
    table = _table("trial", "score", "expected", "configuration", "why it was proposed")
    for trial in (trial for trial in trials if trial.params):
        score = wording.score(outcome.final_score(trial))
        if outcome.final_score(trial) is None:
            score = trial.state.name.lower()
        said = _origin(trial)
        table.add_row(
            str(trial.number),
            score,
            "" if said.expected is None else f"{said.expected[0]:+.1f} ± {said.expected[1]:.1f}",
            outcome.configuration(trial),
            "; ".join((said.source, *said.remarks)),
        )
    table.caption = (
        "Expected scores are in deviations from the average of the trials before each; results "
        "far below the rest are drawn in."
    )
    table.caption_justify = "left"
    return table


def _parameters(found: Explanation) -> Table:
    table = _table("parameter", "importance", "best so far", "predicted best [90%]", "worst [90%]")
    for parameter in found.parameters:
        best, worst = _extremes(parameter)
        table.add_row(
            parameter.name,
            f"{parameter.importance:.0%}",
            wording.number(parameter.best),
            _predicted(parameter, best),
            _predicted(parameter, worst),
        )
    table.caption = "Importance by PED-ANOVA over the completed trials, as in optuna-dashboard."
    table.caption_justify = "left"
    return table


def _extremes(parameter: Parameter) -> tuple[int, int]:
    """Where the predicted mean is highest and lowest."""
    return int(parameter.mean.argmax()), int(parameter.mean.argmin())


def _predicted(parameter: Parameter, k: int) -> str:
    value = wording.number(parameter.values[k])
    return f"{value}: {parameter.mean[k]:.3f} [{parameter.low[k]:.3f}, {parameter.high[k]:.3f}]"


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, head in enumerate(heads):
        last = k == len(heads) - 1
        # What a row is about is not broken, wherever else there is too little room.
        table.add_column(
            Text(head, style="dim"), overflow="fold", ratio=1 if last else None, no_wrap=k == 0
        )
    return table


def section(study: optuna.Study, spec: StudySpec) -> str:
    """A section of the report: a small chart for each parameter that matters."""
    found = explain(study)
    predicted = _predicted_value(spec)
    if not found.parameters:
        return ""
    shown = [p for p in found.parameters if p.importance >= 0.01] or list(found.parameters[:1])
    panels = "".join(
        f"<div><b>{html.escape(p.name)}</b> <span class=quiet>importance {p.importance:.0%}"
        f"</span>{_chart(p, predicted)}</div>"
        for p in shown
    )
    return (
        "<h2>Which parameters matter, and how</h2>"
        f"<p class=quiet>The predicted {predicted} along each parameter, the others as in the "
        "best trial, with a band that holds 90% of what is possible, and the trials (the best one "
        "in colour, pruned ones as rings at what they had when they were pruned). Importance by "
        "PED-ANOVA over the completed trials, as in optuna-dashboard."
        f"</p><div class=panels>{panels}</div>"
    )


def _predicted_value(spec: StudySpec) -> str:
    """What the surrogate predicts: of several objectives the first."""
    return "score" if spec.n_objectives == 1 else str(spec.objective.objectives[0])


def _chart(parameter: Parameter, predicted: str) -> str:
    choices = any(isinstance(v, str | bool) or v is None for v in parameter.values)
    x = [_place(parameter, value) for value in parameter.values]
    believed = list(zip(x, parameter.mean, parameter.low, parameter.high, strict=True))
    # A choice is a short level stretch.
    stretches = (
        [[(at - 0.3, *rest), (at + 0.3, *rest)] for at, *rest in believed]
        if choices
        else [believed]
    )
    series = [
        charts.Series(
            [(at, mean) for at, mean, _, _ in stretch],
            band=[(at, low, high) for at, _, low, high in stretch],
        )
        for stretch in stretches
    ]
    # One run that went wrong would flatten the rest.
    results = [y for _, y in parameter.trials + parameter.pruned]
    lowest = min(float(parameter.low.min()), float(np.quantile(results, 0.25)))

    def dots(trials: tuple[tuple[Any, float], ...]) -> list[tuple[float, float]]:
        return [(_place(parameter, v), max(y, lowest)) for v, y in trials]

    seen = dots(parameter.trials)
    pruned = charts.Series(dots(parameter.pruned), "#94a3b8", line=False, dots=True, hollow=True)
    series += [pruned, charts.Series(seen, color="#94a3b8", line=False, dots=True)]
    best = max(seen, key=lambda point: point[1], default=None)
    if best is not None:
        series.append(charts.Series([best], line=False, dots=True))
    ticks = None
    if choices:
        ticks = [(at, wording.number(v)) for at, v in zip(x, parameter.values, strict=True)]
    elif parameter.log:
        round_values = log_ticks(parameter.values[0], parameter.values[-1])
        ticks = [(math.log10(value), f"{value:g}") for value in round_values]
    return charts.chart(series, x="", y=predicted, size=_PANEL, ticks=ticks)


def _place(parameter: Parameter, value: Any) -> float:
    """Where a value stands on the horizontal axis."""
    if any(isinstance(v, str | bool) or v is None for v in parameter.values):
        return float(parameter.values.index(value))
    return math.log10(value) if parameter.log else float(value)
