"""Where proposals come from: a few hundred configurations a step, scored afterwards.

Notations
    B, D      tasks and columns, as in :mod:`~optuna_lora_rl.policy.layout`
    n, m      finished and pending (running) trials, N candidates
    x         candidates, shape (B, N, D)
    source    index into ``SOURCES``, shape (N,)
    valid     shape (B, N): not a repeat of a finished trial, nor close to a pending one

The source "transfer" is for configurations that earlier studies found good; a study without any
has none of it. Whatever can be sampled can be scored, so no space is too odd: discrete, mixed or
conditional.
All random numbers come from the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from optuna_lora_rl.policy.layout import Layout
from optuna_lora_rl.policy.layout import Snap
from optuna_lora_rl.policy.prior import GUIDE_RATIO
from optuna_lora_rl.policy.prior import GUIDE_RATIO_SPREAD
from optuna_lora_rl.policy.roles import ROLES

SOURCES = (
    "default",
    "sweep",
    "prior",
    "uniform",
    "axis",
    "mutation",
    "improvement",
    "transfer",
)
_LEARNING_RATE = ROLES.index("learning_rate")

SAME = 1e-7
# What is no farther than this from a running trial, in every coordinate, would tell much the same;
# and what is so close to a failed one would fail as well, once failing is no accident.
NEAR = 0.03
NO_ACCIDENT = 2

# Maps points (B, N, D) to what is to be maximised, (B, N).
Acquisition = Callable[[Tensor], Tensor]
# Maps points (B, K, D) to better ones.
Climb = Callable[[Tensor], Tensor]


@dataclass
class Observed:
    """The trials of a batch of tasks.

    Args:
        x: finished trials, shape (B, n, D); no NaN.
        y: standardised scores, larger is better, shape (B, n); failed trials carry a bad one.
        mask: which rows are real, shape (B, n).
        failed: which of them failed, shape (B, n).
        infeasible: which of them broke a constraint, shape (B, n).
        pending: running trials, shape (B, m, D).
        pending_mask: which of these are real, shape (B, m).
        horizon: number of trials that the study will have, shape (B,); 0 where unknown.
    """

    x: Tensor
    y: Tensor
    mask: Tensor
    failed: Tensor
    infeasible: Tensor
    pending: Tensor
    pending_mask: Tensor
    horizon: Tensor

    @property
    def good(self) -> Tensor:
        """Shape (B, n): finished within the constraints, with a score of their own."""
        return self.mask & ~self.failed & ~self.infeasible

    def best(self, count: int) -> tuple[Tensor, Tensor]:
        """The best trials so far, shape (B, count, D), and which are real, (B, count)."""
        order = torch.where(self.good, self.y, -torch.inf).argsort(
            dim=1, descending=True, stable=True
        )
        order = order[:, :count]
        x = self.x.gather(1, order[:, :, None].expand(-1, -1, self.x.shape[2]))
        return x, self.good.gather(1, order)


@dataclass
class Candidates:
    """See the module's notations."""

    x: Tensor
    source: Tensor
    valid: Tensor


@cache
def sobol(count: int, dimensions: int) -> Tensor:
    engine = torch.quasirandom.SobolEngine(dimensions)
    return engine.draw(count + 1, dtype=torch.float64)[1:]


def uniform_points(layout: Layout, count: int, generator: torch.Generator) -> Tensor:
    """A randomly shifted Sobol net, shape (B, count, D) (Cranley & Patterson 1976)."""
    B, D = layout.real.shape
    shift = torch.rand(B, 1, D, generator=generator, dtype=torch.float64)
    return (sobol(count, D)[None] + shift) % 1.0


def prior_points(layout: Layout, count: int, generator: torch.Generator) -> Tensor:
    """Draws from the prior, shape (B, count, D), alpha from its ratio to the rank."""
    B, D = layout.real.shape
    density = layout.log_density.exp()
    cells = 0.5 * (density[:, :, 1:] + density[:, :, :-1])
    cumulative = cells.cumsum(-1) / cells.sum(-1, keepdim=True)
    draw = torch.rand(B, D, count, generator=generator, dtype=torch.float64)
    cell = torch.searchsorted(cumulative.contiguous(), draw).clamp_max(cells.shape[-1] - 1)
    within = torch.rand(B, D, count, generator=generator, dtype=torch.float64)
    x = ((cell + within) / cells.shape[-1]).transpose(1, 2)
    return _with_alpha(layout, x, generator)


