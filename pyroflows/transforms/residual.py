"""Residual maps y = x + f(x) with cheap determinants and inverses as precise as the dtype."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyroflows.bijection import Bijection
from pyroflows.numerics import monotone_inverse
from pyroflows.transforms._common import AxisBijection, Parameters, Triangle
from pyroflows.transforms._factories import conditional
from pyroflows.transforms.orthogonal import reflect

__all__ = [
    "Planar",
    "Radial",
    "Sylvester",
    "conditional_planar",
    "conditional_radial",
    "conditional_sylvester",
    "planar",
    "radial",
    "sylvester",
]

ROOT_SEARCH = 8  # evaluations of a map until its root is found, about
MIN_SLOPE = 1e-3  # bounds the condition number of the inverse


def positive_slope(raw: Tensor) -> Tensor:
    """Return a slope above ``MIN_SLOPE``, 1 at 0; it grows like ``raw`` where that is large."""
    return MIN_SLOPE + (1 - MIN_SLOPE) * F.softplus(raw + math.log(math.expm1(1)))


def tanh_slope(x: Tensor) -> Tensor:
    """Return the derivative of tanh, precise also where it is small."""
    q = torch.exp(-2 * x.abs())
    return 4 * q / (1 + q).square()


class Planar(AxisBijection):
    r"""Move x along one direction, by an amount that depends on its projection on another.

    .. math:: y = x + \hat u \tanh(w \cdot x + b), \qquad
        \det = \tanh^2 + (1 - \tanh^2)(1 + w \cdot \hat u)

    :math:`\hat u` is u with its part along w bent so that :math:`1 + w \cdot \hat u` stays above
    0.001, and is 0 at u = 0. O(D) from x to y. From y to x :math:`w \cdot x` solves a monotone
    equation in one unknown, found to the precision of the dtype, with exact first-order gradients.
    With a context, which then sets u, w and b, one network call in either direction. The identity
    at initialization.

    Args:
        input_dim: Number of features D.
        context_dim: Features of the context; 0 for none.
        **network: ``hidden_dims``, ``residual`` and ``activation`` of the context's network.

    References:
        Rezende, Mohamed (2015), Variational inference with normalizing flows, eq. 10 and appendix
        A.1. arXiv:1505.05770
    """

    def __init__(self, input_dim: int, *, context_dim: int = 0, **network: Any) -> None:
        super().__init__(input_dim, context_dim=context_dim)
        w = torch.randn(input_dim) / math.sqrt(input_dim)
        start = torch.cat([torch.zeros(1 + input_dim), w]).unsqueeze(0)
        self.vectors = Parameters(start, context_dim=context_dim, **network)

    @property
    def calls(self) -> tuple[float, float]:
        """Network calls of a context, and a root search back."""
        forward, inverse = super().calls
        return forward, inverse + ROOT_SEARCH

    def _params(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return b, w, the bent u, and 1 + w · u."""
        (vectors,) = self.vectors.at_context(context)
        b, u, w = vectors.split([1, self.size, self.size], -1)
        along = (w * u).sum(-1, keepdim=True)
        slope = positive_slope(along)
        norm2 = (w * w).sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        return b, w, u + (slope - 1 - along) / norm2 * w, slope

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        b, w, u, slope = self._params(context)
        p = (w * x).sum(-1, keepdim=True)
        _, log_det = _move_projection(p, b, slope)
        return x + u * torch.tanh(p + b), log_det.squeeze(-1)

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        b, w, u, slope = self._params(context)
        q, reach = (w * y).sum(-1, keepdim=True), (slope - 1).abs()
        p, log_det = monotone_inverse(
            lambda p: _move_projection(p, b, slope), q, low=q - reach, high=q + reach
        )
        return y - u * torch.tanh(p + b), -log_det.squeeze(-1)


