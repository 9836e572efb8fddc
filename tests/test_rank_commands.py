"""The commands that look at ranks, as a person meets them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optuna_lora_rl import cli
from tests.rank.conftest import attach

Said = Callable[..., str]
Fails = Callable[..., str]


@pytest.fixture(scope="module")
def adapter(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter of rank 4 on the random Llama."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    attach(AutoModelForCausalLM.from_pretrained(random_llama)).save_pretrained(folder)
    return folder


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    monkeypatch.setenv("COLUMNS", "80")

    def output(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        assert not ended.value.code
        return capsys.readouterr().out

    return output


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    def sentence(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    return sentence


@pytest.mark.parametrize("name", ["analyze", "advise", "truncate", "merge"])
def test_commands_teach_by_an_example(name: str, said: Said) -> None:
    assert f"Example: optuna-lora-rl {name} " in " ".join(said(name, "--help").split())


def test_analyze_shows_every_layer_of_the_built_in_model(said: Said, tmp_path: Path) -> None:
    table = tmp_path / "new" / "spectra.csv"
    shown = said("analyze", "--model", "tiny", "--csv", table)
    assert "3.self_attn.q_proj" in shown and "model.layers.…" in shown
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 28
    assert (rows[-1]["block"], rows[-1]["module"]) == ("3", "down_proj")
    assert all(0 < int(row["rank_90"]) <= int(row["rank_95"]) <= 128 for row in rows)


def test_analyze_draws_layers_by_modules_and_capacity(
    said: Said, random_llama: Path, tmp_path: Path
) -> None:
    figure, capacity = tmp_path / "map.html", tmp_path / "capacity.html"
    asked = ["--modules", "q_proj,up_proj", "--figure", figure, "--capacity", capacity]
    shown = said("analyze", "--model", random_llama, *asked)
    assert "k_proj" not in shown and "times" in shown
    assert "model.layers.1.mlp.up_proj (64x32)" in figure.read_text()
    assert "as large as the weights" in capacity.read_text()


def test_an_adapter_is_analysed_without_its_base(
    said: Said, adapter: Path, random_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = said("analyze", "--adapter", adapter, "--model", random_llama)
    assert "dW/W" in shown
    monkeypatch.setattr("optuna_lora_rl.finetuning.model.load", None)
    alone = said("analyze", "--adapter", adapter)
    assert "dW/W" not in alone and alone.count("q_proj") == alone.count("down_proj") == 2


def test_what_is_advised_is_what_peft_makes(
    said: Said, random_llama: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from optuna_lora_rl.rank import layers

    file = tmp_path / "advice.json"
    asked = ["--task-complexity", "low", "--memory-gb", "8", "--by-weight", "--length", "64"]
    shown = said("advise", "--model", random_llama, *asked, "-o", file)
    assert "- rank 8: where tasks of low complexity usually begin" in shown
    written = json.loads(file.read_text())
    assert written["reasons"] and written["asked"]["workload"]["length"] == 64
    config = LoraConfig(task_type="CAUSAL_LM", **written["lora_config"])
    peft: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(random_llama), config)
    made = layers.lora_layers(peft)
    assert {name: layer.r["default"] for name, layer in made.items()} == written["ranks"]
    assert {layer.scaling["default"] for layer in made.values()} == {2.0}
    namespace: dict[str, Any] = {"LoraConfig": LoraConfig}
    code = shown[shown.index("LoraConfig(") : shown.index("\n)\n") + 2]
    printed = eval(code, namespace)
    assert printed.rank_pattern == config.rank_pattern
    assert printed.alpha_pattern == config.alpha_pattern


def test_truncate_says_what_it_would_give_and_does_it(
    said: Said, adapter: Path, tmp_path: Path
) -> None:
    assert "0.95" in said("truncate", adapter)
    small = tmp_path / "small"
    assert "50.0%" in said("truncate", adapter, "--rank", 2, "--output", small)
    assert json.loads((small / "adapter_config.json").read_text())["r"] == 2


def test_truncate_says_what_each_size_leaves_of_the_quality(
    said: Said, fails: Fails, random_llama: Path, sums: str, tmp_path: Path
) -> None:
    import yaml

    adapter = tmp_path / "out" / "best"
    file = tmp_path / "study.yaml"
    content = {
        "model": str(random_llama),
        "data": {"train": sums, "max_length": 16},
        "space": {"max_steps": 8, "learning_rate": 0.02, "lora_rank": 4},
        "training": {"use_cpu": True, "evaluations": 1},
        "sampler": "random",
        "budget": 1,
        "output": str(tmp_path / "out"),
    }
    file.write_text(yaml.safe_dump(content))
    said("run", file, "--plain")
    rows = [line.split() for line in said("truncate", adapter, "--study", file).splitlines()]
    qualities = {row[0]: float(row[-1]) for row in rows if len(row) == 5 and row[0][0] in "01"}
    best = json.loads(said("best", file, "--json"))
    assert qualities["1"] == pytest.approx(best["metrics"]["quality"], abs=1e-4)
    assert qualities["0.5"] != qualities["1"] and len(qualities) == 7
    assert "goes with no --energy" in fails(
        "truncate", adapter, "--rank", 2, "--study", file, "-o", tmp_path / "cut"
    )


def test_merge_writes_a_model(
    said: Said, adapter: Path, random_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    said("merge", adapter, "--output", tmp_path / "merged")
    merged, base = (
        AutoModelForCausalLM.from_pretrained(folder).model.layers[0]
        for folder in (tmp_path / "merged", random_llama)
    )
    assert not merged.mlp.down_proj.weight.equal(base.mlp.down_proj.weight)
    assert merged.mlp.up_proj.weight.equal(base.mlp.up_proj.weight)


@pytest.fixture(scope="module")
def experts(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose experts lie in one parameter, and an adapter on them and on a layer."""
    from peft import LoraConfig
    from peft import get_peft_model
    from transformers import AutoTokenizer
    from transformers import MixtralConfig
    from transformers import MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(random_llama)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("experts")
    MixtralForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj"],
        init_lora_weights=False,
    )
    peft: Any = get_peft_model(MixtralForCausalLM.from_pretrained(base), lora)
    peft.save_pretrained(adapter)
    return base, adapter


