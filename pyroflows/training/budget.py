"""The one clock of a fit."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable

import torch

from pyroflows.checks import users_line
from pyroflows.training.parallel import agreed

__all__ = ["Budget"]


class Budget:
    """Seconds of work since construction, what they allow, and what they cut.

    Work is processor time, unless several threads make it run ahead of the wall. Stages ask
    whether their share is over; what they then leave out they must :meth:`tell`.

    Args:
        seconds: Allowed for the whole fit; None for no end.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.limit = seconds or math.inf
        self.wall, self.cpu = time.monotonic(), time.process_time()
        self.cuts: list[str] = []

    def seconds(self) -> float:
        """Since construction."""
        return min(time.monotonic() - self.wall, time.process_time() - self.cpu)

    def spend(self, seconds: float) -> None:
        """Count seconds of work that was done before."""
        self.wall, self.cpu = self.wall - seconds, self.cpu - seconds

    def over(self, share: float = 1.0) -> bool:
        """Whether a share of the time is gone."""
        return self.seconds() > share * self.limit

    def window(
        self, *, reserve: float = 0.0, device: str | torch.device = "cpu"
    ) -> Callable[[], float]:
        """What tells the share that is spent of the time that is left from now on.

        Processes of ``torch.distributed`` agree on the largest.

        Args:
            reserve: Seconds to leave for what comes after.
            device: Where the processes exchange numbers.
        """
        begun, like = self.seconds(), torch.zeros((), device=device)
        if math.isinf(self.limit):
            return lambda: 0.0
        length = max(self.limit - reserve - begun, 1e-9)
        return lambda: agreed((self.seconds() - begun) / length, like=like)

    def tell(self, cut: str) -> None:
        """Remember what was cut."""
        if cut not in self.cuts:
            self.cuts.append(cut)

    def warn(self) -> None:
        """Say what was cut, if anything."""
        if self.cuts:
            warnings.warn(
                f"max_time={self.limit:g} s {' and '.join(self.cuts)}; more time would help",
                stacklevel=users_line(),
            )
