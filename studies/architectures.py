"""Which architectures work: each that AutoModelForCausalLM knows is checked and trained a little.

    python studies/architectures.py

Of every architecture a tiny model with random weights is made. It goes through the check that a
study makes before its first trial, then through two short trials (`all-linear` and `attention`)
and the same two side by side. The loss of the saved adapter is computed again by transformers and
PEFT alone, row by row. What was found is kept line by line, so that the command goes on where it
was stopped; `--again` and names do some anew.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import peft
import tiny_models
import torch
import transformers
import trl
from peft import PeftModel
from transformers import AutoModelForCausalLM

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import checking
from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.isolation import quiet
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import ObjectiveOptions
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.finetuning.targets import select
from optuna_lora_rl.finetuning.trial import TrialRequest
from optuna_lora_rl.finetuning.trial import TrialResult
from optuna_lora_rl.vocabulary import TARGET_PRESETS

HOUSE = Path(__file__).resolve().parents[1]
RECORD = HOUSE / "studies" / "results" / "architectures.jsonl"
PAGE = HOUSE / "docs" / "architectures.md"
TRIED = ("all-linear", "attention")
# Random models of two layers have losses near 7; sums in another order differ by less.
TOLERANCE = 5e-4
_ROWS = 16
_SECONDS = 240
_TRIAL = {"max_steps": 3, "learning_rate": 5e-3, "lora_rank": 2, "batch_size": 4}


@dataclass
class Found:
    """What was found of one architecture.

    Attributes:
        name: Its ``model_type``.
        outcome: ``works``, ``refused``, ``no tiny model`` or ``error``.
        reason: Why it is not the first.
        own_head: Whether its own output head is taken.
        differs: By how much the trainer's loss differs from that of the model's own forward.
        presets: How many modules each preset adapts.
        left_out: What nothing adapts.
        saved: By how much the loss of the trial's model differs from that of the saved adapter.
        packed: By how much a trial beside another differs from the same alone.
        alone: Why trials cannot share a pass.
    """

    name: str
    outcome: str = "error"
    reason: str = ""
    own_head: bool = False
    differs: float = 0.0
    presets: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    saved: float = 0.0
    packed: float = 0.0
    alone: str = ""


class _Late(BaseException):
    """It took too long."""


def look(name: str, folder: Path) -> Found:
    """Makes a tiny model of an architecture, checks it and trains it a little."""
    found = Found(name)
    try:
        tiny_models.save(name, folder / "model")
        _try_out(found, tuner_of(folder / "model"), folder)
        found.outcome = "works"
    except tiny_models.NoTinyModel as error:
        found.outcome, found.reason = "no tiny model", str(error)
    except UserError as error:
        found.outcome, found.reason = "refused", str(error)
    except Exception as error:
        found.outcome, found.reason = "error", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    found.reason = found.reason.replace(str(folder / "model"), name)
    return found


def tuner_of(folder: Path) -> FineTuner:
    """A fine-tuner of a small task, whose validation set is one batch."""
    return FineTuner(
        ModelOptions(name=str(folder)),
        DataOptions(
            train="tiny:dates-small",
            max_train_samples=_ROWS,
            max_validation_samples=_ROWS,
            max_length=48,
        ),
        TrainingOptions(use_cpu=True, evaluations=1, eval_batch_size=_ROWS, monitor=0),
        ObjectiveOptions(),
    )


def _try_out(found: Found, tuner: FineTuner, folder: Path) -> None:
    tuner.prepare()
    prepared = tuner.prepared
    architecture = prepared.base.architecture
    rows = prepared.tokens.validation
    found.own_head = prepared.base.call.own_head
    found.left_out = list(architecture.left_out)
    found.presets = {preset: _count(architecture, preset) for preset in TARGET_PRESETS}
    own = float(checking.own_losses(prepared.base.model, rows, prepared.device).mean())
    found.differs = abs(own - tuner.baseline().loss)
    trials = [{**_TRIAL, "target_modules": t} for t in TRIED if found.presets[t]]
    alone = []
    for number, trial in enumerate(trials):
        result = tuner.run(trial, folder=folder / f"{number}")
        alone.append(result)
        fresh = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        saved = PeftModel.from_pretrained(fresh, str(folder / f"{number}")).eval()
        again = float(checking.own_losses(saved, rows, prepared.device).mean())
        found.saved = max(found.saved, abs(again - result.metrics["loss"]))
    beside, notes = _side_by_side(tuner, trials)
    differences = [
        abs(a.metrics["loss"] - b.metrics["loss"]) for a, b in zip(alone, beside, strict=True)
    ]
    found.packed = max(differences, default=0.0)
    found.alone = notes[0].partition(": ")[2] if notes else ""
    worst = max(found.differs, found.saved, found.packed)
    if not worst <= TOLERANCE:
        raise RuntimeError(f"losses that should be the same differ by {worst:.2g}")


def _count(architecture: Any, preset: str) -> int:
    try:
        return len(select(architecture, preset))
    except UserError:
        return 0


def _side_by_side(
    tuner: FineTuner, trials: Sequence[Mapping[str, Any]]
) -> tuple[list[TrialResult], list[str]]:
    waiting = [TrialRequest(number, trial) for number, trial in enumerate(trials)]
    ended: dict[int, TrialResult | Exception] = {}
    notes: list[str] = []
    tuner.run_packed(
        lambda: waiting.pop(0) if waiting else None,
        lambda run, result: ended.update({run.number: result}),
        size=len(trials) or 1,
        says=notes.append,
    )
    results = []
    for number in sorted(ended):
        result = ended[number]
        if isinstance(result, Exception):
            raise result
        results.append(result)
    return results, notes


def page(found: Sequence[Found], command: str) -> str:
    """The documentation's page: a table, and the reasons below."""
    by = {kind: [f for f in found if f.outcome == kind] for kind in ("works", "refused")}
    none = [f for f in found if f.outcome == "no tiny model"]
    failed = [f for f in found if f.outcome == "error"]
    own = [f for f in by["works"] if f.own_head]
    versions = ", ".join(
        f"{module.__name__} {module.__version__}" for module in (torch, transformers, peft, trl)
    )
    lines = [
        "# Architectures",
        "",
        "<!-- Written by studies/architectures.py; do not edit. -->",
        "",
        f"Of the {len(found)} architectures that `AutoModelForCausalLM` knows, "
        f"{len(by['works'])} work, {len(by['refused'])} are refused before the first trial with "
        f"the sentence below, and of {len(none)} transformers makes no tiny model with the sizes "
        "that were tried, so nothing is claimed.",
        "",
        f"`{command}` made this page ({versions}). It makes a tiny model of each, with random "
        "weights, and puts it through the check that every study makes before its first trial: "
        "the untuned loss by the trainer is that of the model's own forward pass on rows without "
        "padding, an adapter that is still zero changes nothing, and all of it gets a gradient. "
        "Then it trains with `all-linear` and `attention`, alone and side by side, and computes "
        "the loss of the saved adapters again by transformers and PEFT alone. *Works* means that "
        f"all these losses agree within {TOLERANCE:g}.",
        "",
        "The numbers are the modules that a preset adapts in two layers (0: a study that has the "
        "preset in its space is refused, and told what to write). *Head*: `own` where the model's "
        "own output head is taken because TRL's fused one computes another loss. *Together*: "
        "whether trials side by side share passes. *Not adapted*: weights that no preset reaches, "
        "because PEFT does not adapt them as linear modules (experts in one tensor) or text does "
        "not pass through them.",
        "",
        f"| architecture | {' | '.join(TARGET_PRESETS)} | head | together | not adapted |",
        f"| --- |{' --- |' * (len(TARGET_PRESETS) + 3)}",
        *(_row(f) for f in by["works"]),
        "",
        f"Own heads: {len(own)}.",
        "",
        *(["## Failed", ""] if failed else []),
        *(f"- {f.name}: {_cell(f.reason)}" for f in failed),
        *([""] if failed else []),
        "## Refused",
        "",
        "| architecture | the sentence |",
        "| --- | --- |",
        *(f"| {f.name} | {_cell(f.reason)} |" for f in by["refused"]),
        "",
        "## Not tried",
        "",
        "| architecture | what transformers says of the tiny configuration, or of its model |",
        "| --- | --- |",
        *(f"| {f.name} | {_cell(f.reason)} |" for f in none),
        "",
    ]
    return "\n".join(lines)


