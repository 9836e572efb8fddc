from __future__ import annotations

import json
import math
from dataclasses import asdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optuna_lora_rl.learning import scaled_surfaces
from optuna_lora_rl.learning.scaled_surfaces import Plateau
from optuna_lora_rl.learning.tables import scaled
from optuna_lora_rl.learning.tables.records import ScaledRecord

FORM = Plateau(
    rate=-2.5,
    half=0.5,
    widens=0.4,
    rising=0.25,
    falling=0.1,
    drop=1.0,
    by_ratio=0.64,
    by_rank=0.5,
    by_size=0.5,
    by_steps=0.5,
    by_batch=0.0,
    top=0.8,
    lack=0.1,
    scale=2.0,
    large=0.0,
    steps=0.0,
    batch=0.0,
    dropout=-0.02,
    middle_steps=5.5,
    middle_batch=3.0,
)
MIDDLE = {"ratio": 1.0, "rank": 4.0, "share": 0.0, "dropout": 0.0, "batch_size": 3.0}
RATES = np.linspace(-5.0, -0.5, 181)


def good(form: Plateau, **changes: float) -> tuple[float, float]:
    """The ends of the rates that give nine tenths of the best quality."""
    values = {**MIDDLE, "steps": form.middle_steps, **changes}
    v = {name: np.full(len(RATES), value) for name, value in values.items()}
    quality = form({**v, "learning_rate": RATES})
    rates = RATES[quality > 0.9 * quality.max()]
    return float(rates[0]), float(rates[-1])


def test_quality_rises_stays_and_falls() -> None:
    v = {name: np.full(3, value) for name, value in {**MIDDLE, "steps": 5.5}.items()}
    low, middle, high = FORM({**v, "learning_rate": np.array([-5.0, -2.5, -0.5])})
    assert abs(low) < 0.01 and 0.7 < middle < 0.8 and high < -0.1
    first, last = good(FORM)
    assert (first + last) / 2 == pytest.approx(FORM.rate, abs=0.15)


def test_more_alpha_and_rank_ask_for_lower_rates() -> None:
    first, last = good(FORM)
    for changes, moved in (({"ratio": 3.0}, 0.64 * 2), ({"rank": 6.0}, 0.5 * 2)):
        one, other = good(FORM, **changes)
        assert (first + last - one - other) / 2 == pytest.approx(0.301 * moved, abs=0.05)


def test_longer_runs_learn_at_lower_rates_and_bear_no_higher_ones() -> None:
    first, last = good(replace(FORM, by_steps=0.5, widens=0.5))
    one, other = good(replace(FORM, by_steps=0.5, widens=0.5), steps=8.5)
    assert first - one == pytest.approx(0.903, abs=0.1)
    assert other == pytest.approx(last, abs=0.06)


def records(task: str, examples: int) -> list[ScaledRecord]:
    rng = np.random.default_rng(3)
    made = []
    for number in range(40):
        one = {
            "learning_rate": 10 ** rng.uniform(-5, -0.5),
            "lora_rank": int(2 ** rng.integers(7)),
            "alpha_ratio": 2 ** rng.uniform(-2, 3),
            "target_modules": scaled_surfaces.TARGETS[number % 4],
            "batch_size": int(2 ** rng.integers(1, 5)),
            "max_steps": 24,
            "lora_dropout": 0.0 if examples > 64 else rng.uniform(0, 0.3),
        }
        v = scaled_surfaces.natural({name: np.array([value]) for name, value in one.items()})
        rows = min(one["batch_size"], examples)
        size = 2 ** (v["rank"][0] + v["share"][0])
        made.append(
            ScaledRecord(
                task=task,
                split="train",
                configuration=number,
                parameters=one,
                step=[6, 12, 18, 24],
                loss=[1.0] * 4,
                accuracy=[0.0] * 4,
                quality=[float(FORM(v)[0])] * 4,
                cost=0.1 + 0.02 * rows * (1 + size / 64) + 0.001 * size,
                context={
                    "hidden_size": 576,
                    "model_layers": 30,
                    "model_parameters": 134_515_008,
                    "examples": examples,
                    "mean_tokens": 72.0,
                    "method": "sft",
                    "precision": "bf16",
                },
            )
        )
    return made


def surface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: int):
    task = f"smollm2/dates/{examples} examples/24 steps"
    compiled, fits = tmp_path / "scaled.parquet", tmp_path / "scaled.json"
    scaled.write(compiled, records(task, examples))
    # As if the fit had been off by a quarter of a decade.
    form = asdict(replace(FORM, rate=FORM.rate + 0.25, middle_steps=math.log2(24)))
    entry = {"form": form, "left": 0.05, "noise": 0.01}
    fits.write_text(json.dumps({"tables": {task: entry}}), encoding="utf-8")
    monkeypatch.setattr(scaled_surfaces, "FITS", fits)
    tables = scaled.load("train", path=compiled)
    monkeypatch.setattr(scaled, "load", lambda split: tables if split == "train" else [])
    (found,) = scaled_surfaces.load("train")
    assert scaled_surfaces.load("test") == []
    return found, tables[0]


@pytest.mark.parametrize("examples", [16, 512])
def test_a_surface_says_what_was_measured_and_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: int
) -> None:
    found, table = surface(tmp_path, monkeypatch, examples)
    assert found.context.as_dict() == {
        "hidden_size": 576,
        "layers": 30,
        "parameters": 134_515_008,
        "examples": examples,
        "tokens": 72.0,
        "method": "sft",
        "steps": 24,
    }
    names = [one.name for one in found.dimensions]
    assert "max_steps" not in names and ("lora_dropout" in names) == (examples == 16)
    assert {one.role for one in found.dimensions} >= {"learning_rate", "rank", "targets"}
    x = np.array(
        [
            [
                scaled_surfaces.TARGETS.index(value) if isinstance(value, str) else float(value)
                for value in (table.parameters[name][row] for name in names)
            ]
            for row in range(len(table))
        ]
    )
    quality, diverged = found(x)
    measured = scaled_surfaces.quality(table)
    assert np.abs(quality - measured).max() < 0.1
    assert diverged.tolist() == (quality < scaled_surfaces.DIVERGED).tolist()
    np.testing.assert_allclose(found.cost(x), table.cost, rtol=0.05)


def test_surfaces_of_what_is_shipped_are_finite() -> None:
    for split in ("train", "validation", "test"):
        for found in scaled_surfaces.load(split):
            rng = np.random.default_rng(0)
            columns = []
            for one in found.dimensions:
                u = one.snap(rng.random(50))
                levels = 0 if one.is_ordered else len(one.levels)
                columns.append(np.floor(u * levels) if levels else one.natural(u))
            quality, _ = found(np.stack(columns, 1))
            assert np.isfinite(quality).all() and quality.max() <= 1
            assert (found.cost(np.stack(columns, 1)) > 0).all()
