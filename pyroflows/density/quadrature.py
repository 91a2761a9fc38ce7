"""Gaps before a row's last cell by sums over labels and quadrature over one missing number."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyroflows.density.conditionals import Numbers, bounded
from pyroflows.density.particles import Cloud, Particles, gaps, log_sums
from pyroflows.density.restricted import PointsWithin, Restricted, may_stay

if TYPE_CHECKING:
    from pyroflows.density.model import TableModel

__all__ = ["enumerate_gaps"]

LEVELS = torch.special.ndtr(torch.linspace(-5, 5, 97, dtype=torch.float64))  # of the first grid
EXACT = 3e-4  # nats of error at which a grid is fine enough
ROUNDS = 6  # grids tried


@dataclasses.dataclass
class _Grid:
    """Intervals of a missing number: ends (G, Q), log-probabilities (G, Q + 1), owners (G,)."""

    place: int
    first: int
    row: Tensor
    edges: Tensor
    log_mass: Tensor


def enumerate_gaps(
    out: Cloud, model: TableModel, values: Tensor, rows: Tensor, leave: bool
) -> None:
    """Sums over labels and quadrature over one number, refined until they stand still."""
    last = gaps(model, values)[1]
    grids: list[_Grid] = []
    for step in range(ROUNDS):
        p, used = _enumerated(model, values[rows], last[rows], grids, leave)
        error, finer = _refined(model, p, used, len(rows))
        more = (error > EXACT) & (step + 1 < ROUNDS)
        out.evidence[rows], out.error[rows] = p.total(len(rows)), error
        out.add(p, rows, ~more, *_intervals(p, used))
        if not more.any():
            return
        place = more.cumsum(0) - 1
        grids = [
            dataclasses.replace(g, row=place[g.row[more[g.row]]], edges=g.edges[more[g.row]])
            for g in finer
        ]
        rows = rows[more]


def _enumerated(
    model: TableModel, values: Tensor, last: Tensor, given: list[_Grid], leave: bool
) -> tuple[Particles, list[_Grid]]:
    """Every label of the gaps before ``last``, and a grid over a missing number."""
    p = Particles.start(model, values)
    grids: list[_Grid] = []
    count = 0
    for t, i in p.walk():
        at = (i <= last[p.row]).nonzero()[:, 0]
        if not len(at):
            continue
        c = p.conditional(t, at)
        gap = p.raw[at, i].isnan()
        if not gap.all():
            p.weigh(i, at[~gap], c[~gap], leave)
        if not gap.any():
            continue
        c, at = c[gap], at[gap]
        if isinstance(c, Restricted):
            p.log_w[at] += c.total(leave)
            inner = i < last[p.row[at]]  # the last cell is drawn when all else is
            c, at = c[inner], at[inner]
            if not len(at):
                continue
        leaf = None
        if isinstance(c, PointsWithin):
            x, log_p = c.table()
        elif isinstance(c, Numbers):
            old = next((g for g in given if g.place == i), None)
            edges = c.grid(LEVELS) if old is None else old.edges
            x, log_p = c.nodes(edges)
            grids.append(_Grid(i, count, p.row[at], edges, log_p[:, : edges.shape[1] + 1]))
            leaf, count = count, count + len(at)
        else:
            log_p = c.log_table()
            x = torch.arange(log_p.shape[1]).double().expand_as(log_p)
        if may_stay(c, leave):
            odds = bounded(c.odds)[:, None]
            x = torch.cat([x, torch.full_like(odds, torch.nan)], 1)
            log_p = torch.cat([log_p + torch.log1p(-odds), odds.log()], 1)
        p.branch(i, at, x, log_p, leaf)
    return p, grids


def _refined(
    model: TableModel, p: Particles, grids: list[_Grid], rows: int
) -> tuple[Tensor, list[_Grid]]:
    """The error of each row's sum, shape (rows,), and finer grids where it is large.

    Three neighbouring intervals are compared with one of three times the width: as the rule is of
    second order, an eighth of the difference remains.
    """
    error = torch.zeros(rows, dtype=torch.float64)
    total = p.total(rows).nan_to_num(neginf=0.0)  # rows that cannot be have no error
    finer = []
    for g in grids:
        cells, count, width = model.cells[g.place], len(g.row), g.log_mass.shape[1]
        mine = (p.leaf >= g.first) & (p.leaf < g.first + count) & (p.node < width)
        flat = (p.leaf[mine] - g.first) * width + p.node[mine]
        share = p.log_w[mine] - total[p.row[mine]]
        part = log_sums(share, flat, count * width).view(count, width).exp()
        mass = g.log_mass.exp()
        height = torch.where(mass > 0, part / mass.clamp_min(1e-300), 0.0)
        three = part[:, 1:-1].reshape(count, -1, 3), mass[:, 1:-1].reshape(count, -1, 3)
        rough = three[1].sum(2) * height[:, 2:-1:3]
        gap = (three[0].sum(2) - rough).abs() / 8
        if float(cells.step) > 0:
            single = (g.edges.diff(dim=1) < 1.5 * cells.step).view(count, -1, 3).all(2)
            gap = torch.where(single, 0.0, gap)
        error.index_add_(0, g.row, gap.sum(1))
        # a cut of width h leaves an error of h^3: where it is large, more and smaller intervals
        s = cells.score(g.edges.reshape(-1))[0].view_as(g.edges)
        s = torch.cat([s[:, :1] - 2, s, s[:, -1:] + 2], 1)
        around = torch.nn.functional.pad(height[:, None], (1, 1), mode="replicate")[:, 0]
        bend = part.new_zeros(count, width) + mass * around.diff(dim=1).diff(dim=1).abs()
        bend = torch.nn.functional.max_pool1d(bend[:, None], 3, 1, 1)[:, 0]
        weight = (bend / bend.amax(1, keepdim=True).clamp_min(1e-300)) ** (1 / 3)
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-300) + 0.1 / width
        cum = torch.cat([torch.zeros(count, 1).double(), weight.cumsum(1)], 1)
        cum = cum / cum[:, -1:]
        levels = (torch.arange(1, width).double() / width).expand(count, -1).contiguous()
        at = torch.searchsorted(cum.contiguous(), levels).clamp(1, width)
        c0, c1 = cum.gather(1, at - 1), cum.gather(1, at)
        s0, s1 = s.gather(1, at - 1), s.gather(1, at)
        new = s0 + (s1 - s0) * ((levels - c0) / (c1 - c0).clamp_min(1e-300)).clamp(0, 1)
        edges = cells.keep(cells.place(new.reshape(-1))).view_as(new)
        finer.append(dataclasses.replace(g, edges=edges.cummax(1).values))
    return error, finer


def _intervals(p: Particles, grids: list[_Grid]) -> tuple[Tensor, Tensor]:
    """Column and ends of the interval that each particle stands for."""
    column = torch.full_like(p.row, -1)
    ends = torch.zeros(len(p.row), 2, dtype=torch.float64)
    for g in grids:
        mine = (p.leaf >= g.first) & (p.leaf < g.first + len(g.row))
        mine = (mine & (p.node < g.log_mass.shape[1])).nonzero()[:, 0]
        edge = torch.nn.functional.pad(g.edges, (1, 1), value=torch.inf)
        edge[:, 0] = -torch.inf
        leaf, node = p.leaf[mine] - g.first, p.node[mine]
        column[mine] = g.place
        ends[mine] = torch.stack([edge[leaf, node], edge[leaf, node + 1]], 1)
    return column, ends
