"""What the steps of a fit share: the learning rate, clipped gradients, points of the base."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from pyroflows.guides.prefit import normal_points

__all__ = ["BasePoints", "GradientClipper", "Schedule"]


class Schedule:
    """Learning rate: linear warm-up, level until the loss levels off, then a cosine to zero.

    Args:
        num_steps: Longest schedule; two thirds of it, if never levelled off, are the cosine.
        window: Steps over which losses are averaged to see whether they still fall; 0 never looks.
        tol: Fall of the loss per window, in nats, that is worth another window at the full rate.
    """

    def __init__(self, num_steps: int, *, window: int = 60, tol: float = 0.005) -> None:
        self.num_steps, self.window, self.tol = num_steps, window, tol
        self.warmup = max(1, min(20, num_steps // 10))
        self.decay_from, self.decay_steps = num_steps // 3, num_steps - num_steps // 3
        self.converged = False

    def factor(self, step: int) -> float:
        """Factor of the learning rate at a step; 0 ends the fit."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if step < self.decay_from:
            return 1.0
        return 0.5 * (
            1 + math.cos(math.pi * min(1.0, (step - self.decay_from) / self.decay_steps))
        )

    def see(self, losses: list[float]) -> None:
        """Begin the cosine early if the last window of losses is no lower than the one before."""
        n, w = len(losses), self.window
        if (
            not w
            or n >= self.decay_from
            or n < self.warmup + 2 * w
            or (n - self.warmup) % (w // 2)
        ):
            return
        recent, before = (
            torch.tensor([y for y in x if math.isfinite(y)], dtype=torch.float64)
            for x in (losses[-w:], losses[-2 * w : -w])
        )
        if min(len(recent), len(before)) < w // 2:
            return
        noise = ((recent.var() + before.var()) / w).sqrt()
        if not before.mean() - recent.mean() > max(self.tol, noise.item()):
            self.decay_from, self.converged = n, True
            self.decay_steps = min(self.decay_steps, max(2 * w, n))

    def end_within(self, step: int, left: float) -> None:
        """Come to the end within ``left`` steps from ``step``, if it would not by itself."""
        left = max(1, int(left))
        if step + left >= self.decay_from + self.decay_steps:
            return
        done = max(0.0, (step - self.decay_from) / self.decay_steps)
        if done:  # the cosine goes on where it is, faster
            self.decay_steps = max(1, round(left / max(1e-3, 1 - done)))
            self.decay_from = step - round(done * self.decay_steps)
        else:
            self.decay_from = step + left // 3
            self.decay_steps = left - left // 3


class GradientClipper:
    """Scale a gradient down to a multiple of the running median of its norm.

    Args:
        factor: The multiple.
        window: Steps over which the median runs.
    """

    def __init__(self, factor: float = 2.0, window: int = 50) -> None:
        self.factor, self.norms = factor, deque[float](maxlen=window)

    def __call__(self, tensors: list[Tensor]) -> bool:
        """Clip the gradients of ``tensors`` together; False if they are not finite."""
        grads = [t.grad for t in tensors if t.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm().item() if grads else 0.0
        if not math.isfinite(norm):
            return False
        if len(self.norms) >= 5:
            limit = self.factor * sorted(self.norms)[len(self.norms) // 2]
            if norm > limit > 0:
                for g in grads:
                    g.mul_(limit / norm)
        self.norms.append(norm)
        return True


class BasePoints:
    """Standard normal batches: one Sobol set, shifted at random modulo one for each."""

    def __init__(self, num: int, dim: int, like: Tensor) -> None:
        like64 = like.new_zeros(0, dtype=torch.float64)
        self.points = torch.special.ndtr(normal_points(num, dim, like=like64))
        self.like = like

    def draw(self) -> Tensor:
        shift = torch.rand(
            self.points.shape[-1], dtype=self.points.dtype, device=self.points.device
        )
        eps = 1e-10
        return torch.special.ndtri(((self.points + shift) % 1.0).clamp(eps, 1 - eps)).to(self.like)
