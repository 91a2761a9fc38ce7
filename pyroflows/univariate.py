"""Distribution functions and quantiles of flows of one dimension, exact through the base's."""

import copy
import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    MixtureSameFamily,
    StudentT,
    TransformedDistribution,
)

from pyroflows.bijection import Bijection
from pyroflows.numerics import monotone_inverse
from pyroflows.supports import Bounds

__all__ = ["cdf", "icdf"]


def cdf(base: Distribution, transform: Bijection, value: Tensor) -> Tensor:
    r"""Return P(Y ≤ value) of y = f(x), shape batch: F(f⁻¹(y)), or one less that if f decreases.

    Args:
        base: Distribution of x, of one number an event.
        transform: The map f, monotone as every bijection of the line.
        value: Shape ``(*batch, *event)``.

    Raises:
        NotImplementedError: If events have more than one number, or the base has no ``cdf``.
    """
    _check_size(base, "cdf")
    below = _cdf(base, transform.inverse_and_log_det(value)[0])
    return torch.where(_increases(base, transform, value), below, 1 - below)


def icdf(base: Distribution, transform: Bijection, p: Tensor) -> Tensor:
    """Return the value y with P(Y ≤ y) = p, shape ``(*batch, *event)``; arguments as in `cdf`.

    Args:
        base: Distribution of x.
        transform: The map f.
        p: Probabilities, of the shape of the log-density.

    Raises:
        ValueError: If a probability is outside [0, 1].
        NotImplementedError: As in `cdf`.
    """
    _check_size(base, "icdf")
    if not torch.compiler.is_compiling() and bool(((p < 0) | (p > 1)).any()):
        raise ValueError("icdf expects probabilities in [0, 1]")
    p = torch.where(_increases(base, transform, p), p, 1 - p)
    return transform.forward_and_log_det(_icdf(base, p))[0]


def _check_size(base: Distribution, name: str) -> None:
    if math.prod(base.event_shape) != 1:
        raise NotImplementedError(
            f"{name} needs a flow of one dimension; this one has events of shape "
            f"{tuple(base.event_shape)}"
        )


@torch.no_grad()
def _increases(base: Distribution, transform: Bijection, like: Tensor) -> Tensor:
    """Whether the map increases, for each context: a bijection of the line is monotone."""
    p = like.new_tensor([0.25, 0.75]).reshape(2, *[1] * len(base.batch_shape))
    low, high = transform.forward_and_log_det(_icdf(base, p))[0]
    return _without_event(high >= low, len(base.event_shape))


def _without_event(value: Tensor, ndims: int) -> Tensor:
    """Drop the last axes, all of length 1."""
    return value.reshape(value.shape[: value.dim() - ndims])


def _cdf(base: Distribution, value: Tensor) -> Tensor:
    """P(X ≤ value), shape batch."""
    if isinstance(base, torch.distributions.Independent):
        return _without_event(_cdf(base.base_dist, value), base.reinterpreted_batch_ndims)
    if isinstance(base, dist.ExpandedDistribution):
        return _cdf(base.base_dist, value)
    if isinstance(base, MixtureSameFamily):
        component = base.component_distribution
        below = _cdf(component, value.unsqueeze(-1 - len(component.event_shape)))
        return (base.mixture_distribution.probs * below).sum(-1)
    if isinstance(base, StudentT):
        return _student_t_cdf((value - base.loc) / base.scale, base.df)
    try:
        if base.event_shape:  # a flow, say
            return base.cdf(value)
        low, high = _ends(base, value)
        inside = (value > low) & (value < high)
        below = _unvalidated(base).cdf(torch.where(inside, value, _between(low, high)))
        return torch.where(inside, below, torch.where(value.isnan(), value, value >= high))
    except NotImplementedError:
        raise NotImplementedError(
            f"the base {type(base).__name__} has no cdf, so the flow has none"
        ) from None


def _icdf(base: Distribution, p: Tensor) -> Tensor:
    """The x with P(X ≤ x) = p, shape batch and event."""
    if isinstance(base, torch.distributions.Independent):
        ndims = base.reinterpreted_batch_ndims
        return _icdf(base.base_dist, p.reshape(*p.shape, *[1] * ndims))
    if isinstance(base, dist.ExpandedDistribution):
        return _icdf(base.base_dist, p)
    try:
        return base.icdf(p)
    except NotImplementedError:
        return _search(base, p)


def _search(base: Distribution, p: Tensor) -> Tensor:
    """Quantiles by the root of the distribution function."""
    event = [1] * len(base.event_shape)
    p = p.expand(torch.broadcast_shapes(p.shape, base.batch_shape))
    whole = _unvalidated(base)  # the ends are asked for too
    first, last = _ends(base, p)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.reshape(*p.shape, *event)
        return _cdf(base, x), whole.log_prob(x)

    low = torch.where(first.isfinite(), first, _between(first, last) - 1).expand_as(p)
    high = torch.where(last.isfinite(), last, _between(first, last) + 1).expand_as(p)
    with torch.no_grad():
        for _ in range(64):  # wide enough for every probability but 0 and 1
            width = high - low
            low = torch.where(forward(low)[0] > p, low - width, low)
            high = torch.where(forward(high)[0] < p, high + width, high)
    x = monotone_inverse(forward, p, low=low, high=high)[0]
    x = torch.where(p <= 0, first, torch.where(p >= 1, last, x))
    return x.reshape(*p.shape, *event)


def _ends(base: Distribution, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where the values of a distribution begin and end, ±inf if they do not."""
    bounds = Bounds.of(base.support) or Bounds()
    low, high = (
        torch.as_tensor(end, dtype=like.dtype, device=like.device)
        for end in (bounds.low, bounds.high)
    )
    return low, high


def _between(low: Tensor, high: Tensor) -> Tensor:
    """A number in the interval."""
    from_low = torch.where(high.isfinite(), (low + high) / 2, low + 1)
    from_high = torch.where(high.isfinite(), high - 1, 0.0)
    return torch.where(low.isfinite(), from_low, from_high)


def _unvalidated(base: Distribution) -> Distribution:
    """The distribution, unchecked: torch's Gumbel refuses values at which its cdf is tiny."""
    new = copy.copy(base)
    new._validate_args = False
    if isinstance(new, TransformedDistribution):
        new.base_dist = _unvalidated(new.base_dist)
    return new


def _student_t_cdf(t: Tensor, df: Tensor) -> Tensor:
    r"""By quadrature in :math:`t = \sqrt\nu \tan\theta`, where the density is smooth and bounded.

    .. math:: F(t) = \frac12 + C \int_0^{\theta} \cos^{\nu - 1} u \, du
    """
    nodes, weights = (v.to(t) for v in _gauss_legendre(48))
    theta = torch.atan(t / df.sqrt()).unsqueeze(-1)
    u = theta * (nodes + 1) / 2
    power = ((df.unsqueeze(-1) - 1) * u.cos().log()).exp()
    integral = (weights * power).sum(-1) * theta.squeeze(-1) / 2
    log_c = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * math.log(math.pi)
    return (0.5 + log_c.exp() * integral).clamp(0, 1)


def _gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1], of the eigenvalues and vectors of the Jacobi matrix.

    References:
        Golub, Welsch (1969), Calculation of Gauss quadrature rules.
    """
    k = torch.arange(1, count, dtype=torch.float64)
    nodes, vectors = torch.linalg.eigh(torch.diag(k / (4 * k * k - 1).sqrt(), -1))
    return nodes, 2 * vectors[0].square()
