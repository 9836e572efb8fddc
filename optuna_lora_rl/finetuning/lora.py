"""One trial's adapter: built, put into the base model, saved, and taken out without a trace."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from pathlib import Path
from typing import Any
from typing import cast

import torch
from peft import LoraConfig
from peft import PeftModel
from peft import get_peft_model
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import Tensor
from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import first_line
from optuna_lora_rl.finetuning import products
from optuna_lora_rl.finetuning.architecture import Architecture
from optuna_lora_rl.finetuning.architecture import LinearModule
from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.isolation import quiet
from optuna_lora_rl.finetuning.targets import peft_names
from optuna_lora_rl.finetuning.targets import select
from optuna_lora_rl.rank import allocation
from optuna_lora_rl.rank import initialisation
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import saved
from optuna_lora_rl.rank.initialisation import Kind
from optuna_lora_rl.rank.initialisation import Start

# What PEFT puts in the place of a module.
ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)


@dataclass(frozen=True)
class Adapter:
    """An adapter in its place.

    Attributes:
        model: The base model with the adapter in it.
        initial: The adapter's weights before training, on the CPU.
        start: What of them the base weights make up for.
        has_base: Whether nobody else computes with the base weights while it is there.
    """

    model: PeftModel
    initial: dict[str, Tensor]
    start: Start = field(default_factory=Start)
    has_base: bool = False

    def weights(self) -> dict[str, Tensor]:
        return _weights(self.model)

    @property
    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def changed(self) -> bool:
        """Whether training has moved any weight."""
        # A layer of another rank than before is not equal either.
        return any(
            not torch.equal(weight.cpu(), self.initial[name])
            for name, weight in self.weights().items()
        )

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the adapter in PEFT format, such that it loads onto the *original* base.

        With it goes the tokenizer, with which it was trained, so that the folder is all one needs.

        PiSSA, OLoRA and starts of our own that are not zero train against a base from which their
        first update was taken. Their adapter is therefore written as the plain LoRA of rank r + r0
        that makes the same update: BA - B0 A0 = [B | -B0] [A ; A0].

        Raises:
            UserError: When the folder cannot be written, which is no fault of the trial.
        """
        try:
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
            self.start.subtract(folder)
            # PEFT's card is an empty form, with the path of the base on this machine.
            (folder / "README.md").unlink(missing_ok=True)
            tokenizer.save_pretrained(str(folder))
        except (OSError, SafetensorError, UserError) as error:
            failed = error.__cause__ if isinstance(error, UserError) else error
            if not isinstance(failed, OSError | SafetensorError):
                raise
            cause = _system_error(failed, folder)
            reason = getattr(cause, "strerror", None) or first_line(cause)
            raise UserError(
                f"the adapter cannot be written to {str(folder)!r}: {reason}"
            ) from cause


def targets_of(
    configuration: Configuration,
    architecture: Architecture,
    target_sets: Mapping[str, Sequence[str]],
) -> tuple[LinearModule, ...]:
    """Returns the modules that a configuration adapts.

    Raises:
        FineTuningError: With reason ``"configuration"``, when there is none, the rank is more
            than the initialisation can give one of them, or it cannot be had in this model.
    """
    try:
        chosen = select(
            architecture, configuration.target_modules, configuration.layers, target_sets
        )
    except UserError as error:
        raise FineTuningError("configuration", str(error)) from None
    if configuration.init_lora_weights.startswith("olora") and architecture.fan_in_fan_out:
        # PEFT takes a weight's rows for outputs; here they are inputs.
        raise FineTuningError(
            "configuration",
            f"init_lora_weights {configuration.init_lora_weights} does not go with "
            f"{architecture.model_type} models, whose layers keep their weights transposed; take "
            "pissa or default",
        )
    smallest = min(chosen, key=lambda linear: min(linear.inputs, linear.outputs))
    most = min(smallest.inputs, smallest.outputs)
    if configuration.rank_limited and configuration.lora_rank > most:
        raise FineTuningError(
            "configuration",
            f"init_lora_weights {configuration.init_lora_weights} takes its directions from the "
            f"weights, and {smallest.name} has only {most} for lora_rank "
            f"{configuration.lora_rank}",
        )
    return chosen


def lora_config(
    configuration: Configuration,
    architecture: Architecture,
    chosen: Sequence[LinearModule],
    ranks: Mapping[str, int] | None = None,
    revision: str | None = None,
) -> LoraConfig:
    """Says a configuration in PEFT's words.

    Args:
        configuration: What is wanted.
        architecture: The model's modules.
        chosen: Those that get an adapter.
        ranks: Their ranks, where these differ; their scale is that of ``lora_rank`` all the same.
        revision: The base model's on the hub, which PEFT asks for when it loads the adapter.
    """
    names, layers = peft_names(architecture, chosen)
    # Our own starts come after PEFT's.
    own = configuration.own_start is not None
    init = "default" if own else configuration.init_lora_weights
    alpha = configuration.lora_alpha
    patterns = allocation.patterns(
        ranks or {},
        rank=configuration.lora_rank,
        alpha=alpha,
        use_rslora=configuration.use_rslora,
    )
    return LoraConfig(
        task_type="CAUSAL_LM",
        revision=revision,
        r=configuration.lora_rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        rank_pattern=patterns.rank_pattern,
        alpha_pattern=patterns.alpha_pattern,
        lora_dropout=configuration.lora_dropout,
        target_modules=names,
        layers_to_transform=layers,
        bias=configuration.bias,
        init_lora_weights=True if init == "default" else init,
        use_rslora=configuration.use_rslora,
        use_dora=configuration.use_dora,
        fan_in_fan_out=architecture.fan_in_fan_out,
    )


