"""The end of a study: its adapters answer held-out questions.

The untuned model, the guides' configuration and the best adapter answer the same ones. How many
answers are right is counted over all of them; the first few are kept with the study, to be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from optuna_lora_rl.errors import shortened
from optuna_lora_rl.study import adapters
from optuna_lora_rl.study import answers
from optuna_lora_rl.study import outcome

if TYPE_CHECKING:
    import optuna

    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.study.spec import StudySpec

_SHOWN = 3
# Characters of a question or an answer.
_MOST_KEPT = 600


def wanted(study: optuna.Study, spec: StudySpec) -> dict[str, tuple[int | None, Path | None]]:
    """Who has to answer: by name, its trial and its adapter's folder; empty where all is known."""
    trials = study.get_trials(deepcopy=False)
    there = adapters.best_there(trials, spec.folder)
    if not spec.answers or there.trial is None or there.folder is None:
        return {}
    who: dict[str, tuple[int | None, Path | None]] = {answers.UNTUNED: (None, None)}
    guides = outcome.guides_of(trials)
    if guides is not None and guides.number != there.trial.number:
        folder = adapters.place_of(spec.folder, guides.number)
        if not adapters.fault_of(folder):
            who[answers.GUIDES] = (guides.number, folder)
    who[answers.BEST] = (there.trial.number, there.folder)
    known = study.user_attrs.get(answers.ANSWERS, {})
    same = known.get("wanted") == spec.answers and {
        name: one["trial"] for name, one in known.get("of", {}).items()
    } == {name: trial for name, (trial, _) in who.items()}
    return {} if same or known.get("asked") == 0 else who


def ask(
    study: optuna.Study,
    spec: StudySpec,
    tuner: FineTuner,
    who: Mapping[str, tuple[int | None, Path | None]],
) -> None:
    """Lets them answer, and keeps what they say with the study."""
    known: dict[str, Any] = {"wanted": spec.answers, "asked": 0, "of": {}}
    for name, (trial, folder) in who.items():
        said = tuner.answers(folder, spec.answers)
        if said is None:
            break
        known |= {
            "asked": len(said.questions),
            "split": said.split,
            "questions": _kept(said.questions),
            "expected": _kept(said.expected),
        }
        known["of"][name] = {"trial": trial, "right": said.right, "given": _kept(said.given)}
    study.set_user_attr(answers.ANSWERS, known)


def _kept(texts: tuple[str, ...]) -> list[str]:
    return [shortened(answers.printable(text), _MOST_KEPT) for text in texts[:_SHOWN]]
