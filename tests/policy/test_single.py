"""The form for one study and the batched form of the policy are the same policy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optuna_lora_rl.policy import proposal
from optuna_lora_rl.policy import surrogate
from optuna_lora_rl.policy import weights
from optuna_lora_rl.policy.candidates import Observed
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.features import CANDIDATE_FEATURES
from optuna_lora_rl.policy.layout import exact_snap
from optuna_lora_rl.policy.layout import layout_of
from optuna_lora_rl.policy.proposal import Decision
from optuna_lora_rl.policy.proposal import Settings
from optuna_lora_rl.policy.scores import standardise
from optuna_lora_rl.policy.single import candidates as single_candidates
from optuna_lora_rl.policy.single import decision as single
from optuna_lora_rl.policy.single import scores as single_scores
from optuna_lora_rl.policy.single.candidates import Trials
from optuna_lora_rl.policy.single.process import Posterior
from optuna_lora_rl.policy.single.process import fit_theta
from optuna_lora_rl.policy.single.process import log_improvement
from optuna_lora_rl.policy.single.tables import Tables

SPACES = {
    "lora": [
        Dimension("learning_rate", "float", 1e-6, 1e-2, log=True),
        Dimension("lora_alpha", "int", 1, 512, log=True),
        Dimension("lora_dropout", "float", 0.0, 0.3),
        Dimension("lora_rank", "int", 2, 256, log=True),
        Dimension("target_modules", "categorical", choices=("qv", "attention", "all-linear")),
    ],
    "ratio": [
        Dimension("alpha_ratio", "float", 0.5, 8.0, log=True),
        Dimension("lr", "float", 1e-5, 1e-2, log=True),
        Dimension("r", "categorical", choices=(8, 16, 32, 64)),
    ],
    "plain": [Dimension(name, "float", -5.0, 5.0) for name in "abcdefgh"],
    "mixed": [
        Dimension("a", "float"),
        Dimension("b", "int", 0, 20),
        Dimension("c", "categorical", choices=("p", "q", "s", "t")),
    ],
    "line": [Dimension("x", "float")],
}
SETTINGS = Settings(iterations=12)


def _observed(space: Space, n: int, kind: str, seed: int = 0) -> Observed:
    rng = np.random.default_rng([seed, n])
    x = space.snap(rng.uniform(size=(n, len(space))))
    scores = -((x - 0.4) ** 2).sum(1) + 0.05 * rng.normal(size=n)
    failed = np.arange(n) % 4 == 1 if kind == "failed" else np.zeros(n, dtype=bool)
    infeasible = np.arange(n) % 3 == 0 if kind == "infeasible" else np.zeros(n, dtype=bool)
    pending = space.snap(rng.uniform(size=(3 if kind == "running" else 0, len(space))))
    bad = torch.from_numpy(failed)[None]
    return Observed(
        x=torch.from_numpy(x)[None],
        y=standardise(torch.from_numpy(scores)[None], ~bad, bad),
        mask=torch.ones_like(bad),
        failed=bad,
        infeasible=torch.from_numpy(infeasible)[None],
        pending=torch.from_numpy(pending)[None],
        pending_mask=torch.ones((1, len(pending)), dtype=torch.bool),
        horizon=torch.tensor([40 if n % 2 else 0]),
    )


def _trials(observed: Observed) -> Trials:
    columns = (observed.x, observed.y, observed.failed, observed.infeasible, observed.pending)
    return Trials(*(column[0].numpy() for column in columns), int(observed.horizon))


def _both(
    space: Space, observed: Observed, constraints: np.ndarray
) -> tuple[single.Decision, Decision]:
    network, layout = weights.load(None), layout_of(space)
    tables, trials = Tables(layout), _trials(observed)
    theta = single.fit_hyperparameters(tables, trials, SETTINGS)
    with torch.no_grad():
        one = single.decide(
            tables,
            trials,
            network,
            space.snap,
            torch.Generator().manual_seed(1),
            SETTINGS,
            feasibility=single.fit_feasibility(tables, trials, constraints),
            theta=theta,
        )
        told = torch.from_numpy(constraints)[None]
        batched = proposal.decide(
            layout,
            observed,
            network,
            exact_snap(space),
            torch.Generator().manual_seed(1),
            Settings(iterations=0),
            feasibility=proposal.fit_feasibility(layout, observed, told),
            start=torch.from_numpy(theta)[None],
        )
    return one, batched


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("kind", ["failed", "infeasible", "running"])
@pytest.mark.parametrize("n", [0, 1, 25])
def test_both_forms_make_the_same_decision(name: str, kind: str, n: int) -> None:
    space = make_space(SPACES[name])
    observed = _observed(space, n, kind)
    constraints = np.zeros((n, 0))
    if kind == "infeasible":
        constraints = np.random.default_rng(n).normal(size=(n, 4))
        constraints[::3, 0] = np.nan
        constraints[:, 1] = constraints[:, 1] > 0  # only says kept or broken
        constraints[:, 2] = np.where(constraints[:, 2] > 0, np.inf, -1.0)
        constraints[n // 2 :, 3] *= np.inf
    one, batched = _both(space, observed, constraints)

    def close(left: np.ndarray, right: torch.Tensor, **tolerance: float) -> None:
        torch.testing.assert_close(torch.from_numpy(left), right[0], **tolerance)

    assert one.source.tolist() == batched.candidates.source.tolist()
    assert one.valid.tolist() == batched.candidates.valid[0].tolist()
    close(one.x, batched.candidates.x, rtol=0, atol=1e-9)
    for field in ("mean", "deviation", "log_ei", "log_prior", "log_feasible"):
        close(getattr(one.view, field), getattr(batched.view, field), rtol=1e-5, atol=1e-6)
    close(one.residual, batched.residual, rtol=1e-5, atol=1e-6)
    close(one.context, batched.features.context)
    # Equal candidates have equal expected improvement: which of them ranks first is chance.
    ranks = CANDIDATE_FEATURES.index("log_ei_rank")
    others = [k for k in range(len(CANDIDATE_FEATURES)) if k != ranks]
    right = batched.features.values
    close(one.values[:, others], right[:, :, others], rtol=1e-4, atol=1e-5)
    for told in (one.values, right[0].numpy()):
        order = told[:, ranks].argsort()
        assert (np.diff(one.view.log_ei[order]) > -1e-6).all()
    right[0, :, ranks] = torch.from_numpy(one.values[:, ranks])
    with torch.no_grad():
        learned = weights.load(None)(batched.features).double()
    close(one.logits, batched.residual + learned, rtol=0, atol=1e-4)


def test_scores_are_standardised_as_in_the_batched_form() -> None:
    rng = np.random.default_rng(0)
    for n in range(30):
        scores, failed = rng.normal(size=n % 10), rng.uniform(size=n % 10) < (n % 3) / 3
        odd = rng.uniform(size=len(scores)) < 0.2
        scores = np.where(odd, rng.choice([np.inf, -np.inf, 1e6, 0.0], size=len(scores)), scores)
        if n % 4 == 3:
            scores = np.where(rng.uniform(size=len(scores)) < 0.5, -1e4 * 10.0 ** (10 * n), scores)
        bad = torch.from_numpy(failed)[None]
        expected = standardise(torch.from_numpy(scores)[None], ~bad, bad)[0].numpy()
        np.testing.assert_allclose(single_scores.standardise(scores, failed), expected, atol=1e-9)


@pytest.mark.parametrize("name", SPACES)
def test_both_forms_fit_the_same_hyperparameters(name: str) -> None:
    space = make_space(SPACES[name])
    observed = _observed(space, 15, "failed")
    layout = layout_of(space)
    theta = single.fit_hyperparameters(Tables(layout), _trials(observed), SETTINGS)
    batched = proposal.fit_surrogate(layout, observed, SETTINGS).theta[0]
    torch.testing.assert_close(torch.from_numpy(theta), batched, rtol=0, atol=1e-9)


def test_the_likelihood_and_its_gradient_are_those_of_the_batched_form() -> None:
    rng = np.random.default_rng(0)
    n, d = 9, 3
    X, y, extra = rng.uniform(size=(n, d)), rng.normal(size=n), np.arange(n) % 2 * 0.05
    theta = rng.normal(size=(2, d + 2)) * 0.5 - 1.0
    log_l = np.stack([rng.normal(size=d), np.ones(d)], axis=1)
    sqd = ((X[:, None] - X[None]) ** 2).reshape(-1, d)
    centres = [surrogate.LOG_S_PRIOR, surrogate.LOG_V_PRIOR]
    posterior = Posterior(sqd, y, extra, np.concatenate([log_l, centres]))
    value, gradient = posterior.negative_log(theta)
    twice = [torch.from_numpy(array).expand(2, *array.shape) for array in (sqd, y, extra)]
    prior = surrogate.Lengthscales(*(torch.from_numpy(log_l[:, k]).expand(2, d) for k in (0, 1)))
    expected = surrogate.negative_log_posterior(
        torch.from_numpy(theta), twice[0], twice[1], torch.ones((2, n)) > 0, twice[2], prior
    )
    np.testing.assert_allclose(value, expected[0].numpy(), rtol=1e-9)
    np.testing.assert_allclose(gradient, expected[1].numpy(), rtol=1e-7, atol=1e-9)


def test_a_long_history_is_fitted_by_a_part_of_its_rows() -> None:
    space = make_space(SPACES["mixed"])
    observed = _observed(space, 50, "failed")
    tables, trials = Tables(layout_of(space)), _trials(observed)
    few = Settings(iterations=5, fit_rows=20)
    theta = single.fit_hyperparameters(tables, trials, few)
    batched = proposal.fit_surrogate(tables.layout, observed, few).theta[0].numpy()
    np.testing.assert_allclose(theta, batched, atol=1e-9)


def test_improvement_is_right_from_far_below_to_far_above() -> None:
    mean = np.array([-1e5, -2e3, -50.0, -3.0, -1.0, 0.0, 0.7, 5.0, 24.0, 26.0, 400.0])
    gain = log_improvement(mean, np.full(len(mean), 0.5), 0.1)
    deviation = torch.full((len(mean),), 0.5, dtype=torch.float64)
    right = surrogate.log_expected_improvement(
        torch.from_numpy(mean), deviation, torch.full_like(deviation, 0.1)
    )
    np.testing.assert_allclose(gain.value, right.numpy(), rtol=1e-9)
    step = 1e-6
    ahead = log_improvement(mean[2:8] + step, np.full(6, 0.5), 0.1).value
    np.testing.assert_allclose(gain.by_mean[2:8], (ahead - gain.value[2:8]) / step, rtol=1e-3)


def test_the_same_point_is_found_among_many() -> None:
    rng = np.random.default_rng(0)
    others = rng.uniform(size=(500, 4)).round(1)
    x = np.concatenate([others[::50] + 5e-8, others[1::50] + 3e-7, rng.uniform(size=(50, 4))])
    expected = single_candidates.within(x, others, single_candidates.SAME)
    assert expected[:10].all() and not expected[20:].any()
    assert (single_candidates.same(x, others) == expected).all()


def test_without_trials_the_fit_is_the_centre_of_the_prior() -> None:
    centre = fit_theta(
        np.zeros((0, 2)),
        np.zeros(0),
        np.zeros(2, dtype=bool),
        np.array([[0.3, 1.0], [0.1, 1.0]]),
        np.zeros(0),
        iterations=5,
        fit_rows=10,
    )
    assert centre[:2].tolist() == [0.3, 0.1]
