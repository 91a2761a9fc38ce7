r"""The distribution of one cell given all other cells of its row.

.. math:: p(x_t \mid x_{-t}) \propto p(x_t \mid x_{<t}) \prod_{s > t} p(x_s \mid x_{<s})

Labels are enumerated; numbers take the density given the earlier cells times a likelihood of the
later ones that is constant on each of some two dozen intervals, placed where the product lies.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from pyroflows.density.columns import NumberCells
from pyroflows.density.conditionals import Conditional, Labels, Numbers
from pyroflows.density.model import TableModel
from pyroflows.density.particles import Particles

__all__ = ["Reweighted", "given_others"]

INTERVALS = 24  # of a number
IMPOSSIBLE = -1e4  # nats of an impossible later cell, which no value explains
PARTICLES = 8192  # rows with one cell replaced, at once


@dataclasses.dataclass
class Reweighted(Conditional):
    """A number's distribution, times a factor that is constant between edges.

    Args:
        odds: As in :class:`Conditional`.
        law: The distribution, normalized.
        edges: Ends of the intervals, not decreasing, shape (N, Q).
        log_ratio: Log-factor in the Q + 1 intervals, then at the atoms, normalized; (N, Q + 1 +
            A).
        start: P(X < the interval) under the law, atoms apart; shape (N, Q + 1).
        below: Probability of the intervals before each, atoms apart; shape (N, Q + 1).
    """

    law: Numbers
    edges: Tensor
    log_ratio: Tensor
    start: Tensor
    below: Tensor

    @property
    def cells(self) -> NumberCells:
        """The column."""
        return self.law.cells

    @classmethod
    def of(cls, law: Numbers, edges: Tensor, log_factor: Tensor) -> Reweighted:
        """From factors that are not normalized, (N, Q + 1 + A)."""
        _, log_mass = law.nodes(edges)
        log_ratio = log_factor - (log_mass + log_factor).logsumexp(1, keepdim=True)
        mass = (log_mass + log_ratio).exp()[:, : edges.shape[1] + 1]
        start = F.pad(law.cdf(edges, atoms=False), (1, 0))
        return cls(law.odds, law, edges, log_ratio, start, mass.cumsum(1) - mass)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of values of shape (N,)."""
        at = torch.searchsorted(self.edges.contiguous(), x[:, None].contiguous())[:, 0]
        atoms = self.cells.atoms
        if len(atoms):
            same = x[:, None] == atoms
            first = self.edges.shape[1] + 1
            at = torch.where(same.any(1), first + same.long().argmax(1), at)
        return self.law.log_prob(x) + self.log_ratio.gather(1, at[:, None])[:, 0]

    def cdf(self, x: Tensor) -> Tensor:
        """P(X <= x)."""
        c, z = self.cells, x.reshape(len(x), -1)
        at = torch.searchsorted(self.edges.contiguous(), c.keep(z).contiguous())
        part = (self.law.cdf(z, atoms=False) - self.start.gather(1, at)).clamp_min(0)
        out = self.below.gather(1, at) + part * self.log_ratio.gather(1, at).exp()
        if len(c.atoms):
            atoms = (self.law.log_atoms + self.log_ratio[:, self.edges.shape[1] + 1 :]).exp()
            out = out + (atoms[:, None] * (z[..., None] >= c.atoms)).sum(-1)
        return out.clamp(0, 1).view_as(x)

    def quantile(self, p: Tensor) -> Tensor:
        """Smallest x with P(X <= x) >= p, by bisection on the smooth scale."""
        c = self.cells
        lo, hi = torch.full_like(p, -30.0), torch.full_like(p, 30.0)
        for _ in range(40):
            mid = (lo + hi) / 2
            up = self.cdf(c.place(mid)) >= p
            lo, hi = torch.where(up, lo, mid), torch.where(up, mid, hi)
        x = c.keep(c.place(hi))
        for atom in c.atoms:  # bisection ends beside one
            at = atom.expand_as(x)
            below = self.cdf(c.below(at.reshape(-1)).view_as(at))
            x = torch.where((below < p) & (self.cdf(at) >= p), at, x)
        return x

    def sample(self, u: Tensor, v: Tensor, *, lattice: bool = True) -> Tensor:
        """Not drawn from: :func:`pyroflows.density.particles.complete` does that."""
        raise NotImplementedError("draw with complete()")


