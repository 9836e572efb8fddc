"""What ``analyze`` takes on the layers of a 7B model, beside the exact singular values.

    python studies/spectra_7b.py --threads 2

The layers have the shapes of a 4096-wide model and random weights of two kinds: ``gaussian``,
whose spectrum is flat, and ``decaying``, the same with a part of rank 512 on top whose singular
values fall as 1 / i^0.7, which is nearer to what trained weights have. Each decomposition runs in
a fresh process of its own: ours with ``rank.spectrum.of_matrix``, the other with
``torch.linalg.svdvals`` on the full matrix in float32. Memory is the process's peak over what it
held with the matrix made.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import measuring

if TYPE_CHECKING:
    from torch import Tensor

FILE = str(Path(__file__).resolve())
RECORDS = measuring.FOLDER.parent / "logs" / "spectra_7b.jsonl"
COSTS = (
    "Seconds of all cores are the processor's, summed over threads; how many times faster ours is "
    "goes by them. Where a machine is shared both are rough: threads that wait for others spin."
)
SHAPES = ("4096x4096", "11008x4096")
KINDS = ("gaussian", "decaying")
ARMS = ("ours", "exact")
NUMBERS = (
    "effective_rank",
    "entropy_rank",
    "stable_rank",
    "rank_90",
    "rank_95",
    "spectral_norm",
    "frobenius_norm",
)
_DECAYING_RANK, _DECAY = 512, 0.7
_STD = 0.02
_ROWS = 256


def main(arguments: Sequence[str]) -> None:
    """The command line of this file."""
    given = _options(arguments)
    records = measuring.Records(given.records)
    layers = {
        f"{kind} {shape}": measure(shape, kind, given.threads, records)
        for shape, kind in product(given.shapes, given.kinds)
    }
    entry = {
        **measuring.circumstances(FILE, arguments, records.revisions),
        "threads": given.threads,
        "note": given.note,
        "layers": layers,
    }
    name = f"{given.threads or 'all'} threads"
    print(measuring.publish(given.output / "spectra_7b", name, entry, markdown))


def prepare(job: measuring.Job) -> Callable[[], measuring.Result]:
    """Get a worker ready; what it returns is timed."""
    import psutil
    import torch

    from optuna_lora_rl.rank import spectrum

    measuring.set_threads(job["threads"])
    matrix = weights(job["shape"], job["kind"])
    # Libraries set themselves up at their first call.
    spectrum.of_matrix(torch.randn(64, 96), exact_up_to=1, components=8)
    before = psutil.Process().memory_info().rss

    def work() -> measuring.Result:
        if job["arm"] == "ours":
            found = spectrum.of_matrix(matrix)
        else:
            found = spectrum.of_values(torch.linalg.svdvals(matrix), matrix.shape)
        numbers = {name: getattr(found, name) for name in NUMBERS}
        leading = [float(value) for value in found.values[:64]]
        return {"numbers": numbers, "leading": leading, "stated_error": found.error}

    def measured() -> measuring.Result:
        result = measuring.timed(work)
        return {**result, "extra_bytes": _peak() - before}

    return measured


def weights(shape: str, kind: str) -> Tensor:
    """Make a layer, the same each time."""
    import torch

    d, k = (int(side) for side in shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    # In place and by parts, since what the making takes would hide what the decomposition takes.
    matrix = torch.empty(d, k).normal_(std=_STD, generator=generator)
    if kind == "decaying":
        rank = min(_DECAYING_RANK, d, k)
        # The largest stands five times over the noise, sigma about std (sqrt d + sqrt k).
        sigma = 5 * _STD * (d**0.5 + k**0.5) / torch.arange(1, rank + 1) ** _DECAY
        right = sigma[:, None] * torch.randn(rank, k, generator=generator) / k**0.5
        for rows in matrix.split(_ROWS):
            rows.addmm_(torch.randn(len(rows), rank, generator=generator) / d**0.5, right)
    return matrix


def measure(
    shape: str, kind: str, threads: int | None, records: measuring.Records
) -> dict[str, Any]:
    """Decompose one layer both ways, and compare."""
    found = {}
    for arm in ARMS:
        job = {"arm": arm, "shape": shape, "kind": kind, "threads": threads}
        known = records.find(job)
        if known is None:
            known = measuring.launch(FILE, [job])[0]
            records.add(job, known)
        found[arm] = known
    leading = {arm: found[arm].pop("leading") for arm in ARMS}
    most = max(abs(a - b) for a, b in zip(leading["ours"], leading["exact"], strict=True))
    off = {
        name: found["ours"]["numbers"][name] / found["exact"]["numbers"][name] - 1
        for name in NUMBERS
    }
    return {**found, "leading_error": most / leading["exact"][0], "off": off}


def markdown(entries: dict[str, Any]) -> str:
    """The page of all entries."""
    lines = ["# Spectra of the layers of a 7B model", ""]
    lines += [(__doc__ or "").split("\n\n")[2].replace("\n", " ").strip(), ""]
    for name, entry in entries.items():
        lines += [f"## {name}", "", *measuring.provenance(entry)]
        if entry["note"]:
            lines += [entry["note"], ""]
        lines += [COSTS, ""]
        lines += _costs(entry["layers"]) + _accuracy(entry["layers"])
    return "\n".join(lines)


def _costs(layers: dict[str, Any]) -> list[str]:
    lines = [
        "| layer | seconds, ours | exact | of all cores, ours | exact | times faster | "
        "extra memory, ours | exact |",
        "|---" * 8 + "|",
    ]
    for name, layer in layers.items():
        ours, exact = layer["ours"], layer["exact"]
        memory = [f"{layer[arm]['extra_bytes'] / 1e6:.0f} MB" for arm in ARMS]
        lines.append(
            f"| {name} | {ours['seconds']:.2f} | {exact['seconds']:.2f} | "
            f"{ours['cpu_seconds']:.2f} | {exact['cpu_seconds']:.2f} | "
            f"{exact['cpu_seconds'] / ours['cpu_seconds']:.1f} | {' | '.join(memory)} |"
        )
    return [*lines, ""]


def _accuracy(layers: dict[str, Any]) -> list[str]:
    lines = [
        "Ours, beside the exact number. Leading values: the largest difference among the first "
        "64, relative to the largest value, and what the result states as its error.",
        "",
        "| layer | leading values | stated | "
        + " | ".join(name.replace("_", " ") for name in NUMBERS)
        + " |",
        "|---" * (3 + len(NUMBERS)) + "|",
    ]
    for name, layer in layers.items():
        pairs = [[_short(layer[arm]["numbers"][n]) for arm in ARMS] for n in NUMBERS]
        cells = [
            f"{layer['leading_error']:.2%}",
            f"{layer['ours']['stated_error']:.2%}",
            *(f"{ours} / {exact}" for ours, exact in pairs),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:#.4g}".removesuffix(".")


def _peak() -> int:
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the spectra of a 7B model's layers.")
    parser.add_argument("--shapes", type=measuring.words, default=list(SHAPES))
    parser.add_argument(
        "--kinds", type=measuring.words, default=list(KINDS), help=" or ".join(KINDS)
    )
    parser.add_argument("--threads", type=int, help="torch's own number by default")
    measuring.add_recording(parser, RECORDS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    measuring.program(main, prepare)
