"""The file of what a study decides."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_lora_rl.rank.callback import RankChange
from optuna_lora_rl.study import display
from optuna_lora_rl.study import layers
from optuna_lora_rl.study import output
from optuna_lora_rl.study import runner
from tests.study.conftest import MakeSpec


def test_what_is_logged_in_the_package_is_kept(tmp_path: Path) -> None:
    logger = logging.getLogger("optuna_lora_rl.somewhere")
    change = RankChange(10, "layers.0.q_proj", 4, 6, "the loss stands still", 0.0)
    with output.logged(tmp_path / "study"):
        logger.info("trial %d, %s", 3, change)
        logging.getLogger("elsewhere").info("not ours")
    logger.info("too late")
    (line,) = (tmp_path / "study" / "log.txt").read_text().splitlines()
    assert line.endswith(
        "trial 3, after step 10: layers.0.q_proj from rank 4 to 6, because the loss stands still"
    )


def test_a_study_that_decides_nothing_writes_nothing(tmp_path: Path) -> None:
    with output.logged(tmp_path / "study"):
        pass
    assert not (tmp_path / "study").exists()


def test_a_folder_that_cannot_be_made_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with output.logged(tmp_path / "file" / "study"):
        logging.getLogger("optuna_lora_rl").info("lost")


@pytest.mark.parametrize("packing", ["off", 2])
def test_each_change_of_rank_stands_under_its_trial_as_it_happens(
    make_spec: MakeSpec, packing: str | int
) -> None:
    # Ranks change at the least occasion; the second trial, which learns nothing, is pruned.
    gradient = {"every": 1, "window": 2, "slack": 0.9, "consistent": -1.0}
    spec = make_spec(
        {
            "packing": packing,
            "training": {"evaluations": 4, "rank_change": {"patience": 1, "gradient": gradient}},
            "space.rank_change": "gradient",
            "space.learning_rate": [3e-3, 1e-6],
            "space.max_steps": 8,
            "pruner": {"name": "threshold", "lower": 0.0, "n_warmup_steps": 3},
            "budget": 2,
        }
    )

    class Seen(display.Display):
        def trial_ends(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> None:
            before[trial.number] = lines(trial.number)

    def lines(number: int) -> list[str]:
        said = (spec.folder / output.LOG_FILE).read_text().splitlines()
        return [line for line in said if f" trial {number}, after step " in line]

    before: dict[int, list[str]] = {}
    study = runner.open_study(spec)
    for rate in spec.space["learning_rate"]:
        study.enqueue_trial({"learning_rate": rate, "lora_rank": 4, "target_modules": "qv"})
    trials = runner.run(spec, display=Seen()).study.trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.PRUNED]
    for trial in trials:
        assert lines(trial.number)
        # All were there before the trial was over.
        assert lines(trial.number) == before[trial.number]
    assert len(lines(0)) == len(layers.read(trials[0], spec.folder).rank_changes)


def test_warnings_are_shown_too(tmp_path: Path) -> None:
    shown: list[str] = []
    with output.logged(tmp_path, shown.append):
        logging.getLogger("optuna_lora_rl.somewhere").info("a detail")
        logging.getLogger("optuna_lora_rl.somewhere").warning("no more of %s", "this")
    assert shown == ["no more of this"]
    assert len((tmp_path / output.LOG_FILE).read_text().splitlines()) == 2
