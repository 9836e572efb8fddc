"""Runs a comparison and writes what came of it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.learning.comparison import figures
from optuna_lora_rl.learning.comparison import running
from optuna_lora_rl.learning.comparison import summary
from optuna_lora_rl.learning.comparison.problems import build

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console

    from optuna_lora_rl.learning.comparison.protocol import Protocol

RECORDS = "records.jsonl"
# Lines of progress where there is no terminal.
_LINES = 20


def compare(protocol: Protocol, output: Path, *, command: str, console: Console) -> dict[str, Any]:
    """Runs what is missing, and writes ``comparison.json``, ``.md`` and ``.html``.

    Args:
        protocol: samplers, problems and seeds.
        output: folder for the files and for ``records.jsonl``, the studies' records.
        command: what was typed, for the record.
        console: shows how far it is.

    Returns:
        What ``comparison.json`` holds.

    Raises:
        UserError: a sampler cannot be made.
    """
    show = _bar if console.is_terminal else _lines
    records = show(protocol, output / RECORDS, console)
    problems = build(protocol.problems)
    results = summary.summarise(protocol, problems, records) | {"command": command}
    text = json.dumps(results, indent=1)
    (output / "comparison.json").write_text(text + "\n", encoding="utf-8")
    (output / "comparison.md").write_text(summary.markdown(results), encoding="utf-8")
    html = figures.page(
        protocol.name,
        summary.curves(protocol, problems, records),
        summary.sections(problems),
        protocol.against,
        protocol.checkpoints,
    )
    (output / "comparison.html").write_text(html, encoding="utf-8")
    return results


def _bar(protocol: Protocol, file: Path, console: Console) -> dict[running.Key, running.Record]:
    from rich.progress import BarColumn
    from rich.progress import MofNCompleteColumn
    from rich.progress import Progress
    from rich.progress import TextColumn
    from rich.progress import TimeElapsedColumn
    from rich.progress import TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("studies")

        def before(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        def after(record: running.Record) -> None:
            progress.update(task, advance=1, description=f"{record.sampler} on {record.problem}")

        return running.run(protocol, file, before=before, after=after)


def _lines(protocol: Protocol, file: Path, console: Console) -> dict[running.Key, running.Record]:
    before, after = _narrator(console)
    return running.run(protocol, file, before=before, after=after)


def _narrator(
    console: Console,
) -> tuple[Callable[[int, int], None], Callable[[running.Record], None]]:
    started = time.monotonic()
    done = total = 0

    def say() -> None:
        seconds = time.monotonic() - started
        console.print(f"{done} of {total} studies, {seconds:.0f} s", highlight=False)

    def before(already: int, all_of_them: int) -> None:
        nonlocal done, total
        done, total = already, all_of_them
        say()

    def after(record: running.Record) -> None:
        nonlocal done
        done += 1
        if done == total or done * _LINES // total > (done - 1) * _LINES // total:
            say()

    return before, after
