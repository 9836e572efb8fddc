from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.data import Kind
from optuna_lora_rl.finetuning.data import Splits
from optuna_lora_rl.finetuning.evaluation import questions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.finetuning.tokens import Tokens
from optuna_lora_rl.finetuning.tokens import tokenise

TURNS = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture(scope="module")
def base(random_llama: Path) -> Any:
    import torch

    from optuna_lora_rl.finetuning import model

    return model.load(ModelOptions(name=str(random_llama)), torch.device("cpu"))


def made(base: Any, kind: Kind, rows: list[dict[str, Any]], max_length: int = 16) -> Tokens:
    splits = Splits(kind=kind, train=rows, validation=rows, test=None)
    return tokenise(splits, base, TrainingOptions(), max_length=max_length, use_cpu=True)


def learnt(base: Any, tokens: Tokens) -> list[str]:
    return [
        base.tokenizer.decode([token for token in labels if token != -100])
        for labels in tokens.train["labels"]
    ]


def test_completions_are_learnt_and_prompts_are_not(base: Any) -> None:
    tokens = made(base, "prompt-completion", [{"prompt": "1+1=", "completion": "2"}])
    assert learnt(base, tokens) == ["2</s>"]
    assert base.tokenizer.decode(tokens.train["input_ids"][0]) == "1+1=2</s>"
    assert tokens.lengths == [6]


def test_text_and_chat_are_learnt_whole(base: Any) -> None:
    assert learnt(base, made(base, "text", [{"text": "abc"}])) == ["abc</s>"]
    assert learnt(base, made(base, "messages", [{"messages": TURNS}])) == ["u>2?\na>yes\n"]


def test_chat_prompts_with_completions_are_learnt_in_their_completion(base: Any) -> None:
    row = {"prompt": TURNS[:1], "completion": TURNS[1:]}
    assert learnt(base, made(base, "prompt-completion", [row])) == ["yes\n"]


def test_long_examples_are_cut_and_those_without_anything_to_learn_counted(base: Any) -> None:
    rows = [{"prompt": "12", "completion": "345678"}, {"prompt": "12345678", "completion": "9"}]
    tokens = made(base, "prompt-completion", rows, max_length=5)
    assert tokens.lengths == [5]
    assert learnt(base, tokens) == ["345"]
    # Once in training, once in validation.
    assert tokens.unlearnable == 2


def test_nothing_to_learn_at_all_is_refused(base: Any) -> None:
    with pytest.raises(UserError, match=r"data\.max_length: within 3 tokens no train example"):
        made(base, "prompt-completion", [{"prompt": "12345", "completion": "6"}], max_length=3)


def test_chat_without_a_template_is_refused(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="messages examples cannot be tokenised") as refused:
        made(base, "messages", [{"messages": TURNS}])
    assert "\n" not in str(refused.value)


def test_a_template_that_refuses_an_example_names_it(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
    ) + base.tokenizer.chat_template
    monkeypatch.setattr(base.tokenizer, "chat_template", template)
    rows = [
        {"messages": TURNS},
        {"messages": [{"role": "system", "content": "be\nbrief"}, *TURNS]},
    ]
    with pytest.raises(UserError) as refused:
        made(base, "messages", rows)
    assert "at the example that begins with 'be brief': System role not" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_template_is_given_the_tools(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for tool in tools or [] %}{{ tool['name'] }};{% endfor %}"
    monkeypatch.setattr(base.tokenizer, "chat_template", template + base.tokenizer.chat_template)
    rows = [{"messages": TURNS, "tools": '[{"name": "look"}]'}, {"messages": TURNS, "tools": None}]
    assert learnt(base, made(base, "messages", rows)) == [
        "look;u>2?\na>yes\n",
        "u>2?\na>yes\n",
    ]
    asked = questions(rows, base.tokenizer, count=9, seed=0, longest_prompt=64)
    decoded = {base.tokenizer.decode(prompt) for prompt in asked.prompts}
    assert decoded == {"look;u>2?\na>", "u>2?\na>"}


def test_preparation_leaves_the_model_as_it_was(base: Any) -> None:
    attributes = set(base.model.__dict__)
    made(base, "text", [{"text": "abc"}])
    assert set(base.model.__dict__) == attributes
