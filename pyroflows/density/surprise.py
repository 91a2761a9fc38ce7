"""How odd a cell or a row is, calibrated by held-out rows.

A cell's surprise is minus the logarithm of a tail probability under its conditional: of labels,
the probability of all that are no more probable; of numbers, the two-sided tail, or the ratio of
its density to its marginal one where that is smaller (both bound how often so odd a cell comes).
Held-out rows then say how often such a surprise really comes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from pyroflows.density.cellwise import exact_model
from pyroflows.density.columns import LabelCells, NumberCells
from pyroflows.density.conditionals import Labels, Numbers
from pyroflows.density.engine import Engine, Fit, TrainingTable
from pyroflows.density.model import TableModel
from pyroflows.density.others import Reweighted
from pyroflows.density.particles import Particles
from pyroflows.tables.inputs import check_half_known

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Oddness",
    "Tail",
    "by_quantiles",
    "cell_tail",
    "expected",
    "gap_or_tail",
    "judged",
    "oddness_of",
    "row_oddness",
    "stranger",
    "surprises",
]

LEAST = 1e-16  # tail probability that rounding leaves
KNOTS = 48  # of a calibration
BEYOND = 0.01  # share of the held-out rows past which the tail is extrapolated
STRANGE = 1e-3  # share of a column, and tail probability, below which a number is a stranger
BLOCK = 2**22  # numbers at once


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
    def fit(cls, x: Tensor, weight: Tensor, *, prior: float | None = None) -> Self:
        """From held-out values, shape (N,).

        Args:
            x: Values; those that are not finite are left out.
            weight: Of the rows.
            prior: The scale that the tail should have, worth ten rows; None for none.
        """
        keep = x.isfinite() & (weight > 0)
        x, order = x[keep].double().sort(descending=True)
        weight = weight[keep].double()[order]
        if not len(x):
            one = torch.zeros(1, dtype=torch.float64)
            return cls(one, one, 1.0 if prior is None else prior)
        share = weight.cumsum(0) / weight.sum()
        last = torch.ones(len(x), dtype=torch.bool)
        last[:-1] = x[:-1] > x[1:]  # where values repeat, all of them are as large
        value, share = x[last], share[last]
        inner = (share >= max(BEYOND, min(5 / len(x), 1 - 1e-9))).nonzero()[:, 0]
        first = int(inner[0])
        pick = torch.linspace(math.log(first + 1), math.log(len(value)), KNOTS, dtype=share.dtype)
        pick = (pick.exp().round().long() - 1).clamp(first, len(value) - 1).unique().flip(0)
        above = (x > value[first]).nonzero()[:, 0]
        above = above[1:] if len(above) >= 10 else above  # one planted row must not set the scale
        mass = weight[above] / weight.mean()
        start = 0.0 if prior is None else 10.0
        excess = (mass * (x[above] - value[first])).sum() + start * (prior or 0.0)
        scale = float(excess / (mass.sum() + start).clamp_min(1e-9))
        tiny = 1e-3 * (1 + abs(float(value[first])))
        return cls(value[pick], -share[pick].log(), max(scale, tiny))

    def __call__(self, x: Tensor) -> Tensor:
        """``-log S(x)``, of any shape; infinite where x is."""
        right = torch.searchsorted(self.at, x.contiguous()).clamp(0, len(self.at) - 1)
        left = (right - 1).clamp_min(0)
        width = (self.at[right] - self.at[left]).clamp_min(1e-300)
        part = ((x - self.at[left]) / width).clamp(0, 1)
        inner = self.nats[left] + part * (self.nats[right] - self.nats[left])
        return inner + (x - self.at[-1]).clamp_min(0) / self.scale

    def to_json(self) -> list[list[float]]:
        """Plain lists."""
        return [self.at.tolist(), self.nats.tolist(), [self.scale]]

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Inverse of :meth:`to_json`."""
        at, nats, (scale,) = (torch.tensor(part, dtype=torch.float64) for part in data)
        return cls(at, nats, float(scale))


