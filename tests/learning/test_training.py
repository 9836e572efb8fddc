from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.rollouts import collect
from optuna_lora_rl.learning.training import Trainer
from optuna_lora_rl.learning.training import TrainingSettings
from optuna_lora_rl.learning.training import bootstrap_interval
from optuna_lora_rl.learning.training import load_settings
from optuna_lora_rl.learning.training import main
from optuna_lora_rl.learning.training import settings_from
from optuna_lora_rl.learning.training import train
from optuna_lora_rl.policy import weights

SMALL = TrainingSettings(
    imitation_updates=2, ppo_updates=2, batch=6, tasks=8, validation_tasks=6, validate_every=2
)


def _final(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "checkpoint.pt", weights_only=True)["network"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    train(output, SMALL)
    return output


def test_a_run_leaves_weights_a_log_and_a_checkpoint(run: Path) -> None:
    weights.load(run / "weights.safetensors")
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["update"] for entry in log] == [1, 2, 3, 4]
    assert "imitation_loss" in log[0]
    assert {"approx_kl", "clipfrac", "entropy", "explained_variance", "reward"} <= log[-1].keys()
    assert log[-1]["gain_low"] <= log[-1]["validation_gain"] <= log[-1]["gain_high"]


def test_a_run_that_was_interrupted_ends_where_it_would_have(run: Path, tmp_path: Path) -> None:
    while not (tmp_path / "checkpoint.pt").is_file() or _updates(tmp_path) < 4:
        train(tmp_path, SMALL, minutes=0)
    whole, pieces = _final(run), _final(tmp_path)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def _updates(output: Path) -> int:
    return int(torch.load(output / "checkpoint.pt", weights_only=True)["update"])


def test_another_runs_folder_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="belongs to a run with other settings"):
        train(run, replace(SMALL, seed=1))


def test_imitation_lowers_its_loss(tmp_path: Path) -> None:
    trainer = Trainer(SMALL, tmp_path)
    rollout = collect(trainer.pool, 6, trainer.network, trainer.critic, trainer.generator)
    losses = [trainer._imitate(rollout)["imitation_loss"] for _ in range(10)]
    assert losses[-1] < losses[0]


def test_the_weights_are_the_mean_of_the_best_of_both_phases(tmp_path: Path) -> None:
    trainer = Trainer(SMALL, tmp_path)
    state = trainer.network.state_dict()
    for phase, value in (("imitation", 1.0), ("ppo", 3.0)):
        network = {name: torch.full_like(tensor, value) for name, tensor in state.items()}
        trainer.best[phase] = {"score": 0.1, "update": 1, "network": network}
    assert (weights.load(trainer.finish()).last.weight == 2.0).all()
    trainer.best = {}
    assert (weights.load(trainer.finish()).last.weight == 0.0).all()


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    Trainer(SMALL, tmp_path).step()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_settings_of_the_shipped_file() -> None:
    file = Path(__file__).parents[2] / "studies" / "policy.yaml"
    assert load_settings(file) == TrainingSettings()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "sed is no setting of a training run: batch"),
        ({"seed": "one"}, "seed is 'one', but must be a number"),
        ({"ppo": {"clip": 0.1}}, "ppo: clip is no setting of PPO"),
        ({"ppo": {"gamma": "high"}}, "ppo: gamma is 'high'"),
        ({"ppo": 3}, "ppo is 3"),
    ],
)
def test_bad_settings_are_named(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings_from(values)


def test_a_missing_settings_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as YAML"):
        load_settings(tmp_path / "none.yaml")


def test_the_command_line_prints_where_the_weights_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        f"--output {tmp_path} --imitation-updates 1 --ppo-updates 0 --batch 4 --tasks 4"
        " --validation-tasks 4".split()
    )
    assert capsys.readouterr().out.strip().endswith("weights.safetensors")


def test_the_interval_of_equal_differences_is_a_point() -> None:
    assert bootstrap_interval(np.full(10, 0.5), seed=0) == pytest.approx((0.5, 0.5, 0.5))
