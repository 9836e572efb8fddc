"""What an evaluation finds, and how much of the validation set each of a run reads: ever more.

An early evaluation only tells the hopeless from the hopeful, and need not read everything. All
runs read the same examples at the evaluation of the same number, each evaluation those of the one
before and more, the last one everything, and quality compares with the untuned model on the same
examples. A run of fewer steps than evaluations has not all of the numbers, but the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from typing import TYPE_CHECKING
from typing import Literal

import numpy as np

from optuna_lora_rl.finetuning.questions import Questions

if TYPE_CHECKING:
    from datasets import Dataset

_SEED = 0
# Share of all evaluations in the work of a trial.
_SHARE = 0.15
# A step is a pass forward and one back, in which the frozen weights get no gradient.
_PASSES = 2
# Fewer examples tell nothing apart, at the end and on the way.
_LEAST, _LEAST_EARLY = 32, 8


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: Mean cross-entropy over all learnt tokens, in nats, of the model alone: no auxiliary
            loss, no smoothing, no other training loss is in it.
        token_accuracy: Share of them that are the most likely token given the ones before.
        exact_match: Share of generated answers equal to the expected ones but for outer spaces.
        accuracy: The same, regardless of case, inner spacing and anything after the first line.
        f1: F1 of the answers taken as labels, macro-averaged over the expected ones.
        quality: Gain over the untuned model in the study's metric; 0 for the untuned model.
    """

    loss: float
    token_accuracy: float
    exact_match: float | None = None
    accuracy: float | None = None
    f1: float | None = None
    quality: float = 0.0

    def metrics(self) -> dict[str, float]:
        """Returns what was measured, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def quality(metric: str, values: Mapping[str, float], baseline: Evaluation) -> float:
    """Returns the gain over the untuned model.

    For ``loss`` it is the share of the untuned model's loss that is gone, for the other metrics
    the difference; so more is better, and 0 is no gain.
    """
    before = getattr(baseline, metric)
    if metric == "loss":
        return float((before - values["loss"]) / before) if before > 0 else 0.0
    return float(values[metric] - before)


def teacher_forced(metrics: Mapping[str, float]) -> dict[str, float]:
    """Picks TRL's evaluation metrics, under the names used here."""
    return {
        "loss": float(metrics["eval_loss"]),
        "token_accuracy": float(metrics["eval_mean_token_accuracy"]),
    }


def is_finite(values: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in values.values())


@dataclass(frozen=True)
class Stage:
    """What one evaluation of a run reads, and what the untuned model makes of it.

    Attributes:
        dataset: Tokenised examples.
        asked: Questions, where the metric compares answers.
        baseline: The untuned model's evaluation.
    """

    dataset: Dataset
    asked: Questions | None
    baseline: Evaluation


class Stages:
    """The stages of a study's runs, each measured once.

    Args:
        whole: All there is; the last stage of every run.
        rows: How many of its examples the evaluation of each number reads, the last one all.
        measure: Evaluates the untuned model.
    """

    def __init__(
        self,
        whole: Stage,
        rows: Sequence[int],
        measure: Callable[[Dataset, Questions | None], Evaluation],
    ) -> None:
        self._whole = whole
        self._rows = rows
        self._measure = measure
        self._known = {len(whole.dataset): whole}

    def of(self, evaluated: Mapping[int, int]) -> dict[int, Stage]:
        """Returns the stage of each step after which a run is evaluated.

        Args:
            evaluated: The number of each step's evaluation, from 1.
        """
        return {step: self._stage(self._rows[number - 1]) for step, number in evaluated.items()}

    def _stage(self, rows: int) -> Stage:
        if rows not in self._known:
            dataset, asked = self._whole.dataset, self._whole.asked
            chosen = drawn(dataset, rows)
            if asked is not None:
                share = rows / len(dataset) * len(asked.prompts)
                numbers = _drawn(len(asked.prompts), max(1, round(share)))
                asked = replace(
                    asked,
                    prompts=tuple(asked.prompts[i] for i in numbers),
                    answers=tuple(asked.answers[i] for i in numbers),
                )
            self._known[rows] = Stage(chosen, asked, self._measure(chosen, asked))
        return self._known[rows]


@dataclass(frozen=True)
class Work:
    """What a typical trial computes, in tokens.

    Attributes:
        trained: Tokens of all its steps.
        example: Tokens of a validation example.
    """

    trained: float
    example: float

    def share(self, rows: Sequence[int]) -> float:
        """The share of evaluations of so many examples in all of a trial's work."""
        read = sum(rows) * self.example
        return read / (read + _PASSES * self.trained)


def rows_read(
    evaluations: int,
    available: int,
    work: Work,
    *,
    first: float | Literal["auto"],
    reads_all: bool,
) -> list[int]:
    """Decides how many examples each evaluation of a run reads.

    Args:
        evaluations: How many evaluations there are.
        available: How many examples there are.
        work: What a typical trial computes.
        first: Share of the last one's that the first reads, or ``auto`` for what work allows.
        reads_all: Whether the last one reads all; otherwise what work allows.
    """
    allowed = _SHARE / (1 - _SHARE) * _PASSES * work.trained / work.example
    # Two thirds of it for the last, by which trials are compared in the end.
    last = available if reads_all else min(available, max(_LEAST, round(allowed * 2 / 3)))
    if first != "auto":
        return [max(1, round(share * last)) for share in _even(first, evaluations)]
    rest, early = max(0.0, allowed - last), evaluations - 1
    # More from one to the next, and the rest in all.
    parts = [2 * rest * k / (early * (early + 1)) for k in range(1, evaluations)]
    return [*(min(last, max(_LEAST_EARLY, round(part))) for part in parts), last]


def _even(first: float, evaluations: int) -> list[float]:
    return np.linspace(first, 1.0, evaluations).tolist() if evaluations > 1 else [1.0]


def drawn(dataset: Dataset, rows: int) -> Dataset:
    """Returns so many examples of a data set, among them those of any smaller number."""
    return dataset if rows >= len(dataset) else dataset.select(_drawn(len(dataset), rows))


def _drawn(count: int, rows: int) -> list[int]:
    order = np.random.default_rng(_SEED).permutation(count)
    return sorted(order[:rows].tolist())
