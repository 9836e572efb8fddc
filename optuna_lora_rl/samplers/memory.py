"""What a sampler may remember between calls without changing any answer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Hashable
from typing import Generic
from typing import TypeVar

T = TypeVar("T")


class Memo(Generic[T]):
    """The latest results of pure functions, by the content that they were computed from.

    >>> memo = Memo[int]()
    >>> memo.get("three", lambda: 3), memo.get("three", lambda: 4)
    (3, 3)

    Args:
        size: how many results are kept.
    """

    def __init__(self, size: int = 16) -> None:
        self._size, self._kept = size, OrderedDict[Hashable, T]()
        self._lock = threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What ``compute`` returned for this key, now or before."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        value = compute()
        with self._lock:
            self._kept[key] = value
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return value


def milestone(n: int) -> int:
    """The last number of trials, at most n, at which slow things are computed anew.

    Every trial at first, then about every sixth part more.

    >>> [milestone(n) for n in (3, 11, 12, 13, 14, 100)]
    [3, 11, 12, 12, 14, 90]
    """
    m = 0
    while m + max(1, m // 6) <= n:
        m += max(1, m // 6)
    return m
