"""Kills studies in the middle, goes on with them, and checks what is left: a table.

    python studies/kills.py --random 60 --points 40 --output studies/results/kills.md

A study trains the built-in model for a few steps a trial: alone, in packs, or in two workers at
once. Some are killed (SIGKILL) at a random moment, some at a chosen point of the program. Then the
same command runs once more, unharmed, and the study has to be complete: the wished number of
trials and each finished one as it was, none running, report and best adapter whole and of the best
trial, no leftovers. Two workers share an SQLite file, or the database that --storage names.

Children are forks of a process that has imported everything, so that a study takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import measuring
from optuna.trial import TrialState
from safetensors import safe_open

from optuna_lora_rl.study import adapters
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import spec as study_spec

BUDGET = 4
KINDS = {"plain": (1, "off"), "packed": (1, 2), "two workers": (2, "off"), "two packed": (2, 2)}
# Where a worker is killed: module, function or method, and in words. Before it, or after.
POINTS = [
    ("study.heartbeat:Heartbeat.begins", "before", "between ask and the first heartbeat"),
    ("study.heartbeat:Heartbeat.begins", "after", "after the first heartbeat, before a proposal"),
    ("study.trials:Trials._record", "before", "trained and saved, nothing written down"),
    ("study.trials:Trials._record", "after", "written down, not told"),
    ("study.trials:Trials._forget", "before", "told, adapters of others not dropped"),
    ("study.adapters:drop_others", "after", "after adapters were dropped"),
    ("study.adapters:publish_best", "before", "before the best adapter is saved"),
    ("shutil:copytree", "after", "the best adapter copied, not in its place"),
    ("pathlib:Path.rename", "after", "the former best moved away, the new not in its place"),
    ("study.report:write", "before", "before the report"),
    ("study.dashboard:annotate", "before", "after the report, before the notes"),
]
# Where the killed run is the study's second, with a trial more than the first had.
SECOND = {"the former best moved away, the new not in its place"}
CLEAN = {".study", ".lock"}


@dataclass
class Attempt:
    """A study that was killed, and what was found after the next command."""

    kind: str
    where: str
    killed: bool = False
    finished_before: int = 0
    wrong: list[str] = field(default_factory=list)


def file_of(folder: Path, kind: str, storage: str | None, budget: int = BUDGET) -> Path:
    """Writes the study's file."""
    content = {
        "name": folder.name,
        "model": "tiny",
        "data": {
            "train": "tiny:dates-small",
            "max_train_samples": 16,
            "max_validation_samples": 8,
            "max_test_samples": 8,
        },
        "space": {
            "lora_rank": {"low": 2, "high": 8, "log": True},
            "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "batch_size": 4,
            "max_steps": 4,
        },
        "objective": {"reference": {"max_steps": 4, "batch_size": 4}},
        "training": {"evaluations": 2},
        "sampler": "random",
        "packing": KINDS[kind][1],
        "budget": budget,
        "output": str(folder / "out"),
        "storage": storage if KINDS[kind][0] > 1 else None,
    }
    file = folder / "study.yaml"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def start(file: Path, log: Path, kill: Callable[[], None] | None = None) -> int:
    """Runs the study in a child; returns the child's number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("a") as stream, contextlib.redirect_stdout(stream):
            with contextlib.redirect_stderr(stream):
                if kill is not None:
                    kill()
                code = runner.EXIT_CODES[runner.run(study_spec.load(file)).ended_by]
    except BaseException as error:
        with log.open("a") as stream:
            stream.write(f"{type(error).__name__}: {error}\n")
    finally:
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dies_at(point: str, when: str, call: int) -> Callable[[], None]:
    """Kills this process at the so manieth call of a function."""

    def install() -> None:
        module, _, path = point.partition(":")
        package = "optuna_lora_rl." if module.startswith("study.") else ""
        owner: Any = importlib.import_module(f"{package}{module}")
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original, calls = getattr(owner, name), Counter[str]()

        def dying(*given: Any, **named: Any) -> Any:
            calls["all"] += 1
            result = None
            if calls["all"] < call or when == "after":
                result = original(*given, **named)
            if calls["all"] >= call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, dying)

    return install


def attempt(
    kind: str,
    where: str,
    storage: str | None,
    *,
    kill: Callable[[], None] | None = None,
    after: float | None = None,
) -> Attempt:
    """Kills a study's first worker, waits for the other one, goes on, and looks."""
    found = Attempt(kind, where)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    file, log = file_of(folder, kind, storage), folder / "log"
    try:
        if where in SECOND:
            file_of(folder, kind, storage, BUDGET - 1)
            if code := ended(start(file, log)):
                found.wrong.append(f"the first run ended with {code}")
            file_of(folder, kind, storage)
        children = [start(file, log, kill)]
        children += [start(file, log) for _ in range(1, KINDS[kind][0])]
        if after is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(children[0], signal.SIGKILL)
        found.killed = ended(children[0]) == -signal.SIGKILL
        for child in children[1:]:
            code = ended(child)
            if code:
                found.wrong.append(f"the other worker ended with {code}")
        check(found, file, log)
    except Exception as error:
        found.wrong.append(f"{type(error).__name__}: {error}")
    if found.wrong:
        found.wrong.append(f"kept in {folder}")
        print(found, log.read_text() if log.exists() else "", file=sys.stderr, flush=True)
    else:
        shutil.rmtree(folder)
    return found


def finished(file: Path) -> dict[int, Any]:
    try:
        study = opening.load_study(study_spec.load(file))
    except Exception:
        # Killed before there was one.
        return {}
    trials = study.get_trials()
    study._storage.remove_session()
    return {
        trial.number: (trial.state, trial.values, trial.params)
        for trial in trials
        if trial.state.is_finished() and outcome.counts(trial)
    }


