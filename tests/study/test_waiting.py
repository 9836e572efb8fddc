"""What is told while something takes its time."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from rich.console import Console
from typer.testing import CliRunner

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.cli import app
from optuna_lora_rl.learning import training
from optuna_lora_rl.study import panel
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import waiting
from optuna_lora_rl.study.display import Display
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner
from tests.study.screen import Screen

Passes = Callable[[float], list[str]]


@pytest.fixture
def log() -> Console:
    """A pipe, wide enough that no line is broken."""
    return Console(file=io.StringIO(), width=140, markup=False, highlight=False)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch, log: Console) -> Passes:
    """Lets so many seconds pass at once, and returns the lines that were written meanwhile."""
    now, tickers, read = [0.0], [], [0]

    class ByHand:
        def __init__(self, every: float, call: Callable[[], None]) -> None:
            self.every, self.call = every, call

        def start(self) -> None:
            tickers.append(self)

        def stop(self) -> None:
            tickers.remove(self)

    monkeypatch.setattr(waiting, "Ticker", ByHand)
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def lines(seconds: float) -> list[str]:
        end = now[0] + seconds
        for ticker in tickers:
            while now[0] < end:
                now[0] += ticker.every
                ticker.call()
        written = log.file.getvalue().splitlines()
        new, read[0] = written[read[0] :], len(written)
        return new

    return lines


def test_a_piped_study_has_a_line_after_two_seconds_and_then_every_thirty(
    make_spec: MakeSpec, log: Console, passes: Passes
) -> None:
    shown = panel.create(log)
    shown.opens(make_spec(), [])
    assert len(passes(60)) == 1
    shown.works_on(Activity("tokenising", 10, 96, "rows"))
    assert passes(1.5) == []
    assert passes(0.5) == ["tokenising: 10 of 96 rows (2.0 s)"]
    shown.works_on(Activity("tokenising", 50, 96, "rows"))
    assert passes(29.5) == []
    assert passes(0.5) == ["tokenising: 50 of 96 rows (32 s)"]
    assert passes(30) == ["tokenising: 50 of 96 rows (1 min 2 s)"]
    assert passes(30) == ["tokenising: 50 of 96 rows (1 min 32 s)"]
    shown.closes()


def test_so_has_a_trial_and_each_of_a_pack(
    make_spec: MakeSpec, log: Console, passes: Passes
) -> None:
    shown = panel.create(log)
    shown.opens(make_spec(), [])
    passes(0)
    shown.trial_starts(0, {"lora_rank": 8})
    shown.trial_works_on(0, Activity("training", 5, 40, "steps", "loss 1.234"))
    assert passes(29.5) == []
    assert passes(0.5) == ["trial 0: training: 5 of 40 steps, loss 1.234 (30 s)"]
    shown.trial_starts(1, {"lora_rank": 4})
    shown.trial_works_on(1, Activity("evaluating", 1, 3, "batches"))
    (line,) = passes(30)
    training_0, evaluating_1 = "training: 5 of 40 steps, loss 1.234", "evaluating: 1 of 3 batches"
    assert line == f"trials 0, 1: 0 {training_0}; 1 {evaluating_1} (30 s)"
    # Whatever is written, there is a line at least every half minute, and no more of these.
    space = {"lora_rank": optuna.distributions.IntDistribution(1, 100)}
    trial = optuna.create_trial(params={"lora_rank": 8}, distributions=space, value=1)
    trial.number = 0
    shown.trial_ends(trial, [trial])
    assert [line[:11] for line in passes(29.5)] == ["trial   0 ("]
    (line,) = passes(0.5)
    assert line.startswith(f"trial 1: {evaluating_1} (")
    shown.closes()


def test_a_piped_command_has_a_line_every_thirty_seconds(log: Console, passes: Passes) -> None:
    with waiting.waiting(log) as on_activity:
        on_activity(Activity("decomposing", 3, 12, "layers"))
        assert passes(29.5) == []
        assert passes(0.5) == ["decomposing: 3 of 12 layers (30 s)"]
        on_activity(Activity("decomposing", 4, 12, "layers"))
        assert passes(30) == ["decomposing: 4 of 12 layers (1 min)"]
    assert passes(60) == []


def test_lines_come_by_themselves_until_they_are_stopped() -> None:
    lines, third = [], threading.Event()

    def write(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            third.set()

    told = waiting.WaitingLines(write, first=0.01, every=0.01)
    told.start()
    told.works_on(Activity("loading"))
    assert third.wait(20)
    told.stop()
    written = len(lines)
    assert not threading.Event().wait(0.1)
    assert len(lines) == written and lines[0].startswith("loading (")


def test_a_terminal_has_a_bar_which_leaves_nothing_and_takes_no_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    screen = Screen()
    with waiting.waiting(Console(file=screen, force_terminal=True, width=80)) as on_activity:
        on_activity(Activity("decomposing", 3, 12, "layers"))
        assert screen.is_drawn_on(timeout=20)
        (bar,) = [line for line in screen.lines() if line.strip()]
        print("a result that goes to a file")
    assert "decomposing: 3 of 12 layers" in bar
    assert sys.stdout.getvalue() == "a result that goes to a file\n"
    assert not any(line.strip() for line in screen.lines())


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What commands say that they do, each once in a row."""
    found: list[str] = []

    class Noted(waiting.WaitingLines):
        def works_on(self, activity: Activity | None, *, first: bool = True) -> None:
            assert activity is not None
            if found[-1:] != [activity.what]:
                found.append(activity.what)

    monkeypatch.setattr(waiting, "WaitingLines", Noted)
    return found


