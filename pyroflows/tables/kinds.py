"""Kinds of columns: labels, few numbers, numbers, times, keys.

A :class:`~pyroflows.tables.Column` holds what a column is; its kind, one of :data:`KINDS`, what to
do with that: turn cells into float64 and back, read text, say what it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyroflows.tables.storage import Held, as_numbers, as_times, canonical, dtype_named
from pyroflows.tables.ticks import unit_named
from pyroflows.tables.values import plain

if TYPE_CHECKING:
    import pandas as pd

    from pyroflows.tables.columns import Column

__all__ = ["KINDS", "Kind", "canonical_as", "holds_labels"]


class Kind:
    """What to do with the cells of a column.

    Attributes:
        is_label: Whether they are codes of levels rather than numbers.
        has_numbers: Whether they stand for numbers, be it few.
    """

    is_label = True
    has_numbers = True

    def like_fit(self, column: Column, series: pd.Series) -> pd.Series:
        """Canonical cells of the type that fitting saw."""
        if column.held and column.held.kind == "text number":
            return as_numbers(series)[0]
        cells, _ = canonical(series)
        return _as_times(column, series, cells) if unit_named(column.dtype) else cells

    def encode(self, column: Column, series: pd.Series) -> np.ndarray:
        """Cells to float64, NaN where missing."""
        return self.code(column, column.raw(series))

    def decode(self, column: Column, values: np.ndarray) -> pd.Series:
        """The inverse of :meth:`encode`."""
        return column.cells(self.value(column, values))

    def restored(self, column: Column, numbers: np.ndarray) -> pd.Series:
        """Cells from numbers that are no codes yet."""
        return column.cells(numbers)

    def code(self, column: Column, x: np.ndarray) -> np.ndarray:
        """Numbers to what is modelled."""
        return x

    def value(self, column: Column, codes: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`code`."""
        return codes

    def parse(self, column: Column, text: str) -> Any:
        """A cell written as text."""
        import pandas as pd

        if unit_named(column.dtype):
            cells = pd.Series([text], name=column.name, dtype=object)
            return self.like_fit(column, cells).iloc[0]
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"column {column.name!r} holds numbers; got {text!r}") from None

    def shown(self, column: Column, level: Any) -> str:
        """A level as it is written."""
        return column.shown(level)

    def described(self, column: Column) -> str:
        """The levels in few words."""
        if len(column.levels) == 1:
            return f"constant {self.shown(column, column.levels[0])}"
        return f"{len(column.levels)} {self.word(column)}" if column.levels else "empty"

    def word(self, column: Column) -> str:
        """What its levels are."""
        return "numbers as labels"


class Numeric(Kind):
    """Numbers, on a lattice or not."""

    is_label = False


class Datetime(Numeric):
    """Seconds since the column's origin."""


class Discrete(Kind):
    """Few numbers, treated as labels; levels increase."""

    def code(self, column: Column, x: np.ndarray) -> np.ndarray:
        level = np.array(column.levels, float)
        if not len(level):
            return np.where(np.isnan(x), np.nan, 0.0)
        code = np.searchsorted(level, x).clip(0, len(level) - 1)
        known = np.where(level[code] == x, code, len(level)).astype(float)
        return np.where(np.isnan(x), np.nan, known)

    def value(self, column: Column, codes: np.ndarray) -> np.ndarray:
        index = np.where(np.isnan(codes), -1, np.nan_to_num(codes)).astype(int)
        return np.array([*column.levels, np.nan], float)[index]


