"""Earlier studies as the policy takes them: read once, then a pure function of their content."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from optuna.study import Study
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.policy.candidates import Trials
from optuna_lora_rl.policy.decision import Settings
from optuna_lora_rl.policy.decision import decide
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import Space
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.matching import place
from optuna_lora_rl.policy.transfer import MIN_TRIALS
from optuna_lora_rl.policy.transfer import SourceModel
from optuna_lora_rl.policy.transfer import SourceStudy
from optuna_lora_rl.policy.transfer import fit_source
from optuna_lora_rl.samplers.cut_short import with_evidence
from optuna_lora_rl.samplers.history import read_history
from optuna_lora_rl.samplers.history import space_of
from optuna_lora_rl.samplers.memory import Memo

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# Fits that are kept: define-by-run spaces grow, weights of several objectives change.
_KEPT = 8


@dataclass(frozen=True)
class _Told:
    """What an earlier study was when it was handed over; ``None``: directions as the new one's."""

    name: str
    trials: tuple[FrozenTrial, ...]
    directions: tuple[StudyDirection, ...] | None


class EarlierStudies:
    """What a sampler knows from studies before its own.

    Args:
        studies: Optuna studies, or lists of trials whose directions are those of the new study.
        roles: given by the user, by parameter name.

    Raises:
        UserError: something else is in the list, or a study has too few results to learn from.
    """

    def __init__(
        self, studies: Sequence[Study | Sequence[FrozenTrial]], roles: Mapping[str, str]
    ) -> None:
        if isinstance(studies, Study) or not isinstance(studies, Sequence):
            raise UserError(
                f"source_studies is {studies!r}, but must be a list of studies, or of lists of "
                "trials"
            )
        self._told = [_read(position, study) for position, study in enumerate(studies)]
        self._roles = dict(roles)
        # Then the new study is taken to be one as well.
        self.are_lora = any(_space(told, self._roles).is_lora for told in self._told)
        self._fits: Memo[list[SourceModel]] = Memo(_KEPT)

    def __len__(self) -> int:
        return len(self._told)

    def models(
        self,
        space: Space,
        layout: Layout,
        directions: Sequence[StudyDirection],
        weights: np.ndarray,
    ) -> list[SourceModel]:
        """Processes of all studies that know something of the space.

        Args:
            space: of the new study.
            layout: of the space.
            directions: of the new study.
            weights: of its objectives in this proposal, shape (m,).
        """

        def fitted() -> list[SourceModel]:
            fits = (fit_source(layout, space, s, weights) for s in self._sources(directions))
            return [fit for fit in fits if fit is not None]

        key = (repr(space), tuple(directions), weights.tobytes())
        return self._fits.get(key, fitted)

    def opening(
        self, space: Space, column: int, directions: Sequence[StudyDirection]
    ) -> float | None:
        """The unit coordinate of one parameter in the first trial; ``None`` where none is known.

        All parameters of a first trial go back to one configuration, so that they fit together
        though the trial asks for them one by one.

        Args:
            space: what the trial has asked for so far.
            column: of the parameter.
            directions: of the new study.
        """
        sources = self._sources(directions)
        if not sources:
            return None
        union = _union([source.space for source in sources])
        if not len(union):
            return None
        layout, m = Layout(union), len(directions)
        models = self.models(union, layout, directions, np.full(m, 1.0 / m))
        if not models:
            return None
        decision = decide(
            layout,
            Trials.none(len(union)),
            None,
            union.snap,
            torch.Generator(device="cpu").manual_seed(0),
            Settings(),
            sources=models,
        )
        point = decision.x[int(decision.logits.argmax())]
        placed, _ = place(space, union, [union.decode(point)])
        u, is_ordered = float(placed[0, column]), space.dimensions[column].is_ordered
        if np.isnan(u) or (u < 0 and not is_ordered):
            return None
        return min(max(u, 0.0), 1.0)

    def _sources(self, directions: Sequence[StudyDirection]) -> list[SourceStudy]:
        return [_source(told, self._roles, directions) for told in self._told]


def source_study(study: Study, roles: Mapping[str, str] | None = None) -> SourceStudy:
    """A study's finished trials as plain values; ``roles`` as for the sampler."""
    finished = tuple(t for t in with_evidence(study.get_trials()) if t.state.is_finished())
    told = _Told(f"study {study.study_name!r}", finished, tuple(study.directions))
    return _source(told, roles or {}, study.directions)


def _read(position: int, study: Study | Sequence[FrozenTrial]) -> _Told:
    where = f"source_studies: item {position}"
    directions: tuple[StudyDirection, ...] | None = None
    if isinstance(study, Study):
        where = f"source_studies: study {study.study_name!r}"
        directions, trials = tuple(study.directions), study.get_trials()
    elif isinstance(study, Sequence) and all(isinstance(t, FrozenTrial) for t in study):
        trials = list(study)
    else:
        raise UserError(
            f"{where} is {study!r}, but must be an Optuna study or a list of FrozenTrials"
        )
    finished = tuple(trial for trial in with_evidence(trials) if trial.state.is_finished())
    results = sum(trial.values is not None for trial in finished)
    if results < MIN_TRIALS:
        raise UserError(
            f"{where} has {results} trials with a result, but at least {MIN_TRIALS} are needed to "
            "learn from it"
        )
    return _Told(where, finished, directions)


def _source(
    told: _Told, roles: Mapping[str, str], directions: Sequence[StudyDirection]
) -> SourceStudy:
    space = _space(told, roles)
    m = len(told.directions or directions)
    odd = next((t for t in told.trials if t.values is not None and len(t.values) != m), None)
    if odd is not None:
        raise UserError(
            f"{told.name} has a trial with {len(odd.values)} values, but must have {m}, since a "
            "list of trials has the new study's directions; give the study that they are of"
        )
    history = read_history(told.trials, space, told.directions or directions)
    params = {trial.number: trial.params for trial in told.trials}
    return SourceStudy(
        name=told.name,
        space=space,
        params=tuple(params[number] for number in history.numbers.tolist()),
        scores=history.scores,
        bad=history.failed | (history.violation > 0),
    )


def _space(told: _Told, roles: Mapping[str, str]) -> Space:
    """All parameters of an earlier study."""
    distributions: dict[str, BaseDistribution] = {}
    for trial in told.trials:
        distributions.update(trial.distributions)
    return space_of({k: v for k, v in distributions.items() if not v.single()}, roles)


def _union(spaces: Sequence[Space]) -> Space:
    """All parameters of several spaces, each name and each role once."""
    dimensions: list[Dimension] = []
    names: set[str] = set()
    roles: set[str] = set()
    for space in spaces:
        for dimension in space.dimensions:
            # Alpha and its ratio to the rank are one thing said in two ways.
            role = "alpha" if dimension.role == "alpha_ratio" else dimension.role
            if dimension.name in names or role in roles:
                continue
            dimensions.append(dimension)
            names.add(dimension.name)
            roles |= {role} if role else set()
    ordered = sorted(dimensions, key=lambda dimension: dimension.name)
    return Space(tuple(ordered), any(space.said for space in spaces))
