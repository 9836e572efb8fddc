"""What becomes of an adapter's ranks after training, and in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from optuna_lora_rl.finetuning.failure import FineTuningError
from optuna_lora_rl.finetuning.trial import FineTuner
from optuna_lora_rl.finetuning.trial import Run

Hash = Callable[[FineTuner], str]
SMALL = {"lora_rank": 6, "max_steps": 4, "batch_size": 2, "learning_rate": 1e-2}


def reloaded_loss(tuner: FineTuner, folder: Path) -> tuple[float, dict[str, int]]:
    """The loss of a saved adapter in plain PEFT, and its layers' ranks."""
    model = AutoModelForCausalLM.from_pretrained(tuner._prepared.base.name)
    loaded = PeftModel.from_pretrained(model, str(folder))
    ranks = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in loaded.named_modules()
        if hasattr(module, "lora_A")
    }
    found = tuner._shared.evaluate(loaded, tuner._prepared.tokens.validation, None)
    return found["loss"], ranks


@pytest.mark.parametrize("limit", [{"truncate_energy": 0.9}, {"truncate_rank": 2}])
@pytest.mark.parametrize("more", [{}, {"use_dora": True, "use_rslora": True}])
def test_an_adapter_that_was_cut_is_scored_and_saved_as_it_is(
    tuner: FineTuner, base_hash: Hash, tmp_path: Path, limit: dict[str, Any], more: dict[str, Any]
) -> None:
    before = base_hash(tuner)
    whole = tuner.run({**SMALL, **more})
    result = tuner.run({**SMALL, **more, **limit}, folder=tmp_path)
    assert base_hash(tuner) == before
    cut = result.truncation
    assert cut["quality_before"] == whole.quality == result.curve[-1]["quality"]
    assert cut["quality_after"] == result.quality != whole.quality
    assert cut["parameters_after"] < cut["parameters_before"]
    assert max(result.ranks.values()) == cut["largest_rank"] <= limit.get("truncate_rank", 6)
    # Training cost what it cost.
    assert result.cost == whole.cost
    assert result.score == result.quality - 0.1 * result.cost
    loss, ranks = reloaded_loss(tuner, tmp_path)
    assert ranks == result.ranks
    assert loss == pytest.approx(result.metrics["loss"], rel=1e-5)
    assert whole.truncation == {} and whole.ranks == {}


def test_a_limit_that_cuts_nothing_changes_nothing(tuner: FineTuner) -> None:
    whole = tuner.run(SMALL)
    result = tuner.run({**SMALL, "truncate_rank": 6})
    assert result.quality == whole.quality and result.metrics == whole.metrics
    assert result.truncation["largest_error"] == 0 and result.ranks == {}


def test_one_that_is_cut_runs_alone(tuner: FineTuner) -> None:
    notes: list[str] = []
    outcomes: list[Any] = []
    runs = iter([Run(0, {**SMALL, "truncate_rank": 2})])
    tuner.run_packed(
        lambda: next(runs, None), lambda run, outcome: outcomes.append(outcome), says=notes.append
    )
    assert notes[0].startswith("trial 0 runs alone: truncate changes the ranks")
    assert outcomes[0].truncation["largest_rank"] == 2


def test_limits_that_do_not_go_together_are_refused(tuner: FineTuner) -> None:
    with pytest.raises(FineTuningError, match="two limits of one rank; set one of them"):
        tuner.run({"truncate_rank": 2, "truncate_energy": 0.9})
    with pytest.raises(FineTuningError, match="pissa does not go with truncate"):
        tuner.run({"truncate_rank": 2, "init_lora_weights": "pissa"})
