"""The parameters of a LoRA fine-tuning run: names, defaults, what is allowed, and advice.

The names are those that users of PEFT and TRL know. A *configuration* is a plain mapping from
every one of these names to its value.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from dataclasses import dataclass
from typing import Any

from optuna_lora_rl.errors import UserError

Value = int | float | str | bool
Configuration = dict[str, Value]

TARGET_PRESETS = ("qv", "attention", "mlp", "all-linear")
# Optuna stores whole numbers as floats, which hold no larger ones exactly.
_LARGEST_WHOLE = 2**53
_LAYERS = r"all|first-half|last-half|middle|\d+(-\d+)?(,\d+(-\d+)?)*"
# Those of `rank/initialisation.py`; B begins with zeros, or like A.
OWN_INITIALISATIONS = {
    "xavier": "xavier",
    "kaiming": "kaiming",
    "orthogonal-rows": "orthogonal",
    "svd": "svd",
    "layer-adaptive": "layer-adaptive",
    "weight-adaptive": "weight-adaptive",
}
BOTH = "-both"
_INITIALISATIONS = (
    r"default|gaussian|orthogonal|olora|pissa|pissa_niter_[1-9]\d*|mica|"
    rf"({'|'.join(OWN_INITIALISATIONS)})({BOTH})?"
)


@dataclass(frozen=True)
class Term:
    """One word of the vocabulary.

    Attributes:
        default: Value where a study does not mention the parameter; its type is the parameter's.
        help: One line for the user, with the advice that the literature gives.
        low: Smallest allowed value, for numbers.
        high: Largest allowed value, for numbers.
        whole: Whether only whole numbers make sense.
        pattern: Regular expression that a string must match in full.
        allowed: What the pattern means, in words.
    """

    default: Value
    help: str
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    pattern: str = r".+"
    allowed: str = "a non-empty string"

    def check(self, name: str, value: Any) -> Value:
        """Returns ``value`` as the parameter's type, or raises ``UserError``."""
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise UserError(f"space.{name}: {value!r} is not allowed; use true or false")
            return value
        if isinstance(self.default, str):
            if not isinstance(value, str) or not re.fullmatch(self.pattern, value):
                raise UserError(f"space.{name}: {value!r} is not allowed; use {self.allowed}")
            return value
        return self._check_number(name, value)

    def _check_number(self, name: str, value: Any) -> Value:
        kind = "a whole number" if self.whole else "a number"
        number = finite_number(value)
        if number is None or (self.whole and not float(number).is_integer()):
            raise UserError(f"space.{name}: {value!r} is not {kind}")
        if not self.low <= number <= self.high or (self.whole and number > _LARGEST_WHOLE):
            bounds = f"at least {self.low:g}"
            if math.isfinite(self.high):
                bounds = f"from {self.low:g} to {self.high:g}"
            elif number > self.low:
                bounds = f"at most {_LARGEST_WHOLE}"
            raise UserError(f"space.{name}: {value!r} is out of range; use {kind} {bounds}")
        return int(number) if self.whole else number


def finite_number(value: Any) -> int | float | None:
    """Returns a finite number, also from a string such as ``1e-4`` (YAML reads it as a string)."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    # Also no whole number that is too large for a float.
    is_finite = isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return value if is_finite else None


VOCABULARY: dict[str, Term] = {
    "lora_rank": Term(
        8, "Rank r of the update B A; small for simple tasks and little data.", 1, whole=True
    ),
    "rank_allocation": Term(
        "uniform",
        "Who gets how much of lora_rank, then the mean rank: uniform, or by what a probe finds "
        "in the weights, gradients or inputs, or in the updates (delta) of a short run.",
        pattern="uniform|weight|gradient|activation|delta",
        allowed="uniform, weight, gradient, activation or delta",
    ),
    "rank_change": Term(
        "none",
        "Who changes ranks during the run: none, the loss curve or the gradients' spectrum; "
        "training.rank_change has the thresholds.",
        pattern="none|loss|gradient",
        allowed="none, loss or gradient",
    ),
    "truncate_energy": Term(
        1.0,
        "Share of each update's energy that is kept after training, 1 for all; "
        "`truncate: {energy: 0.95}` says the same.",
        1e-6,
        1.0,
    ),
    "truncate_rank": Term(
        0,
        "Largest rank that is kept after training, 0 for any; `truncate: {rank: 8}` says the "
        "same.",
        0,
        whole=True,
    ),
    "lora_alpha": Term(16, "Scale of the update, alpha / r; 2 r is usual.", 1e-6),
    "lora_dropout": Term(
        0.0, "Dropout before A, in [0, 0.9]; pays with little data only.", 0.0, 0.9
    ),
    "target_modules": Term(
        "all-linear",
        "Which linear modules get an adapter: qv, attention, mlp, all-linear, or a name from "
        "target_sets; attention first, all-linear usually best.",
        allowed=f"one of {', '.join(TARGET_PRESETS)}, or a name defined under target_sets",
    ),
    "layers": Term(
        "all",
        "Which layers get an adapter: all, first-half, last-half, middle, or indices '0,2,5-7'.",
        pattern=_LAYERS,
        allowed="all, first-half, last-half, middle, or layer indices such as '0,2,5-7'",
    ),
    "bias": Term(
        "none",
        "Which biases are trained: none, all or lora_only.",
        pattern="none|all|lora_only",
        allowed="none, all or lora_only",
    ),
    "init_lora_weights": Term(
        "default",
        "Initialisation of A and B, by PEFT's names or ours; each has a learning rate of its own. "
        "Of ours B begins with zeros, or with -both like A, and the base weights make up for it.",
        pattern=_INITIALISATIONS,
        allowed="default, gaussian, orthogonal, olora, pissa, pissa_niter_N, mica, or one of "
        f"{', '.join(OWN_INITIALISATIONS)}, each also with {BOTH}",
    ),
    "use_rslora": Term(False, "Scale by alpha / sqrt(r) (rsLoRA), steadier at large ranks."),
    "use_dora": Term(False, "Weight-decomposed LoRA (DoRA): slower, sometimes better at low r."),
    "learning_rate": Term(
        2e-4, "Peak learning rate, the parameter that matters most; about 1e-4 to 5e-4.", 1e-12
    ),
    "batch_size": Term(
        8, "Sequences in one optimizer step, over all micro-batches.", 1, whole=True
    ),
    "optim": Term("adamw_torch", "Optimizer, by its transformers name."),
    "weight_decay": Term(0.0, "Weight decay of the adapter's weights.", 0.0),
    "warmup_ratio": Term(0.0, "Share of the steps over which the rate warms up.", 0.0, 1.0),
    "lr_scheduler_type": Term("linear", "Learning-rate schedule, by its transformers name."),
    "max_grad_norm": Term(1.0, "Gradient norm above which gradients are scaled down.", 0.0),
    "max_steps": Term(0, "Optimizer steps; 0 means num_train_epochs decides.", 0, whole=True),
    "num_train_epochs": Term(1.0, "Passes over the training data, when max_steps is 0.", 1e-3),
    "loraplus_lr_ratio": Term(
        1.0, "Learning rate of B over that of A (LoRA+); 1 is plain LoRA.", 1e-3
    ),
}
DEFAULTS: Configuration = {name: term.default for name, term in VOCABULARY.items()}


def unknown_parameter(name: Any) -> str:
    close = difflib.get_close_matches(str(name), VOCABULARY, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(VOCABULARY)}"
    return f"space.{name}: there is no such parameter; {hint}"
