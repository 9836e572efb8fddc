"""Hyperparameter tuning as a reinforcement-learning environment, many tasks in step.

State: the finished and running trials of a task. Action: the index of one of the candidates that
the policy's own step generates. Reward: the decrease of the log regret, floored near the noise, so
that nothing is paid for differences that no study could see. An episode is a study of ``length``
trials on one task. Trials can fail, break a constraint, be pruned, or end late (parallel workers).

Notations
    B         tasks in the batch, N candidates a step
    regret    1 - best score so far (0 the best known configuration, 1 the median one), >= 0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace

import torch
from torch import Tensor

from optuna_lora_rl.learning.tasks import Tasks
from optuna_lora_rl.policy.candidates import SOURCES
from optuna_lora_rl.policy.candidates import Observed
from optuna_lora_rl.policy.candidates import uniform_points
from optuna_lora_rl.policy.network import Scorer
from optuna_lora_rl.policy.proposal import Decision
from optuna_lora_rl.policy.proposal import Settings
from optuna_lora_rl.policy.proposal import decide
from optuna_lora_rl.policy.proposal import fit_feasibility
from optuna_lora_rl.policy.roles import ROLES
from optuna_lora_rl.policy.scores import standardise

# Cheaper than at work: the surrogate's fit starts from the last step's.
SETTINGS = Settings(candidates=64, rounds=2, steps=3, iterations=7, fit_rows=60)
_PENDING = 3
_WORST = 3.0
# A pruner compares a trial with at least so many finished ones, by a curve that is less certain
# than the final score by so many deviations of the noise.
_JUDGES, _CURVE_NOISE = 4, 2.0


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
        pruning: studies whose poor trials are stopped early, shape (B,).
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
        pruning: Tensor | None = None,
    ) -> None:
        B, D = len(tasks), tasks.layout.real.shape[1]
        none = torch.zeros(B, dtype=torch.long)
        self.tasks, self.length, self.generator = tasks, length, generator
        self._settings = settings
        self._lag = none if lag is None else lag
        self._horizon = none if horizon is None else horizon
        self._pruning = none.bool() if pruning is None else pruning
        self._x = torch.full((B, length, D), 0.5, dtype=torch.float64)
        self._scores = torch.zeros((B, length), dtype=torch.float64)
        self._excess = torch.full((B, length), torch.nan, dtype=torch.float64)
        self._failed = torch.zeros((B, length), dtype=torch.bool)
        self._pruned = torch.zeros((B, length), dtype=torch.bool)
        self.regret = torch.full((B,), _WORST, dtype=torch.float64)
        self.steps = 0
        self._theta: Tensor | None = None
        self._decision: Decision | None = None

    @property
    def done(self) -> bool:
        """Whether the episode is over."""
        return self.steps >= self.length

    def _seen(self) -> Tensor:
        """Trials whose result has arrived, shape (B, t)."""
        return torch.arange(self.steps)[None] + self._lag[:, None] < self.steps

    def observe(self) -> Observed:
        """The trials as the policy sees them."""
        t, seen = self.steps, self._seen()
        failed = self._failed[:, :t] & seen
        waiting = slice(max(0, t - _PENDING), t)
        some = bool(self._lag.any())
        return Observed(
            x=self._x[:, :t],
            y=standardise(self._scores[:, :t], seen & ~failed, failed),
            mask=seen,
            failed=failed,
            infeasible=(self._excess[:, :t] > 0) & seen,
            pending=self._x[:, waiting] if some else self._x[:, :0],
            pending_mask=~seen[:, waiting] if some else seen[:, :0],
            horizon=self._horizon,
        )

    def decide(self, network: Scorer | None) -> Decision:
        """Candidates and logits for the next step."""
        iterations = self._settings.iterations if self._theta is not None else 12
        settings = replace(self._settings, iterations=iterations)
        layout, observed = self.tasks.layout, self.observe()
        feasibility = None
        if self.steps and bool(self.tasks.constrained.any()):
            told = torch.where(self._seen(), self._excess[:, : self.steps], torch.nan)
            feasibility = fit_feasibility(layout, observed, told[:, :, None])
        decision = decide(
            layout,
            observed,
            network,
            layout.snap,
            self.generator,
            settings,
            feasibility=feasibility,
            start=self._theta,
        )
        self._theta, self._decision = decision.theta, decision
        return decision

    def step(self, action: Tensor) -> Transition:
        """Run the chosen candidates, shape (B,); ``decide`` must have been called."""
        assert self._decision is not None
        x = self._decision.candidates.x
        return self.run(x.gather(1, action[:, None, None].expand(-1, 1, x.shape[2]))[:, 0])

    def run(self, x: Tensor) -> Transition:
        """Run configurations x, shape (B, D), whoever chose them."""
        score, failed = (column[:, 0] for column in self.tasks.score(x[:, None]))
        excess = self.tasks.excess(x[:, None])[:, 0]
        draw = torch.randn((2, len(score)), generator=self.generator, dtype=torch.float64)
        t = self.steps
        seen = score + self.tasks.noise * draw[0]
        judged = seen + _CURVE_NOISE * self.tasks.noise * draw[1]
        pruned, estimate = self._prune(judged)
        pruned &= ~failed
        self._x[:, t], self._failed[:, t], self._excess[:, t] = x, failed, excess
        self._pruned[:, t] = pruned
        self._scores[:, t] = torch.where(pruned, estimate, seen)
        self.steps, self._decision = t + 1, None
        void = failed | pruned | (excess > 0)
        found = torch.where(void, _WORST, (1.0 - score).clamp(0.0, _WORST))
        regret = torch.minimum(self.regret, found)
        reward = (self.regret + self.tasks.floor).log() - (regret + self.tasks.floor).log()
        self.regret = regret
        return Transition(reward.float(), regret)

    def _prune(self, judged: Tensor) -> tuple[Tensor, Tensor]:
        """Which trials a median pruner stops, and the scores it leaves them, each (B,).

        As at work (``samplers.history``) a pruned trial is given the final score that stands at
        its own quantile among the completed ones, so at most their median.
        """
        t = self.steps
        peers = self._seen() & ~self._failed[:, :t] & ~self._pruned[:, :t]
        count = peers.sum(1)
        if not t or not bool((self._pruning & (count >= _JUDGES)).any()):
            return torch.zeros_like(judged, dtype=torch.bool), judged
        finals = torch.where(peers, self._scores[:, :t], torch.inf).sort(1).values
        below = (finals <= judged[:, None]).sum(1)
        stop = self._pruning & (count >= _JUDGES) & (2 * below < count)
        estimate = finals.gather(1, (below - 1).clamp_min(0)[:, None])[:, 0]
        return stop, estimate

    def privileged(self) -> Tensor:
        """What the critic sees of the truth while training, shape (B, P + 2)."""
        regret = (self.regret + self.tasks.floor).log().float()[:, None]
        left = torch.full_like(regret, (self.length - self.steps) / 20.0)
        return torch.cat([self.tasks.truth, regret, left], 1)


# Chooses the configurations of an opening trial, shape (B, D), or leaves it to the policy.
Opening = Callable[[TuningEnvironment], Tensor | None]


def sweep_opening(environment: TuningEnvironment) -> Tensor | None:
    """An expert's sweep: three learning rates over the range, then two by what they said.

    The other parameters stand as in the guides' default. The first three are the quantiles .5,
    .25 and .75 of the range; then the best so far plus and minus an eighth of the range.
    """
    t, layout = environment.steps, environment.tasks.layout
    role = ROLES.index("learning_rate")
    if t >= 5 or not bool(layout.has_role[:, role].any()):
        return None
    column = layout.role_column[:, role].clamp_min(0)[:, None]
    observed = environment.observe()
    best = layout.default if t < 3 else observed.best(1)[0][:, 0]
    middle = best.gather(1, column)
    place = torch.full_like(middle, (0.5, 0.25, 0.75)[t]) if t < 3 else middle
    if t >= 3:
        # The fifth goes on where the fourth was better, and to the other side where it was worse.
        higher = (observed.y.argmax(1)[:, None] == 3) | (t == 3)
        place = middle + torch.where(higher, 0.125, -0.125)
    swept = layout.default.scatter(1, column, place.clamp(0.0, 1.0))
    return layout.snap(
        torch.where(layout.has_role[:, role, None], swept, layout.default)[:, None]
    )[:, 0]


def random_opening(environment: TuningEnvironment) -> Tensor | None:
    """Ten random configurations, as Optuna's Gaussian process and TPE start."""
    if environment.steps >= 10:
        return None
    layout = environment.tasks.layout
    u = uniform_points(layout, 1, environment.generator)
    return layout.snap(torch.where(layout.real[:, None], u, 0.5))[:, 0]


