"""How the cells of a column are held: dates, decimals, Arrow types, text, as numbers and labels.

:func:`canonical` turns a column of any type into one of few: NumPy or nullable numbers,
``datetime64``, ``timedelta64``, categories, or objects that are labels. What it returns beside
them, a :class:`Held`, turns columns of that type back into the type that came in.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pyroflows.tables.values import plain

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Held", "as_numbers", "as_times", "canonical", "dtype_named", "name_of"]

DAY = datetime.timedelta(days=1)
# Text that is a time in one way only; a column must keep to one of them in every cell.
FORMATS = (
    "%Y-%m-%d",
    "%Y/%m/%d",
    "%Y-%m",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%dT%H:%M",
    "%Y-%m-%dT%H:%M:%S",
    "%Y-%m-%dT%H:%M:%SZ",
    *(f"%Y-%m-%d{t}%H:%M:%S.{f}{z}" for t in " T" for f in ("%3f", "%f") for z in ("", "Z")),
)  # %3f: milliseconds
CLOCKS = ("%H:%M:%S", "%H:%M", "%H:%M:%S.%3f", "%H:%M:%S.%f")


@dataclasses.dataclass(frozen=True)
class Held:
    """A type of cells that pandas' own numbers and times stand in for.

    Attributes:
        kind: Which, a key of the table of writers.
        dtype: The dtype to give back.
        detail: What else a writer needs: the format of a text, the decimals of a decimal.
    """

    kind: str
    dtype: str
    detail: Any = None

    @property
    def days(self) -> bool:
        """Whether the cells are dates without a time of day."""
        return self.detail in ("date", *FORMATS[:3]) or self.kind == "arrow date"

    def write(self, cells: pd.Series) -> pd.Series:
        """Canonical cells in the type that came in."""
        return _WRITERS[self.kind](cells, self)


def name_of(dtype: Any) -> str:
    """A dtype as text that :func:`dtype_named` reads; pandas' own names are ambiguous."""
    import pandas as pd

    if isinstance(dtype, pd.ArrowDtype):
        return f"arrow:{dtype.pyarrow_dtype}"
    if isinstance(dtype, pd.StringDtype) and dtype.na_value is pd.NA:
        return f"string[{dtype.storage}]"
    return str(dtype)


def dtype_named(name: str) -> Any:
    """The dtype of that name.

    Raises:
        ValueError: If there is none.
    """
    import pandas as pd

    if name.startswith("arrow:"):
        return pd.ArrowDtype(_arrow_type(name.removeprefix("arrow:")))
    sparse = re.fullmatch(r"Sparse\[(\w+), (.*)\]", name)
    if sparse:
        fills = {"False": False, "True": True}
        fill = fills[sparse[2]] if sparse[2] in fills else np.dtype(sparse[1]).type(sparse[2])
        return pd.SparseDtype(sparse[1], fill)
    try:
        return pd.api.types.pandas_dtype(name)
    except (TypeError, ImportError) as error:
        if name == "string[pyarrow]":  # written where there was pyarrow
            return pd.StringDtype("python")
        raise ValueError(f"no dtype is called {name!r}") from error


def _arrow_type(name: str) -> Any:
    """The Arrow type whose ``str`` this is, of those that :func:`canonical` reads."""
    import pyarrow as pa

    decimals = re.fullmatch(r"decimal(128|256)\((\d+), (-?\d+)\)", name)
    stamp = re.fullmatch(r"timestamp\[(\w+)(?:, tz=(.+))?\]", name)
    parts = re.fullmatch(r"dictionary<values=(.+), indices=(\w+), ordered=(\d)>", name)
    if decimals:
        make = pa.decimal128 if decimals[1] == "128" else pa.decimal256
        return make(int(decimals[2]), int(decimals[3]))
    if stamp:
        return pa.timestamp(stamp[1], stamp[2])
    if parts:
        return pa.dictionary(_arrow_type(parts[2]), _arrow_type(parts[1]), parts[3] == "1")
    return pa.type_for_alias(name)


