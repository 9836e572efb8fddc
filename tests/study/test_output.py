"""A study touches nothing in its folder that it did not make, and leaves nothing half made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from optuna_lora_rl import tune
from optuna_lora_rl.cli import app
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import runner
from tests.study.conftest import SMALL
from tests.study.conftest import MakeSpec

pytestmark = pytest.mark.usefixtures("paper")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "name", ["best/notes.txt", "adapters/trial-0000/mine.bin", "report.html", "notes", ".git/HEAD"]
)
def test_a_folder_that_holds_anything_of_the_users_is_refused_and_left_as_it_is(
    make_spec: MakeSpec, tmp_path: Path, name: str
) -> None:
    own = tmp_path / "out" / name
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and holds no study \(it holds ") as refused:
        runner.run(make_spec())
    assert "\n" not in str(refused.value)
    assert contents(tmp_path / "out") == {name: b"mine"}


def test_hidden_files_and_the_studys_own_database_may_lie_there(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".gitignore").write_text("*")
    assert runner.run(make_spec({"budget": 1})).best_adapter == tmp_path / "out" / "best"
    assert (tmp_path / "out" / ".gitignore").read_text() == "*"


@pytest.mark.parametrize("kind", ["a file", "a link", "a folder"])
def test_a_best_that_no_study_made_is_not_replaced(
    make_spec: MakeSpec, tmp_path: Path, kind: str
) -> None:
    runner.run(make_spec({"budget": 1}))
    best, own = tmp_path / "out" / "best", tmp_path / "own"
    best.rename(tmp_path / "moved")
    own.mkdir()
    (own / "mine").write_text("mine")
    if kind == "a link":
        best.symlink_to(own)
    elif kind == "a file":
        best.write_text("mine")
    else:
        own.rename(best)
    with pytest.raises(UserError, match=f"best is {kind} that no study made"):
        runner.run(make_spec({"budget": 2}))
    assert (best if kind == "a file" else best / "mine").read_text() == "mine"
    best.unlink() if kind != "a folder" else best.rename(own)
    assert runner.run(make_spec({"budget": 2})).best_adapter == best


def test_the_adapters_of_a_study_whose_database_is_gone_are_not_overwritten(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    runner.run(make_spec())
    before = contents(tmp_path / "out" / "best")
    (tmp_path / "out" / "study.db").unlink()
    with pytest.raises(UserError, match="adapters of an earlier study 'small' that the storage"):
        runner.run(make_spec())
    assert contents(tmp_path / "out" / "best") == before


@pytest.mark.parametrize("name", ["..", ".", "a\tb", "n" * 300])
def test_a_name_that_is_no_folders_name_is_refused(make_spec: MakeSpec, name: str) -> None:
    with pytest.raises(UserError, match=r"name is .* names a folder too"):
        make_spec({"name": name})


@pytest.mark.parametrize("name", ["{x}", "%41", "a?b=c", "#h", "sp ace", "größe", "[x]", "{0}"])
def test_a_study_lies_in_the_folder_that_was_named(
    make_spec: MakeSpec, study_file: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    runner.run(make_spec({"output": str(tmp_path / name), "sampler": "random"}))
    assert {"study.db", "best", "report.html"} <= {p.name for p in (tmp_path / name).iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {name, "small.yaml"}
    shown = CliRunner().invoke(app, ["status", str(tmp_path / "small.yaml")])
    assert shown.exit_code == 0 and "3 of 3 trials" in shown.output
    # As an earlier study it is found by its folder.
    again = {"output": str(tmp_path / "again"), "budget": 1, "sampler": "rl"}
    runner.run(make_spec({**again, "transfer_from": [str(tmp_path / name)]}))


def test_calls_of_tune_with_other_arguments_are_other_studies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {"model": "tiny", "train": "tiny:dates-small", "space": SMALL["space"]}
    first = tune(**arguments, trials=1)
    other = tune(**arguments, trials=1, objective={"cost_weight": 0.2})
    assert first.adapter != other.adapter
    assert len(tune(**arguments, trials=2).study.trials) == 2
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_report_is_whole_or_not_there(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runner.run(make_spec({"budget": 1}))
    before = contents(tmp_path / "out")["report.html"]
    write = Path.write_text

    def full(self: Path, text: str, *rest: object, **more: object) -> int:
        if "report" in self.name:
            write(self, text[: len(text) // 2], encoding="utf-8")
            raise OSError(28, "No space left on device", str(self))
        return write(self, text, *rest, **more)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="no room is left"):
        runner.run(make_spec({"budget": 2}))
    assert contents(tmp_path / "out")["report.html"] == before
    monkeypatch.undo()


@pytest.mark.parametrize("command", ["run", "status", "best", "report"])
def test_a_command_makes_again_what_a_killed_worker_did_not_finish(
    make_spec: MakeSpec, tmp_path: Path, command: str
) -> None:
    spec = make_spec()
    best = runner.run(spec).study.best_trial
    folder = spec.folder
    (folder / "report.html").unlink()
    (folder / "best").rename(folder / ".best-123")
    done = CliRunner().invoke(app, [command, str(tmp_path / "small.yaml")])
    assert done.exit_code == 0, done.output
    assert (folder / "report.html").read_text().rstrip().endswith("</html>")
    assert json.loads((folder / "best" / "best.json").read_text())["trial"] == best.number
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".best")]
