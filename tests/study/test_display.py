"""What a person sees of a running study."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.study import display
from optuna_lora_rl.study import panel
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import summary
from optuna_lora_rl.study import wording
from optuna_lora_rl.study.panel import LiveDisplay
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner


def shown(spec: object, *, terminal: bool, width: int = 120) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    result = runner.run(spec, display=panel.create(console))
    summary.ending(console, result, spec, command="small.yaml")
    return console.file.getvalue()


def test_a_log_has_one_line_a_trial(paper: type[PaperTuner], make_spec: MakeSpec) -> None:
    paper.failures = [None, FineTuningError("diverged", "the loss is not finite")]
    text = shown(make_spec(), terminal=False)
    lines = [line for line in text.splitlines() if line.startswith("trial ")]
    assert len(lines) == 3 and "\x1b" not in text
    assert "(1/3)" in lines[0] and "score" in lines[0] and "lr" in lines[0]
    assert "failed: the loss is not finite" in lines[1]
    assert "3 of 3 trials (2 completed, 1 failed)" in text
    assert "optuna-lora-rl dashboard small.yaml" in text


def test_the_panel_shows_trial_score_best_and_time(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    spec = make_spec()
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    panel = LiveDisplay(console)
    panel.opens(spec, [])
    study = runner.run(spec).study
    panel.trial_ends(study.trials[0], study.trials[:1])
    panel.trial_starts(1, study.trials[1].user_attrs["configuration"])
    panel.evaluated(1, 1, 0.25, {"loss": 1.5})
    picture = Console(file=io.StringIO(), width=100)
    picture.print(panel._render())
    panel.closes()
    text = picture.file.getvalue()
    for part in ("1 of 3 trials", "trial 1", "lr ", "score 0.2500", "best", "left", "▁"):
        assert part in text


def test_a_terminal_is_left_as_it_was(study_file: Callable[..., Path]) -> None:
    file = study_file({"budget": 2})
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "optuna_lora_rl", "run", str(file)],
        stdout=terminal,
        stderr=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
    )
    os.close(terminal)
    written = b""
    while True:
        try:
            chunk = os.read(controller, 4096)
        except OSError:
            break
        written += chunk
    assert process.wait() == 0 and process.stderr is not None
    assert process.stderr.read() == b""
    # The cursor is hidden while the panel moves and shown again at the end.
    assert written.rfind(b"\x1b[?25h") > written.rfind(b"\x1b[?25l") >= 0
    assert b"Finished: 2 of 2 trials" in written


def test_numbers_are_written_as_people_write_them() -> None:
    assert wording.number(3.2e-4) == "3.2e-4" and wording.number(0.05) == "0.05"
    assert wording.number(0.0) == "0" and wording.number(2.5e-17) == "0"
    assert wording.number(16) == "16" and wording.number(1234567) == "1.23e6"
    assert wording.number(True) == "True" and wording.number("qv") == "qv"
    times = (0.04, 4.21, 9.96, 59.6, 130, 1800, 3599.7, 3725, 7200, 90_000)
    said = "0.0 s, 4.2 s, 10 s, 1 min, 2 min 10 s, 30 min, 1 h, 1 h 2 min, 2 h, 25 h"
    assert ", ".join(map(wording.duration, times)) == said
    counts = (999, 999.96e3, 4_884_480, 134_515_008, 7.24e9)
    assert ", ".join(map(wording.count, counts)) == "999, 1 M, 4.88 M, 134.5 M, 7.24 G"
    assert wording.sparkline([0.0, None, 1.0]) == "▁·█"
    configuration = {"lora_rank": 16, "lora_alpha": 32.0, "use_dora": True, "max_steps": 40}
    tuned = ["lora_rank", "lora_alpha_ratio", "use_dora"]
    assert wording.compact(configuration, tuned) == "r 16 · α 32 · DoRA"


def test_lines_name_the_trial_from_its_first_moment(make_spec: MakeSpec) -> None:
    written = io.StringIO()
    lines = display.LineDisplay(Console(file=written, width=120), every=0.05)
    lines.opens(make_spec(), [])
    lines.works_on(Activity("proposing"))
    lines.trial_starts(3, {})
    # A wait is worth a line from two seconds on.
    deadline = time.monotonic() + 20
    while "trial 3" not in written.getvalue() and time.monotonic() < deadline:
        time.sleep(0.05)
    lines.closes()
    assert "trial 3: starting (2" in written.getvalue() and "proposing" not in written.getvalue()
