"""Keeping the libraries still: the study has a display of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import nullcontext
from typing import Any

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.activity import OnActivity

# Known and harmless in a trial; anything else still reaches the user.
_HARMLESS = (
    r".*`?torch_dtype`? is deprecated.*",
    r".*'pin_memory' argument is set as true but no accelerator is found.*",
    r".*`use_cache=True` is incompatible with gradient checkpointing.*",
    r".*Could not find a config file in.*",
    r".*Unable to fetch remote file due to the following error.*",
    r".*None of the inputs have requires_grad=True.*",
    # transformers 5.2x renames what TRL, and all of transformers 5.0, still call by the old name.
    r".*gradient_checkpointing(_enable|_disable|_kwargs)?` is deprecated.*",
)
_LOGGERS = ("trl", "peft", "accelerate", "datasets", "huggingface_hub")


@contextmanager
def quiet(on_activity: OnActivity | None = None) -> Iterator[None]:
    """Silences progress bars, logs below errors, harmless warnings and telemetry.

    Args:
        on_activity: Told what the bars of downloads, loading and tokenising would show.
    """
    import datasets
    from huggingface_hub import constants
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    data_bars = datasets.are_progress_bars_disabled()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    transformers_logging.set_verbosity_error()
    shown = on_activity is not None and _is_plain()
    if not shown:
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
    telemetry_off = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with _told(on_activity) if shown else nullcontext(), warnings.catch_warnings():
            for message in _HARMLESS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if not data_bars:
            datasets.enable_progress_bars()
        constants.HF_HUB_DISABLE_TELEMETRY = telemetry_off
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _is_plain() -> bool:
    """Whether the libraries' bars are tqdm's plain ones, and not a notebook's widgets."""
    import tqdm.auto
    import tqdm.std

    return tqdm.auto.tqdm.display is tqdm.std.tqdm.display


@contextmanager
def _told(on_activity: OnActivity | None) -> Iterator[None]:
    """Has tqdm's bars tell how far they are instead of drawing themselves."""
    from tqdm.std import tqdm

    assert on_activity is not None

    def display(bar: Any, msg: str | None = None, pos: int | None = None) -> bool:
        # Nothing is left behind at its end, not even an empty line.
        bar.leave = False
        fetches = bar.unit == "B"
        name = (bar.desc or "").removesuffix(": ")
        what = f"downloading {name}" if fetches else name[:1].lower() + name[1:]
        unit = "" if bar.unit == "it" else bar.unit.strip()
        on_activity(Activity(what or "working", bar.n, bar.total, unit))
        return False

    before = tqdm.display
    tqdm.display = display
    try:
        yield
    finally:
        tqdm.display = before
