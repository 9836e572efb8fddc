"""The tables as a dataset: one compact Parquet file, and arrays for each task."""

from __future__ import annotations

import math
from dataclasses import asdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.tables import design
from optuna_lora_rl.learning.tables.records import UNTUNED
from optuna_lora_rl.learning.tables.records import Record
from optuna_lora_rl.learning.tables.records import merged

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Mapping
    from collections.abc import Sequence

    from numpy.typing import NDArray

FILE = Path(__file__).resolve().parent / "tables.parquet"
POINTS = 4
"""Evaluations of a run, at 25, 50, 75 and 100% of its steps."""

_CURVES = ("step", "loss", "accuracy", "quality")
_SMALL = ("cost", "seconds")


@dataclass(frozen=True, eq=False)
class Table:
    """The measured runs of one task, ``n`` of them, ordered by configuration, then seed.

    Attributes:
        task: Its name, split and what else there is to say: a ``design.Task``, or a
            ``scaled.ScaledTask``.
        configuration: Number of the configuration, shape (n,).
        seed: Seed of the run, shape (n,).
        parameters: For each parameter of the design its values, shape (n,): numbers, or strings.
        step: Optimizer steps done at each evaluation, shape (n, 4); 0 where there was none.
        loss: Validation loss, nats a token, shape (n, 4); NaN after a failure. The evaluations
            read 16, 32, 48 and all 64 examples, so losses compare within a column only.
        accuracy: Validation token accuracy, likewise.
        quality: Share of the untuned model's loss that is gone, on the same examples, likewise.
        failure: Reason of a failed run, empty where it did not fail, shape (n,).
        cost: Counted cost relative to the default configuration at 32 steps, shape (n,).
        trainable_parameters: Of the adapter, shape (n,).
        tokens: Training tokens of the whole run, shape (n,).
        flops: Counted FLOPs of the whole run, shape (n,).
        bytes: Counted bytes at the peak, shape (n,).
        seconds: Wall time on the machine that measured, shape (n,).
        untuned: Loss of the untuned model on the 64 examples.
    """

    task: Any
    configuration: NDArray[np.int64]
    seed: NDArray[np.int64]
    parameters: dict[str, NDArray[Any]]
    step: NDArray[np.int64]
    loss: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    quality: NDArray[np.float64]
    failure: NDArray[np.str_]
    cost: NDArray[np.float64]
    trainable_parameters: NDArray[np.int64]
    tokens: NDArray[np.int64]
    flops: NDArray[np.float64]
    bytes: NDArray[np.float64]
    seconds: NDArray[np.float64]
    untuned: float

    def __len__(self) -> int:
        return len(self.configuration)

    @cached_property
    def noise(self) -> float:
        """Standard deviation of the final quality between seeds, NaN without repeats.

        Over pairs of finished runs of one configuration: ``sqrt(mean((q_0 - q_1)^2) / 2)``.
        """
        final = {
            (int(number), int(seed)): float(quality)
            for number, seed, quality in zip(
                self.configuration, self.seed, self.quality[:, -1], strict=True
            )
        }
        differences = [
            final[number, 0] - quality
            for (number, seed), quality in final.items()
            if seed == 1 and (number, 0) in final
        ]
        known = np.array([value for value in differences if math.isfinite(value)])
        return float(np.sqrt(np.mean(known**2) / 2)) if len(known) else math.nan


def write(path: Path, records: Iterable[Record]) -> None:
    """Write records as Parquet, compressed by zstd, in one order whatever the order given."""
    rows = [
        {**record.pop("parameters"), **record} for record in map(asdict, merged(list(records)))
    ]
    write_rows(path, rows, kinds(design.SPACE))


def kinds(parameters: Iterable[str]) -> dict[str, Any]:
    """Return the columns of a compiled file with these parameters, and their types."""
    import pyarrow as pa

    number = pa.float32()
    return {
        **dict.fromkeys(("task", "failure"), pa.string()),
        **dict.fromkeys(("configuration", "seed"), pa.int16()),
        **{name: _kind(design.SPACE[name]) for name in parameters},
        **dict.fromkeys(_CURVES[1:], pa.list_(number)),
        "step": pa.list_(pa.int16()),
        **dict.fromkeys(("trainable_parameters", "tokens"), pa.int32()),
        **dict.fromkeys(("flops", "bytes"), pa.float64()),
        **dict.fromkeys(_SMALL, number),
    }


