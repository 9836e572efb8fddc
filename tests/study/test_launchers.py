"""Studies under launchers of several processes, and several studies in one process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl import tune
from optuna_lora_rl.study import runner
from optuna_lora_rl.study.display import Display
from tests.study.conftest import SMALL
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner

StudyFile = Callable[..., Path]
ARGUMENTS = {key: value for key, value in SMALL.items() if key not in ("data", "budget")}
WAITS = "another study runs in this process; this one waits"
ARGUMENTS |= {"train": "tiny:dates-small", "trials": 3}


class Saying(Display):
    def __init__(self) -> None:
        self.said: list[str] = []

    def says(self, sentence: str) -> None:
        self.said.append(sentence)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(
    "arguments", [["run"], ["run", "--set", "packing=2"], ["compare"]], ids=" ".join
)
def test_a_process_that_is_one_of_several_is_refused_before_anything_is_made(
    study_file: StudyFile, tmp_path: Path, arguments: list[str]
) -> None:
    command, *options = arguments
    file = str(study_file())
    ended = run("optuna_lora_rl", command, file, *options, WORLD_SIZE="2")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: WORLD_SIZE=2 in the environment says that a launcher")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_torchrun_with_two_processes_is_refused(study_file: StudyFile, tmp_path: Path) -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    file = str(study_file())
    ended = run(*launcher, "-m", "optuna_lora_rl", "run", file)
    assert ended.returncode != 0
    assert "error: WORLD_SIZE=2 in the environment says that a launcher" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_sizes_of_an_adapter_are_not_measured_by_one_of_several(
    study_file: StudyFile, tmp_path: Path
) -> None:
    file = str(study_file({"budget": 1}))
    assert run("optuna_lora_rl", "run", file).returncode == 0
    adapter = str(tmp_path / "out" / "best")
    ended = run("optuna_lora_rl", "truncate", adapter, "--study", file, PMI_SIZE="3")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: PMI_SIZE=3 in the environment says that a launcher")
    assert ended.stderr.count("\n") == 1


def test_one_process_of_a_launcher_finds_what_a_plain_one_finds(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes = {"training.evaluations": 1, "budget": 2}
    plain = runner.run(make_spec(changes)).study
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    display = Saying()
    launched = runner.run(make_spec({**changes, "output": str(tmp_path / "other")}),
                          display=display).study  # fmt: skip
    assert [t.values for t in launched.trials] == [t.values for t in plain.trials]
    note = "not used: ACCELERATE_MIXED_PRECISION=bf16, which a launcher set; the file alone counts"
    assert display.said.count(note) == 1


@pytest.mark.parametrize("packing", ["off", 2])
def test_studies_in_threads_of_one_process_find_what_they_find_alone(
    tmp_path: Path, packing: str | int
) -> None:
    found: dict[str, Any] = {}
    displays = {name: Saying() for name in ("a", "b")}
    settings = {"a": {"seed": 1}, "b": {"seed": 2, "validation": "tiny:arithmetic-small"}}

    def study(name: str, prefix: str) -> None:
        found[prefix + name] = tune(
            **ARGUMENTS,
            packing=packing,
            data={"max_train_samples": 16, "max_validation_samples": 8},
            output=tmp_path / prefix / name,
            display=displays[name] if prefix == "together" else None,
            **settings[name],
        )

    for name in settings:
        study(name, "alone")
    threads = [threading.Thread(target=study, args=(name, "together")) for name in settings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in settings:
        alone, together = found[f"alone{name}"], found[f"together{name}"]
        assert [t.values for t in together.study.trials] == [t.values for t in alone.study.trials]
        assert together.best_configuration == alone.best_configuration
    said = [*displays["a"].said, *displays["b"].said]
    assert said.count(WAITS) == 1


@pytest.mark.parametrize("extra", [{"deepspeed": {"zero_optimization": {}}}, {"fsdp": True}])
@pytest.mark.parametrize("command", ["validate", "run"])
def test_what_needs_several_processes_is_refused_by_its_key(
    study_file: StudyFile, extra: dict[str, Any], command: str
) -> None:
    ended = run("optuna_lora_rl", command, str(study_file({"training.extra": extra})))
    (name,) = extra
    assert ended.returncode == 2
    assert f"training.extra.{name} is for training with several processes" in ended.stderr
    assert "Traceback" not in ended.stderr and ended.stderr.count("\n") == 1


def test_an_argument_that_only_the_trainer_refuses_is_said_in_a_sentence(
    study_file: StudyFile,
) -> None:
    ended = run("optuna_lora_rl", "run", str(study_file({"training.extra": {"loss_type": "x"}})))
    assert ended.returncode == 2
    assert "error: training.extra: Invalid `loss_type` x" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_study_waits_for_one_in_another_thread(
    paper: type[PaperTuner], make_spec: MakeSpec, tmp_path: Path
) -> None:
    inside, done = threading.Event(), threading.Event()

    class Holding(Display):
        def trial_starts(self, *_: Any) -> None:
            inside.set()
            done.wait(60)

    first = threading.Thread(target=runner.run, args=(make_spec(),), kwargs={"display": Holding()})
    first.start()
    assert inside.wait(60)
    saying = Saying()
    spec = make_spec({"output": str(tmp_path / "other")})
    second = threading.Thread(target=runner.run, args=(spec,), kwargs={"display": saying})
    second.start()
    second.join(0.5)
    assert second.is_alive() and not (tmp_path / "other").exists()
    done.set()
    first.join()
    second.join()
    assert saying.said.count(WAITS) == 1
