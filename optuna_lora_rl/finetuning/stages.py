"""Evaluations that read more of the validation set the further a run is.

An early evaluation only tells the hopeless from the hopeful, and need not read everything. All
runs read the same examples at the evaluation of the same number, each evaluation those of the one
before and more, the last one everything, and quality compares with the untuned model on the same
examples. A run of fewer steps than evaluations has not all of the numbers, but the last.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace

import numpy as np
from datasets import Dataset

from optuna_lora_rl.finetuning.evaluation import Evaluation
from optuna_lora_rl.finetuning.evaluation import Questions

_SEED = 0


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
        first: Share of it that the first evaluation reads.
        measure: Evaluates the untuned model.
    """

    def __init__(
        self,
        whole: Stage,
        first: float,
        measure: Callable[[Dataset, Questions | None], Evaluation],
    ) -> None:
        self._whole = whole
        self._first = first
        self._measure = measure
        self._known = {1.0: whole}

    def of(self, evaluated: Mapping[int, int]) -> dict[int, Stage]:
        """Returns the stage of each step after which a run is evaluated.

        Args:
            evaluated: The number of each step's evaluation; the last one reads everything.
        """
        last = max(evaluated.values())
        shares = np.linspace(self._first, 1.0, last) if last > 1 else [1.0]
        return {step: self._stage(float(shares[n - 1])) for step, n in evaluated.items()}

    def _stage(self, share: float) -> Stage:
        if share not in self._known:
            dataset, asked = self._whole.dataset, self._whole.asked
            chosen = dataset.select(_drawn(len(dataset), share))
            if asked is not None:
                numbers = _drawn(len(asked.prompts), share)
                asked = replace(
                    asked,
                    prompts=tuple(asked.prompts[i] for i in numbers),
                    answers=tuple(asked.answers[i] for i in numbers),
                )
            self._known[share] = Stage(chosen, asked, self._measure(chosen, asked))
        return self._known[share]


def _drawn(count: int, share: float) -> list[int]:
    """Numbers of the examples that are in a share, among them those of any smaller share."""
    order = np.random.default_rng(_SEED).permutation(count)
    return sorted(order[: max(1, round(share * count))].tolist())
