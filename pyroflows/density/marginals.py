"""One column at a time: an adaptive histogram and a smooth map to normal scores, both exact.

A numeric column is described twice. The *histogram* (a density tree with generalized Pareto tails)
owns what is abrupt: recording steps, caps, spikes, gaps. The *smooth map* s(x), a monotone
rational-quadratic spline through few quantiles, gives the scale on which a conditional mixture of
logistics is a good model. The conditional densities of :mod:`pyroflows.density.network` are
mixtures of components of both kinds.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Histogram", "NormalScores", "density_tree", "value_cells"]


def value_cells(values: np.ndarray, count: np.ndarray, step: float | None) -> np.ndarray:
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

    def log_lik(k: np.ndarray, width: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(k > 0, k * np.log(k / width), 0.0)

    def best(a: int, b: int) -> tuple[float, list[int]]:
        total, lo, hi = mass[b] - mass[a], edge[a], edge[b]
        if b - a < 2 or total <= 0 or hi <= lo:
            return 0.0, []
        whole = log_lik(total, hi - lo)

        def gain(i: np.ndarray, j: np.ndarray) -> np.ndarray:
            """Cut out [edge_i, edge_j); i = a or j = b is a single cut."""
            width = edge[j] - edge[i]
            k = mass[j] - mass[i]
            g = log_lik(k, width) + log_lik(total - k, (hi - lo) - width) - whole
            cuts = (i > a).astype(float) + (j < b)
            good = (width > 1e-9 * (hi - lo)) & (hi - lo - width > 1e-9 * (hi - lo)) & (cuts > 0)
            return np.where(good, g - penalty * cuts, -np.inf)

        inner = np.arange(a + 1, b)
        starts, ends = [np.full(len(inner), a)], [inner]
        m = 1
        while 2 * m < (b - a) // 2:  # windows of m cells at every eighth of their length
            first = np.arange(a + a % 2, b - 2 * m + 1, 2 * max(1, m // 8))
            starts.append(first)
            ends.append(first + 2 * m - 1)
            m *= 2
        i, j = np.concatenate(starts), np.concatenate(ends)
        g = gain(i, j)
        top = int(np.argmax(g))
        i0, j0, g0 = i[top], j[top], g[top]
        if i0 > a:  # each end of the window to its best place, the other fixed
            for _ in range(2):
                ends_ = np.arange(i0 + 1, b + 1)
                g_ = gain(np.full(len(ends_), i0), ends_)
                j0 = ends_[int(np.argmax(g_))]
                starts_ = np.arange(a, j0)
                g_ = gain(starts_, np.full(len(starts_), j0))
                i0, g0 = starts_[int(np.argmax(g_))], float(g_.max())
        return float(g0), [int(k) for k in (i0, j0) if a < k < b]

    heap: list[tuple[float, int, int, list[int]]] = []

    def push(a: int, b: int) -> None:
        gained, cuts = best(a, b)
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
        cells = value_cells(level, count, None if dense else step)
        if step:
            lower, upper = _shifted(lower, -step / 2), _shifted(upper, step / 2)
            cells = level[0] + (np.round((cells - level[0]) / step - 0.5) + 0.5) * step
            cells[:, 1] = np.maximum(cells[:, 1], cells[:, 0])
        lo, hi = cells[0, 0], cells[-1, 1]
        if step and len(level) <= max_bins // 2:
            inner = np.unique(cells.reshape(-1)[1:-1])
            coarse = inner
        else:
            inner = density_tree(
                cells,
                count.astype(float),
                max_leaves=max_pieces,
                penalty=1.5 * math.log(n + 1) + 2,
            )
            coarse = inner[: max_bins // 2]
            # Equal shares between the cuts, but never inside a stretch that is one level or holds
            # too few values.
            shares = int(min(max_bins // 2, n // 150))
            fine = (
                np.quantile(values, np.linspace(0, 1, shares + 1)[1:-1])
                if shares > 1
                else np.empty(0)
            )
            if step:
                fine = level[np.searchsorted(level, fine).clip(0, len(level) - 1)] + step / 2
            marks = np.unique(np.concatenate([[lo], coarse, [hi]]))
            place = np.searchsorted(marks, fine, side="right") - 1
            held = np.diff(np.searchsorted(level, marks))
            mass = np.histogram(values, marks)[0] / n
            inside = (place >= 0) & (place < len(held))
            place, fine = place[inside], fine[inside]
            fine = np.unique(fine[(held[place] > 1) & (mass[place] > 2.0 / max_bins)])
            coarse = np.concatenate([coarse, fine])
            inner = np.concatenate([inner, fine])
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
        scale, shape = tails(
            values, lo, hi, lower, upper, floor=max(step or 0.0, 1e-6 * (hi - lo))
        )
        return cls(
            torch.as_tensor(edges),
            torch.as_tensor(np.concatenate([outside[:1], mass, outside[1:]])),
            torch.as_tensor(group),
            torch.as_tensor(scale),
            torch.as_tensor(shape),
        )


def _shifted(x: float | None, by: float) -> float | None:
    return None if x is None else x + by


def tails(
    values: np.ndarray,
    lo: float,
    hi: float,
    lower: float | None,
    upper: float | None,
    *,
    floor: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shape of the tails beyond lo and hi, which end at the bounds."""
    out = []
    for sign, end, bound in ((-1, lo, lower), (1, hi, upper)):
        beta, xi = tail_index(sign * values)
        room = np.inf if bound is None else max(sign * (bound - end), 1e-9 * max(hi - lo, floor))
        out.append(_ended(max(beta, floor), xi, room))
    scale, shape = np.array(out).T
    return scale, shape


