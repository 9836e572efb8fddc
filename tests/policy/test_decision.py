from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.policy import weights
from optuna_lora_rl.policy.candidates import SAME
from optuna_lora_rl.policy.candidates import SOURCES
from optuna_lora_rl.policy.candidates import Trials
from optuna_lora_rl.policy.candidates import climb
from optuna_lora_rl.policy.candidates import prior_points
from optuna_lora_rl.policy.candidates import same
from optuna_lora_rl.policy.candidates import within
from optuna_lora_rl.policy.constraints import fit_feasibility
from optuna_lora_rl.policy.constraints import room
from optuna_lora_rl.policy.decision import Decision
from optuna_lora_rl.policy.decision import Settings
from optuna_lora_rl.policy.decision import decide
from optuna_lora_rl.policy.decision import fit_hyperparameters
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.network import Correction
from optuna_lora_rl.policy.network import Features
from optuna_lora_rl.policy.network import Scorer
from optuna_lora_rl.policy.prior import coverage
from optuna_lora_rl.policy.prior import space_prior
from optuna_lora_rl.policy.scores import standardise
from optuna_lora_rl.policy.surrogate import Process
from optuna_lora_rl.policy.surrogate import log_improvement

LORA = make_space(
    [
        Dimension("learning_rate", "float", 1e-6, 1e-2, log=True),
        Dimension("lora_alpha", "int", 1, 512, log=True),
        Dimension("lora_rank", "int", 2, 256, log=True),
        Dimension("lora_dropout", "float", 0.0, 0.3),
        Dimension("target_modules", "categorical", choices=("qv", "attention", "all-linear")),
    ]
)
PLAIN = make_space([Dimension("x", "float"), Dimension("y", "int", 0, 9)])
SETTINGS = Settings(candidates=64)


def _trials(
    space: Space, points: list[list[float]], scores: list[float], failed: list[bool] | None = None
) -> Trials:
    x = space.snap(np.array(points, dtype=float).reshape(-1, len(space)))
    bad = np.array(failed or [False] * len(scores), dtype=bool)
    y, none = standardise(np.array(scores), bad), np.zeros_like(bad)
    return Trials(x, y, bad, none, np.zeros((0, len(space))))


def _decide(space: Space, trials: Trials, network: Scorer | None = None) -> Decision:
    generator = torch.Generator().manual_seed(0)
    correction = None if network is None else Correction.of(network)
    return decide(Layout(space), trials, correction, space.snap, generator, SETTINGS)


def _params(space: Space, decision: Decision) -> dict:
    return space.decode(decision.x[int(decision.logits.argmax())])


def _features(decision: Decision) -> Features:
    arrays = (decision.values, decision.context, decision.valid)
    return Features(*(torch.from_numpy(array)[None] for array in arrays))


def test_the_first_proposal_is_what_guides_recommend() -> None:
    params = _params(LORA, _decide(LORA, _trials(LORA, [], [])))
    assert 1e-4 <= params["learning_rate"] <= 5e-4
    assert 16 <= params["lora_rank"] <= 32
    assert 1 <= params["lora_alpha"] / params["lora_rank"] <= 2.2
    assert params["lora_dropout"] == 0
    assert params["target_modules"] == "all-linear"


def test_the_sweep_tries_the_learning_rates_at_three_sizes_of_a_run() -> None:
    swept = [LORA.decode(row) for row in space_prior(LORA).sweep()]
    usual, small, large = swept[:8], swept[8:16], swept[16:]
    assert usual[0] == LORA.decode(space_prior(LORA).point())
    for size in (usual, small, large):
        assert [p["learning_rate"] for p in size] == [p["learning_rate"] for p in usual]
        assert len({p["learning_rate"] for p in size}) == 8
        assert len({(p["lora_rank"], p["target_modules"]) for p in size}) == 1
        assert all(1.6 < p["lora_alpha"] / p["lora_rank"] < 2.4 for p in size)
    assert [size[0]["lora_rank"] for size in (small, usual, large)] == [4, 16, 64]
    assert [s[0]["target_modules"] for s in (small, large)] == ["qv", "all-linear"]


def test_the_range_draws_the_prior_to_it() -> None:
    def mode(low: float, high: float) -> float:
        space = make_space(
            [Dimension("r", "int", 4, 64), Dimension("lr", "float", low, high, log=True)]
        )
        return space.decode(space_prior(space).point())["lr"]

    usual, high, far = mode(1e-5, 1e-2), mode(1e-4, 1e-1), mode(1e-2, 1.0)
    assert usual < high < far
    assert 5e-2 < far < 2e-1


