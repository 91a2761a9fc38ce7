r"""A Pyro model as a log-density on one flat, unconstrained vector.

.. math:: \log p(u) = \log p\big(x,\, T(u)\big) + \log|\det T'(u)|

Here :math:`T` maps the concatenated unconstrained latents to the supports of their sites. Each
support is read while the model runs, so a support may depend on earlier sites, and flat priors
(``ImproperUniform``) need no sampler. Discrete latents are summed out.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import Transform, identity_transform
from torch.nn.functional import logsigmoid

from pyroflows.guides.evaluation import (
    Evaluation,
    Inverse,
    Labels,
    bijection_of,
    exposed,
    is_circular,
    is_discrete,
    likelihoods,
    marginal_terms,
    masked_out,
    onto_support,
)
from pyroflows.guides.routes import (
    Failures,
    gathered,
    largest_tensor,
    one_by_one,
    preserved,
    seeded,
)

__all__ = ["LatentDensity", "LatentSite", "init_where_possible", "plate_nesting"]

BUDGET = 2**23  #: elements of the largest tensor of a batch that is evaluated without gradients


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


class LatentDensity:
    """The model's log-density over its latents as one flat unconstrained vector.

    Everything that evaluates a model at many latents does it through here, and so by one decision:

    - ``density(u)``: log-densities; minus those of a guide at the same ``u``, the log-weights.
      A point at which the model raises has NaN, spares the others, and is counted in ``failures``.
    - ``density.constrain(u)``, ``density.unconstrain(values)``: between vectors and sites.
    - ``density.likelihoods(u)``, ``density.map(function, u)``: what traces of the model hold.
    - ``density.frozen()``: the same with one choice of subsamples for all calls.

    The ``route`` is how the model takes a batch: ``"native"``, as an extra dimension to the left
    of its plates; else ``"vmap"``; else ``"one by one"``, with a warning. It is decided at the
    first batch on three points of its own, whose values must agree with single runs. Batches are
    cut so that no tensor grows beyond a budget, where no gradient is taken.

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
        sites: The latent sites, in the order in which the model meets them.
        dim: Length ``D`` of the flat vector.
        nesting: Number of plate dimensions of the model.
        init_loc: Flat vector of the initial values; shape ``(D,)``.
        enumerated: Names of the discrete latents that are summed out.
        free: Entries on which nothing depends; shape ``(D,)``.
        circular: Entries that are angles; shape ``(D,)``.
        centre: Centre of the turn of each; shape ``(D,)``.
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
        self.model, self.args, self.kwargs = model, args, kwargs or {}
        init = InitMessenger(functools.partial(init_where_possible, init_loc_fn))
        trace = self._prototype(init, model)
        bare = exposed(model)
        if bare is not model:  # what was hidden may have to be summed out
            whole = self._prototype(init, bare)
            hidden = set(whole.nodes) - set(trace.nodes)
            if any(is_discrete(whole.nodes[name]) for name in hidden):
                own = [n for n, s in trace.iter_stochastic_nodes() if not site_is_subsample(s)]
                names = [n for n in own if names is None or n in names]
                self.model, trace = bare, whole
        self.nesting = plate_nesting(trace)
        frames = [
            f for s in trace.nodes.values() if s["type"] == "sample" for f in s["cond_indep_stack"]
        ]
        self._subsampled = any(f.full_size is not None and f.full_size != f.size for f in frames)
        self.sites: list[LatentSite] = []
        self.enumerated: list[str] = []
        parts, masked, angles = [], [], []
        for name, site in prune_subsample_sites(trace).iter_stochastic_nodes():
            if is_discrete(site):
                self.enumerated.append(_summable(site))
                continue
            if names is not None and name not in names:
                continue
            value = bijection_of(site).inv(site["value"])
            event_dim = site["fn"].event_dim + value.dim() - site["value"].dim()
            start = sum(s.size for s in self.sites)
            shapes = tuple(value.shape), event_dim, tuple(site["value"].shape)
            self.sites.append(LatentSite(name, *shapes, start, value.numel()))
            parts.append(value.reshape(-1))
            out = masked_out(site, tuple(value.shape))
            gone = torch.zeros(value.shape, dtype=torch.bool) if out is None else out
            masked.append(gone.reshape(-1).to(value.device))
            angles.append(torch.full_like(masked[-1], is_circular(site)))
        missing = set(names or ()) - {s.name for s in self.sites}
        if missing:
            latents = [n for n, _ in prune_subsample_sites(trace).iter_stochastic_nodes()]
            raise ValueError(
                f"the model has no latents {sorted(missing)}; it has {latents}. Was the guide "
                "made for another model?"
            )
        if not parts:
            raise RuntimeError("the model has no latent variables")
        self.init_loc = torch.cat(parts)
        self.dim = len(self.init_loc)
        self.failures = Failures()
        self._route: str | None = None
        self._size: int | None = None
        self._random: bool | None = None
        self._seed: int | None = None
        self._onto: Callable[[Any], Any] = onto_support
        self._free_sites: dict[str, Tensor] = {}
        self.circular, self.free = torch.cat(angles), torch.zeros_like(torch.cat(masked))
        self._has_free, self._has_angles = False, bool(self.circular.any())
        self.centre, self._blur = self.init_loc.clone() if centre is None else centre, 0.3
        self._turns = self._has_angles and self._is_periodic()
        if not self._turns:  # not used as angles: the values that the prior draws
            self.centre, self._blur = torch.zeros_like(self.init_loc), 0.1
        if any(bool(m.any()) for m in masked) and not self._subsampled:
            self._find_free(torch.cat(masked))

    def _is_periodic(self) -> bool:
        """Whether the density is the same a turn further, as where angles are used as such."""
        with preserved() as rewind, self._uncounted(), torch.no_grad():
            here, _ = self._probes(rewind)
            kept, self._has_angles = self._has_angles, False
            turned = torch.stack([self._alone(u) for u in here + 2 * math.pi * self.circular])
            plain = torch.stack([self._alone(u) for u in here])
            self._has_angles = kept
        return torch.allclose(turned, plain, rtol=1e-3, atol=1e-3, equal_nan=True)

    def recentre(self, loc: Tensor) -> Tensor:
        """Centre the turns of angles at ``loc``, ``(D,)``, and return it, angles in [-pi, pi)."""
        if not self._turns:
            return loc
        turned = torch.remainder(loc + math.pi, 2 * math.pi) - math.pi
        loc = torch.where(self.circular, turned, loc)
        self.centre = loc.to(self.init_loc)
        return loc

    def turned(self, u: Tensor) -> Tensor:
        """``u`` with each angle in the turn around its centre."""
        if not self._turns:
            return u
        away = torch.remainder(u - self.centre + math.pi, 2 * math.pi) - math.pi
        return torch.where(self.circular, self.centre + away, u)

    def _find_free(self, masked: Tensor) -> None:
        """Masked entries on which no log-density depends, at three points."""
        free = masked
        with preserved() as rewind, self._uncounted():
            points, _ = self._probes(rewind)
            for point in points:
                u = point.clone().requires_grad_()
                with torch.enable_grad():
                    run = self.evaluate(u)
                    rest = torch.as_tensor(run.total - run.jacobian) + 0.0 * u.sum()
                    (grad,) = torch.autograd.grad(rest, u)
                free = free & (grad == 0)
        self.free, self._has_free = free, bool(free.any())
        for s in self.sites:
            own = free[s.start : s.start + s.size]
            if bool(own.any()):
                self._free_sites[s.name] = own.reshape(s.shape)

    def _outside_of_the_model(self, u: Tensor) -> Tensor | float:
        """Log-density of the entries that are free, and the windows of angles."""
        extra: Tensor | float = 0.0
        if self._has_free:
            z = u[..., self.free]
            extra = extra - 0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
        if self._has_angles:
            away = (u - self.centre)[..., self.circular] / self._blur
            half = math.pi / self._blur  # log of a difference of two logistic functions
            window = logsigmoid(away + half) + logsigmoid(half - away)
            extra = extra + (window + math.log(-math.expm1(-2 * half))).sum(-1)
        return extra

    def _prototype(self, init: Callable, model: Callable) -> poutine.Trace:
        with torch.no_grad(), poutine.block():
            return poutine.trace(init(model)).get_trace(*self.args, **self.kwargs)

    def start(self, init_loc_fn: Callable) -> Tensor:
        """Flat vector ``(D,)`` of other initial values, such as ``init_to_sample``'s."""
        init = InitMessenger(functools.partial(init_where_possible, init_loc_fn))
        sites = self._prototype(init, self.model).nodes
        found = [sites[s.name] for s in self.sites]
        values = [onto_support(site["fn"].support).inv(site["value"]) for site in found]
        return torch.cat([v.reshape(-1) for v in values]).to(self.init_loc)

    # -------------------------------------------------------------------------- one run

    def evaluate(self, u: Tensor) -> Evaluation:
        """Run the model once at ``u``, ``(D,)`` or natively ``(S, D)``; return what was seen."""
        unconstrained = {s.name: s.unpack(u, self.nesting) for s in self.sites}
        run = Evaluation(
            unconstrained,
            self.nesting,
            adds=not self.enumerated,
            free=self._free_sites,
            onto=self._onto,
        )
        with pyro.validation_enabled(False), poutine.block(hide_types=["sample", "observe"]):
            if not self.enumerated:
                with run:
                    self.model(*self.args, **self.kwargs)
            else:
                for term in marginal_terms(self._traced(run)):
                    run.total = run.total + term.sum()
        if self._has_free or self._has_angles:
            run.total = run.total + self._outside_of_the_model(u)
        return run

    def trace(self, u: Tensor) -> poutine.Trace:
        """Trace of the model at one point ``u``, ``(D,)``; enumerated labels to the left."""
        unconstrained = {s.name: s.unpack(u, self.nesting) for s in self.sites}
        run = Evaluation(unconstrained, self.nesting, adds=False, onto=self._onto)
        with pyro.validation_enabled(False), poutine.block():
            return self._traced(run)

    def _traced(self, run: Evaluation) -> poutine.Trace:
        with poutine.trace() as seen, Labels(first_available_dim=-1 - self.nesting), run:
            self.model(*self.args, **self.kwargs)
        return seen.trace

    def _log_density(self, u: Tensor) -> Tensor:
        total = torch.as_tensor(self.evaluate(u).total, dtype=u.dtype, device=u.device)
        return total.expand(u.shape[:-1])

    def _alone(self, u: Tensor) -> Tensor:
        """Log-density at one point; NaN if the model raises there."""
        try:
            return self._log_density(u)
        except Exception as error:  # whatever it is: it costs this point, is counted and kept
            self.failures.add(error)
            return u.sum() * math.nan

    # -------------------------------------------------------------------------- many points

    @property
    def route(self) -> str:
        """How the model takes a batch: ``"native"``, ``"vmap"`` or ``"one by one"``."""
        if self._route is None:
            self._route = self._choose()
        return self._route

    @property
    def vectorizes(self) -> bool:
        """Whether the model itself takes a batch of latents to the left of its plates."""
        return self.route == "native"

    @property
    def stochastic(self) -> bool:
        """Whether its value is random: by a subsampled plate, or any generator the model uses."""
        if self._random is None:
            with preserved(), self._uncounted(), torch.no_grad():
                runs = torch.stack([self._alone(self.init_loc) for _ in range(4)])
            same = runs.eq(runs[0]) | (runs.isnan() & runs[0].isnan())
            self._random = self._subsampled or not bool(same.all())
        return self._random

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Points of our own that fail are not counted."""
        kept, self.failures = self.failures, Failures()
        try:
            yield
        finally:
            self.failures = kept

    @property
    def batch_size(self) -> int:
        """Points that are evaluated at once where no gradient is taken."""
        if self._size is None:
            with preserved(), self._uncounted():
                numel = largest_tensor(lambda: self._alone(self.init_loc))
            self._size = max(1, BUDGET // numel)
        return self._size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self._size = size

    def frozen(self, seed: int = 0) -> LatentDensity:
        """The same function with one choice of subsamples for all calls; no random state."""
        if not self.stochastic:
            return self
        _ = self.route, self.batch_size  # decided once for both
        view = copy.copy(self)
        view._seed = seed
        return view

    def over_values(self) -> LatentDensity:
        """The density of the sites' own values, ``(S, *site)`` laid side by side.

        No Jacobian, no window of angles, and nothing rounded: at the edge of a support a value
        says less than the latent that it came from.
        """
        view, start = copy.copy(self), 0
        view._has_free, view._has_angles, view._free_sites = False, False, {}
        view.sites = []
        for s in self.sites:
            size, event_dim = math.prod(s.value_shape), s.event_dim - len(s.shape)
            site = dataclasses.replace(
                s,
                shape=s.value_shape,
                event_dim=event_dim + len(s.value_shape),
                start=start,
                size=size,
            )
            view.sites.append(site)
            start += size
        view.dim, view._onto = start, _as_it_is
        _ = self.route, self.batch_size, self.stochastic  # decided by the latents
        view._route, view._size, view._random = self._route, self._size, self._random
        return view

    def _by(self, route: str, function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """``function`` of a point on many of them by a route; the same randomness for each."""
        if route == "native":
            return function
        if route == "vmap":
            return torch.vmap(function, randomness="same")
        return one_by_one(function, rewinds=self.stochastic)

    def _choose(self, after: str | None = None) -> str:
        """The first route, after one that failed, that agrees with single runs."""
        tol = math.sqrt(torch.finfo(self.init_loc.dtype).eps)
        trouble = "nothing"
        routes = ["native", "vmap"][0 if after is None else 1 + ["native", "vmap"].index(after) :]
        if self.enumerated and "native" in routes:
            routes.remove("native")  # labels lie where the batch would
        with preserved() as rewind, self._uncounted(), torch.no_grad():
            probe, expected = self._probes(rewind)
            for route in routes:
                way, trouble = self._by(route, self._log_density), ""
                for part in (slice(None), slice(1, None)):  # two sizes: one may fit by accident
                    rewind()
                    try:
                        actual = way(probe[part])
                    except Exception as error:  # whatever a model raises on a batch
                        trouble = f"{type(error).__name__}: {str(error).strip()[:200]}"
                        break
                    if not torch.allclose(
                        actual, expected[part], rtol=tol, atol=tol, equal_nan=True
                    ):
                        trouble = "values differ from those of single runs"
                if not trouble:
                    return route
        warnings.warn(
            "the model cannot be run on a batch of latents: evaluating one particle at a time, "
            f"which is slow. torch.vmap says: {trouble}. Let the model work with extra dimensions "
            "on the left of each latent ((X @ w[..., None])[..., 0] for X @ w, a[..., g] for a[g] "
            "outside of plates), without .item(), branches on values, or a random generator of "
            "its own",
            stacklevel=4,
        )
        return "one by one"

    def _probes(self, rewind: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """Three distinct points near the start, at least two of finite density if need be."""
        generator = torch.Generator().manual_seed(5)
        z = torch.randn(3, self.dim, generator=generator, dtype=torch.float64).to(self.init_loc)
        for scale in (0.5, 0.1, 0.01, 1e-3):
            points = self.init_loc + scale * z
            values = []
            for point in points:
                rewind()
                values.append(self._alone(point))
            expected = torch.stack(values)
            fine = expected.isfinite()
            if fine.sum() >= 2:
                return points[fine], expected[fine]
        return points, expected

    def __call__(self, u: Tensor) -> Tensor:
        """Log-density at ``u``; ``(*batch, D)`` to ``(*batch)``."""
        if u.shape[-1] != self.dim:
            raise ValueError(
                f"expected a latent vector of shape (..., {self.dim}); got {tuple(u.shape)}"
            )
        with seeded(self._seed):
            if u.dim() == 1:
                return self._alone(u)
            flat = u.reshape(-1, self.dim)
            return self._in_pieces(self._spared, flat).reshape(u.shape[:-1])

    def _in_pieces(
        self, function: Callable[[Tensor], Any], u: Tensor, *, same: bool = True
    ) -> Any:
        """``function`` on ``u``, ``(S, D)``, cut to the budget; the same randomness for all."""
        _ = self.route  # decided before any piece
        cut = len(u) > 1 and not (torch.is_grad_enabled() and u.requires_grad)
        pieces = u.split(self.batch_size) if cut else (u,)
        if len(pieces) == 1:
            return function(u)
        return gathered(function, pieces, torch.cat, rewinds=same and self.stochastic)

    def _spared(self, u: Tensor) -> Tensor:
        """Log-densities ``(S,)``, where one point that raises does not take others with it."""
        if len(u) == 1:
            return self._alone(u[0])[None]
        try:
            single = self._alone if self.route == "one by one" else self._log_density
            return self._by(self.route, single)(u)
        except Exception as error:  # found by halves which points raise
            before, half = self.failures.count, len(u) // 2
            parts = torch.cat([self._spared(u[:half]), self._spared(u[half:])])
            if _out_of_memory(error):
                self._size = max(1, half)
            elif self.failures.count == before and self.route != "one by one":
                # no point raises by itself
                self._route = self._choose(after=self.route)
            return parts

    def map(
        self, function: Callable[[poutine.Trace], Any], u: Tensor, *, same: bool = True
    ) -> Any:
        """``function(trace)``, tensors in any containers, at each of ``u``, ``(S, D)``; stacked.

        The traces are those of single points, in the model's own shapes, parallel labels to the
        left of them; ``function`` may run under :func:`torch.vmap`. Every point sees the same
        random numbers if ``same``, else its own.
        """
        return self._mapped(lambda point: function(self.trace(point)), u, same=same)

    def _mapped(self, function: Callable[[Tensor], Any], u: Tensor, *, same: bool = True) -> Any:
        with seeded(self._seed):
            slow = one_by_one(function, rewinds=same and self.stochastic)
            if self.route == "one by one":
                return self._in_pieces(slow, u, same=same)
            try:
                fast = torch.vmap(function, randomness="same" if same else "different")
                return self._in_pieces(fast, u, same=same)
            except Exception:  # native code that vmap does not know; what is wrong raises again
                return self._in_pieces(slow, u, same=same)

    def likelihoods(self, u: Tensor) -> dict[str, Tensor]:
        """Pointwise log-likelihood of each observed site at ``u``: ``(S, D)`` to ``(S, ...)``.

        See :func:`pyroflows.guides.evaluation.likelihoods`.
        """
        return self.map(likelihoods, u)

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Value of each site at ``u``: ``(S, D)`` to ``(S, *site)``, plates as in the model."""

        def at(point: Tensor) -> dict[str, Tensor]:
            values = self.evaluate(point).values
            batch = point.shape[:-1]
            return {s.name: values[s.name].reshape(batch + s.value_shape) for s in self.sites}

        if u.dim() == 1:
            return at(u)
        return self._in_pieces(at, u) if self.vectorizes else self._mapped(at, u)

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`constrain`: values ``(*batch, *site)`` to ``(*batch, D)``."""
        first = self.sites[0]
        batch = values[first.name].shape[: values[first.name].dim() - len(first.value_shape)]
        flat = torch.cat([values[s.name].reshape(batch + (-1,)) for s in self.sites], -1)
        sizes = [math.prod(s.value_shape) for s in self.sites]

        def back(point: Tensor) -> Tensor:
            parts = zip(self.sites, point.split(sizes, -1), strict=True)
            run = Inverse({s.name: self._padded(s, part) for s, part in parts})
            with pyro.validation_enabled(False), poutine.block(), torch.no_grad(), run:
                self.model(*self.args, **self.kwargs)
            found = [run.unconstrained[s.name] for s in self.sites]
            return torch.cat([v.reshape(point.shape[:-1] + (-1,)) for v in found], -1)

        if not batch:
            return back(flat)
        rows = flat.reshape(-1, flat.shape[-1])
        u = self._in_pieces(back, rows) if self.vectorizes else self._mapped(back, rows)
        return u.reshape(batch + (self.dim,))

    def log_jacobian(self, u: Tensor) -> Tensor:
        """log|det T'| of the map from ``u``, ``(S, D)``, to the sites' supports; ``(S,)``."""

        def at(point: Tensor) -> Tensor:
            jacobian = torch.as_tensor(self.evaluate(point).jacobian, dtype=u.dtype)
            return jacobian.to(u.device).expand(point.shape[:-1])

        return self._in_pieces(at, u) if self.vectorizes else self._mapped(at, u)

    def _padded(self, site: LatentSite, flat: Tensor) -> Tensor:
        event_dim = site.event_dim - len(site.shape) + len(site.value_shape)
        batch = flat.shape[:-1]
        padding = (1,) * (self.nesting - len(site.value_shape) + event_dim) if batch else ()
        return flat.reshape(batch + padding + site.value_shape)


def _as_it_is(support: Any) -> Transform:
    return identity_transform


def _summable(site: dict[str, Any]) -> str:
    """Name of a discrete site that can be enumerated."""
    if getattr(site["fn"], "has_enumerate_support", False):
        return site["name"]
    raise ValueError(
        f"latent site '{site['name']}' ({type(site['fn']).__name__}) is discrete and has no "
        "finite list of values to sum over: make it continuous, bound it "
        "(Categorical over the values that matter), or observe it"
    )


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate" in str(error)
