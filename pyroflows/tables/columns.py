"""One column: what it is taken for, and its cells as float64 and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyroflows.tables.constraints import Relation
from pyroflows.tables.infer import Numbers, find_atoms, find_bounds, find_step
from pyroflows.tables.keys import Keys
from pyroflows.tables.kinds import KINDS, Kind, canonical_as, holds_labels
from pyroflows.tables.storage import Held, dtype_named, name_of
from pyroflows.tables.ticks import PER_SECOND, less, plus, seconds, ticks_of, unit_named
from pyroflows.tables.values import from_json, plain, to_json

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["KINDS", "Column"]

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
        return self.way.is_label

    @property
    def is_time(self) -> bool:
        """Whether its numbers are seconds."""
        return self.way.has_numbers and bool(unit_named(self.dtype))

    @property
    def way(self) -> Kind:
        """What its kind does with cells."""
        return KINDS[self.kind]

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
        cells, held = canonical_as(series, kind)
        dtype = cells.dtype
        missing = float(cells.isna().mean()) if len(cells) else 0.0
        out = cls(series.name, "numeric", name_of(dtype), missing=missing, held=held)
        if kind == "key":
            out.kind, out.levels, out.keys = "key", ["key"], Keys.of(cells.dropna())
        elif kind == "categorical" or kind is None and holds_labels(dtype):
            out._read_labels(cells)
        elif holds_labels(dtype) and not pd.api.types.is_bool_dtype(dtype):
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
        times = unit_named(dtype)
        if kind == "datetime" and not times:
            raise ValueError(
                f"column {self.name!r} was declared datetime, but has {dtype} cells; convert them "
                "with pd.to_datetime(..., unit=...)"
            )
        if times:
            self.kind, self.per_second = "datetime", PER_SECOND[times]
            if pd.api.types.is_datetime64_any_dtype(dtype):
                whole = ticks_of(cells.dropna())
                self.origin = int(whole.min()) if len(whole) else 0
        elif pd.api.types.is_integer_dtype(dtype):
            whole = ticks_of(cells.dropna())
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
                value = seconds(value) if self.kind == "datetime" else float(value)
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
            return float(self.raw(pd.Series([value], name=self.name))[0])
        return float(value) - self.origin

    def encode(self, series: pd.Series) -> np.ndarray:
        """Cells to float64.

        Values, codes of levels (``len(levels)`` for an unknown one), NaN where missing.
        """
        return self.way.encode(self, series)

    def raw(self, series: pd.Series) -> np.ndarray:
        """Cells of a number column, not yet as codes, as float64; NaN where missing."""
        return self.numbers(self.way.like_fit(self, series))

    def numbers(self, cells: pd.Series) -> np.ndarray:
        """Canonical cells of a number column as float64, NaN where missing."""
        import pandas as pd

        there = cells.notna().to_numpy()
        out = np.full(len(cells), np.nan)
        if unit_named(cells.dtype):
            out[there] = less(ticks_of(cells[there]), self.origin) / self.per_second
            return out
        if pd.api.types.is_integer_dtype(cells.dtype) and self.origin:
            out[there] = less(ticks_of(cells[there]), self.origin)
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
        return self.way.code(self, x)

    # ------------------------------------------------------------------ and back

    def decode(self, values: np.ndarray) -> pd.Series:
        """The inverse of :meth:`encode`, in the original type where that can be missing."""
        return self.way.decode(self, values)

    def cells(self, values: np.ndarray) -> pd.Series:
        """The inverse of :meth:`raw`."""
        return self.written(self._numbers(values))

    def restored(self, numbers: np.ndarray) -> pd.Series:
        """Cells from what :meth:`raw` makes of them, or from codes of labels."""
        return self.way.restored(self, numbers)

    def keyed(self, values: np.ndarray, rows: np.ndarray) -> pd.Series:
        """Fresh keys, which depend on whole rows (N, D), where ``values`` is not NaN."""
        assert self.keys is not None
        return self.written(self.keys.draw(np.isnan(values), rows, self.name, self.dtype))

    def written(self, cells: pd.Series) -> pd.Series:
        """Canonical cells in the type that came."""
        return self.held.write(cells) if self.held else cells

    def value(self, codes: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`code`."""
        return self.way.value(self, codes)

    def _numbers(self, values: np.ndarray) -> pd.Series:
        """Numbers as cells of the canonical dtype."""
        import pandas as pd

        gone = np.isnan(values)
        dtype = dtype_named(self.dtype)
        if unit_named(dtype):
            whole = plus(np.nan_to_num(values), self.origin, self.per_second, "int64")
            naive = self.dtype.split("[")[0] + "[" + unit_named(dtype) + "]"
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
        whole = plus(x, self.origin, 1, wide).clip(bits.min, bits.max)
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
        return self.way.parse(self, text)

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
        if (unit_named(self.dtype) or self.origin) and self.relation is None:
            return str(self._numbers(np.array([value])).iloc[0])
        return self._span(value) if self.relation is not None else f"{value:.10g}"

    def few(self) -> str:
        """Some of the levels, as they are written."""
        shown = [self.way.shown(self, v) for v in self.levels[:20]]
        return "[" + ", ".join(shown) + (", ...]" if len(self.levels) > 20 else "]")

    def describe(self) -> str:
        """One line on how the column is modelled."""
        if self.relation is not None and self.relation.equal:
            return f"{self.relation}, determined"
        if self.relation is not None:
            return f"{self.relation}; the difference: {self._described()}"
        return self._described()

    def _described(self) -> str:
        if self.is_label:
            return self.way.described(self)
        parts = [f"lattice, step {self._span(self.step)}" if self.step else "continuous"]
        parts += [f">= {self.shown(self.lower)}"] if self.lower is not None else []
        parts += [f"<= {self.shown(self.upper)}"] if self.upper is not None else []
        atoms = ", ".join(self.shown(a) for a in self.atoms)
        return ", ".join([*parts, *([f"point masses at {atoms}"] if atoms else [])])

    def _span(self, value: float) -> str:
        """A difference of two values, in words for times."""
        import pandas as pd

        if unit_named(self.dtype) and value >= 1:
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
