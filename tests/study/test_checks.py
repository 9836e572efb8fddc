"""What validate finds out before anything is loaded, written or trained, and run with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl import cli
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import wording
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner

StudyFile = Callable[..., Path]


def ended(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    said = capsys.readouterr()
    return exit.value.code, said.out, said.err


def copy_of(folder: Path, target: Path, *, without: str = "") -> Path:
    shutil.copytree(folder, target)
    for file in target.glob(without) if without else ():
        file.unlink()
    return target


@pytest.fixture
def obstacles(tmp_path: Path, random_llama: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Changes of a file that cannot run, each with words of the sentence."""
    (tmp_path / "file").write_text("")
    (tmp_path / "junk.db").write_text("no database at all")
    bare = copy_of(random_llama, tmp_path / "bare", without="*.safetensors")
    mute = copy_of(random_llama, tmp_path / "mute", without="*token*")
    odd = copy_of(random_llama, tmp_path / "odd")
    (odd / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "a", "reply": "b"}) + "\n")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(9)))
    return {
        "model folder": ({"model": "./no-such"}, "model.name: there is no folder './no-such'"),
        "model name": ({"model": "a--b/c d"}, "nor the name of a model on the hub"),
        "model offline": ({"model": "owner/name"}, "HF_HUB_OFFLINE forbids to fetch it"),
        "model file": ({"model": str(tmp_path / "file")}, "name the folder that holds the model"),
        "no config": ({"model": str(tmp_path / "empty")}, "holds no model (config.json)"),
        "bad config": ({"model": str(odd)}, "has a config.json that cannot be read"),
        "no weights": ({"model": str(bare)}, "holds no weights"),
        "no tokenizer": ({"model": str(mute)}, "holds no tokenizer"),
        "data": ({"data.train": "no-such.jsonl"}, "data.train: there is no file 'no-such.jsonl'"),
        "columns": ({"data.train": str(rows)}, "has the columns 'question', 'reply'"),
        "validation": ({"data.validation": str(text)}, "holds text examples, but data.train"),
        "metric": (
            {"data.train": str(text), "objective.metric": "exact_match"},
            "compares answers, but text examples ask nothing",
        ),
        "output": ({"output": str(tmp_path / "file" / "out")}, "output: the folder"),
        "storage": (
            {"storage": f"sqlite:///{tmp_path}/file/study.db"},
            "storage: the folder",
        ),
        "damaged": ({"storage": f"sqlite:///{tmp_path}/junk.db"}, "is no SQLite database"),
        "server": ({"storage": "postgresql://me@127.0.0.1:9/x"}, "storage: "),
        "earlier": (
            {"sampler": "rl", "transfer_from": [str(tmp_path / "empty")]},
            "transfer_from: there is no database",
        ),
    }


CASES = ["model folder", "model name", "model offline", "model file", "no config", "bad config"]
CASES += ["no weights", "no tokenizer", "data", "columns", "validation", "metric", "output"]
CASES += ["storage", "damaged", "server", "earlier"]


@pytest.mark.parametrize("case", CASES)
def test_validate_refuses_in_a_sentence_what_run_cannot_begin_with(
    case: str,
    obstacles: dict[str, tuple[dict[str, Any], str]],
    study_file: StudyFile,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    paper: type[PaperTuner],
) -> None:
    changes, words = obstacles[case]
    file = study_file(changes)
    before = sorted(path for path in tmp_path.rglob("*"))
    for command in ("validate", "run"):
        code, _, error = ended([command, str(file)], capsys)
        assert code == 2 and words in error, error
        assert error.startswith("error: ") and error.count("\n") == 1
    assert sorted(path for path in tmp_path.rglob("*")) == before and not paper.seeds


def test_several_obstacles_are_listed_one_a_line(
    study_file: StudyFile, capsys: pytest.CaptureFixture[str]
) -> None:
    file = study_file({"model": "./no-such", "data.train": "no-such.jsonl"})
    code, _, error = ended(["validate", str(file)], capsys)
    assert code == 2
    assert error.splitlines() == [
        "error: 2 things stand in the way:",
        "  - model.name: there is no folder './no-such'",
        "  - data.train: there is no file 'no-such.jsonl'",
    ]