def canonical(series: pd.Series, *, texts: bool = True) -> tuple[pd.Series, Held | None]:
    """The cells as numbers, times or labels, and how to give them back; None if as they are.

    Args:
        series: A column.
        texts: Whether text that is a date or a time of day counts as one.

    Raises:
        ValueError: If the cells are of a type that cannot be modelled, naming column and type.
    """
    import pandas as pd

    dtype = series.dtype
    if isinstance(dtype, pd.ArrowDtype):
        return _from_arrow(series, texts)
    if isinstance(dtype, pd.SparseDtype):
        return series.sparse.to_dense(), Held("cast", str(dtype))
    if isinstance(dtype, pd.PeriodDtype):
        codes = pd.Series(series.array.asi8, series.index, name=series.name)
        whole = codes.astype("Int64").mask(series.isna())
        return (whole if series.isna().any() else codes), Held("period", str(dtype))
    if isinstance(dtype, pd.IntervalDtype):
        return series.astype("category"), Held("cast", str(dtype))
    if isinstance(dtype, pd.CategoricalDtype) or pd.api.types.is_bool_dtype(dtype):
        return series, None
    if pd.api.types.is_complex_dtype(dtype):
        raise ValueError(
            f"column {series.name!r}: complex data is not supported; split real and imaginary part"
        )
    if pd.api.types.is_datetime64_any_dtype(dtype) or pd.api.types.is_numeric_dtype(dtype):
        return series, None
    if pd.api.types.is_timedelta64_dtype(dtype):
        return series, None
    if pd.api.types.is_object_dtype(dtype):
        return _from_objects(series, texts)
    return _from_text(series, name_of(dtype)) if texts else (series, None)


# ---------------------------------------------------------------------- Python's objects


def _from_objects(series: pd.Series, texts: bool) -> tuple[pd.Series, Held | None]:
    """A column of Python objects: by the types of its cells."""
    import pandas as pd

    there = series[series.notna()]
    types = {type(v) for v in there}
    if not types:
        return pd.Series(np.nan, series.index, float, name=series.name), Held("empty", "object")
    if types <= {str, np.str_}:
        return _from_text(series, "object") if texts else (series, None)
    for kind, bases, read in _OBJECTS:
        if all(issubclass(t, bases) for t in types):
            return read(series, kind)
    try:
        for value in there:
            hash(value)
            plain(value)
    except TypeError:
        kinds = sorted({type(v).__name__ for v in there})
        raise ValueError(
            f"column {series.name!r} has cells of type {', '.join(kinds)}, e.g. "
            f"{str(there.iloc[0])[:60]!r}: a cell must be a number, a time, or a label such as "
            "text; convert them, or leave the column out: "
            f"schema={{{series.name!r}: {{'kind': 'ignore'}}}}"
        ) from None
    return series, None


def _read_booleans(series: pd.Series, kind: str) -> tuple[pd.Series, Held | None]:
    return series, None


def _read_numbers(series: pd.Series, kind: str) -> tuple[pd.Series, Held | None]:
    """Integers if all are, else float64; True counts as 1."""
    import pandas as pd

    there = series[series.notna()]
    whole = all(isinstance(v, (bool, int, np.bool_, np.integer)) for v in there)
    if whole and all(-(2**63) <= int(v) < 2**63 for v in there):
        out = pd.Series(pd.NA, series.index, dtype="Int64", name=series.name)
        out[series.notna()] = pd.array([int(v) for v in there], dtype="Int64")
        return out, Held("object", "object", "int")
    out = pd.Series(np.nan, series.index, dtype=float, name=series.name)
    out[series.notna()] = [float(v) for v in there]
    return out, Held("object", "object", "int" if whole else "float")


def _read_decimals(series: pd.Series, kind: str) -> tuple[pd.Series, Held | None]:
    import pandas as pd

    there = [v for v in series if isinstance(v, decimal.Decimal) and v.is_finite()]
    places = max((max(-int(v.as_tuple().exponent), 0) for v in there), default=0)
    out = [float(v) if v is not None and not pd.isna(v) else np.nan for v in series]
    cells = pd.Series(out, series.index, dtype=float, name=series.name)
    return cells, Held("decimal", "object", places)


