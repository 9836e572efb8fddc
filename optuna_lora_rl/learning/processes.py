"""Studies in processes of their own: the same results whatever their number."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait

import torch

from optuna_lora_rl.learning.environment import Map

# Studies that a process takes at a time: tasks of one surface travel together.
_AT_A_TIME = 4


@contextmanager
def processes(count: int) -> Iterator[Map]:
    """What applies a function to jobs in so many processes; in this one where it is 1.

    When the block is left early, the few studies that have begun end, and nothing further begins.
    """
    if count == 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, spawn, initializer=_begin)
    try:
        yield partial(pool.map, chunksize=_AT_A_TIME)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Prepare a process: one thread, no Ctrl-C of its own, and it ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
