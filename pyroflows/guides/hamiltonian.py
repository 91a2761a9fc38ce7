"""Hamiltonian steps of many chains at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["State", "hamiltonian", "leapfrog"]


@dataclass(frozen=True)
class State:
    """Where C chains are.

    Attributes:
        position: ``(C, D)``.
        log_p: Log-density there; ``(C,)``.
        grad: Its gradient; ``(C, D)``.
    """

    position: Tensor
    log_p: Tensor
    grad: Tensor

    def moved(self, other: State, where: Tensor) -> State:
        """The other state for those chains that move, ``(C,)``."""
        return State(
            torch.where(where[:, None], other.position, self.position),
            torch.where(where, other.log_p, self.log_p),
            torch.where(where[:, None], other.grad, self.grad),
        )


def hamiltonian(
    with_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    state: State,
    size: Tensor | float,
    num_leapfrog: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[State, Tensor]:
    """One step of Hamiltonian Monte Carlo for every chain, and the mean rate of acceptance.

    Args:
        with_gradient: As in :func:`leapfrog`.
        state: Where the chains are.
        size: Length of a leapfrog step, broadcastable to ``(C, D)``.
        num_leapfrog: Their number.
        generator: Of momenta and acceptances, on the CPU; torch's own if None.
    """
    x = state.position
    momentum = _drawn(torch.randn, x, generator)
    energy = state.log_p - 0.5 * momentum.square().sum(-1)
    q, momentum, log_p, grad = leapfrog(with_gradient, x, momentum, state.grad, size, num_leapfrog)
    log_ratio = (log_p - 0.5 * momentum.square().sum(-1) - energy).nan_to_num(-math.inf)
    move = _drawn(torch.rand, log_ratio, generator).log() < log_ratio
    return state.moved(State(q, log_p, grad), move), log_ratio.exp().clamp(max=1.0).mean()


def _drawn(draw: Callable, like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return draw(like.shape, generator=generator, dtype=like.dtype, device=device).to(like)


def leapfrog(
    with_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    position: Tensor,
    momentum: Tensor,
    grad: Tensor,
    size: Tensor | float,
    num_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Follow Hamilton's equations for unit masses, all chains at once.

    Args:
        with_gradient: Log-density ``(C,)`` and its gradient ``(C, D)`` at positions ``(C, D)``.
        position: Where the chains are, ``(C, D)``.
        momentum: Their momenta, ``(C, D)``.
        grad: Gradient of the log-density there, ``(C, D)``.
        size: Length of a step, broadcastable to ``(C, D)``.
        num_steps: Number of steps, 1 or more; each costs a gradient.

    Returns:
        Positions, momenta, log-densities and gradients at the end.
    """
    for _ in range(num_steps):
        momentum = momentum + 0.5 * size * grad
        position = position + size * momentum
        log_p, grad = with_gradient(position)
        momentum = momentum + 0.5 * size * grad
    return position, momentum, log_p, grad
