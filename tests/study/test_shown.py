"""What people see: every line, in the characters that there are, and while they wait."""

from __future__ import annotations

import threading
import time

import optuna
import pytest
from rich.console import Console

from optuna_lora_rl.study import display
from tests.study.conftest import MakeSpec
from tests.study.screen import Screen


@pytest.fixture(autouse=True)
def terminal_that_is_not_dumb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")


def test_the_panel_erases_no_line_of_a_finished_trial(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It is drawn a thousand times a second, so that a drawing meets nearly every line.
    wait = threading.Event.wait
    monkeypatch.setattr(threading.Event, "wait", lambda self, _=None: wait(self, 0.001))
    screen = Screen(delay=0.001)
    console = Console(file=screen, force_terminal=True, force_interactive=True, width=100)
    panel = display.create(console)
    panel.opens(make_spec({"budget": 400}), [])
    space = {"lora_rank": optuna.distributions.IntDistribution(1, 1000)}
    trials = []
    for number in range(400):
        running = [number + more for more in range(number % 7)]
        for one in running:
            # The panel grows and shrinks.
            panel.trial_starts(one, {"lora_rank": 8})
        trial = optuna.create_trial(params={"lora_rank": number + 1}, distributions=space, value=1)
        trial.number = number
        trials.append(trial)
        panel.trial_ends(trial, trials[-5:])
    panel.closes()
    lines = screen.lines()
    lost = [n for n in range(400) if not any(f" {n:>3}  score" in line for line in lines)]
    assert lost == []
    assert not any("time" in line for line in lines)


def test_a_narrow_panel_cuts_contents_and_no_names(make_spec: MakeSpec) -> None:
    screen = Screen()
    panel = display.create(Console(file=screen, force_terminal=True, width=80))
    panel.opens(make_spec({}), [])
    panel.trial_starts(12, {"target_modules": "x" * 200})
    # It is drawn several times a second, and gone when it closes.
    time.sleep(0.5)
    first = [line.split()[0] for line in screen.lines() if line.strip()]
    panel.closes()
    assert "trial" in first
    assert "time" in first
