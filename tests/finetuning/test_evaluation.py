"""Evaluations that read more of the validation set the further a run is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from optuna_lora_rl.finetuning.evaluation import Evaluation
from optuna_lora_rl.finetuning.evaluation import Stage
from optuna_lora_rl.finetuning.evaluation import Stages
from optuna_lora_rl.finetuning.evaluation import Work
from optuna_lora_rl.finetuning.evaluation import rows_read
from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.questions import Questions
from optuna_lora_rl.finetuning.trial import TrialRequest
from tests.finetuning.runs import loss_of_saved

Make = Callable[..., FineTuner]


def stages(rows: list[int], measured: list[int]) -> Stages:
    dataset = Dataset.from_dict({"input_ids": [[i] for i in range(100)]})
    # In order, as a file sorted by class has them.
    asked = Questions(prompts=tuple((i,) for i in range(40)), answers=("a",) * 20 + ("b",) * 20)

    def measure(part: Dataset, asked: Questions | None) -> Evaluation:
        measured.append(len(part))
        return Evaluation(loss=float(len(part)), token_accuracy=0.0)

    return Stages(Stage(dataset, asked, Evaluation(loss=100.0, token_accuracy=0)), rows, measure)


def test_each_evaluation_reads_what_the_one_before_read_and_more() -> None:
    measured: list[int] = []
    made = stages([25, 50, 75, 100], measured)
    course = made.of({10: 1, 20: 2, 30: 3, 40: 4})
    read = [{row[0] for row in course[step].dataset["input_ids"]} for step in (10, 20, 30, 40)]
    assert [len(part) for part in read] == [25, 50, 75, 100]
    assert read[0] < read[1] < read[2] < read[3]
    assert [course[step].baseline.loss for step in (10, 20, 30, 40)] == [25, 50, 75, 100]
    # Another run reads the same at the same evaluation, and nothing is measured twice.
    again = made.of({5: 1, 7: 2, 11: 3, 13: 4})
    assert again[5].dataset["input_ids"] == course[10].dataset["input_ids"]
    # And so does one that has not the steps for all of them.
    short = made.of({1: 2, 2: 4})
    assert [len(short[step].dataset) for step in (1, 2)] == [50, 100]
    assert measured == [25, 50, 75]


def test_questions_are_drawn_by_lot_in_the_same_way() -> None:
    course = stages([25, 50, 75, 100], []).of({10: 1, 20: 2, 30: 3, 40: 4})
    asked = [course[step].asked for step in (10, 20, 30, 40)]
    read = [set() if part is None else set(part.prompts) for part in asked]
    assert [len(part) for part in read] == [10, 20, 30, 40]
    assert read[0] < read[1] < read[2] < read[3]
    assert all(part is not None and set(part.answers) == {"a", "b"} for part in asked)


def test_all_is_read_each_time_unless_asked_otherwise() -> None:
    measured: list[int] = []
    course = stages([100, 100], measured).of({1: 1, 2: 2})
    assert course[1] is course[2]
    assert measured == []


# A trial of 24 steps of 8 rows of 50 tokens, and validation rows that are as long.
WORK = Work(trained=24 * 8 * 50, example=50)


def test_evaluations_are_at_most_15_percent_of_a_trial() -> None:
    rows = rows_read(4, 256, WORK, first="auto", reads_all=False)
    # 192 rows go forward and back: 68 more may go forward, two thirds of them at the end.
    assert rows == [8, 8, 11, 45]
    assert WORK.share(rows) == pytest.approx(72 / (72 + 2 * 192))
    long = Work(trained=400 * 8 * 50, example=50)
    rows = rows_read(4, 256, long, first="auto", reads_all=False)
    assert rows == [146, 256, 256, 256] and long.share(rows) <= 0.15


def test_what_was_asked_for_is_read() -> None:
    assert rows_read(4, 100, WORK, first=0.25, reads_all=True) == [25, 50, 75, 100]
    assert rows_read(4, 100, WORK, first=1.0, reads_all=True) == [100] * 4
    assert rows_read(1, 100, WORK, first=0.1, reads_all=True) == [100]
    # The last reads all that was asked for; the first ones need not.
    assert rows_read(3, 100, WORK, first="auto", reads_all=True) == [8, 8, 100]


def test_few_examples_are_all_read() -> None:
    short = Work(trained=50, example=50)
    assert rows_read(3, 256, short, first="auto", reads_all=False) == [8, 8, 32]
    assert rows_read(3, 5, short, first="auto", reads_all=False) == [5, 5, 5]


@pytest.mark.parametrize("source", ["train", "eval"])
def test_losses_that_decide_about_ranks_compare(make_tuner: Make, source: str) -> None:
    tuner = make_tuner(
        rank_change={"loss": {"source": source}},
        validation_fraction=0.5,
        max_validation_samples=20,
    )
    rows = tuner.data_facts()["evaluations"]
    assert rows == ([20, 20] if source == "eval" else [8, 20])


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_that_is_stopped_early_ends_with_an_evaluation_of_everything(
    make_tuner: Make, tmp_path: Path, packed: bool
) -> None:
    growing = make_tuner(first_evaluation=0.1, evaluations=4, early_stopping_patience=1)
    # So fast that it grows worse at once.
    wanted = {"max_steps": 4, "learning_rate": 0.3, "max_grad_norm": 0.0}
    reported: list[float] = []
    run = TrialRequest(
        0, wanted, report=lambda n, score, _: reported.append(score), folder=tmp_path
    )
    if packed:
        runs, results = iter([run]), list[Any]()
        growing.run_packed(lambda: next(runs, None), lambda _, result: results.append(result))
        (result,) = results
    else:
        result = growing.run(wanted, report=run.report, folder=tmp_path)
    assert result.stopped_early and result.steps < 4
    loss = loss_of_saved(growing, tmp_path)
    baseline = growing.baseline()
    assert result.metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert result.quality == pytest.approx((baseline.loss - loss) / baseline.loss, rel=1e-4)
    assert result.curve[-1]["quality"] == result.quality
    assert result.curve[-1]["score"] != reported[-1]


@pytest.mark.parametrize("packed", [False, True])
def test_smaller_first_evaluations_leave_training_and_its_end_as_they_are(
    make_tuner: Make, tuner: FineTuner, packed: bool
) -> None:
    wanted = {"lora_rank": 4, "max_steps": 4, "learning_rate": 1e-2}
    growing = make_tuner(first_evaluation=0.5)
    whole = tuner.run(wanted)
    if packed:
        results = []
        runs = iter([TrialRequest(0, wanted)])
        growing.run_packed(
            lambda: next(runs, None), lambda run, result: results.append(result), size=2
        )
        (part,) = results
    else:
        part = growing.run(wanted)
    assert part.curve[-1] == pytest.approx(whole.curve[-1], rel=1e-5)
    assert part.curve[0]["loss"] != pytest.approx(whole.curve[0]["loss"], rel=1e-6)
    # Against the untuned model on the same examples, so of the same order.
    assert part.curve[0]["quality"] == pytest.approx(whole.curve[0]["quality"], abs=0.2)
