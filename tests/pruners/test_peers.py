"""What holds for every pruner of our own, and for each of those that rank running peers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from optuna_lora_rl import pruners
from optuna_lora_rl.pruners import AsyncHalvingPruner
from optuna_lora_rl.pruners import CostAwarePruner
from optuna_lora_rl.pruners import ParetoPruner
from optuna_lora_rl.pruners import PeerMedianPruner

OURS = ("async-halving", "peer-median", "cost-aware")
NOISE = 0.02
Curve = Mapping[int, float]

scores = st.floats(-2, 2, allow_nan=False).map(lambda x: round(x, 3))
curves = st.lists(scores, min_size=2, max_size=8).map(lambda v: dict(enumerate(v, start=1)))


def study_of(
    pruner: optuna.pruners.BasePruner,
    peers: Sequence[tuple[TrialState, Curve]],
    direction: str = "maximize",
) -> optuna.Study:
    study = optuna.create_study(direction=direction, pruner=pruner)
    for state, curve in peers:
        if state == TrialState.RUNNING:
            report(study.ask(), curve)
        else:
            value = curve[max(curve)]
            study.add_trial(
                optuna.create_trial(
                    state=state,
                    value=value if math.isfinite(value) else None,
                    intermediate_values=dict(curve),
                )
            )
    return study


def report(trial: optuna.Trial, curve: Curve) -> None:
    for step, value in curve.items():
        trial.report(value, step)


def judged(pruner: Any, peers: Any, own: Curve, direction: str = "maximize") -> list[bool]:
    """What the pruner says after each of a trial's reports, among peers that stand still."""
    trial = study_of(pruner, peers, direction).ask()
    said = []
    for step, value in own.items():
        trial.report(value, step)
        said.append(trial.should_prune())
    return said


def rising(end: float, steps: Sequence[int] = tuple(range(1, 9))) -> dict[int, float]:
    return {step: end - 0.4 * step**-0.75 for step in steps}


def peers_strategy() -> Any:
    states = st.sampled_from([TrialState.RUNNING, TrialState.PRUNED, TrialState.COMPLETE])
    return st.lists(st.tuples(states, curves), max_size=12)


@pytest.mark.parametrize("name", ["async-halving", "peer-median"])
def test_the_worst_of_those_that_run_side_by_side_are_stopped(name: str) -> None:
    study = study_of(pruners.create(name, {"noise": 0.01}, first_step=1), [])
    running = [study.ask() for _ in range(8)]
    for place, trial in enumerate(running):
        trial.report(0.1 * place, 1)
    said = [trial.should_prune() for trial in running]
    assert said[:3] == [True] * 3
    assert said[6:] == [False] * 2


@pytest.mark.parametrize("name", OURS)
def test_the_first_trial_is_never_stopped(name: str) -> None:
    assert not any(judged(pruners.create(name), [], rising(0.1)))


@pytest.mark.parametrize("name", OURS)
def test_a_hopeless_trial_is_stopped_and_the_best_is_not(name: str) -> None:
    peers = [(TrialState.COMPLETE, rising(0.5 + 0.05 * place)) for place in range(8)]
    pruner = pruners.create(name, first_step=1, last_step=8)
    assert any(judged(pruner, peers, rising(-0.5))[:2])
    assert not any(judged(pruner, peers, rising(0.9)))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_trial_that_diverges_is_stopped_at_once(name: str, direction: str, value: float) -> None:
    assert judged(pruners.create(name), [], {1: 0.5, 2: value}, direction) == [False, True]


@pytest.mark.parametrize("name", OURS)
def test_peers_that_diverged_are_the_worst_and_no_obstacle(name: str) -> None:
    diverged = [(TrialState.RUNNING, {1: -0.9, 2: math.nan}), (TrialState.PRUNED, {1: math.nan})]
    good = [(TrialState.COMPLETE, rising(0.5 + 0.05 * place)) for place in range(6)]
    pruner = pruners.create(name, {"noise": 0.01})
    assert not any(judged(pruner, diverged * 4, rising(0.1)))
    assert not any(judged(pruner, good + diverged, rising(0.9)))
    assert any(judged(pruner, good + diverged, rising(-0.5)))


@pytest.mark.parametrize("name", OURS)
def test_equal_trials_all_go_on(name: str) -> None:
    peers = [(TrialState.COMPLETE, rising(0.5))] * 4 + [(TrialState.RUNNING, rising(0.5))] * 4
    assert not any(judged(pruners.create(name, {"noise": 0.0}), peers, rising(0.5)))


@pytest.mark.parametrize("name", OURS)
def test_nothing_is_stopped_at_the_last_step(name: str) -> None:
    peers = [(TrialState.COMPLETE, rising(0.5 + 0.05 * place)) for place in range(8)]
    # The trial reports for the first time where nothing is left to save.
    assert judged(pruners.create(name), peers, {8: -1.0}) == [False]