@dataclass(frozen=True)
class OwnStart:
    """An initialisation that PEFT has not.

    Attributes:
        kind: Its name.
        both: Whether B begins like A; the base weights then make up for it.
        seed: Source of randomness.
    """

    kind: Kind
    both: bool
    seed: int

    @classmethod
    def of(cls, configuration: Configuration, seed: int) -> OwnStart | None:
        """Returns a configuration's, or None where PEFT has its initialisation."""
        own = configuration.own_start
        return None if own is None else cls(cast(Kind, own[0]), own[1], seed)


@contextmanager
def attached(
    base: PreTrainedModel,
    config: LoraConfig,
    chosen: Sequence[LinearModule],
    start: OwnStart | None = None,
) -> Iterator[Adapter]:
    """Puts an adapter into the base model and takes it out again, whatever happens between.

    Afterwards the base is bit for bit what it was: weights that an initialisation changed
    (PiSSA, OLoRA, our own) or that were trained in place (biases) come back from a copy on the
    CPU, and the patches of trainer and gradient checkpointing are removed.
    """
    with restored(base, _at_risk(base, config, chosen, start)):
        adapter = replace(placed(base, config, start), has_base=True)
        with products.cast_once(adapter.model):
            yield adapter


def placed(model: PreTrainedModel, config: LoraConfig, start: OwnStart | None = None) -> Adapter:
    """Puts an adapter into a model for good."""
    adapted = get_peft_model(model, config)
    begun = Start()
    if start is not None:
        begun = initialisation.initialise(
            adapted, start.kind, both=start.both, seed=start.seed, keep_weights=False
        )
    elif _takes_start_out(config):
        found = layers.lora_layers(adapted)
        begun = Start({name: layers.factors_of(layer).kept() for name, layer in found.items()})
    weights = _weights(adapted)
    initial = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
    return Adapter(model=adapted, initial=initial, start=begun)


@contextmanager
def loaded(base: PreTrainedModel, folder: Path) -> Iterator[PeftModel]:
    """Puts a saved adapter into the base model, for evaluation, and takes it out again.

    Raises:
        UserError: When it cannot be read, or does not go with the base model.
    """
    saved.check(folder)
    biases = {
        name: parameter for name, parameter in base.named_parameters() if name.endswith("bias")
    }
    with restored(base, biases):
        try:
            # Never a pickle, which could run code.
            adapted = PeftModel.from_pretrained(
                base, str(folder), is_trainable=False, use_safetensors=True
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"the adapter in {str(folder)!r} does not go with the base model: {reason}"
            ) from error
        yield adapted


@contextmanager
def restored(base: PreTrainedModel, at_risk: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Undoes what adapters and trainers leave in a base model.

    Args:
        base: The model.
        at_risk: Parameters that may be changed in place.
    """
    copies = {name: parameter.detach().cpu().clone() for name, parameter in at_risk.items()}
    parameters = dict(at_risk)
    embeddings = base.get_input_embeddings()
    hooks = dict(embeddings._forward_hooks)
    attributes = set(base.__dict__)
    config, generation = _saved(base.config), _saved(base.generation_config)
    try:
        yield
    finally:
        _strip(base)
        with torch.no_grad():
            for name, copied in copies.items():
                parameters[name].copy_(copied)
        with quiet():
            base.gradient_checkpointing_disable()
        embeddings._forward_hooks.clear()
        embeddings._forward_hooks.update(hooks)
        # Above all `forward`, which TRL patches one level deeper each trial, and `peft_config`.
        for name in set(base.__dict__) - attributes:
            del base.__dict__[name]
        _put_back(base.config, config)
        _put_back(base.generation_config, generation)
        base.requires_grad_(False)
        base.zero_grad(set_to_none=True)
        base.eval()


def _takes_start_out(config: LoraConfig) -> bool:
    return str(config.init_lora_weights).startswith(("pissa", "olora"))


def _at_risk(
    base: PreTrainedModel,
    config: LoraConfig,
    chosen: Sequence[LinearModule],
    start: OwnStart | None,
) -> dict[str, nn.Parameter]:
    at_risk: dict[str, nn.Parameter] = {}
    if _takes_start_out(config) or (start is not None and start.both):
        for linear in chosen:
            at_risk[linear.name] = base.get_submodule(linear.name).weight
    if config.bias != "none":
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                at_risk[name] = parameter
    return at_risk


def _weights(model: PeftModel) -> dict[str, Tensor]:
    # Told to leave embeddings out, PEFT need not ask the hub whether they were resized.
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def _system_error(error: Exception, folder: Path) -> Exception:
    # safetensors gives the system's error as text only.
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return error
    return OSError(int(number[1]), os.strerror(int(number[1])), str(folder))


def _strip(base: nn.Module) -> None:
    # Also after an initialisation that failed half-way, when there is no PeftModel to unload.
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.get_base_layer())
            elif isinstance(child, AuxiliaryTrainingWrapper):
                setattr(parent, name, child.original_module)


def _saved(config: Any) -> dict[str, Any]:
    return copy.copy(config.__dict__)


def _put_back(config: Any, saved: dict[str, Any]) -> None:
    config.__dict__.clear()
    config.__dict__.update(saved)
