"""Base distributions as modules: ``base()`` or ``base(context)`` is a Pyro distribution.

Being modules, they move with ``.to()``, are saved with ``state_dict`` and may learn. Fixed numbers
are buffers, since Pyro warns about frozen parameters.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyroflows.conditioners import Dense, Free
from pyroflows.constants import Constants
from pyroflows.families import CDF, Family

__all__ = [
    "Base",
    "ConditionalNormal",
    "DiagonalNormal",
    "Factorized",
    "GaussianMixture",
    "StandardNormal",
    "StudentT",
    "as_base",
    "temper",
]

Shape = int | Sequence[int]


def _softplus_inverse(y: float) -> float:
    return y + math.log(-math.expm1(-y))


class _Independent(dist.Independent):
    """Pyro's, except that it takes empty batches, at which PyTorch's sum fails."""

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = self.base_dist.log_prob(value)
        return log_prob.sum(tuple(range(-self.reinterpreted_batch_ndims, 0)))


class Base(nn.Module):
    """A family of distributions with one event shape, indexed by a context if ``context_dim > 0``.

    Args:
        event_shape: Shape of one draw, or its length.
        context_dim: Features of the context; 0 for none.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(self, event_shape: Shape, *, context_dim: int = 0) -> None:
        super().__init__()
        shape = [event_shape] if isinstance(event_shape, int) else list(event_shape)
        if not shape or min(shape) < 1:
            raise ValueError(f"{type(self).__name__} expects positive sizes; got {event_shape}")
        self.event_shape = torch.Size(shape)
        self.context_dim = context_dim

    def forward(self, context: Tensor | None = None) -> Distribution:
        """Return the distribution, with event shape ``event_shape``."""
        raise NotImplementedError(f"{type(self).__name__} has no distribution")

    def extra_repr(self) -> str:
        """Name the event shape."""
        return f"event_shape={tuple(self.event_shape)}"


class DiagonalNormal(Base):
    """Independent normals, fixed or learnable; the standard normal unless told otherwise.

    Args:
        event_shape: Shape of one draw, or its length.
        loc: Means, broadcast to the event shape.
        scale: Positive standard deviations, broadcast to the event shape.
        learnable: Whether means and standard deviations are parameters.

    Raises:
        ValueError: If a scale is not positive.
    """

    def __init__(
        self,
        event_shape: Shape,
        loc: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        *,
        learnable: bool = True,
    ) -> None:
        super().__init__(event_shape)
        loc, scale = (
            torch.as_tensor(v, dtype=torch.get_default_dtype()).expand(self.event_shape).clone()
            for v in (loc, scale)
        )
        if not scale.is_meta and not (scale > 0).all():
            raise ValueError(
                f"{type(self).__name__} expects positive scales; got {scale.tolist()}"
            )
        if learnable:
            self.loc, self.log_scale = nn.Parameter(loc), nn.Parameter(scale.log())
        else:
            self.register_buffer("loc", loc)
            self.register_buffer("log_scale", scale.log())

    def forward(self, context: Tensor | None = None) -> Distribution:
        """Return the normal."""
        normal = dist.Normal(self.loc, self.log_scale.exp(), validate_args=False)
        return _Independent(normal, len(self.event_shape))


class StandardNormal(DiagonalNormal):
    """Independent N(0, 1); nothing to learn.

    Args:
        event_shape: Shape of one draw, or its length.
    """

    def __init__(self, event_shape: Shape) -> None:
        super().__init__(event_shape, learnable=False)


class StudentT(Base):
    """Independent Student's t: heavier tails than a flow with identity tails makes of a normal.

    Args:
        event_shape: Shape of one draw, or its length.
        df: Degrees of freedom, above 2 for a finite variance.
        learnable: Whether the degrees of freedom are parameters, one for each feature.

    Raises:
        ValueError: If ``df`` is not positive.

    References:
        Jaini, Kobyzev, Yu, Brubaker (2020), Tails of Lipschitz triangular flows. arXiv:1907.04481
    """

    def __init__(self, event_shape: Shape, df: float = 5.0, *, learnable: bool = False) -> None:
        super().__init__(event_shape)
        if not df > 0:
            raise ValueError(f"StudentT expects df > 0; got {df}")
        raw = torch.full(self.event_shape, _softplus_inverse(df))
        if learnable:
            self.raw_df = nn.Parameter(raw)
        else:
            self.register_buffer("raw_df", raw)

    def forward(self, context: Tensor | None = None) -> Distribution:
        """Return the Student's t."""
        df = F.softplus(self.raw_df)
        t = dist.StudentT(df, torch.zeros_like(df), torch.ones_like(df), validate_args=False)
        return _Independent(t, len(self.event_shape))


