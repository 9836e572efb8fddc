"""Several workers on one PostgreSQL study. Skipped where no PostgreSQL server is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

SPEC = """\
name: shared
data: tiny:dates-small
space:
  lora_rank: [2, 4, 8, 16]
  learning_rate: {{low: 1.0e-4, high: 1.0e-2, log: true}}
  max_steps: 2
training: {{evaluations: 1}}
sampler: {{name: rl, seed: 0}}
budget: {{trials: 6}}
storage: {url}
output: {folder}
"""

# A worker of four: equal seeds, results that take a while, a space with few enough places.
WORKER = """\
import sys, time
import optuna
from optuna_lora_rl import RLSampler

def objective(trial):
    rank = trial.suggest_int("lora_rank", 2, 64, log=True)
    rate = trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    target = trial.suggest_categorical("target_modules", ["qv", "mlp", "all-linear"])
    time.sleep(0.05)
    return abs(rate / 4e-4 - 1) + 1 / rank + (target == "qv")

study = optuna.load_study(study_name="four", storage=sys.argv[1], sampler=RLSampler(seed=0))
study.optimize(objective, n_trials=8)
"""


def _programs() -> Path | None:
    """Folder of PostgreSQL's server programs, which Debian keeps out of the PATH."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return installed[-1].parent if installed else None


PROGRAMS = _programs()
pytestmark = pytest.mark.skipif(PROGRAMS is None, reason="no PostgreSQL server is installed")


def _as_server_user(command: list[str]) -> list[str]:
    # PostgreSQL refuses to run as root; the package made a user for it.
    return ["runuser", "-u", "postgres", "--", *command] if os.geteuid() == 0 else command


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A database of its own on loopback."""
    assert PROGRAMS is not None
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    control = str(PROGRAMS / "pg_ctl")
    initdb = [str(PROGRAMS / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", "tester"]
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder}
    subprocess.run(_as_server_user(initdb), **quiet)
    options = f"-h 127.0.0.1 -p {port} -k {folder}"
    data = ["-D", str(folder / "data"), "-w"]
    subprocess.run(
        _as_server_user([control, *data, "-l", str(folder / "log"), "-o", options, "start"]),
        **quiet,
    )
    yield f"postgresql://tester@127.0.0.1:{port}/postgres"
    subprocess.run(_as_server_user([control, *data, "-m", "immediate", "stop"]), **quiet)
    shutil.rmtree(folder)


def test_two_workers_share_the_budget_and_repeat_nothing(url: str, tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    (tmp_path / "shared.yaml").write_text(SPEC.format(url=url, folder=tmp_path / "out"))
    command = [sys.executable, "-m", "optuna_lora_rl", "run", str(tmp_path / "shared.yaml")]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)

    trials = optuna.load_study(study_name="shared", storage=url).get_trials()
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(finished) == len(trials)
    assert 6 <= len(trials) <= 7  # both may begin the last one at the same moment
    assert len({tuple(sorted(trial.params.items())) for trial in trials}) == len(trials)
    assert (tmp_path / "out" / "best" / "adapter_model.safetensors").exists()


def test_four_processes_with_one_seed_never_propose_the_same(url: str) -> None:
    pytest.importorskip("psycopg")
    optuna.create_study(study_name="four", storage=url)
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, url], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, "\n".join(errors)

    trials = optuna.load_study(study_name="four", storage=url).get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 32
    assert len({tuple(sorted(trial.params.items())) for trial in trials}) == 32
