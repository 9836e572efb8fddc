"""Single fine-tuning runs for the comparisons of ranks and of initialisations.

What the package offers runs as in a study. PEFT's adapters that are no parameter of a study
(AdaLoRA, EVA, LoRA-GA) run over the same base model, data, steps and evaluation, with
PEFT's own configuration and preparation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING
from typing import Any

import torch
from peft import AdaLoraConfig
from peft import EvaConfig
from peft import PeftModel
from peft import initialize_lora_eva_weights
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.isolation import own_randomness
from optuna_lora_rl.finetuning.isolation import quiet
from optuna_lora_rl.finetuning.lora import Adapter
from optuna_lora_rl.finetuning.lora import restored
from optuna_lora_rl.finetuning.options import DataOptions
from optuna_lora_rl.finetuning.options import ModelOptions
from optuna_lora_rl.finetuning.options import ObjectiveOptions
from optuna_lora_rl.finetuning.options import TrainingOptions
from optuna_lora_rl.finetuning.trial import Trial
from optuna_lora_rl.finetuning.trial import TrialRequest
from optuna_lora_rl.finetuning.trial import TrialResult
from optuna_lora_rl.finetuning.workspace import Workspace
from optuna_lora_rl.rank import layers

if TYPE_CHECKING:
    from collections.abc import Callable

    from optuna_lora_rl.finetuning.price import Measured
    from optuna_lora_rl.vocabulary import Value

# Sequences that PEFT's data-driven starts read; ours read as many.
SEQUENCES = 32
# AdaLoRA: PEFT's own ratio of ranks at the start and at the end, 12 to 8.
ADALORA_START = 1.5


@dataclass(frozen=True)
class Arm:
    """One thing that is compared.

    Attributes:
        group: What it belongs to, in figures.
        parameters: Of the run, by the package's names; ``lora_rank`` is the rank at the start.
        peft: An adapter that PEFT has and a study has not, or "".
        equal: How its parameters are those of the others, in words.
    """

    group: str
    parameters: Mapping[str, Value] = field(default_factory=dict)
    peft: str = ""
    equal: str = ""


class Bench:
    """Runs arms on one task, over one base model.

    Args:
        task: A built-in task.
        steps: Optimizer steps of a run.
        training: How every run trains.
        scale: alpha / r of every adapter, whatever its rank.
    """

    def __init__(self, task: str, steps: int, training: TrainingOptions, scale: float) -> None:
        self.workspace = Workspace(
            ModelOptions(),
            DataOptions(train=f"tiny:{task}", max_validation_samples=256),
            training,
            ObjectiveOptions(reference={"max_steps": steps}),
            {},
            {},
            None,
        )
        self._steps = steps
        self._scale = scale
        self.probe_seconds = cache(self._probe_seconds)

    @property
    def untuned(self) -> dict[str, float]:
        """Loss and token accuracy of the untuned model."""
        baseline = self.workspace.baseline
        return {"loss": baseline.loss, "accuracy": baseline.token_accuracy}

    def run(self, arm: Arm, rate: float, seed: int, evaluations: int) -> dict[str, Any]:
        """Fine-tune once.

        Args:
            arm: What.
            rate: The learning rate.
            seed: Of the start and the order of examples.
            evaluations: How often to evaluate; training is the same.

        Returns:
            Quality (share of the untuned loss that is gone), token accuracy, the curve as
            (step, quality, accuracy), CPU seconds, parameters at their most, on average over
            the steps and at the end, ranks at the end, and what was seen of the start. A run
            that failed has its reason, and what the untuned model has.
        """
        parameters = {
            **arm.parameters,
            "lora_alpha": self._scale * int(arm.parameters["lora_rank"]),
            "learning_rate": rate,
            "max_steps": self._steps,
        }
        self._evaluate(evaluations)
        self.probe_seconds(str(parameters.get("rank_allocation", "uniform")))
        began = time.process_time()
        course = _KINDS.get(arm.peft, _Seen)(self.workspace, TrialRequest(0, parameters, seed))
        try:
            result = course.result(course.alone())
        except FineTuningError as error:
            seconds = round(time.process_time() - began, 3)
            untuned = self.workspace.baseline.token_accuracy
            nothing = {"quality": 0.0, "accuracy": untuned, "curve": []}
            return {"failure": error.reason, **nothing, "cpu_seconds": seconds}
        seconds = round(time.process_time() - began, 3)
        return {**course.outcome(result), "cpu_seconds": seconds}

    def _evaluate(self, evaluations: int) -> None:
        """Has the runs that follow evaluated so often, each time on everything."""
        training, workspace = self.workspace.training, self.workspace
        if training.evaluations != evaluations:
            workspace.training = training.model_copy(update={"evaluations": evaluations})
            for made in ("rows_read", "stages"):
                workspace.__dict__.pop(made, None)

    def _probe_seconds(self, kind: str) -> float:
        """Makes the probe of an allocation, once; returns the CPU seconds it took."""
        # Loading and the untuned model's evaluation are no part of it.
        _ = self.workspace.baseline
        began = time.process_time()
        course = Trial(self.workspace, TrialRequest(0, {"rank_allocation": kind, "lora_rank": 2}))
        return time.process_time() - began if course.chosen else 0.0


class _Seen(Trial):
    """A run of the package, whose adapter is looked at when it begins."""

    def __init__(self, workspace: Workspace, run: TrialRequest) -> None:
        super().__init__(workspace, run)
        self._start: dict[str, float] = {}
        self._trained = 0

    def train(self, adapter: Adapter, after_backward: Callable[[], None] | None = None) -> None:
        self.begin(adapter)
        self._start = start_of(adapter.model)
        self._trained = adapter.trainable_parameters

        def first_gradient() -> None:
            if "gradient_norm" not in self._start:
                squares = [
                    p.grad.square().sum() for p in adapter.model.parameters() if p.grad is not None
                ]
                self._start["gradient_norm"] = float(torch.stack(squares).sum().sqrt())

        super().train(adapter, first_gradient)
        self.ended(adapter)

    def begin(self, adapter: Adapter) -> None:
        """Prepares the attached adapter."""

    def ended(self, adapter: Adapter) -> None:
        """Looks at the trained adapter."""

    def outcome(self, result: TrialResult) -> dict[str, Any]:
        """Returns what is recorded."""
        costs = {m.name: m.inputs + m.outputs for m in self.chosen}
        start = {**dict.fromkeys(costs, self.wanted.lora_rank), **self._allocated.ranks}
        ranks = self.final_ranks() or result.ranks or start
        final = sum(costs[name] * rank for name, rank in ranks.items())
        spells = [
            (steps, sum(costs[name] * rank for name, rank in now.items()))
            for steps, now in (self._spells() if result.rank_changes else [])
        ]
        mean = sum(steps * count for steps, count in spells) / result.steps
        return {
            "quality": result.quality,
            "accuracy": result.metrics["token_accuracy"],
            "curve": [[p["step"], p["quality"], p["token_accuracy"]] for p in result.curve],
            "parameters": {
                "most": max([self._trained, *(count for _, count in spells)]),
                "mean": round(mean) if spells else self._trained,
                "final": final,
            },
            "ranks": ranks if len(set(ranks.values())) > 1 else {},
            "changes": len(result.rank_changes),
            "start": self._start,
        }

    def final_ranks(self) -> dict[str, int]:
        """Returns the ranks at the end, where the result does not have them."""
        return {}

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """Training sequences for starts that look at data, the same for every seed."""
        prepared = self._workspace.prepared
        dataset, pad = prepared.tokens.train, prepared.base.tokenizer.pad_token_id
        collate = DataCollatorForLanguageModeling(pad_token_id=pad)
        rows = [
            {name: dataset[index][name] for name in ("input_ids", "labels")}
            for index in range(min(SEQUENCES, len(dataset)))
        ]
        return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


class _Eva(_Seen):
    """PEFT's EVA, which shares ranks out up to ``rho`` times the mean."""

    rho = 2.0

    def __init__(self, workspace: Workspace, run: TrialRequest) -> None:
        super().__init__(workspace, run)
        self.config = replace(
            self.config, init_lora_weights="eva", eva_config=EvaConfig(rho=self.rho)
        )
        self._shares: dict[str, int] = {}

    def begin(self, adapter: Adapter) -> None:
        with quiet():
            initialize_lora_eva_weights(
                adapter.model, self.batches(SEQUENCES), show_progress_bar=False
            )
        found = layers.lora_layers(adapter.model)
        self._shares = {name: layer.r["default"] for name, layer in found.items()}

    def final_ranks(self) -> dict[str, int]:
        return self._shares