def cell_tail(law: Labels | Numbers | Reweighted, x: Tensor) -> Tensor:
    """Surprise in nats of cells under their conditionals, shape (N,); infinite if impossible."""
    log_p = law.log_prob(x)
    if isinstance(law, Labels):
        return _label_tail(law, log_p)
    c = law.cells
    two = 2 * torch.minimum(law.cdf(x), 1 - law.cdf(c.below(x)))
    out = torch.maximum(-two.clamp(LEAST, 1).log(), _log_marginal(c, x) - log_p)
    return torch.where(log_p == -torch.inf, torch.inf, out)


def _label_tail(law: Labels, log_p: Tensor) -> Tensor:
    """-log of the probability of all labels that are no more probable."""
    parts = []
    for rows in torch.arange(len(log_p)).split(max(1, BLOCK // len(law.cells.group))):
        table, own = law[rows].log_table(), log_p[rows, None]
        less = torch.where(table <= own + 1e-9, table, -torch.inf).logsumexp(1)
        parts.append(torch.maximum(less, log_p[rows]))
    return -torch.cat(parts).clamp_max(0.0) if parts else log_p


def _log_marginal(c: NumberCells, x: Tensor) -> Tensor:
    """Log-density of the column's histogram and atoms."""
    e = c.encode(x)
    return c.bin_mass[e.bin].log() + e.inside


def stranger(c: LabelCells | NumberCells, x: Tensor, odd: Tensor) -> Tensor:
    """Cells that other cells should not be judged by, shape (N,).

    Labels that fitting did not see; numbers outside the support, or beyond nearly all of their
    column and surprising too; gaps in columns that had none.

    Args:
        c: The column.
        x: Its cells.
        odd: Their surprise in nats.
    """
    if isinstance(c, LabelCells):
        out = c.encode(x).bin < 0
    else:
        f = c.hist.cdf(x.nan_to_num(float(c.loc)) / c.unit)
        out = (2 * torch.minimum(f, 1 - f) < STRANGE) & (odd > -math.log(STRANGE))
        out = out | (x < c.bounds[0]) | (x > c.bounds[1])
    return torch.where(x.isnan(), ~c.missing_seen, out)


def expected(law: Labels | Numbers | Reweighted) -> Tensor:
    """The most probable label, or the median, shape (N,)."""
    if isinstance(law, Labels):
        return law.log_table().argmax(1).double()
    return law.quantile(torch.full((len(law.odds),), 0.5, dtype=torch.float64))


def judged(
    model: TableModel, values: Tensor, *, pattern: bool = False, member: int | None = None
) -> Iterator[tuple[int, Labels | Numbers, Tensor]]:
    """Targets, their distributions given the earlier cells, and the surprise of their cells.

    A :func:`stranger` is replaced by what was expected, so that later cells are not judged by it.

    Args:
        model: Fitted.
        values: Shape (N, D).
        pattern: As in :func:`surprises`.
        member: The network that speaks; None for all.
    """
    p = Particles.start(model, values)
    for t, i in p.walk():
        x, law = p.raw[:, i], model.conditional(t, p.features, p.state, member=member)
        odd = gap_or_tail(law, x, pattern)
        yield t, law, odd
        at = stranger(model.cells[i], x, odd).nonzero()[:, 0]
        if len(at):
            p.fill(i, at, expected(law[at]))


@torch.no_grad()
def surprises(
    model: TableModel, values: Tensor, *, pattern: bool = False, member: int | None = None
) -> Tensor:
    """Surprise in nats of the target cells given the earlier ones, shape (N, T).

    NaN where missing, unless ``pattern``: then by the probability of being missing.
    """
    out = torch.empty(len(values), len(model.targets), dtype=torch.float64)
    for part in torch.arange(len(values)).split(model.chunk):
        for t, _, odd in judged(model, values[part], pattern=pattern, member=member):
            out[part, t] = odd
    return out


def gap_or_tail(law: Labels | Numbers | Reweighted, x: Tensor, pattern: bool) -> Tensor:
    """:func:`cell_tail`; for a missing cell NaN, or its own surprise if gaps are modelled."""
    odds = law.odds.double().clamp_min(1e-7)
    gap = -odds.log() if bool(law.cells.missing_seen) else math.inf + torch.zeros_like(odds)
    gap = torch.where(odds <= 0.5, gap, 0.0) if pattern else torch.full_like(odds, torch.nan)
    return torch.where(x.isnan(), gap, cell_tail(law, x))


def oddness_of(
    engine: Engine, table: TrainingTable, fit: Fit, rows: int, pattern: bool
) -> Oddness | None:
    """What so many held-out rows of a fit say, each by the network that did not train on it.

    None for an engine without exact conditionals.
    """
    model = engine.exact
    if model is None:
        return None
    held = (fit.held if len(fit.held) else torch.arange(len(table)))[:rows]
    values, weight = table.values[held], table.weight[held]
    fold = torch.full((len(held),), -1)
    if len(fit.held) and fit.fold is not None:
        fold = fit.fold[:rows]
    odd = torch.empty(len(values), len(model.targets), dtype=torch.float64)
    for m in fold.unique().tolist():
        mine, member = fold == m, m if m >= 0 else None
        odd[mine] = surprises(model, values[mine], pattern=pattern, member=member)
    return Oddness.fit(odd, weight)


def by_quantiles(held: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Minus log-share of held-out values, of which quantiles are known, that are as large as x."""
    known = torch.as_tensor(np.ascontiguousarray(held), dtype=torch.float64)
    return Tail.fit(known, torch.ones_like(known))(torch.from_numpy(x)).numpy()


def row_oddness(
    engine: Engine, oddness: Oddness, frame: pd.DataFrame, *, pattern: bool
) -> np.ndarray:
    """Minus log-share of held-out rows that are at least as odd, shape (rows,)."""
    schema, model = engine.schema, exact_model(engine, "outlier_score")
    check_half_known(schema, frame)
    values = torch.from_numpy(schema.encode(frame))
    score = oddness(surprises(model, values, pattern=pattern)).numpy()
    return np.where(schema.broken(frame), np.inf, score)


@dataclasses.dataclass
class Oddness:
    """What held-out rows say of cells and rows: from surprises to shares of rows.

    A row is as odd as its oddest cell, or as all of them together, whichever is rarer: one
    impossible cell is not drowned by twenty ordinary ones, and twenty strange ones add up.

    Args:
        cells: For each target, the tail of its surprise.
        most: The tail of a row's largest surprise, in excess of what so many cells have.
        total: The tail of the sum of its surprises, each less its mean of one.
        row: The tail of the rarer of both.
    """

    cells: list[Tail]
    most: Tail
    total: Tail
    row: Tail

    @classmethod
    def fit(cls, odd: Tensor, weight: Tensor) -> Self:
        """From the surprises of held-out cells, shape (N, T), and the weights of their rows."""
        cells = [Tail.fit(x, weight, prior=1.0) for x in odd.T]
        for tail in cells:
            tail.scale = max(tail.scale, 1.0)  # never surer than the model
        blank = Tail.fit(odd[:0, 0], weight[:0])
        out = cls(cells, blank, blank, blank)
        most, total = out.statistics(out.calibrated(odd))
        out.most, out.total = Tail.fit(most, weight, prior=1.0), Tail.fit(total, weight)
        out.row = Tail.fit(torch.maximum(out.most(most), out.total(total)), weight, prior=1.0)
        return out

    def calibrated(self, odd: Tensor) -> Tensor:
        """-log of the share of held-out rows whose cell is at least as surprising, (N, T)."""
        return torch.stack([tail(x) for tail, x in zip(self.cells, odd.T, strict=True)], 1)

    def __call__(self, odd: Tensor) -> Tensor:
        """-log of the share of held-out rows that are at least as odd, shape (N,)."""
        most, total = self.statistics(self.calibrated(odd))
        return self.row(torch.maximum(self.most(most), self.total(total)))

    @staticmethod
    def statistics(odd: Tensor) -> tuple[Tensor, Tensor]:
        """The oddest cell of a row, and all of them together."""
        seen = ~odd.isnan()
        most = torch.where(seen, odd, 0.0).amax(1) - seen.sum(1).clamp_min(1).double().log()
        return most, torch.where(seen, odd - 1, 0.0).sum(1)

    def to_json(self) -> list[Any]:
        """Plain lists: the row's three tails, then those of the cells."""
        return [t.to_json() for t in (self.most, self.total, self.row, *self.cells)]

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Inverse of :meth:`to_json`."""
        most, total, row, *cells = (Tail.from_json(part) for part in data)
        return cls(cells, most, total, row)
