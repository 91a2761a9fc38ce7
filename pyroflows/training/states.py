"""States of a fit: the best so far, the average of the last."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Average", "Best"]


class Best:
    """The state with the lowest loss, and the one at the start.

    Args:
        of: What has the state: a module, with its buffers, or tensors.

    Attributes:
        loss: Of the best state; NaN until one with a finite loss was offered.
        mark: What was said of it when it was offered, such as its epoch.
        state: The best; the start until one was offered.
        start: As it was at construction.
    """

    def __init__(self, of: nn.Module | Sequence[Tensor], *, mark: int = -1) -> None:
        self.of, self.mark, self.loss = of, mark, math.nan
        self.state = self.start = self._copy()

    def _live(self) -> Mapping[str, Tensor]:
        if isinstance(self.of, nn.Module):
            return self.of.state_dict()
        return {str(i): tensor for i, tensor in enumerate(self.of)}

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._live().items()}

    def offer(self, loss: float, mark: int = -1) -> bool:
        """Keep the present state if its loss is finite and the lowest; whether it is."""
        better = math.isfinite(loss) and not loss >= self.loss
        if better:
            self.loss, self.mark, self.state = loss, mark, self._copy()
        return better

    def restore(self, *, start: bool = False) -> None:
        """Go back to the best state, or to the start."""
        state = self.start if start else self.state
        if isinstance(self.of, nn.Module):
            self.of.load_state_dict(state)
            return
        with torch.no_grad():
            for name, tensor in self._live().items():
                tensor.copy_(state[name])

    def state_dict(self) -> dict[str, Any]:
        """Loss, mark and both states."""
        return dict(loss=self.loss, mark=self.mark, state=self.state, start=self.start)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        vars(self).update(state)


class Average:
    r"""Exponential moving average of parameters.

    .. math:: \bar\theta \leftarrow \delta_n \bar\theta + (1 - \delta_n)\, \theta,
        \qquad \delta_n = \min\Big(\delta, \frac{n}{n + 10}\Big)

    Args:
        parameters: What is averaged; buffers of a module are not.
        decay: :math:`\delta`.

    References:
        Polyak, Juditsky (1992), Acceleration of stochastic approximation by averaging.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float = 0.995) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"an average expects a decay between 0 and 1; got {decay}")
        self.parameters, self.decay, self.count = list(parameters), decay, 0
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present parameters in."""
        self.count += 1
        rate = 1 - min(self.decay, self.count / (self.count + 10))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], rate)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The parameters are their average meanwhile."""
        live = [p.detach().clone() for p in self.parameters]
        self._put(self.values)
        try:
            yield
        finally:
            self._put(live)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The average and how many it is of."""
        return dict(count=self.count, values=self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.count = state["count"]
        with torch.no_grad():
            for value, kept in zip(self.values, state["values"], strict=True):
                value.copy_(kept)
