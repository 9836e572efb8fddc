"""What a model computes is what is optimised, on every architecture; or it is refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.trial import TrialRequest
from tests.finetuning.runs import Make

# transformers renames what PEFT still calls by the old name.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STUDIES = Path(__file__).resolve().parents[2] / "studies"
TRIAL = {"max_steps": 4, "learning_rate": 5e-3, "lora_rank": 2}
# Heads with a transform, with a cap, of another width; mixtures of experts; no attention.
DIVERSE = [
    "bert",
    "doge",
    "granitemoe",
    "inkling_text",
    "laguna",
    "llama4_text",
    "mamba",
    "modernbert-decoder",
    "phimoe",
    "qwen3_next",
    "recurrent_gemma",
    "rembert",
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Makes a tiny model of an architecture, once, and returns its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        tiny_models = importlib.import_module("tiny_models")
    root, made = tmp_path_factory.mktemp("models"), set()

    def folder(name: str) -> Path:
        if name not in made:
            tiny_models.save(name, root / name)
            made.add(name)
        return root / name

    yield folder


@pytest.fixture
def tuner_of(make_tuner: Make, folder_of: Callable[[str], Path]) -> Callable[..., FineTuner]:
    """Makes a fine-tuner of an architecture, whose validation set is one batch."""

    def make(name: str, **options: Any) -> FineTuner:
        return make_tuner(name=str(folder_of(name)), eval_batch_size=64, **options)

    return make


def own_loss(model: Any, tuner: FineTuner) -> float:
    """The loss by the model's own forward pass, each row by itself, without padding."""
    losses = []
    for row in tuner.prepared.tokens.validation:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        losses.append(
            nn.functional.cross_entropy(logits[labels[1:] != -100], labels[1:][labels[1:] != -100])
            * (labels[1:] != -100).sum()
        )
    learnt = sum(
        (torch.tensor(r["labels"][1:]) != -100).sum() for r in tuner.prepared.tokens.validation
    )
    return float(sum(losses) / learnt)


def saved_loss(tuner: FineTuner, adapter: Path) -> float:
    """The same of a saved adapter, as a user of transformers and PEFT loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tuner.model.name, dtype=torch.float32)
    return own_loss(PeftModel.from_pretrained(base, str(adapter)).eval(), tuner)


def shapes(adapter: Path) -> dict[str, list[int]]:
    """The shapes of a saved adapter's weights."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", DIVERSE)
def test_losses_are_those_of_the_models_own_forward_pass(
    tuner_of: Callable[..., FineTuner], name: str, tmp_path: Path
) -> None:
    tuner = tuner_of(name)
    tuner.prepare()
    untuned = own_loss(tuner.prepared.base.model, tuner)
    assert tuner.baseline().loss == pytest.approx(untuned, rel=2e-5)
    alone = tuner.run(TRIAL, folder=tmp_path / "alone")
    assert alone.metrics["loss"] == pytest.approx(saved_loss(tuner, tmp_path / "alone"), rel=2e-5)
    assert alone.quality == pytest.approx(1 - alone.metrics["loss"] / untuned, abs=1e-4)
    assert sum(a * b for a, b in shapes(tmp_path / "alone").values()) == alone.trainable_parameters
    waiting, packed = [TrialRequest(0, TRIAL), TrialRequest(1, {**TRIAL, "lora_rank": 1})], {}
    tuner.run_packed(
        lambda: waiting.pop(0) if waiting else None,
        lambda run, result: packed.update({run.number: result}),
        size=2,
    )
    assert packed[0].metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_text_adapts_no_tower_for_pictures_and_pays_for_none(
    tuner_of: Callable[..., FineTuner], name: str, tmp_path: Path
) -> None:
    tuner = tuner_of(name)
    notes = tuner.prepare()
    for preset in ("qv", "attention", "mlp", "all-linear"):
        result = tuner.run({**TRIAL, "target_modules": preset}, folder=tmp_path / preset)
        adapted = shapes(tmp_path / preset)
        assert adapted
        assert not [n for n in adapted if "vision" in n or "audio" in n or "projector" in n]
        assert sum(a * b for a, b in adapted.values()) == result.trainable_parameters
    assert any("vision_tower" in note for note in notes)


