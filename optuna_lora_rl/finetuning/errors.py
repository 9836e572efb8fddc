"""Why a trial failed by itself."""

from __future__ import annotations

from typing import Literal

Reason = Literal["diverged", "out-of-memory", "configuration", "outside", "error"]


class FineTuningError(RuntimeError):
    """A trial that cannot give a score; the study records it as failed and goes on.

    Args:
        reason: ``"diverged"`` (the loss is no finite number), ``"out-of-memory"``,
            ``"configuration"`` (the parameters do not go together), ``"outside"`` (a missing
            package, a lost network, a broken disk) or ``"error"`` (anything else).
        message: One sentence for the report.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[FineTuningError], tuple[Reason, str]]:
        return type(self), (self.reason, self.message)


class MachineError(RuntimeError):
    """The machine failed in a trial, whose configuration is no cause of it."""
