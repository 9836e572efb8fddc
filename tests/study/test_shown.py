"""What people see: every line, in the characters that there are, and while they wait."""

from __future__ import annotations

import sys
import threading
import time

import optuna
import pytest
from rich.console import Console
from rich.console import ConsoleRenderable
from rich.console import RenderHook

from optuna_lora_rl.study.panel import create
from tests.study.conftest import MakeSpec
from tests.study.screen import Screen


@pytest.fixture(autouse=True)
def terminal_that_is_not_dumb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.parametrize("writer", ["trial", "sentence", "library"])
def test_the_panel_erases_no_line_of_a_finished_trial(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    # rich works out how far up to go before it writes: a drawing of a smaller panel in between
    # would let it go too far, and erase what stands above.
    screen, here = Screen(), threading.current_thread()
    monkeypatch.setattr(sys, "stdout", screen)
    console = Console(file=screen, force_terminal=True, force_interactive=True, width=100)
    console.height = 40

    class MeetsADrawing(RenderHook):
        def process_renderables(
            self, renderables: list[ConsoleRenderable]
        ) -> list[ConsoleRenderable]:
            if threading.current_thread() is here:
                console.height = 14
                screen.is_drawn_on(timeout=1.5)
            return renderables

    space = {"lora_rank": optuna.distributions.IntDistribution(1, 1000)}
    trials = []
    panel = create(console)
    panel.opens(make_spec({"budget": 20}), [])
    for number in range(20):
        panel.trial_starts(number, {"lora_rank": 8})
        trials.append(optuna.create_trial(params={"lora_rank": 8}, distributions=space, value=1))
        trials[number].number = number
    for number in range(6):
        panel.trial_ends(trials[number], trials[: number + 1])
    assert screen.is_drawn_on(timeout=20)
    console.push_render_hook(MeetsADrawing())
    if writer == "trial":
        panel.trial_ends(trials[6], trials[:7])
    elif writer == "sentence":
        panel.says("something else")
    else:
        print("something else")
    console.pop_render_hook()
    panel.closes()
    last = "6  score" if writer == "trial" else "something else"
    expected = ["★   0  score", *(f"{number}  score" for number in range(1, 6)), last]
    lines = [line.strip() for line in screen.lines() if line.strip()]
    begun = [next((b for b in expected if line.startswith(b)), line) for line in lines]
    assert begun == expected


def test_a_narrow_panel_cuts_contents_and_no_names(make_spec: MakeSpec) -> None:
    screen = Screen()
    panel = create(Console(file=screen, force_terminal=True, width=80))
    panel.opens(make_spec({}), [])
    panel.trial_starts(12, {"target_modules": "x" * 200})
    # It is drawn several times a second, and gone when it closes.
    time.sleep(0.5)
    first = [line.split()[0] for line in screen.lines() if line.strip()]
    panel.closes()
    assert "trial" in first
    assert "time" in first
