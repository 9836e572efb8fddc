"""Trials an hour at equal work: the naive arm, one shared base, and packs of several sizes.

    python studies/throughput.py --model tiny
    python studies/throughput.py --model 30m
    python studies/throughput.py --model smollm2
    python studies/throughput.py --model Qwen/Qwen2.5-0.5B --device auto --trials 32

Every arm trains the same fixed list of configurations, with the same data, steps, batch size and
evaluations and no pruning; there is no sampler in any arm, since nothing is proposed. So the work
is equal, and the final validation losses have to agree, which is recorded. Each arm runs in fresh
processes of its own, the arms of one repeat after each other, repeat after repeat. Imports and a
run of one step that warms the process up are not counted; loading the model for each trial is
counted in the naive arm; the package's one preparation is counted apart and with the trials.

The naive arm (``studies/naive.py``) has torch's own number of threads. The package has that which
its runner takes (one for the built-in model, torch's own for others), or ``--threads``. How much
this matters shows in ``naive, 1 thread``. ``naive, TRL's defaults`` leaves gradient checkpointing
on and the evaluation batch at eight, as one does who does not know of them. ``shared base, growing
evaluations`` has the same training and the same last evaluation, but the evaluations before read a
quarter, a half and three quarters of the validation set (``training.first_evaluation``); all other
arms of the package read all of it each time, but on smollm2. Arms "x2" are two worker processes
that share the list, each with half of the cores.

On ``smollm2`` the naive arm evaluates once, at the end, as TRL's guide has it, in float32 and in
mixed bfloat16, with TRL's defaults and without gradient checkpointing, and the package as it does
by default: four times, the last time on all of the same examples. Each of its parts is also left
out alone: bfloat16, products that cast once and few logits, rows end to end, small early
evaluations, and the one base for all trials.

Model ``30m`` is a Llama of 31.5 million parameters with random weights, made on the spot: time
does not depend on what the weights are. What the records hold is not measured again, so remove
them when the code has changed; the results name the revisions that they are of.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from itertools import product
from pathlib import Path
from typing import Any

import measuring
from throughput_tables import markdown
from throughput_tables import summarise

FILE = str(Path(__file__).resolve())
ROOT = measuring.FOLDER.parent
MADE = ROOT / "runs" / "benchmark-30m"
# What an unattended run of half an hour to an hour on two cores can do.
DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {
        "trials": 16,
        "steps": 40,
        "validation": 160,
        "sets": ["uniform", "mixed"],
        "pairs": [4, 8],
    },
    "30m": {"trials": 16, "steps": 16, "validation": 64, "sets": ["mixed"], "pairs": []},
    "smollm2": {
        "trials": 1,
        "steps": 24,
        "validation": 70,
        "sets": ["uniform"],
        "pairs": [],
        "data": "real:dates",
    },
}
PARTS = ("bfloat16", "own products", "rows end to end", "small evaluations", "the shared base")
BATCH = 8


@dataclass(frozen=True)
class Arm:
    """One way to get through the list.

    Attributes:
        kind: ``naive``, ``shared`` or ``packed``.
        size: Most trials side by side in one process.
        processes: Worker processes.
        one_thread: Whether each process shall have one thread, whatever its usual number.
        defaults: Whether the naive arm keeps TRL's defaults (``naive.Setup``).
        growing: Whether early evaluations read a part of the validation set.
        bf16: Whether the naive arm trains in mixed bfloat16.
        without: The part of the package that is left out.
    """

    kind: str
    size: int = 1
    processes: int = 1
    one_thread: bool = False
    defaults: bool = False
    growing: bool = False
    bf16: bool = False
    without: str = ""

    @property
    def name(self) -> str:
        name = {"naive": "naive", "shared": "shared base"}.get(self.kind, f"packed {self.size}")
        name += ", 1 thread" if self.one_thread else ""
        name += ", TRL's defaults" if self.defaults else ""
        name += ", growing evaluations" if self.growing else ""
        name += ", bf16" if self.bf16 else ""
        name += f", without {self.without}" if self.without else ""
        return name + (f" x{self.processes}" if self.processes > 1 else "")


def arms(model: str, sizes: Sequence[int], pairs: Sequence[int]) -> list[Arm]:
    """Return the arms.

    Args:
        model: Which is trained.
        sizes: Of packs in one process.
        pairs: Of packs in two processes; with any, the other arms run in two processes as well.
    """
    if model == "smollm2":
        naive = [Arm("naive", defaults=d, bf16=b) for d in (True, False) for b in (False, True)]
        return [*naive, Arm("shared"), *(Arm("shared", without=part) for part in PARTS)]
    chosen = [Arm("naive"), Arm("naive", one_thread=True), Arm("naive", defaults=True)]
    chosen += [Arm("shared"), Arm("shared", growing=True)]
    chosen += [Arm("packed", size) for size in sizes]
    if pairs:
        chosen += [Arm("naive", processes=2), Arm("shared", processes=2)]
        chosen.append(Arm("shared", processes=2, growing=True))
    return chosen + [Arm("packed", size, processes=2) for size in pairs]


def configurations(kind: str, count: int, steps: int) -> list[dict[str, Any]]:
    """Return the list, the same at every call.

    Args:
        kind: ``uniform`` (they differ in the learning rate alone) or ``mixed`` (in all).
        count: How many.
        steps: Optimizer steps of each.
    """
    generator = random.Random(f"{kind} configurations")
    made = []
    for _ in range(count):
        rank, ratio, dropout, target = 8, 2.0, 0.0, "all-linear"
        if kind == "mixed":
            rank = round(2 * 32 ** generator.random())
            ratio = 0.5 * 16 ** generator.random()
            dropout = generator.choice([0.0, 0.1, 0.3])
            target = generator.choice(["qv", "attention", "mlp", "all-linear"])
        made.append(
            {
                "lora_rank": rank,
                "lora_alpha": ratio * rank,
                "lora_dropout": dropout,
                "target_modules": target,
                "learning_rate": 1e-4 * 30 ** generator.random(),
                "batch_size": BATCH,
                "max_steps": steps,
            }
        )
    return made


def prepare(job: measuring.Job) -> Callable[[], measuring.Result]:
    """Get a worker ready; what it returns is timed."""
    measuring.set_threads(job["threads"])
    if job["kind"] == "make":
        return lambda: make_model(Path(job["model"]))
    every = configurations(job["set"], job["trials"], job["steps"])
    chosen = [every[number] for number in job["numbers"]]
    ready = _naive if job["kind"] == "naive" else _package
    return ready(job, chosen)


def _naive(job: measuring.Job, chosen: list[dict[str, Any]]) -> Callable[[], measuring.Result]:
    import naive

    from optuna_lora_rl.finetuning.model import path_of
    from optuna_lora_rl.finetuning.options import ModelOptions

    # Kept by the function that is returned, as long as trials read from it.
    folder = tempfile.TemporaryDirectory()
    data = naive.read(*measuring.rows(_data(job), Path(folder.name)), Path(folder.name, "cache"))
    setup = naive.Setup(
        model=path_of(ModelOptions(name=job["model"])),
        evaluations=1 if job["model"] == "smollm2" else job["evaluations"],
        seed=0,
        on_gpu=measuring.on_gpu(job["device"]),
        folder=folder.name,
        defaults=job["defaults"],
        bf16=job["bf16"],
    )
    naive.train(chosen[0] | {"max_steps": 1}, setup, data, lambda step, loss: None)

    def trials() -> measuring.Result:
        with folder:
            losses = [naive.train(one, setup, data, lambda step, loss: None) for one in chosen]
        return {"losses": losses, "once_seconds": 0.0, "notes": []}

    return lambda: measuring.timed(trials)


def _package(job: measuring.Job, chosen: list[dict[str, Any]]) -> Callable[[], measuring.Result]:
    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.finetuning.options import ModelOptions
    from optuna_lora_rl.finetuning.options import ObjectiveOptions

    def made() -> FineTuner:
        return FineTuner(
            ModelOptions(name=job["model"]),
            _data(job),
            measuring.training_options(job),
            ObjectiveOptions(reference={"max_steps": job["steps"]}),
        )

    tuner = made()
    if job["without"] == "rows end to end":
        from optuna_lora_rl.finetuning import model_call

        model_call._saves = lambda model, inputs: False
    elif job["without"] == "own products":
        from optuna_lora_rl.finetuning import heads
        from optuna_lora_rl.finetuning import norms
        from optuna_lora_rl.finetuning import products

        products._autocast = lambda x: None
        norms.RootMeanSquare.of = lambda norm: None
        heads.FEW = 0

    def once() -> measuring.Result:
        tuner.prepare()
        tuner.baseline()
        return {}

    once_seconds = measuring.timed(once)["seconds"]
    run = _packed if job["kind"] == "packed" else _one_by_one
    run(tuner, [chosen[0] | {"max_steps": 1}], job["size"])

    def trials() -> measuring.Result:
        if job["without"] == "the shared base":
            results = [run(made(), [one], job["size"]) for one in chosen]
            found = {name: [*chain(*(r[name] for r in results))] for name in results[0]}
        else:
            found = run(tuner, chosen, job["size"])
        return found | {"once_seconds": once_seconds}

    return lambda: measuring.timed(trials)


def _one_by_one(tuner: Any, chosen: list[dict[str, Any]], size: int) -> measuring.Result:
    return {"losses": [tuner.run(one).metrics["loss"] for one in chosen], "notes": []}


def _packed(tuner: Any, chosen: list[dict[str, Any]], size: int) -> measuring.Result:
    from optuna_lora_rl.finetuning.trial import TrialRequest

    waiting = [TrialRequest(number, one) for number, one in enumerate(chosen)]
    waiting.reverse()
    losses: dict[int, float] = {}
    notes: list[str] = []

    def done(run: Any, result: Any) -> None:
        if isinstance(result, Exception):
            raise result
        losses[run.number] = result.metrics["loss"]

    tuner.run_packed(
        lambda: waiting.pop() if waiting else None, done, size=size, says=notes.append
    )
    return {"losses": [losses[number] for number in range(len(chosen))], "notes": notes}


def _data(job: measuring.Job) -> Any:
    from optuna_lora_rl.finetuning.options import DataOptions

    return DataOptions(train=job["data"], max_validation_samples=job["validation"])


def make_model(folder: Path) -> measuring.Result:
    """Write a Llama of 31.5 million random parameters, with the built-in tokenizer."""
    import torch
    from transformers import AutoTokenizer
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    from optuna_lora_rl import tiny

    tokenizer = AutoTokenizer.from_pretrained(str(tiny.MODEL_FOLDER))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            # More than the tokenizer has: a head of a usual share of the work.
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def measure(given: argparse.Namespace, records: measuring.Records) -> dict[str, Any]:
    """Measure what the records lack, and return all measurements: [set][arm][repeat]."""
    chosen = arms(given.model, given.sizes, given.pairs)
    found: dict[str, Any] = {kind: {arm.name: [] for arm in chosen} for kind in given.sets}
    for repeat in range(given.repeats):
        # Forth and back, so that no arm always runs after the same one.
        order = list(product(given.sets, chosen))[:: -1 if repeat % 2 else 1]
        for kind, arm in order:
            key = {**_settings(given), "set": kind, "arm": arm.name, "repeat": repeat}
            result = records.find(key)
            if result is None:
                result = _joined(measuring.launch(FILE, _jobs(given, kind, arm)))
                records.add(key, result)
            found[kind][arm.name].append(result)
            print(f"{repeat} {kind} {arm.name}: {result['seconds']:.1f} s", flush=True)
    return found


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    work = ("model", "device", "data", "trials", "steps", "evaluations", "validation")
    names = (*work, "threads", "naive_threads")
    return {name: getattr(given, name) for name in names} | {"machine": measuring.machine()}


def _jobs(given: argparse.Namespace, kind: str, arm: Arm) -> list[measuring.Job]:
    threads = given.naive_threads
    if arm.kind != "naive":
        threads = measuring.own_threads(given.model, given.threads)
    if arm.processes > 1 and threads is None:
        threads = max(1, measuring.machine()["cores"] // arm.processes)
    shared = {
        **_settings(given),
        "model": str(MADE) if given.model == "30m" else given.model,
        "kind": arm.kind,
        "size": arm.size,
        "defaults": arm.defaults,
        "training": _training(given.model, arm),
        "bf16": arm.bf16,
        "without": arm.without,
        "set": kind,
        "threads": 1 if arm.one_thread else threads,
    }
    numbers = range(given.trials)
    return [shared | {"numbers": list(numbers[i :: arm.processes])} for i in range(arm.processes)]


def _training(model: str, arm: Arm) -> dict[str, Any]:
    """What the package's arm is told beside the work."""
    training: dict[str, Any] = {"first_evaluation": 0.25} if arm.growing else {}
    if model == "smollm2" and arm.without != "small evaluations":
        training["first_evaluation"] = "auto"
    if arm.without == "bfloat16":
        training["precision"] = "fp32"
    return training


