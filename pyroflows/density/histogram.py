"""An adaptive histogram of one column: a density tree with generalized Pareto tails.

It owns what is abrupt: recording steps, caps, spikes, gaps. What is smooth has
:class:`pyroflows.density.scores.NormalScores` beside it; the conditional densities of
:mod:`pyroflows.density.conditionals` are mixtures of components of both kinds.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pyroflows.density.tails import tails

__all__ = ["Histogram", "density_tree", "value_cells"]


def value_cells(values: np.ndarray, step: float | None) -> np.ndarray:
    """The interval [lo, hi) that each distinct value stands for, shape (n, 2).

    A lattice value stands for its recording cell; a continuous one for as much of the gaps beside
    it as the local spacing fills, so that the end of a dense stretch is not smeared into an empty
    one.
    """
    if step:
        return np.stack([values - step / 2, values + step / 2], 1)
    gap = np.diff(values)
    m = max(1, min(8, len(gap) // 4))
    before = np.concatenate([np.full(m, np.inf), values[m:] - values[:-m]]) / m
    after = np.concatenate([values[m:] - values[:-m], np.full(m, np.inf)]) / m
    space = np.minimum(before, after)
    space = np.where(np.isfinite(space), space, np.median(gap) if len(gap) else 1.0)
    half = np.concatenate([[np.inf], gap / 2, [np.inf]])
    return np.stack(
        [values - np.minimum(half[:-1], space), values + np.minimum(half[1:], space)], 1
    )


def density_tree(
    cells: np.ndarray, count: np.ndarray, *, max_leaves: int, penalty: float
) -> np.ndarray:
    """Edges of an adaptive histogram, in the order in which greedy splitting finds them.

    A leaf is cut in two at the edge of a cell, or in three around a window of consecutive cells (a
    spike or a gap that no single cut would reveal), wherever the log-likelihood grows most; it
    stays whole when that gains less than ``penalty``.

    Args:
        cells: Disjoint increasing intervals, shape (n, 2).
        count: Weight in each, shape (n,).
        max_leaves: Stop after so many leaves.
        penalty: Log-likelihood that a cut must gain, per added edge.

    Returns:
        The inner edges, most valuable first.
    """
    edge = cells.reshape(-1)
    mass = np.stack([np.cumsum(count) - count, np.cumsum(count)], 1).reshape(-1)
    heap: list[tuple[float, int, int, list[int]]] = []

    def push(a: int, b: int) -> None:
        gained, cuts = _Leaf(edge, mass, a, b, penalty).best()
        if gained > 0:
            heapq.heappush(heap, (-gained, a, b, cuts))

    push(0, len(edge) - 1)
    found: list[float] = []
    while heap and len(found) + 1 < max_leaves:
        _, a, b, cuts = heapq.heappop(heap)
        found += [float(edge[k]) for k in cuts]
        for lo, hi in zip([a, *cuts], [*cuts, b], strict=True):
            push(lo, hi)
    return np.array(found)


def _log_lik(k: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Log-likelihood of k values spread evenly over a width."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(k > 0, k * np.log(k / width), 0.0)


@dataclasses.dataclass
class _Leaf:
    """A leaf of the density tree, from edge a to edge b.

    Attributes:
        edge: Ends of the cells, shape (2 n,).
        mass: Weight below each of them.
        a: Its first edge.
        b: Its last.
        penalty: Log-likelihood that a cut must gain.
    """

    edge: np.ndarray
    mass: np.ndarray
    a: int
    b: int
    penalty: float

    def gain(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Of cutting out [edge_i, edge_j); i = a or j = b is a single cut."""
        total = self.mass[self.b] - self.mass[self.a]
        whole = self.edge[self.b] - self.edge[self.a]
        width = self.edge[j] - self.edge[i]
        k = self.mass[j] - self.mass[i]
        g = _log_lik(k, width) + _log_lik(total - k, whole - width) - _log_lik(total, whole)
        cuts = (i > self.a).astype(float) + (j < self.b)
        good = (width > 1e-9 * whole) & (whole - width > 1e-9 * whole) & (cuts > 0)
        return np.where(good, g - self.penalty * cuts, -np.inf)

    def windows(self) -> tuple[np.ndarray, np.ndarray]:
        """Every single cut, and windows of 1, 2, 4, ... cells at every eighth of their length."""
        a, b = self.a, self.b
        inner = np.arange(a + 1, b)
        starts, ends = [np.full(len(inner), a)], [inner]
        m = 1
        while 2 * m < (b - a) // 2:
            first = np.arange(a + a % 2, b - 2 * m + 1, 2 * max(1, m // 8))
            starts.append(first)
            ends.append(first + 2 * m - 1)
            m *= 2
        return np.concatenate(starts), np.concatenate(ends)

    def best(self) -> tuple[float, list[int]]:
        """The largest gain, and the edges to cut at."""
        a, b = self.a, self.b
        if b - a < 2 or self.mass[b] <= self.mass[a] or self.edge[b] <= self.edge[a]:
            return 0.0, []
        starts, ends = self.windows()
        g = self.gain(starts, ends)
        top = int(np.argmax(g))
        i, j, gained = starts[top], ends[top], g[top]
        if i > a:  # each end of the window to its best place, the other fixed
            for _ in range(2):
                last = np.arange(i + 1, b + 1)
                j = last[int(np.argmax(self.gain(np.full(len(last), i), last)))]
                first = np.arange(a, j)
                g = self.gain(first, np.full(len(first), j))
                i, gained = first[int(np.argmax(g))], float(g.max())
        return float(gained), [int(k) for k in (i, j) if a < k < b]


class Histogram(nn.Module):
    r"""A piecewise-uniform density with generalized Pareto tails, its pieces grouped into bins.

    .. math:: f(x) = m_i / w_i \text{ in piece } i, \qquad
        f(x_n + t) = \frac{m_n}{\beta}\,(1 + \xi t/\beta)^{-1 - 1/\xi} \text{ beyond the last edge}

    Bin 0 is the lower tail and the last bin the upper one; the bins between are unions of
    neighbouring pieces. A conditional model reweights the bins and keeps the shape inside.

    Args:
        edges: Increasing edges of the pieces, shape (n + 1,).
        mass: Probability of the lower tail, the n pieces, and the upper tail, shape (n + 2,).
        group: Bin of each of them, nondecreasing from 0, shape (n + 2,).
        scale: :math:`\beta` of the lower and upper tail, shape (2,).
        shape: :math:`\xi \ge 0` of the lower and upper tail, shape (2,).
    """

    def __init__(
        self, edges: Tensor, mass: Tensor, group: Tensor, scale: Tensor, shape: Tensor
    ) -> None:
        super().__init__()
        mass = mass / mass.sum()
        for name, value in dict(edges=edges, mass=mass, scale=scale, xi=shape).items():
            self.register_buffer(name, value.double())
        self.register_buffer("group", group.long())
        self._index()

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Histogram:
        """From what ``state_dict`` gave."""
        return cls(*(state[name] for name in ("edges", "mass", "group", "scale", "xi")))

    def _index(self) -> None:
        bins = int(self.group[-1]) + 1
        bin_mass = self.mass.new_zeros(bins).index_add_(0, self.group, self.mass)
        below = torch.cat([self.mass.new_zeros(1), self.mass.cumsum(0)])[:-1]
        first = torch.cat([self.mass.new_zeros(1), bin_mass.cumsum(0)])[:-1]
        self.register_buffer("bin_mass", bin_mass, persistent=False)
        self.register_buffer("_before", (below - first[self.group]).clamp_min(0), persistent=False)

    @property
    def num_bins(self) -> int:
        """Number of bins, the two tails included."""
        return len(self.bin_mass)

    def _tail(self, t: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Log survival and log density of the excess t >= 0 in tail 0 or 1."""
        beta, xi = self.scale[side], self.xi[side]
        grown = torch.log1p((xi * t / beta).clamp_min(-1))
        inside = xi * t / beta >= -1
        log_density = torch.where(xi == -1, -beta.log(), -grown * (1 + 1 / xi) - beta.log())
        return -grown / xi, torch.where(inside, log_density, -torch.inf)

    def log_density(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The bin of each value and the log-density inside it (integrating to 1 over the bin)."""
        piece = torch.bucketize(x.detach().contiguous(), self.edges, right=True)
        width = (self.edges[1:] - self.edges[:-1]).clamp_min(1e-300)
        padded = torch.cat([width[:1], width, width[-1:]])
        group = self.group[piece]
        inside = (self.mass / self.bin_mass[self.group]).clamp_min(1e-300).log()[piece] - padded[
            piece
        ].log()
        lower = self._tail((self.edges[0] - x).clamp_min(0), 0)[1]
        upper = self._tail((x - self.edges[-1]).clamp_min(0), 1)[1]
        last = len(self.edges)
        out = torch.where(piece == 0, lower, torch.where(piece == last, upper, inside))
        return group, torch.where(x.isnan(), x, out)

    def log_cell(self, x: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """The bin of the lattice cell around x and its log-share of the bin, per unit of x."""
        group, out = self.log_density(x)
        for side, sign in ((0, -1.0), (1, 1.0)):
            excess = sign * (x - self.edges[-side])
            near, far = (
                self._tail((excess + h * step).clamp_min(0), side)[0] for h in (-0.5, 0.5)
            )
            tail = (near.exp() - far.exp()).clamp_min(1e-300).log() - math.log(step)
            out = torch.where((excess > 0) & out.isfinite(), tail, out)
        return group, out

    def cdf_in_bin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The bin of each value and the share of the bin below it."""
        piece = torch.bucketize(x.detach().contiguous(), self.edges, right=True)
        last = len(self.edges)
        i = piece.clamp(1, last - 1)
        part = (x - self.edges[i - 1]) / (self.edges[i] - self.edges[i - 1]).clamp_min(1e-300)
        group = self.group[piece]
        share = (self._before[piece] + part.clamp(0, 1) * self.mass[piece]) / self.bin_mass[group]
        lower = self._tail((self.edges[0] - x).clamp_min(0), 0)[0].exp()
        upper = -torch.expm1(self._tail((x - self.edges[-1]).clamp_min(0), 1)[0])
        return group, torch.where(
            piece == 0, lower, torch.where(piece == last, upper, share)
        ).clamp(0, 1)

    def cdf(self, x: Tensor) -> Tensor:
        """Distribution function, shape (N,)."""
        group, share = self.cdf_in_bin(x)
        return self.bin_mass.cumsum(0)[group] - (1 - share) * self.bin_mass[group]

    def icdf_in_bin(self, group: Tensor, share: Tensor) -> Tensor:
        """The value below which lies ``share`` of bin ``group``; inverse of :meth:`cdf_in_bin`."""
        below = torch.cat([self.mass.new_zeros(1), self.mass.cumsum(0)])
        first = torch.cat([self.mass.new_zeros(1), self.bin_mass.cumsum(0)])
        u = first[group] + share * self.bin_mass[group]
        last = len(self.edges)
        i = (torch.searchsorted(below, u, right=True) - 1).clamp(1, last - 1)
        part = ((u - below[i]) / self.mass[i].clamp_min(1e-300)).clamp(0, 1)
        x = self.edges[i - 1] + part * (self.edges[i] - self.edges[i - 1])

        def excess(log_survival: Tensor, side: int) -> Tensor:
            return self.scale[side] * torch.expm1(-self.xi[side] * log_survival) / self.xi[side]

        lower = self.edges[0] - excess(share.clamp_min(1e-12).log(), 0)
        upper = self.edges[-1] + excess((1 - share).clamp_min(1e-12).log(), 1)
        last_bin = self.num_bins - 1
        return torch.where(group == 0, lower, torch.where(group == last_bin, upper, x))

    @classmethod
    def fit(
        cls,
        values: np.ndarray,
        *,
        step: float | None = None,
        lower: float | None = None,
        upper: float | None = None,
        max_bins: int = 64,
        max_pieces: int = 512,
    ) -> Histogram:
        """The histogram of a sample.

        Args:
            values: Finite values, shape (n,), at least one.
            step: Recording step of a lattice column, else None.
            lower: Lower end of the support, if it has one.
            upper: Upper end of the support, if it has one.
            max_bins: Bins, the two tails included.
            max_pieces: Pieces.
        """
        level, count = np.unique(values, return_counts=True)
        n = len(values)
        # Too many levels to tell one by one, or hardly any repeated: not each is a spike.
        dense = step is not None and (len(level) > 1 << 14 or len(level) > 0.95 * n > 100)
        cells = value_cells(level, None if dense else step)
        if step:
            lower, upper = _shifted(lower, -step / 2), _shifted(upper, step / 2)
            cells = level[0] + (np.round((cells - level[0]) / step - 0.5) + 0.5) * step
            cells[:, 1] = np.maximum(cells[:, 1], cells[:, 0])
        lo, hi = cells[0, 0], cells[-1, 1]
        if step and len(level) <= max_bins // 2:
            coarse = inner = np.unique(cells.reshape(-1)[1:-1])
        else:
            penalty = 1.5 * math.log(n + 1) + 2
            inner = density_tree(
                cells, count.astype(float), max_leaves=max_pieces, penalty=penalty
            )
            coarse = inner[: max_bins // 2]
            fine = _shares(values, level, step, np.unique([lo, *coarse, hi]), max_bins)
            coarse, inner = np.concatenate([coarse, fine]), np.concatenate([inner, fine])
        edges = np.unique(np.concatenate([[lo], inner, [hi]]))
        edges = edges[(edges >= lo) & (edges <= hi)]
        mass = np.histogram(values, edges)[0].astype(float)
        width = np.diff(edges)
        mass += 0.5 * width / width.sum() + 1e-3  # a little everywhere, for rows to come
        # Half an observation, or 1e-4, beyond either end, unless the support ends there too.
        outside = [
            0.0 if x is not None and abs(x - e) < 1e-9 * (hi - lo) else max(0.5, 1e-4 * n)
            for x, e in ((lower, lo), (upper, hi))
        ]
        starts = np.isin(edges[:-1], coarse)
        group = np.concatenate([[0], 1 + np.cumsum(starts), [2 + starts.sum()]])
        floor = max(step or 0.0, 1e-6 * (hi - lo))
        scale, shape = tails(values, lo, hi, lower, upper, floor=floor)
        mass = np.concatenate([outside[:1], mass, outside[1:]])
        return cls(*map(torch.as_tensor, (edges, mass, group, scale, shape)))


def _shares(
    values: np.ndarray, level: np.ndarray, step: float | None, marks: np.ndarray, max_bins: int
) -> np.ndarray:
    """Edges of equal shares of a sample, between the marks that are there already.

    None falls inside a stretch that is one level or holds too few values.
    """
    shares = int(min(max_bins // 2, len(values) // 150))
    fine = np.quantile(values, np.linspace(0, 1, shares + 1)[1:-1]) if shares > 1 else np.empty(0)
    if step:
        fine = level[np.searchsorted(level, fine).clip(0, len(level) - 1)] + step / 2
    place = np.searchsorted(marks, fine, side="right") - 1
    held = np.diff(np.searchsorted(level, marks))
    mass = np.histogram(values, marks)[0] / len(values)
    inside = (place >= 0) & (place < len(held))
    place, fine = place[inside], fine[inside]
    return np.unique(fine[(held[place] > 1) & (mass[place] > 2.0 / max_bins)])


def _shifted(x: float | None, by: float) -> float | None:
    return None if x is None else x + by
