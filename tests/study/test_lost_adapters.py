"""Adapters of earlier trials that are damaged or gone, and what a study does without them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl import cli
from optuna_lora_rl.samplers import process
from optuna_lora_rl.study import adapters
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import runner
from optuna_lora_rl.study.spec import StudySpec
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner
from tests.test_saved_adapters import FILES
from tests.test_saved_adapters import WAYS
from tests.test_saved_adapters import damaged


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a real study of one trial, whose test split is still to be read."""
    from optuna_lora_rl.study import spec as study_spec
    from tests.study.conftest import SMALL

    folder = tmp_path_factory.mktemp("finished") / "out"
    spec = study_spec.parse(
        {**SMALL, "name": "small", "output": str(folder), "budget": 1}, "small"
    )
    runner.run(spec).study.set_user_attr("test", {})
    return folder


def resumed(make_spec: MakeSpec, finished: Path, file: str, how: str) -> tuple[StudySpec, Path]:
    """A copy of the study whose adapter is damaged."""
    spec = make_spec({"budget": 1})
    shutil.copytree(finished, spec.folder)
    folder = adapters.folder_of(spec.folder, 0)
    damaged(folder, file, how)
    return spec, folder


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", WAYS)
def test_a_study_goes_on_without_an_adapter_and_says_so(
    file: str,
    how: str,
    finished: Path,
    make_spec: MakeSpec,
    study_file: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec, _ = resumed(make_spec, finished, file, how)
    shutil.rmtree(spec.folder / "best")
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(study_file({"budget": 1}))])
    said = " ".join(capsys.readouterr().out.split())
    assert not ended.value.code
    assert "the adapter of trial 0, the best, is lost" in said and file in said
    assert " best " in said and "best adapter" not in said.partition("lost")[2]
    assert not (spec.folder / "best").exists()


def test_the_published_copy_stands_in_for_a_damaged_adapter(
    finished: Path, make_spec: MakeSpec, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    from optuna_lora_rl.study import adapters

    spec, _ = resumed(make_spec, finished, FILES[0], "truncated")
    result = runner.run(spec)
    assert result.best_adapter == spec.folder / "best" and not result.lost
    assert "loss" in result.study.user_attrs["test"]
    AutoPeftModelForCausalLM.from_pretrained(str(result.best_adapter))
    assert not adapters.to_peft(result.study, spec, tmp_path / "out-there")
    AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "out-there"))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", WAYS)
def test_the_best_that_is_left_is_published_with_a_word(
    file: str, how: str, paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    first = runner.run(make_spec({"budget": 5}))
    best = first.study.best_trial
    spec = make_spec({"budget": 7})
    damaged(adapters.folder_of(spec.folder, best.number), file, how)
    shutil.rmtree(spec.folder / "best")
    result = runner.run(spec)
    # The case is what it is meant to be.
    assert result.study.best_trial.number == best.number
    left = max(result.study.trials[5:], key=lambda trial: trial.value or 0)
    assert result.best_adapter == spec.folder / "best"
    facts = json.loads((spec.folder / "best" / "best.json").read_text())
    assert facts["trial"] == left.number and facts["score"] == left.value
    said = f"trial {best.number}, the best, is lost"
    assert said in result.lost and f"holds that of trial {left.number}" in result.lost
    assert said in (spec.folder / "report.html").read_text()


def test_an_adapter_of_another_machine_is_not_lost(
    paper: type[PaperTuner], make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec({"budget": 2})
    best = runner.run(spec).study.best_trial
    shutil.rmtree(spec.folder / "best")
    shutil.rmtree(adapters.folder_of(spec.folder, best.number))
    monkeypatch.setattr(process, "machine", lambda: {"host": "another"})
    there = adapters.best_there(opening.load_study(spec).trials, spec.folder)
    assert there.folder is None and not there.lost


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", WAYS)
def test_what_is_damaged_is_not_exported(
    file: str,
    how: str,
    finished: Path,
    make_spec: MakeSpec,
    study_file: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from peft import LoraConfig

    spec, _ = resumed(make_spec, finished, file, how)
    shutil.rmtree(spec.folder / "best")
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(study_file({"budget": 1})), "-o", str(tmp_path / "it")])
    said = " ".join(capsys.readouterr().out.split())
    assert not ended.value.code
    assert "wrote the adapter_config.json" in said and file in said
    assert [path.name for path in (tmp_path / "it").iterdir()] == ["adapter_config.json"]
    assert LoraConfig.from_pretrained(str(tmp_path / "it")).r >= 2


def test_tune_gives_no_adapter_of_another_trial(
    paper: type[PaperTuner], make_spec: MakeSpec, tmp_path: Path
) -> None:
    from optuna_lora_rl.study.tuning import tune

    wanted: dict[str, Any] = {"model": "tiny", "train": "tiny:dates-small", "sampler": "tpe"}
    wanted |= {"space": {"learning_rate": [1e-3, 1e-4]}, "output": tmp_path / "tuned"}
    found = tune(trials=3, **wanted)
    damaged(
        adapters.folder_of(tmp_path / "tuned", found.study.best_trial.number), *(FILES[0], "junk")
    )
    shutil.rmtree(tmp_path / "tuned" / "best")
    assert tune(trials=3, **wanted).adapter is None
