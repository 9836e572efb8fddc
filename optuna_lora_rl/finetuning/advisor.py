"""Which ranks to begin with, and why; and when a run says that they were wrong.

The starting points are what guides and measurements agree on: rank 16 for an ordinary task, less
for a simple one or little data, more for a hard one, alpha twice the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import TYPE_CHECKING
from typing import Literal
from typing import get_args

import numpy as np

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import capacity
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank.allocation import Patterns
from optuna_lora_rl.rank.allocation import Unit
from optuna_lora_rl.rank.allocation import allocate
from optuna_lora_rl.rank.allocation import patterns
from optuna_lora_rl.rank.capacity import Memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optuna_lora_rl.finetuning.options import Precision

Complexity = Literal["low", "medium", "high"]
RANKS: dict[Complexity, int] = {"low": 8, "medium": 16, "high": 64}
FEW_EXAMPLES = 1000
_ALPHA_RATIO = 2
_FACTOR_BYTES, _GRADIENT_BYTES, _ADAM_BYTES = 4, 4, 8
_GIGABYTE = 1e9
# Measured over counted activations (studies/results/advised_memory.md), by the bytes of a number,
# and once more where a block is computed again beside its gradients. How often logits are held on
# a CPU: those of learnt positions where the model's own head makes them, else of a tile of TRL's,
# in float32 and as wide.
_TAKEN, _RECOMPUTED = {4: 1.7, 2: 1.27}, 2.7
_OWN_LOGITS, _TILED_LOGITS, _TILE = 2.2, 8, (4096, 32768)
# How far a layer's rank may go over the mean: a few layers must not take all.
_MOST_OVER_MEAN = 4


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How the model will be trained.

    Attributes:
        batch_size: Sequences in one forward pass.
        length: Their length in tokens.
        learnt: Share of the tokens that is learnt; of prompts and completions the completions'.
        checkpointing: Whether activations are recomputed.
        precision: Arithmetic, as ``training.precision`` of a study.
        examples: Training examples, if known.
    """

    batch_size: int = 8
    length: int = 512
    learnt: float = 1.0
    checkpointing: bool = False
    precision: Literal["auto"] | Precision = "auto"
    examples: int | None = None


@dataclass(frozen=True)
class Advice:
    """Ranks to begin with.

    Attributes:
        rank: The mean rank aimed at; ``LoraConfig.r``.
        alpha: ``LoraConfig.lora_alpha``.
        ranks: The rank of each layer.
        patterns: These in PEFT's words.
        memory: What training then holds.
        reasons: Why, a sentence each.
    """

    rank: int
    alpha: int
    ranks: dict[str, int]
    patterns: Patterns
    memory: Memory
    reasons: tuple[str, ...]


def advise(
    model: PreTrainedModel,
    *,
    complexity: Complexity = "medium",
    memory_gb: float | None = None,
    workload: Workload | None = None,
    names: Sequence[str] | None = None,
    importance: Mapping[str, float] | None = None,
) -> Advice:
    """Advises ranks for a base model.

    Args:
        model: The model, without an adapter.
        complexity: Of the task.
        memory_gb: What there is, in 10^9 bytes; None for no bound.
        workload: How the model will be trained.
        names: Layers to adapt; None for all linear ones.
        importance: By which layers differ (:mod:`.importance`); None for all alike.

    Raises:
        UserError: When an argument is unknown, or even rank 1 does not fit.
    """
    if complexity not in RANKS:
        raise UserError(
            f"task complexity is one of {', '.join(get_args(Complexity))}, not {complexity!r}"
        )
    workload = workload or Workload()
    shapes = layers.shapes_of(model)
    wanted = layers.chosen(shapes, names)
    shapes = {name: shapes[name] for name in wanted}
    rank, reasons = _wished(complexity, workload)
    if memory_gb is not None:
        rank, reason = _fitting(model, shapes, rank, memory_gb, workload)
        reasons.append(reason)
    # Layers differ in what a rank takes; within a bound the sum of that must stay the same.
    unit: Unit = "rank" if memory_gb is None else "parameters"
    ranks, more = _shared(shapes, rank, importance, unit)
    alpha = _ALPHA_RATIO * rank
    reasons += more
    reasons.append(f"alpha {alpha}, twice the rank, is the usual ratio")
    return Advice(
        rank=rank,
        alpha=alpha,
        ranks=ranks,
        patterns=patterns(ranks, rank=rank, alpha=alpha),
        memory=memory_of(model, ranks, workload),
        reasons=tuple(reasons),
    )


