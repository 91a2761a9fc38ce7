"""The latent sites of a model, and their layout as one flat, unconstrained vector."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Transform, biject_to, identity_transform, register_kl
from torch.distributions.constraints import MixtureSameFamilyConstraint

from pyroflows.guides.messages import is_discrete

__all__ = [
    "Placed",
    "Site",
    "Sites",
    "bijection_of",
    "detached",
    "init_where_possible",
    "onto_support",
    "place",
    "teach_divergence",
]


def onto_support(support: Any) -> Any:
    """``biject_to(support)``, also for a mixture's, which is that of its components."""
    mixture = isinstance(support, MixtureSameFamilyConstraint)
    return biject_to(support.base_constraint if mixture else support)


def bijection_of(site: Mapping[str, Any]) -> Any:
    """The transform from real numbers onto the support of a site, given as a message.

    Raises:
        NotImplementedError: If there is none; the message names the site.
    """
    try:
        with helpful_support_errors(site):
            return onto_support(site["fn"].support)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"latent site '{site['name']}' has the support {site['fn'].support}, onto which "
            "PyTorch knows no bijection from real numbers: build the value from other latents (a "
            "covariance from LKJCholesky and scales, say), or register one in "
            "torch.distributions.biject_to"
        ) from error


def init_where_possible(init_loc_fn: Callable, site: dict[str, Any]) -> Tensor:
    """``init_loc_fn(site)``, or the image of 0 for a site that cannot be sampled.

    Discrete sites are drawn.
    """
    if is_discrete(site) and getattr(site["fn"], "has_enumerate_support", False):
        return site["fn"]()
    try:
        return init_loc_fn(site)
    except NotImplementedError:
        fn = site["fn"]
        transform = bijection_of(site)
        shape = transform.inverse_shape(fn.shape())
        return transform(torch.zeros(shape)).broadcast_to(fn.shape())


