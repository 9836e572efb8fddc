"""What cannot share a pass runs alone in the same call, and says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.finetuner import FineTuningError
from optuna_lora_rl.finetuning.packing import packable
from optuna_lora_rl.finetuning.trial import TrialRequest
from optuna_lora_rl.finetuning.trial import TrialResult

# transformers renames what PEFT still calls by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

Make = Callable[..., FineTuner]
Hash = Callable[[FineTuner], str]

QUICK: dict[str, Any] = {"max_steps": 3, "learning_rate": 5e-3}


def packed(tuner: FineTuner, runs: list[TrialRequest]) -> tuple[list[Any], list[str]]:
    """Returns the outcomes in the order of the runs, and the notes."""
    waiting, outcomes, notes = iter(runs), {}, []
    tuner.run_packed(
        lambda: next(waiting, None),
        lambda run, outcome: outcomes.update({run.number: outcome}),
        size=4,
        says=notes.append,
    )
    return [outcomes[run.number] for run in runs], notes


def assert_close(found: Any, expected: TrialResult) -> None:
    assert isinstance(found, TrialResult), found
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5, abs=1e-5)
    assert found.steps == expected.steps


@pytest.mark.parametrize(
    ("configuration", "reason"),
    [
        ({"use_dora": True, "lora_dropout": 0.1}, "use_dora normalises by the whole adapted"),
        ({"bias": "all"}, "bias all trains the base model's own biases"),
        ({"bias": "lora_only"}, "bias lora_only trains the base model's own biases"),
    ],
    ids=lambda given: str(given)[:24],
)
def test_a_configuration_that_cannot_runs_alone_between_the_others(
    tuner: FineTuner, base_hash: Hash, configuration: dict[str, Any], reason: str
) -> None:
    before = base_hash(tuner)
    alike = [{**QUICK, "lora_rank": 1 + i, "lora_dropout": 0.1} for i in range(4)]
    configurations = [*alike[:2], {**QUICK, **configuration}, *alike[2:]]
    runs = [TrialRequest(10 + i, each) for i, each in enumerate(configurations)]
    outcomes, notes = packed(tuner, runs)
    (note,) = notes
    assert note.startswith(f"trial 12 runs alone: {reason}") and "\n" not in note
    # It is the very same run, to the last bit.
    assert outcomes[2].curve == tuner.run(runs[2].configuration).curve
    for run, outcome in zip(runs, outcomes, strict=True):
        assert_close(outcome, tuner.run(run.configuration))
    assert base_hash(tuner) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"report_to": ["tensorboard"]}, "trackers follow one run at a time"),
        (
            {"cost_source": "measured"},
            "objective.cost_source is measured, and a pack's time is shared",
        ),
        ({"extra": {"neftune_noise_alpha": 5.0}}, "training.extra.neftune_noise_alpha changes"),
        ({"extra": {"label_smoothing_factor": 0.1}}, "training.extra.label_smoothing_factor"),
    ],
    ids=lambda given: str(given)[:32],
)
@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor:FutureWarning")
def test_options_that_cannot_make_all_run_alone(
    make_tuner: Make, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    tuner = make_tuner(cache=tmp_path / "cache", reference=QUICK, **options)
    runs = [
        TrialRequest(i, {**QUICK, "lora_rank": 1 + i}, folder=tmp_path / f"{i}") for i in range(2)
    ]
    outcomes, notes = packed(tuner, runs)
    assert len(notes) == 2
    for i, note in enumerate(notes):
        assert note.startswith(f"trial {i} runs alone: {reason}"), note
    for run, outcome in zip(runs, outcomes, strict=True):
        expected = tuner.run(run.configuration, folder=tmp_path / "again")
        assert outcome.curve == expected.curve
        assert set(outcome.cost_parts) == set(expected.cost_parts)


def test_options_that_change_nothing_about_it_are_no_obstacle(make_tuner: Make) -> None:
    tuner = make_tuner(extra={"neftune_noise_alpha": None, "adam_beta2": 0.9})
    outcomes, notes = packed(tuner, [TrialRequest(0, QUICK)])
    assert notes == []
    assert_close(outcomes[0], tuner.run(QUICK))


def test_one_that_fails_alone_fails_by_itself(tuner: FineTuner) -> None:
    fast = {"learning_rate": 1e20, "max_grad_norm": 0.0, "optim": "sgd", "use_dora": True}
    outcomes, notes = packed(
        tuner, [TrialRequest(0, QUICK), TrialRequest(1, {**QUICK, **fast}), TrialRequest(2, QUICK)]
    )
    assert len(notes) == 1
    assert isinstance(outcomes[1], FineTuningError) and outcomes[1].reason == "diverged"
    for outcome in (outcomes[0], outcomes[2]):
        assert_close(outcome, tuner.run(QUICK))


def test_an_adapter_of_a_run_that_was_alone_loads_too(tuner: FineTuner, tmp_path: Path) -> None:
    runs = [TrialRequest(0, QUICK), TrialRequest(1, {**QUICK, "use_dora": True}, folder=tmp_path)]
    outcomes, _ = packed(tuner, runs)
    fresh = AutoModelForCausalLM.from_pretrained(tuner.model.name)
    model = PeftModel.from_pretrained(fresh, tmp_path)
    found = tuner.workspace.evaluate(model, tuner.prepared.tokens.validation, None)["loss"]
    assert found == pytest.approx(outcomes[1].metrics["loss"], rel=1e-4)


def test_a_look_at_the_model_leaves_it_as_it_was(tuner: FineTuner) -> None:
    base = tuner.prepared.base
    numbers, attributes = torch.get_rng_state(), set(base.model.__dict__)
    probed = packable.probe(base.model, base.architecture.linears)
    assert probed.obstacle is None
    heads = {linear.name for linear in base.architecture.linears} - probed.modules
    assert all("layers" not in name for name in heads)
    assert torch.equal(numbers, torch.get_rng_state())
    assert set(base.model.__dict__) == attributes and not base.model.training
    assert not any(module._forward_hooks for module in base.model.modules())
