"""Draws from any guide with their importance weights, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Independent, MaskedDistribution, Unit
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.latent import plate_nesting
from pyroflows.guides.weights import smooth_weights

__all__ = ["GuideDraws", "draw", "importance_resample"]


@dataclass
class GuideDraws:
    """Draws from a guide, S of them.

    Attributes:
        values: For each latent site, ``(S, *site)``.
        log_weights: log p(x, z) - log q(z); shape ``(S,)``, in nats.
        log_prob: log p(x, z) in the sites' own space; shape ``(S,)``.
        log_likelihood: For each observed site its pointwise log-density, ``(S, *site batch)``.
        plates: For each site the names and (negative) axes of its plates, observed sites included.
        deterministic: For each ``pyro.deterministic`` site, ``(S, *site)``.
    """

    values: dict[str, Tensor]
    log_weights: Tensor
    log_prob: Tensor
    log_likelihood: dict[str, Tensor]
    plates: dict[str, list[tuple[str, int]]]
    deterministic: dict[str, Tensor] = field(default_factory=dict)


def pointwise(fn: Any, value: Tensor) -> Tensor:
    """Log-density of each independent part of ``value``: ``to_event`` is taken apart again."""
    while True:
        if isinstance(fn, Independent | torch.distributions.Independent | MaskedDistribution):
            fn = fn.base_dist
        else:
            return fn.log_prob(value)


def _run(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    num: int,
    nesting: int,
    shapes: Mapping[str, torch.Size],
) -> GuideDraws:
    """One batch under a plate of particles; ``num`` 0 for a single draw without one."""

    def batched(fn: Callable) -> Callable:
        return pyro.plate("_draws", num, dim=-1 - nesting)(fn) if num else fn

    with torch.no_grad(), poutine.block():
        guide_trace = poutine.trace(batched(guide)).get_trace(*args, **kwargs)
        model_trace = poutine.trace(batched(poutine.replay(model, trace=guide_trace))).get_trace(
            *args, **kwargs
        )
    guide_trace, model_trace = (prune_subsample_sites(t) for t in (guide_trace, model_trace))
    with torch.no_grad():
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()

    def total(trace: poutine.Trace) -> Tensor:
        terms = [s["log_prob"] for s in trace.nodes.values() if s["type"] == "sample"]
        return sum(
            (t.reshape(len(t), -1).sum(-1) if num and t.dim() > nesting else t.sum())
            for t in terms
        ) + torch.zeros(num or 1, device=terms[0].device if terms else None)

    values, deterministic, likelihood, plates = {}, {}, {}, {}
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or isinstance(site["fn"], Unit):
            continue
        frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != "_draws"]
        plates[name] = [(f.name, f.dim - site["fn"].event_dim) for f in frames]
        keep = max([-f.dim for f in frames], default=0)
        if site["infer"].get("_deterministic"):
            plates[name] = [(f.name, f.dim) for f in frames]  # the whole value counts as event
            deterministic[name] = _own(site["value"], num, shapes[name])
        elif site["is_observed"]:
            each = pointwise(site["fn"], site["value"])
            extra = each.dim() - site["log_prob"].dim()
            likelihood[name] = _squeeze(each, num, nesting, keep, extra)
        else:
            values[name] = _squeeze(site["value"], num, nesting, keep, site["fn"].event_dim)
    log_p, log_q = total(model_trace), total(guide_trace)
    return GuideDraws(values, log_p - log_q, log_p, likelihood, plates, deterministic)


def _own(value: Tensor, num: int, shape: torch.Size) -> Tensor:
    """``(S, *shape)`` of a deterministic site that has ``shape`` in a single run."""
    if value.numel() == shape.numel() * (num or 1):
        return value.reshape((num or 1, *shape))
    return value.reshape(shape).expand((num or 1, *shape))


def _squeeze(value: Tensor, num: int, nesting: int, keep: int, event_dim: int) -> Tensor:
    """``(S, 1, .., plates, event)`` to ``(S, plates, event)``; repeats where S was missing."""
    if not num:
        return value.unsqueeze(0)
    own = value.shape[value.dim() - event_dim :]
    batch = value.shape[: value.dim() - event_dim]
    if len(batch) <= nesting:  # the same for every particle
        return value.expand((num,) + value.shape)
    middle = batch[1:]
    while len(middle) > keep and middle[0] == 1:
        middle = middle[1:]
    return value.expand((num,) + batch[1:] + own).reshape((num,) + middle + own)


def draw(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 1000,
    batch_size: int = 500,
    **kwargs: Any,
) -> GuideDraws:
    """Draw from a guide, any of Pyro's included, and weigh the draws by the model.

    Runs guide and model once per batch, with the batch as an outermost plate; one at a time where
    the model cannot.

    Args:
        model: The model.
        guide: The guide.
        *args: Arguments of both.
        num_samples: Number of draws S.
        batch_size: Draws per run.
        **kwargs: Keyword arguments of both.
    """
    with pyro.validation_enabled(False):  # so that NaN becomes a weight, not an error
        return _draw(model, guide, args, kwargs, num_samples, batch_size)


def _draw(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    num_samples: int,
    batch_size: int,
) -> GuideDraws:
    with torch.no_grad(), poutine.block():
        first = poutine.trace(guide).get_trace(*args, **kwargs)
        second = poutine.trace(poutine.replay(model, trace=first)).get_trace(*args, **kwargs)
    nesting = max(plate_nesting(first), plate_nesting(second))
    sites = [s for s in second.nodes.values() if s["type"] == "sample"]
    shapes = {s["name"]: s["value"].shape for s in sites if isinstance(s["value"], Tensor)}
    if isinstance(guide, AutoFlow):
        vectorized = guide.density(*args, **kwargs).vectorizes
    else:
        vectorized = True
    parts = []
    left = num_samples
    while left:
        n = min(batch_size, left) if vectorized else 0
        try:
            parts.append(_run(model, guide, args, kwargs, n, nesting, shapes))
        except (RuntimeError, ValueError, IndexError):
            if not n:
                raise
            vectorized = False
            continue
        left -= n or 1
    cat = lambda pick: {k: torch.cat([pick(p)[k] for p in parts]) for k in pick(parts[0])}  # noqa: E731
    return GuideDraws(
        values=cat(lambda p: p.values),
        log_weights=torch.cat([p.log_weights for p in parts]),
        log_prob=torch.cat([p.log_prob for p in parts]),
        log_likelihood=cat(lambda p: p.log_likelihood),
        plates=parts[0].plates,
        deterministic=cat(lambda p: p.deterministic),
    )


def importance_resample(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 1000,
    num_proposals: int | None = None,
    **kwargs: Any,
) -> Mapping[str, Tensor]:
    """Draws from the guide, resampled by their Pareto-smoothed importance weights.

    Where the guide covers the posterior (k-hat below 0.7; see ``diagnose``), these follow the
    posterior itself, as far as the proposals last. They repeat: the better the guide, the less.

    Args:
        model: The model.
        guide: The guide.
        *args: Arguments of both.
        num_samples: Draws to return.
        num_proposals: Draws from the guide to choose from; ten times ``num_samples`` if None.
        **kwargs: Keyword arguments of both.

    Returns:
        For each latent site ``(num_samples, *site)``.
    """
    proposals = draw(model, guide, *args, num_samples=num_proposals or 10 * num_samples, **kwargs)
    log_weights, _ = smooth_weights(proposals.log_weights)
    weights = log_weights.exp().nan_to_num(0.0)
    if not weights.sum() > 0:
        raise RuntimeError(
            "importance_resample: no draw has a finite, positive weight; fit the guide first"
        )
    # systematic resampling: the least noise that leaves the expectations right
    edges = weights.cumsum(0) / weights.sum()
    points = (
        torch.arange(num_samples).to(edges)
        + torch.rand((), dtype=edges.dtype, device=edges.device)
    ) / num_samples
    index = torch.searchsorted(edges, points).clamp(max=len(edges) - 1)
    index = index[torch.randperm(num_samples, device=index.device)]
    return {name: value[index] for name, value in proposals.values.items()}
