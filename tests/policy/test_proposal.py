from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.policy import weights
from optuna_lora_rl.policy.ascent import climb
from optuna_lora_rl.policy.candidates import SOURCES
from optuna_lora_rl.policy.candidates import Observed
from optuna_lora_rl.policy.candidates import is_repeat
from optuna_lora_rl.policy.candidates import prior_points
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.layout import exact_snap
from optuna_lora_rl.policy.layout import layout_of
from optuna_lora_rl.policy.layout import stack
from optuna_lora_rl.policy.network import Scorer
from optuna_lora_rl.policy.prior import coverage
from optuna_lora_rl.policy.prior import space_prior
from optuna_lora_rl.policy.proposal import Decision
from optuna_lora_rl.policy.proposal import Settings
from optuna_lora_rl.policy.proposal import decide
from optuna_lora_rl.policy.proposal import fit_feasibility
from optuna_lora_rl.policy.proposal import fit_surrogate
from optuna_lora_rl.policy.scores import standardise

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


def _observed(
    space: Space, points: list[list[float]], scores: list[float], failed: list[bool] | None = None
) -> Observed:
    x = space.snap(np.array(points, dtype=float).reshape(1, -1, len(space)))
    bad = torch.tensor([failed or [False] * len(scores)], dtype=torch.bool)
    y = torch.tensor([scores], dtype=torch.float64)
    return Observed(
        x=torch.from_numpy(x),
        y=standardise(y, ~bad, bad),
        mask=torch.ones_like(bad),
        failed=bad,
        infeasible=torch.zeros_like(bad),
        pending=torch.zeros((1, 0, len(space)), dtype=torch.float64),
        pending_mask=torch.zeros((1, 0), dtype=torch.bool),
        horizon=torch.tensor([0]),
    )


def _decide(space: Space, observed: Observed, network: Scorer | None = None) -> Decision:
    generator = torch.Generator().manual_seed(0)
    layout = layout_of(space)
    return decide(layout, observed, network, exact_snap(space), generator, SETTINGS)


def _params(space: Space, decision: Decision) -> dict:
    return space.decode(decision.candidates.x[0, int(decision.logits[0].argmax())].numpy())


def test_the_first_proposal_is_what_guides_recommend() -> None:
    params = _params(LORA, _decide(LORA, _observed(LORA, [], [])))
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
    layout = layout_of(PLAIN)
    x = torch.rand(1, 50, 2, dtype=torch.float64)
    assert layout.log_prior(x).unique().numel() == 1
    assert _params(PLAIN, _decide(PLAIN, _observed(PLAIN, [], []))) in (
        {"x": 0.5, "y": 4},
        {"x": 0.5, "y": 5},
    )
    spread = _decide(PLAIN, _observed(PLAIN, [[0.5, 0.5]], [0.0]))
    assert SOURCES[spread.candidates.source[int(spread.logits.argmax())]] == "uniform"


def test_alpha_is_drawn_and_judged_by_its_ratio_to_the_rank() -> None:
    layout = layout_of(LORA)
    x = prior_points(layout, 400, torch.Generator().manual_seed(0))
    drawn = [LORA.decode(point) for point in x[0].numpy()]
    ratio = np.array([p["lora_alpha"] / p["lora_rank"] for p in drawn])
    assert 1.0 < np.median(ratio) < 2.5
    same = {"learning_rate": 2e-4, "lora_dropout": 0.0, "target_modules": "qv"}
    points = [
        LORA.encode({**same, "lora_rank": rank, "lora_alpha": alpha})
        for rank, alpha in ((32, 64), (32, 512), (32, 1))
    ]
    usual, large, small = layout.log_prior(torch.tensor(np.array([points])))[0]
    assert usual > large + 1
    assert usual > small + 1


def test_an_untrained_network_leaves_the_residual_policy_as_it_is() -> None:
    observed = _observed(LORA, [[0.5] * 5, [0.6] * 5, [0.4] * 5], [0.1, 0.9, 0.2])
    with_network, without = _decide(LORA, observed, Scorer()), _decide(LORA, observed)
    assert torch.equal(with_network.logits, without.logits)


def test_candidates_exist_are_new_and_come_from_every_source() -> None:
    observed = _observed(LORA, [[0.5] * 5, [0.6] * 5], [0.1, 0.9])
    decision = _decide(LORA, observed)
    x = decision.candidates.x
    assert torch.equal(exact_snap(LORA)(x), x)
    repeats = is_repeat(x, observed.x, observed.mask)
    assert not (repeats & decision.candidates.valid).any()
    own = set(range(len(SOURCES))) - {SOURCES.index("transfer")}
    assert set(decision.candidates.source.tolist()) == own
    assert 77 <= x.shape[1] <= 97


