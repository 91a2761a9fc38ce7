"""Conditional distributions of one column for many rows at once, in float64.

What :meth:`~Conditional.log_prob` scores is what the other methods draw, count and average.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from pyroflows.density.columns import NEVER, LabelCells, NumberCells
from pyroflows.density.mixtures import gaussian_log_cell
from pyroflows.families import Logistics

__all__ = ["Conditional", "Labels", "Numbers", "mixture_log_prob"]

BLOCK = 2**22  # numbers at once


@dataclasses.dataclass
class Conditional(abc.ABC):
    """One column's distribution for N rows, given the columns before it.

    Values and uniform numbers have shape (N,), or (N, Q) for several in each row. Tensor fields
    have the rows on their first axis.
    """

    odds: Tensor  # probability that the cell is missing, shape (N,)

    def may_miss(self, leave: bool) -> bool:
        """Whether a gap may stay one: with ``leave``, where the fit saw gaps."""
        return leave and bool(self.cells.missing_seen)  # type: ignore[attr-defined]

    def log_there(self, leave: bool) -> Tensor | float:
        """Log-probability that the cell is there, shape (N,); 0 where gaps do not count."""
        return (-bounded(self.odds)).log1p() if self.may_miss(leave) else 0.0

    def __getitem__(self, rows: Tensor) -> Self:
        """The same for some of the rows."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        split = {k: v[rows] for k, v in parts.items() if isinstance(v, (Tensor, Conditional))}
        return type(self)(**(parts | split))

    @abc.abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in data units; ``-inf`` outside the support."""

    @abc.abstractmethod
    def sample(self, u: Tensor, v: Tensor, *, lattice: bool = True) -> Tensor:
        """Values from two independent uniform numbers each."""


def bounded(odds: Tensor) -> Tensor:
    """Probabilities in float64, away from 0 and 1."""
    return odds.double().clamp(1e-7, 1 - 1e-7)


@dataclasses.dataclass
class Labels(Conditional):
    """Bins of labels.

    Args:
        odds: As in :class:`Conditional`.
        cells: The column.
        log_bins: Log-probabilities of the bins, shape (N, B).
    """

    cells: LabelCells
    log_bins: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability of codes; an unknown one has that of all unseen labels."""
        e = self.cells.encode(x.reshape(-1))
        cell = e.bin.view(_table(x))
        out = self.log_bins.gather(1, cell.clamp_min(0)) + e.inside.view_as(cell)
        return torch.where(cell < 0, self.cells.log_unseen, out).view_as(x)

    def sample(self, u: Tensor, v: Tensor, *, lattice: bool = True) -> Tensor:
        """Codes: the bin by ``u``, the label in it by ``v``."""
        pick = choose(self.log_bins, u)
        return self.cells.draw(pick.reshape(-1), v.reshape(-1)).view_as(u)

    def log_table(self) -> Tensor:
        """Log-probabilities of all labels, shape (N, C)."""
        return self.log_bins[:, self.cells.group] + self.cells.log_inside


