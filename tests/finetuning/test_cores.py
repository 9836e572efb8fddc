"""Runs on one machine share its cores."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from optuna_lora_rl.finetuning import cores
from optuna_lora_rl.finetuning.cores import Cores

ANOTHER = """
import sys
from optuna_lora_rl.finetuning.cores import Cores

with Cores(None, print):
    print("runs", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine of eight cores on which nothing runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


def another() -> subprocess.Popen[str]:
    """Starts another run in a process of its own."""
    run = subprocess.Popen(
        [sys.executable, "-c", ANOTHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None and run.stdout.readline() == "runs\n"
    return run


def ended(run: subprocess.Popen[str]) -> None:
    run.communicate("\n", timeout=60)
    assert run.returncode == 0


def test_a_run_takes_its_share_while_others_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with Cores(None, said.append) as own:
        assert torch.get_num_threads() == 8 and not said
        first = another()
        # Not at every step.
        monkeypatch.setattr(cores, "_EVERY", 3600.0)
        own.settle()
        assert torch.get_num_threads() == 8
        monkeypatch.setattr(cores, "_EVERY", 0.0)
        own.settle()
        assert torch.get_num_threads() == 4
        own.settle()
        second = another()
        own.settle()
        assert torch.get_num_threads() == 2
        ended(first)
        # A killed one leaves its file, and no lock.
        second.kill()
        second.wait()
        own.settle()
        assert torch.get_num_threads() == 8
    assert said == [
        "another run on this machine: 4 threads from now on",
        "2 other runs on this machine: 2 threads from now on",
        "no other run on this machine: 8 threads from now on",
    ]


def test_one_that_joins_begins_with_its_share_and_gives_it_back() -> None:
    first = another()
    with Cores(None, print):
        assert torch.get_num_threads() == 4
    assert torch.get_num_threads() == 8
    ended(first)


def test_no_run_takes_more_than_is_of_use_to_it() -> None:
    with Cores(1, print):
        assert torch.get_num_threads() == 1


def test_who_sets_the_number_of_threads_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    first = another()
    with Cores(None, print):
        assert torch.get_num_threads() == 8
    ended(first)


def test_a_home_that_cannot_be_written_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with Cores(None, print) as own:
        monkeypatch.setattr(cores, "_EVERY", 0.0)
        own.settle()
        assert torch.get_num_threads() == 8
