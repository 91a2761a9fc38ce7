"""Flow: a base and a bijection, together a distribution that learns."""

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.distributions import TransformedDistribution
from pyro.nn import PyroModule
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, VonMises, constraints

from pyroflows import store, univariate
from pyroflows.bases import Base, as_base, temper
from pyroflows.bijection import Bijection
from pyroflows.checks import check_context
from pyroflows.compose import Compose, as_bijection
from pyroflows.divergence import entropy, kl_divergence, register_kl_of
from pyroflows.substitution import draws_of, has_draws, substituted
from pyroflows.supports import Bounds, is_real, over
from pyroflows.transforms.standardization import Standardized

__all__ = ["Flow", "FlowDistribution"]


class FlowDistribution(TransformedDistribution):
    """A flow's distribution: Pyro's, with a ``log_prob`` that is a single sweep."""

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """Where the draws lie: the base's support, seen through the transform."""
        (transform,) = self.transforms
        support = transform._image(self.base_dist.support)
        return over(support, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of each value, in nats; shape ``sample_shape + batch_shape``."""
        if self._validate_args:
            self._validate_sample(value)
        (transform,) = self.transforms
        noise, log_det = transform.inverse_and_log_det(value)
        return self.base_dist.log_prob(noise) + self._over_events(log_det)

    def _over_events(self, log_det: Tensor) -> Tensor:
        """Sum the log-determinants of an elementwise transform of vectors."""
        narrower = len(self.event_shape) - self.transforms[0]._event_dim(inverse=True)
        return log_det.sum(tuple(range(-narrower, 0))) if narrower > 0 else log_det

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Return draws that carry gradients, and their log-densities, by one pass."""
        (transform,) = self.transforms
        noise = self.base_dist.rsample(torch.Size(sample_shape))
        value, log_det = transform.forward_and_log_det(noise)
        return value, self.base_dist.log_prob(noise) - self._over_events(log_det)

    def sample(self, sample_shape: Sequence[int] = (), *, temperature: float = 1.0) -> Tensor:
        """Return draws without gradient, shape ``sample_shape + batch_shape + event_shape``.

        Args:
            sample_shape: Shape of the draws.
            temperature: Factor on the spread of the noise about its location, 0 or more; the base
                must be a location-scale family.

        Raises:
            ValueError: If the temperature is negative, or the base no location-scale family.
        """
        with torch.no_grad():
            return self._draw(self.base_dist.sample(torch.Size(sample_shape)), temperature)

    def rsample(self, sample_shape: Sequence[int] = (), *, temperature: float = 1.0) -> Tensor:
        """Return draws that carry gradients; arguments and errors as in :meth:`sample`."""
        return self._draw(self.base_dist.rsample(torch.Size(sample_shape)), temperature)

    def _draw(self, noise: Tensor, temperature: float) -> Tensor:
        (transform,) = self.transforms
        return transform(temper(self.base_dist, noise, temperature))

    def cdf(self, value: Tensor) -> Tensor:
        """Return P(Y ≤ value) of a flow of one dimension, of the shape of the log-density.

        Args:
            value: Shape ``(*batch, *event)``.

        Raises:
            NotImplementedError: If events have more than one number, or the base has no ``cdf``.
        """
        if self._validate_args:
            self._validate_sample(value)
        return univariate.cdf(self.base_dist, self.transforms[0], value)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the y with P(Y ≤ y) = ``value``, of the shape of the log-density.

        Raises:
            ValueError: If a probability is outside [0, 1].
            NotImplementedError: As :meth:`cdf`.
        """
        return univariate.icdf(self.base_dist, self.transforms[0], value)

    def entropy(self, num_samples: int | None = None) -> Tensor:
        """Return a Monte-Carlo estimate of the entropy in nats, shape ``batch_shape``.

        It carries gradients. With its error: :func:`pyroflows.entropy`.
        """
        return entropy(self, num_samples)


class Flow(PyroModule):
    r"""A distribution made by a bijection from a simple one.

    .. math:: y = f(x; c), \qquad x \sim \text{base}(c)

    ``flow()`` or ``flow(context)`` is a Pyro distribution. Inside a Pyro model or guide the call
    also registers the parameters, so nothing else is needed to learn them::

        flow = neural_spline(2)
        def model(data):
            with pyro.plate("rows", len(data)):
                pyro.sample("y", flow(), obs=data)

    A context of shape ``(*batch, context_dim)`` gives a distribution with that batch shape.

    Example:
        >>> import torch
        >>> from pyroflows import Flow, transforms as T
        >>> flow = Flow(2, [T.spline_coupling(2), T.linear(2)])
        >>> flow.log_prob(flow.sample((100,))).shape
        torch.Size([100])

    Args:
        base: Number of features (a standard normal), a distribution, or a module of
            :mod:`pyroflows.bases`.
        transforms: A bijection, or a sequence of them from noise to data.
        embedding: A network that makes the context of images, sets or texts, learned and saved
            with the flow: from ``(*batch, *anything)`` to ``(*batch, context_dim)``. What it
            returns decides the batch shape of ``flow(image)``.
        name: Name for Pyro's param store, where the flow is not an attribute of another
            ``PyroModule``.

    Raises:
        ValueError: If base and transforms disagree on the event shape or on ``context_dim``, or
            there is an embedding and neither takes a context.
        TypeError: If base or transforms are of the wrong kind.
    """

    def __init__(
        self,
        base: int | Distribution | nn.Module,
        transforms: Transform | Sequence[Transform],
        *,
        embedding: nn.Module | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name or "")
        base = as_base(base)
        context_dim = getattr(base, "context_dim", 0)
        transform = Standardized(
            _parts_of(transforms),
            getattr(base, "event_shape", None),
            context_dim=context_dim,
            free=_is_free(base),
        )
        if context_dim not in (0, transform.context_dim):
            raise ValueError(
                f"Flow: the base has context_dim {context_dim}, the transforms "
                f"{transform.context_dim}"
            )
        _check_domain(base, transform)
        self.base = base
        self.transform = transform
        self.context_dim = transform.context_dim
        if embedding is not None:
            if not self.context_dim:
                raise ValueError(
                    "Flow: an embedding makes a context, but neither base nor transforms take "
                    "one; build them with context_dim="
                )
            self.embedding = embedding

    def __call__(self, context: Tensor | None = None) -> FlowDistribution:
        if torch.compiler.is_compiling():  # Pyro's context manager would break the graph
            return self.distribution(context)
        return super().__call__(context)

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """Return the distribution; within a model or guide, register the parameters.

        Args:
            context: Shape ``(*batch, context_dim)``; None for a flow without context.

        Raises:
            ValueError: If a context is missing, of the wrong size, or not expected.
            RuntimeError: If another flow already registered the same name in the param store.
        """
        values = self._register() if am_i_wrapped() else {}
        seen: Flow = substituted(self, values, draws_of(self))
        return seen.plain_distribution(context)

    def distribution(self, context: Tensor | None = None) -> FlowDistribution:
        """Return the distribution without telling Pyro.

        Arguments and errors as in :meth:`forward`. Weights with a prior (``PyroSample``) are drawn
        for this distribution, as sites of a model that is being run.
        """
        if torch.compiler.is_compiling():  # a graph has neither a store nor sites
            return self.plain_distribution(context)
        if store.is_loaded(self._store_name):
            store.claim(self._store_name, self)  # also outside of inference
        if has_draws(self):
            with self.__dict__["_pyro_context"]:
                return substituted(self, {}, draws_of(self)).plain_distribution(context)
        return self.plain_distribution(context)

    def plain_distribution(self, context: Tensor | None) -> FlowDistribution:
        """As :meth:`distribution`, of the present tensors alone: nothing is claimed or drawn."""
        context = self.embed(context)
        base, transform = self._parts()
        make = base.distribution if isinstance(base, Flow) else base
        if getattr(base, "context_dim", 0):
            noise = make(transform.context_units.standardize(context))
        else:
            noise = make()
        if context is not None:
            transform = transform.condition(context)
            # here, since torch compares shapes of unequal length, which ties a graph to a batch
            batch = torch.broadcast_shapes(noise.batch_shape, context.shape[:-1])
            noise = noise.expand(batch)
        # NaN must show in its own row, so the check of a support without bounds is left out
        compiling = torch.compiler.is_compiling()
        free = compiling or is_real(transform.codomain)
        if not compiling:
            register_kl_of(FlowDistribution)
        return FlowDistribution(noise, transform, validate_args=False if free else None)

    def embed(self, context: Any) -> Tensor | None:
        """Return the context as the layers get it: what the embedding, if any, makes of it.

        Raises:
            TypeError: If a context is no tensor.
            ValueError: If a context is missing, of the wrong shape, or not expected.
        """
        embedding = self._modules.get("embedding")
        if context is None and self.context_dim:
            what = (
                "what its embedding takes"
                if embedding is not None
                else f"a context of shape (..., {self.context_dim})"
            )
            raise ValueError(f"this flow needs {what}: flow(context)")
        if context is None:
            return None
        if not self.context_dim:
            raise ValueError(
                f"this flow takes no context; got one of shape {tuple(context.shape)}. "
                "Build it with context_dim="
            )
        if embedding is None:
            check_context(context, self.context_dim, "this flow")
            return context
        made = embedding(context)
        check_context(made, self.context_dim, "this flow, of its embedding,")
        batch = made.shape[:-1]
        if isinstance(context, Tensor) and context.shape[: len(batch)] != batch:
            raise ValueError(
                f"the embedding must map (*batch, *anything) to (*batch, {self.context_dim}); it "
                f"made {tuple(made.shape)} of {tuple(context.shape)}"
            )
        return made

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Return log-densities in nats, one for each event; one pass of data to noise.

        Args:
            value: Shape ``(*batch, *event)``.
            context: Shape ``(*batch, context_dim)``.
        """
        return self.distribution(context).log_prob(value)

    def sample(
        self,
        sample_shape: int | Sequence[int] = (),
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return draws without gradient, shape ``(*sample_shape, *context batch, *event)``.

        Args:
            sample_shape: Number of draws, or their shape.
            context: Shape ``(*batch, context_dim)``.
            temperature: Factor on the spread of the noise about its location, as in Glow: below 1
                for more typical draws, above for more varied ones. The draws are then not those
                of :meth:`log_prob`.

        Raises:
            ValueError: If the temperature is negative, or differs from 1 for a base that is no
                location-scale family.
        """
        return self.distribution(context).sample(_size(sample_shape), temperature=temperature)

    def rsample(
        self,
        sample_shape: int | Sequence[int] = (),
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return draws that carry gradients to the parameters; as :meth:`sample`."""
        return self.distribution(context).rsample(_size(sample_shape), temperature=temperature)

    def rsample_and_log_prob(
        self, sample_shape: int | Sequence[int] = (), context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return draws that carry gradients and their log-densities, in one pass of noise to data.

        Nothing is evaluated from data to noise, which is slow for some flows (IAF).
        """
        return self.distribution(context).rsample_and_log_prob(_size(sample_shape))

    def cdf(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Return P(Y ≤ value) of a flow of one dimension, exact; shape as :meth:`log_prob`.

        Args:
            value: Shape ``(*batch, 1)``.
            context: Shape ``(*batch, context_dim)``.

        Raises:
            NotImplementedError: If events have more than one number, or the base has no ``cdf``.
        """
        return self.distribution(context).cdf(value)

    def icdf(self, p: Tensor, context: Tensor | None = None) -> Tensor:
        """Return quantiles of a flow of one dimension, shape ``(*batch, 1)``.

        Args:
            p: Probabilities, shape ``(*batch)``: that of :meth:`log_prob`.
            context: Shape ``(*batch, context_dim)``.

        Raises:
            ValueError: If a probability is outside [0, 1].
            NotImplementedError: As :meth:`cdf`.
        """
        return self.distribution(context).icdf(p)

    def entropy(
        self,
        num_samples: int | None = None,
        context: Tensor | None = None,
        *,
        return_error: bool = False,
    ) -> Any:
        """Return a Monte-Carlo estimate of the entropy, in nats; see :func:`pyroflows.entropy`.

        Args:
            num_samples: Number of draws.
            context: Shape ``(*batch, context_dim)``.
            return_error: Whether to return its standard error too.
        """
        return entropy(self.distribution(context), num_samples, return_error=return_error)

    def kl_divergence(
        self,
        other: "Flow | Distribution",
        num_samples: int | None = None,
        context: Tensor | None = None,
        *,
        return_error: bool = False,
    ) -> Any:
        """Return a Monte-Carlo estimate of KL(self || other); see :func:`pyroflows.kl_divergence`.

        Args:
            other: A distribution, or a flow, which gets the same context if it takes one.
            num_samples: Number of draws from this flow.
            context: Shape ``(*batch, context_dim)``.
            return_error: Whether to return its standard error too.
        """
        if isinstance(other, Flow):
            other = other.distribution(context if other.context_dim else None)
        mine = self.distribution(context if self.context_dim else None)
        return kl_divergence(mine, other, num_samples, return_error=return_error)

    @torch.no_grad()
    def standardize(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> None:
        """Let the flow see data, or contexts, or both, in units in which these rows are standard.

        From then on its layers act on rows of about mean 0 and standard deviation 1, while values,
        contexts, samples and log-densities keep the units of the data. Location and scale are
        buffers, fixed until this is called again; :func:`pyroflows.fit` calls it once. What the
        layers have learned before is not adjusted. The statistics are computed in double
        precision: one pair for each feature, or each channel (axis -3) of events of three axes or
        more. A constant feature is only shifted; a feature of the context that has two values is
        mapped to 0 and 1. Where the flow's last parts bound the values, the units are those
        before these parts. There are none for the data of a flow that is bounded from its base on,
        nor for a context that an ``embedding`` makes.

        Args:
            x: Data, shape ``(n, *event)``; None to leave the units of the data.
            context: Contexts, shape ``(n, context_dim)``; None to leave theirs.
            sample_weight: Non-negative weight of each row, shape ``(n,)``.

        Raises:
            ValueError: If the flow's dtype cannot hold the variation of a feature, shapes do not
                fit, or there is nothing to standardize.
        """
        transform, embedded = self._parts()[1], "embedding" in self._modules
        if context is not None and not embedded:
            check_context(context, self.context_dim, "this flow")
            transform.context_units.fit_to(context, sample_weight, name="context", binary=True)
        elif x is None:
            raise ValueError(
                "standardize: the context is the embedding's" if embedded else "got no rows"
            )
        if x is not None:
            if transform.seam is None:
                raise ValueError(
                    "standardize: this flow is bounded, or an angle, from its base on, or the "
                    "base does not say its event_shape: there is no location and scale to set"
                )
            context = self.embed(context) if embedded and context is not None else context
            transform.units.fit_to(transform.before_seam(x, context), sample_weight)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one draw."""
        base, transform = self._parts()
        shape = transform._map_shape(torch.Size(base.event_shape), inverse=False)
        return shape[len(shape) - transform._event_dim(inverse=True) :]  # less a context's batch

    @property
    def support(self) -> constraints.Constraint:
        """Where the draws lie."""
        base, transform = self._parts()
        if getattr(base, "context_dim", 0):
            support = transform.codomain
        else:
            support = transform._image(base.support if isinstance(base, Flow) else base().support)
        return over(support, len(self.event_shape))

    def _parts(self) -> tuple[nn.Module, Bijection]:
        """Base and transform, past PyroModule's attributes, which tell Pyro of each access."""
        return self._modules["base"], self._modules["transform"]

    def _register(self) -> dict[Tensor, Tensor]:
        """Tell Pyro of the parameters; return what a handler put in the place of some."""
        if pyro.settings.get("module_local_params"):
            _ = [getattr(self, name) for name in list(self._modules)]  # PyroModule's own way
            return {}
        return store.register(self._store_name, self)

    @property
    def _store_name(self) -> str:
        return self.__dict__["_pyro_name"] or "flow"


def _parts_of(transforms: Transform | Sequence[Transform]) -> Sequence[Transform | Bijection]:
    if not isinstance(transforms, Transform):
        return transforms
    transform = as_bijection(transforms)
    return list(transform) if type(transform) is Compose else [transform]


def _is_free(base: nn.Module) -> bool:
    """Whether the noise of a base may be scaled: it is no angle and has no bounds."""
    if isinstance(base, Flow):
        return is_real(base.support)
    if not isinstance(base, Base) or base.context_dim:
        return True
    noise = base()
    while isinstance(noise, torch.distributions.Independent):
        noise = noise.base_dist
    return is_real(noise.support) and not isinstance(noise, VonMises)


def _check_domain(base: nn.Module, transform: Bijection) -> None:
    """Refuse noise that the transform does not take."""
    domain, conditional = Bounds.of(transform.domain), getattr(base, "context_dim", 0)
    if is_real(transform.domain) or domain is None or conditional:
        return
    noise = base.support if isinstance(base, Flow) else base().support
    if not domain.contain(Bounds.of(noise)):
        raise ValueError(
            f"Flow: the base draws from {noise}, but the transforms take {transform.domain}"
        )


def _size(shape: int | Sequence[int]) -> torch.Size:
    return torch.Size([shape] if isinstance(shape, int) else shape)
