"""The learning rate over a fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["Schedule", "warmup_cosine"]


class Schedule:
    r"""Learning rate: linear warm-up, level until the loss levels off, then a cosine to zero.

    .. math:: f(n) = \min\Big(1, \frac{n + 1}{w}\Big)\, \frac{1 + \cos \pi s(n)}{2}

    at step n, where s is the share of the cosine that is over: by the steps, or by the clock if
    that is further. The clock's first part is free (as long as the level part, a tenth at least),
    so that the schedule follows the steps alone, and a seed, unless time runs well ahead of them.

    Args:
        num_steps: Longest schedule.
        warmup: Steps of the warm-up w; None for a fiftieth.
        hold: Step at which the cosine begins, if the loss does not level off before; None for the
            end of the warm-up.
        window: Steps over which losses are averaged to see whether they still fall; 0 never looks.
        tol: Fall of the loss per window, in nats, that is worth another window at the full rate.
        clock: Tells which share of the time is spent, 0 to 1; None for no end but the steps'. See
            :meth:`Budget.window`.

    Attributes:
        position: Share of the cosine that was over when :meth:`factor` was last asked.
        converged: Whether the loss levelled off.
        timed: Whether the clock was further than the steps when :meth:`factor` was last asked.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        warmup: int | None = None,
        hold: int | None = None,
        window: int = 0,
        tol: float = 0.005,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.num_steps, self.window, self.tol, self.clock = num_steps, window, tol, clock
        self.warmup = max(1, round(0.02 * num_steps)) if warmup is None else warmup
        self.decay_from = self.warmup if hold is None else hold
        self.decay_steps = num_steps - self.decay_from
        self.free = min(0.5, max(0.1, self.decay_from / max(1, num_steps)))
        self.converged, self.timed, self.position = False, False, 0.0

    def factor(self, step: int) -> float:
        """Factor of the learning rate at a step, counted from 0; 0 ends the fit."""
        over = max(0, step - self.decay_from) / max(1, self.decay_steps)
        if self.decay_steps <= 0:  # all of it is warm-up
            over = float(step >= self.decay_from)
        spent = 0.0 if self.clock is None else self.clock()
        late = (spent - self.free) / (1 - self.free)
        self.timed, self.position = late > over, min(1.0, max(over, late))
        if self.position >= 1:
            return 0.0
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * self.position))

    def observe(self, losses: Sequence[float]) -> None:
        """Begin the cosine early if the last window of losses is no lower than the one before."""
        n, w = len(losses), self.window
        if w and n < self.decay_from and self._levelled_off(losses):
            self.decay_from, self.converged = n, True
            self.decay_steps = min(self.decay_steps, max(2 * w, n))

    def _levelled_off(self, losses: Sequence[float]) -> bool:
        n, w = len(losses), self.window
        if n < self.warmup + 2 * w or (n - self.warmup) % (w // 2):
            return False
        recent, before = (
            torch.tensor([y for y in x if math.isfinite(y)], dtype=torch.float64)
            for x in (losses[-w:], losses[-2 * w : -w])
        )
        if min(len(recent), len(before)) < w // 2:
            return False
        noise = ((recent.var() + before.var()) / w).sqrt()
        return not before.mean() - recent.mean() > max(self.tol, noise.item())

    def retime(self, begin: int, end: int) -> None:
        """Let the cosine begin and end at other steps."""
        self.num_steps, self.decay_from, self.decay_steps = end, begin, end - begin

    def state_dict(self) -> dict[str, Any]:
        """What has become of the schedule."""
        names = ("num_steps", "decay_from", "decay_steps", "converged")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        vars(self).update(state)


def warmup_cosine(step: int, num_steps: int, *, warmup: float = 0.02) -> float:
    """Return the factor of the learning rate.

    Linear up over the first part, then half a cosine to zero.
    """
    return Schedule(num_steps, warmup=max(1, round(warmup * num_steps))).factor(step)