@pytest.mark.parametrize(
    ("command", "does"),
    [
        (["validate"], ["checking"]),
        (["status"], ["reading the study"]),
        (["best", "--json"], ["reading the study"]),
        (["explain"], ["reading the study", "explaining its trials"]),
        (["explain", "--json"], ["reading the study", "explaining its trials"]),
        (["report"], ["reading the study", "writing the report"]),
        (["export", "-o", "adapter"], ["writing the adapter"]),
        (["ask"], ["proposing"]),
    ],
)
def test_commands_of_a_study_say_what_they_do(
    paper: type[PaperTuner],
    make_spec: MakeSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: list[str],
    command: list[str],
    does: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    runner.run(make_spec())
    told.clear()
    done = CliRunner().invoke(app, [command[0], "small.yaml", *command[1:]])
    assert done.exit_code == 0, done.output
    assert told == does


@pytest.mark.parametrize(
    ("command", "does"),
    [
        ("analyze --model MODEL", ["loading MODEL", "loading weights", "decomposing"]),
        ("advise --model MODEL", ["loading MODEL", "loading weights"]),
    ],
)
def test_commands_on_models_say_what_they_do(
    random_llama: Path, told: list[str], command: str, does: list[str]
) -> None:
    done = CliRunner().invoke(app, command.replace("MODEL", str(random_llama)).split())
    assert done.exit_code == 0, done.output
    expected = [what.replace("MODEL", str(random_llama)) for what in does]
    assert told == ["loading libraries", *expected]


def test_training_a_policy_says_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setattr(training, "_VALIDATED", 5)
    monkeypatch.setattr(training, "_REPORTED", 5)
    settings = {
        **{"curriculum_updates": 0, "imitation_updates": 1, "ppo_updates": 1, "transitions": 50},
        **{"lengths": [4], "tasks": 10, "validation_tasks": 4, "validate_every": 9},
    }
    file = tmp_path / "policy.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")
    done = CliRunner().invoke(app, ["train-policy", str(file), "-o", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert told == [
        *("loading libraries", "drawing tasks", "running the opponents", "training"),
        *("choosing the weights", "drawing tasks", "running the opponents"),
        "measuring for the report",
    ]


@pytest.mark.parametrize("has_test", [True, False])
def test_the_test_split_is_evaluated_in_words_where_there_is_one(
    make_spec: MakeSpec, tmp_path: Path, has_test: bool
) -> None:
    told: list[str] = []

    class Noted(Display):
        def works_on(self, activity: Activity) -> None:
            if told[-1:] != [activity.what]:
                told.append(activity.what)

    rows = [{"prompt": f"{n} + {n} = ", "completion": f"{2 * n}"} for n in range(24)]
    splits = {"train": rows[:16], "validation": rows[16:20], "test": rows[20:]}
    changes: dict[str, Any] = {"budget": 1}
    for name, part in splits.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
        if name != "test" or has_test:
            changes[f"data.{name}"] = str(file)
    runner.run(make_spec(changes), display=Noted())
    on_test = ["evaluating the untuned model on the test split"]
    on_test += ["evaluating the best adapter on the test split"]
    assert [what for what in told if "test split" in what] == (on_test if has_test else [])
    assert told[-1] == "writing the report"


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", ["status", "best --json", "explain", "report", "ask"])
def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word(
    paper: type[PaperTuner], make_spec: MakeSpec, tmp_path: Path, command: str, buffered: bool
) -> None:
    runner.run(make_spec())
    name, *options = command.split()
    reading, writing = os.pipe()
    # As head does after its first lines; here before any, so that every line meets it.
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "optuna_lora_rl", name, str(tmp_path / "small.yaml"), *options],
        stdout=writing,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
        text=True,
        timeout=120,
    )
    os.close(writing)
    assert done.stderr == "" and done.returncode == 1
