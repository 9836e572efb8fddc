"""A machine that fails in a trial says nothing of the trial's configuration."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from optuna.trial import TrialState

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import sft
from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.study import runner
from optuna_lora_rl.study.outcome import Usage
from tests.study.conftest import MakeSpec

FORECAST = FineTuner.forecast
FAILURES = {
    "GPU": RuntimeError(
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might ..."
    ),
    "driver": RuntimeError("CUDA driver error: unspecified launch failure"),
    "disk": OSError(errno.EIO, "Input/output error", "adapter_model.safetensors"),
    "files": OSError(errno.EMFILE, "Too many open files", "adapter_model.safetensors"),
}


@pytest.mark.parametrize("packing", ["off", 2])
@pytest.mark.parametrize("case", FAILURES)
def test_a_machine_that_fails_ends_the_run_and_the_trial_is_repeated(
    case: str, packing: str | int, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    trains, calls = sft.train, []

    def breaks_once(*arguments: Any, **named: Any) -> int:
        calls.append(1)
        if len(calls) == 1:
            raise FAILURES[case]
        return trains(*arguments, **named)

    monkeypatch.setattr(sft, "train", breaks_once)
    spec = make_spec({"packing": packing})
    with pytest.raises(UserError) as ended:
        runner.run(spec)
    said = str(ended.value)
    assert "\n" not in said and "every finished trial is kept" in said
    assert str(FAILURES[case].args[-1]).split(":")[0].split("\n")[0] in said
    trials = runner.run(spec).study.trials
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    # Failed by the run's end, so that no sampler takes it for evidence, and tried again.
    assert {trial.user_attrs["failure"] for trial in failed} == {"interrupted"}
    repeated = {trial.user_attrs.get("retry_of") for trial in trials}
    assert {trial.number for trial in failed} <= repeated
    assert Usage.of(trials).trials == 3
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 3


def test_a_configuration_that_breaks_the_gpu_twice_is_not_tried_for_ever(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    trains, calls = sft.train, []

    def breaks_twice(*arguments: Any, **named: Any) -> int:
        calls.append(1)
        if len(calls) <= 2:
            raise FAILURES["GPU"]
        return trains(*arguments, **named)

    monkeypatch.setattr(sft, "train", breaks_twice)
    spec = make_spec()
    for _ in range(2):
        with pytest.raises(UserError, match="the machine failed in trial"):
            runner.run(spec)
    trials = runner.run(spec).study.trials
    assert [trial.user_attrs.get("failure") for trial in trials[:2]] == ["interrupted", "error"]
    assert [trial.state for trial in trials[2:]] == [TrialState.COMPLETE] * 2


@pytest.mark.parametrize("case", FAILURES)
def test_a_machine_that_fails_before_the_first_trial_ends_the_run(
    case: str, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*arguments: Any, **named: Any) -> int:
        raise FAILURES[case]

    monkeypatch.setattr(sft, "train", breaks)
    monkeypatch.setattr(FineTuner, "forecast", FORECAST)
    spec = make_spec()
    with pytest.raises(UserError) as ended:
        runner.run(spec)
    assert "\n" not in str(ended.value)
    monkeypatch.undo()
    assert Usage.of(runner.run(spec).study.trials).trials == 3
