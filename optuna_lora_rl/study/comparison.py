"""Compares samplers on one fine-tuning study, run with each of them and several seeds.

Every run is a process of its own with one thread, so that runs side by side do not disturb each
other; with estimated costs the result does not depend on how many there are.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
from optuna.trial import TrialState

from optuna_lora_rl.activity import counted
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import masked
from optuna_lora_rl.finetuning import process
from optuna_lora_rl.learning.statistics import interval
from optuna_lora_rl.learning.writing import cell
from optuna_lora_rl.learning.writing import footer
from optuna_lora_rl.learning.writing import table
from optuna_lora_rl.learning.writing import versions
from optuna_lora_rl.samplers import NAMES
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study.outcome import Usage
from optuna_lora_rl.study.spec import StudySpec
from optuna_lora_rl.study.spec import load
from optuna_lora_rl.study.waiting import waiting

if TYPE_CHECKING:
    from rich.console import Console

_PACKAGES = ("optuna", "torch", "transformers", "peft", "trl", "scikit-learn", "numpy")
_CHECKPOINTS = (5, 10, 20, 50)


@dataclass(frozen=True)
class Contestant:
    """One study of the comparison.

    Attributes:
        sampler: The sampler's name.
        seed: The sampler's seed.
        overrides: What is said over the file, as ``key=value``.
    """

    sampler: str
    seed: int
    overrides: tuple[str, ...]


def compare(
    file: Path,
    *,
    samplers: Sequence[str] = ("rl", "tpe", "random"),
    seeds: int = 5,
    workers: int = 1,
    output: Path | None = None,
    overrides: Sequence[str] = (),
    console: Console,
) -> None:
    """Runs what is missing, and writes ``comparison.json`` and ``comparison.md``.

    Args:
        file: Of the study.
        samplers: Their names.
        seeds: Seeds 0 to ``seeds - 1`` are run for each sampler.
        workers: Runs at the same time.
        output: Folder for the results. By default ``comparison`` in the study's output folder,
            where its runs are kept in any case.
        overrides: ``key=value`` assignments over the file.
        console: Is told of every finished run.

    Raises:
        UserError: If the file is no study, a sampler's name is unknown, or a run fails.
    """
    for name in samplers:
        if name not in NAMES:
            raise UserError(f"--samplers: {name!r} is not known; use some of {', '.join(NAMES)}")
    process.check()
    spec = load(file, overrides)
    output = output or spec.folder / "comparison"
    opening.claim(spec)
    contestants = [
        _contestant(spec, name, seed, overrides) for name in samplers for seed in range(seeds)
    ]
    with ThreadPoolExecutor(workers) as pool, waiting(console) as on_activity:
        runs = {pool.submit(_run, file, one): one for one in contestants}
        ended = as_completed(runs)
        try:
            for _ in counted(contestants, "running", "studies", on_activity):
                run = next(ended)
                one, best = runs[run], run.result()[-1]
                console.print(f"{one.sampler:>8}  seed {one.seed}  best {best:.4f}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    curves = {
        name: [run.result() for run, one in runs.items() if one.sampler == name]
        for name in samplers
    }
    command = ["optuna-lora-rl", "compare", str(file), "--samplers", ",".join(samplers)]
    command += ["--seeds", str(seeds), "--output", str(output)]
    command += [part for o in overrides for part in ("--set", o)]
    typed = masked(shlex.join(command))
    results = summarise(curves) | {"command": typed, "versions": versions(_PACKAGES)}
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2)
    (output / "comparison.json").write_text(text + "\n", encoding="utf-8")
    (output / "comparison.md").write_text(markdown(results), encoding="utf-8")
    console.print(markdown(results), markup=False, highlight=False, soft_wrap=True)


def summarise(curves: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Means and intervals over seeds.

    Args:
        curves: For every sampler and seed, the best score after each trial. Seeds pair up.

    Returns:
        For every sampler its final best scores, their mean with a 95% bootstrap interval, the
        same for the paired difference to the first sampler, and means after fewer trials.
    """
    first = next(iter(curves))
    n_trials = min(len(curve) for runs in curves.values() for curve in runs)
    checkpoints = [n for n in _CHECKPOINTS if n < n_trials] + [n_trials]
    samplers = {}
    for name, runs in curves.items():
        scores = np.array([curve[n_trials - 1] for curve in runs])
        against = scores - np.array([curve[n_trials - 1] for curve in curves[first]])
        samplers[name] = {
            "best_scores": scores.tolist(),
            "mean": interval(scores[None]),
            "difference": None if name == first else interval(against[None]),
            "mean_after": {
                str(n): float(np.mean([curve[n - 1] for curve in runs])) for n in checkpoints
            },
            "curves": [list(curve) for curve in runs],
        }
    return {"trials": n_trials, "seeds": len(curves[first]), "samplers": samplers}


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a page with one table."""
    samplers: Mapping[str, Any] = results["samplers"]
    first = next(iter(samplers))
    checkpoints = list(samplers[first]["mean_after"])
    heads = ["sampler", *(f"after {n}" for n in checkpoints[:-1])]
    heads += [f"after {checkpoints[-1]} [95%]", f"difference to {first} [95%]"]
    rows = []
    for name, found in samplers.items():
        cells = [f"`{name}`"]
        cells += [f"{found['mean_after'][n]:.4f}" for n in checkpoints[:-1]]
        difference = found["difference"]
        cells += [cell(found["mean"], ".4f"), cell(difference, "+.4f") if difference else "–"]
        rows.append(cells)
    return "\n".join(
        [
            f"Best score so far, mean over {results['seeds']} seeds; 95% bootstrap intervals over "
            "seeds, differences paired by seed. Higher is better.",
            "",
            *table(heads, rows),
            "",
            *footer(results["command"], results["versions"]),
        ]
    )


def _contestant(spec: StudySpec, sampler: str, seed: int, overrides: Sequence[str]) -> Contestant:
    folder = spec.folder / "comparison" / f"{sampler}-{seed}"
    # The file's own options are for the file's own sampler.
    said = f"sampler={{name: {sampler}, seed: {seed}}}"
    if sampler == spec.sampler.name:
        said = f"sampler.seed={seed}"
    own = (said, f"name={spec.name}-{sampler}-{seed}", f"output={folder}", "storage=null")
    # A storage of the user's is not used, and its password not shown in the list of processes.
    others = (o for o in overrides if o.partition("=")[0].strip() != "storage")
    return Contestant(sampler, seed, (*others, *own))


def _run(file: Path, one: Contestant) -> list[float]:
    """The best score after each trial, from a study that is run first if it is not finished."""
    spec = load(file, one.overrides)
    curve = _curve(spec)
    if curve is not None:
        return curve
    command = [sys.executable, "-m", "optuna_lora_rl", "run", str(file), "--plain"]
    command += [part for o in one.overrides for part in ("--set", o)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    curve = _curve(spec)
    if done.returncode or curve is None:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise UserError(f"{one.sampler}, seed {one.seed}, did not finish: {''.join(last)}")
    return curve


def _curve(spec: StudySpec) -> list[float] | None:
    """The best score after each trial of a finished study, or None."""
    try:
        trials = opening.load_study(spec).get_trials(deepcopy=False)
    except UserError:
        return None
    if Usage.of(trials).exhausted(spec.budget) is None:
        return None
    curve, best = [], float("-inf")
    for trial in (trial for trial in trials if outcome.counts(trial)):
        score = outcome.final_score(trial) if trial.state == TrialState.COMPLETE else None
        best = best if score is None else max(best, score)
        curve.append(best)
    return curve
