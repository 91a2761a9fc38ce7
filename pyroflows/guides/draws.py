"""Draws from any guide with their importance weights, evaluated as fitting evaluates the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.batching import BUDGET
from pyroflows.guides.checks import model_keywords
from pyroflows.guides.enumeration import likelihoods
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.messages import (
    is_circular,
    is_computed,
    is_discrete,
    is_latent,
    plate_nesting,
)
from pyroflows.guides.routes import largest_tensor
from pyroflows.guides.rows import WholeDensity
from pyroflows.guides.saving import SavedGuide
from pyroflows.weights import smooth_weights, systematic_resample

__all__ = ["GuideDraws", "draw", "draw_from", "importance_resample"]


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
        latent: The flat unconstrained vectors, ``(S, D)``.
    """

    values: dict[str, Tensor]
    log_weights: Tensor
    log_prob: Tensor
    log_likelihood: dict[str, Tensor]
    plates: dict[str, list[tuple[str, int]]]
    deterministic: dict[str, Tensor] = field(default_factory=dict)
    latent: Tensor = field(default_factory=lambda: torch.empty(0))


# ----------------------------------------------------------------------------------- the guide


def guided_sites(guide: Callable, args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """Names of the continuous latents that a guide draws."""
    if isinstance(guide, AutoFlow):
        guide.setup(*args, **kwargs)
        return list(guide.sites.named)
    return [
        name
        for name, site in _traced(guide, args, kwargs).nodes.items()
        if is_latent(site) and not site["infer"].get("is_auxiliary") and not is_discrete(site)
    ]


def posterior_density(
    model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]
) -> WholeDensity:
    """The model's log-density over the latents that the guide draws, given all rows.

    Raises:
        ValueError: If the guide lacks a continuous latent of the model.
        NotJudged: See :class:`~pyroflows.guides.rows.WholeDensity`.
    """
    if isinstance(guide, SavedGuide):
        guide.remember(model)
    names = guided_sites(guide, args, kwargs)
    centre = None
    if isinstance(guide, AutoFlow) and guide.local is None and guide.latent_dim:
        centre = guide.whitening.loc.clone()
    density = WholeDensity(model, args, kwargs, names=names, centre=centre)
    lacking = {
        name for name, site in density.trace(density.init_loc).nodes.items() if is_latent(site)
    } - {*names, *density.enumerated}
    if lacking:
        raise ValueError(
            f"the guide draws no value for latent sites of the model: {sorted(lacking)}; "
            "hide them from the model with poutine.block, or give them to the guide"
        )
    return density


def _traced(fn: Callable, args: tuple, kwargs: dict[str, Any]) -> poutine.Trace:
    with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        trace = poutine.trace(fn).get_trace(*args, **kwargs)
        trace.compute_log_prob()
    return trace


def _rows(value: Tensor, num: int, shape: tuple[int, ...]) -> Tensor:
    """``(num, *shape)`` of what a batch gave, ``(num, 1, ..., *shape)`` or the same for all."""
    if value.dim() and len(value) == num and value.numel() == num * math.prod(shape):
        return value.reshape((num, *shape))
    if value.numel() == math.prod(shape):
        return value.reshape(shape).expand((num, *shape))
    raise ValueError(f"expected {num} values of shape {shape}; got {tuple(value.shape)}")


