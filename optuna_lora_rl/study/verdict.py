"""Whether a study found what it was for: an adapter that is better than no adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna.trial import TrialState

from optuna_lora_rl.study import outcome

if TYPE_CHECKING:
    import optuna


def shortfall(study: optuna.Study) -> str | None:
    """Say in a sentence why the study has nothing to show for its trials, or return None.

    Results that were told by hand have no quality, and nothing is said of them.
    """
    return nothing_completed(study) or nothing_better(study)


def nothing_completed(study: optuna.Study) -> str | None:
    """Say that every trial failed or was pruned, with the last failure, or return None."""
    trials = [t for t in study.get_trials(deepcopy=False) if outcome.counts(t)]
    if not trials or any(trial.state == TrialState.COMPLETE for trial in trials):
        return None
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    words = f"no trial was completed: {' and '.join(outcome.counts_in_words(trials))}"
    if not failed:
        return f"{words}; the pruner leaves none, try a milder one or pruner: none"
    last = failed[-1]
    message = last.user_attrs.get(outcome.MESSAGE) or outcome.failure(last)
    return f"{words}; trial {last.number} failed by: {message}"


def nothing_better(study: optuna.Study) -> str | None:
    """Say that the best adapter is no better than the untuned model, or return None.

    With two objectives the best is whichever completed trial has the highest quality.
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    known = [trial for trial in trials if "quality" in trial.user_attrs]
    if not known or len(known) < len(trials):
        return None
    highest = max(known, key=lambda trial: float(trial.user_attrs["quality"]))
    best = outcome.best_of(known) if len(study.directions) == 1 else highest
    if best is None or best.user_attrs["quality"] > 0:
        return None
    words = (
        f"the best adapter, of trial {best.number}, is no better than the untuned model (quality "
        f"{best.user_attrs['quality']:.4f}, where the untuned model has 0)"
    )
    gained = highest.user_attrs["quality"]
    if gained > 0:
        words += f"; trial {highest.number} gains {gained:.4f}, but costs more than that is worth"
    return words