def memory_of(model: PreTrainedModel, ranks: Mapping[str, int], workload: Workload) -> Memory:
    """Counts what training adapters of these ranks with Adam holds.

    Activations are those that :mod:`optuna_lora_rl.finetuning.cost` counts, times what measured
    runs took more: copies of norms, gradients on their way back, what the allocator keeps.

    Raises:
        UserError: When a layer is unknown.
    """
    shapes = layers.shapes_of(model)
    wanted = layers.chosen(shapes, ranks)
    count = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    return Memory(
        base=float(sum(p.numel() * p.element_size() for p in model.parameters())),
        factors=float(count * _FACTOR_BYTES),
        gradients=float(count * _GRADIENT_BYTES),
        moments=float(count * _ADAM_BYTES),
        activations=_activations(model, wanted, ranks, workload),
    )


def review(
    train_losses: Sequence[float],
    eval_losses: Sequence[float],
    *,
    window: int = 4,
    standing: float = 0.01,
) -> str | None:
    """Says what a run's losses say about its rank; None when they are as they should be.

    Args:
        train_losses: Training losses at the evaluations.
        eval_losses: Evaluation losses.
        window: How many of the last are looked at.
        standing: Relative fall over the window under which a loss stands still.

    Raises:
        UserError: When there are not as many of the one as of the other.
    """
    if len(train_losses) != len(eval_losses):
        raise UserError(
            f"there are {len(train_losses)} training losses and {len(eval_losses)} evaluation "
            "losses; each evaluation needs both"
        )
    if len(eval_losses) < window:
        return None
    train, evaluation = (np.array(x[-window:]) for x in (train_losses, eval_losses))
    fall = (train[0] - train[-1]) / max(abs(train[0]), 1e-12)
    gain = (evaluation[0] - evaluation[-1]) / max(abs(evaluation[0]), 1e-12)
    if fall > standing and gain < -standing:
        return (
            f"overfitting: the training loss fell by {fall:.1%} while the evaluation loss rose by "
            f"{-gain:.1%}; take a smaller rank or more dropout, or stop earlier"
        )
    if abs(fall) < standing and abs(gain) < standing:
        return (
            f"stagnant: over {window} evaluations the losses moved by less than {standing:.1%}; "
            "take a larger rank or learning rate if they should go on falling"
        )
    return None


def _wished(complexity: Complexity, workload: Workload) -> tuple[int, list[str]]:
    rank = RANKS[complexity]
    reasons = [f"rank {rank}: where tasks of {complexity} complexity usually begin"]
    examples = workload.examples
    if examples is not None and examples < FEW_EXAMPLES:
        rank //= 2
        reasons.append(
            f"rank {rank}: {examples} examples are few, and a smaller adapter learns less of "
            "their noise; dropout of 0.05 to 0.1 helps too"
        )
    return rank, reasons


def _fitting(
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    memory_gb: float,
    workload: Workload,
) -> tuple[int, str]:
    def needed(r: int) -> Memory:
        return memory_of(model, dict.fromkeys(shapes, r), workload)

    one, per_rank = needed(1), needed(2).total - needed(1).total
    room = memory_gb * _GIGABYTE - one.total
    if room < 0:
        checkpointed = replace(workload, checkpointing=True)
        less = memory_of(model, dict.fromkeys(shapes, 1), checkpointed)
        hint = "a smaller model or batch"
        if not workload.checkpointing and less.total <= memory_gb * _GIGABYTE:
            hint = "gradient checkpointing"
        raise UserError(
            f"{memory_gb:g} GB are less than the {one.total / _GIGABYTE:.3g} GB that training at "
            f"rank 1 takes, {one.base / _GIGABYTE:.3g} GB of it weights and "
            f"{one.activations / _GIGABYTE:.3g} GB activations; take {hint}"
        )
    most = 1 + int(room / per_rank)
    if most < rank:
        return most, f"rank {most}: more does not fit into {memory_gb:g} GB"
    useful = max(capacity.break_even(shape) for shape in shapes.values())
    up_to = f"up to rank {most}" if most < useful else "any rank"
    return rank, (
        f"memory: {needed(rank).total / _GIGABYTE:.3g} of {memory_gb:g} GB; {up_to} fits"
    )


