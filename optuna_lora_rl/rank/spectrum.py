"""Singular values of weights and updates, and what they say about rank.

Notations
---------
W         a matrix of d outputs by k inputs, n = min(d, k)
sigma     its singular values, largest first; energy is sigma^2
q         how many of them a randomised decomposition computes
Q         an orthonormal basis of q columns for the range of W

Small matrices are decomposed exactly. For large ones a randomised SVD (Halko, Martinsson, Tropp
2011, arXiv 0909.4061, algorithms 4.4 and 5.1) computes the leading q values. Its error is known
afterwards: with W^T u = sigma v exact by construction, a singular value of W lies within
||W v - sigma u|| / sqrt(2) of each computed one. The rest of the spectrum is estimated: stochastic
Lanczos quadrature (Ubaru, Chen, Saad 2017, doi 10.1137/16M1104974) on W without the computed part
gives the density of its singular values, whose quantiles stand for the values themselves, scaled
to the energy that is left, which is known exactly.

An adapter's update s B A is never formed: with the QR decompositions B = Q_B R_B and
A^T = Q_A R_A its singular values are those of the small matrix s R_B R_A^T.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch import nn

from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import counted
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optuna_lora_rl.rank.layers import Factors

THRESHOLD = 0.01
EXACT_UP_TO = 1024
_COMPONENTS = 64
_POWER_ITERATIONS = 2
_PROBES = 8
_LANCZOS_STEPS = 24


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of a matrix.

    Attributes:
        shape: (d, k).
        values: Singular values, largest first; after the first ``computed`` ones estimates.
        computed: How many values were computed.
        error: How far a computed value may lie from a singular value, relative to the largest.
        tail: Energy of the values that are not in ``values``.
    """

    shape: tuple[int, int]
    values: NDArray[np.float64]
    computed: int
    error: float = 0.0
    tail: float = 0.0

    @property
    def exact(self) -> bool:
        return self.computed == len(self.values) and self.error == 0.0 and self.tail == 0.0

    @cached_property
    def energy(self) -> float:
        return float((self.values**2).sum()) + self.tail

    @property
    def spectral_norm(self) -> float:
        return float(self.values[0]) if len(self.values) else 0.0

    @property
    def frobenius_norm(self) -> float:
        return float(np.sqrt(self.energy))

    @property
    def effective_rank(self) -> int:
        """How many values are over 1% of the largest."""
        return int((self.values > THRESHOLD * self.spectral_norm).sum())

    @cached_property
    def entropy_rank(self) -> float:
        """exp of the entropy of sigma / sum(sigma) (Roy & Vetterli 2007, definition 1)."""
        total = self.values.sum()
        if total == 0:
            return 0.0
        p = self.values[self.values > 0] / total
        return float(np.exp(-(p * np.log(p)).sum()))

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius over squared spectral norm."""
        return self.energy / self.spectral_norm**2 if self.spectral_norm else 0.0

    @property
    def rank_90(self) -> int:
        return self.energy_rank(0.90)

    @property
    def rank_95(self) -> int:
        return self.energy_rank(0.95)

    @property
    def condition(self) -> float:
        """The largest over the smallest value, infinite for a singular matrix."""
        smallest = float(self.values[-1]) if len(self.values) else 0.0
        return self.spectral_norm / smallest if smallest else float("inf")

    def energy_rank(self, share: float) -> int:
        """Returns how many values together hold this share of the energy; 0 where there is none.

        Where the values do not reach it, because of a ``tail``, their number.
        """
        if self.energy == 0:
            return 0
        held = np.cumsum(self.values**2)
        # Rounding of the sum must not ask for one value more than all.
        rank = int(np.searchsorted(held, share * self.energy * (1 - 1e-12))) + 1
        return min(rank, len(self.values))

    def row(self) -> dict[str, float | int]:
        """Returns the numbers of a table."""
        return {
            "outputs": self.shape[0],
            "inputs": self.shape[1],
            "effective_rank": self.effective_rank,
            "entropy_rank": self.entropy_rank,
            "stable_rank": self.stable_rank,
            "rank_90": self.rank_90,
            "rank_95": self.rank_95,
            "spectral_norm": self.spectral_norm,
            "frobenius_norm": self.frobenius_norm,
            "error": self.error,
        }


def of_matrix(
    matrix: Tensor,
    *,
    exact_up_to: int = EXACT_UP_TO,
    components: int = _COMPONENTS,
    seed: int = 0,
) -> Spectrum:
    """Decomposes a matrix.

    Args:
        matrix: Shape (d, k).
        exact_up_to: Up to this min(d, k) the decomposition is exact.
        components: Leading values that are computed for larger ones.
        seed: Of the randomised decomposition.
    """
    matrix = matrix.detach()
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    if min(matrix.shape) <= max(exact_up_to, components):
        values = torch.linalg.svdvals(matrix)
        return of_values(values, matrix.shape)
    d, k = matrix.shape
    return replace(
        _randomised(matrix if d <= k else matrix.T, components, seed), shape=(int(d), int(k))
    )


def of_values(values: Tensor, shape: Iterable[int], *, tail: float = 0.0) -> Spectrum:
    """Makes a spectrum of computed singular values, largest first."""
    d, k = shape
    known = values.detach().double().cpu().numpy()
    return Spectrum((d, k), known, computed=len(known), tail=max(0.0, tail))


def of_factors(factors: Factors) -> Spectrum:
    """Decomposes an update without forming it; the spectrum has min(d, k, r) values."""
    r_b = torch.linalg.qr(factors.b.double(), mode="r").R
    r_a = torch.linalg.qr(factors.a.double().T, mode="r").R
    values = torch.linalg.svdvals(factors.scaling * r_b @ r_a.T)
    return of_values(values, factors.shape)


def of_weights(
    model: nn.Module,
    names: Iterable[str] | None = None,
    *,
    exact_up_to: int = EXACT_UP_TO,
    on_activity: OnActivity = unseen,
) -> dict[str, Spectrum]:
    """Decomposes the base model's linear weights, layer by layer.

    Args:
        model: The model, with or without an adapter.
        names: Layers; None for all linear ones.
        exact_up_to: As for :func:`of_matrix`.
        on_activity: Told how many are done.

    Raises:
        UserError: When a name is no layer, or a weight is quantised.
    """
    modules = layers.linear_modules(model)
    wanted = list(layers.chosen(modules, names))
    return {
        name: of_matrix(layers.weight_of(modules[name], name), exact_up_to=exact_up_to)
        for name in counted(wanted, "decomposing", "weights", on_activity)
    }


def of_adapter(model: nn.Module, adapter: str = "default") -> dict[str, Spectrum]:
    """Decomposes an attached adapter's updates. With DoRA, of B A before its normalisation.

    Raises:
        UserError: When the model has no such adapter.
    """
    return {
        name: of_factors(layers.factors_of(layer, adapter))
        for name, layer in layers.lora_layers(model, adapter).items()
    }


def of_all(
    factors: Mapping[str, Factors], on_activity: OnActivity = unseen
) -> dict[str, Spectrum]:
    """Decomposes updates by name, such as those of a saved adapter (:mod:`.saved`)."""
    if not factors:
        raise UserError("the adapter has no linear LoRA layers")
    return {
        name: of_factors(factors[name])
        for name in counted(factors, "decomposing", "updates", on_activity)
    }


def leading(matrix: Tensor, q: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the q largest singular values and their vectors, U (d, q), sigma, V^T (q, k).

    Exact where one side of the matrix is at most ``EXACT_UP_TO``, else randomised.
    """
    if min(matrix.shape) <= EXACT_UP_TO:
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :q], sigma[:q], vh[:q]
    return _leading(matrix, q, torch.Generator().manual_seed(seed))


