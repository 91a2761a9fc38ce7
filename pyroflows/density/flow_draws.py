"""Draws of a flow's table given any of its cells, by resampling draws of a simpler model."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pyroflows.checks import users_line
from pyroflows.density.engine import Engine, Settings, TrainingTable
from pyroflows.density.mixed_engine import MixedEngine
from pyroflows.training.budget import Budget
from pyroflows.weights import effective_sample_size, systematic_resample

__all__ = ["pupil_of", "weighted"]

LESSONS = 10_000  # draws from which the simpler model learns
PROPOSALS = 256  # for a row, at least
ROWS = 8192  # at once


def pupil_of(teacher: Engine, device: str) -> MixedEngine:
    """A model of all columns, missing cells and all, that has learned from another's draws."""
    generator = torch.Generator().manual_seed(0)
    blank = torch.full((LESSONS, len(teacher.schema)), torch.nan, dtype=torch.float64)
    rows = teacher.complete(blank, 1, generator=generator)[:, 0]
    engine = MixedEngine(Settings(max_steps=400, members=1, device=device))
    weight = torch.ones(len(rows), dtype=torch.float64)
    with torch.inference_mode(False), torch.enable_grad():
        table = TrainingTable(teacher.schema, rows.clone(), weight, [])
        engine.fit(table, budget=Budget(), generator=generator)
    return engine


def weighted(
    target: Engine,
    proposal: Engine,
    values: Tensor,
    n: int,
    generator: torch.Generator,
    *,
    within: Engine | None = None,
) -> Tensor:
    """Draws of missing cells by importance resampling, (N, n, D).

    Args:
        target: What they are to be draws of.
        proposal: What they are drawn from.
        values: Rows, NaN where a cell is to be filled in.
        n: Draws per row.
        generator: Source of randomness.
        within: The proposal within conditions that rows must fulfil, if there are any.

    Warns:
        UserWarning: Where rows are left with few effective draws, saying how many rows.
    """
    count = max(PROPOSALS, 2 * n)
    out, poor = [], 0
    for rows in torch.arange(len(values)).split(max(1, ROWS // count)):
        source = proposal if within is None else within
        drawn = source.complete(values[rows], count, generator=generator)
        flat = drawn.flatten(0, 1)
        good = ~flat.isnan().any(1)  # else the observed cells cannot be
        log_w = torch.full((len(flat),), -torch.inf, dtype=torch.float64)
        log_w[good] = target.log_prob(flat[good])[0] - proposal.log_prob(flat[good])[0]
        log_w = log_w.nan_to_num(nan=-torch.inf, posinf=-torch.inf).view(len(rows), count)
        dead = log_w.amax(1) == -torch.inf
        share = torch.where(dead[:, None], 0.0, log_w).softmax(1)
        few = effective_sample_size(share) < max(2.0, min(n, 50) / 2)
        poor += int((few | dead).sum())
        shift = torch.rand(len(rows), generator=generator, dtype=share.dtype)
        pick = systematic_resample(share, n, shift)
        pick = pick[:, torch.randperm(n, generator=generator), None]
        out.append(drawn.gather(1, pick.expand(-1, -1, drawn.shape[-1])))
    if poor:
        warnings.warn(
            f"what is known of {poor} row(s) leaves few effective draws: condition on "
            "fewer cells, or fit a conditional model (target=, given=)",
            stacklevel=users_line(),
        )
    return torch.cat(out)
