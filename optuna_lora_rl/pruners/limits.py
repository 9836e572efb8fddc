"""Checks of the pruners' arguments, for those who construct them by hand."""

from __future__ import annotations

import math


def check_number(
    name: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    or_auto: bool = False,
) -> None:
    """Refuse what is no number from ``low`` to ``high``, both included.

    Raises:
        ValueError: In one sentence that names the argument.
    """
    if or_auto and value == "auto":
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and low <= value <= high:  # type: ignore[operator]
        return
    span = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
    auto = " or 'auto'" if or_auto else ""
    raise ValueError(f"{name} is {value!r}, but must be a number, {span}{auto}")
