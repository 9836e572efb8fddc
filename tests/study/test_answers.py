"""Answers before and after, and the trial of the guides' configuration."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from optuna.trial import TrialState
from rich.console import Console

from optuna_lora_rl.finetuning.answering import Answers
from optuna_lora_rl.study import card
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import report
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import summary
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner

GUIDES = {"first_trial": "guides", "sampler": "rl"}
MARKUP = "<script>x</script>\x1b[31m|" + "long " * 200


def _says(adapter: Path | None, count: int) -> Answers:
    """The untuned model says markup; the first adapter one right answer, later ones two."""
    expected = ("1999-12-31", "2001-01-01", "c", "d")[:count]
    if adapter is None:
        given = (MARKUP, "", "", "")
    elif adapter.name == "trial-0000":
        given = ("1999-12-31 ", "2001", "", "")
    else:
        given = ("1999-12-31", "2001-01-01", "", "")
    return Answers(
        "test", ("New <b>Year</b>?", "Then?", "C?", "D?")[:count], expected, given[:count]
    )


def _shown(result: runner.RunResult, make: MakeSpec, changes: dict[str, object]) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    summary.ending(console, result, make(changes), command="small.yaml")
    return console.export_text()


def test_the_guides_trial_is_the_first_and_its_adapter_stays(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    spec = make_spec({**GUIDES, "budget": 4})
    result = runner.run(spec)
    first, *rest = result.study.trials
    # The space ends at rank 8, and fixes the batch at 4.
    assert first.params == {"lora_rank": 8, "learning_rate": pytest.approx(2e-4)} | {
        "target_modules": "attention"
    }
    assert first.user_attrs["source"] == "guides"
    assert [outcome.GUIDES in trial.user_attrs for trial in rest] == [False] * 3
    assert outcome.best_of(result.study.trials) != first
    assert (spec.folder / "adapters" / "trial-0000" / "adapter_model.safetensors").exists()
    assert len(list((spec.folder / "adapters").iterdir())) == 2


def test_a_guides_trial_that_was_killed_is_tried_again_as_such(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    paper.failures = [KeyboardInterrupt()]
    runner.run(make_spec({**GUIDES, "budget": 2}))
    result = runner.run(make_spec({**GUIDES, "budget": 2}))
    states = [(t.state, outcome.GUIDES in t.user_attrs) for t in result.study.trials]
    complete = TrialState.COMPLETE
    assert states == [(TrialState.FAIL, True), (complete, True), (complete, False)]
    again = outcome.guides_of(result.study.trials)
    assert again is not None and again.number == 1


def test_no_pruner_stops_the_guides_trial(paper: type[PaperTuner], make_spec: MakeSpec) -> None:
    pruner = {"name": "threshold", "lower": 0.99}
    spec = make_spec({**GUIDES, "budget": 3, "pruner": pruner, "training.evaluations": 4})
    states = [trial.state.name for trial in runner.run(spec).study.trials]
    assert states == ["COMPLETE", "PRUNED", "PRUNED"]


def test_answers_before_and_after_are_shown(paper: type[PaperTuner], make_spec: MakeSpec) -> None:
    paper.says = staticmethod(_says)
    changes = {**GUIDES, "budget": 3, "answers": 4}
    spec = make_spec(changes)
    result = runner.run(spec)
    known = result.study.user_attrs["answers"]
    best = outcome.best_of(result.study.trials)
    assert best is not None and best.number != 0
    assert {name: (one["trial"], one["right"]) for name, one in known["of"].items()} == {
        "untuned": (None, 0),
        "guides": (0, 1),
        "best": (best.number, 2),
    }
    assert all(
        len(one["given"]) == 3 and len(one["given"][0]) <= 600 for one in known["of"].values()
    )
    text = _shown(result, make_spec, changes)
    assert "untuned   guides (trial 0)   best adapter" in text
    said = "Exact match on 4 questions of the test split: untuned 0, guides 1, best adapter 2."
    assert said in " ".join(text.split())
    assert "\x1b" not in text and max(map(len, text.splitlines())) < 120
    page = (spec.folder / report.FILE).read_text(encoding="utf-8")
    assert said in page and "guides (trial 0)" in page
    assert "<script>" not in page and "&lt;script&gt;" in page and "New &lt;b&gt;" in page
    readme = (spec.folder / "best" / card.FILE).read_text(encoding="utf-8")
    assert said in readme and "\x1b" not in readme
    assert r"| New \<b\>Year\</b\>? | 1999-12-31 | \<script\>" in readme
    facts = json.loads((spec.folder / "best" / "best.json").read_text(encoding="utf-8"))
    assert facts["answers"]["of"]["best"]["right"] == 2


def test_answers_are_given_once_for_each_final_best(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    paper.says = staticmethod(_says)
    runner.run(make_spec({"budget": 2, "answers": 16}))
    assert len(paper.answered) == 2
    runner.run(make_spec({"budget": 2, "answers": 16}))
    assert len(paper.answered) == 2
    runner.run(make_spec({"budget": 2, "answers": 3}))
    assert len(paper.answered) == 4


def test_nothing_is_asked_where_nobody_wants_it(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    result = runner.run(make_spec({"budget": 1, "answers": 0}))
    assert paper.answered == []
    assert "answers" not in result.study.user_attrs


def test_data_that_ask_nothing_show_nothing(paper: type[PaperTuner], make_spec: MakeSpec) -> None:
    asking = {"budget": 1, "answers": 16}
    spec = make_spec(asking)
    result = runner.run(spec)
    assert paper.answered == [None]
    assert "Exact match" not in _shown(result, make_spec, asking)
    page = (spec.folder / report.FILE).read_text(encoding="utf-8")
    assert "Answers before and after" not in page and "Before and after" in page