@pytest.mark.parametrize("name", OURS)
def test_trials_with_other_steps_are_compared_where_their_curves_pass(name: str) -> None:
    peers = [
        (TrialState.COMPLETE, rising(0.5 + 0.05 * place, (10, 20, 40, 80))) for place in range(8)
    ]
    steps = (15, 30, 45, 60, 75)
    pruner = pruners.create(name, first_step=10)
    assert any(judged(pruner, peers, rising(-0.5, steps))[:2])
    assert not any(judged(pruner, peers, rising(0.9, steps)))


@pytest.mark.parametrize("name", OURS)
def test_step_0_is_a_step_like_others(name: str) -> None:
    def from_zero(end: float) -> dict[int, float]:
        return {step - 1: value for step, value in rising(end).items()}

    peers = [(TrialState.COMPLETE, from_zero(0.5 + 0.05 * place)) for place in range(8)]
    assert any(judged(pruners.create(name), peers, from_zero(-0.5)))
    assert not any(judged(pruners.create(name), peers, from_zero(0.9)))


@pytest.mark.parametrize("name", OURS)
def test_trials_of_other_workers_count(name: str, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    here = optuna.create_study(
        storage=storage, study_name="s", direction="maximize", pruner=pruners.create(name)
    )
    there = optuna.load_study(storage=storage, study_name="s")
    for place in range(5):
        trial = there.ask()
        report(trial, rising(0.6 + 0.05 * place))
        there.tell(trial, rising(0.6 + 0.05 * place)[8])
    trial = here.ask()
    report(trial, {1: -0.8, 2: -0.7, 4: -0.6})
    assert trial.should_prune()


@pytest.mark.parametrize("name", OURS)
@settings(max_examples=60, deadline=None)
@given(peers=peers_strategy(), own=curves)
def test_maximising_and_minimising_are_mirror_images(name: str, peers: Any, own: Any) -> None:
    def mirrored(curve: Curve) -> dict[int, float]:
        return {step: -value for step, value in curve.items()}

    pruner = pruners.create(name, {"noise": NOISE})
    turned = [(state, mirrored(curve)) for state, curve in peers]
    assert judged(pruner, peers, own) == judged(pruner, turned, mirrored(own), "minimize")


@pytest.mark.parametrize("name", OURS)
@settings(max_examples=60, deadline=None)
@given(peers=peers_strategy(), own=curves, data=st.data())
def test_the_order_of_the_trials_does_not_matter(
    name: str, peers: Any, own: Any, data: Any
) -> None:
    pruner = pruners.create(name, {"noise": NOISE})
    shuffled = data.draw(st.permutations(peers))
    assert judged(pruner, peers, own) == judged(pruner, shuffled, own)


@pytest.mark.parametrize("name", OURS)
@settings(max_examples=60, deadline=None)
@given(peers=peers_strategy(), lead=st.floats(0.0, 1.0))
def test_who_leads_is_never_stopped(name: str, peers: Any, lead: float) -> None:
    best = {
        step: max([c[step] for _, c in peers if step in c], default=0.0) + lead
        for step in range(1, 9)
    }
    assert not any(judged(pruners.create(name), peers, best))


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.RUNNING])
def test_reports_that_are_no_numbers_are_nobodys_curve(state: TrialState) -> None:
    others = [(state, rising(0.5 + 0.1 * place)) for place in range(5)]
    if state == TrialState.RUNNING:
        others = [(state, {step: of[step] for step in range(1, 8)}) for _, of in others]
    lost = (TrialState.RUNNING, dict.fromkeys(range(1, 8), math.nan))
    own = {1: math.nan, 2: -0.5, 3: -0.5, 4: math.nan, 5: -0.5}
    pruner = CostAwarePruner(last_step=8, noise=0.01)
    # Who diverged at last is lost; who has reported one number alone is not judged.
    assert judged(pruner, [*others, lost], own) == [True, False, True, True, True]


@pytest.mark.parametrize("name", OURS)
@settings(max_examples=60, deadline=None)
@given(
    course=st.lists(scores, min_size=8, max_size=8),
    jitter=st.lists(st.lists(st.floats(-1, 1), min_size=8, max_size=8), min_size=2, max_size=12),
)
def test_differences_within_the_noise_stop_nobody(name: str, course: Any, jitter: Any) -> None:
    def near(offsets: Sequence[float]) -> dict[int, float]:
        pairs = zip(course, offsets, strict=True)
        return {step: c + 0.5 * NOISE * offset for step, (c, offset) in enumerate(pairs, start=1)}

    own, *others = (near(offsets) for offsets in jitter)
    peers = [(TrialState.COMPLETE, curve) for curve in others]
    assert not any(judged(pruners.create(name, {"noise": NOISE}), peers, own))


