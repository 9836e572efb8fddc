"""The model card of an adapter: what it is, how good, and how it was made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import yaml

from optuna_lora_rl import tiny
from optuna_lora_rl.study import answers
from optuna_lora_rl.study import wording

if TYPE_CHECKING:
    from optuna_lora_rl.study.spec import StudySpec

FILE = "README.md"
_LIBRARIES = ("optuna_lora_rl", "peft", "transformers", "trl", "torch", "optuna")


def write(folder: Path, facts: Mapping[str, Any], spec: StudySpec) -> None:
    """Writes the card of a trial's adapter into its folder.

    Args:
        folder: The adapter's.
        facts: What is known of the trial, as :func:`optuna_lora_rl.study.report.facts` has it.
        spec: The study's file.
    """
    base, is_hub = _base(spec)
    head: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    head |= {"tags": ["lora"], **({"base_model": base} if is_hub else {})}
    versions = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    quality = spec.objective.metric.replace("_", " ")
    text = f"""\
---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {_plain(facts["study"])}, trial {facts["trial"]}

A LoRA adapter of {_plain(base)}, fine-tuned on {_plain(_data(spec))}.

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("this-folder")
tokenizer = AutoTokenizer.from_pretrained("this-folder")
```

## Results

{_results(facts)}

The score is {wording.score(facts["score"])}: quality (what {quality} gained over the untuned
model on the validation split) less {spec.objective.cost_weight:g} times the cost of training. The
configuration was chosen on that split.
{_answers(facts.get(answers.ANSWERS))}
## Configuration

{_table(("parameter", "value"), facts["configuration"])}

## How it was made

Supervised fine-tuning with TRL, seed {spec.training.seed}, one of the trials of
`optuna-lora-rl run`. Versions: {versions}.
"""
    (folder / FILE).write_text(text, encoding="utf-8")


def _base(spec: StudySpec) -> tuple[str, bool]:
    """The base model's name without the path to it, and whether it is the hub's."""
    name = spec.model.name
    if name in tiny.MODELS:
        return f"{name} (built into optuna_lora_rl)", False
    is_local = Path(name).expanduser().is_dir()
    return (Path(name).expanduser().resolve().name, False) if is_local else (name, True)


def _data(spec: StudySpec) -> str:
    path = Path(spec.data.train).expanduser()
    return path.name if path.exists() or path.is_absolute() else spec.data.train


def _results(facts: Mapping[str, Any]) -> str:
    test = facts.get("test", {})
    heads = [
        "",
        "untuned",
        "with the adapter",
        *(["with the adapter, test split"] if test else []),
    ]
    rows = {}
    for name in facts["untuned"]:
        if name in facts["metrics"] and name != "quality":
            columns = [facts["untuned"], facts["metrics"], *([test] if test else [])]
            cells = [f"{column[name]:.4f}" if name in column else "" for column in columns]
            rows[name.replace("_", " ")] = cells
    return _table(heads, rows)


def _answers(known: Mapping[str, Any] | None) -> str:
    """Some answers before and after; empty where nothing was asked."""
    if not known:
        return ""
    rows = {}
    for number, question in enumerate(known["questions"]):
        given = [one["given"][number] for one in known["of"].values()]
        rows[question] = [known["expected"][number], *given]
    heads = ("question", "expected", *(answers.WORDS[name] for name in known["of"]))
    return f"\n{answers.counted(known)}\n\n{_table(heads, rows)}\n"


def _table(heads: Sequence[str], rows: Mapping[str, Any]) -> str:
    lines = [heads, ["---"] * len(heads)]
    for name, cells in rows.items():
        listed = cells if isinstance(cells, list) else [str(cells)]
        lines.append([name, *listed])
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`|<>\[\]*#])", r"\\\1", " ".join(text.split()))