def _read_stamps(series: pd.Series, kind: str) -> tuple[pd.Series, Held | None]:
    import pandas as pd

    zones = {str(v.tzinfo) for v in series[series.notna()]}
    if len(zones) > 1:
        raise ValueError(
            f"column {series.name!r} has times in several zones {sorted(zones)}; convert them to "
            "one with pd.to_datetime(..., utc=True)"
        )
    return pd.to_datetime(series), Held("object", "object", kind)


def _read_days(series: pd.Series, kind: str) -> tuple[pd.Series, Held | None]:
    there = series.notna()
    days = np.full(len(series), np.datetime64("NaT", "s"))
    days[there.to_numpy()] = np.array(list(series[there]), "datetime64[D]").astype("datetime64[s]")
    return _like(series, days), Held("object", "object", kind)


def _read_clock(series: pd.Series, kind: str) -> tuple[pd.Series, Held | None]:
    there = series.notna()
    out = np.full(len(series), np.timedelta64("NaT", "us"))
    for i in np.flatnonzero(there.to_numpy()):
        t = series.iloc[i]
        seconds = (t.hour * 60 + t.minute) * 60 + t.second
        out[i] = np.timedelta64(seconds * 1_000_000 + t.microsecond, "us")
    return _like(series, out), Held("clock", "object")


def _read_durations(series: pd.Series, kind: str) -> tuple[pd.Series, Held | None]:
    import pandas as pd

    return pd.to_timedelta(series), Held("object", "object", kind)


_OBJECTS: list[tuple[str, tuple[type, ...], Callable[..., Any]]] = [
    ("bool", (bool, np.bool_), _read_booleans),
    ("number", (bool, np.bool_, int, float, np.integer, np.floating), _read_numbers),
    ("decimal", (decimal.Decimal, int), _read_decimals),
    ("stamp", (datetime.datetime, np.datetime64), _read_stamps),
    ("date", (datetime.date,), _read_days),
    ("time", (datetime.time,), _read_clock),
    ("duration", (datetime.timedelta, np.timedelta64), _read_durations),
]


def _like(series: pd.Series, values: Any) -> pd.Series:
    import pandas as pd

    return pd.Series(values, series.index, name=series.name)


# ---------------------------------------------------------------------- text


def _from_text(series: pd.Series, dtype: str) -> tuple[pd.Series, Held | None]:
    """Dates and times of day that are written in one way throughout; else the labels they are."""
    import pandas as pd

    levels = series.dropna().unique()
    if not len(levels) or not re.fullmatch(r"\d{2,4}[-/:]\d.*", str(levels[0])):
        return series, None
    texts = pd.Series(np.asarray(levels, dtype=object))
    for form in (*FORMATS, *CLOCKS):
        try:
            times = pd.to_datetime(texts, format=form.replace("%3f", "%f"))
        except (ValueError, TypeError, OverflowError):
            continue
        if times.isna().any() or (_strings(times, form) != texts).any():
            continue
        table = dict(zip(levels, times, strict=True))
        cells = pd.to_datetime(series.astype(object).map(table))
        if form not in CLOCKS:
            unit = "us" if "f" in form else "s"
            return _unzoned(cells).astype(f"datetime64[{unit}]"), Held("text", dtype, form)
        midnight = cells.dt.normalize()
        return (cells - midnight).astype("timedelta64[us]"), Held("text clock", dtype, form)
    return series, None


def _unzoned(cells: pd.Series) -> pd.Series:
    return cells.dt.tz_localize(None) if cells.dt.tz is not None else cells


def _strings(times: pd.Series, form: str) -> pd.Series:
    out = times.dt.strftime(form.replace("%3f", "%f")).astype(object)
    if "%3f" in form:
        cut = -3 - form.endswith("Z")
        out = out.str[:cut] + ("Z" if form.endswith("Z") else "")
    return out.where(times.notna(), None)


