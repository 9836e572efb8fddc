"""What an ask costs as a study grows: the learned sampler beside Optuna's TPE and GP.

    python studies/ask_times.py

Six parameters, one objective, in-memory storage. A study of so many finished random trials is
filled in, the same for every sampler; then the samplers take turns to ask for a trial and to be
told its score. After a few asks (a tenth of the study, at least ten) all of them begin again,
so that the study stays about as long as its row says. The first asks of each beginning, which
read the study and load what is loaded late, do not count. One thread for all; processor
milliseconds of the process beside wall ones, which need a machine that does nothing else. GP is
left out of studies in which its asks would take minutes.

"tpe" is Optuna's default, in Optuna 5 multivariate for one objective; "random" is what Optuna
itself costs.
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
from statistics import mean
from statistics import median

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from threadpoolctl import threadpool_limits

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
    "tpe-multivariate": lambda: optuna.samplers.TPESampler(seed=0, multivariate=True),
    "tpe-independent": lambda: optuna.samplers.TPESampler(seed=0, multivariate=False),
    "gp": lambda: optuna.samplers.GPSampler(seed=0),
    "random": lambda: optuna.samplers.RandomSampler(seed=0),
}
# Asks after each beginning that do not count.
WARM_UP = 2


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
    """Milliseconds an ask and KiB that it takes and leaves, by sampler, at one length of study."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    block = max(10, trials // 10)
    studies: dict[str, optuna.Study] = {}
    for begin in range(0, asks, block):
        studies = {name: filled(SAMPLERS[name](), trials) for name in names}
        for k in range(WARM_UP + min(block, asks - begin)):
            # Who goes first changes, since it finds the processor's caches in another state.
            turn = k % len(names)
            for name in names[turn:] + names[:turn]:
                took = one_ask(studies[name], k)
                if k >= WARM_UP:
                    spent[name].append(took)
    table = {}
    for name, times in spent.items():
        processor, wall = (sorted(1e3 * t for t in column) for column in zip(*times, strict=True))
        table[name] = {
            "median_ms": median(processor),
            "mean_ms": mean(processor),
            "longest_ms": processor[-1],
            "median_wall_ms": median(wall),
            "longest_wall_ms": wall[-1],
        }
        if name != "gp":
            table[name] |= memory(studies[name])
    return table


def one_ask(study: optuna.Study, k: int) -> tuple[float, float]:
    """Seconds of the processor and of the clock that an ask took; its trial is told."""
    processor, wall = time.process_time(), time.perf_counter()
    trial = study.ask(SPACE)
    took = time.process_time() - processor, time.perf_counter() - wall
    study.tell(trial, score(trial.params, 0.05 * math.sin(k)))
    return took


def memory(study: optuna.Study, asks: int = 10) -> dict[str, float]:
    """KiB of Python objects and NumPy arrays: what asks take at most and what each leaves."""
    peaks = []
    tracemalloc.start()
    one_ask(study, 0)
    before = tracemalloc.get_traced_memory()[0]
    for k in range(asks):
        tracemalloc.reset_peak()
        now = tracemalloc.get_traced_memory()[0]
        one_ask(study, k)
        peaks.append(tracemalloc.get_traced_memory()[1] - now)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return {
        "peak_kib": median(peaks) / 1024,
        "left_kib_an_ask": (after - before) / 1024 / asks,
    }


def markdown(record: dict) -> str:
    """The tables."""
    names, table = record["samplers"], record["table"]
    lines = [
        "# What an ask costs",
        "",
        f"Made by `{record['command']}`: {record['machine']}; " + record["versions"] + ".",
        f"{record['asks']} asks for each length of study after warm-up, samplers in turn, one "
        "thread, in-memory storage, 6 parameters.",
        *(["", f"**{record['note']}**"] if record["note"] else []),
    ]
    for title, key, longest in (
        ("Processor milliseconds: median (longest)", "median_ms", "longest_ms"),
        ("Wall milliseconds: median (longest)", "median_wall_ms", "longest_wall_ms"),
    ):
        lines += ["", f"## {title}", "", f"| finished trials | {' | '.join(names)} | rl / tpe |"]
        lines.append("|---" * (len(names) + 2) + "|")
        for trials, row in table.items():
            cells = [
                f"{row[n][key]:.1f} ({row[n][longest]:.0f})" if n in row else "-" for n in names
            ]
            ratio = f"{row['rl'][key] / row['tpe'][key]:.2f}" if {"rl", "tpe"} <= set(row) else "-"
            lines.append(f"| {trials} | " + " | ".join(cells) + f" | {ratio} |")
    lines += ["", "## KiB that an ask takes at most / that it and its trial leave", ""]
    shown = [name for name in names if name != "gp"]
    lines.append(f"| finished trials | {' | '.join(shown)} |")
    lines.append("|---" * (len(shown) + 1) + "|")
    for trials, row in table.items():
        cells = [f"{row[n]['peak_kib']:.0f} / {row[n]['left_kib_an_ask']:.0f}" for n in shown]
        lines.append(f"| {trials} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure what an ask costs.")
    parser.add_argument(
        "--trials", type=int, nargs="+", default=[10, 30, 100, 300, 1000, 3000, 10000]
    )
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--asks", type=int, default=30)
    parser.add_argument(
        "--gp-limit", type=int, default=100, help="longest study that GP is asked in"
    )
    parser.add_argument("--note", default="", help="said above the table")
    parser.add_argument("--output", type=Path, default=STEM, help="without its ending")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = {}
    for trials in given.trials:
        names = [name for name in given.samplers if name != "gp" or trials <= given.gp_limit]
        with threadpool_limits(1):
            table[str(trials)] = measure(trials, names, given.asks)
        for name, row in table[str(trials)].items():
            print(trials, name, *(f"{key} {value:.2f}" for key, value in row.items()), flush=True)
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
