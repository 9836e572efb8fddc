from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from optuna_lora_rl.policy.candidates import Trials
from optuna_lora_rl.policy.decision import Decision
from optuna_lora_rl.policy.decision import Settings
from optuna_lora_rl.policy.decision import decide
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.network import Correction
from optuna_lora_rl.policy.scores import standardise
from optuna_lora_rl.policy.surrogate import Process
from optuna_lora_rl.policy.surrogate import fit_theta
from optuna_lora_rl.policy.transfer import Informed
from optuna_lora_rl.policy.transfer import SourceModel
from optuna_lora_rl.policy.transfer import SourceStudy
from optuna_lora_rl.policy.transfer import fit_source
from optuna_lora_rl.policy.transfer import weigh

SPACE = make_space(
    [
        Dimension("learning_rate", "float", 1e-6, 1e-1, log=True),
        Dimension("lora_rank", "int", 2, 128, log=True),
    ]
)
LAYOUT = Layout(SPACE)
Score = Callable[[np.ndarray], np.ndarray]


def _peaked(u: np.ndarray) -> np.ndarray:
    """Best at 0.8 of the learning rate's range (about 1e-2)."""
    return -((u[:, 0] - 0.8) ** 2) - 0.1 * (u[:, 1] - 0.5) ** 2


def _points(count: int, seed: int) -> np.ndarray:
    return SPACE.snap(np.random.default_rng(seed).random((count, 2)))


def _source(score: Score, seed: int = 0) -> SourceModel:
    points = _points(25, seed)
    params = tuple(SPACE.decode(point) for point in points)
    study = SourceStudy("s", SPACE, params, score(points)[:, None], np.zeros(25, dtype=bool))
    model = fit_source(LAYOUT, SPACE, study, np.ones(1))
    assert model is not None
    return model


def _trials(points: np.ndarray, score: Score = _peaked) -> Trials:
    none = np.zeros(len(points), dtype=bool)
    return Trials(points, standardise(score(points), none), none, none, np.zeros((0, 2)))


def _decide(trials: Trials, sources: list[SourceModel], network: Correction | None) -> Decision:
    generator, settings = torch.Generator().manual_seed(0), Settings(candidates=64)
    return decide(LAYOUT, trials, network, SPACE.snap, generator, settings, sources=sources)


def test_without_results_the_sources_are_believed_and_their_best_is_proposed() -> None:
    sources = [_source(_peaked, seed) for seed in range(3)]
    decision = _decide(_trials(np.zeros((0, 2))), sources, None)
    assert decision.trust == pytest.approx(1.0)
    best = decision.x[decision.logits.argmax()]
    assert abs(best[0] - 0.8) < 0.1


@pytest.mark.parametrize("mislead", [lambda u: -_peaked(u), lambda u: -((u[:, 0] - 0.1) ** 2)])
def test_a_misleading_source_loses_its_weight_and_leaves_the_policy_as_it_was(
    mislead: Score,
) -> None:
    trials = _trials(_points(8, 5))
    misled = _decide(trials, [_source(mislead)], None)
    assert misled.trust < 0.05
    opinion = weigh([_source(mislead), _source(_peaked, 1)], LAYOUT, trials)
    assert opinion.weights[0] < 0.05
    assert opinion.weights[1] > 0.8


def test_an_opinion_is_put_to_the_test_until_a_trial_has_gone_against_it() -> None:
    source = _source(_peaked)
    near, far = np.array([[0.8, 0.5], [0.79, 0.5], [0.81, 0.5]]), np.array([[0.2, 0.5]])
    assert weigh([source], LAYOUT, _trials(near[:1])).trust == 0
    assert weigh([source], LAYOUT, _trials(near)).trust == 0
    assert weigh([source], LAYOUT, _trials(np.concatenate([near[:2], far]))).trust > 0.9


def test_no_trust_is_the_policy_without_transfer() -> None:
    trials, model = _trials(_points(6, 3)), _source(_peaked)
    opinion = weigh([model], LAYOUT, trials)
    opinion.weights = np.zeros(1)
    z = trials.points(LAYOUT).coordinates
    assert opinion.residual(z, trials.y).tolist() == trials.y.tolist()
    assert not opinion(z)[0].any()


def test_the_surrogate_follows_the_results_where_there_are_some_and_the_sources_elsewhere() -> (
    None
):
    points = np.array([[0.8, 0.5], [0.7, 0.5], [0.65, 0.4], [0.6, 0.2]])
    decision = _decide(_trials(points), [_source(_peaked)], None)
    mean = _informed_mean(points)
    assert mean[0] > mean[1] > mean[2]
    assert decision.view.mean[decision.x[:, 0] < 0.2].max() < mean[0] - 1.0


def _informed_mean(points: np.ndarray) -> np.ndarray:
    trials, none = _trials(points), np.zeros(len(points))
    opinion = weigh([_source(_peaked)], LAYOUT, trials)
    z = trials.points(LAYOUT).coordinates
    y = opinion.residual(z, trials.y)
    theta = fit_theta(
        z, y, LAYOUT.unordered, LAYOUT.log_l, none, iterations=40, fit_rows=len(points)
    )
    return Informed(Process(z, y, LAYOUT.unordered, theta, none), opinion).posterior(z)[0]


def test_a_source_about_other_things_is_left_out() -> None:
    space = make_space([Dimension("temperature", "float", 0.0, 1.0)])
    params = tuple({"temperature": float(v)} for v in np.linspace(0, 1, 5))
    study = SourceStudy("s", space, params, np.arange(5.0)[:, None], np.zeros(5, dtype=bool))
    assert fit_source(LAYOUT, SPACE, study, np.ones(1)) is None


def test_what_failed_in_the_sources_is_expected_to_be_bad() -> None:
    points = _points(25, 0)
    bad = points[:, 0] > 0.6
    scores = np.where(bad, np.nan, _peaked(points))[:, None]
    params = tuple(SPACE.decode(point) for point in points)
    model = fit_source(LAYOUT, SPACE, SourceStudy("s", SPACE, params, scores, bad), np.ones(1))
    assert model is not None
    mean, _ = model.posterior(np.array([[0.5, 0.5], [0.8, 0.5]]))
    assert mean[0] > mean[1] + 0.5
