"""Many adapters over one forward pass of the frozen base model.

Notations (one linear module; a *block* is a run of adapters that are computed together):
    n       adapters in the block
    b       sequences of each of them
    T       padded length of the pack, in tokens
    L       b * T
    r       largest rank in the block; smaller ones are padded with zeros
    X       (n, L, inputs), the module's inputs, dropped out where training drops out
    A       (n, r, inputs), B^T (n, r, outputs), the factors
    s       (n, 1, 1), the scales alpha / r (rsLoRA: alpha / sqrt r)
    H       (n, L, r) = s X A^T
    Y       (n, L, outputs), the module's outputs, to which H B^T is added
    G       (n, L, outputs), the loss's gradient by Y

The base weights see all rows at once; the factors are multiplied block by block, as batched
products, so that the number of operations does not grow with the number of adapters (cf. Ye et
al. 2023, mLoRA, arXiv 2312.02515; Sheng et al. 2023, S-LoRA, arXiv 2311.03285).
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from optuna_lora_rl.finetuning import products

# Ranks within this factor are padded to the largest among them.
_PADDING = 2


@dataclass(frozen=True)
class Factors:
    """One adapter's update of one module: ``scale * B A``.

    Attributes:
        a: A, (r, inputs).
        b: B, (outputs, r).
        scale: alpha / r, or what rsLoRA makes of it.
        dropout: Probability with which an input is dropped in training.
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0


@dataclass
class Share:
    """One adapter's part of a pack's batch.

    Attributes:
        trained: Its updates by module name.
        fixed: Updates that are not trained, nor dropped out: what PiSSA and OLoRA take from the
            base weights.
        rows: Its first sequence in the batch, and the one after its last.
        length: Its own padded length; the pack's may be longer.
        generator: Its random numbers, for dropout; None where nothing is dropped.
    """

    trained: Mapping[str, Factors]
    fixed: Mapping[str, Factors]
    rows: tuple[int, int]
    length: int
    generator: torch.Generator | None = None


# Adapters that are computed together, with their part of the module.
_Run = list[tuple[Share, Factors]]


