"""Closed-form starts of the networks where labels are rare."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyroflows.density.columns import NumberCells
from pyroflows.density.model import Rows, TableModel
from pyroflows.training.budget import Budget

__all__ = ["start_rare"]

RARE = (4, 100)  # rows of a label that gradients hardly meet, and that say enough


@torch.no_grad()
def start_rare(model: TableModel, values: Tensor, weight: Tensor, budget: Budget) -> None:
    """Start the networks of rare labels where their rows say, in closed form.

    A few rows in thousands move no held-out mean: training would stop before it had learned them.
    Given a rare label, later numbers start at the mean of its rows, later labels at their
    frequencies; the label itself starts as a linear discriminant of earlier numbers. Only what
    differs by four standard errors is told.

    Args:
        model: With untrained networks.
        values: Rows as the schema orders them, shape (N, D).
        weight: Their weights.
        budget: A third of it may be gone.
    """
    if not any(c.is_label for c in model.cells) or len(values) < 20 * RARE[0]:
        return
    rows = model.encode(values)
    scores = [
        _standing(c, rows.raw[:, i]) if isinstance(c, NumberCells) else None
        for i, c in enumerate(model.cells)
    ]
    for i, c in enumerate(model.cells):
        if not c.is_label:
            continue
        codes = torch.where(rows.raw[:, i].isnan(), -1, c.encode(rows.raw[:, i]).bin)
        for b in range(c.num_bins):
            mine = weight * (codes == b)
            if budget.over(0.33):
                return budget.tell("left rare labels to be learned by gradients")
            if RARE[0] <= float(mine.sum()) <= min(RARE[1], 0.02 * float(weight.sum())):
                _start_given(model, rows, scores, mine, i, b)
                if i >= model.num_given:
                    _start_label(model, scores, mine, i, b)


def _standing(c: NumberCells, x: Tensor) -> Tensor:
    """Normal scores as later columns see them, 0 where missing."""
    return c.features(x)[:, 0].double()


def _start_given(
    model: TableModel, rows: Rows, scores: list[Any], mine: Tensor, i: int, b: int
) -> None:
    """Later columns given bin b of label column i, whose rows weigh ``mine``."""
    count, k = float(mine.sum()), model.config["components"]
    for t in range(max(0, i + 1 - model.num_given), len(model.targets)):
        slot = model.slot(t, i)
        if slot is None:
            continue
        skip = model.own(model.nets.skip, t)[:, slot + b]
        s = scores[model.num_given + t]
        if s is not None:
            shift = float((mine * s).sum()) / count
            spread = float((mine * (s - shift).square()).sum() / count) ** 0.5
            if abs(shift) > 4 * max(spread, 0.5) / math.sqrt(count):
                skip[:, :k], skip[:, k : 2 * k] = 4.0, shift  # logistics rather than bins
            continue
        mass = model.targets[t].bin_mass.double()
        known = ~rows.missing[t] & (rows.bin[t] >= 0)
        seen = torch.zeros_like(mass).index_add_(0, rows.bin[t][known], mine[known])
        error = (seen - count * mass).abs() / (count * mass).clamp_min(0.5).sqrt()
        if error.max() > 4:
            ratio = ((seen + mass) / (seen.sum() + 1)).log() - mass.log()
            skip[:, 1 : 1 + len(mass)] = ratio.float()


def _start_label(model: TableModel, scores: list[Any], mine: Tensor, i: int, b: int) -> None:
    """Bin b of label column i given earlier numbers: Fisher's discriminant."""
    t = i - model.num_given
    earlier = [j for j in range(i) if scores[j] is not None and model.slot(t, j) is not None]
    if not earlier:
        return
    s = torch.stack([scores[j] for j in earlier], 1)
    count = float(mine.sum())
    shift = (mine[:, None] * s).sum(0) / count - s.mean(0)
    told = shift.abs() > 4 * s.std(0).clamp_min(0.5) / math.sqrt(count)
    shift = torch.where(told, shift, 0.0)
    cov = s.T.cov().reshape(len(earlier), -1) + 0.1 * torch.eye(len(earlier), dtype=s.dtype)
    slope = torch.linalg.solve(cov, shift)
    skip, bias = (model.own(part, t) for part in (model.nets.skip, model.nets.bias))
    for j, w in zip(earlier, slope.tolist(), strict=True):
        skip[:, model.slot(t, j), 1 + b] = w
    bias[..., 1 + b] -= float(slope @ (s.mean(0) + shift / 2))