def test_a_space_that_is_not_lora_has_a_flat_prior_and_starts_in_the_middle() -> None:
    x = np.random.default_rng(0).random((50, 2))
    assert len(set(Layout(PLAIN).points(x).log_prior.tolist())) == 1
    assert _params(PLAIN, _decide(PLAIN, _trials(PLAIN, [], []))) in (
        {"x": 0.5, "y": 4},
        {"x": 0.5, "y": 5},
    )
    spread = _decide(PLAIN, _trials(PLAIN, [[0.5, 0.5]], [0.0]))
    assert SOURCES[spread.source[spread.logits.argmax()]] == "uniform"


def test_alpha_is_drawn_and_judged_by_its_ratio_to_the_rank() -> None:
    layout = Layout(LORA)
    x = prior_points(layout, 400, torch.Generator().manual_seed(0))
    drawn = [LORA.decode(point) for point in x]
    ratio = np.array([p["lora_alpha"] / p["lora_rank"] for p in drawn])
    assert 1.0 < np.median(ratio) < 2.5
    same = {"learning_rate": 2e-4, "lora_dropout": 0.0, "target_modules": "qv"}
    points = [
        LORA.encode({**same, "lora_rank": rank, "lora_alpha": alpha})
        for rank, alpha in ((32, 64), (32, 512), (32, 1))
    ]
    usual, large, small = layout.points(np.array(points)).log_prior
    assert usual > large + 1
    assert usual > small + 1


def test_an_untrained_network_leaves_the_residual_policy_as_it_is() -> None:
    trials = _trials(LORA, [[0.5] * 5, [0.6] * 5, [0.4] * 5], [0.1, 0.9, 0.2])
    with_network, without = _decide(LORA, trials, Scorer()), _decide(LORA, trials)
    assert np.array_equal(with_network.logits, without.logits)


def test_candidates_exist_are_new_and_come_from_every_source() -> None:
    trials = _trials(LORA, [[0.5] * 5, [0.6] * 5], [0.1, 0.9])
    decision = _decide(LORA, trials)
    assert np.array_equal(LORA.snap(decision.x), decision.x)
    assert not (same(decision.x, trials.x) & decision.valid).any()
    assert set(decision.source.tolist()) == set(range(len(SOURCES))) - {SOURCES.index("transfer")}
    assert 77 <= len(decision.x) <= 97


def test_the_same_point_is_found_among_many() -> None:
    rng = np.random.default_rng(0)
    others = rng.uniform(size=(500, 4)).round(1)
    x = np.concatenate([others[::50] + 5e-8, others[1::50] + 3e-7, rng.uniform(size=(50, 4))])
    expected = within(x, others, SAME)
    assert expected[:10].all() and not expected[20:].any()
    assert (same(x, others) == expected).all()


def test_climbing_finds_more_expected_improvement_than_a_thousand_draws() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((30, 5))
    scores = -((points - 0.37) ** 2).sum(axis=1)
    trials, layout = _trials(LORA, points.tolist(), scores.tolist()), Layout(LORA)
    theta = fit_hyperparameters(layout, trials, SETTINGS)
    X = trials.points(layout).coordinates
    process = Process(X, trials.y, layout.unordered, theta, np.zeros(30))
    best = process.incumbent(trials.good)

    def value(x: np.ndarray) -> np.ndarray:
        mean, deviation = process.posterior(layout.points(x).coordinates)
        return log_improvement(mean, deviation, best).value

    drawn = LORA.snap(rng.random((1000, 5)))
    start = drawn[np.argsort(-value(drawn[:50]))[:5]]
    climbed = climb(start, layout, process, best, steps=20)
    assert (value(climbed) >= value(start)).all()
    assert value(climbed).max() > value(drawn).max()


def test_the_region_of_failures_is_left() -> None:
    """Everything above 0.6 of the learning rate's range failed: go below."""
    points = [[u, 0.5, 0.5, 0.0, 0.9] for u in (0.55, 0.7, 0.8, 0.9)]
    failed = [False, True, True, True]
    params = _params(LORA, _decide(LORA, _trials(LORA, points, [1.0, 0, 0, 0], failed)))
    assert LORA.encode(params)[0] < 0.6


def test_pending_trials_are_not_proposed_again() -> None:
    points = [[i / 9, 0.5] for i in range(10)]
    trials = _trials(PLAIN, points, [-((i - 4.0) ** 2) for i in range(10)])
    first = _decide(PLAIN, trials)
    trials.pending = first.x[[first.logits.argmax()]]
    second = _decide(PLAIN, trials)
    assert np.abs(second.x[second.logits.argmax()] - trials.pending[0]).max() > 1e-3


def test_an_exhausted_space_repeats_what_did_not_fail() -> None:
    space = make_space([Dimension("x", "categorical", choices=("a", "b"))])
    observed = _trials(space, [[0.25], [0.75]], [0.0, 0.0], [True, False])
    assert _params(space, _decide(space, observed)) == {"x": "b"}


