"""Runs a comparison and writes what came of it."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import masked
from optuna_lora_rl.study import reading
from studies.comparison import figures
from studies.comparison import running
from studies.comparison import summary
from studies.comparison.problems import build
from studies.comparison.protocol import Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence

    from rich.console import Console

RECORDS = "records.jsonl"
# Lines of progress where there is no terminal.
_LINES = 20


def from_file(
    file: Path,
    samplers: Sequence[str] | None,
    output: Path | None,
    overrides: Sequence[str],
    console: Console,
) -> None:
    """Runs a file's comparison, and says where the results are.

    Args:
        file: the comparison, in YAML.
        samplers: some of its entries; all if None.
        output: folder for the results; what the file says if None.
        overrides: ``key=value`` assignments over the file.
        console: shows how far it is.

    Raises:
        UserError: the file is not as it has to be, or a sampler or problem cannot be made.
    """
    content = reading.read_yaml(file)
    reading.override(content, overrides, {})
    entries = content.get("samplers")
    if samplers is not None and isinstance(entries, dict):
        for name in samplers:
            if name not in entries:
                raise UserError(
                    f"--samplers: {name!r} is not in {file}; use some of {', '.join(entries)}"
                )
        content["samplers"] = {name: entries[name] for name in samplers}
    content.setdefault("name", file.stem)
    protocol = reading.validate(Protocol, content, str(file))
    folder = output or Path(protocol.output or f"runs/{protocol.name}")
    typed = ["python", "-m", "studies.comparison", str(file)]
    typed += [] if samplers is None else ["--samplers", ",".join(samplers)]
    typed += [part for o in overrides for part in ("--set", o)]
    typed += [] if output is None else ["--output", str(output)]
    compare(protocol, folder, command=masked(shlex.join(typed)), console=console)
    said = f"the results are in {folder}/comparison.md, .html and .json"
    console.print(said, highlight=False, soft_wrap=True)


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
