"""How configurations, numbers and times are written for people."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.rank import tables
from optuna_lora_rl.vocabulary import DEFAULTS

_SHORT = {
    "lora_rank": "r",
    "lora_alpha": "α",
    "learning_rate": "lr",
    "lora_dropout": "dropout",
    "batch_size": "batch",
    "weight_decay": "decay",
    "warmup_ratio": "warm-up",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "loraplus_lr_ratio": "LoRA+",
    "max_grad_norm": "clip",
    "rank_allocation": "ranks by",
    "rank_change": "change by",
    "truncate_energy": "energy kept",
    "truncate_rank": "cut to",
    "bias": "bias",
    "layers": "layers",
}
# Their values speak for themselves.
_BARE = {"target_modules", "init_lora_weights", "optim", "lr_scheduler_type"}
_FLAGS = {"use_rslora": "rsLoRA", "use_dora": "DoRA"}
_USUAL = {
    *_FLAGS,
    "rank_allocation",
    "rank_change",
    "truncate_energy",
    "truncate_rank",
    "init_lora_weights",
    "loraplus_lr_ratio",
    "bias",
    "layers",
}
_BARS = "▁▂▃▄▅▆▇█"


def compact(configuration: Mapping[str, Any], tuned: Collection[str]) -> str:
    """What is tuned of a configuration, in one line: ``r 16 · α 32 · lr 3e-4 · all-linear``.

    Args:
        configuration: The parameters by name.
        tuned: Names of Optuna's parameters; a tuned ratio shows the parameter it gives.
    """
    shown = {name.removesuffix("_ratio") for name in tuned} | set(tuned)
    parts = []
    for name in _order(configuration):
        value = configuration[name]
        # What is off, or as usual, goes without saying.
        if name not in shown or (name in _USUAL and value == DEFAULTS[name]):
            continue
        if name in _BARE:
            parts.append(str(value))
        elif name in _FLAGS:
            parts.append(_FLAGS[name])
        else:
            parts.append(f"{_SHORT.get(name, name)} {number(value)}")
    return " · ".join(parts)


def _order(configuration: Mapping[str, Any]) -> list[str]:
    first = ["lora_rank", "lora_alpha", "learning_rate", "target_modules"]
    return [n for n in first if n in configuration] + [n for n in configuration if n not in first]


# What is left of 0.1 - 0.1 and the like: no parameter is meant to be so small.
_ROUNDING = 1e-15


def number(value: Any) -> str:
    """A parameter's value: three digits, and powers of ten as people write them."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if abs(value) < _ROUNDING:
        return "0"
    if not 1e-2 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def domain(distribution: Any) -> str:
    """What a tuned parameter may be, such as ``2 to 64 (log)`` or ``qv, mlp``."""
    choices = getattr(distribution, "choices", None)
    if choices is not None:
        return ", ".join(number(choice) for choice in choices)
    text = f"{number(distribution.low)} to {number(distribution.high)}"
    if distribution.log:
        return f"{text} (log)"
    step = distribution.step
    return text if step in (None, 1) else f"{text} by {number(step)}"


def score(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def count(value: float) -> str:
    """A number of parameters, such as ``1.2 M``."""
    return tables.in_units(value, ("G", "M", "k"))


def json_text(value: Any) -> str:
    """A value as JSON that every program reads: what is no finite number is null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def activity(one: Activity) -> str:
    """What is being done, such as ``tokenising: 1200 of 4000 rows, 3 files``."""
    parts = [amount(one), one.detail]
    said = ", ".join(filter(None, parts))
    return f"{one.what}: {said}" if said else one.what


def amount(one: Activity) -> str:
    """How far an activity is, such as ``12 of 40 steps``; nothing where it is not counted."""
    if one.unit == "B":
        return tables.size(one.done) + (f" of {tables.size(one.total)}" if one.total else "")
    if one.total is None:
        return f"{one.done:.0f} {one.unit}".rstrip() if one.done else ""
    return f"{one.done:.0f} of {one.total:.0f} {one.unit}".rstrip()


def duration(seconds: float) -> str:
    """A time, such as ``4.2 s``, ``2 min 10 s``, ``30 min`` or ``3 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        parts = (f"{minutes} min" if minutes else "", f"{rest} s" if rest else "")
    else:
        hours, minutes = divmod(round(seconds / 60), 60)
        parts = (f"{hours} h", f"{minutes} min" if minutes else "")
    return " ".join(filter(None, parts))


def of_hours(used: float, limit: float) -> str:
    """Of a budget in hours what is used, such as ``12 min of 1 h``."""
    return f"{duration(3600 * used)} of {duration(3600 * limit)}"


def program() -> str:
    """How to type the program's name so that the shell finds the one that runs."""
    name = "optuna-lora-rl"
    script = Path(sys.executable).with_name(name)
    if not script.exists():
        return f"{shlex.quote(_shown(Path(sys.executable)))} -m optuna_lora_rl"
    found = shutil.which(name)
    return name if found and Path(found).samefile(script) else shlex.quote(_shown(script))


def _shown(path: Path) -> str:
    """A path as one types it here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


_NUMBERS = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def joined(sentences: Iterable[str]) -> dict[str, list[int]]:
    """Puts sentences that differ in their numbers alone into one: ``it fell by 1 to 3%``.

    Returns:
        By the joined sentence, in the order of the first of each, where those it says stand.
    """
    alike: dict[str, list[tuple[int, list[str]]]] = {}
    for place, sentence in enumerate(sentences):
        form = _NUMBERS.sub("{}", sentence.replace("{", "{{").replace("}", "}}"))
        alike.setdefault(form, []).append((place, _NUMBERS.findall(sentence)))
    found: dict[str, list[int]] = {}
    for form, known in alike.items():
        sorts = [sorted(same, key=float) for same in zip(*(n for _, n in known), strict=True)]
        words = [s[0] if s[0] == s[-1] else f"{s[0]} to {s[-1]}" for s in sorts]
        found[form.format(*words)] = [place for place, _ in known]
    return found


def code(text: object) -> str:
    """A text as Markdown shows it letter by letter."""
    line = " ".join(str(text).split())
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {line} {fence}" if longest else f"`{line or ' '}`"


def sparkline(values: Sequence[float | None]) -> str:
    """Values as a row of bars; a dot where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return "·" * len(values)
    low, high = min(known), max(known)
    span = (high - low) or 1.0
    top = len(_BARS) - 1
    return "".join(
        "·" if value is None else _BARS[round((value - low) / span * top)] for value in values
    )
