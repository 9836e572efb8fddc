from __future__ import annotations

import random
import re
from datetime import date

import pytest

from optuna_lora_rl.tiny import exercises
from optuna_lora_rl.tiny import words

PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def questions(family: str, count: int = 300) -> list[tuple[str, str]]:
    generator = random.Random(family)
    return [exercises.FAMILIES[family](generator) for _ in range(count)]


@pytest.mark.parametrize("family", exercises.FAMILIES)
def test_answers_are_short_and_never_given_away_whole(family: str) -> None:
    for question, answer in questions(family):
        assert 0 < len(answer) <= 30
        assert question.strip() == question
        assert answer.strip() == answer


def test_arithmetic() -> None:
    for question, answer in questions("arithmetic"):
        a, sign, b = re.fullmatch(r"What is (\d+) (plus|minus) (\d+)\?", question).groups()
        assert int(answer) == (int(a) + int(b) if sign == "plus" else int(a) - int(b))
        assert int(answer) >= 0


def test_brackets_leave_nothing_open() -> None:
    for question, answer in questions("brackets"):
        text = (question.removeprefix("Complete ") + " " + answer).replace(" ", "")
        while any(pair in text for pair in ("()", "[]", "{}", "<>")):
            for opening, closing in PAIRS.items():
                text = text.replace(opening + closing, "")
        assert text == ""


def test_cipher() -> None:
    to_next = str.maketrans(words.LETTERS, words.LETTERS[1:] + "a")
    for question, answer in questions("cipher"):
        letters = question.removeprefix("Encode ").removesuffix(".")
        assert answer == letters.translate(to_next)


def test_dates() -> None:
    for question, answer in questions("dates"):
        day = date.fromisoformat(question.split()[1])
        assert answer == f"{day.day} {day:%B} {day.year}"


def test_extraction_answers_with_the_field_that_was_asked_for() -> None:
    places = {"name": r"^(\w+),", "age": r"aged (\d+)", "city": r"lives in (\w+)"}
    places |= {"job": r"works as an? (\w+)", "color": r"drives an? (\w+) car"}
    for question, answer in questions("extraction"):
        sentence, asked = question.split("\n")
        field = asked.removeprefix("Which ").removesuffix("?")
        assert re.search(places[field], sentence)[1] == answer


def test_numerals() -> None:
    values = {words.spell_number(number): number for number in range(10_000)}
    assert len(values) == 10_000
    for question, answer in questions("numerals"):
        assert values[question.removeprefix("In figures: ")] == int(answer)


@pytest.mark.parametrize(
    ("number", "spelt"),
    [
        (0, "zero"),
        (15, "fifteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (412, "four hundred and twelve"),
        (3000, "three thousand"),
        (3007, "three thousand and seven"),
        (9120, "nine thousand one hundred and twenty"),
    ],
)
def test_number_words(number: int, spelt: str) -> None:
    assert words.spell_number(number) == spelt


def test_plurals_follow_the_rules() -> None:
    for question, plural in questions("plurals"):
        singular = re.fullmatch(r"One (\w+), two", question)[1]
        if re.search(r"(x|ss|sh|ch)$", singular):
            expected = singular + "es"
        elif re.search(r"[^aeiou]y$", singular):
            expected = singular[:-1] + "ies"
        elif singular.endswith("f"):
            expected = singular[:-1] + "ves"
        else:
            expected = singular + "s"
        assert plural == expected


def test_reversal() -> None:
    for question, answer in questions("reversal"):
        letters = question.removeprefix("Reverse the letters ").removesuffix(".").split()
        assert answer.split() == letters[::-1]


def test_reviews_are_judged_by_their_last_clause_and_use_every_label() -> None:
    labels: dict[str, str] = {}
    for question, label in questions("reviews"):
        last = question.removesuffix(".").split()[-1]
        assert labels.setdefault(last, label) == label
    assert set(labels.values()) == {"positive", "negative", "neutral"}


def test_sorting() -> None:
    for question, answer in questions("sorting"):
        assert answer.split() == sorted(re.findall(r"\d", question))


def test_units() -> None:
    metres = {"km": 1e3, "m": 1, "cm": 1e-2, "mm": 1e-3, "kg": 1e3, "g": 1, "mg": 1e-3}
    metres |= {"hl": 100, "l": 1, "dl": 0.1}
    for question, answer in questions("units"):
        small, number, large = re.fullmatch(r"How many (\w+) are (\d+) (\w+)\?", question).groups()
        assert int(answer) == round(int(number) * metres[large] / metres[small])
