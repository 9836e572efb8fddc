from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from optuna_lora_rl.policy.candidates import Observed
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.layout import exact_snap
from optuna_lora_rl.policy.layout import layout_of
from optuna_lora_rl.policy.network import Scorer
from optuna_lora_rl.policy.proposal import Decision
from optuna_lora_rl.policy.proposal import Settings
from optuna_lora_rl.policy.proposal import decide
from optuna_lora_rl.policy.scores import standardise
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
LAYOUT = layout_of(SPACE)
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


def _observed(points: np.ndarray, score: Score = _peaked) -> Observed:
    n = len(points)
    all_, none = torch.ones((1, n), dtype=torch.bool), torch.zeros((1, n), dtype=torch.bool)
    return Observed(
        x=torch.from_numpy(points)[None],
        y=standardise(torch.from_numpy(score(points))[None], all_, none),
        mask=all_,
        failed=none,
        infeasible=none,
        pending=torch.zeros((1, 0, 2), dtype=torch.float64),
        pending_mask=torch.zeros((1, 0), dtype=torch.bool),
        horizon=torch.zeros(1, dtype=torch.long),
    )


def _decide(observed: Observed, sources: list[SourceModel], network: Scorer | None) -> Decision:
    generator = torch.Generator().manual_seed(0)
    return decide(
        LAYOUT,
        observed,
        network,
        exact_snap(SPACE),
        generator,
        Settings(candidates=64),
        sources=sources,
    )


def test_without_results_the_sources_are_believed_and_their_best_is_proposed() -> None:
    sources = [_source(_peaked, seed) for seed in range(3)]
    decision = _decide(_observed(np.zeros((0, 2))), sources, None)
    assert decision.trust == pytest.approx(1.0)
    best = decision.candidates.x[0, int(decision.logits[0].argmax())]
    assert abs(float(best[0]) - 0.8) < 0.1


@pytest.mark.parametrize("mislead", [lambda u: -_peaked(u), lambda u: -((u[:, 0] - 0.1) ** 2)])
def test_a_misleading_source_loses_its_weight_and_leaves_the_policy_as_it_was(
    mislead: Score,
) -> None:
    observed = _observed(_points(8, 5))
    misled = _decide(observed, [_source(mislead)], None)
    assert misled.trust < 0.05
    opinion = weigh([_source(mislead), _source(_peaked, 1)], LAYOUT, observed)
    assert opinion.weights[0] < 0.05
    assert opinion.weights[1] > 0.8


def test_an_opinion_is_put_to_the_test_until_a_trial_has_gone_against_it() -> None:
    source = _source(_peaked)
    near, far = np.array([[0.8, 0.5], [0.79, 0.5], [0.81, 0.5]]), np.array([[0.2, 0.5]])
    assert weigh([source], LAYOUT, _observed(near[:1])).trust == 0
    assert weigh([source], LAYOUT, _observed(near)).trust == 0
    assert weigh([source], LAYOUT, _observed(np.concatenate([near[:2], far]))).trust > 0.9


def test_no_trust_is_the_policy_without_transfer() -> None:
    observed, model = _observed(_points(6, 3)), _source(_peaked)
    opinion = weigh([model], LAYOUT, observed)
    opinion.weights = torch.zeros(1, dtype=torch.float64)
    z = LAYOUT.model_coordinates(observed.x)
    assert torch.equal(opinion.residual(z, observed.y), observed.y)
    assert torch.equal(opinion.mean(z), torch.zeros_like(observed.y))


def test_the_surrogate_follows_the_results_where_there_are_some_and_the_sources_elsewhere() -> (
    None
):
    points = np.array([[0.8, 0.5], [0.7, 0.5], [0.65, 0.4], [0.6, 0.2]])
    decision = _decide(_observed(points), [_source(_peaked)], None)
    mean, _ = _informed_mean(points)
    assert mean[0] > mean[1] > mean[2]
    far = decision.view.mean[0][decision.candidates.x[0, :, 0] < 0.2]
    assert float(far.max()) < float(mean[0]) - 1.0


def _informed_mean(points: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    from optuna_lora_rl.policy.surrogate import fit

    observed, model = _observed(points), _source(_peaked)
    opinion = weigh([model], LAYOUT, observed)
    z = LAYOUT.model_coordinates(observed.x)
    own = fit(
        z, opinion.residual(z, observed.y), observed.mask, LAYOUT.unordered, LAYOUT.lengthscales()
    )
    mean, deviation = opinion.informed(own).posterior(z)
    return mean[0], deviation[0]


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
    mean, _ = model.posterior(torch.tensor([[[0.5, 0.5], [0.8, 0.5]]], dtype=torch.float64))
    assert mean[0, 0] > mean[0, 1] + 0.5
