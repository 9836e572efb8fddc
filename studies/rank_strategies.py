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
import time
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import four_panels
import measuring
import numpy as np
import rates
from arms import Arm
from arms import Bench

from optuna_lora_rl.finetuning.options import TrainingOptions

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
_SHARED = "rank budget counted in parameters, the rest less than one more rank of any layer"
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


class Runs:
    """The runs of a comparison, made where they are not recorded yet.

    Args:
        arms: What is compared.
        records: Where they are kept.
        steps: Of each run.
    """

    def __init__(self, arms: Mapping[str, Arm], records: measuring.Records, steps: int) -> None:
        self._arms = arms
        self._records = records
        self._steps = steps
        self.bench = cache(self._bench)

    def __call__(
        self, task: str, name: str, rate: float, seed: int, evaluations: int = 1
    ) -> measuring.Result:
        """Return one run."""
        key = {"task": task, "arm": name, **asdict(self._arms[name]), "rate": rate, "seed": seed}
        key |= {"steps": self._steps, "scale": SCALE, "training": TRAINING}
        key["evaluations"] = evaluations
        del key["group"], key["equal"]
        found = self._records.find(key)
        if found is None:
            began = time.monotonic()
            found = self.bench(task).run(self._arms[name], rate, seed, evaluations)
            self._records.add(key, found)
            took = time.monotonic() - began
            said = f"{task} {name} rate {rate:g} seed {seed}: {found['quality']:.4f}"
            print(f"{said}, {found['cpu_seconds']:.1f} s of CPU in {took:.1f} s", flush=True)
        return found

    def untuned(self, task: str) -> dict[str, float]:
        """Return what the untuned model has."""
        return self._once({"task": task, "untuned": True}, lambda: self.bench(task).untuned)

    def probe(self, task: str, name: str) -> float:
        """Return the CPU seconds of an arm's probe."""
        kind = str(self._arms[name].parameters.get("rank_allocation", "uniform"))
        if kind == "uniform":
            return 0.0
        key = {"task": task, "probe": kind}
        measured = self._once(
            key, lambda: {"cpu_seconds": round(self.bench(task).probe_seconds(kind), 3)}
        )
        return float(measured["cpu_seconds"])

    def _once(self, key: dict[str, Any], measure: Any) -> measuring.Result:
        found = self._records.find(key)
        if found is None:
            found = measure()
            self._records.add(key, found)
        return found

    def _bench(self, task: str) -> Bench:
        training = TrainingOptions(use_cpu=True, **TRAINING)
        return Bench(task, self._steps, training, SCALE)


def piloted(runs: Runs, candidates: Sequence[str], count: int) -> dict[str, dict[str, Any]]:
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


def selected(
    runs: Runs,
    tasks: Sequence[str],
    names: Sequence[str],
    seeds: Sequence[int],
    start: Sequence[float],
    factor: float,
    most: int,
) -> dict[str, dict[str, dict[float, float]]]:
    """Return the mean qualities of the rates that were tried, by task and arm."""

    def mean(task: str, name: str, rate: float) -> float:
        return float(np.mean([runs(task, name, rate, seed)["quality"] for seed in seeds]))

    return {
        task: {
            name: rates.search(
                lambda rate, task=task, name=name: mean(task, name, rate), start, factor, most
            )
            for name in names
        }
        for task in tasks
    }


