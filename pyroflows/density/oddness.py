"""From surprises to shares of held-out rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

__all__ = ["Oddness", "Tail", "by_quantiles"]

KNOTS = 48  # of a calibration
BEYOND = 0.01  # share of the held-out rows past which the tail is extrapolated
FAR = 0.03  # the same, of distances
CLOSE = 0.03  # least scale of log-distances: where a column ends, held-out ones end too
SURER = 3.0  # nats by which a distance must be rarer than a surprise, to speak for a cell
FEW = 16  # knots of what matters in its tail alone


@dataclasses.dataclass
class Tail:
    """Share of held-out values at least as large, in nats: ``-log S(x)``.

    Piecewise linear between held-out values, exponential beyond the largest hundredth of them.

    Args:
        at: Values, increasing, shape (K,).
        nats: ``-log S`` there, shape (K,).
        scale: Mean excess of the largest values; beyond the last knot ``-log S`` rises with slope
            ``1 / scale``.
    """

    at: Tensor
    nats: Tensor
    scale: float

    @classmethod
    def fit(
        cls,
        x: Tensor,
        weight: Tensor,
        *,
        prior: float | None = None,
        beyond: float = BEYOND,
        knots: int = KNOTS,
    ) -> Self:
        """From held-out values, shape (N,).

        Args:
            x: Values; NaN and infinity are left out, ``-inf`` is smaller than any.
            weight: Of the rows.
            prior: The scale that the tail should have, worth ten rows; None for none.
            beyond: Share of the rows past which the tail is extrapolated.
            knots: At most so many.
        """
        keep = (x < torch.inf) & (weight > 0)
        x, order = x[keep].double().sort(descending=True)
        weight = weight[keep].double()[order]
        if not bool(x.isfinite().any()):
            one = torch.zeros(1, dtype=torch.float64)
            return cls(one, one, 1.0 if prior is None else prior)
        share = weight.cumsum(0) / weight.sum()
        last = torch.ones(len(x), dtype=torch.bool)
        last[:-1] = x[:-1] > x[1:]  # where values repeat, all of them are as large
        last &= x.isfinite()
        value, share = x[last], share[last]
        inner = (share >= max(beyond, min(5 / len(x), 1 - 1e-9))).nonzero()[:, 0]
        first = int(inner[0]) if len(inner) else len(value) - 1
        pick = torch.linspace(math.log(first + 1), math.log(len(value)), knots, dtype=share.dtype)
        pick = (pick.exp().round().long() - 1).clamp(first, len(value) - 1).unique().flip(0)
        above = (x > value[first]).nonzero()[:, 0]
        excess, mass = x[above] - value[first], weight[above] / weight.mean()
        most = min(max(1, len(above) // 10), len(above))  # planted rows must not set the scale:
        excess[:most] = excess[most] if most < len(above) else 0.0  # known to be larger, no more
        start = 0.0 if prior is None else 10.0
        total = (mass * excess).sum() + start * (prior or 0.0)
        scale = float(total / (mass[most:].sum() + start).clamp_min(1e-9))
        tiny = 1e-3 * (1 + abs(float(value[first])))
        return cls(value[pick], -share[pick].log(), max(scale, tiny))

    def __call__(self, x: Tensor) -> Tensor:
        """``-log S(x)``, of any shape; infinite where x is, 0 below all knots."""
        right = torch.searchsorted(self.at, x.contiguous()).clamp(0, len(self.at) - 1)
        left = (right - 1).clamp_min(0)
        width = (self.at[right] - self.at[left]).clamp_min(1e-300)
        part = ((x - self.at[left]) / width).clamp(0, 1)
        inner = self.nats[left] + part * (self.nats[right] - self.nats[left])
        inner = torch.where(x < self.at[0], 0.0, inner)
        return inner + (x - self.at[-1]).clamp_min(0) / self.scale

    def to_json(self) -> list[list[float]]:
        """Plain lists."""
        return [self.at.tolist(), self.nats.tolist(), [self.scale]]

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Inverse of :meth:`to_json`."""
        at, nats, (scale,) = (torch.tensor(part, dtype=torch.float64) for part in data)
        return cls(at, nats, float(scale))


