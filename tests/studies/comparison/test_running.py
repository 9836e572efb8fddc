"""Studies in parallel processes, recorded as they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from optuna_lora_rl.errors import UserError
from studies.comparison import running
from studies.comparison.problem import LORA
from studies.comparison.problem import Problem
from studies.comparison.protocol import Protocol
from studies.comparison.protocol import SamplerEntry


def protocol(**changes: Any) -> Protocol:
    said = {
        "name": "short",
        "samplers": {"tpe": None, "random": None},
        "problems": {"functions": {"families": ["sphere"], "dimensions": [2]}},
        "trials": 4,
        "seeds": 2,
    }
    return Protocol.model_validate(said | changes)


def noisy(params: dict[str, Any], rng: np.random.Generator) -> tuple[float, float]:
    regret = abs(np.log10(params["learning_rate"]) + 2)
    if params["lora_rank"] > 16:
        raise FloatingPointError
    return -regret + rng.normal(), regret


NOISY = Problem(
    "noisy",
    "noisy",
    LORA,
    {
        "learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
        "lora_rank": IntDistribution(2, 64, log=True),
    },
    noisy,
)


def test_a_comparison_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    made: list[running.Record] = []
    first = running.run(protocol(), file, after=made.append)
    assert len(first) == len(made) == 4
    assert all((np.diff(record.regret) <= 0).all() for record in made)

    # A kill leaves a torn last line, and the sampler's options changed meanwhile.
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:40])
    made.clear()
    changed = protocol(samplers={"tpe": {"n_startup_trials": 2}, "random": None})
    second = running.run(changed, file, after=made.append)
    lost = json.loads(lines[-1])
    wanted = {("tpe", 0), ("tpe", 1)} | {(lost["sampler"], lost["seed"])}
    assert {(record.sampler, record.seed) for record in made} == wanted
    kept = [key for key in first if key[0] == "random"]
    assert all(second[key].regret == first[key].regret for key in kept)

    made.clear()
    running.run(changed, file, after=made.append)
    assert not made


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text('{"regret": []}\nnonsense\n')
    with pytest.raises(UserError, match="line 1 is no record"):
        running.read(file)


def test_samplers_meet_the_same_noise_and_a_start_comes_first() -> None:
    entry = SamplerEntry(name="random", start="defaults")
    records = [running.study(NOISY, entry, ("a", "noisy", seed), "", 6) for seed in (0, 0, 1)]
    assert records[0].regret == records[1].regret
    assert records[0].regret[0] == records[2].regret[0] == pytest.approx(abs(np.log10(2e-4) + 2))
    assert records[0].regret != records[2].regret


def test_a_sweep_hands_over_to_its_sampler() -> None:
    entry = SamplerEntry(name="random", start="sweep")
    seen = []

    def evaluate(params: dict[str, Any], rng: np.random.Generator) -> tuple[float, float]:
        seen.append(params["lora_rank"])
        return noisy(params, rng)

    problem = Problem("noisy", "noisy", LORA, NOISY.space, evaluate)
    record = running.study(problem, entry, ("sweep", "noisy", 0), "", 9)
    assert seen[:5] == [11] * 5 and set(seen[5:9]) != {11}
    assert record.failed == sum(rank > 16 for rank in seen[:9])


def test_the_chosen_configuration_is_the_one_that_looked_best() -> None:
    record = running.study(NOISY, SamplerEntry(name="random"), ("random", "noisy", 0), "", 30)
    # Noise makes a worse one look best.
    assert record.chosen[-1] > record.regret[-1]
    assert all(c >= r for c, r in zip(record.chosen, record.regret, strict=True))


def test_failures_can_be_told_as_the_worst_score(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, list[tuple[Any, float | None]]] = {}
    tell = optuna.Study.tell

    def kept(self: optuna.Study, *args: Any, **kwargs: Any) -> Any:
        frozen = tell(self, *args, **kwargs)
        told[failures].append((frozen.state, frozen.value))
        return frozen

    monkeypatch.setattr(optuna.Study, "tell", kept)
    records = {}
    for failures in ("failed", "worst"):
        told[failures] = []
        entry = SamplerEntry(name="random", failures=failures)
        records[failures] = running.study(NOISY, entry, ("random", "noisy", 0), "me", 30)
    assert records["failed"].regret == records["worst"].regret
    assert records["failed"].failed == records["worst"].failed > 2
    known: list[float] = []
    for (state, value), (_, instead) in zip(told["failed"], told["worst"], strict=True):
        if state == TrialState.FAIL:
            assert instead == (min(known) if known else None)
        else:
            assert instead == value
            known.append(value)


def test_records_of_other_weights_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"one")
    entry = SamplerEntry.model_validate({"name": "rl", "weights": str(file)})
    first = running.made_by(entry)
    assert running.made_by(entry) == first
    file.write_bytes(b"two")
    assert running.made_by(entry) != first
