r"""A Pyro model as a log-density on one flat, unconstrained vector.

.. math:: \log p(u) = \log p\big(x,\, T(u)\big) + \log|\det T'(u)|

Here :math:`T` maps the concatenated unconstrained latents to the supports of their sites. Each
support is read while the model runs, so a support may depend on earlier sites, and flat priors
(``ImproperUniform``) need no sampler.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, transform_to

__all__ = ["LatentDensity", "LatentSite", "init_where_possible", "plate_nesting"]


def init_where_possible(init_loc_fn: Callable, site: dict[str, Any]) -> Tensor:
    """``init_loc_fn(site)``, or the image of 0 for a site that cannot be sampled."""
    try:
        return init_loc_fn(site)
    except NotImplementedError:
        fn = site["fn"]
        transform = transform_to(fn.support)
        shape = transform.inverse_shape(fn.shape())
        return transform(torch.zeros(shape)).broadcast_to(fn.shape())


def plate_nesting(trace: poutine.Trace) -> int:
    """Number of batch dimensions, to the left of every event, that the sites of a trace occupy."""
    sites = [s for s in prune_subsample_sites(trace).nodes.values() if s["type"] == "sample"]
    plates = [-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized]
    batches = [len(s["fn"].batch_shape) for s in sites]
    return max(plates + batches, default=0)


@dataclass(frozen=True)
class LatentSite:
    """Where a latent site lies in the flat vector.

    Attributes:
        name: Name of the site.
        shape: Shape of its unconstrained value, batch dimensions included.
        event_dim: How many of them, from the right, belong to the event.
        value_shape: Shape of its constrained value.
        start: First position in the flat vector.
        size: Number of positions.
    """

    name: str
    shape: tuple[int, ...]
    event_dim: int
    value_shape: tuple[int, ...]
    start: int
    size: int

    def unpack(self, u: Tensor, nesting: int) -> Tensor:
        """The site's part of ``u``, ``(*batch, D)``; the batch left of ``nesting`` plates."""
        padding = (1,) * (nesting - len(self.shape) + self.event_dim) if u.dim() > 1 else ()
        return u[..., self.start : self.start + self.size].reshape(
            u.shape[:-1] + padding + self.shape
        )


class _Evaluation(Messenger):
    """Substitute latents and add up log-densities while the model runs.

    Attributes:
        total: The log-density so far, Jacobians included; shape ``(*batch)`` or ``()``.
        values: Constrained value of each latent.
        observed: Log-density of each observed site, not summed, kept if ``record``.
    """

    def __init__(
        self, unconstrained: dict[str, Tensor], nesting: int, record: bool = False
    ) -> None:
        super().__init__()
        self.unconstrained, self.nesting, self.record = unconstrained, nesting, record
        self.total: Tensor | float = 0.0
        self.values: dict[str, Tensor] = {}
        self.observed: dict[str, Tensor] = {}
        self.supports: dict[str, Any] = {}

    def _add(self, terms: Tensor) -> None:
        """Sum over the plates: what lies to the left of them is the batch."""
        n = terms.dim() - self.nesting
        if n <= 0:
            terms = terms.sum()
        elif self.nesting:
            terms = terms.flatten(n).sum(-1)
        self.total = self.total + terms

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        u = self.unconstrained.get(msg["name"])
        if u is None or msg["is_observed"]:
            return
        support = msg["fn"].support
        transform = biject_to(support)
        msg["value"] = transform(u)
        log_det = transform.log_abs_det_jacobian(u, msg["value"])
        extra = msg["fn"].event_dim - (msg["value"].dim() - log_det.dim())
        self._add(log_det.flatten(-extra).sum(-1) if extra > 0 else log_det)
        self.values[msg["name"]] = msg["value"]
        self.supports[msg["name"]] = support

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg):
            return
        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        if self.record and msg["is_observed"]:
            self.observed[msg["name"]] = scale_and_mask(log_prob, 1.0, msg["mask"])
        self._add(scale_and_mask(log_prob, msg["scale"], msg["mask"]))


