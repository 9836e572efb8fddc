"""The learned sampler: a thin Optuna adapter over :mod:`optuna_lora_rl.policy`."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple

import numpy as np
import torch
from optuna.study import StudyDirection
from optuna.trial import TrialState

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.policy import weights as weight_files
from optuna_lora_rl.policy.conditions import settle
from optuna_lora_rl.policy.constraints import fit_feasibility
from optuna_lora_rl.policy.context import TuningContext
from optuna_lora_rl.policy.decision import BANKED
from optuna_lora_rl.policy.decision import Decision
from optuna_lora_rl.policy.decision import Settings
from optuna_lora_rl.policy.decision import decide
from optuna_lora_rl.policy.decision import draw_parameter
from optuna_lora_rl.policy.decision import fit_hyperparameters
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.network import Correction
from optuna_lora_rl.samplers import PROPOSAL_KEY
from optuna_lora_rl.samplers import is_whole
from optuna_lora_rl.samplers.adaptation import Adaptation
from optuna_lora_rl.samplers.arguments import checked_roles
from optuna_lora_rl.samplers.arguments import checked_seed
from optuna_lora_rl.samplers.arguments import fresh_seed
from optuna_lora_rl.samplers.cut_short import NotingSampler
from optuna_lora_rl.samplers.cut_short import cut_short
from optuna_lora_rl.samplers.cut_short import turn_of
from optuna_lora_rl.samplers.cut_short import with_evidence
from optuna_lora_rl.samplers.history import History
from optuna_lora_rl.samplers.history import Ledger
from optuna_lora_rl.samplers.history import is_taken
from optuna_lora_rl.samplers.history import publish
from optuna_lora_rl.samplers.history import space_of
from optuna_lora_rl.samplers.known_cost import Cost
from optuna_lora_rl.samplers.known_cost import KnownCost
from optuna_lora_rl.samplers.memory import Memo
from optuna_lora_rl.samplers.memory import UnionSpace
from optuna_lora_rl.samplers.memory import milestone
from optuna_lora_rl.samplers.observation import Costs
from optuna_lora_rl.samplers.observation import before_costs
from optuna_lora_rl.samplers.observation import charge_of
from optuna_lora_rl.samplers.observation import conditions_of
from optuna_lora_rl.samplers.observation import constraints_of
from optuna_lora_rl.samplers.observation import objective_weights
from optuna_lora_rl.samplers.observation import observe
from optuna_lora_rl.samplers.observation import recent_and_best
from optuna_lora_rl.samplers.observation import units_of
from optuna_lora_rl.samplers.stored_context import StoredContext
from optuna_lora_rl.samplers.transfer import EarlierStudies

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.policy.dimensions import Space
    from optuna_lora_rl.policy.network import Scorer

# How many trials a study will have, from those that it has.
Lasts = Callable[[Sequence["FrozenTrial"]], "int | None"]
_MAX_GRID = 1024
# A fit to few trials comes close to its end within a few steps; one to many has to take more, and
# is seldom made.
_FEW_TRIALS, _FEW_ITERATIONS, _MANY_ITERATIONS = 20, 20, 60
# Thoughts that a proposal may take where other workers keep having the same.
_ATTEMPTS = 16


class _Known(NamedTuple):
    """What a study knows beside its trials: see ``context``, ``cost`` and ``n_trials``."""

    tuning: TuningContext | None
    costs: Costs | None
    horizon: int | None


class RLSampler(NotingSampler):
    """Proposes configurations by a policy trained, by reinforcement learning, to tune LoRA runs.

    Each proposal scores a few hundred candidates (the guides' defaults, a sweep of the learning
    rate, draws from a prior, quasi-random points, changes of the best trials, maxima of the
    expected improvement) by a Gaussian process, a prior over what the parameters do in a LoRA
    run, and a network. Parameters are recognised by their usual names (``learning_rate``, ``lr``,
    ``r``, ``lora_rank``, ``lora_alpha``, ...). Prior and network speak in a LoRA study: one with a
    name that says LoRA, a rank (or a ratio of alpha to it) and another known parameter, or target
    modules and a learning rate. Elsewhere the sampler is a Gaussian process with expected
    improvement, whatever a single parameter is called.

    It takes every search space (floats, integers, logarithmic, stepped, categorical,
    conditional), one or several objectives, constraints (``trial.set_constraint``), and learns
    from pruned, failed, running, enqueued and added trials. A proposal is a pure function of the
    study's trials, the space, the weights, the seed and the trial's number: what is kept between
    calls only saves time, so studies resume and distribute without further state.

    A trial that fails counts against its configuration, unless it is known to be no fault of it:
    ``Study.optimize`` was interrupted or its process was killed (on this machine, or as a storage
    with a heartbeat finds), or a package, the network or room on the disk was missing. Such trials
    count as if they had never been, their numbers too; the same configuration killed or failed
    so a second time counts.

    >>> import optuna
    >>> from optuna_lora_rl import RLSampler
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> def objective(trial):
    ...     lr = trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    ...     rank = trial.suggest_int("lora_rank", 4, 128, log=True)
    ...     return abs(lr / 4e-4 - 1) + 1 / rank
    >>> study = optuna.create_study(sampler=RLSampler(seed=0))
    >>> study.optimize(objective, n_trials=12)
    >>> study.best_value < 0.3
    True

    Args:
        seed: makes proposals reproducible; by default each sampler draws its own.
        n_trials: how many trials the study will have, as a hint for the policy; it may be wrong.
        roles: what a parameter is, by its name in the study, where its name is not one of the
            usual ones: ``{"my_r": "rank", "alpha": "none"}``.
        weights: a file written by ``optuna-lora-rl train-policy``; by default the policy that is
            shipped with the package.
        learned: ``False`` switches the network off. In a LoRA space a posterior over response
            surfaces then chooses the first ten trials, the guides' defaults at the learning rate
            that the range speaks for to begin with; everything else is left to a Gaussian process.
        n_candidates: about how many candidates each proposal scores.
        source_studies: earlier studies to start from, in any storage: Optuna studies, or lists of
            their trials (whose directions are then taken to be those of the new study). Other
            parameters, ranges, scales and metrics are fine; each needs at least three trials with
            a result. They are read once, here. One that misleads is dropped within a few trials.
        adapt: ``True`` lets the policy learn from the study itself: small, bounded PPO updates
            after 8, 16, 32 and 64 finished trials, computed from the trials alone. Workers agree
            on them where they have the same seed. The network then speaks in every space.
        context: what is known of the model, the data and the run before the first trial:
            ``TuningContext.of(model, examples=5000)``. The learning rates, ranks and dropouts that
            it begins with follow from it. It is stored with the study, so that a sampler without
            one, in another worker or later, has the same. A study with a context is a LoRA study.
        cost: what a configuration's score is charged, as a function of its parameters by name:
            where the score is quality minus cost, that cost; where a loss plus cost is minimised,
            that cost, too. Then only the quality has to be learnt. It is asked for hundreds of
            configurations at each proposal, and should depend on nothing but the parameters. For
            one objective.

    Raises:
        UserError: an argument is not one of those above, or the weights are missing or made for
            another version. When a trial is asked: ``cost`` raised an error or gave no number, or
            the study has several objectives.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        n_trials: int | None = None,
        roles: Mapping[str, str] | None = None,
        weights: str | Path | None = None,
        learned: bool = True,
        n_candidates: int = 256,
        source_studies: Sequence[Study | Sequence[FrozenTrial]] = (),
        adapt: bool = False,
        context: TuningContext | None = None,
        cost: Cost | None = None,
    ) -> None:
        if adapt not in (True, False):
            raise UserError(f"adapt is {adapt!r}, but must be True or False")
        if adapt and not learned:
            raise UserError("adapt is True, but learned is False, so that there is no policy")
        if context is not None and not isinstance(context, TuningContext):
            raise UserError(f"context is {context!r}, but must be a TuningContext")
        if n_trials is not None and not (is_whole(n_trials) and n_trials >= 1):
            raise UserError(f"n_trials is {n_trials!r}, but must be a whole number, at least 1")
        if not (is_whole(n_candidates) and n_candidates >= 16):
            raise UserError(
                f"n_candidates is {n_candidates!r}, but must be a whole number, at least 16"
            )
        self._seed = checked_seed(seed)
        self._n_trials = n_trials
        self._roles = checked_roles(roles)
        self._network = weight_files.load(weights) if learned else None
        # A network that was trained without the bank is worse with it.
        wide = self._network is not None and self._network.wide
        self._settings = Settings(
            candidates=n_candidates,
            bank=wide or not learned,
            moves=BANKED if wide else 0,
            wide=wide,
        )
        self._lasts: Lasts | None = None
        self._context = StoredContext(context)
        self._cost = None if cost is None else KnownCost(cost)
        self._earlier = EarlierStudies(source_studies, self._roles)
        # It keeps the first seed: reseeding for every thread would undo what was learnt.
        network, seed = self._network, self._seed
        self._adaptation = Adaptation(network, seed) if adapt and network is not None else None
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._union = UnionSpace()
        self._ledger = Ledger()
        self._spaces: Memo[Space] = Memo()
        self._layouts: Memo[Layout] = Memo()
        self._fits: Memo[np.ndarray] = Memo()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_lock", "_union", "_ledger", "_spaces", "_layouts", "_fits"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def charge(self, cost: Cost) -> None:
        """Tell what a configuration's score is charged; as the argument ``cost``."""
        self._cost = KnownCost(cost)

    def lasts(self, trials_in_all: Lasts) -> None:
        """Tell how many trials the study will have, by what its trials have used of a budget."""
        self._lasts = trials_in_all

    def reseed_rng(self) -> None:
        """Take a new seed. Optuna calls this where copies of the sampler work in parallel."""
        with self._lock:
            self._seed = fresh_seed()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All parameters that trials have had, conditional ones too, with their latest ranges.

        A conditional parameter that the objective then does not ask for is simply not used. The
        parameters of running trials count, so that workers that start together already differ.
        """
        trials = with_evidence(study.get_trials(deepcopy=False))
        space = self._union.read(trials, trial.number)
        return {name: range_ for name, range_ in space.items() if not range_.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose all parameters together, and let other workers know at once."""
        if not search_space:
            return {}
        # By what is written, not by what is equal: 0 is False, but must not become it.
        tuning = self._context.of(study)
        said = self._earlier.are_lora or tuning is not None
        space = self._spaces.get(
            (repr(search_space), said), lambda: space_of(search_space, self._roles, said=said)
        )
        costs = self._cost.of(study, space) if self._cost else None
        with self._lock:
            seed = self._seed
        for attempt in range(_ATTEMPTS):
            trials = study.get_trials(deepcopy=False)
            horizon = self._lasts(trials) if self._lasts else self._n_trials
            known = _Known(tuning, costs, horizon)
            # A conditional parameter that was proposed and not asked for counts as tried:
            # otherwise the surrogate would take it for unexplored, and propose it without end.
            history = self._ledger.read(
                trials, space, study.directions, current=trial.number, unused=True
            )
            generator = _generator(seed, history.turn, space.names + ("again",) * attempt)
            with on_cpu(), np.errstate(all="ignore"):
                decision, units = self._think(space, history, study.directions, generator, known)
            # What another worker took it would also have had for second best: so drawn.
            point, why = _chosen(decision, units, generator if attempt else None)
            params = space.decode(point)
            begun = (history.unfinished, len(trials))
            # Another worker may have had the same thought meanwhile. Whoever finds it published
            # thinks again; of two that publish at once, both do: neither can know whether the
            # other looked before or after.
            last = attempt == _ATTEMPTS - 1
            if not last and is_taken(params, trial.number, study, begun):
                continue
            publish(study._storage, trial._trial_id, params)
            if last or not is_taken(params, trial.number, study, begun):
                break
        study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL_KEY, why)
        return params

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Propose one parameter that no earlier trial has had in this range.

        The study's first trial takes the guides' value (alpha by the rank that the trial has
        already chosen) or the middle of the range; otherwise a draw from the prior.
        """
        with self._lock:
            seed = self._seed
        trials = study.get_trials(deepcopy=False)
        turn, trials = turn_of(trial.number, cut_short(trials)), with_evidence(trials)
        # All that the study has asked for so far says whether it is a LoRA one.
        asked = {**self._union.read(trials, trial.number), **trial.distributions}
        asked = {k: v for k, v in asked.items() if not v.single()}
        tuning = self._context.of(study)
        said = self._earlier.are_lora or tuning is not None
        space = space_of({**asked, param_name: param_distribution}, self._roles, said=said)
        generator = _generator(seed, turn, (param_name,))
        # A trial that another worker has just begun may not have chosen anything yet.
        first = turn == 0 or not any(
            t.number < trial.number and (t.distributions or t.state == TrialState.RUNNING)
            for t in trials
        )
        column = space.names.index(param_name)
        given = space.encode(trial.params)
        source = "default" if first else "prior"
        with on_cpu():
            opening = self._earlier.opening(space, column, study.directions) if first else None
            if opening is not None:
                coordinate, source = opening, "transfer"
            else:
                draw = None if first else generator
                # The surfaces know of one score a trial.
                bank = self._settings.bank and len(study.directions) == 1
                coordinate = draw_parameter(space, given, column, draw, bank=bank, tuning=tuning)
        if PROPOSAL_KEY not in trial.system_attrs or source == "transfer":
            study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL_KEY, {"source": source})
        return space.dimensions[column].decode(coordinate)

    def _think(
        self,
        space: Space,
        history: History,
        directions: Sequence[StudyDirection],
        generator: torch.Generator,
        known: _Known,
    ) -> tuple[Decision, tuple[float, float] | None]:
        """The policy's step, and what takes its scores to the objective's units."""
        # What the network learnt is what parameters do in a LoRA run. Where there are none it
        # was no help: on functions kept for such choices, regret was .03 more with it.
        network = self._network if space.is_lora else None
        if self._adaptation is not None:
            seed = self._adaptation.seed

            def rebuild(before: History, turn: int, points: np.ndarray) -> Decision:
                again = _generator(seed, turn, space.names)
                return self._decide(space, before, directions, again, None, known, points)[0]

            network = self._adaptation.network(space, history, rebuild)
        decision, told = self._decide(space, history, directions, generator, network, known)
        return decision, units_of(told, decision.trials, directions)

    def _decide(
        self,
        space: Space,
        history: History,
        directions: Sequence[StudyDirection],
        generator: torch.Generator,
        network: Scorer | None,
        known: _Known,
        points: np.ndarray | None = None,
    ) -> tuple[Decision, History]:
        """The policy's step after a history, and the part of the history that it looked at.

        ``points`` (k, d) join the candidates.
        """
        tuning, costs, horizon = known
        charged = costs is not None
        layout = self._layouts.get(
            (space.written, tuning, charged), lambda: Layout(space, tuning, charged=charged)
        )
        default = layout.default
        # The surfaces know of one score a trial.
        bank = self._settings.bank and len(directions) == 1
        conditions = conditions_of(space, history)
        if conditions:
            history = replace(history, points=settle(history.points, conditions, default))

        def snap(x: np.ndarray) -> np.ndarray:
            return settle(space.snap(x), conditions, default)

        paid = costs(history.points) if costs else None
        # The surrogate learns the quality, from which the costs are taken where it matters.
        quality = history if paid is None else before_costs(history, paid)
        theta = self._hyperparameters(layout, space.written + repr(tuning), quality)
        history, quality = recent_and_best(history), recent_and_best(quality)
        weights = objective_weights(len(directions), generator)
        trials = observe(quality, default, horizon, weights)
        charge = charge_of(trials, quality, costs, snap(layout.sweep)) if costs else None
        constraints = constraints_of(history)[~history.running]
        with torch.no_grad():
            decision = decide(
                layout,
                trials,
                Correction.of(network) if network else None,
                snap,
                generator,
                replace(self._settings, bank=bank),
                grid=_grid(space, default, points),
                feasibility=fit_feasibility(layout, trials, constraints),
                theta=theta,
                sources=self._earlier.models(space, layout, directions, weights),
                charge=charge,
            )
        return decision, history

    def _hyperparameters(
        self, layout: Layout, written: str, history: History
    ) -> np.ndarray | None:
        """The surrogate's, fitted to the study as it was at its last milestone, shape (D + 2,).

        ``None`` with several objectives or earlier studies: then every proposal has scores of its
        own to fit.
        """
        if history.scores.shape[1] > 1 or len(self._earlier):
            return None
        finished = len(history) - int(history.running.sum())
        told = recent_and_best(history, after=milestone(finished))
        key = (written, told.points.tobytes(), told.scores.tobytes(), told.violation.tobytes())

        def fitted() -> np.ndarray:
            trials = observe(told, layout.default, None, np.ones(1))
            iterations = _FEW_ITERATIONS if len(told) <= _FEW_TRIALS else _MANY_ITERATIONS
            settings = replace(self._settings, iterations=iterations)
            return fit_hyperparameters(layout, trials, settings)

        return self._fits.get(key, fitted)


def _grid(space: Space, default: np.ndarray, points: np.ndarray | None) -> np.ndarray | None:
    """All configurations of a small space, and further points, shape (k, d)."""
    sets = []
    if space.n_configurations <= _MAX_GRID:
        axes = [dimension.grid(_MAX_GRID) for dimension in space.dimensions]
        mesh = np.meshgrid(*axes, indexing="ij")
        sets.append(np.stack(mesh, axis=-1).reshape(-1, len(space)))
    if points is not None and len(points):
        sets.append(np.where(np.isnan(points), default, points))
    return np.concatenate(sets) if sets else None


def _chosen(
    decision: Decision,
    units: tuple[float, float] | None,
    generator: torch.Generator | None,
) -> tuple[np.ndarray, dict[str, float | str]]:
    """A point, and why.

    Args:
        decision: the policy's step.
        units: what takes standardised scores to the objective's own.
        generator: to draw from the policy instead of taking the best.
    """
    if generator is None:
        choice = int(decision.logits.argmax())
    else:
        logits = torch.from_numpy(decision.logits)
        choice = int(torch.multinomial(logits.softmax(0), 1, generator=generator))
    why = decision.explain(choice)
    if units is not None:
        offset, scale = units
        why["value"] = offset + scale * float(why["mean"])
        why["value_std"] = abs(scale) * float(why["std"])
    return decision.x[choice], why


def _generator(seed: int, turn: int, names: Sequence[str]) -> torch.Generator:
    """A private generator; the trial's turn makes workers with one seed differ."""
    digest = hashlib.sha256(repr((seed, turn, tuple(names))).encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def on_cpu() -> AbstractContextManager[object]:
    """Keeps the sampler's tensors on the CPU where the objective's program defaults elsewhere."""
    device = torch.device("cpu")
    return nullcontext() if torch.get_default_device() == device else device
