from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from optuna_lora_rl.policy import bank as bank_module
from optuna_lora_rl.policy.bank import Bank
from optuna_lora_rl.policy.bank import Posterior
from optuna_lora_rl.policy.candidates import Trials
from optuna_lora_rl.policy.decision import Decision
from optuna_lora_rl.policy.decision import Settings
from optuna_lora_rl.policy.decision import decide
from optuna_lora_rl.policy.decision import draw_parameter
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.lora_surfaces import natural_values
from optuna_lora_rl.policy.scores import standardise

PLAIN = make_space([Dimension("x", "float"), Dimension("y", "int", 0, 9)])
SETTINGS = Settings(candidates=64, bank=True)


def _lora(low: float = 1e-6, high: float = 1e-2) -> Space:
    return make_space(
        [
            Dimension("learning_rate", "float", low, high, log=True),
            Dimension("lora_alpha", "int", 1, 512, log=True),
            Dimension("lora_rank", "int", 2, 256, log=True),
            Dimension("target_modules", "categorical", choices=("qv", "attention", "all-linear")),
        ]
    )


LORA = _lora()
LAYOUT = Layout(LORA)


def _trials(
    points: list[list[float]],
    scores: list[float],
    *,
    failed: tuple[int, ...] = (),
    infeasible: tuple[int, ...] = (),
    pending: tuple[list[float], ...] = (),
    space: Space = LORA,
) -> Trials:
    x = space.snap(np.array(points, dtype=float).reshape(-1, len(space)))
    bad, broken = np.isin(np.arange(len(x)), failed), np.isin(np.arange(len(x)), infeasible)
    running = space.snap(np.array(pending, dtype=float).reshape(-1, len(space)))
    return Trials(x, standardise(np.array(scores), bad), bad, broken, running)


def _decide(
    space: Space, trials: Trials, settings: Settings = SETTINGS, layout: Layout | None = None
) -> Decision:
    generator = torch.Generator().manual_seed(0)
    return decide(layout or Layout(space), trials, None, space.snap, generator, settings)


def _chosen(space: Space, decision: Decision) -> dict:
    return space.decode(decision.x[int(decision.logits.argmax())])


def test_surfaces_are_one_at_their_best_and_nothing_at_their_median() -> None:
    x = LORA.snap(np.random.default_rng(3).random((512, 4)))
    f = LAYOUT.bank.values(LAYOUT.points(x))
    assert f.shape[0] == len(LAYOUT.bank.shapes) > 1500
    assert abs(float(np.median(np.median(f, 1)))) < 0.1
    assert 0.8 < float(np.median(f.max(1))) < 1.2
    assert f.min() >= -1.5


def test_a_surface_is_best_on_its_ridge() -> None:
    shapes = LAYOUT.bank.shapes
    x = np.repeat(LAYOUT.default[None], 201, 0)
    x[:, 0] = np.linspace(0, 1, 201)
    v = natural_values(LAYOUT.points(x), LAYOUT)
    best = v["learning_rate"][shapes(v).argmax(1)]
    ridge = shapes.peak - shapes.lift(v)[:, 0]
    inside = (ridge > -5.9) & (ridge < -2.1)
    assert np.abs(best - ridge)[inside].max() < 0.03


