"""Response surfaces to train on: what a configuration scores in a made-up LoRA study.

Notations
    B, N, D   tasks, points, columns (as in :mod:`optuna_lora_rl.policy.layout`)
    K         random features of the generic surfaces
    value     larger is better, shape (B, N), in arbitrary units
    failed    the run diverged or ran out of memory, shape (B, N)

The LoRA surface knows what is known about LoRA: a ridge between learning rate, alpha / rank, batch
size and steps; rank and targets that saturate and cost; a cliff beyond which runs diverge; small
data that overfits and on which dropout pays; parameters that do nothing. The generic surfaces
(Gaussian-process draws by random Fourier features, random networks) know nothing of roles, so
that the policy learns when to forget them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.prior import GUIDE_LR
from optuna_lora_rl.policy.roles import ROLES

FEATURES = 48
_LOG10_2 = math.log10(2.0)
# Natural value of a role that the space does not tune.
_ABSENT = {
    "learning_rate": GUIDE_LR,
    "rank": 4.0,
    "alpha": 5.0,
    "alpha_ratio": 1.0,
    "dropout": 0.0,
    "targets": 1.0,
    "layers": 1.0,
    "batch_size": 3.0,
    "weight_decay": 0.0,
    "warmup": 0.03,
    "steps": 6.0,
}


@dataclass
class Surface:
    """Parameters of a batch of surfaces; every tensor's first axis is B.

    Args:
        is_lora: LoRA surface, else generic.
        is_network: a generic surface is a random network, else a Gaussian-process draw.
        ridge: weights of (alpha ratio, batch, rank, steps) in the effective learning rate, (B, 4).
        peak: log10 of the best effective learning rate.
        width: of the ridge below and above the peak, in decades, (B, 2).
        flat: how far the surface levels off away from the ridge: 0 quadratic, 1 bounded.
        cliff: decades above the peak at which runs diverge.
        hard_cliff: whether they then fail rather than score badly.
        capacity: weight, centre and scale of the gain by rank and targets, (B, 3).
        overfit: weight and onset of overfitting, (B, 2).
        cure: share of the overfitting that full dropout cures.
        cost: weights of parameters, steps and memory in the score, (B, 3).
        memory: log2 of the size at which runs go out of memory; large for never.
        minor: weights of batch, weight decay, warmup, dropout, layers, (B, 5).
        batch: log2 of the best batch size.
        idle: weights of the parameters without role, (B, D), and their best places, (B, D).
        places: see ``idle``.
        W: input weights of the generic features, (B, K, D); b, a: their shift and amplitude.
    """

    is_lora: Tensor
    is_network: Tensor
    ridge: Tensor
    peak: Tensor
    width: Tensor
    flat: Tensor
    cliff: Tensor
    hard_cliff: Tensor
    capacity: Tensor
    overfit: Tensor
    cure: Tensor
    cost: Tensor
    memory: Tensor
    minor: Tensor
    batch: Tensor
    idle: Tensor
    places: Tensor
    W: Tensor
    b: Tensor
    a: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Surface:
        return Surface(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def __call__(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Values and failures at points x of the layout's spaces, each (B, N)."""
        lora, diverged = self._lora(x, layout)
        generic = self._generic(x)
        value = torch.where(self.is_lora[:, None], lora, generic)
        return value, diverged & self.is_lora[:, None]

    def demand(self, x: Tensor, layout: Layout) -> Tensor:
        """What a constraint may limit, shape (B, N): log2 of the memory of a LoRA run that tunes
        its rank, elsewhere a second generic function, independent of the first.
        """
        v = _role_values(x, layout)
        size = v["rank"] + v["targets"].clamp_min(0.05).log2() + 0.7 * v["batch_size"]
        sized = layout.has_role[:, ROLES.index("rank")]
        return torch.where(sized[:, None], size, self._generic(x, shift=0.5 * math.pi))

    def _generic(self, x: Tensor, shift: float = 0.0) -> Tensor:
        h = x @ self.W.transpose(1, 2) + self.b[:, None] + shift
        h = torch.where(self.is_network[:, None, None], torch.tanh(h), torch.cos(h))
        return (h * self.a[:, None]).sum(-1)

    def _lora(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        v = _role_values(x, layout)
        offset = self._offset(v)
        below, above = self.width[:, :1], self.width[:, 1:]
        z = offset / torch.where(offset < 0, below, above)
        quadratic, bounded = 0.5 * z * z, 1.0 - torch.exp(-0.5 * z * z)
        flat = self.flat[:, None]
        value = -(flat * bounded + (1.0 - flat) * quadratic.clamp_max(4.0))
        size = v["rank"] + v["targets"].clamp_min(0.05).log2() + v["layers"].clamp_min(0.05).log2()
        gain, centre, scale = (c[:, None] for c in self.capacity.T)
        value = value - gain * torch.exp2(-(size - centre) / scale).clamp_max(4.0)
        value = value - self._overfitting(v, size) - self._price(v, size)
        value = value - self._minor(v)
        off = (x - self.places[:, None]) ** 2
        value = value - (self.idle[:, None] * off).sum(-1)
        beyond = offset - self.cliff[:, None]
        value = value - torch.where(beyond > 0, 1.0 + 4.0 * beyond, torch.zeros_like(beyond))
        memory = size + 0.7 * v["batch_size"] > self.memory[:, None]
        return value, ((beyond > 0) & self.hard_cliff[:, None]) | memory

    def _offset(self, v: dict[str, Tensor]) -> Tensor:
        """Decades by which the effective learning rate lies above the peak."""
        ratio, batch, rank, steps = (c[:, None] * _LOG10_2 for c in self.ridge.T)
        effective = v["learning_rate"] + ratio * (v["ratio"] - 1.0)
        effective = effective - batch * (v["batch_size"] - 3.0)
        effective = effective + rank * (v["rank"] - 4.0) + steps * (v["steps"] - 6.0)
        return effective - self.peak[:, None]

    def _overfitting(self, v: dict[str, Tensor], size: Tensor) -> Tensor:
        weight, onset = (c[:, None] for c in self.overfit.T)
        excess = torch.nn.functional.softplus(size + v["steps"] - 6.0 - onset)
        cured = 1.0 - self.cure[:, None] * (v["dropout"] / 0.1).clamp_max(1.0)
        return weight * excess * cured

    def _price(self, v: dict[str, Tensor], size: Tensor) -> Tensor:
        parameters, steps, memory = (c[:, None] for c in self.cost.T)
        price = parameters * torch.exp2(size - 4.0).clamp_max(64.0)
        price = price + steps * torch.exp2(v["steps"] - 6.0).clamp_max(64.0)
        return price + memory * torch.exp2(v["batch_size"] - 3.0).clamp_max(64.0)

    def _minor(self, v: dict[str, Tensor]) -> Tensor:
        batch, decay, warmup, dropout, layers = (c[:, None] for c in self.minor.T)
        loss = batch * (v["batch_size"] - self.batch[:, None]) ** 2
        loss = loss + decay * (v["weight_decay"] / 0.1) + warmup * (v["warmup"] - 0.05).abs() * 10
        return loss + dropout * v["dropout"] * 5 + layers * (1.0 - v["layers"])


def _role_values(x: Tensor, layout: Layout) -> dict[str, Tensor]:
    natural, has = layout.role_values(x), layout.has_role
    v = {
        role: torch.where(has[:, i, None], natural[:, :, i], _ABSENT[role])
        for i, role in enumerate(ROLES)
    }
    given, tuned = ROLES.index("alpha_ratio"), ROLES.index("alpha")
    ratio = torch.where(has[:, given, None], v["alpha_ratio"], torch.ones_like(v["rank"]))
    v["ratio"] = torch.where(has[:, tuned, None], v["alpha"] - v["rank"], ratio)
    return v


def draw_surface(
    rng: np.random.Generator, layout: Layout, *, is_lora: bool, peak: float
) -> Surface:
    """One random surface over a space (a batch of one).

    Args:
        rng: of all random numbers.
        layout: of the space.
        is_lora: a LoRA surface, else a generic one.
        peak: log10 of the best effective learning rate.
    """
    D = layout.real.shape[1]
    small = rng.random() < 0.25
    costly = rng.random() < 0.5
    has = layout.role_column[0].numpy()
    no_role = np.array([column not in set(has.tolist()) for column in range(D)])
    useful = no_role & (rng.random(D) < 0.35)
    overfit = [rng.uniform(0.05, 0.3), rng.uniform(0.0, 4.0)] if small else [0.0, 0.0]
    minor = rng.uniform([0, 0, 0, 0.0, 0], [0.03, 0.03, 0.05, 0.2, 0.3]) * (rng.random(5) < 0.7)
    values: dict[str, object] = {
        "is_lora": is_lora,
        "is_network": rng.random() < 0.4,
        "ridge": [
            rng.uniform(0.3, 1.0),
            rng.uniform(0.0, 1.0),
            rng.uniform(-0.2, 0.5),
            rng.uniform(0.0, 0.5),
        ],
        "peak": peak,
        "width": [rng.uniform(0.25, 0.8), rng.uniform(0.2, 0.6)],
        "flat": rng.beta(0.7, 0.7),
        "cliff": rng.uniform(0.3, 1.6) if rng.random() < 0.7 else 9.0,
        "hard_cliff": rng.random() < 0.4,
        "capacity": [
            rng.uniform(0.03, 0.4) * (rng.random() < 0.85),
            rng.uniform(1.0, 6.0),
            rng.uniform(0.7, 3.0),
        ],
        "overfit": overfit,
        "cure": rng.uniform(0.2, 0.9),
        "cost": rng.exponential([0.04, 0.06, 0.04]) * costly,
        "memory": rng.uniform(7.0, 11.0) if rng.random() < 0.15 else 99.0,
        "minor": minor,
        "batch": rng.uniform(1.0, 6.0),
        "idle": useful * rng.exponential(0.3, D),
        "places": rng.random(D),
    }
    values |= _draw_generic(rng, layout, bool(values["is_network"]))
    return Surface(**{k: torch.from_numpy(np.asarray(v))[None] for k, v in values.items()})


def _draw_generic(
    rng: np.random.Generator, layout: Layout, is_network: bool
) -> dict[str, np.ndarray]:
    D = layout.real.shape[1]
    relevant = rng.random(D) < 0.75
    relevant[rng.integers(D)] = True
    length = rng.lognormal(math.log(0.35), 0.6, D) * math.sqrt(max(relevant.sum(), 1)) ** 0.7
    if is_network:
        W = rng.normal(size=(FEATURES, D)) * rng.uniform(1.0, 6.0)
    else:  # Matern 5/2: Student-t frequencies with 5 degrees of freedom
        chi = rng.chisquare(5.0, (FEATURES, 1)) / 5.0
        W = rng.normal(size=(FEATURES, D)) / np.sqrt(chi) / length
    # Neighbouring levels of an unordered column have nothing in common.
    W = W * relevant * np.where(layout.unordered[0].numpy(), 9.0, 1.0)
    b = rng.uniform(0, 2 * math.pi, FEATURES) if not is_network else -(W @ rng.random(D))
    return {"W": W, "b": b, "a": rng.normal(size=FEATURES) * math.sqrt(2.0 / FEATURES)}
