"""Fixed permutations along an axis."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.transforms._common import AxisBijection

__all__ = ["Permute", "as_order", "permute", "reverse"]


def as_order(permutation: Sequence[int] | Tensor, size: int) -> Tensor:
    """Return a permutation of ``range(size)`` as a tensor on the CPU.

    Raises:
        ValueError: If it is none.
    """
    order = torch.as_tensor(permutation, device="cpu").tolist()
    if not isinstance(order, list) or sorted(order) != list(range(size)):
        raise ValueError(f"permutation must be one of 0..{size - 1}; got {order}")
    return torch.tensor(order, dtype=torch.long)


class Permute(AxisBijection):
    r"""Reorder the entries along an axis: :math:`y_i = x_{\pi(i)}`; the log-determinant is 0.

    Args:
        input_dim: Entries along ``dim``, or the shape of the event.
        permutation: The order :math:`\pi`, kept as a buffer.
        dim: Negative axis.

    Raises:
        ValueError: If ``permutation`` is none of ``input_dim`` entries.
    """

    permutation: Tensor
    restore_index: Tensor

    def __init__(
        self,
        input_dim: int | Sequence[int],
        permutation: Sequence[int] | Tensor,
        *,
        dim: int = -1,
    ) -> None:
        super().__init__(input_dim, dim)
        permutation = as_order(permutation, self.size)
        self.register_buffer("permutation", permutation)
        self.register_buffer("restore_index", permutation.argsort())

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x.index_select(self.dim, self.permutation), x.new_zeros(x.shape[: self.dim])

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return y.index_select(self.dim, self.restore_index), y.new_zeros(y.shape[: self.dim])


def permute(
    input_dim: int | Sequence[int],
    permutation: Sequence[int] | Tensor | None = None,
    dim: int = -1,
) -> Permute:
    """Return a fixed permutation along ``dim``: the given one, or if None a random one.

    Example:
        >>> import torch
        >>> from pyroflows import transforms as T
        >>> T.permute(3, [2, 0, 1])(torch.tensor([10.0, 20.0, 30.0]))
        tensor([30., 10., 20.])

    Args:
        input_dim: Entries along ``dim``, or the shape of the event, of ``-dim`` axes.
        permutation: Entry i of y is entry ``permutation[i]`` of x.
        dim: Negative axis.

    Raises:
        ValueError: If the arguments do not fit together.
    """
    if permutation is None:
        size = input_dim if isinstance(input_dim, int) else input_dim[0]
        permutation = torch.randperm(size, device="cpu")
    return Permute(input_dim, permutation, dim=dim)


def reverse(input_dim: int | Sequence[int], dim: int = -1) -> Permute:
    """Return the permutation that turns the order along ``dim`` around; see :func:`permute`."""
    n = input_dim if isinstance(input_dim, int) else input_dim[0]
    return Permute(input_dim, range(n - 1, -1, -1), dim=dim)
