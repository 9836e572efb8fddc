"""Chats that call tools: each is learnt as the chat template writes it, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import data
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.finetuning.tokens import Tokens
from optuna_lora_rl.finetuning.tokens import tokenise

Write = Callable[..., str]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{{ message.role[0] }}>"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}{{ message.content | trim }}\n{% endfor %}"
)


@pytest.fixture
def base(random_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import torch

    from optuna_lora_rl.finetuning import model

    base = model.load(ModelOptions(name=str(random_llama)), torch.device("cpu"))
    monkeypatch.setattr(base.tokenizer, "chat_template", TEMPLATE)
    return base


def tokenised(base: Any, source: str, **options: Any) -> tuple[Tokens, data.Splits]:
    splits = data.load(DataOptions(train=source, **options))
    made = tokenise(splits, base, TrainingOptions(), max_length=256, use_cpu=True)
    return made, splits


def texts(base: Any, tokens: Tokens) -> list[str]:
    rows = [*tokens.train["input_ids"], *tokens.validation["input_ids"]]
    return sorted(base.tokenizer.decode(ids) for ids in rows)


def chat(number: int, arguments: dict[str, Any], name: str = "f") -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": f"q{number}"},
            {"role": "assistant", "tool_calls": [call]},
        ]
    }


def test_each_call_has_its_own_arguments_alone(base: Any, write_rows: Write) -> None:
    rows = [chat(n, {"x": n} if n % 2 else {"y": n}, "fg"[n % 2]) for n in range(6)]
    tokens, _ = tokenised(base, write_rows(rows))
    assert texts(base, tokens) == sorted(
        f'u>q{n}\na>{"fg"[n % 2]}{{"{"yx"[n % 2]}": {n}}}\n' for n in range(6)
    )


def test_a_call_is_what_the_template_makes_of_the_row(base: Any, write_rows: Write) -> None:
    given: list[dict[str, Any]] = [
        {"x": 1},
        {"x": "one"},
        {"x": [1, "one", None]},
        {"x": {"deep": [{"a": 1}, {"b": None}]}, "a": True},
        {"x": 0.1234567890123456, "big": 2**70},
        {},
    ]
    rows = [chat(n, arguments) for n, arguments in enumerate(given)]
    tokens, _ = tokenised(base, write_rows(rows))
    for row in rows:
        row["messages"][1].setdefault("content", "")
    assert texts(base, tokens) == sorted(
        base.tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows
    )


def test_calls_in_prompts_and_completions_too(base: Any, write_rows: Write) -> None:
    rows = []
    for number, arguments in enumerate([{"x": 1}, {"y": "one"}, {"x": "two"}]):
        asked, called = chat(number, arguments)["messages"]
        rows.append({"prompt": [asked], "completion": [called]})
    tokens, _ = tokenised(base, write_rows(rows))
    called = ['{"x": 1}', '{"y": "one"}', '{"x": "two"}']
    assert texts(base, tokens) == [f"u>q{n}\na>f{call}\n" for n, call in enumerate(called)]


def test_nulls_that_a_table_filled_in_are_no_arguments(base: Any, tmp_path: Path) -> None:
    rows = [chat(n, {"x": n} if n % 2 else {"y": n}) for n in range(4)]
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    tokens, _ = tokenised(base, str(path))
    assert texts(base, tokens) == sorted(
        f'u>q{n}\na>f{{"{"yx"[n % 2]}": {n}}}\n' for n in range(4)
    )


def test_nulls_that_a_saved_data_set_filled_in_are_no_arguments(base: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [
        {
            **chat(n, {"x": n} if n % 2 else {"y": n}),
            "tools": [{"name": "fg"[n % 2], "ab"[n % 2]: 1}],
        }
        for n in range(4)
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    tokens, _ = tokenised(base, str(tmp_path / "saved"))
    assert texts(base, tokens) == sorted(
        f'[{{"name": "{"fg"[n % 2]}", "{"ab"[n % 2]}": 1}}]\nu>q{n}\na>f{{"{"yx"[n % 2]}": {n}}}\n'
        for n in range(4)
    )


def test_parts_of_text_are_learnt_as_text(base: Any, write_rows: Write) -> None:
    def said(role: str, *texts: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}

    rows = [{"messages": [said("user", "a", f"{n}"), said("assistant", "b")]} for n in range(3)]
    tokens, _ = tokenised(base, write_rows(rows))
    assert texts(base, tokens) == [f"u>a{n}\na>b\n" for n in range(3)]


def test_the_order_of_arguments_makes_other_tokens_on_disk_too(
    base: Any, write_rows: Write, tmp_path: Path
) -> None:
    found = []
    for arguments in ({"x": 1, "y": 2}, {"y": 2, "x": 1}):
        rows = [chat(n, arguments) for n in range(2)]
        splits = data.load(DataOptions(train=write_rows(rows)))
        options: dict[str, Any] = {"max_length": 256, "use_cpu": True, "cache": tmp_path / "cache"}
        found.append(texts(base, tokenise(splits, base, TrainingOptions(), **options))[0])
    assert found == ['u>q0\na>f{"x": 1, "y": 2}\n', 'u>q0\na>f{"y": 2, "x": 1}\n']


@pytest.mark.parametrize("left_out", ["tool", "calls"])
def test_a_template_that_leaves_turns_out_is_refused(
    base: Any, write_rows: Write, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    template = TEMPLATE.replace("call.function.name", "''")
    if left_out == "tool":
        template = TEMPLATE.replace(
            "{{ message.content | trim }}",
            "{% if message.role != 'tool' %}{{ message.content | trim }}{% endif %}",
        )
    monkeypatch.setattr(base.tokenizer, "chat_template", template)
    answered = [{"role": "tool", "content": "2"}, {"role": "assistant", "content": "so"}]
    rows = [{"messages": [*chat(n, {"x": n})["messages"], *answered]} for n in range(3)]
    role = "tool" if left_out == "tool" else "assistant that calls tools"
    with pytest.raises(UserError) as refused:
        tokenised(base, write_rows(rows))
    assert f"leaves out messages of the role {role}, at the example that" in str(refused.value)


def test_json_keeps_its_own_nulls(base: Any, write_rows: Write) -> None:
    rows = [chat(n, {"x": None, "n": n}) for n in range(3)]
    tokens, _ = tokenised(base, write_rows(rows))
    assert texts(base, tokens) == [f'u>q{n}\na>f{{"x": null, "n": {n}}}\n' for n in range(3)]
