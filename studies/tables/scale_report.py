"""Write in words and tables what the tables with scale in them say."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from studies.tables import scale_fitting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from studies.tables.scale_fitting import Fit
    from studies.tables.scale_fitting import Regression

_FEW = 64
_TELLING = 16
"""Runs from which on a table tells more of its own form than the prior does."""


def page(fits: Sequence[Fit], regression: Regression, command: str) -> str:
    """Return the record in Markdown."""
    runs = sum(len(one.table) for one in fits)
    parts = [
        "# How the best configuration moves with model, data and length of the run",
        f"Made by `{command}` from {runs:,} runs of {len(fits)} tables "
        "(`docs/tables.md` says how they were measured). The best learning rate of a table is "
        "that of the fitted ridge at alpha = 2 rank, rank 16, all linear modules, and the middle "
        "of the table's own steps and batch sizes; ± is one standard deviation, of the fit. A "
        "table whose deviation is near the prior's "
        f"({regression.spread:.2f} decades or more) says little by itself. Intervals are over "
        "resampled tables; where tables have few runs the prior holds them together, and the "
        "intervals are too narrow.",
        "## The best learning rate",
        _regression(regression),
        "The same without one of the regressors, and by split (what is kept out of training is "
        "whole widths, a whole length, and families):",
        _alternatives(fits, regression),
        "## Exponents within tables",
        f"Mean over the tables of at least {_TELLING} runs (fewer echo the prior), with the 95% "
        "interval of the mean over resampled tables. An exponent of .64 of alpha / rank says that "
        "four times the ratio asks for 4^.64 = 2.4 times less learning rate.",
        _exponents(fits),
        "## Rank, targets and dropout by number of examples",
        "What the fitted surface gains in quality (share of the untuned loss that is removed), at "
        f"the best learning rate of each choice, in the tables of at least {_TELLING} runs.",
        _choices(fits),
        "## Each table",
        _tables(fits),
    ]
    return "\n\n".join(parts) + "\n"


def _regression(regression: Regression) -> str:
    rows = [
        "| decades of rate by decade of | coefficient | 95% interval |",
        "| --- | ---: | ---: |",
    ]
    for name, value, (low, high) in zip(
        scale_fitting.NAMES, regression.coefficients, regression.intervals, strict=True
    ):
        said = {"one": "(128 wide, 4 layers, 48 steps of 8 rows out of 256 examples)"}
        rows.append(f"| {said.get(name, name)} | {value:.2f} | {low:.2f} to {high:.2f} |")
    best = 10 ** regression.coefficients[0]
    return "\n".join(rows) + (
        f"\n\nThat is {best:.1e} in the middle. Tables lie {regression.spread:.2f} decades "
        "(standard deviation) from this line, beyond what their own fits are unsure of."
    )


def _alternatives(fits: Sequence[Fit], regression: Regression) -> str:
    names = scale_fitting.NAMES[1:]
    lots: list[tuple[str, Sequence[Fit], tuple[str, ...]]] = [("all", fits, ())]
    lots += [(f"without {name}", fits, (name,)) for name in names]
    lots.append(("small models alone", [one for one in fits if _is_small(one)], ()))
    lots.append(("split train alone", [one for one in fits if _split(one) == "train"], ()))
    rows = [f"| regression | tables | in the middle | {' | '.join(names)} |"]
    rows.append("| --- |" + " ---: |" * (len(names) + 2))
    for said, some, without in lots:
        if not some:
            continue
        found = scale_fitting.solved(some, regression.coefficients, without, 0).coefficients
        cells = [
            "-" if name in without else f"{value:.2f}"
            for name, value in zip(scale_fitting.NAMES, found, strict=True)
        ]
        rows.append(f"| {said} | {len(some)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _is_small(one: Fit) -> bool:
    return bool(one.known["model_parameters"] < 1e8)


def _split(one: Fit) -> str:
    return str(one.table.task.split)


def _telling(fits: Sequence[Fit]) -> list[Fit]:
    return [one for one in fits if len(one.table) >= _TELLING]


def _exponents(fits: Sequence[Fit]) -> str:
    fits = _telling(fits)
    names = {
        "by_ratio": "alpha / rank",
        "by_rank": "rank at fixed alpha / rank",
        "by_size": "share of modules",
        "by_steps": "steps, within a table",
        "by_batch": "1 / batch size, within a table",
        "half": "half the width of the plateau, decades",
        "widens": "steps, by which that grows",
        "lowest": "steps, by which the lowest good rate falls",
        "highest": "steps, by which the highest good rate falls",
        "rising": "scale of the rise, decades",
        "falling": "scale of the fall, decades",
        "drop": "quality that the fall takes",
    }
    lots = {
        "all": list(fits),
        "to 128 wide": [one for one in fits if one.known["hidden_size"] <= 128],
        "192 to 512": [one for one in fits if 128 < one.known["hidden_size"] <= 512],
        "smollm2": [one for one in fits if not _is_small(one)],
    }
    lots = {said: some for said, some in lots.items() if len(some) >= 2}
    rows = [f"| | {' | '.join(lots)} |", "| --- |" + " ---: |" * len(lots)]
    for name, said in names.items():
        cells = []
        for some in lots.values():
            values = np.array([_exponent(one, name) for one in some])
            cells.append("{:.2f} [{:.2f}, {:.2f}]".format(values.mean(), *_interval(values)))
        rows.append(f"| {said} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _exponent(one: Fit, name: str) -> float:
    if name in ("lowest", "highest"):
        return one.form.by_steps + (1 if name == "lowest" else -1) * one.form.widens
    return float(getattr(one.form, name))


def _interval(values: np.ndarray) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _choices(fits: Sequence[Fit]) -> str:
    fits = _telling(fits)
    lots = {
        "16": [one for one in fits if one.known["examples"] <= 16],
        "64": [one for one in fits if 16 < one.known["examples"] <= _FEW],
        "96 to 512": [one for one in fits if _FEW < one.known["examples"] <= 512],
        "1024 and more": [one for one in fits if one.known["examples"] > 512],
    }
    lots = {said: some for said, some in lots.items() if len(some) >= 2}
    comparisons = {
        "rank 64 over 8": ({"rank": 6.0}, {"rank": 3.0}),
        "rank 8 over 1": ({"rank": 3.0}, {"rank": 0.0}),
        "all linear modules over attention": ({"share": 0.0}, {"share": math.log2(0.45)}),
        "all linear modules over q and v": ({"share": 0.0}, {"share": math.log2(0.2)}),
        "dropout .1 over none": ({"dropout": 0.1}, {"dropout": 0.0}),
    }
    heads = [f"{said} examples ({len(some)} tables)" for said, some in lots.items()]
    rows = [f"| gain | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(lots)]
    for said, (one, other) in comparisons.items():
        cells = []
        for some in lots.values():
            tried = [
                f
                for f in some
                if "dropout" not in said or f.table.parameters["lora_dropout"].any()
            ]
            if len(tried) < 2:
                cells.append("not varied")
                continue
            gains = np.array([_best(f, one) - _best(f, other) for f in tried])
            cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(gains.mean(), *_interval(gains)))
        rows.append(f"| {said} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _best(one: Fit, changes: dict[str, float]) -> float:
    """The largest quality over learning rates, of a configuration in the middle of a table."""
    rates = np.linspace(-5.0, -0.5, 91)
    middle = {
        "ratio": 1.0,
        "rank": 4.0,
        "share": 0.0,
        "dropout": 0.0,
        "batch_size": math.log2(one.known["batch_size"]),
        "steps": math.log2(one.known["steps"]),
    }
    v = {name: np.full(len(rates), value) for name, value in {**middle, **changes}.items()}
    return float(one.form({"learning_rate": rates, **v}).max())


def _tables(fits: Sequence[Fit]) -> str:
    rows = [
        "| table | split | width | layers | rows seen | runs | best rate | log10 | R2 "
        "| best quality | precision |",
        "| --- | --- |" + " ---: |" * 8 + " --- |",
    ]
    for one in sorted(fits, key=lambda f: (f.known["hidden_size"], f.known["steps"])):
        known = one.known
        best = np.nanmax(one.table.quality[:, -1])
        rows.append(
            f"| `{one.table.task.name}` | {_split(one)} | {known['hidden_size']} "
            f"| {known['model_layers']} | {known['steps'] * known['batch_size']:.0f} "
            f"| {len(one.table)} | {10**one.rate:.1e} | {one.rate:.2f} ± {one.deviation:.2f} "
            f"| {one.r2:.2f} | {best:.3f} | {known['precision']} |"
        )
    return "\n".join(rows)
