"""What 200 trials in one process leave behind: memory, objects, hooks, threads, lost speed.

    python studies/leaks.py

The same list of trials, of all kinds (ranks, targets, dropouts, initialisations, optimizers; every
tenth is pruned and every twenty-fifth diverges), runs in one process one after the other, and in
another side by side. After trials 20, 110 and 200 each process is looked at: nothing runs then,
and Python's collector has been by. A leak shows as a number that goes on growing. Trials 21 to 110
and 111 to 200 are of the same kinds, so that they should take the processor equally long.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import threading
import time
import warnings
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import measuring

FILE = str(Path(__file__).resolve())
STEM = measuring.FOLDER / "results" / "leaks"
KINDS: list[dict[str, Any]] = [
    {},
    {"lora_dropout": 0.1, "target_modules": "attention"},
    {"init_lora_weights": "pissa", "lora_rank": 4},
    {"target_modules": "mlp", "optim": "adafactor", "lr_scheduler_type": "cosine"},
    {"init_lora_weights": "gaussian", "batch_size": 4},
    {"init_lora_weights": "olora", "target_modules": "qv", "lora_dropout": 0.2},
    {"use_rslora": True, "lora_rank": 16, "loraplus_lr_ratio": 4.0},
    {"init_lora_weights": "orthogonal", "layers": "last-half", "batch_size": 16},
    {"use_dora": True, "target_modules": "qv"},
]
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Pruned(Exception):
    """What a pruned trial raises."""


def configuration(number: int, steps: int) -> dict[str, Any]:
    """Return the trial of that number, the same at every call."""
    chosen = {"max_steps": steps, "learning_rate": 1e-3, **KINDS[number % len(KINDS)]}
    if number % 25 == 24:
        chosen |= {"learning_rate": 1e20, "max_grad_norm": 0.0, "optim": "sgd"}
    return chosen


def prune(step: int, score: float, metrics: Any) -> None:
    """End the trial at its first evaluation."""
    raise Pruned


def prepare(job: measuring.Job) -> Callable[[], measuring.Result]:
    """Get a worker ready; what it returns runs all trials."""
    measuring.set_threads(job["threads"])
    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.finetuning.options import DataOptions
    from optuna_lora_rl.finetuning.options import ModelOptions
    from optuna_lora_rl.finetuning.options import ObjectiveOptions

    tuner = FineTuner(
        ModelOptions(name=job["model"]),
        DataOptions(train=job["data"], max_validation_samples=job["validation"]),
        measuring.training_options(job),
        ObjectiveOptions(),
    )
    tuner.prepare()
    tuner.baseline()
    return lambda: measuring.timed(lambda: trials(tuner, job))


def trials(tuner: Any, job: measuring.Job) -> measuring.Result:
    """Run all trials and look at the process between them."""
    seconds: dict[int, float] = {}
    endings: dict[str, int] = {}
    looks, begun = [look(tuner)], 0

    def done(run: Any, result: Any) -> None:
        kind = type(result).__name__
        endings[kind] = endings.get(kind, 0) + 1
        if kind == "TrialResult":
            seconds[run.number] = result.seconds / result.steps
        elif getattr(result, "reason", "diverged") != "diverged":
            raise result

    for until in job["looks"]:
        _train(tuner, begun, until, job, done)
        looks.append(look(tuner))
        begun = until
    order = [seconds[number] for number in sorted(seconds)]
    return {
        "looks": dict(zip(map(str, [0, *job["looks"]]), looks, strict=True)),
        "endings": endings,
        "seconds_per_step": {"first": median(order[:50]), "last": median(order[-50:])},
    }


def _train(tuner: Any, begin: int, end: int, job: measuring.Job, done: Any) -> None:
    from optuna_lora_rl.finetuning.trial import TrialRequest

    waiting = [
        TrialRequest(i, configuration(i, job["steps"]), report=prune if i % 10 == 9 else None)
        for i in range(begin, end)
    ]
    if job["size"] > 1:
        waiting.reverse()
        tuner.run_packed(lambda: waiting.pop() if waiting else None, done, size=job["size"])
        return
    for run in waiting:
        result: Any
        try:
            result = tuner.run(run.configuration, report=run.report)
        except Exception as error:
            result = error
        done(run, result)


def look(tuner: Any) -> dict[str, Any]:
    """Return what the process holds, and whether the base model is what it was."""
    import psutil
    import torch

    gc.collect()
    base = tuner._prepared.base.model
    digest = hashlib.sha256()
    for name, tensor in base.state_dict().items():
        digest.update(
            name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        )
    things = gc.get_objects()
    with warnings.catch_warnings():
        # Some of torch's lazy objects warn at being looked at.
        warnings.simplefilter("ignore")
        tensors = sum(isinstance(thing, torch.Tensor) for thing in things)
    return {
        "cpu_seconds": time.process_time(),
        "rss_bytes": psutil.Process().memory_info().rss,
        "objects": len(things),
        "tensors": tensors,
        "hooks": sum(len(getattr(module, kind)) for module in base.modules() for kind in HOOKS),
        "attributes": sum(len(module.__dict__) for module in base.modules()),
        "threads": threading.active_count(),
        "weights": digest.hexdigest()[:16],
    }


def page(entries: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    lines = [
        "# What 200 trials in one process leave behind",
        "",
        "Nothing runs when the process is looked at, and Python's collector has been by. Trial 0: "
        "the model and the data are loaded, nothing was trained. The first trials fill caches of "
        "the libraries; what counts is whether a number goes on growing. Trials 21 to 110 and 111 "
        "to 200 are of the same kinds. Seconds a step are by the clock, so they tell also what "
        "else the machine did; the processor's seconds hardly do.",
    ]
    for name, entry in entries.items():
        lines += ["", f"## {name}", "", *measuring.provenance(entry)]
        for arm, result in entry["arms"].items():
            lines += [f"### {arm}", "", *_table(result), ""]
            speed = result["seconds_per_step"]
            ends = ", ".join(f"{count} {kind}" for kind, count in result["endings"].items())
            lines += [
                f"Seconds a step, median of the first 50 trials and of the last 50: "
                f"{speed['first']:.4f} and {speed['last']:.4f} "
                f"({speed['last'] / speed['first'] - 1:+.1%}). Outcomes: {ends}. "
                f"Everything took {result['seconds']:.0f} s.",
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def _table(result: measuring.Result) -> list[str]:
    counts = ("objects", "tensors", "hooks", "attributes", "threads")
    titles = ["After trial", "CPU s since", "RSS, MB", *counts, "weights"]
    rows = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    before = 0.0
    for number, found in result["looks"].items():
        took, before = found["cpu_seconds"] - before, found["cpu_seconds"]
        cells = [
            number,
            "" if number == "0" else f"{took:.1f}",
            f"{found['rss_bytes'] / 1e6:.1f}",
            *(str(found[key]) for key in counts),
            f"`{found['weights']}`",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main(arguments: Sequence[str]) -> None:
    """Run both arms and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", default="tiny:dates-small")
    parser.add_argument("--device", default="cpu", choices=["cpu", "auto"])
    parser.add_argument("--looks", type=int, nargs="+", default=[20, 110, 200])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--evaluations", type=int, default=2)
    parser.add_argument("--validation", type=int, default=32)
    parser.add_argument("--size", type=int, default=8, help="trials side by side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stem", type=Path, default=STEM, help="results file, without a suffix")
    given = parser.parse_args(arguments)
    settings = {name: value for name, value in vars(given).items() if name != "stem"}
    results = {}
    for arm, size in (("alone", 1), (f"packed {given.size}", given.size)):
        (results[arm],) = measuring.launch(FILE, [{**settings, "size": size}])
        print(f"{arm}: {results[arm]['seconds']:.0f} s", flush=True)
    entry = {
        **measuring.circumstances(FILE, arguments),
        "settings": settings,
        "arms": results,
    }
    print(measuring.publish(given.stem, given.model, entry, page))


if __name__ == "__main__":
    measuring.program(main, prepare)
