from __future__ import annotations

import re

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layer_names
from optuna_lora_rl.rank.layer_names import Place

LLAMA = [
    f"model.layers.{i}.{module}"
    for i in range(12)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]
GPT2 = [f"h.{i}.{module}" for i in range(2) for module in ("attn.c_proj", "mlp.c_proj")]


def pattern_value(pattern: dict[str, int], name: str, usual: int) -> int:
    # As PEFT reads patterns.
    keys = (key for key in pattern if re.match(rf"(.*\.)?({key})$", name))
    return next((pattern[key] for key in keys), usual)


def test_modules_are_named_as_shortly_as_tells_them_apart() -> None:
    assert layer_names.of_names(LLAMA)["model.layers.11.mlp.up_proj"] == Place(11, "up_proj")
    assert layer_names.of_names(GPT2)["h.1.mlp.c_proj"] == Place(1, "mlp.c_proj")
    towers = [f"{tower}.layers.0.fc1" for tower in ("vision", "text")]
    assert layer_names.of_names(towers)["text.layers.0.fc1"] == Place(0, "text.layers.fc1")
    assert layer_names.of_names(["score"])["score"] == Place(None, "score")


@pytest.mark.parametrize(
    "names",
    [LLAMA, GPT2, [*LLAMA, "project"], [f"h.{i}.experts.{j}.up" for i in (0, 1) for j in (0, 1)]],
)
def test_no_two_layers_stand_at_the_same_place(names: list[str]) -> None:
    found = layer_names.of_names(names)
    assert list(found) == names
    assert len(set(found.values())) == len(names)


def test_modules_choose_layers() -> None:
    assert layer_names.chosen(LLAMA, ["v_proj"]) == [n for n in LLAMA if n.endswith("v_proj")]
    assert layer_names.chosen(GPT2, ["mlp.c_proj", "h.0.attn.c_proj"]) == [
        GPT2[0],
        GPT2[1],
        GPT2[3],
    ]
    assert layer_names.chosen(GPT2, None) == GPT2
    with pytest.raises(UserError, match="no module 'k_proj'; the modules are q_proj, up_proj, v"):
        layer_names.chosen(LLAMA, ["k_proj"])


def test_targets_reach_the_layers_and_no_other() -> None:
    assert layer_names.targets(LLAMA, LLAMA) == ["q_proj", "v_proj", "up_proj"]
    assert layer_names.targets([GPT2[1], GPT2[3]], GPT2) == ["h.0.mlp.c_proj", "h.1.mlp.c_proj"]


@pytest.mark.parametrize("names", [LLAMA, GPT2])
@pytest.mark.parametrize("spread", [1, 2, 5])
def test_a_short_pattern_says_the_same(names: list[str], spread: int) -> None:
    by_layer = {name: 8 + i % spread for i, name in enumerate(names)}
    by_module = {name: 8 + len(name.rpartition(".")[0]) % spread for name in names}
    for ranks in (by_layer, by_module):
        pattern = layer_names.collapsed(ranks, 8)
        assert {name: pattern_value(pattern, name, 8) for name in names} == ranks


def test_modules_that_agree_take_one_entry() -> None:
    ranks = {name: 4 if name.endswith("v_proj") else 8 for name in LLAMA}
    assert layer_names.collapsed(ranks, 8) == {"v_proj": 4}


def test_the_first_number_is_the_block() -> None:
    names = [f"h.{i}.experts.{j}.up" for i in (0, 1) for j in (0, 1)]
    assert layer_names.of_names(names)["h.0.experts.1.up"] == Place(0, "experts.1.up")


def test_layers_are_divided_by_kind_and_range_of_blocks() -> None:
    names = [f"layers.{i}.{side}_proj" for i in range(30) for side in "qv"]
    found = layer_names.groups([*names, "lm_head"])
    assert [(group.module, group.blocks, len(group.names)) for group in found] == [
        ("lm_head", "none", 1),
        *((f"{side}_proj", blocks, 10) for side in "qv" for blocks in ("0-9", "10-19", "20-29")),
    ]
    assert found[2].names[0] == "layers.10.q_proj"
    # Every layer is in one group.
    assert sorted(name for group in found for name in group.names) == sorted([*names, "lm_head"])
    assert [group.blocks for group in layer_names.groups(["h.0.a", "h.1.a"])] == ["0", "1"]


def test_layers_are_named_by_kind_and_block() -> None:
    names = [f"layers.{i}.q_proj" for i in (7, 0, 1, 2, 9)]
    said = layer_names.in_words([*names, "layers.3.v_proj", "lm_head"])
    assert said == "lm_head, q_proj of blocks 0-2, 7 and 9, v_proj of block 3"
