"""The shipped weights: an ordinary folder that loads offline and has learnt something."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

from optuna_lora_rl import tiny
from optuna_lora_rl.finetuning.model import load
from optuna_lora_rl.finetuning.options import ModelOptions
from studies.tiny import mixture

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


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_model_card_states_losses_and_the_command(name: str) -> None:
    card = (tiny.MODELS[name] / "README.md").read_text(encoding="utf-8")
    assert "python -m studies.tiny.pretraining" in card
    losses = re.findall(r"\| (?:standard library|exercises) \| ([\d.]+) \|.*?\| ([\d.]+) \|", card)
    assert len(losses) == 2
    assert all(float(loss) < 0.65 * float(unigram) for loss, unigram in losses)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_no_checkpoint_is_shipped(name: str) -> None:
    assert not list(tiny.MODELS[name].glob("*.pt*"))


@pytest.mark.parametrize(
    ("name", "least", "most"), [("tiny-narrow", 200_000, 300_000), ("tiny-wide", 1.8e6, 2.2e6)]
)
def test_the_other_sizes_are_small_and_load_as_float32(
    name: str, least: float, most: float
) -> None:
    folder = tiny.MODELS[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_100_000
    # As transformers loads it by default, and as a study does.
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert least < model.num_parameters() < most
    base = load(ModelOptions(name=name), torch.device("cpu"))
    assert base.model.dtype == torch.float32 and base.name == str(folder)


@pytest.mark.parametrize("name", ["tiny-narrow", "tiny-wide"])
def test_all_sizes_have_one_tokenizer(name: str) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tiny.MODELS[name] / file).read_bytes() == (tiny.MODEL_FOLDER / file).read_bytes()


def test_each_size_knows_best_what_it_read_most() -> None:
    code = "\n".join(row["text"] for row in tiny.load("sources-small", "test")[:60])
    skill = "\n".join(
        "{}: {}".format(*pair) for pair in mixture.exercises(200, random.Random("unseen"))
    )
    losses = {}
    for name in ("tiny-narrow", "tiny-wide"):
        model = AutoModelForCausalLM.from_pretrained(tiny.MODELS[name], local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(tiny.MODELS[name], local_files_only=True)
        losses[name] = []
        for text in (code, skill):
            tokens = tokenizer(text, truncation=True, max_length=1200)["input_ids"]
            windows = [tokens[start : start + 120] for start in range(0, 1200, 120)]
            losses[name].append(sum(loss(model.eval(), window) for window in windows) / 10)
    assert losses["tiny-wide"][0] < losses["tiny-narrow"][0] - 0.3
    assert losses["tiny-narrow"][1] < losses["tiny-wide"][1]