@pytest.mark.parametrize("unit", [1e-307, 1e-160, 1e6, 1e160, 1e307])
@pytest.mark.parametrize("farthest", [1.0, math.inf])
def test_feasibility_follows_the_constraint(unit: float, farthest: float) -> None:
    trials, layout = _trials(PLAIN, [[i / 9, 0.5] for i in range(10)], [0.0] * 10), Layout(PLAIN)
    constraint = (trials.x[:, :1] - 0.4) * unit
    constraint[-2:] *= farthest
    feasible = fit_feasibility(layout, trials, constraint)
    assert feasible is not None
    low, high = np.exp(feasible(layout.points(np.array([[0.15, 0.5], [0.85, 0.5]]))))
    assert low > 0.9
    assert high < 0.1
    assert fit_feasibility(layout, trials, constraint[:, :0]) is None
    assert fit_feasibility(layout, trials, constraint * np.nan) is None


@pytest.mark.parametrize(("broken", "kept"), [(1.0, -1.0), (math.inf, -1.0), (2.0, -math.inf)])
def test_two_values_are_a_flag_whatever_they_are(broken: float, kept: float) -> None:
    trials, layout = _trials(PLAIN, [[i / 9, 0.5] for i in range(10)], [0.0] * 10), Layout(PLAIN)
    over = trials.x[:, :1] > 0.4
    models = [
        fit_feasibility(layout, trials, np.where(over, a, b))
        for a, b in ((1.0, 0.0), (broken, kept))
    ]
    points = layout.points(np.random.default_rng(0).random((9, 2)))
    flag, told = (model(points) for model in models if model is not None)
    assert told == pytest.approx(flag)


@pytest.mark.parametrize(
    "values", [[0.0, 0.0, 0.0], [-1.0, -2.0, 1.0, 3.0], [1e300, -1e-300, 5.0]]
)
def test_room_is_kept_below_the_limit_and_broken_above(values: list[float]) -> None:
    left = room(np.array(values))
    assert np.isfinite(left).all() and np.abs(left).max() <= 3.0
    assert (np.sign(left) * np.sign(values) <= 0).all()


def test_the_arrays_of_the_scorer_say_what_it_says() -> None:
    network, trials = weights.load(), _trials(LORA, [[0.5] * 5, [0.6] * 5], [0.0, 1.0])
    decision = _decide(LORA, trials)
    assert not decision.valid.all()
    arrays = (decision.values, decision.context, decision.valid)
    said = Correction.of(network)(*arrays)
    assert said == pytest.approx(network(_features(decision))[0].numpy(), abs=1e-4)
    assert np.abs(said).max() > 0.1


def test_the_scorer_does_not_care_about_the_order_of_candidates() -> None:
    torch.manual_seed(0)
    network = Scorer()
    torch.nn.init.normal_(network.last.weight)
    seen = _features(_decide(LORA, _trials(LORA, [[0.5] * 5], [0.0])))
    order = torch.randperm(seen.values.shape[1])
    value = network(seen)
    seen.values, seen.valid = seen.values[:, order], seen.valid[:, order]
    assert torch.allclose(network(seen), value[:, order], atol=1e-5)


@pytest.mark.parametrize(
    ("choice", "share"),
    [("all-linear", 1.0), ("qv", 0.2), ("q_proj,v_proj", 2 / 7), ("MLP", 0.55), ("mine", 0.4)],
)
def test_target_presets_and_lists_have_a_size(choice: str, share: float) -> None:
    assert coverage(choice) == pytest.approx(share)


def test_weights_come_back_and_others_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Scorer()
    torch.nn.init.normal_(network.last.weight)
    file = tmp_path / "mine.safetensors"
    weights.save(network, file, {"seed": "0"})
    loaded = weights.load(file)
    assert torch.equal(loaded.last.weight, network.last.weight)
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    good = {"version": weights.VERSION, "features": weights.LAYOUT_HASH, "width": "64"}
    for key, value, message in (
        ("version", "0", "version '0'"),
        ("features", "other", "features 'other'"),
        ("width", "32", "does not hold a policy network"),
    ):
        save_file(tensors, str(file), metadata={**good, key: value})
        with pytest.raises(UserError, match=message):
            weights.load(file)
    file.write_text("no")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        weights.load(file)
    with pytest.raises(UserError, match="there is no file"):
        weights.load(tmp_path / "missing")


def test_loading_the_shipped_weights_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    weights.load()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_network_fades_in_long_studies() -> None:
    torch.manual_seed(0)
    network = Scorer()
    torch.nn.init.normal_(network.last.weight)

    def correction(space: Space, trials: int) -> float:
        points = np.random.default_rng(0).random((trials, len(space)))
        decision = _decide(space, _trials(space, points.tolist(), points[:, 0].tolist()))
        return network(_features(decision)).abs().max().item()

    for space in (PLAIN, LORA):
        assert correction(space, 5) > 0.1
        assert correction(space, 200) < 0.1 * correction(space, 5)
