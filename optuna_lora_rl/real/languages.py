"""Dates and amounts as many languages write them, by Unicode's CLDR data (Babel)."""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterator

from optuna_lora_rl.real.exercise import Exercise

LOCALES = (
    *("en_US", "en_GB", "de_DE", "fr_FR", "es_ES", "it_IT", "pt_BR", "nl_NL", "sv_SE", "da_DK"),
    *("nb_NO", "fi_FI", "pl_PL", "cs_CZ", "hu_HU", "ro_RO", "tr_TR", "id_ID", "vi_VN", "et_EE"),
    *("hr_HR", "sl_SI", "sk_SK", "lt_LT"),
)
_FIRST = datetime.date(1950, 1, 1)
_DAYS = 100 * 365


def dates(rng: random.Random) -> Iterator[Exercise]:
    """Dates from 1950 to 2049 in the full, long and medium forms of a language."""
    from babel import Locale
    from babel.dates import format_date

    while True:
        date = _FIRST + datetime.timedelta(days=rng.randrange(_DAYS))
        locale = Locale.parse(rng.choice(LOCALES))
        written = format_date(date, rng.choice(["full", "long", "medium"]), locale=locale)
        yield Exercise(
            subject=date.isoformat(),
            question=f"Write this date as YYYY-MM-DD. {locale.english_name}: {written}",
            answer=date.isoformat(),
        )


def numbers(rng: random.Random) -> Iterator[Exercise]:
    """Amounts, with and without a currency, with the separators of a language."""
    from babel import Locale
    from babel.numbers import format_currency
    from babel.numbers import format_decimal

    while True:
        number = rng.randrange(1, 10 ** rng.randint(3, 9)) / 100
        locale = Locale.parse(rng.choice(LOCALES))
        if rng.random() < 0.5:
            code = rng.choice(["EUR", "USD", "JPY"])
            written = format_currency(number, code, "#,##0.00 ¤", locale, currency_digits=False)
        else:
            written = format_decimal(number, "#,##0.00", locale)
        yield Exercise(
            subject=f"{number:.2f}",
            question=f"Write this amount as a plain number. {locale.english_name}: {written}",
            answer=f"{number:.2f}",
        )
