from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_lora_rl import RLSampler
from optuna_lora_rl import TuningContext
from optuna_lora_rl import cli
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.rollouts import collect
from optuna_lora_rl.learning.settings import TrainingSettings
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.learning.training import Trainer
from optuna_lora_rl.learning.training import _stages
from optuna_lora_rl.learning.training import train
from optuna_lora_rl.learning.training_log import TrainingLog
from optuna_lora_rl.learning.training_log import read_metrics
from optuna_lora_rl.learning.updates import imitate
from optuna_lora_rl.learning.validation import bootstrap_interval
from optuna_lora_rl.policy import weights
from optuna_lora_rl.policy.ppo import PPOSettings
from optuna_lora_rl.samplers import proposal
from optuna_lora_rl.study import reading

SMALL = TrainingSettings(
    curriculum_updates=0,
    imitation_updates=1,
    ppo_updates=1,
    transitions=50,
    lengths=(4, 6),
    tasks=10,
    validation_tasks=4,
    validate_every=9,
)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optuna_lora_rl.learning.training._VALIDATED", 5)
    monkeypatch.setattr("optuna_lora_rl.learning.training._REPORTED", 5)


def _final(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "checkpoint.pt", weights_only=True)["network"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optuna_lora_rl.learning.training._VALIDATED", 5)
        patch.setattr("optuna_lora_rl.learning.training._REPORTED", 5)
        train(output, SMALL)
    return output


def test_a_run_leaves_weights_a_log_a_figure_and_a_report(run: Path) -> None:
    weights.load(run / "weights.safetensors")
    log = read_metrics(run)
    assert [entry["update"] for entry in log] == [1, 2]
    assert {"imitation_loss", "learning_rate", "reward"} <= log[0].keys()
    assert {"approx_kl", "clipfrac", "entropy", "explained_variance", "reward"} <= log[-1].keys()
    assert log[-1]["gain_low"] <= log[-1]["validation_gain"] <= log[-1]["gain_high"]
    assert any(name.startswith("lead_") for name in log[-1])
    assert "explained_variance" in (run / "training.html").read_text().lower().replace(" ", "_")
    assert "sweep_then_gp" in (run / "report.md").read_text()
    assert list((run / "tensorboard").iterdir())


def test_a_network_that_sees_surfaces_is_trained_and_serves(tmp_path: Path) -> None:
    known = {"surfaces": True, "contexts": True, "opened": 0.5, "lookahead": 0.5}
    train(tmp_path, SMALL.model_copy(update={**known, "linear_reward": 0.5, "lora_share": 1.0}))
    file = tmp_path / "ppo.safetensors"
    if not file.is_file():
        file = tmp_path / "weights.safetensors"
    assert weights.load(file).wide
    # It is held against what it starts from, the surfaces without a network.
    assert "surfaces_then_gp" in (tmp_path / "report.md").read_text()
    context = TuningContext(hidden_size=128, steps=32, batch_size=8)
    sampler = RLSampler(seed=0, weights=file, context=context, cost=lambda params: 0.001)
    study = optuna.create_study(sampler=sampler)
    space = {"lora_rank": IntDistribution(2, 64), "lr": FloatDistribution(1e-6, 1e-1, log=True)}
    for _ in range(4):
        trial = study.ask(space)
        study.tell(trial, abs(math.log10(trial.params["lr"]) + 2.0))
    assert study.best_value < 0.7
    assert "surfaces" in (proposal(study.trials[3]) or {})


def test_a_run_that_was_interrupted_ends_where_it_would_have(run: Path, tmp_path: Path) -> None:
    train(tmp_path, SMALL, minutes=0)
    # What was done after the last checkpoint is done again, and logged once.
    lost = json.dumps({**read_metrics(run)[-1], "reward": 99.0})
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write(lost + "\n")
    train(tmp_path, SMALL)
    whole, pieces = _final(run), _final(tmp_path)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert read_metrics(tmp_path) == read_metrics(run)


def test_the_weights_do_not_depend_on_the_number_of_processes(run: Path, tmp_path: Path) -> None:
    train(tmp_path, SMALL, processes=2)
    one, two = _final(run), _final(tmp_path)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read_metrics(tmp_path) == read_metrics(run)
    assert (tmp_path / "report.md").read_text() == (run / "report.md").read_text()


def test_another_runs_folder_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="belongs to a run with other settings"):
        train(run, SMALL.model_copy(update={"seed": 1}))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optuna_lora_rl.learning.training._VALIDATED", 5)
        torch.manual_seed(3)
        before = torch.random.get_rng_state()
        made = Trainer(SMALL, tmp_path_factory.mktemp("trainer"))
        made.step()
        assert torch.equal(torch.random.get_rng_state(), before)
    return made


