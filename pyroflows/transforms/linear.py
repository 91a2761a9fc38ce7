"""Linear maps along an axis: a matrix in its PLU form, a triangular affine map."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.bijection import Bijection
from pyroflows.compose import iterated
from pyroflows.numerics import soft_bound
from pyroflows.transforms._common import (
    LOG_SCALE_BOUND,
    AxisBijection,
    Parameters,
    Triangle,
    from_rows,
    rows_along,
)
from pyroflows.transforms._factories import conditional
from pyroflows.transforms.orthogonal import (
    Householder,
    MatrixExponential,
    conditional_householder,
    conditional_matrix_exponential,
    householder,
    matrix_exponential,
)
from pyroflows.transforms.permutation import Permute, as_order, permute, reverse

__all__ = [
    "Householder",
    "Linear",
    "MatrixExponential",
    "Permute",
    "TriangularAffine",
    "conditional_generalized_channel_permute",
    "conditional_householder",
    "conditional_linear",
    "conditional_lower_cholesky_affine",
    "conditional_matrix_exponential",
    "generalized_channel_permute",
    "householder",
    "iterated",
    "linear",
    "lower_cholesky_affine",
    "matrix_exponential",
    "permute",
    "reverse",
]


class Linear(AxisBijection):
    r"""Multiply by a learnable matrix along an axis, in its PLU form.

    .. math:: y = P L U x, \qquad \log|\det| = \sum_i \log U_{ii}

    P is a fixed permutation (a buffer), L unit lower triangular, U upper triangular with a
    positive diagonal whose logarithm is smoothly bounded. Either direction costs O(D²) for each
    vector, by two products or two triangular solves, and the log-determinant O(D); with a context
    one network call. At initialization L = U = 1.

    Args:
        input_dim: Entries D along ``dim``, or the shape of the event.
        permutation: P as an order of ``range(D)``; the natural one if None, which makes y = x at
            initialization.
        dim: Negative axis; -3 gives the 1×1 convolution of images ``(channels, height, width)``.
        context_dim: Features of the context, shape ``(*batch, context_dim)``, which then sets all
            entries of L and U.
        bound: Largest |log U_ii|, in nats.
        **network: ``hidden_dims``, ``residual`` and ``activation`` of the context's network.

    Raises:
        ValueError: If ``permutation`` is none of D entries.

    References:
        Kingma, Dhariwal (2018), Glow, section 3.2. arXiv:1807.03039
    """

    permutation: Tensor
    restore_index: Tensor

    def __init__(
        self,
        input_dim: int | Sequence[int],
        permutation: Sequence[int] | Tensor | None = None,
        *,
        dim: int = -1,
        context_dim: int = 0,
        bound: float = LOG_SCALE_BOUND,
        **network: Any,
    ) -> None:
        super().__init__(input_dim, dim, context_dim=context_dim)
        d, self.bound = self.size, bound
        order = as_order(range(d) if permutation is None else permutation, d)
        self.register_buffer("permutation", order)
        self.register_buffer("restore_index", order.argsort())
        self.entries = Parameters(torch.zeros(1, d, d), context_dim=context_dim, **network)

    def _factors(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return L - 1, U and log diag U, with the context's batch in front."""
        (entries,) = self.entries.at_context(context)
        log_diagonal = soft_bound(entries.diagonal(dim1=-2, dim2=-1), self.bound)
        return entries.tril(-1), entries.triu(1) + log_diagonal.exp().diag_embed(), log_diagonal

    def _log_det(self, value: Tensor, log_diagonal: Tensor) -> Tensor:
        copies = math.prod(value.shape[self.dim + 1 :]) if self.dim < -1 else 1
        return (copies * log_diagonal.sum(-1)).expand(value.shape[: self.dim])

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        lower, upper, log_diagonal = self._factors(context)
        rows = rows_along(x, self.dim, batched=upper.dim() > 2)
        rows = rows @ upper.mT
        rows = rows + rows @ lower.mT
        y = from_rows(rows.index_select(-1, self.permutation), x, self.dim)
        return y, self._log_det(x, log_diagonal)

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        lower, upper, log_diagonal = self._factors(context)
        rows = rows_along(y, self.dim, batched=upper.dim() > 2)
        rows = rows.index_select(-1, self.restore_index)
        solve = torch.linalg.solve_triangular
        rows = solve(lower.mT, rows, upper=True, left=False, unitriangular=True)
        rows = solve(upper.mT, rows, upper=False, left=False)
        return from_rows(rows, y, self.dim), self._log_det(y, -log_diagonal)


