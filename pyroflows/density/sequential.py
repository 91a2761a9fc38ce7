"""Gaps before a row's last cell by weighted draws: sequential Monte Carlo, tempered where rare."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyroflows.density.particles import Particles, drawn
from pyroflows.density.restricted import Guessed, Restricted
from pyroflows.density.uniforms import Uniforms
from pyroflows.weights import effective_sample_size, systematic_resample

if TYPE_CHECKING:
    from pyroflows.density.model import TableModel

__all__ = ["MOST", "simulate", "tempered"]

MOST = 16384  # draws of one row, at most, where they are to be completions
APART = 1_000_003  # columns at most; beyond their numbers lie those of candidates
LENGTHS = (1.0, 0.5, 0.25, 0.7, 0.35, 0.12)  # of the moves between two powers


def simulate(
    model: TableModel,
    values: Tensor,
    last: Tensor,
    size: int,
    uniforms: Uniforms,
    rows: Tensor,
    *,
    batch: int = 0,
    leave: bool = False,
    resample: bool = True,
) -> tuple[Particles, Tensor, Tensor]:
    """Sequential Monte Carlo over the gaps before ``last``: ``size`` particles to a row.

    A gap is drawn from its conditional, an observed cell or the region of a drawn one weighs the
    particles; they are resampled where their effective number falls below half.

    Returns:
        The particles, sorted by row; the log-evidence, shape (N,); the effective number of
        particles that began apart, shape (N,).
    """
    n = len(values)
    p = Particles.start(model, values, size)
    draw = torch.arange(size).repeat(n) + batch * size
    known = values.new_zeros(n)
    for t, i in p.walk():
        at = (i <= last[p.row]).nonzero()[:, 0]
        if not len(at):
            continue
        c = p.conditional(t, at)
        gap = p.raw[at, i].isnan()
        if gap.any():
            hole = at[gap]
            x, log_p = _proposed(c[gap], uniforms, rows[p.row[hole]], draw[hole], i, leave)
            p.fill(i, hole, x)
            p.log_w[hole] += log_p
        if gap.all() and not isinstance(c, Restricted):
            continue
        if not gap.all():
            p.weigh(i, at[~gap], c[~gap], leave)
        if resample:
            shift = uniforms(rows, torch.full_like(rows, batch * size), i, 3)
            poor, total = p.resample(size, shift)
            known[poor] += total
    if model.regions.late is not None:
        p.log_w[~model.regions.late(p.values)] = -torch.inf
    total = p.total(n)
    share = (p.log_w - total[p.row]).exp().nan_to_num(0.0)
    root = torch.zeros(n * size, dtype=torch.float64).index_add_(0, p.root, share)
    return p, known + total, 1 / root.view(n, size).square().sum(1).clamp_min(1e-300)


def _proposed(
    c: Any, uniforms: Uniforms, row: Tensor, draw: Tensor, i: int, leave: bool
) -> tuple[Tensor, Tensor | float]:
    """Values of column i, and what a region weighs them by."""
    if isinstance(c, Guessed):
        x, log_p = c.propose(lambda k: uniforms(row, draw, i + (k + 1) * APART, 6))
        return x, log_p + c.log_there(leave)
    x = drawn(c, uniforms, row, draw, i, leave)
    return x, c.total(leave) if isinstance(c, Restricted) else 0.0


class _Table:
    """Uniform numbers of draws by place, from normal ones of shape (P, columns, 3)."""

    def __init__(self, z: Tensor) -> None:
        self.u = torch.special.ndtr(z).clamp(1e-16, 1 - 1e-16)

    def __call__(self, row: Tensor, draw: Tensor, column: int, kind: int = 0) -> Tensor:
        return self.u[draw, column, kind]


def tempered(
    model: TableModel,
    values: Tensor,
    last: Tensor,
    size: int,
    uniforms: Uniforms,
    row: Tensor,
    leave: bool = False,
) -> tuple[Particles, Tensor, Tensor]:
    """Particles of one row whose regions or cells are rare, by raising the weights to powers.

    The random numbers behind a particle are moved, which a particle is a function of: from their
    own law, normal, by powers of the weight that rise from 0 to 1 as fast as half of the particles
    stay effective (Del Moral, Doucet, Jasra 2006); then moves of some columns by some length that
    leave the power's law as it is (Cotter, Roberts, Stuart, White 2013, eq. 4.4). A pass over the
    columns each, some tens of them.

    Returns:
        As :func:`simulate` does, for one row.
    """
    size = max(2048, min(size, MOST))
    seed = uniforms(row, torch.zeros_like(row), 0, 7) * 2**53
    generator = torch.Generator().manual_seed(int(seed))

    def normal() -> Tensor:
        shape = size, len(model.cells), 3
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def run(z: Tensor) -> tuple[Particles, Tensor]:
        table: Any = _Table(z)
        p = simulate(model, values, last, size, table, row, leave=leave, resample=False)[0]
        return p, p.log_w + math.log(size)

    z = normal()
    p, log_w = run(z)
    power, total = 0.0, torch.zeros(1, dtype=torch.float64)
    while power < 1 and bool((log_w > -torch.inf).any()):
        step = _next_power(log_w, 1 - power)
        power = min(power + step, 1.0)
        raised = torch.where(log_w > -torch.inf, step * log_w, -torch.inf)
        total += raised.logsumexp(0) - math.log(size)
        pick = systematic_resample(raised.softmax(0)[None], size, uniform(1))[0]
        z, log_w = z[pick], log_w[pick]
        for length in LENGTHS:
            some = uniform(*z.shape) < 0.5
            moved = math.sqrt(1 - length**2) * z + length * normal()
            other = torch.where(some, moved, z)
            new = run(other)[1]
            better = uniform(size).log() < power * (new - log_w)
            z = torch.where(better[:, None, None], other, z)
            log_w = torch.where(better, new, log_w)
    if power < 1:
        total -= torch.inf
    p = run(z)[0]
    p.log_w[:] = -math.log(size)
    return p, total, torch.full((1,), size / 2, dtype=torch.float64)


def _next_power(log_w: Tensor, most: float) -> float:
    """The power of weights by which half of the particles stay effective, by bisection."""
    finite = log_w[log_w > -torch.inf]

    def effective(power: float) -> float:
        share = (power * finite).softmax(0)
        return float(effective_sample_size(share))

    low, high = 0.0, most
    if effective(high) >= len(finite) / 2:
        return most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if effective(middle) < len(finite) / 2 else (middle, high)
    return max(high, 1e-6)
