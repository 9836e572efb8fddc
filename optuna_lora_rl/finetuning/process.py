"""What a process has but one of, and every trainer in it shares.

Launchers (torchrun, accelerate launch, mpirun) leave settings in the environment, accelerate keeps
its state in classes, and torch has switches of the whole process. A trial shall depend on none of
them, and change none of them for others.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager

from optuna_lora_rl.errors import UserError

# Where accelerate looks for the number of processes.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# What accelerate and transformers read of a launcher's settings, by the names' beginnings.
_LAUNCHERS = (
    "ACCELERATE_",
    "FORK_LAUNCHED",
    "FSDP_",
    "GROUP_RANK",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MEGATRON_LM_",
    "MPI_LOCAL",
    "MV2_COMM_WORLD_",
    "OMPI_COMM_WORLD_",
    "PARALLELISM_CONFIG_",
    "PMI_",
    "RANK",
    "TORCHELASTIC_",
    "WORLD_SIZE",
)
# Of accelerate's settings those that would change how a trial trains, and the values that do not.
_CHANGING = (
    "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_TORCH_DEVICE",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
_NEUTRAL = ("", "0", "1", "false", "no")

_turn = threading.RLock()


def check() -> None:
    """Refuses to be one of several processes that a launcher started.

    Raises:
        UserError: Naming the variable of the environment that says so.
    """
    for name in _SIZES:
        size = os.environ.get(name, "").strip()
        if size.isdecimal() and int(size) > 1:
            raise UserError(
                f"{name}={size} in the environment says that a launcher (torchrun, accelerate "
                f"launch, mpirun) started {size} processes for one training, and a trial is "
                f"trained by one: start without the launcher, or unset {name} if it is left over"
            )


def unused() -> list[str]:
    """Returns the launcher's settings that would change how a trial trains, and do not."""
    said = {name: os.environ.get(name, "") for name in _CHANGING}
    return [f"{name}={value}" for name, value in said.items() if value.lower() not in _NEUTRAL]


@contextmanager
def turn(waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Lets one thread of the process at a time into the block.

    Args:
        waits: Called where another is in it.
    """
    if not _turn.acquire(blocking=False):
        waits()
        _turn.acquire()
    try:
        yield
    finally:
        _turn.release()


@contextmanager
def alone() -> Iterator[None]:
    """Makes the block depend on no launcher, trainer or thread beside it, and changes none.

    Raises:
        UserError: In one of several processes that a launcher started.
    """
    check()
    with turn(), _own_environment(), _own_accelerate(), _own_torch():
        yield


@contextmanager
def _own_environment() -> Iterator[None]:
    hidden = _take_out()
    try:
        yield
    finally:
        # Trainers, too, leave such settings there.
        _take_out()
        os.environ.update(hidden)


def _take_out() -> dict[str, str]:
    return {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_LAUNCHERS)}


@contextmanager
def _own_accelerate() -> Iterator[None]:
    from accelerate.state import AcceleratorState
    from accelerate.state import GradientState
    from accelerate.state import PartialState

    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            state.clear()
            state.update(values)


@contextmanager
def _own_torch() -> Iterator[None]:
    import torch

    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn
    switches = cudnn.deterministic, cudnn.benchmark
    try:
        yield
    finally:
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        cudnn.deterministic, cudnn.benchmark = switches