class TriangularAffine(AxisBijection):
    r"""A learnable lower-triangular affine map; it makes standard normal noise N(loc, L Lᵀ).

    .. math:: y = \mathrm{loc} + L x, \qquad \log|\det| = \sum_i \log L_{ii}

    The log-diagonal is smoothly bounded. O(D²) in either direction; with a context, which then
    sets loc and L, one network call. The identity at initialization, unless told otherwise.

    Args:
        input_dim: Number of features D.
        loc: Initial loc, shape ``(D,)``; zeros if None.
        scale_tril: Initial L, shape ``(D, D)``, lower triangular with a positive diagonal; the
            identity if None.
        context_dim: Features of the context; 0 for none.
        bound: Largest |log L_ii|, in nats; infinity for none.
        **network: ``hidden_dims``, ``residual`` and ``activation`` of the context's network.

    Raises:
        ValueError: If ``loc`` or ``scale_tril`` has the wrong shape or a diagonal entry beyond the
            bound.
    """

    def __init__(
        self,
        input_dim: int,
        loc: Tensor | None = None,
        scale_tril: Tensor | None = None,
        *,
        context_dim: int = 0,
        bound: float = LOG_SCALE_BOUND,
        **network: Any,
    ) -> None:
        super().__init__(input_dim, context_dim=context_dim)
        d, self.bound = self.size, bound
        loc = torch.zeros(d) if loc is None else loc.detach()
        scale_tril = torch.eye(d) if scale_tril is None else scale_tril.detach()
        if loc.shape != (d,) or scale_tril.shape != (d, d):
            raise ValueError(
                f"TriangularAffine expects loc of shape ({d},) and scale_tril of shape "
                f"({d}, {d}); got {tuple(loc.shape)} and {tuple(scale_tril.shape)}"
            )
        log_diagonal = scale_tril.diagonal().log()
        ratio = log_diagonal / bound
        if not ratio.is_meta and not bool((ratio.abs() < 1).all()):
            raise ValueError(
                f"TriangularAffine expects |log diag(scale_tril)| < {bound}; "
                f"got a diagonal of {scale_tril.diagonal().tolist()}"
            )
        raw = log_diagonal * (1 - ratio * ratio).rsqrt()  # undoes soft_bound
        packed = (scale_tril.tril(-1) + raw.diag())[*torch.tril_indices(d, d)]
        self.triangle = Triangle(d)
        start = torch.cat([loc, packed]).unsqueeze(0)
        self.entries = Parameters(start, context_dim=context_dim, **network)

    def _params(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if context is None:
            entries = self.entries.theta.flatten()  # a view, cheaper than iterating
        else:
            (entries,) = self.entries.at_context(context)
        loc, packed = entries.split([self.size, entries.shape[-1] - self.size], -1)
        raw = self.triangle(packed)
        log_diagonal = soft_bound(raw.diagonal(dim1=-2, dim2=-1), self.bound)
        scale_tril = raw.diagonal_scatter(log_diagonal.exp(), dim1=-2, dim2=-1)
        return loc, scale_tril, log_diagonal

    @property
    def loc(self) -> Tensor:
        """Shift, ``(D,)``, with the context's batch in front of a conditioned one."""
        return self._params(self._context)[0]

    @property
    def scale_tril(self) -> Tensor:
        """L, ``(D, D)``, with the context's batch in front of a conditioned one."""
        return self._params(self._context)[1]

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        loc, scale_tril, log_diagonal = self._params(context)
        if context is None:
            y = x @ scale_tril.mT
        else:
            y = from_rows(rows_along(x, -1, batched=True) @ scale_tril.mT, x, -1)
        return y + loc, log_diagonal.sum(-1).expand(x.shape[:-1])

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        loc, scale_tril, log_diagonal = self._params(context)
        away, solve = y - loc, torch.linalg.solve_triangular
        if context is None:
            rows = away.reshape(-1, self.size)
            x = solve(scale_tril.mT, rows, upper=True, left=False).reshape(y.shape)
        else:
            rows = rows_along(away, -1, batched=True)
            x = from_rows(solve(scale_tril.mT, rows, upper=True, left=False), y, -1)
        return x, -log_diagonal.sum(-1).expand(y.shape[:-1])


def linear(
    input_dim: int | Sequence[int],
    hidden_dims: Sequence[int] | None = None,
    permutation: Sequence[int] | Tensor | None = None,
    dim: int = -1,
    **kwargs: Any,
) -> Linear:
    """Return :class:`Linear`, a learnable matrix; ``hidden_dims`` are of a context's network."""
    return Linear(input_dim, permutation, dim=dim, hidden_dims=hidden_dims, **kwargs)


def lower_cholesky_affine(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    loc: Tensor | None = None,
    scale_tril: Tensor | None = None,
    **kwargs: Any,
) -> TriangularAffine:
    """Return :class:`TriangularAffine`, y = loc + L x; loc and L start as given and learn."""
    return TriangularAffine(input_dim, loc, scale_tril, hidden_dims=hidden_dims, **kwargs)


def generalized_channel_permute(
    channels: int = 3,
    permutation: Sequence[int] | Tensor | None = None,
    hidden_dims: Sequence[int] | None = None,
    **kwargs: Any,
) -> Linear:
    """Return Glow's 1×1 convolution of images: :class:`Linear` along dim -3.

    It starts as a permutation of the channels, the given one or if None a random one, so that
    channels mix.
    """
    if permutation is None:
        permutation = torch.randperm(channels, device="cpu")
    return Linear(channels, permutation, dim=-3, hidden_dims=hidden_dims, **kwargs)


def conditional_generalized_channel_permute(
    context_dim: int,
    channels: int = 3,
    hidden_dims: Sequence[int] | None = None,
    **kwargs: Any,
) -> Bijection:
    """:func:`generalized_channel_permute` with a context, whose size comes first as in Pyro."""
    kwargs.update(hidden_dims=hidden_dims)
    return conditional(generalized_channel_permute)(channels, context_dim, **kwargs)


conditional_linear = conditional(linear)
conditional_lower_cholesky_affine = conditional(lower_cholesky_affine)
