r"""Gaussian fits that place a flow before it trains, from a few thousand gradients.

Three candidates, each of which fails somewhere, and the ELBO to choose among them: batch-and-match
from the initial point, BFGS with a Laplace approximation from several starts, and batch-and-match
from the best of those.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pyroflows.guides.climbing import climb, laplace, lbfgs
from pyroflows.guides.gaussian import Gaussian, Target, normal_points
from pyroflows.guides.matching import batch_and_match, diagonal_match

__all__ = ["Gaussian", "batch_and_match", "climb", "laplace", "prefit"]


def _near(u: Tensor, gaussian: Gaussian) -> bool:
    """Whether ``u`` lies within half a standard deviation of the mean."""
    offset = (u - gaussian.loc)[:, None]
    return bool(
        torch.linalg.solve_triangular(gaussian.scale_tril, offset, upper=False).norm() < 0.5
    )


class _Candidates:
    """Gaussians and their ELBOs, one after the other; one that fails is noted."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.found: list[Gaussian] = []
        self.failures: list[Exception] = []

    def attempt(self, make: Callable[..., Gaussian], *args: Any, **kwargs: Any) -> Gaussian | None:
        """Make a Gaussian and its ELBO; None if it fails, or no budget is left to try."""
        if self.target.spent and self.found:
            return None
        try:
            candidate = make(*args, **kwargs)
            if not (candidate.loc.isfinite().all() and candidate.scale_tril.isfinite().all()):
                return None
            self.found.append(candidate.with_elbo(self.target))
        except (RuntimeError, ValueError, ArithmeticError) as error:
            self.failures.append(error)
            return None
        return candidate

    def best(self) -> Gaussian:
        """The one of best ELBO."""
        if not self.found:
            raise RuntimeError(
                "prefit: the log-density could not be evaluated at any start"
            ) from self.failures[0]
        return max(self.found, key=lambda c: c.elbo)


def prefit(
    log_density: Callable[[Tensor], Tensor],
    init_loc: Tensor,
    *,
    full_rank: bool = True,
    num_starts: int = 4,
    num_modes: int = 2,
    num_steps: int = 60,
    batch_size: int = 32,
    max_gradients: float = 10_000,
    max_time: float | None = None,
) -> tuple[Gaussian, list[Gaussian], int]:
    """The Gaussian of best ELBO among the candidates.

    A candidate that fails does not stop the others. Cost: two to five thousand gradients for up to
    ten latents.

    Args:
        log_density: Function ``(S, D) -> (S,)``.
        init_loc: Where to begin; shape ``(D,)``. Its type and device are those of the density.
        full_rank: Whether to fit full covariances, or diagonal ones, for many latents.
        num_starts: Starts of BFGS: ``init_loc`` and points around it.
        num_modes: Distinct modes to consider.
        num_steps: Largest number of batch-and-match steps, each time it runs.
        batch_size: Points per batch-and-match step.
        max_gradients: Gradients after which no further step is begun; up to one step more is used.
        max_time: Seconds after which none is.

    Returns:
        The best candidate in float64, all candidates, and the number of gradients used.
    """
    target = Target(
        log_density,
        init_loc.dtype,
        max_gradients=max_gradients,
        deadline=math.inf if max_time is None else time.monotonic() + max_time,
        batch_size=getattr(log_density, "batch_size", None),
    )
    loc, candidates = init_loc.detach().double(), _Candidates(target)
    fit: dict[str, Any] = {"num_steps": num_steps, "batch_size": batch_size}
    if full_rank:
        start = Gaussian(loc, torch.eye(len(loc)).to(loc), method="initial point")
        candidates.attempt(lambda: start)
        candidates.attempt(batch_and_match, target, start, **fit)
        spread = 2 * torch.tanh(normal_points(num_starts, len(loc), like=loc, seed=1))
        starts = loc + torch.cat([torch.zeros_like(spread[:1]), spread[1:]])
        _around_modes(candidates, climb(target, starts), num_modes, fit)
    else:
        start = Gaussian(loc, torch.ones_like(loc), method="initial point")
        candidates.attempt(lambda: start)
        candidates.attempt(diagonal_match, target, start, **fit)
        candidates.attempt(
            lambda: diagonal_match(
                target, Gaussian(lbfgs(target, loc), torch.ones_like(loc)), **fit
            )
        )
    return candidates.best(), candidates.found, target.num_gradients


def _around_modes(
    candidates: _Candidates, modes: Iterable[Tensor], num_modes: int, fit: dict[str, Any]
) -> None:
    """Laplace's approximation at distinct modes, and matched scores from the best of them."""
    target, laplaces = candidates.target, list[Gaussian]()
    for mode in modes:
        if len(laplaces) < num_modes and not any(_near(mode, g) for g in laplaces):
            found = candidates.attempt(laplace, target, mode)
            laplaces += [found] if found else []
    for best in sorted(laplaces, key=lambda c: -c.elbo)[:1]:
        matched = candidates.attempt(batch_and_match, target, best, **fit)
        if matched:
            matched.method = "batch-and-match from Laplace"
