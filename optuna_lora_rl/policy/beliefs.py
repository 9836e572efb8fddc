"""What the network sees of response surfaces, of what is known of the run, and of known costs.

Notations
    N, P      candidates; surfaces with a span, drawn by their weights
    levels    by how much each surface expects a candidate to beat the incumbent, in its spans,
              shape (N, P)

These features stand behind those of :mod:`~optuna_lora_rl.policy.features`, for networks that were
trained with a bank of surfaces. Where no bank is asked they read 0, and one of them says so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_lora_rl.policy.prior import GUIDE_LR
from optuna_lora_rl.policy.roles import ROLES
from optuna_lora_rl.policy.scaling import method_shift
from optuna_lora_rl.policy.scaling import smallness

if TYPE_CHECKING:
    from optuna_lora_rl.policy.bank import Posterior
    from optuna_lora_rl.policy.features import View
    from optuna_lora_rl.policy.layout import Layout

CANDIDATE_BELIEFS = (
    "surfaces_log_ei",
    "surfaces_mean",
    "surfaces_deviation",
    "surfaces_best",
    "surfaces_far",
    "charged",
)
STUDY_BELIEFS = (
    "surfaces",
    "surfaces_share",
    "surfaces_effective",
    "peak",
    "peak_deviation",
    "free",
    "cost_known",
    "model_known",
    "expected_place",
    "expected_deviation",
    "expected_from_guides",
    "best_from_expected",
    "log_width",
    "rows_known",
    "log_rows",
    "examples_known",
    "log_examples",
    "smallness",
    "method_shift",
)
# Spans below the incumbent that are far.
_FAR = 1.0
_RATE = ROLES.index("learning_rate")


def candidate_beliefs(
    view: View, valid: np.ndarray, surfaces: Posterior | None, charged: np.ndarray | None
) -> np.ndarray:
    """Of candidates, shape (N, len(CANDIDATE_BELIEFS)), in single precision.

    Args:
        view: of the candidates.
        valid: which may be proposed, shape (N,).
        surfaces: what the trials leave of the bank; ``None`` where it is not asked.
        charged: what is known to be taken from their scores beyond what the incumbent pays, in
            units of the standardised score, shape (N,).
    """
    table = np.zeros((len(valid), len(CANDIDATE_BELIEFS)), dtype=np.float32)
    if charged is not None:
        table[:, 5] = charged
    if surfaces is not None:
        gain, levels = view.surfaces_gain, view.levels
        table[:, 0] = np.maximum(gain - gain[valid].max(), -10.0) / 3.0
        table[:, 1] = levels.mean(1)
        table[:, 2] = levels.std(1)
        best = np.where(valid[:, None], levels, -np.inf).argmax(0)
        table[:, 3] = np.sqrt(np.bincount(best, minlength=len(valid)) / levels.shape[1])
        table[:, 4] = (levels < -_FAR).mean(1)
    return np.clip(table, -8.0, 8.0, out=table)


def study_beliefs(
    layout: Layout, surfaces: Posterior | None, best_rate: float | None
) -> np.ndarray:
    """Of the study, shape (len(STUDY_BELIEFS),), in single precision.

    Args:
        layout: of the space, with what is known of the run.
        surfaces: what the trials leave of the bank; ``None`` where it is not asked.
        best_rate: log10 of the incumbent's learning rate, if there is one.
    """
    context, expected = layout.context, layout.expected
    tuned = layout.column[_RATE] >= 0
    low, high = (float(layout.natural[_RATE, at]) for at in (0, -1)) if tuned else (GUIDE_LR,) * 2
    centre, width = 0.5 * (low + high), max(high - low, 1e-3)
    row = [float(surfaces is not None)]
    if surfaces is None:
        row += [0.0] * 5
    else:
        peak = surfaces.peak
        row += [surfaces.share, surfaces.effective, peak.mean - centre if tuned else 0.0]
        row += [peak.deviation, surfaces.free]
    row += [float(layout.charged), float(expected is not None)]
    if expected is None:
        row += [0.0] * 4
    else:
        row += [(expected.mean - low) / width - 0.5 if tuned else 0.0, expected.deviation]
        row += [expected.mean - GUIDE_LR]
        row += [0.0 if best_rate is None else best_rate - expected.mean]
    wide = context.width if context else None
    examples = context.examples if context else None
    row += [math.log10(wide / 1000.0) if wide else 0.0]
    row += [float(layout.rows is not None), (layout.rows or 4.0) - 4.0]
    row += [float(examples is not None), math.log10((examples or 1000) / 1000.0)]
    row += [smallness(context), method_shift(context).mean]
    return np.clip(row, -8.0, 8.0).astype(np.float32)
