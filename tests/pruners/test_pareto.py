from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from optuna_lora_rl import pruners
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.pruners import ParetoPruner

STEPS = range(1, 9)
FRONT = ((0.5, 0.2), (0.6, 0.5), (0.8, 1.0), (0.9, 1.5))


def curve(end: float) -> list[float]:
    return [end - 0.3 / step for step in STEPS]


def tuned(
    points: Any,
    pruner: optuna.pruners.BasePruner | None = None,
    directions: tuple[str, str] = ("maximize", "minimize"),
    storage: str | None = None,
) -> list[int]:
    """Tune trials that come to (quality, cost); returns how many reports each made."""
    study = optuna.create_study(
        directions=directions, pruner=pruner or ParetoPruner(), storage=storage
    )
    signs = [1 if direction == "maximize" else -1 for direction in directions]
    made: list[int] = []

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        end, cost = points[trial.number]
        made.append(0)
        for step, quality in zip(STEPS, curve(end), strict=True):
            pruners.report(trial, (signs[0] * quality, -signs[1] * cost), step)
            made[-1] += 1
            if pruners.should_prune(trial):
                raise optuna.TrialPruned
        return signs[0] * curve(end)[-1], -signs[1] * cost

    study.optimize(objective, n_trials=len(points))
    assert all(t.state.name in ("COMPLETE", "PRUNED") for t in study.trials)
    return made


@pytest.mark.parametrize(
    "directions", [("maximize", "minimize"), ("minimize", "maximize"), ("minimize", "minimize")]
)
def test_dominated_runs_are_stopped_and_those_on_the_front_are_not(directions: Any) -> None:
    dominated, cheap, best = (0.4, 1.2), (0.2, 0.1), (0.95, 2.0)
    made = tuned([*FRONT, dominated, cheap, best], directions=directions)
    assert made[:4] == [8] * 4
    assert made[4] < 8
    assert made[5:] == [8, 8]


def test_reports_reach_other_workers_through_the_storage(tmp_path: Path) -> None:
    made = tuned([*FRONT, (0.4, 1.2)], storage=f"sqlite:///{tmp_path}/study.db")
    assert made[4] < 8


def test_equal_cost_is_no_way_out() -> None:
    assert tuned([*FRONT, (0.3, 1.0)])[4] < 8


def test_a_run_within_the_noise_of_the_front_goes_on() -> None:
    assert tuned([*FRONT, (0.78, 1.0)], ParetoPruner(noise=0.05))[4] == 8


def test_a_run_that_diverges_is_stopped() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"], pruner=ParetoPruner())
    trial = study.ask()
    pruners.report(trial, (math.nan, 1.0), step=1)
    assert pruners.should_prune(trial)


@pytest.mark.parametrize("lost", [(math.nan, 1.2), (0.1, math.nan)])
def test_a_report_that_is_no_number_is_left_out(lost: tuple[float, float]) -> None:
    pruner = ParetoPruner(last_step=8)
    study = optuna.create_study(directions=["maximize", "minimize"], pruner=pruner)
    for end, cost in FRONT:
        trial = study.ask()
        for step in range(1, 9):
            pruners.report(trial, (end - 0.3 / step, cost), step)
        study.tell(trial, (end, cost))
    trial = study.ask()
    said = []
    for step, values in enumerate([lost, (0.1, 2.0), (0.1, 2.0), (0.1, 2.0)], start=1):
        pruners.report(trial, values, step)
        said.append(pruners.should_prune(trial))
    assert said == [True, False, True, True]


@settings(max_examples=30, deadline=None)
@given(
    others=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 2)), min_size=4, max_size=8),
    lead=st.floats(0, 1),
)
def test_who_is_ahead_in_quality_is_never_stopped(others: Any, lead: float) -> None:
    own = (max(end for end, _ in others) + lead, 3.0)
    assert tuned([*others, own])[-1] == 8


def test_with_one_objective_the_pair_is_optunas_own() -> None:
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=1.0))
    trial = study.ask()
    pruners.report(trial, 0.5, step=1)
    assert not pruners.should_prune(trial)
    pruners.report(trial, [2.0], step=2)
    assert pruners.should_prune(trial)
    assert study.trials[0].intermediate_values == {1: 0.5, 2: 2.0}


def test_no_pruner_stops_nobody_and_others_say_that_they_cannot() -> None:
    directions = ["maximize", "minimize"]
    study = optuna.create_study(directions=directions, pruner=optuna.pruners.NopPruner())
    trial = study.ask()
    pruners.report(trial, (math.nan, 1.0), step=1)
    assert not pruners.should_prune(trial)
    study = optuna.create_study(directions=directions)
    with pytest.raises(UserError, match=r"MedianPruner cannot judge 2 objectives.*ParetoPruner"):
        pruners.should_prune(study.ask())


@pytest.mark.parametrize(
    ("values", "step", "said"),
    [(0.5, 1, "1 values.*2 objectives"), ((1, 2, 3), 1, "3 values"), ((1, 2), -1, "step is -1")],
)
def test_wrong_reports_are_refused_in_a_sentence(values: Any, step: int, said: str) -> None:
    trial = optuna.create_study(directions=["maximize", "minimize"]).ask()
    with pytest.raises(UserError, match=said):
        pruners.report(trial, values, step)


def test_one_objective_is_refused_in_a_sentence() -> None:
    study = optuna.create_study(pruner=ParetoPruner())
    trial = study.ask()
    trial.report(1.0, 1)
    with pytest.raises(UserError, match="'pareto' needs several objectives"):
        trial.should_prune()