@torch.no_grad()
def given_others(model: TableModel, values: Tensor, t: int) -> Labels | Reweighted:
    """The distribution of target t given all other cells of each row.

    Missing cells count as such, as the networks see them.

    Args:
        model: Fitted.
        values: Shape (N, D) in the schema's order.
        t: Target.
    """
    parts = [_given_others(model, values[rows], t) for rows in _portions(model, len(values), t)]
    return parts[0] if len(parts) == 1 else _joined(parts)


def _portions(model: TableModel, n: int, t: int) -> tuple[Tensor, ...]:
    c = model.targets[t]
    width = c.num_bins if c.is_label else INTERVALS + len(c.atoms)
    return torch.arange(n).split(max(1, min(PARTICLES, 2 * model.chunk) // width))


def _joined(parts: list) -> Labels | Reweighted:
    """Distributions of rows, one below the other."""

    def cat(items: list) -> object:
        if isinstance(items[0], Tensor):
            return torch.cat(items)
        if isinstance(items[0], Conditional):
            return _joined(items)
        return items[0]

    names = [f.name for f in dataclasses.fields(parts[0])]
    return type(parts[0])(**{name: cat([getattr(p, name) for p in parts]) for name in names})


def _given_others(model: TableModel, values: Tensor, t: int) -> Labels | Reweighted:
    p = Particles.start(model, values)
    place = model.num_given + t
    for _, i in p.walk():
        if i == place:
            break
    law = p.conditional(t, torch.arange(len(values)))
    if isinstance(law, Labels):
        code = _representatives(law).expand(len(values), -1)
        log_bins = law.log_bins + _likelihood(model, p, place, code)
        return dataclasses.replace(law, log_bins=log_bins.log_softmax(1))
    q = INTERVALS - 1
    levels = torch.special.ndtr(torch.linspace(-4.5, 4.5, q, dtype=torch.float64))
    for last in (False, True):
        edges = law.grid(levels)
        x, log_mass = law.nodes(edges)
        factor = _likelihood(model, p, place, x)
        if not last:
            levels = _refined(log_mass[:, : q + 1], factor[:, : q + 1])
    return Reweighted.of(law, edges, factor)


def _representatives(law: Labels) -> Tensor:
    """A code of each bin, shape (B,): what comes later cannot tell codes of a bin apart."""
    c = law.cells
    code = torch.zeros(c.num_bins, dtype=torch.long)
    return code.scatter_(0, c.group, torch.arange(len(c.group))).double()


def _refined(log_mass: Tensor, factor: Tensor) -> Tensor:
    """Levels of the law, (N, Q), where the product has equal shares, and some everywhere."""
    n, count = log_mass.shape
    share = (log_mass + factor).softmax(1)
    wide = torch.nn.functional.max_pool1d(share[:, None], 3, 1, 1)[:, 0]  # up to the neighbours
    weight = wide / wide.sum(1, keepdim=True) + 0.3 / count
    zero = torch.zeros(n, 1, dtype=weight.dtype)
    cum = torch.cat([zero, weight.cumsum(1)], 1)
    cum = cum / cum[:, -1:]
    mass = log_mass.exp()
    level = torch.cat([zero, mass.cumsum(1)], 1) / mass.sum(1, keepdim=True)
    want = (torch.arange(1, count) / count).double().expand(n, -1).contiguous()
    at = torch.searchsorted(cum.contiguous(), want).clamp(1, count)
    c0, c1 = cum.gather(1, at - 1), cum.gather(1, at)
    l0, l1 = level.gather(1, at - 1), level.gather(1, at)
    return l0 + (l1 - l0) * ((want - c0) / (c1 - c0).clamp_min(1e-300)).clamp(0, 1)


def _likelihood(model: TableModel, p: Particles, place: int, x: Tensor) -> Tensor:
    """Log-density of the observed later cells, for each value x (N, C) of the cell at a place.

    Less the largest of the row.
    """
    n, count = x.shape
    p = copy.copy(p)
    p.branch(place, torch.arange(n), x, torch.zeros_like(x), None)
    p.state = model.read(place, p.raw[:, place], p.state)
    every, total = torch.arange(n * count), torch.zeros(n * count, dtype=torch.float64)
    for i in range(place + 1, len(model.cells)):
        t = i - model.num_given
        if p.state is not None or model.slot(t, place) is not None:  # else it never hears of x
            seen = p.raw[:, i]
            log_p = p.conditional(t, every).log_prob(seen).clamp_min(IMPOSSIBLE)
            total += torch.where(seen.isnan(), 0.0, log_p)
        p.state = model.read(i, p.raw[:, i], p.state)
    total = total.view(n, count)
    return total - total.amax(1, keepdim=True)
