"""The procedural half of the pretraining text: small skills in formats of their own.

Each skill is related to one or more fine-tuning tasks but asks something else of the same
material (other ranges, other directions, other wordings), so that a LoRA adapter has something
to build on and something left to learn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_lora_rl.tiny import words

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    Exercise = tuple[str, str]
    Skill = Callable[[random.Random], Exercise]

BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def documents(count: int, generator: random.Random) -> list[str]:
    """Return ``count`` short texts, each made of one to four exercises of one skill."""
    return [_document(generator) for _ in range(count)]


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    """Return one exercise as chat messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def exercises(count: int, generator: random.Random) -> list[tuple[str, str]]:
    """Return ``count`` (question, answer) pairs of random skills."""
    return [generator.choice(SKILLS)(generator) for _ in range(count)]


def _document(generator: random.Random) -> str:
    skill = generator.choice(SKILLS)
    layout = generator.choice(_LAYOUTS)
    repeats = generator.choice((1, 1, 1, 2, 3, 4))
    return "\n".join(layout.format(*skill(generator)) for _ in range(repeats))


_LAYOUTS = ("{} -> {}", "{} = {}", "{}: {}", "{}\n{}", "Q: {}\nA: {}", "Input: {}\nOutput: {}")


def _letters(generator: random.Random, low: int, high: int) -> list[str]:
    return [generator.choice(words.LETTERS) for _ in range(generator.randint(low, high))]


def _digits(generator: random.Random, low: int, high: int) -> list[int]:
    return [generator.randint(0, 9) for _ in range(generator.randint(low, high))]


def _copy(generator: random.Random) -> Exercise:
    text = " ".join(_letters(generator, 2, 9))
    return f"copy {text}", text


def _first_or_last(generator: random.Random) -> Exercise:
    letters = _letters(generator, 2, 8)
    which, place = generator.choice((("first", 0), ("second", 1), ("last", -1)))
    return f"{which} of {' '.join(letters)}", letters[place]


def _digits_backwards(generator: random.Random) -> Exercise:
    digits = _digits(generator, 2, 4)
    return f"backwards {digits}", str(digits[::-1])


def _alphabet_run(generator: random.Random) -> Exercise:
    start = generator.randint(0, 21)
    length = generator.randint(3, min(8, 26 - start))
    run = words.LETTERS[start : start + length]
    if generator.random() < 0.3:
        run = run[::-1]
    return f"continue {run[0]} {run[1]}", " ".join(run[2:])


def _neighbour_letter(generator: random.Random) -> Exercise:
    place = generator.randint(1, 24)
    letter = words.LETTERS[place]
    if generator.random() < 0.5:
        return f"after {letter} comes", words.LETTERS[place + 1]
    return f"before {letter} comes", words.LETTERS[place - 1]


def _spelling(generator: random.Random) -> Exercise:
    word = generator.choice(words.NOUNS + words.VERBS + words.COLORS)
    spelt = " ".join(word)
    return (f"spell {word}", spelt) if generator.random() < 0.5 else (f"join {spelt}", word)


def _upper(generator: random.Random) -> Exercise:
    letters = _letters(generator, 2, 7)
    return f"upper {' '.join(letters)}", " ".join(letters).upper()


def _sum(generator: random.Random) -> Exercise:
    a, b = generator.randint(0, 49), generator.randint(0, 49)
    return f"sum({a}, {b})", str(a + b)


def _difference(generator: random.Random) -> Exercise:
    a, b = generator.randint(0, 59), generator.randint(0, 39)
    return f"take {b} from {a + b}", str(a)


def _product(generator: random.Random) -> Exercise:
    a, b = generator.randint(0, 10), generator.randint(0, 10)
    return f"{a} times {b} is", str(a * b)


def _count_on(generator: random.Random) -> Exercise:
    start, step = generator.randint(0, 900), generator.choice((1, 1, 2, 5, 10))
    series = [str(start + step * i) for i in range(6)]
    return f"count {' '.join(series[:3])}", " ".join(series[3:])


def _largest(generator: random.Random) -> Exercise:
    digits = _digits(generator, 2, 5)
    which, choose = generator.choice((("largest", max), ("smallest", min)))
    return f"{which} of {digits}", str(choose(digits))


def _sort_letters(generator: random.Random) -> Exercise:
    letters = _letters(generator, 2, 5)
    return f"sorted {' '.join(letters)}", " ".join(sorted(letters))


def _american_date(generator: random.Random) -> Exercise:
    month, day = generator.randint(1, 12), generator.randint(1, 28)
    year = generator.randint(1900, 1999)
    name = words.MONTHS[month - 1]
    if generator.random() < 0.3:
        return f"month {month:02d}", name
    pair = f"{name} {day}, {year}", f"{month:02d}/{day:02d}/{year}"
    return pair if generator.random() < 0.5 else (pair[1], pair[0])


