from __future__ import annotations

import gc
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning.shared import Shared
from optuna_lora_rl.finetuning.trial import FineTuner
from optuna_lora_rl.finetuning.trial import FineTuningError
from optuna_lora_rl.finetuning.trial import TrialResult

# transformers renames what PEFT still calls by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

Make = Callable[..., FineTuner]
Hash = Callable[[FineTuner], str]

QUICK: dict[str, Any] = {"max_steps": 4, "learning_rate": 5e-3}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_2", "use_rslora": True},
    {"init_lora_weights": "olora", "target_modules": "qv"},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": "orthogonal", "layers": "last-half"},
    {"init_lora_weights": "gaussian", "loraplus_lr_ratio": 8.0, "weight_decay": 0.1},
    {"use_dora": True, "lora_dropout": 0.1, "target_modules": "mlp"},
    {"use_dora": True, "init_lora_weights": "pissa"},
    {"lr_scheduler_type": "cosine", "warmup_ratio": 0.5, "optim": "adafactor"},
]


class Pruned(Exception):
    pass


def test_a_run_learns_and_says_what_it_cost(tuner: FineTuner) -> None:
    reports: list[tuple[int, float, Mapping[str, float]]] = []
    result = tuner.run(
        {"max_steps": 30, "learning_rate": 1e-2},
        report=lambda step, score, metrics: reports.append((step, score, dict(metrics))),
    )
    baseline = tuner.baseline()
    assert result.quality > 0.1
    assert result.quality == pytest.approx(
        (baseline.loss - result.metrics["loss"]) / baseline.loss
    )
    assert result.score == result.quality - 0.1 * result.cost
    assert [point["step"] for point in result.curve] == [15, 30]
    assert [(step, score) for step, score, _ in reports] == [
        (point["step"], point["score"]) for point in result.curve
    ]
    assert reports[-1][1] == result.score
    assert result.steps == 30 and not result.stopped_early
    assert result.cost == result.cost_parts["estimated"]["total"]
    assert result.seconds > 0 and result.peak_memory_bytes > 0 and result.flops > 0
    json.dumps([result.curve, result.metrics, result.cost_parts])


def test_the_reference_run_costs_one(make_tuner: Make) -> None:
    tuner = make_tuner(reference={**QUICK, "lora_rank": 4})
    result = tuner.run({**QUICK, "lora_rank": 4})
    assert result.cost_parts["estimated"] == {
        "time": 1.0,
        "memory": 1.0,
        "parameters": 1.0,
        "total": 1.0,
    }
    double = tuner.run({**QUICK, "lora_rank": 8, "max_steps": 8})
    assert double.cost_parts["estimated"]["parameters"] == 2.0
    assert double.cost_parts["estimated"]["time"] > 2.0


def test_the_base_model_comes_back_bit_for_bit(
    tuner: FineTuner, base_hash: Hash, tmp_path: Path
) -> None:
    before = base_hash(tuner)
    attributes = set(tuner._prepared.base.model.__dict__)
    config = tuner._prepared.base.model.config.to_dict()
    first = tuner.run(QUICK)
    for number, variant in enumerate(VARIANTS):
        tuner.run({**QUICK, **variant}, folder=tmp_path / str(number))
        assert base_hash(tuner) == before, variant
    again = tuner.run(QUICK)
    assert (again.quality, again.score, again.curve) == (first.quality, first.score, first.curve)
    assert set(tuner._prepared.base.model.__dict__) == attributes
    assert tuner._prepared.base.model.config.to_dict() == config
    assert not any(p.requires_grad for p in tuner._prepared.base.model.parameters())