def _with_alpha(layout: Layout, x: Tensor, generator: torch.Generator) -> Tensor:
    """Alpha set to a guide's multiple of the rank where a LoRA space has both."""
    rank, alpha = ROLES.index("rank"), ROLES.index("alpha")
    both = layout.has_role[:, rank] & layout.has_role[:, alpha] & layout.is_lora
    draw = torch.randn(x.shape[:2], generator=generator, dtype=torch.float64)
    wished = layout.role_values(x)[:, :, rank] + GUIDE_RATIO + GUIDE_RATIO_SPREAD * draw
    table = layout.natural[:, alpha]
    nearest = (table[:, None, :] - wished[:, :, None]).abs().argmin(-1)
    u = nearest.to(x.dtype) / (table.shape[-1] - 1)
    column = layout.role_column[:, alpha].clamp_min(0)[:, None, None].expand(-1, x.shape[1], 1)
    old = x.gather(2, column)
    return x.scatter(2, column, torch.where(both[:, None, None], u[:, :, None], old))


def perturb(
    x: Tensor,
    layout: Layout,
    scale: Tensor,
    probability: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Points moved in a random subset of columns (always at least one).

    Args:
        x: shape (B, N, D).
        layout: of the batch.
        scale: deviation of a move, broadcastable to x.
        probability: chance that a column moves, broadcastable to x.
        generator: of the random numbers.

    Unordered columns jump to any of their values.
    """
    chance = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    chance = torch.where(layout.real[:, None, :], chance, torch.full_like(chance, 2.0))
    moves = (chance < probability) | (chance == chance.amin(-1, keepdim=True))
    step = torch.randn(x.shape, generator=generator, dtype=torch.float64) * scale
    jump = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    moved = torch.where(layout.unordered[:, None, :], jump, x + step)
    # Reflected at the faces, so that the borders are met as often as the inside.
    moved = moved.abs()
    moved = 1.0 - (1.0 - moved).abs()
    return torch.where(moves & layout.real[:, None, :], moved, x).clamp(0.0, 1.0)


def axis_points(anchors: Tensor, layout: Layout, count: int, generator: torch.Generator) -> Tensor:
    """The anchors moved along one axis each, every other one along the learning rate.

    The learning rate goes up and down in growing steps from a third of a decade to two, since
    its scale is what a guide gets wrong.
    """
    B, k, _ = anchors.shape
    rows = torch.arange(count) % k
    x = anchors[:, rows]
    moved = perturb(x, layout, torch.tensor(0.3), torch.tensor(0.0), generator)
    column = layout.role_column[:, _LEARNING_RATE].clamp_min(0)[:, None, None]
    column = column.expand(-1, count, 1)
    table = layout.natural[:, _LEARNING_RATE]
    width = (table[:, -1] - table[:, 0]).clamp_min(0.3)[:, None]
    size = 0.33 * 1.6 ** (4.0 * torch.rand(B, count, generator=generator, dtype=torch.float64))
    up = torch.rand(B, count, generator=generator, dtype=torch.float64) < 0.5
    step = torch.where(up, size, -size) / width
    u = (x.gather(2, column)[:, :, 0] + step).clamp(0.0, 1.0)
    along = x.scatter(2, column, u[:, :, None])
    use = layout.has_role[:, _LEARNING_RATE, None] & (torch.arange(count) // k % 2 == 0)
    return torch.where(use[:, :, None], along, moved)


def improve(
    acquisition: Acquisition,
    start: Tensor,
    layout: Layout,
    snap: Snap,
    generator: torch.Generator,
    *,
    climb: Climb,
    rounds: int,
    keep: int,
) -> Tensor:
    """Local search for the acquisition's best points, shape (B, keep, D).

    Some of the best points climb; then every round perturbs the best so far, at finer and finer
    scales, which also tries other values of what has no order, and lets the best climb again.
    """
    x, value = start, acquisition(start)
    for turn in range(rounds + 1):
        order = value.argsort(dim=1, descending=True, stable=True)[:, :keep]
        value = value.gather(1, order)
        x = x.gather(1, order[:, :, None].expand(-1, -1, x.shape[2]))
        if turn == rounds:
            break
        climbers = snap(climb(x[:, spread_places(x.shape[1], max(keep // 4, 2))]))
        parents = torch.cat([climbers, x], 1)
        scale = 0.15 * 0.3**turn
        probability = torch.full((1, 1, 1), max(0.34, 2.0 / x.shape[2]))
        spread = torch.tensor([scale, 0.3 * scale]).repeat(parents.shape[1])[: parents.shape[1]]
        moved = perturb(parents, layout, spread[None, :, None], probability, generator)
        born = torch.cat([climbers, snap(moved)], 1)
        x, value = torch.cat([x, born], 1), torch.cat([value, acquisition(born)], 1)
    return x


@cache
def spread_places(n: int, count: int) -> Tensor:
    """``count`` places among n, dense at the beginning."""
    places = (torch.linspace(0.0, 1.0, min(count, n)) ** 1.7 * (n - 1)).long()
    return torch.maximum(places, torch.arange(len(places)))


def is_repeat(x: Tensor, others: Tensor, mask: Tensor, within: float = SAME) -> Tensor:
    """Which of x (B, N, D) lie within so much of a masked other (B, n, D), shape (B, N)."""
    if not others.shape[1]:
        return torch.zeros(x.shape[:2], dtype=torch.bool)
    same = torch.cdist(x, others, p=torch.inf) < within
    return (same & mask[:, None, :]).any(-1)


def propose_candidates(
    layout: Layout,
    observed: Observed,
    acquisition: Acquisition,
    snap: Snap,
    generator: torch.Generator,
    *,
    climb: Climb,
    count: int = 256,
    rounds: int = 2,
    grid: Tensor | None = None,
) -> Candidates:
    """Candidates of every source for one step.

    Args:
        layout: the spaces.
        observed: the trials so far.
        acquisition: what the local search maximises.
        snap: moves points onto configurations that exist.
        generator: of all random numbers.
        climb: moves points towards more expected improvement.
        count: about how many candidates.
        rounds: of the local search.
        grid: all configurations of a small discrete space, shape (B, k, D), added as they are.
    """
    share = max(count // 16, 2)
    anchors, real = observed.best(5)
    if not anchors.shape[1]:
        anchors, real = layout.default[:, None], torch.ones_like(layout.is_lora)[:, None]
    anchors = torch.where(real[:, :, None], anchors, layout.default[:, None])
    sets = [
        ("default", layout.default[:, None]),
        ("sweep", layout.sweep),
        ("prior", prior_points(layout, 3 * share, generator)),
        ("uniform", uniform_points(layout, 4 * share, generator)),
        ("axis", axis_points(anchors, layout, 3 * share, generator)),
    ]
    parents = anchors[:, torch.arange(3 * share) % anchors.shape[1]]
    scale = torch.tensor([0.03, 0.1, 0.3]).repeat(share)[None, :, None]
    chance = torch.full((1, 1, 1), max(0.25, 1.5 / layout.real.shape[1]))
    sets.append(("mutation", perturb(parents, layout, scale, chance, generator)))
    if grid is not None:
        sets.append(("uniform", grid))
    everything = snap(torch.cat([points for _, points in sets], 1))
    blocked = _blocked_acquisition(acquisition, observed)
    best = improve(
        blocked, everything, layout, snap, generator, climb=climb, rounds=rounds, keep=3 * share
    )
    sets.append(("improvement", best))
    x = torch.cat([everything, best], 1)
    source = torch.cat(
        [torch.full((points.shape[1],), SOURCES.index(name)) for name, points in sets]
    )
    return Candidates(x, source, _allowed(x, observed))


def _near(x: Tensor, observed: Observed) -> Tensor:
    """Close to a running trial, or to a failed one where several have failed, shape (B, N)."""
    near = is_repeat(x, observed.pending, observed.pending_mask, NEAR)
    failed = observed.failed & observed.mask
    doomed = failed & (failed.sum(1, keepdim=True) >= NO_ACCIDENT)
    return near | is_repeat(x, observed.x, doomed, NEAR) if bool(doomed.any()) else near


def _blocked_acquisition(acquisition: Acquisition, observed: Observed) -> Acquisition:
    def blocked(x: Tensor) -> Tensor:
        repeat = is_repeat(x, observed.x, observed.mask) | _near(x, observed)
        return torch.where(repeat, -torch.inf, acquisition(x))

    return blocked


def _allowed(x: Tensor, observed: Observed) -> Tensor:
    """No repeats and nothing close to a running trial or to failed ones; where nothing else is
    left, what is close; then repeats of what did not fail; else anything.
    """
    near = _near(x, observed)
    repeat = is_repeat(x, observed.x, observed.mask)
    repeat_of_running = is_repeat(x, observed.pending, observed.pending_mask)
    failed = is_repeat(x, observed.x, observed.failed & observed.mask)
    valid = ~(repeat | near)
    for next_best in (~(repeat | repeat_of_running), ~failed, torch.ones_like(valid)):
        valid = torch.where(valid.any(1, keepdim=True), valid, next_best)
    return valid
