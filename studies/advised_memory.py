"""What training holds by the advisor's count, beside what a process really takes.

    python studies/advised_memory.py

Each case is a process of its own that loads the model, remembers its resident memory, trains three
steps on the CPU with TRL as a study does, and reads its peak. Loading and the base weights are
taken off on both sides. The advisor's factors were chosen by these cases.
"""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measuring
import psutil
import throughput

RESULT = measuring.FOLDER / "results" / "advised_memory.md"
RANK = 16
# Model, sequences, their length, share that is learnt, gradient checkpointing, arithmetic.
CASES = [
    ("tiny", 8, 512, 1.0, False, "fp32"),
    ("tiny", 8, 512, 0.1, False, "fp32"),
    ("tiny", 8, 128, 1.0, False, "fp32"),
    ("tiny", 8, 512, 1.0, True, "fp32"),
    ("30m", 8, 128, 1.0, False, "fp32"),
    ("30m", 8, 256, 1.0, True, "fp32"),
    ("smollm2", 8, 128, 1.0, False, "bf16"),
    ("smollm2", 2, 512, 1.0, False, "bf16"),
    ("smollm2", 8, 512, 1.0, False, "bf16"),
    ("smollm2", 8, 512, 0.1, False, "bf16"),
    ("smollm2", 8, 512, 1.0, True, "bf16"),
    ("smollm2", 8, 512, 0.1, True, "bf16"),
    ("smollm2", 8, 256, 1.0, False, "fp32"),
    ("smollm2", 8, 256, 0.1, False, "fp32"),
    ("smollm2", 8, 256, 0.1, True, "fp32"),
]


def take(
    name: str, batch: int, length: int, share: float, checkpointing: bool, precision: Any
) -> dict[str, float]:
    """Return the measured and the advised bytes beyond the loaded model."""
    from optuna_lora_rl.commands.layers import load
    from optuna_lora_rl.finetuning import advisor
    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.finetuning.options import ModelOptions
    from optuna_lora_rl.finetuning.options import ObjectiveOptions
    from optuna_lora_rl.finetuning.options import TrainingOptions
    from optuna_lora_rl.rank import layers

    path = str(throughput.MADE) if name == "30m" else name
    with tempfile.TemporaryDirectory() as folder:
        tuner = FineTuner(
            ModelOptions(name=path),
            _data(Path(folder), batch, length, share),
            TrainingOptions(
                use_cpu=True,
                evaluations=1,
                gradient_checkpointing=checkpointing,
                precision=precision,
            ),
            ObjectiveOptions(),
        )
        tuner.prepare()
        tuner.baseline()
        found = _counts(tuner)
        gc.collect()
        before = psutil.Process().memory_info().rss
        # The peak from here on, without that of loading and checking.
        Path("/proc/self/clear_refs").write_text("5")
        tuner.run({"lora_rank": RANK, "max_steps": 3, "batch_size": batch})
        peak = _peak()
    model: Any = load(path)
    workload = advisor.Workload(
        batch_size=batch,
        length=round(found["length"]),
        learnt=found["learnt"],
        checkpointing=checkpointing,
        precision=precision,
    )
    counted = advisor.memory_of(model, dict.fromkeys(layers.shapes_of(model), RANK), workload)
    return {"measured": peak - before, "advised": counted.total - counted.base, **found}


def _peak() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _counts(tuner: Any) -> dict[str, float]:
    train = tuner.workspace.prepared.tokens.train
    tokens = sum(map(len, train["input_ids"]))
    learnt = sum(label != -100 for row in train["labels"] for label in row)
    return {"length": tokens / len(train), "learnt": learnt / tokens}


def _data(folder: Path, batch: int, length: int, share: float) -> Any:
    from optuna_lora_rl.finetuning.options import DataOptions

    drawn = random.Random(0)

    def words(count: int) -> str:
        return " ".join(str(drawn.randrange(10**6)) for _ in range(count))

    def row() -> dict[str, str]:
        if share == 1:
            return {"text": words(length)}
        # A number has some eight tokens; the completion is cut where the row is full.
        return {
            "prompt": words(round(length * (1 - share) / 8)),
            "completion": f" {words(length)}",
        }

    train, validation = folder / "train.jsonl", folder / "validation.jsonl"
    train.write_text("".join(json.dumps(row()) + "\n" for _ in range(2 * batch)))
    short = {"text": "1 2 3"} if share == 1 else {"prompt": "1 2", "completion": " 3"}
    validation.write_text((json.dumps(short) + "\n") * 8)
    return DataOptions(train=str(train), validation=str(validation), max_length=length)


def main() -> None:
    """Measure every case and write the page."""
    if not (throughput.MADE / "config.json").exists():
        throughput.make_model(throughput.MADE)
    rows = ""
    for case in CASES:
        asked = [sys.executable, __file__, json.dumps(case)]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        found = json.loads(said.splitlines()[-1])
        name, batch, _, _, checkpointing, precision = case
        measured, advised = (found[key] / 1e6 for key in ("measured", "advised"))
        words = (
            f"| {name} | {batch} x {found['length']:.0f} | {found['learnt']:.0%} | "
            f"{'yes' if checkpointing else 'no'} | {precision} | "
        )
        rows += f"{words}{advised:.0f} | {measured:.0f} | {advised / measured:.2f} |\n"
        print(words, advised, measured, flush=True)
    heads = (
        "| model | tokens | learnt | checkpointing | arithmetic | advised, MB | measured, MB | "
        "advised / measured |"
    )
    versions = ", ".join(f"{k} {v}" for k, v in measuring.versions().items())
    page = (
        f"# Memory, advised and measured\n\n{(__doc__ or '').strip()}\n\nRank {RANK} on all "
        f"linear layers, one CPU process a case; {versions}.\n\n{heads}\n"
        f"|---|---|---|---|---|---|---|---|\n{rows}"
    )
    RESULT.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(take(*json.loads(sys.argv[1]))))
    else:
        main()
