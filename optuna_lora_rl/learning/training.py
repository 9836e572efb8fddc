"""The training run: imitation of a clairvoyant, then PPO, with validation, checkpoints and a log.

    python -m optuna_lora_rl.learning.training --output policy --seed 0

Everything follows from the settings: the same settings give the same weights on the same machine
and library versions, also when the run was interrupted and started again. ``--minutes`` ends a
run early and is the one thing that makes it depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.environment import rollout_regret
from optuna_lora_rl.learning.rollouts import Rollout
from optuna_lora_rl.learning.rollouts import collect
from optuna_lora_rl.learning.rollouts import log_probabilities
from optuna_lora_rl.learning.rollouts import select
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.policy import ppo
from optuna_lora_rl.policy import weights
from optuna_lora_rl.policy.network import Critic
from optuna_lora_rl.policy.network import Scorer
from optuna_lora_rl.policy.ppo import PPOSettings

_PRIVILEGED = 6
_LENGTHS = (5, 8, 10, 12, 16, 20, 30)
CHECKPOINTS = (1, 3, 5, 10, 20)


@dataclass(frozen=True)
class TrainingSettings:
    """What a training run depends on.

    Args:
        seed: of tasks, networks and episodes.
        imitation_updates: rollouts learnt from by imitation, first.
        ppo_updates: rollouts learnt from by PPO, afterwards.
        batch: tasks a rollout.
        tasks: size of the pool of training tasks.
        validation_tasks: tasks kept apart for choices; validated on their first trials.
        validate_every: updates between validations.
        width: of the networks' hidden layers.
        imitation_learning_rate: of Adam while imitating.
        ppo: hyperparameters of PPO.
    """

    seed: int = 0
    imitation_updates: int = 160
    ppo_updates: int = 110
    batch: int = 128
    tasks: int = 3000
    validation_tasks: int = 400
    validate_every: int = 20
    width: int = 64
    imitation_learning_rate: float = 1e-3
    ppo: PPOSettings = field(default_factory=PPOSettings)


class Trainer:
    """One training run: its networks, its place in the schedule, its files.

    Args:
        settings: of the run.
        output: folder of checkpoint, log and weights.
    """

    def __init__(self, settings: TrainingSettings, output: Path) -> None:
        self.settings, self.output = settings, output
        self.update = 0
        self.best: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.network, self.critic = Scorer(settings.width), Critic(_PRIVILEGED)
        self.parameters = [*self.network.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=settings.imitation_learning_rate, eps=1e-5
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.pool = draw_tasks(settings.tasks, seed=2 * settings.seed + 1)
        self.validation = draw_tasks(settings.validation_tasks, seed=2 * settings.seed + 1_000_000)
        length = max(CHECKPOINTS)
        self.baseline = rollout_regret(self.validation, length, None, settings.seed)

    @property
    def updates(self) -> int:
        """Updates in the whole run."""
        return self.settings.imitation_updates + self.settings.ppo_updates

    def step(self) -> dict[str, float]:
        """One rollout and the update from it."""
        rows = torch.randint(len(self.pool), (self.settings.batch,), generator=self.generator)
        pick = int(torch.randint(len(_LENGTHS), (1,), generator=self.generator))
        rollout = collect(
            self.pool[rows], _LENGTHS[pick], self.network, self.critic, self.generator
        )
        imitating = self.update < self.settings.imitation_updates
        metrics = self._imitate(rollout) if imitating else self._reinforce(rollout)
        self.update += 1
        metrics |= {
            "reward": float(rollout.rewards.sum(0).mean()),
            "regret": float(rollout.regret.mean()),
            "length": float(_LENGTHS[pick]),
        }
        return metrics

    def _imitate(self, rollout: Rollout) -> dict[str, float]:
        """Cross-entropy to the clairvoyant, and the critic to the returns seen on the way."""
        done = self.update / self.settings.imitation_updates
        self._set_learning_rate(self.settings.imitation_learning_rate * (1.0 - 0.9 * done))
        data = rollout.transitions(self.settings.ppo)
        losses, scale = [], rollout.target.sum(1).mean()
        for _ in range(2):
            order = torch.randperm(len(rollout), generator=self.generator)
            for rows in order.split(self.settings.ppo.minibatch_size):
                features = select(rollout.features, rows)
                log_p = log_probabilities(self.network, features, rollout.residual[rows], 1.0)
                finite = torch.where(features.valid, log_p, torch.zeros_like(log_p))
                imitation = -(rollout.target[rows] / scale * finite).sum(1).mean()
                value = self.critic(features, rollout.privileged[rows])
                loss = imitation + 0.5 * ((value - data.returns[rows]) ** 2).mean()
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                losses.append(imitation.item())
        explained = ppo.explained_variance(data.values, data.returns)
        return {"imitation_loss": float(np.mean(losses)), "explained_variance": explained}

    def _reinforce(self, rollout: Rollout) -> dict[str, float]:
        settings = self.settings
        done = (self.update - settings.imitation_updates) / max(settings.ppo_updates, 1)
        self._set_learning_rate(settings.ppo.learning_rate * (1.0 - done))

        def evaluate(rows: Tensor) -> tuple[Tensor, Tensor]:
            features = select(rollout.features, rows)
            log_p = log_probabilities(self.network, features, rollout.residual[rows])
            return log_p, self.critic(features, rollout.privileged[rows])

        return ppo.update(
            evaluate,
            self.parameters,
            self.optimizer,
            rollout.transitions(settings.ppo),
            settings.ppo,
            self.generator,
        )

    def _set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def validate(self) -> dict[str, float]:
        """Gain over the residual policy on the validation tasks, and keep the best network."""
        length = max(CHECKPOINTS)
        regret = rollout_regret(self.validation, length, self.network, self.settings.seed)
        gain = log_regret_gain(self.baseline, regret)
        mean, low, high = bootstrap_interval(gain.mean(1).numpy(), self.settings.seed)
        phase = "imitation" if self.update <= self.settings.imitation_updates else "ppo"
        if mean > self.best.get(phase, {"score": 0.0})["score"]:
            state = {k: v.clone() for k, v in self.network.state_dict().items()}
            self.best[phase] = {"score": mean, "update": self.update, "network": state}
            self.export(self.network, f"{phase}.safetensors", {"validation_gain": f"{mean:.4f}"})
        by_trial = {f"gain_at_{k}": float(gain[:, i].mean()) for i, k in enumerate(CHECKPOINTS)}
        return {"validation_gain": mean, "gain_low": low, "gain_high": high, **by_trial}

    def finish(self) -> Path:
        """Write the run's weights: the mean of the best of imitation and the best of PPO.

        The mean of two networks of one trajectory generalises better than either (Izmailov et
        al. 2018): PPO alone had become reluctant to leave a guide's value on flat surfaces.
        Where nothing beat the start on the validation tasks, the start is what is written.
        """
        network = Scorer(self.settings.width)
        states = [entry["network"] for entry in self.best.values()]
        if states:
            mean = {k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]}
            network.load_state_dict(mean)
        notes = {phase: f"best at update {best['update']}" for phase, best in self.best.items()}
        return self.export(network, "weights.safetensors", notes)

    def export(self, network: Scorer, name: str, notes: dict[str, str]) -> Path:
        """Write a network to a file of the run's folder."""
        origin = {"settings": json.dumps(asdict(self.settings)), "update": str(self.update)}
        weights.save(network, self.output / name, {**origin, **notes})
        return self.output / name

    def save(self) -> None:
        """Write a checkpoint from which the same run goes on."""
        state = {
            "settings": json.dumps(asdict(self.settings)),
            "update": self.update,
            "best": self.best,
            "network": self.network.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        partial = self.output / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.output / "checkpoint.pt")

    def restore(self) -> None:
        """Go on from the folder's checkpoint, where there is one of this run."""
        file = self.output / "checkpoint.pt"
        if not file.is_file():
            return
        state = torch.load(file, weights_only=True)
        if state["settings"] != json.dumps(asdict(self.settings)):
            raise UserError(
                f"output: {file} belongs to a run with other settings; choose another folder"
            )
        self.update, self.best = state["update"], state["best"]
        self.network.load_state_dict(state["network"])
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])