def no_opening(environment: TuningEnvironment) -> Tensor | None:
    """The policy from the first trial on."""
    return None


OPENINGS: dict[str, Opening] = {
    "defaults_then_gp": no_opening,
    "sweep_then_gp": sweep_opening,
    "gp": random_opening,
}


def rollout_regret(
    tasks: Tasks,
    length: int,
    network: Scorer | None,
    seed: int,
    *,
    settings: Settings = SETTINGS,
    opening: Opening = no_opening,
    random: bool = False,
) -> Tensor:
    """Regret after each trial of one greedy study a task, shape (B, length).

    Args:
        tasks: the problems.
        length: trials a study.
        network: the learned scorer; ``None`` for the residual policy.
        seed: of candidates and noise; the same seed pairs policies.
        settings: of the policy's step.
        opening: makes the first choices.
        random: choose uniform configurations instead.
    """
    generator = torch.Generator().manual_seed(seed)
    environment = TuningEnvironment(tasks, length, generator, settings=settings)
    regrets = []
    with torch.no_grad():
        while not environment.done:
            chosen = opening(environment)
            if chosen is not None:
                regrets.append(environment.run(chosen).regret)
                continue
            decision = environment.decide(network)
            logits = decision.logits
            if random:
                uniform = decision.candidates.source == SOURCES.index("uniform")
                logits = torch.rand(logits.shape, generator=generator) - 9.0 * ~uniform[None]
            regrets.append(environment.step(logits.argmax(1)).regret)
    return torch.stack(regrets, 1)
