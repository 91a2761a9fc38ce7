"""One column: what it is taken for, and its cells as float64 and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyroflows.tables.constraints import Relation
from pyroflows.tables.infer import Numbers, find_atoms, find_bounds, find_step
from pyroflows.tables.keys import Keys
from pyroflows.tables.storage import Held, as_numbers, as_times, canonical, dtype_named, name_of
from pyroflows.tables.values import from_json, plain, to_json

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["KINDS", "Column"]

KINDS = ("categorical", "discrete", "numeric", "datetime", "key")
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
DEGREES = {"lat": 90.0, "latitude": 90.0, "lon": 180.0, "lng": 180.0, "longitude": 180.0}


@dataclasses.dataclass
class Column:
    """What one column is.

    Attributes:
        name: Its label.
        kind: ``"categorical"`` (labels, booleans), ``"discrete"`` (few numbers, treated as
            labels), ``"numeric"``, ``"datetime"`` (numeric, in seconds since ``origin``), or
            ``"key"`` (not modelled; samples get fresh ones).
        dtype: The pandas dtype of its canonical cells.
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
        origin: Integer that stands for zero (datetimes, and integers that float64 cannot hold).
        per_second: Integers per second (datetimes).
        held: How the cells are held where ``dtype`` does not say it (dates, decimals, Arrow).
        keys: How fresh keys are made.
        relation: The constraint by which a distance to other columns is modelled in its place:
            ``levels``, ``step``, ``lower``, ``upper`` and ``atoms`` are those of the distance.
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
    held: Held | None = None
    keys: Keys | None = None
    relation: Relation | None = None

    @property
    def is_label(self) -> bool:
        """Whether cells are codes of levels rather than numbers."""
        return self.kind in ("categorical", "discrete", "key")

    @property
    def is_time(self) -> bool:
        """Whether its numbers are seconds."""
        return self.kind not in ("categorical", "key") and bool(_unit(self.dtype))

    # ------------------------------------------------------------------ what it is

    @classmethod
    def from_series(cls, series: pd.Series, changes: Mapping[str, Any] | None = None) -> Column:
        """Decide what a column is.

        Args:
            series: Its cells.
            changes: Attributes to set instead of inferring them, in the column's own values.

        Raises:
            ValueError: If the cells cannot be modelled, or contradict the changes.
        """
        import pandas as pd

        changes = dict(changes or {})
        kind = changes.pop("kind", None)
        if kind is not None and kind not in KINDS:
            raise ValueError(
                f"schema of {series.name!r}: expected a kind of {[*KINDS, 'ignore']}; got {kind!r}"
            )
        cells, held = _cells(series, kind)
        dtype = cells.dtype
        missing = float(cells.isna().mean()) if len(cells) else 0.0
        out = cls(series.name, "numeric", name_of(dtype), missing=missing, held=held)
        if kind == "key":
            out.kind, out.levels, out.keys = "key", ["key"], Keys.of(cells.dropna())
        elif kind == "categorical" or kind is None and _labels(dtype):
            out._read_labels(cells)
        elif _labels(dtype) and not pd.api.types.is_bool_dtype(dtype):
            raise ValueError(
                f"column {series.name!r} was declared {kind}, but has {dtype} cells, e.g. "
                f"{cells.dropna().iloc[:1].tolist()}"
            )
        else:
            out._read_numbers(cells, kind)
        out._change(changes, cells)
        return out

    def _read_labels(self, cells: pd.Series) -> None:
        import pandas as pd

        self.kind = "categorical"
        if isinstance(cells.dtype, pd.CategoricalDtype):
            self.levels = [plain(v) for v in cells.cat.categories]
            self.ordered = bool(cells.cat.ordered)
            self.dtype = f"category:{name_of(cells.cat.categories.dtype)}"
            return
        levels = {plain(v) for v in cells.dropna().unique()}
        try:
            self.levels = sorted(levels)
        except TypeError:
            self.levels = sorted(levels, key=lambda v: (str(type(v)), str(v)))

    def _read_numbers(self, cells: pd.Series, kind: str | None) -> None:
        import pandas as pd

        dtype = cells.dtype
        times = _unit(dtype)
        if kind == "datetime" and not times:
            raise ValueError(
                f"column {self.name!r} was declared datetime, but has {dtype} cells; convert them "
                "with pd.to_datetime(..., unit=...)"
            )
        if times:
            self.kind, self.per_second = "datetime", PER_SECOND[times]
            if pd.api.types.is_datetime64_any_dtype(dtype):
                whole = _ticks(cells.dropna())
                self.origin = int(whole.min()) if len(whole) else 0
        elif pd.api.types.is_integer_dtype(dtype):
            whole = _ticks(cells.dropna())
            if len(whole) and max(-int(whole.min()), int(whole.max())) >= 2**53:
                self.origin = int(whole.min())
        values = self.numbers(cells)
        values = values[~np.isnan(values)]
        if np.isinf(values).any():
            raise ValueError(
                f"column {self.name!r} contains infinity; replace it by a missing value or a "
                "finite cap"
            )
        single = "32" in str(dtype) and "float" in str(dtype).lower()
        self.read_values(Numbers.of(values, single=single, times=bool(times)), kind)

    def read_values(self, x: Numbers, kind: str | None = None) -> None:
        """Decide from the column's numbers: labels, step, point masses, bounds."""
        few = len(x.level) <= (1 if self.kind == "datetime" else 2) or (
            len(x.level) <= 4 and x.size >= 20 * len(x.level) and x.whole and not x.times
        )
        if (few and kind in (None, "discrete")) or kind == "discrete" or not len(x.level):
            self.kind, self.levels = "discrete", [float(v) for v in x.level]
            return
        self.step, atoms = find_step(x)
        if self.held and self.held.days:
            self.step, atoms = 86400.0, np.empty(0)
        if self.step:
            regular = x.level[~np.isin(x.level, atoms)]
            self.anchor = float(regular[0])
        else:
            atoms = find_atoms(x)
        self.atoms = [float(v) for v in atoms]
        if self.held and "clock" in self.held.kind:
            self.lower, self.upper = 0.0, 86400.0
            if self.step:  # the first and the last of the day
                self.lower = self.anchor % self.step
                steps = np.ceil((86400.0 - self.lower) / self.step - 1e-9) - 1
                self.upper = self.lower + float(steps) * self.step
        elif self.origin == 0:
            self.lower, self.upper = find_bounds(x, self.step)
            end = DEGREES.get(str(self.name).lower())
            if end and max(-x.level[0], x.level[-1]) <= end:
                self.lower, self.upper = -end if self.lower is None else self.lower, end

    def _change(self, changes: dict[str, Any], cells: pd.Series) -> None:
        """Set attributes; bounds, steps and atoms must agree with the cells."""
        known = {f.name for f in dataclasses.fields(Column)} - {
            "name",
            "dtype",
            "held",
            "keys",
            "relation",
        }
        for key, value in changes.items():
            if key not in known:
                raise ValueError(
                    f"schema override of {self.name!r}: Column has no attribute {key!r}; "
                    f"there are {sorted(known | {'kind'})}"
                )
            if key in ("lower", "upper", "anchor") and value is not None:
                value = self.place(value)
            elif key == "atoms":
                value = [self.place(v) for v in value]
            elif key == "step" and value is not None:
                value = _seconds(value) if self.kind == "datetime" else float(value)
                if not value > 0:
                    raise ValueError(f"schema of {self.name!r}: step must be positive or None")
            setattr(self, key, value)
        if self.is_label or not changes:
            return
        values = self.numbers(cells)
        self._check(np.unique(values[~np.isnan(values)]), changes)

    def _check(self, level: np.ndarray, changes: dict[str, Any]) -> None:
        regular = level[~np.isin(level, self.atoms)]
        if not len(level):
            return
        for key, end, beyond in (
            ("lower", self.lower, level < (-np.inf if self.lower is None else self.lower)),
            ("upper", self.upper, level > (np.inf if self.upper is None else self.upper)),
        ):
            if beyond.any() and key in changes:
                worst = level[beyond][0 if key == "lower" else -1]
                raise ValueError(
                    f"schema of {self.name!r}: {key}={self.shown(end)}, but a cell is "
                    f"{self.shown(worst)}"
                )
            if beyond.any():  # inferred before the atoms were set
                setattr(self, key, None)
        if self.step and len(regular):
            if "step" in changes and "anchor" not in changes:
                self.anchor = float(regular[0])
            off = np.abs((regular - self.anchor) / self.step)
            off = np.abs(off - np.round(off)) > 1e-3
            if off.sum() > max(8, 0.05 * len(regular)):
                raise ValueError(
                    f"schema of {self.name!r}: step={self.step:g}, but {int(off.sum())} of "
                    f"{len(regular)} values are not on that lattice, e.g. "
                    f"{self.shown(regular[off][0])}"
                )

    # ------------------------------------------------------------------ cells to numbers

    def place(self, value: Any) -> float:
        """The number that stands for one value of a number column."""
        import pandas as pd

        if self.kind == "datetime":
            return float(self.numbers(self._like_fit(pd.Series([value], name=self.name)))[0])
        return float(value) - self.origin

    def encode(self, series: pd.Series) -> np.ndarray:
        """Cells to float64.

        Values, codes of levels (``len(levels)`` for an unknown one), NaN where missing.
        """
        if self.kind == "key":
            return np.where(series.isna(), np.nan, 0.0)
        if self.kind == "categorical":
            return self._codes(self._like_fit(series))
        return self.code(self.raw(series))

    def raw(self, series: pd.Series) -> np.ndarray:
        """Cells of a number column, not yet as codes, as float64; NaN where missing."""
        return self.numbers(self._like_fit(series))

    def _like_fit(self, series: pd.Series) -> pd.Series:
        """Canonical cells of the type that fitting saw."""
        import pandas as pd

        if self.kind == "categorical":
            forced = None if self.held and self.held.kind.startswith("text") else "categorical"
            cells, _ = _cells(series, forced)
            return cells
        if self.held and self.held.kind == "text number":
            return as_numbers(series)[0]
        cells, held = canonical(series)
        if self.kind == "datetime" or _unit(self.dtype):
            if cells.isna().all():
                return pd.Series(pd.NaT, series.index, dtype=self.dtype, name=series.name)
            try:
                if _labels(cells.dtype) and not pd.api.types.is_bool_dtype(cells.dtype):
                    read = pd.to_timedelta if self.dtype.startswith("time") else pd.to_datetime
                    cells = read(cells.astype(object))
                zoned = getattr(cells.dtype, "tz", None) is not None
                if zoned and "," not in self.dtype:
                    raise TypeError("time zones differ")
                return cells.astype(self.dtype) if str(cells.dtype) != self.dtype else cells
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"column {self.name!r} was {self.shown_type} in fitting; got {series.dtype}, "
                    f"e.g. {series.dropna().iloc[:1].tolist()}"
                ) from error
        return cells

    def numbers(self, cells: pd.Series) -> np.ndarray:
        """Canonical cells of a number column as float64, NaN where missing."""
        import pandas as pd

        there = cells.notna().to_numpy()
        out = np.full(len(cells), np.nan)
        if _unit(cells.dtype):
            out[there] = _less(_ticks(cells[there]), self.origin) / self.per_second
            return out
        if pd.api.types.is_integer_dtype(cells.dtype) and self.origin:
            out[there] = _less(_ticks(cells[there]), self.origin)
            return out
        try:
            x = cells.to_numpy(dtype=float, na_value=np.nan)
            return x - self.origin if self.origin else x
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"column {self.name!r} was numeric in fitting; got {cells.dtype}, e.g. "
                f"{cells.dropna().iloc[:1].tolist()}"
            ) from error

    def code(self, x: np.ndarray) -> np.ndarray:
        """Numbers as they are, or as codes if they are few."""
        if self.kind != "discrete":
            return x
        level = np.array(self.levels, float)
        if not len(level):
            return np.where(np.isnan(x), np.nan, 0.0)
        code = np.searchsorted(level, x).clip(0, len(level) - 1)
        known = np.where(level[code] == x, code, len(level)).astype(float)
        return np.where(np.isnan(x), np.nan, known)

    def _codes(self, cells: pd.Series) -> np.ndarray:
        """Codes of labels."""
        import pandas as pd

        index = {v: i for i, v in enumerate(self.levels)}

        def code(v: Any) -> int:
            return index.get(plain(v), len(index))

        if isinstance(cells.dtype, pd.CategoricalDtype):
            table = np.array([*map(code, cells.cat.categories), np.nan], float)
            return table[cells.cat.codes.to_numpy()]
        codes, uniques = pd.factorize(cells)
        return np.array([*map(code, uniques), np.nan], float)[codes]

    # ------------------------------------------------------------------ and back

    def decode(self, values: np.ndarray) -> pd.Series:
        """The inverse of :meth:`encode`, in the original type where that can be missing."""
        if self.kind == "key":
            return self.keyed(values, values)
        if self.kind == "categorical":
            return self._written(self._labels(values))
        return self.cells(self.value(values))

    def cells(self, values: np.ndarray) -> pd.Series:
        """The inverse of :meth:`raw`."""
        return self._written(self._numbers(values))

    def restored(self, numbers: np.ndarray) -> pd.Series:
        """Cells from what :meth:`raw` makes of them, or from codes of labels."""
        return self.decode(numbers) if self.kind == "categorical" else self.cells(numbers)

    def keyed(self, values: np.ndarray, rows: np.ndarray) -> pd.Series:
        """Fresh keys, which depend on whole rows (N, D), where ``values`` is not NaN."""
        assert self.keys is not None
        return self._written(self.keys.draw(np.isnan(values), rows, self.name, self.dtype))

    def _written(self, cells: pd.Series) -> pd.Series:
        return self.held.write(cells) if self.held else cells

    def value(self, codes: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`code`."""
        if self.kind != "discrete":
            return codes
        index = np.where(np.isnan(codes), -1, np.nan_to_num(codes)).astype(int)
        return np.array([*self.levels, np.nan], float)[index]

    def _labels(self, values: np.ndarray) -> pd.Series:
        import pandas as pd

        gone = np.isnan(values)
        code = np.where(gone, -1, np.nan_to_num(values)).astype(int)
        if self.dtype.startswith("category:"):
            levels = pd.Index(self.levels, dtype=dtype_named(self.dtype.removeprefix("category:")))
            return pd.Series(
                pd.Categorical.from_codes(code, levels, ordered=self.ordered), name=self.name
            )
        labels = np.empty(len(self.levels) + 1, dtype=object)
        labels[:-1] = self.levels
        series = pd.Series(labels[code], name=self.name, dtype=object)
        dtype = dtype_named(self.dtype)
        if gone.any() and isinstance(dtype, np.dtype) and dtype.kind in "biu":
            return series if dtype.kind == "b" else series.astype(float)
        return series.astype(dtype)

    def _numbers(self, values: np.ndarray) -> pd.Series:
        """Numbers as cells of the canonical dtype."""
        import pandas as pd

        gone = np.isnan(values)
        dtype = dtype_named(self.dtype)
        if _unit(dtype):
            whole = _plus(np.nan_to_num(values), self.origin, self.per_second, "int64")
            naive = self.dtype.split("[")[0] + "[" + _unit(dtype) + "]"
            series = pd.Series(whole.view(naive), name=self.name).mask(gone)
            zone = getattr(dtype, "tz", None)
            if zone is not None:
                series = series.dt.tz_localize("UTC").dt.tz_convert(zone)
            return series.astype(dtype)
        if not pd.api.types.is_integer_dtype(dtype):
            return pd.Series(values, name=self.name).astype(dtype)
        kind = getattr(dtype, "numpy_dtype", dtype)
        bits = np.iinfo(kind)
        wide = "uint64" if kind.kind == "u" else "int64"
        x = np.nan_to_num(values).clip(
            float(bits.min) - self.origin, float(bits.max) - self.origin
        )
        whole = _plus(x, self.origin, 1, wide).clip(bits.min, bits.max)
        series = pd.Series(whole, name=self.name)
        if not gone.any():
            return series.astype(dtype)
        if isinstance(dtype, np.dtype) and not self.origin:
            return series.astype(float).mask(gone)  # a NumPy integer cannot be missing
        nullable = dtype if not isinstance(dtype, np.dtype) else wide.replace("i", "I", 1)
        return series.astype(nullable if nullable != "uInt64" else "UInt64").mask(gone)

    def parse(self, text: str) -> Any:
        """A cell written as text, e.g. on a command line.

        Raises:
            ValueError: If it is no cell of this column, naming it.
        """
        import pandas as pd

        if self.kind == "categorical":
            for level in self.levels:
                if str(level) == text:
                    return level
            raise ValueError(f"column {self.name!r} has no label {text!r}; it has {self.few()}")
        if _unit(self.dtype):
            cell = self._like_fit(pd.Series([text], name=self.name, dtype=object)).iloc[0]
            return cell
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"column {self.name!r} holds numbers; got {text!r}") from None

    # ------------------------------------------------------------------ words

    @property
    def shown_type(self) -> str:
        """The type that the column came in."""
        if self.held is None:
            return self.dtype.split(":")[0]
        if self.held.kind.startswith("text"):
            return f"text like {self.held.detail}" if self.held.detail else "text of numbers"
        return (
            self.held.dtype
            if self.held.dtype != "object"
            else str(self.held.detail if isinstance(self.held.detail, str) else self.held.kind)
        )

    def shown(self, value: float | None) -> str:
        """A number of the column as its cells are written."""
        if value is None or not np.isfinite(value):
            return str(value)
        if (_unit(self.dtype) or self.origin) and self.relation is None:
            return str(self._numbers(np.array([value])).iloc[0])
        return self._span(value) if self.relation is not None else f"{value:.10g}"

    def few(self) -> str:
        """Some of the levels, as they are written."""
        numbers = self.kind == "discrete"
        shown = [self.shown(v) if numbers else repr(v) for v in self.levels[:20]]
        return "[" + ", ".join(shown) + (", ...]" if len(self.levels) > 20 else "]")

    def describe(self) -> str:
        """One line on how the column is modelled."""
        if self.relation is not None and self.relation.equal:
            return f"{self.relation}, determined"
        if self.relation is not None:
            return f"{self.relation}; the difference: {self._described()}"
        return self._described()

    def _described(self) -> str:
        if self.kind == "key":
            return f"key, not modelled; fresh ones {self.keys}"
        if self.is_label:
            if len(self.levels) == 1:
                one = self.levels[0]
                return f"constant {self.shown(one) if self.kind == 'discrete' else repr(one)}"
            word = (
                "numbers as labels"
                if self.kind == "discrete"
                else "ordered labels"
                if self.ordered
                else "labels"
            )
            return f"{len(self.levels)} {word}" if self.levels else "empty"
        parts = [f"lattice, step {self._span(self.step)}" if self.step else "continuous"]
        parts += [f">= {self.shown(self.lower)}"] if self.lower is not None else []
        parts += [f"<= {self.shown(self.upper)}"] if self.upper is not None else []
        atoms = ", ".join(self.shown(a) for a in self.atoms)
        return ", ".join([*parts, *([f"point masses at {atoms}"] if atoms else [])])

    def _span(self, value: float) -> str:
        """A difference of two values, in words for times."""
        import pandas as pd

        if _unit(self.dtype) and value >= 1:
            return str(pd.Timedelta(seconds=value)).replace(" 00:00:00", "")
        return f"{value:.10g}"

    # ------------------------------------------------------------------ JSON

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["name"], out["levels"] = to_json(self.name), to_json(self.levels)
        for part in ("held", "keys", "relation"):
            value = out.pop(part)
            if value is not None:
                out[part] = to_json(dataclasses.asdict(value))
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Column:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: If a field is unknown or of the wrong type.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if (
            not isinstance(data, dict)
            or set(data) - known
            or {"name", "kind", "dtype"} - set(data)
        ):
            raise ValueError(f"not a stored column: {str(data)[:100]}")
        data = {**data, "name": from_json(data["name"])}
        data["levels"] = from_json(data.get("levels", []))
        try:
            for part, make in (("held", Held), ("keys", Keys)):
                data[part] = make(**from_json(data[part])) if data.get(part) else None
            stored = data.get("relation")
            data["relation"] = Relation.from_json(from_json(stored)) if stored else None
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"column {data['name']!r}: {error}") from error
        out = cls(**data)
        numbers = [out.anchor, out.missing, *out.atoms]
        numbers += [v for v in (out.step, out.lower, out.upper) if v is not None]
        if out.kind == "discrete":
            numbers += out.levels
        if (
            out.kind not in KINDS
            or not isinstance(out.dtype, str)
            or not isinstance(out.levels, list)
            or not all(isinstance(v, (int, float)) and np.isfinite(v) for v in numbers)
            or not (isinstance(out.origin, int) and isinstance(out.per_second, int))
            or out.per_second < 1
        ):
            raise ValueError(f"column {out.name!r}: fields of the wrong type")
        return out


# ---------------------------------------------------------------------- helpers


def _cells(series: pd.Series, kind: str | None) -> tuple[pd.Series, Held | None]:
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
        if _labels(cells.dtype) and not pd.api.types.is_bool_dtype(cells.dtype):
            if isinstance(cells.dtype, pd.CategoricalDtype):
                raise ValueError(
                    f"column {series.name!r} was declared {kind}, but holds categories; convert "
                    "it with .astype first"
                )
            return as_times(series) if kind == "datetime" else as_numbers(series)
        return cells, held
    return canonical(series)


def _labels(dtype: Any) -> bool:
    """Whether canonical cells of this dtype are labels."""
    import pandas as pd

    if isinstance(dtype, pd.CategoricalDtype) or pd.api.types.is_bool_dtype(dtype):
        return True
    return not (pd.api.types.is_numeric_dtype(dtype) or _unit(dtype))


def _unit(dtype: Any) -> str:
    """The unit of a datetime or timedelta dtype, else nothing."""
    found = re.match(r"(?:datetime64|timedelta64)\[(\w+)", str(dtype))
    return found[1] if found else ""


def _ticks(cells: pd.Series) -> np.ndarray:
    """Integers of a column without missing cells, exact."""
    if _unit(cells.dtype):
        return cells.astype("int64").to_numpy()
    unsigned = str(cells.dtype).lower().startswith("uint")
    return cells.to_numpy(dtype="uint64" if unsigned else "int64")


def _less(ticks: np.ndarray, origin: int) -> np.ndarray:
    """Ticks - origin as float64, exact up to 2^53 whatever their size."""
    if not origin:
        return ticks.astype(float)
    raw, zero = ticks.astype("uint64"), np.uint64(origin % 2**64)
    below = ticks < origin
    return np.where(below, -(zero - raw).astype(float), (raw - zero).astype(float))


def _plus(values: np.ndarray, origin: int, per_unit: int, wide: str) -> np.ndarray:
    """Integers values * per_unit + origin, the inverse of :func:`_less`."""
    unit = np.floor(values)
    part = np.round((values - unit) * per_unit).astype("int64")
    if wide == "uint64":
        start = origin + np.array([int(u) for u in unit], dtype=object) + part
        return np.array([min(max(int(v), 0), 2**64 - 1) for v in start], dtype="uint64")
    top = float(2**63 - 2**10) / per_unit - abs(origin) / per_unit
    return unit.clip(-top, top).astype("int64") * per_unit + part + origin


def _seconds(value: Any) -> float:
    """A step of times: a number of seconds, or what pandas takes for a duration."""
    import pandas as pd

    return float(value) if isinstance(value, (int, float)) else pd.Timedelta(value).total_seconds()
