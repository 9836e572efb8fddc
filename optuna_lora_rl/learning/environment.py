"""Hyperparameter tuning as a reinforcement-learning environment.

State: the finished and running trials of a study. Action: the index of one of the candidates that
the policy's own step generates. Reward: the decrease of the log regret, floored near the noise, so
that nothing is paid for differences that no study could see. An episode is a study of ``length``
trials on one task. Trials can fail, break a constraint, be pruned, or end late (parallel workers).

Regret is 1 - best score so far (0 the best known configuration, 1 the median one), at least 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from optuna_lora_rl.learning.tasks import Task
from optuna_lora_rl.policy.candidates import Trials
from optuna_lora_rl.policy.candidates import randn
from optuna_lora_rl.policy.candidates import uniform_points
from optuna_lora_rl.policy.constraints import fit_feasibility
from optuna_lora_rl.policy.decision import Decision
from optuna_lora_rl.policy.decision import Settings
from optuna_lora_rl.policy.decision import decide
from optuna_lora_rl.policy.decision import fit_hyperparameters
from optuna_lora_rl.policy.network import Correction
from optuna_lora_rl.policy.network import Scorer
from optuna_lora_rl.policy.roles import ROLES
from optuna_lora_rl.policy.scores import standardise
from optuna_lora_rl.policy.scores import unit

# Cheaper than at work: the surrogate's fit starts from the last step's.
SETTINGS = Settings(candidates=64, rounds=2, steps=3, iterations=7, fit_rows=60)
# For a network that sees surfaces, the run and costs.
WIDE = replace(SETTINGS, bank=True, moves=1_000_000, wide=True)
_FIRST_ITERATIONS = 12
# Features of the truth that the critic sees: a task's, the regret so far and the trials left.
PRIVILEGED = 6
_PENDING = 3
_WORST = 3.0
# A pruner compares a trial with at least so many finished ones, by a curve that is less certain
# than the final score by so many deviations of the noise.
_JUDGES, _CURVE_NOISE = 4, 2.0
_LEARNING_RATE = ROLES.index("learning_rate")
# The first trials of a study, and the regret beyond which all are as bad.
_EARLY, _MEDIAN = 5, 1.5
# Units of score that the costs of a space differ by, as long as nobody can say.
_SPREAD = 0.2

# Applies a function to jobs, in their order: ``map``, or that of a pool of processes.
Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


class TuningEnvironment:
    """A study on a task.

    Args:
        task: the problem.
        length: trials an episode.
        generator: of all random numbers.
        settings: of the policy's step.
        lag: results arrive so many trials late (parallel workers), 0 to 3.
        horizon: what the policy is told about the length; 0 for nothing.
        pruning: whether poor trials are stopped early.
        linear: weight of the decrease of the regret itself in the reward of the first trials.
    """

    def __init__(
        self,
        task: Task,
        length: int,
        generator: torch.Generator,
        *,
        settings: Settings = SETTINGS,
        lag: int = 0,
        horizon: int = 0,
        pruning: bool = False,
        linear: float = 0.0,
    ) -> None:
        self.task, self.length, self.generator = task, length, generator
        self._settings, self._lag, self._horizon, self._pruning = settings, lag, horizon, pruning
        self._linear = linear
        self._x = np.zeros((length, len(task.space)))
        self._scores, self._excess = np.zeros(length), np.full(length, math.nan)
        self._failed, self._pruned = np.zeros(length, dtype=bool), np.zeros(length, dtype=bool)
        self.regret, self.steps = _WORST, 0
        self._theta: np.ndarray | None = None
        self._decision: Decision | None = None

    @property
    def done(self) -> bool:
        """Whether the episode is over."""
        return self.steps >= self.length

    @property
    def _seen(self) -> int:
        """How many trials have a result that has arrived."""
        return max(self.steps - self._lag, 0)

    def observe(self) -> Trials:
        """The trials as the policy sees them."""
        n = self._seen
        scores = self._scores[:n]
        if self.task.charges:
            scores = scores + self.task.cost(self._x[:n])
        return Trials(
            x=self._x[:n],
            y=standardise(scores, self._failed[:n]),
            failed=self._failed[:n],
            infeasible=self._excess[:n] > 0,
            pending=self._x[max(n, self.steps - _PENDING) : self.steps],
            horizon=self._horizon,
        )

    def _charge(self, trials: Trials) -> Callable[[np.ndarray], np.ndarray] | None:
        """What points are charged in units of the trials' ``y``; the trials get to know theirs."""
        task, n = self.task, self._seen
        if not task.charges:
            return None
        quality = self._scores[:n] + task.cost(trials.x)
        worth = unit(quality, trials.y, trials.failed)
        if worth is None:
            worth = max(float(np.ptp(task.cost(task.layout.sweep))), 1e-12) / _SPREAD
        trials.charged = task.cost(trials.x) / worth
        return lambda x: task.cost(x) / worth

    def decide(self, network: Correction | None) -> Decision:
        """Candidates and logits for the next step."""
        settings, task, trials = self._settings, self.task, self.observe()
        charge = self._charge(trials)
        if self._theta is None:
            settings = replace(settings, iterations=_FIRST_ITERATIONS)
        with np.errstate(all="ignore"):
            self._theta = fit_hyperparameters(task.layout, trials, settings, self._theta)
            told = self._excess[: self._seen, None]
            feasibility = fit_feasibility(task.layout, trials, told)
            self._decision = decide(
                task.layout,
                trials,
                network,
                task.space.snap,
                self.generator,
                settings,
                feasibility=feasibility,
                theta=self._theta,
                charge=charge,
            )
        return self._decision

    def step(self, action: int) -> float:
        """Run a candidate, for which ``decide`` must have been called; the reward."""
        assert self._decision is not None
        return self.run(self._decision.x[action])

    def run(self, x: np.ndarray) -> float:
        """Run a configuration x, shape (D,), whoever chose it; the reward."""
        task, t = self.task, self.steps
        (score,), (failed,) = task.score(x[None])
        excess = float(task.excess(x[None])[0])
        noise, doubt = task.noise * randn(2, generator=self.generator)
        seen = score + noise
        estimate = None if failed else self._prune(seen + _CURVE_NOISE * doubt)
        self._x[t], self._failed[t], self._excess[t] = x, failed, excess
        self._pruned[t] = estimate is not None
        self._scores[t] = seen if estimate is None else estimate
        self.steps, self._decision = t + 1, None
        void = failed or estimate is not None or excess > 0
        before, found = self.regret, _WORST if void else min(max(1.0 - score, 0.0), _WORST)
        self.regret = min(before, float(found))
        gain = math.log(before + task.floor) - math.log(self.regret + task.floor)
        if t < _EARLY:
            gain += self._linear * (min(before, _MEDIAN) - min(self.regret, _MEDIAN))
        return gain

    def _prune(self, judged: float) -> float | None:
        """The score that a median pruner leaves a trial that it stops; else ``None``.

        As at work (``samplers.history``) a pruned trial is given the final score that stands at
        its own quantile among the completed ones, so at most their median.
        """
        peers = slice(self._seen)
        finals = np.sort(self._scores[peers][~(self._failed[peers] | self._pruned[peers])])
        below = int((finals <= judged).sum())
        if not self._pruning or len(finals) < _JUDGES or 2 * below >= len(finals):
            return None
        return float(finals[max(below - 1, 0)])

    def privileged(self) -> np.ndarray:
        """What the critic sees of the truth while training, shape (PRIVILEGED,)."""
        regret, left = math.log(self.regret + self.task.floor), self.length - self.steps
        return np.append(self.task.truth, [regret, left / 20.0]).astype(np.float32)


