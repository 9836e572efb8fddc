from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import architecture
from optuna_lora_rl.finetuning import lora
from optuna_lora_rl.finetuning.configuration import Configuration

# transformers renames what PEFT still calls by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture
def model(random_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(random_llama).requires_grad_(False).eval()


def hashed(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def attach(model: Any, **parameters: Any) -> Any:
    read = architecture.read(model)
    configuration = Configuration.of(parameters)
    chosen = lora.targets_of(configuration, read, {})
    return lora.attached(model, lora.lora_config(configuration, read, chosen), chosen)


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "olora", "pissa", "mica"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_starts_without_effect(model: Any, init: str, use_dora: bool) -> None:
    import torch

    if init == "mica" and use_dora:
        pytest.skip("refused")
    ids = torch.arange(10)[None]
    before = model(ids).logits
    with attach(model, init_lora_weights=init, use_dora=use_dora) as adapter:
        assert torch.allclose(adapter.model(ids).logits, before, atol=1e-4)
        assert adapter.trainable_parameters > 0
        assert not adapter.changed()
    assert torch.equal(model(ids).logits, before)


def test_an_initialisation_that_fails_half_way_leaves_nothing(model: Any) -> None:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    before, read = hashed(model), architecture.read(model)
    # One rank fits the first modules and not the later, narrower ones.
    config = LoraConfig(r=20, init_lora_weights="mica", target_modules=["q_proj", "k_proj"])
    with pytest.raises(ValueError, match="MiCA requires"):
        with lora.attached(model, config, read.linears):
            pass
    assert hashed(model) == before
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert architecture.read(model) == read


def test_configuration_becomes_pefts(model: Any) -> None:
    read = architecture.read(model)
    configuration = Configuration.of(
        {
            "lora_rank": 4,
            "lora_alpha": 6.5,
            "lora_dropout": 0.25,
            "target_modules": "qv",
            "layers": "last-half",
            "use_rslora": True,
            "bias": "lora_only",
        }
    )
    chosen = lora.targets_of(configuration, read, {})
    config = lora.lora_config(configuration, read, chosen)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 6.5, 0.25)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.layers_to_transform == [1]
    assert config.use_rslora and config.bias == "lora_only"
    assert config.init_lora_weights is True


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_a_folder_that_cannot_be_written_is_the_users_matter(
    model: Any, tmp_path: Path, init: str, make_tokenizer: Callable[[], Any]
) -> None:
    (tmp_path / "file").write_text("")
    with attach(model, init_lora_weights=init) as adapter:
        with pytest.raises(UserError, match="the adapter cannot be written to"):
            adapter.save(tmp_path / "file" / "adapter", make_tokenizer())


def test_a_full_disk_is_known_by_its_number(
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_tokenizer: Callable[[], Any],
) -> None:
    from safetensors import SafetensorError

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with attach(model, init_lora_weights="olora") as adapter:
        with pytest.raises(UserError, match="No space left on device") as refused:
            adapter.save(tmp_path, make_tokenizer())
    assert isinstance(refused.value.__cause__, OSError)
    assert refused.value.__cause__.errno == 28


def test_hooks_of_others_stay(model: Any) -> None:
    seen: list[int] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda *_: seen.append(1))
    with attach(model):
        model.enable_input_require_grads()
        assert len(embeddings._forward_hooks) == 2
    assert len(embeddings._forward_hooks) == 1
    seen.clear()
    model(model.dummy_inputs["input_ids"])
    assert seen == [1]
