"""Keeping the libraries still: the study has a display of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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
def quiet() -> Iterator[None]:
    """Silences progress bars, logs below errors, harmless warnings and telemetry."""
    import datasets
    from huggingface_hub import constants
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    data_bars = datasets.are_progress_bars_disabled()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    telemetry_off = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
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
