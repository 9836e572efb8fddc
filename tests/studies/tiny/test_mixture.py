from __future__ import annotations

import random

import pytest

from optuna_lora_rl import tiny
from studies.tiny import mixture


def test_the_same_generator_composes_the_same_texts() -> None:
    assert mixture.documents(50, random.Random(3)) == mixture.documents(50, random.Random(3))


def test_every_skill_is_practised() -> None:
    questions = {question.split()[0] for question, _ in mixture.exercises(3000, random.Random(0))}
    for word in ("copy", "sorted", "write", "count", "close", "spell", "upper"):
        assert word in questions


@pytest.mark.parametrize("skill", sorted({skill.__name__ for skill in mixture.SKILLS}))
def test_each_skill_gives_a_question_and_an_answer(skill: str) -> None:
    functions = {function.__name__: function for function in mixture.SKILLS}
    generator = random.Random(skill)
    for _ in range(200):
        question, answer = functions[skill](generator)
        assert question
        assert answer


def test_sums_are_right() -> None:
    for question, answer in mixture.exercises(2000, random.Random(1)):
        if question.startswith("sum("):
            a, b = question[4:-1].split(", ")
            assert int(answer) == int(a) + int(b)


def test_no_task_prompt_is_practised_in_pretraining() -> None:
    practised = "\n".join(mixture.documents(5000, random.Random(0)))
    for family in tiny.FAMILIES:
        for row in tiny.load(f"{family}-small", "test"):
            assert row.get("prompt", row.get("text", "")) not in practised