def place(
    u: Tensor, transform: Transform, event_dim: int, free: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The image of ``u``, and log|det dx/du|, summed over the event.

    Args:
        u: Unconstrained values, ``(*batch, *unconstrained event)``.
        transform: The transform.
        event_dim: Axes of an event of the image.
        free: Entries of ``u`` whose Jacobian does not count.
    """
    value = transform(u)
    log_det = transform.log_abs_det_jacobian(u, value)
    if free is not None:
        inner = u.dim() - log_det.dim()  # dimensions that one Jacobian spans
        log_det = torch.where(free.flatten(-inner).all(-1) if inner else free, 0.0, log_det)
    return value, sum_rightmost(log_det, log_det.dim() - value.dim() + event_dim)


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


@dataclass(frozen=True)
class Site:
    """A latent site, and its part of a flat unconstrained vector.

    Attributes:
        name: Its name.
        support: Where its values lie, as the model was first seen.
        batch_shape: Its plates, and other batch dimensions.
        event_shape: Shape of the event of a value.
        base_shape: Shape of the event of an unconstrained value.
        plates: The plates around it: names, (negative) axes, sizes.
        start: First position in the flat vector.
        onto: The transform onto a support.
    """

    name: str
    support: Any
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    plates: tuple[CondIndepStackFrame, ...] = ()
    start: int = 0
    onto: Callable[[Any], Any] = onto_support

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Site:
        """The site of a message that holds a value."""
        fn, value = message["fn"], message["value"]
        with torch.no_grad():
            u = bijection_of(message).inv(value)
        n = value.dim() - fn.event_dim
        return cls(
            message["name"],
            fn.support,
            tuple(value.shape[:n]),
            tuple(value.shape[n:]),
            tuple(u.shape[n:]),
            tuple(message["cond_indep_stack"]),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its unconstrained value."""
        return self.batch_shape + self.base_shape

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of its value."""
        return self.batch_shape + self.event_shape

    @property
    def event_dim(self) -> int:
        """Axes of the event of a value."""
        return len(self.event_shape)

    @property
    def size(self) -> int:
        """Positions in the flat vector."""
        return math.prod(self.shape)

    @property
    def subsampled(self) -> bool:
        """Whether it lies in a plate of which the model sees a part at a time."""
        return any(f.full_size is not None and f.full_size != f.size for f in self.plates)

    @property
    def part(self) -> slice:
        """Positions in the flat vector."""
        return slice(self.start, self.start + self.size)

    def bijection(self, support: Any = None) -> Any:
        """The transform onto its support, or onto another one."""
        return self.onto(self.support if support is None else support)

    def constrain(self, u: Tensor, support: Any = None) -> tuple[Tensor, Tensor]:
        """Value and log|det dx/du|, ``(*batch)``, of ``u``, ``(*batch, *base_shape)``."""
        return place(u, self.bijection(support), self.event_dim)

    def unconstrain(self, value: Tensor, support: Any = None) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`constrain`, and again log|det dx/du|."""
        transform = self.bijection(support)
        u = transform.inv(value)
        log_det = transform.log_abs_det_jacobian(u, value)
        return u, sum_rightmost(log_det, log_det.dim() - value.dim() + self.event_dim)

    def delta(self, u: Tensor, support: Any = None) -> Placed:
        """A guide site at the image of ``u``, ``(*batch, *base_shape)``."""
        if poutine.get_mask() is not False:
            return self.placed(*self.constrain(u, support))
        value = self.bijection(support)(u)
        return self.placed(value, value.new_zeros(value.shape[: value.dim() - self.event_dim]))

    def placed(self, value: Tensor, log_det: Tensor) -> Placed:
        """A guide site at a value, given log|det dx/du|."""
        return Placed(value, -log_det, self.event_dim, validate_args=False)


class Sites(Sequence[Site]):
    """The layout of latents as one flat unconstrained vector of length ``dim``, site after site.

    Args:
        sites: The sites; each gets its place.

    Attributes:
        dim: Length D of the vector.
        named: The sites by their names.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        laid, start = [], 0
        for site in sites:
            laid.append(replace(site, start=start))
            start += site.size
        self._sites, self.dim = tuple(laid), start
        self.named = {site.name: site for site in laid}

    @classmethod
    def of(cls, trace: poutine.Trace, names: Iterable[str] | None = None) -> Sites:
        """The latents of a trace, or those of these names, in the trace's order."""
        wanted = None if names is None else set(names)
        return cls(
            Site.of(message)
            for name, message in prune_subsample_sites(trace).iter_stochastic_nodes()
            if wanted is None or name in wanted
        )

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Site]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    def only(self, names: Iterable[str]) -> Sites:
        """The layout of some of them."""
        wanted = set(names)
        return Sites(site for site in self if site.name in wanted)

    def of_rows(self) -> Sites:
        """The layout of one row's latents: events alone, what plates hold is a batch."""
        return Sites(replace(site, batch_shape=()) for site in self)

    def of_values(self) -> Sites:
        """The layout of the values themselves, laid side by side."""
        return Sites(replace(s, base_shape=s.event_shape, onto=_as_it_is) for s in self)

    def start(self, trace: poutine.Trace) -> Tensor:
        """The flat vector of the values of a trace, ``(D,)``."""
        found = [(site, trace.nodes[site.name]) for site in self]
        return torch.cat(
            [s.bijection(m["fn"].support).inv(m["value"]).reshape(-1) for s, m in found]
        )

    def split(self, u: Tensor) -> dict[str, Tensor]:
        """Unconstrained value of each site in ``u``, ``(*batch, D)``: ``(*batch, *base_shape)``.

        The batch of ``u`` broadcasts with that of each site: a batch to the left of all plates
        has them as axes of length 1.
        """
        return {
            s.name: u[..., s.part].reshape(_joint(u.shape[:-1], s.batch_shape) + s.base_shape)
            for s in self
        }

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The vectors ``(*batch, D)`` of unconstrained values ``(*batch, *shape)``."""
        flat = []
        for site in self:
            part = parts[site.name]
            flat.append(part.reshape(*part.shape[: part.dim() - len(site.shape)], -1))
        return torch.cat(flat, -1)

    def constrain(
        self, u: Tensor, supports: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Value of each site at ``u``, as :meth:`split` takes it, and log|det dx/du| of each.

        Args:
            u: The vectors.
            supports: Supports that differ from those of the sites.
        """
        others, values, log_dets = supports or {}, {}, {}
        for name, part in self.split(u).items():
            values[name], log_dets[name] = self.named[name].constrain(part, others.get(name))
        return values, log_dets

    def unconstrain(
        self, values: Mapping[str, Tensor], supports: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The vectors ``(*batch, D)`` of values ``(*batch, *site)``, and log|det dx/du|.

        Args:
            values: The value of each site.
            supports: Supports that differ from those of the sites.
        """
        others, parts, log_dets = supports or {}, [], []
        for site in self:
            value = values[site.name]
            batch = value.shape[: value.dim() - len(site.value_shape)]
            u, log_det = site.unconstrain(value, others.get(site.name))
            parts.append(u.reshape(*batch, -1))
            log_dets.append(log_det.reshape(*batch, -1).sum(-1))
        return torch.cat(parts, -1), torch.stack(log_dets).sum(0)

    def deltas(self, u: Tensor, supports: Mapping[str, Any] | None = None) -> dict[str, Placed]:
        """A guide site for each at its image of ``u``; see :meth:`constrain`."""
        others = supports or {}
        return {
            name: self.named[name].delta(part, others.get(name))
            for name, part in self.split(u).items()
        }


def _joint(batch: Sequence[int], own: Sequence[int]) -> tuple[int, ...]:
    """Two batch shapes broadcast together; several times faster than torch's."""
    n = max(len(batch), len(own))
    pairs = zip((1,) * (n - len(batch)) + (*batch,), (1,) * (n - len(own)) + (*own,), strict=True)
    return tuple(theirs if mine == 1 else mine for mine, theirs in pairs)


def _as_it_is(support: Any) -> Transform:
    return identity_transform


def detached(support: Any) -> Any:
    """A constraint whose bounds have no graph."""
    copied = copy.copy(support)
    for name, value in vars(support).items():
        if isinstance(value, Tensor):
            vars(copied)[name] = value.detach()
        elif hasattr(value, "check"):
            vars(copied)[name] = detached(value)
    return copied