@pytest.mark.parametrize(
    "case", ["best/mine", "report.html", "link", "other study", "no database"]
)
def test_validate_refuses_a_folder_that_run_refuses(
    case: str,
    make_spec: MakeSpec,
    study_file: StudyFile,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    paper: type[PaperTuner],
) -> None:
    out = tmp_path / "out"
    changes: dict[str, Any] = {"budget": 1}
    words = "is not empty and holds no study"
    if case in ("best/mine", "report.html"):
        (out / case).parent.mkdir(parents=True)
        (out / case).write_text("mine")
    else:
        runner.run(make_spec(changes))
    if case == "link":
        (out / "best").rename(tmp_path / "own")
        (out / "best").symlink_to(tmp_path / "own")
        words = "best is a link that no study made"
    elif case == "other study":
        changes["name"], words = "other", "holds the adapters of the study 'small'"
    elif case == "no database":
        (out / "study.db").unlink()
        words = "that the storage knows nothing of"
    file = study_file(changes)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    for command in ("validate", "run"):
        code, _, error = ended([command, str(file)], capsys)
        assert code == 2 and words in error, error
        assert error.startswith("error: ") and error.count("\n") == 1
        assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_validate_names_a_study_of_another_problem_and_creates_nothing(
    make_spec: MakeSpec,
    study_file: StudyFile,
    paper: type[PaperTuner],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    before = sorted(tmp_path.rglob("*"))
    file = study_file()
    assert ended(["validate", str(file)], capsys)[0] == 0
    assert sorted(tmp_path.rglob("*")) == sorted([*before, file])
    runner.run(make_spec())
    assert ended(["validate", str(file)], capsys)[0] == 0
    code, _, error = ended(["validate", str(study_file({"data.max_length": 64}))], capsys)
    assert code == 2
    assert "data.max_length was 512 and is now 64" in error
    two = study_file({"objective.objectives": ["quality", "cost"]})
    code, _, error = ended(["validate", str(two)], capsys)
    assert code == 2 and "was begun with 1 objective(s)" in error


def test_validate_says_how_the_data_is_read(
    study_file: StudyFile, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"question": "a", "reply": "b", "source": "web"}
    rows.write_text(json.dumps(row) + "\n" + json.dumps({**row, "question": "c"}) + "\n")
    columns = {"prompt": "question", "completion": "reply"}
    file = study_file({"data.train": str(rows), "data.columns": columns})
    code, said, _ = ended(["validate", str(file)], capsys)
    assert code == 0 and "The file is valid." in said
    assert "data.train: prompt-completion (prompt from question, completion from reply)" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "./no-such"], "there is no folder './no-such'"),
        (["--train", "no-such.jsonl"], "there is no file 'no-such.jsonl'"),
        (["--train", "./no-such"], "there is no folder './no-such'"),
        (["--train", "tiny:no-such"], "no-such"),
    ],
)
def test_init_refuses_a_model_or_data_that_are_not_there(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    code, _, error = ended(["init", str(file), *arguments], capsys)
    assert code == 2 and words in error and not file.exists()


def test_init_says_what_it_could_not_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    code, said, _ = ended(["init", str(file), "--model", "owner/name"], capsys)
    assert code == 0 and file.exists()
    assert "not checked: owner/name is no local file or folder" in said


def test_the_commands_that_are_printed_run_as_they_stand(
    study_file: StudyFile, tmp_path: Path
) -> None:
    # Neither the script nor its interpreter is on PATH, as after `make study`.
    environment = os.environ | {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [sys.executable, "-m", "optuna_lora_rl", "init", str(tmp_path / "new.yaml")]
    said = subprocess.run(started, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    command = said.stdout.split("next: ")[1].strip().replace(" run ", " validate ")
    again = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "The file is valid." in again.stdout, again.stderr


def test_the_programs_name_is_short_where_the_shell_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    script = python.with_name("optuna-lora-rl")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert wording.program() == ".venv/bin/python -m optuna_lora_rl"
    script.touch(mode=0o755)
    assert wording.program() == ".venv/bin/optuna-lora-rl"
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin")
    assert wording.program() == "optuna-lora-rl"