class Categorical(Kind):
    """Labels of any type, booleans, categories."""

    has_numbers = False

    def like_fit(self, column: Column, series: pd.Series) -> pd.Series:
        text = column.held is not None and column.held.kind.startswith("text")
        return canonical_as(series, None if text else "categorical")[0]

    def encode(self, column: Column, series: pd.Series) -> np.ndarray:
        """Codes of labels, ``len(levels)`` for an unknown one."""
        import pandas as pd

        cells = self.like_fit(column, series)
        index = {v: i for i, v in enumerate(column.levels)}

        def code(v: Any) -> int:
            return index.get(plain(v), len(index))

        if isinstance(cells.dtype, pd.CategoricalDtype):
            table = np.array([*map(code, cells.cat.categories), np.nan], float)
            return table[cells.cat.codes.to_numpy()]
        codes, uniques = pd.factorize(cells)
        return np.array([*map(code, uniques), np.nan], float)[codes]

    def decode(self, column: Column, values: np.ndarray) -> pd.Series:
        return column.written(self._labels(column, values))

    def restored(self, column: Column, numbers: np.ndarray) -> pd.Series:
        return self.decode(column, numbers)

    def _labels(self, column: Column, values: np.ndarray) -> pd.Series:
        import pandas as pd

        gone = np.isnan(values)
        code = np.where(gone, -1, np.nan_to_num(values)).astype(int)
        if column.dtype.startswith("category:"):
            inner = dtype_named(column.dtype.removeprefix("category:"))
            levels = pd.Index(column.levels, dtype=inner)
            cells = pd.Categorical.from_codes(code, levels, ordered=column.ordered)
            return pd.Series(cells, name=column.name)
        labels = np.empty(len(column.levels) + 1, dtype=object)
        labels[:-1] = column.levels
        series = pd.Series(labels[code], name=column.name, dtype=object)
        dtype = dtype_named(column.dtype)
        if gone.any() and isinstance(dtype, np.dtype) and dtype.kind in "biu":
            return series if dtype.kind == "b" else series.astype(float)
        return series.astype(dtype)

    def parse(self, column: Column, text: str) -> Any:
        for level in column.levels:
            if str(level) == text:
                return level
        raise ValueError(f"column {column.name!r} has no label {text!r}; it has {column.few()}")

    def shown(self, column: Column, level: Any) -> str:
        return repr(level)

    def word(self, column: Column) -> str:
        return "ordered labels" if column.ordered else "labels"


class Key(Kind):
    """What tells rows apart and nothing else."""

    has_numbers = False

    def encode(self, column: Column, series: pd.Series) -> np.ndarray:
        return np.where(series.isna(), np.nan, 0.0)

    def decode(self, column: Column, values: np.ndarray) -> pd.Series:
        return column.keyed(values, values)

    def shown(self, column: Column, level: Any) -> str:
        return repr(level)

    def described(self, column: Column) -> str:
        return f"key, not modelled; fresh ones {column.keys}"


KINDS: dict[str, Kind] = {
    "categorical": Categorical(),
    "discrete": Discrete(),
    "numeric": Numeric(),
    "datetime": Datetime(),
    "key": Key(),
}


# ---------------------------------------------------------------------- canonical cells


def _as_times(column: Column, series: pd.Series, cells: pd.Series) -> pd.Series:
    """Canonical cells as times of the column's dtype."""
    import pandas as pd

    if cells.isna().all():
        return pd.Series(pd.NaT, series.index, dtype=column.dtype, name=series.name)
    try:
        if holds_labels(cells.dtype) and not pd.api.types.is_bool_dtype(cells.dtype):
            read = pd.to_timedelta if column.dtype.startswith("time") else pd.to_datetime
            cells = read(cells.astype(object))
        zoned = getattr(cells.dtype, "tz", None) is not None
        if zoned and "," not in column.dtype:
            raise TypeError("time zones differ")
        return cells.astype(column.dtype) if str(cells.dtype) != column.dtype else cells
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"column {column.name!r} was {column.shown_type} in fitting; got {series.dtype}, "
            f"e.g. {series.dropna().iloc[:1].tolist()}"
        ) from error


def canonical_as(series: pd.Series, kind: str | None) -> tuple[pd.Series, Held | None]:
    """Canonical cells; those of labels keep their own values."""
    import pandas as pd

    if kind in ("categorical", "key"):
        if isinstance(series.dtype, (pd.ArrowDtype, pd.SparseDtype, pd.PeriodDtype)):
            return canonical(series, texts=False)
        if series.dtype == object:
            cells, held = canonical(series, texts=False)
            return (series, None) if held and held.kind != "empty" else (cells, held)
        return canonical(series, texts=False)
    if kind in ("numeric", "discrete", "datetime"):
        cells, held = canonical(series, texts=kind == "datetime")
        if holds_labels(cells.dtype) and not pd.api.types.is_bool_dtype(cells.dtype):
            if isinstance(cells.dtype, pd.CategoricalDtype):
                raise ValueError(
                    f"column {series.name!r} was declared {kind}, but holds categories; convert "
                    "it with .astype first"
                )
            return as_times(series) if kind == "datetime" else as_numbers(series)
        return cells, held
    return canonical(series)


def holds_labels(dtype: Any) -> bool:
    """Whether canonical cells of this dtype are labels."""
    import pandas as pd

    if isinstance(dtype, pd.CategoricalDtype) or pd.api.types.is_bool_dtype(dtype):
        return True
    return not (pd.api.types.is_numeric_dtype(dtype) or unit_named(dtype))
