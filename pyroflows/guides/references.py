"""What a file of a guide holds in the place of functions."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["Lost", "Reference"]


class Reference:
    """A function by its name, so that a file holds no code and no data of it."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    @classmethod
    def of(cls, function: Any) -> Reference | None:
        """Reference of a function that another process can import, else None."""
        module, name = (getattr(function, k, None) for k in ("__module__", "__qualname__"))
        if not inspect.isfunction(function) or module in (None, "__main__", "__mp_main__"):
            return None
        module, name = str(module), str(name)
        found = cls(module, name)
        return found if found.find() is function else None

    def find(self) -> Callable | None:
        """The function, or None where it cannot be imported."""
        try:
            return getattr(importlib.import_module(self.module), self.name, None)
        except ImportError:
            return None


class Lost:
    """Stands where a function could not be saved; an error when it is called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"this guide was loaded from a file, and its {self.name.strip('_')} could not be "
            f"saved: set it again, guide.{self.name} = ..."
        )