def _row(found: Found) -> str:
    presets = " | ".join(str(found.presets[preset]) for preset in TARGET_PRESETS)
    left = ", ".join(f"`{name}`" for name in found.left_out)
    head = "own" if found.own_head else "fused"
    return f"| {found.name} | {presets} | {head} | {'no' if found.alone else 'yes'} | {left} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:300]


def _in_time(action: Callable[[], Found], name: str) -> Found:
    def late(*_: Any) -> None:
        raise _Late

    signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    try:
        return action()
    except _Late:
        return Found(name, "no tiny model", f"it took more than {_SECONDS} s")
    finally:
        signal.alarm(0)


def main(arguments: Sequence[str]) -> None:
    """Looks at the architectures that are not in the record yet, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="architectures to look at anew; all by default")
    parser.add_argument("--again", action="store_true", help="look at those that did not work")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args(arguments)
    known: dict[str, Found] = {}
    if given.record.exists():
        for line in given.record.read_text(encoding="utf-8").splitlines():
            one = Found(**json.loads(line))
            known[one.name] = one
    wanted = given.names or [
        name
        for name in tiny_models.names()
        if name not in known or (given.again and known[name].outcome != "works")
    ]
    given.record.parent.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            one = _in_time(lambda: look(name, Path(folder)), name)  # noqa: B023
        known[name] = one
        print(f"{name}: {one.outcome} {one.reason}"[:300], flush=True)
        with given.record.open("a", encoding="utf-8") as record:
            record.write(json.dumps(asdict(one)) + "\n")
    found = [known[name] for name in sorted(known)]
    # One line each, the newest.
    given.record.write_text(
        "".join(json.dumps(asdict(one)) + "\n" for one in found), encoding="utf-8"
    )
    given.page.write_text(page(found, "python studies/architectures.py"), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
