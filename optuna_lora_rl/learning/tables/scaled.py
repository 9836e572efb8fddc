"""The tables with scale in them: models 48 to 576 wide, 8 to 512 steps, 16 to 4,000 examples.

They are what says how the best configuration moves with model, data and length of the run, so
each has a context (``ScaledTask.context``). Their designs vary learning rate, rank, alpha,
targets, batch size, steps and, with few examples, dropout::

    from optuna_lora_rl.learning.tables import scaled

    for table in scaled.load("train"):
        print(table.task.name, table.task.context["hidden_size"], table.quality[:, -1].max())

``docs/tables.md`` says what is kept out of training. The command is ``python -m studies.tables``,
in a clone.
"""

from __future__ import annotations

from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.learning.tables import dataset
from optuna_lora_rl.learning.tables.records import UNTUNED
from optuna_lora_rl.learning.tables.records import ScaledRecord
from optuna_lora_rl.learning.tables.records import merged

if TYPE_CHECKING:
    from collections.abc import Iterable

FILE = Path(__file__).resolve().parent / "scaled.parquet"
VARIED = (
    "learning_rate",
    "lora_rank",
    "alpha_ratio",
    "target_modules",
    "batch_size",
    "max_steps",
    "lora_dropout",
)
"""The parameters of these tables. Layers are all adapted, and no weight decays."""

_COUNTS = ("hidden_size", "model_layers", "model_parameters", "examples")
_WORDS = ("method", "precision")
CONTEXT = (*_COUNTS, "mean_tokens", *_WORDS)


@dataclass(frozen=True, eq=False)
class ScaledTask:
    """What a table was measured on.

    Attributes:
        name: ``<model>/<data>/<examples> examples/<steps> steps``.
        split: ``train``, ``validation`` or ``test``.
        context: ``hidden_size``, ``model_layers`` and ``model_parameters`` of the base model;
            ``examples`` and ``mean_tokens`` of the training data; ``method`` (sft) and
            ``precision`` of the runs.
    """

    name: str
    split: str
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        return self.name.split("/")[0]

    @property
    def family(self) -> str:
        return self.name.split("/")[1]


def write(path: Path, records: Iterable[ScaledRecord]) -> None:
    """Write records as Parquet, in one order whatever the order given."""
    import pyarrow as pa

    rows = []
    for record in merged(list(records)):
        row = asdict(record)
        rows.append({**row.pop("parameters"), **row.pop("context"), **row})
    kinds = {
        "split": pa.string(),
        **dataset.kinds(VARIED),
        **dict.fromkeys(_COUNTS, pa.int32()),
        "mean_tokens": pa.float32(),
        **dict.fromkeys(_WORDS, pa.string()),
    }
    dataset.write_rows(path, rows, kinds)


def read(path: Path = FILE) -> list[ScaledRecord]:
    """Return the records of a compiled file; none where there is no file."""
    if not path.exists():
        return []
    from pyarrow import parquet

    records = []
    for row in parquet.read_table(path).to_pylist():
        context = {name: row.pop(name) for name in CONTEXT}
        parameters = {name: row.pop(name) for name in VARIED}
        is_untuned = row["configuration"] == UNTUNED
        records.append(
            ScaledRecord(parameters={} if is_untuned else parameters, context=context, **row)
        )
    return records


def load(split: str | None = None, *, path: Path = FILE) -> list[dataset.Table]:
    """Return the tables of a split, ordered by name; each ``task`` is a ``ScaledTask``.

    Args:
        split: ``train``, ``validation`` or ``test``; None for all.
        path: A compiled file.

    Raises:
        UserError: There is no such split.
    """
    dataset.check_split(split)
    by_task: dict[str, list[ScaledRecord]] = {}
    for record in read(path):
        if split in (None, record.split):
            by_task.setdefault(record.task, []).append(record)
    loaded = []
    for name, records in sorted(by_task.items()):
        task = ScaledTask(name, records[0].split, records[0].context)
        loaded.append(dataset.table(task, records, VARIED))
    return [table for table in loaded if len(table)]
