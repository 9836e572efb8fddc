from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import probe
from optuna_lora_rl.rank import saved
from optuna_lora_rl.rank import spectrum
from optuna_lora_rl.rank.layers import Factors
from tests.rank.conftest import drawn_factors
from tests.rank.conftest import language_loss


def with_values(values: torch.Tensor, d: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    n = len(values)
    u = torch.linalg.qr(torch.randn(d, n, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(k, n, generator=generator)).Q
    return (u * values) @ v.T


def test_numbers_of_a_known_spectrum() -> None:
    known = spectrum.of_matrix(with_values(torch.tensor([4.0, 2.0, 2.0, 0.02]), 7, 5))
    assert known.exact
    assert known.effective_rank == 3
    assert known.spectral_norm == pytest.approx(4, rel=1e-5)
    assert known.frobenius_norm == pytest.approx(24.0004**0.5, rel=1e-5)
    assert known.stable_rank == pytest.approx(24.0004 / 16, rel=1e-5)
    assert (known.energy_rank(0.6), known.rank_90, known.rank_95) == (1, 3, 3)
    p = np.array([4, 2, 2, 0.02]) / 8.02
    assert known.entropy_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_equal_values_have_full_rank_by_every_measure() -> None:
    flat = spectrum.of_matrix(torch.eye(6))
    assert flat.effective_rank == flat.rank_95 == 6
    assert flat.entropy_rank == pytest.approx(6)
    assert flat.stable_rank == pytest.approx(6)
    assert flat.condition == pytest.approx(1)


def test_a_zero_matrix_has_no_rank() -> None:
    zero = spectrum.of_matrix(torch.zeros(3, 4))
    assert (zero.effective_rank, zero.rank_90, zero.entropy_rank, zero.stable_rank) == (0,) * 4
    assert zero.condition == float("inf")


N, K = 300, 420
SPECTRA = {
    "gaussian": lambda: torch.randn(N, K, generator=torch.Generator().manual_seed(0)),
    "power": lambda: with_values(torch.arange(1, N + 1).float() ** -0.7, K, N),
    "exponential": lambda: with_values(torch.exp(-torch.arange(N) / 20.0), N, K),
    "low-rank": lambda: with_values(torch.linspace(3, 1, 10), N, K),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_a_randomised_decomposition_keeps_its_word(name: str) -> None:
    matrix = SPECTRA[name]()
    exact = spectrum.of_matrix(matrix)
    rough = spectrum.of_matrix(matrix, exact_up_to=0, components=40)
    assert exact.exact
    assert not rough.exact
    assert rough.shape == exact.shape
    assert len(rough.values) == len(exact.values) == N
    assert (np.diff(rough.values) <= 0).all()
    leading = rough.values[: rough.computed]
    distance = np.abs(leading[:, None] - exact.values).min(axis=1) / exact.values[0]
    assert (distance <= rough.error + 1e-5).all()
    assert rough.energy == pytest.approx(exact.energy, rel=1e-4)
    assert rough.effective_rank == pytest.approx(exact.effective_rank, rel=0.05)
    assert rough.entropy_rank == pytest.approx(exact.entropy_rank, rel=0.05)
    assert rough.stable_rank == pytest.approx(exact.stable_rank, rel=0.05)
    assert rough.rank_95 == pytest.approx(exact.rank_95, rel=0.05, abs=1)


def test_a_randomised_decomposition_repeats_itself() -> None:
    matrix = SPECTRA["power"]()
    first, second = (spectrum.of_matrix(matrix, exact_up_to=0, components=20) for _ in range(2))
    assert (first.values == second.values).all()


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(1, 12),
    k=st.integers(1, 12),
    r=st.integers(1, 14),
    scaling=st.floats(0.1, 10),
    seed=st.integers(0, 99),
)
def test_an_update_has_the_spectrum_of_its_product(
    d: int, k: int, r: int, scaling: float, seed: int
) -> None:
    a, b = drawn_factors(d, k, r, seed)
    dense = torch.linalg.svdvals(scaling * b.double() @ a.double()).numpy()
    values = spectrum.of_factors(Factors(a, b, scaling)).values
    padded = np.zeros(max(len(dense), len(values)))
    padded[: len(dense)] = dense
    assert np.allclose(values, padded[: len(values)], atol=1e-9 * max(1, padded[0]))
    assert np.allclose(padded[len(values) :], 0, atol=1e-9 * max(1, padded[0]))


def test_weights_go_by_the_same_names_with_and_without_an_adapter(
    model: Any, adapted: Callable[..., Any]
) -> None:
    before = spectrum.of_weights(model)
    assert "lm_head" not in before
    assert len(before) == 14
    after = spectrum.of_weights(adapted())
    assert list(after) == list(before)
    name = "model.layers.1.mlp.up_proj"
    assert (after[name].values == before[name].values).all()
    assert before[name].shape == (64, 32)


def test_weights_stored_transposed_count_as_outputs_by_inputs() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 4))
    assert layers.shapes_of(model) == {"0": (6, 4)}
    assert spectrum.of_weights(model)["0"].shape == (6, 4)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_attached_and_saved_adapters_have_the_spectra_of_their_dense_updates(
    adapted: Callable[..., Any], tmp_path: Path, use_rslora: bool
) -> None:
    peft = adapted(
        use_rslora=use_rslora,
        rank_pattern={"down_proj": 6},
        alpha_pattern={r"layers\.1\.mlp\.down_proj": 3},
    )
    peft.save_pretrained(tmp_path)
    attached = spectrum.of_adapter(peft)
    stored = spectrum.of_all(saved.read(tmp_path).factors)
    assert set(attached) == set(stored) and len(stored) == 4
    for name, layer in layers.lora_layers(peft).items():
        dense = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double()).numpy()
        for found in (attached[name], stored[name]):
            assert np.allclose(found.values, dense[: len(found.values)], rtol=1e-4, atol=1e-6)
            assert found.shape == tuple(layer.get_delta_weight("default").shape)


