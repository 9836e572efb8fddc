"""Many adapters in one pass give what each gives by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch import nn

from optuna_lora_rl.finetuning.packing.adapters import Factors
from optuna_lora_rl.finetuning.packing.adapters import PackedBatch
from optuna_lora_rl.finetuning.packing.adapters import Share

MODULES = ("first", "second", "third")


class Model(nn.Module):
    """Three linear modules in a row, the last as some layers are written, with a view."""

    def __init__(self, sizes: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        for name, inputs, outputs in zip(MODULES, sizes[:-1], sizes[1:], strict=True):
            linear = nn.Linear(inputs, outputs, bias=name != "second")
            for parameter in linear.parameters():
                parameter.data = torch.randn(
                    parameter.shape, generator=generator, dtype=torch.float64
                )
                parameter.requires_grad_(False)
            self.add_module(name, Viewing(linear) if name == "third" else linear)

    def forward(self, x: Tensor) -> Tensor:
        for name in MODULES:
            x = torch.tanh(self.get_submodule(name)(x))
        return x


class Viewing(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        flat: Tensor = self.linear(x.reshape(-1, x.shape[-1]))
        return flat.view(*x.shape[:-1], -1)


def by_itself(model: Model, share: Share, x: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """Computes one adapter's rows with its updates written out."""
    for name in MODULES:
        y = model.get_submodule(name)(x)
        for updates in (share.fixed, share.trained):
            if name in updates:
                update = updates[name]
                seen = x * masks[name] if updates is share.trained and name in masks else x
                y = y + update.scale * (seen @ update.a.T @ update.b.T)
        x = torch.tanh(y)
    return x


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(1, 6))
    alike = draw(st.booleans())
    rows = draw(st.integers(1, 4))
    kinds = []
    for _ in range(count):
        kinds.append(
            {
                "rows": rows if alike else draw(st.integers(1, 4)),
                "ranks": {
                    name: draw(st.integers(1, 9))
                    for name in MODULES
                    if draw(st.integers(0, 3)) > 0
                },
                "fixed": {name: 2 for name in MODULES if draw(st.integers(0, 3)) == 0},
                "scale": draw(st.floats(0.1, 4.0)),
                "frozen": draw(st.booleans()),
            }
        )
    return {
        "kinds": kinds,
        "length": draw(st.integers(1, 4)),
        "sizes": draw(st.tuples(*[st.integers(1, 6)] * 4)),
        "seed": draw(st.integers(0, 10**6)),
        "differentiable": draw(st.booleans()),
    }


def shares_of(case: dict[str, Any], generator: torch.Generator) -> list[Share]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sizes = dict(
        zip(MODULES, zip(case["sizes"][:-1], case["sizes"][1:], strict=True), strict=True)
    )
    shares, start = [], 0
    for kind in case["kinds"]:
        trained = {}
        for name, rank in kind["ranks"].items():
            inputs, outputs = sizes[name]
            a, b = normal(rank, inputs).requires_grad_(), normal(outputs, rank)
            trained[name] = Factors(a, b.requires_grad_(not kind["frozen"]), kind["scale"])
        fixed = {
            name: Factors(normal(rank, sizes[name][0]), normal(sizes[name][1], rank), -0.5)
            for name, rank in kind["fixed"].items()
        }
        rows = (start, start + kind["rows"])
        shares.append(Share(trained, fixed, rows, case["length"]))
        start = rows[1]
    return shares


