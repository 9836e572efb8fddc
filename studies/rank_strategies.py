"""Ways to spend the same number of LoRA parameters, on built-in tasks.

    python studies/rank_strategies.py

Uniform ranks, our allocations, ranks that change in training, training at a high rank and
truncating, PEFT's AdaLoRA and EVA. All but "uniform high" end with the parameters of a uniform
rank of 4, as far as each can keep to them; the page says how. The scale alpha / r is 2 everywhere.

Three parts, on seeds of their own. The pilot takes from the candidate tasks those where a uniform
high rank gains most over a uniform low one. Then each arm gets its learning rate on each task: the
best of three on the selection seeds, and of more where the best of them stands at an end. Then all
arms run at their rates on the judging seeds, which nothing was chosen by. Finished runs are kept
in the records, so that a stopped comparison goes on. One process, one thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comparing
import four_panels
import measuring
import numpy as np
import rates
from arms import Arm
from comparing import Found

FILE = str(Path(__file__).resolve())
RECORDS = measuring.FOLDER.parent / "logs" / "rank_strategies.jsonl"
CANDIDATES = (
    "arithmetic-ample",
    "brackets-ample",
    "cipher-ample",
    "numerals-ample",
    "plurals-ample",
    "reversal-ample",
)
LOW, HIGH, SCALE = 4, 16, 2.0
STEPS, EVALUATIONS = 64, 4
TASKS = 3
RATES, FACTOR, MOST_RATES = (4e-3, 8e-3, 1.6e-2), 2.0, 6
SELECTION = (100, 101)
# With their defaults, which are for longer runs, the deciders see too little of so short ones.
# These were set by looking at when ranks change on one task with the first selection seed.
TRAINING = {
    "rank_budget": "parameters",
    "rank_change": {
        "mean_rank": LOW,
        "maximum": HIGH,
        "patience": 1,
        "loss": {"every": 4, "window": 3, "plateau": 0.2, "calm": 0.15, "oscillation": 0.5},
        "gradient": {"every": 4, "window": 2, "consistent": 0.0, "fading": 0.5},
    },
}
_LOW = {"lora_rank": LOW}
_SHARED = "shares the same parameters out; less than one more rank costs is left over"
_CHANGED = "begins with half of them, and grows until all layers together have as many"
ARMS: dict[str, Arm] = {
    "uniform low": Arm("uniform", _LOW, equal="the budget itself"),
    "uniform high": Arm(
        "uniform", {"lora_rank": HIGH}, equal="not equal: four times as many, for reference"
    ),
    **{
        kind: Arm("allocation", {**_LOW, "rank_allocation": kind}, equal=_SHARED)
        for kind in ("weight", "gradient", "activation", "delta")
    },
    "changed by loss": Arm(
        "changing", {"lora_rank": LOW // 2, "rank_change": "loss"}, equal=_CHANGED
    ),
    "changed by gradient": Arm(
        "changing", {"lora_rank": LOW // 2, "rank_change": "gradient"}, equal=_CHANGED
    ),
    "high, truncated": Arm(
        "truncation",
        {"lora_rank": HIGH, "truncate_rank": LOW},
        equal="trained with four times as many, each layer then cut to the low rank",
    ),
    "AdaLoRA (PEFT)": Arm(
        "PEFT",
        _LOW,
        peft="adalora",
        equal="target rank is the low rank, begins with 1.5 times as many; PEFT's budget counts "
        "ranks, whatever the layer's size",
    ),
    "EVA (PEFT)": Arm(
        "PEFT",
        _LOW,
        peft="eva",
        equal="ranks shared out with rho = 2; PEFT's budget counts ranks, whatever the layer's "
        "size",
    ),
}
BASELINE, RIVAL = "uniform low", "AdaLoRA (PEFT)"
OURS = tuple(name for name, arm in ARMS.items() if arm.group in ("allocation", "changing"))
COLORS = {
    "uniform low": "#111827",
    "uniform high": "#9ca3af",
    "weight": "#0f766e",
    "gradient": "#22c55e",
    "activation": "#84cc16",
    "delta": "#0ea5e9",
    "changed by loss": "#b45309",
    "changed by gradient": "#f59e0b",
    "high, truncated": "#7c3aed",
    "AdaLoRA (PEFT)": "#be123c",
    "EVA (PEFT)": "#f472b6",
}


def piloted(
    runs: comparing.Runs, candidates: Sequence[str], count: int
) -> dict[str, dict[str, Any]]:
    """Measure what a high rank gains over a low one, and say which tasks are taken."""
    found = {}
    for task in candidates:
        tried = {
            name: rates.search(
                lambda rate, task=task, name=name: runs(task, name, rate, SELECTION[0])["quality"],
                RATES,
                FACTOR,
                MOST_RATES,
            )
            for name in ("uniform low", "uniform high")
        }
        low, high = (max(qualities.values()) for qualities in tried.values())
        found[task] = {"low": low, "high": high, "gain": high - low}
    taken = sorted(found, key=lambda task: -found[task]["gain"])[:count]
    return {task: {**gap, "taken": task in taken} for task, gap in found.items()}


def goal(found: Found) -> dict[str, dict[str, Any]]:
    """Compare the best of ours on each task, chosen on the selection seeds, on the others."""
    answer = {}
    for task, arms in found.items():
        chosen = max(OURS, key=lambda name: max(arms[name]["tried"].values()))
        against = {
            rival: rates.over_seeds(
                np.subtract(arms[chosen]["quality"], arms[rival]["quality"]).tolist()
            )
            for rival in (BASELINE, RIVAL)
        }
        met = all(low > 0 for _, low, _ in against.values())
        answer[task] = {"chosen": chosen, "against": against, "met": met}
    return answer


def markdown(entries: dict[str, Any]) -> str:
    """The page."""
    (entry,) = entries.values()
    found = entry["tasks"]
    lines = ["# Ways to spend the same LoRA parameters", ""]
    lines += ["What it says: [the reading](rank_strategies_reading.md).", ""]
    lines += ["![Loss, accuracy, final accuracy and parameters](rank_strategies.svg)", ""]
    lines += measuring.provenance(entry)
    lines += comparing.paragraphs(__doc__)
    if entry["note"]:
        lines += [entry["note"], ""]
    lines += _pilot(entry["pilot"])
    lines += _equality(found)
    lines += comparing.quality_table(found)
    lines += comparing.difference_table(entry["differences"], found, BASELINE)
    lines += comparing.difference_table(entry["against_rival"], found, RIVAL)
    lines += _goal(entry["goal"])
    lines += comparing.tried_table(found)
    return "\n".join(lines)


def _pilot(pilot: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "## Pilot",
        "",
        f"Best quality of one seed at uniform rank {LOW} and {HIGH}.",
        "",
        "| task | low | high | gain | taken |",
        "|---|---|---|---|---|",
    ]
    for task, gap in pilot.items():
        cells = [f"{gap[which]:.4f}" for which in ("low", "high", "gain")]
        lines.append(f"| {task} | {' | '.join(cells)} | {'yes' if gap['taken'] else 'no'} |")
    return [*lines, ""]


def _equality(found: Found) -> list[str]:
    first = next(iter(found.values()))
    budget = first[BASELINE]["parameters"]["final"]
    took = comparing.times(found, BASELINE)
    lines = [
        "## Parameters and time",
        "",
        f"Parameters of the factors as shares of {budget:,.0f}, those of uniform rank {LOW}: at "
        "their most, on average over the steps, and at the end, mean over tasks and seeds. Time: "
        "CPU seconds over those of uniform low at the same task and seed, geometric mean with its "
        "95% bootstrap interval over the pairs, since the machine was shared; a probe runs once "
        "for a task, and its CPU seconds (mean over tasks) come on top.",
        "",
        "| strategy | most | mean | end | time | probe, s | how they are equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in first:
        arms = [by_name[name] for by_name in found.values()]
        shares = [
            f"{np.mean([arm['parameters'][which] for arm in arms]) / budget:.2f}"
            for which in ("most", "mean", "final")
        ]
        probe = np.mean([arm["probe_cpu_seconds"] for arm in arms])
        lines.append(
            f"| {name} | {' | '.join(shares)} | {measuring.shown(took[name])} | "
            f"{f'{probe:.1f}' if probe else '–'} | {ARMS[name].equal} |"
        )
    return [*lines, ""]


def _goal(answer: Mapping[str, Mapping[str, Any]]) -> list[str]:
    met = sum(bool(one["met"]) for one in answer.values())
    lines = [
        "## The goal",
        "",
        "On each task the best of our allocations and changing ranks, chosen by the selection "
        f"seeds, against {BASELINE} and {RIVAL} on the judging seeds. It is met on a task where "
        "both intervals are over zero, and met as a whole on two tasks at least: it is "
        f"**{'met' if met >= 2 else 'not met'}** ({met} of {len(answer)}).",
        "",
        f"| task | chosen | against {BASELINE} | against {RIVAL} | met |",
        "|---|---|---|---|---|",
    ]
    for task, one in answer.items():
        cells = [comparing.signed(one["against"][rival]) for rival in (BASELINE, RIVAL)]
        said = "yes" if one["met"] else "no"
        lines.append(f"| {task} | {one['chosen']} | {' | '.join(cells)} | {said} |")
    return [*lines, ""]


def taken(pilot: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The tasks of a pilot that are compared on."""
    return [task for task, gap in pilot.items() if gap["taken"]]


