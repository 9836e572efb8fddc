"""Records of measured runs: one line of JSON for each, in a file that a kill cannot spoil."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING
from typing import Any
from typing import TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from optuna_lora_rl.vocabulary import Value

UNTUNED = -1
"""The number that stands for the untuned model instead of a configuration."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured run, or the untuned model.

    Attributes:
        task: Name of the task.
        configuration: Number of the configuration, or ``UNTUNED``.
        seed: Seed of initialisation, dropout and order.
        parameters: The configuration, in the words of ``design.SPACE``.
        step: Optimizer steps done at each evaluation, until the run ended or failed.
        loss: Validation loss at each of them, nats a token. Early evaluations read a part of the
            validation examples.
        accuracy: Validation token accuracy at each of them.
        quality: Share of the untuned model's loss that is gone, on the same examples.
        failure: Why the run failed, or None.
        trainable_parameters: Parameters of the adapter.
        tokens: Training tokens of the whole run, padding not counted.
        flops: Counted FLOPs of the whole run.
        bytes: Counted bytes at the peak.
        cost: Counted cost of the whole run; that of the default configuration is 1.
        seconds: Wall time on the machine that measured it.
    """

    task: str
    configuration: int
    seed: int = 0
    parameters: dict[str, Value] = field(default_factory=dict)
    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    quality: list[float] = field(default_factory=list)
    failure: str | None = None
    trainable_parameters: int = 0
    tokens: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    cost: float = 0.0
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, int, int]:
        return self.task, self.configuration, self.seed


@dataclass(frozen=True, kw_only=True)
class ScaledRecord(Record):
    """One measured run of a table with scale in it (``tables.scaled``), in processor seconds.

    Attributes:
        split: ``train``, ``validation`` or ``test``.
        context: What is known of the task before any run: ``hidden_size``, ``model_layers``,
            ``model_parameters``, ``examples``, ``mean_tokens``, ``method`` and ``precision``.
    """

    split: str
    context: dict[str, Any] = field(default_factory=dict)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read(path: Path, kind: type[AnyRecord] = Record) -> list[AnyRecord]:  # type: ignore[assignment]
    """Return the records of a file, each of a kind; none where there is no file.

    A last line that a kill tore is left out; the next ``append`` begins a line of its own.
    """
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    records = []
    for line in whole.splitlines():
        try:
            records.append(kind(**json.loads(line)))
        except ValueError:
            # Torn by an earlier kill: its run is measured again.
            continue
    return records


def append(path: Path, record: Record) -> None:
    """Write one record at the end of a file, on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(asdict(record)).encode() + b"\n")


def merged(*sources: Iterable[AnyRecord]) -> list[AnyRecord]:
    """Return the records of several sources without repeats, ordered; the first source counts."""
    kept: dict[tuple[str, int, int], AnyRecord] = {}
    for source in sources:
        for record in source:
            kept.setdefault(record.key, record)
    return [kept[key] for key in sorted(kept)]
