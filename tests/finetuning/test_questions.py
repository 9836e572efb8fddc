from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import evaluation
from optuna_lora_rl.finetuning import questions
from optuna_lora_rl.finetuning.evaluation import Evaluation

labels = st.lists(st.sampled_from(["yes", "no", "maybe"]), min_size=1, max_size=20)


def test_answers_are_compared_exactly_and_as_labels() -> None:
    given = [" 12", "Yes\nbecause", "no", ""]
    found = questions.compare(given, ["12", "yes", "maybe", "12"])
    assert found["exact_match"] == 0.25
    assert found["accuracy"] == 0.5
    # F1 of "12" is 2/3, of "yes" 1, of "maybe" 0.
    assert found["f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)


@given(expected=labels)
def test_right_answers_score_one(expected: list[str]) -> None:
    found = questions.compare(expected, expected)
    assert found == {"exact_match": 1.0, "accuracy": 1.0, "f1": 1.0}


def test_quality_is_the_gain_over_the_untuned_model() -> None:
    before = Evaluation(loss=2.0, token_accuracy=0.25, exact_match=0.5)
    after = {"loss": 0.5, "token_accuracy": 0.75, "exact_match": 0.25}
    assert evaluation.quality("loss", after, before) == 0.75
    assert evaluation.quality("token_accuracy", after, before) == 0.5
    assert evaluation.quality("exact_match", after, before) == -0.25


@pytest.fixture(scope="module")
def loaded(random_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer

    return (
        AutoModelForCausalLM.from_pretrained(random_llama).eval(),
        AutoTokenizer.from_pretrained(random_llama),
    )


def test_padding_and_batching_do_not_change_answers(loaded: Any) -> None:
    model, tokenizer = loaded
    rows = [{"prompt": "12+3=" * n, "completion": "x"} for n in (1, 4, 2, 7)]
    asked = questions.questions(rows, tokenizer, count=10, seed=0, longest_prompt=64)
    together = questions.answers(model, tokenizer, asked, max_new_tokens=6, batch_size=4)
    alone = questions.answers(model, tokenizer, asked, max_new_tokens=6, batch_size=1)
    assert together == alone
    assert all(together)


def test_chat_asks_for_the_last_answer(loaded: Any) -> None:
    turns = [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4"},
    ]
    silent = [turns[0], {"role": "assistant", "content": ""}]
    alone = {"messages": turns[1:]}
    rows = [{"messages": turns}, {"messages": turns[:1]}, alone, {"messages": silent}]
    asked = questions.questions(rows, loaded[1], count=10, seed=0, longest_prompt=64)
    assert asked.answers == ("4",)
    assert loaded[1].decode(asked.prompts[0]) == "u>2+2\na>"


def test_an_answer_ends_where_the_chat_template_ends_it(loaded: Any) -> None:
    model, tokenizer = copy.deepcopy(loaded)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.chat_template = tokenizer.chat_template.replace("+ '\n' }}", "+ ' <turn>\\n' }}")
    end = tokenizer.convert_tokens_to_ids("<turn>")
    rows = [
        {"messages": [{"role": "user", "content": "2"}, {"role": "assistant", "content": "4"}]}
    ]
    asked = questions.questions(rows, tokenizer, count=1, seed=0, longest_prompt=64)
    assert asked.end == end
    said = iter([tokenizer.convert_tokens_to_ids("4"), end, tokenizer.convert_tokens_to_ids("5")])

    def scripted(**inputs: Any) -> Any:
        found = type(model).forward(model, **inputs)
        found.logits[..., next(said)] = 1e9
        return found

    model.forward = scripted
    given = questions.answers(model, tokenizer, asked, max_new_tokens=3, batch_size=1)
    assert given == ["4"]
    assert next(said) == tokenizer.convert_tokens_to_ids("5")


def test_long_prompts_keep_their_end(loaded: Any) -> None:
    rows = [{"prompt": "abcdef", "completion": "x"}]
    asked = questions.questions(rows, loaded[1], count=1, seed=0, longest_prompt=2)
    assert loaded[1].decode(asked.prompts[0]) == "ef"


def test_a_question_that_the_template_refuses_is_one_sentence(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}"
    monkeypatch.setattr(loaded[1], "chat_template", template)
    turns = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    with pytest.raises(UserError, match=r"that begins with '2\+2': too short"):
        questions.questions([{"messages": turns}], loaded[1], count=1, seed=0, longest_prompt=8)


def test_plain_text_asks_nothing(loaded: Any) -> None:
    with pytest.raises(UserError, match="need prompt/completion data"):
        questions.questions([{"messages": []}], loaded[1], count=1, seed=0, longest_prompt=8)
