"""What a run cost, measured: wall time and peak memory of this process."""

from __future__ import annotations

import threading
import time

import psutil
import torch


class Meter:
    """Measures the block that it is entered for.

    On a GPU the peak is what CUDA allocated; on a CPU it is the process's resident memory,
    sampled by a thread, and so includes the libraries.

    Attributes:
        seconds: Wall time.
        peak_bytes: Peak memory.
    """

    _INTERVAL = 0.02

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0
        self._device = device
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._start = 0.0

    def __enter__(self) -> Meter:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *raised: object) -> None:
        self.seconds = time.perf_counter() - self._start
        if self._thread is None:
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device)
            return
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.peak_bytes = max(self.peak_bytes, process.memory_info().rss)
            if self._done.wait(self._INTERVAL):
                return
