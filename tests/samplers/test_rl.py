"""What RLSampler promises beyond the contract of any sampler (``test_contract.py``)."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

import optuna_lora_rl
from optuna_lora_rl import RLSampler
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.policy.decision import Settings
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.samplers import proposal
from optuna_lora_rl.samplers.history import read_history
from optuna_lora_rl.samplers.history import space_of
from optuna_lora_rl.samplers.observation import recent_and_best

Objective = Callable[[optuna.Trial], float]


def _lora(best: float, low: float = 1e-6, high: float = 1e-1) -> Objective:
    """A ridge of learning rate and alpha / rank with a cliff; the rest matters less."""

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("learning_rate", low, high, log=True)
        rank = trial.suggest_int("lora_rank", 2, 256, log=True)
        alpha = trial.suggest_int("lora_alpha", 1, 512, log=True)
        targets = trial.suggest_categorical("target_modules", ["qv", "attention", "all-linear"])
        dropout = trial.suggest_float("lora_dropout", 0.0, 0.3)
        off = math.log10(lr / best) + 0.5 * math.log10(alpha / rank / 2)
        if off > 1.2:
            raise FloatingPointError
        size = {"qv": 0.1, "attention": 0.05, "all-linear": 0.0}[targets]
        return 1 - math.exp(-2 * off * off) + 0.1 / rank**0.5 + size + 0.1 * dropout

    return objective


def _study(objective: Objective, trials: int, **arguments: object) -> optuna.Study:
    study = optuna.create_study(sampler=RLSampler(**{"seed": 0, **arguments}))
    study.optimize(objective, n_trials=trials, catch=(FloatingPointError,))
    return study


@pytest.mark.parametrize("lr", ["learning_rate", "lr"])
@pytest.mark.parametrize("rank", ["r", "lora_rank", "lora_r"])
def test_the_first_trial_is_what_a_guide_recommends(lr: str, rank: str) -> None:
    study = optuna.create_study(sampler=RLSampler(seed=3))
    trial = study.ask()
    alpha = trial.suggest_int("lora_alpha", 1, 512)
    chosen_rank = trial.suggest_categorical(rank, [4, 8, 16, 32, 64, 128])
    assert chosen_rank in (16, 32)
    assert 1e-4 <= trial.suggest_float(lr, 1e-6, 1e-2, log=True) <= 5e-4
    assert trial.suggest_float("lora_dropout", 0, 0.2) == 0
    assert trial.suggest_categorical("target_modules", ["qv", "all-linear"]) == "all-linear"
    assert 16 <= alpha <= 64
    second = study.ask()
    second.suggest_categorical(rank, [4, 8, 16, 32, 64, 128])
    assert second.params != trial.params


def test_alpha_asked_after_the_rank_is_twice_the_rank() -> None:
    trial = optuna.create_study(sampler=RLSampler(seed=0)).ask()
    rank = trial.suggest_int("lora_rank", 4, 256, log=True)
    assert 1 <= trial.suggest_int("lora_alpha", 1, 512, log=True) / rank <= 2.3


@pytest.mark.parametrize(("low", "high", "best"), [(1e-5, 1e-1, 5e-3), (1e-4, 1.0, 3e-2)])
def test_it_lets_go_of_the_guide_within_five_trials(low: float, high: float, best: float) -> None:
    nearest = []
    for seed in range(3):
        study = _study(_lora(best, low, high), 5, seed=seed)
        tried = [trial.params["learning_rate"] for trial in study.trials]
        nearest.append(min(abs(math.log10(lr / best)) for lr in tried))
    assert np.median(nearest) < 0.6


def test_it_beats_random_search_on_a_lora_surface() -> None:
    def median_best(sampler: Callable[[int], optuna.samplers.BaseSampler]) -> float:
        found = []
        for seed in range(5):
            study = optuna.create_study(sampler=sampler(seed))
            study.optimize(_lora(1e-3), n_trials=10, catch=(FloatingPointError,))
            found.append(study.best_value)
        return float(np.median(found))

    learned = median_best(lambda seed: RLSampler(seed=seed))
    random = median_best(lambda seed: optuna.samplers.RandomSampler(seed=seed))
    assert learned < 0.5 * random


def test_it_maximises_a_function_it_knows_nothing_of() -> None:
    def objective(trial: optuna.Trial) -> float:
        x, y = trial.suggest_float("x", -3, 3), trial.suggest_float("y", -3, 3)
        return -((x - 1.234) ** 2) - (y + 0.567) ** 2

    study = optuna.create_study(direction="maximize", sampler=RLSampler(seed=0))
    study.optimize(objective, n_trials=25)
    assert study.best_value > -0.01


def test_what_failed_is_not_proposed_again_and_small_spaces_are_exhausted() -> None:
    def objective(trial: optuna.Trial) -> float:
        choice = trial.suggest_categorical("choice", list("abcdefgh"))
        if choice in "bdf":
            raise FloatingPointError
        return float(ord(choice))

    study = _study(objective, 12)
    tried = [trial.params["choice"] for trial in study.trials]
    assert sorted(tried[:8]) == list("abcdefgh")
    assert not set(tried[8:]) & set("bdf")


def test_a_trial_says_why_it_was_proposed() -> None:
    study = _study(_lora(1e-3), 3)
    first, second, third = (proposal(trial) for trial in study.trials)
    assert first == {"source": "default"}
    assert second is not None
    judged = {"source", "mean", "std", "log_ei", "log_prior", "log_feasible"}
    assert set(second) == judged | {"residual", "network", "logit"}
    assert third is not None
    assert set(third) == set(second) | {"value", "value_std"}
    assert all(math.isfinite(v) for v in third.values() if isinstance(v, float))
    assert third["residual"] + third["network"] == pytest.approx(third["logit"])


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_a_prediction_comes_in_the_units_of_the_objective(direction: str) -> None:
    sign = 1.0 if direction == "minimize" else -1.0
    study = optuna.create_study(direction=direction, sampler=RLSampler(seed=0, learned=False))
    study.optimize(lambda t: 500 + sign * 80 * (t.suggest_float("x", 0, 1) - 0.3) ** 2, 12)
    said = [(proposal(trial), trial.value) for trial in study.trials[7:]]
    for why, value in said:
        assert why is not None
        assert why["value"] == pytest.approx(value, abs=5 + 2 * why["value_std"])


def test_conditional_parameters_are_proposed_together_with_the_rest() -> None:
    def objective(trial: optuna.Trial) -> float:
        if trial.suggest_categorical("use_dora", [False, True]):
            return abs(trial.suggest_float("dora_scale", 0, 1) - 0.3)
        return 0.4 + 0.2 * (trial.suggest_float("other", 0, 1) - 0.6) ** 2

    study = _study(objective, 20)
    late = [trial for trial in study.trials if trial.number > 6]
    assert all(proposal(trial).keys() > {"source"} for trial in late)  # type: ignore[union-attr]
    assert study.best_value < 0.1


def test_several_objectives_spread_along_the_front() -> None:
    def objective(trial: optuna.Trial) -> tuple[float, float]:
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        return x**2 + y, (x - 1) ** 2 + y

    study = optuna.create_study(directions=["minimize"] * 2, sampler=RLSampler(seed=0))
    study.optimize(objective, n_trials=30)
    front = sorted(trial.params["x"] for trial in study.best_trials)
    assert len(front) >= 6
    assert front[-1] - front[0] > 0.6


def test_it_covers_more_of_a_front_than_tpe_and_nsga_ii() -> None:
    """ZDT1 (Zitzler, Deb & Thiele 2000) with five parameters; hypervolume above (1.1, 6)."""
    space = {f"x{i}": FloatDistribution(0, 1) for i in range(5)}

    def covered(sampler: optuna.samplers.BaseSampler) -> float:
        study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
        points = []
        for _ in range(20):
            trial = study.ask(space)
            x = list(trial.params.values())
            g = 1 + 9 * sum(x[1:]) / 4
            points.append((x[0], g * (1 - math.sqrt(x[0] / g))))
            study.tell(trial, points[-1])
        # Strips between one point of the front and the next.
        area, lowest = 0.0, 6.0
        for first, second in sorted(points):
            if second < lowest:
                area += (1.1 - first) * (lowest - second)
                lowest = second
        return area

    peers = [optuna.samplers.TPESampler(seed=0), optuna.samplers.NSGAIISampler(seed=0)]
    assert covered(RLSampler(seed=0)) > 1.2 * max(covered(peer) for peer in peers)


def test_a_long_study_is_remembered_by_its_best_and_its_latest() -> None:
    study = optuna.create_study()
    distributions = {"x": optuna.distributions.FloatDistribution(0, 1)}
    for i in range(500):
        study.add_trial(
            optuna.create_trial(
                params={"x": i / 500}, distributions=distributions, value=abs(i - 100.0)
            )
        )
    history = recent_and_best(
        read_history(study.trials, space_of(distributions), study.directions)
    )
    assert len(history) <= 200
    assert {100, 499} <= set(history.numbers.tolist())
    study.sampler = RLSampler(seed=0)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert study.trials[-1].state == TrialState.COMPLETE


def test_roles_and_the_horizon_can_be_given() -> None:
    study = optuna.create_study(
        sampler=RLSampler(seed=0, n_trials=10, roles={"speed": "learning_rate", "k": "rank"})
    )
    trial = study.ask()
    assert 1e-4 <= trial.suggest_float("speed", 1e-6, 1e-2, log=True) <= 5e-4
    assert 16 <= trial.suggest_int("k", 1, 300, log=True) <= 32


def test_without_its_network_it_still_proposes() -> None:
    def rank_first(trial: optuna.Trial) -> float:
        trial.suggest_int("lora_rank", 2, 256, log=True)
        return _lora(1e-3)(trial)

    with_network, without = _study(rank_first, 6), _study(rank_first, 6, learned=False)
    # The guides' configuration, once at their learning rate and once at the surfaces'.
    guides, surfaces = (dict(study.trials[0].params) for study in (with_network, without))
    assert surfaces.pop("learning_rate") > guides.pop("learning_rate")
    assert surfaces == guides
    assert [t.params for t in with_network.trials] != [t.params for t in without.trials]


def test_the_surfaces_tell_their_share_in_a_proposal_for_ten_trials() -> None:
    study = _study(_lora(1e-3), 12, learned=False)
    shares = [(proposal(trial) or {}).get("surfaces") for trial in study.trials]
    assert shares[0] is None  # proposed parameter by parameter
    assert all(0 < share <= 1 for share in shares[1:10])
    assert shares[10:] == [None, None]
    told = optuna_lora_rl.explain(study).origins[1]
    assert any("what LoRA runs usually respond to" in remark for remark in told.remarks)


def test_the_surfaces_are_silent_with_several_objectives() -> None:
    def objective(trial: optuna.Trial) -> tuple[float, float]:
        return _lora(1e-3)(trial), float(trial.params["lora_rank"])

    proposed = []
    for silenced in (False, True):
        study = optuna.create_study(
            directions=["minimize", "minimize"], sampler=RLSampler(seed=0, learned=False)
        )
        if silenced:
            study.sampler._settings = Settings(bank=False)
        study.optimize(objective, n_trials=5)
        proposed.append([trial.params for trial in study.trials])
    assert proposed[0] == proposed[1]


def test_its_network_is_silent_where_it_recognises_nothing() -> None:
    def plain(trial: optuna.Trial) -> float:
        x, y = (trial.suggest_float(name, -5.0, 5.0) for name in ("x0", "x1"))
        return (x - 1) ** 2 + 3 * (y + 2) ** 2

    with_network, without = _study(plain, 8), _study(plain, 8, learned=False)
    assert [t.params for t in with_network.trials] == [t.params for t in without.trials]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"n_trials": 0}, "n_trials is 0"),
        ({"n_candidates": 3}, "n_candidates is 3"),
        ({"roles": {"lr": "speed"}}, "roles: lr is 'speed', but must be one of learning_rate"),
        ({"weights": "nowhere.safetensors"}, "weights: there is no file nowhere.safetensors"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RLSampler(**arguments)


def test_it_stays_on_the_cpu_whatever_the_programs_default_device() -> None:
    usual = _study(_lora(1e-3), 4)
    torch.set_default_device("meta")
    try:
        elsewhere = _study(_lora(1e-3), 4)
    finally:
        torch.set_default_device("cpu")
    assert [t.params for t in elsewhere.trials] == [t.params for t in usual.trials]


def test_it_works_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _study(_lora(1e-3), 6)


def test_it_is_light_to_import() -> None:
    code = (
        "import sys; from optuna_lora_rl import RLSampler; RLSampler();"
        "print(*sorted({m.split('.')[0] for m in sys.modules}"
        " & {'transformers', 'trl', 'peft', 'scipy', 'sklearn', 'pandas', 'datasets'}))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == ""


def test_a_constraint_is_learnt_and_its_limit_is_found() -> None:
    study = optuna.create_study(sampler=RLSampler(seed=0))
    space = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    for _ in range(20):
        trial = study.ask(space)
        x, y = trial.params["x"], trial.params["y"]
        trial.set_constraint("x", x - 0.4)
        study.tell(trial, (y - 0.5) ** 2 - x)
    late = [trial.params["x"] for trial in study.trials[10:]]
    assert sum(x > 0.4 for x in late) <= 3
    assert max(x for x in late if x <= 0.4) > 0.37


def test_a_constraint_that_only_says_kept_or_broken_is_mostly_kept() -> None:
    """Ranks and batches that pay take memory; whoever proposes by what pays breaks the limit."""
    space = {
        "learning_rate": FloatDistribution(1e-5, 1e-2, log=True),
        "lora_rank": optuna.distributions.IntDistribution(2, 256, log=True),
        "batch_size": optuna.distributions.CategoricalDistribution([4, 8, 16, 32, 64]),
    }
    late = []
    for seed in range(3):
        study, kept = optuna.create_study(sampler=RLSampler(seed=seed)), []
        for number in range(20):
            trial = study.ask(space)
            rank, batch = trial.params["lora_rank"], trial.params["batch_size"]
            off = math.log10(trial.params["learning_rate"]) + 3.2
            value = off**2 - 0.1 * math.log2(rank) - 0.1 * math.log2(batch)
            broken = rank / 64 + batch / 16 > 1.6
            kept += [] if broken else [value]
            late += [broken] if number >= 10 else []
            trial.set_constraint("memory", float(broken))
            study.tell(trial, value)
        assert min(kept) < -0.85
    assert sum(late) <= len(late) / 2


def test_neither_a_failed_trial_nor_its_close_neighbours_are_proposed_again() -> None:
    """The function rises towards a corner where every run fails."""
    study = optuna.create_study(sampler=RLSampler(seed=1))
    space = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    failed: list[np.ndarray] = []
    for _ in range(25):
        trial = study.ask(space)
        point = np.array([trial.params["x"], trial.params["y"]])
        if len(failed) >= 2:
            assert min(np.abs(point - other).max() for other in failed) > 0.029
        if point.sum() > 1.2:
            failed.append(point)
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, -point.sum())
    assert 2 <= len(failed) <= 8
    assert study.best_value < -1


def test_the_lora_of_exploration_is_no_lora() -> None:
    names = [Dimension(name, "float") for name in ("learning_rate", "exploration_fraction")]
    assert not make_space(names).is_lora
    assert make_space([*names, Dimension("my_lora_thing", "float")]).is_lora


def test_numpy_seeds_and_another_default_type_are_welcome() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        study = optuna.create_study(sampler=RLSampler(seed=np.int64(3)))
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    finally:
        torch.set_default_dtype(before)
    assert len(study.trials) == 3
