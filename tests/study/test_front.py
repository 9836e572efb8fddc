"""The Pareto front of quality and cost, wherever a study is shown."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from rich.console import Console

from optuna_lora_rl import cli
from optuna_lora_rl.study import front
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import spec as study_spec
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner

TWO = {"objective.objectives": ["quality", "cost"], "budget": 8, "sampler": "nsgaii"}


def says(*command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command])
    assert not ended.value.code
    return capsys.readouterr().out


def test_status_best_and_the_report_show_the_front(
    paper: type[PaperTuner],
    study_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = str(study_file(TWO))
    ending = says("run", file, capsys=capsys)
    spec = study_spec.load(Path(file))
    study = opening.load_study(spec)
    numbers = [trial.number for trial in front.front(study)]
    assert sorted(numbers) == sorted(trial.number for trial in study.best_trials)
    qualities = [trial.values[0] for trial in front.front(study)]
    assert qualities == sorted(qualities, reverse=True)

    said = f"{len(numbers)} trial"
    for shown in (ending, says("status", file, capsys=capsys), says("best", file, capsys=capsys)):
        words = " ".join(shown.split())
        assert f"Pareto front: {said}" in words
        assert "counts as the best, by the score quality - 0.1 * cost" in words
    facts = json.loads(says("best", file, "--json", capsys=capsys))
    assert [row["trial"] for row in facts["pareto_front"]] == numbers
    assert facts["trial"] in numbers
    assert all({"quality", "cost", "configuration"} <= row.keys() for row in facts["pareto_front"])
    page = (spec.folder / "report.html").read_text(encoding="utf-8")
    section = page.partition("<h2>Pareto front</h2>")[2].partition("</table>")[0]
    assert all(f"<tr><td>{number}<td>" in section for number in numbers)
    assert f"<p class=quiet>{said}" in section
    heads = re.findall("<h2>(.*?)</h2>", page)
    assert heads.index("Pareto front") == heads.index("The best configuration") + 1


def test_a_front_shows_what_differs_and_says_the_rest_once(make_spec: MakeSpec) -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    space = {
        "lora_rank": optuna.distributions.IntDistribution(1, 64),
        "batch_size": optuna.distributions.CategoricalDistribution([4, 8]),
    }
    for rank, values in ((4, (0.5, 0.1)), (16, (0.9, 0.4))):
        study.add_trial(
            optuna.create_trial(
                params={"lora_rank": rank, "batch_size": 8}, distributions=space, values=values
            )
        )
    spec = make_spec({"objective.objectives": ["quality", "cost"]})
    section = front.section(study, spec)
    cells = re.findall("<td>([^<]*)", section)
    assert cells[4::5] == ["r 16", "r 4"]
    assert section.endswith("<p class=quiet>All of them: batch 8.</p>")
    shown = Console(file=io.StringIO(), width=80)
    shown.print(front.table(front.front(study), spec))
    assert "All of them: batch 8." in shown.file.getvalue()


def test_one_objective_has_no_front() -> None:
    study = optuna.create_study()
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    assert front.front(study) == []
