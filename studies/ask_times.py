"""What an ask costs as a study grows: the learned sampler beside Optuna's TPE and GP.

    python studies/ask_times.py

Six parameters, one objective, in-memory storage. A study of so many finished random trials is
filled in; then the samplers take turns to ask for a trial and to be told its score. Processor
time of the process, so that what else the machine does counts little; one thread. GP is left out
of studies in which its asks would take minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
import tracemalloc
import warnings
from pathlib import Path
from statistics import median

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_lora_rl import RLSampler

STEM = Path(__file__).resolve().parent / "results" / "ask_times"
SPACE: dict[str, BaseDistribution] = {
    "learning_rate": FloatDistribution(1e-6, 1e-1, log=True),
    "lora_alpha": IntDistribution(1, 512, log=True),
    "lora_dropout": FloatDistribution(0.0, 0.3),
    "lora_rank": IntDistribution(2, 256, log=True),
    "target_modules": CategoricalDistribution(["qv", "attention", "all-linear"]),
    "weight_decay": FloatDistribution(0.0, 0.3),
}
SAMPLERS = {
    "rl": lambda: RLSampler(seed=0),
    "tpe": lambda: optuna.samplers.TPESampler(seed=0),
    "gp": lambda: optuna.samplers.GPSampler(seed=0),
}
# Above so many trials the GP of Optuna is not asked.
GP_LIMIT = 100


def score(params: dict[str, float | int | str], noise: float) -> float:
    """A loss with a best learning rate, some gain from rank and a little noise."""
    off = math.log10(float(params["learning_rate"])) + 3.5
    return off**2 + 0.1 / float(params["lora_rank"]) ** 0.5 + float(params["weight_decay"]) + noise


def filled(sampler: optuna.samplers.BaseSampler, trials: int) -> optuna.Study:
    """A study of so many finished random trials."""
    rng = np.random.default_rng(0)
    study = optuna.create_study(sampler=sampler)
    told = []
    for _ in range(trials):
        params = {
            "learning_rate": float(10 ** rng.uniform(-6, -1)),
            "lora_alpha": int(rng.integers(1, 513)),
            "lora_dropout": float(rng.uniform(0, 0.3)),
            "lora_rank": int(rng.integers(2, 257)),
            "target_modules": ("qv", "attention", "all-linear")[rng.integers(3)],
            "weight_decay": float(rng.uniform(0, 0.3)),
        }
        value = score(params, 0.05 * rng.normal())
        told.append(optuna.create_trial(params=params, distributions=SPACE, value=value))
    study.add_trials(told)
    return study


def measure(trials: int, names: list[str], asks: int) -> dict[str, dict[str, float]]:
    """Milliseconds an ask and KiB that it leaves behind, by sampler, at one length of study."""
    studies = {name: filled(SAMPLERS[name](), trials) for name in names}
    spent: dict[str, list[float]] = {name: [] for name in names}
    for k in range(asks + 1):
        for name, study in studies.items():
            begin = time.process_time()
            trial = study.ask(SPACE)
            took = time.process_time() - begin
            study.tell(trial, score(trial.params, 0.05 * math.sin(k)))
            if k:  # the first reads the study and loads what is loaded late
                spent[name].append(1e3 * took)
    table = {
        name: {"median_ms": median(times), "longest_ms": max(times)}
        for name, times in spent.items()
    }
    for name, study in studies.items():
        if name != "gp":
            table[name]["left_kib_an_ask"] = left_behind(study)
    return table


def left_behind(study: optuna.Study, asks: int = 10) -> float:
    """KiB of Python objects that are there after each ask and were not before."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for k in range(asks):
        trial = study.ask(SPACE)
        study.tell(trial, score(trial.params, 0.05 * math.cos(k)))
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return (after - before) / 1024 / asks


def markdown(record: dict) -> str:
    """The table."""
    lines = [
        "# What an ask costs",
        "",
        f"Made by `{record['command']}`: {record['machine']}; " + record["versions"] + ".",
        f"Median processor milliseconds of {record['asks']} asks, one thread, in-memory storage, "
        "6 parameters; in brackets the longest.",
        *(["", f"**{record['note']}**"] if record["note"] else []),
        "",
        "| finished trials | " + " | ".join(record["samplers"]) + " | rl / tpe |",
        "|---" * (len(record["samplers"]) + 2) + "|",
    ]
    for trials, row in record["table"].items():
        cells = [
            f"{row[name]['median_ms']:.1f} ({row[name]['longest_ms']:.0f})" if name in row else "-"
            for name in record["samplers"]
        ]
        ratio = "-"
        if {"rl", "tpe"} <= set(row):
            ratio = f"{row['rl']['median_ms'] / row['tpe']['median_ms']:.2f}"
        lines.append(f"| {trials} | " + " | ".join(cells) + f" | {ratio} |")
    kept = ", ".join(
        f"{trials}: "
        + " and ".join(f"{row[n]['left_kib_an_ask']:.0f} ({n})" for n in row if n != "gp")
        for trials, row in record["table"].items()
    )
    lines += ["", f"KiB that an ask and its trial leave behind, by finished trials: {kept}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure what an ask costs.")
    parser.add_argument("--trials", type=int, nargs="+", default=[10, 100, 1000, 10000])
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--asks", type=int, default=15)
    parser.add_argument("--note", default="", help="said above the table")
    parser.add_argument("--output", type=Path, default=STEM, help="without its ending")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = {}
    for trials in given.trials:
        names = [name for name in given.samplers if name != "gp" or trials <= GP_LIMIT]
        table[str(trials)] = measure(trials, names, given.asks)
        print(trials, table[str(trials)], flush=True)
    record = {
        "command": " ".join(["python", "studies/ask_times.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": f"Python {platform.python_version()}, optuna {optuna.__version__}, "
        f"torch {torch.__version__}, numpy {np.__version__}",
        "note": given.note,
        "asks": given.asks,
        "samplers": given.samplers,
        "table": table,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(markdown(record))


if __name__ == "__main__":
    main()
