"""Running a study: to its number, again, with failures, in two objectives."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from optuna_lora_rl import TuningContext
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.pruners import NAMES as PRUNERS
from optuna_lora_rl.samplers import CONTEXT_KEY
from optuna_lora_rl.samplers import RLSampler
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import storage
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner


def scores(study: optuna.Study) -> list[tuple[dict, float | None]]:
    return [(trial.params, trial.value) for trial in study.trials]


def test_a_real_study_leaves_an_adapter_that_plain_peft_loads(make_spec: MakeSpec) -> None:
    spec = make_spec({"training.report_to": ["tensorboard"]})
    result = runner.run(spec)
    assert result.ended_by == "budget"
    assert [trial.state for trial in result.study.trials] == [TrialState.COMPLETE] * 3
    best = result.study.best_trial
    assert result.best_adapter == spec.folder / "best"
    assert [folder.name for folder in (spec.folder / "adapters").iterdir()] == [
        f"trial-{best.number:04d}"
    ]
    facts = json.loads((result.best_adapter / "best.json").read_text())
    assert facts["score"] == best.value and facts["trial"] == best.number
    assert facts["configuration"]["lora_rank"] == best.params["lora_rank"]
    assert set(facts["untuned"]) >= {"loss", "token_accuracy"} and "loss" in facts["test"]

    logged = [folder.name for folder in sorted((spec.folder / "tensorboard").iterdir())]
    assert logged == ["trial-0000", "trial-0001", "trial-0002"]
    assert {file.name for file in result.best_adapter.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "best.json",
        "tokenizer.json",
    }

    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(str(result.best_adapter))
    assert model.peft_config["default"].r == best.params["lora_rank"]
    for name in ("quality", "cost", "trainable_parameters", "seconds", "peak_memory_mb", "loss"):
        assert isinstance(best.user_attrs[name], int | float)
    assert best.user_attrs["source"] == "tpe"


@pytest.mark.parametrize("sampler", ["rl", "tpe"])
def test_the_same_file_twice_gives_the_same_trials(
    make_spec: MakeSpec, tmp_path: Path, sampler: str
) -> None:
    changes = {"budget": 4, "sampler": sampler, "pruner": "median"}
    first = runner.run(make_spec({**changes, "output": str(tmp_path / "a")}))
    again = runner.run(make_spec({**changes, "output": str(tmp_path / "b")}))
    assert scores(first.study) == scores(again.study)


@pytest.mark.parametrize("sampler", ["rl", "bandit", "tpe", "random", "gp", "qmc", "nsgaii"])
def test_an_interrupted_study_proposes_what_an_uninterrupted_one_does(
    paper: type[PaperTuner], make_spec: MakeSpec, tmp_path: Path, sampler: str
) -> None:
    # rl is told how many trials there will be, so the number is the same in both.
    changes = {"budget": 12, "sampler": sampler}
    whole = runner.run(make_spec(changes | {"output": str(tmp_path / "whole")}))
    broken = make_spec(changes | {"output": str(tmp_path / "broken")})
    for began in (0, 3, 4):
        paper.failures = [None] * began + [KeyboardInterrupt()]
        assert runner.run(broken).ended_by == "interruption"
    resumed = runner.run(broken)
    kept = [trial for trial in resumed.study.trials if trial.state == TrialState.COMPLETE]
    assert len(resumed.study.trials) == 15
    assert [t.params for t in kept] == [t.params for t in whole.study.trials]
    assert [t.values for t in kept] == [t.values for t in whole.study.trials]


def test_the_sampler_knows_the_model_and_what_a_trial_will_cost(
    paper: type[PaperTuner], make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Callable[[Mapping[str, Any]], float]] = []
    monkeypatch.setattr(RLSampler, "charge", lambda self, cost: told.append(cost))
    spec = make_spec({"sampler": "rl", "budget": 2})
    study = runner.run(spec).study
    context = TuningContext.from_dict(study.user_attrs[CONTEXT_KEY])
    assert (context.hidden_size, context.examples, context.method) == (128, 40, "sft")
    assert context.batch_size is not None and context.steps is not None
    for trial in study.trials:
        charged = spec.objective.cost_weight * trial.user_attrs["cost"]
        assert told[0](trial.params) == pytest.approx(charged)


def test_trials_that_ran_beside_a_killed_one_are_not_proposed_again(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    spec = make_spec({"sampler": "random", "budget": 4})
    study = opening.open_study(spec)
    trials = [study.ask() for _ in range(3)]
    for trial in (trials[0], trials[2]):
        opening.propose(spec, trial)
    # The second one's process ends before it has a configuration.
    outcome.fail(trials[1], outcome.KILLED, "killed")
    study.tell(trials[1], state=TrialState.FAIL)
    trials.append(study.ask())
    opening.propose(spec, trials[3])
    rates = [trial.params["learning_rate"] for trial in trials if trial.params]
    assert len(set(rates)) == 3


def test_a_study_ends_when_every_configuration_has_been_tried(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    space = {"learning_rate": [1e-4, 1e-3], "lora_rank": [2, 4], "max_steps": 4}
    spec = make_spec({"space": space, "budget": 20, "sampler": "rl"})
    result = runner.run(spec)
    assert (result.ended_by, result.reason) == ("budget", "all 4 configurations of the space")
    assert len(result.study.trials) == 4
    assert len(runner.run(spec).study.trials) == 4


def test_running_again_goes_on_to_the_wished_number(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    assert len(runner.run(make_spec({"budget": 3})).study.trials) == 3
    assert len(runner.run(make_spec({"budget": 3})).study.trials) == 3
    result = runner.run(make_spec({"budget": 5}))
    assert len(result.study.trials) == 5
    assert len({trial.params["learning_rate"] for trial in result.study.trials}) == 5
    assert set(paper.seeds) == {0}


def test_the_test_split_is_read_once_for_each_final_best(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    runner.run(make_spec({"budget": 3}))
    result = runner.run(make_spec({"budget": 3}))
    assert len(paper.tested) == 1
    assert result.study.user_attrs["test"]["trial"] == result.study.best_trial.number


@pytest.mark.parametrize(
    ("budget", "trials"),
    [({"trials": None, "cost": 1.0}, 2), ({"trials": 4, "cost": 100.0}, 4)],
)
def test_the_nearest_limit_ends_the_study(
    paper: type[PaperTuner], make_spec: MakeSpec, budget: dict, trials: int
) -> None:
    # Rank 4 costs half a reference run.
    spec = make_spec({"budget": budget, "space.lora_rank": 4})
    assert len(runner.run(spec).study.trials) == trials


def test_hours_count_over_all_runs(paper: type[PaperTuner], make_spec: MakeSpec) -> None:
    # A trial on paper takes half a second.
    spec = make_spec({"budget": {"trials": None, "hours": 1.2 / 3600}})
    assert len(runner.run(spec).study.trials) == 3
    assert len(runner.run(spec).study.trials) == 3


def test_the_clock_ends_a_run_and_the_next_has_it_anew(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    late = runner.run(make_spec({"budget": {"trials": 3, "wall_hours": 1e-9}}))
    assert late.ended_by == "budget" and "on the clock" in late.reason
    assert not late.study.trials
    again = runner.run(make_spec({"budget": {"trials": 3, "wall_hours": 1.0}}))
    assert len(again.study.trials) == 3


def test_a_failing_trial_is_recorded_and_the_study_goes_on(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    paper.failures = [
        FineTuningError("diverged", "the loss is not finite"),
        FineTuningError("out-of-memory", "CUDA out of memory"),
        ZeroDivisionError("a bug of somebody's"),
    ]
    study = runner.run(make_spec({"budget": 5})).study
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 3 + ["COMPLETE"] * 2
    assert [trial.user_attrs.get("failure") for trial in study.trials[:3]] == [
        "diverged",
        "out-of-memory",
        "error",
    ]
    assert "ZeroDivisionError" in study.trials[2].user_attrs["failure_message"]


def test_three_equal_failures_stop_the_study(paper: type[PaperTuner], make_spec: MakeSpec) -> None:
    paper.failures = [FineTuningError("error", f"no column at row {n}") for n in range(9)]
    result = runner.run(make_spec({"budget": 9}))
    assert result.ended_by == "failures" and result.reason == "no column at row 0"
    assert len(result.study.trials) == 3 and result.best_adapter is None


def test_later_equal_failures_do_not_stop_it(paper: type[PaperTuner], make_spec: MakeSpec) -> None:
    paper.failures = [None, *(FineTuningError("diverged", "not finite") for _ in range(4))]
    assert runner.run(make_spec({"budget": 6})).ended_by == "budget"


# "pareto" is for two objectives: tests/study/test_packing.py has a study of that kind.
@pytest.mark.parametrize("pruner", [name for name in PRUNERS if name != "pareto"])
def test_every_pruner_runs(paper: type[PaperTuner], make_spec: MakeSpec, pruner: str) -> None:
    options = {"threshold": {"lower": 0.2}, "wilcoxon": {"p_threshold": 0.5}}.get(pruner, {})
    spec = make_spec(
        {
            "budget": 12,
            "pruner": {"name": pruner, **options},
            "training.evaluations": 4,
            "sampler": "random",
        }
    )
    study = runner.run(spec).study
    states = {trial.state for trial in study.trials}
    assert len(study.trials) == 12 and TrialState.FAIL not in states
    if pruner in ("median", "percentile", "successive-halving", "threshold"):
        assert TrialState.PRUNED in states
    for trial in study.get_trials(states=[TrialState.PRUNED]):
        assert 0 < trial.user_attrs["cost"] < trial.params["lora_rank"] / 8


def test_a_pareto_study_keeps_the_front(paper: type[PaperTuner], make_spec: MakeSpec) -> None:
    spec = make_spec({"objective.objectives": ["quality", "cost"], "budget": 8})
    result = runner.run(spec)
    front = {trial.number for trial in result.study.best_trials}
    kept = {int(folder.name[-4:]) for folder in (spec.folder / "adapters").iterdir()}
    assert front <= kept and len(kept - front) <= 1
    facts = json.loads((spec.folder / "best" / "best.json").read_text())
    assert facts["score"] == max(trial.user_attrs["score"] for trial in result.study.trials)


def test_a_full_disk_is_one_sentence_and_the_trial_is_run_again(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    full = OSError(28, "No space left on device", "adapter_model.safetensors")
    wrapped = FineTuningError("error", "OSError")
    wrapped.__cause__ = full
    paper.failures = [None, wrapped]
    with pytest.raises(UserError, match="no room is left on the disk at adapter_model"):
        runner.run(make_spec())
    study = runner.run(make_spec()).study
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL"] + ["COMPLETE"] * 2
    assert study.trials[2].params == study.trials[1].params


def test_an_untuned_model_that_cannot_be_evaluated_is_one_sentence(
    paper: type[PaperTuner], make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PaperTuner) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\n...")

    monkeypatch.setattr(paper, "baseline", fail)
    with pytest.raises(UserError, match="the untuned model cannot be evaluated: CUDA out of mem"):
        runner.run(make_spec())


def test_a_failing_test_split_does_not_cost_the_adapter(
    paper: type[PaperTuner], make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PaperTuner, adapter: Path) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(paper, "test", fail)
    result = runner.run(make_spec())
    assert result.best_adapter is not None and "test" not in result.study.user_attrs


def test_a_worker_that_fell_silent_elsewhere_is_replaced(
    paper: type[PaperTuner], make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "HEARTBEAT_INTERVAL", 1)
    monkeypatch.setattr(storage, "GRACE_PERIOD", 1)
    spec = make_spec()
    study = opening.open_study(spec)
    lost = study.ask()
    opening.propose(spec, lost)
    lost.set_user_attr("owner", {"host": "elsewhere"})
    study._storage.record_heartbeat(lost._trial_id)
    time.sleep(3)
    trials = runner.run(spec).study.trials
    assert [trial.state.name for trial in trials] == ["FAIL"] + ["COMPLETE"] * 3
    assert trials[1].params == trials[0].params


def test_a_folder_with_another_studys_adapters_is_refused(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    first = make_spec({"budget": 1})
    runner.run(first)
    kept = (first.folder / "best" / "best.json").read_text()
    with pytest.raises(UserError, match="holds the adapters of the study 'small'; give 'other'"):
        runner.run(make_spec({"name": "other", "budget": 1}))
    assert (first.folder / "best" / "best.json").read_text() == kept
    runner.run(make_spec({"budget": 2}))


def test_a_short_run_is_judged_at_the_same_shares_of_its_training(make_spec: MakeSpec) -> None:
    # Of four steps, and evaluated after each.
    spec = make_spec({"budget": 1, "training.evaluations": 8})
    (trial,) = runner.run(spec).study.trials
    assert sorted(trial.intermediate_values) == [2, 4, 6, 8]
    assert "evaluation" not in trial.user_attrs
