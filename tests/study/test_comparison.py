"""Samplers side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from optuna_lora_rl.study import comparison


def test_differences_are_paired_by_seed() -> None:
    found = comparison.summarise({"rl": [[0.1, 0.5], [0.2, 0.9]], "tpe": [[0.1, 0.4], [0.3, 0.8]]})
    tpe = found["samplers"]["tpe"]
    assert found["trials"] == 2 and found["seeds"] == 2
    assert tpe["mean"]["mean"] == pytest.approx(0.6)
    # Each seed differs by the same amount, so that there is no doubt about it.
    assert tpe["difference"] == pytest.approx({"mean": -0.1, "low": -0.1, "high": -0.1})
    assert found["samplers"]["rl"]["difference"] is None


def test_a_comparison_runs_and_goes_on_with_what_is_missing(
    study_file: Callable[..., Path], tmp_path: Path
) -> None:
    file = study_file({"budget": 2, "sampler": {"name": "tpe", "n_startup_trials": 1}})

    def compare(samplers: list[str]) -> dict:
        comparison.compare(
            file,
            samplers=samplers,
            seeds=1,
            workers=1,
            output=tmp_path / "results",
            overrides=[],
            console=Console(quiet=True),
        )
        return json.loads((tmp_path / "results" / "comparison.json").read_text())

    first = compare(["tpe"])
    database = tmp_path / "out" / "comparison" / "tpe-0" / "study.db"
    stamp = database.stat().st_mtime_ns
    both = compare(["tpe", "random"])
    assert database.stat().st_mtime_ns == stamp
    assert both["samplers"]["tpe"] == first["samplers"]["tpe"]
    assert both["versions"]["optuna"] and "--samplers tpe,random" in both["command"]
    page = (tmp_path / "results" / "comparison.md").read_text()
    assert "| `random` |" in page and "difference to tpe" in page
