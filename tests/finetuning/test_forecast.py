"""What a trial will take is told from two steps of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from optuna_lora_rl import cli
from optuna_lora_rl.activity import Activity
from optuna_lora_rl.finetuning import forecast
from optuna_lora_rl.finetuning.forecast import Forecast
from optuna_lora_rl.finetuning.price import Measured
from optuna_lora_rl.study import fine_tuner
from optuna_lora_rl.study.spec import Budget
from tests.finetuning.conftest import FineTuner
from tests.finetuning.packing.packs import Hash
from tests.study.conftest import PaperTuner
from tests.study.conftest import paper  # noqa: F401
from tests.study.conftest import study_file  # noqa: F401


@pytest.mark.parametrize("evaluations", [1, 4])
def test_two_steps_are_scaled_to_a_whole_trial(
    monkeypatch: pytest.MonkeyPatch, evaluations: int
) -> None:
    now = SimpleNamespace(at=0.0)

    class Trial:
        def __init__(self, shared: Any, run: Any) -> None:
            self._run = run

        def alone(self) -> Measured:
            assert self._run.configuration["max_steps"] == 2
            for step in (1, 2):
                # The first is slow, as first ones are.
                now.at += 9.0 if step == 1 else 2.0
                self._run.on_activity(Activity("training", step, 2, "steps"))
                if step == 2 or evaluations > 1:
                    now.at += 3.0
                    self._run.report(step, 0.0, {})
            return Measured(now.at, 1000)

    monkeypatch.setattr(forecast, "Trial", Trial)
    monkeypatch.setattr(forecast, "time", SimpleNamespace(monotonic=lambda: now.at))
    plan = SimpleNamespace(of=lambda *_: SimpleNamespace(steps=40))
    monkeypatch.setattr(forecast.sft, "Plan", plan)
    rows = [10, 20, 30, 60] if evaluations == 4 else [60]
    shared: Any = SimpleNamespace(
        training=None, prepared=SimpleNamespace(lengths=[1]), rows_read=rows
    )
    found = forecast.measure(shared, {"learning_rate": 1e-3}, lambda activity: None)
    # Sixty rows take three seconds, and each step two.
    evaluating = 6.0 if evaluations == 4 else 3.0
    assert found == Forecast(40 * 2.0 + evaluating, evaluating, 1000)


def test_a_real_trial_is_measured_and_leaves_the_base_as_it_was(
    tuner: FineTuner, base_hash: Hash
) -> None:
    before = base_hash(tuner)
    found = tuner.forecast()
    assert 0 < found.evaluating < found.seconds and found.peak_bytes > 10**8
    assert base_hash(tuner) == before


@pytest.mark.parametrize(
    ("budget", "end"),
    [
        ({"trials": 12}, "; 12 trials 18 min where none is pruned"),
        ({"trials": 200, "hours": 2}, "; 2 h are about 80 trials where none is pruned"),
        ({"trials": 12, "hours": 2}, "; 12 trials 18 min where none is pruned"),
        ({"trials": None, "cost": 3}, ""),
    ],
)
def test_it_is_said_when_the_budget_will_be_spent(budget: dict[str, Any], end: str) -> None:
    said = fine_tuner.forecast(Forecast(90.0, 9.0, 2_100_000_000), Budget(**budget))
    start = "a trial will take about 1 min 30 s, 10% of it evaluations, and 2.1 GB of memory"
    assert said == start + end


def test_run_says_it_before_the_first_trial_alone(
    paper: type[PaperTuner],  # noqa: F811
    study_file: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    for budget in (1, 2):
        with pytest.raises(SystemExit):
            cli.main(["run", str(study_file({"budget": budget}))])
        said = capsys.readouterr().out
        assert ("a trial will take about 1 min 30 s" in said) is (budget == 1)


def test_validate_measures_and_leaves_nothing(
    study_file: Any,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = study_file({"budget": 3})
    with pytest.raises(SystemExit) as ended:
        cli.main(["validate", str(file), "--measure"])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code in (0, None)
    assert "a trial will take about" in said and "; 3 trials" in said
    assert "training on CPU" in said and "evaluations read" in said
    assert not (tmp_path / "out").exists()
