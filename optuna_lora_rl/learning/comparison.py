"""Samplers side by side on problems whose best value is known.

    python -m optuna_lora_rl.learning.comparison --tasks 16 --seeds 2 --trials 20

Problems are synthetic LoRA studies that no policy was trained or validated on, and functions that
have nothing to do with LoRA. Regret is 0 at the best known configuration and 1 at the median one;
it is that of the best configuration tried so far, without its noise. Differences are paired over
problems and seeds; their intervals are 95% bootstrap intervals over problems, so an interval that
holds 0 is a tie.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
import torch

from optuna_lora_rl import samplers
from optuna_lora_rl.learning.tasks import Tasks
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.policy.dimensions import Dimension

# Tasks of this seed are neither trained nor validated on.
TEST_SEED = 777_000_001
AFTER = (1, 3, 5, 10, 20, 30, 50)

# Takes a trial and a random generator for the noise; returns the observed score (larger is
# better) and the regret without noise; raises FloatingPointError for a failed run.
Run = Callable[[optuna.Trial, np.random.Generator], tuple[float, float]]
MakeSampler = Callable[[int], optuna.samplers.BaseSampler]


@dataclass(frozen=True)
class Problem:
    """Something to tune.

    Args:
        name: for the tables.
        group: problems of one group are averaged.
        run: see ``Run``.
    """

    name: str
    group: str
    run: Run


def suggest(trial: optuna.Trial, dimension: Dimension) -> object:
    """Ask a trial for the parameter of a dimension."""
    if dimension.kind == "categorical":
        return trial.suggest_categorical(dimension.name, dimension.choices)
    if dimension.kind == "int":
        low, high = round(dimension.low), round(dimension.high)
        return trial.suggest_int(dimension.name, low, high, log=dimension.log)
    return trial.suggest_float(dimension.name, dimension.low, dimension.high, log=dimension.log)


def synthetic_problem(tasks: Tasks, row: int) -> Problem:
    """A task of the training families as a problem for any Optuna sampler."""
    task = tasks[torch.tensor([row])]
    space, width = task.spaces[0], task.layout.real.shape[1]
    lora, truth = bool(task.truth[0, 3] > 0), bool(task.truth[0, 0] > 0)
    shifted = lora and truth and abs(float(task.truth[0, 1])) > 0.7
    group = "LoRA, other scale" if shifted else "LoRA, usual scale" if lora else "not LoRA"

    def run(trial: optuna.Trial, rng: np.random.Generator) -> tuple[float, float]:
        params = {dimension.name: suggest(trial, dimension) for dimension in space.dimensions}
        x = np.full((1, 1, width), 0.5)
        x[0, 0, : len(space)] = space.encode(params)
        score, failed = task.score(torch.from_numpy(x))
        if bool(failed):
            raise FloatingPointError
        value = float(score)
        return value + float(task.noise) * rng.normal(), max(0.0, 1.0 - value)

    return Problem(f"task-{row}", group, run)


def _branin(trial: optuna.Trial, rng: np.random.Generator) -> tuple[float, float]:
    x, y = trial.suggest_float("x", -5, 10), trial.suggest_float("y", 0, 15)
    value = (y - 5.1 / (4 * math.pi**2) * x * x + 5 / math.pi * x - 6) ** 2
    value += 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10 - 0.397887
    return -value, value / 38.0


_A = np.array(
    [
        [10, 3, 17, 3.5, 1.7, 8],
        [0.05, 10, 17, 0.1, 8, 14],
        [3, 3.5, 1.7, 10, 17, 8],
        [17, 8, 0.05, 10, 0.1, 14],
    ]
)
_P = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)


def _hartmann(trial: optuna.Trial, rng: np.random.Generator) -> tuple[float, float]:
    x = np.array([trial.suggest_float(f"x{i}", 0, 1) for i in range(6)])
    inner = np.exp(-np.sum(_A * (x - _P) ** 2, axis=1))
    value = float(np.array([1.0, 1.2, 3.0, 3.2]) @ inner)
    return value, (3.32237 - value) / 3.13


def _mixed(trial: optuna.Trial, rng: np.random.Generator) -> tuple[float, float]:
    x = [trial.suggest_float(f"x{i}", -5, 5) for i in range(3)]
    k = trial.suggest_int("k", 1, 20)
    kind = trial.suggest_categorical("kind", ["a", "b", "c", "d"])
    scale = trial.suggest_float("scale", 1e-4, 1, log=True)
    value = sum((v - 1.3) ** 2 for v in x) / 10 + abs(k - 7) / 5
    value += {"a": 0.0, "b": 0.3, "c": 1.0, "d": 0.6}[kind] + (math.log10(scale) + 2) ** 2
    return -value, value / 6.0


FUNCTIONS = (
    Problem("branin", "functions", _branin),
    Problem("hartmann6", "functions", _hartmann),
    Problem("mixed", "functions", _mixed),
)


def peers(weights: Path | None = None) -> dict[str, MakeSampler]:
    """The samplers to compare, by name."""
    learned = {"weights": weights} if weights else {}

    def maker(name: str, options: Mapping[str, object]) -> MakeSampler:
        return lambda seed: samplers.create(name, seed=seed, options=options)

    def policy(**options: object) -> MakeSampler:
        return lambda seed: samplers.RLSampler(seed=seed, **options)  # type: ignore[arg-type]

    return {
        "rl": policy(**learned),
        "defaults-then-gp": policy(learned=False),
        "gp": maker("gp", {}),
        "tpe": maker("tpe", {}),
        "random": maker("random", {}),
    }


def regret_curve(problem: Problem, make: MakeSampler, seed: int, trials: int) -> np.ndarray:
    """Regret of the best configuration after each trial of one study, shape (trials,).

    Before the first trial that does not fail it is 3.
    """
    study = optuna.create_study(direction="maximize", sampler=make(seed))
    regrets = np.full(trials, 3.0)
    for number in range(trials):
        trial = study.ask()
        try:
            score, regret = problem.run(trial, np.random.default_rng([seed, number]))
        except FloatingPointError:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        study.tell(trial, score)
        regrets[number] = min(regret, 3.0)
    return np.minimum.accumulate(regrets)


def compare(
    problems: Sequence[Problem],
    makers: Mapping[str, MakeSampler],
    *,
    seeds: int,
    trials: int,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, np.ndarray]:
    """Regret curves by sampler, each of shape (problems, seeds, trials)."""
    curves = {name: np.zeros((len(problems), seeds, trials)) for name in makers}
    for row, problem in enumerate(problems):
        for name, make in makers.items():
            for seed in range(seeds):
                curves[name][row, seed] = regret_curve(problem, make, seed, trials)
        report(f"{row + 1} of {len(problems)} problems")
    return curves


def paired_interval(differences: np.ndarray, draws: int = 4000) -> tuple[float, float, float]:
    """Mean over problems and seeds (problems, seeds), and its 95% interval over problems."""
    by_problem = differences.mean(axis=1)
    rng = np.random.default_rng(0)
    rows = rng.integers(len(by_problem), size=(draws, len(by_problem)))
    low, high = np.quantile(by_problem[rows].mean(axis=1), [0.025, 0.975])
    return float(by_problem.mean()), float(low), float(high)


def tables(
    problems: Sequence[Problem], curves: Mapping[str, np.ndarray], reference: str = "rl"
) -> Iterable[str]:
    """Markdown tables by group: mean regret, and log10 regret of the others minus the reference's.

    A positive difference is a win of the reference; intervals that hold 0 are ties.
    """
    trials = curves[reference].shape[2]
    after = [k for k in AFTER if k <= trials]
    for group in sorted({problem.group for problem in problems}):
        rows = [i for i, problem in enumerate(problems) if problem.group == group]
        yield f"\n**{group}** ({len(rows)} problems): mean regret after trials\n"
        yield "| sampler | " + " | ".join(str(k) for k in after) + " |"
        yield "|---" * (len(after) + 1) + "|"
        for name, curve in curves.items():
            cells = [f"{curve[rows][:, :, k - 1].mean():.3f}" for k in after]
            yield f"| {name} | " + " | ".join(cells) + " |"
        for name, curve in curves.items():
            if name == reference:
                continue
            cells = []
            for k in after:
                ours = np.log10(curves[reference][rows][:, :, k - 1] + 0.01)
                theirs = np.log10(curve[rows][:, :, k - 1] + 0.01)
                mean, low, high = paired_interval(theirs - ours)
                cells.append(f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]")
            yield f"| log10 {name} - {reference} | " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description="Compare samplers on synthetic problems.")
    parser.add_argument("--tasks", type=int, default=16, help="synthetic tasks")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--weights", type=Path, help="of the policy; by default those shipped")
    parser.add_argument("--samplers", default="rl,defaults-then-gp,gp,tpe,random")
    given = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    tasks = draw_tasks(given.tasks, seed=TEST_SEED)
    problems = [synthetic_problem(tasks, row) for row in range(given.tasks)] + list(FUNCTIONS)
    everybody = peers(given.weights)
    makers = {name: everybody[name] for name in given.samplers.split(",")}
    curves = compare(
        problems,
        makers,
        seeds=given.seeds,
        trials=given.trials,
        report=lambda line: print(line, flush=True),
    )
    print("\n".join(tables(problems, curves)))


if __name__ == "__main__":
    main()
