"""Processes of ``torch.distributed`` that train together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

__all__ = ["agreed", "alone", "average_gradients", "broadcast", "rank_and_world"]


_alone: ContextVar[bool] = ContextVar("alone", default=False)


def rank_and_world() -> tuple[int, int]:
    """Number of this process and of all; 0 and 1 without a process group, or :func:`alone`."""
    if _alone.get():
        return 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@contextmanager
def alone() -> Iterator[None]:
    """Let a process of several work by itself."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def agreed(value: float, *, like: Tensor, op: str = "MAX") -> float:
    """The largest value (or ``"MIN"``, ``"SUM"``) of all processes."""
    if rank_and_world()[1] == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=like.device)
    torch.distributed.all_reduce(shared, getattr(torch.distributed.ReduceOp, op))
    return float(shared)


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor], loss: float) -> float:
    """Average the gradients over all processes, and the loss, which is returned.

    One message for each dtype. A parameter without a gradient here counts as zero.
    """
    _, world = rank_and_world()
    if world == 1:
        return loss
    like = parameters[0]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    kinds = {p.dtype: [q.grad for q in parameters if q.dtype == p.dtype] for p in parameters}
    for grads in kinds.values():
        flat = torch.cat([g.flatten() for g in grads if g is not None])
        torch.distributed.all_reduce(flat)
        flat /= world
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))
    return agreed(loss, like=like, op="SUM") / world


def broadcast(module: nn.Module) -> None:
    """Give all processes the state of the first."""
    if rank_and_world()[1] == 1:
        return
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    for value in state.values():
        torch.distributed.broadcast(value, 0)
    module.load_state_dict(state)