def check(found: Attempt, file: Path, log: Path) -> None:
    before = finished(file)
    found.finished_before = len(before)
    code = ended(start(file, log))
    spec = study_spec.load(file)
    study = opening.load_study(spec)
    trials, output = study.get_trials(), spec.folder
    after = finished(file)
    best = outcome.best_of(trials)
    number = best.number if best else None
    retried = Counter(t.user_attrs["retry_of"] for t in trials if "retry_of" in t.user_attrs)
    configurations = Counter(
        str(sorted(t.params.items())) for t in trials if t.state == TrialState.COMPLETE
    )
    report = output / "report.html"
    whole = report.exists() and report.read_text().rstrip().endswith("</html>")
    hidden = {path.name for path in output.iterdir() if path.name.startswith(".")}
    kept = {path.name for path in (output / "adapters").iterdir()}
    for wrong, said in [
        (code != 0, f"the next command ended with {code}"),
        (any(after.get(n) != was for n, was in before.items()), "a finished trial is lost"),
        (len(after) != BUDGET, f"{len(after)} trials count, not {BUDGET}"),
        (any(t.state == TrialState.RUNNING for t in trials), "a trial is left running"),
        (max(retried.values(), default=0) > 1, "a trial was run again twice"),
        (max(configurations.values(), default=0) > 1, "a configuration was finished twice"),
        (not whole, "no whole report"),
        (adapters.best_number(output) != number, "best is not of the best trial"),
        (not loads(output / "best"), "the best adapter cannot be read"),
        (not hidden <= CLEAN, f"left over: {sorted(hidden - CLEAN)}"),
        (kept != {f"trial-{number:04d}"}, f"adapters kept: {sorted(kept)}"),
    ]:
        if wrong:
            found.wrong.append(said)


def loads(folder: Path) -> bool:
    """Whether a saved adapter can be read."""
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
            names = list(weights.keys())
            return bool(names) and all(weights.get_tensor(name) is not None for name in names)
    except Exception:
        return False


def table(attempts: list[Attempt]) -> str:
    lines = [
        "| killed | study | kills | had ended before | trials finished by then | wrong |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Attempt]] = {}
    for one in attempts:
        groups.setdefault((one.where, one.kind), []).append(one)
    for (where, kind), ones in groups.items():
        before = sorted(one.finished_before for one in ones)
        counted = f"{before[0]} to {before[-1]}" if before[0] != before[-1] else str(before[0])
        missed = sum(not one.killed for one in ones)
        wrong = "; ".join(said for one in ones for said in one.wrong) or "nothing"
        lines.append(f"| {where} | {kind} | {len(ones)} | {missed or ''} | {counted} | {wrong} |")
    return "\n".join(lines)


def record(attempts: list[Attempt], arguments: argparse.Namespace, revision: str) -> None:
    """Writes what there is so far, so that a run that is stopped leaves it."""
    if arguments.output is None:
        return
    command = f"python studies/kills.py --random {arguments.random} --points {arguments.points}"
    command += " --storage URL" if arguments.storage else ""
    said = f"    {command}\n\n(Revision {revision}; {len(attempts)} kills.)"
    arguments.output.write_text(f"{INTRODUCTION}\n{said}\n\n{table(attempts)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, default=60, help="kills at random moments")
    parser.add_argument("--points", type=int, default=40, help="kills at chosen points")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", help="database of the studies of two workers")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    draw, revision = random.Random(arguments.seed), measuring.revision()
    # Of one worker's studies each has a file of its own.
    kinds = [kind for kind in KINDS if KINDS[kind][0] > 1 or not arguments.storage]
    # What every child needs is imported once.
    import optuna_lora_rl.finetuning.finetuner
    import optuna_lora_rl.study.explaining  # noqa: F401

    attempts: list[Attempt] = []
    for i in range(arguments.points):
        point, when, where = POINTS[i % len(POINTS)]
        kind = kinds[i // len(POINTS) % len(kinds)]
        # Trials are many, endings few; of two workers each may have one trial.
        several = KINDS[kind][0] == 1 and ("Trials" in point or "Heartbeat" in point)
        call = draw.randint(1, 3) if several else 1
        kill = dies_at(point, when, call)
        attempts.append(attempt(kind, where, arguments.storage, kill=kill))
        record(attempts, arguments, revision)
    lasted: dict[str, float] = {}
    for i in range(arguments.random):
        kind = kinds[i % len(kinds)]
        if kind not in lasted:
            began = time.monotonic()
            attempt(kind, "never", arguments.storage)
            # The next command, which the attempt runs too, takes about a fifth of it.
            lasted[kind] = (time.monotonic() - began) * 0.8
        moment = draw.uniform(0.0, lasted[kind])
        attempts.append(attempt(kind, "at a random moment", arguments.storage, after=moment))
        record(attempts, arguments, revision)
    wrong = sum(bool(one.wrong) for one in attempts)
    print(table(attempts), f"\n{len(attempts)} kills, {wrong} with something wrong", flush=True)
    sys.exit(1 if wrong else 0)


INTRODUCTION = """# Killed studies

Studies of four trials of the built-in model, alone, in packs of two, and in two workers on one
folder, whose worker (the first of two) was killed with SIGKILL. Then the same command ran once
more. Nothing is wrong where the wished number of trials is finished, each that was finished before
is as it was, no configuration was finished or run again twice, no trial is left running, the
report is whole, `best` is the best trial's adapter and can be read, and nothing is left over.
"Had ended before" counts kills that came too late. Where the former best is moved away, the study
had ended before with a trial less.
"""


if __name__ == "__main__":
    main()
