# Fixtures are imported by name and then asked for by name.
# ruff: noqa: F811

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest

from optuna_lora_rl import samplers
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import opening
from tests.study.conftest import MakeSpec
from tests.study.conftest import make_spec  # noqa: F401
from tests.study.conftest import study_file  # noqa: F401


def _earlier(folder: Path, *names: str, trials: int = 4) -> str:
    """An output folder of an earlier run whose best learning rate is near 8e-3."""
    folder.mkdir(exist_ok=True)
    url = f"sqlite:///{folder / 'study.db'}"
    distributions = {"learning_rate": optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True)}
    for name in names:
        study = optuna.create_study(study_name=name, storage=url, direction="maximize")
        for k in range(trials):
            lr = 10 ** (-3.6 + 0.5 * k)
            study.add_trial(
                optuna.trial.create_trial(
                    params={"learning_rate": lr},
                    distributions=distributions,
                    value=-abs(math.log10(lr) + 2.1),
                )
            )
    return url


def _first_source(make_spec: MakeSpec, transfer_from: list[object]) -> str:
    spec = make_spec({"sampler": {"name": "rl"}, "transfer_from": transfer_from})
    study = opening.open_study(spec, heartbeat=False)
    opening.propose(spec, study.ask())
    trial = study.trials[0]
    assert trial.params["learning_rate"] > 2e-3
    return str((samplers.proposal(trial) or {})["source"])


def test_a_run_starts_from_an_earlier_runs_folder(make_spec: MakeSpec, tmp_path: Path) -> None:
    _earlier(tmp_path / "first", "first")
    assert _first_source(make_spec, [str(tmp_path / "first")]) == "transfer"


def test_one_of_several_studies_is_named(make_spec: MakeSpec, tmp_path: Path) -> None:
    url = _earlier(tmp_path / "two", "a", "b")
    with pytest.raises(UserError, match=r"transfer_from: .*two holds 2 studies \(a, b\); say"):
        _first_source(make_spec, [str(tmp_path / "two")])
    assert _first_source(make_spec, [{"study": "b", "storage": url}]) == "transfer"


def test_mistakes_are_named(make_spec: MakeSpec, tmp_path: Path) -> None:
    _earlier(tmp_path / "out", "small")
    _earlier(tmp_path / "short", "short", trials=2)
    for entry, sentence in (
        ("nothing", "there is no study 'nothing' in sqlite.*it holds 1 studies"),
        ("small", "'small' is this study itself"),
        (str(tmp_path / "gone"), "there is no database .*gone/study.db"),
        (str(tmp_path / "short"), "'short' has 2 trials with a result, but at least 3"),
    ):
        with pytest.raises(UserError, match=sentence):
            _first_source(make_spec, [entry])
    with pytest.raises(UserError, match=r"transfer_from is given, but sampler\.name is 'tpe'"):
        make_spec({"sampler": {"name": "tpe"}, "transfer_from": ["a"]})
    with pytest.raises(UserError, match="give study, storage, or both"):
        make_spec({"sampler": {"name": "rl"}, "transfer_from": [{}]})
