from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies
from transformers import AutoTokenizer

from optuna_lora_rl import tiny
from studies.tiny.mixture import conversation


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny.MODEL_FOLDER)


@settings(max_examples=60, deadline=None)
@given(text=strategies.text(max_size=60))
def test_any_text_survives(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not any(special in text for special in tokenizer.all_special_tokens):
        assert tokenizer.decode(ids) == text


def test_digits_stand_alone(tokenizer: Any) -> None:
    tokens = tokenizer.tokenize("2024-11-05 is 365")
    assert [token for token in tokens if token.isdigit()] == list("20241105365")


def test_text_begins_with_its_own_token(tokenizer: Any) -> None:
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prompt_and_completion_divide_between_tokens(tokenizer: Any, family: str) -> None:
    for row in tiny.load(f"{family}-small", "train"):
        if "prompt" in row:
            prompt = tokenizer(row["prompt"])["input_ids"]
            whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
            assert whole[: len(prompt)] == prompt


def test_chats_end_each_answer_and_open_the_next(tokenizer: Any) -> None:
    chat = conversation("How many?", "Seven")
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|begin|><|turn|>user\nHow many?\n<|turn|>assistant\nSeven<|end|>"
    )
    opened = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert opened == "<|begin|><|turn|>user\nHow many?\n<|turn|>assistant\n"


def test_chats_say_which_tokens_the_assistant_wrote(tokenizer: Any) -> None:
    rendered = tokenizer.apply_chat_template(
        conversation("How many?", "Seven"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    written = [
        token
        for token, mask in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
        if mask
    ]
    assert tokenizer.decode(written) == "Seven<|end|>"
