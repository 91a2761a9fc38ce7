"""A fit on disk, from which it goes on to the same numbers."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Checkpoint", "described"]

_FORMAT = 1


def described(thing: object) -> str:
    """Text that is the same in every process: a name, or how it prints, without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", getattr(thing, "__qualname__", None) or repr(thing))


class Checkpoint:
    """The state of a fit in one file, written whole or not at all.

    Args:
        path: Where; what lies there must be of the same fit.
        flow: Whose shapes and layers are part of what "the same" means.
        settings: What else is: arguments of the fit, and what its rows are known by.
    """

    def __init__(self, path: str | os.PathLike, flow: nn.Module, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        shapes = [(k, tuple(v.shape), str(v.dtype)) for k, v in flow.state_dict().items()]
        layers = re.sub(r" at 0x[0-9a-f]+|, unset", "", repr(flow))  # units are set by the fit
        flow_is = hashlib.sha256(f"{layers} {shapes}".encode()).hexdigest()[:16]
        self.settings = {"format": _FORMAT, "flow": flow_is, **settings}

    def load(self) -> dict[str, Any] | None:
        """The state; None if there is no file.

        Raises:
            ValueError: If the file is of another fit, or is none.
        """
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return None
        if self.path.is_dir():
            raise ValueError(f"fit: {self.path} is a folder; give the checkpoint a file")
        try:
            state = torch.load(self.path, weights_only=True, map_location="cpu")
            there = state["settings"]
        except Exception as error:
            raise ValueError(
                f"fit: {self.path} is no checkpoint of a fit ({type(error).__name__}: "
                f"{str(error)[:200]})"
            ) from error
        other = [
            f"{name} was {there.get(name)!r} and is {self.settings.get(name)!r}"
            for name in {**there, **self.settings}
            if there.get(name) != self.settings.get(name)
        ]
        if other:
            raise ValueError(
                f"fit: the checkpoint {self.path} is of another fit: {'; '.join(other)}. Call as "
                "before to go on with it, or pass another path"
            )
        return state

    def save(self, **state: Any) -> None:
        """Write the state in place of the last one."""
        part = self.path.with_name(self.path.name + ".part")
        torch.save({"settings": self.settings, **state}, part)
        os.replace(part, self.path)
