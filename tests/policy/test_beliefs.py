"""What a wide network sees, and how it is kept from saying too much too soon."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from optuna_lora_rl import TuningContext
from optuna_lora_rl.policy import weights
from optuna_lora_rl.policy.beliefs import CANDIDATE_BELIEFS
from optuna_lora_rl.policy.beliefs import STUDY_BELIEFS
from optuna_lora_rl.policy.candidates import MOVES
from optuna_lora_rl.policy.candidates import Trials
from optuna_lora_rl.policy.candidates import moves
from optuna_lora_rl.policy.candidates import strays
from optuna_lora_rl.policy.decision import Decision
from optuna_lora_rl.policy.decision import Settings
from optuna_lora_rl.policy.decision import decide
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.network import Correction
from optuna_lora_rl.policy.network import Features
from optuna_lora_rl.policy.network import Scorer
from optuna_lora_rl.policy.network import sizes
from optuna_lora_rl.policy.scores import standardise

LORA = make_space(
    [
        Dimension("learning_rate", "float", 1e-6, 1e-1, log=True),
        Dimension("lora_rank", "int", 2, 128, log=True),
        Dimension("lora_alpha", "int", 2, 256, log=True),
        Dimension("target_modules", "categorical", choices=("qv", "all-linear")),
    ]
)
PLAIN = make_space([Dimension("x", "float"), Dimension("y", "float")])
NARROW = Settings(candidates=32, bank=True)
WIDE = replace(NARROW, moves=1_000_000, wide=True)
EACH, WHOLE = sizes(wide=True)


def _trials(space: Space, n: int) -> Trials:
    x = space.snap(np.random.default_rng(0).random((n, len(space))))
    none = np.zeros(n, dtype=bool)
    return Trials(x, standardise(-np.abs(x[:, 0] - 0.6), none), none, none, x[:0])


def _decide(
    space: Space, n: int, settings: Settings = WIDE, context: TuningContext | None = None
) -> tuple[Decision, Layout]:
    layout, generator = Layout(space, context), torch.Generator().manual_seed(0)
    return decide(layout, _trials(space, n), None, space.snap, generator, settings), layout


def _seen(decision: Decision, name: str) -> np.ndarray:
    if name in STUDY_BELIEFS:
        return decision.context[STUDY_BELIEFS.index(name) - len(STUDY_BELIEFS)]
    return decision.values[:, CANDIDATE_BELIEFS.index(name) - len(CANDIDATE_BELIEFS)]


def test_features_have_one_shape_and_are_bounded() -> None:
    shapes = set()
    for space, n in ((LORA, 0), (LORA, 1), (LORA, 4), (LORA, 12), (PLAIN, 3)):
        decision, _ = _decide(space, n)
        assert decision.context.shape == (WHOLE,)
        shapes.add(decision.values.shape)
        for seen in (decision.values, decision.context):
            assert np.isfinite(seen).all() and np.abs(seen).max() <= 8.0
    assert len(shapes) == 1 and next(iter(shapes))[1] == EACH


def test_the_surfaces_are_seen_as_long_as_they_are_asked() -> None:
    for space, n, asked in ((LORA, 4, True), (LORA, 12, False), (PLAIN, 4, False)):
        decision, _ = _decide(space, n)
        assert bool(_seen(decision, "surfaces")) == asked
        assert (_seen(decision, "surfaces_mean") != 0).any() == asked
    decision, _ = _decide(LORA, 4)
    # Exactly one candidate is best under each pair.
    assert np.square(_seen(decision, "surfaces_best")).sum() == pytest.approx(1.0, abs=1e-5)


def test_the_context_is_seen() -> None:
    blind, _ = _decide(LORA, 2)
    told = TuningContext(hidden_size=128, steps=32, batch_size=8, examples=100, method="dpo")
    seeing, layout = _decide(LORA, 2, context=told)
    assert not _seen(blind, "model_known") and not _seen(blind, "examples_known")
    assert _seen(seeing, "model_known") and _seen(seeing, "smallness") > 0
    assert layout.expected is not None
    assert _seen(seeing, "expected_deviation") == pytest.approx(layout.expected.deviation)
    assert _seen(seeing, "method_shift") < -1


def test_the_second_and_third_trial_change_rate_and_size_alone() -> None:
    trials = _trials(LORA, 1)
    decision, layout = _decide(LORA, 1)
    chosen = decision.x[int(decision.logits.argmax())]
    assert not strays(layout, trials, chosen[None])[0]
    other = trials.x.copy()
    other[0, 3] = 0.25 if other[0, 3] > 0.5 else 0.75
    assert strays(layout, trials, other)[0]
    born = moves(layout, trials)
    assert born.shape == (MOVES, len(LORA)) and (born >= 0).all() and (born <= 1).all()
    assert len(np.unique(born[:, :2], axis=0)) > MOVES // 2
    assert moves(Layout(PLAIN), _trials(PLAIN, 1)).shape == (MOVES, 2)


def test_a_wide_network_says_the_same_in_training_and_at_work(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Scorer(16, wide=True)
    torch.nn.init.normal_(network.last.weight, std=20.0)
    weights.save(network, tmp_path / "w.safetensors")
    network = weights.load(tmp_path / "w.safetensors")
    assert network.wide
    for n in (0, 2, 5):
        decision, _ = _decide(LORA, n)
        one = Correction.of(network)(decision.values, decision.context, decision.valid)
        seen = (decision.values, decision.context, decision.valid)
        batch = Features(*(torch.from_numpy(array)[None] for array in seen))
        with torch.no_grad():
            assert np.allclose(network(batch)[0].numpy(), one, atol=1e-4)
        # Little may be said before the fourth trial.
        assert np.abs(one).max() <= (1.5 if n < 3 else 8.0) + 1e-6
        assert (np.abs(one).max() > 1.5) == (n >= 3)


def test_a_narrow_network_knows_nothing_of_it() -> None:
    decision, _ = _decide(LORA, 4, NARROW)
    assert decision.values.shape[1] == sizes(wide=False)[0]
    assert Correction.of(Scorer(16))(decision.values, decision.context, decision.valid).shape