def test_experts_are_no_layer_of_high_rank(
    said: Said, experts: tuple[Path, Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    base, adapter = experts
    shown = " ".join(said("analyze", "--model", base).split())
    assert "Left out are 3 weights" in shown and "model.layers.0.mlp.gate.weight" in shown
    assert "mlp." not in said("analyze", "--adapter", adapter)
    said("truncate", adapter, "--rank", 2, "--output", tmp_path)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("q_proj" in name for name in changed)


def test_an_adapter_of_another_model_is_refused(
    fails: Fails, adapter: Path, experts: tuple[Path, Path], tmp_path: Path
) -> None:
    base, _ = experts
    another = f"the adapter is of another model: {base} has no layer model.layers.0.mlp.down_proj"
    assert another in fails("analyze", "--adapter", adapter, "--model", base)
    assert "is for a weight of" in fails("merge", adapter, "--model", "tiny", "-o", tmp_path)
    # PEFT would have merged what fits, and left the rest out in silence.
    assert another in fails("merge", adapter, "--model", base, "-o", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["analyze"], "analyze needs a --model"),
        (["analyze", "--model", "./nowhere"], "--model: there is no folder './nowhere'"),
        (["analyze", "--model", "tiny", "--figure", "map.png"], "'map.png' has to end in .html"),
        (["analyze", "--adapter", "nowhere"], "'nowhere' holds no adapter"),
        (["advise", "--model", "tiny", "--modules", "x"], "no module 'x'; the modules are down"),
        (["advise", "--model", "tiny", "--memory-gb", "0.001"], "0.001 GB are less than"),
        (["truncate", "nowhere"], "'nowhere' holds no adapter"),
        (["truncate", "nowhere", "--rank", "2"], "needs a folder to write"),
        (["merge", "nowhere", "-o", "merged"], "'nowhere' holds no adapter"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], words: str, fails: Fails) -> None:
    assert words in fails(*arguments)


def test_bad_adapters_are_one_sentence(
    adapter: Path, fails: Fails, tmp_path: Path, random_llama: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert "has no linear LoRA layers" in fails("analyze", "--adapter", tmp_path)
    assert "is for a weight of" in fails("analyze", "--adapter", adapter, "--model", "tiny")
    assert "energy is a share" in fails("truncate", adapter, "--energy", "2", "-o", tmp_path)
    assert "either an energy or a rank" in fails(
        "truncate", adapter, "--energy", "0.5", "--rank", "2", "-o", tmp_path
    )
