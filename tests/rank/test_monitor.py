from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import monitor
from optuna_lora_rl.rank.callback import MonitorCallback
from optuna_lora_rl.rank.monitor import Limits
from optuna_lora_rl.rank.monitor import Monitor
from optuna_lora_rl.rank.monitor import Reading
from tests.rank.conftest import language_loss
from tests.rank.test_callback import train

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def recorded(
    gradients: dict[str, Sequence[float]], weights: Sequence[float] | None = None, **fields: int
) -> Monitor:
    found = Monitor(Limits(window=3))
    for step in range(len(next(iter(gradients.values())))):
        found.record(
            {
                name: Reading(
                    step=step,
                    weight_norm=weights[step] if weights else step + 1.0,
                    gradient_norm=norms[step],
                    **{"rank": 2, "parameters": 10, "dense": 100, **fields},
                )
                for name, norms in gradients.items()
            }
        )
    return found


def concerns(found: Monitor) -> set[tuple[str, str]]:
    return {(one.layer, one.concern) for one in found.suggestions()}


def test_readings_are_those_of_the_layers(adapted: Callable[..., Any], ids: Any) -> None:
    peft = adapted()
    before = monitor.read(peft, 0)
    language_loss(peft, ids).backward()
    found = monitor.read(peft, 3)
    for name, layer in layers.lora_layers(peft).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert found[name].step == 3 and found[name].rank == 4
        assert found[name].parameters == a.numel() + b.numel()
        product = layer.get_delta_weight("default").detach()
        assert found[name].weight_norm == pytest.approx(float(product.norm()), rel=1e-4)
        both = torch.cat([a.grad.flatten(), b.grad.flatten()])
        assert found[name].gradient_norm == pytest.approx(float(both.norm()), rel=1e-4)
        assert before[name].gradient_norm != before[name].gradient_norm


def test_layers_far_from_the_median_are_named() -> None:
    found = recorded({"a": [1.0], "b": [1.1], "c": [4.0], "d": [0.05], "e": [0.9]})
    assert concerns(found) == {("c", "large gradient"), ("d", "small gradient")}
    assert "4.0 times the median" in found.suggestions()[0].text


def test_a_layer_that_learns_no_more_has_converged() -> None:
    weights = [1.0, 2.0, 2.5, 2.5, 2.501]
    fading, steady = [1.0, 0.5, 0.05, 0.05, 0.05], [1.0] * 5
    assert concerns(recorded({"a": fading}, weights)) == {("a", "converged")}
    assert concerns(recorded({"a": steady}, weights)) == set()
    # A layer whose update is still zero has not begun.
    assert concerns(recorded({"a": fading}, [0.0] * 5)) == set()


def test_a_gradient_that_jumps_or_is_none_is_unstable() -> None:
    assert concerns(recorded({"a": [1.0, 1.0, 0.01, 30.0, 0.01]})) == {("a", "unstable")}
    assert concerns(recorded({"a": [1.0, float("inf")]})) == {("a", "unstable")}


def test_an_adapter_nearly_as_large_as_its_weight_is_named() -> None:
    assert concerns(recorded({"a": [1.0]}, parameters=60)) == {("a", "too many parameters")}
    assert concerns(recorded({"a": [1.0]}, parameters=40)) == set()


def test_the_table_shows_trends() -> None:
    (row,) = recorded({"a": [9.0, 4.0, 2.0, 1.0]}, [1.0, 2.0, 2.0, 2.0]).table()
    assert row["layer"] == "a" and row["gradient_norm"] == 1.0
    assert row["gradient_trend"] == pytest.approx(-0.5)
    assert row["weight_trend"] == pytest.approx(0)


def test_a_summary_is_json_with_medians_over_the_layers() -> None:
    found = recorded({"a": [1.0, 4.0], "b": [3.0, 6.0], "c": [float("nan"), 8.12345]})
    summary = json.loads(json.dumps(found.summary()))
    assert [row["gradient_norm"] for row in summary["course"]] == [2.0, 6.0]
    assert [row["parameters"] for row in summary["course"]] == [30, 30]
    assert summary["layers"][2]["gradient_norm"] == 8.123
    assert summary["suggestions"] == []


def test_a_run_is_monitored(
    adapted: Callable[..., Any], random_llama: Path, tmp_path: Path
) -> None:
    gathered = Monitor()
    ranks = train(
        adapted(random=False), random_llama, tmp_path, MonitorCallback(gathered, every=3)
    )
    assert set(gathered.history) == set(ranks)
    for readings in gathered.history.values():
        assert [one.step for one in readings] == [0, 3, 6]
        assert all(one.gradient_norm > 0 for one in readings)
        assert readings[0].weight_norm == 0 < readings[-1].weight_norm


def test_bad_settings_are_one_sentence() -> None:
    with pytest.raises(UserError, match="factors over 1"):
        Limits(large=1.0)
    with pytest.raises(UserError, match="at least 2 readings"):
        Limits(window=1)
    with pytest.raises(UserError, match="every is at least 1"):
        MonitorCallback(Monitor(), every=0)