@pytest.mark.parametrize("name", OURS)
def test_decisions_are_the_same_each_time(name: str) -> None:
    peers = [(TrialState.COMPLETE, rising(0.3 + 0.1 * place)) for place in range(6)]
    first, second = (judged(pruners.create(name), peers, rising(0.4)) for _ in range(2))
    assert first == second


def test_noise_that_is_estimated_spares_what_a_small_given_one_stops() -> None:
    # Curves that jump by a tenth from report to report.
    def noisy(end: float) -> dict[int, float]:
        return {step: value + 0.1 * (-1) ** step for step, value in rising(end).items()}

    peers = [(TrialState.COMPLETE, noisy(0.5 + 0.01 * place)) for place in range(6)]
    own = noisy(0.48)
    assert any(judged(PeerMedianPruner(noise=0.001), peers, own))
    assert not any(judged(PeerMedianPruner(), peers, own))


@pytest.mark.parametrize("name", ["async-halving", "peer-median"])
def test_finished_trials_that_ended_early_keep_nobody_from_being_judged(name: str) -> None:
    early = [(TrialState.COMPLETE, {1: 0.5, 2: 0.6})] * 3
    peers = [*early, *[(TrialState.RUNNING, rising(0.9, range(1, 8)))] * 5]
    own = {**rising(0.9), **dict.fromkeys((4, 8), 0.0)}
    said = judged(pruners.create(name, first_step=1, last_step=8), peers, own)
    assert [step for step, stop in enumerate(said, start=1) if stop] == [4]


def test_halving_judges_at_its_rungs_alone() -> None:
    peers = [(TrialState.RUNNING, dict.fromkeys(range(1, 9), 1.0)) for _ in range(4)]
    own = {step: 1.0 if step == 1 else 0.0 for step in range(1, 9)}
    pruner = AsyncHalvingPruner(reduction_factor=2, noise=0.0)
    said = judged(pruner, peers, own)
    assert [step for step, stop in enumerate(said, start=1) if stop] == [2, 4, 8]


def test_halving_keeps_one_in_so_many() -> None:
    peers = [(TrialState.PRUNED, {1: 0.1 * place}) for place in range(1, 8)]
    for factor, kept in ((2, 4), (4, 2)):
        pruner = AsyncHalvingPruner(reduction_factor=factor, noise=0.0)
        said = [judged(pruner, peers, {1: 0.1 * place + 0.05})[0] for place in range(8)]
        assert said.count(False) == kept


def test_the_median_counts_those_it_stopped_before() -> None:
    # Four of eight were stopped at once; among the four that went on nobody is below the median.
    stopped = [(TrialState.PRUNED, {1: 0.1})] * 4
    peers = [*stopped, *((TrialState.RUNNING, {1: 0.5, 2: 0.6 + 0.1 * k}) for k in range(3))]
    assert judged(PeerMedianPruner(noise=0.0), peers, {1: 0.5, 2: 0.5}) == [False, False]


def test_one_bad_evaluation_does_not_end_a_good_run() -> None:
    peers = [(TrialState.COMPLETE, rising(0.5 + 0.05 * place)) for place in range(8)]
    own = rising(0.95)
    own[3] = -0.5
    assert not any(judged(CostAwarePruner(noise=0.01), peers, own))


def test_forecasts_of_running_peers_count_before_anybody_has_finished() -> None:
    peers = [(TrialState.RUNNING, rising(0.5 + 0.05 * place, range(1, 6))) for place in range(7)]
    pruner = CostAwarePruner(last_step=8, noise=0.01)
    hopeless, best = rising(-0.5, range(1, 6)), rising(0.9, range(1, 6))
    assert any(judged(pruner, peers, hopeless))
    assert not any(judged(pruner, peers, best))


def test_an_incumbent_that_breaks_a_constraint_is_none() -> None:
    study = study_of(CostAwarePruner(), [(TrialState.COMPLETE, rising(0.5))] * 6)
    best = study.ask()
    best.set_constraint("memory", 1.0)
    report(best, rising(0.9))
    study.tell(best, 0.9)
    trial = study.ask()
    said = []
    for step, value in rising(0.55).items():
        trial.report(value, step)
        said.append(trial.should_prune())
    assert not any(said)


def test_a_run_that_is_nearly_done_may_finish_on_a_small_chance() -> None:
    peers = [(TrialState.COMPLETE, rising(0.5 + 0.02 * place)) for place in range(8)]
    own = rising(0.55)
    patient, strict = (CostAwarePruner(probability=p, noise=0.03) for p in (0.001, 0.5))
    assert sum(judged(patient, peers, own)) < sum(judged(strict, peers, own))


@pytest.mark.parametrize(
    "kind", [AsyncHalvingPruner, PeerMedianPruner, CostAwarePruner, ParetoPruner]
)
def test_arguments_are_checked_without_the_package_around_it(kind: Any) -> None:
    for wrong in (-1, math.nan, "much", True):
        with pytest.raises(ValueError, match=r"noise is .* or 'auto'"):
            kind(noise=wrong)
