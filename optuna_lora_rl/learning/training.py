"""The training run: imitation of a clairvoyant, then PPO, with validation, checkpoints and a log.

    optuna-lora-rl train-policy studies/policy.yaml --output policy

Everything follows from the settings: the same settings give the same weights on the same machine
and library versions, also when the run was interrupted and started again. ``minutes`` ends a run
early and is the one thing that makes it depend on the machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from pickle import PickleError
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning import scaled_surfaces
from optuna_lora_rl.learning import table_surfaces
from optuna_lora_rl.learning import training_log
from optuna_lora_rl.learning.environment import PRIVILEGED
from optuna_lora_rl.learning.environment import Map
from optuna_lora_rl.learning.measured import ResponseSurface
from optuna_lora_rl.learning.processes import processes as studies_in
from optuna_lora_rl.learning.rollouts import collect
from optuna_lora_rl.learning.settings import TrainingSettings
from optuna_lora_rl.learning.tasks import Task
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.learning.training_log import TrainingLog
from optuna_lora_rl.learning.updates import imitate
from optuna_lora_rl.learning.updates import reinforce
from optuna_lora_rl.learning.validation import Validation
from optuna_lora_rl.learning.validation import balanced
from optuna_lora_rl.policy import weights
from optuna_lora_rl.policy.network import Critic
from optuna_lora_rl.policy.network import Scorer

# Trials of a validation study: while training, and in the report at the end.
_VALIDATED, _REPORTED = 20, 50
# Seeds of the pools lie apart, so that no task is in two of them.
_VALIDATION_SEED, _REPORT_SEED = 1_000_000, 2_000_000
_SAVE_EVERY = 5
_SMALL = 3
# Over a rollout, while imitating.
_PASSES = 2
_DECAY = 0.95


class Trainer:
    """One training run: its networks, its place in the schedule, its files.

    Args:
        settings: of the run.
        output: folder of checkpoint, log and weights.
        run: applies a function to jobs; studies are such jobs.
        on_activity: told what takes its time.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        output: Path,
        run: Map = map,
        on_activity: OnActivity = unseen,
    ) -> None:
        self.settings, self.output = settings, output
        self._run, self._on_activity = run, on_activity
        self._ppo = settings.ppo.settings()
        self.update = 0
        self.best: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.network = self._fresh_scorer()
            self.critic = Critic(PRIVILEGED, wide=settings.surfaces)
        parameters = [*self.network.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(
            parameters, lr=settings.imitation_learning_rate, eps=1e-5
        )
        # Judged and kept is the running mean of the weights over some twenty updates: a single
        # update moves what the policy does more than it improves it (Polyak & Juditsky 1992).
        self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(_DECAY))
        self.generator = torch.Generator().manual_seed(settings.seed)
        on_activity(Activity("drawing tasks"))
        self.pool = draw_tasks(
            settings.tasks,
            2 * settings.seed + 1,
            _measured("train", settings),
            settings.measured_share,
            contexts=settings.contexts,
            lora=settings.lora_share,
        )
        self.stages = _stages(self.pool)
        self.validation = self._validation(_VALIDATION_SEED, _VALIDATED)

    def _validation(self, seed: int, length: int) -> Validation:
        self._on_activity(Activity("drawing tasks"))
        tasks, seed = self._fresh(seed), self.settings.seed
        wide = self.settings.surfaces
        return Validation(tasks, length, seed, self._run, self._on_activity, wide)

    def _fresh(self, seed: int) -> list[Task]:
        """Tasks apart from the training tasks, of the validation families where measured."""
        settings = self.settings
        surfaces, count = _measured("validation", settings), settings.validation_tasks
        drawn = draw_tasks(
            2 * count,
            seed + 2 * settings.seed,
            surfaces,
            settings.measured_share,
            contexts=settings.contexts,
            lora=settings.lora_share,
        )
        return balanced(drawn, count)

    def _tell(self, detail: str) -> None:
        done, of = self.update, self.settings.updates
        self._on_activity(Activity("training", done, of, "updates", detail))

    def step(self) -> dict[str, float]:
        """One rollout and the update from it."""
        settings, generator = self.settings, self.generator
        imitating = self.update < settings.imitation_updates
        self._tell("imitation" if imitating else "PPO")
        first = self.update < settings.curriculum_updates
        stage = "first" if first else self._draw_stage()
        length = settings.lengths[
            int(torch.randint(len(settings.lengths), (1,), generator=generator))
        ]
        batch = max(2, settings.transitions // length)
        # The process of the constraint costs as much again as that of the score.
        batch = max(2, batch // 2) if stage == "constrained" else batch
        tasks = self.stages[stage]
        chosen = torch.randint(len(tasks), (batch,), generator=generator).tolist()
        rollout = collect(
            [tasks[row] for row in chosen],
            length,
            self.network,
            self.critic,
            generator,
            plain=first,
            teaching=settings.teaching,
            run=self._run,
        )
        learning = (self.network, self.critic, self.optimizer, rollout, self._ppo, generator)
        if imitating:
            done = self.update / settings.imitation_updates
            self._set_learning_rate(settings.imitation_learning_rate * (1.0 - 0.9 * done))
            metrics = imitate(*learning, passes=_PASSES)
        else:
            done = (self.update - settings.imitation_updates) / max(settings.ppo_updates, 1)
            self._set_learning_rate(self._ppo.learning_rate * (1.0 - done))
            metrics = reinforce(*learning)
        self.update += 1
        self.average.update_parameters(self.network)
        return metrics | {
            "reward": float(rollout.rewards.sum(0).mean()),
            "regret": float(rollout.regret.mean()),
            "length": float(length),
        }

    def _draw_stage(self) -> str:
        """Constrained tasks come as often as the pool has them, but by themselves."""
        share = len(self.stages["constrained"]) / len(self.pool)
        draw = float(torch.rand(1, generator=self.generator))
        return "constrained" if draw < share else "all"

    def _set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def validate(self) -> dict[str, float]:
        """Judge the mean network on the validation tasks, and keep the best of each phase."""
        self._tell("validating")
        network = self.average.module
        assert isinstance(network, Scorer)
        metrics = self.validation.compare(network)
        mean = metrics["validation_gain"]
        phase = "imitation" if self.update <= self.settings.imitation_updates else "ppo"
        if mean > self.best.get(phase, {"score": 0.0})["score"]:
            state = {k: v.clone() for k, v in network.state_dict().items()}
            self.best[phase] = {"score": mean, "update": self.update, "network": state}
            self.export(network, f"{phase}.safetensors", {"validation_gain": f"{mean:.4f}"})
        return metrics

    def finish(self) -> Path:
        """Write the run's weights: what does best on the validation tasks.

        That is the best network of a phase, or the mean of the two, which often generalises
        better than either (Izmailov et al. 2018). Where nothing beat the start, the start is what
        is written.
        """
        self._on_activity(Activity("choosing the weights"))
        found = {
            phase: (best["score"], best["network"], f"best at update {best['update']}")
            for phase, best in self.best.items()
        }
        if len(found) == 2:
            states = [state for _, state, _ in found.values()]
            state = {k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]}
            score = self.validation.compare(self._scorer(state))["validation_gain"]
            found["mean"] = (score, state, "mean of the phases' best")
        notes = {name: f"{note}, validation gain {s:.4f}" for name, (s, _, note) in found.items()}
        if not found:
            return self.export(self._fresh_scorer(), "weights.safetensors", notes)
        chosen = max(found, key=lambda name: found[name][0])
        network = self._scorer(found[chosen][1])
        return self.export(network, "weights.safetensors", {"chosen": chosen, **notes})

    def _scorer(self, state: dict[str, Tensor]) -> Scorer:
        network = self._fresh_scorer()
        network.load_state_dict(state)
        return network

    def _fresh_scorer(self) -> Scorer:
        return Scorer(self.settings.width, wide=self.settings.surfaces)

    def report(self) -> str:
        """Regret of the run's networks beside their opponents, on tasks that chose nothing."""
        networks = {
            name: weights.load(self.output / f"{name}.safetensors")
            for name in ("weights", "ppo", "imitation")
            if (self.output / f"{name}.safetensors").is_file()
        }
        fresh = self._validation(_REPORT_SEED, _REPORTED)
        self._on_activity(Activity("measuring for the report"))
        text = fresh.table(networks)
        (self.output / "report.md").write_text(text)
        return text

    def export(self, network: Scorer, name: str, notes: dict[str, str]) -> Path:
        """Write a network to a file of the run's folder."""
        origin = {"settings": self.settings.model_dump_json(), "update": str(self.update)}
        weights.save(network, self.output / name, {**origin, **notes})
        return self.output / name

    def save(self) -> None:
        """Write a checkpoint from which the same run goes on."""
        state = {
            "settings": self.settings.model_dump_json(),
            "update": self.update,
            "best": self.best,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        partial = self.output / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.output / "checkpoint.pt")

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of this run."""
        self.update, self.best = state["update"], state["best"]
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])


def _measured(split: str, settings: TrainingSettings) -> list[ResponseSurface]:
    """The surfaces of a split that tasks are cut out of."""
    scaled = scaled_surfaces.load(split) if settings.scaled else []
    return [*table_surfaces.load(split), *scaled]


def _stages(pool: Sequence[Task]) -> dict[str, Sequence[Task]]:
    """The pool by stage of the curriculum: first, all, and the constrained apart."""
    free = [task for task in pool if not task.constrained] or pool
    few = [task for task in free if len(task.space) <= _SMALL and not task.constrained] or free
    return {"first": few, "all": free, "constrained": [task for task in pool if task.constrained]}


def _checkpoint(output: Path, settings: TrainingSettings) -> dict[str, Any] | None:
    """What the folder's checkpoint holds, before any work is done for it."""
    file = output / "checkpoint.pt"
    if not file.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True)
        known = state["settings"]
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError, PickleError):
        raise UserError(
            f"output: {file} is damaged or no checkpoint; delete it to begin anew"
        ) from None
    if known != settings.model_dump_json():
        raise UserError(
            f"output: {file} belongs to a run with other settings; choose another folder"
        )
    return state


