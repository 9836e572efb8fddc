"""How the best settings of a LoRA run move with the model, the data and the run.

All coefficients stand here. The learning rate is that of alpha = 2 rank, in decades:

    log10 lr = RATE + BY_WIDTH log10(h / 128) + BY_ROWS max(0, log10(rows / 1000)) + method

h is the hidden size, rows are examples seen in a run (steps times batch size). By hand to

- the package's tables (hidden 64, 128 and 192; 8 to 64 steps; ``docs/tables.md``): 1.1e-2, 9e-3
  and 9e-3, deviation .19 decades over 26 tasks, where this says 1.3e-2, 9e-3 and 8e-3;
- SmolLM2 (hidden 576; 8, 24 and 96 steps of 8 rows): 5e-3 alike, where this says 5e-3;
- sweeps of 28 large models (780 steps of 128 rows): LoRA's rate about 5e-4 at a width of 2,000,
  3e-4 at 4,000, 1.7e-4 at 8,000, where this says 5e-4, 4e-4 and 3e-4. Short runs take higher ones
  (about 15 in place of 10 times full fine-tuning's after some 100 steps; Schulman et al. 2025,
  "LoRA without regret").

The tables with scale in them (``studies/results/scale.md``), measured since, put less on the width
(-.10 a decade) and speak of steps, whatever the batch (-.51); they are not taken in yet.

Methods: common defaults are 2e-4 for SFT, 5e-6 for DPO and KTO, 1e-6 to 1e-5 for GRPO.
With few examples guides advise less rank and more dropout, from about a thousand down; what that
is worth was not measured here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from typing import NamedTuple

from optuna_lora_rl.policy.context import TuningContext
from optuna_lora_rl.policy.context import in_words

if TYPE_CHECKING:
    from optuna_lora_rl.policy.dimensions import Space

RATE, BY_WIDTH, BY_ROWS = math.log10(9.3e-3), -0.45, -0.35
# Deviation of the best rate where width and rows are known, and what not knowing the method's
# scale, or guessing the width from the parameters, adds.
SPREAD, METHOD_SPREAD, GUESSED = 0.22, 0.35, 0.1
METHODS = {"sft": 0.0, "dpo": -1.6, "kto": -1.6, "grpo": -1.6}
# log10 of the rows of a run where nobody says: a mean for a width of 128, by decade of width, and
# a deviation.
ROWS, ROWS_BY_WIDTH, ROWS_SPREAD = 3.0, 0.9, 0.7
# Passes over the data of a run whose steps are not known.
_PASSES = 2.0
# Examples that are few enough to change what is usual, and so few that nothing changes any more.
_FEW, _FEWEST = 1000.0, 50.0
# Octaves of rank and dropout that the fewest examples change.
_LESS_RANK, _MORE_DROPOUT = 2.0, 0.1
# Share of the surfaces that overfit: where nothing is known of the data, with the fewest examples
# and with many.
OVERFITTING, OVERFITTING_FEW, OVERFITTING_MANY = 0.22, 0.6, 0.08


class Normal(NamedTuple):
    """A belief: its mean and its deviation."""

    mean: float
    deviation: float


def method_shift(context: TuningContext | None) -> Normal:
    """Decades by which the method's learning rates lie above those of SFT."""
    method = context.method if context else None
    shift = METHODS[method or "sft"]
    return Normal(shift, METHOD_SPREAD if shift else 0.0)


def expected_rate(context: TuningContext | None, log10_rows: float | None) -> Normal | None:
    """log10 of the best learning rate at alpha = 2 rank; ``None`` where no model is known.

    Args:
        context: what is known.
        log10_rows: of the examples that a run sees; ``None`` where nobody says.
    """
    if context is None or context.width is None:
        return None
    wider = math.log10(context.width / 128.0)
    rows = ROWS + ROWS_BY_WIDTH * wider if log10_rows is None else log10_rows
    shift = method_shift(context)
    mean = RATE + BY_WIDTH * wider + BY_ROWS * max(0.0, rows - 3.0) + shift.mean
    parts = [SPREAD, shift.deviation, GUESSED * (context.hidden_size is None)]
    parts.append(BY_ROWS * ROWS_SPREAD * (log10_rows is None))
    return Normal(mean, math.hypot(*parts))


def log10_rows(
    context: TuningContext | None, space: Space, point: dict[str, float]
) -> float | None:
    """log10 of the examples that a run sees; ``None`` where nobody says.

    Args:
        context: what is known.
        space: what is tuned.
        point: log2 of the steps and of the batch size that are meant, where they are tuned.
    """
    if context is None:
        return None
    column = space.role_columns.get("steps")
    passes = column is not None and "epoch" in space.names[column].lower()
    examples = None if context.examples is None else math.log10(context.examples)
    if passes:
        return None if examples is None else examples + math.log10(2.0) * point["steps"]
    steps = _log10(context.steps) if column is None else math.log10(2.0) * point["steps"]
    batch = point.get("batch_size")
    batch = _log10(context.batch_size) if batch is None else math.log10(2.0) * batch
    if steps is not None and batch is not None:
        return steps + batch
    return None if examples is None else examples + math.log10(_PASSES)


def _log10(count: int | None) -> float | None:
    return None if count is None else math.log10(count)


def smallness(context: TuningContext | None) -> float:
    """How few examples there are: 0 from a thousand up or where nobody says, 1 for the fewest."""
    if context is None or context.examples is None:
        return 0.0
    share = math.log(_FEW / context.examples) / math.log(_FEW / _FEWEST)
    return min(max(share, 0.0), 1.0)


def less_rank(context: TuningContext | None) -> float:
    """Octaves by which the usual rank is less."""
    return _LESS_RANK * smallness(context)


def more_dropout(context: TuningContext | None) -> float:
    """By how much the usual dropout is more."""
    return _MORE_DROPOUT * smallness(context)


def overfitting(context: TuningContext | None) -> float:
    """Share of LoRA studies in which a larger adapter overfits."""
    if context is None or context.examples is None:
        return OVERFITTING
    few = smallness(context)
    return OVERFITTING_MANY + (OVERFITTING_FEW - OVERFITTING_MANY) * few


def reasons(context: TuningContext, rate: Normal | None, rows: float | None) -> list[str]:
    """What follows from the context, in sentences.

    Args:
        context: what is known.
        rate: the expected learning rate.
        rows: log10 of the examples that a run sees.
    """
    said = []
    if rate is not None:
        size = f"hidden size {context.hidden_size}"
        if context.hidden_size is None:
            size = f"{in_words(float(context.parameters or 0))} parameters"
        steps = "" if context.steps is None else f" and {context.steps} steps"
        if context.steps is None and rows is not None:
            steps = f" and runs over {in_words(10.0**rows)} examples"
        low, high = (10.0 ** (rate.mean + sign * rate.deviation) for sign in (-1.0, 1.0))
        about = f"{in_words(10.0**rate.mean)} ({in_words(low)} to {in_words(high)})"
        said.append(f"{size}{steps}: learning rate about {about} at alpha = 2 rank")
    shift = method_shift(context).mean
    if shift and context.method:
        said.append(
            f"{context.method}: learning rates {in_words(10.0**-shift)} times lower than for sft"
        )
    if few := smallness(context):
        rank = in_words(2.0 ** (4.0 - _LESS_RANK * few))
        dropout = in_words(_MORE_DROPOUT * few)
        said.append(f"{context.examples} examples: rank about {rank}, dropout about {dropout}")
    return said
