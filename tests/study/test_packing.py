"""Trials side by side: the same study, the same records, in less time."""

from __future__ import annotations

import io
import threading
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from rich.console import Console
from sqlalchemy import event
from sqlalchemy.orm import Session

from optuna_lora_rl import tune
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.study import adapters
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import panel
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import summary
from optuna_lora_rl.study import trials as trials_module
from optuna_lora_rl.study.outcome import Usage
from optuna_lora_rl.study.panel import LiveDisplay
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner


def records(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [(trial.state, trial.params, trial.value) for trial in study.trials]


@pytest.mark.parametrize("said", [False, "off", "auto", 1, 8])
def test_packing_is_off_auto_or_a_number(make_spec: MakeSpec, said: Any) -> None:
    assert make_spec({"packing": said}).packing == ("off" if said is False else said)


@pytest.mark.parametrize("said", [0, -2, True, 2.5, "8", "on", [4]])
def test_another_packing_is_one_sentence(make_spec: MakeSpec, said: Any) -> None:
    with pytest.raises(UserError) as refused:
        make_spec({"packing": said})
    wanted = f"packing is {said!r}, but must be off, auto, or a whole number, at least 1"
    assert str(refused.value).endswith(f"small.yaml: {wanted}")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"objective.cost_source": "measured"}, "cannot be told apart in a pack"),
    ],
)
def test_what_needs_a_trial_of_its_own_is_not_packed(
    make_spec: MakeSpec, changes: dict[str, Any], reason: str
) -> None:
    make_spec(changes)
    with pytest.raises(UserError, match=reason):
        make_spec(changes | {"packing": "auto"})


def test_random_search_is_the_same_study_however_many_run_side_by_side(
    paper: type[PaperTuner], make_spec: MakeSpec, tmp_path: Path
) -> None:
    studies = {}
    for packing, most in (("off", 0), (4, 4), ("auto", 3)):
        paper.together = []
        output = str(tmp_path / f"{packing}")
        result = runner.run(
            make_spec({"budget": 10, "sampler": "random", "packing": packing, "output": output})
        )
        studies[packing] = records(result.study)
        assert max(paper.together, default=0) == most
        assert result.ended_by == "budget" and result.best_adapter is not None
    assert studies["off"] == studies[4] == studies["auto"]


@pytest.mark.parametrize("sampler", ["rl", "bandit", "tpe", "gp"])
def test_the_same_packed_file_twice_gives_the_same_trials(
    paper: type[PaperTuner], make_spec: MakeSpec, tmp_path: Path, sampler: str
) -> None:
    changes = {"budget": 9, "sampler": sampler, "pruner": "median", "packing": 4}
    first = runner.run(make_spec({**changes, "output": str(tmp_path / "a")})).study
    again = runner.run(make_spec({**changes, "output": str(tmp_path / "b")})).study
    assert records(first) == records(again) and len(first.trials) == 9
    assert len({str(trial.params) for trial in first.trials}) == 9


