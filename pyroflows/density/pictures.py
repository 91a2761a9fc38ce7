"""Pictures of results: those of :mod:`pyroflows.plots`, a floor above, loaded when wanted."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["picture"]


def picture(name: str, *args: Any, **options: Any) -> Any:
    """Call a function of :mod:`pyroflows.plots`, loaded when a picture is wanted."""
    return getattr(importlib.import_module("pyroflows.plots"), name)(*args, **options)
