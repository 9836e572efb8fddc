"""What takes its time, told while it lasts: whoever works calls a function, whoever shows draws.

Nothing here knows of terminals, so every part of the package may tell what it is doing.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Activity:
    """What is being done, and how far it is.

    Attributes:
        what: In words, such as ``tokenising``.
        done: How much is done, in ``unit``.
        total: How much there is; None where nobody knows.
        unit: What is counted, such as ``rows``; ``B`` for bytes.
        detail: What else is worth showing, such as ``loss 1.234``.
    """

    what: str
    done: float = 0
    total: float | None = None
    unit: str = ""
    detail: str = ""


# Called as often as there is something new, from any thread; it returns at once.
OnActivity = Callable[[Activity], None]


def unseen(activity: Activity) -> None:
    """Shows nothing."""


def counted(
    items: Collection[Item], what: str, unit: str, on_activity: OnActivity
) -> Iterator[Item]:
    """Yields the items, and tells before each how many are done."""
    for done, item in enumerate(items):
        on_activity(Activity(what, done, len(items), unit))
        yield item
