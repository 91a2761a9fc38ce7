"""What several of the transforms share: an axis, parameters that a context may set, triangles."""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.bijection import Bijection
from pyroflows.conditioners import Activation, Dense

__all__ = [
    "LOG_SCALE_BOUND",
    "AxisBijection",
    "Parameters",
    "Triangle",
    "axis_shape",
    "from_rows",
    "rows_along",
]

LOG_SCALE_BOUND = 16.0  # of a diagonal: e^16 is still harmless in float32


def axis_shape(input_dim: int | Sequence[int], dim: int) -> list[int]:
    """Return the shape of an event, or only its length along ``dim`` if no more is known.

    Raises:
        ValueError: If ``dim`` is not negative, or ``input_dim`` is not positive or has not
            ``-dim`` axes.
    """
    if dim >= 0:
        raise ValueError(f"dim must be negative; got {dim}")
    shape = [input_dim] if isinstance(input_dim, int) else list(input_dim)
    if not isinstance(input_dim, int) and len(shape) != -dim:
        raise ValueError(f"dim={dim} needs an event of {-dim} axes; got input_dim={input_dim}")
    if min(shape) < 1:
        raise ValueError(f"input_dim must be positive; got {input_dim}")
    return shape


class AxisBijection(Bijection):
    """A bijection that treats one axis of the event; the axes behind it may be of any size.

    Args:
        input_dim: Entries along ``dim``, or the shape of the whole event, of ``-dim`` axes.
        dim: Negative axis.
        context_dim: Features of the context, shape ``(*batch, context_dim)``; 0 for none.

    Raises:
        ValueError: If ``dim`` is not negative, or ``input_dim`` is not positive or has not
            ``-dim`` axes.
    """

    def __init__(
        self, input_dim: int | Sequence[int], dim: int = -1, *, context_dim: int = 0
    ) -> None:
        shape = axis_shape(input_dim, dim)
        super().__init__(shape if len(shape) == -dim else None, context_dim=context_dim)
        self.dim, self.size = dim, shape[0]
        self.domain = self.codomain = constraints.independent(constraints.real, -dim)

    @property
    def calls(self) -> tuple[float, float]:
        """One network call in either direction if there is a context, else none."""
        return (1, 1) if self.context_dim else (0, 0)

    def _check(self, value: Tensor, event_dim: int, inverse: bool) -> None:
        super()._check(value, event_dim, inverse)
        if value.shape[self.dim] != self.size:
            raise ValueError(
                f"{type(self).__name__} expects {self.size} entries along dim {self.dim}; "
                f"got values of shape {tuple(value.shape)}"
            )

    def extra_repr(self) -> str:
        """Say how many entries along which axis."""
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{self.size}, dim={self.dim}{context}"


class Parameters(nn.Module):
    """Free parameters that start at ``start``; a context adds a network's output, zero at first.

    Args:
        start: Initial value, shape ``(num_params, *shape)``.
        context_dim: Features of the context; 0 for none.
        hidden_dims: Widths of the context's network.
        residual: Whether its widths after the first are residual blocks of two layers.
        activation: Constructor of its nonlinearity.
    """

    def __init__(
        self,
        start: Tensor,
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
        residual: bool = False,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        self.theta = nn.Parameter(start.detach().clone())
        if not context_dim:
            return
        num_params, *shape = start.shape
        self.net = Dense(
            context_dim,
            num_params,
            shape,
            hidden_dims=hidden_dims,
            residual=residual,
            activation=activation,
        )

    def at_context(self, context: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        """Return θ: ``num_params`` tensors of ``shape``, with the context's batch in front."""
        if context is None:
            return self.theta
        return tuple(t + c for t, c in zip(self.theta, self.net(context), strict=True))


def rows_along(x: Tensor, dim: int, batched: bool) -> Tensor:
    """Return the vectors along ``dim`` as ``(n, size)``; if ``batched``, ``(*batch, n, size)``."""
    rows = x.movedim(dim, -1)
    batch = rows.shape[: rows.dim() + dim] if batched else rows.shape[:0]
    return rows.reshape(*batch, prod(rows.shape[len(batch) : -1]), rows.shape[-1])


def from_rows(rows: Tensor, like: Tensor, dim: int) -> Tensor:
    """Undo :func:`rows_along`."""
    return rows.reshape(like.movedim(dim, -1).shape).movedim(-1, dim).contiguous()


class Triangle(nn.Module):
    """Unpack ``(*batch, D (D + 1) / 2)`` into triangular matrices, ``(*batch, D, D)``.

    Args:
        size: D.
        upper: Whether the entries lie above the diagonal, row by row, and not below.
    """

    index: Tensor

    def __init__(self, size: int, *, upper: bool = False) -> None:
        super().__init__()
        self.size, self.upper = size, upper
        self.register_buffer("index", self._index(None), persistent=False)

    def _index(self, device: torch.device | None) -> Tensor:
        """Where each entry lies in the flattened matrix, ``(D (D + 1) / 2,)``."""
        n = self.size
        side = torch.triu_indices if self.upper else torch.tril_indices
        rows, columns = side(n, n, device=device)
        return rows * n + columns

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Triangle":
        super()._apply(fn, recurse)
        # no state holds it, and to_empty leaves what it finds in memory
        self.index = self._index(self.index.device)
        return self

    def forward(self, packed: Tensor) -> Tensor:
        """Return the matrices, zero on the other side of the diagonal."""
        if self.index.device != packed.device:  # as after load_state_dict(assign=True)
            self.index = self._index(packed.device)
        n = self.size
        zeros = packed.new_zeros((*packed.shape[:-1], n * n))
        entries = zeros.index_copy(-1, self.index, packed)
        return entries.unflatten(-1, (n, n))
