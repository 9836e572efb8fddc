"""Evaluations add the updates to the base weights, and give the very weights back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig
from peft import LoraConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers import GPT2Config
from transformers import GPT2LMHeadModel

from optuna_lora_rl.finetuning import merged as merging
from optuna_lora_rl.finetuning import trainer
from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.merged import merged
from optuna_lora_rl.finetuning.trial import TrialRequest
from tests.finetuning.packing.packs import packed

Make = Callable[..., FineTuner]
IDS = torch.arange(10)[None]


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": "all-linear", **options}
    return get_peft_model(model, LoraConfig(init_lora_weights=False, **options)).eval()


def llama(folder: Any, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" not in name}


def changed(model: Any) -> set[str]:
    """The base weights that are others while updates are added."""
    before = {name: p.detach().clone() for name, p in weights(model).items()}
    with merged(model):
        return {name for name, p in weights(model).items() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 9}}])
def test_logits_are_equal_to_rounding_and_the_very_weights_come_back(
    random_llama: Any, options: dict[str, Any]
) -> None:
    model = adapted(llama(random_llama), **options)
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in weights(model).items()}
    with torch.no_grad():
        expected = model(IDS).logits
        with merged(model):
            found = model(IDS).logits
        again = model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, expected)
    for name, p in weights(model).items():
        one, place, value = before[name]
        assert p is one and p.data_ptr() == place and torch.equal(p, value)
    assert len(changed(model)) == 14  # seven modules in two layers


def test_layers_that_keep_their_weights_transposed(random_llama: Any) -> None:
    sizes = GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = adapted(GPT2LMHeadModel(sizes), fan_in_fan_out=True)
    with torch.no_grad():
        expected = model(IDS).logits
        with merged(model):
            found = model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert changed(model)


@pytest.mark.parametrize(
    ("options", "dtype"), [({"use_dora": True}, torch.float32), ({}, torch.bfloat16)]
)
def test_what_would_not_be_exact_stays_apart(
    random_llama: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    assert not changed(adapted(llama(random_llama, dtype), **options))


def test_an_adapter_that_is_no_lora_stays_apart(random_llama: Any) -> None:
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10)
    assert not changed(get_peft_model(llama(random_llama), config))


def test_a_head_that_is_the_embeddings_too_stays_apart(random_llama: Any) -> None:
    base = llama(random_llama)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    model = adapted(base, target_modules=["lm_head", "q_proj"])
    assert len(changed(model)) == 2


def test_weights_that_are_too_many_to_lie_there_twice_stay_apart(
    random_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(llama(random_llama), target_modules=["q_proj"])
    own = sum(p.nbytes for name, p in weights(model).items() if "q_proj" in name)
    monkeypatch.setattr(merging, "_MOST_BYTES", own)
    assert len(changed(model)) == 2
    monkeypatch.setattr(merging, "_MOST_BYTES", own - 1)
    assert not changed(model)


def test_an_error_leaves_nothing_behind(random_llama: Any) -> None:
    model = adapted(llama(random_llama))
    before = {name: p.clone() for name, p in weights(model).items()}
    with pytest.raises(KeyboardInterrupt), merged(model):
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())
    assert changed(model)


@pytest.mark.parametrize("chosen", [{}, {"init_lora_weights": "pissa"}, {"use_rslora": True}])
def test_a_run_is_judged_the_same(
    make_tuner: Make,
    base_hash: Callable[[FineTuner], str],
    monkeypatch: pytest.MonkeyPatch,
    chosen: dict[str, Any],
) -> None:
    tuner = make_tuner()
    tuner.prepare()
    before = base_hash(tuner)
    chosen = {"max_steps": 4, "learning_rate": 5e-3, "lora_dropout": 0.1, **chosen}
    ours = tuner.run(chosen)
    assert base_hash(tuner) == before
    monkeypatch.setattr(trainer, "merged", lambda model: nullcontext())
    theirs = tuner.run(chosen)
    for found, expected in zip(ours.curve, theirs.curve, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert found["train_loss"] == expected["train_loss"]


def test_a_pack_never_touches_the_weights_that_others_compute_with(
    make_tuner: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = make_tuner()
    entered = []

    @contextmanager
    def counted(model: Any) -> Any:
        entered.append(model)
        with merged(model):
            yield

    monkeypatch.setattr(trainer, "merged", counted)
    tuner.run({"max_steps": 2})
    assert len(entered) == 2
    outcomes, _ = packed(tuner, [TrialRequest(i, {"max_steps": 2}) for i in range(2)])
    assert len(outcomes) == 2 and len(entered) == 2