def _shared(
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    importance: Mapping[str, float] | None,
    unit: Unit,
) -> tuple[dict[str, int], list[str]]:
    reasons = []
    # An adapter with more parameters than the weight has no point.
    bounds = {name: max(1, capacity.break_even(shape)) for name, shape in shapes.items()}
    narrow = [name for name, bound in bounds.items() if bound < rank]
    if narrow:
        reasons.append(
            f"less rank for {len(narrow)} narrow layers, such as {narrow[0]}: at rank "
            f"{bounds[narrow[0]]} their adapters are as large as their weights"
        )
    alike = {name: min(rank, bound) for name, bound in bounds.items()}
    if importance is None:
        return alike, reasons
    price = {name: sum(shape) if unit == "parameters" else 1 for name, shape in shapes.items()}
    most = {name: min(bound, _MOST_OVER_MEAN * rank) for name, bound in bounds.items()}
    budget = rank * sum(price.values())
    ranks = most
    if budget < sum(price[name] * most[name] for name in most):
        ranks = allocate(
            {name: importance.get(name, 0.0) for name in bounds},
            budget=budget,
            unit=unit,
            shapes=shapes,
            maximum=most,
        ).ranks
    low, high = min(ranks.values()), max(ranks.values())
    reasons.append(
        f"ranks {low} to {high} by importance, which take the "
        f"{'ranks' if unit == 'rank' else 'parameters'} of rank {rank} everywhere"
    )
    return ranks, reasons


def _activations(
    model: PreTrainedModel, names: Sequence[str], ranks: Mapping[str, int], workload: Workload
) -> float:
    from optuna_lora_rl.finetuning import architecture
    from optuna_lora_rl.finetuning import cost
    from optuna_lora_rl.finetuning import device
    from optuna_lora_rl.finetuning import heads
    from optuna_lora_rl.finetuning.configuration import Configuration

    read = architecture.read(model)
    wanted = set(names)
    chosen = [linear for linear in read.linears if linear.name in wanted]
    precision = workload.precision
    if precision == "auto":
        precision = device.precision_of(model.device, read.hidden)
    itemsize = min(4 if precision == "fp32" else 2, model.dtype.itemsize)
    work = cost.Work(
        steps=1,
        sequences=workload.batch_size,
        micro_batch_size=workload.batch_size,
        length=workload.length,
        checkpointing=workload.checkpointing,
        itemsize=itemsize,
        weight_itemsize=0,
    )
    mean = max(1, round(sum(ranks.values()) / len(ranks)))
    configuration = Configuration.of({"lora_rank": mean, "lora_dropout": 0.0})
    found = cost.estimate(configuration, read, chosen, work)
    headless = cost.estimate(configuration, replace(read, vocabulary=0), chosen, work)
    trained = found.trainable_parameters * (_FACTOR_BYTES + _GRADIENT_BYTES + _ADAM_BYTES)
    logits = found.memory_bytes - headless.memory_bytes
    if model.device.type == "cpu":
        learnt = workload.batch_size * workload.length * workload.learnt
        if itemsize == 2 and learnt * read.vocabulary <= heads.FEW:
            logits = _OWN_LOGITS * learnt * read.vocabulary * itemsize
        else:
            tile = min(learnt, _TILE[0]) * min(read.vocabulary, _TILE[1])
            logits = _TILED_LOGITS * tile * 4
    # In mixed precision the frozen weights are there a second time.
    cast = itemsize * read.parameters if model.dtype.itemsize > itemsize else 0
    taken = _TAKEN[itemsize] * (_RECOMPUTED if workload.checkpointing else 1)
    return taken * (headless.memory_bytes - trained) + logits + cast
