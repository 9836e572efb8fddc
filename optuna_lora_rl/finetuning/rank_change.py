"""Ranks that change in the course of a run: who decides, and what has become of them."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

from optuna_lora_rl.finetuning.rank_options import RankChangeOptions
from optuna_lora_rl.rank.callback import GradientRankCallback
from optuna_lora_rl.rank.callback import LossRankCallback
from optuna_lora_rl.rank.callback import RankChange
from optuna_lora_rl.rank.deciders import GradientSpectrum
from optuna_lora_rl.rank.deciders import Limit
from optuna_lora_rl.rank.deciders import LossCurve
from optuna_lora_rl.rank.deciders import Steps


def callback(
    kind: str,
    options: RankChangeOptions,
    seed: int,
    costs: Mapping[str, int],
    changed: Callable[[RankChange], None],
) -> LossRankCallback | GradientRankCallback | None:
    """Makes the trainer's callback, or None where ranks stay.

    Args:
        kind: ``none``, ``loss`` or ``gradient``.
        options: Its thresholds.
        seed: Of the rows that a growing layer gets.
        costs: What one rank of each layer costs, in parameters.
        changed: Called with each change when it has happened.
    """
    # What is not said here is a threshold, and bears the decider's own name for it.
    steps = Steps(**options.model_dump(exclude={"loss", "gradient", "mean_rank"}))
    limit = None
    if options.mean_rank is not None:
        limit = Limit(options.mean_rank * sum(costs.values()), costs)
    if kind == "loss":
        loss = options.loss
        thresholds = loss.model_dump(exclude={"source", "every"})
        curve = LossCurve(**thresholds, steps=steps, limit=limit)
        return LossRankCallback(curve, source=loss.source, seed=seed, changed=changed)
    if kind == "gradient":
        gradient = options.gradient
        thresholds = gradient.model_dump(exclude={"every", "columns"})
        spectrum = GradientSpectrum(**thresholds, steps=steps, limit=limit)
        return GradientRankCallback(
            spectrum,
            every=gradient.every,
            columns=gradient.columns,
            seed=seed,
            changed=changed,
        )
    return None


def spells(
    ranks: Mapping[str, int], changes: Sequence[RankChange], steps: int
) -> list[tuple[int, dict[str, int]]]:
    """Returns for how many steps which ranks were in place, in order.

    Args:
        ranks: Ranks at the start.
        changes: What changed, in order.
        steps: Steps of the run.
    """
    found: list[tuple[int, dict[str, int]]] = []
    now, since = dict(ranks), 0
    for change in changes:
        if change.step > since:
            found.append((change.step - since, dict(now)))
            since = change.step
        now[change.layer] = change.after
    return [*found, (steps - since, now)]
