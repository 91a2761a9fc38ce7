"""Log-densities, draws and averages of rows whose missing cells are filled in."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyroflows.checks import users_line
from pyroflows.density.conditionals import Labels
from pyroflows.density.particles import Cloud, Particles, chunks, drawn, gaps
from pyroflows.density.quadrature import enumerate_gaps
from pyroflows.density.restricted import Regions
from pyroflows.density.sequential import MOST, simulate, tempered
from pyroflows.density.uniforms import Uniforms

if TYPE_CHECKING:
    from pyroflows.density.model import TableModel

__all__ = ["averages", "cloud", "complete", "evidence"]

NOISE = 0.03  # nats of error at which draws are enough
BATCHES = 16  # independent batches of draws, at most


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
    for part in chunks(model, easy, leaves[easy]):
        enumerate_gaps(out, model, values, part, False)
        out.forget()
    hard = rows[leaves[rows].isinf()]
    sums: list[Tensor] = []
    uniforms = Uniforms(0, strata=draws)
    rare = bool(model.regions) and model.regions.smooth
    while len(hard) and len(sums) < BATCHES:
        new = torch.full((len(values),), -torch.inf, dtype=torch.float64)
        for part in chunks(model, hard, draws):
            few = values[part]
            new[part] = simulate(model, few, last[part], draws, uniforms, part, batch=len(sums))[1]
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
        out.add(p, plain, torch.ones(len(plain), dtype=torch.bool))
    rows = ((last >= 0) & leaves.isfinite()).nonzero()[:, 0]
    for part in chunks(model, rows, leaves[rows]):
        enumerate_gaps(out, model, values, part, leave)
    hard = ((last >= 0) & leaves.isinf()).nonzero()[:, 0]
    count = max(256, 4 * size)
    while len(hard):
        more = []
        for part in chunks(model, hard, count):
            p, log_p, effective = simulate(
                model, values[part], last[part], count, uniforms, part, leave=leave
            )
            few = effective < max(50, size)
            poor = few & (4 * count <= MOST) & (log_p.isfinite() | bool(model.regions))
            rare = few & ~poor & bool(model.regions) & model.regions.smooth
            out.evidence[part], out.effective[part] = log_p, effective
            out.add(p, part, ~poor & ~rare)
            more.append(part[poor])
            for r in part[rare][:, None]:
                p, log_p, effective = tempered(model, values[r], last[r], size, uniforms, r, leave)
                out.evidence[r], out.effective[r] = log_p, effective
                out.add(p, r, torch.ones(1, dtype=torch.bool))
        hard, count = torch.cat(more), 4 * count
    return out.close()


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
        x = drawn(law, uniforms, row[at], draw[at], i, leave, lattice)
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
    for rows in chunks(model, torch.arange(n), max(count, 1)):
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
        for part in chunks(model, rows, size):
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
            stacklevel=users_line(),
        )
    few = (c.effective < min(max(count / 4, 2), 50)) & ~c.dead
    if few.any():
        warnings.warn(
            f"the observed cells of {int(few.sum())} row(s) are so improbable given the cells "
            f"before them that the draws stand for {float(c.effective[few].min()):.0f} different "
            "ones only: condition on fewer cells, or fit a conditional model (target=, given=)",
            stacklevel=users_line(),
        )