@dataclasses.dataclass
class Numbers(Conditional):
    """Bins and atoms of a number, logistics and Gaussians of its normal scores.

    Args:
        odds: As in :class:`Conditional`.
        cells: The column.
        log_bins: Log-probabilities of bins, then atoms, shape (N, B).
        log_logistic: Those of K logistics, shape (N, K).
        loc: Their locations, shape (N, K).
        log_scale: Their log-scales, shape (N, K).
        log_gauss: Log-probabilities of G Gaussians, shape (N, G).
        mean: Their means, shape (N, G).
        sd: Their standard deviations, shape (N, G).
    """

    cells: NumberCells
    log_bins: Tensor
    log_logistic: Tensor
    loc: Tensor
    log_scale: Tensor
    log_gauss: Tensor
    mean: Tensor
    sd: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of values: of the recording cell per step on a lattice."""
        e = self.cells.encode(x.reshape(-1))
        cell, inside, upper, width, offset = (part.view(_table(x)) for part in e)
        bins = self.log_bins.gather(1, cell) + inside
        gauss = gaussian_log_cell(upper, width, self.mean[:, None], self.sd[:, None])
        gauss = (self.log_gauss[:, None] + gauss).logsumexp(-1)
        smooth = torch.logaddexp(self._logistics.log_cell(upper, width), gauss)
        out = torch.logaddexp(bins, smooth + offset)
        return torch.where(out < NEVER / 10, -torch.inf, out).view_as(x)

    def sample(self, u: Tensor, v: Tensor, *, lattice: bool = True) -> Tensor:
        """Values: the component by ``u``, the place in it by ``v``."""
        log_w = torch.cat([self.log_bins, self.log_logistic, self.log_gauss], 1)
        pick = choose(log_w, u)
        loc = torch.cat([self.loc, self.mean], 1)
        scale = torch.cat([self.log_scale.exp(), self.sd], 1)
        bins, logistics = self.log_bins.shape[1], self.loc.shape[1]
        inner = v.clamp(1e-12, 1 - 1e-12)
        noise = torch.where(pick < bins + logistics, inner.logit(), torch.special.ndtri(inner))
        which = (pick - bins).clamp_min(0)
        score = (loc.gather(1, which.view(_table(u))).view_as(u)) + (
            scale.gather(1, which.view(_table(u))).view_as(u)
        ) * noise
        smooth = self.cells.from_score(score.reshape(-1), lattice=lattice)
        rough = self.cells.draw(
            pick.clamp_max(bins - 1).reshape(-1), v.reshape(-1), lattice=lattice
        )
        return torch.where(pick >= bins, smooth.view_as(u), rough.view_as(u))

    @property
    def _logistics(self) -> Logistics:
        """The logistics, for several values in each row."""
        weight, loc, log_scale = self.log_logistic, self.loc, self.log_scale
        return Logistics(weight[:, None], loc[:, None], log_scale[:, None], dim=-1)

    @property
    def log_atoms(self) -> Tensor:
        """Log-probabilities of the atoms, shape (N, A)."""
        first = self.cells.hist.num_bins
        return self.log_bins[:, first : first + len(self.cells.atoms)]

    def cdf(self, x: Tensor, *, atoms: bool = True) -> Tensor:
        """P(X <= x); without ``atoms``, their jumps are left out."""
        c = self.cells
        z = x.reshape(_table(x))
        width = z.shape[1] * (self.loc.shape[1] + self.mean.shape[1] + 1)
        if len(x) * width > BLOCK and len(x) > 1:
            parts = torch.arange(len(x)).split(max(1, BLOCK // width))
            return torch.cat([self[rows].cdf(x[rows], atoms=atoms) for rows in parts])
        top = c.snap(z) + c.step / 2 if c.step > 0 else z
        flat = top.reshape(-1)
        cell, share = (part.view_as(z) for part in c.bin_share(flat))
        bins = self.log_bins[:, : c.hist.num_bins].exp()
        below = bins.cumsum(1) - bins
        total = below.gather(1, cell) + bins.gather(1, cell) * share
        s = c.score(flat)[0].view_as(z)
        gauss = torch.special.ndtr((s[..., None] - self.mean[:, None]) / self.sd[:, None])
        total = total + self._logistics.cdf(s)
        total = total + (self.log_gauss.exp()[:, None] * gauss).sum(-1)
        all_smooth = 1 - self.log_atoms.exp().sum(1, keepdim=True)
        total = torch.where(top < c.bounds[0], 0.0, total)
        total = torch.where(top >= c.bounds[1], all_smooth, total)
        if atoms and len(c.atoms):
            total = total + (self.log_atoms.exp()[:, None] * (z[..., None] >= c.atoms)).sum(-1)
        return total.clamp(0, 1).view_as(x)

    def pit(self, x: Tensor, u: Tensor) -> Tensor:
        """P(X < x) + u P(X = x) for uniform numbers u, shape (N,); NaN where x is."""
        held = x.nan_to_num(float(self.cells.loc))
        high, low = self.cdf(held), self.cdf(self.cells.below(held))
        return torch.where(x.isnan(), torch.nan, low + (high - low) * u)

    def quantile(self, p: Tensor) -> Tensor:
        """Smallest x with P(X <= x) >= p."""
        x = self._inverse(p, atoms=True)
        for a, value in enumerate(self.cells.atoms):
            at = value.expand(len(p), *p.shape[1:])
            high = self.cdf(at)
            jump = self.log_atoms[:, a].exp().view(-1, *[1] * (p.dim() - 1))
            x = torch.where((p > high - jump) & (p <= high), value, x)
        return x

    def _inverse(self, p: Tensor, *, atoms: bool) -> Tensor:
        """By bisection on the smooth scale."""
        c = self.cells
        lo, hi = torch.full_like(p, -30.0), torch.full_like(p, 30.0)
        for _ in range(50):
            mid = (lo + hi) / 2
            up = self.cdf(c.place(mid), atoms=atoms) >= p
            lo, hi = torch.where(up, lo, mid), torch.where(up, mid, hi)
        return c.keep(c.place(hi))

    def sample_between(self, low: Tensor, high: Tensor, v: Tensor) -> Tensor:
        """Values in (low, high], atoms apart, from uniform numbers v."""
        a, b = self.cdf(low, atoms=False), self.cdf(high, atoms=False)
        x = self._inverse(a + (b - a) * v, atoms=False)
        return torch.minimum(x, high)

    def mean_value(self, points: int = 401) -> Tensor:
        """Mean, shape (N,), from the distribution function at so many points, and the atoms."""
        c = self.cells
        s = torch.linspace(-10, 10, points, dtype=torch.float64)
        x = c.keep(c.place(s)).unique()
        f = self.cdf(x.expand(len(self.odds), -1), atoms=False)
        step = float(c.step)
        middle = torch.cat([x[:1], (x[:-1] + step + x[1:]) / 2])
        share = torch.cat([f[:, :1], f.diff(dim=1)], 1)
        smooth = (share * middle).sum(1) / share.sum(1).clamp_min(1e-300)
        atom = self.log_atoms.exp()
        return (1 - atom.sum(1)) * smooth + (atom * c.atoms).sum(1)

    # ------------------------------------------------------------------ quadrature

    def grid(self, levels: Tensor) -> Tensor:
        """Ends of intervals near the given levels of the distribution function, atoms apart.

        Args:
            levels: Increasing probabilities, shape (Q,).

        Returns:
            Values, shape (N, Q), not decreasing along the last axis.
        """
        c = self.cells
        s = torch.linspace(-9, 9, 257, dtype=torch.float64)
        x = c.keep(torch.cat([c.place(s), c.ends()])).unique()
        f = self.cdf(x.expand(len(self.odds), -1), atoms=False)
        f = f / f[:, -1:].clamp_min(1e-300)
        at = torch.searchsorted(f.contiguous(), levels.expand(len(f), -1).contiguous())
        at = at.clamp(1, max(len(x) - 1, 1)) if len(x) > 1 else torch.zeros_like(at)
        low, high = x[(at - 1).clamp_min(0)], x[at]
        f0, f1 = f.gather(1, (at - 1).clamp_min(0)), f.gather(1, at)
        part = ((levels - f0) / (f1 - f0).clamp_min(1e-300)).clamp(0, 1)
        return c.keep(low + part * (high - low))

    def nodes(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """A value in each interval between edges (N, Q - 1), and the interval's log-probability.

        The two outer intervals reach to infinity: Q edges make Q + 1 intervals. The atoms follow.
        """
        c = self.cells
        n = len(edges)
        f = self.cdf(edges, atoms=False)
        total = 1 - self.log_atoms.exp().sum(1, keepdim=True)
        f = torch.cat([torch.zeros(n, 1, dtype=f.dtype), f, total], 1)
        s = c.score(edges.reshape(-1))[0].view_as(edges)
        ends = torch.cat([s[:, :1] - 1, s, s[:, -1:] + 1], 1)
        middle = c.keep(c.place((ends[:, 1:] + ends[:, :-1]) / 2))
        if float(c.step) > 0:  # a value of the lattice that the interval holds
            first = torch.cat([middle[:, :1].minimum(edges[:, :1]), edges + c.step], 1)
            last = torch.cat([edges, middle[:, -1:].maximum(edges[:, -1:] + c.step)], 1)
            middle = c.keep(middle.maximum(first).minimum(last))
        log_mass = f.diff(dim=1).clamp_min(0).log()
        atoms = c.atoms.expand(n, -1)
        return torch.cat([middle, atoms], 1), torch.cat([log_mass, self.log_atoms], 1)


def log_scale(raw: Tensor) -> Tensor:
    """Log-scale of a logistic.

    Softly bounded below by -8 (3e-4 of a normal score), linear above.
    """
    return F.softplus(raw + 8.0) - 8.0


def mixture_log_prob(
    out: Tensor,
    cell: Tensor,
    inside: Tensor,
    upper: Tensor,
    width: Tensor,
    offset: Tensor,
    bins: int,
) -> Tensor:
    r"""Log-density of cells under a mixture of histogram bins and logistics of the normal scores.

    .. math:: p = w_{b(x)}\, f(x \mid b) + \sum_k w_k
        \Big[\sigma\big(\tfrac{s^+ - \mu_k}{\sigma_k}\big) - \sigma\big(\tfrac{s^- -
        \mu_k}{\sigma_k}\big)\Big] e^{offset}

    Args:
        out: Network outputs, shape (G, N, bins + 3 K): logits of bins and logistics, locations,
            log-scales.
        cell: Bin of each cell, shape (G, N).
        inside: log f(x | b), shape (G, N).
        upper: Upper end of the cell in normal scores, shape (G, N).
        width: Its width there, shape (G, N).
        offset: Log of density per unit of score probability, shape (G, N).
        bins: Number of bins.
    """
    k = (out.shape[-1] - bins) // 3
    logits, loc, raw = out.split([bins + k, k, k], -1)
    log_w = logits.log_softmax(-1)
    log_bin = log_w[..., :bins].gather(-1, cell[..., None])[..., 0] + inside
    smooth = Logistics(log_w[..., bins:], loc, log_scale(raw), dim=-1)
    return torch.logaddexp(log_bin, smooth.log_cell(upper, width) + offset)


def choose(log_w: Tensor, u: Tensor) -> Tensor:
    """Index of the category that uniform numbers u pick, by log-weights of shape (N, K)."""
    total = log_w.softmax(1).cumsum(1)
    flat = u.reshape(_table(u)).contiguous() * total[:, -1:]
    index = torch.searchsorted(total.contiguous(), flat, right=True)
    return index.clamp_max(log_w.shape[1] - 1).view_as(u)


def _table(x: Tensor) -> tuple[int, int]:
    """Rows, and values in each, of shape (N,) or (N, Q)."""
    return len(x), math.prod(x.shape[1:])


def average(parts: Tensor) -> Tensor:
    """Log of the mean over the first axis, of logarithms."""
    return parts.logsumexp(0) - math.log(len(parts))


def labels_of(cells: LabelCells, out: Tensor, simple: Tensor | None, alpha: float) -> Labels:
    """The average of M networks, outputs (M, N, 1 + B), and a simple model's bins (N, B)."""
    out = out[..., : 1 + cells.num_bins].double()
    log_bins = average(out[..., 1:].log_softmax(-1))
    if simple is not None and alpha > 0:
        log_bins = torch.logaddexp(log_bins + math.log1p(-alpha), simple + math.log(alpha))
    return Labels(out[..., 0].sigmoid().mean(0), cells, log_bins)