class _DiagonalMixture(dist.MixtureOfDiagNormals):
    """Pyro's, unchecked, whose draws refuse second derivatives instead of giving wrong ones."""

    def __init__(self, locs: Tensor, coord_scale: Tensor, component_logits: Tensor) -> None:
        self.batch_mode, self.dim = False, locs.shape[-1]
        self.locs, self.coord_scale, self.component_logits = locs, coord_scale, component_logits
        self.categorical = dist.Categorical(logits=component_logits, validate_args=False)
        self.probs = self.categorical.probs
        TorchDistribution.__init__(self, torch.Size(), locs.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "_DiagonalMixture":
        new = object.__new__(type(self)) if _instance is None else _instance
        return super().expand(batch_shape, _instance=new)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        once = copy.copy(self)
        for name in ("locs", "coord_scale", "component_logits"):
            setattr(once, name, _Once.apply(getattr(self, name)))
        shape = torch.Size(sample_shape)
        if shape and self.batch_shape:  # of the two the kernel takes one
            once, shape = once.expand(shape + self.batch_shape), torch.Size()
        return super(_DiagonalMixture, once).rsample(shape)


class _Once(torch.autograd.Function):
    """The identity, whose gradient is not differentiated: what made it was a kernel."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Refused.apply(grad, *ctx.saved_tensors)


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, value: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "draws of a GaussianMixture have first derivatives with respect to its parameters "
            "only: differentiate twice through its log_prob, or take another base"
        )


class GaussianMixture(Base):
    """A learnable mixture of diagonal normals: modes that a single flow would have to tear apart.

    Means start at random, N(0, 1), from torch's generator. ``rsample`` is pathwise for two or more
    features (Jankowiak & Karaletsos 2019, arXiv:1806.01856), with first derivatives only; a single
    feature has ``sample`` only.

    Args:
        input_dim: Number of features D.
        count_components: Number of components K.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(self, input_dim: int, count_components: int = 8) -> None:
        super().__init__(input_dim)
        if count_components < 1:
            raise ValueError(f"GaussianMixture expects components; got {count_components}")
        self.loc = nn.Parameter(torch.randn(count_components, input_dim))
        self.log_scale = nn.Parameter(torch.zeros(count_components, input_dim))
        self.logits = nn.Parameter(torch.zeros(count_components))

    def forward(self, context: Tensor | None = None) -> Distribution:
        """Return the mixture."""
        scale = self.log_scale.exp()
        if self.loc.shape[-1] > 1:
            return _DiagonalMixture(self.loc, scale, self.logits)
        return dist.MixtureSameFamily(
            dist.Categorical(logits=self.logits, validate_args=False),
            _Independent(dist.Normal(self.loc, scale, validate_args=False), 1),
            validate_args=False,
        )


class ConditionalNormal(Base):
    """Independent normals whose means and scales a network of the context gives; N(0, 1) at first.

    Args:
        input_dim: Number of features.
        context_dim: Features of the context.
        hidden_dims: Widths of the network.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(
        self, input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None
    ) -> None:
        super().__init__(input_dim, context_dim=context_dim)
        self.net = Dense(context_dim, 2, input_dim, hidden_dims=hidden_dims)

    def forward(self, context: Tensor | None = None) -> Distribution:
        """Return the normal for each context, shape ``(*batch, context_dim)``.

        Raises:
            ValueError: If there is no context.
        """
        if context is None:
            raise ValueError(
                f"ConditionalNormal expects a context of shape (..., {self.context_dim}); got none"
            )
        loc, raw = self.net(context)
        scale = (8 * (raw / 8).tanh()).exp()
        return _Independent(dist.Normal(loc, scale, validate_args=False), 1)


class _OfFamily(TorchDistribution):
    """A family at given parameters, shape ``(num_params, *batch)``."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, family: Family, params: Tensor) -> None:
        self.family, self.params = family, params
        super().__init__(params.shape[1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "_OfFamily":
        missing = len(batch_shape) + 1 - self.params.dim()
        params = self.params.reshape(len(self.params), *[1] * missing, *self.params.shape[1:])
        return _OfFamily(self.family, params.expand(-1, *batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.family.log_prob(value, self.params)

    def cdf(self, value: Tensor) -> Tensor:
        return self.family.logit_cdf(value, self.params).sigmoid()

    def icdf(self, value: Tensor) -> Tensor:
        return self.family.quantile(value, self.params)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        first, second = self.params.new_empty(2, *shape).exponential_().log()
        return CDF(self.family).inverse(first - second, self.params)[0]  # of logistic noise


class Factorized(Base):
    """Independent numbers, each of a family whose parameters learn, or a context sets.

    Modes and tails of each number are so left to the base, and what binds them to the transforms.
    Draws are pathwise: they carry gradients to the parameters, first derivatives and higher ones.
    At first the family at θ = 0, of a logistic mixture the standard logistic distribution.

    Args:
        family: The family, such as :class:`pyroflows.families.LogisticMixture`.
        event_shape: Shape of one draw, or its length.
        context_dim: Features of the context; 0 for none.
        hidden_dims: Widths of the context's network.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> from pyroflows import Flow, transforms as T
        >>> from pyroflows.bases import Factorized
        >>> from pyroflows.families import LogisticMixture
        >>> flow = Flow(Factorized(LogisticMixture(4), 2), T.linear(2))
        >>> flow.sample((3,)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        family: Family,
        event_shape: Shape,
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
    ) -> None:
        super().__init__(event_shape, context_dim=context_dim)
        self.family = family
        self.net = Free(
            family.num_params,
            self.event_shape,
            context_dim=context_dim,
            hidden_dims=hidden_dims,
        )

    def forward(self, context: Tensor | None = None) -> Distribution:
        """Return the distribution, one for each context of shape ``(*batch, context_dim)``.

        Raises:
            ValueError: If there is no context, and one is needed.
        """
        if self.context_dim and context is None:
            raise ValueError(
                f"Factorized expects a context of shape (..., {self.context_dim}); got none"
            )
        params = self.net.params(context)
        if not isinstance(params, Tensor):
            params = torch.stack(params)
        return _Independent(_OfFamily(self.family, params), len(self.event_shape))

    def extra_repr(self) -> str:
        """Name the family and the event shape."""
        return f"{self.family}, {super().extra_repr()}"


class _Fixed(Base):
    """A distribution that was made outside; its numbers are buffers, its parameters stay so."""

    def __init__(self, distribution: Distribution) -> None:
        shape = distribution.event_shape or distribution.batch_shape
        if not shape:
            raise ValueError(
                f"a base needs an event of at least one axis; {distribution} is a scalar. "
                "Use .expand([n]).to_event(1)"
            )
        super().__init__(shape)
        if isinstance(distribution, torch.distributions.Independent):
            ndims, distribution = distribution.reinterpreted_batch_ndims, distribution.base_dist
            distribution = _Independent(distribution, ndims)
        elif not distribution.event_shape:
            distribution = _Independent(distribution, len(shape))
        self.constants = Constants(distribution)

    def forward(self, context: Tensor | None = None) -> Distribution:
        bound: Distribution = self.constants.bind()
        # what holds a draw is that draw's alone
        return _twin(bound) if "_substituted" in vars(self.constants) else bound


def _twin(distribution: Distribution) -> Distribution:
    new = copy.copy(distribution)
    for name, value in list(vars(new).items()):
        if isinstance(value, Distribution):
            vars(new)[name] = _twin(value)
    return new


def as_base(base: int | Distribution | nn.Module) -> nn.Module:
    """Return a base module: of a size (standard normal), of a distribution, or the module itself.

    Raises:
        TypeError: If ``base`` is none of them.
    """
    if isinstance(base, nn.Module):
        return base
    if isinstance(base, int):
        return StandardNormal(base)
    if isinstance(base, Distribution):
        return _Fixed(base)
    raise TypeError(
        f"a base is a number of features, a distribution or a module; got {type(base).__name__}"
    )


def temper(distribution: Distribution, noise: Tensor, temperature: float) -> Tensor:
    """Return draws of a location-scale family, their distance to the location times a factor.

    Args:
        distribution: What the noise was drawn from.
        noise: Draws.
        temperature: Factor, 0 or more.

    Raises:
        ValueError: If the temperature is negative, or differs from 1 for another family.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more; got {temperature}")
    if temperature == 1:
        return noise
    while isinstance(distribution, (torch.distributions.Independent, dist.ExpandedDistribution)):
        distribution = distribution.base_dist
    loc = getattr(distribution, "loc", None)
    if loc is None or not _scales(distribution):
        raise ValueError(
            f"temperature scales noise about its location; {type(distribution).__name__} is no "
            "location-scale family: use a normal, Laplace or Student-t base, or temperature=1"
        )
    return loc + temperature * (noise - loc)


def _scales(distribution: Distribution) -> bool:
    """Whether a distribution with a location is on the whole space, and not of angles."""
    support = distribution.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return type(support) is type(constraints.real) and not isinstance(distribution, dist.VonMises)
