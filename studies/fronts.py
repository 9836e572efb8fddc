"""How much of a front the learned sampler covers, beside Optuna's NSGA-II, TPE, GP and random.

    PYTHONPATH=. python studies/fronts.py

LoRA problems are the measured tables of the families that were held out (``learning/tables``): a
study minimises the cost of a run and maximises its quality over six parameters, with the noise of
the table's repeated runs; runs that diverge fail. The others are ZDT1 (its front convex), ZDT2
(concave) and ZDT3 (in five pieces; all in Zitzler, Deb & Thiele 2000) in 3 and 6 dimensions.

What counts is the hypervolume of all that a study has tried so far, without its noise, over that
of the ideal front: 0 nothing, 1 all of it. A problem's objectives are scaled so that the ideal
front spans 0 to 1 in each, both to be minimised, and the reference point is (1.1, 1.1), a tenth of
its range beyond its ends (Ishibuchi et al. 2018, "How to specify a reference point in hypervolume
calculation for fair performance comparison"). The ideal front of ZDT is known; that of a table is
the best that a search of 22,528 configurations found on its surface, which five times as many
improve by at most 0.003 of its hypervolume.

RLSampler scalarises: each proposal draws weights for the objectives. NSGA-II has a population of
10, since with Optuna's default of 50 the first 50 trials are random search.

Differences are rl's less the other's, paired by problem and seed; above 0 rl is ahead. Brackets
are 95% bootstrap intervals, over problems and seeds in a group, over seeds in a problem. Finished
studies are kept in the records, so that a stopped benchmark goes on. One process, one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import optuna
import torch
from optuna._hypervolume import compute_hypervolume
from optuna.distributions import BaseDistribution
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from optuna_lora_rl import samplers
from optuna_lora_rl.learning import statistics
from optuna_lora_rl.learning import writing
from optuna_lora_rl.learning.tables import surfaces
from optuna_lora_rl.learning.tables.problem import TableProblem
from optuna_lora_rl.learning.tables.problem import undominated
from studies.comparison import running
from studies.comparison.measured import GUISES
from studies.comparison.measured import measured_tasks
from studies.comparison.protocol import SamplerEntry

FILE = str(Path(__file__).resolve())
RECORDS = measuring.FOLDER.parent / "logs" / "fronts.jsonl"
OURS = "rl"
SAMPLERS = {
    label: SamplerEntry.model_validate({"name": label, **options})
    for label, options in {
        OURS: {},
        "nsgaii": {"population_size": 10},
        "tpe": {},
        "gp": {},
        "random": {},
    }.items()
}
_OTHERS = tuple(label for label in SAMPLERS if label != OURS)
LORA, OTHER = "LoRA", "ZDT"
AFTER = (10, 20, 50)
REFERENCE = np.array([1.1, 1.1])
_ZDT_POINTS = 10_001

# Takes a configuration and a random generator for the noise; returns both objectives as observed
# and as they are, to be minimised; raises FloatingPointError for a failed run.
Evaluate = Callable[[dict[str, Any], np.random.Generator], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Problem:
    """Two objectives to be minimised, whose best trade-offs are known.

    Args:
        name: for the records.
        group: ``LORA`` or ``OTHER``.
        space: Optuna's distributions by parameter name.
        evaluate: see ``Evaluate``.
        front: the ideal front, shape (n, 2).
    """

    name: str
    group: str
    space: Mapping[str, BaseDistribution]
    evaluate: Evaluate
    front: np.ndarray

    @cached_property
    def ideal(self) -> float:
        """Hypervolume of the ideal front, in its own ranges."""
        return self._volume(self.front)

    def hypervolume(self, losses: np.ndarray) -> float:
        """Share of the ideal hypervolume that losses (n, 2) have."""
        return self._volume(losses) / self.ideal

    def _volume(self, losses: np.ndarray) -> float:
        low, high = self.front.min(0), self.front.max(0)
        scaled = (losses - low) / (high - low)
        inside = scaled[(scaled < REFERENCE).all(1)]
        return float(compute_hypervolume(inside, REFERENCE)) if len(inside) else 0.0


def table_problem(task: str, known: surfaces.Surfaces) -> Problem:
    """Cost and quality of a measured table, in the comparison's usual guise of it."""
    guise = GUISES["usual"]
    shift = {"learning_rate": guise["scale"]}
    truth = TableProblem(task, tuned=guise["tuned"], shift=shift, failures=True, shipped=known)
    noise = float(known.noise[known.names.index(task)])

    def evaluate(
        params: dict[str, Any], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        (quality,), (cost,), (diverged,) = (one.tolist() for one in truth.outcomes([params]))
        scatter = noise * rng.normal()
        if diverged:
            raise FloatingPointError
        return np.array([cost, -quality - scatter]), np.array([cost, -quality])

    front = truth.front * [1.0, -1.0]
    return Problem(task.replace("/", "-"), LORA, truth.search_space, evaluate, front)


def zdt_problem(number: int, dimensions: int) -> Problem:
    """ZDT1, ZDT2 or ZDT3 over [0, 1]^d."""

    def second(first: Any, g: Any) -> Any:
        ratio = first / g
        if number == 2:
            return g * (1.0 - ratio**2)
        return g * (1.0 - ratio**0.5 - (number == 3) * ratio * np.sin(10.0 * math.pi * first))

    def evaluate(
        params: dict[str, Any], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        first, *others = (params[f"x{k}"] for k in range(dimensions))
        losses = np.array([first, second(first, 1.0 + 9.0 * np.mean(others))])
        return losses, losses

    first = np.linspace(0.0, 1.0, _ZDT_POINTS)
    curve = np.stack([first, second(first, 1.0)], axis=1)
    space = {f"x{k}": FloatDistribution(0.0, 1.0) for k in range(dimensions)}
    name = f"zdt{number}-{dimensions}d"
    return Problem(name, OTHER, space, evaluate, curve[undominated(curve)])


def build(tables: Sequence[str], dimensions: Sequence[int]) -> list[Problem]:
    """The problems: LoRA first."""
    zdt = [zdt_problem(number, d) for d in dimensions for number in (1, 2, 3)]
    known = surfaces.load()
    return [*(table_problem(task, known) for task in tables), *zdt]


def run(problem: Problem, entry: SamplerEntry, seed: int, trials: int) -> measuring.Result:
    """One study: the normalised hypervolume after each trial, and how many failed."""
    started = time.process_time()
    sampler = samplers.create(entry.name, seed=seed, options=entry.options)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    found, volumes = np.empty((0, 2)), []
    for number in range(trials):
        trial = study.ask(dict(problem.space))
        try:
            # Every sampler meets the same noise.
            rng = np.random.default_rng([seed, number])
            observed, true = problem.evaluate(trial.params, rng)
            study.tell(trial, observed.tolist())
            found = np.concatenate([found, true[None]])
        except FloatingPointError:
            study.tell(trial, state=TrialState.FAIL)
        volumes.append(round(problem.hypervolume(found), 5))
    seconds = round(time.process_time() - started, 2)
    return {"hypervolume": volumes, "failed": trials - len(found), "seconds": seconds}


@dataclass(frozen=True)
class Found:
    """What the studies of one sampler found.

    Args:
        curve: normalised hypervolume after each trial, shape (problems, seeds, trials).
        failed: trials that failed, shape (problems, seeds).
    """

    curve: np.ndarray
    failed: np.ndarray

    def of(self, rows: Sequence[int]) -> Found:
        """That of some of the problems."""
        return Found(self.curve[rows], self.failed[rows])


def studies(
    problems: Sequence[Problem], seeds: int, trials: int, records: measuring.Records
) -> dict[str, Found]:
    """Run what is not recorded, seed by seed, so that an early look at the records is fair."""
    shape = (len(problems), seeds)
    found = {label: Found(np.empty((*shape, trials)), np.empty(shape)) for label in SAMPLERS}
    makers = {label: running.made_by(entry) for label, entry in SAMPLERS.items()}
    for seed in range(seeds):
        for row, problem in enumerate(problems):
            for label, entry in SAMPLERS.items():
                key = {"problem": problem.name, "ideal": round(problem.ideal, 5), "seed": seed}
                key |= {"sampler": label, "made_by": makers[label], "trials": trials}
                result = records.find(key)
                if result is None:
                    result = run(problem, entry, seed, trials)
                    records.add(key, result)
                    said = f"{problem.name} {label} seed {seed}: {result['hypervolume'][-1]:.3f}"
                    print(f"{said}, {result['seconds']:.1f} s", flush=True)
                found[label].curve[row, seed] = result["hypervolume"]
                found[label].failed[row, seed] = result["failed"]
    return found


def summarise(
    problems: Sequence[Problem], found: Mapping[str, Found], after: Sequence[int]
) -> dict[str, Any]:
    """Means and paired differences of each group and of each problem."""
    rows: dict[str, list[int]] = {}
    for row, problem in enumerate(problems):
        rows.setdefault(problem.group, []).append(row)

    def section(rows: list[int]) -> dict[str, Any]:
        return _section({label: one.of(rows) for label, one in found.items()}, after)

    return {
        "counts": {name: len(of) for name, of in rows.items()},
        "groups": {name: section(of) for name, of in rows.items()},
        "problems": {problem.name: section([row]) for row, problem in enumerate(problems)},
    }


def _section(found: Mapping[str, Found], after: Sequence[int]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for label, one in found.items():
        ahead = found[OURS].curve - one.curve
        said[label] = {
            "hypervolume": {str(k): statistics.interval(one.curve[:, :, k - 1]) for k in after},
            "behind": {str(k): statistics.interval(ahead[:, :, k - 1]) for k in after},
            "failed": float(one.failed.mean()),
        }
    return said


def page(record: Mapping[str, Any]) -> str:
    """The tables, with what the head of this file says of them."""
    assert __doc__ is not None
    after = [str(k) for k in record["after"]]
    lines = ["# Fronts of two objectives", "", *__doc__.strip().splitlines()[4:], ""]
    lines += [record["note"], ""] if record["note"] else []
    for name, found in record["groups"].items():
        lines += [f"## {name}", ""]
        of = f"{record['counts'][name]} problems, {record['seeds']} seeds"
        lines += [f"{of}. Normalised hypervolume after so many trials:", ""]
        lines += writing.table(
            ["sampler", *after, "failed trials"],
            ([f"`{s}`", *_means(found[s], after), _failed(found[s])] for s in SAMPLERS),
        )
        lines += ["", "rl's less the other's:", ""]
        lines += writing.table(
            ["sampler", *after], ([f"`{s}`", *_behind(found[s], after)] for s in _OTHERS)
        )
        lines += [""]
    lines += [f"## By problem, after {after[-1]} trials", ""]
    lines += ["rl's normalised hypervolume, and rl's less the other's:", ""]
    lines += writing.table(
        ["problem", *(f"`{label}`" for label in SAMPLERS)],
        (
            [
                name,
                *_means(found[OURS], after[-1:]),
                *(cell for s in _OTHERS for cell in _behind(found[s], after[-1:])),
            ]
            for name, found in record["problems"].items()
        ),
    )
    lines += ["", "Failed trials of a study, mean, where there are any:", ""]
    lines += writing.table(
        ["problem", *(f"`{label}`" for label in SAMPLERS)],
        (
            [name, *(_failed(found[s]) for s in SAMPLERS)]
            for name, found in record["problems"].items()
            if any(found[s]["failed"] for s in SAMPLERS)
        ),
    )
    return "\n".join([*lines, "", *measuring.provenance(record)])


def _failed(found: Mapping[str, Any]) -> str:
    return f"{found['failed']:.1f}"


def _means(found: Mapping[str, Any], after: Sequence[str]) -> list[str]:
    return [f"{found['hypervolume'][k]['mean']:.3f}" for k in after]


def _behind(found: Mapping[str, Any], after: Sequence[str]) -> list[str]:
    return [writing.cell(found["behind"][k], "+.3f") for k in after]


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[3, 6], help="of ZDT")
    parser.add_argument("--tables", nargs="+", default=list(measured_tasks("test")))
    measuring.add_recording(parser, RECORDS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    after = sorted({k for k in AFTER if k < given.trials} | {given.trials})
    problems, records = build(given.tables, given.dimensions), measuring.Records(given.records)
    found = studies(problems, given.seeds, given.trials, records)
    record = {
        **measuring.circumstances(FILE, arguments, records.revisions),
        "note": given.note,
        "seeds": given.seeds,
        "after": after,
        **summarise(problems, found, after),
        "curves": {
            problem.name: {label: one.curve[row].tolist() for label, one in found.items()}
            for row, problem in enumerate(problems)
        },
    }
    stem = given.output / "fronts"
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    text = page(record)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
