"""What a trial may not let out: its random numbers and the many ways in which it fails."""

from __future__ import annotations

import gc
import logging
import random
import re
import warnings
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import nullcontext
from contextlib import suppress
from types import FrameType
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import is_outside
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.errors import MachineError
from optuna_lora_rl.finetuning.errors import Reason

# What torch says when the GPU or its driver fails; the process cannot use the GPU again.
_BROKEN_GPU = re.compile(r"CUDA (error|driver)|CUDNN_STATUS_|CUBLAS_STATUS_|NCCL error")
_EXHAUSTED = ("out of memory", "can't allocate memory", "cannot allocate memory")


@contextmanager
def own_randomness(seed: int | None = None) -> Iterator[None]:
    """Seeds the global generators for the block and gives them back as they were."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            if seed is not None:
                set_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


@contextmanager
def failures(is_callers: Callable[[BaseException], bool]) -> Iterator[None]:
    """Turns what a trial raises into a ``FineTuningError`` with its reason.

    Args:
        is_callers: Tells the errors that the caller's own function raised (a pruned trial): they
            pass as they are.
    """
    try:
        yield
    except (FineTuningError, MachineError, UserError):
        raise
    except Exception as error:
        if is_callers(error):
            raise
        text = str(error).strip()
        if is_out_of_memory(error):
            raise FineTuningError("out-of-memory", text or "out of memory") from error
        if _BROKEN_GPU.search(text):
            raise MachineError(text.splitlines()[0]) from error
        reason: Reason = "outside" if is_outside(error) else "error"
        raise FineTuningError(reason, f"{type(error).__name__}: {text}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was no memory for something, on the GPU or on the CPU."""
    text = str(error).lower()
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(words in text for words in _EXHAUSTED)


@contextmanager
def collected() -> Iterator[None]:
    """Frees what the block made, cycles and all, without walking what was there before it.

    A trainer is a knot of references that keeps the optimizer's state in memory until the
    collector unties it, and the collector rarely comes by itself. accelerate calls it at the
    start of each training run, but walking the hundreds of thousands of objects that the
    libraries keep takes longer than twenty steps of a small model. Frozen objects it skips.
    """
    if gc.get_freeze_count():
        # Somebody else's arrangement; undoing ours would undo theirs.
        yield
        return
    gc.freeze()
    try:
        yield
    except BaseException as error:
        let_go(error)
        raise
    finally:
        gc.collect()
        gc.unfreeze()


def let_go(error: BaseException | None) -> None:
    """Frees what the frames of an error hold."""
    # The frames of a traceback, and those that called them, hold the trainer for as long as
    # somebody holds the error.
    while error is not None:
        step = error.__traceback__
        while step is not None:
            frame: FrameType | None = step.tb_frame
            while frame is not None:
                # Frames that still run refuse.
                with suppress(RuntimeError):
                    frame.clear()
                frame = frame.f_back
            step = step.tb_next
        error = error.__cause__ or error.__context__


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
