"""Plates of the sizes that a model has at given arguments, seen in a run of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyroflows.guides.substitute import outside_of_plates
from pyroflows.training.seeds import preserved

__all__ = ["PlateSize", "PlateSizes"]


class PlateSize:
    """Size of a plate, of its subsample, and the subsample where the model gave it."""

    def __init__(self, size: int, subsample_size: int | None, subsample: Any = None) -> None:
        self.size, self.subsample_size, self.subsample = size, subsample_size, subsample

    @property
    def rows(self) -> int:
        """Rows that the model takes."""
        if self.subsample is not None:
            return len(self.subsample)
        return self.size if self.subsample_size is None else self.subsample_size

    def made(self, name: str, dim: int) -> pyro.plate:
        """A plate of this size."""
        if self.subsample is not None:
            return pyro.plate(name, self.size, dim=dim, subsample=self.subsample)
        return pyro.plate(name, self.size, dim=dim, subsample_size=self.subsample_size)


class PlateSizes:
    """Sizes of plates by the shapes of a model's arguments; each new shape costs a run of it."""

    def __init__(self) -> None:
        self._known: dict[Any, dict[str, PlateSize]] = {}

    def known(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, PlateSize] | None:
        """The sizes at arguments of such shapes, if they were seen."""
        return self._known.get(_shapes((args, kwargs)))

    def see(
        self, model: Callable, names: Iterable[str], args: tuple, kwargs: dict[str, Any]
    ) -> dict[str, PlateSize]:
        """The sizes of the plates of these names, by a run of the model."""
        seen = _SeePlates(names)
        with outside_of_plates(), torch.no_grad(), preserved(), poutine.block(), seen:
            model(*args, **kwargs)
        if len(self._known) >= 64:
            self._known.clear()
        self._known[_shapes((args, kwargs))] = seen.found
        return seen.found

    def forget(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forget what was seen at arguments of such shapes."""
        self._known.pop(_shapes((args, kwargs)), None)


class _SeePlates(poutine.messenger.Messenger):
    """Remember the plates of these names while the model runs."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names, self.found = set(names), dict[str, PlateSize]()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.names and poutine.util.site_is_subsample(msg):
            fn = msg["fn"]
            size = fn.subsample_size if msg["value"] is None else None
            self.found[msg["name"]] = PlateSize(fn.size, size, msg["value"])


def _shapes(thing: Any) -> Any:
    """What sizes of plates may depend on: shapes of tensors, whole numbers, lengths; hashable."""
    if isinstance(thing, Tensor):
        return tuple(thing.shape)
    if isinstance(thing, Mapping):
        return tuple((k, _shapes(v)) for k, v in thing.items())
    if isinstance(thing, list | tuple):
        return len(thing), tuple(_shapes(v) for v in thing[:100])
    if hasattr(thing, "shape"):
        return tuple(thing.shape)
    return thing if isinstance(thing, int | str | bool | None) else type(thing)
