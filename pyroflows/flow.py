"""Flow: a base and a bijection, together a distribution that learns."""

from collections.abc import Sequence

import pyro
import torch
from pyro.distributions import TransformedDistribution
from pyro.nn import PyroModule
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from pyroflows import store
from pyroflows.bases import as_base
from pyroflows.bijection import Bijection, Compose, as_bijection, check_context

__all__ = ["Flow", "FlowDistribution"]


class FlowDistribution(TransformedDistribution):
    """A flow's distribution.

    Pyro's ``TransformedDistribution``, whose ``log_prob`` is a single sweep.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of each value, in nats; shape ``sample_shape + batch_shape``."""
        if self._validate_args:
            self._validate_sample(value)
        (transform,) = self.transforms
        noise, log_det = transform.inverse_and_log_det(value)
        return self.base_dist.log_prob(noise) + log_det


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

    Args:
        base: Number of features (a standard normal), a distribution, or a module of
            :mod:`pyroflows.bases`.
        transforms: A bijection, or a sequence of them from noise to data.
        name: Name for Pyro's param store, where the flow is not an attribute of another
            ``PyroModule``.

    Raises:
        ValueError: If base and transforms disagree on the event shape or on ``context_dim``.
        TypeError: If base or transforms are of the wrong kind.
    """

    def __init__(
        self,
        base: int | Distribution | nn.Module,
        transforms: Transform | Sequence[Transform],
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name or "")
        base = as_base(base)
        transform: Bijection = (
            as_bijection(transforms) if isinstance(transforms, Transform) else Compose(transforms)
        )
        dims = {getattr(base, "context_dim", 0), transform.context_dim} - {0}
        if len(dims) > 1:
            raise ValueError(
                f"Flow: the base has context_dim {base.context_dim}, the transforms "
                f"{transform.context_dim}"
            )
        event_shape = getattr(base, "event_shape", None)
        if event_shape is not None and transform.event_shape not in (None, event_shape):
            raise ValueError(
                f"Flow: the base gives events of shape {tuple(event_shape)}, but the transforms "
                f"expect {tuple(transform.event_shape)}"
            )
        self.base = base
        self.transform = transform
        self.context_dim = dims.pop() if dims else 0

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
        if am_i_wrapped():
            self._register()
        return self.distribution(context)

    def distribution(self, context: Tensor | None = None) -> FlowDistribution:
        """Return the distribution without telling Pyro.

        Arguments and errors as in :meth:`forward`.
        """
        self._check_context(context)
        if not torch.compiler.is_compiling() and store.is_loaded(self._store_name):
            store.claim(self._store_name, self)  # also outside of inference
        base, transform = self._parts()
        if context is not None:
            transform = transform.condition(context)
        noise = base(context) if getattr(base, "context_dim", 0) else base()
        # NaN must show in its own row, so the check of a support without bounds is left out
        free = _is_real(transform.codomain)
        return FlowDistribution(noise, transform, validate_args=False if free else None)

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Return log-densities in nats, one for each event; one pass of data to noise.

        Args:
            value: Shape ``(*batch, *event)``.
            context: Shape ``(*batch, context_dim)``.
        """
        return self.distribution(context).log_prob(value)

    def sample(
        self, sample_shape: int | Sequence[int] = (), context: Tensor | None = None
    ) -> Tensor:
        """Return draws without gradient, shape ``(*sample_shape, *context batch, *event)``."""
        return self.distribution(context).sample(_size(sample_shape))

    def rsample(
        self, sample_shape: int | Sequence[int] = (), context: Tensor | None = None
    ) -> Tensor:
        """Return draws that carry gradients to the parameters; shape as :meth:`sample`."""
        return self.distribution(context).rsample(_size(sample_shape))

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one draw."""
        base, transform = self._parts()
        shape = transform._map_shape(torch.Size(base.event_shape), inverse=False)
        return shape[len(shape) - transform.codomain.event_dim :]

    @property
    def support(self) -> constraints.Constraint:
        """Where the draws lie."""
        return self._parts()[1].codomain

    def _parts(self) -> tuple[nn.Module, Bijection]:
        """Base and transform, past PyroModule's attributes, which tell Pyro of each access."""
        return self._modules["base"], self._modules["transform"]

    def _check_context(self, context: Tensor | None) -> None:
        if context is None and self.context_dim:
            raise ValueError(
                f"this flow needs a context of shape (..., {self.context_dim}): flow(context)"
            )
        if context is None:
            return
        if not self.context_dim:
            raise ValueError(
                f"this flow takes no context; got one of shape {tuple(context.shape)}. "
                "Build it with context_dim="
            )
        check_context(context, self.context_dim, "this flow")

    def _register(self) -> None:
        if pyro.settings.get("module_local_params"):
            _ = self.base, self.transform  # PyroModule's own way
            return
        store.register(self._store_name, self)

    @property
    def _store_name(self) -> str:
        return self.__dict__["_pyro_name"] or "flow"


def _is_real(constraint: constraints.Constraint) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint is constraints.real or type(constraint) is type(constraints.real)


def _size(shape: int | Sequence[int]) -> torch.Size:
    return torch.Size([shape] if isinstance(shape, int) else shape)