def test_what_peft_leaves_out_of_a_mixture_of_experts_is_named(
    tuner_of: Callable[..., FineTuner], tmp_path: Path
) -> None:
    tuner = tuner_of("qwen3_next")
    tuner.run(TRIAL, folder=tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    # PEFT would turn such names into adapters of all experts, of twice the rank.
    assert not config["target_parameters"]
    (note,) = tuner.prepare()
    assert "model.layers.*.mlp.experts.gate_up_proj" in note
    assert "model.layers.*.mlp.shared_expert.gate_proj" in note


def test_presets_mean_the_mixers_where_there_is_no_attention(
    tuner_of: Callable[..., FineTuner], tmp_path: Path
) -> None:
    tuner = tuner_of("mamba")
    tuner.run({**TRIAL, "target_modules": "attention"}, folder=tmp_path / "adapter")
    leaves = {name.split(".")[-3] for name in shapes(tmp_path / "adapter")}
    # Not dt_proj, whose weight the model reads without a call, nor out_proj, which PEFT refuses.
    assert leaves == {"in_proj", "x_proj"}


def test_a_space_with_modules_that_the_model_lacks_is_refused_before_the_first_trial(
    folder_of: Callable[[str], Path], sums: str, tmp_path: Path
) -> None:
    from optuna_lora_rl import tune

    with pytest.raises(UserError) as refused:
        tune(
            model=str(folder_of("mamba")),
            train=sums,
            trials=2,
            space={"target_modules": ["attention", "mlp"], "max_steps": 2},
            output=tmp_path / "study",
        )
    assert str(refused.value) == (
        "space.target_modules: mlp names no module of this mamba model; write target_modules: "
        "[attention], or name some of its linear modules under target_sets: [in_proj, x_proj]"
    )
    assert not list((tmp_path / "study").glob("adapters/*"))


def test_a_model_that_sees_what_it_should_predict_is_refused(
    make_tuner: Make, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder_of("bert"))
    # As all of BERT's checkpoints are.
    model.config.is_decoder = False
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder_of("bert")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"bert model sees the tokens that it should.*is_d"):
        make_tuner(name=str(tmp_path)).prepare()


def test_a_model_whose_rows_depend_on_padding_is_refused(
    tuner_of: Callable[..., FineTuner],
) -> None:
    with pytest.raises(UserError, match="a prophetnet model cannot be trained in batches: padded"):
        tuner_of("prophetnet").prepare()


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    make_tuner: Make, random_llama: Path, write_rows: Callable[..., str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(random_llama)
    model = AutoModelForCausalLM.from_pretrained(random_llama)
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens(["<think>"])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ordinary = [{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(9)]
    # While no example has the token, the model is what it was.
    make_tuner(name=str(tmp_path / "model"), train=write_rows(ordinary)).prepare()
    thought = write_rows([*ordinary, {"prompt": "9+1=", "completion": "<think>10"}] * 4, "b.jsonl")
    with pytest.raises(UserError) as refused:
        make_tuner(name=str(tmp_path / "model"), train=thought).prepare()
    assert f"makes token {rows} ('<think>')" in str(refused.value)
    assert f"embeddings for tokens 0 to {rows - 1} only" in str(refused.value)


def test_a_base_is_checked_once(
    tuner_of: Callable[..., FineTuner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optuna_lora_rl.finetuning import checking

    tuner_of("bert", cache=tmp_path).prepare()
    monkeypatch.delattr(checking, "own_losses")
    again = tuner_of("bert", cache=tmp_path)
    again.prepare()
    assert again.prepared.base.call.own_head
