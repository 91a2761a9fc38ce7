"""Times as integers of a unit since an origin, exact, and as float64 seconds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PER_SECOND", "less", "plus", "seconds", "ticks_of", "unit_named"]

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def unit_named(dtype: Any) -> str:
    """The unit of a datetime or timedelta dtype, else nothing."""
    found = re.match(r"(?:datetime64|timedelta64)\[(\w+)", str(dtype))
    return found[1] if found else ""


def ticks_of(cells: pd.Series) -> np.ndarray:
    """Integers of a column without missing cells, exact."""
    if unit_named(cells.dtype):
        return cells.astype("int64").to_numpy()
    unsigned = str(cells.dtype).lower().startswith("uint")
    return cells.to_numpy(dtype="uint64" if unsigned else "int64")


def less(ticks: np.ndarray, origin: int) -> np.ndarray:
    """Ticks - origin as float64, exact up to 2^53 whatever their size."""
    if not origin:
        return ticks.astype(float)
    raw, zero = ticks.astype("uint64"), np.uint64(origin % 2**64)
    below = ticks < origin
    return np.where(below, -(zero - raw).astype(float), (raw - zero).astype(float))


def plus(values: np.ndarray, origin: int, per_unit: int, wide: str) -> np.ndarray:
    """Integers values * per_unit + origin, the inverse of :func:`less`."""
    unit = np.floor(values)
    part = np.round((values - unit) * per_unit).astype("int64")
    if wide == "uint64":
        start = origin + np.array([int(u) for u in unit], dtype=object) + part
        return np.array([min(max(int(v), 0), 2**64 - 1) for v in start], dtype="uint64")
    top = float(2**63 - 2**10) / per_unit - abs(origin) / per_unit
    return unit.clip(-top, top).astype("int64") * per_unit + part + origin


def seconds(value: Any) -> float:
    """A step of times: a number of seconds, or what pandas takes for a duration."""
    import pandas as pd

    return float(value) if isinstance(value, (int, float)) else pd.Timedelta(value).total_seconds()
