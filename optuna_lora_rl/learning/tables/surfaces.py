"""Response surfaces of the tables: what any configuration would score, also between the points.

Notations
    T, n     tables, runs of a table (padded in a batch)
    D        coordinates (``coordinates.NAMES``), 9
    P        outputs of a process: 4 for the learning curve, 1 for divergence
    x        coordinates asked for, shape (T, N, D);  z: those the kernel sees,
             ``coordinates.turned(x)``;  Z: those of the measured runs, shape (T, n, D)
    theta    log lengthscales, log signal variance, log noise variance, shape (D + 2,)
    alpha    (K + noise)^-1 y for each output, shape (T, P, n), with y standardised

Two Gaussian processes a table (``policy.surrogate``: Matérn 5/2, one lengthscale a coordinate):
the final quality, whose kernel the three earlier points of the curve share; and whether a run
*diverged*, that is, failed or ended worse than the untuned model by over 5% of its loss (a
regression on -1 and 1, Rasmussen & Williams 2006, section 6.5). Quality below -0.5 counts as
-0.5: how bad a useless run was shall not bend the surface elsewhere. The cost is counted, not
fitted: ``costs``.

The kernels' hyperparameters are fitted once (``python -m studies.tables fit``)
and kept in ``surfaces.json`` beside the cross-validated quality; loading only solves for alpha.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
import torch

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.learning.tables import coordinates
from optuna_lora_rl.learning.tables import costs
from optuna_lora_rl.learning.tables import dataset
from optuna_lora_rl.policy import surrogate

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from optuna_lora_rl.learning.tables.dataset import Table

FITS = Path(__file__).resolve().parent / "surfaces.json"
WORST = -0.5
DIVERGED = -0.05


@dataclass(frozen=True, eq=False)
class Process:
    """A Gaussian process for each of several tables; see the module's notations.

    The mean at x is ``shift + stretch * (k(z, Z) @ alpha)`` with ``k`` the Matérn 5/2 kernel of
    variance ``variance`` at scaled distance ``|(z - Z) * scale|``, where a coordinate without
    order contributes 0 or ``scale``.

    Attributes:
        Z: Measured coordinates as the kernel sees them, shape (T, n, D), padded with 0.
        alpha: Shape (T, P, n); 0 where padded, so that padding adds nothing.
        scale: Inverse lengthscales, shape (T, D).
        variance: Of the signal, shape (T,).
        shift: Mean of each output, shape (T, P).
        stretch: Deviation of each output, shape (T, P).
    """

    Z: Tensor
    alpha: Tensor
    scale: Tensor
    variance: Tensor
    shift: Tensor
    stretch: Tensor

    def __getitem__(self, rows: Any) -> Process:
        return Process(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def __call__(self, x: Tensor) -> Tensor:
        """Return the means at coordinates x (T, N, D), shape (T, N, P)."""
        z = coordinates.turned(x)
        k = self.variance[:, None, None] * _matern52(z, self.Z, self.scale)
        return self.shift[:, None] + self.stretch[:, None] * (k @ self.alpha.transpose(1, 2))


def _matern52(z: Tensor, Z: Tensor, scale: Tensor) -> Tensor:
    """Correlations of z (T, N, D) with Z (T, n, D), shape (T, N, n)."""
    ordered = torch.from_numpy(~coordinates.UNORDERED)
    p, q = ((side * scale[:, None])[..., ordered] for side in (z, Z))
    r2 = (p * p).sum(-1)[:, :, None] + (q * q).sum(-1)[:, None] - 2.0 * p @ q.mT
    r2 = r2.clamp_min(0.0)
    for j in np.flatnonzero(coordinates.UNORDERED).tolist():
        differs = (z[:, :, None, j] - Z[:, None, :, j]).abs() > 1e-6
        r2 = r2 + scale[:, j, None, None] ** 2 * differs
    r = math.sqrt(5.0) * (r2 + 1e-18).sqrt()
    return (1.0 + r + r * r / 3.0) * torch.exp(-r)


@dataclass(frozen=True, eq=False)
class Surfaces:
    """The surfaces of T tables, in one batch.

    Attributes:
        names: Of the tables' tasks.
        noise: Deviation of the final quality between seeds, shape (T,); 0 where not known.
        curve: Quality at 25, 50, 75 and 100% of the steps, P = 4.
        divergence: Above 0 where a run rather diverges than not, P = 1.
        price: The counted cost.
    """

    names: tuple[str, ...]
    noise: Tensor
    curve: Process
    divergence: Process
    price: costs.Costs

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Sequence[int]) -> Surfaces:
        chosen = torch.as_tensor(rows)
        return Surfaces(
            tuple(self.names[row] for row in chosen.tolist()),
            self.noise[chosen],
            self.curve[chosen],
            self.divergence[chosen],
            self.price[chosen],
        )

    def quality(self, x: Tensor) -> Tensor:
        """Return the final quality at coordinates x (T, N, D), shape (T, N)."""
        return self.curve(x)[:, :, -1]

    def cost(self, x: Tensor) -> Tensor:
        """Return the relative cost at coordinates x (T, N, D), shape (T, N)."""
        return self.price(x)

    def diverges(self, x: Tensor) -> Tensor:
        """Return whether runs at coordinates x (T, N, D) diverge, shape (T, N).

        Where they are predicted to, or to end that much worse than the untuned model: far from
        all runs the classifier falls back to "no", since few runs diverge.
        """
        return (self.divergence(x)[:, :, 0] > 0) | (self.quality(x) < DIVERGED)


def targets(table: Table) -> dict[str, NDArray[np.float64]]:
    """Return what the processes of a table are fitted to, each of shape (n, P)."""
    curve = np.where(np.isfinite(table.quality), table.quality, WORST).clip(WORST)
    diverged = (table.failure != "") | (curve[:, -1] < DIVERGED)
    return {"curve": curve, "divergence": np.where(diverged, 1.0, -1.0)[:, None]}


def prior() -> NDArray[np.float64]:
    """Return the prior of the log lengthscales, mean and deviation, shape (D, 2).

    It grows with the square root of D (Hvarfner et al. 2024, "Vanilla Bayesian optimization
    performs great in high dimensions", section 5), so that complexity does not.
    """
    D = len(coordinates.NAMES)
    return np.tile([math.log(0.5) + 0.5 * math.log(D / 3), 1.0], (D, 1))


def fit(X: NDArray[np.float64], y: NDArray[np.float64]) -> surrogate.Process:
    """Return a process fitted to one output.

    Args:
        X: Coordinates, shape (n, D).
        y: Standardised output, shape (n,).
    """
    z, none, unordered = (
        coordinates.turned(torch.from_numpy(X)).numpy(),
        np.zeros(len(y)),
        coordinates.UNORDERED,
    )
    theta = surrogate.fit_theta(z, y, unordered, prior(), none, iterations=30, fit_rows=len(y))
    return surrogate.Process(z, y, unordered, theta, none)


def condition(
    X: NDArray[np.float64], y: NDArray[np.float64], theta: Sequence[float] | None
) -> Process:
    """Return the process of one table with hyperparameters ``theta``.

    Args:
        X: Coordinates, shape (n, D).
        y: Outputs, shape (n, P).
        theta: None for outputs that are all the same, which the process then returns.
    """
    shift, stretch = torch.from_numpy(y.mean(0)), torch.from_numpy(np.maximum(y.std(0), 1e-9))
    standard = (torch.from_numpy(y) - shift) / stretch
    log = np.array(theta or [0.0] * (X.shape[1] + 2))
    Z, none = coordinates.turned(torch.from_numpy(X)), np.zeros(len(X))
    fitted = surrogate.Process(Z.numpy(), standard[:, 0].numpy(), coordinates.UNORDERED, log, none)
    alpha = torch.from_numpy(fitted.solve(standard.numpy())).T
    scale, variance = torch.from_numpy(np.exp(-log[:-2])), torch.tensor(fitted.s, dtype=Z.dtype)
    return Process(*(t[None] for t in (Z, alpha, scale, variance, shift, stretch)))


def stack(processes: Sequence[Process]) -> Process:
    """Return processes of equal P as one batch, padded to the most runs."""
    n = max(process.Z.shape[1] for process in processes)

    def padded(process: Process, name: str) -> Tensor:
        tensor: Tensor = getattr(process, name)
        missing = n - process.Z.shape[1]
        padding = {"Z": (0, 0, 0, missing), "alpha": (0, missing)}.get(name)
        return torch.nn.functional.pad(tensor, padding) if padding else tensor

    return Process(
        **{f.name: torch.cat([padded(one, f.name) for one in processes]) for f in fields(Process)}
    )


def of(tables: Sequence[Table], fits: Mapping[str, Any], prices: costs.Costs) -> Surfaces:
    """Return the surfaces of tables.

    Args:
        tables: T of them.
        fits: Their entries of ``surfaces.json``, by name of the task.
        prices: Their costs, in the same order.
    """
    processes: dict[str, list[Process]] = {"curve": [], "divergence": []}
    for table in tables:
        X, wanted = coordinates.matrix(table.parameters), targets(table)
        for name, made in processes.items():
            made.append(condition(X, wanted[name], fits[table.task.name][name]))
    noise = torch.tensor([table.noise for table in tables], dtype=torch.float64)
    return Surfaces(
        names=tuple(table.task.name for table in tables),
        noise=noise.nan_to_num(0.0),
        curve=stack(processes["curve"]),
        divergence=stack(processes["divergence"]),
        price=prices,
    )


def load(
    split: str | None = None,
    *,
    path: Path = dataset.FILE,
    fits: Path = FITS,
    prices: Path = costs.FILE,
) -> Surfaces:
    """Return the surfaces of a split's tables.

    Args:
        split: ``train``, ``validation`` or ``test``; None for all.
        path: The compiled tables.
        fits: The fitted hyperparameters.
        prices: The counted costs.

    Raises:
        UserError: There is no such split, or a table was not fitted.
    """
    tables = dataset.load(split, path=path)
    known = json.loads(fits.read_text(encoding="utf-8")) if fits.exists() else {}
    for table in tables:
        if table.task.name not in known:
            raise UserError(
                f"There is no surface of {table.task.name}; run python -m studies.tables fit."
            )
    return of(tables, known, costs.load([table.task.name for table in tables], prices))