def as_numbers(series: pd.Series) -> tuple[pd.Series, Held]:
    """Text that writes numbers, as numbers.

    Raises:
        ValueError: If some cell does not, naming column and cell.
    """
    import pandas as pd

    out = pd.to_numeric(series.astype(object), errors="coerce")
    bad = series[out.isna() & series.notna()]
    if len(bad):
        raise ValueError(
            f"column {series.name!r} was declared numeric; {len(bad)} cells are not numbers, "
            f"e.g. {bad.iloc[0]!r}"
        )
    return out.astype(float), Held("text number", name_of(series.dtype))


def as_times(series: pd.Series) -> tuple[pd.Series, Held]:
    """Text that writes times, as times.

    Raises:
        ValueError: If some cell does not, naming column and cell.
    """
    import pandas as pd

    try:
        times = pd.to_datetime(series.astype(object), format="mixed")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"column {series.name!r} was declared datetime; {error}; convert it with "
            "pd.to_datetime(..., format=...)"
        ) from error
    whole = bool((times.dropna() == times.dropna().dt.normalize()).all())
    form = "%Y-%m-%d" if whole else "%Y-%m-%dT%H:%M:%S"
    return _unzoned(times).astype("datetime64[s]"), Held("text", name_of(series.dtype), form)


# ---------------------------------------------------------------------- Arrow


def _from_arrow(series: pd.Series, texts: bool) -> tuple[pd.Series, Held | None]:
    """An Arrow column as NumPy's or the nullable kind of the same thing."""
    import pyarrow as pa

    kind, name = series.dtype.pyarrow_dtype, name_of(series.dtype)
    types = pa.types
    there = series.notna()
    if types.is_boolean(kind):
        return series.astype("boolean"), Held("arrow", name)
    if types.is_integer(kind):
        nullable = str(kind).replace("u", "U", 1).replace("int", "Int")
        return series.astype(nullable), Held("arrow", name)
    if types.is_floating(kind) or types.is_null(kind):
        values = series.to_numpy(dtype=float, na_value=np.nan)
        return _like(series, values), Held("arrow", name)
    if types.is_timestamp(kind):
        zone = f", {kind.tz}" if kind.tz else ""
        return series.astype(f"datetime64[{kind.unit}{zone}]"), Held("cast", name)
    if types.is_duration(kind):
        return series.astype(f"timedelta64[{kind.unit}]"), Held("cast", name)
    cells = series.astype(object).where(there, None)
    if types.is_decimal(kind):
        return _read_decimals(cells, "decimal")[0], Held("arrow decimal", name, kind.scale)
    if types.is_date(kind):
        return _read_days(cells, "date")[0], Held("arrow date", name)
    if types.is_time(kind):
        return _read_clock(cells, "time")[0], Held("arrow clock", name)
    if types.is_string(kind) or types.is_large_string(kind):
        cells, held = _from_text(cells, name) if texts else (cells, None)
        return cells, held or Held("cast", name)
    if types.is_dictionary(kind):
        return cells.astype("category"), Held("arrow", name)
    if types.is_binary(kind) or types.is_large_binary(kind):
        return cells, Held("cast", name)
    raise ValueError(
        f"column {series.name!r} has cells of type {kind}: a cell must be a number, a time, or a "
        "label such as text; convert them, or leave the column out: "
        f"schema={{{series.name!r}: {{'kind': 'ignore'}}}}"
    )


def _arrow(cells: pd.Series, values: list[Any], held: Held) -> pd.Series:
    import pandas as pd
    import pyarrow as pa

    dtype = dtype_named(held.dtype)
    kind = dtype.pyarrow_dtype
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    array = pa.array(values, type=inner, from_pandas=True)
    if inner is not kind:
        array = array.dictionary_encode().cast(kind)
    return pd.Series(pd.arrays.ArrowExtensionArray(array), cells.index, name=cells.name)


