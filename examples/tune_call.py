"""One Python call from data to the best adapter.

    python examples/tune_call.py

Five short trials on the built-in model and a built-in task; takes about half a minute.
"""

from __future__ import annotations

from optuna_lora_rl import tune

if __name__ == "__main__":
    result = tune(
        model="tiny",
        train="tiny:dates-small",
        trials=5,
        space={
            "lora_rank": [4, 8, 16],
            "lora_alpha": "2 * lora_rank",
            "learning_rate": {"low": 1e-3, "high": 3e-2, "log": True},
            "max_steps": 24,
        },
        output="runs/tune_call",
    )
    print(f"score {result.best_score:.3f} with {result.best_configuration}")
    print(f"adapter in {result.adapter}")
