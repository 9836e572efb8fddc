"""Ranks that change in TRL runs, by deciders that are quick enough for a few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank.callback import GradientRankCallback
from optuna_lora_rl.rank.callback import LossRankCallback
from optuna_lora_rl.rank.deciders import GradientSpectrum
from optuna_lora_rl.rank.deciders import LossCurve
from optuna_lora_rl.rank.deciders import Steps
from tests.rank.conftest import language_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def train(
    peft: Any, random_llama: Path, folder: Path, callback: Any, **settings: Any
) -> dict[str, int]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig
    from trl import SFTTrainer

    rows = [{"input_ids": [5 + i, 6 + i, 7, 8, 9]} for i in range(16)]
    data = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])
    trainer = SFTTrainer(
        model=peft,
        args=SFTConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            disable_tqdm=True,
            per_device_train_batch_size=4,
            max_length=None,
            max_steps=8,
            **{"gradient_checkpointing": False, "learning_rate": 1e-3, **settings},
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(random_llama),
        callbacks=[callback],
    )
    trainer.train()
    return {name: layer.r["default"] for name, layer in layers.lora_layers(peft).items()}


def test_a_flat_loss_grows_the_layers_in_a_run(
    adapted: Callable[..., Any], random_llama: Path, tmp_path: Path, ids: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    peft = adapted(random=False)
    # Any loss is a plateau.
    decider = LossCurve(
        window=3, plateau=9.0, calm=9.0, oscillation=9.0, steps=Steps(patience=1, maximum=6)
    )
    callback = LossRankCallback(decider)
    settings = {"eval_strategy": "steps", "eval_steps": 1}
    ranks = train(peft, random_llama, tmp_path, callback, **settings)
    assert set(ranks.values()) == {6}
    assert [(c.step, c.layer, c.before, c.after) for c in callback.changes] == [
        (3, name, 4, 6) for name in ranks
    ]
    assert all("stands still" in change.reason for change in callback.changes)
    # The new columns of B were trained.
    assert all(
        (f.b[:, 4:] != 0).any() for f in map(layers.factors_of, layers.lora_layers(peft).values())
    )
    peft.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(random_llama)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.allclose(again.eval()(ids).logits, peft.eval()(ids).logits, atol=1e-5)


def test_logged_losses_are_another_source(
    adapted: Callable[..., Any], random_llama: Path, tmp_path: Path
) -> None:
    decider = LossCurve(window=3, plateau=9.0, calm=9.0, oscillation=9.0, steps=Steps(patience=1))
    callback = LossRankCallback(decider, source="train")
    train(adapted(), random_llama, tmp_path, callback, logging_steps=1)
    assert {change.step for change in callback.changes} == {3, 6}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_change_ranks_in_a_run(
    adapted: Callable[..., Any], random_llama: Path, tmp_path: Path, gradient_checkpointing: bool
) -> None:
    peft = adapted(random=False)
    decider = GradientSpectrum(
        window=2, consistent=-1.0, fading=0.99, steps=Steps(patience=1, maximum=8)
    )
    callback = GradientRankCallback(decider, every=2, columns=16)
    ranks = train(
        peft, random_llama, tmp_path, callback, gradient_checkpointing=gradient_checkpointing
    )
    assert callback.changes
    assert {change.step for change in callback.changes} <= {3, 5, 7}
    for change in callback.changes:
        assert "of the gradient's energy" in change.reason
    last = {change.layer: change.after for change in callback.changes}
    assert ranks == {**dict.fromkeys(ranks, 4), **last}
    assert not any(layer._forward_hooks for layer in layers.lora_layers(peft).values())


def test_sketches_are_the_gradients_of_the_weights(adapted: Callable[..., Any], ids: Any) -> None:
    from optuna_lora_rl.rank.probe import GradientSketches

    peft = adapted()
    found = layers.lora_layers(peft)
    sketches = GradientSketches(found, columns=40)
    sketches.start()
    for part in (ids[:1], ids[1:]):
        language_loss(peft, part).backward()
    gathered = sketches.stop()
    for layer in found.values():
        layer.get_base_layer().weight.requires_grad_(True)
    for part in (ids[:1], ids[1:]):
        language_loss(peft, part).backward()
    for name, layer in found.items():
        whole = layer.get_base_layer().weight.grad
        if whole.shape[1] <= 40:
            assert torch.allclose(gathered[name], whole, atol=1e-6)
        else:
            assert gathered[name].shape == (whole.shape[0], 40)
            assert float(gathered[name].norm() / whole.norm()) == pytest.approx(1, abs=0.3)
    assert len(gathered) == 4


def test_a_model_without_adapter_is_refused(
    model: Any, random_llama: Path, tmp_path: Path
) -> None:
    model.requires_grad_(True)
    with pytest.raises(UserError, match="no linear LoRA layers"):
        train(model, random_llama, tmp_path, LossRankCallback(LossCurve()))
