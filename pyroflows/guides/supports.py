"""Supports of latent sites that depend on other sites: which do, and where to read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyroflows.guides.gaussian import normal_points
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.sites import Placed, Site, Sites
from pyroflows.guides.substitute import Substitute, outside_of_plates

__all__ = ["ModelSupports", "moving_supports"]


class ModelSupports:
    """Supports that depend on other sites: read in a run of the model, unseen from around it.

    A batch of latents runs as one, to the left of all plates of the model, whatever layout the
    guide has for it.

    Args:
        sites: The latent sites.
        nesting: Plate dimensions of the model.
    """

    def __init__(self, sites: Sites, nesting: int) -> None:
        self.sites, self.nesting = sites, nesting

    def _spread(self, site: Site, value: Tensor, dim: int, size: int) -> Tensor:
        """``(*lead, *own)`` as ``(S, *ones, *own)``, or as ``own`` if nothing has a batch."""
        lead, own = _parted(value, dim)
        if size == 1:
            return value.reshape(own)
        ones = (1,) * (self.nesting - len(site.batch_shape))
        return value.reshape((math.prod(lead), *ones, *own))

    def places(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        unconstrained: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
    ) -> dict[str, Placed]:
        """Guide sites at unconstrained values, each ``(*lead, *own)``, in the same layout.

        Args:
            model: The model.
            args: Its arguments.
            kwargs: Its keyword arguments.
            unconstrained: Unconstrained values of some sites.
            values: Constrained values of others.
            rows: For each plate the rows to take.
        """
        sites = self.sites.named
        latents = [(sites[n], u, len(sites[n].shape)) for n, u in unconstrained.items()]
        given = [(sites[n], v, len(sites[n].value_shape)) for n, v in values.items()]
        size = max(math.prod(_parted(v, dim)[0]) for _, v, dim in latents + given)
        run = Substitute(
            {s.name: self._spread(s, u, dim, size) for s, u, dim in latents},
            {s.name: self._spread(s, v, dim, size) for s, v, dim in given},
            rows=rows,
        )
        with outside_of_plates(), poutine.block(), run:
            model(*args, **kwargs)
        placed = {}
        for site, u, dim in latents:
            own = _parted(run.values[site.name], len(site.value_shape))[1]
            value = run.values[site.name].reshape(_parted(u, dim)[0] + own)
            batch = value.shape[: value.dim() - site.event_dim]
            placed[site.name] = site.placed(value, run.log_dets[site.name].reshape(batch))
        return placed

    def origins(
        self, model: Callable, args: tuple, kwargs: dict[str, Any], values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Flat u ``(S, D)`` and log|det dx/du|, ``(S,)``, of values ``(S, *site)``."""
        sites = [self.sites.named[name] for name in values]
        size = max(len(v) for v in values.values())
        spread = {s.name: self._spread(s, values[s.name], len(s.value_shape), size) for s in sites}
        run = Substitute(given=spread)
        with outside_of_plates(), poutine.block(), poutine.mask(mask=False), run:
            model(*args, **kwargs)
        found = [s.unconstrain(spread[s.name], run.supports[s.name]) for s in sites]
        u = torch.cat([u.reshape(size, -1) for u, _ in found], -1)
        return u, torch.stack([d.reshape(size, -1).sum(-1) for _, d in found]).sum(0)


def _parted(value: Tensor, dim: int) -> tuple[torch.Size, torch.Size]:
    """The shape of what lies left of the last ``dim`` axes, and theirs."""
    return value.shape[: value.dim() - dim], value.shape[value.dim() - dim :]


def moving_supports(density: LatentDensity, sites: Sites) -> frozenset[str]:
    """Names of the sites whose supports depend on other sites."""
    if not any(_bounds(site.support) for site in sites):
        return frozenset()
    step = normal_points(1, density.dim, like=density.init_loc, seed=5)[0]
    with torch.no_grad(), poutine.block():
        there, here = (density.evaluate(density.init_loc + s * step).supports for s in (1, -1))
    return frozenset(n for n in sites.named if n in there and _differ(there[n], here[n]))


def _bounds(support: Any) -> list[Tensor]:
    """Tensors that bound a constraint, those of its parts included."""
    found = []
    for value in vars(support).values():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, Tensor):
                found.append(part)
            elif hasattr(part, "check"):
                found += _bounds(part)
    return found


def _differ(one: Any, other: Any) -> bool:
    pairs = zip(_bounds(one), _bounds(other), strict=True)
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)
