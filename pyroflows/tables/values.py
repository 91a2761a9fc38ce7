"""Names and labels of any type as JSON, and back; nothing that is read is ever executed."""

from __future__ import annotations

import base64
import datetime
import decimal
import math
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["from_json", "plain", "to_json"]


def plain(value: Any) -> Any:
    """A label as a Python object that :func:`to_json` knows.

    Raises:
        TypeError: If it is of a type that cannot be a label.
    """
    import pandas as pd

    if isinstance(value, np.datetime64):
        return pd.Timestamp(value)
    if isinstance(value, np.timedelta64):
        return pd.Timedelta(value)
    if isinstance(value, np.generic):
        value = value.item()
    to_json(value)
    return value


def to_json(value: Any) -> Any:
    """Lists, strings, numbers, and ``{"$type": ...}`` for what JSON has no word for.

    Raises:
        TypeError: If a part is of a type that is not known.
    """
    import pandas as pd

    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return to_json(value.item())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list):
        return [to_json(v) for v in value]
    if isinstance(value, Mapping):
        return {"$dict": [[to_json(k), to_json(v)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"$tuple": [to_json(v) for v in value]}
    if isinstance(value, pd.Timestamp):
        zone = {} if value.tz is None else {"tz": str(value.tz)}
        return {"$timestamp": {"at": int(value.asm8.view("i8")), "unit": value.unit, **zone}}
    if isinstance(value, pd.Timedelta):
        return {"$timedelta": {"of": int(value.asm8.view("i8")), "unit": value.unit}}
    if isinstance(value, pd.Interval):
        return {"$interval": [to_json(value.left), to_json(value.right), value.closed]}
    if isinstance(value, pd.Period):
        return {"$period": [str(value), value.freqstr]}
    for name, (kind, write, _) in _TEXTS.items():
        if isinstance(value, kind):
            return {f"${name}": write(value)}
    raise TypeError(f"values of type {type(value).__name__} cannot be stored")


def from_json(data: Any) -> Any:
    """Inverse of :func:`to_json`.

    Raises:
        ValueError: If it is not of that form.
    """
    if isinstance(data, list):
        return [from_json(v) for v in data]
    if not isinstance(data, dict):
        return data
    tag = next(iter(data)) if len(data) == 1 else ""
    try:
        if tag in _PARTS:
            return _PARTS[tag](data[tag])
        if tag.startswith("$") and tag[1:] in _TEXTS:
            return _TEXTS[tag[1:]][2](data[tag])
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise ValueError(f"{data!r} is not a stored value: {error}") from error
    return {k: from_json(v) for k, v in data.items()}


_TEXTS: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "datetime": (datetime.datetime, lambda v: v.isoformat(), datetime.datetime.fromisoformat),
    "date": (datetime.date, lambda v: v.isoformat(), datetime.date.fromisoformat),
    "time": (datetime.time, lambda v: v.isoformat(), datetime.time.fromisoformat),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
    "uuid": (uuid.UUID, str, uuid.UUID),
    "bytes": (bytes, lambda v: base64.b64encode(v).decode(), base64.b64decode),
}


def _timestamp(body: Any) -> Any:
    import pandas as pd

    out = pd.Timestamp(np.datetime64(int(body["at"]), body["unit"]))
    return out.tz_localize("UTC").tz_convert(body["tz"]) if "tz" in body else out


def _timedelta(body: Any) -> Any:
    import pandas as pd

    return pd.Timedelta(np.timedelta64(int(body["of"]), body["unit"]))


def _interval(body: Any) -> Any:
    import pandas as pd

    left, right, closed = body
    return pd.Interval(from_json(left), from_json(right), closed=closed)


def _period(body: Any) -> Any:
    import pandas as pd

    return pd.Period(body[0], freq=body[1])


_PARTS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$tuple": lambda body: tuple(from_json(v) for v in body),
    "$dict": lambda body: {from_json(k): from_json(v) for k, v in body},
    "$timestamp": _timestamp,
    "$timedelta": _timedelta,
    "$interval": _interval,
    "$period": _period,
}