def _some(cells: pd.Series) -> list[Any]:
    return cells.astype(object).where(cells.notna(), None).tolist()


# ---------------------------------------------------------------------- back


def _days(cells: pd.Series) -> list[Any]:
    # floor: a day holds all of its seconds
    days = cells.to_numpy().astype("datetime64[D]")
    return [None if np.isnat(d) else d.item() for d in days]


def _clock(cells: pd.Series) -> list[Any]:
    ticks = cells.astype("timedelta64[us]").to_numpy()
    start = datetime.datetime(2000, 1, 1)
    return [
        None
        if np.isnat(t)
        else (start + datetime.timedelta(microseconds=int(t.view("i8")))).time()
        for t in np.minimum(ticks, np.timedelta64(86_400_000_000 - 1, "us"))
    ]


def _decimals(cells: pd.Series, places: int) -> list[Any]:
    return [None if np.isnan(v) else decimal.Decimal(f"{v:.{places}f}") for v in cells]


def _objects(cells: pd.Series, values: list[Any]) -> pd.Series:
    import pandas as pd

    out = np.empty(len(values), dtype=object)
    out[:] = values
    return pd.Series(out, cells.index, dtype=object, name=cells.name)


def _cast(cells: pd.Series, dtype: Any) -> pd.Series:
    """As it is where a missing cell has no place in the dtype (sparse or interval integers)."""
    inner = np.dtype(getattr(dtype, "subtype", "O"))
    return cells if inner.kind in "biu" and cells.isna().any() else cells.astype(dtype)


def _write_objects(cells: pd.Series, held: Held) -> pd.Series:
    """Integers, floats, datetimes, dates or durations of Python."""
    there = cells.notna()
    if held.detail == "date":
        return _objects(cells, _days(cells))
    make: dict[str, Callable[[Any], Any]] = {
        "int": lambda v: int(round(v)),
        "float": float,
        "stamp": lambda v: v,
        "duration": lambda v: v,
    }
    pairs = zip(cells, there, strict=True)
    return _objects(cells, [make[held.detail](v) if ok else None for v, ok in pairs])


def _write_text(cells: pd.Series, held: Held) -> pd.Series:
    return _strings(cells, held.detail).astype(dtype_named(held.dtype))


def _write_text_clock(cells: pd.Series, held: Held) -> pd.Series:
    midnight = np.datetime64("2000-01-01", "us")
    return _strings(cells.astype("timedelta64[us]") + midnight, held.detail).astype(
        dtype_named(held.dtype)
    )


def _write_text_numbers(cells: pd.Series, held: Held) -> pd.Series:
    texts = [None if np.isnan(v) else np.format_float_positional(v, trim="-") for v in cells]
    return _objects(cells, texts).astype(dtype_named(held.dtype))


def _write_periods(cells: pd.Series, held: Held) -> pd.Series:
    import pandas as pd

    dtype = dtype_named(held.dtype)
    whole = [pd.NaT if pd.isna(v) else pd.Period(ordinal=int(v), freq=dtype.freq) for v in cells]
    return pd.Series(pd.array(whole, dtype=dtype), cells.index, name=cells.name)


_WRITERS: dict[str, Callable[[Any, Held], Any]] = {
    "cast": lambda cells, held: _cast(cells, dtype_named(held.dtype)),
    "empty": lambda cells, held: _objects(cells, [None] * len(cells)),
    "object": _write_objects,
    "clock": lambda cells, held: _objects(cells, _clock(cells)),
    "decimal": lambda cells, held: _objects(cells, _decimals(cells, held.detail)),
    "text": _write_text,
    "text clock": _write_text_clock,
    "text number": _write_text_numbers,
    "period": _write_periods,
    "arrow": lambda cells, held: _arrow(cells, _some(cells), held),
    "arrow date": lambda cells, held: _arrow(cells, _days(cells), held),
    "arrow clock": lambda cells, held: _arrow(cells, _clock(cells), held),
    "arrow decimal": lambda cells, held: _arrow(cells, _decimals(cells, held.detail), held),
}