def _joined(results: Sequence[measuring.Result]) -> measuring.Result:
    """Join what the processes of one arm did: time of the slowest, memory of all."""
    losses: list[float] = [0.0] * sum(len(result["losses"]) for result in results)
    for i, result in enumerate(results):
        losses[i :: len(results)] = result["losses"]
    joined = {
        name: sum(result[name] for result in results)
        for name in results[0]
        if "peak" in name or name == "cpu_seconds"
    }
    return joined | {
        "seconds": max(result["seconds"] for result in results),
        "once_seconds": max(result["once_seconds"] for result in results),
        "losses": losses,
        "notes": sorted({note for result in results for note in result["notes"]}),
    }


def main(arguments: Sequence[str]) -> None:
    """The command line of this file."""
    given = _options(arguments)
    measuring.stay_offline(given.model)
    if given.model == "30m" and not (MADE / "config.json").exists():
        job = {"kind": "make", "threads": None, "model": str(MADE)}
        print(measuring.launch(FILE, [job])[0], flush=True)
    records = measuring.Records(given.records)
    found = measure(given, records)
    entry = {
        **measuring.circumstances(FILE, arguments, records.revisions),
        "settings": _settings(given),
        "repeats": given.repeats,
        "sets": {kind: summarise(arms) for kind, arms in found.items()},
    }
    on = entry["machine"].get("gpu", "cpu") if given.device != "cpu" else "cpu"
    name = f"{Path(given.model).name} on {on}"
    if given.threads is not None:
        name += f", threads: {given.threads}"
    page = partial(markdown, batch=BATCH)
    print(measuring.publish(given.output / "throughput", name, entry, page))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure trials an hour at equal work.")
    parser.add_argument("--model", default="tiny", help="tiny, 30m, a folder, or a hub name")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"))
    parser.add_argument("--data", help="as data.train of a study; tiny:dates-small by default")
    parser.add_argument("--sets", type=lambda text: text.split(","), help="uniform, mixed or both")
    parser.add_argument("--trials", type=int, help="configurations of a set")
    parser.add_argument("--steps", type=int, help="optimizer steps of a trial")
    parser.add_argument("--validation", type=int, help="most validation examples")
    parser.add_argument("--evaluations", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", default="1,2,4,8,16", type=_numbers, help="of packs")
    parser.add_argument("--pairs", type=_numbers, help="of packs in two processes; '' for none")
    parser.add_argument("--threads", type=int, help="of a process of the package's arms")
    parser.add_argument("--naive-threads", type=int, help="of the naive arm; torch's by default")
    parser.add_argument("--records", type=Path, default=ROOT / "logs" / "throughput.jsonl")
    parser.add_argument("--output", type=Path, default=measuring.RESULTS)
    given = parser.parse_args(arguments)
    usual = {"data": "tiny:dates-small", **DEFAULTS.get(given.model, DEFAULTS["tiny"])}
    for name, value in usual.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.steps % given.evaluations:
        parser.error("--steps has to be a multiple of --evaluations, for equal work")
    return given


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


if __name__ == "__main__":
    measuring.program(main, prepare)
