"""Smooth scales for columns: increasing maps between normal scores and the data, all fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.bijection import Bijection
from pyroflows.density.histogram import Histogram
from pyroflows.density.tails import ended, tails
from pyroflows.splines import rational_quadratic

__all__ = ["Marginals", "NormalScores"]


class NormalScores(Bijection):
    r"""An increasing map from standard normal scores to a column's values, and back.

    A monotone rational-quadratic spline through quantiles, whose inverse s is, beyond the ends,
    :math:`s(x_K + t) = z_K + s'_K\,\frac{\beta}{\xi}\log(1 + \xi t / \beta)`, which maps Pareto
    tails to exponential ones. A knot that is repeated lets the slope jump there.

    Args:
        knots: Values x, not decreasing, shape (K,), K >= 2.
        scores: Their scores z, not decreasing, shape (K,).
        slopes: Positive dz/dx at the knots, shape (K,).
        scale: Tail scale :math:`\beta` at either end, shape (2,).
        shape: Tail shape :math:`\xi` at either end, not 0; below 0 the tail ends after
            :math:`-\beta / \xi`; shape (2,).

    References:
        Gregory and Delbourgo (1982), Piecewise rational quadratic interpolation to monotonic data.
    """

    domain = codomain = constraints.real
    knots: Tensor
    scores: Tensor
    slopes: Tensor
    scale: Tensor
    xi: Tensor

    def __init__(
        self, knots: Tensor, scores: Tensor, slopes: Tensor, scale: Tensor, shape: Tensor
    ) -> None:
        super().__init__()
        for name, value in dict(
            knots=knots, scores=scores, slopes=slopes, scale=scale, xi=shape
        ).items():
            self.register_buffer(name, value.double())

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> NormalScores:
        """From what ``state_dict`` gave."""
        return cls(*(state[name] for name in ("knots", "scores", "slopes", "scale", "xi")))

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        s, (out, log_slope) = x, self._inside(x, inverse=True)
        for side, sign in ((0, -1.0), (1, 1.0)):
            beta, xi = self.scale[side], self.xi[side]
            excess = (sign * (s - self.scores[-side])).clamp_min(0)
            grown = (excess * xi / (self.slopes[-side] * beta)).clamp_max(60)
            out = out + sign * beta / xi * torch.expm1(grown)
            log_slope = log_slope + grown
        return out, log_slope

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        out, log_slope = self._inside(y, inverse=False)
        for side, sign in ((0, -1.0), (1, 1.0)):
            beta, xi = self.scale[side], self.xi[side]
            excess = (sign * (y - self.knots[-side])).clamp_min(0)
            grown = torch.log1p((xi * excess / beta).clamp_min(-1 + 1e-9))
            out = out + sign * self.slopes[-side] * beta / xi * grown
            log_slope = log_slope - grown
        return out, log_slope

    def _inside(self, value: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """The spline from values to scores, or its inverse; a value beyond counts as its end."""
        grid = self.scores if inverse else self.knots
        # the first of equal knots: what lies between them is empty
        k = torch.bucketize(value.detach().contiguous(), grid) - 1
        k = k.clamp(0, len(grid) - 2)
        at = torch.stack([k, k + 1])
        ends = torch.stack([self.knots[at], self.scores[at]])
        out, log_slope, *_ = rational_quadratic(value, ends, self.slopes[at], inverse=inverse)
        return out, log_slope

    def rescaled(self, unit: float) -> NormalScores:
        """The map of the column in another unit: its values times ``unit``."""
        parts = self.knots * unit, self.scores, self.slopes / unit, self.scale * unit, self.xi
        return NormalScores(*parts)

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
        x, score = _quantiles(
            values, edge, int(np.clip(round(n ** (1 / 3)), 3, max_knots)), spread
        )
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
            scale, shape = np.array([ended(10 * spread, 0.05, room) for room in rooms]).T
        else:
            for side in (0, -1):
                law = scale[side], shape[side], slopes[side]
                scale[side], shape[side], slopes[side] = _joined(*law, edge, 2 * spread)
        return cls(*map(torch.as_tensor, (x, score, slopes, scale, shape)))

    @classmethod
    def of(
        cls,
        hist: Histogram,
        *,
        lower: float = -math.inf,
        upper: float = math.inf,
        spacing: float = 0.1,
    ) -> NormalScores:
        """The map that makes what a histogram describes standard normal.

        Args:
            hist: The histogram.
            lower: Where the support ends, as the map then does.
            upper: Likewise.
            spacing: Largest distance of neighbouring knots in scores; the map bends between two
                knots of a piece as the histogram asks within 1e-3 in log-density.
        """
        edges, mass = hist.edges.numpy().copy(), hist.mass.numpy().copy()
        ends = mass[0] == 0 or edges[0] <= lower, mass[-1] == 0 or edges[-1] >= upper
        edges[0], edges[-1] = max(edges[0], lower), min(edges[-1], upper)
        for side, inner, bounded in ((0, 1, ends[0]), (-1, -2, ends[1])):
            if bounded:
                mass[inner] += mass[side]
                mass[side] = 0
        below = mass[:-1].cumsum()
        # where the support ends, a ten-thousandth of the sample is the tail
        cut = below.copy()
        cut[0] = max(cut[0], min(1e-4, mass[1] / 4))
        cut[-1] = min(cut[-1], 1 - min(1e-4, mass[-2] / 4))
        z = ndtri(cut)
        counts = np.maximum(np.ceil(np.diff(z) / spacing), 1).astype(int)
        score = np.concatenate(
            [np.linspace(a, b, m + 1) for a, b, m in zip(z[:-1], z[1:], counts, strict=True)]
        )
        piece = np.repeat(np.arange(len(counts)), counts + 1)
        part = np.clip((ndtr(score) - below[piece]) / mass[1 + piece], 0, 1)
        starts = np.flatnonzero(np.diff(piece)) + 1  # an edge twice, and twice the same number
        part[starts], part[starts - 1] = 0.0, 1.0
        right = edges[piece + 1]
        x = np.where(part == 1, right, edges[piece] + part * (right - edges[piece]))
        per_score = np.sqrt(2 * np.pi) * np.exp(score**2 / 2)
        slopes = (mass[1:-1] / np.diff(edges))[piece] * per_score
        scale, shape = hist.scale.numpy().copy(), hist.xi.numpy().copy()
        for side, room, bounded in (
            (0, x[0] - edges[0], ends[0]),
            (-1, edges[-1] - x[-1], ends[1]),
        ):
            if bounded:
                scale[side], shape[side] = room, -1.0
                slopes[side] = max(slopes[side], 1 / room)
            else:  # as tall as the histogram beyond the edge
                slopes[side] = mass[side] / scale[side] * per_score[side]
        return cls(*map(torch.as_tensor, (x, score, slopes, scale, shape)))


def ndtri(u: np.ndarray) -> np.ndarray:
    """Standard normal quantiles."""
    return torch.special.ndtri(torch.as_tensor(u)).numpy()


def ndtr(z: np.ndarray) -> np.ndarray:
    """Standard normal distribution function."""
    return torch.special.ndtr(torch.as_tensor(z)).numpy()


def _quantiles(
    values: np.ndarray, edge: float, count: int, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles at scores from -edge to edge, and their scores; tied ones have the mean one."""
    z = torch.linspace(-edge, edge, count, dtype=torch.float64)
    x = np.quantile(values, torch.special.ndtr(z).numpy())
    keep = np.concatenate([[True], np.diff(x) > 1e-6 * spread])
    place = np.cumsum(keep) - 1
    return x[keep], np.bincount(place, z.numpy()) / np.bincount(place)


