"""Runs side by side give what they give alone, however each of them ends."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import GradientState
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from optuna_lora_rl.finetuning.pack import Pack
from optuna_lora_rl.finetuning.trial import FineTuner
from optuna_lora_rl.finetuning.trial import FineTuningError
from optuna_lora_rl.finetuning.trial import Run
from optuna_lora_rl.finetuning.trial import TrialResult

Make = Callable[..., FineTuner]
Hash = Callable[[FineTuner], str]
Write = Callable[..., str]
Options = dict[str, Any]

QUICK: Options = {"max_steps": 3, "learning_rate": 5e-3}
DIVERGES: Options = {"learning_rate": 1e20, "max_grad_norm": 0.0, "optim": "sgd"}
# Different in everything that may differ within a pack.
MIXED: list[Options] = [
    {},
    {"lora_rank": 1, "lora_alpha": 3.0},
    {"lora_rank": 16, "lora_alpha": 4.0, "target_modules": "qv"},
    {"lora_rank": 7, "use_rslora": True, "target_modules": "attention"},
    {"target_modules": "mlp", "lora_dropout": 0.3},
    {"layers": "last-half", "lora_dropout": 0.1, "lora_rank": 2},
    {"layers": "0", "lora_dropout": 0.5, "target_modules": "qv"},
    {"batch_size": 3, "max_steps": 7},
    {"batch_size": 16, "lora_dropout": 0.2, "max_steps": 2},
    {"batch_size": 1, "max_steps": 1},
    {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    {"init_lora_weights": "orthogonal", "lora_rank": 4},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": "pissa", "lora_rank": 4},
    {"init_lora_weights": "pissa_niter_4", "lora_dropout": 0.2, "use_rslora": True},
    {"init_lora_weights": "olora", "target_modules": "qv", "lora_dropout": 0.1},
    {"loraplus_lr_ratio": 8.0, "weight_decay": 0.1},
    {"optim": "adafactor", "lr_scheduler_type": "cosine", "warmup_ratio": 0.5},
    {"optim": "sgd", "max_grad_norm": 1e-3, "lr_scheduler_type": "constant"},
    {"max_steps": 0, "num_train_epochs": 0.5},
]


class Pruned(Exception):
    pass


def packed(
    tuner: FineTuner,
    runs: Sequence[Run],
    *,
    size: int | None = 8,
    done: Callable[[Run, Any], None] | None = None,
) -> tuple[list[Any], list[str]]:
    """Returns the outcomes in the order of the runs, and the notes."""
    waiting, outcomes, notes = iter(runs), {}, []

    def ended(run: Run, outcome: Any) -> None:
        assert run.number not in outcomes
        outcomes[run.number] = outcome
        if done is not None:
            done(run, outcome)

    tuner.run_packed(lambda: next(waiting, None), ended, size=size, says=notes.append)
    return [outcomes[run.number] for run in runs], notes


def runs_of(configurations: Sequence[Options], folder: Path | None = None) -> list[Run]:
    return [
        Run(i, {**QUICK, **configuration}, folder=None if folder is None else folder / f"{i}")
        for i, configuration in enumerate(configurations)
    ]


def alone(tuner: FineTuner, run: Run, folder: Path | None = None) -> TrialResult:
    return tuner.run(run.configuration, seed=run.seed, report=run.report, folder=folder)


def assert_same(found: Any, expected: TrialResult) -> None:
    assert isinstance(found, TrialResult), found
    assert len(found.curve) == len(expected.curve)
    for ours, theirs in zip(found.curve, expected.curve, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5, abs=1e-5)
    for name in ("quality", "score", "cost"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-5), name
    for name in ("steps", "flops", "bytes", "trainable_parameters", "stopped_early"):
        assert getattr(found, name) == getattr(expected, name), name


def assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        # Optimizers that divide by a gradient's size make much of the last bits of small ones.
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=5e-4)


def assert_all_as_alone(
    tuner: FineTuner, configurations: Sequence[Options], folder: Path, **how: Any
) -> None:
    runs = runs_of(configurations, folder / "packed")
    outcomes, notes = packed(tuner, runs, **how)
    assert notes == []
    for run, outcome in zip(runs, outcomes, strict=True):
        assert_same(outcome, alone(tuner, run, folder / "alone" / f"{run.number}"))
        assert_same_weights(
            folder / "packed" / f"{run.number}", folder / "alone" / f"{run.number}"
        )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of lines of very different lengths."""
    path = tmp_path_factory.mktemp("texts") / "texts.txt.jsonl"
    lines = [f'{{"text": "{"ab " * (i % 9 + 1)}{i}"}}\n' for i in range(40)]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def test_runs_of_all_kinds_give_what_they_give_alone(
    tuner: FineTuner, base_hash: Hash, tmp_path: Path
) -> None:
    before = base_hash(tuner)
    assert_all_as_alone(tuner, MIXED, tmp_path)
    assert base_hash(tuner) == before


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_size": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "micro_batch_size": 2},
        {"metric": "exact_match", "max_new_tokens": 4},
        {"extra": {"loss_type": "dft"}},
        {"early_stopping_patience": 1, "evaluations": 6},
    ],
    ids=str,
)
def test_the_options_of_training_change_nothing_about_that(
    make_tuner: Make, tmp_path: Path, options: Options
) -> None:
    chosen = [MIXED[i] for i in (0, 3, 4, 5, 7, 8, 13, 14)]
    if "early_stopping_patience" in options:
        chosen = [{**c, "learning_rate": 0.3, "max_grad_norm": 0.0} for c in chosen[:4]]
        chosen.append({"max_steps": 6})
    assert_all_as_alone(make_tuner(**options), chosen, tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_texts_of_different_lengths_share_a_pass(
    make_tuner: Make, texts: str, tmp_path: Path, checkpointing: bool
) -> None:
    # Batches of one sequence have each its own length, and dropout is drawn over it.
    dropped = [{"batch_size": b, "lora_dropout": 0.3, "max_steps": 4} for b in (1, 1, 2, 5)]
    chosen = [{**c, "lora_rank": 2 + i} for i, c in enumerate(dropped)]
    chosen += [{"batch_size": 1}, {"init_lora_weights": "pissa", "batch_size": 2}]
    tuner = make_tuner(train=texts, max_length=40, gradient_checkpointing=checkpointing)
    assert_all_as_alone(tuner, chosen, tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_base_in_half_precision_rounds_a_little_differently(
    make_tuner: Make, precision: str
) -> None:
    tuner = make_tuner(precision=precision, dtype="bfloat16")
    runs = runs_of([MIXED[i] for i in (0, 3, 5, 13)])
    for run, outcome in zip(runs, packed(tuner, runs)[0], strict=True):
        assert outcome.metrics["loss"] == pytest.approx(
            alone(tuner, run).metrics["loss"], rel=5e-3
        )


def test_chats_and_generated_answers_too(
    make_tuner: Make, write_rows: Write, tmp_path: Path
) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}{'?' * (i % 5)}"},
                {"role": "assistant", "content": "yes" if i % 2 else "no"},
            ]
        }
        for i in range(30)
    ]
    tuner = make_tuner(train=write_rows(rows), metric="f1", max_new_tokens=4)
    chosen = [{}, {"lora_dropout": 0.2}, {"init_lora_weights": "olora"}, {"max_steps": 5}]
    assert_all_as_alone(tuner, chosen, tmp_path)