def _number_words(generator: random.Random) -> Exercise:
    number = generator.randint(0, generator.choice((20, 99, 999)))
    return f"write {number}", words.spell_number(number)


def _small_number_digits(generator: random.Random) -> Exercise:
    number = generator.randint(0, 99)
    return f"number {words.spell_number(number)}", str(number)


def _dictionary_item(generator: random.Random) -> Exercise:
    record = {
        "name": generator.choice(words.NAMES),
        "city": generator.choice(words.CITIES),
        "job": generator.choice(words.JOBS),
        "age": generator.randint(18, 80),
    }
    keys = generator.sample(sorted(record), generator.randint(2, 4))
    shown = {key: record[key] for key in keys}
    key = generator.choice(keys)
    return f"{shown}[{key!r}]", repr(shown[key])


def _sentence(generator: random.Random) -> Exercise:
    name, job = generator.choice(words.NAMES), generator.choice(words.JOBS)
    city, color = generator.choice(words.CITIES), generator.choice(words.COLORS)
    noun, age = generator.choice(words.NOUNS), generator.randint(18, 80)
    trade, thing = words.with_article(job), words.with_article(f"{color} {noun}")
    return generator.choice(
        (
            (f"{name} is {trade} from {city}.", f"{name} has {thing}."),
            (f"The {job} in {city} is {age} years old.", f"The {job} is called {name}."),
            (f"{name} lives in {city}.", f"{name} works as {trade} and likes {thing}."),
        )
    )


def _mood_of_words(generator: random.Random) -> Exercise:
    good = ("good", "great", "nice", "kind", "fresh", "lovely")
    bad = ("bad", "awful", "rude", "cold", "dirty", "slow")
    chosen = generator.choice((good, bad))
    return f"{' '.join(generator.sample(chosen, 2))} is", "good" if chosen is good else "bad"


def _balanced(generator: random.Random) -> Exercise:
    opened: list[str] = []
    text: list[str] = []
    for _ in range(generator.randint(2, 8)):
        if opened and generator.random() < 0.5:
            text.append(BRACKETS[opened.pop()])
        else:
            opened.append(generator.choice(list(BRACKETS)[:3]))
            text.append(opened[-1])
    text += [BRACKETS[bracket] for bracket in reversed(opened)]
    cut = generator.randint(1, len(text) - 1)
    return " ".join(text[:cut]), " ".join(text[cut:])


def _matching_bracket(generator: random.Random) -> Exercise:
    bracket = generator.choice(list(BRACKETS))
    return f"close {bracket}", BRACKETS[bracket]


def _verb_form(generator: random.Random) -> Exercise:
    verb = generator.choice(words.VERBS)
    stem = verb[:-1] if verb.endswith("e") else verb
    if len(verb) <= 4 and verb[-1] in "bpn" and verb[-2] in "aeou":
        stem = verb + verb[-1]
    if generator.random() < 0.5:
        return f"to {verb}, now", f"{stem}ing"
    past = f"{verb[:-1]}ied" if verb[-1] == "y" and verb[-2] not in "aeo" else f"{stem}ed"
    return f"to {verb}, then", past


def _noun_phrase(generator: random.Random) -> Exercise:
    noun, color = generator.choice(words.NOUNS), generator.choice(words.COLORS)
    return f"{words.with_article(noun)}, {color}", f"the {color} {noun}"


def _unit_fact(generator: random.Random) -> Exercise:
    one, other, factor = generator.choice(
        (
            ("km", "m", 1000),
            ("m", "cm", 100),
            ("cm", "mm", 10),
            ("kg", "g", 1000),
            ("hour", "minutes", 60),
            ("week", "days", 7),
        )
    )
    if generator.random() < 0.5:
        return f"1 {one}", f"{factor} {other}"
    return f"{factor} {other}", f"1 {one}"


def _append_zeros(generator: random.Random) -> Exercise:
    number, zeros = generator.randint(1, 99), generator.randint(1, 3)
    return f"{number} and {zeros} zeros", f"{number}{'0' * zeros}"


SKILLS: tuple[Skill, ...] = (
    _copy,
    _first_or_last,
    _digits_backwards,
    _alphabet_run,
    _neighbour_letter,
    _spelling,
    _upper,
    _sum,
    _sum,
    _difference,
    _product,
    _count_on,
    _largest,
    _sort_letters,
    _american_date,
    _number_words,
    _small_number_digits,
    _dictionary_item,
    _sentence,
    _mood_of_words,
    _balanced,
    _matching_bracket,
    _verb_form,
    _noun_phrase,
    _unit_fact,
    _append_zeros,
)
