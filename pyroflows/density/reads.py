"""Which earlier columns the networks of a wide table read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.density.columns import LabelCells, NumberCells

__all__ = ["WIDE", "choose_reads"]

WIDE = 64  # columns up to which every network reads all earlier ones
ROWS = 2000  # that the dependence is measured on
VIEWS = 8  # of a column, at most


def choose_reads(
    cells: Sequence[LabelCells | NumberCells],
    raw: Tensor,
    num_given: int,
    *,
    columns: int = 32,
) -> list[list[int]] | None:
    """The earlier places that each target depends on most; None for tables that are not wide.

    The dependence of two columns is the largest correlation in absolute value between their
    views: normal scores and their squares, indicators of the most frequent labels. With so many
    inputs for each column, networks, memory and time grow linearly in the number of columns.

    Args:
        cells: The columns in model order.
        raw: Their values, shape (N, D), NaN where missing; some of the rows are looked at.
        num_given: How many are given.
        columns: How many are read; fewer where they have many features.
    """
    if len(cells) <= WIDE:
        return None
    some = raw[torch.linspace(0, len(raw) - 1, min(len(raw), ROWS)).long()]
    views = torch.stack([_views(c, some[:, i]) for i, c in enumerate(cells)])  # (D, VIEWS, n)
    most, reads = 16 * columns, []
    for t in range(num_given, len(cells)):
        dependence = (views[:t].flatten(0, 1) @ views[t].T).abs().view(t, VIEWS**2).amax(1)
        strongest = dependence.sort(descending=True, stable=True).indices[:columns].tolist()
        size = torch.tensor([cells[i].num_features for i in strongest]).cumsum(0)
        kept = max(1, int((size <= most).sum()))
        reads.append(sorted(strongest[:kept]))
    return reads


def _views(c: LabelCells | NumberCells, x: Tensor) -> Tensor:
    """Standardized copies of a column, shape (VIEWS, n); constant ones are zero."""
    features = c.features(x)
    if not c.is_label:
        features = torch.stack([features[:, 0], features[:, 0].square()], 1)
    views = features[:, :VIEWS].T
    views = views - views.mean(1, keepdim=True)
    views = views / views.norm(dim=1, keepdim=True).clamp_min(1e-6)
    return torch.nn.functional.pad(views, (0, 0, 0, VIEWS - len(views)))