class _EvenEva(_Eva):
    """The same as a start alone: all ranks stay equal."""

    rho = 1.0


class _LoraGa(_Seen):
    """PEFT's LoRA-GA with its defaults."""

    def __init__(self, workspace: Workspace, run: TrialRequest) -> None:
        super().__init__(workspace, run)
        self.config = replace(
            self.config, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
        )

    def alone(self) -> Measured:
        model = self._workspace.prepared.base.model

        def step() -> None:
            for batch in self.batches(8):
                model(**batch).loss.backward()

        modules = [model.get_submodule(m.name) for m in self.chosen]
        with restored(model, {m.name: model.get_submodule(m.name).weight for m in self.chosen}):
            with quiet(), own_randomness(self.seed):
                preprocess_loraga(model, self.config, step)
            try:
                return super().alone()
            finally:
                for module in modules:
                    module.__dict__.pop("_peft_loraga_grad", None)


class _AdaLora(_Seen):
    """PEFT's AdaLoRA with its defaults; its schedule has the shares of the run that its guide has.

    Masked directions stay in memory, and count as gone: they can be cut without effect.
    """

    def __init__(self, workspace: Workspace, run: TrialRequest) -> None:
        super().__init__(workspace, run)
        target, steps = self.wanted.lora_rank, self.wanted.max_steps
        first = round(ADALORA_START * target)
        plain: Any = self.config
        self.config = AdaLoraConfig(
            task_type="CAUSAL_LM",
            target_r=target,
            init_r=first,
            # AdaLoRA divides by the rank at the start.
            lora_alpha=plain.lora_alpha * first / target,
            target_modules=plain.target_modules,
            layers_to_transform=plain.layers_to_transform,
            tinit=steps // 8,
            tfinal=steps // 4,
            total_step=steps,
        )
        self._kept: dict[str, int] = {}

    def begin(self, adapter: Adapter) -> None:
        self.callbacks.append(_Allocate(adapter.model))
        config: Any = adapter.model.peft_config["default"]
        weight = config.orth_reg_weight

        def regularised(module: Any, args: Any, kwargs: Any) -> None:
            # PEFT adds the regularisation to the loss of evaluations too.
            config.orth_reg_weight = weight if module.training else 0.0

        adapter.model.base_model.register_forward_pre_hook(regularised, with_kwargs=True)

    def ended(self, adapter: Adapter) -> None:
        prefix = "base_model.model."
        self._kept = {
            name.removeprefix(prefix): int((module.lora_E["default"] != 0).sum())
            for name, module in adapter.model.named_modules()
            if isinstance(module, AdaLoraLayer)
        }

    def final_ranks(self) -> dict[str, int]:
        return self._kept


