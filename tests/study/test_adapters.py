"""Adapters that leave the study."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import adapters
from optuna_lora_rl.study import layers
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import runner
from tests.study.conftest import MakeSpec


def test_the_best_adapter_and_any_configuration_load_in_plain_peft(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM
    from peft import LoraConfig
    from peft import get_peft_model

    spec = make_spec({"budget": 2})
    runner.run(spec)
    study = opening.load_study(spec)
    best = study.best_trial
    other = 1 - best.number

    assert not adapters.to_peft(study, spec, tmp_path / "best")
    model = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "best"))
    assert model.peft_config["default"].r == best.params["lora_rank"]

    # Only the best weights are kept; the other's configuration is ready to train with.
    assert "not kept" in adapters.to_peft(study, spec, tmp_path / "other", other)
    config = LoraConfig.from_pretrained(str(tmp_path / "other"))
    assert config.r == study.trials[other].params["lora_rank"]
    fresh = get_peft_model(model.get_base_model(), config)
    assert any("lora_A" in name for name, _ in fresh.named_parameters())
    written = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    assert Path(written["base_model_name_or_path"]).is_dir()


def test_what_cannot_be_exported(make_spec: MakeSpec, paper: object, tmp_path: Path) -> None:
    spec = make_spec({"budget": 1})
    runner.run(spec)
    study = opening.load_study(spec)
    with pytest.raises(UserError, match="trial 7 does not exist"):
        adapters.to_peft(study, spec, tmp_path / "x", 7)
    with pytest.raises(UserError, match="exists and is not empty"):
        adapters.to_peft(study, spec, spec.folder)


def test_ranks_by_layer_are_exported_without_the_weights_too(
    make_spec: MakeSpec, paper: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    modules = [f"{layer}.self_attn.{side}_proj" for layer in range(4) for side in "qv"]
    ranks = {f"model.layers.{name}": rank for rank, name in enumerate(modules, 1)}
    keep = layers.keep
    monkeypatch.setattr(
        layers,
        "keep",
        lambda folder, number, result: keep(
            folder, number, dataclasses.replace(result, ranks=ranks)
        ),
    )
    space = {"lora_rank": [4], "target_modules": "qv", "init_lora_weights": "xavier"}
    spec = make_spec({"budget": 1, "space": {**space, "learning_rate": 1e-3}})
    study = runner.run(spec).study
    shutil.rmtree(adapters.folder_of(spec.folder, 0))
    shutil.rmtree(spec.folder / "best")
    assert "not kept" in adapters.to_peft(study, spec, tmp_path / "bare")
    config = LoraConfig.from_pretrained(str(tmp_path / "bare"))
    base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path)
    found = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in get_peft_model(base, config).named_modules()
        if hasattr(module, "lora_A")
    }
    assert found == ranks

    layers.file_of(spec.folder, 0).unlink()
    with pytest.raises(UserError, match=r"the layers of trial 0 are lost.*the ranks that the ad"):
        adapters.to_peft(study, spec, tmp_path / "rankless")
    assert not (tmp_path / "rankless").exists()