def _leading(w: Tensor, q: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    # Twice the columns, since the last values of a sketch are too small.
    columns = min(2 * q, *w.shape)
    omega = torch.randn(w.shape[1], columns, generator=generator, dtype=w.dtype).to(w.device)
    basis = torch.linalg.qr(w @ omega).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(w.T @ basis).Q
        basis = torch.linalg.qr(w @ basis).Q
    u, sigma, vh = torch.linalg.svd(basis.T @ w, full_matrices=False)
    return basis @ u[:, :q], sigma[:q], vh[:q]


def _randomised(w: Tensor, q: int, seed: int) -> Spectrum:
    # w is wide: d <= k.
    generator = torch.Generator().manual_seed(seed)
    u, sigma, vh = _leading(w, q, generator)
    residuals = torch.linalg.vector_norm(w @ vh.T - u * sigma, dim=0)
    computed = sigma.double().cpu().numpy()
    # By rows: the squares of a large matrix would take as much memory as it.
    energy = float(torch.linalg.vector_norm(w, dim=1).double().square().sum())
    left = max(0.0, energy - float((computed**2).sum()))
    values = np.concatenate([computed, _tail(w, u, left, generator)])
    return Spectrum(
        shape=(w.shape[0], w.shape[1]),
        values=np.sort(values)[::-1],
        computed=q,
        error=float(residuals.max() / 2**0.5) / max(float(computed[0]), 1e-300),
    )


def _tail(
    w: Tensor, basis: Tensor, left: float, generator: torch.Generator
) -> NDArray[np.float64]:
    """Estimates the d - q values that are left, from their density."""
    nodes, weights = _density(w, basis, generator)
    order = np.argsort(-nodes)
    nodes, weights = nodes[order], weights[order]
    count = basis.shape[0] - basis.shape[1]
    quantiles = (np.arange(count) + 0.5) / count
    # Between the nodes the density is read as a line: far fewer nodes than values.
    middles = (np.cumsum(weights) - weights / 2) / weights.sum()
    values = np.interp(quantiles, middles, nodes)
    energy = float((values**2).sum())
    return values * (left / energy) ** 0.5 if energy > 0 else values


def _density(
    w: Tensor, basis: Tensor, generator: torch.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gauss quadrature of the spectral density of W W^T outside the basis, as sigma and weight."""
    d = w.shape[0]
    v = torch.randn(d, _PROBES, generator=generator, dtype=w.dtype).to(w.device)
    v -= basis @ (basis.T @ v)
    v /= torch.linalg.vector_norm(v, dim=0)
    steps = min(_LANCZOS_STEPS, d - basis.shape[1])
    history = v.new_zeros(steps + 1, d, _PROBES)
    history[0] = v
    alphas, betas = [], []
    for step in range(steps):
        u = w @ (w.T @ history[step])
        alphas.append((u * history[step]).sum(0))
        # Orthogonal to all before, twice: Lanczos vectors lose it quickly.
        past = history[: step + 1]
        for _ in range(2):
            u -= basis @ (basis.T @ u)
            u -= torch.einsum("sdp,sp->dp", past, torch.einsum("sdp,dp->sp", past, u))
        betas.append(torch.linalg.vector_norm(u, dim=0))
        history[step + 1] = u / betas[-1].clamp_min(torch.finfo(u.dtype).tiny)
    nodes, weights = [], []
    for probe in range(_PROBES):
        diagonal = torch.stack(alphas)[:, probe].double().cpu().numpy()
        beside = torch.stack(betas)[:-1, probe].double().cpu().numpy()
        theta, vectors = np.linalg.eigh(
            np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        )
        nodes.append(np.sqrt(np.maximum(theta, 0.0)))
        weights.append(vectors[0] ** 2)
    return np.concatenate(nodes), np.concatenate(weights)
