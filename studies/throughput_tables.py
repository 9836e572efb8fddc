"""What ``studies/throughput.py`` measured, compared and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import measuring
import numpy as np

DEFAULTS = "naive, TRL's defaults"


def summarise(found: dict[str, list[measuring.Result]]) -> dict[str, Any]:
    """Compare the arms of one set with the naive ones."""
    seconds = {name: np.array([r["seconds"] for r in runs]) for name, runs in found.items()}
    naive = [name for name in found if name.startswith("naive")]
    best = min(naive, key=lambda name: float(np.median(seconds[name])))
    expected = np.array(found["naive"][0]["losses"])
    rows: dict[str, Any] = {}
    for name, runs in found.items():
        trials = len(expected)
        took = float(np.median(seconds[name]))
        whole = float(np.median([r["seconds"] + r["once_seconds"] for r in runs]))
        differences = np.abs(np.array([r["losses"] for r in runs]) - expected)
        rows[name] = {
            "seconds": seconds[name].tolist(),
            "cpu_seconds": [r["cpu_seconds"] for r in runs],
            "trials_an_hour": 3600 * trials / took,
            "trials_an_hour_with_preparation": 3600 * trials / whole,
            "preparation_seconds": float(np.median([r["once_seconds"] for r in runs])),
            "ratio": _ratio(seconds["naive"], seconds[name]),
            "ratio_to_defaults": _ratio(seconds[_careless(seconds)], seconds[name]),
            "ratio_to_fastest_naive": _ratio(seconds[best], seconds[name]),
            "peak_bytes": max(r.get("peak_cuda_bytes") or r["peak_rss_bytes"] for r in runs),
            "largest_loss_difference": float(differences.max()),
            "notes": sorted({note for r in runs for note in r["notes"]}),
        }
    return {"fastest_naive": best, "arms": rows}


def _careless(seconds: Mapping[str, Any]) -> str:
    """The naive arm with the libraries' own settings; on a real model the plain one is."""
    return DEFAULTS if DEFAULTS in seconds else "naive"


def _ratio(naive: np.ndarray, own: np.ndarray) -> list[float]:
    return measuring.interval(np.stack([naive, own], axis=1), measuring.ratio_of_medians)


def markdown(entries: dict[str, Any], *, batch: int) -> str:
    """All entries as a page; ``batch`` is the sequences of a step."""
    lines = [
        "# Trials an hour at equal work",
        "",
        "The same fixed configurations in every arm, no pruning, no sampler; `studies/naive.py` "
        "is the naive arm, `studies/throughput.py` says what is measured. Ratios are those of "
        "median times to the naive arm's, to those of the naive arm with TRL's own defaults "
        "(gradient checkpointing, evaluation batches of 8) and to those of the fastest naive "
        "variant, with 95% bootstrap intervals over repeats. Memory is the processes' peak "
        "resident size, on a GPU what torch allocated. The last column is the largest difference "
        "of any trial's final validation loss from the naive arm's.",
        "",
    ]
    for name, entry in sorted(entries.items()):
        s = entry["settings"]
        lines += [f"## {name}", ""]
        lines += measuring.provenance(entry)
        for kind, found in entry["sets"].items():
            lines += [
                f"{s['trials']} {kind} configurations of {s['steps']} steps of {batch} sequences "
                f"(`{s['data']}`), {s['evaluations']} evaluations on {s['validation']} examples, "
                f"{entry['repeats']} repeats; the fastest naive variant is "
                f"'{found['fastest_naive']}'.",
                "",
                "| arm | trials/hour | with preparation | x naive [95%] | x TRL's defaults [95%] "
                "| x fastest naive [95%] | peak memory, MB | loss difference |",
                "|---|---|---|---|---|---|---|---|",
            ]
            for arm, row in found["arms"].items():
                lines.append(
                    f"| {arm} | {row['trials_an_hour']:.0f} "
                    f"| {row['trials_an_hour_with_preparation']:.0f} "
                    f"| {measuring.shown(row['ratio'])} "
                    f"| {measuring.shown(row['ratio_to_defaults'])} "
                    f"| {measuring.shown(row['ratio_to_fastest_naive'])} "
                    f"| {row['peak_bytes'] / 1e6:.0f} | {row['largest_loss_difference']:.1e} |"
                )
            lines.append("")
    return "\n".join(lines)
