"""A study in one call, for Python."""

from __future__ import annotations

import hashlib
import html
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from optuna_lora_rl import terminal
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import panel
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import spec as study_spec
from optuna_lora_rl.study import verdict
from optuna_lora_rl.study import wording
from optuna_lora_rl.study.display import Display

_MAY_CHANGE = {"budget", "packing", "storage"}


@dataclass(frozen=True, repr=False)
class TuningResult:
    """What ``tune`` found.

    Attributes:
        study: The Optuna study, with every trial.
        best_configuration: The best trial's parameters by name, complete; None if the budget
            left room for none.
        best_score: Its score.
        adapter: Folder of its adapter in PEFT format; None where it is lost or on another machine.
        warning: That the adapter is no better than the untuned model, in a sentence, which is also
            given as a Python warning; None where it is.
    """

    study: optuna.Study
    best_configuration: dict[str, Any] | None
    best_score: float | None
    adapter: Path | None
    warning: str | None = None

    def __repr__(self) -> str:
        return "\n".join(f"{name + ':':<14} {said}" for name, said in self._rows())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        rows = "".join(
            f'<tr><th style="text-align:left">{html.escape(name)}</th>'
            f'<td style="text-align:left">{html.escape(said)}</td></tr>'
            for name, said in self._rows()
        )
        return f"<table>{rows}</table>"

    def _rows(self) -> list[tuple[str, str]]:
        trials = self.study.get_trials(deepcopy=False)
        best, configuration = outcome.best_of(trials), self.best_configuration
        score = wording.score(self.best_score)
        rows = [
            ("study", f"{self.study.study_name}, {len(trials)} trials"),
            ("best score", f"{score} (trial {best.number})" if best else "no trial was completed"),
        ]
        if configuration is not None:
            said = [f"{name} {_short(value)}" for name, value in configuration.items()]
            rows.append(("configuration", ", ".join(said)))
        rows.append(("adapter", str(self.adapter) if self.adapter else "none in this place"))
        return rows + ([("warning", self.warning)] if self.warning else [])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def tune(
    *,
    model: str | Mapping[str, Any],
    train: str,
    trials: int = 20,
    validation: str | None = None,
    space: Mapping[str, Any] | None = None,
    sampler: str | Mapping[str, Any] = "rl",
    output: str | Path | None = None,
    seed: int = 0,
    quiet: bool = False,
    display: Display | None = None,
    **sections: Any,
) -> TuningResult:
    """Finds a good LoRA configuration and trains its adapter.

    Called again with the same arguments it goes on where it stopped; with more ``trials`` it
    adds some.

    Args:
        model: ``"tiny"``, a local folder or a hub name; or the whole ``model`` section.
        train: Training data: ``"tiny:<task>"``, a file, a folder or a hub name.
        trials: How many trials.
        validation: Validation data; without it a part of the training data is set aside.
        space: What is tuned, by parameter, as ``LoraSpace`` takes it; None for the recommended
            space.
        sampler: A sampler's name, or the whole ``sampler`` section.
        output: Folder for the database, the adapters and the report; by default one in ``runs``
            that is named after the arguments, so that other arguments get another study.
        seed: Seed of the proposals and of training.
        quiet: Whether nothing is shown of the progress, which otherwise goes to standard error, or
            below a notebook's cell.
        display: Shows the progress in a way of your own, whatever ``quiet`` says.
        **sections: Further keys and sections as in a YAML file (docs/configuration.md), such as
            ``packing=8``, ``objective={"cost_weight": 0.2}`` or ``data={"max_length": 256}``.

    Raises:
        UserError: If an argument is wrong, if model, data or disk cannot be used, if the first
            trials all fail the same way, or if every trial failed or was pruned.
        KeyboardInterrupt: On Ctrl-C, after the running trial was told.
    """
    data = {**sections.pop("data", {}), "train": train}
    if validation is not None:
        data["validation"] = validation
    chosen = {"name": sampler} if isinstance(sampler, str) else dict(sampler)
    content: dict[str, Any] = {
        **sections,
        "model": {"name": model} if isinstance(model, str) else dict(model),
        "data": data,
        "space": space,
        "sampler": {"seed": seed, **chosen},
        "training": {"seed": seed, **sections.get("training", {})},
        "budget": {"trials": trials, **sections.get("budget", {})},
    }
    folder = Path(output or f"runs/tune-{_digest(content)}")
    content = {"name": folder.name, **content, "output": str(folder)}
    spec = study_spec.parse(content, "tune")
    if display is None:
        display = Display() if quiet else panel.create(terminal.console(stderr=True))
    result = runner.run(spec, display=display)
    if result.ended_by == "interruption":
        raise KeyboardInterrupt
    if result.ended_by == "failures":
        raise UserError(f"the first trials all failed the same way: {result.reason}")
    nothing = verdict.nothing_completed(result.study)
    if nothing:
        raise UserError(nothing)
    if result.shortfall:
        warnings.warn(result.shortfall, stacklevel=2)
    best = outcome.best_of(result.study.get_trials())
    return TuningResult(
        study=result.study,
        best_configuration=dict(best.user_attrs["configuration"]) if best else None,
        best_score=outcome.final_score(best) if best else None,
        adapter=None if result.lost else result.best_adapter,
        warning=result.shortfall,
    )


def _digest(content: Mapping[str, Any]) -> str:
    """Stands for what a study is; how long it goes on and where it is kept may change."""
    kept = {key: value for key, value in content.items() if key not in _MAY_CHANGE}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
