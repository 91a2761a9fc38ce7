"""Missing cells, filled in from their distribution given the observed ones of the same row.

Columns are walked through in the model's order. Gaps before a row's last observed cell must agree
with it, and become weighted *particles*: all labels of a gap, a grid over one missing number, or
draws where both would be too many (sequential Monte Carlo). Gaps after it are simply drawn. Every
random number belongs to a row, a draw and a column, so that a row never feels the rows beside it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyroflows.density.conditionals import Conditional, Labels, Numbers
from pyroflows.density.restricted import Guessed, PointsWithin, Regions, Restricted, may_miss
from pyroflows.tables.conditions import Codes, Points

if TYPE_CHECKING:
    from pyroflows.density.model import TableModel
from pyroflows.weights import effective_sample_size, systematic_resample

__all__ = ["Cloud", "Particles", "Uniforms", "averages", "cloud", "complete", "evidence"]

LEAVES = 2048  # particles of a row up to which its gaps are enumerated
LEVELS = torch.special.ndtr(torch.linspace(-5, 5, 97, dtype=torch.float64))  # of the first grid
EXACT = 3e-4  # nats of error at which a grid is fine enough
ROUNDS = 6  # grids tried
NOISE = 0.03  # nats of error at which draws are enough
BATCHES = 16  # independent batches of draws, at most
MOST = 16384  # draws of one row, at most, where they are to be completions
APART = 1_000_003  # columns at most; beyond their numbers lie those of candidates


def _mix(z: Tensor) -> Tensor:
    """Scramble 64-bit integers, a bijection (Steele, Lea, Flood 2014, SplitMix64)."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return z ^ ((z >> 31) & ((1 << 33) - 1))


GOLDEN = -7046029254386353131


def _wrapped(z: int) -> int:
    """An integer as one of 64 bits."""
    return (z + 2**63) % 2**64 - 2**63


