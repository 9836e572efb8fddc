"""What a trial may not let out: its random numbers and the many ways in which it fails."""

from __future__ import annotations

import gc
import random
import re
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from types import FrameType

import numpy as np
import torch
from transformers import set_seed

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import is_outside
from optuna_lora_rl.finetuning.failure import FineTuningError
from optuna_lora_rl.finetuning.failure import MachineError
from optuna_lora_rl.finetuning.failure import Reason

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
