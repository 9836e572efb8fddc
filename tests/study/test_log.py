"""The file of what a study decides."""

from __future__ import annotations

import logging
from pathlib import Path

from optuna_lora_rl.rank.callback import RankChange
from optuna_lora_rl.study import log


def test_what_is_logged_in_the_package_is_kept(tmp_path: Path) -> None:
    logger = logging.getLogger("optuna_lora_rl.somewhere")
    change = RankChange(10, "layers.0.q_proj", 4, 6, "the loss stands still", 0.0)
    with log.kept(tmp_path / "study"):
        logger.info("trial %d, %s", 3, change)
        logging.getLogger("elsewhere").info("not ours")
    logger.info("too late")
    (line,) = (tmp_path / "study" / "log.txt").read_text().splitlines()
    assert line.endswith(
        "trial 3, after step 10: layers.0.q_proj from rank 4 to 6, because the loss stands still"
    )


def test_a_study_that_decides_nothing_writes_nothing(tmp_path: Path) -> None:
    with log.kept(tmp_path / "study"):
        pass
    assert not (tmp_path / "study").exists()


def test_a_folder_that_cannot_be_made_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with log.kept(tmp_path / "file" / "study"):
        logging.getLogger("optuna_lora_rl").info("lost")
