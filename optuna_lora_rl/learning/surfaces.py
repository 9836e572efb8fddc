"""Response surfaces to train on: what a configuration scores in a made-up LoRA study.

Notations
    N, D      points, columns
    K         random features of the generic surfaces
    value     larger is better, shape (N,), in arbitrary units
    failed    the run diverged or ran out of memory, shape (N,)

The LoRA surface knows what is known about LoRA: a ridge between learning rate, alpha / rank, batch
size and steps; rank and targets that saturate and cost; a cliff beyond which runs diverge; small
data that overfits and on which dropout pays; parameters that do nothing. The generic surfaces
(Gaussian-process draws by random Fourier features, random networks) know nothing of roles, so
that the policy learns when to forget them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.lora_surfaces import USUAL
from optuna_lora_rl.policy.roles import ROLES

FEATURES = 48
_LOG10_2 = math.log10(2.0)
# Natural value of a role that the space does not tune.
_ABSENT = {**USUAL, "weight_decay": 0.0, "warmup": 0.03}


@dataclass(frozen=True, eq=False)
class Surface:
    """Parameters of a surface.

    Args:
        is_lora: LoRA surface, else generic.
        is_network: a generic surface is a random network, else a Gaussian-process draw.
        ridge: weights of (alpha ratio, batch, rank, steps) in the effective learning rate, (4,).
        peak: log10 of the best effective learning rate.
        width: of the ridge below and above the peak, in decades, (2,).
        flat: how far the surface levels off away from the ridge: 0 quadratic, 1 bounded.
        cliff: decades above the peak at which runs diverge.
        hard_cliff: whether they then fail rather than score badly.
        capacity: weight, centre and scale of the gain by rank and targets, (3,).
        overfit: weight and onset of overfitting, (2,).
        cure: share of the overfitting that full dropout cures.
        cost: weights of parameters, steps and memory in the score, (3,).
        memory: log2 of the size at which runs go out of memory; large for never.
        minor: weights of batch, weight decay, warmup, dropout, layers, (5,).
        batch: log2 of the best batch size.
        idle: weights of the parameters without role, (D,), and their best places, (D,).
        places: see ``idle``.
        W: input weights of the generic features, (K, D); b, a: their shift and amplitude.
    """

    is_lora: bool
    is_network: bool
    ridge: np.ndarray
    peak: float
    width: np.ndarray
    flat: float
    cliff: float
    hard_cliff: bool
    capacity: np.ndarray
    overfit: np.ndarray
    cure: float
    cost: np.ndarray
    memory: float
    minor: np.ndarray
    batch: float
    idle: np.ndarray
    places: np.ndarray
    W: np.ndarray
    b: np.ndarray
    a: np.ndarray

    def __call__(self, x: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        """Values and failures at points x (N, D) of the layout's space, each (N,)."""
        if self.is_lora:
            return self._lora(x, layout)
        return self._generic(x), np.zeros(len(x), dtype=bool)

    def price(self, x: np.ndarray, layout: Layout) -> np.ndarray:
        """What a LoRA surface charges for parameters, steps and memory, shape (N,)."""
        v = _role_values(x, layout)
        targets, layers = (np.log2(np.maximum(v[role], 0.05)) for role in ("targets", "layers"))
        return self._price(v, v["rank"] + targets + layers)

    def demand(self, x: np.ndarray, layout: Layout) -> np.ndarray:
        """What a constraint may limit, shape (N,): log2 of the memory of a LoRA run that tunes
        its rank, elsewhere a second generic function, independent of the first.
        """
        if layout.column[ROLES.index("rank")] < 0:
            return self._generic(x, shift=0.5 * math.pi)
        v = _role_values(x, layout)
        return v["rank"] + np.log2(np.maximum(v["targets"], 0.05)) + 0.7 * v["batch_size"]

    def _generic(self, x: np.ndarray, shift: float = 0.0) -> np.ndarray:
        h = x @ self.W.T + self.b + shift
        value: np.ndarray = (np.tanh(h) if self.is_network else np.cos(h)) @ self.a
        return value

    def _lora(self, x: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        v = _role_values(x, layout)
        offset = self._offset(v)
        z = offset / np.where(offset < 0, *self.width)
        quadratic, bounded = 0.5 * z * z, 1.0 - np.exp(-0.5 * z * z)
        value = -(self.flat * bounded + (1.0 - self.flat) * np.minimum(quadratic, 4.0))
        targets, layers = (np.log2(np.maximum(v[role], 0.05)) for role in ("targets", "layers"))
        size = v["rank"] + targets + layers
        gain, centre, scale = self.capacity
        value -= gain * np.minimum(np.exp2(-(size - centre) / scale), 4.0)
        value -= self._overfitting(v, size) + self._price(v, size) + self._minor(v)
        value -= np.square(x - self.places) @ self.idle
        beyond = offset - self.cliff
        value -= np.where(beyond > 0, 1.0 + 4.0 * beyond, 0.0)
        memory = size + 0.7 * v["batch_size"] > self.memory
        return value, ((beyond > 0) & self.hard_cliff) | memory

    def _offset(self, v: dict[str, np.ndarray]) -> np.ndarray:
        """Decades by which the effective learning rate lies above the peak."""
        ratio, batch, rank, steps = self.ridge * _LOG10_2
        effective = v["learning_rate"] + ratio * (v["ratio"] - 1.0)
        effective = effective - batch * (v["batch_size"] - 3.0)
        effective = effective + rank * (v["rank"] - 4.0) + steps * (v["steps"] - 6.0)
        return effective - self.peak

    def _overfitting(self, v: dict[str, np.ndarray], size: np.ndarray) -> np.ndarray:
        weight, onset = self.overfit
        excess = np.logaddexp(0.0, size + v["steps"] - 6.0 - onset)
        cured = 1.0 - self.cure * np.minimum(v["dropout"] / 0.1, 1.0)
        return np.asarray(weight * excess * cured)

    def _price(self, v: dict[str, np.ndarray], size: np.ndarray) -> np.ndarray:
        parameters, steps, memory = self.cost
        price = parameters * np.minimum(np.exp2(size - 4.0), 64.0)
        price = price + steps * np.minimum(np.exp2(v["steps"] - 6.0), 64.0)
        return np.asarray(price + memory * np.minimum(np.exp2(v["batch_size"] - 3.0), 64.0))

    def _minor(self, v: dict[str, np.ndarray]) -> np.ndarray:
        batch, decay, warmup, dropout, layers = self.minor
        loss = batch * np.square(v["batch_size"] - self.batch)
        loss = loss + decay * (v["weight_decay"] / 0.1) + warmup * np.abs(v["warmup"] - 0.05) * 10
        return np.asarray(loss + dropout * v["dropout"] * 5 + layers * (1.0 - v["layers"]))


def _role_values(x: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    natural = layout.points(x).roles
    v = {
        role: natural[:, i] if layout.column[i] >= 0 else np.full(len(x), _ABSENT[role])
        for i, role in enumerate(ROLES)
    }
    tuned = layout.column[ROLES.index("alpha")] >= 0
    v["ratio"] = v["alpha"] - v["rank"] if tuned else v["alpha_ratio"]
    return v


def draw_surface(
    rng: np.random.Generator, layout: Layout, *, is_lora: bool, peak: float
) -> Surface:
    """One random surface over a space.

    Args:
        rng: of all random numbers.
        layout: of the space.
        is_lora: a LoRA surface, else a generic one.
        peak: log10 of the best effective learning rate.
    """
    D = len(layout)
    small = rng.random() < 0.25
    costly = rng.random() < 0.5
    no_role = np.array([column not in layout.column for column in range(D)])
    useful = no_role & (rng.random(D) < 0.35)
    overfit = [rng.uniform(0.05, 0.3), rng.uniform(0.0, 4.0)] if small else [0.0, 0.0]
    minor = rng.uniform([0, 0, 0, 0.0, 0], [0.03, 0.03, 0.05, 0.2, 0.3]) * (rng.random(5) < 0.7)
    is_network = bool(rng.random() < 0.4)
    values: dict[str, Any] = {
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
    values |= _draw_generic(rng, layout, is_network)
    values |= {k: np.array(v) for k, v in values.items() if isinstance(v, list)}
    return Surface(is_lora=is_lora, is_network=is_network, **values)


def _draw_generic(
    rng: np.random.Generator, layout: Layout, is_network: bool
) -> dict[str, np.ndarray]:
    D = len(layout)
    relevant = rng.random(D) < 0.75
    relevant[rng.integers(D)] = True
    length = rng.lognormal(math.log(0.35), 0.6, D) * math.sqrt(max(relevant.sum(), 1)) ** 0.7
    if is_network:
        W = rng.normal(size=(FEATURES, D)) * rng.uniform(1.0, 6.0)
    else:  # Matern 5/2: Student-t frequencies with 5 degrees of freedom
        chi = rng.chisquare(5.0, (FEATURES, 1)) / 5.0
        W = rng.normal(size=(FEATURES, D)) / np.sqrt(chi) / length
    # Neighbouring levels of an unordered column have nothing in common.
    W = W * relevant * np.where(layout.unordered, 9.0, 1.0)
    b = rng.uniform(0, 2 * math.pi, FEATURES) if not is_network else -(W @ rng.random(D))
    return {"W": W, "b": b, "a": rng.normal(size=FEATURES) * math.sqrt(2.0 / FEATURES)}
