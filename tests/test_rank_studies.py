"""The parts of ``studies/rank_strategies.py`` and ``studies/initialisations.py`` that compute."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STUDIES = Path(__file__).resolve().parents[1] / "studies"


@pytest.fixture(scope="module")
def studies() -> Iterator[Any]:
    """Imports the scripts by name, as they import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        yield importlib.import_module


def test_rates_go_on_past_the_end_at_which_the_best_stands(studies: Any) -> None:
    rates = studies("rates")
    asked: list[float] = []

    def quality(rate: float) -> float:
        asked.append(rate)
        return -abs(np.log(rate / 0.04))

    found = rates.search(quality, (0.004, 0.008, 0.016), 2.0, 6)
    assert asked == [0.004, 0.008, 0.016, 0.032, 0.064]
    assert rates.best(found) == 0.032
    assert list(rates.search(quality, (0.004, 0.008, 0.016), 2.0, 4)) == [
        0.004,
        0.008,
        0.016,
        0.032,
    ]
    assert list(rates.search(lambda rate: -rate, (0.1, 0.2), 2.0, 4)) == [0.025, 0.05, 0.1, 0.2]


def test_intervals_are_of_paired_differences(studies: Any) -> None:
    rates = studies("rates")
    theirs = {"a": [0.1, 0.5, 0.9], "b": [0.2, 0.4, 0.6]}
    ours = {"a": [0.2, 0.6, 1.0], "b": [0.2, 0.4, 0.9]}
    found = rates.differences(ours, theirs)
    assert found["a"] == pytest.approx([0.1, 0.1, 0.1])
    # t of two degrees of freedom, 4.303, times 0.3 / sqrt(3) over sqrt(3).
    assert found["b"] == pytest.approx([0.1, 0.1 - 0.4303, 0.1 + 0.4303], abs=1e-3)
    assert found["all"][0] == pytest.approx(0.1)
    assert rates.verdict(found["a"]) == "better" and rates.verdict(found["b"]) == "not told apart"
    wider = rates.differences(ours, theirs, level=0.99)["b"]
    assert wider[1] < found["b"][1] and wider[2] > found["b"][2]


def result(values: list[float], tried: dict[str, float]) -> dict[str, Any]:
    return {"quality": values, "tried": tried}


def test_the_goal_is_judged_on_other_seeds_than_it_is_chosen_by(studies: Any) -> None:
    study = studies("rank_strategies")
    arms = {name: result([0.5, 0.6], {"0.01": 0.4}) for name in study.ARMS}
    # The best of ours by selection is not the best of ours in judging, nor is the best of all.
    arms["weight"] = result([0.6, 0.7], {"0.01": 0.7, "0.02": 0.1})
    arms["delta"] = result([0.9, 0.95], {"0.01": 0.6})
    arms["uniform high"] = result([0.9, 0.9], {"0.01": 0.99})
    arms[study.RIVAL] = result([0.6, 0.8], {"0.01": 0.4})
    answer = study.goal({"task": arms})["task"]
    assert answer["chosen"] == "weight"
    assert answer["against"][study.BASELINE] == pytest.approx([0.1, 0.1, 0.1])
    assert answer["against"][study.RIVAL][0] == pytest.approx(-0.05) and not answer["met"]


def test_strategies_have_equal_parameters_and_runs_are_kept(
    studies: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, comparing = studies("rank_strategies"), studies("comparing")
    records = tmp_path / "records.jsonl"

    def runs() -> Any:
        return comparing.Runs(
            study.ARMS,
            studies("measuring").Records(records),
            steps=8,
            scale=2.0,
            training=study.TRAINING,
        )

    names = ("uniform low", "weight", "high, truncated", "AdaLoRA (PEFT)", "EVA (PEFT)")
    first = runs()
    found = {name: first("units-small", name, 1e-2, 0) for name in names}
    ends = {name: one["parameters"]["final"] for name, one in found.items()}
    layer = 2 * 128
    assert ends["uniform low"] == 39_424 == ends["high, truncated"]
    assert 0 <= 39_424 - ends["weight"] < layer
    # PEFT counts ranks: 28 layers of rank 4, whatever their size.
    for name in ("AdaLoRA (PEFT)", "EVA (PEFT)"):
        assert sum(found[name]["ranks"].values()) == 28 * 4
        assert abs(ends[name] - 39_424) < 0.1 * 39_424
    assert found["AdaLoRA (PEFT)"]["parameters"]["most"] > 1.5 * 39_424
    assert all(0.0 < one["quality"] < 1.0 for one in found.values())
    assert capsys.readouterr().out.count("\n") == len(names)
    again = runs()
    assert {name: again("units-small", name, 1e-2, 0) for name in names} == found
    assert capsys.readouterr().out == ""


def test_adalora_is_evaluated_without_its_regularisation(studies: Any) -> None:
    arms = studies("arms")
    from optuna_lora_rl.finetuning.options import TrainingOptions

    bench = arms.Bench("units-small", 4, TrainingOptions(use_cpu=True, monitor=0), 2.0)
    adalora = arms.Arm("", {"lora_rank": 2}, peft="adalora")
    found = bench.run(adalora, 1e-9, 0, 1)
    # At no learning rate it is the base model: regularisation would add about one to the loss.
    assert found["quality"] == pytest.approx(0.0, abs=1e-4)
    plain = bench.run(arms.Arm("", {"lora_rank": 2}), 1e-2, 0, 1)
    assert bench.run(arms.Arm("", {"lora_rank": 2}), 1e-2, 0, 1)["quality"] == plain["quality"]


def test_starts_are_compared_and_written_down(
    studies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = studies("initialisations")
    chosen = (study.BASELINE, "svd", "LoRA-GA (PEFT)")
    monkeypatch.setattr(study, "ARMS", {name: study.ARMS[name] for name in chosen})
    monkeypatch.setattr(study, "EVALUATIONS", 2)
    asked = ["--tasks", "units-small", "--steps", "4", "--rates", "0.01", "--most-rates", "1"]
    asked += ["--seeds", "2", "--output", str(tmp_path)]
    study.main([*asked, "--records", str(tmp_path / "records.jsonl")])
    (entry,) = json.loads((tmp_path / "initialisations.json").read_text()).values()
    arms = entry["tasks"]["units-small"]
    assert {arm["parameters"]["final"] for arm in arms.values()} == {39_424}
    assert arms["svd"]["start"]["a_condition"] == pytest.approx(1.0, abs=1e-4)
    assert arms["svd"]["start"]["update_spectral_norm"] == 0.0
    assert arms["LoRA-GA (PEFT)"]["start"]["update_spectral_norm"] > 0.0
    page = (tmp_path / "initialisations.md").read_text()
    assert "| svd |" in page and "Bonferroni" in page
    figure = (tmp_path / "initialisations.svg").read_text()
    assert figure.startswith("<svg") and figure.count("Final accuracy") == 1