def judged(
    runs: Runs,
    tried: Mapping[str, Mapping[str, Mapping[float, float]]],
    seeds: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Run every arm at its best rates on the judging seeds; results by task and arm."""
    chosen = {
        (task, name): rates.best(qualities)
        for task, arms in tried.items()
        for name, qualities in arms.items()
    }
    # Arms run side by side, seed by seed: what slows the machine down meets all alike.
    rows: dict[tuple[str, str], list[measuring.Result]] = {pair: [] for pair in chosen}
    for seed in range(seeds):
        for (task, name), rate in chosen.items():
            rows[task, name].append(runs(task, name, rate, seed, EVALUATIONS))
    found: dict[str, dict[str, dict[str, Any]]] = {task: {} for task in tried}
    for (task, name), results in rows.items():
        found[task][name] = _gathered(results) | {
            "rate": chosen[task, name],
            "tried": {f"{rate:g}": quality for rate, quality in tried[task][name].items()},
            "probe_cpu_seconds": runs.probe(task, name),
        }
    return found


def _gathered(results: Sequence[measuring.Result]) -> dict[str, Any]:
    done = [one for one in results if "failure" not in one]
    parameters = {
        which: float(np.mean([one["parameters"][which] for one in done])) if done else 0.0
        for which in ("most", "mean", "final")
    }
    return {
        "quality": [one["quality"] for one in results],
        "accuracy": [one["accuracy"] for one in results],
        "cpu_seconds": [one["cpu_seconds"] for one in results],
        "failed": len(results) - len(done),
        "parameters": parameters,
        "changes": float(np.mean([one["changes"] for one in done])) if done else 0.0,
        "start": {
            which: float(np.mean([one["start"][which] for one in done]))
            for which in (done[0]["start"] if done else ())
        },
        "ranks": done[0]["ranks"] if done else {},
        "curve": np.mean([one["curve"] for one in done], axis=0).tolist() if done else [],
        "reached": [_reached(one["curve"]) for one in done],
    }


def _reached(curve: Sequence[Sequence[float]]) -> float:
    """The first step evaluated at which 95% of the final quality was there."""
    return next(step for step, quality, _ in curve if quality >= 0.95 * curve[-1][1])


def goal(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
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


def compared(
    found: Mapping[str, Mapping[str, Mapping[str, Any]]], baseline: str, which: str = "quality"
) -> dict[str, dict[str, list[float]]]:
    """Return every arm's differences to one of them, by task and over all."""

    def of(name: str) -> dict[str, list[float]]:
        return {task: arms[name][which] for task, arms in found.items()}

    names = next(iter(found.values()))
    return {name: rates.differences(of(name), of(baseline)) for name in names if name != baseline}


def times(
    found: Mapping[str, Mapping[str, Mapping[str, Any]]], baseline: str
) -> dict[str, list[float]]:
    """Return each arm's CPU seconds over those of one of them, with intervals over the pairs."""
    names = next(iter(found.values()))
    return {
        name: measuring.interval(
            np.array(
                [
                    pair
                    for arms in found.values()
                    for pair in zip(
                        arms[name]["cpu_seconds"], arms[baseline]["cpu_seconds"], strict=True
                    )
                ]
            ),
            measuring.geometric_mean_ratio,
        )
        for name in names
    }


def drawn(
    found: Mapping[str, Mapping[str, Mapping[str, Any]]],
    untuned: Mapping[str, Mapping[str, float]],
    colors: Mapping[str, str],
) -> list[four_panels.Drawn]:
    """Return what the figure shows: means over tasks and seeds."""
    accuracy = float(np.mean([one["accuracy"] for one in untuned.values()]))
    rows = []
    for name in next(iter(found.values())):
        arms = [by_name[name] for by_name in found.values()]
        curve = np.mean([arm["curve"] for arm in arms if arm["curve"]], axis=0)
        final = rates.over_seeds(np.mean([arm["accuracy"] for arm in arms], axis=0).tolist())
        rows.append(
            four_panels.Drawn(
                name=name,
                color=colors[name],
                loss=[(0.0, 1.0), *((step, 1 - quality) for step, quality, _ in curve)],
                accuracy=[(0.0, accuracy), *((step, share) for step, _, share in curve)],
                final=(final[0], final[1], final[2]),
                parameters=float(np.mean([arm["parameters"]["final"] for arm in arms])),
            )
        )
    return rows


def markdown(entries: dict[str, Any]) -> str:
    """The page."""
    (entry,) = entries.values()
    found = entry["tasks"]
    lines = ["# Ways to spend the same LoRA parameters", ""]
    lines += ["What it says: [the reading](rank_strategies_reading.md).", ""]
    lines += ["![Loss, accuracy, final accuracy and parameters](rank_strategies.svg)", ""]
    lines += measuring.provenance(entry)
    lines += [paragraph.replace("\n", " ") for paragraph in _paragraphs()]
    if entry["note"]:
        lines += [entry["note"], ""]
    lines += _pilot(entry["pilot"])
    lines += _equality(found)
    lines += _qualities(found)
    lines += difference_table(entry["differences"], found, BASELINE)
    lines += _goal(entry["goal"])
    lines += tried_table(found)
    return "\n".join(lines)


def _paragraphs() -> list[str]:
    return [line for part in (__doc__ or "").split("\n\n")[2:] for line in (part.strip(), "")]


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


def _equality(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    first = next(iter(found.values()))
    budget = first[BASELINE]["parameters"]["final"]
    took = times(found, BASELINE)
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


def _qualities(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    seeds = len(next(iter(next(iter(found.values())).values()))["quality"])
    lines = [
        "## Quality",
        "",
        "Share of the untuned model's validation loss that is gone, and token accuracy over all "
        f"tasks: means over {seeds} judging seeds, 95% intervals by Student's t. A run that "
        "failed counts as one that learnt nothing.",
        "",
        f"| strategy | {' | '.join(found)} | accuracy, all tasks | failed |",
        "|---" * (len(found) + 3) + "|",
    ]
    for name in next(iter(found.values())):
        arms = [by_name[name] for by_name in found.values()]
        cells = [measuring.shown(rates.over_seeds(arm["quality"]), 4) for arm in arms]
        accuracy = rates.over_seeds(np.mean([arm["accuracy"] for arm in arms], axis=0).tolist())
        failed = sum(arm["failed"] for arm in arms)
        lines.append(
            f"| {name} | {' | '.join(cells)} | {measuring.shown(accuracy, 4)} | {failed} |"
        )
    return [*lines, ""]


def difference_table(
    found: Mapping[str, Mapping[str, Sequence[float]]], tasks: Mapping[str, Any], baseline: str
) -> list[str]:
    """Markdown of quality differences to one arm."""
    lines = [
        f"## Against {baseline}",
        "",
        "Differences of quality, paired by task and seed, with 95% intervals by Student's t over "
        "seeds; over all tasks by the seeds' means over them. They say nothing of other tasks. "
        f"With {len(found)} rows, about one interval in twenty misses its mean by chance.",
        "",
        f"| | {' | '.join(tasks)} | all tasks | |",
        "|---" * (len(tasks) + 3) + "|",
    ]
    for name, row in found.items():
        cells = [_signed(row[task]) for task in (*tasks, "all")]
        lines.append(f"| {name} | {' | '.join(cells)} | {rates.verdict(row['all'])} |")
    return [*lines, ""]


def _signed(interval: Sequence[float]) -> str:
    mean, low, high = (f"{value:+.4f}" for value in interval)
    return f"{mean} [{low}, {high}]"


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
        cells = [_signed(one["against"][rival]) for rival in (BASELINE, RIVAL)]
        said = "yes" if one["met"] else "no"
        lines.append(f"| {task} | {one['chosen']} | {' | '.join(cells)} | {said} |")
    return [*lines, ""]


def tried_table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Markdown of the learning rates."""
    lines = [
        "## Learning rates",
        "",
        "Those that were tried, with the mean quality on the selection seeds; the best one was "
        "taken.",
        "",
        f"| | {' | '.join(found)} |",
        "|---" * (len(found) + 1) + "|",
    ]
    for name in next(iter(found.values())):
        cells = []
        for arms in found.values():
            chosen = f"{arms[name]['rate']:g}"
            cells.append(
                ", ".join(
                    f"**{rate}: {quality:.3f}**" if rate == chosen else f"{rate}: {quality:.3f}"
                    for rate, quality in arms[name]["tried"].items()
                )
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
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
    runs = Runs(ARMS, records, given.steps)
    pilot = piloted(runs, given.candidates, given.tasks)
    tried = selected(runs, taken(pilot), tuple(ARMS), SELECTION, RATES, FACTOR, given.most_rates)
    found = judged(runs, tried, given.seeds)
    untuned = {task: runs.untuned(task) for task in found}
    entry = {
        **measuring.circumstances(FILE, arguments, records.revisions),
        "note": given.note,
        "pilot": pilot,
        "untuned": untuned,
        "tasks": found,
        "differences": compared(found, BASELINE),
        "against_rival": compared(found, RIVAL),
        "goal": goal(found),
    }
    stem = given.output / "rank_strategies"
    print(measuring.publish(stem, "rank strategies", entry, markdown))
    svg = four_panels.figure(
        drawn(found, untuned, COLORS),
        title=f"Rank strategies, means over {len(found)} tasks and {given.seeds} seeds",
        loss="validation loss, share of the untuned model's",
        accuracy="token accuracy",
        legend=list(COLORS.items()),
    )
    stem.with_suffix(".svg").write_text(svg + "\n", encoding="utf-8")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare rank strategies at equal parameters.")
    parser.add_argument("--candidates", type=_words, default=list(CANDIDATES))
    parser.add_argument("--tasks", type=int, default=3, help="how many candidates are taken")
    parser.add_argument("--seeds", type=int, default=6, help="judging seeds")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--most-rates", type=int, default=MOST_RATES)
    parser.add_argument(
        "--note", help="what the page has to say, such as that the machine was shared"
    )
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--output", type=Path, default=measuring.RESULTS)
    return parser.parse_args(arguments)


def _words(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    main(sys.argv[1:])
