"""What rows tell a flow about their units, and how well it scores them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pyroflows.flow import Flow
from pyroflows.training.parallel import agreed
from pyroflows.training.rows import Rows
from pyroflows.transforms.standardization import Units

__all__ = ["score", "standardize_by"]


@torch.no_grad()
def score(flow: nn.Module, parts: Iterable[Rows], *, shared: bool = False) -> float:
    """Return the mean negative log-density in evaluation mode.

    Args:
        flow: The flow; it is left in evaluation mode.
        parts: Rows, in its dtype and on its device.
        shared: Whether each process of ``torch.distributed`` has rows of its own.
    """
    flow.eval()
    total, weights = 0.0, 0.0
    for x, context, weight in parts:
        log_prob = flow.log_prob(x, context).double()
        weight = torch.ones_like(log_prob) if weight is None else weight.double()
        total -= (weight * log_prob).sum().item()
        weights += weight.sum().item()
    if shared:
        like = next(flow.parameters())
        total, weights = (agreed(v, like=like, op="SUM") for v in (total, weights))
    return total / max(weights, 1e-300)


@torch.no_grad()
def standardize_by(flow: Flow, rows: Rows) -> None:
    """Set the units that the flow has not, unless it scores the rows better without them."""
    transform, some = flow.transform, rows.some(2048).to(flow)
    _, context, weight = rows
    if getattr(flow, "embedding", None) is not None:
        embedded = transform.seam is not None and transform.seam < len(transform)
        context = flow.embed(rows.to(flow).context) if embedded else None
    elif context is not None:
        units = transform.context_units
        if units.active:
            _check_units(units, context, weight, "context")
        else:
            before = score(flow, [some])
            units.fit_to(context, weight, name="context", binary=True)
            _keep_if_better(units, before, score(flow, [some]))
    if transform.seam is not None:
        units, values = transform.units, transform.before_seam(rows.x, context)
        if units.active:
            _check_units(units, values, weight, "x")
        else:
            before = score(flow, [some])
            units.fit_to(values, weight)
            _keep_if_better(units, before, score(flow, [some]))


def _keep_if_better(units: Units, before: float, after: float) -> None:
    """Leave out units that make a density worse: its layers know the rows as they are."""
    if math.isfinite(before) and not after <= before + 1e-6 * abs(before):
        units.reset()


def _check_units(units: Units, rows: Tensor, weight: Tensor | None, name: str) -> None:
    """Warn if units that were set before do not suit these rows."""
    fresh = copy.deepcopy(units)
    fresh.fit_to(rows, weight, name=name)
    shift, ratio = (fresh.loc - units.loc) / units.scale, fresh.scale / units.scale
    if bool((shift.abs() > 10).any() | (ratio > 10).any()):
        warnings.warn(
            f"fit: {name} lies up to {float(shift.abs().max()):.3g} standard deviations from, and "
            f"varies up to {float(ratio.max()):.3g} times as much as, the rows by which the flow "
            "was standardized; flow.standardize(x, context) sets it anew, before fitting",
            stacklevel=8,
        )
