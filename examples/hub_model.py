"""A model and a data set from the hub (or any local folder and file), by the same call.

    python examples/hub_model.py --model Qwen/Qwen2.5-0.5B --train trl-lib/Capybara --trials 10

Needs a network for hub names, and a GPU for anything but the smallest models. With a local
folder and file it runs offline:

    python examples/hub_model.py --model path/to/model --train data.jsonl --trials 3
"""

from __future__ import annotations

import argparse

from optuna_lora_rl import tune

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B", help="hub name or local folder")
    parser.add_argument("--train", default="trl-lib/Capybara", help="hub name or local file")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a trial")
    parser.add_argument("--output", default="runs/hub_model")
    arguments = parser.parse_args()

    result = tune(
        model=arguments.model,
        train=arguments.train,
        trials=arguments.trials,
        space={
            "lora_rank": {"low": 4, "high": 64, "log": True},
            "lora_alpha": {"ratio": {"low": 0.5, "high": 4, "log": True}, "of": "lora_rank"},
            "learning_rate": {"low": 2e-5, "high": 2e-3, "log": True},
            "target_modules": ["attention", "all-linear"],
            "max_steps": arguments.steps,
        },
        pruner="median",
        output=arguments.output,
    )
    print(f"score {result.best_score:.3f} with {result.best_configuration}")
    print(f"adapter in {result.adapter}")
