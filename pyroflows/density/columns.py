"""Cells of one column in the terms of its conditional density, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyroflows.density.histogram import Histogram
from pyroflows.density.scores import NormalScores
from pyroflows.tables import Column

__all__ = ["Encoded", "LabelCells", "NumberCells", "cells_for"]

NUMBERS = ("atoms", "loc", "scale", "bin_mass", "step", "anchor", "bounds")  # of NumberCells
NEVER = -1e30  # stands for log 0 where -inf would spoil gradients
POINT = 1e-8  # width in normal scores that stands for a point


class Encoded(NamedTuple):
    """Cells, each of shape (N,): what the conditional densities need."""

    bin: Tensor
    inside: Tensor
    upper: Tensor
    width: Tensor
    offset: Tensor


class LabelCells(nn.Module):
    """Codes: the most frequent labels have a bin each, the rarer ones share the last.

    Args:
        group: Bin of each code, shape (C,).
        log_inside: Log-probability of the code inside its bin, shape (C,).
        bin_mass: Probabilities of the bins.
        log_unseen: Log-probability of a label that fitting did not see.
        missing_seen: Whether fitting saw missing cells.
    """

    is_label = True

    def __init__(
        self,
        *,
        group: Tensor,
        log_inside: Tensor,
        bin_mass: Tensor,
        log_unseen: Tensor,
        missing_seen: Tensor,
    ) -> None:
        super().__init__()
        self.register_buffer("group", group)
        self.register_buffer("log_inside", log_inside)
        self.register_buffer("bin_mass", bin_mass)
        self.register_buffer("log_unseen", log_unseen)
        self.register_buffer("missing_seen", missing_seen)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> LabelCells:
        """From what ``state_dict`` gave."""
        return cls(**state)

    @property
    def num_bins(self) -> int:
        """Outcomes of the conditional softmax."""
        return len(self.bin_mass)

    @property
    def num_features(self) -> int:
        """Inputs that the column gives to later ones."""
        return self.num_bins + int(self.missing_seen)

    @classmethod
    def fit(
        cls,
        codes: np.ndarray,
        count: int,
        *,
        weight: np.ndarray | None = None,
        max_bins: int = 128,
    ) -> LabelCells:
        """From codes (NaN where missing) of ``count`` levels, and weights."""
        known = ~np.isnan(codes)
        held = codes[known].astype(int)
        seen = np.ones(len(held)) if weight is None else weight[known]
        found = np.bincount(held[held < count], seen[held < count], minlength=count)
        freq = (found[: max(count, 1)] if count else np.ones(1)) + 0.1
        rank = np.empty(len(freq), int)
        rank[np.argsort(-freq, kind="stable")] = np.arange(len(freq))
        group = np.minimum(rank, max_bins - 1)
        mass = np.bincount(group, freq)
        unseen = 1 / (seen.sum() + 2)
        inside = np.log(freq / mass[group]) + math.log1p(-unseen)
        return cls(
            group=torch.as_tensor(group),
            log_inside=torch.as_tensor(inside),
            bin_mass=torch.as_tensor(mass / mass.sum()),
            log_unseen=float64(math.log(unseen)),
            missing_seen=torch.tensor(bool(len(held) < len(codes))),
        )

    def encode(self, x: Tensor, *, lattice: bool = True) -> Encoded:
        """Codes to cells; an unknown code gets bin -1."""
        code = x.nan_to_num(0).long()
        known = code < len(self.group)
        code = torch.where(known, code, 0)
        zero = torch.zeros_like(x)
        return Encoded(
            torch.where(known, self.group[code], -1), self.log_inside[code], zero, zero + 1, zero
        )

    def features(self, x: Tensor) -> Tensor:
        """Indicators of the bins, and of a missing cell, shape (N, num_features)."""
        cell = torch.where(x.isnan(), -1, self.encode(x).bin)
        hot = F.one_hot(cell + 1, self.num_bins + 1)[:, 1:].float()
        return torch.cat([hot, x.isnan().float()[:, None]], 1) if self.missing_seen else hot

    def draw(self, cell: Tensor, u: Tensor) -> Tensor:
        """A code from each bin, by uniform numbers; cells and numbers of one shape."""
        one = torch.zeros(self.num_bins, dtype=torch.long).scatter_(
            0, self.group, torch.arange(len(self.group))
        )
        crowd = (self.group == self.num_bins - 1).nonzero()[:, 0]
        share = self.log_inside[crowd].softmax(0).cumsum(0)
        pick = torch.searchsorted(share, u.contiguous(), right=True).clamp_max(len(crowd) - 1)
        return torch.where(cell == self.num_bins - 1, crowd[pick], one[cell]).double()


class NumberCells(nn.Module):
    """Numbers: bins of a histogram, then a bin per atom; normal scores for the smooth part.

    Args:
        hist: The histogram of the regular values.
        scores: Their map to normal scores.
        atoms: Values of their own probability, shape (A,).
        loc: Center of the standardized copy that later columns see.
        scale: Its scale.
        bin_mass: Probabilities of the bins, atoms last.
        step: Recording step, 0 for none.
        anchor: A value on the lattice.
        bounds: Lower and upper end of the support.
        waves: Frequencies of the rank that later columns see; they let the networks learn sharp
            dependence early.
        missing_seen: Whether fitting saw missing cells.
    """

    is_label = False

    def __init__(
        self,
        *,
        hist: Histogram,
        scores: NormalScores,
        waves: Tensor,
        missing_seen: Tensor,
        **numbers: Tensor,
    ) -> None:
        super().__init__()
        self.hist, self.scores = hist, scores
        if set(numbers) != set(NUMBERS):
            raise TypeError(f"NumberCells expects {NUMBERS}; got {sorted(numbers)}")
        for name in NUMBERS:
            self.register_buffer(name, numbers[name].double())
        self.register_buffer("waves", waves)
        self.register_buffer("missing_seen", missing_seen)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> NumberCells:
        """From what ``state_dict`` gave."""
        parts: dict[str, dict[str, Tensor]] = {"hist": {}, "scores": {}, "": {}}
        for name, tensor in state.items():
            part, _, own = name.rpartition(".")
            parts[part][own] = tensor
        scores = NormalScores.from_state(parts["scores"])
        return cls(hist=Histogram.from_state(parts["hist"]), scores=scores, **parts[""])

    @property
    def num_bins(self) -> int:
        """Bins and atoms."""
        return len(self.bin_mass)

    @property
    def num_features(self) -> int:
        """Inputs that the column gives to later ones."""
        return 2 + 2 * len(self.waves) + len(self.atoms) + int(self.missing_seen)

    @classmethod
    def fit(
        cls,
        values: np.ndarray,
        column: Column,
        *,
        weight: np.ndarray | None = None,
        max_bins: int = 64,
    ) -> NumberCells:
        """From values (NaN where missing), at least one of them present, and weights."""
        known = ~np.isnan(values)
        held = values[known]
        seen = np.ones(len(held)) if weight is None else weight[known]
        atom = np.isin(held, column.atoms)
        own = ~atom if (~atom).any() else np.ones(len(held), bool)
        regular = held[own] if weight is None else repeated(held[own], seen[own])
        anchor, step = column.anchor, column.step or 0.0
        if step:
            regular = anchor + np.round((regular - anchor) / step) * step
        middle, spread = moments(regular)
        spread = max(spread or 1.0, step)
        hist, scores = _smooth_parts(regular, column, unit_of(spread), max_bins)
        low = -np.inf if column.lower is None else column.lower - step / 2
        high = np.inf if column.upper is None else column.upper + step / 2
        count = np.array([seen[held == a].sum() for a in column.atoms], float) + 0.1
        share = max(float(seen[~atom].sum()), 0.1)
        mass = np.concatenate([hist.bin_mass.numpy() * share, count])
        waves = 0 if seen.sum() < 1000 else 3 if seen.sum() < 5000 else 6
        return cls(
            hist=hist,
            scores=scores,
            atoms=float64(column.atoms),
            loc=float64(middle),
            scale=float64(spread),
            bin_mass=float64(mass / mass.sum()),
            step=float64(step),
            anchor=float64(anchor),
            bounds=float64([low, high]),
            waves=torch.arange(1, 1 + waves),
            missing_seen=torch.tensor(bool(len(held) < len(values))),
        )

    def atom(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each value is an atom, and which."""
        same = x[:, None] == self.atoms
        return same.any(1), same.long().argmax(1) if len(self.atoms) else torch.zeros_like(
            x, dtype=torch.long
        )

    def snap(self, x: Tensor) -> Tensor:
        """The nearest value of the lattice, written with the digits of its step."""
        if self.step == 0:
            return x
        out = self.anchor + ((x - self.anchor) / self.step).round() * self.step
        step, edges = float(self.step), self.ends()
        # of the column, not of x: what a value becomes must not depend on those beside it
        size = max(abs(float(self.anchor)), float(edges[edges.isfinite()].abs().max()), step)
        digits = int(min(15 - math.ceil(math.log10(size)), 5 - math.floor(math.log10(step))))
        return out.round(decimals=digits) if digits >= 0 else out

    def encode(self, x: Tensor, *, lattice: bool = True) -> Encoded:
        """Values to cells; differentiable in x, except for the bins.

        Args:
            x: Values, shape (N,); NaN gives NaN-free nonsense for the caller to mask.
            lattice: Whether a value of a lattice column stands for its cell; else for the point.
        """
        x = x.nan_to_num(float(self.loc))
        step = float(self.step) if lattice else 0.0
        is_atom, which = self.atom(x)  # before rounding: an atom need not lie on the lattice
        if step:
            x = self.anchor + ((x - self.anchor) / step).round() * step
            cell, inside = self.hist.log_cell(x / self.unit, step / self.unit)
            upper, lower = self.score(x + step / 2)[0], self.score(x - step / 2)[0]
            width = (upper - lower).clamp_min(1e-12)
            inside = inside - self.log_unit
            offset = torch.full_like(x, -math.log(step))
        else:
            cell, inside = self.hist.log_density(x.detach() / self.unit)
            inside = inside - self.log_unit
            upper, offset = self.score(x)
            width = torch.full_like(x, POINT)
            offset = offset - math.log(POINT)
        inside = inside.clamp_min(NEVER)
        offset = torch.where((x < self.bounds[0]) | (x > self.bounds[1]), NEVER, offset)
        if len(self.atoms) and lattice:
            cell = torch.where(is_atom, self.hist.num_bins + which, cell)
            inside = torch.where(is_atom, -math.log(step) if step else 0.0, inside)
            offset = torch.where(is_atom, NEVER, offset)
        return Encoded(cell, inside, upper, width, offset)

    def features(self, x: Tensor) -> Tensor:
        """Normal score, standardized value, waves of the rank, atoms, missing; shape (N, F)."""
        gone = x.isnan()
        x = x.nan_to_num(float(self.loc))
        parts = [self.score(x)[0].clamp(-6, 6), ((x - self.loc) / self.scale).clamp(-6, 6)]
        if len(self.waves):
            angle = math.pi * self.hist.cdf(x / self.unit)[None] * self.waves[:, None]
            parts += [*(angle.sin() / self.waves[:, None]), *(angle.cos() / self.waves[:, None])]
        parts = [torch.where(gone, 0.0, p) for p in parts]
        if len(self.atoms):
            is_atom, which = self.atom(x)
            parts += list(
                F.one_hot(torch.where(is_atom, which + 1, 0), len(self.atoms) + 1)[:, 1:].T
            )
        if self.missing_seen:
            parts.append(gone)
        return torch.stack([p.float() for p in parts], 1)

    def draw(self, cell: Tensor, u: Tensor, *, lattice: bool = True) -> Tensor:
        """A value from each bin, by uniform numbers; cells and numbers have shape (N,).

        Unless ``lattice``, anywhere between the recording steps.
        """
        regular = cell < self.hist.num_bins
        x = self.hist.icdf_in_bin(torch.where(regular, cell, 0), u) * self.unit
        x = self.keep(x, lattice=lattice)
        if len(self.atoms):
            place = (cell - self.hist.num_bins).clamp(0, len(self.atoms) - 1)
            x = torch.where(regular, x, self.atoms[place])
        return x

    @property
    def unit(self) -> float:
        """Power of two in which the histogram and the scores count: 1 but for absurd spreads."""
        return unit_of(float(self.scale))

    @property
    def log_unit(self) -> float:
        """Logarithm of :attr:`unit`."""
        return math.log(self.unit)

    def score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normal scores of values, and the log-slope there."""
        s, log_slope = self.scores.inverse_and_log_det(x / self.unit)
        return s, log_slope - self.log_unit

    def place(self, s: Tensor) -> Tensor:
        """Values at normal scores, on or off the lattice."""
        return self.scores(s.double()) * self.unit

    def ends(self) -> Tensor:
        """Edges of the histogram's pieces."""
        return self.hist.edges * self.unit

    def bin_share(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The bin of each value and the share of the bin below it."""
        return self.hist.cdf_in_bin(x / self.unit)

    def from_score(self, s: Tensor, *, lattice: bool = True) -> Tensor:
        """The value at a normal score."""
        return self.keep(self.place(s), lattice=lattice)

    def below(self, x: Tensor) -> Tensor:
        """The place just before x that no probability separates from it, unless x carries some."""
        if self.step > 0:
            return x - self.step
        return torch.where(self.atom(x)[0], torch.nextafter(x, x - 1), x) if len(self.atoms) else x

    def keep(self, x: Tensor, *, lattice: bool = True) -> Tensor:
        """Inside the support, and on the lattice."""
        if not lattice:
            return x.clamp(self.bounds[0], self.bounds[1])
        half = self.step / 2
        return self.snap(x.clamp(self.bounds[0] + half, self.bounds[1] - half))


def _smooth_parts(
    regular: np.ndarray, column: Column, unit: float, max_bins: int
) -> tuple[Histogram, NormalScores]:
    """Histogram and normal scores of regular values, which count in a unit."""
    step = column.step or 0.0
    lower, upper = column.lower, column.upper
    hist = Histogram.fit(
        regular / unit,
        step=step / unit or None,
        lower=None if lower is None else lower / unit,
        upper=None if upper is None else upper / unit,
        max_bins=max_bins,
    )
    return hist, NormalScores.fit(
        regular / unit,
        lower=None if lower is None else (lower - step / 2) / unit,
        upper=None if upper is None else (upper + step / 2) / unit,
    )


def float64(x: Any) -> Tensor:
    """A tensor that rounds nothing, whatever the default dtype."""
    return torch.as_tensor(x, dtype=torch.float64)


def unit_of(spread: float) -> float:
    """A power of two near an absurd spread, else 1."""
    power = math.frexp(spread)[1]
    return 1.0 if abs(power) < 300 else math.ldexp(1.0, min(power, 1023))


def moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation; a spread that rounding could have made counts as none."""
    size = float(np.abs(values).max())
    if size == 0:
        return 0.0, 0.0
    power = math.ldexp(1.0, math.frexp(size)[1] - 1)
    part = values / power
    middle, spread = float(np.mean(part)), float(np.std(part))
    real = spread > 4 * np.finfo(float).eps and len(np.unique(values)) > 1
    return middle * power, spread * power if real else 0.0


def repeated(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Values in order, each as often as its weight says, to one in each stretch."""
    order = np.argsort(values, kind="stable")
    below = weight[order].cumsum()
    n = max(round(float(below[-1])), 1)
    place = np.searchsorted(below, (np.arange(n) + 0.5) / n * below[-1])
    return values[order][place.clip(0, len(values) - 1)]


def cells_for(
    values: np.ndarray,
    column: Column,
    *,
    weight: np.ndarray | None = None,
    max_bins: int = 64,
) -> LabelCells | NumberCells:
    """The cells of a column whose encoded values are given, shape (N,), and weights."""
    if column.is_label:
        return LabelCells.fit(values, len(column.levels), weight=weight)
    if np.isnan(values).all():
        raise ValueError(f"column {column.name!r} has no values")
    return NumberCells.fit(values, column, weight=weight, max_bins=max_bins)
