"""Ways of evaluating a function of one point on many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyroflows.training.seeds import rewinder

__all__ = [
    "Failures",
    "gathered",
    "largest_tensor",
    "one_by_one",
    "operations",
]


def gathered(
    function: Callable[[Tensor], Any],
    parts: Iterable[Tensor],
    join: Callable[[list[Tensor]], Tensor],
    *,
    rewinds: bool,
) -> Any:
    """``function`` of each part, its results joined tensor by tensor.

    Args:
        function: Gives tensors in any containers.
        parts: What it is called on.
        join: :func:`torch.stack` or :func:`torch.cat`.
        rewinds: Whether every call sees the same random numbers.
    """
    rewind = rewinder() if rewinds else None
    found = []
    for part in parts:
        if rewind is not None:
            rewind()
        found.append(tree_flatten(function(part)))
    columns = zip(*(leaves for leaves, _ in found), strict=True)
    return tree_unflatten([join(list(c)) for c in columns], found[0][1])


def one_by_one(
    function: Callable[[Tensor], Any], *, rewinds: bool = False
) -> Callable[[Tensor], Any]:
    """``function`` of a point, ``(D,)``, on ``(S, D)``."""
    return lambda u: gathered(function, u, torch.stack, rewinds=rewinds)


@dataclass
class Failures:
    """Points at which the model raised.

    Attributes:
        count: How many.
        first: What was raised first.
    """

    count: int = 0
    first: Exception | None = None

    def add(self, error: Exception) -> None:
        """Count one."""
        self.count, self.first = self.count + 1, self.first or error

    def __str__(self) -> str:
        return f"{self.count} (first {type(self.first).__name__}: {str(self.first)[:200]})"


class _Largest(TorchDispatchMode):
    """Size of the largest tensor that is made, and the number of operations."""

    numel, calls = 1, 0

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def largest_tensor(function: Callable[[], Any]) -> int:
    """Number of elements of the largest tensor that a call of ``function`` makes."""
    with torch.no_grad(), _Largest() as seen:
        function()
    return seen.numel


def operations(function: Callable[[], Any]) -> int:
    """Number of operations on tensors in a call of ``function``."""
    with torch.no_grad(), _Largest() as seen:
        function()
    return seen.calls
