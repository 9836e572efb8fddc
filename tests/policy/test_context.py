"""What is known before the first trial, and what follows from it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optuna_lora_rl import TuningContext
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.policy.context import in_words
from optuna_lora_rl.policy.dimensions import Dimension
from optuna_lora_rl.policy.dimensions import make_space
from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.roles import ROLES
from optuna_lora_rl.policy.scaling import expected_rate

LLAMA = {"hidden_size": 2048, "num_hidden_layers": 16}
SPACE = make_space(
    [
        Dimension("learning_rate", "float", 1e-6, 1e-1, log=True),
        Dimension("lora_rank", "int", 2, 128, log=True),
        Dimension("lora_alpha", "int", 2, 256, log=True),
        Dimension("lora_dropout", "float", 0.0, 0.3),
        Dimension("target_modules", "categorical", choices=("qv", "all-linear")),
    ]
)
RATE, RANK, DROPOUT = (ROLES.index(r) for r in ("learning_rate", "rank", "dropout"))


class _Config:
    """Stands for a configuration of transformers."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def to_dict(self) -> dict[str, Any]:
        return self._values


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = _Config(n_embd=64, n_layer=2)
        self.body = torch.nn.Linear(10, 10, bias=False)
        self.lora_A = torch.nn.Linear(10, 2, bias=False)


def test_a_model_is_read_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for model in (LLAMA, _Config(**LLAMA), str(tmp_path), tmp_path):
        found = TuningContext.of(model, method="dpo")
        assert (found.hidden_size, found.layers, found.method) == (2048, 16, "dpo")
        assert found.quantization == "none"
    multimodal = {"hidden_size": 9, "text_config": LLAMA, "quantization_config": {"bits": 4}}
    found = TuningContext.of(_Config(**multimodal))
    assert (found.hidden_size, found.quantization) == (2048, "4bit")
    # Adapters are no part of the base model.
    loaded = TuningContext.of(_Model())
    assert (loaded.hidden_size, loaded.layers, loaded.parameters) == (64, 2, 100)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"examples": 2.5}, "examples is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"tokens": math.nan}, "tokens is nan"),
        ({"method": "ppo"}, "must be one of sft, dpo, kto, grpo"),
        ({"quantization": 4}, "must be one of none, 8bit, 4bit"),
    ],
)
def test_bad_values_get_a_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        TuningContext(**values)


def test_what_is_no_model_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not say how wide"):
        TuningContext.of({"model_type": "odd"})
    assert TuningContext.of({"model_type": "odd"}, hidden_size=8).hidden_size == 8
    with pytest.raises(UserError, match="cannot be read"):
        TuningContext.of(tmp_path)
    with pytest.raises(UserError, match="no model"):
        TuningContext.of(3)
    with pytest.raises(UserError, match="there is no 'width'"):
        TuningContext.of(LLAMA, width=3)


def test_a_name_on_the_hub_needs_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(name: str, file: str) -> str:
        assert (name, file) == ("nobody/nothing", "config.json")
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lost)
    with pytest.raises(UserError, match=r"gave no configuration: no route$"):
        TuningContext.of("nobody/nothing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs the package huggingface_hub: pip install"):
        TuningContext.of("nobody/nothing")


def test_it_comes_back_from_plain_values() -> None:
    context = TuningContext(hidden_size=np.int64(64), tokens=12, method="kto")
    assert TuningContext.from_dict(json.loads(json.dumps(context.as_dict()))) == context


def test_the_expected_rate_is_near_what_was_measured() -> None:
    measured = [
        (64, 32 * 8, 1.1e-2),
        (128, 32 * 8, 9e-3),
        (192, 32 * 8, 9e-3),
        (576, 24 * 8, 5e-3),
        (2000, 780 * 128, 5e-4),
        (4000, 780 * 128, 3e-4),
    ]
    for width, rows, rate in measured:
        found = expected_rate(TuningContext(hidden_size=width), math.log10(rows))
        assert found is not None and abs(found.mean - math.log10(rate)) < 0.2
    assert expected_rate(None, None) is None
    assert expected_rate(TuningContext(examples=5), 3.0) is None
    # The less is known, the wider the belief.
    sure = expected_rate(TuningContext(hidden_size=4096), 5.0)
    unsure = expected_rate(TuningContext(parameters=7_000_000_000), None)
    assert sure and unsure and unsure.deviation > 1.3 * sure.deviation
    assert abs(unsure.mean - sure.mean) < 0.4


def test_the_first_trial_and_the_prior_follow_the_context() -> None:
    def rate(context: TuningContext | None) -> float:
        return float(Layout(SPACE, context).usual.roles[0, RATE])

    small = TuningContext(hidden_size=128, steps=32, batch_size=8)
    large = TuningContext(hidden_size=4096, steps=780, batch_size=128)
    assert rate(small) > rate(None) + 0.5
    assert abs(rate(large) - math.log10(4e-4)) < 0.3
    preferences = TuningContext(hidden_size=4096, method="dpo")
    assert rate(preferences) < rate(large) - 0.8
    few = Layout(SPACE, TuningContext(examples=60)).usual.roles[0]
    many = Layout(SPACE, TuningContext(examples=60_000)).usual.roles[0]
    assert few[RANK] < many[RANK] and few[DROPOUT] > many[DROPOUT] == 0.0


def test_surfaces_are_drawn_where_the_context_says() -> None:
    def best(context: TuningContext | None) -> tuple[float, float]:
        shapes = Layout(SPACE, context).bank.shapes
        return float(np.median(shapes.peak)), float((shapes.overfit > 0).mean())

    small = best(TuningContext(hidden_size=128, steps=32, batch_size=8, examples=60))
    large = best(TuningContext(hidden_size=4096, steps=780, batch_size=128, examples=10**6))
    assert small[0] > large[0] + 0.8
    assert small[1] > best(None)[1] > large[1]


def test_numbers_in_words() -> None:
    said = [in_words(value) for value in (0.0093, 9.96e-4, 0.05, 5.0, 400.0, 0.0)]
    assert said == ["9e-3", "1e-3", "0.05", "5", "400", "0"]
