"""What training holds by the advisor's count, beside what a process really takes.

    python studies/advised_memory.py

Each case is a process of its own that loads the model, remembers its resident memory, trains two
steps on the CPU with TRL as a study does, and reads its peak. Loading and the base weights are
taken off on both sides. The advisor's two factors were chosen by the first two cases.
"""

from __future__ import annotations

import gc
import json
import random
import resource
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
# Model, sequences, their length, gradient checkpointing.
CASES = [
    ("tiny", 8, 512, False),
    ("30m", 8, 128, False),
    ("30m", 2, 512, False),
    ("30m", 8, 256, True),
]


def take(name: str, batch: int, length: int, checkpointing: bool) -> dict[str, float]:
    """Return the measured and the advised bytes beyond the loaded model."""
    from optuna_lora_rl.commands.layers import load
    from optuna_lora_rl.finetuning.options import ModelOptions
    from optuna_lora_rl.finetuning.options import ObjectiveOptions
    from optuna_lora_rl.finetuning.options import TrainingOptions
    from optuna_lora_rl.finetuning.trial import FineTuner
    from optuna_lora_rl.rank import advisor
    from optuna_lora_rl.rank import layers

    path = str(throughput.MADE) if name == "30m" else name
    with tempfile.TemporaryDirectory() as folder:
        tuner = FineTuner(
            ModelOptions(name=path),
            _data(Path(folder), batch, length),
            TrainingOptions(use_cpu=True, evaluations=1, gradient_checkpointing=checkpointing),
            ObjectiveOptions(),
        )
        tuner.prepare()
        tuner.baseline()
        gc.collect()
        before = psutil.Process().memory_info().rss
        tuner.run({"lora_rank": RANK, "max_steps": 2, "batch_size": batch})
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model: Any = load(path)
    workload = advisor.Workload(batch_size=batch, length=length, checkpointing=checkpointing)
    counted = advisor.memory_of(model, dict.fromkeys(layers.shapes_of(model), RANK), workload)
    return {"measured": peak - before, "advised": counted.total - counted.base}


def _data(folder: Path, batch: int, length: int) -> Any:
    from optuna_lora_rl.finetuning.options import DataOptions

    drawn = random.Random(0)
    train, validation = folder / "train.jsonl", folder / "validation.jsonl"
    texts = [" ".join(str(drawn.randrange(10**6)) for _ in range(length)) for _ in range(batch)]
    train.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    validation.write_text('{"text": "1 2 3"}\n')
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
        name, batch, length, checkpointing = case
        measured, advised = (found[key] / 1e6 for key in ("measured", "advised"))
        words = f"| {name} | {batch} x {length} | {'yes' if checkpointing else 'no'} | "
        rows += f"{words}{advised:.0f} | {measured:.0f} | {advised / measured:.2f} |\n"
        print(words, advised, measured, flush=True)
    heads = "| model | tokens | checkpointing | advised, MB | measured, MB | advised / measured |"
    versions = ", ".join(f"{k} {v}" for k, v in measuring.versions().items())
    page = (
        f"# Memory, advised and measured\n\n{(__doc__ or '').strip()}\n\nRank {RANK} on all "
        f"linear layers, float32, one CPU process a case; {versions}.\n\n{heads}\n"
        f"|---|---|---|---|---|---|\n{rows}"
    )
    RESULT.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(take(*json.loads(sys.argv[1]))))
    else:
        main()
