r"""Families: distributions of one real number, parameters first, as the scalar maps have them.

A scalar map moves a number, a family weighs it. Each is a frozen dataclass; ``params`` is
``(num_params, *shape)``, where ``shape`` broadcasts with that of x. :class:`CDF` is the bridge: it
makes a scalar map of a family, so that every scheme takes one::

    flow = Flow(2, coupling(CDF(LogisticMixture(8)), 2))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pyroflows.numerics import monotone_inverse, soft_bound
from pyroflows.scalar import Params

__all__ = ["CDF", "Family", "LogisticMixture", "Logistics"]

Map = Callable[[Tensor], tuple[Tensor, Tensor]]


class Family(Protocol):
    r"""A distribution with a positive density on the whole line, :math:`F(x; \theta)`.

    A subclass writes ``num_params``, ``log_prob``, ``log_cell``, ``logit_cdf`` and ``bracket``.
    """

    @property
    def num_params(self) -> int:
        """Parameters for each number."""

    def log_prob(self, x: Tensor, params: Params) -> Tensor:
        """Return the log-density at x, of x's shape."""

    def log_cell(self, upper: Tensor, width: Tensor, params: Params) -> Tensor:
        """Return log P(upper - width < X <= upper), precise however narrow the interval."""

    def logit_cdf(self, x: Tensor, params: Params) -> Tensor:
        """Return log F(x) / (1 - F(x)), precise in both tails."""

    def bracket(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return two ends, of y's shape, between which ``logit_cdf`` has the value y."""

    def to_logistic(self, params: Params, like: Tensor) -> Map:
        """Return the map ``x -> (logit F(x; θ), its log-slope)`` for values as ``like``.

        What depends on the parameters alone may be computed here, once for many calls.
        """

        def move(x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.logit_cdf(x, params)
            return y, self.log_prob(x, params) - F.logsigmoid(y) - F.logsigmoid(-y)

        return move

    def quantile(self, u: Tensor, params: Params) -> Tensor:
        """Return the x with F(x) = u, of u's shape; it carries gradients to ``params`` too."""
        return CDF(self).inverse(torch.logit(u), params)[0]


@dataclass(frozen=True)
class Logistics:
    r"""A mixture of K logistic distributions, or the part of one that has some of the weight.

    .. math:: F(x) = \sum_k w_k \, \sigma\Big(\frac{x - \mu_k}{s_k}\Big)

    Shapes: the components lie along ``dim`` of the fields; without that axis these broadcast with
    x.

    Args:
        log_weight: :math:`\log w_k`.
        loc: :math:`\mu_k`.
        log_scale: :math:`\log s_k`.
        dim: Axis of the components, the first or the last.
    """

    log_weight: Tensor
    loc: Tensor
    log_scale: Tensor
    dim: int = 0

    def _place(self, x: Tensor) -> Tensor:
        """Of x in each component, in units of its scale."""
        return (x.unsqueeze(self.dim) - self.loc) * (-self.log_scale).exp()

    def _tails(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of F and 1 - F of each component."""
        a = self._place(x)
        log_below = F.logsigmoid(a)
        return log_below, log_below - a

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density at x."""
        below, above = self._tails(x)
        return (self.log_weight + below + above - self.log_scale).logsumexp(self.dim)

    def log_cell(self, upper: Tensor, width: Tensor) -> Tensor:
        r"""Return log P(upper - width < X <= upper).

        Of each component it is :math:`\sigma(a)\,\sigma(\delta - a)\,(1 - e^{-\delta})`, where δ
        is the width in units of the scale: exact in logarithms however narrow.
        """
        rate = (-self.log_scale).exp()
        a = (upper.unsqueeze(self.dim) - self.loc) * rate
        delta = width.unsqueeze(self.dim) * rate
        log_cell = F.logsigmoid(a) + F.logsigmoid(delta - a) + torch.log(-torch.expm1(-delta))
        return (self.log_weight + log_cell).logsumexp(self.dim)

    def to_logistic(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log F(x) / (1 - F(x)) and the logarithm of its slope, at once."""
        below, above = self._tails(x)
        whole = (self.log_weight + below + above - self.log_scale).logsumexp(self.dim)
        below = (self.log_weight + below).logsumexp(self.dim)
        above = (self.log_weight + above).logsumexp(self.dim)
        return below - above, whole - below - above

    def cdf(self, x: Tensor) -> Tensor:
        """Return F(x)."""
        return (self.log_weight.exp() * self._place(x).sigmoid()).sum(self.dim)


@dataclass(frozen=True)
class LogisticMixture(Family):
    r"""A mixture of logistic distributions; the standard logistic one at θ = 0.

    Rows of ``params``: K logits of weights, K locations, K log-scales, bounded smoothly. Equal
    components would get equal gradients and stay equal for ever, so each answers to θ at its own
    rate: :math:`\mu_k = r_k \theta_k`, and log-scales alike, with r from 0.5 to 1.5.

    Args:
        count_components: K.
        bound: Largest |log-scale|, in nats.

    Raises:
        ValueError: If a field is not positive, or ``params`` has not 3 K rows.

    Example:
        >>> import torch
        >>> from pyroflows.families import LogisticMixture
        >>> family, theta = LogisticMixture(2), torch.zeros(6, 1)
        >>> family.log_prob(torch.tensor([0.0]), theta).exp()
        tensor([0.2500])
        >>> family.quantile(torch.tensor([0.5]), theta)
        tensor([0.])
    """

    count_components: int = 8
    bound: float = 7.0

    def __post_init__(self) -> None:
        if self.count_components < 1:
            raise ValueError(f"count_components must be at least 1; got {self.count_components}")
        if not self.bound > 0:
            raise ValueError(f"LogisticMixture expects bound > 0; got {self.bound}")

    @property
    def num_params(self) -> int:
        """3 K."""
        return 3 * self.count_components

    def mixture(self, params: Params, like: Tensor) -> Logistics:
        """Return the mixture at these parameters, for values of as many axes as ``like``."""
        if not isinstance(params, Tensor):
            params = torch.stack(torch.broadcast_tensors(*params))
        if params.dim() == 0 or params.shape[0] != self.num_params:
            raise ValueError(
                f"LogisticMixture of {self.count_components} components expects params of shape "
                f"({self.num_params}, *x.shape); got {tuple(params.shape)}"
            )
        missing = like.dim() + 1 - params.dim()
        if missing > 0:
            params = params.reshape(self.num_params, *[1] * missing, *params.shape[1:])
        logits, loc, raw = params.unflatten(0, (3, -1)).unbind()
        if self.count_components > 1:
            rate = torch.linspace(
                0.5, 1.5, self.count_components, dtype=params.dtype, device=params.device
            ).view(-1, *[1] * (loc.dim() - 1))
            loc, raw = loc * rate, raw * rate
        return Logistics(logits.log_softmax(0), loc, soft_bound(raw, self.bound))

    def log_prob(self, x: Tensor, params: Params) -> Tensor:
        """Return the log-density at x, of x's shape."""
        return self.mixture(params, x).log_prob(x)

    def log_cell(self, upper: Tensor, width: Tensor, params: Params) -> Tensor:
        """Return log P(upper - width < X <= upper), precise however narrow the interval."""
        return self.mixture(params, upper).log_cell(upper, width)

    def logit_cdf(self, x: Tensor, params: Params) -> Tensor:
        """Return log F(x) / (1 - F(x)), precise in both tails."""
        return self.to_logistic(params, x)(x)[0]

    def to_logistic(self, params: Params, like: Tensor) -> Map:
        """Return the map ``x -> (logit F(x; θ), its log-slope)``."""
        return self.mixture(params, like).to_logistic

    def bracket(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest of the components' own quantiles."""
        mixture = self.mixture(params, y)
        each = mixture.loc + mixture.log_scale.exp() * y
        return each.amin(0), each.amax(0)


@dataclass(frozen=True)
class CDF:
    r"""The scalar map y = logit F(x; θ): it takes draws of the family to logistic noise.

    The identity at θ = 0, where the family is the standard logistic distribution. Both directions
    are precise far into the tails. The inverse is the root of a monotone equation, found to the
    precision of the dtype, with derivatives up to the third order; it costs ten evaluations of F,
    up to forty where scales lie far apart.

    Args:
        family: The family, such as :class:`LogisticMixture`.

    References:
        Ho, Chen, Srinivas, Duan, Abbeel (2019), Flow++, section 3.2. arXiv:1902.00275

    Example:
        >>> import torch
        >>> from pyroflows import transforms as T
        >>> from pyroflows.families import CDF, LogisticMixture
        >>> layer = T.coupling(CDF(LogisticMixture(4)), 3)
        >>> layer(torch.tensor([0.5, -1.0, 2.0])).detach()  # the identity, until it has learned
        tensor([ 0.5000, -1.0000,  2.0000])
    """

    family: Family

    def __post_init__(self) -> None:
        if not hasattr(self.family, "logit_cdf"):
            raise TypeError(
                f"CDF expects a family, such as LogisticMixture(8); got {self.family!r}"
            )

    @property
    def num_params(self) -> int:
        """Those of the family."""
        return self.family.num_params

    def forward(self, x: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return y and log|dy/dx|, both of x's shape."""
        return self.family.to_logistic(params, x)(x)

    def inverse(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return x and log|dx/dy|, both of y's shape."""
        with torch.no_grad():
            low, high = self.family.bracket(y, params)
        forward = self.family.to_logistic(params, y)
        x, log_slope = monotone_inverse(forward, y, low=low, high=high, rounding=4)
        return x, -log_slope
