"""Reading YAML as people write it."""

from __future__ import annotations

from pathlib import Path

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import reading
from optuna_lora_rl.study.spec import SHORT_FORMS


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E+3", 1e3), ("-2.e5", -2e5), ("1.5", 1.5), ("1e", "1e"), ("e4", "e4")],
)
def test_numbers_need_no_dot(tmp_path: Path, text: str, value: object) -> None:
    (tmp_path / "a.yaml").write_text(f"x: {text}\n")
    assert reading.read_yaml(tmp_path / "a.yaml") == {"x": value}


def test_anchors_and_merges_still_work(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\n")
    assert reading.read_yaml(tmp_path / "a.yaml")["b"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("content", "assignment", "result"),
    [
        ({}, "budget.trials=5", {"budget": {"trials": 5}}),
        ({"budget": 20}, "budget.hours=1", {"budget": {"trials": 20, "hours": 1}}),
        (
            {"model": "tiny"},
            "model.dtype=bfloat16",
            {"model": {"name": "tiny", "dtype": "bfloat16"}},
        ),
        ({"model": {"name": "a"}}, "model=b", {"model": "b"}),
        ({}, "space.lora_rank={low: 2, high: 8}", {"space": {"lora_rank": {"low": 2, "high": 8}}}),
        ({}, "objective.cost.time=1e-1", {"objective": {"cost": {"time": 0.1}}}),
        ({"objective": None}, "objective.metric=f1", {"objective": {"metric": "f1"}}),
        ({}, "data.train=a=b.jsonl", {"data": {"train": "a=b.jsonl"}}),
    ],
)
def test_overrides_reach_into_sections(content: dict, assignment: str, result: dict) -> None:
    reading.override(content, [assignment], SHORT_FORMS)
    assert content == result


def test_an_override_does_not_turn_a_value_into_a_section() -> None:
    with pytest.raises(UserError, match="output is 'runs' and has no keys"):
        reading.override({"output": "runs"}, ["output.x=1"], SHORT_FORMS)