def log_regret_gain(baseline: Tensor, regret: Tensor) -> Tensor:
    """log10 of baseline regret over regret at ``CHECKPOINTS``, floored at 0.01, (B, 5)."""
    columns = [k - 1 for k in CHECKPOINTS]
    return (baseline[:, columns] + 0.01).log10() - (regret[:, columns] + 0.01).log10()


def bootstrap_interval(
    differences: np.ndarray, seed: int, draws: int = 2000
) -> tuple[float, float, float]:
    """Mean of paired differences and its 95% bootstrap interval."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(differences), size=(draws, len(differences)))
    low, high = np.quantile(differences[rows].mean(axis=1), [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def train(
    output: Path,
    settings: TrainingSettings | None = None,
    *,
    minutes: float | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
) -> Path:
    """Train a policy and return the file of its weights.

    Args:
        output: folder for ``weights.safetensors``, the best of each phase on the validation tasks
            (``imitation.safetensors``, ``ppo.safetensors``), ``checkpoint.pt`` and
            ``metrics.jsonl``; a run in it is continued.
        settings: of the run.
        minutes: stop after so long, at the next update; the run can be continued.
        report: called with the metrics of every update.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings or TrainingSettings(), output)
    trainer.restore()
    started = time.monotonic()
    with (output / "metrics.jsonl").open("a") as log:
        while trainer.update < trainer.updates:
            metrics = trainer.step()
            every = trainer.settings.validate_every
            last = trainer.update in (trainer.settings.imitation_updates, trainer.updates)
            if trainer.update % every == 0 or last:
                metrics |= trainer.validate()
                trainer.save()
            metrics["update"] = trainer.update
            log.write(json.dumps({k: round(v, 5) for k, v in metrics.items()}) + "\n")
            log.flush()
            if report is not None:
                report(metrics)
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                trainer.save()
                break
    return trainer.finish()


