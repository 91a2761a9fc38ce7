"""How odd a cell or a row is, calibrated by held-out rows.

A cell's surprise is minus the logarithm of a tail probability under its conditional: of labels,
the probability of all that are no more probable; of numbers, the two-sided tail, or the ratio of
its density to its marginal one where that is smaller (both bound how often so odd a cell comes).
A model that was trained on a wrong value has learned that one row in so many holds it, but not
how far from all others it lies: so a number has distances too, from the middle of its conditional
and of its column, in units of their widths. Held-out rows then say how often each comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyroflows.density.cellwise import exact_model
from pyroflows.density.columns import LabelCells, NumberCells
from pyroflows.density.conditionals import Labels, Numbers
from pyroflows.density.engine import Engine, Fit, TrainingTable
from pyroflows.density.model import TableModel
from pyroflows.density.oddness import Oddness
from pyroflows.density.others import Reweighted
from pyroflows.density.particles import Particles
from pyroflows.tables.inputs import check_half_known

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "STATISTICS",
    "cell_tail",
    "distance",
    "expected",
    "gap_or_tail",
    "judged",
    "oddness_of",
    "own_cells",
    "row_oddness",
    "stranger",
    "surprises",
]

LEAST = 1e-16  # tail probability that rounding leaves
STATISTICS = 4  # surprise and three distances
UNUSUAL = 3.0  # nats of surprise from which a number's distance is measured
LEVELS = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)  # middle and width of a law
SECTIONS = 8  # at once, in search of a quantile
NARROW = 0.01  # least width of a conditional, as a share of its column's
STRANGE = 1e-3  # share of a column, and tail probability, below which a number is a stranger
BLOCK = 2**22  # numbers at once


def cell_tail(law: Labels | Numbers | Reweighted, x: Tensor) -> Tensor:
    """Surprise in nats of cells under their conditionals, shape (N,); infinite if impossible."""
    log_p = law.log_prob(x)
    if isinstance(law, Labels):
        return _label_tail(law, log_p)
    c = law.cells
    two = 2 * torch.minimum(law.cdf(x), 1 - law.cdf(c.below(x)))
    out = torch.maximum(-two.clamp(LEAST, 1).log(), _log_marginal(c, x) - log_p)
    return torch.where(log_p == -torch.inf, torch.inf, out)


def distance(law: Labels | Numbers | Reweighted, x: Tensor, odd: Tensor) -> Tensor:
    """Log-distances of cells, shape (3, N): from their conditionals, below and above their column.

    Between the median and x, in units of that between the median and the quantile of 0.05 or 0.95
    on x's side, which a few wrong values in the training rows do not move. ``-inf`` for labels, on
    the other side, and, from conditionals, where the surprise ``odd`` is no more than usual.
    """
    out = torch.full((3, len(x)), -torch.inf, dtype=torch.float64)
    if isinstance(law, Labels):
        return out
    c = law.cells
    ends = c.place(torch.special.ndtri(LEVELS))
    least = torch.maximum(NARROW * (ends[2] - ends[0]), c.step).clamp_min(1e-6 * float(c.scale))
    far = _log_distance(x, ends, least)
    out[1] = torch.where(x < ends[1], far, -torch.inf)
    out[2] = torch.where(x > ends[1], far, -torch.inf)
    at = ((odd > UNUSUAL) & ~x.isnan()).nonzero()[:, 0]
    if len(at):
        out[0, at] = _log_distance(x[at], _rough_quantiles(law[at]).T, least)
    return out


def _log_distance(x: Tensor, quantiles: Tensor, least: Tensor) -> Tensor:
    """Of values (N,), from quantiles of :data:`LEVELS`, (3,) or (3, N)."""
    low, middle, high = quantiles
    width = torch.where(x > middle, high - middle, middle - low)
    return ((x - middle).abs() / torch.maximum(width, least)).log()


def _rough_quantiles(law: Numbers | Reweighted) -> Tensor:
    """Of :data:`LEVELS` to some digits, (N, 3), by few calls of cdf: sections of normal scores."""
    lo, width = torch.full((len(law.odds), 3, 1), -6.0, dtype=torch.float64), 12.0
    part = torch.arange(1, SECTIONS) / SECTIONS
    for _ in range(5):
        x = law.cells.place(lo + width * part)
        below = law.cdf(x.flatten(1)).view(x.shape) < LEVELS[:, None]
        width /= SECTIONS
        lo = lo + width * below.sum(-1, keepdim=True)
    return law.cells.keep(law.cells.place(lo[..., 0] + width))


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
    """Surprise in nats of the target cells given the earlier ones, and log-distances, (4, N, T).

    NaN where missing, unless ``pattern``: then by the probability of being missing.
    """
    out = torch.empty(STATISTICS, len(values), len(model.targets), dtype=torch.float64)
    for part in torch.arange(len(values)).split(model.chunk):
        for t, law, odd in judged(model, values[part], pattern=pattern, member=member):
            out[0, part, t] = odd
            out[1:, part, t] = distance(law, own_cells(model, values[part], t), odd)
    return out


def own_cells(model: TableModel, values: Tensor, t: int) -> Tensor:
    """The cells of target t, shape (N,)."""
    return values[:, model.order[model.num_given + t]]


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
    odd = torch.empty(STATISTICS, len(values), len(model.targets), dtype=torch.float64)
    for m in fold.unique().tolist():
        mine, member = fold == m, m if m >= 0 else None
        odd[:, mine] = surprises(model, values[mine], pattern=pattern, member=member)
    return Oddness.fit(odd, weight)


def row_oddness(
    engine: Engine, oddness: Oddness, frame: pd.DataFrame, *, pattern: bool
) -> np.ndarray:
    """Minus log-share of held-out rows that are at least as odd, shape (rows,)."""
    schema, model = engine.schema, exact_model(engine, "outlier_score")
    check_half_known(schema, frame)
    values = torch.from_numpy(schema.encode(frame))
    score = oddness(surprises(model, values, pattern=pattern)).numpy()
    return np.where(schema.broken(frame), np.inf, score)