def _move_projection(p: Tensor, b: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return w · y for p = w · x, and the logarithm of its slope."""
    t, steep = torch.tanh(p + b), tanh_slope(p + b)
    return p + (slope - 1) * t, torch.log(t * t + steep * slope)


class Radial(AxisBijection):
    r"""Contract or expand around a point.

    .. math:: y = x + \frac{\beta}{\alpha + r} (x - x_0), \qquad r = |x - x_0|

    With :math:`\beta = \alpha (\kappa - 1)`: κ > 0.001 is the slope at the centre, which makes it
    invertible. O(D) in either direction: from y to x the radius solves a quadratic equation. With
    a context, which then sets α, κ and :math:`x_0`, one network call. The identity at
    initialization.

    Args:
        input_dim: Number of features D.
        context_dim: Features of the context; 0 for none.
        **network: ``hidden_dims``, ``residual`` and ``activation`` of the context's network.

    References:
        Rezende, Mohamed (2015), Variational inference with normalizing flows, eq. 14 and appendix
        A.2. arXiv:1505.05770
    """

    def __init__(self, input_dim: int, *, context_dim: int = 0, **network: Any) -> None:
        super().__init__(input_dim, context_dim=context_dim)
        centre = torch.randn(input_dim) / math.sqrt(input_dim)
        start = torch.cat([torch.zeros(2), centre]).unsqueeze(0)
        self.vectors = Parameters(start, context_dim=context_dim, **network)

    def _params(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        (vectors,) = self.vectors.at_context(context)
        alpha, slope, centre = vectors.split([1, 1, self.size], -1)
        return MIN_SLOPE + F.softplus(alpha), positive_slope(slope), centre

    def _log_det(self, r: Tensor, alpha: Tensor, slope: Tensor) -> Tensor:
        across = torch.log((r + alpha * slope) / (r + alpha))
        along = torch.log1p((slope - 1) * (alpha / (alpha + r)).square())
        return ((self.size - 1) * across + along).squeeze(-1)

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        alpha, slope, centre = self._params(context)
        r = torch.linalg.vector_norm(x - centre, dim=-1, keepdim=True)
        y = x + alpha * (slope - 1) / (alpha + r) * (x - centre)
        return y, self._log_det(r, alpha, slope)

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        alpha, slope, centre = self._params(context)
        # |y - x0| = r (r + α κ) / (r + α), so r² + b r - α |y - x0| = 0; the roots differ in sign
        radius = torch.linalg.vector_norm(y - centre, dim=-1, keepdim=True)
        b = alpha * slope - radius
        larger = (b.abs() + torch.sqrt(b * b + 4 * alpha * radius)) / 2
        r = torch.where(b > 0, alpha * radius / larger, larger)
        x = centre + (r + alpha) / (r + alpha * slope) * (y - centre)
        return x, -self._log_det(r, alpha, slope)


class Sylvester(AxisBijection):
    r"""Planar maps along D orthogonal directions at once, coupled by triangular matrices.

    .. math:: y = x + Q R \tanh(S Q^T x + b), \qquad \det = \prod_i (1 + \tanh' R_{ii} S_{ii})

    Q is a product of K reflections, R and S are upper triangular with diagonals inside (-1, 1).
    O(D² + K D) from x to y. From y to x the entries of :math:`Q^T x` come one after the other,
    each the root of a monotone equation in one unknown, found to the precision of the dtype, with
    exact first-order gradients: D root searches. With a context, which then sets everything, one
    network call in either direction. The identity at initialization.

    Args:
        input_dim: Number of features D.
        count_transforms: Number of reflections K.
        context_dim: Features of the context; 0 for none.
        **network: ``hidden_dims``, ``residual`` and ``activation`` of the context's network.

    Raises:
        ValueError: If ``count_transforms`` is not positive.

    References:
        van den Berg, Hasenclever, Tomczak, Welling (2018), Sylvester normalizing flows.
        arXiv:1803.05649
    """

    def __init__(
        self, input_dim: int, count_transforms: int = 1, *, context_dim: int = 0, **network: Any
    ) -> None:
        super().__init__(input_dim, context_dim=context_dim)
        if count_transforms < 1:
            raise ValueError(f"count_transforms must be positive; got {count_transforms}")
        d = self.size
        self.triangle = Triangle(d, upper=True)
        identity = torch.eye(d)[*torch.triu_indices(d, d)]
        pieces = [torch.randn(count_transforms * d), 0 * identity, identity, torch.zeros(d)]
        self.sizes = [len(piece) for piece in pieces]
        start = torch.cat(pieces).unsqueeze(0)
        self.vectors = Parameters(start, context_dim=context_dim, **network)

    @property
    def calls(self) -> tuple[float, float]:
        """Network calls of a context, and a root search for each feature back."""
        forward, inverse = super().calls
        return forward, inverse + ROOT_SEARCH * self.size

    def _params(self, context: Tensor | None) -> tuple[Sequence[Tensor], Tensor, Tensor, Tensor]:
        """Return the normals of Q's reflections, R, S and b."""
        (vectors,) = self.vectors.at_context(context)
        normals, r, s, b = vectors.split(self.sizes, -1)
        reflections = normals.unflatten(-1, (-1, self.size)).unbind(-2)
        return reflections, self._matrix(r), self._matrix(s), b

    def _matrix(self, packed: Tensor) -> Tensor:
        raw = self.triangle(packed)
        diagonal = math.sqrt(1 - MIN_SLOPE) * raw.diagonal(dim1=-2, dim2=-1).tanh()
        return raw.triu(1) + diagonal.diag_embed()

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        reflections, r, s, b = self._params(context)
        a = _times(s, _rotate(x, reflections)) + b
        y = x + _rotate(_times(r, torch.tanh(a)), reflections[::-1])
        diagonals = r.diagonal(dim1=-2, dim2=-1) * s.diagonal(dim1=-2, dim2=-1)
        return y, torch.log1p(tanh_slope(a) * diagonals).sum(-1)

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        reflections, r, s, b = self._params(context)
        rest, a = _rotate(y, reflections), b
        v: list[Tensor] = []
        log_det = y.new_zeros(y.shape[:-1])
        for i in reversed(range(self.size)):
            r_i, s_i = r[..., :, i], s[..., :, i]
            v_i, log_slope = _solve(rest[..., i], r_i[..., i], s_i[..., i], a[..., i])
            v.insert(0, v_i)
            log_det = log_det - log_slope
            a = a + s_i * v_i.unsqueeze(-1)
            rest = rest - r_i * torch.tanh(a[..., i : i + 1])
        return _rotate(torch.stack(v, -1), reflections[::-1]), log_det


def _rotate(x: Tensor, normals: Sequence[Tensor]) -> Tensor:
    for u in normals:
        x = reflect(x, u)
    return x


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """Return ``matrix`` times each vector of x; batches broadcast."""
    return x @ matrix.mT if matrix.dim() == 2 else (matrix @ x.unsqueeze(-1)).squeeze(-1)


def _solve(q: Tensor, r: Tensor, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return v with v + r tanh(s v + a) = q, and the logarithm of that map's slope at v."""

    def move(v: Tensor) -> tuple[Tensor, Tensor]:
        h = s * v + a
        return v + r * torch.tanh(h), torch.log1p(r * s * tanh_slope(h))

    return monotone_inverse(move, q, low=q - r.abs(), high=q + r.abs())


def planar(input_dim: int, hidden_dims: Sequence[int] | None = None, **kwargs: Any) -> Planar:
    """Return :class:`Planar`; ``hidden_dims`` are those of a context's network."""
    return Planar(input_dim, hidden_dims=hidden_dims, **kwargs)


def radial(input_dim: int, hidden_dims: Sequence[int] | None = None, **kwargs: Any) -> Radial:
    """Return :class:`Radial`; ``hidden_dims`` are those of a context's network."""
    return Radial(input_dim, hidden_dims=hidden_dims, **kwargs)


def sylvester(input_dim: int, count_transforms: int | None = None, **kwargs: Any) -> Sylvester:
    """Return :class:`Sylvester` with ``count_transforms`` reflections, D // 2 + 1 if None."""
    if count_transforms is None:
        count_transforms = input_dim // 2 + 1
    return Sylvester(input_dim, count_transforms, **kwargs)


def conditional_sylvester(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_transforms: int | None = None,
    **kwargs: Any,
) -> Bijection:
    """:func:`sylvester` with a context of ``context_dim`` features."""
    kwargs.update(hidden_dims=hidden_dims)
    return conditional(sylvester)(input_dim, context_dim, count_transforms, **kwargs)


conditional_planar = conditional(planar)
conditional_radial = conditional(radial)
