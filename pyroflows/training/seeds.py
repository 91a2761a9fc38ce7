"""Random numbers of a fit: seeded, and the global generators given back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pyro.util import get_rng_state, set_rng_state

__all__ = ["preserved", "random_state", "rewinder", "seeded", "set_random_state"]


def random_state() -> dict[str, Any]:
    """The global generators, in what ``torch.load(weights_only=True)`` reads."""
    state = get_rng_state()
    name, keys, *rest = state["numpy"]
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy = [name, torch.from_numpy(keys.astype(np.int64)), *rest]
    return dict(torch=state["torch"], random=state["random"], numpy=numpy, cuda=devices)


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to what :func:`random_state` gave."""
    name, keys, *rest = state["numpy"]
    numpy = (name, keys.numpy().astype(np.uint32), *rest)
    set_rng_state({"torch": state["torch"], "random": state["random"], "numpy": numpy})
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


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
def seeded(seed: int | None, device: torch.device | None = None) -> Iterator[None]:
    """Run under a seed and give the random states back; do nothing without one.

    Args:
        seed: For torch, on all devices, NumPy and ``random``.
        device: One that will be used inside, so that its state can be given back.
    """
    if seed is None:
        yield
        return
    if device is not None and device.type == "cuda":
        torch.cuda.init()
    with preserved():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # which takes no more
        yield