def test_trained_biases_are_put_back(
    make_tuner: Make, make_tokenizer: Callable[[], Any], base_hash: Hash, tmp_path: Path
) -> None:
    import torch
    from transformers import GPT2Config
    from transformers import GPT2LMHeadModel

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with torch.random.fork_rng():
        GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32)
        ).save_pretrained(tmp_path / "gpt2")
    tuner = make_tuner(name=str(tmp_path / "gpt2"))
    before = base_hash(tuner_ready(tuner))
    with pytest.raises(FineTuningError, match="olora does not go with gpt2 models") as failed:
        tuner.run({**QUICK, "init_lora_weights": "olora"})
    assert failed.value.reason == "configuration"
    for bias in ("all", "lora_only"):
        adapter = tmp_path / bias
        result = tuner.run({**QUICK, "bias": bias, "init_lora_weights": "pissa"}, folder=adapter)
        assert base_hash(tuner) == before
        assert loss_of_saved(tuner, adapter) == pytest.approx(result.metrics["loss"], rel=1e-4)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 32},
    "opt": {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "qwen2": {"hidden_size": 16, "intermediate_size": 32, "num_key_value_heads": 1},
    "gemma2": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_key_value_heads": 1,
        "head_dim": 8,
    },
    "phi": {"hidden_size": 16, "intermediate_size": 32},
    "mistral": {"hidden_size": 16, "intermediate_size": 32, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_train_and_come_back(
    make_tuner: Make,
    make_tokenizer: Callable[[], Any],
    base_hash: Hash,
    tmp_path: Path,
    name: str,
) -> None:
    import torch
    from transformers import AutoConfig
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / name)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "eos")}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    config = AutoConfig.for_model(
        name, vocab_size=len(tokenizer), **sizes, **ids, **ARCHITECTURES[name]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    tuner = tuner_ready(make_tuner(name=str(tmp_path / name)))
    before = base_hash(tuner)
    for variant in ({"target_modules": "qv"}, {"init_lora_weights": "olora", "layers": "1"}):
        adapter = tmp_path / "adapter" / variant.get("init_lora_weights", "default")
        result = tuner.run({**QUICK, "lora_rank": 2, **variant}, folder=adapter)
        assert base_hash(tuner) == before
        assert loss_of_saved(tuner, adapter) == pytest.approx(result.metrics["loss"], rel=1e-4)


def test_further_arguments_reach_the_trainer(make_tuner: Make, base_hash: Hash) -> None:
    noisy = tuner_ready(make_tuner(extra={"neftune_noise_alpha": 50.0}))
    before = base_hash(noisy)
    embeddings = noisy._prepared.base.model.get_input_embeddings()
    attributes = set(embeddings.__dict__)
    assert noisy.run(QUICK).quality != make_tuner().run(QUICK).quality

    def report(step: int, score: float, metrics: Mapping[str, float]) -> None:
        raise Pruned

    with pytest.raises(Pruned):
        noisy.run(QUICK, report=report)
    assert base_hash(noisy) == before
    assert set(embeddings.__dict__) == attributes and not embeddings._forward_hooks


def test_a_schedule_has_the_arguments_that_it_needs(make_tuner: Make) -> None:
    tuner = make_tuner(extra={"lr_scheduler_kwargs": {"min_lr": 1e-3}})
    slow = tuner.run({**QUICK, "lr_scheduler_type": "cosine_with_min_lr"})
    assert slow.steps == QUICK["max_steps"]


@pytest.mark.parametrize(
    "change",
    [
        {"loraplus_lr_ratio": 16.0},
        {"weight_decay": 0.5},
        {"warmup_ratio": 1.0},
        {"lr_scheduler_type": "constant"},
        {"max_grad_norm": 1e-3, "optim": "sgd"},
        {"lora_dropout": 0.5},
        {"lora_alpha": 64.0},
        {"use_rslora": True},
        {"use_dora": True},
        {"batch_size": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_parameter_makes_a_difference(tuner: FineTuner, change: dict[str, Any]) -> None:
    assert tuner.run({**QUICK, **change}).quality != tuner.run(QUICK).quality


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def test_a_saved_adapter_loads_onto_the_original_model(
    tuner: FineTuner, tmp_path: Path, variant: dict[str, Any]
) -> None:
    result = tuner.run({**QUICK, **variant}, folder=tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == tuner.model.name
    assert saved["peft_type"] == "LORA"
    assert loss_of_saved(tuner, tmp_path / "adapter") == pytest.approx(
        result.metrics["loss"], rel=1e-4
    )


def test_gradient_checkpointing_changes_memory_and_nothing_else(
    make_tuner: Make, tuner: FineTuner, base_hash: Hash
) -> None:
    saving = make_tuner(gradient_checkpointing=True)
    before = base_hash(tuner_ready(saving))
    first, second = saving.run(QUICK), saving.run(QUICK)
    plain = tuner.run(QUICK)
    assert first.curve == second.curve
    assert first.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-5)
    assert first.bytes < plain.bytes and first.flops > plain.flops
    assert base_hash(saving) == before
    assert not saving._prepared.base.model.get_input_embeddings()._forward_hooks


def test_micro_batches_change_memory_and_nothing_else(make_tuner: Make, tuner: FineTuner) -> None:
    plain = tuner.run(QUICK)
    small = make_tuner(micro_batch_size=2).run(QUICK)
    assert small.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-4)
    assert small.bytes < plain.bytes


def test_equal_runs_are_equal_in_another_process(tuner: FineTuner) -> None:
    here = tuner.run(QUICK, seed=3)
    options = [
        section.model_dump_json()
        for section in (tuner.model, tuner.data, tuner.training, tuner.objective)
    ]
    code = (
        "import json, sys\n"
        "from optuna_lora_rl.finetuning import options as o\n"
        "from optuna_lora_rl.finetuning.trial import FineTuner\n"
        "kinds = (o.ModelOptions, o.DataOptions, o.TrainingOptions, o.ObjectiveOptions)\n"
        "made = [k.model_validate_json(s) for k, s in zip(kinds, sys.argv[1:5])]\n"
        f"result = FineTuner(*made).run({QUICK!r}, seed=3)\n"
        "print(json.dumps([result.quality, result.score]))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *options], capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout) == [here.quality, here.score]
    assert ran.stderr == ""


def test_another_seed_is_another_run(tuner: FineTuner) -> None:
    assert tuner.run(QUICK, seed=1).quality != tuner.run(QUICK, seed=2).quality


def test_the_callers_random_numbers_are_left_alone(tuner: FineTuner) -> None:
    import torch

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    tuner.run(QUICK)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_a_pruned_run_ends_at_once_and_leaves_the_base_as_it_was(
    tuner: FineTuner, base_hash: Hash, tmp_path: Path
) -> None:
    before = base_hash(tuner)
    steps: list[int] = []

    def report(step: int, score: float, metrics: Mapping[str, float]) -> None:
        steps.append(step)
        raise Pruned

    with pytest.raises(Pruned):
        tuner.run({**QUICK, "init_lora_weights": "pissa"}, report=report, folder=tmp_path)
    assert steps == [2]
    assert base_hash(tuner) == before
    assert not (tmp_path / "adapter_config.json").exists()


def test_even_an_interrupt_leaves_the_base_as_it_was(tuner: FineTuner, base_hash: Hash) -> None:
    before = base_hash(tuner)

    def report(step: int, score: float, metrics: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuner.run({**QUICK, "init_lora_weights": "olora"}, report=report)
    assert base_hash(tuner) == before


@pytest.mark.parametrize("ending", ["whole", "pruned", "failed"])
def test_nothing_of_a_run_stays_in_memory(tuner: FineTuner, ending: str) -> None:
    from peft.tuners.lora import LoraLayer
    from trl import SFTTrainer

    def living() -> list[type]:
        kinds = [type(thing) for thing in gc.get_objects()]
        return [kind for kind in kinds if issubclass(kind, SFTTrainer | LoraLayer)]

    def report(step: int, score: float, metrics: Mapping[str, float]) -> None:
        if ending == "pruned":
            raise Pruned

    fast = {"learning_rate": 1e20, "max_grad_norm": 0.0, "optim": "sgd"}
    kept: BaseException | None = None
    # What earlier tests left behind.
    gc.collect()
    before = living()
    try:
        tuner.run({**QUICK, **(fast if ending == "failed" else {})}, report=report)
    except (Pruned, FineTuningError) as error:
        kept = error
    assert living() == before
    assert (kept is None) == (ending == "whole")


def test_a_diverging_run_is_stopped_as_soon_as_it_is_seen(
    tuner: FineTuner, base_hash: Hash
) -> None:
    before = base_hash(tuner)
    reported: list[int] = []
    with pytest.raises(FineTuningError) as failed:
        tuner.run(
            {"max_steps": 100, "learning_rate": 1e20, "max_grad_norm": 0.0, "optim": "sgd"},
            report=lambda step, score, metrics: reported.append(step),
        )
    assert failed.value.reason == "diverged"
    assert "step" in failed.value.message
    assert reported == []
    assert base_hash(tuner) == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_running_out_of_memory_is_told_apart(
    tuner: FineTuner, base_hash: Hash, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from trl import SFTTrainer

    def exhausted(*args: Any, **kwargs: Any) -> None:
        raise error

    before = base_hash(tuner)
    monkeypatch.setattr(SFTTrainer, "training_step", exhausted)
    with pytest.raises(FineTuningError) as failed:
        tuner.run({**QUICK, "init_lora_weights": "pissa"})
    assert failed.value.reason == "out-of-memory"
    assert failed.value.message
    assert base_hash(tuner) == before


def test_any_other_failure_keeps_its_message(
    tuner: FineTuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import SFTTrainer

    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(SFTTrainer, "training_step", broken)
    with pytest.raises(FineTuningError) as failed:
        tuner.run(QUICK)
    assert failed.value.reason == "error"
    assert failed.value.message == "KeyError: 'gone'"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"init_lora_weights": "pissa", "lora_rank": 64}, "has only 16 for lora_rank 64"),
        ({"target_modules": "everything"}, "it is one of qv"),
        ({"layers": "7"}, "the layers 0 to 1"),
        ({"optim": "adam_nope"}, "optim 'adam_nope' is unknown; it is one of adamw_torch, "),
        ({"lr_scheduler_type": "zigzag"}, "'zigzag' is unknown; it is one of linear, cosine, "),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs other training.extra.lr_scheduler_"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs other training.extra.lr_scheduler_"),
    ],
)
def test_impossible_parameters_fail_as_configuration(
    tuner: FineTuner, base_hash: Hash, parameters: dict[str, Any], words: str
) -> None:
    before = base_hash(tuner)
    with pytest.raises(FineTuningError) as failed:
        tuner.run({**QUICK, **parameters})
    assert failed.value.reason == "configuration"
    assert words in failed.value.message
    assert base_hash(tuner) == before


def test_a_run_that_stagnates_stops_and_costs_less(make_tuner: Make) -> None:
    tuner = make_tuner(evaluations=8, early_stopping_patience=2)
    # Far too slow: no evaluation is better than the first.
    slow = {"max_steps": 64, "learning_rate": 1e-12}
    result = tuner.run(slow)
    assert result.stopped_early and result.steps == 3 * 64 / 8
    qualities = [point["quality"] for point in result.curve]
    assert max(qualities) == qualities[0] and len(qualities) == 3
    assert result.quality == qualities[-1]
    whole = make_tuner(evaluations=8).run(slow)
    assert result.cost_parts["estimated"]["time"] == pytest.approx(
        whole.cost_parts["estimated"]["time"] * result.steps / 64
    )


def test_generated_answers_are_scored(make_tuner: Make, write_rows: Callable[..., str]) -> None:
    rows = [{"prompt": f"{a}{b}=", "completion": "ok"} for a in range(10) for b in range(5)]
    tuner = make_tuner(train=write_rows(rows), metric="exact_match", max_new_tokens=4)
    assert tuner.baseline().exact_match == 0.0
    result = tuner.run({"max_steps": 40, "learning_rate": 1e-2})
    assert result.quality == result.metrics["exact_match"] == 1.0
    assert result.metrics["accuracy"] == result.metrics["f1"] == 1.0


def test_the_test_split_waits_for_the_best(
    make_tuner: Make, sums: str, write_rows: Callable[..., str], tmp_path: Path
) -> None:
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in (10, 11) for b in range(9)]
    tuner = make_tuner(test=write_rows(rows, "test.jsonl"), metric="token_accuracy")
    result = tuner.run({"max_steps": 20, "learning_rate": 1e-2}, folder=tmp_path / "a")
    found = tuner.test(tmp_path / "a")
    assert found is not None
    assert found.loss != result.metrics["loss"]
    assert found.quality > 0
    assert make_tuner().test(tmp_path / "a") is None


def test_the_untuned_model_is_measured_once(
    make_tuner: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_tuner(cache=tmp_path).baseline()
    monkeypatch.setattr(Shared, "evaluate", None)
    assert make_tuner(cache=tmp_path).baseline() == first
    with pytest.raises(TypeError):
        make_tuner(cache=tmp_path, max_validation_samples=3).baseline()


def test_runs_on_data_from_the_cache_give_the_same(make_tuner: Make, tmp_path: Path) -> None:
    alone = make_tuner().run(QUICK)
    make_tuner(cache=tmp_path).prepare()
    (entry,) = (tmp_path / "tokens").iterdir()
    before = entry.stat().st_mtime_ns
    assert make_tuner(cache=tmp_path).run(QUICK).curve == alone.curve
    assert entry.stat().st_mtime_ns == before


def test_a_damaged_cache_is_measured_again(make_tuner: Make, tmp_path: Path) -> None:
    first = make_tuner(cache=tmp_path).baseline()
    (path,) = (tmp_path / "baselines").iterdir()
    path.write_text('{"loss": 1')
    assert make_tuner(cache=tmp_path).baseline() == first


def test_measured_cost_is_relative_to_a_measured_run(make_tuner: Make, tmp_path: Path) -> None:
    tuner = make_tuner(cache=tmp_path, cost_source="measured", reference=QUICK)
    reported: list[float] = []
    result = tuner.run(QUICK, report=lambda step, score, metrics: reported.append(score))
    assert result.cost == result.cost_parts["measured"]["total"] > 0
    assert result.score == result.quality - 0.1 * result.cost
    # What it takes is known at its end only: until then the estimate is charged.
    assert reported[-1] == result.curve[-1]["score"] == pytest.approx(result.quality - 0.1)
    assert result.seconds > 0 and result.peak_memory_bytes > 0
    assert result.cost_parts["measured"]["parameters"] == 1.0
    assert result.cost_parts["estimated"]["total"] == 1.0
    assert len(list((tmp_path / "references").iterdir())) == 1


def test_trackers_follow_a_run_and_close_when_it_is_pruned(
    make_tuner: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    closed: list[bool] = []
    close = SummaryWriter.close
    monkeypatch.setattr(
        SummaryWriter, "close", lambda writer: (closed.append(True), close(writer))[1]
    )
    tuner = make_tuner(report_to=["tensorboard"])
    tuner.run(QUICK, folder=tmp_path / "whole", trackers_name="trial-0")
    assert closed == [True]
    assert list((tmp_path / "whole").rglob("events.out.tfevents*"))

    def prune(step: int, score: float, metrics: Mapping[str, float]) -> None:
        raise Pruned

    with pytest.raises(Pruned):
        tuner.run(QUICK, folder=tmp_path / "pruned", report=prune)
    assert closed == [True, True]
    with pytest.raises(FineTuningError):
        tuner.run({**QUICK, "learning_rate": 1e20, "max_grad_norm": 0.0, "optim": "sgd"})
    assert closed == [True, True, True]


def test_a_run_says_nothing_on_the_terminal(
    tuner: FineTuner, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    tuner.run(QUICK)
    assert capfd.readouterr() == ("", "")
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_sets": {"mine": ["q_porj"]}}, "target_sets.mine: this llama model has no"),
        ({"target_sets": {"qv": ["q_proj"]}}, "target_sets.qv is the name of a preset"),
        ({"reference": {"lora_rank": 0}}, "objective.reference: lora_rank: 0"),
        ({"reference": {"optim": "adam"}}, "objective.reference: optim 'adam' is unknown"),
        ({"reference": {"rank": 4}}, "objective.reference: rank"),
        ({"metric": "f1", "max_new_tokens": 500}, "leaves no room for a prompt"),
        ({"precision": "fp16", "use_cpu": None}, "training.precision fp16 needs a GPU"),
        ({"packing": True, "use_cpu": None}, "attn_implementation flash_attention_2"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation"),
        ({"name": "./no-such-folder"}, "model.name: there is no folder './no-such-folder'"),
        ({"max_length": 2}, "data.max_length: within 2 tokens no"),
    ],
)
def test_what_cannot_work_is_said_before_any_trial(
    make_tuner: Make, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as refused:
        make_tuner(**options).prepare()
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_several_gpus_in_one_process_are_refused(
    make_tuner: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="2 GPUs are visible to one process"):
        make_tuner(use_cpu=None).prepare()


def test_mixed_precision_leaves_the_base_as_it_was(make_tuner: Make, base_hash: Hash) -> None:
    tuner = make_tuner(precision="bf16", dtype="bfloat16")
    attributes = set(tuner_ready(tuner)._prepared.base.model.__dict__)
    first, second = tuner.run(QUICK), tuner.run(QUICK)
    assert first.curve == second.curve
    assert first.quality > 0
    assert set(tuner._prepared.base.model.__dict__) == attributes


def test_generated_metrics_need_questions(
    make_tuner: Make, write_rows: Callable[..., str]
) -> None:
    source = write_rows([{"text": f"line {i}"} for i in range(9)])
    with pytest.raises(UserError, match=r"objective\.metric: f1 compares answers"):
        make_tuner(train=source, metric="f1").prepare()


def test_text_and_chat_train_too(make_tuner: Make, write_rows: Callable[..., str]) -> None:
    text = write_rows([{"text": f"{i} and {i + 1}"} for i in range(30)], "text.jsonl")
    chat = write_rows(
        [
            {
                "messages": [
                    {"role": "user", "content": f"{i}?"},
                    {"role": "assistant", "content": "yes" if i % 2 else "no"},
                ]
            }
            for i in range(30)
        ],
        "chat.jsonl",
    )
    assert make_tuner(train=text).run(QUICK).quality > 0
    chatting = make_tuner(train=chat, metric="accuracy", max_new_tokens=4)
    assert math.isfinite(chatting.run(QUICK).quality)


def tuner_ready(tuner: FineTuner) -> FineTuner:
    tuner.prepare()
    return tuner


def loss_of_saved(tuner: FineTuner, adapter: Path) -> float:
    """Loads an adapter as a user of PEFT would and evaluates it on the validation set."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(tuner.model.name)
    model = PeftModel.from_pretrained(fresh, adapter)
    return tuner._shared.evaluate(model, tuner._prepared.tokens.validation, None)["loss"]


def test_results_are_plain(tuner: FineTuner) -> None:
    result = tuner.run(QUICK)
    assert isinstance(result, TrialResult)
    for name in ("quality", "score", "cost", "seconds", "flops", "bytes"):
        assert type(getattr(result, name)) is float, name
    for name in ("steps", "trainable_parameters", "peak_memory_bytes"):
        assert type(getattr(result, name)) is int, name


def test_traits_say_what_there_is(tuner: FineTuner) -> None:
    traits = tuner.traits()
    assert traits["train_examples"] + traits["validation_examples"] == 60
    assert traits["model_layers"] == 2 and traits["hidden_size"] == 32
    assert 5 < traits["mean_tokens"] <= traits["longest_tokens"] <= 8


def test_an_optimizer_that_is_not_installed_fails_before_training(
    tuner: FineTuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(FineTuningError) as failed:
        tuner.run({**QUICK, "optim": "adamw_bnb_8bit"})
    assert failed.value.reason == "configuration"