class GuideRuns:
    """Draws of any guide, by the first way that works: native, vmap, one by one.

    Args:
        guide: The guide; a model without data draws from its prior.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        density: Whose latents to draw.
    """

    def __init__(
        self, guide: Callable, args: tuple, kwargs: dict[str, Any], density: LatentDensity
    ) -> None:
        self.guide, self.args, self.kwargs = guide, args, kwargs
        self.shapes = {s.name: s.value_shape for s in density.sites}
        self.single_trace = _traced(guide, args, kwargs)
        self.nesting = max(density.nesting, plate_nesting(self.single_trace))
        self.batch_size = max(1, BUDGET // largest_tensor(self._single))
        sites = (self.single_trace.nodes[name] for name in self.shapes)
        self.turns = any(is_circular(site) for site in sites)  # its angles are on a circle
        self.ways = [self._native, self._vectorized, self._one_by_one]

    def __call__(self, num: int) -> tuple[dict[str, Tensor], Tensor]:
        """Values ``(num, *site)`` and the guide's log-density of them, ``(num,)``."""
        sizes = [self.batch_size] * (num // self.batch_size) + [num % self.batch_size]
        parts = [self._batch(n) for n in sizes if n]
        values = {name: torch.cat([p[0][name] for p in parts]) for name in self.shapes}
        return values, torch.cat([p[1] for p in parts])

    def _batch(self, num: int) -> tuple[dict[str, Tensor], Tensor]:
        while True:
            try:
                return self.ways[0](num)
            except Exception:  # whatever a guide raises on a batch; one by one it is raised
                if len(self.ways) == 1:
                    raise
                self.ways = self.ways[1:]

    def _counted(self, trace: poutine.Trace) -> list[dict[str, Any]]:
        """Sites whose densities make up the guide's: its latents and the noise behind them."""
        return [
            site
            for name, site in trace.nodes.items()
            if is_latent(site) and (name in self.shapes or site["infer"].get("is_auxiliary"))
        ]

    def _single(self, guide: Callable | None = None) -> tuple[dict[str, Tensor], Tensor]:
        seen = _traced(guide or self.guide, self.args, self.kwargs)
        log_q = sum(s["log_prob"].sum() for s in self._counted(seen)) + torch.zeros(())
        return {n: seen.nodes[n]["value"].reshape(s) for n, s in self.shapes.items()}, log_q

    def _one_by_one(self, num: int) -> tuple[dict[str, Tensor], Tensor]:
        runs = [self._single() for _ in range(num)]
        values = {name: torch.stack([r[0][name] for r in runs]) for name in self.shapes}
        return values, torch.stack([r[1] for r in runs])

    def _vectorized(self, num: int) -> tuple[dict[str, Tensor], Tensor]:
        run = torch.vmap(lambda _: self._single(), randomness="different")
        return run(torch.zeros(num))

    def _native(self, num: int) -> tuple[dict[str, Tensor], Tensor]:
        """Under one more plate, outermost; a draw by itself must have the same density."""
        seen = _traced(
            pyro.plate("_draws", num, dim=-1 - self.nesting)(self.guide), self.args, self.kwargs
        )
        values = {
            name: _rows(seen.nodes[name]["value"], num, shape)
            for name, shape in self.shapes.items()
        }
        log_q = torch.zeros(num)
        for site in self._counted(seen):
            each = site["log_prob"]
            log_q = log_q + (
                each.reshape(num, -1).sum(-1) if each.dim() > self.nesting else each.sum()
            )
        for s in {0, num - 1}:
            alone = self._single(poutine.replay(self.guide, trace=self._draw_of(seen, num, s)))
            found = {name: value[s] for name, value in values.items()}, log_q[s]
            pairs = zip(tree_leaves(found), tree_leaves(alone), strict=True)
            if not all(
                torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True) for a, b in pairs
            ):
                raise ValueError("a batch of the guide is not its draws side by side")
        return values, log_q

    def _draw_of(self, seen: poutine.Trace, num: int, s: int) -> poutine.Trace:
        """The trace of a single draw; what is computed from others is left to the guide."""
        trace = self.single_trace.copy()
        for name, node in self.single_trace.nodes.items():
            if not is_latent(node):
                continue
            if isinstance(node["fn"], Delta):
                trace.remove_node(name)
            else:
                value = _rows(seen.nodes[name]["value"], num, tuple(node["value"].shape))[s]
                trace.nodes[name] = {**node, "value": value}
        return trace


def _weighed(
    guide: Callable, density: LatentDensity, num: int, args: tuple, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Flat latents ``(num, D)``, log p of the sites' values, log p - log q, and the values."""
    if isinstance(guide, AutoFlow):
        shapes = [(s.name, s.value_shape) for s in guide.sites]
        if shapes == [(s.name, s.value_shape) for s in density.sites]:
            posterior = guide.get_posterior(*args, **kwargs)
            u = posterior.sample((num,))
            log_p = density(u)
            values = density.constrain(u)
            return u, log_p - density.log_jacobian(u), log_p - posterior.log_prob(u), values
    runs = GuideRuns(guide, args, kwargs, density)
    values, log_q = runs(num)
    u = density.unconstrain(values)
    if density.circular.any():
        density.recentre(_circular_mean(u))
        u = density.turned(u)
    if density.free.any() or (density.circular.any() and not runs.turns):
        log_p = density(u) - density.log_jacobian(u)
    else:
        log_p = density.over_values()(flat_values(density, values))
    return u, log_p, log_p - log_q, values


def _circular_mean(u: Tensor) -> Tensor:
    return torch.atan2(u.sin().mean(0), u.cos().mean(0))


def flat_values(density: LatentDensity, values: Mapping[str, Tensor]) -> Tensor:
    """Values of all sites side by side, ``(S, sum of sizes)``."""
    return density.sites.of_values().join(values)


# ----------------------------------------------------------------------------------- the model


def site_plates(trace: poutine.Trace) -> dict[str, list[tuple[str, int]]]:
    """Names and (negative) axes of the plates in the value of each sample site of one run."""
    plates = {}
    for name, site in prune_subsample_sites(trace).nodes.items():
        if site["type"] != "sample" or isinstance(site["fn"], Unit):
            continue
        frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != "_draws"]
        shift = site["fn"].event_dim
        if site["infer"].get("_deterministic") and shift == site["value"].dim():
            shift = _axes_to_the_right(site["value"].shape, frames)
        plates[name] = [(f.name, f.dim - shift) for f in frames]
    return plates


def _axes_to_the_right(shape: torch.Size, frames: list[Any]) -> int:
    """Axes of a deterministic value, all called event by Pyro, that lie right of its plates."""
    for shift in range(len(shape)):
        axes = [(f.dim - shift, f.size) for f in frames]
        if all(-axis <= len(shape) and shape[axis] == size for axis, size in axes):
            return shift
    return 0


def held_in(trace: poutine.Trace) -> dict[str, dict[str, Tensor]]:
    """What one run holds beside its latents."""
    computed = {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and is_computed(site)
    }
    likelihood = {name: v for name, v in likelihoods(trace).items() if name not in computed}
    return {"log_likelihood": likelihood, "deterministic": computed}


def row_axes(prototype: poutine.Trace) -> Callable[[str, str], dict[str, int]]:
    """Where the plates of a site lie in tensors ``(S, ...)`` of its values or likelihoods."""
    plates = site_plates(prototype)

    def axes(group: str, name: str) -> dict[str, int]:
        first = name.split("+")[0]  # labels that are summed out join sites
        dim = prototype.nodes[first]["value"].dim()
        return {plate: 1 + dim + axis for plate, axis in plates[first] if dim + axis >= 0}

    return axes


def draw(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 1000,
    batch_size: int | None = None,
    details: bool = True,
    **kwargs: Any,
) -> GuideDraws:
    """Draw from a guide, any of Pyro's included, and weigh the draws by the model.

    The model is evaluated as :class:`~pyroflows.guides.latent.LatentDensity` finds that it can be,
    in batches; data in subsampled plates are visited whole.

    Args:
        model: The model.
        guide: The guide.
        *args: Arguments of both.
        num_samples: Number of draws S.
        batch_size: Draws per run of the model; as many as a budget of memory allows if None.
        details: Whether to keep pointwise log-likelihoods and deterministic sites, S times the
            data in memory.
        **kwargs: Keyword arguments of both.
    """
    density = posterior_density(model, guide, args, kwargs)
    if batch_size is not None:
        density.batch_size = batch_size
    return draw_from(guide, density, num_samples, args, kwargs, details=details)


@torch.no_grad()
def draw_from(
    guide: Callable,
    density: WholeDensity,
    num_samples: int,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    details: bool = False,
) -> GuideDraws:
    """:func:`draw`, with the density at hand."""
    with pyro.validation_enabled(False):  # so that NaN becomes a weight, not an error
        u, log_prob, log_weights, values = _weighed(guide, density, num_samples, args, kwargs)
        prototype = density.trace(density.init_loc)
        held = density.whole(held_in, u, row_axes(prototype)) if details else {}
        return GuideDraws(
            values=values,
            log_weights=log_weights,
            log_prob=log_prob,
            log_likelihood=held.get("log_likelihood", {}),
            plates=site_plates(prototype),
            deterministic=held.get("deterministic", {}),
            latent=u,
        )


@model_keywords
def importance_resample(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 1000,
    num_proposals: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
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
        model_kwargs: Keyword arguments of both whose names are also names of these options.
        **kwargs: Keyword arguments of both.

    Returns:
        For each latent site ``(num_samples, *site)``.
    """
    kwargs = {**kwargs, **(model_kwargs or {})}
    density = posterior_density(model, guide, args, kwargs)
    proposals = draw_from(guide, density, num_proposals or 10 * num_samples, args, kwargs)
    log_weights, _ = smooth_weights(proposals.log_weights)
    weights = log_weights.exp().nan_to_num(0.0)
    if not weights.sum() > 0:
        raise RuntimeError(
            "importance_resample: no draw has a finite, positive weight; fit the guide first"
        )
    shift = torch.rand((), dtype=weights.dtype, device=weights.device)
    index = systematic_resample(weights, num_samples, shift)
    index = index[torch.randperm(num_samples, device=index.device)]
    return {name: value[index] for name, value in proposals.values.items()}
