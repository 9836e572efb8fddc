"""``optuna-lora-rl explain``, and what the report says the trials taught."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from xml.etree import ElementTree

import pytest
from rich.console import Console

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import explaining
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import runner
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner


@pytest.fixture
def printed() -> tuple[Console, Callable[[], str]]:
    console = Console(width=160, record=True, file=StringIO())
    return console, console.export_text


def test_each_trial_is_explained_and_the_figure_is_written(
    paper: type[PaperTuner], make_spec: MakeSpec, printed: tuple[Console, Callable[[], str]]
) -> None:
    console, text = printed
    spec = make_spec({"budget": 8, "sampler": {"name": "rl"}})
    study = runner.run(spec).study
    figure = explaining.show(console, study, spec)
    said = text()
    assert "the guides' configuration" in said and "learning_rate" in said
    narrow = Console(width=50, file=StringIO())
    explaining.show(narrow, study, spec)
    assert "learning_rate" in narrow.file.getvalue()
    assert said.count("±") >= 6
    assert figure is not None and "usual in LoRA runs" in figure.read_text()

    assert explaining.show(console, study, spec, number=5) is None
    said = text()
    assert "trial" in said and "kept of the proposal" in said and "log_ei" in said
    with pytest.raises(UserError, match="--trial is 8, but the study's trials are 0 to 7"):
        explaining.show(console, study, spec, number=8)


def test_a_trial_that_is_run_again_says_so(
    paper: type[PaperTuner], make_spec: MakeSpec, printed: tuple[Console, Callable[[], str]]
) -> None:
    console, text = printed
    paper.failures = [KeyboardInterrupt()]
    spec = make_spec({"budget": 3, "sampler": {"name": "random"}})
    runner.run(spec)
    study = runner.run(spec).study
    explaining.show(console, study, spec)
    assert "trial 0 again, which was cut short" in text()


def test_a_study_with_two_trials_says_what_is_missing(
    paper: type[PaperTuner], make_spec: MakeSpec, printed: tuple[Console, Callable[[], str]]
) -> None:
    console, text = printed
    spec = make_spec({"budget": 2})
    runner.run(spec)
    assert explaining.show(console, opening.load_study(spec), spec) is None
    assert "Three results or more are needed" in text()
    assert explaining.section(opening.load_study(spec), spec) == ""


def test_the_reports_charts_are_valid_svg(paper: type[PaperTuner], make_spec: MakeSpec) -> None:
    changes = {
        "budget": 8,
        "space": {
            "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "lora_rank": 8,
            "target_modules": ["qv", "all-linear"],
        },
    }
    spec = make_spec(changes)
    study = runner.run(spec).study
    part = explaining.section(study, spec)
    pictures = [f"<svg{rest.split('</svg>')[0]}</svg>" for rest in part.split("<svg")[1:]]
    assert pictures
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.findall("{*}polygon") and root.findall("{*}circle")
    assert "0.001" in pictures[0] and "The predicted score" in part