def train(
    output: Path,
    settings: TrainingSettings | None = None,
    *,
    minutes: float | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
    on_activity: OnActivity = unseen,
    processes: int = 1,
) -> Path:
    """Train a policy and return the file of its weights.

    Args:
        output: folder for ``weights.safetensors``, the best of each phase on the validation tasks
            (``imitation.safetensors``, ``ppo.safetensors``), ``checkpoint.pt``, the log
            (``metrics.jsonl``, ``tensorboard/``, ``training.html``) and, at the end of the
            schedule, ``report.md``; a run in it is continued.
        settings: of the run.
        minutes: stop after so long, at the next update; the run can be continued.
        report: called with the metrics of every update.
        on_activity: told what takes its time, and how far it is.
        processes: that run studies; the weights do not depend on it. With more than one, the
            calling script has to guard its entry point, as for every use of multiprocessing.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    output.mkdir(parents=True, exist_ok=True)
    settings = settings or TrainingSettings()
    state = _checkpoint(output, settings)
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    with studies_in(processes) as run:
        trainer = Trainer(settings, output, run, on_activity)
        if state is not None:
            trainer.restore(state)
        _updates(trainer, until, report)
        training_log.draw(output)
        path = trainer.finish()
        if trainer.update >= settings.updates:
            trainer.report()
    return path


def _updates(
    trainer: Trainer, until: float, report: Callable[[dict[str, float]], None] | None
) -> None:
    """Updates to the end of the schedule, or to a time."""
    settings, log = trainer.settings, TrainingLog(trainer.output, trainer.update)
    while trainer.update < settings.updates:
        metrics = trainer.step()
        phase_ends = trainer.update in (settings.imitation_updates, settings.updates)
        if trainer.update % settings.validate_every == 0 or phase_ends:
            metrics |= trainer.validate()
        log.write({"update": trainer.update, **metrics})
        if report is not None:
            report({"update": trainer.update, **metrics})
        late = time.monotonic() > until
        if trainer.update % _SAVE_EVERY == 0 or phase_ends or late:
            trainer.save()
        if late:
            break
    log.close()
