"""Uphill to where the expected improvement is largest, many points of many tasks in step.

Notations
    B, K, D   tasks, points that climb, columns
    x         points, shape (B, K, D)

Steps go by iRprop- (Igel & Huesken 2003), which asks only for the gradient's signs: log expected
improvement is steep and flat by turns, and no line search has to wait for the slowest point.
Ordered columns with steps are taken as continuous on the way and rounded at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.surrogate import Surrogate

# The first step, as a share of the lengthscale, and the longest lengthscale that counts.
FIRST_STEP, LONGEST = 0.15, 0.7


def climb(x: Tensor, layout: Layout, surrogate: Surrogate, best: Tensor, steps: int) -> Tensor:
    """Where so many steps uphill from x lead, shape (B, K, D), not yet snapped.

    Args:
        x: where to start.
        layout: the spaces.
        surrogate: the process that judges.
        best: score to improve on, shape (B,).
        steps: uphill.
    """
    first = FIRST_STEP * surrogate.log_l.exp().clamp_max(LONGEST)[:, None]
    step = first.expand_as(x)
    previous = torch.zeros_like(x)
    for _ in range(steps):
        _, gradient = surrogate.slope(layout.model_coordinates(x), best)
        sign = layout.pull_back(x, gradient).sign()
        agreement = sign * previous
        step = step * (1.0 + 0.3 * agreement.clamp_min(0.0) + 0.5 * agreement.clamp_max(0.0))
        previous = sign * (agreement >= 0)
        x = (x + previous * step).clamp(0.0, 1.0)
    return x