def numbers_of(
    cells: NumberCells,
    out: Tensor,
    bins: int,
    simple: tuple[Tensor, Tensor, Tensor] | None,
    alpha: float,
    *,
    atoms: bool = True,
) -> Numbers:
    """The average of M networks, outputs (M, N, 1 + bins + 3 K), and a simple model's Gaussians.

    Without ``atoms``, point masses get no probability.
    """
    out = out.double()
    m, n, p = out.shape
    k = (p - 1 - bins) // 3
    odds, logits, loc, raw = out.split([1, bins + k, k, k], -1)
    if not atoms and len(cells.atoms):
        hidden = torch.arange(cells.hist.num_bins, cells.num_bins)
        logits = logits.index_fill(-1, hidden, NEVER)
    log_w = logits.log_softmax(-1)
    log_bins = average(log_w[..., : cells.num_bins])

    def joined(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(n, m * k)

    log_logistic = joined(log_w[..., bins:]) - math.log(m)
    none = out.new_zeros(n, 0)
    gauss, mean, sd = none, none, none
    if simple is not None and alpha > 0:
        gauss, mean, sd = simple
        gauss, sd = gauss + math.log(alpha), sd.expand_as(mean)
        log_bins, log_logistic = log_bins + math.log1p(-alpha), log_logistic + math.log1p(-alpha)
    return Numbers(
        odds[..., 0].sigmoid().mean(0),
        cells,
        log_bins,
        log_logistic,
        joined(loc),
        log_scale(joined(raw)),
        gauss,
        mean,
        sd,
    )