def write_rows(path: Path, rows: Sequence[dict[str, Any]], kinds: Mapping[str, Any]) -> None:
    """Write rows as Parquet, compressed by zstd.

    Args:
        path: The file.
        rows: Values by column.
        kinds: The columns and their types.
    """
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist(rows, schema=pa.schema(list(kinds.items())))
    partial = path.with_suffix(".partial")
    parquet.write_table(table, partial, compression="zstd", compression_level=19)
    partial.replace(path)


def _kind(one: design.Level | design.Span) -> Any:
    import pyarrow as pa

    if isinstance(one, design.Span):
        return pa.float64()
    return pa.string() if isinstance(one.values[0], str) else pa.int16()


def read(path: Path) -> list[Record]:
    """Return the records of a compiled file; none where there is no file."""
    if not path.exists():
        return []
    from pyarrow import parquet

    records = []
    for row in parquet.read_table(path).to_pylist():
        parameters = {name: row.pop(name) for name in design.SPACE}
        records.append(Record(parameters={} if _is_untuned(row) else parameters, **row))
    return records


def _is_untuned(row: dict[str, Any]) -> bool:
    return bool(row["configuration"] == UNTUNED)


def load(split: str | None = None, *, path: Path = FILE) -> list[Table]:
    """Return the tables of a split, in the order of ``design.TASKS``.

    Args:
        split: ``train``, ``validation`` or ``test``; None for all.
        path: A compiled file.

    Raises:
        UserError: There is no such split.
    """
    check_split(split)
    by_task: dict[str, list[Record]] = {}
    for record in read(path):
        by_task.setdefault(record.task, []).append(record)
    wanted = [task for task in design.TASKS.values() if split in (None, task.split)]
    return [
        table(task, by_task[task.name], design.SPACE) for task in wanted if task.name in by_task
    ]


def check_split(split: str | None) -> None:
    """Check the name of a split; None stands for all.

    Raises:
        UserError: There is no such split.
    """
    if split is not None and split not in design.SPLITS:
        known = ", ".join(design.SPLITS)
        raise UserError(f"There is no split {split!r} of the tables; there are: {known}.")


def table(task: Any, records: Sequence[Record], parameters: Iterable[str]) -> Table:
    """Return the records of one task as arrays.

    Args:
        task: The task.
        records: Its runs and the untuned model, in any order.
        parameters: Names of the parameters of its configurations.
    """
    untuned = next((one.loss[0] for one in records if one.configuration == UNTUNED), math.nan)
    runs = sorted((one for one in records if one.configuration != UNTUNED), key=lambda r: r.key)

    def column(name: str, kind: Any) -> Any:
        return np.array([getattr(one, name) for one in runs], dtype=kind)

    def curve(name: str, kind: Any, absent: float) -> Any:
        padded = [(getattr(one, name) + [absent] * POINTS)[:POINTS] for one in runs]
        return np.array(padded, dtype=kind).reshape(len(runs), POINTS)

    return Table(
        task=task,
        configuration=column("configuration", np.int64),
        seed=column("seed", np.int64),
        parameters={name: np.array([one.parameters[name] for one in runs]) for name in parameters},
        step=curve("step", np.int64, 0),
        loss=curve("loss", np.float64, math.nan),
        accuracy=curve("accuracy", np.float64, math.nan),
        quality=curve("quality", np.float64, math.nan),
        failure=np.array([one.failure or "" for one in runs], dtype=np.str_),
        cost=column("cost", np.float64),
        trainable_parameters=column("trainable_parameters", np.int64),
        tokens=column("tokens", np.int64),
        flops=column("flops", np.float64),
        bytes=column("bytes", np.float64),
        seconds=column("seconds", np.float64),
        untuned=untuned,
    )
