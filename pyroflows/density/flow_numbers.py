"""The numbers of a table as points that a flow can see: cells, atoms, context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyroflows.density.columns import LabelCells, NumberCells, repeated
from pyroflows.density.histogram import Histogram
from pyroflows.density.scores import Marginals, NormalScores
from pyroflows.density.uniforms import Uniforms

__all__ = ["NumberSide", "own_uniforms", "score_map"]

LOG_ROOT = 0.5 * math.log(2 * math.pi)
SPREAD = (np.arange(89) * 0.6180339887498949) % 1  # evenly over a cell, in no order


class NumberSide:
    """Between rows of a table and the points and contexts of a flow of its numbers.

    A lattice value is any point of its recording cell. A number at an atom is any value of its
    marginal law, which the flow is told of; so every row has a density of a vector of numbers.

    Args:
        cells: Of all columns, in the schema's order.
        told: Columns that the flow is told of, in order.
        columns: Columns that it models, in order.
        marginals: Their maps from normal scores.
    """

    def __init__(
        self,
        cells: Sequence[LabelCells | NumberCells],
        told: Sequence[int],
        columns: Sequence[int],
        marginals: Marginals,
    ) -> None:
        self.cells, self.told, self.columns = list(cells), list(told), list(columns)
        self.marginals = marginals

    @classmethod
    def fit(
        cls,
        cells: Sequence[LabelCells | NumberCells],
        told: Sequence[int],
        columns: Sequence[int],
        values: Tensor,
        weight: Tensor,
    ) -> NumberSide:
        """With the marginal maps of the rows ``values`` (N, D), of these weights."""
        maps = []
        for j in columns:
            c, x = cast(NumberCells, cells[j]), values[:, j]
            own = ~c.atom(x)[0] if len(c.atoms) else torch.ones_like(x, dtype=torch.bool)
            own = own if own.any() else ~own
            maps.append(score_map(c, repeated(c.snap(x[own]).numpy(), weight[own].numpy())))
        return cls(cells, told, columns, Marginals(maps))

    @property
    def cells_of_numbers(self) -> list[NumberCells]:
        """Cells of the modelled numbers."""
        return [c for c in (self.cells[j] for j in self.columns) if isinstance(c, NumberCells)]

    @property
    def context_dim(self) -> int:
        """Features of the context."""
        seen = sum(self.cells[j].num_features for j in self.told)
        return seen + sum(len(c.atoms) for c in self.cells_of_numbers)

    def atoms(self, x: Tensor) -> Tensor:
        """Which atom each number is, from 1, or 0 for none; of the shape (N, numbers) of x."""
        which = [
            torch.where(at, index + 1, 0)
            for at, index in (c.atom(v) for c, v in zip(self.cells_of_numbers, x.T, strict=True))
        ]
        return torch.stack(which, 1)

    def context(self, values: Tensor, atoms: Tensor) -> Tensor | None:
        """What the flow is told of rows: features of the other columns, and which atoms.

        Args:
            values: Shape (N, D) in the schema's order.
            atoms: As :meth:`atoms` returns them.

        Returns:
            Shape (N, context_dim), float64; None where there is nothing to tell.
        """
        parts = [self.cells[j].features(values[:, j]) for j in self.told]
        for c, which in zip(self.cells_of_numbers, atoms.T, strict=True):
            if len(c.atoms):
                parts.append(F.one_hot(which, len(c.atoms) + 1)[:, 1:])
        return torch.cat([p.double() for p in parts], 1) if parts else None

    @property
    def certain(self) -> bool:
        """Whether every row is one point: no lattice, no atom."""
        return all(float(c.step) == 0 and not len(c.atoms) for c in self.cells_of_numbers)

    def points(self, x: Tensor, atoms: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Points that rows may stand for, and the log-density from which they are drawn.

        Args:
            x: Numbers, shape (N, numbers).
            atoms: Which atom each is.
            u: Uniform numbers, of a shape that broadcasts with x.

        Returns:
            The points, shape (N, numbers), and log q, shape (N,): log p of a row is the log of
            the mean of exp(log p(point) - log q).
        """
        out, log_q = [], x.new_zeros(len(x))
        for i, (c, part) in enumerate(
            zip(self.cells_of_numbers, self.marginals.parts, strict=True)
        ):
            noise = u[:, i].expand(len(x))
            y = c.snap(x[:, i]) + c.step * (noise - 0.5)
            at = atoms[:, i] > 0
            if at.any():
                s = torch.special.ndtri(noise[at].clamp(1e-12, 1 - 1e-12))
                y[at], log_slope = part.forward_and_log_det(s)
                log_step = math.log(c.step) if c.step > 0 else 0.0
                log_q[at] += log_step - 0.5 * s * s - LOG_ROOT - log_slope
            out.append(y)
        return torch.stack(out, 1), log_q

    def inside(self, x: Tensor) -> Tensor:
        """Which rows of numbers lie in the support, shape (N,)."""
        ends = torch.stack([c.bounds for c in self.cells_of_numbers])
        return ((x >= ends[:, 0]) & (x <= ends[:, 1])).all(1)

    def values(self, points: Tensor, atoms: Tensor, *, lattice: bool = True) -> Tensor:
        """Numbers that points stand for: on the lattice, inside the support, atoms exact."""
        out = []
        for i, c in enumerate(self.cells_of_numbers):
            x = c.keep(points[:, i], lattice=lattice)
            if len(c.atoms):
                value = c.atoms[(atoms[:, i] - 1).clamp_min(0)]
                x = torch.where(atoms[:, i] > 0, value, x)
            out.append(x)
        return torch.stack(out, 1)