def settings_from(values: dict[str, Any]) -> TrainingSettings:
    """Settings from plain values (a YAML file's, the command line's).

    Raises:
        UserError: an unknown name or a value of the wrong type.
    """
    known = {f.name: f for f in fields(TrainingSettings)}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{name} is no setting of a training run: {', '.join(sorted(known))}")
        if name != "ppo" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{name} is {value!r}, but must be a number")
    inner = values.get("ppo", {})
    if not isinstance(inner, dict):
        raise UserError(f"ppo is {inner!r}, but must hold names and values")
    allowed = [f.name for f in fields(PPOSettings)]
    for name, value in inner.items():
        if name not in allowed:
            raise UserError(f"ppo: {name} is no setting of PPO: {', '.join(sorted(allowed))}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"ppo: {name} is {value!r}, but must be a number")
    return TrainingSettings(**{**values, "ppo": PPOSettings(**inner)})


def load_settings(path: Path) -> TrainingSettings:
    """Settings from a YAML file such as ``studies/policy.yaml``.

    Raises:
        UserError: no such file, not a mapping, or as ``settings_from``.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold names and values of training settings")
    return settings_from(values)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description="Train the policy of RLSampler.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--settings", type=Path, help="YAML file; the options below overrule it")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    for setting in fields(TrainingSettings):
        if setting.name != "ppo":
            kind = float if setting.name == "imitation_learning_rate" else int
            parser.add_argument(f"--{setting.name.replace('_', '-')}", type=kind)
    given = vars(parser.parse_args(arguments))
    output, minutes, file = given.pop("output"), given.pop("minutes"), given.pop("settings")
    settings = TrainingSettings() if file is None else load_settings(file)
    settings = replace(settings, **{k: v for k, v in given.items() if v is not None})

    def report(metrics: dict[str, float]) -> None:
        print(json.dumps({name: round(value, 4) for name, value in metrics.items()}), flush=True)

    print(train(output, settings, minutes=minutes, report=report))


if __name__ == "__main__":
    main()
