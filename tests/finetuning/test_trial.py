"""What becomes of an adapter's ranks after training, and in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.finetuner import FineTuner
from optuna_lora_rl.finetuning.rank_options import RankChangeOptions
from optuna_lora_rl.finetuning.trial import TrialRequest
from optuna_lora_rl.vocabulary import OWN_INITIALISATIONS

Hash = Callable[[FineTuner], str]
SMALL = {"lora_rank": 6, "max_steps": 4, "batch_size": 2, "learning_rate": 1e-2}


def reloaded_loss(tuner: FineTuner, folder: Path) -> tuple[float, dict[str, int]]:
    """The loss of a saved adapter in plain PEFT, and its layers' ranks."""
    model = AutoModelForCausalLM.from_pretrained(tuner.prepared.base.name)
    loaded = PeftModel.from_pretrained(model, str(folder))
    ranks = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in loaded.named_modules()
        if hasattr(module, "lora_A")
    }
    found = tuner.workspace.evaluate(loaded, tuner.prepared.tokens.validation, None)
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
    runs = iter([TrialRequest(0, {**SMALL, "truncate_rank": 2})])
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
    for more in ({"truncate_rank": 2}, {"rank_change": "loss"}):
        with pytest.raises(FineTuningError, match=r"mica does not go with (trunc|rank_)"):
            tuner.run({**more, "init_lora_weights": "mica"})


LIVELY = {
    "grow": 1.5,
    "patience": 1,
    "loss": {"every": 1, "window": 3, "plateau": 10.0, "calm": 5.0, "oscillation": 10.0},
    "gradient": {"every": 1, "window": 2, "slack": 0.9, "consistent": -1.0},
}


@pytest.fixture
def lively(tuner: FineTuner, monkeypatch: pytest.MonkeyPatch) -> FineTuner:
    """A fine-tuner whose ranks change at the least occasion."""
    options = RankChangeOptions.model_validate(LIVELY)
    changed = tuner.training.model_copy(update={"rank_change": options})
    monkeypatch.setattr(tuner.workspace, "training", changed)
    monkeypatch.setattr(tuner.workspace.price, "_training", changed)
    return tuner


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize(
    "more", [{}, {"init_lora_weights": "pissa"}, {"rank_allocation": "weight"}]
)
def test_ranks_that_change_are_told_paid_and_saved(
    lively: FineTuner, base_hash: Hash, tmp_path: Path, kind: str, more: dict[str, Any]
) -> None:
    before = base_hash(lively)
    wanted = {**SMALL, "lora_rank": 4, "max_steps": 6, **more}
    still = lively.run(wanted)
    result = lively.run({**wanted, "rank_change": kind}, folder=tmp_path)
    assert base_hash(lively) == before
    assert result.rank_changes and not still.rank_changes
    names = {module.name for module in lively.prepared.base.architecture.linears}
    now = dict(still.ranks) or dict.fromkeys(names, 4)
    for change in result.rank_changes:
        assert 0 < change["step"] < 6 and change["reason"]
        assert now[str(change["layer"])] == change["before"] != change["after"]
        now[str(change["layer"])] = int(change["after"])
    assert now == result.ranks
    loss, ranks = reloaded_loss(lively, tmp_path)
    assert loss == pytest.approx(result.metrics["loss"], rel=1e-4)
    if "init_lora_weights" not in more:
        assert ranks == result.ranks
    if kind == "loss":
        # Every verdict is to grow, and larger ranks cost more.
        assert result.flops > still.flops
        assert result.trainable_parameters > still.trainable_parameters


def test_a_run_is_counted_at_the_ranks_that_it_had(lively: FineTuner) -> None:
    wanted = {**SMALL, "lora_rank": 4, "max_steps": 6}
    result = lively.run({**wanted, "rank_change": "loss"})
    price = lively.workspace.price
    configuration = Configuration.of({**wanted, "rank_change": "loss"})
    ranks = {module.name: 4 for module in lively.prepared.base.architecture.linears}
    adapted = price.adapted(configuration)
    flops, since = 0.0, 0
    for step in [*sorted({int(change["step"]) for change in result.rank_changes}), 6]:
        flops += price.followed(configuration, adapted, [(step - since, ranks)]).flops
        ranks = ranks | {
            str(c["layer"]): int(c["after"]) for c in result.rank_changes if c["step"] == step
        }
        since = step
    assert result.flops == pytest.approx(flops)


def test_one_whose_ranks_change_runs_alone_and_may_be_cut(lively: FineTuner) -> None:
    notes: list[str] = []
    outcomes: list[Any] = []
    runs = iter([TrialRequest(0, {**SMALL, "rank_change": "loss", "truncate_rank": 2})])
    lively.run_packed(
        lambda: next(runs, None), lambda run, outcome: outcomes.append(outcome), says=notes.append
    )
    assert notes[0].startswith("trial 0 runs alone: rank_change loss changes the adapter's shapes")
    assert outcomes[0].rank_changes and set(outcomes[0].ranks.values()) == {2}


STARTS = [name + both for name in OWN_INITIALISATIONS for both in ("", "-both")]


@pytest.mark.parametrize("init", STARTS)
def test_own_starts_begin_at_the_base_and_load_in_plain_peft(
    tuner: FineTuner, base_hash: Hash, tmp_path: Path, init: str
) -> None:
    before = base_hash(tuner)
    wanted = {**SMALL, "lora_rank": 3, "init_lora_weights": init}
    still = tuner.run({**wanted, "max_steps": 1, "learning_rate": 1e-9})
    assert still.metrics["loss"] == pytest.approx(tuner.baseline().loss, rel=1e-5)
    result = tuner.run(wanted, folder=tmp_path)
    assert base_hash(tuner) == before
    loss, ranks = reloaded_loss(tuner, tmp_path)
    assert loss == pytest.approx(result.metrics["loss"], rel=1e-4)
    assert set(ranks.values()) == {6 if init.endswith("-both") else 3}


def test_own_starts_share_a_pass(tuner: FineTuner) -> None:
    runs = [
        TrialRequest(number, {**SMALL, "init_lora_weights": init})
        for number, init in enumerate(("xavier", "svd-both", "weight-adaptive-both"))
    ]
    notes: list[str] = []
    outcomes: dict[int, Any] = {}
    waiting = iter(runs)
    tuner.run_packed(
        lambda: next(waiting, None),
        lambda run, outcome: outcomes.update({run.number: outcome}),
        size=3,
        says=notes.append,
    )
    assert not notes
    for run in runs:
        alone = tuner.run(run.configuration)
        assert outcomes[run.number].metrics["loss"] == pytest.approx(
            alone.metrics["loss"], rel=1e-4
        )
    losses = {outcome.metrics["loss"] for outcome in outcomes.values()}
    assert len(losses | {tuner.run(SMALL).metrics["loss"]}) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"minimum": 9, "maximum": 8}, "minimum is 9, but must be at most maximum, 8"),
        ({"loss": {"calm": 0.5}}, "calm is 0.5, but must be at most oscillation, 0.05"),
    ],
)
def test_thresholds_that_contradict_each_other_are_refused(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        RankChangeOptions.model_validate(options)
