"""What a run costs, counted: FLOPs and bytes, the same on every machine and every run.

Notations
---------
in, out   features of a linear module; r the rank of its adapter
T         padded length of a micro-batch in tokens, expected over random batches
d, V, L   width of the residual stream, size of the vocabulary, number of blocks
a         features that attention mixes (heads times head size)

FLOPs, two for each multiply-add (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), a sequence:

- frozen linear: forward ``2 in out T``; backward ``2 in out T`` for the gradient of its input
  (none for its weight, which is frozen), where gradients flow at all;
- attention: forward ``4 a T^2`` (scores and mixing, not halved for causality), backward twice
  that (Narayanan et al. 2021, arXiv 2104.04473, appendix);
- adapter (Hu et al. 2021, arXiv 2106.09685): forward ``2 r (in + out) T``; backward twice that,
  less ``2 r in T`` where the input needs no gradient;
- DoRA (Liu et al. 2024, arXiv 2402.09353), as PEFT computes it: ``2 r in (in + out)`` for the
  product BA at each micro-batch, and the frozen linear once more when there is dropout;
- head: ``2 d V (T - 1)`` three times: forward, its recomputation, and the hidden gradient, as
  TRL's chunked loss does it;
- gradient checkpointing: the blocks' forward once more (Chen et al. 2016, arXiv 1604.06174), and
  gradients flow through every block.

Gradients flow from the head down to the lowest adapted module: below it there is no backward.
Norms, activations, embeddings, the optimizer's update and evaluation are not counted. Against
``torch.utils.flop_counter`` on Llama, GPT-2 and GPT-NeoX this is within 2%, and up to 10% too
high with gradient checkpointing, which stops recomputing once it has what backward reads. The
weights of mixture-of-experts layers that are no linear modules are not counted either.

Bytes: base weights; adapter weights and gradients in float32 and the optimizer's moments; the
activations of one micro-batch that the backward pass reads, in the manner of Korthikanti et al.
2022 (arXiv 2205.05198), restricted to blocks where gradients flow; one tile of logits. Numbers
whose type is left to the machine (``auto``) count as float32, so that the bytes are the same on
every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from optuna_lora_rl.finetuning.architecture import Architecture
from optuna_lora_rl.finetuning.architecture import LinearModule
from optuna_lora_rl.finetuning.configuration import Configuration

_STAGES = {
    "other": 0,
    "query": 0,
    "key": 0,
    "value": 0,
    "fused": 0,
    "attention-output": 2,
    "mlp-in": 3,
    "mlp-out": 4,
}
_ATTENTION_STAGE = 1
_MLP_STAGE = 3
# Bytes of optimizer state for a trainable parameter, by how the optimizer's name begins.
_MOMENTS = (
    (("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), 2.0),
    (("adamw_torch_4bit",), 1.0),
    (("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1.0),
    (("sgd", "adafactor"), 0.0),
    (("lion", "paged_lion", "rmsprop", "adagrad", "ademamix_8bit"), 4.0),
)
_ADAM_MOMENTS = 8.0
_LOGIT_TILE_TOKENS = 4096


@dataclass(frozen=True)
class Work:
    """How much a run computes.

    Attributes:
        steps: Optimizer steps.
        sequences: Mean sequences in a step.
        micro_batch_size: Sequences in one forward pass.
        length: T, the expected padded length in tokens.
        checkpointing: Whether activations are recomputed.
        itemsize: Bytes of an activation's number.
        weight_itemsize: Bytes of a base weight's number.
    """

    steps: int
    sequences: float
    micro_batch_size: int
    length: float
    checkpointing: bool = False
    itemsize: int = 4
    weight_itemsize: int = 4


@dataclass(frozen=True)
class Estimate:
    """Counted cost of a run: FLOPs of training, bytes at the peak, trainable parameters."""

    flops: float
    memory_bytes: float
    trainable_parameters: int


def expected_padded_length(lengths: Sequence[int], micro_batch_size: int) -> float:
    """Returns the expected longest of ``micro_batch_size`` lengths drawn without replacement.

    With the lengths sorted, l_1 <= ... <= l_n, the longest of m is at most l_k with probability
    C(k, m) / C(n, m).
    """
    ordered = np.sort(np.asarray(lengths, dtype=float))
    n = len(ordered)
    m = min(micro_batch_size, n)
    k = np.arange(m, n + 1)
    choose = np.array([math.lgamma(i + 1) - math.lgamma(i - m + 1) for i in k])
    at_most = np.exp(choose - choose[-1])
    return float(ordered[m - 1 :] @ np.diff(at_most, prepend=0.0))


def trainable_parameters(
    configuration: Configuration,
    architecture: Architecture,
    chosen: Sequence[LinearModule],
    ranks: Mapping[str, int] | None = None,
) -> int:
    """Returns how many parameters a configuration trains, with ranks of their own if given."""
    r = _ranks(configuration, chosen, ranks)
    frozen_b = configuration.init_lora_weights == "mica"
    count = sum(r[m.name] * (m.inputs + (0 if frozen_b else m.outputs)) for m in chosen)
    if configuration.use_dora:
        count += sum(m.outputs for m in chosen)
    if configuration.bias == "all":
        count += architecture.bias_parameters
    elif configuration.bias == "lora_only":
        count += sum(m.outputs for m in chosen if m.bias)
    return count


def estimate(
    configuration: Configuration,
    architecture: Architecture,
    chosen: Sequence[LinearModule],
    work: Work,
    ranks: Mapping[str, int] | None = None,
) -> Estimate:
    """Counts what a run costs; the module's docstring gives the formulas.

    Args:
        configuration: What is trained.
        architecture: The model's modules.
        chosen: Those that get an adapter.
        work: How much the run computes.
        ranks: Ranks of the chosen modules, where they are not all ``lora_rank``.
    """
    r = _ranks(configuration, chosen, ranks)
    flows = _Flow.of(configuration, architecture, chosen, work.checkpointing)
    T = work.length
    sequence = _blocks_flops(architecture, T, flows, work.checkpointing)
    sequence += 3 * 2 * architecture.hidden * architecture.vocabulary * (T - 1)
    sequence += sum(
        _adapter_flops(configuration, module, r[module.name], T, flows, work.checkpointing)
        for module in chosen
    )
    flops = work.steps * work.sequences * sequence
    if configuration.use_dora:
        passes = work.steps * math.ceil(work.sequences / work.micro_batch_size)
        forwards = 2 if work.checkpointing else 1
        flops += (
            passes
            * forwards
            * sum(2 * r[m.name] * m.inputs * (m.inputs + m.outputs) for m in chosen)
        )
    trainable = trainable_parameters(configuration, architecture, chosen, r)
    memory = (
        architecture.parameters * work.weight_itemsize
        + trainable * (4 + 4 + _moments(configuration.optim))
        + _activation_bytes(configuration, architecture, chosen, r, work, flows)
    )
    return Estimate(flops=flops, memory_bytes=memory, trainable_parameters=trainable)


def look_flops(architecture: Architecture, T: float, *, backward: bool) -> float:
    """Counts a look at one sequence of the untuned model.

    Args:
        architecture: The model's modules.
        T: Its padded length in tokens.
        backward: Whether for the gradients of all linear weights, which take ``2 in out T`` each
            beside those of their inputs; otherwise for the second moments of the inputs,
            ``2 in^2 T``.
    """
    products = sum(2 * m.inputs * m.outputs * T for m in architecture.computing)
    mixing = 4 * architecture.attention_width * T * T * architecture.layers
    head = 2 * architecture.hidden * architecture.vocabulary * T
    if backward:
        return 3 * (products + mixing + head)
    return products + mixing + head + sum(2 * m.inputs**2 * T for m in architecture.linears)


def sketch_flops(chosen: Sequence[LinearModule], T: float, columns: int) -> float:
    """Counts the gradient sketches of one sequence: ``2 c (in + out) T`` for each module.

    Args:
        chosen: The modules.
        T: The sequence's padded length in tokens.
        columns: c, the width of a sketch; of narrower inputs the gradient itself is taken.
    """
    return sum(
        2 * m.inputs * m.outputs * T
        if m.inputs <= columns
        else 2 * columns * (m.inputs + m.outputs) * T
        for m in chosen
    )


def decomposition_flops(m: LinearModule) -> float:
    """Counts a weight's singular values: 4 a b^2 - 4 b^3 / 3 of an a x b matrix with a >= b.

    Golub and Van Loan 2013, Matrix Computations, section 8.6.
    """
    a, b = max(m.inputs, m.outputs), min(m.inputs, m.outputs)
    return 4 * a * b**2 - 4 * b**3 / 3


def _ranks(
    configuration: Configuration,
    chosen: Sequence[LinearModule],
    ranks: Mapping[str, int] | None,
) -> Mapping[str, int]:
    return ranks or {m.name: configuration.lora_rank for m in chosen}


@dataclass(frozen=True)
class _Flow:
    """Where gradients flow into modules: above the lowest trained module of its branch.

    Attributes:
        layer: The lowest block with something trained, -1 for below all blocks.
        attention: The lowest trained stage in that block.
        mlp: The same for the MLP's stages; its own branch in parallel blocks.
    """

    layer: int
    attention: int
    mlp: int

    @classmethod
    def of(
        cls,
        configuration: Configuration,
        architecture: Architecture,
        chosen: Sequence[LinearModule],
        checkpointing: bool,
    ) -> _Flow:
        all_biases = configuration.bias == "all" and architecture.bias_parameters > 0
        layer = min(-1 if m.layer is None else m.layer for m in chosen)
        if checkpointing or all_biases or layer < 0:
            return cls(-1, 0, 0)
        stages = [_STAGES[m.role] for m in chosen if m.layer == layer]
        if not architecture.parallel:
            return cls(layer, min(stages), min(stages))
        nothing = len(_STAGES)
        return cls(
            layer,
            min((stage for stage in stages if stage < _MLP_STAGE), default=nothing),
            min((stage for stage in stages if stage >= _MLP_STAGE), default=nothing),
        )

    def into(self, layer: int | None, stage: int) -> bool:
        if layer is None or layer != self.layer:
            return layer is not None and layer > self.layer
        return stage > (self.mlp if stage >= _MLP_STAGE else self.attention)

    def out_of(self, module: LinearModule) -> bool:
        if module.layer is None or module.layer != self.layer:
            return module.layer is not None and module.layer > self.layer
        stage = _STAGES[module.role]
        return stage >= (self.mlp if stage >= _MLP_STAGE else self.attention)


def _blocks_flops(
    architecture: Architecture, T: float, flows: _Flow, checkpointing: bool
) -> float:
    forward = 4 * architecture.attention_width * T * T * architecture.layers
    backward = sum(
        8 * architecture.attention_width * T * T
        for layer in range(architecture.layers)
        if flows.into(layer, _ATTENTION_STAGE)
    )
    for m in architecture.computing:
        product = 2 * m.inputs * m.outputs * T
        forward += product
        if flows.into(m.layer, _STAGES[m.role]):
            backward += product
    return forward * (2 if checkpointing else 1) + backward


def _adapter_flops(
    configuration: Configuration,
    m: LinearModule,
    r: int,
    T: float,
    flows: _Flow,
    checkpointing: bool,
) -> float:
    into_a, out_of_b = 2 * r * m.inputs * T, 2 * r * m.outputs * T
    needs_input = flows.into(m.layer, _STAGES[m.role])
    forward = into_a + out_of_b
    backward = into_a + out_of_b
    if configuration.init_lora_weights != "mica":
        backward += out_of_b
    if needs_input:
        backward += into_a
    if configuration.use_dora and configuration.lora_dropout > 0:
        product = 2 * m.inputs * m.outputs * T
        forward += product
        backward += product if needs_input else 0
    return forward * (2 if checkpointing else 1) + backward


def _activation_bytes(
    configuration: Configuration,
    architecture: Architecture,
    chosen: Sequence[LinearModule],
    r: Mapping[str, int],
    work: Work,
    flows: _Flow,
) -> float:
    tokens = work.micro_batch_size * work.length
    by_layer: dict[int, float] = {}
    for m in architecture.computing:
        if m.layer is None or not flows.out_of(m):
            continue
        # The output feeds attention, an activation function or the residual stream; of the MLP's
        # products the backward pass reads both the value and its activation.
        by_layer[m.layer] = by_layer.get(m.layer, 0) + m.outputs * (2 if m.role == "mlp-in" else 1)
    for layer in by_layer:
        # The two norms and attention's result.
        by_layer[layer] += 2 * architecture.hidden + architecture.attention_width
    for m in chosen:
        own = r[m.name] + m.inputs * (2 if configuration.lora_dropout > 0 else 1)
        if m.layer is not None:
            by_layer[m.layer] = by_layer.get(m.layer, 0) + own
    saved = sum(by_layer.values())
    if work.checkpointing and by_layer:
        saved = architecture.layers * architecture.hidden + max(by_layer.values())
    logits = min(tokens, _LOGIT_TILE_TOKENS) * architecture.vocabulary
    return work.itemsize * (tokens * saved + logits)


def _moments(optim: str) -> float:
    for names, size in _MOMENTS:
        if optim.startswith(names):
            return size
    return _ADAM_MOMENTS
