"""What the command line says of a study once a run is over, or in between."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import optuna
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import tables
from optuna_lora_rl.study import answers
from optuna_lora_rl.study import data_report
from optuna_lora_rl.study import front
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import owner
from optuna_lora_rl.study import report
from optuna_lora_rl.study import verdict
from optuna_lora_rl.study import wording
from optuna_lora_rl.study.outcome import Usage

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.study.runner import RunResult
    from optuna_lora_rl.study.spec import StudySpec

# Columns of a terminal from which the table has room for all it knows.
_WIDE = 120


def standing(
    console: Console, study: optuna.Study, spec: StudySpec, *, is_ending: bool = False
) -> None:
    """How far the study is, its best trials, and what they gained.

    Args:
        console: Where to print.
        study: The study.
        spec: Its file.
        is_ending: Whether a run has just said what was made of the data.
    """
    trials = study.get_trials(deepcopy=False)
    _say(console, Text.assemble((spec.name, "bold"), f"  {progress(trials, spec)}"))
    known = study.user_attrs.get(data_report.DATA)
    if known and not is_ending:
        _say(console, Text(data_report.line(known), style="dim"))
    if known:
        for warning in data_report.warnings(known):
            _say(console, Text(warning, style="yellow"))
    packed = outcome.side_by_side(trials)
    if packed:
        _say(console, Text(packed, style="dim"))
    best = report.top(trials, 5)
    if not best:
        nothing = verdict.nothing_completed(study)
        _say(console, _warning(nothing) if nothing else "No trial has been completed yet.")
        return
    console.print()
    console.print(_table(best, console.width))
    if shown := front.front(study):
        _say(console, Text(f"Pareto front: {front.sentence(shown, spec)}", style="dim"))
        console.print(front.table(shown, spec))
    gain = _gain(study, best[0])
    if gain.row_count:
        console.print(gain)
    if answered := answers.of(study, best[0]):
        _say(console, answers.counted(answered))
        console.print(answers.table(answered))
        console.print()
    if "cost" in best[0].user_attrs:
        words = f"The best run cost {best[0].user_attrs['cost']:.2f} of the reference run."
        _say(console, Text(words, style="dim"))
    shortfall = verdict.nothing_better(study)
    if shortfall:
        _say(console, _warning(shortfall))


def standing_as_json(study: optuna.Study, spec: StudySpec) -> str:
    """The same for programs: counts by state, the budget's use, the best trial and the front."""
    trials = study.get_trials(deepcopy=False)
    usage = Usage.of(trials)
    states = Counter(trial.state.name.lower() for trial in trials if outcome.counts(trial))
    facts = {
        "study": spec.name,
        "trials": usage.trials,
        "running": usage.running,
        "states": dict(states),
        "hours": round(usage.hours, 4),
        "cost": usage.cost,
        "budget": spec.budget.model_dump(exclude_none=True),
        "data": study.user_attrs.get(data_report.DATA),
        "shortfall": verdict.shortfall(study),
        "best": report.best_facts(study, spec),
        "pareto_front": front.as_json(front.front(study), spec),
    }
    return json.dumps(facts, indent=2)


def progress(trials: Sequence[FrozenTrial], spec: StudySpec) -> str:
    """The budget's use in words, such as ``12 of 20 trials (9 completed, 3 pruned)``."""
    usage, budget = Usage.of(trials), spec.budget
    states = outcome.counts_in_words(trials)
    if usage.running:
        states.append(f"{usage.running} running")
    parts = [
        f"{usage.trials} of {budget.trials} trials" if budget.trials else f"{usage.trials} trials",
        wording.of_hours(usage.hours, budget.hours) if budget.hours else "",
        f"cost {usage.cost:.1f} of {budget.cost:g}" if budget.cost else "",
    ]
    return ", ".join(filter(None, parts)) + (f" ({', '.join(states)})" if states else "")


def description(
    console: Console, spec: StudySpec, notes: Iterable[str] = (), *, as_json: bool = False
) -> None:
    """What a valid file asks for, and what else there is to say of it."""
    if as_json:
        tuned = spec.lora_space().distributions()
        said = {
            "valid": True,
            "study": spec.name,
            "model": spec.model.name,
            "data": spec.data.train,
            "tuned": {name: wording.domain(tuned[name]) for name in tuned},
            "sampler": spec.sampler.name,
            "pruner": spec.pruner.name,
            "packing": spec.packing,
            "budget": spec.budget.model_dump(exclude_none=True),
            "output": str(spec.folder),
            "notes": list(notes),
        }
        print(json.dumps(said, indent=2))
        return
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column(overflow="fold")
    space = spec.lora_space()
    limits = spec.budget.model_dump(exclude_none=True)
    rows.add_row("study", Text(spec.name, style="bold"))
    rows.add_row("model", spec.model.name)
    rows.add_row("data", spec.data.train)
    for name, distribution in space.distributions().items():
        rows.add_row("tuned", f"{name}: {wording.domain(distribution)}")
    rows.add_row("sampler", spec.sampler.name)
    rows.add_row("pruner", spec.pruner.name)
    if spec.packing != "off":
        side_by_side = (
            "as many trials" if spec.packing == "auto" else f"up to {spec.packing} trials"
        )
        rows.add_row("packing", f"{side_by_side} side by side")
    rows.add_row("budget", ", ".join(f"{wording.number(v)} {k}" for k, v in limits.items()))
    rows.add_row("output", f"{spec.folder}/")
    console.print(rows, highlight=False)
    for note in notes:
        _say(console, Text(note, style="dim"))
    _say(console, Text("The file is valid.", style="green"))


