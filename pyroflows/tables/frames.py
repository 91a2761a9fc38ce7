"""Tables of polars, Arrow and whatever else speaks Arrow's C interface, as pandas' and back.

What comes in is read through Arrow without a copy where that can be, into columns of Arrow types,
and goes back in the types that it had: dates, times with zones, decimals, unsigned and nullable
integers, Enum and Categorical.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Container", "container_named", "read_table", "takes_tables"]


@dataclasses.dataclass(frozen=True)
class Container:
    """What tables are given back in.

    Attributes:
        library: ``"pandas"``, ``"polars"`` or ``"arrow"``.
        types: Types of label columns to restore, by name: those that pandas has no word for.
    """

    library: str = "pandas"
    types: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def hold(self, frame: pd.DataFrame) -> Any:
        """A DataFrame as a table of this kind; its index is left out, joined names get a "_"."""
        if self.library == "pandas":
            return frame
        pa = _pyarrow()
        import pandas as pd

        if isinstance(frame.columns, pd.MultiIndex):
            frame = frame.set_axis(["_".join(map(str, c)) for c in frame.columns], axis=1)
        frame = frame.set_axis([str(c) for c in frame.columns], axis=1)
        table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
        if self.library == "arrow":
            return table.cast(pa.schema([self._field(f) for f in table.schema]))
        import polars as pl

        out: Any = pl.from_arrow(table)
        texts: Any = pl.String, pl.Categorical
        labels = [name for name, kind in out.schema.items() if kind in texts]
        return out.with_columns(pl.col(n).cast(self.types[n]) for n in labels if n in self.types)

    def _field(self, field: Any) -> Any:
        labels = _pyarrow().types.is_dictionary(field.type)
        return field.with_type(self.types.get(field.name, field.type)) if labels else field


def container_named(name: str) -> Container:
    """The kind of table that ``set_output`` calls so."""
    return Container("arrow" if name == "pyarrow" else name)


def _library(x: Any) -> str:
    return type(x).__module__.split(".")[0]


def _container_of(x: Any) -> Container | None:
    """The kind of a table; None if it is no table of a library."""
    root = _library(x)
    if root == "pandas":
        return Container() if hasattr(x, "columns") else None
    if root == "polars" and hasattr(type(x), "columns"):
        schema = x.collect_schema() if hasattr(x, "collect_schema") else x.schema
        labels = ("Enum", "Categorical")
        return Container("polars", {n: t for n, t in schema.items() if type(t).__name__ in labels})
    if not _speaks_arrow(x):
        return None
    schema = getattr(x, "schema", None)
    is_dictionary = _pyarrow().types.is_dictionary
    fields = schema if root == "pyarrow" and schema is not None else ()
    return Container("arrow", {f.name: f.type for f in fields if is_dictionary(f.type)})


def _speaks_arrow(x: Any) -> bool:
    """Whether it is a table that Arrow's C interface or the interchange protocol hands over."""
    if isinstance(x, (Mapping, type)):
        return False
    columns = hasattr(type(x), "columns") or hasattr(x, "columns") or hasattr(x, "column_names")
    stream = hasattr(x, "__arrow_c_stream__") or hasattr(x, "__arrow_c_array__")
    return columns and (stream or hasattr(x, "__dataframe__"))


def read_table(x: Any) -> Any:
    """A table of another library as a DataFrame; anything else as it is.

    A lazy table of polars is collected. A Series of polars becomes an array.

    Raises:
        ImportError: If pyarrow is not installed, saying what to do.
    """
    root = _library(x)
    if root == "polars" and not hasattr(type(x), "columns") and hasattr(x, "to_numpy"):
        return x.to_numpy()
    if isinstance(x, Mapping):
        theirs = any(_library(value) == "polars" for value in x.values())
        return {name: read_table(value) for name, value in x.items()} if theirs else x
    if root == "polars" and hasattr(x, "collect"):
        x = x.collect()
    if root == "pandas" or not _speaks_arrow(x):
        return x
    pa = _pyarrow()
    if hasattr(x, "__arrow_c_array__") and not hasattr(x, "__arrow_c_stream__"):
        table = pa.Table.from_batches([pa.record_batch(x)])
    elif hasattr(x, "__arrow_c_stream__"):
        table = pa.table(x)
    else:
        from pyarrow.interchange import from_dataframe

        table = from_dataframe(x)
    return _to_pandas(table)


def _to_pandas(table: Any) -> pd.DataFrame:
    """Columns of Arrow types; dictionaries as categories, in their order."""
    pa = _pyarrow()
    import pandas as pd

    parts = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type
        if pa.types.is_dictionary(kind):
            parts[name] = column.to_pandas()
            continue
        plain = {"string_view": pa.large_string(), "binary_view": pa.large_binary()}
        wide = plain.get(str(kind), kind)
        column = column.cast(wide) if wide is not kind else column
        parts[name] = column.to_pandas(types_mapper=pd.ArrowDtype)
    twice = {n for n in table.column_names if table.column_names.count(n) > 1}
    if twice:
        raise ValueError(f"column names must be unique; repeated: {sorted(twice)}")
    return pd.DataFrame(parts, index=pd.RangeIndex(table.num_rows))


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(
            "tables of polars and Arrow are read through pyarrow: pip install 'pyroflows[polars]'"
        ) from error
    return pyarrow


def takes_tables(*names: str) -> Callable[[type], type]:
    """Let methods with parameters of these names take any table and return the same kind.

    Of a class decorated so, such a method sees DataFrames only. A DataFrame that it returns
    becomes a table of the kind that came; where none came, of the kind that ``fit`` saw. What
    ``set_output`` asks for goes before both.
    """

    def decorate(kind: type) -> type:
        for name, entry in list(vars(kind).items()):
            method = getattr(entry, "method", entry)  # of a method that is there on a condition
            if name.startswith("_") or not inspect.isfunction(method):
                continue
            if set(names) & set(inspect.signature(method).parameters):
                if method is entry:
                    setattr(kind, name, _in_kind(method))
                else:
                    entry.method = _in_kind(method)
        return kind

    return decorate


def _in_kind(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that reads tables of every kind, and holds the one that it returns in the same."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "_reading", False):  # one method within another
            return method(self, *args, **kwargs)
        came = next(filter(None, map(_container_of, (*args, *kwargs.values()))), None)
        args = tuple(map(read_table, args))
        kwargs = {name: read_table(value) for name, value in kwargs.items()}
        self._reading = True
        try:
            out = method(self, *args, **kwargs)
        finally:
            del self._reading
        if out is self:
            self._container = came or Container()
            return out
        asked = getattr(self, "_output", None)
        known: Container = came or getattr(self, "_container", None) or Container()
        if asked in ("polars", "pyarrow") and known.library != container_named(asked).library:
            known = container_named(asked)
        elif asked == "pandas":
            known = Container()
        return _held(out, known)

    return call


def _held(out: Any, container: Container) -> Any:
    """Tables among results in their container."""
    if isinstance(out, list):
        return [_held(part, container) for part in out]
    is_frame = type(out).__module__.startswith("pandas") and hasattr(out, "columns")
    return container.hold(out) if is_frame else out
