"""What a sampler may remember between calls without changing any answer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from itertools import compress
from itertools import count
from operator import is_not
from typing import TYPE_CHECKING
from typing import Generic
from typing import TypeVar

from optuna.trial import TrialState

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

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

    def __reduce__(self) -> tuple[type[Memo[T]], tuple[int]]:
        # Locks do not travel, and what is kept only saves time.
        return type(self), (self._size,)

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


def unlike(trials: Sequence[FrozenTrial], seen: Sequence[FrozenTrial | None]) -> list[int]:
    """The places, as far as both lists reach, at which the objects are not the same.

    Without a loop in Python, which over a long study would be most of what an ask costs.
    """
    return list(compress(count(), map(is_not, trials, seen)))


class UnionSpace:
    """All parameters that trials have had, with their latest ranges.

    Each finished trial is read once: as with :class:`~optuna_lora_rl.samplers.history.Ledger`,
    what was read holds for the same objects at the same places; anything else is read anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: list[FrozenTrial | None] = []
        self._space: dict[str, BaseDistribution] = {}

    def read(self, trials: Sequence[FrozenTrial], current: int) -> dict[str, BaseDistribution]:
        """The space, names in order; waiting trials and the ``current`` one are left out."""
        with self._lock:
            seen, known = self._seen, len(self._seen)
            fresh = unlike(trials, seen)
            replaced = len(trials) < known or any(seen[i] is not None for i in fresh)
            fresh += range(known, len(trials))
            seen += [None] * (len(trials) - known)
            del seen[len(trials) :]
            told, running = [], []
            for trial in (trials[i] for i in fresh):
                if trial.state.is_finished():
                    told.append(trial)
                elif trial.state == TrialState.RUNNING and trial.number != current:
                    running.append(trial)
            for i in fresh:
                seen[i] = trials[i] if trials[i].state.is_finished() else None
            if not known:
                self._space = _union(told)
            elif replaced or not _agree(told, self._space, new=False):
                self._space = _union(t for t in trials if t.state.is_finished())
            finished = self._space
        if _agree(running, finished, new=True):
            space = {**finished, **_union(running)}
        else:
            space = _union(t for t in trials if t.number != current)
        return dict(sorted(space.items()))


def _agree(
    trials: Iterable[FrozenTrial], space: Mapping[str, BaseDistribution], *, new: bool
) -> bool:
    """Whether the trials' ranges are those of the space; ``new`` parameters may come on top."""
    return all(
        (name not in space and new) or space.get(name) == distribution
        for trial in trials
        for name, distribution in trial.distributions.items()
    )


def _union(trials: Iterable[FrozenTrial]) -> dict[str, BaseDistribution]:
    """The latest range of each parameter; waiting trials have none."""
    space: dict[str, BaseDistribution] = {}
    for trial in trials:
        if trial.state != TrialState.WAITING:
            space.update(trial.distributions)
    return space


def milestone(n: int) -> int:
    """The last number of trials, at most n, at which slow things are computed anew.

    Every trial at first, then about every fourth part more.

    >>> [milestone(n) for n in (3, 7, 11, 12, 14, 100)]
    [3, 7, 10, 12, 12, 97]
    """
    m = 0
    while m + max(1, m // 4) <= n:
        m += max(1, m // 4)
    return m
