"""Reflections and matrix exponentials: matrices that are invertible whatever their parameters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.bijection import Bijection
from pyroflows.transforms._common import AxisBijection, Parameters, from_rows, rows_along
from pyroflows.transforms._factories import conditional

__all__ = [
    "Householder",
    "MatrixExponential",
    "conditional_householder",
    "conditional_matrix_exponential",
    "householder",
    "matrix_exponential",
    "reflect",
]


def reflect(x: Tensor, u: Tensor) -> Tensor:
    r"""Reflect x at the plane orthogonal to u, :math:`x - 2 u (u \cdot x) / |u|^2`."""
    norm2 = (u * u).sum(-1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
    return x - (2 * (u * x).sum(-1, keepdim=True) / norm2) * u


class Householder(AxisBijection):
    r"""Reflections at learnable planes, one after the other: an orthogonal map.

    .. math:: y = H_K \cdots H_1 x, \qquad H_k = 1 - 2 \frac{u_k u_k^T}{|u_k|^2}

    O(K D) in either direction; with a context, which then sets every u, one network call. A single
    reflection is never the identity, but two equal ones are: at initialization the planes are
    random and equal in pairs, so an even K starts as the identity and an odd K as one random
    reflection.

    Args:
        input_dim: Number of features D.
        count_transforms: Number of reflections K; K = D reaches every orthogonal map of
            determinant (-1)^D.
        context_dim: Features of the context; 0 for none.
        **network: ``hidden_dims``, ``residual`` and ``activation`` of the context's network.

    Raises:
        ValueError: If ``count_transforms`` is not positive.

    References:
        Tomczak, Welling (2016), Improving variational auto-encoders using Householder flow.
        arXiv:1611.09630
    """

    def __init__(
        self, input_dim: int, count_transforms: int = 2, *, context_dim: int = 0, **network: Any
    ) -> None:
        super().__init__(input_dim, context_dim=context_dim)
        if count_transforms < 1:
            raise ValueError(f"count_transforms must be positive; got {count_transforms}")
        planes = torch.randn((count_transforms + 1) // 2, input_dim)
        start = planes.repeat_interleave(2, 0)[:count_transforms].unsqueeze(0)
        self.normals = Parameters(start, context_dim=context_dim, **network)

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[:-1])
        for u in self.normals.at_context(context)[0].unbind(-2):
            x = reflect(x, u)
        return x, log_det

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_det = y.new_zeros(y.shape[:-1])
        for u in reversed(self.normals.at_context(context)[0].unbind(-2)):
            y = reflect(y, u)
        return y, log_det


class MatrixExponential(AxisBijection):
    r"""Multiply by the exponential of a learnable matrix, which is always invertible.

    .. math:: y = e^M x, \qquad x = e^{-M} y, \qquad \log|\det| = \operatorname{tr} M

    One matrix exponential, O(D³), for each context in either direction, to the precision of the
    dtype; with a context one network call. The identity at initialization.

    Args:
        input_dim: Number of features D.
        bound: M is shrunk smoothly so that its Frobenius norm stays below ``bound``; far beyond
            the default float32 overflows.
        context_dim: Features of the context; 0 for none.
        **network: ``hidden_dims``, ``residual`` and ``activation`` of the context's network.

    Raises:
        ValueError: If ``bound`` is not positive.

    References:
        Hoogeboom, Garcia Satorras, Tomczak, Welling (2020), The convolution exponential.
        arXiv:2006.01910
    """

    def __init__(
        self, input_dim: int, bound: float = 32.0, *, context_dim: int = 0, **network: Any
    ) -> None:
        super().__init__(input_dim, context_dim=context_dim)
        if not bound > 0:
            raise ValueError(f"bound must be positive; got {bound}")
        self.bound = bound
        start = torch.zeros(1, input_dim, input_dim)
        self.weights = Parameters(start, context_dim=context_dim, **network)

    def _move(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        matrix = (-1 if inverse else 1) * self.weights.at_context(context)[0]
        norm2 = (matrix * matrix).sum((-2, -1), keepdim=True)
        matrix = matrix * torch.rsqrt(1 + norm2 / self.bound**2)
        rows = rows_along(value, -1, batched=matrix.dim() > 2) @ torch.matrix_exp(matrix).mT
        log_det = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        return from_rows(rows, value, -1), log_det.expand(value.shape[:-1])


def householder(input_dim: int, count_transforms: int | None = None, **kwargs: Any) -> Householder:
    """Return :class:`Householder`; ``count_transforms`` is even and above D / 2 if None."""
    if count_transforms is None:
        count_transforms = 2 * ((input_dim // 2 + 2) // 2)
    return Householder(input_dim, count_transforms, **kwargs)


def conditional_householder(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_transforms: int = 1,
    **kwargs: Any,
) -> Bijection:
    """:func:`householder` with a context of ``context_dim`` features."""
    kwargs.update(hidden_dims=hidden_dims)
    return conditional(householder)(input_dim, context_dim, count_transforms, **kwargs)


def matrix_exponential(
    input_dim: int,
    iterations: int = 8,
    normalization: str = "none",
    bound: float | None = None,
    **kwargs: Any,
) -> MatrixExponential:
    """Return :class:`MatrixExponential`.

    The exponential is not truncated: ``iterations`` is taken for Pyro's sake and changes nothing.
    ``bound=None`` stands for the default of the class.

    Raises:
        ValueError: If ``normalization`` is not "none", the only one there is.
    """
    if normalization != "none":
        raise ValueError(f"normalization must be 'none'; got {normalization!r}. Use bound=")
    if bound is not None:
        kwargs.update(bound=bound)
    return MatrixExponential(input_dim, **kwargs)


def conditional_matrix_exponential(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    iterations: int = 8,
    normalization: str = "none",
    bound: float | None = None,
    **kwargs: Any,
) -> Bijection:
    """:func:`matrix_exponential` with a context of ``context_dim`` features."""
    kwargs.update(hidden_dims=hidden_dims)
    return conditional(matrix_exponential)(
        input_dim, context_dim, iterations, normalization, bound, **kwargs
    )
