"""Forms of English words, by the NIH's SPECIALIST lexicon (LemmInflect)."""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Iterator
from importlib.resources import files

from optuna_lora_rl.real.exercise import Exercise

_FORMS = {
    "NNS": "plural of the noun",
    "VBD": "past tense of the verb",
    "VBG": "present participle of the verb",
    "VBN": "past participle of the verb",
    "VBZ": "third person singular of the verb",
    "JJR": "comparative of the adjective",
    "JJS": "superlative of the adjective",
}
_ENDINGS = ("s", "es", "d", "ed", "ing", "r", "er", "st", "est")


def exercises(rng: random.Random) -> Iterator[Exercise]:
    """One form of each word, half of them forms that are not the word with an ending."""
    from lemminflect import getAllInflections

    simple: list[Exercise] = []
    other: list[Exercise] = []
    for word in _words():
        # Of two spellings one would be marked wrong.
        forms = {tag: said for tag, said in getAllInflections(word).items() if len(said) == 1}
        tags = sorted(forms.keys() & _FORMS.keys())
        if not tags:
            continue
        tag = rng.choice(tags)
        (answer,) = forms[tag]
        question = f'What is the {_FORMS[tag]} "{word}"? Answer with the word alone.'
        is_simple = answer in {word + ending for ending in _ENDINGS}
        (simple if is_simple else other).append(Exercise(word, question, answer))
    rng.shuffle(simple)
    rng.shuffle(other)
    for pair in zip(simple, other, strict=False):
        yield from pair


def _words() -> list[str]:
    lexicon = files("lemminflect") / "resources" / "infl_lu.csv.gz"
    with lexicon.open("rb") as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        words = {row[0] for row in csv.reader(lines)}
    plain = (w for w in words if w.isascii() and w.isalpha() and w.islower())
    return sorted(word for word in plain if 3 <= len(word) <= 12)
