"""Random numbers of a row, a draw and a column: no row feels those beside it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

__all__ = ["Uniforms"]


def _mix(z: Tensor) -> Tensor:
    """Scramble 64-bit integers, a bijection (Steele, Lea, Flood 2014, SplitMix64)."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return z ^ ((z >> 31) & ((1 << 33) - 1))


GOLDEN = -7046029254386353131


def _as_int64(z: int) -> int:
    """An integer as one of 64 bits."""
    return (z + 2**63) % 2**64 - 2**63


class Uniforms:
    """Uniform numbers that depend on a seed and their place alone.

    Args:
        seed: Any 63-bit integer.
        strata: If given, all rows share the numbers, and the first ``strata`` draws fall into as
            many equal parts of (0, 1), one in each; so for the next ones.
    """

    def __init__(self, seed: int, *, strata: int = 0) -> None:
        self.seed = _mix(torch.tensor(seed, dtype=torch.int64))
        self.strata = strata
        self.rows: Tensor | None = None

    def at(self, rows: Tensor) -> Uniforms:
        """The same for a part of the table, whose rows stand at these places."""
        out = copy.copy(self)
        out.rows = rows if self.rows is None else self.rows[rows]
        return out

    def __call__(self, row: Tensor, draw: Tensor, column: int, kind: int = 0) -> Tensor:
        """Numbers in (0, 1) for rows and draws, shape (P,); ``kind`` tells several apart."""
        key = _mix(self.seed + _as_int64((column * 8 + kind + 1) * GOLDEN))
        if not self.strata or not len(draw):
            return self._hash(key, row if self.rows is None else self.rows[row], draw)
        count = int(draw.max()) // self.strata + 1
        every = torch.arange(count * self.strata)
        place = self._hash(key, torch.zeros_like(every), every).view(count, -1)
        inner = self._hash(_mix(key + 1), torch.zeros_like(every), every).view(count, -1)
        return ((place.argsort(1).argsort(1) + inner) / self.strata).view(-1)[draw]

    @staticmethod
    def _hash(key: Tensor, row: Tensor, draw: Tensor) -> Tensor:
        z = _mix(_mix(key + row * GOLDEN) + draw * GOLDEN)
        return (((z >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
