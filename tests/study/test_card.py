"""The model card and the tokenizer beside a study's best adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from optuna_lora_rl.study import adapters
from optuna_lora_rl.study import runner
from tests.study.conftest import MakeSpec

Rows = Callable[..., str]


def parts(card: Path) -> tuple[dict[str, Any], str]:
    """The head of a card, and its text."""
    _, head, text = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_best_folder_and_an_export_load_alone_and_say_what_they_are(
    make_spec: MakeSpec,
    random_llama: Path,
    write_rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    shutil.copytree(random_llama, tmp_path / "bases" / "small-llama")
    for start, name in ((0, "sums.jsonl"), (50, "held-out.jsonl")):
        rows = [{"prompt": f"{start + a}+1=", "completion": str(start + a + 1)} for a in range(40)]
        write_rows(rows, name)
    monkeypatch.chdir(tmp_path)
    data = {"data.train": "sums.jsonl", "data.test": "held-out.jsonl", "data.max_length": 16}
    spec = make_spec({**data, "model": "bases/small-llama", "output": "runs/out", "budget": 2})
    study = runner.run(spec).study
    assert not adapters.to_peft(study, spec, Path("exported"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    best = study.best_trial
    for folder in (tmp_path / "runs" / "out" / "best", tmp_path / "exported"):
        model = AutoPeftModelForCausalLM.from_pretrained(str(folder))
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        assert tokenizer.chat_template
        assert model(**tokenizer("1+1=", return_tensors="pt")).logits.shape[1] > 1
        head, text = parts(folder / "README.md")
        assert head["library_name"] == "peft" and "base_model" not in head
        assert str(tmp_path) not in text and "bases/" not in text
        assert "small-llama" in text and "sums.jsonl" in text
        assert f"| loss | {study.user_attrs['untuned']['loss']:.4f} |" in text
        assert f"{best.user_attrs['loss']:.4f}" in text and "test split" in text
        assert f"{study.user_attrs['test']['loss']:.4f}" in text
        assert f"| learning_rate | {best.params['learning_rate']} |" in text
        assert f"peft {version('peft')}" in text and "optuna-lora-rl run" in text
        assert "More Information Needed" not in text


def test_a_card_names_the_base_on_the_hub_and_shows_names_as_text(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    from optuna_lora_rl.study import card

    spec = make_spec({"model": "some/base"})
    facts = {
        "study": "a|b <b> [c](d)",
        "trial": 0,
        "score": 0.5,
        "configuration": {"lora_rank": 4},
        "metrics": {"loss": 1.0},
        "untuned": {"loss": 2.0},
    }
    card.write(tmp_path, facts, spec)
    head, text = parts(tmp_path / "README.md")
    assert head["base_model"] == "some/base" and "dates-small" in text
    assert r"# a\|b \<b\> \[c\](d), trial 0" in text
    assert "| loss | 2.0000 | 1.0000 |" in text
