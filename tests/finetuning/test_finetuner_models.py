"""Runs leave the base model as it was; adapters load onto it, on several architectures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.finetuner import FineTuningError
from tests.finetuning.architectures import ARCHITECTURES
from tests.finetuning.architectures import saved_model
from tests.finetuning.runs import QUICK
from tests.finetuning.runs import Hash
from tests.finetuning.runs import Make
from tests.finetuning.runs import loss_of_saved
from tests.finetuning.runs import tuner_ready

# transformers renames what PEFT still calls by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


VARIANTS: list[dict[str, Any]] = [
    {},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_2", "use_rslora": True},
    {"init_lora_weights": "olora", "target_modules": "qv"},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": "orthogonal", "layers": "last-half"},
    {"init_lora_weights": "gaussian", "loraplus_lr_ratio": 8.0, "weight_decay": 0.1},
    {"use_dora": True, "lora_dropout": 0.1, "target_modules": "mlp"},
    {"use_dora": True, "init_lora_weights": "pissa"},
    {"lr_scheduler_type": "cosine", "warmup_ratio": 0.5, "optim": "adafactor"},
]


def test_the_base_model_comes_back_bit_for_bit(
    tuner: FineTuner, base_hash: Hash, tmp_path: Path
) -> None:
    before = base_hash(tuner)
    attributes = set(tuner.prepared.base.model.__dict__)
    config = tuner.prepared.base.model.config.to_dict()
    first = tuner.run(QUICK)
    for number, variant in enumerate(VARIANTS):
        tuner.run({**QUICK, **variant}, folder=tmp_path / str(number))
        assert base_hash(tuner) == before, variant
    again = tuner.run(QUICK)
    assert (again.quality, again.score, again.curve) == (first.quality, first.score, first.curve)
    assert set(tuner.prepared.base.model.__dict__) == attributes
    assert tuner.prepared.base.model.config.to_dict() == config
    assert not any(p.requires_grad for p in tuner.prepared.base.model.parameters())


def test_trained_biases_are_put_back(
    make_tuner: Make, make_tokenizer: Callable[[], Any], base_hash: Hash, tmp_path: Path
) -> None:
    import torch
    from transformers import GPT2Config
    from transformers import GPT2LMHeadModel

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with torch.random.fork_rng():
        GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32)
        ).save_pretrained(tmp_path / "gpt2")
    tuner = make_tuner(name=str(tmp_path / "gpt2"))
    before = base_hash(tuner_ready(tuner))
    with pytest.raises(FineTuningError, match="olora does not go with gpt2 models") as failed:
        tuner.run({**QUICK, "init_lora_weights": "olora"})
    assert failed.value.reason == "configuration"
    for bias in ("all", "lora_only"):
        adapter = tmp_path / bias
        result = tuner.run({**QUICK, "bias": bias, "init_lora_weights": "pissa"}, folder=adapter)
        assert base_hash(tuner) == before
        assert loss_of_saved(tuner, adapter) == pytest.approx(result.metrics["loss"], rel=1e-4)


# PEFT's olora does not go with gpt2.
@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {"gpt2"}))
def test_other_architectures_train_and_come_back(
    make_tuner: Make,
    make_tokenizer: Callable[[], Any],
    base_hash: Hash,
    tmp_path: Path,
    name: str,
) -> None:
    folder = saved_model(name, ARCHITECTURES[name], make_tokenizer(), tmp_path)
    tuner = tuner_ready(make_tuner(name=folder))
    before = base_hash(tuner)
    for variant in ({"target_modules": "qv"}, {"init_lora_weights": "olora", "layers": "1"}):
        adapter = tmp_path / "adapter" / variant.get("init_lora_weights", "default")
        result = tuner.run({**QUICK, "lora_rank": 2, **variant}, folder=adapter)
        assert base_hash(tuner) == before
        assert loss_of_saved(tuner, adapter) == pytest.approx(result.metrics["loss"], rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def test_a_saved_adapter_loads_onto_the_original_model(
    tuner: FineTuner, tmp_path: Path, variant: dict[str, Any]
) -> None:
    result = tuner.run({**QUICK, **variant}, folder=tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == tuner.model.name
    assert saved["peft_type"] == "LORA"
    assert loss_of_saved(tuner, tmp_path / "adapter") == pytest.approx(
        result.metrics["loss"], rel=1e-4
    )