def test_seeds_differ_as_alone(tuner: FineTuner) -> None:
    runs = [Run(i, {**QUICK, "lora_dropout": 0.1}, seed=i % 3) for i in range(6)]
    outcomes, _ = packed(tuner, runs, size=4)
    for run, outcome in zip(runs, outcomes, strict=True):
        assert_same(outcome, alone(tuner, run))
    assert len({outcome.quality for outcome in outcomes}) == 3


@pytest.mark.parametrize("size", [1, 2, 3, None])
def test_the_size_of_the_pack_changes_nothing(
    tuner: FineTuner, tmp_path: Path, size: int | None
) -> None:
    assert_all_as_alone(tuner, [MIXED[i] for i in (0, 4, 7, 14)], tmp_path, size=size)


ARCHITECTURES: dict[str, Options] = {
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 32},
    "opt": {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0},
    "qwen2": {"hidden_size": 16, "intermediate_size": 32, "num_key_value_heads": 1},
    "gemma2": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_key_value_heads": 1,
        "head_dim": 8,
    },
    "phi": {"hidden_size": 16, "intermediate_size": 32},
    "mistral": {"hidden_size": 16, "intermediate_size": 32, "num_key_value_heads": 1},
    "gpt2": {"hidden_size": 16, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_share_their_passes(
    make_tuner: Make, make_tokenizer: Callable[[], Any], tmp_path: Path, name: str
) -> None:
    tuner = make_tuner(name=saved_model(name, ARCHITECTURES[name], make_tokenizer(), tmp_path))
    chosen: list[Options] = [
        {"lora_rank": 2},
        {"target_modules": "qv", "lora_dropout": 0.2},
        {"init_lora_weights": "pissa", "layers": "1", "lora_rank": 4},
    ]
    if name == "opt":
        # Its MLP lays all sequences end to end.
        chosen = [{**c, "target_modules": "qv"} for c in chosen]
        _, notes = packed(tuner, runs_of([{"target_modules": "mlp", "max_steps": 1}]))
        assert notes == [
            "trial 0 runs alone: model.decoder.layers.0.fc1 does not see every token of every "
            "sequence once"
        ]
    assert_all_as_alone(tuner, chosen, tmp_path)


def test_a_model_with_dropout_of_its_own_is_not_shared(
    make_tuner: Make, make_tokenizer: Callable[[], Any], tmp_path: Path
) -> None:
    tuner = make_tuner(name=saved_model("gpt2", {"hidden_size": 16}, make_tokenizer(), tmp_path))
    runs = runs_of([{}, {"lora_rank": 2}])
    outcomes, notes = packed(tuner, runs)
    assert notes == [
        f"trial {i} runs alone: the base model has dropout of its own" for i in range(2)
    ]
    for run, outcome in zip(runs, outcomes, strict=True):
        assert outcome.curve == alone(tuner, run).curve


def test_saved_adapters_load_onto_the_original_model(tuner: FineTuner, tmp_path: Path) -> None:
    runs = runs_of([MIXED[i] for i in (0, 3, 5, 13, 14, 15)], tmp_path)
    for run, outcome in zip(runs, packed(tuner, runs)[0], strict=True):
        assert run.folder is not None
        fresh = AutoModelForCausalLM.from_pretrained(tuner.model.name)
        model = PeftModel.from_pretrained(fresh, run.folder)
        found = tuner._shared.evaluate(model, tuner._prepared.tokens.validation, None)["loss"]
        assert found == pytest.approx(outcome.metrics["loss"], rel=1e-4)


def test_one_that_diverges_and_one_that_is_pruned_leave_the_others_alone(
    tuner: FineTuner, base_hash: Hash, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = base_hash(tuner)
    monkeypatch.setattr(
        tuner._shared, "training", tuner.training.model_copy(update={"evaluations": 3})
    )
    order: list[int] = []

    def prune(step: int, score: float, metrics: Mapping[str, float]) -> None:
        if step > 3:
            raise Pruned(step)

    runs = runs_of([{"max_steps": 6, "lora_rank": 1 + i} for i in range(12)])
    runs[2] = Run(2, {"max_steps": 6, "lora_dropout": 0.1, **DIVERGES})
    runs[5] = Run(5, {**QUICK, "max_steps": 6}, report=prune)
    # Its evaluation, not its training, is the first to see that it is lost.
    runs[7] = Run(7, {"max_steps": 1, **DIVERGES})
    outcomes, _ = packed(tuner, runs, done=lambda run, outcome: order.append(run.number))
    for i, (run, outcome) in enumerate(zip(runs, outcomes, strict=True)):
        if i in (2, 7):
            assert isinstance(outcome, FineTuningError) and outcome.reason == "diverged"
            assert ("evaluation" if i == 7 else "training") in outcome.message
            with pytest.raises(FineTuningError) as failed:
                alone(tuner, run)
            assert outcome.message == failed.value.message
        elif i == 5:
            assert isinstance(outcome, Pruned) and outcome.args == (4,)
        else:
            assert_same(outcome, alone(tuner, run))
    # The places of those that ended were taken while the others were running.
    assert set(order[:3]) == {2, 5, 7} and set(order[-4:]) == {8, 9, 10, 11}
    assert base_hash(tuner) == before


def test_reports_are_those_of_a_run_alone_and_come_in_the_callers_thread(
    tuner: FineTuner,
) -> None:
    def report_to(reports: list[Any]) -> Callable[..., None]:
        def report(step: int, score: float, metrics: Mapping[str, float]) -> None:
            assert threading.current_thread() is threading.main_thread()
            reports.append([step, score, *metrics.values()])

        return report

    found: list[list[Any]] = [[] for _ in range(3)]
    runs = [Run(i, {**QUICK, **MIXED[3 + i]}, report=report_to(found[i])) for i in range(3)]
    threads = []
    packed(tuner, runs, done=lambda *ended: threads.append(threading.current_thread()))
    assert threads == [threading.main_thread()] * 3
    for run, reports in zip(runs, found, strict=True):
        expected: list[Any] = []
        tuner.run(run.configuration, report=report_to(expected))
        assert len(reports) == len(expected) == 2
        for ours, theirs in zip(reports, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_places_are_filled_as_they_become_free_and_none_means_not_now(tuner: FineTuner) -> None:
    asked: list[str] = []
    waiting = runs_of([{"max_steps": steps} for steps in (1, 4, 4, 1, 1)])
    given = 0

    def runs() -> Run | None:
        nonlocal given
        # Only one while nothing has ended; afterwards as many as are wanted.
        if given == len(waiting) or (given == 1 and "done" not in asked):
            asked.append("none")
            return None
        given += 1
        asked.append("run")
        return waiting[given - 1]

    tuner.run_packed(runs, lambda run, outcome: asked.append("done"), size=2)
    assert asked[:6] == ["run", "none", "done", "run", "run", "done"]
    assert asked.count("run") == asked.count("done") == 5
    # Having said no, one is not asked again before something has ended.
    assert "none none" not in " ".join(asked) and asked[-1] == "none"
    tuner.run_packed(lambda: None, lambda run, outcome: pytest.fail("nothing ran"))


def test_shares_of_the_time_add_up_to_no_more_than_it(tuner: FineTuner) -> None:
    began = time.perf_counter()
    outcomes, _ = packed(tuner, runs_of(MIXED[:6]))
    took = time.perf_counter() - began
    assert sum(outcome.seconds for outcome in outcomes) < took
    assert all(outcome.seconds > 0 and outcome.peak_memory_bytes > 0 for outcome in outcomes)


def test_what_cannot_run_fails_by_itself(tuner: FineTuner) -> None:
    runs = runs_of([{}, {"optim": "adam_nope"}, {"lora_rank": 0}, {"layers": "7"}, {}])
    outcomes, notes = packed(tuner, runs)
    assert [getattr(outcome, "reason", None) for outcome in outcomes] == [
        None,
        "configuration",
        "configuration",
        "configuration",
        None,
    ]
    assert notes == []
    assert_same(outcomes[4], alone(tuner, runs[4]))


def traces(model: nn.Module) -> dict[str, dict[str, Any]]:
    """All that a run might leave on a model."""
    found = {}
    for name, module in model.named_modules():
        kept = {}
        for key, value in module.__dict__.items():
            if key == "_modules":
                value = {child: id(its) for child, its in value.items()}
            elif key in ("_parameters", "_buffers"):
                value = {
                    own: None if its is None else (id(its), its.requires_grad, its.grad is None)
                    for own, its in value.items()
                }
            elif isinstance(value, dict):
                value = dict(value)
            elif callable(value) and not isinstance(value, type):
                value = getattr(value, "__qualname__", id(value))
            kept[key] = value
        found[name] = kept
    return found


class World:
    """What a run may not change outside of itself."""

    def __init__(self, tuner: FineTuner, base_hash: Hash) -> None:
        self._tuner = tuner
        self._hash = base_hash
        self._before = self._look()

    def assert_unchanged(self) -> None:
        found = self._look()
        for name, expected in self._before.items():
            assert found[name] == expected, name

    def _look(self) -> dict[str, Any]:
        model = self._tuner._prepared.base.model
        gc.collect()
        return {
            "weights": self._hash(self._tuner),
            "traces": traces(model),
            "config": model.config.to_dict(),
            "generation": model.generation_config.to_dict(),
            "python": random.getstate(),
            "numpy": [str(part) for part in np.random.get_state()],
            "torch": torch.get_rng_state().tolist(),
            "gradients": dict(GradientState._shared_state),
            "threads": threading.enumerate(),
            "frozen": gc.get_freeze_count() > 0,
            "grad mode": torch.is_grad_enabled(),
        }


@pytest.fixture
def world(tuner: FineTuner, base_hash: Hash) -> Iterator[World]:
    # The first run of a process leaves what all later ones find.
    packed(tuner, runs_of([{}]))
    yield World(tuner, base_hash)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_a_pack_stays(
    tuner: FineTuner, world: World, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    changed = tuner.training.model_copy(update={"gradient_checkpointing": checkpointing})
    monkeypatch.setattr(tuner._shared, "training", changed)
    packed(tuner, runs_of([MIXED[i] for i in (0, 4, 13, 15)]), size=3)
    world.assert_unchanged()


@pytest.mark.parametrize("where", ["report", "runs", "done", "error in done", "error in runs"])
def test_nothing_stays_of_a_pack_that_is_interrupted(
    tuner: FineTuner, world: World, where: str
) -> None:
    error = KeyError("broken") if "error" in where else KeyboardInterrupt()
    ended: list[int] = []
    begun = 0

    def report(step: int, score: float, metrics: Mapping[str, float]) -> None:
        if where == "report" and step == 3:
            raise error

    def runs() -> Run | None:
        nonlocal begun
        if "runs" in where and begun == 5:
            raise error
        begun += 1
        chosen = MIXED[(4, 13, 0, 5, 8)[begun % 5]]
        return Run(begun, {**QUICK, "max_steps": 6, **chosen}, report=report)

    def done(run: Run, outcome: Any) -> None:
        ended.append(run.number)
        if "done" in where:
            raise error

    with pytest.raises(type(error)) as raised:
        tuner.run_packed(runs, done, size=4)
    assert raised.value is error
    # The others were given up without a word.
    assert len(ended) == (4 if "runs" in where else 1)
    del raised
    error.__traceback__ = None
    world.assert_unchanged()
    outcomes, _ = packed(tuner, runs_of([{}]))
    assert_same(outcomes[0], tuner.run(QUICK))


def test_nothing_of_a_packed_run_stays_in_memory(tuner: FineTuner) -> None:
    from peft.tuners.lora import LoraLayer
    from trl import SFTTrainer

    def living() -> list[Any]:
        gc.collect()
        return [type(t) for t in gc.get_objects() if isinstance(t, SFTTrainer | LoraLayer)]

    def prune(step: int, score: float, metrics: Mapping[str, float]) -> None:
        raise Pruned

    before, between = living(), []
    waiting = [*runs_of([{}]), Run(1, {**QUICK, **DIVERGES}), Run(2, QUICK, report=prune)]
    outcomes: list[Any] = []

    def runs() -> Run | None:
        between.append(living())
        return waiting[len(outcomes)] if len(outcomes) < len(waiting) else None

    tuner.run_packed(runs, lambda run, outcome: outcomes.append(outcome), size=1)
    assert [type(outcome) for outcome in outcomes] == [TrialResult, FineTuningError, Pruned]
    # Each is gone before the next one comes.
    assert len(between) == 4 and all(found == before for found in between)
    assert living() == before


def test_many_trials_leave_no_more_than_few(tuner: FineTuner) -> None:
    def run(count: int, size: int) -> None:
        packed(tuner, runs_of([MIXED[i % len(MIXED)] for i in range(count)]), size=size)

    def living() -> tuple[int, int]:
        gc.collect()
        things = gc.get_objects()
        return sum(isinstance(t, torch.Tensor) for t in things), len(things)

    run(8, 4)
    tensors, objects = living()
    run(16, 4)
    later_tensors, later_objects = living()
    assert later_tensors <= tensors
    # Libraries remember a little in bounded caches; a trial of this model is thousands.
    assert later_objects - objects < 16 * 20


def exhausted(limit: int, when: str, base: nn.Module) -> Callable[[], None]:
    """Makes passes of more than ``limit`` rows run out of memory; returns the undoing."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            if len(g) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return g

    def check(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if when == "backward":
            return Backward.apply(output) if output.requires_grad else output
        if len(output) > limit and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return output

    # Late in the pass: much of it has already been done, and dropout drawn.
    return base.model.layers[1].mlp.register_forward_hook(check).remove


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pack_that_memory_does_not_hold_becomes_smaller(
    make_tuner: Make, when: str, checkpointing: bool
) -> None:
    tuner = make_tuner(gradient_checkpointing=checkpointing, micro_batch_size=4)
    chosen = [{"batch_size": 4, "lora_dropout": 0.1 * i, "lora_rank": 1 + i} for i in range(7)]
    # This one does not fit at all.
    chosen.insert(2, {"batch_size": 4})
    runs = runs_of(chosen)
    tuner.prepare()
    undo = exhausted(8, when, tuner._prepared.base.model)
    try:
        outcomes, notes = packed(tuner, runs)
    finally:
        undo()
    assert notes == [
        f"memory ran out: from now on at most {n} trials share a pass" for n in (4, 2)
    ]
    for run, outcome in zip(runs, outcomes, strict=True):
        assert_same(outcome, alone(tuner, run))


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_only_the_run_that_does_not_fit_fails(tuner: FineTuner, when: str) -> None:
    runs = runs_of([{"batch_size": b, "lora_dropout": 0.1} for b in (4, 4, 12, 4, 4)])
    undo = exhausted(8, when, tuner._prepared.base.model)
    try:
        outcomes, notes = packed(tuner, runs)
    finally:
        undo()
    assert notes[-1] == "memory ran out: from now on trials take turns"
    assert isinstance(outcomes[2], FineTuningError) and outcomes[2].reason == "out-of-memory"
    for i in (0, 1, 3, 4):
        assert_same(outcomes[i], alone(tuner, runs[i]))


def test_the_halves_of_a_pack_are_not_in_memory_together(
    tuner: FineTuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits alone also ends well when the pack has to be cut to single runs."""
    held: set[int] = set()
    forward, backward = Pack._passed, Pack._go_back

    def counted_forward(pack: Any, seats: Any, before: Any) -> Any:
        trains = seats[0].takes().trains
        if trains and len(held) + len(seats) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        passed = forward(pack, seats, before)
        if trains:
            held.add(id(passed))
        return passed

    def counted_backward(pack: Any, passed: Any, waiting: Any) -> None:
        backward(pack, passed, waiting)
        held.remove(id(passed))

    runs = runs_of([{"lora_rank": 1 + i} for i in range(3)])
    with monkeypatch.context() as patch:
        patch.setattr(Pack, "_passed", counted_forward)
        patch.setattr(Pack, "_go_back", counted_backward)
        outcomes, _ = packed(tuner, runs)
    for run, outcome in zip(runs, outcomes, strict=True):
        assert_same(outcome, alone(tuner, run))


def test_another_error_in_a_shared_pass_is_a_bug_and_says_so(
    tuner: FineTuner, world: World
) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("in the base model")

    handle = tuner._prepared.base.model.model.layers[1].register_forward_hook(broken)
    try:
        with pytest.raises(ZeroDivisionError):
            packed(tuner, runs_of([{}, {}]))
    finally:
        handle.remove()
    world.assert_unchanged()


def saved_model(name: str, changes: Options, tokenizer: Any, folder: Path) -> str:
    from transformers import AutoConfig

    tokenizer.save_pretrained(folder / name)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "eos")}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **sizes, **ids, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return str(folder / name)