def by_quantiles(held: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Minus log-share of held-out values, of which quantiles are known, that are as large as x."""
    known = torch.as_tensor(np.ascontiguousarray(held), dtype=torch.float64)
    return Tail.fit(known, torch.ones_like(known))(torch.from_numpy(x)).numpy()


@dataclasses.dataclass
class Oddness:
    """What held-out rows say of cells and rows: from surprises to shares of rows.

    Cells come with several statistics, shape (S, N, T), as
    :func:`~pyroflows.density.surprise.surprises` gives them, the first of which is in nats; a cell
    is as odd as the rarest of them says. A row is as odd as its oddest cell, or as all of them
    together: one impossible cell is not drowned by twenty ordinary ones, and twenty strange ones
    add up.

    Args:
        tails: For each statistic and target, its tail.
        rarest: For each target, the tail of the rarest statistic; none for one statistic, which
            files of older versions hold.
        most: The tail of a row's oddest cell, in excess of what so many cells have.
        total: The tail of the sum of its cells, each less its mean of one.
        row: The tail of the rarer of both.
    """

    tails: list[list[Tail]]
    rarest: list[Tail]
    most: Tail
    total: Tail
    row: Tail

    @classmethod
    def fit(cls, seen: Tensor, weight: Tensor) -> Self:
        """From the statistics of held-out cells, and the weights of their rows."""
        tails = [[_sober(Tail.fit(x, weight, prior=1.0), 1.0) for x in seen[0].T]]
        for far in seen[1:]:
            tails += [[_sober(Tail.fit(x, weight, beyond=FAR, knots=FEW), CLOSE) for x in far.T]]
        blank = Tail.fit(seen[0, :0, 0], weight[:0])
        out = cls(tails, [], blank, blank, blank)
        odd = out.calibrated(seen)
        out.rarest = [_sober(Tail.fit(x, weight, prior=1.0, knots=FEW), 1.0) for x in odd.T]
        most, total = out.statistics(out.calibrated(seen))
        out.most, out.total = Tail.fit(most, weight, prior=1.0), Tail.fit(total, weight)
        out.row = Tail.fit(torch.maximum(out.most(most), out.total(total)), weight, prior=1.0)
        return out

    def calibrated(self, seen: Tensor) -> Tensor:
        """-log of the share of held-out rows whose cell is at least as odd, (N, T)."""
        odd = _each(self.tails[0], seen[0])
        for tails, far in zip(self.tails[1:], seen[1:], strict=False):
            odd = torch.maximum(odd, _each(tails, far) - SURER)
        return _each(self.rarest, odd) if self.rarest else odd

    def __call__(self, seen: Tensor) -> Tensor:
        """-log of the share of held-out rows that are at least as odd, shape (N,)."""
        most, total = self.statistics(self.calibrated(seen))
        return self.row(torch.maximum(self.most(most), self.total(total)))

    @staticmethod
    def statistics(odd: Tensor) -> tuple[Tensor, Tensor]:
        """The oddest cell of a row, and all of them together."""
        seen = ~odd.isnan()
        most = torch.where(seen, odd, 0.0).amax(1) - seen.sum(1).clamp_min(1).double().log()
        return most, torch.where(seen, odd - 1, 0.0).sum(1)

    def to_json(self) -> list[Any]:
        """Plain lists: the row's three tails, then those of the cells, of the rarest last."""
        tails = [self.most, self.total, self.row, *sum(self.tails, []), *self.rarest]
        return [t.to_json() for t in tails]

    @classmethod
    def from_json(cls, data: Any, targets: int) -> Self:
        """Inverse of :meth:`to_json`, for so many targets."""
        most, total, row, *each = (Tail.from_json(part) for part in data)
        tails = [each[k : k + targets] for k in range(0, len(each), targets)]
        return cls(tails, tails.pop() if len(tails) > 1 else [], most, total, row)


def _each(tails: list[Tail], x: Tensor) -> Tensor:
    """Each target's tail of its cells, (N, T)."""
    return torch.stack([tail(column) for tail, column in zip(tails, x.T, strict=True)], 1)


def _sober(tail: Tail, least: float) -> Tail:
    """With no smaller scale: a statistic in nats is not trusted beyond its own claim."""
    return dataclasses.replace(tail, scale=max(tail.scale, least))
