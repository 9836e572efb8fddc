from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.finetuning import cost
from optuna_lora_rl.finetuning import ranks
from optuna_lora_rl.finetuning import workspace
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.ranks import Allocator
from optuna_lora_rl.finetuning.trial import TrialRequest

Make = Callable[..., FineTuner]
KINDS = ("weight", "gradient", "activation", "delta")
SMALL = {"lora_rank": 3, "max_steps": 2, "batch_size": 2, "learning_rate": 1e-2}


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the probes that were made."""
    made: list[str] = []
    own = Allocator._measured

    def measured(self: Allocator, kind: str, tell: OnActivity) -> dict[str, Any]:
        made.append(kind)
        return own(self, kind, tell)

    monkeypatch.setattr(Allocator, "_measured", measured)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_sum_to_the_mean_and_load_in_plain_peft(
    tuner: FineTuner, base_hash: Callable[[FineTuner], str], tmp_path: Path, kind: str
) -> None:
    before = base_hash(tuner)
    uniform = tuner.run(SMALL)
    result = tuner.run({**SMALL, "rank_allocation": kind}, folder=tmp_path)
    assert base_hash(tuner) == before
    assert uniform.ranks == {}
    count = len(tuner.prepared.base.architecture.linears)
    assert len(result.ranks) == count and sum(result.ranks.values()) == 3 * count
    assert len(set(result.ranks.values())) > 1
    model = AutoModelForCausalLM.from_pretrained(tuner.prepared.base.name)
    loaded = PeftModel.from_pretrained(model, str(tmp_path))
    shapes = {
        name.removeprefix("base_model.model."): module.lora_A["default"].weight.shape[0]
        for name, module in loaded.named_modules()
        if hasattr(module, "lora_A")
    }
    assert shapes == result.ranks
    scales = {
        round(module.scaling["default"], 6)
        for module in loaded.modules()
        if hasattr(module, "lora_A")
    }
    assert scales == {round(16 / 3, 6)}
    trained = sum(p.numel() for name, p in loaded.named_parameters() if "lora_" in name)
    assert trained == result.trainable_parameters
    loss = tuner.workspace.evaluate(loaded, tuner.prepared.tokens.validation, None)["loss"]
    assert loss == pytest.approx(result.metrics["loss"], rel=1e-5)


def test_a_budget_of_parameters_is_that_of_uniform_ranks(make_tuner: Make) -> None:
    tuner = make_tuner(rank_budget="parameters")
    uniform, _ = tuner.estimate(SMALL)
    shared, _ = tuner.estimate({**SMALL, "rank_allocation": "weight"})
    smallest = min(m.inputs + m.outputs for m in tuner.prepared.base.architecture.linears)
    assert 0 <= uniform.trainable_parameters - shared.trainable_parameters < smallest
    assert len(set(tuner.run({**SMALL, "rank_allocation": "weight"}).ranks.values())) > 1


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_change_the_base_keep_their_ranks(
    tuner: FineTuner, tmp_path: Path, init: str
) -> None:
    wanted = {**SMALL, "rank_allocation": "weight", "init_lora_weights": init}
    result = tuner.run(wanted, folder=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tuner.prepared.base.name)
    loaded = PeftModel.from_pretrained(model, str(tmp_path))
    loss = tuner.workspace.evaluate(loaded, tuner.prepared.tokens.validation, None)["loss"]
    assert loss == pytest.approx(result.metrics["loss"], rel=1e-4)


def test_what_layers_need_is_probed_once_a_study(
    make_tuner: Make, tmp_path: Path, probes: list[str]
) -> None:
    first, second = make_tuner(cache=tmp_path), make_tuner(cache=tmp_path)
    wanted = {**SMALL, "rank_allocation": "gradient"}
    one = first.run(wanted)
    other = first.run({**wanted, "target_modules": "qv", "lora_rank": 2})
    assert second.run(wanted).ranks == one.ranks
    assert len(other.ranks) == 4 and sum(other.ranks.values()) == 8
    assert probes == ["gradient"]
    first.run({**wanted, "rank_allocation": "activation"})
    assert probes == ["gradient", "activation"]


def test_equal_ranks_ask_for_nothing(
    make_tuner: Make, probes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "content_of", None)
    counted, _ = make_tuner().estimate(SMALL)
    assert counted.flops > 0 and probes == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_is_part_of_every_price(tuner: FineTuner, kind: str) -> None:
    wanted = {**SMALL, "rank_allocation": kind}
    counted, parts = tuner.estimate(wanted)
    longer, _ = tuner.estimate({**wanted, "max_steps": 4})
    # What does not grow with the steps is the probe.
    probe = counted.flops - (longer.flops - counted.flops)
    chosen = tuner.prepared.base.architecture.linears
    assert probe == pytest.approx(tuner.workspace.allocator._flops(kind)) and probe > 0
    assert sum(m.inputs + m.outputs for m in chosen) < counted.trainable_parameters
    result = tuner.run(wanted)
    assert result.flops == counted.flops and result.cost == parts["total"]


@pytest.mark.parametrize("kind", ["gradient", "activation"])
def test_a_look_takes_the_flops_that_are_counted(tuner: FineTuner, kind: str) -> None:
    prepared = tuner.prepared
    own = tuner.workspace.allocator
    batches = list(own._batches())
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        own._looked_at(kind, unseen)
    measured = counter.get_total_flops()
    expected = sum(
        len(batch["input_ids"])
        * cost.look_flops(
            prepared.base.architecture, batch["input_ids"].shape[1], backward=kind == "gradient"
        )
        for batch in batches
    )
    assert expected == pytest.approx(measured, rel=0.15)
    assert sum(len(b["input_ids"]) for b in batches) <= ranks.SEQUENCES


def test_side_by_side_is_as_alone(tuner: FineTuner) -> None:
    wanted = [{**SMALL, "rank_allocation": kind, "lora_dropout": 0.1} for kind in KINDS[:2]]
    outcomes: dict[int, Any] = {}
    runs = iter(
        [TrialRequest(number, configuration) for number, configuration in enumerate(wanted)]
    )
    notes: list[str] = []
    tuner.run_packed(
        lambda: next(runs, None),
        lambda run, outcome: outcomes.update({run.number: outcome}),
        size=2,
        says=notes.append,
    )
    for number, configuration in enumerate(wanted):
        alone = tuner.run(configuration)
        assert outcomes[number].ranks == alone.ranks
        assert outcomes[number].metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-5)
    assert not notes


def test_ranks_that_the_layers_cannot_take_are_refused(tuner: FineTuner) -> None:
    with pytest.raises(FineTuningError, match=r"rank_allocation weight: a budget of \d+ ranks"):
        tuner.run({"lora_rank": 64, "rank_allocation": "weight"})
    with pytest.raises(FineTuningError, match="orthogonal needs even ranks"):
        tuner.run({"init_lora_weights": "orthogonal", "rank_allocation": "delta"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_tells_how_far_its_probe_is(make_tuner: Make, kind: str) -> None:
    told: list[Activity] = []
    make_tuner().run({**SMALL, "rank_allocation": kind}, on_activity=told.append)
    of = {"weight": ("decomposing", 14), "delta": ("training", 20)}.get(kind, (kind, 4))
    probed = [one for one in told if one.what == f"probing the layers: {of[0]}"]
    assert probed and {one.total for one in probed} == {of[1]}
    # Then what every run tells.
    training = [one for one in told if one.what == "training"]
    assert [(one.done, one.total, one.unit) for one in training] == [
        (1, 2, "steps"),
        (2, 2, "steps"),
    ]
    evaluating = [one for one in told if one.what == "evaluating at step 2 of 2"]
    assert evaluating[-1].done == evaluating[-1].total and evaluating[-1].unit == "batches"