def _joined(
    scale: float, shape: float, slope: float, edge: float, far: float
) -> tuple[float, float, float]:
    """Scale and shape of a tail and the slope where it begins, so that all fit together.

    Args:
        scale: Of the tail of the sample.
        shape: Likewise.
        slope: Of the spline at its end.
        edge: Score there.
        far: Room beyond which an end of the support is as good as none.
    """
    room = -scale / shape if shape < 0 else np.inf
    if room > far:
        beta = max(scale, 1 / (3 * slope * max(edge, 1.0)))
        scale, shape = ended(beta, max(shape, 0.05), room)
        # Mills' ratio: beyond z an exponential tail of scale beta has normal scores of
        # slope 1 / (beta z).
        best = 1 / (scale * max(edge, 1.0))
        slope = float(np.clip(best, slope / 10, slope * 3))
    if shape < 0:  # so steep that the density does not pile up at the bound
        slope = max(slope, 1 / room)
    return scale, shape, slope


class Marginals(Bijection):
    """Each number by a fixed map of its own, from scores to data: the data side of a table's flow.

    Args:
        parts: The maps, one for each number, all of one dtype.
    """

    def __init__(self, parts: Sequence[Bijection]) -> None:
        super().__init__([len(parts)])
        self.parts = nn.ModuleList(parts)

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._each([p.forward_and_log_det for p in self.parts], x)

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._each([p.inverse_and_log_det for p in self.parts], y)

    @staticmethod
    def _each(maps: Sequence[Any], value: Tensor) -> tuple[Tensor, Tensor]:
        outs, log_slopes = zip(
            *(f(v) for f, v in zip(maps, value.unbind(-1), strict=True)), strict=True
        )
        return torch.stack(outs, -1), torch.stack(log_slopes).sum(0)