def ending(console: Console, result: RunResult, spec: StudySpec, *, command: str) -> None:
    """How the run ended, where things stand, and what to type next."""
    style = {"failures": "red", "interruption": "yellow"}.get(result.ended_by, "green")
    style = "red" if result.shortfall else style
    opening = {
        "budget": f"Finished: {result.reason}.",
        "others": f"This worker is done: {result.reason}; the last one to end brings the best "
        "adapter and the report up to date.",
        "failures": f"Stopped: the first trials all failed the same way: {result.reason}",
        "interruption": "Interrupted; nothing finished is lost.",
    }[result.ended_by]
    console.print()
    _say(console, Text(opening, style=style))
    standing(console, result.study, spec, is_ending=True)
    program = wording.program()
    if result.lost:
        again = f"{program} best {command} shows its configuration, to train it again"
        _say(console, Text(f"Note: {result.lost}. {again}.", style="yellow"))
    rows = [("dashboard", f"{program} dashboard {command}")]
    report_file = spec.folder / report.FILE
    if report_file.exists():
        rows.insert(0, ("report", str(report_file)))
    best = outcome.best_of(result.study.get_trials(deepcopy=False))
    if result.best_adapter is not None:
        rows.insert(0, ("best adapter", f"{result.best_adapter}/ (PEFT format)"))
    elif best is not None and not result.lost and (elsewhere := owner.where(best)):
        rows.insert(0, ("best adapter", f"not here: trial {best.number} ran for {elsewhere}"))
    if result.ended_by != "budget":
        rows.append(("go on", f"{program} run {command}"))
    console.print()
    for name, content in rows:
        # Never broken into lines: they are there to be copied.
        line = Text.assemble((f"{name:<14}", "dim"), content)
        console.print(line, soft_wrap=True, highlight=False)


def best(console: Console, study: optuna.Study, spec: StudySpec, *, as_json: bool) -> None:
    """The best trial, for people or as JSON.

    Raises:
        UserError: If no trial has been completed yet.
    """
    facts = report.best_facts(study, spec)
    if facts is None:
        raise UserError(f"the study {spec.name!r} has no completed trial yet")
    shown = front.front(study)
    if as_json:
        more = {"pareto_front": front.as_json(shown, spec)} if shown else {}
        print(json.dumps(facts | more, indent=2))
        return
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column()
    for name, value in facts["configuration"].items():
        tuned = name in facts["params"] or f"{name}_ratio" in facts["params"]
        rows.add_row(name, Text(wording.number(value), style="bold" if tuned else ""))
    score = wording.score(facts["score"])
    _say(console, Text(f"Trial {facts['trial']}, score {score}", style="bold green"))
    if taken := _taken(facts["metrics"]):
        _say(console, Text(taken, style="dim"))
    console.print(rows, highlight=False)
    if shown:
        console.print()
        _say(console, Text(f"Pareto front: {front.sentence(shown, spec)}", style="dim"))
        console.print(front.table(shown, spec))


def _taken(metrics: Mapping[str, Any]) -> str:
    """What a trial took, such as ``4.88 M parameters, 2 min 10 s, 1.26 GB of memory at most``."""
    parts = []
    if "trainable_parameters" in metrics:
        parts.append(f"{wording.count(metrics['trainable_parameters'])} parameters trained")
    if "seconds" in metrics:
        parts.append(wording.duration(metrics["seconds"]))
    if "peak_memory_mb" in metrics:
        # Of 2^20 bytes, as the attribute has always been.
        memory = tables.size(metrics["peak_memory_mb"] * (1 << 20))
        parts.append(f"{memory} of memory at most")
    return ", ".join(parts)


def _table(trials: Sequence[FrozenTrial], width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, padding=(0, 1))
    columns = ["trial", "score", "quality", "cost", "loss", "params"]
    columns += ["time"] if width >= _WIDE else []
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("configuration", overflow="fold")
    for place, trial in enumerate(trials):
        attrs = trial.user_attrs
        cells: dict[str, str] = {
            "trial": str(trial.number),
            "score": wording.score(outcome.final_score(trial)),
            **{k: f"{attrs[k]:.3f}" for k in ("quality", "cost", "loss") if k in attrs},
        }
        if "trainable_parameters" in attrs:
            cells["params"] = wording.count(attrs["trainable_parameters"])
        if "seconds" in attrs:
            cells["time"] = wording.duration(attrs["seconds"])
        table.add_row(
            *(cells.get(name, "–") for name in columns),
            outcome.configuration(trial),
            style="bold green" if place == 0 else "",
        )
    return table


def _gain(study: optuna.Study, best: FrozenTrial) -> Table:
    """What the best adapter does, beside what the untuned model does."""
    columns = report.side_by_side(study, best)
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, padding=(0, 1))
    table.add_column("validation")
    for name in columns:
        table.add_column(name, justify="right")
    for metric in report.measured(study, best):
        cells = [f"{known[metric]:.3f}" if metric in known else "" for known in columns.values()]
        table.add_row(metric.replace("_", " "), *cells)
    return table


def _warning(sentence: str) -> Text:
    return Text(f"{sentence[0].upper()}{sentence[1:]}.", style="bold red")


def _say(console: Console, text: Text | str) -> None:
    console.print(text, highlight=False)
