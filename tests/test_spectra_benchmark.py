"""The record of ``studies/spectra_7b.py``, made of small layers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

STUDIES = Path(__file__).resolve().parents[1] / "studies"


@pytest.fixture
def study() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        yield importlib.import_module("spectra_7b")


def test_layers_are_decomposed_both_ways_and_compared(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optuna_lora_rl.rank import spectrum

    def launch(file: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [json.loads(json.dumps(study.prepare(job)())) for job in jobs]

    monkeypatch.setattr(study.measuring, "launch", launch)
    # Makes the small layers large ones.
    of_matrix = spectrum.of_matrix
    monkeypatch.setattr(
        spectrum, "of_matrix", lambda m, **given: of_matrix(m, **{"exact_up_to": 64, **given})
    )
    asked = [
        "--shapes",
        "96x160",
        "--threads",
        "1",
        "--note",
        "Shared.",
        "--output",
        str(tmp_path),
    ]
    study.main([*asked, "--records", str(tmp_path / "records.jsonl")])
    entry = json.loads((tmp_path / "spectra_7b.json").read_text())["1 threads"]
    assert entry["command"].startswith("python studies/spectra_7b.py --shapes 96x160")
    for layer in entry["layers"].values():
        assert layer["exact"]["stated_error"] == 0 < layer["ours"]["stated_error"]
        assert 0 <= layer["leading_error"] <= 2 * layer["ours"]["stated_error"]
        assert abs(layer["off"]["frobenius_norm"]) < 1e-3
    page = (tmp_path / "spectra_7b.md").read_text()
    assert "\nShared.\n" in page and "| decaying 96x160 |" in page