class LatentDensity:
    """The model's log-density over its latents as one flat unconstrained vector.

    Cost: one run of the model per call, whatever the batch. The model runs with the batch as an
    extra dimension to the left of its plates; a model that cannot (checked at the first batch
    against single runs) goes through
    :func:`torch.vmap`, or failing that one point at a time, with a warning.

    Args:
        model: A Pyro model whose latents are all continuous.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        init_loc_fn: Initial value of each site; see :mod:`pyro.infer.autoguide.initialization`.

    Attributes:
        sites: The latent sites, in the order in which the model meets them.
        dim: Length ``D`` of the flat vector.
        nesting: Number of plate dimensions of the model.
        init_loc: Flat vector of the initial values; shape ``(D,)``.
        stochastic: Whether plates are subsampled, so that every call sees other data.

    Raises:
        ValueError: If a latent site is discrete; the message names it.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        *,
        init_loc_fn: Callable = init_to_median,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs or {}
        init = InitMessenger(functools.partial(init_where_possible, init_loc_fn))
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(init(model)).get_trace(*self.args, **self.kwargs)
        self.nesting = plate_nesting(trace)
        frames = [
            f for s in trace.nodes.values() if s["type"] == "sample" for f in s["cond_indep_stack"]
        ]
        self.stochastic = any(f.full_size is not None and f.full_size != f.size for f in frames)
        self.sites: list[LatentSite] = []
        parts = []
        for name, site in prune_subsample_sites(trace).iter_stochastic_nodes():
            with helpful_support_errors(site):
                value = biject_to(site["fn"].support).inv(site["value"])
            event_dim = site["fn"].event_dim + value.dim() - site["value"].dim()
            start = sum(s.size for s in self.sites)
            shapes = tuple(value.shape), event_dim, tuple(site["value"].shape)
            self.sites.append(LatentSite(name, *shapes, start, value.numel()))
            parts.append(value.reshape(-1))
        if not parts:
            raise RuntimeError("the model has no latent variables")
        self.init_loc = torch.cat(parts)
        self.dim = len(self.init_loc)
        self._batched: Callable[[Tensor], Tensor] | None = None

    def frozen(self, seed: int = 0) -> Callable[[Tensor], Tensor]:
        """The same function with one choice of subsamples for all calls; no random state."""
        if not self.stochastic:
            return self

        def density(u: Tensor) -> Tensor:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                return self(u)

        return density

    def evaluate(self, u: Tensor, *, record: bool = False) -> _Evaluation:
        """Run the model once at ``u``, ``(D,)`` or ``(S, D)``, and return what was seen."""
        run = _Evaluation(
            {s.name: s.unpack(u, self.nesting) for s in self.sites}, self.nesting, record
        )
        with pyro.validation_enabled(False), poutine.block(hide_types=["sample"]), run:
            self.model(*self.args, **self.kwargs)
        return run

    def _native(self, u: Tensor) -> Tensor:
        return torch.as_tensor(self.evaluate(u).total, dtype=u.dtype, device=u.device).expand(
            u.shape[:-1]
        )

    def _one_by_one(self, u: Tensor) -> Tensor:
        return torch.stack([self._or_nan(point) for point in u])

    def _choose(self, u: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The first way of evaluating a batch that agrees with single runs on some points."""
        probe = u.detach()[:3]
        state = torch.get_rng_state()

        def same_randomness(function: Callable[[], Tensor]) -> Tensor:
            torch.set_rng_state(state)
            return function()

        with torch.no_grad():
            expected = torch.stack(
                [same_randomness(functools.partial(self._or_nan, p)) for p in probe]
            )
            fine = expected.isfinite()
            probe, expected = probe[fine], expected[fine]
            if len(probe) < 2:
                return None  # undecided
            tol = math.sqrt(torch.finfo(u.dtype).eps)
            for way in (self._native, torch.vmap(self._native, randomness="same")):
                try:
                    actual = same_randomness(functools.partial(way, probe))
                except Exception:  # whatever a model raises on a batch, another way may do
                    continue
                if torch.allclose(actual, expected, rtol=tol, atol=tol, equal_nan=True):
                    return way
        torch.set_rng_state(state)
        warnings.warn(
            "the model cannot be run on a batch of latents: evaluating one particle at a time",
            stacklevel=3,
        )
        return self._one_by_one

    def __call__(self, u: Tensor) -> Tensor:
        """Log-density at ``u``; ``(*batch, D)`` to ``(*batch)``."""
        if u.shape[-1] != self.dim:
            raise ValueError(
                f"expected a latent vector of shape (..., {self.dim}); got {tuple(u.shape)}"
            )
        if u.dim() == 1:
            return self._or_nan(u)
        flat = u.reshape(-1, self.dim)
        if self._batched is None:
            self._batched = self._choose(flat)
        try:
            return (self._batched or self._native)(flat).reshape(u.shape[:-1])
        except torch.linalg.LinAlgError:  # one particle must not take the others with it
            return torch.stack([self._or_nan(point) for point in flat]).reshape(u.shape[:-1])

    def _or_nan(self, u: Tensor) -> Tensor:
        try:
            return self._native(u)
        except torch.linalg.LinAlgError:
            return u.sum() * math.nan

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Value of each site at ``u``: ``(S, D)`` to ``(S, *site)``, plates as in the model."""
        values = self.evaluate(u).values
        return {s.name: values[s.name].reshape(u.shape[:-1] + s.value_shape) for s in self.sites}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`constrain`: values ``(*batch, *site)`` to ``(*batch, D)``."""
        run = _Inverse({s.name: self._padded(s, values[s.name]) for s in self.sites})
        with pyro.validation_enabled(False), poutine.block(), torch.no_grad(), run:
            self.model(*self.args, **self.kwargs)
        first = self.sites[0]
        batch = values[first.name].shape[: values[first.name].dim() - len(first.value_shape)]
        return torch.cat(
            [run.unconstrained[s.name].reshape(batch + (-1,)) for s in self.sites], -1
        )

    def _padded(self, site: LatentSite, value: Tensor) -> Tensor:
        batch = value.shape[: value.dim() - len(site.value_shape)]
        event_dim = site.event_dim - len(site.shape) + len(site.value_shape)
        padding = (1,) * (self.nesting - len(site.value_shape) + event_dim) if batch else ()
        return value.reshape(batch + padding + site.value_shape)


class _Inverse(Messenger):
    """Give latents constrained values while the model runs, and keep their unconstrained ones."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.unconstrained: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        value = self.values.get(msg["name"])
        if value is not None:
            msg["value"] = value
            self.unconstrained[msg["name"]] = biject_to(msg["fn"].support).inv(value)
