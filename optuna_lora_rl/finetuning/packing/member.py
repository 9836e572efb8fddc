"""One run of a pack: its job, its requests, and the detour of its backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any
from typing import Protocol

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from optuna_lora_rl.finetuning.lora import Adapter
from optuna_lora_rl.finetuning.packing.adapters import Factors
from optuna_lora_rl.finetuning.packing.coroutine import Coroutine
from optuna_lora_rl.finetuning.price import Measured


@dataclass(frozen=True)
class Call:
    """The wish that a function is called in the thread of the pack."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Forward:
    """A batch that waits for its hidden states.

    Attributes:
        input_ids: (sequences, length).
        attention_mask: The same shape.
        trains: Whether gradients are wanted.
        drops: Whether inputs are dropped out.
        autocast: The type that autocast computes in, or None where it is off.
    """

    input_ids: Tensor
    attention_mask: Tensor
    trains: bool
    drops: bool
    autocast: torch.dtype | None


@dataclass(frozen=True)
class Backward:
    """Hidden states whose gradient waits to go on into the adapter."""


class Job(Protocol):
    """One run for a pack."""

    def work(self, member: Member) -> None:
        """The run itself, called in a coroutine."""

    def done(self, error: Exception | None, took: Measured) -> None:
        """Called in the thread of the pack when ``work`` has ended."""

    def alone(self) -> None:
        """Called instead when memory ran out beside others: does all again, outside the pack."""


class Member:
    """A run in a pack: its job, its coroutine, and its side of what the pack computes.

    Args:
        job: The run.

    Attributes:
        job: The run.
        coroutine: Where it runs.
        trained: The adapter's updates by module name.
        fixed: What an initialisation has to have taken out of the base weights.
        hidden: The last hidden states that wait for a gradient.
        batch: The batch that it gave last.
        seconds: Its share of the time so far.
        peak_bytes: The peak of memory while it was at work, the others' memory included.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.coroutine: Coroutine[None] = Coroutine(lambda: job.work(self))
        self.trained: dict[str, Factors] = {}
        self.fixed: dict[str, Factors] = {}
        self.hidden: Tensor | None = None
        self.batch: Forward | None = None
        self.seconds = 0.0
        self.peak_bytes = 0

    def takes(self) -> Forward:
        """The batch that it waits with, or waited with before its backward pass."""
        request = self.coroutine.request
        if isinstance(request, Forward):
            self.batch = request
        assert self.batch is not None
        return self.batch

    def waits_to_go_back(self) -> bool:
        return isinstance(self.coroutine.request, Backward)

    def order(self) -> tuple[Any, ...]:
        """Places runs side by side whose updates can be computed together."""
        ranks = [factors.a.shape[0] for factors in self.trained.values()]
        return len(self.takes().input_ids), sorted(self.trained), max(ranks, default=0)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function in the thread of the pack; what it raises is raised here."""
        return self.coroutine.ask(Call(function, arguments))

    def join(
        self, adapter: Adapter, *, subtracts_start: bool, parted: Callable[[str], None]
    ) -> None:
        """Sends the adapter's model through the shared base from now on.

        Args:
            adapter: In a model of its own, with the weights of the shared one.
            subtracts_start: Whether the initialisation took the adapter's first update out of
                these weights (PiSSA, OLoRA); the shared ones still have it.
            parted: Called in the thread of the pack, once, with the reason, when the model is
                called in a way that cannot be shared, and so computes by itself.
        """
        model = adapter.model.get_base_model()
        for name, layer in model.named_modules():
            if "default" not in getattr(layer, "lora_A", ()):
                continue
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            scale, p = layer.scaling["default"], getattr(layer.lora_dropout["default"], "p", 0.0)
            self.trained[name] = Factors(a, b, scale, p)
            if subtracts_start:
                self.fixed[name] = Factors(a.detach().clone(), b.detach().clone(), -scale)
        self._redirect(adapter, model.base_model, parted)

    def after_backward(self) -> None:
        """Takes the gradient of the hidden states on into the adapter's weights."""
        if self.hidden is not None:
            self.coroutine.ask(Backward())

    def weights(self) -> list[Tensor]:
        """The tensors that are trained."""
        factors = self.trained.values()
        return [t for f in factors for t in (f.a, f.b) if t.requires_grad]

    def _redirect(self, adapter: Adapter, backbone: Any, parted: Callable[[str], None]) -> None:
        own, said = backbone.forward, False

        @wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal said
            wanted = {name for name, v in kwargs.items() if v is not None and v is not False}
            if args or wanted != {"input_ids", "attention_mask"}:
                # Most often generation, with its cache. The model is whole and can do it itself.
                if "use_cache" not in wanted and not said:
                    said = True
                    self.call(parted, f"its model is called with {', '.join(sorted(wanted))}")
                return own(*args, **kwargs)
            if self.hidden is not None:
                raise RuntimeError("two forward passes in one training step cannot be packed")
            ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
            kind = ids.device.type
            hidden = self.coroutine.ask(
                Forward(
                    input_ids=ids,
                    attention_mask=mask,
                    trains=torch.is_grad_enabled(),
                    drops=adapter.model.training,
                    autocast=torch.get_autocast_dtype(kind)
                    if torch.is_autocast_enabled(kind)
                    else None,
                )
            )
            self.hidden = hidden if hidden.requires_grad else None
            return BaseModelOutputWithPast(last_hidden_state=hidden)

        backbone.forward = forward
