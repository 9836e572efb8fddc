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

import numpy as np
import torch

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import counted
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.environment import PRIVILEGED
from optuna_lora_rl.learning.environment import Map
from optuna_lora_rl.learning.environment import rollout_regret
from optuna_lora_rl.learning.measured import ResponseSurface
from optuna_lora_rl.learning.own_studies import MIN_TRIALS
from optuna_lora_rl.learning.own_studies import surfaces_of
from optuna_lora_rl.learning.processes import processes as studies_in
from optuna_lora_rl.learning.rollouts import collect
from optuna_lora_rl.learning.tasks import Task
from optuna_lora_rl.learning.tasks import draw_tasks
from optuna_lora_rl.learning.updates import imitate
from optuna_lora_rl.learning.updates import reinforce
from optuna_lora_rl.learning.validation import bootstrap_interval
from optuna_lora_rl.learning.validation import log_regret
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
    processes: int = 1,
) -> Learnt:
    """Fine-tune a policy on studies and write its weights.

    Args:
        studies: finished ones, of LoRA spaces.
        output: file of the weights, ``.safetensors``.
        settings: of the run; the same studies and settings give the same weights.
        start: weights to start from; by default those shipped with the package.
        report: called with the metrics of every update.
        on_activity: told what takes its time, and how far it is.
        processes: that run imagined studies; the weights do not depend on it.

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

    with studies_in(processes) as run:
        chosen, kept, gains = _fine_tune(network, surfaces, settings, run, report, on_activity)
    mean, low, high = bootstrap_interval(gains.mean(1), settings.seed)
    notes = {
        "learnt_from": ", ".join(study.name for study in studies)[:500],
        "updates": f"{kept} of {settings.updates}",
        "gain": f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]",
    }
    weights.save(chosen, output, notes)
    return Learnt(output, kept, mean, low, high)


def _fine_tune(
    network: Scorer,
    surfaces: Sequence[ResponseSurface],
    settings: LearningSettings,
    run: Map,
    report: Callable[[dict[str, float]], None] | None,
    on_activity: OnActivity,
) -> tuple[Scorer, int, np.ndarray]:
    """The policy that is kept, its update, and its gains on fresh tasks, shape (B, K)."""
    on_activity(Activity("drawing tasks"))

    def tasks(share: float, part: int) -> list[Task]:
        count = max(round(share * settings.tasks), 8)
        drawn = draw_tasks(count, 3 * settings.seed + part, surfaces, _SHARE)
        # Those with the learning rates as the studies had them: where they lie is what is learnt.
        return [task for task in drawn if task.cut is None or task.cut.shift == 0.0]

    def log_regrets(of: Sequence[Task], policy: Scorer) -> np.ndarray:
        # Only tasks of the user's own count: what is to be gained is there.
        own = [task for task in of if task.cut is not None]
        return log_regret(rollout_regret(own, settings.trials, policy, settings.seed, run=run))

    learner, validation, fresh = (
        _Learner(network, tasks(1.0, 0), settings, run),
        tasks(_VALIDATION, 1),
        tasks(_REPORT, 2),
    )
    on_activity(Activity("running the policy that it starts from"))
    baseline = log_regrets(validation, network)
    best, kept, chosen = 0.0, 0, network
    for update in range(1, settings.updates + 1):
        on_activity(Activity("learning", update - 1, settings.updates, "updates"))
        metrics = learner.step()
        if update % _VALIDATE_EVERY == 0 or update == settings.updates:
            gain = float((baseline - log_regrets(validation, learner.network)).mean())
            metrics["validation_gain"] = gain
            if gain > best:
                best, kept, chosen = gain, update, copy.deepcopy(learner.network)
        if report is not None:
            report({"update": float(update), **metrics})
    on_activity(Activity("measuring what was gained"))
    return chosen, kept, log_regrets(fresh, network) - log_regrets(fresh, chosen)


class _Learner:
    """The policy under training, its critic and its place in the schedule."""

    def __init__(
        self, network: Scorer, pool: Sequence[Task], settings: LearningSettings, run: Map = map
    ) -> None:
        self._settings, self._pool, self._run, self._update = settings, pool, run, 0
        self._generator = torch.Generator().manual_seed(settings.seed)
        self.network = copy.deepcopy(network).requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self._critic = Critic(PRIVILEGED)
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
        rows = torch.randint(len(self._pool), (settings.studies,), generator=generator).tolist()
        length = _LENGTHS[int(torch.randint(len(_LENGTHS), (1,), generator=generator))]
        tasks = [self._pool[row] for row in rows]
        rollout = collect(tasks, length, self.network, self._critic, generator, run=self._run)
        learning = (
            self.network,
            self._critic,
            self._optimizer,
            rollout,
            settings.ppo,
            generator,
        )
        if self._update < settings.updates // 2:
            self._optimizer.param_groups[0]["lr"] = _IMITATION_RATE
            metrics = imitate(*learning, passes=1)
        else:
            left = 1.0 - self._update / settings.updates
            self._optimizer.param_groups[0]["lr"] = settings.ppo.learning_rate * left
            metrics = reinforce(*learning)
        self._update += 1
        return metrics | {"reward": float(rollout.rewards.sum(0).mean())}
