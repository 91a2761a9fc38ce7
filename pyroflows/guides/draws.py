"""Draws from any guide with their importance weights, evaluated as fitting evaluates the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.checks import model_keywords
from pyroflows.guides.enumeration import likelihoods
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.messages import is_computed, is_discrete, is_latent, row_axes, site_plates
from pyroflows.guides.rows import WholeDensity
from pyroflows.guides.runner import Runner, traced
from pyroflows.guides.saving import SavedGuide
from pyroflows.weights import smooth_weights, systematic_resample

__all__ = ["GuideDraws", "draw", "draw_from", "importance_resample", "posterior_density"]


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
    log_likelihood: dict[str, Tensor] = field(default_factory=dict)
    plates: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    deterministic: dict[str, Tensor] = field(default_factory=dict)
    latent: Tensor = field(default_factory=lambda: torch.empty(0))


def guided_sites(guide: Callable, args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """Names of the continuous latents that a guide draws."""
    if isinstance(guide, AutoFlow):
        guide.setup(*args, **kwargs)
        return list(guide.sites.named)
    return [
        name
        for name, site in traced(guide, args, kwargs).nodes.items()
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


def _weighed(
    guide: Callable, density: LatentDensity, num: int, args: tuple, kwargs: dict[str, Any]
) -> GuideDraws:
    """Draws with their weights alone."""
    if isinstance(guide, AutoFlow) and _same_latents(guide, density):
        posterior = guide.get_posterior(*args, **kwargs)
        u = posterior.sample((num,))
        log_p, values = density(u), density.constrain(u)
        log_prob = log_p - density.log_jacobian(u)
        return GuideDraws(values, log_p - posterior.log_prob(u), log_prob, latent=u)
    runs = Runner(guide, args, kwargs, density)
    drawn = runs(num)
    u = density.unconstrain(drawn.values)
    if density.circular.any():
        density.recentre(torch.atan2(u.sin().mean(0), u.cos().mean(0)))
        u = density.turned(u)
    if density.free.any() or (density.circular.any() and not runs.turns):
        log_p = density(u) - density.log_jacobian(u)
    else:
        log_p = density.of_values(drawn.values)
    return GuideDraws(drawn.values, log_p - drawn.log_q, log_p, latent=u)


def _same_latents(guide: AutoFlow, density: LatentDensity) -> bool:
    own, theirs = (
        [(s.name, s.value_shape) for s in sites] for sites in (guide.sites, density.sites)
    )
    return own == theirs


def held_in(trace: poutine.Trace) -> dict[str, dict[str, Tensor]]:
    """What one run holds beside its latents."""
    computed = {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and is_computed(site)
    }
    likelihood = {name: v for name, v in likelihoods(trace).items() if name not in computed}
    return {"log_likelihood": likelihood, "deterministic": computed}


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
        draws = _weighed(guide, density, num_samples, args, kwargs)
        prototype = density.trace(density.init_loc)
        draws.plates = site_plates(prototype)
        if details:
            held = density.whole(held_in, draws.latent, row_axes(prototype))
            draws.log_likelihood = held.get("log_likelihood", {})
            draws.deterministic = held.get("deterministic", {})
        return draws


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
