from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch

from optuna_lora_rl import RLSampler
from optuna_lora_rl import cli
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning import fine_tuning
from optuna_lora_rl.learning.fine_tuning import LearningSettings
from optuna_lora_rl.learning.own_studies import surfaces_of
from optuna_lora_rl.policy import weights
from optuna_lora_rl.policy.transfer import SourceStudy
from optuna_lora_rl.samplers.transfer import source_study

SMALL = LearningSettings(seed=1, updates=2, studies=3, tasks=8, trials=3)


def _objective(trial: optuna.Trial) -> float:
    lr = trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True)
    rank = trial.suggest_categorical("lora_rank", [4, 8, 16, 32])
    trial.suggest_categorical("target_modules", ["qv", "all-linear"])
    if lr > 0.03:
        raise FloatingPointError
    return -abs(math.log10(lr) + 2.5) - 0.1 * abs(math.log2(rank) - 4)


def _study(trials: int = 24, storage: str | None = None) -> optuna.Study:
    study = optuna.create_study(
        study_name="own",
        direction="maximize",
        storage=storage,
        sampler=optuna.samplers.TPESampler(seed=0),
    )
    study.optimize(_objective, n_trials=trials, catch=FloatingPointError)
    return study


@pytest.fixture(scope="module")
def source() -> SourceStudy:
    return source_study(_study())


def test_a_surface_says_what_the_trials_said(source: SourceStudy) -> None:
    surface, *draws = surfaces_of(source, 3, seed=0)
    names = [dimension.name for dimension in surface.dimensions]
    assert names == ["learning_rate", "lora_rank", "target_modules"]
    x = np.array([[10**-4.5, 16.0, 1.0], [10**-2.5, 16.0, 1.0], [10**-1.1, 16.0, 1.0]])
    value, failed = surface(x)
    assert value[1] > value[0] + 0.5
    assert failed.tolist() == [False, False, True]
    others = np.stack([draw(x)[0] for draw in draws])
    assert not np.array_equal(others[0], others[1])
    assert (others[:, 1] > others[:, 0]).all()


def test_the_policy_is_fine_tuned_and_loads(source: SourceStudy, tmp_path: Path) -> None:
    told: list[float] = []
    result = fine_tuning.learn(
        [source],
        tmp_path / "w.safetensors",
        SMALL,
        report=lambda metrics: told.append(metrics["update"]),
    )
    assert told == [1.0, 2.0]
    assert result.low <= result.gain <= result.high
    changed = not torch.equal(weights.load(result.path).last.weight, weights.load().last.weight)
    assert changed == bool(result.kept)
    assert RLSampler(weights=result.path, seed=0)


def test_each_phase_changes_the_policy_the_same_way_twice(source: SourceStudy) -> None:
    start = weights.load()
    tasks = fine_tuning.draw_tasks(4, 0, surfaces_of(source, 2, seed=0), 1.0)
    runs = [fine_tuning._Learner(start, tasks, SMALL) for _ in range(2)]
    before = start.last.weight
    for metric in ("imitation_loss", "approx_kl"):
        assert all(metric in run.step() for run in runs)
        one, two = (run.network.last.weight.detach().clone() for run in runs)
        assert torch.equal(one, two)
        assert not torch.equal(one, before)
        before = one


def test_studies_that_teach_nothing_are_named(tmp_path: Path) -> None:
    short = _study(5)
    with pytest.raises(UserError, match="study 'own' has 4 trials with a result, but at least 8"):
        fine_tuning.learn([source_study(short)], tmp_path / "w.safetensors", SMALL)
    with pytest.raises(UserError, match="none of 1 studies has at least 8 trials"):
        fine_tuning.read([short], all_wanted=False)
    plain = optuna.create_study(study_name="plain")
    plain.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=9)
    with pytest.raises(UserError, match="'plain' tunes x, which does not look like LoRA"):
        fine_tuning.learn([source_study(plain)], tmp_path / "w.safetensors", SMALL)


def test_the_command_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.create_study(study_name="own", storage=url)
    for arguments, sentence in (
        (["--storage", str(tmp_path / "gone")], "there is no database"),
        (["--storage", url, "--study", "other"], "there is no study 'other'"),
        (["--storage", url], "none of 1 studies has at least 8 trials"),
        (["--storage", url, "--study", "own", "-o", "w.pt"], "must end in .safetensors"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["learn", *arguments])
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_learnt(
    tmp_path: Path,
) -> None:
    folder, file = tmp_path / "is-a-folder.safetensors", tmp_path / "file"
    folder.mkdir()
    file.touch()
    for output in (folder, file / "weights.safetensors"):
        with pytest.raises(UserError, match="cannot be written"):
            fine_tuning.learn([], output)
