"""How a fit by maximum likelihood trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.optim import PyroOptim

from pyroflows.training.checkpoint import described
from pyroflows.training.clipping import Clip
from pyroflows.training.history import History
from pyroflows.training.steps import Optimize

__all__ = ["Callback", "Options", "refuse_uncallable"]

Callback = Callable[[History], object]


def refuse_uncallable(
    who: str, callbacks: Sequence[Callback], optimizer: Any, scheduler: Any = None
) -> None:
    """Raise an error if something cannot be called as fits call it.

    Raises:
        TypeError: If it is no function or class; optimizers already made are none.
        ValueError: If the optimizer has a rate of its own, which that of the fit would replace.
    """
    if not all(map(callable, callbacks)):
        raise TypeError(f"{who} expects callbacks to be functions; got {callbacks!r:.80}")
    for name, value in dict(optimizer=optimizer, scheduler=scheduler).items():
        if value is not None and (not callable(value) or isinstance(value, PyroOptim)):
            raise TypeError(
                f"{who} expects {name} to be a class or function that makes one, such as "
                f"functools.partial(torch.optim.SGD, momentum=0.9); got {value!r:.80}"
            )
    if "lr" in getattr(optimizer, "keywords", {}):
        raise ValueError(f"{who}: pass lr to {who}, which gives it to the optimizer")


@dataclass(kw_only=True)
class Options:
    """How a fit trains; see :func:`pyroflows.training.fit`."""

    num_epochs: int
    batch_size: int | None
    lr: float
    weight_decay: float
    validation: Any
    patience: int
    clip_norm: float | Clip
    standardize: bool
    seed: int
    progress: bool
    callbacks: list[Callback]
    optimizer: Optimize | None
    scheduler: Callable[[torch.optim.Optimizer], Any] | None
    ema: float | None
    max_time: float | None
    checkpoint: str | os.PathLike | None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.num_epochs < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(
                f"fit expects positive num_epochs and batch_size; got {self.num_epochs} and "
                f"{self.batch_size}"
            )
        if self.max_time is not None and not self.max_time > 0:
            raise ValueError(f"fit expects a positive max_time; got {self.max_time}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"fit expects ema between 0 and 1; got {self.ema}")
        if isinstance(self.clip_norm, type):
            raise TypeError(f"fit: pass a clipper, {self.clip_norm.__name__}(), not its class")
        if not callable(self.clip_norm) and not self.clip_norm > 0:
            raise ValueError(f"fit expects a positive clip_norm; got {self.clip_norm}")
        refuse_uncallable("fit", self.callbacks, self.optimizer, self.scheduler)
        if self.optimizer is not None and self.weight_decay:
            raise ValueError("fit: give weight_decay to the optimizer that you pass")

    def settings(self) -> dict[str, str]:
        """What makes a fit the same; of functions the name."""
        apart = {"validation", "progress", "callbacks", "checkpoint"}
        return {k: described(v) for k, v in vars(self).items() if k not in apart}
