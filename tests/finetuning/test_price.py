from __future__ import annotations

import multiprocessing
import pickle
import time

import numpy as np
import torch

from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.price import Meter


def test_the_meter_sees_time_and_memory() -> None:
    # In a process of its own: one that has freed gigabytes takes new memory from them.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(_meter_sees_time_and_memory)


def _meter_sees_time_and_memory() -> None:
    with Meter(torch.device("cpu")) as idle:
        time.sleep(0.01)
    with Meter(torch.device("cpu")) as busy:
        block = np.ones(50_000_000)
        time.sleep(0.1)
    assert block.sum() > 0
    assert idle.seconds >= 0.01 and busy.seconds >= 0.1
    assert busy.peak_bytes - idle.peak_bytes > 200_000_000


def test_a_failure_survives_pickling() -> None:
    failure = pickle.loads(pickle.dumps(FineTuningError("diverged", "the loss was nan")))
    assert (failure.reason, failure.message) == ("diverged", "the loss was nan")
