"""Small studies: a file in a temporary folder, and a tuner that needs no model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from optuna_lora_rl.finetuning import finetuner as trial_module
from optuna_lora_rl.finetuning.answering import Answers
from optuna_lora_rl.finetuning.data import Counts
from optuna_lora_rl.finetuning.evaluation import Evaluation
from optuna_lora_rl.finetuning.forecast import Forecast
from optuna_lora_rl.finetuning.trial import TrialRequest
from optuna_lora_rl.finetuning.trial import TrialResult
from optuna_lora_rl.study import spec as study_spec
from optuna_lora_rl.study.spec import StudySpec

# A real study whose trials take a fraction of a second.
SMALL: dict[str, Any] = {
    "model": "tiny",
    "data": {
        "train": "tiny:dates-small",
        "max_train_samples": 16,
        "max_validation_samples": 8,
        "max_test_samples": 8,
    },
    "space": {
        "lora_rank": {"low": 2, "high": 8, "log": True},
        "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "target_modules": ["qv", "attention"],
        "batch_size": 4,
        "max_steps": 4,
    },
    "objective": {"reference": {"max_steps": 4, "batch_size": 4}},
    "training": {"evaluations": 2},
    "sampler": "tpe",
    "budget": 3,
    # They take longer than the trials.
    "answers": 0,
}

MakeSpec = Callable[..., StudySpec]


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with dotted keys replaced."""
    content = json.loads(json.dumps(base))
    for key, value in changes.items():
        *path, last = key.split(".")
        section = content
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return content


@pytest.fixture
def study_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``small.yaml`` with the given keys changed; its output is a temporary folder."""

    def write(changes: dict[str, Any] | None = None) -> Path:
        file = tmp_path / "small.yaml"
        content = merged(SMALL | {"output": str(tmp_path / "out")}, changes or {})
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        return file

    return write


@pytest.fixture
def make_spec(study_file: Callable[..., Path]) -> MakeSpec:
    """The spec of ``small.yaml`` with the given keys changed."""
    return lambda changes=None: study_spec.load(study_file(changes))


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No study in this process measures two steps first: what is trained is the trials."""
    forecast = Forecast(seconds=1.0, evaluating=0.1, peak_bytes=1)
    monkeypatch.setattr(trial_module.FineTuner, "forecast", lambda tuner: forecast)


