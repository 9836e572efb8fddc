"""The procedural families: questions composed at random whose short answers are exact.

Each function composes one question with a private generator and returns it with its answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_lora_rl.tiny import words

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    Exercise = tuple[str, str]

_CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
_NUMBER_WORDS_LIMIT = 9999
_UNITS = (
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("cm", "mm", 10),
    ("kg", "g", 1000),
    ("g", "mg", 1000),
    ("l", "dl", 10),
    ("hl", "l", 100),
)
_REGULAR_ENDINGS = (("t", "ts"), ("n", "ns"), ("ey", "eys"), ("rd", "rds"))
_CHANGED_ENDINGS = (
    ("x", "xes"),
    ("ss", "sses"),
    ("sh", "shes"),
    ("ch", "ches"),
    ("by", "bies"),
    ("ty", "ties"),
    ("lf", "lves"),
)
_GOOD = ("excellent", "friendly", "delicious", "pleasant", "bright", "perfect")
_BAD = ("terrible", "broken", "noisy", "bitter", "boring", "ugly")
_PLAIN = ("wooden", "round", "small", "local", "paper", "heavy")
_REVIEWED = (
    "soup",
    "room",
    "waiter",
    "film",
    "chair",
    "coffee",
    "bed",
    "concert",
    "garden",
    "book",
)


def arithmetic(generator: random.Random) -> Exercise:
    """Addition and subtraction of two-digit numbers."""
    a, b = generator.randint(10, 99), generator.randint(10, 99)
    if generator.random() < 0.5:
        return f"What is {a} plus {b}?", str(a + b)
    return f"What is {max(a, b)} minus {min(a, b)}?", str(abs(a - b))


def dates(generator: random.Random) -> Exercise:
    """ISO dates written out (``2021-03-05`` is ``5 March 2021``)."""
    year, month = generator.randint(1950, 2049), generator.randint(1, 12)
    day = generator.randint(1, 28)
    return (
        f"Date {year}-{month:02d}-{day:02d} in words?",
        f"{day} {words.MONTHS[month - 1]} {year}",
    )


def reversal(generator: random.Random) -> Exercise:
    """Spaced letters in reverse order."""
    letters = generator.choices(words.LETTERS, k=generator.randint(3, 6))
    return f"Reverse the letters {' '.join(letters)}.", " ".join(reversed(letters))


def cipher(generator: random.Random) -> Exercise:
    """Each letter replaced by the next of the alphabet, z by a."""
    letters = generator.choices(words.LETTERS, k=generator.randint(3, 6))
    shifted = [words.LETTERS[(words.LETTERS.index(letter) + 1) % 26] for letter in letters]
    return f"Encode {' '.join(letters)}.", " ".join(shifted)


def numerals(generator: random.Random) -> Exercise:
    """Number words in figures (``four hundred and twelve`` is ``412``)."""
    number = generator.randint(100, _NUMBER_WORDS_LIMIT)
    return f"In figures: {words.spell_number(number)}", str(number)


def extraction(generator: random.Random) -> Exercise:
    """One field of a person described in a sentence."""
    name, city = generator.choice(words.NAMES), generator.choice(words.CITIES)
    job, color = generator.choice(words.JOBS), generator.choice(words.COLORS)
    age = generator.randint(18, 80)
    trade, car = words.with_article(job), words.with_article(f"{color} car")
    sentence = f"{name}, aged {age}, lives in {city}, works as {trade} and drives {car}."
    fields = {"name": name, "age": str(age), "city": city, "job": job, "color": color}
    field = generator.choice(list(fields))
    return f"{sentence}\nWhich {field}?", fields[field]


def brackets(generator: random.Random) -> Exercise:
    """The brackets that close what was opened."""
    opened: list[str] = []
    text: list[str] = []
    length = generator.randint(4, 9)
    while len(text) < length or not opened:
        if opened and generator.random() < 0.35:
            text.append(_CLOSING[opened.pop()])
        else:
            opened.append(generator.choice(list(_CLOSING)))
            text.append(opened[-1])
    return f"Complete {' '.join(text)}", " ".join(_CLOSING[b] for b in reversed(opened))


def reviews(generator: random.Random) -> Exercise:
    """Classification of a two-clause review: positive, negative or neutral by its last clause."""
    labels = {"positive": _GOOD, "negative": _BAD, "neutral": _PLAIN}
    label = generator.choice(list(labels))
    first = generator.choice(labels[generator.choice(list(labels))])
    last = generator.choice(labels[label])
    one, other = generator.sample(_REVIEWED, 2)
    return f"Review: The {one} was {first} but the {other} was {last}.", label


def sorting(generator: random.Random) -> Exercise:
    """Digits in ascending order."""
    digits = generator.choices("0123456789", k=generator.randint(3, 6))
    return f"Order {' '.join(digits)} from low to high.", " ".join(sorted(digits))


def units(generator: random.Random) -> Exercise:
    """Conversion of a whole number of metric units to a smaller unit."""
    large, small, factor = generator.choice(_UNITS)
    number = generator.randint(2, 999)
    return f"How many {small} are {number} {large}?", str(number * factor)


def plurals(generator: random.Random) -> Exercise:
    """English plural rules on invented nouns (``blapy`` makes ``blapies``)."""
    stem = "".join(generator.choices(words.syllables(), k=generator.randint(1, 2)))
    ending, plural = generator.choice([*_REGULAR_ENDINGS, *_CHANGED_ENDINGS])
    return f"One {stem}{ending}, two", stem + plural


FAMILIES: dict[str, Callable[[random.Random], Exercise]] = {
    function.__name__: function
    for function in (
        arithmetic,
        brackets,
        cipher,
        dates,
        extraction,
        numerals,
        plurals,
        reversal,
        reviews,
        sorting,
        units,
    )
}
