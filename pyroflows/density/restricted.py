"""Conditionals of one column within a region: a range, some labels, some points.

A :class:`Restricted` law is the conditional given that the cell lies in the region, and knows the
probability of that. A model within regions, :meth:`TableModel.within`, has such laws at these
columns, and draws, weighs and integrates as any other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyroflows.density.conditionals import Conditional, Labels, Numbers, choose
from pyroflows.density.mixtures import gaussian_log_cell
from pyroflows.families import Logistics
from pyroflows.tables.conditions import (
    Codes,
    Condition,
    Interval,
    Points,
    Predicate,
    Region,
)

if TYPE_CHECKING:
    from pyroflows.density.model import TableModel

__all__ = ["Regions", "Restricted", "may_stay", "regions_of", "restrict"]

CANDIDATES = 32  # draws of which a predicate takes one
FAR = 1e4  # normal score beyond any


@dataclasses.dataclass(frozen=True)
class Regions:
    """What a row must be beside its known cells.

    Attributes:
        at: Regions by place in model order.
        late: What whole rows must fulfil, values (P, D) in the schema's order to (P,); None for
            nothing.
        words: The conditions as they were written, by column.
    """

    at: Mapping[int, Region] = dataclasses.field(default_factory=dict)
    late: Callable[[Tensor], Tensor] | None = None
    words: Mapping[Any, str] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.at) or self.late is not None

    @property
    def smooth(self) -> bool:
        """Whether the probability of every one is known, rather than guessed from draws."""
        return not any(isinstance(r, Predicate) for r in self.at.values())

    def within(self, place: int) -> bool:
        """Whether they are about columns up to a place only, and its law within them is known."""
        return self.summable and max(self.at, default=-1) <= place

    @property
    def summable(self) -> bool:
        """Whether a sum over cells column by column can say the probability of all."""
        return self.smooth and self.late is None


def regions_of(model: TableModel, conditions: Mapping[Any, Condition]) -> Regions:
    """What conditions on columns ask of a model's rows.

    A column that a constraint replaced by a distance is asked when its row is whole.

    Raises:
        ValueError: If a column is none of the model's, is given to it, or has no such cell.
    """
    columns = model.schema.columns
    places = {columns[j].name: i for i, j in enumerate(model.order)}
    at, late = {}, []
    for name, condition in conditions.items():
        if name not in places:
            raise ValueError(f"unknown columns [{name!r}]; the fit had {model.schema.names}")
        j = model.order[places[name]]
        if places[name] < model.num_given:
            raise ValueError(
                f"this model is conditional on {name!r}: pass its value, not {condition}"
            )
        if columns[j].relation is None:
            at[places[name]] = condition.region(columns[j])
        else:
            late.append((j, condition))

    def whole(values: Tensor) -> Tensor:
        natural = model.schema.natural(values.numpy())
        held = [c.holds(columns[j], natural[:, j]) for j, c in late]
        return torch.from_numpy(np.logical_and.reduce(held))

    words = {name: str(condition) for name, condition in conditions.items()}
    return Regions(at, whole if late else None, words)


class Restricted(Conditional):
    """A conditional within a region, normalized.

    Attributes:
        log_mass: Log-probability of the region (log-density of points of a density), shape (N,).
    """

    log_mass: Tensor

    def total(self, leave: bool) -> Tensor:
        """Log-probability of a cell in the region; with ``leave`` also that it is there."""
        return self.log_mass + self.log_there(leave)


def may_stay(law: Any, leave: bool) -> bool:
    """Whether a gap may stay one."""
    return law.may_miss(leave) and not isinstance(law, Restricted)


@dataclasses.dataclass
class LabelsWithin(Labels, Restricted):
    """Some of the labels."""

    log_mass: Tensor
    region: Codes

    def log_table(self) -> Tensor:
        out = super().log_table().masked_fill(~torch.from_numpy(self.region.allowed), -torch.inf)
        return out - _finite(self.log_mass)

    def log_prob(self, x: Tensor) -> Tensor:
        code = x.reshape(len(x), math.prod(x.shape[1:])).long()
        known = code < len(self.region.allowed)
        out = self.log_table().gather(1, torch.where(known, code, 0))
        return torch.where(known, out, -torch.inf).view_as(x)

    def sample(self, u: Tensor, v: Tensor, *, lattice: bool = True) -> Tensor:
        return choose(self.log_table(), u).double()


@dataclasses.dataclass
class PointsWithin(Restricted):
    """Some values of a number: by their probabilities, or by their densities if they have none."""

    cells: Any
    log_mass: Tensor
    log_points: Tensor
    region: Points

    def table(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.region.values).expand_as(self.log_points), self.log_points

    def log_prob(self, x: Tensor) -> Tensor:
        same = x.reshape(len(x), math.prod(x.shape[1:]), 1) == torch.from_numpy(self.region.values)
        found = torch.where(same, self.log_points[:, None], -torch.inf)
        return found.amax(-1).view_as(x)

    def sample(self, u: Tensor, v: Tensor, *, lattice: bool = True) -> Tensor:
        return torch.from_numpy(self.region.values)[choose(self.log_points, u)]

    def quantile(self, p: Tensor) -> Tensor:
        return self.sample(p, p)

    def mean_value(self) -> Tensor:
        return self.log_points.exp() @ torch.from_numpy(self.region.values)


@dataclasses.dataclass
class NumbersWithin(Numbers, Restricted):
    """A range of numbers, both ends included: each component within the range."""

    log_mass: Tensor
    log_parts: Tensor  # log-probabilities of all components within the range, shape (N, B + K + G)
    region: Interval

    @classmethod
    def of(cls, law: Numbers, region: Interval) -> NumbersWithin:
        """The range of a conditional."""
        parts = {f.name: getattr(law, f.name) for f in dataclasses.fields(Numbers)}
        span = _Span.of(law.cells, region)
        upper = torch.full_like(law.odds, span.top, dtype=torch.float64)
        width = upper - span.bottom
        each = Logistics(law.log_logistic[None], law.loc[None], law.log_scale[None])
        logistic = each.log_cell(upper[:, None], width[:, None])
        gauss = gaussian_log_cell(upper, width, law.mean, law.sd)
        within = (span.last - span.first).clamp_min(0).log()
        log_parts = torch.cat([law.log_bins + within, logistic, law.log_gauss + gauss], 1)
        return cls(**parts, log_mass=log_parts.logsumexp(1), log_parts=log_parts, region=region)

    @property
    def whole(self) -> Numbers:
        """The conditional without the region."""
        return Numbers(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Numbers)})

    @property
    def log_atoms(self) -> Tensor:
        first = self.cells.hist.num_bins
        own = self.log_parts[:, first : first + len(self.cells.atoms)]
        return own - _finite(self.log_mass)

    def cdf(self, x: Tensor, *, atoms: bool = True) -> Tensor:
        span = _Span.of(self.cells, self.region)
        alike = len(x), *[1] * (x.dim() - 1)
        low = _below(self.whole, span.start).view(alike)
        top = self.whole.cdf(x.clamp(max=span.end), atoms=False)
        out = (top - low).clamp_min(0) / _finite(self.log_mass).exp().view(alike)
        if atoms and len(self.cells.atoms):
            jump = self.log_atoms.exp().view(*alike, -1)
            out = out + (jump * (x[..., None] >= self.cells.atoms)).sum(-1)
        return out.clamp(0, 1)

    def log_prob(self, x: Tensor) -> Tensor:
        inside = (x >= self.region.low) & (x <= self.region.high)
        mass = self.log_mass.view(len(x), *[1] * (x.dim() - 1))
        return torch.where(inside, self.whole.log_prob(x) - mass, -torch.inf)

    def sample(self, u: Tensor, v: Tensor, *, lattice: bool = True) -> Tensor:
        """Values, shape (N,): the component by ``u``, the place in its part by ``v``."""
        c, span = self.cells, _Span.of(self.cells, self.region)
        pick = choose(self.log_parts, u)
        bins, logistics = self.log_bins.shape[1], self.loc.shape[1]
        which = (pick - bins).clamp_min(0)[:, None]
        loc = torch.cat([self.loc, self.mean], 1).gather(1, which)[:, 0]
        scale = torch.cat([self.log_scale.exp(), self.sd], 1).gather(1, which)[:, 0]
        a, b = (span.bottom - loc) / scale, (span.top - loc) / scale
        side = torch.where(a + b > 0, -1.0, 1.0)  # counted from the nearer tail, nothing cancels
        a, b = torch.where(side < 0, -b, a), torch.where(side < 0, -a, b)
        normal = pick >= bins + logistics
        low = torch.where(normal, torch.special.log_ndtr(a), F.logsigmoid(a)).exp()
        high = torch.where(normal, torch.special.log_ndtr(b), F.logsigmoid(b)).exp()
        q = low + torch.where(side < 0, 1 - v, v) * (high - low)
        noise = side * torch.where(normal, torch.special.ndtri(q), q.logit())
        smooth = c.place((loc + scale * noise).clamp(span.bottom, span.top).clamp(-50, 50))
        cell = pick.clamp_max(bins - 1)
        share = span.first[cell] + v * (span.last - span.first)[cell]
        rough = c.draw(cell, torch.where(cell < c.hist.num_bins, share, v))
        atom = (pick >= c.hist.num_bins) & (pick < bins)
        x = torch.where(pick >= bins, c.keep(smooth), rough)
        return torch.where(atom, x, self._inside(x))

    def _inverse(self, p: Tensor, *, atoms: bool) -> Tensor:
        return self._inside(super()._inverse(p, atoms=atoms))

    def _inside(self, x: Tensor) -> Tensor:
        """The nearest value of the region, where it has any but atoms."""
        span = _Span.of(self.cells, self.region)
        first = span.start + float(self.cells.step)
        return x if first > span.end else self.cells.snap(x.clamp(first, span.end))

    def mean_value(self, points: int = 401) -> Tensor:
        """Mean, shape (N,), of as many quantiles of the smooth part, and the atoms."""
        atom = self.log_atoms.exp()
        rest = 1 - atom.sum(1, keepdim=True)
        p = (torch.arange(points, dtype=rest.dtype) + 0.5) / points
        smooth = self._inverse(rest * p, atoms=False).mean(1)
        return rest[:, 0] * smooth + (atom * self.cells.atoms).sum(1)

    def grid(self, levels: Tensor) -> Tensor:
        rest = 1 - self.log_atoms.exp().sum(1, keepdim=True)
        return self._inverse(rest * levels, atoms=False).cummax(1).values

    def nodes(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        x, log_p = super().nodes(edges)
        inner = x.shape[1] - len(self.cells.atoms)
        return torch.cat([self._inside(x[:, :inner]), x[:, inner:]], 1), log_p


@dataclasses.dataclass(frozen=True)
class _Span:
    """A range in the terms of a column: what lies above ``start`` and up to ``end``.

    Attributes:
        start: A value; on a lattice the last one that is left out.
        end: A value.
        bottom: Normal score where it begins.
        top: Normal score where it ends.
        first: Share of each bin below it; of an atom outside 1, else 0.
        last: Share of each bin below its end; of an atom 1.
    """

    start: float
    end: float
    bottom: float
    top: float
    first: Tensor
    last: Tensor

    @classmethod
    def of(cls, cells: Any, region: Interval) -> _Span:
        start, end = _ends(cells, region)
        score, first, last = [-FAR, FAR], torch.zeros(cells.num_bins), torch.ones(cells.num_bins)
        first, last = first.double(), last.double()
        bins = torch.arange(cells.hist.num_bins)
        for k, (value, share) in enumerate(((start, first), (end, last))):
            if not math.isfinite(value):
                continue
            at = torch.full((1,), value + float(cells.step) / 2, dtype=torch.float64)
            if bool((at >= cells.bounds[0]) & (at < cells.bounds[1])):
                score[k] = float(cells.score(at)[0].clamp(-FAR, FAR))
                cell, part = cells.bin_share(at)
                share[bins] = torch.where(bins < cell, 1.0, torch.where(bins > cell, 0.0, part))
            else:
                beyond = bool(at >= cells.bounds[1])
                score[k], share[bins] = (FAR if beyond else -FAR), float(beyond)
        inside = (cells.atoms >= region.low) & (cells.atoms <= region.high)
        first[len(bins) :] = (~inside).double()
        return cls(start, end, score[0], score[1], first, last)


@dataclasses.dataclass
class Guessed(Restricted):
    """Numbers of which a function holds: one of several draws that fulfil it.

    Its probability is the share of the draws that do, unbiased; no draw, no probability.
    """

    law: Numbers
    region: Predicate

    @property
    def cells(self) -> Any:
        return self.law.cells

    def __getitem__(self, rows: Tensor) -> Guessed:
        return Guessed(self.odds[rows], self.law[rows], self.region)

    def propose(self, uniforms: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """Values, and log-probabilities of the region, both (N,), from uniform numbers by kind."""
        x = torch.stack([
            self.law.sample(uniforms(2 * k), uniforms(2 * k + 1)) for k in range(CANDIDATES)
        ], 1)  # fmt: skip
        good = torch.from_numpy(self.region.holds(x.reshape(-1).numpy())).view_as(x)
        first = x.gather(1, good.long().argmax(1)[:, None])[:, 0]
        return first, good.double().mean(1).log()

    def log_prob(self, x: Tensor) -> Tensor:
        raise NotImplementedError("the probability of a predicate is known from draws only")

    def sample(self, u: Tensor, v: Tensor, *, lattice: bool = True) -> Tensor:
        raise NotImplementedError("a predicate proposes")


def restrict(law: Labels | Numbers, region: Region) -> Any:
    """The conditional within a region."""
    parts = {f.name: getattr(law, f.name) for f in dataclasses.fields(law)}
    if isinstance(region, Codes):
        table = law.log_table()
        mass = table.masked_fill(~torch.from_numpy(region.allowed), -torch.inf).logsumexp(1)
        return LabelsWithin(**parts, log_mass=mass, region=region)
    assert isinstance(law, Numbers)
    if isinstance(region, Points):
        x = torch.from_numpy(region.values).expand(len(law.odds), -1)
        step = float(law.cells.step)
        log_p = law.log_prob(x) + (np.log(step) if step else 0.0)
        mass = log_p.logsumexp(1)
        return PointsWithin(law.odds, law.cells, mass, log_p - _finite(mass), region)
    if isinstance(region, Interval):
        return NumbersWithin.of(law, region)
    assert isinstance(region, Predicate)
    return Guessed(law.odds, law, region)


def _finite(log_mass: Tensor) -> Tensor:
    """As a column to divide by; what has no probability divides by one."""
    return torch.where(log_mass > -torch.inf, log_mass, 0.0)[:, None]


def _below(law: Numbers, value: float) -> Tensor:
    """P(X <= value), shape (N,), atoms apart."""
    if value == -math.inf:
        return torch.zeros(len(law.odds), dtype=torch.float64)
    if value == math.inf:
        return 1 - law.log_atoms.exp().sum(1)
    at = torch.full((len(law.odds),), value, dtype=torch.float64)
    return law.cdf(at, atoms=False)


def _ends(cells: Any, region: Interval) -> tuple[float, float]:
    """The region is what lies above the first and up to the second."""
    step, low, high = float(cells.step), region.low, region.high
    if not step:
        return low, high
    place = (np.array([low, high]) - float(cells.anchor)) / step
    first, last = np.ceil(place[0] - 1e-6) - 1, np.floor(place[1] + 1e-6)
    start, end = torch.tensor([first, last], dtype=torch.float64) * step + cells.anchor
    return float(start), float(end)
