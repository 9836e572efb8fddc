"""The bandit baseline as an Optuna sampler: trials in, parameters out."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any
from typing import Literal

import numpy as np
from optuna.search_space import intersection_search_space
from optuna.trial import TrialState

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.policy.bandit import Bandit
from optuna_lora_rl.policy.bandit import rank_rewards
from optuna_lora_rl.policy.bandit import scalarise
from optuna_lora_rl.policy.levels import make_grid
from optuna_lora_rl.samplers import PROPOSAL_KEY
from optuna_lora_rl.samplers.arguments import checked_roles
from optuna_lora_rl.samplers.arguments import checked_seed
from optuna_lora_rl.samplers.arguments import fresh_seed
from optuna_lora_rl.samplers.cut_short import NotingSampler
from optuna_lora_rl.samplers.cut_short import with_evidence
from optuna_lora_rl.samplers.history import publish
from optuna_lora_rl.samplers.history import read_history
from optuna_lora_rl.samplers.history import space_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.policy.levels import Grid
    from optuna_lora_rl.samplers.history import History


class BanditSampler(NotingSampler):
    """Multi-armed bandits over discrete levels of each parameter.

    A continuous range is cut into levels: ranks, alphas and batch sizes into powers of two, other
    ranges into evenly spaced values (a learning rate in equal factors). A proposal is a pure
    function of the study's trials, the search space, the seed and the trial's number, so a study
    resumes in another process as if it had never stopped, and workers with one seed differ.

    Failed trials count as the worst (but for those that ended through no fault of their
    configuration, see :class:`RLSampler`), trials that violate constraints as worse than those
    that do not, pruned ones by their estimated final score. With several objectives each proposal
    weighs them at random. A configuration is not proposed twice as long as there are others.

    >>> import optuna
    >>> from optuna_lora_rl import BanditSampler
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> study = optuna.create_study(sampler=BanditSampler(seed=0))
    >>> study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2, n_trials=8)
    >>> study.best_value < 0.1
    True

    Args:
        seed: makes proposals reproducible; by default each sampler draws its own.
        algorithm: ``"thompson"`` (Gaussian Thompson sampling) or ``"ucb"`` (UCB1-Tuned; LinUCB
            when contextual).
        contextual: a linear model of levels and of pairs of levels of the main parameters
            (learning rate, rank, alpha, batch size), in place of independent arms.
        levels: how many levels a range gets; or by parameter name how many or which values, as in
            ``{"lora_rank": [4, 16, 64], "learning_rate": 9}``.
        exploration: factor on the width of what is unknown; 0 is greedy, 1 the textbook.
        roles: what a parameter is, by its name in the study, where it is not one of the usual
            names: ``{"my_r": "rank"}``.

    Raises:
        UserError: an argument is not one of those above; when a trial is asked, that no given
            level lies in the parameter's range.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        algorithm: Literal["thompson", "ucb"] = "thompson",
        contextual: bool = False,
        levels: int | Mapping[str, int | Sequence[Any]] | None = None,
        exploration: float = 1.0,
        roles: Mapping[str, str] | None = None,
    ) -> None:
        if algorithm not in ("thompson", "ucb"):
            raise UserError(f"algorithm is {algorithm!r}, but must be 'thompson' or 'ucb'")
        if not (math.isfinite(exploration) and exploration >= 0):
            raise UserError(f"exploration is {exploration!r}, but must be a number, at least 0")
        _check_levels(levels)
        self._seed = checked_seed(seed)
        self._algorithm: Literal["thompson", "ucb"] = algorithm
        self._contextual = contextual
        self._levels = levels
        self._exploration = exploration
        self._roles = checked_roles(roles)

    def reseed_rng(self) -> None:
        """Take a new seed. Optuna calls this where copies of the sampler work in parallel."""
        self._seed = fresh_seed()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The parameters that all finished trials have, with unchanged ranges.

        Before the first has finished those of the running ones, so that trials that start
        together already differ.
        """
        trials = with_evidence(study.get_trials(deepcopy=False))
        space = intersection_search_space(trials, include_pruned=True)
        if not any(other.state in (TrialState.COMPLETE, TrialState.PRUNED) for other in trials):
            space = _common(
                other.distributions
                for other in trials
                if other.state == TrialState.RUNNING and other.number != trial.number
            )
        return {name: space[name] for name in sorted(space) if not space[name].single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose all parameters together, and let other workers know at once."""
        if not search_space:
            return {}
        params, why = self._propose(study, trial, search_space, repeats=False)
        publish(study._storage, trial._trial_id, params)
        study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL_KEY, why)
        return params

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Propose a parameter that not every trial has, or whose range has changed."""
        space = {param_name: param_distribution}
        # Alone, a level may come again: the other parameters differ.
        params, why = self._propose(study, trial, space, repeats=True)
        if PROPOSAL_KEY not in trial.system_attrs:
            study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL_KEY, why)
        return params[param_name]

    def _propose(
        self,
        study: Study,
        trial: FrozenTrial,
        distributions: Mapping[str, BaseDistribution],
        *,
        repeats: bool,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        space = space_of(distributions, self._roles)
        try:
            grid = make_grid(space, self._levels)
        except ValueError as error:
            raise UserError(str(error)) from error
        history = read_history(
            study.get_trials(deepcopy=False), space, study.directions, current=trial.number
        )
        rng = self._random(history.turn, distributions)
        bandit = self._bandit(grid, history, rng, repeats=repeats)
        cell = bandit.propose(rng)
        params = space.decode(grid.points(cell[None, :])[0])
        return params, self._why(bandit, cell, params)

    def _bandit(
        self, grid: Grid, history: History, rng: np.random.Generator, *, repeats: bool
    ) -> Bandit:
        cells = grid.cells(history.points)
        played = history.scored | history.failed
        scored = history.scores[history.scored]
        values = np.zeros(len(history))
        if scored.shape[1] == 1:
            values[history.scored] = scored[:, 0]
        else:
            weights = rng.dirichlet(np.ones(scored.shape[1]))
            values[history.scored] = scalarise(scored, weights)
        ranks = rank_rewards(values[played], history.failed[played], history.violation[played])
        return Bandit(
            grid,
            cells[played],
            ranks,
            algorithm=self._algorithm,
            contextual=self._contextual,
            exploration=self._exploration,
            pending=cells[history.running],
            tried=None if repeats else cells[grid.exactly(history.points, cells)],
        )

    def _why(self, bandit: Bandit, cell: np.ndarray, params: Mapping[str, Any]) -> dict[str, Any]:
        """What the proposal rests on: for each level how often it was seen, and how it did."""
        seen = len(bandit.ranks)
        algorithm = f"linear-{self._algorithm}" if self._contextual else self._algorithm
        return {
            "source": algorithm if seen else "random",
            "trials_seen": seen,
            "levels": {
                name: {"value": params[name], "plays": plays, "mean_rank": round(mean, 3)}
                for name, (plays, mean) in zip(params, bandit.plays(cell), strict=True)
            },
        }

    def _random(self, turn: int, distributions: Mapping[str, BaseDistribution]) -> Any:
        # crc32, since Python's own hash of a text differs between processes.
        names = zlib.crc32("\n".join(sorted(distributions)).encode())
        return np.random.default_rng([self._seed, turn, names])


def _common(spaces: Iterable[dict[str, BaseDistribution]]) -> dict[str, BaseDistribution]:
    """What spaces have in common; those that nothing was asked for yet do not matter."""
    known = [space for space in spaces if space]
    return {
        name: distribution
        for name, distribution in (known[0] if known else {}).items()
        if all(space.get(name) == distribution for space in known)
    }


def _check_levels(levels: Any) -> None:
    named = levels if isinstance(levels, Mapping) else {"a range": levels}
    for name, wanted in named.items():
        if wanted is None and named is not levels:
            continue
        is_count = isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 2
        is_list = named is levels and isinstance(wanted, list | tuple) and len(wanted) > 0
        if not (is_count or is_list):
            allowed = "a whole number, at least 2" + (
                ", or a list of values" if named is levels else ", or a mapping of names to levels"
            )
            raise UserError(f"levels of {name} is {wanted!r}, but must be {allowed}")