def test_gradients_are_those_of_the_weights(model: Any, ids: Any) -> None:
    name = "model.layers.0.self_attn.q_proj"
    found = probe.gradients(model, [ids[:1], ids[1:]], language_loss)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    weight = model.get_submodule(name).weight.requires_grad_(True)
    for part in (ids[:1], ids[1:]):
        language_loss(model, part).backward()
    assert np.allclose(found[name].values, torch.linalg.svdvals(weight.grad), atol=1e-5)
    assert len(found) == 14


def test_a_probe_leaves_training_as_it_was(adapted: Callable[..., Any], ids: Any) -> None:
    peft = adapted(lora_dropout=0.5).train()
    language_loss(peft, ids).backward()
    before = {n: (p.requires_grad, p.grad) for n, p in peft.named_parameters()}
    probe.gradients(peft, [ids], language_loss, names=["model.layers.0.mlp.up_proj"])
    probe.activations(peft, [ids], lambda model, batch: model(batch))
    assert all(module.training for module in peft.modules())
    for name, parameter in peft.named_parameters():
        assert (parameter.requires_grad, parameter.grad) == before[name]


def test_sketched_gradients_are_close(model: Any, ids: Any) -> None:
    name = "model.layers.0.mlp.down_proj"
    whole = probe.gradients(model, [ids], language_loss, names=[name])[name]
    rough = probe.gradients(model, [ids], language_loss, names=[name], columns=48)[name]
    assert rough.shape == (32, 48)
    assert rough.frobenius_norm == pytest.approx(whole.frobenius_norm, rel=0.3)


def test_activations_are_those_of_the_inputs(model: Any, ids: Any) -> None:
    name = "model.layers.0.self_attn.q_proj"
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    found = probe.activations(model, [ids], lambda model, batch: model(batch))
    hook.remove()
    x = seen[0].reshape(-1, 32)
    expected = torch.linalg.svdvals(x.detach() / len(x) ** 0.5)
    assert np.allclose(found[name].values[:20], expected[:20], atol=1e-3)


def test_padding_does_not_count(model: Any, ids: Any) -> None:
    name = "model.layers.0.self_attn.q_proj"
    run = lambda model, batch: model(batch)  # noqa: E731
    short = probe.activations(model, [ids[:, :6]], run)[name]
    masked = probe.activations(model, [ids], run, mask=lambda batch: batch % 10 < 6)[name]
    assert np.allclose(short.values, masked.values, atol=1e-3)


def test_wide_inputs_keep_their_leading_values(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Sequential(nn.Linear(120, 2))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 120, generator=generator) * torch.exp(-torch.arange(120) / 8)
    run = lambda model, batch: model(batch)  # noqa: E731
    whole = probe.activations(layer, [x], run)["0"]
    monkeypatch.setattr(probe, "_WHOLE_UP_TO", 100)
    monkeypatch.setattr(probe, "_SKETCH", 60)
    rough = probe.activations(layer, [x], run)["0"]
    assert np.allclose(rough.values[:20], whole.values[:20], rtol=1e-3)
    assert rough.energy == pytest.approx(whole.energy, rel=1e-4)


def test_bad_input_is_one_sentence(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no layer 'nowhere'"):
        spectrum.of_weights(model, ["nowhere"])
    with pytest.raises(UserError, match="no linear LoRA layers of an adapter 'default'"):
        spectrum.of_adapter(model)
    with pytest.raises(UserError, match="no linear layers"):
        spectrum.of_weights(nn.ReLU())
    with pytest.raises(UserError, match="at least one batch"):
        probe.gradients(model, [], language_loss)
    with pytest.raises(UserError, match=r"holds no adapter: no adapter_config\.json"):
        saved.read(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        saved.read(tmp_path)
    quantised = nn.Sequential(nn.Linear(2, 2))
    quantised[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="the weight of 0 is quantised"):
        spectrum.of_weights(quantised)
