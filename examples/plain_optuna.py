"""RLSampler around an objective of your own that has nothing to do with LoRA.

    python examples/plain_optuna.py

Tunes a support vector machine on scikit-learn's digits; takes some seconds.
"""

from __future__ import annotations

import optuna
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

from optuna_lora_rl import RLSampler

DIGITS, LABELS = load_digits(return_X_y=True)


def objective(trial: optuna.Trial) -> float:
    kernel = trial.suggest_categorical("kernel", ["rbf", "poly"])
    model = SVC(
        C=trial.suggest_float("C", 1e-3, 1e3, log=True),
        gamma=trial.suggest_float("gamma", 1e-6, 1e-1, log=True),
        kernel=kernel,
        degree=trial.suggest_int("degree", 2, 5) if kernel == "poly" else 3,
    )
    return float(cross_val_score(model, DIGITS[:600], LABELS[:600], cv=3).mean())


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=RLSampler(seed=0))
    study.optimize(objective, n_trials=25)
    print(f"accuracy {study.best_value:.3f} with {study.best_params}")
