"""What is known of model, data and run, kept with a study for its other workers and for later."""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.policy.context import TuningContext
from optuna_lora_rl.samplers import CONTEXT_KEY

if TYPE_CHECKING:
    from optuna.study import Study


class StoredContext:
    """The context of each study that a sampler serves.

    Args:
        given: what the sampler was told; ``None`` for nothing.
    """

    def __init__(self, given: TuningContext | None) -> None:
        self._given = given
        self._stored: dict[tuple[int, int], TuningContext | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_given": self._given, "_stored": {}}

    def of(self, study: Study) -> TuningContext | None:
        """What is given, or what is stored with the study.

        It is looked for once; what is given is stored where nothing is.
        """
        study_id, storage = study._study_id, study._storage
        key = (id(storage), study_id)
        if key not in self._stored:
            said = storage.get_study_user_attrs(study_id).get(CONTEXT_KEY)
            known = self._given
            if known is None and said is not None:
                known = TuningContext.from_dict(said)
            elif known is not None and said is None:
                storage.set_study_user_attr(study_id, CONTEXT_KEY, known.as_dict())
            self._stored[key] = known
        return self._stored[key]
