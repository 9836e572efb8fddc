from __future__ import annotations

import copy
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from optuna_lora_rl.policy.adaptation import MAX_CHANGE
from optuna_lora_rl.policy.adaptation import MAX_KL
from optuna_lora_rl.policy.adaptation import SHARPNESS
from optuna_lora_rl.policy.adaptation import Step
from optuna_lora_rl.policy.adaptation import adapt
from optuna_lora_rl.policy.adaptation import rewards
from optuna_lora_rl.policy.features import CANDIDATE_FEATURES
from optuna_lora_rl.policy.features import CONTEXT_FEATURES
from optuna_lora_rl.policy.network import Features
from optuna_lora_rl.policy.network import Scorer


def _network() -> Scorer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Scorer(16)
        torch.nn.init.normal_(network.last.weight, std=0.3)
    return network.requires_grad_(False)


def _steps(count: int) -> list[Step]:
    """Choices among 5 or 6 candidates; the one that has the first feature brings a reward."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for t in range(count):
        N = 5 + t % 2
        values = torch.randn(N, len(CANDIDATE_FEATURES), generator=generator).numpy()
        context = np.zeros(len(CONTEXT_FEATURES), dtype=np.float32)
        residual = np.append(np.zeros(N - 1), -np.inf)
        action = t % 3
        steps.append(
            Step(values, context, residual, 1.0, action, 2.0 * float(values[action, 0] > 0))
        )
    return steps


def _log_probability(network: Scorer, step: Step) -> torch.Tensor:
    residual = torch.from_numpy(step.residual)
    each, whole = torch.from_numpy(step.values)[None], torch.from_numpy(step.context)[None]
    correction = network(Features(each, whole, residual[None].isfinite()))[0]
    return torch.log_softmax(SHARPNESS * (residual + step.share * correction), -1)


def test_what_brought_more_becomes_likelier() -> None:
    old, steps = _network(), _steps(16)
    new = adapt(old, steps, torch.Generator().manual_seed(0))
    gain = [
        float(_log_probability(new, s)[s.action] - _log_probability(old, s)[s.action])
        for s in steps
    ]
    reward = [s.reward for s in steps]
    assert np.corrcoef(gain, reward)[0, 1] > 0.2


@contextmanager
def _half() -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, _half])
def test_what_is_learnt_does_not_depend_on_the_program_around_it(
    mode: Callable[[], AbstractContextManager[None]],
) -> None:
    old, steps = _network(), _steps(8)
    usual = adapt(old, steps, torch.Generator().manual_seed(0)).last.weight
    with mode():
        # What is made inside inference mode cannot be learnt from as it is.
        copied = copy.deepcopy(old)
        learnt = adapt(copied, steps, torch.Generator().manual_seed(0)).last.weight
    assert not learnt.is_inference()
    # To rounding: where a copy lies in memory moves the last digit.
    assert torch.allclose(learnt, usual, rtol=1e-4, atol=1e-6)
    assert not torch.equal(learnt, old.last.weight)


@pytest.mark.parametrize("count", [8, 32])
def test_the_change_is_bounded_and_only_the_last_layers(count: int) -> None:
    old, steps = _network(), _steps(count)
    kept = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    new = adapt(old, steps, torch.Generator().manual_seed(0))
    assert all(torch.equal(old.state_dict()[name], tensor) for name, tensor in kept.items())
    changed = {name for name, t in new.state_dict().items() if not torch.equal(t, kept[name])}
    assert changed == {"last.weight", "last.bias"} or changed == {"last.weight"}
    change = sum(float((new.state_dict()[n] - kept[n]).square().sum()) for n in changed) ** 0.5
    norm = sum(float(kept[n].square().sum()) for n in ("last.weight", "last.bias")) ** 0.5
    assert change <= MAX_CHANGE * max(norm, 1.0) * 1.0001
    divergence = []
    for step in steps:
        before, after = _log_probability(old, step), _log_probability(new, step)
        p = before.exp()
        divergence.append(float((p * torch.where(p > 0, before - after, 0.0 * p)).sum()))
    assert float(np.mean(divergence)) <= MAX_KL + 1e-6


def test_nothing_is_learnt_from_nothing() -> None:
    old = _network()
    for steps in ([], _steps(1)):
        new = adapt(old, steps, torch.Generator().manual_seed(0))
        assert torch.equal(new.last.weight, old.last.weight)


def test_rewards_are_paid_for_improvements_alone() -> None:
    scores = np.array([0.0, 1.0, 0.5, 3.0, 3.0, 0.0])
    good = np.array([True, True, True, True, True, False])
    paid = rewards(scores, good)
    assert np.all(paid[[0, 1, 3]] > 0)
    assert np.all(paid[[2, 4, 5]] == 0)
    assert not rewards(scores, np.zeros(6, dtype=bool)).any()
