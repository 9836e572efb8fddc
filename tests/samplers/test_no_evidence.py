"""What says nothing about configurations changes no proposal; nor does a name met by chance."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from optuna_lora_rl import BanditSampler
from optuna_lora_rl import RLSampler
from optuna_lora_rl.errors import is_outside
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import make_space

Sampler = Callable[[], optuna.samplers.BaseSampler]
SAMPLERS: list[Sampler] = [
    lambda: RLSampler(seed=0),
    lambda: RLSampler(seed=0, learned=False),
    lambda: BanditSampler(seed=0),
]


def _ask(trial: optuna.Trial) -> float:
    rate = trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    rank = trial.suggest_int("lora_rank", 2, 64, log=True)
    return abs(rate / 3e-4 - 1.0) + 1.0 / rank


def _proposed(sampler: Sampler, broken: dict[int, BaseException], trials: int = 7) -> list[dict]:
    """The configurations that came to a result, where some trials raise what is ``broken``."""
    study = optuna.create_study(sampler=sampler())

    def objective(trial: optuna.Trial) -> float:
        value = _ask(trial)
        if trial.number in broken:
            raise broken[trial.number]
        return value

    while len(study.get_trials(states=(TrialState.COMPLETE,))) < trials:
        try:
            study.optimize(objective, n_trials=1)
        except (Exception, KeyboardInterrupt):
            continue
    return [t.params for t in study.trials if t.state == TrialState.COMPLETE]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interrupted_study_proposes_what_it_would_have_proposed(sampler: Sampler) -> None:
    whole = _proposed(sampler, {})
    # Also in the first trial, and twice in a row.
    broken = dict.fromkeys((0, 3, 4), KeyboardInterrupt())
    assert _proposed(sampler, broken) == whole


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("bitsandbytes"), OSError(errno.ENOSPC, "full"), ConnectionError("lost")],
)
def test_what_fails_outside_the_configuration_leaves_no_trace(error: Exception) -> None:
    whole = _proposed(SAMPLERS[0], {})
    assert _proposed(SAMPLERS[0], {2: error, 5: error}) == whole
    # The same configuration once more: it may ask for what is not there.
    assert _proposed(SAMPLERS[0], {2: error, 3: error}) != whole


def test_other_errors_and_no_numbers_are_evidence() -> None:
    whole = _proposed(SAMPLERS[0], {})
    for error in (RuntimeError("diverged"), MemoryError(), ValueError("rank")):
        assert not is_outside(error)
        assert _proposed(SAMPLERS[0], {2: error}) != whole
    cause = RuntimeError("training failed")
    cause.__cause__ = ConnectionError("lost")
    assert is_outside(cause)


_KILLED = """
    import os, optuna
    from optuna_lora_rl import RLSampler
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = "sqlite:///{file}"
    study = optuna.load_study(study_name="s", storage=storage, sampler=RLSampler(seed=0))
    def objective(trial):
        trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
        trial.suggest_int("lora_rank", 2, 64, log=True)
        os._exit(9)
    study.optimize(objective, n_trials=1)
"""


def test_a_killed_process_leaves_no_trace(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    study = optuna.create_study(study_name="s", storage=storage, sampler=RLSampler(seed=0))
    study.optimize(_ask, n_trials=3)
    code = textwrap.dedent(_KILLED.format(file=tmp_path / "s.db"))
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 9
    stale = study.trials[3]
    assert stale.state == TrialState.RUNNING and stale.params
    study.optimize(_ask, n_trials=2)
    told = [t.params for t in study.trials if t.state == TrialState.COMPLETE]
    assert told == _proposed(SAMPLERS[0], {}, trials=5)
    # So it is where the storage noticed its silence.
    study._storage.set_trial_state_values(stale._trial_id, TrialState.FAIL)
    study.optimize(_ask, n_trials=1)
    told = [t.params for t in study.trials if t.state == TrialState.COMPLETE]
    assert told == _proposed(SAMPLERS[0], {}, trials=6)


def test_one_name_by_chance_makes_no_lora_study() -> None:
    by_chance = {
        "learning_rate": Dimension("learning_rate", "float", 1e-5, 1.0, log=True),
        "batch_size": Dimension("batch_size", "int", 16, 256),
        "dropout": Dimension("dropout", "float", 0.0, 0.5),
        "rank": Dimension("rank", "int", 2, 64),
    }
    other = Dimension("max_depth", "int", 2, 16)
    for dimension in by_chance.values():
        space = make_space([dimension, other])
        assert not space.is_lora and not space.role_columns
    several = [by_chance[name] for name in ("learning_rate", "batch_size", "dropout")]
    assert not make_space([*several, other]).role_columns
    assert make_space([*several, by_chance["rank"]]).is_lora
    # Whoever gives a role says that it is one.
    assert make_space([*several, other], {"dropout": "dropout"}).is_lora
    assert not make_space([*several, other], {"dropout": "none"}).is_lora


@pytest.mark.parametrize("learned", [True, False])
def test_a_study_of_another_trade_proposes_as_if_no_name_were_known(learned: bool) -> None:
    def proposed(**roles: str) -> list[dict]:
        sampler = RLSampler(seed=1, learned=learned, n_candidates=64, roles=roles)
        study = optuna.create_study(sampler=sampler)

        def objective(trial: optuna.Trial) -> float:
            rate = trial.suggest_float("learning_rate", 1e-4, 1.0, log=True)  # asked for first
            depth = trial.suggest_int("tree_depth", 2, 12)
            return (rate - 0.1) ** 2 + 0.01 * (depth - 5) ** 2

        study.optimize(objective, n_trials=5)
        return [t.params for t in study.trials]

    found = proposed()
    # The first value is the middle of the range.
    assert found[0]["learning_rate"] == pytest.approx(1e-2)
    assert found == proposed(learning_rate="none")
    assert found != proposed(learning_rate="learning_rate")