class Uniforms:
    """Uniform numbers that depend on a seed and their place alone.

    Args:
        seed: Any 63-bit integer.
        strata: If given, all rows share the numbers, and the first ``strata`` draws fall into as
            many equal parts of (0, 1), one in each; so for the next ones.
    """

    def __init__(self, seed: int, *, strata: int = 0) -> None:
        self.seed = _mix(torch.tensor(seed, dtype=torch.int64))
        self.strata = strata
        self.rows: Tensor | None = None

    def at(self, rows: Tensor) -> Uniforms:
        """The same for a part of the table, whose rows stand at these places."""
        out = copy.copy(self)
        out.rows = rows if self.rows is None else self.rows[rows]
        return out

    def __call__(self, row: Tensor, draw: Tensor, column: int, kind: int = 0) -> Tensor:
        """Numbers in (0, 1) for rows and draws, shape (P,); ``kind`` tells several apart."""
        key = _mix(self.seed + _wrapped((column * 8 + kind + 1) * GOLDEN))
        if not self.strata or not len(draw):
            return self._hash(key, row if self.rows is None else self.rows[row], draw)
        count = int(draw.max()) // self.strata + 1
        every = torch.arange(count * self.strata)
        place = self._hash(key, torch.zeros_like(every), every).view(count, -1)
        inner = self._hash(_mix(key + 1), torch.zeros_like(every), every).view(count, -1)
        return ((place.argsort(1).argsort(1) + inner) / self.strata).view(-1)[draw]

    @staticmethod
    def _hash(key: Tensor, row: Tensor, draw: Tensor) -> Tensor:
        z = _mix(_mix(key + row * GOLDEN) + draw * GOLDEN)
        return (((z >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53


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

    def total(self, count: int) -> Tensor:
        """Log of the summed weights of each of ``count`` rows."""
        return _log_sums(self.log_w, self.row, count)

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


def _log_sums(log_w: Tensor, place: Tensor, count: int) -> Tensor:
    """Log of the sums of exponentials by place, shape (count,)."""
    top = torch.full((count,), -torch.inf, dtype=log_w.dtype).scatter_reduce(
        0, place, log_w, "amax"
    )
    safe = torch.where(top.isfinite(), top, 0.0)
    sums = torch.zeros(count, dtype=log_w.dtype).index_add_(0, place, (log_w - safe[place]).exp())
    return sums.log() + safe


# ---------------------------------------------------------------------- gaps before the last cell


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

    def add(self, p: Particles, rows: Tensor, keep: Tensor, column: Tensor, ends: Tensor) -> None:
        """Take the particles of those of ``rows`` that ``keep`` names, shape (len(rows),)."""
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


@dataclasses.dataclass
class _Grid:
    """Intervals of a missing number: ends (G, Q), log-probabilities (G, Q + 1), owners (G,)."""

    place: int
    first: int
    row: Tensor
    edges: Tensor
    log_mass: Tensor


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
            p.log_w[at[~gap]] += _weight(c[~gap], p.raw[at[~gap], i], leave)
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
        if may_miss(c, leave):
            odds = c.odds.double().clamp(1e-7, 1 - 1e-7)[:, None]
            x = torch.cat([x, torch.full_like(odds, torch.nan)], 1)
            log_p = torch.cat([log_p + torch.log1p(-odds), odds.log()], 1)
        p.branch(i, at, x, log_p, leaf)
    return p, grids


def _weight(c: Conditional, x: Tensor, leave: bool) -> Tensor:
    """Log-density of observed cells; with ``leave`` also that they were observed."""
    log_p = c.log_prob(x)
    if leave and bool(c.cells.missing_seen):  # type: ignore[attr-defined]
        log_p = log_p + torch.log1p(-c.odds.double().clamp(1e-7, 1 - 1e-7))
    return log_p


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
        part = _log_sums(share, flat, count * width).view(count, width).exp()
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


def _enumerate(out: Cloud, model: TableModel, values: Tensor, rows: Tensor, leave: bool) -> None:
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


# ---------------------------------------------------------------------- draws


def _simulated(
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
            p.log_w[at[~gap]] += _weight(c[~gap], p.raw[at[~gap], i], leave)
        if not resample:
            continue
        log_w = p.log_w.view(n, size)
        total = log_w.logsumexp(1)
        share = (log_w - total[:, None]).exp()
        poor = (total > -torch.inf) & (effective_sample_size(share) < size / 2)
        if poor.any():
            which = poor.nonzero()[:, 0]
            shift = uniforms(rows[which], torch.full_like(which, batch * size), i, 3)
            pick = systematic_resample(share[which], size, shift) + which[:, None] * size
            index = torch.arange(n * size).view(n, size)
            index[which] = pick
            p.take(index.view(-1))
            known[which] += total[which]
            p.log_w.view(n, size)[which] = -math.log(size)
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
        if leave and bool(c.cells.missing_seen):
            log_p = log_p + torch.log1p(-c.odds.double().clamp(1e-7, 1 - 1e-7))
        return x, log_p
    x = _drawn(c, uniforms, row, draw, i, leave)
    return x, c.total(leave) if isinstance(c, Restricted) else 0.0


def _drawn(
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
    if may_miss(c, leave):
        x = torch.where(uniforms(row, draw, i, 2) < c.odds, torch.nan, x)
    return x


def _chunks(model: TableModel, rows: Tensor, size: float | Tensor) -> Iterator[Tensor]:
    """Rows in parts whose particles, ``size`` of each row, fit into memory."""
    width = 1 if model.simple is None else model.simple.mean.numel()
    particles = max(512, min(32768, 2**25 // (width + model.specs[-1].slice.stop)))
    sizes = torch.as_tensor(size, dtype=torch.float64).expand(len(rows))
    part = (sizes.cumsum(0) / particles).long()
    yield from rows.split(torch.bincount(part)[part.unique()].tolist()) if len(rows) else ()


def evidence(
    model: TableModel, values: Tensor, *, draws: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-density of rows that have gaps before an observed cell.

    By enumeration where there are few possibilities or one missing number; else by batches of
    draws, until their mean is known to ``NOISE`` nats or ``BATCHES`` batches are spent. A row's
    result depends on that row alone.

    Returns:
        Which rows, shape (R,); their log-densities; their errors in nats.
    """
    _, last, leaves = gaps(model, values)
    out = Cloud(len(values))
    rows = (last >= 0).nonzero()[:, 0]
    easy = rows[leaves[rows].isfinite()]
    for part in _chunks(model, easy, leaves[easy]):
        _enumerate(out, model, values, part, False)
        out.forget()
    hard = rows[leaves[rows].isinf()]
    sums: list[Tensor] = []
    uniforms = Uniforms(0, strata=draws)
    rare = bool(model.regions) and model.regions.smooth
    while len(hard) and len(sums) < BATCHES:
        new = torch.full((len(values),), -torch.inf, dtype=torch.float64)
        for part in _chunks(model, hard, draws):
            few = values[part]
            new[part] = _simulated(model, few, last[part], draws, uniforms, part, batch=len(sums))[
                1
            ]
        sums.append(new)
        if len(sums) % 4:
            continue
        every = torch.stack(sums)[:, hard]
        mean = every.logsumexp(0) - math.log(len(sums))
        ratio = torch.where(mean.isfinite(), every - mean, 0.0).exp()  # what cannot be is exact
        out.evidence[hard] = mean
        out.error[hard] = ratio.std(0) / math.sqrt(len(sums))
        hard = hard[(out.error[hard] > NOISE) | (rare & out.evidence[hard].isinf())]
    for r in hard[:, None] if rare else ():
        runs = [tempered(model, values[r], last[r], 2048, Uniforms(k), r)[1] for k in range(4)]
        each = torch.stack(runs)
        out.evidence[r] = each.logsumexp(0) - math.log(len(runs))
        ratio = torch.where(each.isfinite(), each - out.evidence[r], 0.0).exp()
        out.error[r] = ratio.std(0) / math.sqrt(len(runs))
    return rows, out.evidence[rows], out.error[rows]


# ---------------------------------------------------------------------- completions


def cloud(
    model: TableModel, values: Tensor, size: int, uniforms: Uniforms, *, leave: bool = False
) -> Cloud:
    """Every row with its gaps before the last observed cell filled in, weighted.

    Args:
        model: The model.
        values: Shape (N, D) in the schema's order.
        size: Draws that the particles of a row should stand for, where they are drawn.
        uniforms: Random numbers.
        leave: Whether a missing cell may stay missing, as in the data.
    """
    _, last, leaves = gaps(model, values)
    n = len(values)
    out = Cloud(n)
    plain = (last < 0).nonzero()[:, 0]
    if len(plain) or not n:
        p = Particles.start(model, values[plain])
        out.add(p, plain, torch.ones(len(plain), dtype=torch.bool), *_intervals(p, []))
    rows = ((last >= 0) & leaves.isfinite()).nonzero()[:, 0]
    for part in _chunks(model, rows, leaves[rows]):
        _enumerate(out, model, values, part, leave)
    hard = ((last >= 0) & leaves.isinf()).nonzero()[:, 0]
    count = max(256, 4 * size)
    while len(hard):
        more = []
        for part in _chunks(model, hard, count):
            p, log_p, effective = _simulated(
                model, values[part], last[part], count, uniforms, part, leave=leave
            )
            few = effective < max(50, size)
            poor = few & (4 * count <= MOST) & (log_p.isfinite() | bool(model.regions))
            rare = few & ~poor & bool(model.regions) & model.regions.smooth
            out.evidence[part], out.effective[part] = log_p, effective
            out.add(p, part, ~poor & ~rare, *_intervals(p, []))
            more.append(part[poor])
            for r in part[rare][:, None]:
                p, log_p, effective = tempered(model, values[r], last[r], size, uniforms, r, leave)
                out.evidence[r], out.effective[r] = log_p, effective
                out.add(p, r, torch.ones(1, dtype=torch.bool), *_intervals(p, []))
        hard, count = torch.cat(more), 4 * count
    return out.close()


# ---------------------------------------------------------------------- rare regions


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
        As :func:`_simulated` does, for one row.
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
        p = _simulated(model, values, last, size, table, row, leave=leave, resample=False)[0]
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


LENGTHS = (1.0, 0.5, 0.25, 0.7, 0.35, 0.12)  # of the moves between two powers


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


def _picks(c: Cloud, n: int, count: int, uniforms: Uniforms) -> Tensor:
    """``count`` particles of each of n rows by their weights, in random order; (n * count,)."""
    first = torch.searchsorted(c.row, torch.arange(n))
    after = torch.searchsorted(c.row, torch.arange(n), right=True)
    rows = torch.arange(n)
    shift = uniforms(rows, torch.zeros_like(rows), 0, 4)
    ahead = torch.cat([torch.zeros(1, dtype=torch.float64), c.log_w.exp().cumsum(0)])
    base, whole = ahead[first], ahead[after] - ahead[first]
    grid = base[:, None] + whole[:, None] * (torch.arange(count) + shift[:, None]) / count
    pick = torch.searchsorted(ahead[1:], grid, right=True)
    pick = pick.maximum(first[:, None]).minimum(after[:, None] - 1)
    key = uniforms(rows.repeat_interleave(count), torch.arange(count).repeat(n), 0, 5).view(
        n, count
    )
    return pick.gather(1, key.argsort(1)).view(-1)


def _completed(
    model: TableModel,
    c: Cloud,
    n: int,
    count: int,
    uniforms: Uniforms,
    *,
    leave: bool = False,
    lattice: bool = True,
) -> Iterator[tuple[int, Tensor, Any, Particles]]:
    """Draw ``count`` particles of each row and then what is still missing, column by column.

    Yields (place, particles that were filled in, their conditionals, the particles), and in the
    end (-1, ...) for all columns.
    """
    pick = _picks(c, n, count, uniforms)
    values = torch.empty_like(c.raw[pick])
    values[:, model.order] = c.raw[pick]
    column, ends = c.column[pick], c.ends[pick]
    p = Particles.start(model, values)
    row, draw = torch.arange(n).repeat_interleave(count), torch.arange(count).repeat(n)
    last = gaps(model, values)[1] if leave else torch.full((len(values),), -1)
    for t, i in p.walk():
        between = column == i
        hole = p.raw[:, i].isnan() & ((i > last) | (i in model.regions.at))
        at = (between | hole).nonzero()[:, 0]
        if not len(at):
            continue
        law = p.conditional(t, at, atoms=lattice)
        x = _drawn(law, uniforms, row[at], draw[at], i, leave, lattice)
        inner = between[at]
        if inner.any():
            u = uniforms(row[at][inner], draw[at][inner], i, 1)
            x[inner] = law[inner].sample_between(ends[at[inner], 0], ends[at[inner], 1], u)
        p.fill(i, at, x)
        yield i, at, law, p
    yield -1, torch.arange(0), None, p


def complete(
    model: TableModel,
    values: Tensor,
    count: int,
    uniforms: Uniforms,
    *,
    leave: bool = False,
    lattice: bool = True,
) -> Tensor:
    """Several draws of each row's missing cells given the observed ones, shape (N, count, D).

    Args:
        model: The model.
        values: Shape (N, D) in the schema's order, NaN where a cell is to be filled in.
        count: Draws per row.
        uniforms: Random numbers.
        leave: Draw also whether a missing cell stays missing, as in the data.
        lattice: Draw lattice columns and point masses as such; else from the smooth density
            around them.
    """
    n, d = values.shape
    parts = []
    for rows in _chunks(model, torch.arange(n), max(count, 1)):
        few, mine = values[rows], uniforms.at(rows)
        c = cloud(model, few, count, mine, leave=leave)
        _warn(c, count, model.regions)
        *_, (*_, p) = _completed(model, c, len(few), count, mine, leave=leave, lattice=lattice)
        filled = torch.empty_like(p.raw)
        filled[:, model.order] = p.raw
        filled = filled.view(len(few), count, d)
        parts.append(torch.where(c.dead[:, None, None], few[:, None], filled))
    return torch.cat(parts) if parts else values[:, None].expand(-1, count, -1)


def averages(model: TableModel, values: Tensor, count: int, uniforms: Uniforms) -> Tensor:
    """Means of missing numbers, most probable labels, given the observed cells; shape (N, D).

    From the exact conditional where one row of earlier columns leads to it, from ``count`` draws
    else; labels from their average probabilities.
    """
    out = values.clone()
    gap, last, _ = gaps(model, values)
    alone = (gap.sum(1) == 1) & (last < 0)
    for kind, size in ((alone, 1), (~alone, count)):
        rows = kind.nonzero()[:, 0]
        for part in _chunks(model, rows, size):
            out[part] = _averages(model, values[part], size, uniforms.at(part))
    return out


def _averages(model: TableModel, values: Tensor, count: int, uniforms: Uniforms) -> Tensor:
    """:func:`averages` of a few rows."""
    n = len(values)
    gap, last, _ = gaps(model, values)
    c = cloud(model, values, count, uniforms)
    _warn(c, 1, model.regions)
    result = values[:, model.order]
    for i, cells in enumerate(model.cells):
        at = gap[:, i] & (i <= last)
        if at.any():
            result[:, i] = torch.where(at, _mean_of(c, i, cells, n), result[:, i])
    place = torch.arange(gap.shape[1])
    alone = ~(gap & (place < last[:, None])).any(1)  # until a first gap has been drawn
    for i, at, law, p in _completed(model, c, n, count, uniforms):
        rows = (gap[:, i] & (i >= last)).nonzero()[:, 0] if i >= 0 else at
        rows = rows[torch.isin(rows, at // count)]
        if not len(rows):
            continue
        inner = torch.isin(at // count, rows).nonzero()[:, 0]
        if isinstance(law, Labels):
            share = law[inner].log_table().exp().view(len(rows), count, -1).mean(1)
            result[rows, i] = share.argmax(1).double()
        else:
            x = p.raw[at[inner], i].view(len(rows), count).mean(1)
            exact = alone[rows]
            if exact.any():
                x[exact] = law[inner.view(len(rows), count)[exact, 0]].mean_value()
            result[rows, i] = x
        alone[rows] = False
    out = torch.empty_like(result)
    out[:, model.order] = result
    return torch.where(c.dead[:, None], values, out)


def _mean_of(c: Cloud, i: int, cells: Any, n: int) -> Tensor:
    """Weighted mean, or most probable code, of column i of a cloud of n rows."""
    share, x = c.log_w.exp(), c.raw[:, i]
    if not cells.is_label:
        known = ~x.isnan()
        return torch.zeros(n, dtype=torch.float64).index_add_(0, c.row[known], (share * x)[known])
    count = len(cells.group) + 1
    code = x.nan_to_num(count - 1).long().clamp_max(count - 1)
    table = torch.zeros(n * count, dtype=torch.float64).index_add_(0, c.row * count + code, share)
    return table.view(n, count).argmax(1).double()


def _warn(c: Cloud, count: int, regions: Regions) -> None:
    """Say where cells are impossible, and where draws repeat each other."""
    if c.dead.any():
        if c.dead.all() and regions:
            told = "; ".join(f"{name!r} {words}" for name, words in regions.words.items())
            raise ValueError(
                f"no row fulfils the conditions {told}: together they are impossible, or too "
                "improbable for any draw to meet them"
            )
        warnings.warn(
            f"{int(c.dead.sum())} row(s) have observed cells outside the support of their column; "
            "their missing cells stay missing",
            stacklevel=2,
        )
    few = (c.effective < min(max(count / 4, 2), 50)) & ~c.dead
    if few.any():
        warnings.warn(
            f"the observed cells of {int(few.sum())} row(s) are so improbable given the cells "
            f"before them that the draws stand for {float(c.effective[few].min()):.0f} different "
            "ones only: condition on fewer cells, or fit a conditional model (target=, given=)",
            stacklevel=2,
        )
