"""What a trial records of its layers: in a file, found wherever the study is looked at."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from optuna_lora_rl.samplers import process
from optuna_lora_rl.study import layers
from optuna_lora_rl.study import report
from optuna_lora_rl.study import runner
from tests.study.conftest import MakeSpec
from tests.study.test_rank_report import CHANGE
from tests.study.test_rank_report import READ

RANKS = {"model.layers.0.q_proj": 4, "model.layers.1.q_proj": 6}


@pytest.fixture
def recorded(paper: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every trial record something of its layers."""
    keep = layers.keep
    known: dict[str, Any] = {"ranks": RANKS, "rank_changes": [CHANGE], "monitor": READ}
    monkeypatch.setattr(
        layers,
        "keep",
        lambda folder, number, result: keep(folder, number, dataclasses.replace(result, **known)),
    )


@pytest.mark.usefixtures("recorded")
def test_they_are_kept_beside_the_adapters_and_outlive_them(make_spec: MakeSpec) -> None:
    spec = make_spec({"budget": 3})
    study = runner.run(spec).study
    assert len(list((spec.folder / "adapters").iterdir())) == 1
    for trial in study.trials:
        found = layers.read(trial, spec.folder)
        assert found.ranks == RANKS and found.rank_changes == [CHANGE] and found.monitor == READ
        assert not found.missing
        # The database holds the file's hash alone.
        assert not trial.user_attrs.keys() & set(layers.HELD)
        assert len(json.dumps(trial.user_attrs[layers.ATTRIBUTE])) < 200
    notes = study._storage.get_study_system_attrs(study._study_id).values()
    assert any("layers/trial-0000.json" in str(note) for note in notes)
    assert [file.name for file in sorted((spec.folder / "layers").iterdir())] == [
        f"trial-{number:04d}.json" for number in range(3)
    ]


@pytest.mark.usefixtures("recorded")
def test_a_worker_that_shares_only_the_database_is_told_where_they_are(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = process.machine()
    monkeypatch.setattr(process, "machine", lambda: {**here, "host": "elsewhere"})
    spec = make_spec({"budget": 1})
    study = runner.run(spec).study
    monkeypatch.undo()
    assert socket.gethostname() != "elsewhere"
    shutil.rmtree(spec.folder / "layers")
    where = f"on the machine that ran it, in {spec.folder.absolute()} on elsewhere"
    missing = layers.read(study.best_trial, spec.folder).missing
    assert missing == f"the layers of trial 0 are {where}"
    assert f"Note:</b> {missing}." in report.write(study, spec).read_text()
    facts = report.best_facts(study, spec)
    assert facts is not None and facts["note"] == missing and "ranks" not in facts


@pytest.mark.usefixtures("recorded")
def test_a_file_that_is_not_the_trials_own_is_not_shown(make_spec: MakeSpec) -> None:
    spec = make_spec({"budget": 1})
    trial = runner.run(spec).study.best_trial
    file = layers.file_of(spec.folder, 0)
    file.write_text(file.read_text().replace("slow", "fast"))
    found = layers.read(trial, spec.folder)
    assert found.missing == f"the layers of trial 0 are lost: {file} is not what the trial wrote"
    assert not found.ranks and found.held == {"ranks", "rank_changes", "monitor"}
    file.unlink()
    assert "cannot be read (No such file" in layers.read(trial, spec.folder).missing


def test_what_earlier_versions_kept_in_the_database_is_read(tmp_path: Path) -> None:
    attributes = {"ranks": RANKS, "rank_changes": [CHANGE], "monitor": READ}
    trial = optuna.trial.create_trial(value=0.5, user_attrs=attributes)
    found = layers.read(trial, tmp_path)
    assert (found.ranks, found.rank_changes, found.monitor) == (RANKS, [CHANGE], READ)
    assert not found.missing


def test_numbers_that_are_none_come_back_as_such(tmp_path: Path) -> None:
    read: dict[str, Any] = {"course": [{"step": 0, "gradient_norm": math.nan}]}
    result: Any = SimpleNamespace(ranks={}, rank_changes=[], monitor=read)
    trial = optuna.trial.create_trial(value=0.5, user_attrs=layers.keep(tmp_path, 0, result))
    trial.number = 0
    assert math.isnan(layers.read(trial, tmp_path).monitor["course"][0]["gradient_norm"])
    assert "NaN" not in layers.file_of(tmp_path, 0).read_text()
