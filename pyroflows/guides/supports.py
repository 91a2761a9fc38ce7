"""Supports of latent sites: where they are read, and guide sites that are placed on them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.runtime import _DIM_ALLOCATOR
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import register_kl

from pyroflows.guides.evaluation import onto_support
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.prefit import normal_points

__all__ = [
    "ModelSupports",
    "Placed",
    "fixed_rows",
    "moving_supports",
    "outside_of_plates",
    "placed",
    "teach_divergence",
    "unplaced",
]


class Placed(dist.Delta):
    """A value on its support, with minus the log-Jacobian that brought it there as density."""


@functools.cache
def teach_divergence() -> None:
    """Tell PyTorch the divergence of a :class:`Placed`; at the first guide, not at import.

    The one that Pyro knows for a ``Delta`` leaves its density out, and
    :class:`~pyro.infer.TraceMeanField_ELBO` with it every Jacobian.
    """

    @register_kl(Placed, torch.distributions.Distribution)
    def _(p: Placed, q: torch.distributions.Distribution) -> Tensor:
        return p.log_density - q.log_prob(p.v)


def placed(u: Tensor, support: Any, event_dim: int) -> Placed:
    """A guide site at the image of ``u``, ``(*batch, *unconstrained event)``, on a support."""
    transform = onto_support(support)
    value = transform(u)
    log_density = value.new_zeros(value.shape[: value.dim() - event_dim])
    if poutine.get_mask() is not False:
        log_det = transform.log_abs_det_jacobian(u, value)
        log_density = -sum_rightmost(log_det, log_det.dim() - value.dim() + event_dim)
    return Placed(value, log_density, event_dim, validate_args=False)


def unplaced(value: Tensor, support: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Where a value ``(*batch, *shape)`` is from: flat u ``(*batch, n)``, and log|det dx/du|."""
    transform = onto_support(support)
    batch = value.shape[: value.dim() - len(shape)]
    u = transform.inv(value)
    log_det = transform.log_abs_det_jacobian(u, value)
    return u.reshape(*batch, -1), log_det.reshape(*batch, -1).sum(-1)


class _Places(poutine.messenger.Messenger):
    """Give latents their values while the model runs, and remember where they lie."""

    def __init__(
        self,
        unconstrained: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.unconstrained, self.values, self.rows = unconstrained, values, rows
        self.places: dict[str, Placed] = {}
        self.supports: dict[str, Any] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name, fn = msg["name"], msg["fn"]
        if site_is_subsample(msg):
            if name in self.rows:
                msg["value"] = self.rows[name]
        elif msg["is_observed"]:
            return
        elif name in self.unconstrained:
            self.places[name] = placed(self.unconstrained[name], fn.support, fn.event_dim)
            msg["value"] = self.places[name].v
        elif name in self.values:
            msg["value"], self.supports[name] = self.values[name], fn.support


def fixed_rows(rows: Mapping[str, Tensor]) -> poutine.messenger.Messenger:
    """A handler under which plates take these rows."""
    return _Places({}, {}, rows)


class ModelSupports:
    """Supports that depend on other sites: read in a run of the model, unseen from around it.

    A batch of latents runs as one, to the left of all plates of the model, whatever layout the
    guide has for it.

    Args:
        sites: The latent sites, as the prototype has them.
        nesting: Plate dimensions of the model.
    """

    def __init__(self, sites: Mapping[str, dict[str, Any]], nesting: int) -> None:
        self.sites, self.nesting = dict(sites), nesting

    def _spread(self, name: str, value: Tensor, more: int, size: int) -> Tensor:
        """``(*lead, *own)`` as ``(S, *ones, *own)``, or as ``own`` if nothing has a batch."""
        site = self.sites[name]
        dim = site["value"].dim() + more
        lead, own = value.shape[: value.dim() - dim], value.shape[value.dim() - dim :]
        if size == 1:
            return value.reshape(own)
        ones = (1,) * (self.nesting - len(site["fn"].batch_shape))
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
        more = {n: self._more(n, u) for n, u in unconstrained.items()}
        both = [(n, u, more[n]) for n, u in unconstrained.items()]
        both += [(n, v, 0) for n, v in values.items()]
        size = max(
            math.prod(v.shape[: v.dim() - self.sites[n]["value"].dim() - m]) for n, v, m in both
        )
        run = _Places(
            {n: self._spread(n, u, more[n], size) for n, u in unconstrained.items()},
            {n: self._spread(n, v, 0, size) for n, v in values.items()},
            rows,
        )
        with outside_of_plates(), poutine.block(), run:
            model(*args, **kwargs)
        return {n: self._as(run.places[n], n, u, more[n]) for n, u in unconstrained.items()}

    def _more(self, name: str, u: Tensor) -> int:
        """Dimensions that the unconstrained event has more than the constrained one."""
        site = self.sites[name]
        return (
            len(onto_support(site["fn"].support).inverse_shape(site["value"].shape))
            - site["value"].dim()
        )

    def _as(self, place: Placed, name: str, u: Tensor, more: int) -> Placed:
        dim, event_dim = self.sites[name]["value"].dim(), self.sites[name]["fn"].event_dim
        lead = u.shape[: u.dim() - dim - more]
        value = place.v.reshape(lead + place.v.shape[place.v.dim() - dim :])
        log_density = place.log_density.reshape(value.shape[: value.dim() - event_dim])
        return Placed(value, log_density, event_dim, validate_args=False)

    def origins(
        self, model: Callable, args: tuple, kwargs: dict[str, Any], values: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Flat u ``(S, n)`` and log|det dx/du| ``(S,)`` of values ``(S, *site)``."""
        size = max(len(v) for v in values.values())
        spread = {n: self._spread(n, v, 0, size) for n, v in values.items()}
        run = _Places({}, spread, {})
        with outside_of_plates(), poutine.block(), poutine.mask(mask=False), run:
            model(*args, **kwargs)
        found = {}
        for name, value in spread.items():
            shape = values[name].shape[1:]
            u, log_det = unplaced(value, run.supports[name], shape)
            found[name] = u.reshape(size, -1), log_det.reshape(size)
        return found


@contextmanager
def outside_of_plates() -> Iterator[None]:
    """The model finds for its plates the dimensions that it has by itself."""
    taken, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack = taken


def moving_supports(density: LatentDensity, sites: Mapping[str, Any]) -> frozenset[str]:
    """Names of the sites whose supports depend on other sites."""
    if not any(_bounds(site["fn"].support) for site in sites.values()):
        return frozenset()
    step = normal_points(1, density.dim, like=density.init_loc, seed=5)[0]
    with torch.no_grad(), poutine.block():
        there, here = (density.evaluate(density.init_loc + s * step).supports for s in (1, -1))
    return frozenset(n for n in sites if n in there and _differ(there[n], here[n]))


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
