r"""A Pyro model as a log-density on one flat, unconstrained vector.

.. math:: \log p(u) = \log p\big(x,\, T(u)\big) + \log|\det T'(u)|

Here :math:`T` maps the concatenated unconstrained latents to the supports of their sites. Each
support is read while the model runs, so a support may depend on earlier sites, and flat priors
(``ImproperUniform``) need no sampler. Discrete latents are summed out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyroflows.guides.batching import BatchedDensity
from pyroflows.guides.enumeration import Labels, likelihoods, marginal_terms
from pyroflows.guides.messages import (
    exposed,
    is_circular,
    is_discrete,
    is_subsampled,
    masked_out,
    plate_nesting,
)
from pyroflows.guides.sites import Sites, init_where_possible
from pyroflows.guides.substitute import Substitute
from pyroflows.training.seeds import preserved

__all__ = ["Angles", "LatentDensity"]


@dataclass(frozen=True)
class Angles:
    """Angles, which count once: in a smooth window of one turn, whose copies add up to 1.

    Attributes:
        circular: The entries that are angles; shape ``(D,)``.
        centre: Centre of the turn of each; shape ``(D,)``.
        blur: Width of the window's ends.
        turns: Whether the density is the same a turn further: else they are plain numbers, in the
            turn that the prior draws.
    """

    circular: Tensor
    centre: Tensor
    blur: float = 0.3
    turns: bool = True

    def log_window(self, u: Tensor) -> Tensor:
        """Logarithm of the window at ``u``, ``(*batch, D)`` to ``(*batch)``."""
        away = (u - self.centre)[..., self.circular] / self.blur
        half = math.pi / self.blur  # log of a difference of two logistic functions
        window = logsigmoid(away + half) + logsigmoid(half - away)
        return (window + math.log(-math.expm1(-2 * half))).sum(-1)

    def turned(self, u: Tensor) -> Tensor:
        """``u`` with each angle in the turn around its centre."""
        if not self.turns:
            return u
        away = torch.remainder(u - self.centre + math.pi, 2 * math.pi) - math.pi
        return torch.where(self.circular, self.centre + away, u)


class LatentDensity(BatchedDensity):
    """The model's log-density over its latents as one flat unconstrained vector.

    Everything that evaluates a model at many latents does it through here, and so by one decision:

    - ``density(u)``: log-densities; minus those of a guide at the same ``u``, the log-weights.
      A point at which the model raises has NaN, spares the others, and is counted in ``failures``.
    - ``density.constrain(u)``, ``density.unconstrain(values)``: between vectors and sites.
    - ``density.likelihoods(u)``, ``density.map(function, u)``: what traces of the model hold.
    - ``density.frozen()``: the same with one choice of subsamples for all calls.

    The ``route`` is how the model takes a batch: ``"native"``, as an extra dimension to the left
    of its plates; else ``"vmap"``; else ``"one by one"``, with a warning.

    Discrete latents with finitely many values are summed out as by
    :class:`~pyro.infer.TraceEnum_ELBO`, marked by ``config_enumerate`` or not; also those that a
    ``poutine.block`` around the model hides.

    Entries of latents that a mask takes the prior from and on which nothing else depends
    (``obs_mask``, ragged plates) have a standard normal as their density, unconstrained. Angles
    (von Mises) count once: their density over the real line is multiplied by a smooth window of
    one turn around a centre, whose copies add up to 1.

    Making one costs a run of the model; the decision about ten.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        init_loc_fn: Initial value of each site; see :mod:`pyro.infer.autoguide.initialization`.
        names: The latents to hold; other continuous ones are drawn from the model. All if None.
        centre: Centre of the turn of each angle; shape ``(D,)``. ``init_loc`` if None.

    Attributes:
        sites: The layout of the latent sites, in the order in which the model meets them.
        dim: Length ``D`` of the flat vector.
        nesting: Number of plate dimensions of the model.
        init_loc: Flat vector of the initial values; shape ``(D,)``.
        enumerated: Names of the discrete latents that are summed out.
        free: Entries on which nothing depends; shape ``(D,)``.
        angles: The entries that are angles, and their turns.
        failures: Points at which the model raised, so far.

    Raises:
        ValueError: If a discrete latent has infinitely many values; the message names it.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        *,
        init_loc_fn: Callable = init_to_median,
        names: Sequence[str] | None = None,
        centre: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.args, self.kwargs = model, args, kwargs or {}
        trace, names = self._first_run(init_loc_fn, names)
        self.nesting = plate_nesting(trace)
        sampled = [s for s in trace.nodes.values() if s["type"] == "sample"]
        self._subsampled = any(is_subsampled(s) for s in sampled)
        latents = dict(prune_subsample_sites(trace).iter_stochastic_nodes())
        self.enumerated = [_summable(s) for s in latents.values() if is_discrete(s)]
        own = [n for n in latents if n not in self.enumerated and (names is None or n in names)]
        missing = set(names or ()) - set(own)
        if missing:
            raise ValueError(
                f"the model has no latents {sorted(missing)}; it has {list(latents)}. Was the "
                "guide made for another model?"
            )
        if not own:
            raise RuntimeError("the model has no latent variables")
        self.sites = Sites.of(trace, own)
        self.init_loc, self.dim = self.sites.start(trace), self.sites.dim
        self._windowed, self._free_sites = False, dict[str, Tensor]()
        self.free = torch.zeros_like(self.init_loc, dtype=torch.bool)
        self.angles = self._find_angles(trace, centre)
        self._windowed = bool(self.circular.any())
        self._find_free(trace)

    # -------------------------------------------------------------------------- its entries

    def _first_run(
        self, init_loc_fn: Callable, names: Sequence[str] | None
    ) -> tuple[poutine.Trace, Sequence[str] | None]:
        """The trace that tells the sites, and their names; labels that are hidden are exposed."""
        trace = self._prototype(init_loc_fn)
        bare = exposed(self.model)
        if bare is self.model:
            return trace, names
        whole = self._prototype(init_loc_fn, bare)
        hidden = set(whole.nodes) - set(trace.nodes)
        if not any(is_discrete(whole.nodes[name]) for name in hidden):
            return trace, names
        own = [n for n, _ in prune_subsample_sites(trace).iter_stochastic_nodes()]
        self.model = bare
        return whole, [n for n in own if names is None or n in names]

    def _prototype(self, init_loc_fn: Callable, model: Callable | None = None) -> poutine.Trace:
        init = InitMessenger(functools.partial(init_where_possible, init_loc_fn))
        with torch.no_grad(), poutine.block():
            return poutine.trace(init(model or self.model)).get_trace(*self.args, **self.kwargs)

    def start(self, init_loc_fn: Callable) -> Tensor:
        """Flat vector ``(D,)`` of other initial values, such as ``init_to_sample``'s."""
        return self.sites.start(self._prototype(init_loc_fn)).to(self.init_loc)

    def _find_angles(self, trace: poutine.Trace, centre: Tensor | None) -> Angles:
        circular = torch.zeros_like(self.init_loc, dtype=torch.bool)
        for site in self.sites:
            circular[site.part] = is_circular(trace.nodes[site.name])
        if circular.any():
            with preserved() as rewind, self._uncounted(), torch.no_grad():
                here, _ = self._probes(rewind)
                turned = torch.stack([self._alone(u) for u in here + 2 * math.pi * circular])
                plain = torch.stack([self._alone(u) for u in here])
            if torch.allclose(turned, plain, rtol=1e-3, atol=1e-3, equal_nan=True):
                return Angles(circular, self.init_loc.clone() if centre is None else centre)
        # not used as angles: the values that the prior draws
        return Angles(circular, torch.zeros_like(self.init_loc), 0.1, turns=False)

    @property
    def circular(self) -> Tensor:
        """Entries that are angles; shape ``(D,)``."""
        return self.angles.circular

    @property
    def centre(self) -> Tensor:
        """Centre of the turn of each angle; shape ``(D,)``."""
        return self.angles.centre

    def recentre(self, loc: Tensor) -> Tensor:
        """Centre the turns of angles at ``loc``, ``(D,)``, and return it, angles in [-pi, pi)."""
        if not self.angles.turns:
            return loc
        turned = torch.remainder(loc + math.pi, 2 * math.pi) - math.pi
        loc = torch.where(self.circular, turned, loc)
        self.angles = replace(self.angles, centre=loc.to(self.init_loc))
        return loc

    def turned(self, u: Tensor) -> Tensor:
        """``u`` with each angle in the turn around its centre."""
        return self.angles.turned(u)

    def _find_free(self, trace: poutine.Trace) -> None:
        """Masked entries on which no log-density depends, at three points."""
        masks = {s.name: masked_out(trace.nodes[s.name], s.shape) for s in self.sites}
        if self._subsampled or all(mask is None for mask in masks.values()):
            return
        none = {s.name: torch.zeros(s.shape, dtype=torch.bool) for s in self.sites}
        held = {n: none[n] if m is None else m for n, m in masks.items()}
        free = self.sites.join({n: m.to(self.init_loc.device) for n, m in held.items()})
        with preserved() as rewind, self._uncounted():
            points, _ = self._probes(rewind)
            for point in points:
                u = point.clone().requires_grad_()
                with torch.enable_grad():
                    run = self.evaluate(u)
                    rest = torch.as_tensor(run.total - run.jacobian) + 0.0 * u.sum()
                    (grad,) = torch.autograd.grad(rest, u)
                free = free & (grad == 0)
        self.free, parts = free, self.sites.split(free)
        self._free_sites = {name: part for name, part in parts.items() if part.any()}

    def _outside_of_the_model(self, u: Tensor) -> Tensor | float:
        """Log-density of the entries that are free, and the windows of angles."""
        extra: Tensor | float = 0.0
        if self._free_sites:
            z = u[..., self.free]
            extra = extra - 0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
        return extra + self.angles.log_window(u) if self._windowed else extra

    # -------------------------------------------------------------------------- one run

    def _left_of_plates(self, u: Tensor) -> Tensor:
        """``(S, n)`` as ``(S, 1, ..., n)``; ``(n,)`` as it is."""
        return u if u.dim() == 1 else u.reshape(len(u), *(1,) * self.nesting, u.shape[-1])

    def evaluate(self, u: Tensor) -> Substitute:
        """Run the model once at ``u``, ``(D,)`` or natively ``(S, D)``; return what was seen."""
        run = Substitute(
            self.sites.split(self._left_of_plates(u)),
            nesting=self.nesting,
            enumerates=bool(self.enumerated),
            free=self._free_sites,
            onto=self.sites[0].onto,
        )
        with pyro.validation_enabled(False), poutine.block(hide_types=["sample", "observe"]):
            if not self.enumerated:
                with run:
                    self.model(*self.args, **self.kwargs)
            else:
                for term in marginal_terms(self._traced(run)):
                    run.total = run.total + term.sum()
        if self._free_sites or self._windowed:
            run.total = run.total + self._outside_of_the_model(u)
        return run

    def trace(self, u: Tensor) -> poutine.Trace:
        """Trace of the model at one point ``u``, ``(D,)``; enumerated labels to the left."""
        latents = self.sites.split(self._left_of_plates(u))
        run = Substitute(latents, enumerates=True, onto=self.sites[0].onto)
        with pyro.validation_enabled(False), poutine.block():
            return self._traced(run)

    def _traced(self, run: Substitute) -> poutine.Trace:
        with poutine.trace() as seen, Labels(first_available_dim=-1 - self.nesting), run:
            self.model(*self.args, **self.kwargs)
        return seen.trace

    def log_density(self, u: Tensor) -> Tensor:
        """As in :class:`BatchedDensity`."""
        total = torch.as_tensor(self.evaluate(u).total, dtype=u.dtype, device=u.device)
        return total.expand(u.shape[:-1])

    @property
    def takes_batches(self) -> bool:
        """Whether it may take a batch natively: labels would lie where the batch does."""
        return not self.enumerated

    @property
    def stochastic(self) -> bool:
        """Whether its value is random: by a subsampled plate, or any generator the model uses."""
        return self._subsampled or super().stochastic

    # -------------------------------------------------------------------------- many points

    def over_values(self) -> Self:
        """The density of the sites' own values, ``(S, *site)`` laid side by side.

        No Jacobian, no window of angles, and nothing rounded: at the edge of a support a value
        says less than the latent that it came from.
        """
        _ = self.route, self.batch_size, self.stochastic  # decided by the latents
        sites = self.sites.of_values()
        return self._with(sites=sites, dim=sites.dim, _windowed=False, _free_sites={})

    def of_values(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log-density of the sites' own values ``(S, *site)``; see :meth:`over_values`."""
        view = self.over_values()
        return view(view.sites.join(values))

    def map(
        self, function: Callable[[poutine.Trace], Any], u: Tensor, *, same: bool = True
    ) -> Any:
        """``function(trace)``, tensors in any containers, at each of ``u``, ``(S, D)``; stacked.

        The traces are those of single points, in the model's own shapes, parallel labels to the
        left of them; ``function`` may run under :func:`torch.vmap`. Every point sees the same
        random numbers if ``same``, else its own.
        """
        return self._mapped(lambda point: function(self.trace(point)), u, same=same)

    def likelihoods(self, u: Tensor) -> dict[str, Tensor]:
        """Pointwise log-likelihood of each observed site at ``u``: ``(S, D)`` to ``(S, ...)``.

        See :func:`pyroflows.guides.enumeration.likelihoods`.
        """
        return self.map(likelihoods, u)

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Value of each site at ``u``: ``(S, D)`` to ``(S, *site)``, plates as in the model."""

        def at(point: Tensor) -> dict[str, Tensor]:
            values = self.evaluate(point).values
            batch = point.shape[:-1]
            return {s.name: values[s.name].reshape(batch + s.value_shape) for s in self.sites}

        return at(u) if u.dim() == 1 else self._natively(at, u)

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`constrain`: values ``(*batch, *site)`` to ``(*batch, D)``."""
        layout = self.sites.of_values()
        flat = layout.join(values)

        def back(point: Tensor) -> Tensor:
            run = Substitute(given=layout.split(self._left_of_plates(point)))
            with pyro.validation_enabled(False), poutine.block(), torch.no_grad(), run:
                self.model(*self.args, **self.kwargs)
            found = [s.bijection(run.supports[s.name]).inv(run.values[s.name]) for s in self.sites]
            return torch.cat([v.reshape(point.shape[:-1] + (-1,)) for v in found], -1)

        if flat.dim() == 1:
            return back(flat)
        u = self._natively(back, flat.reshape(-1, layout.dim))
        return u.reshape(flat.shape[:-1] + (self.dim,))

    def log_jacobian(self, u: Tensor) -> Tensor:
        """log|det T'| of the map from ``u``, ``(S, D)``, to the sites' supports; ``(S,)``."""

        def at(point: Tensor) -> Tensor:
            jacobian = torch.as_tensor(self.evaluate(point).jacobian, dtype=u.dtype)
            return jacobian.to(u.device).expand(point.shape[:-1])

        return self._natively(at, u)


def _summable(site: dict[str, Any]) -> str:
    """Name of a discrete site that can be enumerated."""
    if getattr(site["fn"], "has_enumerate_support", False):
        return site["name"]
    raise ValueError(
        f"latent site '{site['name']}' ({type(site['fn']).__name__}) is discrete and has no "
        "finite list of values to sum over: make it continuous, bound it "
        "(Categorical over the values that matter), or observe it"
    )