class _Allocate(TrainerCallback):
    """Lets AdaLoRA mask directions, after each optimizer step and while gradients are there."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model: Any = self._model.base_model
        model.update_and_allocate(state.global_step + 1)


_KINDS: dict[str, type[_Seen]] = {
    "": _Seen,
    "adalora": _AdaLora,
    "eva": _Eva,
    "eva-even": _EvenEva,
    "lora_ga": _LoraGa,
}


def start_of(model: PeftModel) -> dict[str, float]:
    """Returns means over layers of an adapter's norms before training.

    Of A the Frobenius and the spectral norm and the condition number; of the update scaling * B A
    the spectral norm.
    """
    rows = []
    for a, b, scaling in _factors(model):
        values = torch.linalg.svdvals(a)
        product = torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T)
        condition = float(values[0] / values[-1]) if values[-1] > 0 else float("inf")
        rows.append((float(a.norm()), float(values[0]), condition, scaling * float(product[0])))
    names = ("a_norm", "a_spectral_norm", "a_condition", "update_spectral_norm")
    return {name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(names)}


def _factors(model: PeftModel) -> Iterator[tuple[Tensor, Tensor, float]]:
    for module in model.modules():
        if isinstance(module, AdaLoraLayer):
            a, b, e = (getattr(module, f"lora_{name}")["default"].detach() for name in "ABE")
            scaling = float(module.scaling["default"]) / float(module.ranknum["default"])
            yield a, b * e[:, 0], scaling
        elif isinstance(module, LoraLayer):
            a, b = (getattr(module, f"lora_{name}")["default"].weight.detach() for name in "AB")
            yield a, b, float(module.scaling["default"])
