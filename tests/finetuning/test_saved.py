"""What a run saves: an adapter that the libraries load from its folder alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import lora
from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.vocabulary import BOTH
from optuna_lora_rl.vocabulary import OWN_INITIALISATIONS
from tests.finetuning.architectures import ARCHITECTURES
from tests.finetuning.architectures import saved_model
from tests.finetuning.runs import QUICK
from tests.finetuning.runs import Hash
from tests.finetuning.runs import Make
from tests.rank.conftest import attach

STARTS = [
    "default",
    "gaussian",
    "orthogonal",
    "olora",
    "pissa",
    "pissa_niter_4",
    "mica",
    *OWN_INITIALISATIONS,
    *(f"{name}{BOTH}" for name in OWN_INITIALISATIONS),
]


@pytest.fixture
def logits_at_the_end(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The logits of each adapter as its run ends."""
    found: list[Any] = []
    save = lora.Adapter.save

    def followed(self: Any, *arguments: Any) -> None:
        found.append(logits(self.model.eval()))
        save(self, *arguments)

    monkeypatch.setattr(lora.Adapter, "save", followed)
    return found


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(20).reshape(2, 10)).logits


def distance(base: str | Path, adapter: Path, wanted: Any) -> float:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return float((logits(model.eval()) - wanted).abs().max())


@pytest.mark.parametrize("init", STARTS)
def test_plain_peft_loads_every_start_over_the_original_base(
    init: str,
    tuner: FineTuner,
    random_llama: Path,
    tmp_path: Path,
    logits_at_the_end: list[Any],
) -> None:
    tuner.run({**QUICK, "init_lora_weights": init, "lora_rank": 4}, folder=tmp_path)
    assert distance(random_llama, tmp_path, logits_at_the_end[0]) < 1e-4


@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": True},
        {"use_rslora": True, "bias": "all"},
        {"bias": "lora_only"},
        {"rank_allocation": "weight"},
        {"init_lora_weights": "svd-both", "rank_allocation": "weight", "use_rslora": True},
        {"init_lora_weights": "pissa", "bias": "all", "use_rslora": True},
    ],
)
def test_and_every_variant_also_over_transposed_weights(
    more: dict[str, Any],
    make_tuner: Make,
    make_tokenizer: Callable[[], Any],
    tmp_path: Path,
    logits_at_the_end: list[Any],
) -> None:
    base = saved_model("gpt2", ARCHITECTURES["gpt2"], make_tokenizer(), tmp_path)
    tuner = make_tuner(name=base)
    tuner.run({**QUICK, "lora_rank": 4, **more}, folder=tmp_path / "adapter")
    assert distance(base, tmp_path / "adapter", logits_at_the_end[0]) < 1e-4


@pytest.mark.parametrize("packed", [False, True])
def test_the_folder_alone_loads_from_anywhere(
    packed: bool,
    make_tuner: Make,
    random_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    from optuna_lora_rl.finetuning.trial import TrialRequest

    shutil.copytree(random_llama, tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    tuner = make_tuner(name="base")
    if packed:
        runs = [TrialRequest(0, QUICK, folder=Path("adapter"))]
        tuner.run_packed(lambda: runs.pop() if runs else None, lambda run, result: None)
    else:
        tuner.run(QUICK, folder=Path("adapter"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "here" / "adapter"
    model = AutoPeftModelForCausalLM.from_pretrained(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    original = AutoTokenizer.from_pretrained(random_llama)
    chat = [{"role": "user", "content": "1+1="}]
    assert tokenizer("1+1=").input_ids == original("1+1=").input_ids
    assert tokenizer.apply_chat_template(chat) == original.apply_chat_template(chat)
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "here" / "base")


def test_an_empty_card_is_not_left(tuner: FineTuner, tmp_path: Path) -> None:
    tuner.run(QUICK, folder=tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_the_revision_of_the_base_goes_with_the_adapter(
    make_tuner: Make, random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer

    load_model = AutoModelForCausalLM.from_pretrained
    load_tokenizer = AutoTokenizer.from_pretrained

    def model_of_the_hub(name: str, revision: str, **rest: Any) -> Any:
        model, loading = load_model(random_llama, **rest)
        model.config._commit_hash = revision
        return model, loading

    def tokenizer_of_the_hub(name: str, revision: str, **rest: Any) -> Any:
        return load_tokenizer(random_llama, **rest)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model_of_the_hub)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer_of_the_hub)
    tuner = make_tuner(name="somebody/model", revision="v2")
    tuner.run(QUICK, folder=tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "v2"


def test_measuring_a_foreign_adapter_gives_the_base_back(
    make_tuner: Make, base_hash: Hash, random_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(random_llama)
    attach(model, modules_to_save=["embed_tokens"]).save_pretrained(tmp_path)
    tuner = make_tuner()
    tuner.prepare()
    before = base_hash(tuner)
    assert len(tuner.cut(tmp_path)) == 7
    assert base_hash(tuner) == before


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5, 6]},
    ],
)
def test_the_quality_of_an_adapter_on_the_head_is_not_made_up(
    options: dict[str, Any],
    tuner: FineTuner,
    base_hash: Hash,
    random_llama: Path,
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    attach(AutoModelForCausalLM.from_pretrained(random_llama), **options).save_pretrained(tmp_path)
    before = base_hash(tuner)
    with pytest.raises(UserError, match="is on the output head"):
        tuner.cut(tmp_path)
    assert base_hash(tuner) == before


def test_an_adapter_that_does_not_go_with_the_base_is_one_whole_sentence(
    tuner: FineTuner, base_hash: Hash, random_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    larger = AutoModelForCausalLM.from_pretrained(random_llama)
    larger.resize_token_embeddings(120, mean_resizing=False)
    attach(larger).save_pretrained(tmp_path, save_embedding_layers=True)
    before = base_hash(tuner)
    with pytest.raises(UserError, match=r"does not go with the base model: .*embed_tokens"):
        tuner.cut(tmp_path)
    assert base_hash(tuner) == before
