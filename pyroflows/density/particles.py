"""Rows with missing cells filled in, with weights.

Columns are walked through in the model's order. Gaps before a row's last observed cell must agree
with it, and become weighted *particles*: all labels of a gap or a grid over one missing number
(:mod:`~pyroflows.density.quadrature`), or draws where both would be too many
(:mod:`~pyroflows.density.sequential`). Gaps after it are simply drawn
(:mod:`~pyroflows.density.completions`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyroflows.density.conditionals import Conditional
from pyroflows.density.restricted import may_stay
from pyroflows.density.uniforms import Uniforms
from pyroflows.tables.conditions import Codes, Points
from pyroflows.weights import effective_sample_size, systematic_resample

if TYPE_CHECKING:
    from pyroflows.density.model import TableModel

__all__ = ["chunks", "Cloud", "drawn", "gaps", "log_sums", "log_weight", "Particles"]

LEAVES = 2048  # particles of a row up to which its gaps are enumerated


@dataclasses.dataclass
class Particles:
    """Rows with gaps filled in, as many to a row as it takes.

    Attributes:
        model: The model.
        row: The row of each particle, shape (P,).
        raw: Values in model order, shape (P, D).
        features: What the networks see of them, shape (P, F).
        state: What the simple model has read of them.
        log_w: Log-weights, shape (P,).
        root: Number of the particle that it began as, shape (P,).
        leaf: Number of the particle whose missing number was spread over a grid, -1 for none.
        node: Its place on that grid.
    """

    model: TableModel
    row: Tensor
    raw: Tensor
    features: Tensor
    state: Any
    log_w: Tensor
    root: Tensor
    leaf: Tensor
    node: Tensor

    @classmethod
    def start(cls, model: TableModel, values: Tensor, copies: int = 1) -> Particles:
        """``copies`` particles for each row of values in the schema's order."""
        row = torch.arange(len(values)).repeat_interleave(copies)
        raw = values[:, model.order].double()
        features = model.features(raw)[row]
        raw = raw[row]
        state = None if model.simple is None else model.simple.start(len(raw))
        none = torch.full_like(row, -1)
        log_w = torch.full((len(row),), -math.log(copies), dtype=torch.float64)
        return cls(
            model, row, raw, features, state, log_w, torch.arange(len(row)), none, none.clone()
        )

    def take(self, index: Tensor) -> None:
        """Keep these particles, in this order."""
        for name in ("row", "raw", "features", "log_w", "root", "leaf", "node"):
            setattr(self, name, getattr(self, name)[index])
        if self.state is not None:
            self.state = tuple(part[index] for part in self.state)

    def fill(self, i: int, at: Tensor, x: Tensor) -> None:
        """Put values into column i of some particles."""
        self.raw[at, i] = x
        self.features[at, self.model.specs[i].slice] = self.model.cells[i].features(x)

    def branch(self, i: int, at: Tensor, x: Tensor, log_p: Tensor, leaf: int | None) -> None:
        """Replace particles by one for each of their values x of column i, shape (len(at), B).

        ``leaf`` numbers them where the values are a grid.
        """
        count = x.shape[1]
        rest = torch.ones(len(self.row), dtype=torch.bool)
        rest[at] = False
        rest = rest.nonzero()[:, 0]
        good = (log_p > -torch.inf).view(-1)
        node = torch.arange(count).expand_as(x).reshape(-1)[good]
        self.take(torch.cat([rest, at.repeat_interleave(count)[good]]))
        new = torch.arange(len(rest), len(self.row))
        self.fill(i, new, x.reshape(-1)[good])
        self.log_w[new] += log_p.reshape(-1)[good]
        if leaf is not None:
            which = torch.arange(len(at)).repeat_interleave(count)[good]
            self.leaf[new], self.node[new] = which + leaf, node

    @property
    def values(self) -> Tensor:
        """The rows in the schema's order, shape (P, D)."""
        out = torch.empty_like(self.raw)
        out[:, self.model.order] = self.raw
        return out

    def weigh(self, i: int, at: Tensor, law: Conditional, leave: bool) -> None:
        """Weigh particles by their observed cells of column i, given those before it."""
        if len(at):
            self.log_w[at] += log_weight(law, self.raw[at, i], leave)

    def resample(self, size: int, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the particles of rows anew whose effective number is below half, by their weights.

        Args:
            size: Particles of each row.
            shift: A uniform number for each row.

        Returns:
            Those rows, and the log of the mean of their weights, which then are equal.
        """
        log_w = self.log_w.view(-1, size)
        total = log_w.logsumexp(1)
        share = (log_w - total[:, None]).exp()
        poor = (total > -torch.inf) & (effective_sample_size(share) < size / 2)
        rows = poor.nonzero()[:, 0]
        if len(rows):
            pick = systematic_resample(share[rows], size, shift[rows]) + rows[:, None] * size
            index = torch.arange(len(self.row)).view(-1, size)
            index[rows] = pick
            self.take(index.view(-1))
            self.log_w.view(-1, size)[rows] = -math.log(size)
        return rows, total[rows]

    def total(self, count: int) -> Tensor:
        """Log of the summed weights of each of ``count`` rows."""
        return log_sums(self.log_w, self.row, count)

    def walk(self) -> Iterator[tuple[int, int]]:
        """Yield (target, place) in model order; the simple model reads a column after its turn."""
        for i in range(len(self.model.cells)):
            if i >= self.model.num_given:
                yield i - self.model.num_given, i
            self.state = self.model.read(i, self.raw[:, i], self.state)

    def conditional(self, t: int, at: Tensor, *, atoms: bool = True) -> Any:
        """The distribution of target t for some particles."""
        state = None if self.state is None else tuple(part[at] for part in self.state)
        return self.model.conditional(t, self.features[at], state, atoms=atoms)


def log_sums(log_w: Tensor, place: Tensor, count: int) -> Tensor:
    """Log of the sums of exponentials by place, shape (count,)."""
    top = torch.full((count,), -torch.inf, dtype=log_w.dtype).scatter_reduce(
        0, place, log_w, "amax"
    )
    safe = torch.where(top.isfinite(), top, 0.0)
    sums = torch.zeros(count, dtype=log_w.dtype).index_add_(0, place, (log_w - safe[place]).exp())
    return sums.log() + safe


class Cloud:
    """Rows whose gaps before the last observed cell are filled in, several times with weights.

    Attributes:
        evidence: Log-density of the observed cells of each row, shape (N,).
        error: Its standard error, or the numerical one, in nats, shape (N,).
        effective: Number of draws that the particles of a row stand for, shape (N,).
        row: The row of each particle, increasing, shape (P,).
        raw: Its values in model order, shape (P, D).
        log_w: Its log-weight; the weights of a row sum to one.
        column: The column of which only an interval is known, or -1, shape (P,).
        ends: The ends of that interval, shape (P, 2).
    """

    def __init__(self, n: int) -> None:
        self.evidence = torch.full((n,), torch.nan, dtype=torch.float64)
        self.error = torch.zeros(n, dtype=torch.float64)
        self.effective = torch.full((n,), torch.inf, dtype=torch.float64)
        self._parts: list[tuple[Tensor, ...]] = []

    def add(
        self,
        p: Particles,
        rows: Tensor,
        keep: Tensor,
        column: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> None:
        """Take the particles of those of ``rows`` that ``keep`` names, shape (len(rows),).

        ``column`` and ``ends`` tell of which column each only knows an interval; None of none.
        """
        if column is None or ends is None:
            column, ends = torch.full_like(p.row, -1), p.log_w.new_zeros(len(p.row), 2)
        total = p.total(len(rows))[p.row]
        share = torch.where(total > -torch.inf, p.log_w - total, 0.0)  # no weights: all alike
        mine = keep[p.row].nonzero()[:, 0]
        self._parts.append((rows[p.row[mine]], p.raw[mine], share[mine], column[mine], ends[mine]))

    @property
    def dead(self) -> Tensor:
        """Rows whose observed cells are impossible, shape (N,)."""
        return self.evidence == -torch.inf

    def forget(self) -> None:
        """Drop the particles, where the evidence is all that is wanted."""
        self._parts.clear()

    def close(self) -> Cloud:
        """Sort the particles by row."""
        parts = [torch.cat(x) for x in zip(*self._parts, strict=True)]
        order = parts[0].argsort(stable=True)
        self.row, self.raw, self.log_w, self.column, self.ends = (x[order] for x in parts)
        return self


def gaps(model: TableModel, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which cells are to be filled in, shape (N, D) in model order.

    Also the place of each row's last observed target, or of one within a region, -1 if no gap
    comes before it; and by how many particles its gaps are enumerated, infinity if they cannot be.
    """
    missing = values[:, model.order].isnan()
    missing[:, : model.num_given] = False
    place = torch.arange(missing.shape[1])
    within = torch.isin(place, torch.tensor(list(model.regions.at), dtype=torch.long))
    within = within | (model.regions.late is not None)
    seen = (~missing | within) & (place >= model.num_given)
    last = torch.where(seen, place, -1).amax(1)
    inner = missing & (place < last[:, None])
    sizes = [_outcomes(model, i) for i in range(len(place))]
    few = torch.tensor([math.isfinite(size) for size in sizes])
    size = torch.tensor([size if math.isfinite(size) else 120.0 for size in sizes])
    leaves = (inner * size.double().log()).sum(1)
    exact = ((inner & ~few).sum(1) <= 1) & (leaves <= math.log(LEAVES))
    if not model.regions.summable:
        exact &= False
    leaves = torch.where(exact, leaves.exp(), torch.inf)
    needed = (missing & (within | (place < last[:, None]))).any(1)
    return missing, torch.where(needed, last, -1), leaves


def _outcomes(model: TableModel, i: int) -> float:
    """Values that a gap in column i can have, infinity for any number."""
    region, cells = model.regions.at.get(i), model.cells[i]
    if isinstance(region, Points):
        return len(region.values)
    if isinstance(region, Codes):
        return int(region.allowed.sum()) + 1
    return len(cells.group) + 1 if cells.is_label else math.inf


def log_weight(c: Conditional, x: Tensor, leave: bool) -> Tensor:
    """Log-density of observed cells; with ``leave`` also that they were observed."""
    return c.log_prob(x) + c.log_there(leave)


def drawn(
    c: Any,
    uniforms: Uniforms,
    row: Tensor,
    draw: Tensor,
    i: int,
    leave: bool,
    lattice: bool = True,
) -> Tensor:
    """Values of column i, NaN where the cell stays missing."""
    x = c.sample(uniforms(row, draw, i, 0), uniforms(row, draw, i, 1), lattice=lattice)
    if may_stay(c, leave):
        x = torch.where(uniforms(row, draw, i, 2) < c.odds, torch.nan, x)
    return x


def chunks(model: TableModel, rows: Tensor, size: float | Tensor) -> Iterator[Tensor]:
    """Rows in parts whose particles, ``size`` of each row, fit into memory."""
    width = 1 if model.simple is None else model.simple.mean.numel()
    particles = max(512, min(32768, 2**25 // (width + model.specs[-1].slice.stop)))
    sizes = torch.as_tensor(size, dtype=torch.float64).expand(len(rows))
    part = (sizes.cumsum(0) / particles).long()
    yield from rows.split(torch.bincount(part)[part.unique()].tolist()) if len(rows) else ()
