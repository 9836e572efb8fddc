"""Records of made-up people and firms in letters, mails and notes (Faker)."""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from optuna_lora_rl.real.exercise import Exercise

if TYPE_CHECKING:
    from faker import Faker

_LOCALES = ("en_US", "en_GB", "de_DE", "fr_FR", "es_ES", "it_IT", "nl_NL", "sv_SE")
# The same record in the words of different writers, some with what is not asked for.
_TEXTS = (
    "Dear {other}, please send the invoice over {money} to {name}, {company}, {city}. It is due "
    "on {day}. Questions go to {email}.",
    "{name} ({company}) called from {city}: the order of {money} has to leave by {day}. Mail: "
    "{email}.",
    "Booking confirmed for {day}. Guest: {name}, {email}. Company: {company}, {city}. Total: "
    "{money}. Your host is {other}.",
    "From: {email}\nTo: sales\nWe at {company} in {city} accept your offer of {money}, valid "
    "until {day}.\nRegards, {name}",
    "Note of {other}: met {name} of {company}. Office in {city}, reachable at {email}. They pay "
    "{money} on {day}.",
)
_DAYS = ("%d %B %Y", "%B %d, %Y", "%Y-%m-%d", "%d %b %Y")
_FIRST, _SPAN = datetime.date(2015, 1, 1), 20 * 365
_QUESTION = (
    "Extract name, company, city, email, date (YYYY-MM-DD) and amount (a number) as JSON.\n\n"
)


def exercises(rng: random.Random) -> Iterator[Exercise]:
    """Texts in English about people of eight countries."""
    from faker import Faker

    fakers = [Faker(locale) for locale in _LOCALES]
    for faker in fakers:
        faker.seed_instance(rng.randrange(2**32))
    while True:
        yield _exercise(rng, rng.choice(fakers))


def _exercise(rng: random.Random, faker: Faker) -> Exercise:
    date = _FIRST + datetime.timedelta(days=rng.randrange(_SPAN))
    amount = rng.randrange(500, 5_000_000) / 100
    record = {
        "name": f"{faker.first_name()} {faker.last_name()}",
        "company": faker.company(),
        "city": faker.city(),
        "email": faker.ascii_safe_email(),
        "date": date.isoformat(),
        "amount": amount,
    }
    text = rng.choice(_TEXTS).format(
        **record,
        other=faker.last_name(),
        money=f"{rng.choice(['EUR', '$', 'GBP'])} {amount:,.2f}",
        day=date.strftime(rng.choice(_DAYS)),
    )
    answer = json.dumps(record, ensure_ascii=False)
    return Exercise(record["name"], _QUESTION + text, answer)