def test_weights_are_the_likelihood_by_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the density of the scores with an offset of a huge variance in place of a flat."""
    monkeypatch.setattr(bank_module, "_FLOOR", -1e9)  # no clipping
    layout = Layout(LORA)
    points = [[0.3, 0.5, 0.4, 1 / 6], [0.5, 0.5, 0.4, 0.5], [0.7, 0.4, 0.6, 5 / 6]]
    trials = _trials(points, [0.2, 0.9, 0.5])
    bank = Bank(layout)
    posterior = Posterior(bank, trials)
    seen = trials.points(layout)
    f, spans = bank.values(seen).astype(float), np.ptp(trials.y) * bank_module._SPANS
    length = np.exp(layout.log_l[:, 0])
    r = np.sqrt(5) * np.linalg.norm(
        (seen.coordinates[:, None] - seen.coordinates[None]) / length, axis=2
    )
    unit = (1 + r + r**2 / 3) * np.exp(-r)
    expected = np.zeros((40, len(spans)))
    for row in range(40):
        for k, b in enumerate(spans):
            covariance = b**2 * (0.25**2 * unit + 0.07**2 * np.eye(3)) + 1e6
            expected[row, k] = multivariate_normal(b * f[row], covariance).logpdf(trials.y)
    found = np.log(posterior.weights[:40])
    # The smallest weights are lost to rounding on both sides.
    clear = expected > expected.max() - 12
    assert clear.sum() > 100
    assert np.ptp((found - expected)[clear]) < 0.02


def test_results_that_look_like_a_ridge_raise_the_share_and_others_lower_it() -> None:
    points = [[u, 0.6, 0.5, 5 / 6] for u in (0.2, 0.4, 0.6, 0.8, 0.95)]
    ridge = Posterior(LAYOUT.bank, _trials(points, [-0.5, 0.6, 1.0, 0.2, -1.5])).share
    zigzag = Posterior(LAYOUT.bank, _trials(points, [1.0, -0.9, 1.0, -1.0, 1.0])).share
    assert ridge > 0.95
    assert zigzag < 0.5


def test_one_score_says_nothing() -> None:
    posterior = Posterior(LAYOUT.bank, _trials([[0.5, 0.5, 0.5, 5 / 6]], [3.0]))
    assert posterior.share == pytest.approx(0.9)
    assert np.ptp(posterior.weights) < 1e-12


def test_a_failure_moves_weight_to_surfaces_that_are_bad_there() -> None:
    point = [0.95, 0.6, 0.5, 5 / 6]
    trials = _trials([point], [0.0], failed=(0,))
    f = LAYOUT.bank.values(trials.points(LAYOUT))[:, 0]
    before, after = f.mean(), Posterior(LAYOUT.bank, trials).weights[:, 0] @ f
    assert after < before - 0.2
    low = [0.6, 0.6, 0.5, 5 / 6]
    rate = _chosen(LORA, _decide(LORA, trials))["learning_rate"]
    assert rate < LORA.decode(np.array(point))["learning_rate"] / 3
    healthy = _trials([point], [0.0])
    there = LAYOUT.points(np.array([low]))
    assert np.isfinite(Posterior(LAYOUT.bank, healthy).judge(there)[0]).all()


def test_the_first_trial_follows_the_range() -> None:
    rates = []
    for low, high in ((1e-6, 1e-3), (1e-5, 1e-2), (1e-4, 1e-1), (1e-3, 1.0)):
        space = _lora(low, high)
        params = _chosen(space, _decide(space, _trials([], [], space=space)))
        usual = space.decode(Layout(space).default)
        rates.append(params.pop("learning_rate"))
        del usual["learning_rate"]
        assert params == usual
        assert abs(math.log10(rates[-1]) - 0.5 * math.log10(low * high)) < 0.8
    assert rates == sorted(rates)


@pytest.mark.parametrize("first", ["learning_rate", "lora_rank"])
def test_the_first_trial_is_the_same_parameter_by_parameter(first: str) -> None:
    names = sorted(LORA.names, key=lambda name: (name != first, name == "lora_alpha"))
    known: list[Dimension] = []
    params: dict = {}
    for name in names:
        known.append(LORA.dimensions[LORA.names.index(name)])
        space = Space(tuple(known))
        place = draw_parameter(space, space.encode(params), len(known) - 1, None, bank=True)
        params[name] = space.dimensions[-1].decode(place)
    together = LORA.decode(LAYOUT.first)
    assert params["learning_rate"] == pytest.approx(together["learning_rate"], rel=0.5)
    assert {k: v for k, v in params.items() if k != "learning_rate"} == {
        k: v for k, v in together.items() if k != "learning_rate"
    }


def test_an_unknown_parameter_beside_the_learning_rate_keeps_the_guides() -> None:
    space = make_space(
        [Dimension("depth", "int", 1, 8), Dimension("lr", "float", 1e-4, 1e-1, log=True)]
    )
    given = space.encode({"depth": 3})
    guides, bank = (draw_parameter(space, given, 1, None, bank=on) for on in (False, True))
    assert guides == bank


def test_a_space_that_is_not_lora_proposes_what_it_did() -> None:
    for points, scores in ([], []), ([[0.5, 0.5]], [0.1]), ([[0.1, 0.2], [0.4, 0.9]], [0.3, 0.1]):
        trials = _trials(points, scores, space=PLAIN)
        plain = _decide(PLAIN, trials, replace(SETTINGS, bank=False))
        banked = _decide(PLAIN, trials)
        assert np.array_equal(plain.x, banked.x)
        assert np.array_equal(plain.logits, banked.logits)
        assert banked.share == 0.0


def test_after_ten_trials_nothing_of_it_is_left() -> None:
    rng = np.random.default_rng(0)
    points, scores = rng.random((10, 4)).tolist(), rng.random(10).tolist()
    nine = _decide(LORA, _trials(points[:9], scores[:9]))
    assert nine.share > 0
    assert "surfaces" in nine.explain(0)
    for pending in ((), (points[9],)):
        n = 10 - len(pending)
        trials = _trials(points[:n], scores[:n], pending=pending)
        plain = _decide(LORA, trials, replace(SETTINGS, bank=False))
        assert np.array_equal(_decide(LORA, trials).logits, plain.logits)


def test_proposals_are_a_function_of_trials_and_seed() -> None:
    points = [[0.5, 0.5, 0.5, 5 / 6], [0.7, 0.5, 0.5, 5 / 6], [0.6, 0.3, 0.4, 0.5]]
    trials = _trials(points, [0.1, 0.4, 0.3])
    again = _decide(LORA, trials, layout=LAYOUT)
    assert np.array_equal(_decide(LORA, trials).logits, again.logits)
    assert np.array_equal(_decide(LORA, trials, layout=LAYOUT).logits, again.logits)


def test_running_trials_are_kept_away_from() -> None:
    first = LAYOUT.first.tolist()
    for points, scores in ([], []), ([[0.4, 0.5, 0.5, 5 / 6]], [0.5]):
        alone = Posterior(LAYOUT.bank, _trials([[0.1] * 4, *points], [0.0, *scores]))
        beside = Posterior(
            LAYOUT.bank, _trials([[0.1] * 4, *points], [0.0, *scores], pending=(first,))
        )
        there = LAYOUT.points(LORA.snap(np.array([first])))
        assert beside.judge(there)[0][0] < alone.judge(there)[0][0] - 0.5
    params = _chosen(LORA, _decide(LORA, _trials([], [], pending=(first,))))
    assert params != LORA.decode(LAYOUT.first)


def test_odd_histories_have_a_proposal() -> None:
    points = [[0.5, 0.5, 0.5, 5 / 6], [0.7, 0.5, 0.5, 5 / 6], [0.9, 0.3, 0.4, 0.5]]
    for trials in (
        _trials(points, [1.0, 1.0, 1.0]),
        _trials(points, [math.inf, 0.0, -math.inf]),
        _trials(points, [0.1, 0.2, 0.3], infeasible=(0, 1, 2)),
        _trials(points, [0.0] * 3, failed=(0, 1, 2)),
        _trials(points[:1], [0.3], pending=tuple(points[1:])),
    ):
        decision = _decide(LORA, trials)
        assert np.isfinite(decision.logits[decision.valid]).all()


def test_a_space_without_anything_the_surfaces_know_has_no_bank() -> None:
    space = make_space([Dimension("lora_flavour", "float")])
    layout = Layout(space)
    assert layout.is_lora
    assert not layout.bank.speaks
    trials = _trials([[0.5]], [0.1], space=space)
    assert _decide(space, trials).share == 0.0
    plain = _decide(space, trials, replace(SETTINGS, bank=False))
    assert np.array_equal(_decide(space, trials).logits, plain.logits)
