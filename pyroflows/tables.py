"""Columns to numbers and back: the schema of a table.

:class:`Schema` reads a DataFrame once, decides what each column is, and from then on turns tables
into float64 arrays (missing cells are NaN) and arrays into tables of the original dtypes. What it
decided can be read (:meth:`Schema.summary`), changed (``schema["price"].step = None``) and stored
as JSON.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Column", "Schema", "as_frame", "find_step"]

KINDS = ("categorical", "discrete", "numeric", "datetime")


def find_step(values: np.ndarray) -> tuple[float | None, np.ndarray]:
    """The recording step, or None, and the few values that do not keep to it (caps).

    A lattice must carry 99 % of the rows, and its values must repeat: a step so fine that nearly
    every value is different says nothing more than a density does.

    Args:
        values: Finite values, shape (n,).
    """
    level, count = np.unique(values, return_counts=True)
    none = None, np.empty(0)
    if len(level) < 3:
        return none
    span = level[-1] - level[0]
    repeated = 1 - (count == 1).sum() / len(values)
    whole = bool(np.all(level == np.round(level))) and abs(level[[0, -1]]).max() < 2**53
    if not whole and repeated < 0.05:
        return none
    gap = np.diff(level)
    power = math.floor(math.log10(span))
    steps = [m * 10.0**k for k in range(power, power - 8, -1) for m in (5.0, 2.5, 2.0, 1.0)]
    steps = [s if s >= 1 else 1 / round(1 / s, 6) for s in steps]
    for step in sorted({*steps, float(gap.min()), *([1.0] if whole else [])}, reverse=True):
        if step <= 0 or span / step > 2**40:
            continue
        tolerance = 1e-4 + 4 * np.finfo(float).eps * np.abs(level).max() / step
        if tolerance > 0.1:
            continue
        # A cap may be the most frequent value: try a few as the anchor.
        anchors = level[[int(np.argmax(count)), 0, len(level) // 3, len(level) // 2]]
        places = (level - anchors[:, None]) / step
        miss = np.abs(places - np.round(places)) > tolerance
        off = miss[int(np.argmin((miss * count).sum(1)))]
        if off.sum() <= min(8, 0.02 * len(level)) and count[off].sum() <= 0.06 * len(values):
            good = off.sum() <= 3 or count[off].min() >= 5
            levels = len(level) - off.sum()
            if good and levels >= 3:
                return float(step), level[off]
    return none


@dataclasses.dataclass
class Column:
    """What one column is.

    Attributes:
        name: Its label.
        kind: ``"categorical"`` (labels, booleans), ``"discrete"`` (few numbers, treated as
            labels), ``"numeric"`` or ``"datetime"`` (numeric, in seconds since ``origin``).
        dtype: The pandas dtype to give back.
        levels: Labels in code order (categorical, discrete).
        ordered: Whether the labels are ordered.
        step: Recording step of a lattice-valued column; its log-density is log(P(cell) / step).
            None for a continuous one.
        anchor: Some value on the lattice.
        lower: No value lies below.
        upper: No value lies above.
        atoms: Values of their own probability (caps, zeros) in a column that is otherwise
            continuous.
        missing: Share of missing cells.
        origin: Integer that stands for zero (datetimes).
        per_second: Integers per second (datetimes).
    """

    name: Any
    kind: str
    dtype: str
    levels: list[Any] = dataclasses.field(default_factory=list)
    ordered: bool = False
    step: float | None = None
    anchor: float = 0.0
    lower: float | None = None
    upper: float | None = None
    atoms: list[float] = dataclasses.field(default_factory=list)
    missing: float = 0.0
    origin: int = 0
    per_second: int = 1

    @property
    def is_label(self) -> bool:
        """Whether cells are codes of levels rather than numbers."""
        return self.kind in ("categorical", "discrete")

    @classmethod
    def from_series(cls, series: pd.Series) -> Column:
        """Decide what a column is."""
        import pandas as pd

        dtype, name = series.dtype, series.name
        missing = float(series.isna().mean()) if len(series) else 0.0
        base = dict(name=name, dtype=str(dtype), missing=missing)
        if isinstance(dtype, pd.CategoricalDtype):
            return cls(
                kind="categorical",
                levels=[_plain(v) for v in dtype.categories],
                ordered=bool(dtype.ordered),
                **{**base, "dtype": f"category:{dtype.categories.dtype}"},
            )
        if pd.api.types.is_complex_dtype(dtype):
            raise ValueError(
                f"column {name!r}: complex data is not supported; split real and imaginary part"
            )
        stamps = pd.api.types.is_datetime64_any_dtype(dtype) or pd.api.types.is_timedelta64_dtype(
            dtype
        )
        if not stamps and (
            pd.api.types.is_bool_dtype(dtype) or not pd.api.types.is_numeric_dtype(dtype)
        ):
            values = series.dropna()
            levels = sorted({_plain(v) for v in values}, key=lambda v: (str(type(v)), v))
            return cls(kind="categorical", levels=levels, **base)
        origin, per_second = 0, 1
        if stamps:
            whole = series.dropna().astype("int64")
            origin = int(whole.min()) if len(whole) else 0
            per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[_unit(dtype)]
        out = cls(
            kind="datetime" if stamps else "numeric", origin=origin, per_second=per_second, **base
        )
        values = out.encode(series)
        values = values[~np.isnan(values)]
        if np.isinf(values).any():
            raise ValueError(
                f"column {name!r} contains infinity; replace it by a missing value or a finite cap"
            )
        level, count = np.unique(values, return_counts=True)
        n = len(values)
        if len(level) <= 2 or (
            len(level) <= 4 and n >= 20 * len(level) and bool((level == np.round(level)).all())
        ):
            out.kind = "discrete" if not stamps else "datetime"
            if out.kind == "discrete":
                out.levels = [float(v) for v in level]
                return out
        if len(level) > 2:
            out.step, atoms = find_step(values)
            out.atoms = [float(v) for v in atoms]
        if out.step:
            regular = level[~np.isin(level, out.atoms)]
            out.anchor = float(regular[0])
        else:
            # A value that a continuous column repeats far more often than chance is a value of its
            # own.
            often = count >= max(5, 0.005 * n) if len(level) > 20 else count > n
            if often.sum() <= 16:
                out.atoms = [float(v) for v in level[often]]
        if not stamps and len(level):
            low, high, middle = level[0], level[-1], abs(float(np.median(values)))
            near = max(out.step or 0.0, 0.01 * middle)
            if 0 <= low <= near:
                out.lower = 0.0
            if 0 <= -high <= near:
                out.upper = 0.0
        return out

    def encode(self, series: pd.Series) -> np.ndarray:
        """Cells to float64.

        Values, codes of levels (``len(levels)`` for an unknown one), NaN where missing.
        """
        import pandas as pd

        if self.is_label and self.kind == "categorical":
            index = {v: i for i, v in enumerate(self.levels)}
            if isinstance(series.dtype, pd.CategoricalDtype):
                table = np.array(
                    [index.get(_plain(v), len(index)) for v in series.cat.categories] + [np.nan],
                    float,
                )
                return table[series.cat.codes.to_numpy()]
            codes, uniques = pd.factorize(series)
            table = np.array([index.get(_plain(v), len(index)) for v in uniques] + [np.nan], float)
            return table[codes]
        if self.kind == "datetime":
            try:
                whole = series.astype(self.dtype) if str(series.dtype) != self.dtype else series
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"column {self.name!r} was {self.dtype} in fitting; got {series.dtype}"
                ) from error
            out = np.full(len(series), np.nan)
            good = whole.notna().to_numpy()
            out[good] = (whole[good].astype("int64").to_numpy() - self.origin) / self.per_second
            return out
        try:
            x = series.to_numpy(dtype=float, na_value=np.nan)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"column {self.name!r} was numeric in fitting; got {series.dtype}"
            ) from error
        if self.kind == "discrete":
            level = np.array(self.levels, float)
            if not len(level):
                return np.where(np.isnan(x), np.nan, 0.0)
            code = np.searchsorted(level, x).clip(0, len(level) - 1)
            return np.where(
                np.isnan(x), np.nan, np.where(level[code] == x, code, len(level)).astype(float)
            )
        return x

    def decode(self, values: np.ndarray) -> pd.Series:
        """The inverse of :meth:`encode`, in the original dtype where that can be missing."""
        import pandas as pd

        gone = np.isnan(values)
        if self.is_label:
            code = np.where(gone, -1, np.nan_to_num(values)).astype(int)
            if self.dtype.startswith("category:"):
                levels = pd.Index(self.levels, dtype=self.dtype[9:])
                return pd.Series(
                    pd.Categorical.from_codes(code, levels, ordered=self.ordered), name=self.name
                )
            if self.kind == "categorical":
                labels = np.array([*self.levels, None], dtype=object)[code]
                series = pd.Series(labels, name=self.name, dtype=object)
                return series if self.dtype == "bool" and gone.any() else series.astype(self.dtype)
            values = np.array([*self.levels, np.nan], float)[code]
        if self.kind == "datetime":
            second = np.floor(np.nan_to_num(values))
            part = np.round((np.nan_to_num(values) - second) * self.per_second).astype("int64")
            whole = second.astype("int64") * self.per_second + part + self.origin
            naive = self.dtype.split("[")[0] + "[" + _unit(self.dtype) + "]"
            series = pd.Series(whole.view(naive), name=self.name).mask(gone)
            if "," in self.dtype:
                series = series.dt.tz_localize("UTC").dt.tz_convert(
                    self.dtype.split(",")[1].strip(" ]")
                )
            return series.astype(self.dtype)
        dtype = pd.api.types.pandas_dtype(self.dtype)
        series = pd.Series(values, name=self.name)
        if pd.api.types.is_integer_dtype(dtype):
            bits = np.iinfo(getattr(dtype, "numpy_dtype", dtype))
            series = series.round().clip(bits.min, min(bits.max, 2**63 - 1024))
            if gone.any() and isinstance(dtype, np.dtype):
                return series  # a NumPy integer cannot be missing
            return series.astype("Int64").astype(dtype) if gone.any() else series.astype(dtype)
        return series.astype(dtype)

    def parse(self, text: str) -> Any:
        """A cell written as text, e.g. on a command line."""
        if self.kind == "categorical":
            for level in self.levels:
                if str(level) == text:
                    return level
            raise ValueError(f"column {self.name!r} has no label {text!r}; it has {self.levels}")
        if self.kind == "datetime":
            import pandas as pd

            return pd.Timestamp(text)
        return float(text)

    def describe(self) -> str:
        """One line on how the column is modelled."""
        if self.is_label:
            if len(self.levels) == 1:
                return f"constant {self.levels[0]!r}"
            word = (
                "ordered labels"
                if self.ordered
                else "labels"
                if self.kind == "categorical"
                else "numbers as labels"
            )
            return f"{len(self.levels)} {word}" if self.levels else "empty"
        parts = [f"lattice, step {self.step:g}" if self.step else "continuous"]
        parts += [f">= {self.lower:g}"] if self.lower is not None else []
        parts += [f"<= {self.upper:g}"] if self.upper is not None else []
        parts += (
            ["point masses at " + ", ".join(f"{a:g}" for a in self.atoms)] if self.atoms else []
        )
        return ", ".join(parts)


class Schema:
    """The columns of a table, in order.

    Args:
        columns: The columns.

    Raises:
        ValueError: If two columns share a name.
    """

    def __init__(self, columns: Iterable[Column]) -> None:
        self.columns = list(columns)
        names = [c.name for c in self.columns]
        twice = sorted({str(n) for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"column names must be unique; repeated: {twice}")

    @classmethod
    def from_frame(
        cls, frame: pd.DataFrame, overrides: Mapping[Any, Mapping[str, Any]] | None = None
    ) -> Schema:
        """Read a table; ``overrides`` maps names to attributes of :class:`Column` to set, e.g.

        ``{"price": {"step": None}}``.
        """
        twice = frame.columns[frame.columns.duplicated()]
        if len(twice):
            raise ValueError(f"column names must be unique; repeated: {[str(c) for c in twice]}")
        schema = cls(Column.from_series(frame[name]) for name in frame.columns)
        for name, changes in (overrides or {}).items():
            column = schema[name]
            for key, value in changes.items():
                if key not in {f.name for f in dataclasses.fields(Column)}:
                    raise ValueError(
                        f"schema override of {name!r}: Column has no attribute {key!r}"
                    )
                setattr(column, key, value)
        return schema

    def __len__(self) -> int:
        return len(self.columns)

    def __iter__(self) -> Any:
        return iter(self.columns)

    def __getitem__(self, name: Any) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(f"no column {name!r}; there are {self.names}")

    def __repr__(self) -> str:
        return "\n".join(f"{c.name}: {c.describe()}" for c in self.columns)

    @property
    def names(self) -> list[Any]:
        """Labels of the columns."""
        return [c.name for c in self.columns]

    def encode(self, frame: pd.DataFrame, *, partial: bool = False) -> np.ndarray:
        """Table to float64 array, shape (rows, columns); see :meth:`Column.encode`.

        Args:
            frame: The table; columns may come in any order.
            partial: Whether absent columns count as missing cells.

        Raises:
            ValueError: If columns are absent or unknown, naming them.
        """
        absent = [c for c in self.names if c not in frame.columns]
        unknown = [c for c in frame.columns if c not in set(self.names)]
        if unknown or (absent and not partial):
            raise ValueError(
                f"columns differ from those of the fit: missing {absent}, unknown {unknown}; "
                f"expected {self.names}"
            )
        out = np.full((len(frame), len(self)), np.nan)
        for j, column in enumerate(self.columns):
            if column.name in frame.columns:
                out[:, j] = column.encode(frame[column.name])
        if np.isinf(out).any():
            where = [
                c.name for c, bad in zip(self.columns, np.isinf(out).any(0), strict=True) if bad
            ]
            raise ValueError(
                f"columns {where} contain infinity; replace it by a missing value or a finite cap"
            )
        return out

    def decode(
        self, values: np.ndarray, columns: Sequence[Any] | None = None, index: Any = None
    ) -> pd.DataFrame:
        """Array, shape (rows, columns), to table."""
        import pandas as pd

        keep = self.names if columns is None else list(columns)
        parts = {
            c.name: c.decode(values[:, j]) for j, c in enumerate(self.columns) if c.name in keep
        }
        frame = pd.DataFrame(parts, columns=pd.Index(keep))
        return frame if index is None else frame.set_axis(index, axis=0)

    def summary(self) -> pd.DataFrame:
        """One row per column: what it is and its share of missing cells."""
        import pandas as pd

        rows = [
            dict(column=c.name, dtype=c.dtype, model=c.describe(), missing=c.missing)
            for c in self.columns
        ]
        return pd.DataFrame(rows).set_index("column") if rows else pd.DataFrame()

    def to_json(self) -> list[dict[str, Any]]:
        """Plain lists and dicts."""
        return [dataclasses.asdict(c) for c in self.columns]

    @classmethod
    def from_json(cls, data: list[dict[str, Any]]) -> Schema:
        """Inverse of :meth:`to_json`."""
        return cls(Column(**c) for c in data)


def as_frame(x: Any, names: Sequence[Any] | None = None) -> pd.DataFrame:
    """A DataFrame of a Series, a mapping, or an array of shape (rows, columns).

    Raises:
        ValueError: If it has not two axes, or is sparse, complex or empty.
    """
    import pandas as pd

    if isinstance(x, pd.DataFrame):
        return x
    if hasattr(x, "toarray"):
        raise TypeError("Sparse data was passed, but dense data is required; use .toarray()")
    if isinstance(x, pd.Series):
        return x.to_frame()
    if isinstance(x, Mapping):
        return pd.DataFrame(x)
    if hasattr(x, "to_pandas"):  # polars, pyarrow
        return x.to_pandas()
    if hasattr(x, "detach"):
        x = x.detach().cpu().numpy()
    array = np.asarray(x)
    if array.dtype.kind == "c":
        raise ValueError("Complex data not supported; split it into real and imaginary parts")
    if array.ndim != 2:
        raise ValueError(
            f"Expected 2D array (rows, columns), got {array.ndim}D array instead. "
            "Reshape your data either using array.reshape(-1, 1) for one column "
            "or array.reshape(1, -1) for one row."
        )
    if array.dtype.kind == "O":
        array = array.astype(float)  # numbers held as objects; strings raise here
    names = (
        list(names)
        if names is not None and len(names) == array.shape[1]
        else [f"x{i}" for i in range(array.shape[1])]
    )
    return pd.DataFrame(array, columns=names)


def _unit(dtype: Any) -> str:
    return str(dtype).split("[")[1].rstrip("]").split(",")[0].strip()


def _plain(value: Any) -> Any:
    """A label as a JSON value: bool, int, float or text."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    return str(value)
