"""The shapes of the measured tables' surfaces, which half of the sampler's bank is drawn from.

    python studies/bank_shapes.py

Fits the form of ``optuna_lora_rl/policy/lora_surfaces.py`` to the final quality of each table of
the training split, by robust least squares from a few starts, and prints for each how well it
fits (R2), then mean and deviation of every parameter over the tables. ``_like_tables`` holds
these, rounded, and wider where few tables tell. A failed run, and one that is worse than the
untuned model by more than half, counts as half worse.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import least_squares

from optuna_lora_rl.learning import tables
from optuna_lora_rl.policy.lora_surfaces import Shapes
from optuna_lora_rl.policy.prior import coverage

# Smallest and largest value of each parameter; the tables' quality has no cost in it.
BOUNDS = {
    "peak": (-3.5, -0.5),
    "by_ratio": (0.0, 1.2),
    "by_rank": (-0.3, 1.2),
    "by_size": (-0.5, 1.2),
    "by_steps": (-0.3, 1.2),
    "by_batch": (-0.6, 0.6),
    "below": (0.2, 2.5),
    "above": (0.2, 2.5),
    "flat": (0.0, 1.0),
    "cliff": (0.3, 3.0),
    "gain": (0.0, 1.5),
    "half": (-2.0, 7.0),
    "scale": (0.6, 8.0),
    "steps": (0.0, 0.4),
    "batch": (-0.1, 0.1),
    "overfit": (0.0, 0.3),
    "onset": (-2.0, 8.0),
    "dropout": (-0.3, 0.5),
}
FIXED = {"cost": 0.0, "compute": 0.0}
# Quality at the peak, and what takes a surface's units to quality.
SCALE = {"offset": (-3.0, 3.0), "span": (0.02, 3.0)}
WORST, STARTS = -0.5, 3


def natural(table: tables.Table) -> dict[str, np.ndarray]:
    """What surfaces ask of a table's configurations."""
    p = table.parameters
    covers = np.vectorize(coverage, otypes=[float])
    share = np.log2(covers(p["target_modules"]))
    share += np.log2(np.where(p["layers"] == "all", 1.0, covers(p["layers"])))
    return {
        "learning_rate": np.log10(p["learning_rate"]),
        "ratio": np.log2(p["alpha_ratio"]),
        "rank": np.log2(p["lora_rank"]),
        "share": share,
        "dropout": p["lora_dropout"],
        "batch_size": np.log2(p["batch_size"]),
        "steps": np.log2(p["max_steps"]),
    }


def fitted(table: tables.Table) -> tuple[np.ndarray, float]:
    """Parameters in the order of the bounds, and R2."""
    v, quality = natural(table), table.quality[:, -1]
    quality = np.where(np.isfinite(quality), np.maximum(quality, WORST), WORST)
    low, high = np.array([*BOUNDS.values(), *SCALE.values()]).T

    def residuals(x: np.ndarray) -> np.ndarray:
        own = dict(zip(BOUNDS, x[:-2], strict=True)) | FIXED
        shape = Shapes(**{name: np.array([value]) for name, value in own.items()})
        return np.asarray(x[-2] + x[-1] * shape(v)[0] - quality)

    rng, best = np.random.default_rng(0), None
    for start in range(STARTS):
        at = low + (high - low) * (0.5 if start == 0 else rng.uniform(0.2, 0.8, len(low)))
        at[-2:], at[0] = (0.6, 0.4), -2.0
        options: dict[str, Any] = {"loss": "soft_l1", "f_scale": 0.05, "max_nfev": 150}
        found = least_squares(residuals, at, bounds=(low, high), diff_step=1e-4, **options)
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    apart = np.square(residuals(best.x)).sum() / np.square(quality - quality.mean()).sum()
    return best.x, float(1.0 - apart)


def main() -> None:
    """Fit every table and print what was found."""
    found = []
    for table in tables.load("train"):
        x, r2 = fitted(table)
        found.append(x)
        print(f"{table.task.name:28} R2 {r2:.2f}  peak {x[0]:.2f}", flush=True)
    columns = np.array(found).T
    for name, column in zip([*BOUNDS, *SCALE], columns, strict=True):
        median, mean = np.median(column), column.mean()
        print(f"{name:10} mean {mean:6.2f}  deviation {column.std():5.2f}  median {median:6.2f}")


if __name__ == "__main__":
    main()