def own_uniforms(x: Tensor) -> Tensor:
    """Uniform numbers of the shape (N, numbers) of x that depend on nothing but their row."""
    row = torch.zeros(len(x), dtype=torch.long)
    for bits in (x + 0.0).contiguous().view(torch.int64).T:
        row = (row ^ bits) * 0x5851F42D4C957F2D
    uniforms, none = Uniforms(0), torch.zeros_like(row)
    return torch.stack([uniforms(row, none, i) for i in range(x.shape[1])], 1)


def score_map(cells: NumberCells, values: np.ndarray) -> NormalScores:
    """The map of a column: its histogram's, or the smooth one, as half of the rows judge.

    Args:
        cells: The column.
        values: Its values in increasing order, atoms left out.
    """
    unit, step = cells.unit, float(cells.step) / cells.unit
    low, high = (cells.bounds / unit).tolist()
    ends = [None if math.isinf(end) else end for end in (low, high)]
    inner = [
        None if end is None else end + s * step / 2 for end, s in zip(ends, (1, -1), strict=True)
    ]
    x = values / unit
    some, rest = x[::2], torch.as_tensor(x[1::2])
    if len(rest) < 20:
        return cells.scores.rescaled(unit)
    hist = Histogram.fit(some, step=step or None, lower=inner[0], upper=inner[1])
    rough = NormalScores.of(hist, lower=low, upper=high)
    smooth = NormalScores.fit(some, lower=ends[0], upper=ends[1])
    spread = torch.as_tensor(np.resize(SPREAD, len(rest)))
    points = rest + step * (spread - 0.5)
    gain = _nats(rough, points) - _nats(smooth, points)
    if gain.mean() < 2 * gain.std() / math.sqrt(len(gain)):  # no more than chance
        return cells.scores.rescaled(unit)
    return NormalScores.of(cells.hist, lower=low, upper=high).rescaled(unit)


def _nats(scores: NormalScores, x: Tensor) -> Tensor:
    """Log-density of values whose scores are standard normal."""
    s, log_slope = scores.inverse_and_log_det(x)
    return log_slope - 0.5 * s * s - LOG_ROOT
