"""What people see: every line, in the characters that there are, and while they wait."""

from __future__ import annotations

import threading

import optuna
import pytest
from rich.console import Console

from optuna_lora_rl.study import display
from tests.study.conftest import MakeSpec
from tests.study.screen import Screen


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
