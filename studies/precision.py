"""From which width on a processor trains faster in bfloat16.

    python studies/precision.py

Llamas of four layers and random weights, of several widths, with LoRA of rank 16 on all linear
modules: a step of 8 rows of 48 tokens, forward, backward and update, in float32 and under
bfloat16 autocast with float32 weights, one after the other, twenty times. The ratio is that of
the two medians; what ``precision: auto`` takes is decided by it
(``optuna_lora_rl/finetuning/device.py``).
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext

import measuring
import torch
from peft import LoraConfig
from peft import get_peft_model
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

WIDTHS = (64, 96, 128, 192, 256, 384, 576, 768)
REPEATS = 20


def ratio(width: int) -> tuple[float, float]:
    """Return the median seconds of a step in float32 and in bfloat16."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=4,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
        )
    )
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ids = torch.randint(0, 2048, (8, 48))

    def step(precision: str) -> float:
        began = time.perf_counter()
        half = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
        with half:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    taken: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for repeat in range(REPEATS + 2):
        for precision, seconds in taken.items():
            took = step(precision)
            if repeat >= 2:
                seconds.append(took)
    return statistics.median(taken["fp32"]), statistics.median(taken["bf16"])


def main() -> None:
    """Measure every width and write the page."""
    rows = ""
    for width in WIDTHS:
        full, half = ratio(width)
        rows += f"| {width} | {full * 1e3:.0f} | {half * 1e3:.0f} | {full / half:.2f} |\n"
        print(f"{width} wide: {full / half:.2f} times", flush=True)
    known = [name for name, has in torch.cpu.get_capabilities().items() if has is True]
    has = [name for name in known if "bf16" in name] or ["no bfloat16"]
    page = (
        f"# A step in float32 and in bfloat16\n\n{(__doc__ or '').strip()}\n\n"
        f"{torch.get_num_threads()} threads, {', '.join(has)}; "
        f"{', '.join(f'{k} {v}' for k, v in measuring.versions().items())}.\n\n"
        f"| width | float32, ms | bfloat16, ms | times as fast |\n|---|---|---|---|\n{rows}"
    )
    (measuring.FOLDER / "results" / "precision.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