def settings_of(network: Scorer | None) -> Settings:
    """As a network is trained."""
    return WIDE if network is not None and network.wide else SETTINGS


# Chooses the configuration of an opening trial, shape (D,), or leaves it to the policy.
Opening = Callable[[TuningEnvironment], np.ndarray | None]


def sweep_opening(environment: TuningEnvironment) -> np.ndarray | None:
    """An expert's sweep: three learning rates over the range, then two by what they said.

    The other parameters stand as in the guides' default. The first three are the quantiles .5,
    .25 and .75 of the range; then the best so far plus and minus an eighth of the range. Without
    a learning rate the policy begins.
    """
    t, task = environment.steps, environment.task
    column = task.layout.column[_LEARNING_RATE]
    if t >= 5 or column < 0:
        return None
    swept = task.layout.default.copy()
    if t < 3:
        swept[column] = (0.5, 0.25, 0.75)[t]
    else:
        trials = environment.observe()
        best = trials.x[trials.best_at or 0]
        # The fifth goes on where the fourth was better, and to the other side where it was worse.
        higher = t == 3 or int(trials.y.argmax()) == 3
        swept[column] = min(max(best[column] + (0.125 if higher else -0.125), 0.0), 1.0)
    return task.space.snap(swept)


def random_opening(environment: TuningEnvironment) -> np.ndarray | None:
    """Ten random configurations, as Optuna's Gaussian process and TPE start."""
    if environment.steps >= 10:
        return None
    space = environment.task.space
    return space.snap(uniform_points(1, len(space), environment.generator)[0])


def no_opening(environment: TuningEnvironment) -> np.ndarray | None:
    """The policy from the first trial on."""
    return None


OPENINGS: dict[str, Opening] = {
    "defaults_then_gp": no_opening,
    "sweep_then_gp": sweep_opening,
    "gp": random_opening,
}


def rollout_regret(
    tasks: Sequence[Task],
    length: int,
    network: Scorer | None,
    seed: int,
    *,
    opening: Opening = no_opening,
    settings: Settings | None = None,
    run: Map = map,
) -> np.ndarray:
    """Regret after each trial of one greedy study a task, shape (B, length).

    Args:
        tasks: the problems.
        length: trials a study.
        network: the learned scorer; ``None`` for the residual policy.
        seed: of candidates and noise; the same seed pairs policies.
        opening: makes the first choices.
        settings: of the policy's step; by default as the network was trained.
        run: applies a function to jobs.
    """
    settings = settings or settings_of(network)
    correction = None if network is None else Correction.of(network)
    study = partial(_greedy, length=length, network=correction, opening=opening, settings=settings)
    seeds = np.random.default_rng(seed).integers(2**62, size=len(tasks)).tolist()
    return np.stack(list(run(study, list(zip(tasks, seeds, strict=True)))))


def _greedy(
    job: tuple[Task, int],
    *,
    length: int,
    network: Correction | None,
    opening: Opening,
    settings: Settings,
) -> np.ndarray:
    """Regret after each trial of a study that takes the best candidates, shape (length,)."""
    task, seed = job
    generator = torch.Generator().manual_seed(seed)
    environment = TuningEnvironment(task, length, generator, settings=settings)
    regrets = np.zeros(length)
    for t in range(length):
        chosen = opening(environment)
        if chosen is None:
            environment.step(int(environment.decide(network).logits.argmax()))
        else:
            environment.run(chosen)
        regrets[t] = environment.regret
    return regrets
