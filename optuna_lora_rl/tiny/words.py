"""Word lists and spellings that the procedural texts are composed from."""

# ruff: noqa: SIM905 (lists of words read best as text)

from __future__ import annotations

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
NAMES = tuple(
    "Ada Ben Carla David Emma Felix Grace Henry Iris Jonas Kira Leo Maria Nina Oscar Paula Quinn "
    "Rosa Sam Tara Uma Victor Wanda Xenia Yusuf Zoe".split()
)
CITIES = tuple(
    "Athens Berlin Cairo Delhi Geneva Hanoi Istanbul Lima London Madrid Nairobi Oslo Paris Quito "
    "Rome Seoul Tokyo Vienna Warsaw Zurich".split()
)
JOBS = tuple(
    "actor baker carpenter dentist driver editor farmer gardener judge lawyer miner nurse painter "
    "pilot sailor singer tailor teacher waiter writer".split()
)
COLORS = tuple("black blue brown gold green grey orange pink purple red white yellow".split())
NOUNS = tuple(
    "apple book box bridge camera car chair church clock cup desk door engine flower garden hat "
    "house island jacket key lamp letter map mirror phone picture plate road shirt song table "
    "train tree watch window".split()
)
VERBS = tuple(
    "add bake call clean cook copy cry dance drop fix hope hurry jump like look love move paint "
    "plan plant play print push rub save smile stop study talk test try use visit walk wash "
    "work".split()
)
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
_SYLLABLE_STARTS = "b br c ch d dr f fl g gr h j k l m n p pl r s sh sl st t tr v w z".split()
_SYLLABLE_VOWELS = "a e i o u".split()


def spell_number(number: int) -> str:
    """Return the English words of a whole number from 0 to 9999 (``four hundred and twelve``)."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        tens, unit = divmod(number, 10)
        return _TENS[tens] + (f"-{_UNITS[unit]}" if unit else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{_UNITS[hundreds]} hundred" + (f" and {spell_number(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    joint = " and " if rest < 100 else " "
    return f"{_UNITS[thousands]} thousand" + (f"{joint}{spell_number(rest)}" if rest else "")


def with_article(noun: str) -> str:
    """Return a noun or noun phrase after ``a`` or ``an``, as its first letter wants."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def syllables() -> list[str]:
    """Return every open syllable (``ba``, ``bra``, ...) that invented words are made of."""
    return [start + vowel for start in _SYLLABLE_STARTS for vowel in _SYLLABLE_VOWELS]