def test_climbing_finds_more_expected_improvement_than_a_thousand_draws() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((30, 5))
    scores = -((points - 0.37) ** 2).sum(axis=1)
    observed = _observed(LORA, points.tolist(), scores.tolist())
    layout, settings = layout_of(LORA), Settings(candidates=64)
    surrogate = fit_surrogate(layout, observed, settings)
    best = surrogate.incumbent(observed.good)

    def value(x: torch.Tensor) -> torch.Tensor:
        return surrogate.slope(layout.model_coordinates(x), best)[0]

    drawn = torch.from_numpy(LORA.snap(rng.random((1, 1000, 5))))
    start = drawn[:, value(drawn)[0, :50].topk(5).indices]
    climbed = climb(start, layout, surrogate, best, steps=20)
    assert (value(climbed) >= value(start)).all()
    assert value(climbed).max() > value(drawn).max()


def test_the_region_of_failures_is_left() -> None:
    """Everything above 0.6 of the learning rate's range failed: go below."""
    points = [[u, 0.5, 0.5, 0.0, 0.9] for u in (0.55, 0.7, 0.8, 0.9)]
    failed = [False, True, True, True]
    params = _params(LORA, _decide(LORA, _observed(LORA, points, [1.0, 0, 0, 0], failed)))
    assert LORA.encode(params)[0] < 0.6


def test_pending_trials_are_not_proposed_again() -> None:
    points = [[i / 9, 0.5] for i in range(10)]
    observed = _observed(PLAIN, points, [-((i - 4.0) ** 2) for i in range(10)])
    first = _decide(PLAIN, observed)
    chosen = first.candidates.x[:, int(first.logits.argmax())][:, None]
    observed.pending, observed.pending_mask = chosen, torch.ones((1, 1), dtype=torch.bool)
    second = _decide(PLAIN, observed)
    again = second.candidates.x[:, int(second.logits.argmax())]
    assert (again - chosen[:, 0]).abs().max() > 1e-3


def test_an_exhausted_space_repeats_what_did_not_fail() -> None:
    space = make_space([Dimension("x", "categorical", choices=("a", "b"))])
    observed = _observed(space, [[0.25], [0.75]], [0.0, 0.0], [True, False])
    assert _params(space, _decide(space, observed)) == {"x": "b"}


@pytest.mark.parametrize("unit", [1e-307, 1e-160, 1e6, 1e160, 1e307])
@pytest.mark.parametrize("farthest", [1.0, math.inf])
def test_feasibility_follows_the_constraint(unit: float, farthest: float) -> None:
    observed = _observed(PLAIN, [[i / 9, 0.5] for i in range(10)], [0.0] * 10)
    constraint = (observed.x[:, :, :1] - 0.4) * unit
    constraint[0, -2:] *= farthest
    feasible = fit_feasibility(layout_of(PLAIN), observed, constraint)
    assert feasible is not None
    low, high = feasible(torch.tensor([[[0.15, 0.5], [0.85, 0.5]]], dtype=torch.float64))[0].exp()
    assert low > 0.9
    assert high < 0.1
    assert fit_feasibility(layout_of(PLAIN), observed, constraint[:, :, :0]) is None


@pytest.mark.parametrize(("broken", "kept"), [(1.0, -1.0), (math.inf, -1.0), (2.0, -math.inf)])
def test_two_values_are_a_flag_whatever_they_are(broken: float, kept: float) -> None:
    observed = _observed(PLAIN, [[i / 9, 0.5] for i in range(10)], [0.0] * 10)
    over = observed.x[:, :, :1] > 0.4
    models = [
        fit_feasibility(layout_of(PLAIN), observed, torch.where(over, a, b).double())
        for a, b in ((1.0, 0.0), (broken, kept))
    ]
    x = torch.rand((1, 9, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flag, told = (model(x) for model in models if model is not None)
    torch.testing.assert_close(told, flag)


def test_a_batch_of_spaces_scores_as_each_alone() -> None:
    x = torch.rand(1, 20, 5, dtype=torch.float64)
    both = stack([layout_of(LORA), layout_of(PLAIN)])
    alone = layout_of(LORA)
    wide = torch.cat([x, x])
    assert both.log_prior(wide)[0].numpy() == pytest.approx(alone.log_prior(x)[0].numpy())
    assert both.log_prior(wide)[1].abs().max() == 0
    assert torch.equal(both.snap(wide.clone())[0], alone.snap(x.clone())[0])


def test_the_scorer_does_not_care_about_the_order_of_candidates() -> None:
    torch.manual_seed(0)
    network = Scorer()
    torch.nn.init.normal_(network.last.weight)
    seen = _decide(LORA, _observed(LORA, [[0.5] * 5], [0.0])).features
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
        decision = _decide(space, _observed(space, points.tolist(), points[:, 0].tolist()))
        return network(decision.features).abs().max().item()

    for space in (PLAIN, LORA):
        assert correction(space, 5) > 0.1
        assert correction(space, 200) < 0.1 * correction(space, 5)
