"""The shipped weights: an ordinary folder that loads offline and has learnt something."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

from optuna_lora_rl import tiny

WEIGHTS = tiny.MODEL_FOLDER / "model.safetensors"


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL_FOLDER, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL_FOLDER, local_files_only=True)
    return model.eval(), tokenizer


def loss(model: Any, tokens: list[int]) -> float:
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_the_weights_are_small_and_float32(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, _ = model_and_tokenizer
    assert WEIGHTS.stat().st_size <= 4_000_000
    assert model.dtype == torch.float32
    assert 800_000 <= model.num_parameters() <= 1_500_000


def test_code_never_seen_costs_far_less_than_by_token_frequencies(
    model_and_tokenizer: tuple[Any, Any],
) -> None:
    model, tokenizer = model_and_tokenizer
    text = "\n".join(row["text"] for row in tiny.load("sources-small", "test"))
    tokens = tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
    counts = torch.bincount(torch.tensor(tokens), minlength=len(tokenizer)) / len(tokens)
    # Frequencies counted on this very text: the best that any unigram model could do on it.
    unigram = float(-(counts[counts > 0] * counts[counts > 0].log()).sum())
    windows = [tokens[start : start + 256] for start in range(0, 256 * 12, 256)]
    mean = sum(loss(model, window) for window in windows) / len(windows)
    assert mean < 0.6 * unigram
    assert mean < 0.5 * math.log(len(tokenizer))


def test_it_copies_letters_and_stops(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    prompt = tokenizer("copy d k m ->", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = out[0, prompt["input_ids"].shape[1] :].tolist()
    assert tokenizer.eos_token_id in answer
    assert tokenizer.decode(answer, skip_special_tokens=True).split("\n")[0] == " d k m"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tasks_are_left_to_learn(family: str, model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    rows = tiny.load(f"{family}-small", "validation")[:40]
    solved = 0
    for row in rows:
        if "prompt" in row:
            prompt = tokenizer(row["prompt"])["input_ids"]
            whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
            with torch.no_grad():
                guesses = model(input_ids=torch.tensor([whole])).logits.argmax(-1)[0].tolist()
            solved += guesses[len(prompt) - 1 : -1] == whole[len(prompt) :]
    assert solved <= 0.5 * len(rows)


def test_the_model_card_states_losses_and_the_command() -> None:
    card = (tiny.MODEL_FOLDER / "README.md").read_text(encoding="utf-8")
    assert "python -m optuna_lora_rl.tiny.pretraining" in card
    losses = re.findall(r"\| (?:standard library|exercises) \| ([\d.]+) \|.*?\| ([\d.]+) \|", card)
    assert len(losses) == 2
    assert all(float(loss) < 0.6 * float(unigram) for loss, unigram in losses)


def test_no_checkpoint_is_shipped() -> None:
    assert not list(tiny.MODEL_FOLDER.glob("*.pt*"))
