"""Two different problems never mix in one study."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest

from optuna_lora_rl import tiny
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import runner
from optuna_lora_rl.study.problem import PROBLEM
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner

pytestmark = pytest.mark.usefixtures("paper")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"objective.cost_weight": 0.2},
            "objective.cost_weight was 0.1 and is now 0.2: scores of the study 'small' would not "
            "compare; choose another study name or storage",
        ),
        ({"data.max_length": 64}, "data.max_length was 512 and is now 64"),
        ({"training.seed": 1}, "training.seed was 0 and is now 1"),
        ({"space.max_steps": 8}, "space.max_steps was 4 and is now 8"),
        ({"space.bias": ["none", "all"]}, "space.bias was fixed at 'none' and is now tuned"),
        ({"space.lora_rank": 4}, "space.lora_rank was tuned and is now fixed at 4"),
        (
            {"space.target_modules": ["qv", "mlp"]},
            "space.target_modules was a choice of qv, attention and is now a choice of qv, mlp",
        ),
        (
            {"space.lora_rank": {"low": 2, "high": 8}},
            "space.lora_rank was a log int range and is now a linear int range",
        ),
        (
            {"objective.objectives": ["quality", "cost"]},
            "was begun with 1 objective(s): choose another study name or storage",
        ),
    ],
)
def test_another_problem_is_refused_with_the_difference(
    make_spec: MakeSpec, changes: dict[str, Any], sentence: str
) -> None:
    runner.run(make_spec({"budget": 1}))
    with pytest.raises(UserError) as refused:
        runner.run(make_spec(changes))
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": {"trials": 2, "hours": 1.0}},
        {"budget": 2, "sampler": "random"},
        {"budget": 2, "pruner": "median"},
        {"budget": 2, "training.report_to": ["tensorboard"]},
        {"budget": 2, "space.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}},
    ],
)
def test_what_may_change(make_spec: MakeSpec, changes: dict[str, Any]) -> None:
    runner.run(make_spec({"budget": 1}))
    assert len(runner.run(make_spec(changes)).study.trials) == 2


def forget(study: optuna.Study, *keys: str) -> None:
    """Leaves the stored problem as a version that had no such keys would have left it."""
    stored = study.user_attrs[PROBLEM]
    study.set_user_attr(PROBLEM, {key: stored[key] for key in stored.keys() - set(keys)})


def test_a_study_begun_before_a_key_existed_goes_on_while_the_key_has_its_default(
    make_spec: MakeSpec,
) -> None:
    study = runner.run(make_spec({"budget": 1})).study
    keys = ("training.rank_change.patience", "space.truncate_energy", "target_sets")
    forget(study, *keys)
    assert len(runner.run(make_spec({"budget": 2})).study.trials) == 2
    assert study.user_attrs[PROBLEM].keys() >= set(keys)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"training.first_evaluation": 0.5},
            "training.first_evaluation was 'auto' and is now 0.5",
        ),
        ({"space.truncate_energy": 0.9}, "space.truncate_energy was 1.0 and is now 0.9"),
        (
            {"space.truncate_energy": {"low": 0.5, "high": 1.0}},
            "space.truncate_energy was fixed at 1.0 and is now tuned",
        ),
    ],
)
def test_a_study_begun_before_a_key_existed_is_refused_where_the_key_now_says_something(
    make_spec: MakeSpec, changes: dict[str, Any], sentence: str
) -> None:
    study = runner.run(make_spec({"budget": 1})).study
    forget(study, "training.first_evaluation", "space.truncate_energy")
    with pytest.raises(UserError) as refused:
        runner.run(make_spec(changes))
    assert sentence in str(refused.value)


def test_an_empty_section_that_now_says_something_is_no_vanished_key(
    make_spec: MakeSpec,
) -> None:
    runner.run(make_spec({"budget": 1}))
    with pytest.raises(UserError) as refused:
        runner.run(make_spec({"data.columns": {"prompt": "q"}}))
    assert "data.columns.prompt was not set and is now 'q'" in str(refused.value)
    assert "data.columns was" not in str(refused.value)


def test_before_the_first_trial_anything_may_change(
    make_spec: MakeSpec, paper: type[PaperTuner], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: PaperTuner, *_: object) -> None:
        raise UserError("data.columns: no such column")

    with monkeypatch.context() as patch:
        patch.setattr(paper, "prepare", refuse)
        with pytest.raises(UserError, match="no such column"):
            runner.run(make_spec())
    changed = {"data.max_length": 100, "objective.objectives": ["quality", "cost"]}
    assert runner.run(make_spec(changed)).ended_by == "budget"


def test_a_data_file_that_changed_is_refused(
    make_spec: MakeSpec, study_file: Callable[..., Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    changes = {"data": {"train": str(rows)}, "budget": 1}
    runner.run(make_spec(changes))
    rows.write_text('{"text": "b"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl \(data.train\) has changed"):
        runner.run(make_spec(changes))


@pytest.mark.parametrize("key", ["model", "data"])
def test_files_that_are_not_read_may_come_and_go(
    make_spec: MakeSpec, tmp_path: Path, key: str
) -> None:
    folder = tmp_path / key
    if key == "model":
        shutil.copytree(tiny.MODELS["tiny"], folder)
        read, changes = folder / "model.safetensors", {"model": str(folder)}
    else:
        folder.mkdir()
        (folder / "validation.jsonl").write_text('{"text": "c"}\n')
        read = folder / "train.jsonl"
        read.write_text('{"text": "a"}\n')
        changes = {"data": {"train": str(folder)}}
    # Its own output lies there too.
    changes |= {"output": str(folder / "out")}
    runner.run(make_spec(changes | {"budget": 1}))
    (folder / "README.md").write_text("what it is")
    (folder / "results.json").write_text("{}")
    (folder / "notes.txt").write_text("")
    assert len(runner.run(make_spec(changes | {"budget": 2})).study.trials) == 2
    # Of the same size.
    read.write_bytes(read.read_bytes()[:-3] + b'z"}' if key == "data" else bytes(1000))
    with pytest.raises(UserError, match=rf"\({key}\.\w+\) has changed"):
        runner.run(make_spec(changes | {"budget": 3}))


def test_a_study_of_another_program_is_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'other.db'}"
    optuna.create_study(study_name="small", storage=url, direction="maximize").ask()
    with pytest.raises(UserError, match="begun by another program"):
        runner.run(make_spec({"storage": url}))


def test_a_study_whose_losses_were_means_over_batches_does_not_go_on(make_spec: MakeSpec) -> None:
    study = runner.run(make_spec({"budget": 1})).study
    before = dict(study.user_attrs[PROBLEM])
    del before["objective.loss"]
    study.set_user_attr(PROBLEM, before)
    with pytest.raises(UserError, match="is now 'cross-entropy, mean over tokens'"):
        runner.run(make_spec({"budget": 2}))


def test_results_of_another_number_of_objectives_are_one_sentence(make_spec: MakeSpec) -> None:
    spec = make_spec({"budget": 1})
    runner.run(spec)
    change(
        spec.folder / "study.db",
        "INSERT INTO trial_values (trial_id, objective, value, value_type)"
        " VALUES (1, 1, 0.5, 'FINITE')",
    )
    with pytest.raises(UserError, match=r"damaged .*\(trial 0 has 2 of 1 values\)"):
        opening.load_study(spec)
    change(
        spec.folder / "study.db",
        "INSERT INTO study_directions (direction, study_id, objective) VALUES ('MINIMIZE', 1, 1)",
    )
    with pytest.raises(UserError, match=r"its study has 2 objectives, and the file 1"):
        opening.load_study(spec)


def change(file: Path, command: str) -> None:
    """Changes a database behind Optuna's back."""
    with closing(sqlite3.connect(file)) as database:
        database.execute(command)
        database.commit()