def main(arguments: Sequence[str]) -> None:
    """The command line of this file."""
    given = _options(arguments)
    measuring.stay_offline("tiny")
    measuring.set_threads(1)
    records = measuring.Records(given.records)
    runs = comparing.Runs(ARMS, records, steps=given.steps, scale=SCALE, training=TRAINING)
    pilot = piloted(runs, given.candidates, given.tasks)
    tried = comparing.selected(
        runs, taken(pilot), tuple(ARMS), SELECTION, RATES, FACTOR, given.most_rates
    )
    found = comparing.judged(runs, tried, given.seeds, EVALUATIONS)
    untuned = {task: runs.untuned(task) for task in found}
    entry = {
        **measuring.circumstances(FILE, arguments, records.revisions),
        "note": given.note,
        "pilot": pilot,
        "untuned": untuned,
        "tasks": found,
        "differences": comparing.compared(found, BASELINE),
        "against_rival": comparing.compared(found, RIVAL),
        "goal": goal(found),
    }
    stem = given.output / "rank_strategies"
    print(measuring.publish(stem, "rank strategies", entry, markdown))
    svg = four_panels.figure(
        comparing.drawn(found, untuned, COLORS),
        title=f"Rank strategies, means over {len(found)} tasks and {given.seeds} seeds",
        loss="validation loss, share of the untuned model's",
        accuracy="token accuracy",
        legend=list(COLORS.items()),
    )
    stem.with_suffix(".svg").write_text(svg + "\n", encoding="utf-8")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare rank strategies at equal parameters.")
    parser.add_argument("--candidates", type=measuring.words, default=list(CANDIDATES))
    parser.add_argument("--tasks", type=int, default=TASKS, help="how many candidates are taken")
    parser.add_argument("--seeds", type=int, default=6, help="judging seeds")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--most-rates", type=int, default=MOST_RATES)
    measuring.add_recording(parser, RECORDS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
