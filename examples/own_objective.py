"""LoraSpace in an objective of your own: you train with PEFT as you like, Optuna asks the space.

    python examples/own_objective.py

Fine-tunes the built-in model with a plain PyTorch loop; takes about half a minute.
"""

from __future__ import annotations

import optuna
import torch
from peft import LoraConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from optuna_lora_rl import LoraSpace
from optuna_lora_rl import RLSampler
from optuna_lora_rl import tiny

SPACE = LoraSpace(
    {
        "lora_rank": {"low": 2, "high": 32, "log": True},
        "lora_alpha": {"ratio": {"low": 0.5, "high": 4, "log": True}, "of": "lora_rank"},
        "learning_rate": {"low": 1e-4, "high": 3e-2, "log": True},
        "target_modules": ["my-attention", "my-everything"],
    },
    target_sets={
        "my-attention": ["q_proj", "v_proj"],
        "my-everything": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    },
)
disable_progress_bar()
TOKENIZER = AutoTokenizer.from_pretrained(str(tiny.MODEL_FOLDER))


def batch(split: str, count: int) -> dict[str, torch.Tensor]:
    examples = tiny.load("dates-ample", split)[:count]
    texts = [example["prompt"] + example["completion"] for example in examples]
    encoded = TOKENIZER(texts, padding=True, return_tensors="pt")
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    return {**encoded, "labels": labels}


TRAIN, VALIDATION = batch("train", 64), batch("validation", 64)


def objective(trial: optuna.Trial) -> float:
    chosen = SPACE.suggest(trial)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(str(tiny.MODEL_FOLDER), dtype=torch.float32)
    model = get_peft_model(
        base,
        LoraConfig(
            r=chosen["lora_rank"],
            lora_alpha=chosen["lora_alpha"],
            target_modules=list(SPACE.target_sets[chosen["target_modules"]]),
        ),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen["learning_rate"])
    for _ in range(12):
        loss = model(**TRAIN).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return float(model(**VALIDATION).loss)


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=RLSampler(seed=0))
    study.optimize(objective, n_trials=10)
    print(f"validation loss {study.best_value:.3f} with {SPACE.resolve(study.best_params)}")
