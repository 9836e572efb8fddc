"""A comparison of arms: their runs, their learning rates, and what its page and figure show."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import four_panels
import measuring
import numpy as np
import rates
from arms import Arm
from arms import Bench

from optuna_lora_rl.finetuning.options import TrainingOptions

# What was found: by task and arm.
Found = Mapping[str, Mapping[str, Mapping[str, Any]]]


class Runs:
    """The runs of a comparison, made where they are not recorded yet.

    Args:
        arms: What is compared.
        records: Where they are kept.
        steps: Of each run.
        scale: alpha / r of every adapter.
        training: How every run trains.
    """

    def __init__(
        self,
        arms: Mapping[str, Arm],
        records: measuring.Records,
        *,
        steps: int,
        scale: float,
        training: Mapping[str, Any],
    ) -> None:
        self._arms = arms
        self._records = records
        self._steps = steps
        self._scale = scale
        self._training = training
        self.bench = cache(self._bench)

    def __call__(
        self, task: str, name: str, rate: float, seed: int, evaluations: int = 1
    ) -> measuring.Result:
        """Return one run."""
        key = {"task": task, "arm": name, **asdict(self._arms[name]), "rate": rate, "seed": seed}
        key |= {"steps": self._steps, "scale": self._scale, "training": self._training}
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

    def _once(
        self, key: dict[str, Any], measure: Callable[[], measuring.Result]
    ) -> measuring.Result:
        found = self._records.find(key)
        if found is None:
            found = measure()
            self._records.add(key, found)
        return found

    def _bench(self, task: str) -> Bench:
        training = TrainingOptions(use_cpu=True, monitor=0, **self._training)
        return Bench(task, self._steps, training, self._scale)


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
    evaluations: int,
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
            rows[task, name].append(runs(task, name, rate, seed, evaluations))
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


def compared(
    found: Found, baseline: str, which: str = "quality"
) -> dict[str, dict[str, list[float]]]:
    """Return every arm's differences to one of them, by task and over all."""

    def of(name: str) -> dict[str, list[float]]:
        return {task: arms[name][which] for task, arms in found.items()}

    names = [name for name in next(iter(found.values())) if name != baseline]
    gaps = {name: rates.differences(of(name), of(baseline)) for name in names}
    for name, row in gaps.items():
        # Over as many comparisons as rows, one error in twenty for all together (Bonferroni).
        row["corrected"] = rates.differences(of(name), of(baseline), level=1 - 0.05 / len(names))[
            "all"
        ]
    return gaps


def times(found: Found, baseline: str) -> dict[str, list[float]]:
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
    found: Found,
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
                parameters=(_mean_parameters(arms, "final"), _mean_parameters(arms, "most")),
            )
        )
    return rows


def paragraphs(docstring: str | None) -> list[str]:
    """Markdown of a file's docstring, from its third paragraph on."""
    parts = (docstring or "").split("\n\n")[2:]
    return [line for part in parts for line in (part.strip().replace("\n", " "), "")]


def quality_table(found: Found) -> list[str]:
    """Markdown of what the arms came to."""
    seeds = len(next(iter(next(iter(found.values())).values()))["quality"])
    lines = [
        "## Quality",
        "",
        "Share of the untuned model's validation loss that is gone, and token accuracy over all "
        f"tasks: means over {seeds} judging seeds, 95% intervals by Student's t. A run that "
        "failed counts as one that learnt nothing.",
        "",
        f"| | {' | '.join(found)} | accuracy, all tasks | failed |",
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


def _mean_parameters(arms: Sequence[Mapping[str, Any]], which: str) -> float:
    return float(np.mean([arm["parameters"][which] for arm in arms]))


def difference_table(
    found: Mapping[str, Mapping[str, Sequence[float]]], tasks: Mapping[str, Any], baseline: str
) -> list[str]:
    """Markdown of quality differences to one arm."""
    lines = [
        f"## Against {baseline}",
        "",
        "Differences of quality, paired by task and seed, with 95% intervals by Student's t over "
        "seeds; over all tasks by the seeds' means over them. They say nothing of other tasks. "
        f"In brackets what is left when the intervals are widened for {len(found)} comparisons "
        "(Bonferroni).",
        "",
        f"| | {' | '.join(tasks)} | all tasks | |",
        "|---" * (len(tasks) + 3) + "|",
    ]
    for name, row in found.items():
        cells = [signed(row[task]) for task in (*tasks, "all")]
        said = f"{rates.verdict(row['all'])} ({rates.verdict(row['corrected'])})"
        lines.append(f"| {name} | {' | '.join(cells)} | {said} |")
    return [*lines, ""]


def signed(interval: Sequence[float]) -> str:
    mean, low, high = (f"{value:+.4f}" for value in interval)
    return f"{mean} [{low}, {high}]"


def tried_table(found: Found) -> list[str]:
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
