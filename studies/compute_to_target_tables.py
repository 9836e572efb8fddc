"""What ``studies/compute_to_target.py`` measured: ratios, each part's share, and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import measuring
import numpy as np
from search_to_target import TOLERANCE


def first_hit(naive: measuring.Result) -> dict[str, Any]:
    """Return what the naive arm had spent when it first reached its own target."""
    target = naive["best"] - TOLERANCE
    return dict(
        next(end for end in naive["ended"] if end["score"] is not None and end["score"] >= target)
    )


def spent(result: measuring.Result, measure: str) -> float:
    """Return an arm's compute to target; twice what it spent where it did not get there."""
    return float(result[measure]) * (1 if result["reached"] else 2)


def summarise(
    found: Mapping[tuple[str, int], Mapping[str, measuring.Result]], names: Sequence[str]
) -> dict[str, Any]:
    """Ratios, intervals, and each part's share.

    Args:
        found: Results by (task, seed) and by arm.
        names: The arms in the order of their parts, ``naive`` first.
    """
    pairs = [{name: results[name] for name in names} for results in found.values()]
    hits = [first_hit(results["naive"]) for results in pairs]
    rows: dict[str, Any] = {}
    for name in names:
        own = [results[name] for results in pairs]
        rows[name] = row = {
            "reached": sum(result["reached"] for result in own),
            "median_trials": float(np.median([result["trials"] for result in own])),
            "sampler_seconds_share": _share(own, "sampler_seconds"),
            "pruner_seconds_share": _share(own, "pruner_seconds"),
        }
        if name == "naive":
            row["reached"] = len(pairs)
            row["median_trials_to_first_hit"] = float(np.median([h["trial"] + 1 for h in hits]))
            continue
        for measure in ("tokens", "seconds"):
            compute = [spent(result, measure) for result in own]
            whole = [results["naive"][measure] for results in pairs]
            row[f"{measure}_to_50_trials"] = _ratio(whole, compute)
            row[f"{measure}_to_first_hit"] = _ratio([hit[measure] for hit in hits], compute)
    return {"pairs": len(pairs), "arms": rows, "parts": _parts(pairs, hits, names)}


def _parts(
    pairs: Sequence[Mapping[str, measuring.Result]],
    hits: Sequence[Mapping[str, Any]],
    names: Sequence[str],
) -> dict[str, Any]:
    """Each part's factor: compute to target without it over that with it."""
    parts: dict[str, Any] = {}
    for measure in ("tokens", "seconds"):
        compute = {name: [spent(results[name], measure) for results in pairs] for name in names}
        compute["naive"] = [hit[measure] for hit in hits]
        total = np.log(_ratio(compute["naive"], compute[names[-1]])[0])
        for before, name in pairwise(names):
            factor = _ratio(compute[before], compute[name])
            verdict = "pays" if factor[1] > 1 else "costs" if factor[2] < 1 else "not shown"
            share = float(np.log(factor[0]) / total) if total else 0.0
            parts.setdefault(name, {})[measure] = {
                "factor": factor,
                "share": share,
                "verdict": verdict,
            }
    return parts


def _ratio(naive: Sequence[float], own: Sequence[float]) -> list[float]:
    pairs = np.stack([np.array(naive, dtype=float), np.array(own, dtype=float)], axis=1)
    return measuring.interval(pairs, measuring.geometric_mean_ratio)


def _share(results: Sequence[measuring.Result], part: str) -> float:
    return float(sum(r[part] for r in results) / sum(r["seconds"] for r in results))


def markdown(entries: dict[str, Any]) -> str:
    """All entries as a page."""
    lines = [
        "# Compute to target",
        "",
        "What it takes to reach the score that the naive arm (`studies/naive.py`) has after 50 "
        "trials; `studies/compute_to_target.py` says what is measured. Ratios are geometric means "
        "over (task, seed) of the naive arm's compute over the arm's, with 95% bootstrap "
        "intervals, paired by task and seed: against all of the naive arm's trials, and, "
        "stricter, against what it had spent when it first had its final score, which nobody "
        "knows at that time. Arms that did not reach the target after twice the trials count "
        "with twice what they spent.",
        "",
    ]
    for name, entry in sorted(entries.items()):
        lines += [f"## {name}", "", *measuring.provenance(entry), *_tables(entry)]
    return "\n".join(lines)


def _tables(entry: Mapping[str, Any]) -> list[str]:
    found = entry["summary"]
    s = entry["settings"]
    trials = s["trials"]
    lines = [
        f"{found['pairs']} pairs of task ({', '.join(s['tasks'])}) and seed; {s['steps']} steps, "
        f"{s['evaluations']} evaluations a trial"
        + (f"; pruner `{s['pruner']}`" if "pruner" in found["arms"] else "")
        + (f"; options {s['training']}" if "options" in found["arms"] else "")
        + (f"; packs of {s['size']}" if "packing" in found["arms"] else "")
        + ".",
        "",
        f"| with | reached | median trials | tokens, x of {trials} trials | seconds, x of "
        f"{trials} trials | tokens, x of first hit | seconds, x of first hit "
        "| sampler's, pruner's share of time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, row in found["arms"].items():
        ratios = [
            measuring.shown(row[f"{measure}_to_{base}"]) if arm != "naive" else "–"
            for base in ("50_trials", "first_hit")
            for measure in ("tokens", "seconds")
        ]
        number = f"{row['median_trials']:.0f}"
        if arm == "naive":
            number += f" (first hit {row['median_trials_to_first_hit']:.0f})"
        shares = f"{row['sampler_seconds_share']:.1%}, {row['pruner_seconds_share']:.1%}"
        cells = [arm, f"{row['reached']}/{found['pairs']}", number, *ratios, shares]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Each part's factor, as it is added to those above it, and its share of the whole ratio "
        "to the first hit (in logarithms):",
        "",
        "| part | tokens [95%] | share | | seconds [95%] | share | |",
        "|---|---|---|---|---|---|---|",
    ]
    for part, row in found["parts"].items():
        cells = [part]
        for measure in ("tokens", "seconds"):
            one = row[measure]
            cells += [measuring.shown(one["factor"]), f"{one['share']:.0%}", one["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", _unpaid(found["parts"]), ""]


def _unpaid(parts: Mapping[str, Any]) -> str:
    unpaid = [
        f"{name} in {measure}"
        for name, row in parts.items()
        for measure in ("tokens", "seconds")
        if row[measure]["verdict"] != "pays"
    ]
    if not unpaid:
        return "Every part paid, in tokens and in seconds."
    return f"Not shown to pay (the interval reaches down to 1): {', '.join(unpaid)}."
