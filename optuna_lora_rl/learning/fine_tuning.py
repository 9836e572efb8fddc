"""Fine-tunes a policy on a user's own studies: tasks cut out of their surfaces, and PPO on them.

As in the first training, the policy first imitates a clairvoyant, while the critic, which begins
anew, learns beside it; then comes PPO. The policy that did best on validation tasks is kept; where
none beat the start, the start is what is written. What is reported is measured on further tasks
that chose nothing.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import counted
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.environment import rollout_regret
from optuna_lora_rl.learning.own_studies import MIN_TRIALS
from optuna_lora_rl.learning.own_studies import surfaces_of
from optuna_lora_rl.learning.rollouts import Rollout
from optuna_lora_rl.learning.rollouts import collect
from optuna_lora_rl.learning.rollouts import log_probabilities
from optuna_lora_rl.learning.rollouts import select
from optuna_lora_rl.learning.tasks import Tasks
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.learning.validation import bootstrap_interval
from optuna_lora_rl.learning.validation import log_regret
from optuna_lora_rl.policy import ppo
from optuna_lora_rl.policy import weights
from optuna_lora_rl.policy.network import Critic
from optuna_lora_rl.policy.network import Scorer
from optuna_lora_rl.policy.ppo import PPOSettings
from optuna_lora_rl.policy.transfer import SourceStudy
from optuna_lora_rl.samplers.transfer import source_study

if TYPE_CHECKING:
    from optuna.study import Study

# Surfaces drawn from each study, and the share of the LoRA tasks that are cut out of them: the
# rest are those of the first training, so that nothing else is forgotten.
_SURFACES, _SHARE = 6, 0.8
_VALIDATION, _REPORT = 0.4, 0.6
_LENGTHS = (8, 12, 16)
_IMITATION_RATE = 1e-3
_VALIDATE_EVERY = 4


@dataclass(frozen=True)
class LearningSettings:
    """What a run depends on besides the studies.

    Args:
        seed: of tasks, episodes and the critic's start.
        updates: rollouts that the policy learns from.
        studies: imagined studies a rollout.
        tasks: drawn for training; for validation and for the report a share of that besides.
        trials: of a validation study.
        ppo: hyperparameters.
    """

    seed: int = 0
    updates: int = 24
    studies: int = 48
    tasks: int = 200
    trials: int = 20
    ppo: PPOSettings = field(default_factory=lambda: PPOSettings(learning_rate=5e-4))


@dataclass(frozen=True)
class Learnt:
    """What a run found.

    Args:
        path: of the weights.
        kept: update whose policy was kept; 0 for the start.
        gain: log10 regret of the start less that of the kept policy, on tasks that chose
            nothing; a mean over tasks and numbers of trials.
        low: lower end of its 95% interval.
        high: upper end.
    """

    path: Path
    kept: int
    gain: float
    low: float
    high: float


def read(studies: Sequence[Study], *, all_wanted: bool) -> tuple[list[SourceStudy], list[str]]:
    """Studies as plain values, and the names of those left out for too few trials.

    Args:
        studies: of a storage.
        all_wanted: whether each of them was asked for, so that none may be left out.

    Raises:
        UserError: none is left.
    """
    sources = [source_study(study) for study in studies]
    enough = [source for source in sources if all_wanted or source.results >= MIN_TRIALS]
    if not enough:
        raise UserError(
            f"none of {len(studies)} studies has at least {MIN_TRIALS} trials with a result; run"
            " some first"
        )
    return enough, [source.name for source in sources if source not in enough]


def learn(
    studies: Sequence[SourceStudy],
    output: Path,
    settings: LearningSettings | None = None,
    *,
    start: Path | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
    on_activity: OnActivity = unseen,
) -> Learnt:
    """Fine-tune a policy on studies and write its weights.

    Args:
        studies: finished ones, of LoRA spaces.
        output: file of the weights, ``.safetensors``.
        settings: of the run; the same studies and settings give the same weights.
        start: weights to start from; by default those shipped with the package.
        report: called with the metrics of every update.
        on_activity: told what takes its time, and how far it is.

    Raises:
        UserError: a study has too few trials or does not look like LoRA, or the start cannot be
            read.
    """
    settings = settings or LearningSettings()
    if output.suffix != ".safetensors":
        raise UserError(f"output is {str(output)!r}, but must end in .safetensors")
    try:
        # Said now rather than after all the learning.
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output is {str(output)!r}, but cannot be written: {error}") from None
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"output is {str(output)!r}, but cannot be written there")
    network = weights.load(start)
    surfaces = [
        surface
        for number, study in enumerate(
            counted(studies, "fitting surrogates", "studies", on_activity)
        )
        for surface in surfaces_of(study, _SURFACES, settings.seed + number)
    ]

    on_activity(Activity("drawing tasks"))

    def tasks(share: float, part: int) -> Tasks:
        count = max(round(share * settings.tasks), 8)
        return _as_measured(draw_tasks(count, 3 * settings.seed + part, surfaces, _SHARE))

    run = _Run(network, tasks(1.0, 0), settings)
    # Only tasks of the user's own count: what is to be gained is there.
    validation, fresh = (_measured(tasks(n, p)) for n, p in ((_VALIDATION, 1), (_REPORT, 2)))
    on_activity(Activity("running the policy that it starts from"))
    baseline = _log_regret(validation, network, settings)
    best, kept, chosen = 0.0, 0, network
    for update in range(1, settings.updates + 1):
        on_activity(Activity("learning", update - 1, settings.updates, "updates"))
        metrics = run.step()
        if update % _VALIDATE_EVERY == 0 or update == settings.updates:
            mine = _log_regret(validation, run.network, settings)
            gain = float((baseline - mine).mean())
            metrics["validation_gain"] = gain
            if gain > best:
                best, kept, chosen = gain, update, copy.deepcopy(run.network)
        if report is not None:
            report({"update": float(update), **metrics})
    on_activity(Activity("measuring what was gained"))
    gains = _log_regret(fresh, network, settings) - _log_regret(fresh, chosen, settings)
    mean, low, high = bootstrap_interval(gains.mean(1).numpy(), settings.seed)
    notes = {
        "learnt_from": ", ".join(study.name for study in studies)[:500],
        "updates": f"{kept} of {settings.updates}",
        "gain": f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]",
    }
    weights.save(chosen, output, notes)
    return Learnt(output, kept, mean, low, high)


class _Run:
    """The policy under training, its critic and its place in the schedule."""

    def __init__(self, network: Scorer, pool: Tasks, settings: LearningSettings) -> None:
        self._settings, self._pool, self._update = settings, pool, 0
        self._generator = torch.Generator().manual_seed(settings.seed)
        self.network = copy.deepcopy(network).requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            # The environment adds the regret so far and the trials left to a task's truth.
            self._critic = Critic(pool.truth.shape[1] + 2)
        self._parameters = [*self.network.parameters(), *self._critic.parameters()]
        self._optimizer = torch.optim.Adam(
            [
                {"params": list(self.network.parameters()), "lr": 0.0},
                {"params": list(self._critic.parameters()), "lr": 1e-3},
            ],
            eps=1e-5,
        )

    def step(self) -> dict[str, float]:
        """One rollout and the update from it."""
        settings, generator = self._settings, self._generator
        rows = torch.randint(len(self._pool), (settings.studies,), generator=generator)
        pick = int(torch.randint(len(_LENGTHS), (1,), generator=generator))
        rollout = collect(self._pool[rows], _LENGTHS[pick], self.network, self._critic, generator)

        imitating = self._update < settings.updates // 2
        self._update += 1
        metrics = self._imitate(rollout) if imitating else self._reinforce(rollout)
        return metrics | {"reward": float(rollout.rewards.sum(0).mean())}

    def _imitate(self, rollout: Rollout) -> dict[str, float]:
        """Cross-entropy to the clairvoyant, and the critic to the returns seen on the way."""
        self._optimizer.param_groups[0]["lr"] = _IMITATION_RATE
        data, losses = rollout.transitions(self._settings.ppo), []
        scale = rollout.target.sum(1).mean().clamp_min(1e-6)
        order = torch.randperm(len(rollout), generator=self._generator)
        for rows in order.split(self._settings.ppo.minibatch_size):
            features = select(rollout.features, rows)
            log_p = log_probabilities(self.network, features, rollout.residual[rows], 1.0)
            finite = torch.where(features.valid, log_p, torch.zeros_like(log_p))
            imitation = -(rollout.target[rows] / scale * finite).sum(1).mean()
            value = self._critic(features, rollout.privileged[rows])
            loss = imitation + 0.5 * ((value - data.returns[rows]) ** 2).mean()
            self._optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimizer.step()
            losses.append(imitation.item())
        return {"imitation_loss": sum(losses) / len(losses)}

    def _reinforce(self, rollout: Rollout) -> dict[str, float]:
        settings = self._settings
        left = 1.0 - (self._update - 1) / settings.updates
        self._optimizer.param_groups[0]["lr"] = settings.ppo.learning_rate * left

        def evaluate(rows: Tensor) -> tuple[Tensor, Tensor]:
            features = select(rollout.features, rows)
            log_p = log_probabilities(self.network, features, rollout.residual[rows])
            return log_p, self._critic(features, rollout.privileged[rows])

        data = rollout.transitions(settings.ppo)
        return ppo.update(
            evaluate, self._parameters, self._optimizer, data, settings.ppo, self._generator
        )


def _as_measured(tasks: Tasks) -> Tasks:
    """Those with the learning rates as the studies had them: where they lie is what is learnt."""
    rows = [row for row, cut in enumerate(tasks.slices) if cut is None or cut.shift == 0.0]
    return tasks[torch.tensor(rows)]


def _measured(tasks: Tasks) -> Tasks:
    """Those of the tasks that are cut out of the studies."""
    rows = [row for row, cut in enumerate(tasks.slices) if cut is not None]
    return tasks[torch.tensor(rows)]


def _log_regret(tasks: Tasks, network: Scorer, settings: LearningSettings) -> Tensor:
    return log_regret(rollout_regret(tasks, settings.trials, network, settings.seed))
