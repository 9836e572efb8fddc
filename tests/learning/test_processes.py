from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from optuna_lora_rl.learning.processes import processes

KILLED = """
import multiprocessing
import os
import signal

from optuna_lora_rl.learning.processes import processes

if __name__ == "__main__":
    with processes(2) as run:
        assert sum(run(abs, range(8))) == 28
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_the_order_of_the_jobs(count: int) -> None:
    with processes(count) as run:
        assert list(run(abs, [-3, 2, -1, 0, 5, -8])) == [3, 2, 1, 0, 5, 8]


def test_processes_end_with_the_one_that_began_them(tmp_path: Path) -> None:
    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    children = [int(child) for child in done.stdout.split()]
    assert len(children) == 2
    until = time.monotonic() + 20
    while any(psutil.pid_exists(child) for child in children):
        assert time.monotonic() < until
        time.sleep(0.1)