class PackedBatch:
    """The adapters of one packed batch, put into the base model for the time of a pass.

    Args:
        shares: The adapters' parts, in the order of their rows.
        drops: Whether inputs are dropped out.
        replays: Whether modules run a second time, in the backward pass.
    """

    def __init__(self, shares: Sequence[Share], *, drops: bool, replays: bool) -> None:
        self._shares = shares
        self._drops = drops
        self._replays = replays
        self._before: dict[tuple[int, str], Tensor] = {}

    @contextmanager
    def within(self, base: nn.Module) -> Iterator[None]:
        """Adds each adapter's update to the outputs of the modules it adapts."""
        handles = []
        try:
            for name in {n for s in self._shares for n in (*s.trained, *s.fixed)}:
                hook = self._hook(name)
                handles.append(base.get_submodule(name).register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for kind in ("fixed", "trained"):
                runs = list(self._runs(name, kind))
                if runs:
                    # Some layers (GPT-2's) give a view, which must not be written to.
                    output = output.clone() if output._is_view() else output
                    kept = [self._kept(name, run, args[0]) for run in runs]
                    blocks = [_Block.of(run) for run in runs]
                    tensors = [t for block in blocks for t in block.tensors]
                    output = _Add.apply(output, args[0], blocks, kept, *tensors)
            return output

        return add

    def _runs(self, name: str, kind: str) -> Iterator[_Run]:
        """Cuts a module's adapters into runs of adjacent rows, equal in number, alike in rank."""
        run: _Run = []
        for share in self._shares:
            factors = (share.trained if kind == "trained" else share.fixed).get(name)
            if factors is None:
                continue
            if run and not _goes_with(run, share, factors):
                yield run
                run = []
            run.append((share, factors))
        if run:
            yield run

    def _kept(self, name: str, run: _Run, x: Tensor) -> Tensor | None:
        """Returns what dropout multiplies X by, (n, L, inputs), or None.

        Drawn as ``nn.Dropout`` draws it for the adapter alone: over its own rows and length, and
        by the same function, which on a GPU gives numbers to elements in an order of its own.
        """
        if not self._drops or all(factors.dropout == 0 for _, factors in run):
            return None
        b, T, inputs = run[0][0].rows[1] - run[0][0].rows[0], x.shape[1], x.shape[2]
        kept = x.new_ones((len(run), b, T, inputs), dtype=torch.float32)
        for i, (share, factors) in enumerate(run):
            if factors.dropout == 0:
                continue
            own = torch.ones(b, share.length, inputs, device=x.device)
            with _going_on(self._generator(share, name)):
                if products.is_mixed(x):
                    # As alone.
                    drawn = products.kept(own, factors.dropout) / (1 - factors.dropout)
                else:
                    drawn = nn.functional.dropout(own, factors.dropout)
                kept[i, :, : share.length] = drawn
        return kept.view(len(run), b * T, inputs)

    def _generator(self, share: Share, module: str) -> torch.Generator:
        """The adapter's random numbers; for a module's second pass, those of its first."""
        assert share.generator is not None
        if not self._replays:
            return share.generator
        key = (id(share), module)
        if key not in self._before:
            self._before[key] = share.generator.get_state()
            return share.generator
        again = torch.Generator(share.generator.device)
        again.set_state(self._before[key])
        return again


@contextmanager
def _going_on(generator: torch.Generator) -> Iterator[None]:
    """Has dropout, which knows only the device's own numbers, draw a generator's instead."""
    device, own = generator.device, torch.default_generator
    if device.type == "cuda":
        own = torch.cuda.default_generators[device.index or 0]
    before = own.get_state()
    own.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(own.get_state())
        own.set_state(before)


@dataclass(frozen=True)
class _Block:
    """Adapters of one module that are multiplied together.

    Attributes:
        rows: Their sequences in the batch.
        tensors: A and B of the first, of the second, and so on.
        scales: Their scales.
    """

    rows: slice
    tensors: tuple[Tensor, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(cls, run: _Run) -> _Block:
        return cls(
            rows=slice(run[0][0].rows[0], run[-1][0].rows[1]),
            tensors=tuple(t for _, factors in run for t in (factors.a, factors.b)),
            scales=tuple(factors.scale for _, factors in run),
        )


def _goes_with(run: _Run, share: Share, factors: Factors) -> bool:
    last = run[-1][0]
    ranks = [f.a.shape[0] for _, f in run] + [factors.a.shape[0]]
    return (
        share.rows[0] == last.rows[1]
        and share.rows[1] - share.rows[0] == last.rows[1] - last.rows[0]
        and max(ranks) <= _PADDING * min(ranks)
    )


class _Add(torch.autograd.Function):
    """Adds H B^T to the rows of each block, in place; the other rows pass."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        blocks: list[_Block],
        kept: list[Tensor | None],
        *tensors: Tensor,
    ) -> Tensor:
        kind = x.device.type
        # What autocast does to products, a custom function has to do for itself.
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else tensors[0].dtype
        hidden = []
        with torch.autocast(kind, enabled=False):
            for block, mask in zip(blocks, kept, strict=True):
                A, Bt, s = _stacked(block, dtype)
                H = torch.bmm(_inputs(block, x, mask, dtype), A.mT).mul_(s)
                part = y[block.rows]
                Y = part.view(len(s), -1, y.shape[-1])
                if Y.dtype == dtype:
                    Y.baddbmm_(H, Bt)
                else:
                    part.copy_((Y + torch.bmm(H, Bt)).view(part.shape))
                hidden.append(H)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, *hidden, *kept)
        ctx.blocks, ctx.dtype = blocks, dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        hidden, kept = saved[: len(ctx.blocks)], saved[len(ctx.blocks) :]
        gx = None
        if ctx.needs_input_grad[1]:
            covered = sum(block.rows.stop - block.rows.start for block in ctx.blocks)
            gx = torch.empty_like(x) if covered == len(x) else torch.zeros_like(x)
        gradients: list[Tensor] = []
        with torch.autocast(x.device.type, enabled=False):
            for block, H, mask in zip(ctx.blocks, hidden, kept, strict=True):
                A, Bt, s = _stacked(block, ctx.dtype)
                G = g[block.rows].reshape(len(s), -1, g.shape[-1]).to(ctx.dtype)
                GH = torch.bmm(G, Bt.mT).mul_(s)
                gBt = torch.bmm(H.mT, G)
                gA = torch.bmm(GH.mT, _inputs(block, x, mask, ctx.dtype))
                for i, a in enumerate(block.tensors[::2]):
                    r = a.shape[0]
                    gradients += [gA[i, :r].to(a.dtype), gBt[i, :r].mT.to(a.dtype)]
                if gx is not None:
                    gX = torch.bmm(GH, A)
                    gX = gX if mask is None else gX.mul_(mask)
                    gx[block.rows] = gX.view(-1, *x.shape[1:])
        return (g, gx, None, None, *gradients)


def _stacked(block: _Block, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns A (n, r, inputs), B^T (n, r, outputs) and s (n, 1, 1), padded with zeros."""
    a, b = list(block.tensors[::2]), [b.mT for b in block.tensors[1::2]]
    A = pad_sequence(a, batch_first=True) if len(a) > 1 else a[0].unsqueeze(0)
    Bt = pad_sequence(b, batch_first=True) if len(b) > 1 else b[0].unsqueeze(0)
    s = torch.tensor(block.scales, dtype=dtype, device=A.device).view(-1, 1, 1)
    return A.to(dtype), Bt.to(dtype), s


def _inputs(block: _Block, x: Tensor, kept: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns X (n, L, inputs)."""
    X = x[block.rows].reshape(len(block.scales), -1, x.shape[-1])
    return (X if kept is None else X * kept).to(dtype)
