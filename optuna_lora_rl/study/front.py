"""The Pareto front of a study of two objectives: the trials that no other beats in both."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING
from typing import Any

from rich import box
from rich.table import Table

from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import wording

if TYPE_CHECKING:
    from collections.abc import Sequence

    import optuna
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.study.spec import StudySpec


def front(study: optuna.Study) -> list[FrozenTrial]:
    """Its trials, the best of the first objective first; empty with one objective."""
    if len(study.directions) == 1:
        return []
    return sorted(study.best_trials, key=lambda trial: (-trial.values[0], trial.number))


def as_json(trials: Sequence[FrozenTrial], spec: StudySpec) -> list[dict[str, Any]]:
    """What each trial of a front reached, and with what."""
    return [
        {
            "trial": trial.number,
            **dict(zip(spec.objective.objectives, trial.values, strict=True)),
            "score": outcome.final_score(trial),
            "configuration": trial.user_attrs.get("configuration", trial.params),
        }
        for trial in trials
    ]


def sentence(trials: Sequence[FrozenTrial], spec: StudySpec) -> str:
    """What the front is, and which of its trials counts as the best."""
    taken = max(trials, key=lambda trial: outcome.final_score(trial) or 0.0)
    first, second = spec.objective.objectives
    one = len(trials) == 1
    return (
        f"{len(trials)} trial{'' if one else 's'} that no other beats in both "
        f"{first} and {second}. Trial {taken.number} counts as the best, by the score "
        f"{first} - {spec.objective.cost_weight:g} * {second}; objective.cost_weight weighs them."
    )


def table(trials: Sequence[FrozenTrial], spec: StudySpec) -> Table:
    """The front for a terminal."""
    shown = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, padding=(0, 1))
    for name in ("trial", *spec.objective.objectives, "score"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("configuration", overflow="fold")
    for cells in _rows(trials):
        shown.add_row(*cells)
    shown.caption, shown.caption_justify = _shared(trials), "left"
    return shown


def section(study: optuna.Study, spec: StudySpec) -> str:
    """The front for the report; empty with one objective."""
    trials = front(study)
    if not trials:
        return ""
    heads = ("trial", *spec.objective.objectives, "score", "configuration")
    head = "".join(f"<th>{html.escape(name)}" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells) for cells in _rows(trials)
    )
    return (
        f"<h2>Pareto front</h2><p class=quiet>{html.escape(sentence(trials, spec))}</p>"
        f"<table class=wide><tr>{head}{body}</table>"
        f"<p class=quiet>{html.escape(_shared(trials))}</p>"
    )


def _differing(trials: Sequence[FrozenTrial]) -> set[str]:
    """The parameters in which the trials differ; all that are tuned where there is one trial."""
    names = {name for trial in trials for name in trial.params}
    if len(trials) == 1:
        return names
    return {n for n in names if len({repr(trial.params.get(n)) for trial in trials}) > 1}


def _written(trial: FrozenTrial, names: set[str]) -> str:
    return wording.compact(trial.user_attrs.get("configuration", trial.params), names)


def _shared(trials: Sequence[FrozenTrial]) -> str:
    """What is tuned and the same in all of them; empty where there is none."""
    names = {name for trial in trials for name in trial.params} - _differing(trials)
    shared = _written(trials[0], names)
    return f"All of them: {shared}." if shared else ""


def _rows(trials: Sequence[FrozenTrial]) -> list[list[str]]:
    names = _differing(trials)
    return [
        [
            str(trial.number),
            *(f"{value:.3f}" for value in trial.values),
            wording.score(outcome.final_score(trial)),
            _written(trial, names),
        ]
        for trial in trials
    ]
