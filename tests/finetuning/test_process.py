"""Nothing that a launcher, a trainer or a thread leaves in the process reaches a trial."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.trial import TrialResult
from tests.finetuning.packing.packs import packed
from tests.finetuning.packing.packs import runs_of
from tests.finetuning.runs import QUICK
from tests.finetuning.runs import Make

SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
# What launchers leave in a process that is the only one, and what would change its training.
ONE_PROCESS = {
    "WORLD_SIZE": "1",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}
SETTINGS = [
    {"ACCELERATE_MIXED_PRECISION": "bf16"},
    {"ACCELERATE_MIXED_PRECISION": "fp8"},
    {"ACCELERATE_DYNAMO_BACKEND": "EAGER"},
    {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    {"ACCELERATE_USE_FSDP": "true"},
    {"ACCELERATE_USE_DEEPSPEED": "true"},
    {"ACCELERATE_USE_MEGATRON_LM": "true"},
    {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
    {"ACCELERATE_TORCH_DEVICE": "meta"},
    {"WORLD_SIZE": "all"},
    {"LOCAL_RANK": ""},
    ONE_PROCESS,
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
]


def assert_equal(found: TrialResult, expected: TrialResult) -> None:
    assert found.curve == expected.curve
    assert found.metrics == expected.metrics


@pytest.mark.parametrize("name", SIZES)
def test_one_of_several_processes_trains_nothing(
    tuner: FineTuner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv(name, "2")
    calls: list[Any] = [
        tuner.prepare,
        tuner.traits,
        tuner.baseline,
        lambda: tuner.estimate(QUICK),
        lambda: tuner.run(QUICK),
        lambda: tuner.run_packed(lambda: None, lambda run, result: None),
        lambda: tuner.test(tmp_path),
        lambda: tuner.cut(tmp_path),
    ]
    for call in calls:
        with pytest.raises(UserError, match=f"^{name}=2 in the environment says that a launcher"):
            call()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(settings))
def test_a_launchers_settings_change_no_trial_and_stay(
    tuner: FineTuner, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    expected = tuner.run({**QUICK, "batch_size": 4})
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    assert_equal(tuner.run({**QUICK, "batch_size": 4}), expected)
    (outcome,), _ = packed(tuner, runs_of([{"batch_size": 4, **QUICK}]))
    assert outcome.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-5)
    assert dict(os.environ) == before


def test_settings_that_are_not_used_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna_lora_rl.finetuning import process

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    assert process.unused() == []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert process.unused() == ["ACCELERATE_MIXED_PRECISION=bf16"]


def test_the_callers_own_accelerator_stays_what_it_was(tuner: FineTuner) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=3)
    expected = tuner.run(QUICK)
    assert accelerator.mixed_precision == "bf16"
    assert accelerator.gradient_state.num_steps == 3
    accelerator.free_memory()
    assert_equal(tuner.run(QUICK), expected)


def test_a_trainers_switches_of_the_whole_process_are_put_back(make_tuner: Make) -> None:
    make_tuner(extra={"full_determinism": True}).run(QUICK)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_runs_from_several_threads_take_turns(make_tuner: Make) -> None:
    """Fine-tuners of their own, one of them twice, and a configuration that draws numbers."""
    wanted = [{**QUICK, "lora_dropout": 0.3, "lora_rank": 2 + i} for i in range(3)]
    first, second = make_tuner(), make_tuner(eval_batch_size=5)
    tuners = [first, second, first]
    expected = [t.run(w) for t, w in zip(tuners, wanted, strict=True)]
    found: dict[int, TrialResult] = {}
    inside, most = 0, 0

    def work(number: int) -> None:
        def report(*_: Any) -> None:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            threading.Event().wait(0.05)
            inside -= 1

        found[number] = tuners[number].run(wanted[number], report=report)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, result in enumerate(expected):
        assert_equal(found[number], result)
    assert most == 1


def test_checking_for_launchers_loads_no_heavy_library() -> None:
    code = "import sys; from optuna_lora_rl.finetuning import process; process.check();"
    code += "assert not {'torch', 'accelerate', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
