"""Random numbers of a fit: seeded, and the global generators given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyro
import torch
from pyro.util import get_rng_state, set_rng_state

__all__ = ["preserved", "rewinder", "seeded"]


def rewinder() -> Callable[[], None]:
    """What takes torch, on all devices, NumPy and ``random`` back to their present states."""
    host = get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def rewind() -> None:
        set_rng_state(host)
        if devices:
            torch.cuda.set_rng_state_all(devices)

    return rewind


@contextmanager
def preserved() -> Iterator[Callable[[], None]]:
    """Give the random states of torch, NumPy and ``random`` back; yields what rewinds them."""
    rewind = rewinder()
    try:
        yield rewind
    finally:
        rewind()


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run under a seed and give the random states back; do nothing without one."""
    if seed is None:
        yield
        return
    with preserved():
        pyro.set_rng_seed(seed)
        yield
