"""What the commands share: how they are given a study, and where they write."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Annotated

import typer

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.errors import masked
from optuna_lora_rl.terminal import console

if TYPE_CHECKING:
    from optuna_lora_rl.study.spec import StudySpec

StudyFile = Annotated[
    Path, typer.Argument(metavar="STUDY.YAML", help="The study's file, or quickstart.")
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the file, such as --set budget.trials=5 in a study's; may be "
        "repeated.",
    ),
]


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show no progress; errors are still told.")
]
AllLayers = Annotated[
    bool,
    typer.Option("--all", help="Every layer on a line of its own, also where there are many."),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON, and nothing else.")]


def load(file: Path, overrides: Sequence[str]) -> StudySpec:
    """Read a study's file."""
    from optuna_lora_rl.study import spec

    return spec.load(file, overrides)


@contextmanager
def working(what: str = "loading libraries", *, quiet: bool = False) -> Iterator[OnActivity]:
    """Shows on standard error what a command does: torch, transformers and PEFT take seconds.

    Args:
        what: What it does first, in words.
        quiet: Nothing is shown.
    """
    from optuna_lora_rl.study.waiting import waiting

    with waiting(console(stderr=True, quiet=quiet)) as on_activity:
        on_activity(Activity(what))
        yield on_activity


def split(words: str | None) -> list[str] | None:
    """The words between commas; None for none."""
    return None if words is None else [word.strip() for word in words.split(",")]


def again(file: Path, overrides: Sequence[str]) -> str:
    """The file and overrides as they have to be typed again, but for passwords."""
    import shlex

    return masked(shlex.join([str(file), *(part for o in overrides for part in ("--set", o))]))
