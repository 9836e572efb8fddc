from __future__ import annotations

import json
from pathlib import Path

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.tiny import FAMILIES
from studies.tiny import table
from studies.tiny.measurements import Measurement
from studies.tiny.measurements import Plan
from studies.tiny.measurements import read

PLAN = Plan(configurations=3, seeds=2, steps=5)


def run(configuration: str, loss: float | None, seed: int = 0) -> Measurement:
    return Measurement(
        task="dates-small",
        steps=5,
        configuration=configuration,
        seed=seed,
        loss=loss,
        seconds=2.0,
        failure=None if loss is not None else "diverged",
        parameters={},
    )


RUNS = [
    run("untuned", 4.0),
    run("default", 3.0),
    run("random-00", 1.0),
    run("random-01", 2.0),
    run("random-02", None),
    run("random-00", 1.2, seed=1),
]


def test_a_row_compares_the_best_over_seeds_with_the_median() -> None:
    row = table.summarise("dates-small", PLAN, RUNS)
    assert row is not None
    assert (row.untuned, row.default, row.median) == (4.0, 3.0, 2.0)
    assert row.best == pytest.approx(1.1)
    assert row.noise == pytest.approx(0.2 / 2**0.5)
    assert row.gap_in_noise == pytest.approx(0.9 / row.noise)
    assert (row.failed, row.runs) == (1, 3)


@pytest.mark.parametrize("missing", range(len(RUNS)))
def test_no_row_before_every_run_is_there(missing: int) -> None:
    assert table.summarise("dates-small", PLAN, RUNS[:missing] + RUNS[missing + 1 :]) is None


def test_the_page_states_the_command_and_the_versions() -> None:
    row = table.summarise("dates-small", PLAN, RUNS)
    assert row is not None
    page = table.document(
        [row],
        PLAN,
        command="python -m studies.tiny.table --steps 5",
        records=Path("studies/runs.jsonl"),
    )
    assert "    python -m studies.tiny.table --steps 5\n" in page
    assert "| `dates-small` | 4.000 | 3.000 | 2.000 | 1.100 | 72% |" in page
    assert "torch" in page
    assert "`studies/runs.jsonl`" in page
    assert "in 1 of\n1 tasks" in page


def test_tasks_are_chosen_by_family_and_size() -> None:
    assert table.chosen_tasks([], "small") == [f"{family}-small" for family in FAMILIES]
    assert table.chosen_tasks(["dates"], "both") == ["dates-small", "dates-ample"]
    with pytest.raises(UserError, match="'birds'"):
        table.chosen_tasks(["birds"], "small")


def test_the_command_measures_real_runs_and_writes_the_page(tmp_path: Path) -> None:
    records, page = tmp_path / "deep" / "records.jsonl", tmp_path / "docs" / "page.md"
    arguments = ["--families", "dates", "--configurations", "1", "--seeds", "2", "--steps", "2"]
    arguments += ["--records", str(records), "--output", str(page)]
    table.main(arguments)
    runs = read(records)
    assert {run.configuration for run in runs} == {"untuned", "default", "random-00"}
    assert all(run.loss is not None and run.loss > 0 for run in runs)
    assert "`dates-small`" in page.read_text(encoding="utf-8")
    assert json.loads(records.read_text().splitlines()[0])["configuration"] == "untuned"
