"""Hyperparameter tuning as a reinforcement-learning environment, many tasks in step.

State: the finished and running trials of a task. Action: the index of one of the candidates that
the policy's own step generates. Reward: the decrease of the log regret, floored near the noise, so
that nothing is paid for differences that no study could see. An episode is a study of ``length``
trials on one task.

Notations
    B         tasks in the batch, N candidates a step
    regret    1 - best score so far (0 the best known configuration, 1 the median one), >= 0
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace

import torch
from torch import Tensor

from optuna_lora_rl.learning.tasks import Tasks
from optuna_lora_rl.policy.candidates import Observed
from optuna_lora_rl.policy.network import Scorer
from optuna_lora_rl.policy.proposal import Decision
from optuna_lora_rl.policy.proposal import Settings
from optuna_lora_rl.policy.proposal import decide
from optuna_lora_rl.policy.scores import standardise

# Cheaper than at work: the surrogate's fit starts from the last step's.
SETTINGS = Settings(candidates=64, rounds=2, iterations=7, fit_rows=60)
_PENDING = 3
_WORST = 3.0


@dataclass
class Transition:
    """What a step returned, each of shape (B,)."""

    reward: Tensor
    regret: Tensor


class TuningEnvironment:
    """A batch of studies, one a task, that all take their steps together.

    Args:
        tasks: the problems.
        length: trials an episode.
        generator: of all random numbers.
        settings: of the policy's step.
        lag: results arrive so many trials late, shape (B,) (parallel workers); 0 to 3.
        horizon: what the policy is told about the length, shape (B,); 0 for nothing.
    """

    def __init__(
        self,
        tasks: Tasks,
        length: int,
        generator: torch.Generator,
        *,
        settings: Settings = SETTINGS,
        lag: Tensor | None = None,
        horizon: Tensor | None = None,
    ) -> None:
        B, D = len(tasks), tasks.layout.real.shape[1]
        self.tasks, self.length, self.generator = tasks, length, generator
        self._settings = settings
        self._lag = torch.zeros(B, dtype=torch.long) if lag is None else lag
        self._horizon = torch.zeros(B, dtype=torch.long) if horizon is None else horizon
        self._x = torch.full((B, length, D), 0.5, dtype=torch.float64)
        self._scores = torch.zeros((B, length), dtype=torch.float64)
        self._failed = torch.zeros((B, length), dtype=torch.bool)
        self.regret = torch.full((B,), _WORST, dtype=torch.float64)
        self.steps = 0
        self._theta: Tensor | None = None
        self._decision: Decision | None = None

    @property
    def done(self) -> bool:
        """Whether the episode is over."""
        return self.steps >= self.length

    def observe(self) -> Observed:
        """The trials as the policy sees them."""
        t = self.steps
        arrives = torch.arange(t)[None] + self._lag[:, None]
        seen = arrives < t if t else torch.zeros((len(self._lag), 0), dtype=torch.bool)
        failed = self._failed[:, :t] & seen
        waiting = slice(max(0, t - _PENDING), t)
        some = bool(self._lag.any())
        return Observed(
            x=self._x[:, :t],
            y=standardise(self._scores[:, :t], seen & ~failed, failed),
            mask=seen,
            failed=failed,
            infeasible=torch.zeros_like(failed),
            pending=self._x[:, waiting] if some else self._x[:, :0],
            pending_mask=~seen[:, waiting] if some else seen[:, :0],
            horizon=self._horizon,
        )

    def decide(self, network: Scorer | None) -> Decision:
        """Candidates and logits for the next step."""
        iterations = self._settings.iterations if self._theta is not None else 12
        settings = replace(self._settings, iterations=iterations)
        layout = self.tasks.layout
        decision = decide(
            layout,
            self.observe(),
            network,
            layout.snap,
            self.generator,
            settings,
            start=self._theta,
        )
        fitted = decision.surrogate
        self._theta = torch.cat([fitted.log_l, fitted.log_s[:, None], fitted.log_v[:, None]], 1)
        self._decision = decision
        return decision

    def step(self, action: Tensor) -> Transition:
        """Run the chosen candidates, shape (B,); ``decide`` must have been called."""
        assert self._decision is not None
        x = self._decision.candidates.x
        chosen = x.gather(1, action[:, None, None].expand(-1, 1, x.shape[2]))
        score, failed = self.tasks.score(chosen)
        draw = torch.randn(len(score), generator=self.generator, dtype=torch.float64)
        t = self.steps
        self._x[:, t] = chosen[:, 0]
        self._scores[:, t] = score[:, 0] + self.tasks.noise * draw
        self._failed[:, t] = failed[:, 0]
        self.steps, self._decision = t + 1, None
        found = torch.where(failed[:, 0], _WORST, (1.0 - score[:, 0]).clamp(0.0, _WORST))
        regret = torch.minimum(self.regret, found)
        reward = (self.regret + self.tasks.floor).log() - (regret + self.tasks.floor).log()
        self.regret = regret
        return Transition(reward.float(), regret)

    def privileged(self) -> Tensor:
        """What the critic sees of the truth while training, shape (B, P + 2)."""
        regret = (self.regret + self.tasks.floor).log().float()[:, None]
        left = torch.full_like(regret, (self.length - self.steps) / 20.0)
        return torch.cat([self.tasks.truth, regret, left], 1)


def rollout_regret(
    tasks: Tasks,
    length: int,
    network: Scorer | None,
    seed: int,
    *,
    settings: Settings = SETTINGS,
    random: bool = False,
) -> Tensor:
    """Regret after each trial of one greedy study a task, shape (B, length).

    Args:
        tasks: the problems.
        length: trials a study.
        network: the learned scorer; ``None`` for the residual policy.
        seed: of candidates and noise; the same seed pairs policies.
        settings: of the policy's step.
        random: choose uniform configurations instead.
    """
    generator = torch.Generator().manual_seed(seed)
    environment = TuningEnvironment(tasks, length, generator, settings=settings)
    regrets = []
    with torch.no_grad():
        while not environment.done:
            decision = environment.decide(network)
            logits = decision.logits
            if random:
                uniform = decision.candidates.source == 3
                logits = torch.rand(logits.shape, generator=generator) - 9.0 * ~uniform[None]
            regrets.append(environment.step(logits.argmax(1)).regret)
    return torch.stack(regrets, 1)