class PaperTuner:
    """A fine-tuner on paper: quality is best at learning rate 1e-3, cost grows with rank.

    ``failures`` are raised, one a trial, before the trials begin to succeed.
    """

    failures: list[BaseException | None] = []  # noqa: RUF012
    seeds: list[int] = []  # noqa: RUF012
    tested: list[Path] = []  # noqa: RUF012
    # How many ran side by side, each time that one was trained for an evaluation.
    together: list[int] = []  # noqa: RUF012

    # Who was asked, and what they say; None where the data ask nothing.
    answered: list[Path | None] = []  # noqa: RUF012
    says: Callable[[Path | None, int], Answers] | None = None

    def __init__(self, model: Any, data: Any, training: Any, objective: Any, **_: Any) -> None:
        self.training, self.objective = training, objective

    def prepare(self, targets: Iterable[str], layers: Iterable[str]) -> list[str]:
        return []

    @property
    def precision(self) -> str:
        return "fp32" if self.training.precision == "auto" else str(self.training.precision)

    def data_facts(self) -> dict[str, Any]:
        counts = dict.fromkeys(
            (*(name.name for name in fields(Counts)), "emptied", "cut", "special"), 0
        )
        counts |= {"read": 40, "used": 40}
        splits = {name: dict(counts) for name in ("train", "validation")}
        return {
            "kind": "prompt-completion",
            "learns": "the completion",
            "unread": [],
            "max_length": 512,
            "answered": None,
            "splits": splits,
        }

    def traits(self) -> dict[str, Any]:
        sizes = {"hidden_size": 128, "model_layers": 4, "model_parameters": 10**6}
        return {**sizes, "train_examples": 40, "mean_tokens": 12.5}

    def estimate(self, configuration: Any) -> tuple[None, dict[str, float]]:
        return None, {"total": configuration["lora_rank"] / 8}

    def baseline(self) -> Evaluation:
        return Evaluation(loss=2.0, token_accuracy=0.25)

    def forecast(self) -> Forecast:
        return Forecast(seconds=90.0, evaluating=9.0, peak_bytes=2_100_000_000)

    def run(self, configuration: Any, **rest: Any) -> TrialResult:
        *_, result = self._course(
            TrialRequest(configuration=configuration, **{"number": 0, **rest})
        )
        assert result is not None
        return result

    def run_packed(
        self,
        runs: Callable[[], TrialRequest | None],
        done: Callable[[TrialRequest, TrialResult | Exception], None],
        *,
        size: int | None,
        says: Callable[[str], None],
        alone: Callable[[TrialRequest, str], None],
    ) -> None:
        """Trains ``size`` runs in turn, each for an evaluation; three are all that fits."""
        running: list[tuple[TrialRequest, Iterator[TrialResult | None]]] = []
        while True:
            while len(running) < (size or 3) and (run := runs()) is not None:
                running.append((run, self._course(run)))
            if not running:
                return
            for run, course in list(running):
                PaperTuner.together.append(len(running))
                result: TrialResult | Exception | None
                try:
                    result = next(course)
                except Exception as error:
                    result = error
                if result is not None:
                    running.remove((run, course))
                    done(run, result)

    def _course(self, run: TrialRequest) -> Iterator[TrialResult | None]:
        assert run.seed is not None and run.report is not None and run.folder is not None
        PaperTuner.seeds.append(run.seed)
        failure = PaperTuner.failures.pop(0) if PaperTuner.failures else None
        if failure is not None:
            raise failure
        configuration: Any = run.configuration
        quality = 1 - 0.2 * abs(math.log10(configuration["learning_rate"] / 1e-3))
        cost = configuration["lora_rank"] / 8
        curve = []
        evaluations = min(self.training.evaluations, 4)
        for evaluation in range(1, evaluations + 1):
            share = evaluation / evaluations
            score = share * quality - self.objective.cost_weight * cost
            curve.append({"step": evaluation, "loss": 2 - share * quality, "score": score})
            metrics = {"loss": 2 - share * quality, "quality": share * quality}
            run.report(evaluation, score, {**metrics, "evaluation": evaluation})
            if evaluation < evaluations:
                yield None
        run.folder.mkdir(parents=True)
        (run.folder / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
        save_file({"weight": np.zeros(1)}, run.folder / "adapter_model.safetensors")
        yield TrialResult(
            quality=quality,
            score=quality - self.objective.cost_weight * cost,
            cost=cost,
            cost_parts={"estimated": {"time": cost, "total": cost}},
            metrics={"loss": 2 - quality, "token_accuracy": 0.5},
            curve=curve,
            steps=4,
            seconds=0.5,
            peak_memory_bytes=1 << 20,
            flops=1.0,
            bytes=1.0,
            trainable_parameters=100,
            stopped_early=False,
        )

    def answers(self, adapter: Path | None, count: int) -> Answers | None:
        PaperTuner.answered.append(adapter)
        return PaperTuner.says(adapter, count) if PaperTuner.says else None

    def test(self, adapter: Path) -> Evaluation | None:
        PaperTuner.tested.append(adapter)
        return Evaluation(loss=1.5, token_accuracy=0.5)


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> type[PaperTuner]:
    """Replaces the fine-tuner by one on paper."""
    PaperTuner.failures, PaperTuner.seeds, PaperTuner.tested = [], [], []
    PaperTuner.together, PaperTuner.answered, PaperTuner.says = [], [], None
    monkeypatch.setattr(trial_module, "FineTuner", PaperTuner)
    return PaperTuner
