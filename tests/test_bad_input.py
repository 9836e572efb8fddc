"""What is said of bad input: one sentence, exit status 2, no traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from optuna_lora_rl import cli
from tests.study.conftest import SMALL
from tests.study.conftest import merged

# Keys of a good file that are changed, and what has to be said.
IN_THE_FILE: dict[str, tuple[dict[str, Any], str]] = {
    "unknown section": ({"modle": "tiny"}, "modle is not a known key; did you mean model?"),
    "unknown key": (
        {"objective.cost_wieght": 0.2},
        "objective.cost_wieght is not a known key; did you mean cost_weight?",
    ),
    "unknown key far from any": ({"budget": {"zzz": 1}}, "known are cost, hours, trials"),
    "wrong type": ({"budget": "many"}, "budget.trials is 'many', but must be a whole number"),
    "a boolean for a number": (
        {"budget": {"trials": True}},
        "budget.trials is True, but must be a whole number",
    ),
    "fraction of a trial": ({"budget": 2.5}, "budget.trials is 2.5, but must be a whole number"),
    "no trials": ({"budget": 0}, "budget.trials is 0, but must be at least 1"),
    "no time": ({"budget": {"hours": 0.0}}, "budget.hours is 0.0, but must be more than 0"),
    "no end": (
        {"budget": {"trials": None}},
        "give at least one of trials, hours, wall_hours and cost",
    ),
    "missing data": ({"data": None}, "data is missing; it has to be given"),
    "empty data": ({"data.train": ""}, "data.train is '', but must not be empty"),
    "not a section": ({"objective": 3}, "objective is 3, but must hold keys with values"),
    "unknown metric": (
        {"objective.metric": "bleu"},
        "objective.metric is 'bleu', but must be 'loss', 'token_accuracy', 'exact_match'",
    ),
    "negative weight": (
        {"objective.cost_weight": -1},
        "objective.cost_weight is -1, but must be at least 0",
    ),
    "no cost at all": (
        {"objective.cost": {"time": 0, "memory": 0, "parameters": 0}},
        "objective.cost: time, memory and parameters are all 0",
    ),
    "odd objectives": (
        {"objective.objectives": ["cost"]},
        "objective.objectives is ['cost']; it is [score] or [quality, cost]",
    ),
    "unknown sampler": ({"sampler": "hyperopt"}, "sampler.name is 'hyperopt', but must be 'rl'"),
    "unknown sampler option": (
        {"sampler": {"name": "tpe", "startup": 3}},
        "sampler 'tpe' has no option 'startup' (did you mean 'n_startup_trials'?)",
    ),
    "negative seed": ({"sampler": {"seed": -1}}, "sampler.seed is -1, but must be at least 0"),
    "unknown pruner": ({"pruner": "asha"}, "pruner.name is 'asha', but must be 'none'"),
    "pruner option of a wrong type": (
        {"pruner": {"name": "median", "n_warmup_steps": "two"}},
        "option 'n_warmup_steps' is 'two', but must be a whole number",
    ),
    "pruner for two objectives": (
        {"objective.objectives": ["quality", "cost"], "pruner": "median"},
        "pruner 'median' cannot be used with 2 objectives",
    ),
    "sampler for one objective": (
        {"objective.objectives": ["quality", "cost"], "sampler": "cmaes"},
        "sampler 'cmaes' works with one objective",
    ),
    "nothing tuned": (
        {"space": {"max_steps": 24, "batch_size": 8}},
        "space tunes nothing, so that every trial would run the same configuration",
    ),
    "unknown parameter": ({"space.lora_rnk": 4}, "did you mean lora_rank?"),
    "empty range": (
        {"space.lora_rank": {"low": 8, "high": 2}},
        "space.lora_rank: the range is empty",
    ),
    "log range from zero": (
        {"space.lora_dropout": {"low": 0.0, "high": 0.3, "log": True}},
        "a log range needs low > 0",
    ),
    "half a range": ({"space.lora_rank": {"low": 2}}, "space.lora_rank: keys ['low'] do not fit"),
    "value out of range": ({"space.lora_rank": 0}, "space.lora_rank: 0 is out of range"),
    "value of a wrong type": ({"space.learning_rate": "fast"}, "'fast' is not a number"),
    "choice that is not allowed": ({"space.bias": ["none", "some"]}, "'some' is not allowed"),
    "choice given twice": ({"space.batch_size": [4, 4]}, "name a value twice"),
    "unknown target set": (
        {"space.target_modules": ["qv", "heads"]},
        "space.target_modules: 'heads' is not known",
    ),
    "name of a preset": ({"target_sets": {"qv": ["q_proj"]}}, "taken by a preset"),
    "circle": (
        {"space.lora_rank": "2 * lora_alpha", "space.lora_alpha": "2 * lora_rank"},
        "depend on each other in a circle",
    ),
    "unknown role of a column": ({"data.columns": {"question": "q"}}, "'question' is no role"),
    "no validation set": (
        {"data.validation_fraction": 1.5},
        "data.validation_fraction is 1.5, but must be less than 1",
    ),
    "argument that a trial sets": (
        {"training.extra": {"learning_rate": 1e-4}},
        "training.extra.learning_rate is set by each trial",
    ),
    "unknown tracker": ({"training.report_to": ["excel"]}, "training.report_to.0 is 'excel'"),
    "name with a slash": (
        {"name": "a/b"},
        "name is 'a/b', but names a folder too and must have no slash",
    ),
    "url of no database": ({"storage": "study.db"}, "study.db is not a database URL"),
    "database that cannot be reached": (
        {"storage": "postgresql+psycopg://me:secret@127.0.0.1:1/x"},
        "the database postgresql+psycopg://me:***@127.0.0.1:1/x cannot be used",
    ),
    "storage that is a folder": ({"storage": "sqlite:////tmp"}, "/tmp is a folder"),
    "folder that cannot be written": ({"output": "/proc/none"}, "/proc/none cannot be created"),
    "missing data file": ({"data.train": "missing.jsonl"}, "missing.jsonl"),
    "unknown task": ({"data.train": "tiny:datse-small"}, "dates-small"),
    "missing model folder": ({"model": "./missing"}, "model.name: there is no folder './missing'"),
    "hub model without a network": ({"model": "nobody/nothing"}, "nobody/nothing"),
    "modules that the model does not have": (
        {"target_sets": {"mine": ["c_attn"]}, "space.target_modules": "mine"},
        "c_attn",
    ),
    "generated metric on plain text": (
        {"data.train": "tiny:sources-small", "objective.metric": "exact_match"},
        "objective.metric: exact_match compares answers",
    ),
}

# The text of a file that cannot be read at all.
UNREADABLE: dict[str, tuple[str, str]] = {
    "empty": ("", "is empty"),
    "list": ("- tiny\n", "holds a list, not keys with values"),
    "no YAML": ("model: tiny: x\n", "line 1, column 12: this is not valid YAML"),
    "tab": ("model:\n\tname: tiny\n", "line 2, column 1: this is not valid YAML"),
    "key given twice": ("data: a\nmodel: tiny\ndata: b\n", "line 3: the key data is given twice"),
    "key that is a number": ("1: tiny\n", "line 1: 1 is not a key name"),
}

# Rows of a data file, keys of the study, and what has to be said.
DATA: dict[str, tuple[str, dict[str, Any], str]] = {
    "no rows": ("", {}, "train"),
    "no JSON": ("{not json}\n", {}, "line 1"),
    "columns missing": ('{"question": "a", "answer": "b"}\n' * 20, {}, "columns"),
    "column that is not there": (
        '{"prompt": "a", "completion": "b"}\n' * 20,
        {"data.columns": {"prompt": "q"}},
        "'q'",
    ),
    "nothing left to validate": ('{"prompt": "a", "completion": "b"}\n' * 20, {}, "validation"),
}

COMMANDS: dict[str, tuple[list[str], str]] = {
    "missing file": (["run", "missing.yaml"], "missing.yaml: there is no such file"),
    "folder for a file": (["validate", "."], ". is a folder; name a YAML file"),
    "override without a value": (
        ["validate", "FILE", "--set", "budget.trials"],
        "--set budget.trials: use key=value",
    ),
    "override through a value": (
        ["validate", "FILE", "--set", "output.x=1"],
        "--set output.x=1: output is",
    ),
    "override that is no YAML": (["validate", "FILE", "--set", "space=[1"], "not valid YAML"),
    "override with a bad value": (
        ["run", "FILE", "--set", "budget.trials=-3"],
        "budget.trials is -3, but must be at least 1",
    ),
    "init over a file": (["init", "FILE"], "exists; --force overwrites it"),
    "status before the first run": (["status", "FILE"], "has not begun"),
    "best before the first run": (["best", "FILE"], "has not begun"),
    "the folder of nobody": (
        ["init", "other.yaml", "--model", "~no-such-user"],
        "--model: name is '~no-such-user', but nobody has that name",
    ),
    "an address as a model": (
        ["init", "other.yaml", "--model", "https://me:secret@host/m"],
        "--model: name is an address",
    ),
    "a name that is too long": (["truncate", "x" * 3000], "File name too long"),
    "tell without JSON": (["tell", "FILE", "trial 3"], "not valid JSON"),
    "tell without a trial": (["tell", "FILE", "{}"], "must be a JSON object such as"),
    "tell with an unknown key": (
        ["tell", "FILE", '{"trial": 0, "vaule": 1}'],
        "unknown key vaule",
    ),
    "unknown contestant": (
        ["compare", "FILE", "-o", "out", "--samplers", "rl,best"],
        "--samplers: 'best' is not known",
    ),
}


def said_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints to stderr, after checking that it ends as it should."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert "Traceback" not in printed.err
    # What a slow machine says of its progress may come before.
    _, found, error = ("\n" + printed.err).partition("\nerror: ")
    assert found
    return f"error: {error}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, changes: dict[str, Any]) -> str:
    content = merged(SMALL | {"output": str(folder / "out")}, changes)
    (folder / "small.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return "small.yaml"


@pytest.mark.parametrize("case", IN_THE_FILE)
def test_mistakes_in_the_file(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, sentence = IN_THE_FILE[case]
    said = said_of(["run", write(folder, changes)], capsys)
    assert sentence in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("case", UNREADABLE)
def test_files_that_cannot_be_read(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, sentence = UNREADABLE[case]
    (folder / "small.yaml").write_text(text, encoding="utf-8")
    said = said_of(["validate", "small.yaml"], capsys)
    assert sentence in said and "small.yaml" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_used(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, changes, sentence = DATA[case]
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    said = said_of(["run", write(folder, {"data": {"train": "rows.jsonl"}, **changes})], capsys)
    assert sentence in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("case", COMMANDS)
def test_mistakes_on_the_command_line(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, sentence = COMMANDS[case]
    file = write(folder, {})
    said = said_of([file if part == "FILE" else part for part in arguments], capsys)
    assert sentence in said


def test_all_mistakes_of_a_file_are_listed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(folder, {"budget": 0, "objective.metric": "bleu", "trainnig": {}})
    said = said_of(["validate", file], capsys)
    assert "small.yaml has 3 mistakes" in said
    assert all(key in said for key in ("budget.trials", "objective.metric", "training?"))