def test_imitation_lowers_its_loss(trainer: Trainer) -> None:
    rollout = collect(trainer.pool[:10], 5, trainer.network, trainer.critic, trainer.generator)
    learning = (trainer.network, trainer.critic, trainer.optimizer, rollout, PPOSettings())
    losses = [imitate(*learning, trainer.generator, passes=1)["imitation_loss"] for _ in range(10)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("gain_of_the_mean", "weight"), [(0.05, 3.0), (0.15, 3.0), (0.25, 2.0)])
def test_the_weights_are_the_best_of_both_phases_or_their_mean(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, gain_of_the_mean: float, weight: float
) -> None:
    state = trainer.network.state_dict()
    for phase, value in (("imitation", 1.0), ("ppo", 3.0)):
        network = {name: torch.full_like(tensor, value) for name, tensor in state.items()}
        trainer.best[phase] = {"score": 0.1 * value - 0.1, "update": 1, "network": network}
    judged = {"validation_gain": gain_of_the_mean}
    monkeypatch.setattr(trainer.validation, "compare", lambda network: judged)
    assert (weights.load(trainer.finish()).last.weight == weight).all()


def test_where_nothing_was_better_the_weights_are_the_start(trainer: Trainer) -> None:
    trainer.best = {}
    assert (weights.load(trainer.finish()).last.weight == 0.0).all()


def test_the_curriculum_begins_with_small_tasks_and_keeps_constraints_apart() -> None:
    pool = draw_tasks(40, 5)
    stages = _stages(pool)
    first, rest = stages["first"], stages["all"]
    assert all(len(task.space) <= 3 for task in first)
    assert 0 < len(first) < len(rest) < len(pool)
    assert not any(task.constrained for task in rest)
    assert len(rest) + len(stages["constrained"]) == len(pool)


def test_a_running_mean_of_the_weights_is_judged_and_kept(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean = trainer.average.module.last.weight.clone()
    trainer.step()
    now = trainer.network.last.weight
    torch.testing.assert_close(trainer.average.module.last.weight, 0.95 * mean + 0.05 * now)
    judged: list[object] = []

    def compare(network: object) -> dict[str, float]:
        judged.append(network)
        return {"validation_gain": 9.0}

    monkeypatch.setattr(trainer.validation, "compare", compare)
    trainer.validate()
    assert judged == [trainer.average.module]
    kept = trainer.best["ppo"]["network"]["last.weight"]
    assert torch.equal(kept, trainer.average.module.last.weight)


def test_settings_of_the_shipped_file() -> None:
    file = Path(__file__).parents[2] / "studies" / "policy.yaml"
    content = reading.read_yaml(file)
    assert reading.validate(TrainingSettings, content, "policy.yaml") == TrainingSettings()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "sed is not a known key; did you mean seed?"),
        ("seed=one", "seed is 'one', but must be a whole number"),
        ("ppo.clip=0.1", "ppo.clip is not a known key; did you mean clip_coef?"),
        ("ppo.gamma=1.5", "ppo.gamma is 1.5, but must be at most 1"),
        ("lengths=[0]", "lengths.0 is 0, but must be at least 1"),
    ],
)
def test_bad_settings_are_named(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(Path(__file__).parents[2] / "studies" / "policy.yaml")
    with pytest.raises(SystemExit) as end:
        cli.main(["train-policy", file, "--set", override, "--output", str(tmp_path / "run")])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_says_how_it_goes_and_where_the_weights_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(
        "{curriculum_updates: 0, imitation_updates: 1, ppo_updates: 0, transitions: 50,"
        " lengths: [4], tasks: 4, validation_tasks: 4}"
    )
    with pytest.raises(SystemExit) as end:
        cli.main(["train-policy", str(file), "--output", str(tmp_path / "run")])
    assert not end.value.code
    said = capsys.readouterr().out
    assert "update 1 (imitation)" in said
    assert "weights.safetensors" in said


def test_the_interval_of_equal_differences_is_a_point() -> None:
    assert bootstrap_interval(np.full(10, 0.5), seed=0) == pytest.approx((0.5, 0.5, 0.5))


def test_a_torn_line_of_the_log_does_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"update": 1, "reward": 2.0}\n{"update": 2, "rew')
    TrainingLog(tmp_path, 2).close()
    assert read_metrics(tmp_path) == [{"update": 1, "reward": 2.0}]
