"""Measure the tables, compile what was measured, fit the surfaces.

    python -m studies.tables measure --log logs/tables.jsonl
    python -m studies.tables compile --log logs/tables.jsonl
    python -m studies.tables fit
    python -m studies.tables scale measure --folder logs/scale
    python -m studies.tables scale compile --folder logs/scale
    python -m studies.tables scale fit

The first three are the 26 tables of one design, ``scale`` those of many models and lengths.
Measuring takes hours; it goes on where it was, from the log and from the compiled file.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.tables import dataset
from optuna_lora_rl.learning.tables import design
from optuna_lora_rl.learning.tables import records
from optuna_lora_rl.learning.tables import scaled
from studies.tables import scale

if TYPE_CHECKING:
    from collections.abc import Sequence

_MARKS = ("<!-- begin -->", "<!-- end -->")


def measure(given: argparse.Namespace) -> None:
    """Measure what log and compiled file lack, in one process, on one thread."""
    # A measurement that lasts hours shall not stop because a hub cannot be reached.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from studies.tables.measuring import measure as go_on

    # The matrices are too small to share, and sums in another order would give other numbers.
    torch.set_num_threads(1)
    known = records.merged(records.read(given.log), dataset.read(given.compiled))
    tasks = design.chosen(given.tasks)
    go_on(given.log, known, tasks, given.configurations, lambda line: print(line, flush=True))


def compile_file(given: argparse.Namespace) -> None:
    """Add the log to the compiled file."""
    known = records.merged(dataset.read(given.compiled), records.read(given.log))
    if not known:
        raise UserError(f"There are no records in {given.log}.")
    dataset.write(given.compiled, known)
    print(f"{len(known)} records, {given.compiled.stat().st_size:,} bytes in {given.compiled}")


def fit(given: argparse.Namespace) -> None:
    """Fit the surfaces of a compiled file, and write how good they are into the page."""
    import torch

    from studies.tables import fitting

    torch.set_num_threads(1)
    fitting.fit_all(given.compiled, given.fits, given.costs, lambda line: print(line, flush=True))
    table = fitting.markdown(given.compiled, given.fits)
    if given.page.exists():
        begin, end = _MARKS
        before, _, rest = given.page.read_text(encoding="utf-8").partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n\n{table}\n\n{end}{after}"
        given.page.write_text(page, encoding="utf-8")


def measure_scale(given: argparse.Namespace) -> None:
    """Measure what is missing; pretrain the models first that are not in the folder."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from studies.tables import scale_measuring
    from studies.tiny import pretraining

    for name in scale.PRETRAINED:
        folder = given.folder / "models" / name
        if not (folder / "README.md").exists():
            pretraining.pretrain(folder, pretraining.RECIPES[name], name=name)
    known = scaled.read(given.compiled)
    scale_measuring.measure(given.folder, lambda line: print(line, flush=True), known=known)


def compile_scale(given: argparse.Namespace) -> None:
    """Add what was measured to the compiled file."""
    log = records.read(given.folder / scale.LOG, records.ScaledRecord)
    known = records.merged(scaled.read(given.compiled), log)
    if not known:
        raise UserError(f"There are no records in {given.folder / scale.LOG}.")
    scaled.write(given.compiled, known)
    print(f"{len(known)} records, {given.compiled.stat().st_size:,} bytes in {given.compiled}")


def fit_scale(given: argparse.Namespace) -> None:
    """Fit the compiled tables, and write how the best configuration moves."""
    from studies.tables import scale_fitting
    from studies.tables import scale_report

    tables = scaled.load(path=given.compiled)
    if not given.alone:
        tables += scale_fitting.others()
    fits, regression = scale_fitting.fit_all(tables, lambda line: print(line, flush=True))
    scale_fitting.write(given.fits, fits, regression)
    page = scale_report.page(fits, regression, "python -m studies.tables scale fit")
    given.page.write_text(page, encoding="utf-8")


def _add_scale(parser: argparse.ArgumentParser) -> None:
    from optuna_lora_rl.learning.scaled_surfaces import FITS

    actions = parser.add_subparsers(required=True)
    chosen = (("measure", measure_scale), ("compile", compile_scale), ("fit", fit_scale))
    for name, action in chosen:
        command = actions.add_parser(name, help=action.__doc__)
        command.set_defaults(action=action)
        command.add_argument("--compiled", type=Path, default=scaled.FILE)
        if action is fit_scale:
            command.add_argument("--fits", type=Path, default=FITS)
            command.add_argument("--page", type=Path, default=Path("studies/results/scale.md"))
            command.add_argument("--alone", action="store_true", help="without the 26 others")
        else:
            command.add_argument("--folder", type=Path, default=Path("logs/scale"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and do as it says; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m studies.tables")
    from optuna_lora_rl.learning.tables import costs
    from optuna_lora_rl.learning.tables.surfaces import FITS

    commands = parser.add_subparsers(required=True)
    for name, action in (("measure", measure), ("compile", compile_file), ("fit", fit)):
        command = commands.add_parser(name, help=action.__doc__)
        command.set_defaults(action=action)
        if action is not fit:
            command.add_argument("--log", type=Path, default=Path("logs/tables.jsonl"))
        command.add_argument("--compiled", type=Path, default=dataset.FILE)
        if action is measure:
            command.add_argument("--tasks", nargs="*", default=[], help="all where none is given")
            command.add_argument("--configurations", type=int, default=design.CONFIGURATIONS)
        if action is fit:
            command.add_argument("--fits", type=Path, default=FITS)
            command.add_argument("--page", type=Path, default=Path("docs/tables.md"))
            command.add_argument("--costs", type=Path, default=costs.FILE)
    _add_scale(commands.add_parser("scale", help="the tables of many models and lengths"))
    given = parser.parse_args(arguments)
    try:
        given.action(given)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