@settings(max_examples=80, deadline=None)
@given(cases())
def test_outputs_and_gradients_are_those_of_each_adapter_alone(case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    model = Model(case["sizes"], generator)
    shares = shares_of(case, generator)
    shape = (shares[-1].rows[1], case["length"], case["sizes"][0])
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x.requires_grad_(case["differentiable"])
    weights = [t for s in shares for f in s.trained.values() for t in (f.a, f.b)]
    weights = [w for w in weights if w.requires_grad] + ([x] if case["differentiable"] else [])

    with PackedBatch(shares, drops=False, replays=False).within(model):
        found = model(x)
    expected = torch.cat([by_itself(model, s, x[slice(*s.rows)], {}) for s in shares])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not any(module._forward_hooks for module in model.modules())

    if weights:
        arriving = torch.randn(found.shape, generator=generator, dtype=torch.float64)
        ours = torch.autograd.grad(found, weights, arriving, allow_unused=True)
        theirs = torch.autograd.grad(expected, weights, arriving, allow_unused=True)
        for our, their in zip(ours, theirs, strict=True):
            assert our is not None and their is not None
            torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(cases(), st.lists(st.sampled_from([0.0, 0.3, 0.9]), min_size=6, max_size=6))
def test_dropout_is_drawn_for_each_adapter_as_if_it_were_alone(
    case: dict[str, Any], dropouts: list[float]
) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    model = Model(case["sizes"], generator)
    shares = shares_of(case, generator)
    x = torch.randn(shares[-1].rows[1], case["length"], case["sizes"][0], generator=generator)
    x = x.double()
    expected = []
    for seed, (share, p) in enumerate(zip(shares, dropouts, strict=False)):
        # Padded at the end, as a batch of longer sequences pads this one.
        share.length = 1 + seed % case["length"]
        share.generator = torch.Generator().manual_seed(seed)
        share.trained = {name: Factors(f.a, f.b, f.scale, p) for name, f in share.trained.items()}
        masks = {}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for name in MODULES if p > 0 else ():
                if name in share.trained:
                    ones = torch.ones(
                        share.rows[1] - share.rows[0], share.length, share.trained[name].a.shape[1]
                    )
                    masks[name] = nn.functional.dropout(ones, p)
        own = x[slice(*share.rows), : share.length]
        expected.append(by_itself(model, share, own, masks))
    with PackedBatch(shares, drops=True, replays=False).within(model):
        found = model(x)
    for share, own in zip(shares, expected, strict=True):
        ours = found[slice(*share.rows), : share.length]
        torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-6)


GPU = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_dropout_is_that_of_the_device_and_goes_on_where_it_stands(device: str) -> None:
    linear, eye = nn.Linear(24, 24, bias=False, device=device), torch.eye(24, device=device)
    nn.init.zeros_(linear.weight)
    x = torch.rand(3, 7, 24, device=device)
    generators = [torch.Generator(device).manual_seed(seed) for seed in (1, 2)]
    shares = [
        Share({"0": Factors(eye, eye, 1.0, 0.3)}, {}, rows, 5 + rows[0], generator)
        for rows, generator in zip([(0, 1), (1, 3)], generators, strict=True)
    ]
    torch.manual_seed(0)
    batch = PackedBatch(shares, drops=True, replays=False)
    with batch.within(nn.Sequential(linear)):
        found = [linear(x), linear(x)]
    untouched = torch.rand(2, device=device)
    torch.manual_seed(0)
    torch.testing.assert_close(untouched, torch.rand(2, device=device), rtol=0, atol=0)
    for seed, share in zip((1, 2), shares, strict=True):
        torch.manual_seed(seed)
        for output in found:
            own = (slice(*share.rows), slice(share.length))
            expected = nn.functional.dropout(x[own].contiguous(), 0.3)
            torch.testing.assert_close(output[own], expected)


def test_one_adapters_nan_stays_in_its_rows() -> None:
    case = {
        "kinds": [
            {
                "rows": 2,
                "ranks": dict.fromkeys(MODULES, r),
                "fixed": {},
                "scale": 1,
                "frozen": False,
            }
            for r in (4, 3, 2)
        ],
        "length": 3,
        "sizes": (4, 5, 4, 3),
    }
    generator = torch.Generator().manual_seed(0)
    model, shares = Model(case["sizes"], generator), shares_of(case, generator)
    with torch.no_grad():
        shares[1].trained["first"].b.fill_(torch.nan)
    x = torch.randn(6, 3, 4, generator=generator, dtype=torch.float64)
    with PackedBatch(shares, drops=False, replays=False).within(model):
        found = model(x)
    assert found[2:4].isnan().all() and found[[0, 1, 4, 5]].isfinite().all()
    arriving = torch.ones_like(found)
    arriving[2:4] = 0
    healthy = [t for i in (0, 2) for f in shares[i].trained.values() for t in (f.a, f.b)]
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, healthy, arriving))


def test_hooks_go_away_when_the_pass_fails() -> None:
    generator = torch.Generator().manual_seed(0)
    case = {
        "kinds": [{"rows": 1, "ranks": {"first": 2}, "fixed": {}, "scale": 1, "frozen": False}],
        "length": 2,
        "sizes": (2, 2, 2, 2),
    }
    model, shares = Model(case["sizes"], generator), shares_of(case, generator)
    with pytest.raises(ZeroDivisionError):
        with PackedBatch(shares, drops=False, replays=False).within(model):
            raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())
