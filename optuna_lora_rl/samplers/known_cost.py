"""What a configuration's score is charged, asked of a function of the user's.

A step looks at some four hundred candidates. A function mostly reads a few parameters only, such
as the rank and the target modules: which ones is watched, and what differs in others alone has the
same cost. So one value is asked for once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from optuna_lora_rl.errors import UserError

if TYPE_CHECKING:
    from optuna.study import Study

    from optuna_lora_rl.policy.dimensions import Space
    from optuna_lora_rl.samplers.observation import Costs

# Takes parameters by name; returns what their score is charged, in its units.
Cost = Callable[[Mapping[str, Any]], float]
# Values that are kept.
_MOST = 100_000


class KnownCost:
    """A cost function, and what it has said so far.

    Args:
        function: of the user's.

    Raises:
        UserError: it is no function; when asked, that it raised something, or gave no number.
    """

    def __init__(self, function: Cost) -> None:
        if not callable(function):
            raise UserError(f"cost is {function!r}, but must be a function of the parameters")
        self._function = function
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._read: dict[str, set[str]] = {}
        self._kept: dict[object, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_function": self._function}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def of(self, study: Study, space: Space) -> Costs:
        """What configurations of a space are charged in a study, points to costs.

        Raises:
            UserError: the study has several objectives.
        """
        if len(study.directions) > 1:
            raise UserError("cost is for one objective, but the study has several")
        # Parameters with a single value are no part of the space.
        constant: dict[str, Any] = {}
        for trial in study.get_trials(deepcopy=False)[-8:]:
            constant.update({k: v for k, v in trial.params.items() if k not in space.names})
        return partial(self.at, space, constant=constant)

    def at(self, space: Space, points: np.ndarray, constant: Mapping[str, Any]) -> np.ndarray:
        """The costs of configurations, shape (N,).

        Args:
            space: of the parameters.
            points: in its unit cube, shape (N, D); NaN where a parameter is absent.
            constant: parameters that do not vary, by name.
        """
        with self._lock:
            costs = np.full(len(points), math.nan)
            left = np.arange(len(points))
            while len(left):
                read = self._read.setdefault(space.written, set())
                columns = [c for c, name in enumerate(space.names) if name in read]
                each, rows, which = _distinct(points[left][:, columns])
                known = [(space.written, tuple(columns), row) for row in each]
                more = False
                for key, row in zip(known, rows, strict=True):
                    if key not in self._kept:
                        value = self._ask({**constant, **space.decode(points[left[row]])}, read)
                        more = sum(name in read for name in space.names) > len(columns)
                        if more:
                            break  # told apart by too few parameters: once more by all
                        self._keep(key, value)
                if not more:
                    costs[left] = np.array([self._kept[key] for key in known])[which]
                    left = left[:0]
            return costs

    def _ask(self, params: dict[str, Any], read: set[str]) -> float:
        try:
            value: Any = self._function(_Watched(params, read))
        except Exception as error:
            raise UserError(
                f"cost raised {type(error).__name__} for {params}: {str(error).strip()}"
            ) from error
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not (number and math.isfinite(value)):
            raise UserError(f"cost gave {value!r} for {params}, but must give a finite number")
        return float(value)

    def _keep(self, key: object, value: float) -> None:
        if len(self._kept) >= _MOST:
            self._kept.clear()
        self._kept[key] = value


def _distinct(points: np.ndarray) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """Different rows as bytes, where each is first met, and which of them each row is."""
    if not points.shape[1]:
        return [b""], np.zeros(1, dtype=int), np.zeros(len(points), dtype=int)
    whole = np.ascontiguousarray(points).view(f"V{8 * points.shape[1]}")[:, 0]
    first: dict[bytes, int] = {}
    which = np.array([first.setdefault(row, len(first)) for row in map(bytes, whole)])
    rows = np.zeros(len(first), dtype=int)
    rows[which[::-1]] = np.arange(len(points))[::-1]
    return list(first), rows, which


class _Watched(Mapping[str, Any]):
    """Parameters that write down which of them are read."""

    def __init__(self, params: Mapping[str, Any], read: set[str]) -> None:
        self._params, self._read = params, read

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._params[name]

    def __iter__(self) -> Iterator[str]:
        self._read.update(self._params)
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def __contains__(self, name: object) -> bool:
        self._read.add(str(name))
        return name in self._params

    def __repr__(self) -> str:
        self._read.update(self._params)
        return repr(self._params)