def _ended(beta: float, xi: float, room: float) -> tuple[float, float]:
    """A tail that ends after ``room``: uniform if it would reach there, else of its own scale."""
    if not np.isfinite(room):
        return beta, xi
    return (room, -1.0) if beta >= room else (beta, -beta / room)


def tail_index(values: np.ndarray) -> tuple[float, float]:
    """Scale and shape of the generalized Pareto law beyond the maximum, by L-moments.

    References:
        Hosking and Wallis (1987), Parameter and quantile estimation for the generalized Pareto
        distribution.
    """
    k = int(min(max(10, len(values) // 50), 500, len(values) - 1))
    if k < 5:
        spread = float(np.std(values)) or 1.0
        return spread, 0.2
    top = np.sort(np.partition(values, len(values) - k - 1)[-k - 1 :])
    excess = top[1:] - top[0]
    b0 = excess.mean()
    b1 = (excess * (k - np.arange(1, k + 1)) / (k - 1)).mean()
    if b0 <= 0 or b0 - 2 * b1 <= 0:
        return float(max(b0, 0.0)), 0.2
    xi = float(np.clip(2 - b0 / (b0 - 2 * b1), 0.05, 0.9))
    beta = b0 * (1 - xi)
    return float(beta + xi * (top[-1] - top[0])), xi


class NormalScores(nn.Module):
    r"""A smooth increasing map s of the real line that makes a column roughly standard normal.

    A monotone rational-quadratic spline through quantiles, and beyond its ends
    :math:`s(x_K + t) = z_K + s'_K\,\frac{\beta}{\xi}\log(1 + \xi t / \beta)`, which maps Pareto
    tails to exponential ones.

    Args:
        knots: Increasing x, shape (K,), K >= 2.
        scores: Increasing z, shape (K,).
        slopes: Positive ds/dx at the knots, shape (K,).
        scale: Tail scale :math:`\beta` at either end, shape (2,).
        shape: Tail shape :math:`\xi` at either end, shape (2,).

    References:
        Gregory and Delbourgo (1982), Piecewise rational quadratic interpolation to monotonic data.
    """

    def __init__(
        self, knots: Tensor, scores: Tensor, slopes: Tensor, scale: Tensor, shape: Tensor
    ) -> None:
        super().__init__()
        for name, value in dict(
            knots=knots, scores=scores, slopes=slopes, scale=scale, xi=shape
        ).items():
            self.register_buffer(name, value.double())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores s(x) and log s'(x)."""
        k = (torch.bucketize(x.detach().contiguous(), self.knots) - 1).clamp(
            0, len(self.knots) - 2
        )
        w, h = self.knots[k + 1] - self.knots[k], self.scores[k + 1] - self.scores[k]
        d0, d1, delta = self.slopes[k], self.slopes[k + 1], h / w
        t = ((x - self.knots[k]) / w).clamp(0, 1)
        den = delta + (d0 + d1 - 2 * delta) * t * (1 - t)
        s = self.scores[k] + h * (delta * t * t + d0 * t * (1 - t)) / den
        log_slope = (
            2 * delta.log()
            + (d1 * t * t + 2 * delta * t * (1 - t) + d0 * (1 - t) ** 2).log()
            - 2 * den.log()
        )
        for side, sign in ((0, -1.0), (1, 1.0)):
            beta, xi = self.scale[side], self.xi[side]
            end, d = self.knots[-side], self.slopes[-side]
            excess = (sign * (x - end)).clamp_min(0)
            grown = torch.log1p((xi * excess / beta).clamp_min(-1 + 1e-9))
            s = s + sign * d * beta / xi * grown
            log_slope = log_slope - grown
        return s, log_slope

    def inverse(self, s: Tensor) -> Tensor:
        """The x with s(x) = s."""
        k = (torch.bucketize(s.contiguous(), self.scores) - 1).clamp(0, len(self.knots) - 2)
        w, h = self.knots[k + 1] - self.knots[k], self.scores[k + 1] - self.scores[k]
        d0, d1, delta = self.slopes[k], self.slopes[k + 1], h / w
        y = (s - self.scores[k]).clamp_min(0).minimum(h)
        curve = d0 + d1 - 2 * delta
        a = h * (delta - d0) + y * curve
        b = h * d0 - y * curve
        c = -delta * y
        root = 2 * c / (-b - (b * b - 4 * a * c).clamp_min(0).sqrt())
        x = self.knots[k] + w * root.clamp(0, 1)
        for side, sign in ((0, -1.0), (1, 1.0)):
            beta, xi = self.scale[side], self.xi[side]
            grown = (
                (sign * (s - self.scores[-side])).clamp_min(0) * xi / (self.slopes[-side] * beta)
            )
            x = x + sign * beta / xi * torch.expm1(grown.clamp_max(60))
        return x

    @classmethod
    def fit(
        cls,
        values: np.ndarray,
        *,
        lower: float | None = None,
        upper: float | None = None,
        max_knots: int = 32,
    ) -> NormalScores:
        """The map of a sample of at least one finite value.

        A small sample gets a straight line, unless its shape is far from normal: a mixture on the
        original scale then needs fewer parameters than the map would.
        """
        n = len(values)
        spread = float(np.std(values))
        if not spread > 4 * np.finfo(float).eps * float(np.abs(values).max()):
            spread = max(abs(float(values[0])), 1.0) * 1e-3
        edge = float(torch.special.ndtri(torch.tensor(1 - min(0.25, 8 / n), dtype=torch.float64)))
        count = int(np.clip(round(n ** (1 / 3)), 3, max_knots))
        z = torch.linspace(-edge, edge, count, dtype=torch.float64)
        x = np.quantile(values, torch.special.ndtr(z).numpy())
        keep = np.concatenate([[True], np.diff(x) > 1e-6 * spread])
        place = np.cumsum(keep) - 1
        score = np.bincount(place, z.numpy()) / np.bincount(place)  # tied knots: their mean score
        x = x[keep]
        middle = float(np.mean(values))
        skew = abs(np.mean(((values - middle) / spread) ** 3))
        rooms = [
            np.inf if bound is None else sign * (bound - middle) - 2 * spread
            for sign, bound in ((-1, lower), (1, upper))
        ]
        plain = len(x) < 2 or (n < 1000 and skew < 1.0 and min(rooms) >= 2 * spread)
        if plain:
            x, score = middle + 2 * spread * np.array([-1.0, 1.0]), np.array([-2.0, 2.0])
        delta = np.diff(score) / np.diff(x)
        inner = delta[:-1] * delta[1:] / ((delta[:-1] + delta[1:]) / 2)
        slopes = np.concatenate([delta[:1], inner, delta[-1:]])
        scale, shape = tails(values, x[0], x[-1], lower, upper, floor=1e-9 * spread)
        if plain:
            rooms = [room if room > 0 else np.inf for room in rooms]
            scale, shape = np.array([_ended(10 * spread, 0.05, room) for room in rooms]).T
        else:
            for side in (0, -1):
                room = -scale[side] / shape[side] if shape[side] < 0 else np.inf
                if room > 2 * spread:  # no bound, or a far one
                    beta = max(scale[side], 1 / (3 * slopes[side] * max(edge, 1.0)))
                    scale[side], shape[side] = _ended(beta, max(shape[side], 0.05), room)
                    # Mills' ratio: beyond z an exponential tail of scale beta has normal scores of
                    # slope 1 / (beta z).
                    best = 1 / (scale[side] * max(edge, 1.0))
                    slopes[side] = float(np.clip(best, slopes[side] / 10, slopes[side] * 3))
                if shape[side] < 0:  # so steep that the density does not pile up at the bound
                    slopes[side] = max(slopes[side], 1 / room)
        as_tensor = torch.as_tensor
        return cls(
            as_tensor(x), as_tensor(score), as_tensor(slopes), as_tensor(scale), as_tensor(shape)
        )