def test_a_study_goes_on_with_another_packing(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    for trials, packing in ((3, "off"), (8, 4), (9, "auto")):
        result = runner.run(make_spec({"budget": trials, "packing": packing}))
        assert [trial.state for trial in result.study.trials] == [TrialState.COMPLETE] * trials


def test_packed_trials_fail_each_for_itself(paper: type[PaperTuner], make_spec: MakeSpec) -> None:
    paper.failures = [
        None,
        FineTuningError("diverged", "the loss is not finite"),
        None,
        FineTuningError("out-of-memory", "CUDA out of memory"),
        ZeroDivisionError("a bug of somebody's"),
    ]
    study = runner.run(make_spec({"budget": 8, "packing": 4})).study
    assert [trial.user_attrs.get("failure") for trial in study.trials] == [
        *(None, "diverged", None, "out-of-memory", "error"),
        *(None, None, None),
    ]
    assert sum(trial.state == TrialState.COMPLETE for trial in study.trials) == 5


def test_a_score_that_is_no_number_is_a_failure(
    paper: type[PaperTuner], make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.study.conftest.math.log10", lambda value: float("nan"))
    result = runner.run(make_spec({"budget": 6, "packing": 4}))
    assert result.ended_by == "failures" and "nan" in result.reason
    assert {trial.user_attrs["failure"] for trial in result.study.trials} == {"diverged"}


def test_a_success_beside_equal_failures_lets_the_study_go_on(
    paper: type[PaperTuner], make_spec: MakeSpec, tmp_path: Path
) -> None:
    # The failures end first, and no trial begins before the one beside them has succeeded.
    paper.failures = [None, *(FineTuningError("diverged", "not finite") for _ in range(3))]
    result = runner.run(make_spec({"budget": 8, "packing": 4}))
    assert result.ended_by == "budget" and len(result.study.trials) == 8
    paper.failures = [FineTuningError("diverged", "not finite") for _ in range(9)]
    own = {"name": "hopeless", "output": str(tmp_path / "hopeless")}
    hopeless = runner.run(make_spec({"budget": 9, "packing": 4, **own}))
    assert hopeless.ended_by == "failures"
    assert 3 <= len(hopeless.study.trials) <= 4 and len(paper.failures) >= 5


def test_pruned_trials_leave_with_their_last_report(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    changes = {"budget": 16, "packing": 4, "pruner": "median", "training.evaluations": 4}
    study = runner.run(make_spec(changes | {"sampler": "random"})).study
    pruned = study.get_trials(states=[TrialState.PRUNED])
    assert pruned and len(study.trials) == 16
    for trial in pruned:
        assert trial.value == trial.intermediate_values[max(trial.intermediate_values)]
        assert 0 < trial.user_attrs["cost"] < trial.params["lora_rank"] / 8


@pytest.mark.parametrize(
    ("budget", "trials"),
    [
        # Trials on paper take half a second, and cost half a run of the reference at rank 4.
        ({"trials": None, "cost": 1.0}, 4),
        ({"trials": None, "hours": 2.2 / 3600}, 8),
        ({"trials": 6, "cost": 100.0}, 6),
    ],
)
def test_no_trial_begins_beyond_the_budget(
    paper: type[PaperTuner], make_spec: MakeSpec, budget: dict[str, Any], trials: int
) -> None:
    spec = make_spec({"budget": budget, "space.lora_rank": 4, "packing": 4})
    assert len(runner.run(spec).study.trials) == trials


def test_an_interrupted_pack_is_tried_again(
    paper: type[PaperTuner], make_spec: MakeSpec, tmp_path: Path
) -> None:
    changes = {"budget": 9, "packing": 4, "sampler": "random"}
    paper.failures = [*[None] * 5, KeyboardInterrupt()]
    spec = make_spec(changes)
    broken = runner.run(spec)
    assert broken.ended_by == "interruption"
    states = [trial.state for trial in broken.study.trials]
    interrupted = [t for t in broken.study.trials if t.state == TrialState.FAIL]
    assert 1 <= len(interrupted) <= 4 and TrialState.RUNNING not in states
    assert {t.user_attrs["failure"] for t in interrupted} == {"interrupted"}
    assert states.count(TrialState.WAITING) == len(interrupted)
    assert (spec.folder / "best" / "best.json").exists()

    study = runner.run(spec).study
    retried = [t for t in study.trials if "retry_of" in t.user_attrs]
    assert [t.params for t in retried] == [t.params for t in interrupted]
    assert sum(outcome.counts(trial) for trial in study.trials) == 9
    assert sum(trial.state == TrialState.COMPLETE for trial in study.trials) == 9


def test_a_full_disk_ends_the_pack_and_all_of_it_is_tried_again(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    wrapped = FineTuningError("error", "OSError")
    wrapped.__cause__ = OSError(28, "No space left on device", "adapter_model.safetensors")
    paper.failures = [None, None, wrapped]
    spec = make_spec({"budget": 6, "packing": 3})
    with pytest.raises(UserError, match="no room is left on the disk at adapter_model"):
        runner.run(spec)
    study = runner.run(spec).study
    assert [t.user_attrs.get("failure") for t in study.trials[:3]] == ["interrupted"] * 3
    assert [t.params for t in study.trials[3:6]] == [t.params for t in study.trials[:3]]
    assert sum(trial.state == TrialState.COMPLETE for trial in study.trials) == 6


def test_time_side_by_side_is_shared_out(
    paper: type[PaperTuner], make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A second passes from one thing that happens to the next.
    clock = SimpleNamespace(monotonic=map(float, count()).__next__)
    monkeypatch.setattr(trials_module, "time", clock)
    paper.failures = [FineTuningError("error", f"reason {'x' * n}") for n in range(3)]
    study = runner.run(make_spec({"budget": 3, "packing": 3})).study
    # Three begin one after the other, then fail one after the other.
    shares = [1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3 + 1 / 2, 1 / 3 + 1 / 2 + 1]
    seconds = [trial.user_attrs["seconds"] for trial in study.trials]
    assert seconds == pytest.approx(shares, abs=0.001)


def test_the_folder_of_a_running_trial_stays(make_spec: MakeSpec) -> None:
    spec = make_spec()
    study = opening.open_study(spec, heartbeat=False)
    for number in range(3):
        study.ask()
        adapters.folder_of(spec.folder, number).mkdir(parents=True)
    for number in (0, 2):
        study.tell(number, float(number))
    adapters.drop_others(study, spec.folder)
    left = {folder.name for folder in (spec.folder / "adapters").iterdir()}
    assert left == {"trial-0001", "trial-0002"}


def test_the_best_stays_when_it_ends_while_others_are_dropped(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    study = opening.open_study(spec, heartbeat=False)
    for number in range(2):
        study.ask()
        adapters.folder_of(spec.folder, number).mkdir(parents=True)
    study.tell(0, 0.0)
    read = study.get_trials

    def another_ends_after(**kwargs: Any) -> list[FrozenTrial]:
        trials = read(**kwargs)
        if not study._storage.get_trial(trials[1]._trial_id).state.is_finished():
            study.tell(1, 1.0)
        return trials

    monkeypatch.setattr(study, "get_trials", another_ends_after)
    adapters.drop_others(study, spec.folder)
    assert adapters.folder_of(spec.folder, 1).exists()


def test_a_trial_that_another_worker_gave_up_costs_nothing_else(
    paper: type[PaperTuner], make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec({"budget": 4, "packing": 2})
    course = PaperTuner._course

    def lose_the_first(self: PaperTuner, run: Any) -> Any:
        if run.number == 0:
            other = opening.load_study(spec)
            other.tell(0, state=TrialState.FAIL)
        yield from course(self, run)

    monkeypatch.setattr(PaperTuner, "_course", lose_the_first)
    console = Console(file=io.StringIO())
    study = runner.run(spec, display=panel.create(console)).study
    assert "another worker gave trial 0 up" in console.file.getvalue()
    assert sum(trial.state == TrialState.COMPLETE for trial in study.trials) == 4


def test_another_worker_may_look_at_a_pack_at_any_moment(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    spec = make_spec({"budget": 4, "packing": 2})
    study, seen, here = opening.open_study(spec), [], threading.current_thread()

    def look(_: Session) -> None:
        if threading.current_thread() is here and seen[-1:] != [None]:
            # Its own reading is nothing to look at.
            seen.append(None)
            other = opening.load_study(spec)
            running = Usage.of(other.get_trials(deepcopy=False)).running
            # Nothing of a trial that runs is given up, however little of it is written down.
            assert outcome.recover(other) == []
            seen[-1] = running

    event.listen(Session, "after_commit", look)
    try:
        runner.run(spec)
    finally:
        event.remove(Session, "after_commit", look)
    assert set(seen) == {0, 1, 2} and len(seen) > 40
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4


def test_trackers_see_one_trial_at_a_time(paper: type[PaperTuner], make_spec: MakeSpec) -> None:
    console = Console(file=io.StringIO())
    changes = {"packing": 4, "training.report_to": ["tensorboard"]}
    runner.run(make_spec(changes), display=panel.create(console))
    assert not paper.together and "one after the other" in console.file.getvalue()


def test_tune_packs(paper: type[PaperTuner], tmp_path: Path) -> None:
    space = {"lora_rank": [2, 4, 8], "learning_rate": [1e-3, 1e-2]}
    tune(
        model="tiny",
        train="tiny:dates-small",
        trials=6,
        space=space,
        packing=3,
        output=tmp_path / "out",
    )
    assert max(paper.together) == 3


def test_the_panel_has_a_line_for_each_running_trial(make_spec: MakeSpec) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=16)
    panel = LiveDisplay(console)
    panel.opens(make_spec({"budget": 20, "packing": 12}), [])
    for number in range(12):
        panel.trial_starts(number, {"lora_rank": 4 + number, "learning_rate": 1e-3})
    panel.evaluated(3, 1, 0.25, {"loss": 1.5})
    picture = Console(file=io.StringIO(), width=100)
    picture.print(panel._render())
    panel.closes()
    lines = picture.file.getvalue().splitlines()
    (line,) = [line for line in lines if "trial 3" in line]
    assert "0.2500" in line and "r 7" in line and "▁·" in line
    assert len(lines) <= 16 and any("more" in line for line in lines)


def test_real_trials_give_side_by_side_what_they_give_alone(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    # In two objectives, so that more adapters than one are kept.
    changes = {"budget": 5, "sampler": "random", "objective.objectives": ["quality", "cost"]}
    alone, packed = (
        make_spec(changes | {"packing": packing, "output": str(tmp_path / f"{packing}")})
        for packing in ("off", 3)
    )
    one_by_one, side_by_side = runner.run(alone).study, runner.run(packed).study
    assert [t.params for t in side_by_side.trials] == [t.params for t in one_by_one.trials]
    for ours, theirs in zip(side_by_side.trials, one_by_one.trials, strict=True):
        assert ours.values == pytest.approx(theirs.values, abs=1e-4)
        assert ours.user_attrs["loss"] == pytest.approx(theirs.user_attrs["loss"], abs=1e-4)
        assert ours.user_attrs["packed"] is True

    from peft import PeftConfig
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kept = sorted((packed.folder / "adapters").iterdir())
    assert len(kept) >= len(side_by_side.best_trials)
    for folder in [*kept, packed.folder / "best"]:
        name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), str(folder))
        assert any(weight.any() for n, weight in model.named_parameters() if "lora_B" in n)


def test_what_cannot_be_packed_runs_alone_and_says_why(make_spec: MakeSpec) -> None:
    console = Console(file=io.StringIO(), width=200)
    spec = make_spec({"budget": 2, "packing": 2, "space.use_dora": True, "sampler": "random"})
    result = runner.run(spec, display=panel.create(console))
    summary.ending(console, result, spec, command="small.yaml")
    for trial in result.study.trials:
        assert trial.user_attrs["packed"] is False and "use_dora" in trial.user_attrs["alone"]
    text = console.file.getvalue()
    assert "trial 0 runs alone: use_dora" in text
    assert "trial 0 runs alone: use_dora" in (spec.folder / "log.txt").read_text()
    assert "0 trials side by side, 2 alone (2 x use_dora" in text
    assert "2 alone (2 x use_dora" in (spec.folder / "report.html").read_text()


def test_a_study_of_two_objectives_is_pruned_by_pareto(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    changes = {
        "objective.objectives": ["quality", "cost"],
        "training.evaluations": 4,
        "pruner": "pareto",
        "space.learning_rate": {"low": 1e-7, "high": 1e-2, "log": True},
        "budget": 16,
        "sampler": "random",
        "packing": 2,
    }
    study = runner.run(make_spec(changes)).study
    pruned = study.get_trials(states=[TrialState.PRUNED])
    assert pruned and len(study.trials) == 16
    for trial in pruned:
        assert 0 < trial.user_attrs["cost"] < trial.params["lora_rank"] / 8
        assert trial.user_attrs["steps"] < 4
    with pytest.raises(UserError, match=r"objective.cost_weight is 0"):
        make_spec(changes | {"objective.cost_weight": 0.0})
