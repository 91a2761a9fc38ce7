"""The one loop that calls an optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyroflows.training.clipping import Clip, MaxNorm
from pyroflows.training.history import History
from pyroflows.training.parallel import average_gradients
from pyroflows.training.schedule import Schedule
from pyroflows.training.states import Best

__all__ = ["Optimize", "Steps", "make_adam"]

Optimize = Callable[..., torch.optim.Optimizer]


def make_adam(
    parameters: Iterable[Any],
    lr: float,
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """Return Adam, fused where the device has it.

    A third to a sixth of the default's time on the CPU.

    Args:
        parameters: Tensors, or groups of them as torch's optimizers take them.
        lr: Learning rate of groups that have none of their own.
        weight_decay: Decoupled weight decay (AdamW), likewise.
        betas: Decay of the averages of gradients and of their squares.
    """
    groups = [
        dict(params=[g]) if isinstance(g, Tensor) else {**g, "params": _listed(g["params"])}
        for g in parameters
    ]
    tensors = [p for g in groups for p in g["params"]]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in tensors)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)


def _listed(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


class Steps:
    """Steps of an optimizer: iterate over them and :meth:`take` each.

    .. code-block:: python

        steps = Steps(flow.parameters(), lr=1e-3, schedule=Schedule(1000))
        for step in steps:
            steps.take(-flow.log_prob(batch()).mean())

    An iteration ends with the schedule, or when something called :meth:`stop`; it may be begun
    again and goes on at the next step, so that ``zip(steps, batches)`` ends with whichever ends
    first. A step whose loss or gradient is not finite is left out, and counted.

    Args:
        parameters: Tensors, or groups ``{"params": ..., "lr": ..., "weight_decay": ...}`` with
            rates of their own, as torch's optimizers take them.
        lr: Largest learning rate of what has none of its own.
        schedule: Factor of all rates; None leaves them, and has no end.
        clip: Clips the gradients and tells whether they are finite.
        optimizer: Called as ``optimizer(parameters, lr=lr)``. L-BFGS is neither clipped nor given
            anything but what computes the loss.
        history: Where losses and skipped steps are recorded.
        shared: Whether to average gradients and losses over the processes of
            ``torch.distributed``.

    Attributes:
        count: Steps taken, those left out included.
        factor: Factor of the learning rates at the next step.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        *,
        schedule: Schedule | None = None,
        clip: Clip | None = None,
        optimizer: Optimize = make_adam,
        history: History | None = None,
        shared: bool = False,
    ) -> None:
        self.optimizer = optimizer(list(parameters), lr=lr)
        groups = self.optimizer.param_groups
        self.parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        self.rates = [group["lr"] for group in groups]
        self.schedule, self.shared = schedule, shared
        self.clip = MaxNorm() if clip is None else clip
        self.history = History() if history is None else history
        self.count = 0
        self._look()

    @property
    def losses(self) -> list[float]:
        """Loss of every step tried."""
        return self.history.losses

    @property
    def skipped(self) -> int:
        """Steps left out because loss or gradient was not finite."""
        return self.history.skipped_steps

    @property
    def lr(self) -> float:
        """Learning rate of the first parameters, at the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def __iter__(self) -> Iterator[int]:
        """Numbers of the steps, from 0."""
        while not self.history.stopped and (self.factor > 0 or not self.count):
            yield self.count

    def stop(self, reason: str) -> None:
        """Let no step follow; ``reason`` is recorded, see :attr:`History.stopped`."""
        self.history.stopped = reason

    def take(self, loss: Tensor | Callable[[], Tensor | float]) -> float | None:
        """Take one step; return its loss, or None if it was left out, being not finite.

        Args:
            loss: A scalar to differentiate; or what computes one; or what computes the gradients
                itself, adds them to ``.grad``, and returns the loss as a number.
        """
        self._set_rates()
        if isinstance(self.optimizer, torch.optim.LBFGS):
            return self._record(*self._search(loss))
        value = self._differentiate(loss)
        usable = math.isfinite(value) and self.clip(self.parameters)
        if not isinstance(usable, bool):
            raise TypeError(
                "a clipper must return whether the gradients are finite, True or False; "
                f"{self.clip!r:.80} returned {usable!r:.80}"
            )
        if usable:
            self.optimizer.step()
        return self._record(value, usable)

    def _differentiate(self, loss: Tensor | Callable[[], Tensor | float]) -> float:
        """Put the gradient in place; return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        value = loss() if callable(loss) else loss
        if isinstance(value, Tensor):
            value.backward()
            value = value.item()
        return average_gradients(self.parameters, value) if self.shared else value

    def _search(self, loss: Tensor | Callable[[], Tensor | float]) -> tuple[float, bool]:
        """One step of L-BFGS, which asks for the loss at several points."""
        if not callable(loss):
            raise TypeError("L-BFGS asks for the loss at several points: pass what computes it")
        before, values = Best(self.parameters), []

        def closure() -> float:
            values.append(self._differentiate(loss))
            return values[-1]

        self.optimizer.step(closure)
        usable = all(map(math.isfinite, values)) and all(
            bool(p.isfinite().all()) for p in self.parameters
        )
        if not usable:
            before.restore()
            self.optimizer.state.clear()  # its curvature has seen what is not finite
        return values[0], usable

    def _record(self, value: float, usable: bool) -> float | None:
        self.losses.append(value)
        self.history.skipped_steps += not usable
        self.count += 1
        if self.schedule is not None:
            self.schedule.observe(self.losses)
            self.history.converged = self.schedule.converged
        self._look()
        return value if usable else None

    def _look(self) -> None:
        """Ask the schedule for the next step."""
        self.factor = 1.0 if self.schedule is None else self.schedule.factor(self.count)
        if self.factor == 0 and self.schedule is not None and self.schedule.timed:
            self.stop("max_time")

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, schedule, clipper and history."""
        kept = dict(optimizer=self.optimizer, history=self.history, **self._stateful())
        return {name: part.state_dict() for name, part in kept.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.history.load_state_dict(state["history"])
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        self.count = len(self.losses)
        self._look()

    def _stateful(self) -> dict[str, Any]:
        parts = dict(schedule=self.schedule, clip=self.clip)
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}

    def _set_rates(self) -> None:
        if self.schedule is None:
            return
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.factor
