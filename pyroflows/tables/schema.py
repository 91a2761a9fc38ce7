"""The columns of a table in order, and the constraints between them.

:class:`Schema` reads a DataFrame once, decides what each column is, and from then on turns tables
into float64 arrays (missing cells are NaN) and arrays into tables of the original dtypes. What it
decided can be read (:meth:`Schema.summary`), changed (``schema["price"].step = None``) and stored
as JSON.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from pyroflows.checks import users_line
from pyroflows.tables.columns import Column
from pyroflows.tables.constraints import Parsed, Relation, in_words, parse_constraint
from pyroflows.tables.frames import read_table
from pyroflows.tables.infer import Numbers, find_step
from pyroflows.tables.keys import suspicion
from pyroflows.tables.storage import canonical

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Schema", "as_frame", "ignored"]


def ignored(overrides: Mapping[Any, Mapping[str, Any]] | None) -> set[Any]:
    """Columns that ``{"name": {"kind": "ignore"}}`` leaves out."""
    for name, changes in (overrides or {}).items():
        if not isinstance(changes, Mapping):
            raise ValueError(
                f"schema of {name!r}: expected a dict like {{'kind': 'ignore'}}; got {changes!r}"
            )
    return {name for name, c in (overrides or {}).items() if c.get("kind") == "ignore"}


class Schema:
    """The columns of a table, in order.

    Args:
        columns: The columns.
        index_names: Names of the levels of the table's column index.

    Raises:
        ValueError: If two columns share a name, or constraints depend on each other in a circle.
    """

    def __init__(self, columns: Iterable[Column], index_names: Sequence[Any] = (None,)) -> None:
        self.columns = list(columns)
        self.index_names = list(index_names)
        names = [c.name for c in self.columns]
        twice = sorted({str(n) for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"column names must be unique; repeated: {twice}")
        self._place = {name: j for j, name in enumerate(names)}
        self._related = self._sorted()

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        overrides: Mapping[Any, Mapping[str, Any]] | None = None,
        constraints: Iterable[Any] = (),
        *,
        given: Iterable[Any] = (),
    ) -> Schema:
        """Read a table.

        Args:
            frame: Its rows.
            overrides: Attributes of :class:`Column` by name of column, e.g. ``{"price": {"step":
                None}, "zip": {"kind": "categorical"}}``; the kind ``"ignore"`` leaves a column
                out.
            constraints: Such as ``"start < end"``; see :mod:`pyroflows.tables.constraints`.
            given: Columns that constraints must not replace.

        Warns:
            UserWarning: If a column looks like a key, like free text, or like misread numbers.
        """
        twice = frame.columns[frame.columns.duplicated()]
        if len(twice):
            raise ValueError(f"column names must be unique; repeated: {[str(c) for c in twice]}")
        overrides = dict(overrides or {})
        unknown = [name for name in overrides if name not in frame.columns]
        left_out = ignored(overrides)
        if set(unknown) - left_out:
            raise KeyError(f"no column {unknown[0]!r}; there are {list(frame.columns)}")
        names = [name for name in frame.columns if name not in left_out]
        several = [constraints] if isinstance(constraints, str) else constraints
        parsed = [parse_constraint(c, names) for c in several]
        columns = [Column.from_series(frame[name], overrides.get(name)) for name in names]
        for column in columns:
            if "kind" not in overrides.get(column.name, {}):
                _warn(column, frame[column.name])
        schema = cls(columns, list(frame.columns.names))
        if parsed:
            schema._relate(parsed, frame, set(given), overrides)
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

    # ------------------------------------------------------------------ constraints

    def _relate(
        self, parsed: list[Parsed], frame: pd.DataFrame, given: set[Any], overrides: Mapping
    ) -> None:
        """Replace columns by their distances, and read those as columns of their own."""
        raw = self._numbers(frame)
        for c in parsed:
            for _, name in c.terms:
                if self[name].kind in ("categorical", "key"):
                    raise ValueError(
                        f"constraint {c.source!r}: column {name!r} holds labels, not numbers"
                    )
            if len(c.terms) == 1:
                self._bound(c, raw)
            elif any(name not in given for _, name in c.terms):
                self._add(c, given)
            else:
                warnings.warn(
                    f"constraint {c.source!r} is between given columns only: the model has no say "
                    "in them, so that rows which break it are taken as they come",
                    stacklevel=users_line(),
                )
        self._related = self._sorted()
        for name in self._related:
            column = self[name]
            relation = column.relation
            assert relation is not None
            x = raw[name]
            relation.step = column.step or find_step(Numbers.of(x[np.isfinite(x)]))[0]
            relation.anchor = float(x[np.isfinite(x)][0]) if np.isfinite(x).any() else 0.0
            scale = max([np.nanmax(np.abs(raw[n]), initial=0.0) for n in (name, *relation.names)])
            relation.slack = max(1e-9 * scale, 1e-4 * (relation.step or 0.0))
            self._read(column, relation, relation.distance(x, raw), overrides.get(name, {}))

    def _bound(self, c: Parsed, raw: Mapping[Any, np.ndarray]) -> None:
        """``x <= 5``: an end of the support."""
        ((sign, name),) = c.terms
        column = self[name]
        end = column.place(c.constant if isinstance(c.constant, str) else -sign * c.constant)
        beyond = sign * (raw[name] - end) > 0 if c.op != "==" else raw[name] != end
        if (beyond & ~np.isnan(raw[name])).any():
            bad = raw[name][beyond & ~np.isnan(raw[name])]
            raise ValueError(
                f"constraint {c.source!r} does not hold in {len(bad)} rows, e.g. "
                f"{name!r} = {column.shown(bad[0])}"
            )
        setattr(column, "upper" if sign > 0 else "lower", end)

    def _add(self, c: Parsed, given: set[Any]) -> None:
        free = [n for _, n in c.terms if n not in given]
        name = c.alone if c.alone in free else free[-1]
        if len(c.terms) == 2 and c.op != "==":  # the larger one, if it may
            name = next((n for s, n in c.terms if s < 0 and n in free), name)
        expr, sign = c.solved(name)
        own = next(s for s, n in c.terms if n == name)
        column = self[name]
        if isinstance(c.constant, str):
            raise ValueError(f"constraint {c.source!r}: {c.constant!r} is no number")
        offset = sum(s * _zero(self[n]) for s, n in expr) - _zero(column)
        constant = float(offset) - own * c.constant
        words = in_words(expr, -own * c.constant)
        old = column.relation
        if old is None:
            equal, strict = c.op == "==", c.op == "<"
            sign = 1 if equal else sign
            column.relation = Relation([expr], [constant], sign, equal, strict, words=[words])
        elif old.equal or c.op == "==" or old.sign != sign:
            raise ValueError(
                f"constraint {c.source!r}: column {name!r} is bound by another one already; "
                "state it with another column alone on one side"
            )
        else:
            old.exprs.append(expr)
            old.constants.append(constant)
            old.words.append(words)
            old.strict = old.strict or c.op == "<"

    def _read(
        self, column: Column, relation: Relation, distance: np.ndarray, changes: Mapping
    ) -> None:
        """What a distance is; it must be what the constraint says in every row."""
        there = distance[np.isfinite(distance)]
        bad = there != 0 if relation.equal else there <= 0 if relation.strict else there < 0
        if bad.any():
            raise ValueError(
                f"constraint {column.name!r} {relation} does not hold in {int(bad.sum())} of "
                f"{len(there)} rows; correct or drop them before the fit"
            )
        column.kind = "datetime" if column.kind == "datetime" else "numeric"
        column.step, column.atoms, column.lower, column.upper = None, [], None, None
        column.levels = []
        if relation.equal:
            column.kind, column.levels = "discrete", [0.0]
            return
        kept = column.held, column.origin
        column.held, column.origin = None, 0
        column.read_values(Numbers.of(there, times=column.kind == "datetime"))
        column.held, column.origin = kept
        if "step" in changes:
            column.step = changes["step"]
        column.lower = column.step if relation.strict and column.step else 0.0

    def _sorted(self) -> list[Any]:
        """Columns with a relation, each after those that it depends on."""
        done: list[Any] = []
        left = [c for c in self.columns if c.relation is not None]
        while left:
            names = {c.name for c in left}
            ready = [c for c in left if not names & set(c.relation.names)]
            if not ready:
                raise ValueError(f"constraints on {sorted(map(str, names))} form a circle")
            done += [c.name for c in ready]
            left = [c for c in left if c not in ready]
        return done

    def broken(self, frame: pd.DataFrame) -> np.ndarray:
        """Rows that break a constraint, shape (rows,); missing cells break none."""
        return np.logical_or.reduce([np.zeros(len(frame), bool), *self.breaks(frame).values()])

    def breaks(self, frame: pd.DataFrame) -> dict[Any, np.ndarray]:
        """Columns that a constraint binds, and the rows that break it, shape (rows,)."""
        out = {}
        raw = self._numbers(frame) if self._related else {}
        for name in self._related:
            relation = self[name].relation
            assert relation is not None
            d = relation.distance(raw[name], raw)
            out[name] = d != 0 if relation.equal else d <= 0 if relation.strict else d < 0
        return out

    def half_known(self, frame: pd.DataFrame) -> dict[Any, np.ndarray]:
        """Columns whose cell is there where its constraint lacks another, and in which rows."""
        out = {}
        raw = self._numbers(frame) if self._related else {}
        for name in self._related:
            relation = self[name].relation
            assert relation is not None
            where = ~np.isnan(raw[name]) & np.isnan(relation.value(raw))
            if where.any():
                out[name] = where
        return out

    def _numbers(self, frame: pd.DataFrame) -> dict[Any, np.ndarray]:
        """Numbers of all columns; cells that an equation determines are filled in."""
        raw = {}
        for column in self.columns:
            if column.kind in ("categorical", "key") or column.name not in frame.columns:
                raw[column.name] = np.full(len(frame), np.nan)
            else:
                raw[column.name] = column.raw(frame[column.name])
        for name in reversed(self._related):
            relation = self[name].relation
            if relation is not None and relation.equal:
                self._solve(name, relation, raw)
        return raw

    @staticmethod
    def _solve(name: Any, relation: Relation, raw: dict[Any, np.ndarray]) -> None:
        """Where the sum and all parts but one are known, that part is too."""
        ((expr,), (constant,)) = relation.exprs, relation.constants
        raw[name] = np.where(np.isnan(raw[name]), relation.value(raw), raw[name])
        for sign, part in expr:
            rest = sum((s * raw[n] for s, n in expr if n != part), np.zeros(1)) + constant
            raw[part] = np.where(np.isnan(raw[part]), sign * (raw[name] - rest), raw[part])

    # ------------------------------------------------------------------ there and back

    def encode(self, frame: pd.DataFrame, *, partial: bool = False) -> np.ndarray:
        """Table to float64 array, shape (rows, columns); see :meth:`Column.encode`.

        Args:
            frame: The table; columns may come in any order.
            partial: Whether absent columns count as missing cells.

        Raises:
            ValueError: If columns are absent or unknown, naming them.
        """
        absent = [c for c in self.names if c not in frame.columns]
        unknown = [c for c in frame.columns if c not in self._place]
        if unknown and partial:
            raise ValueError(f"unknown columns {unknown}; the fit had {self.names}")
        if unknown or (absent and not partial):
            raise ValueError(
                f"columns differ from those of the fit: missing {absent}, unknown {unknown}; "
                f"expected {self.names}"
            )
        raw = self._numbers(frame) if self._related else {}
        out = np.full((len(frame), len(self)), np.nan)
        for j, column in enumerate(self.columns):
            if column.name in raw and column.kind not in ("categorical", "key"):
                x = raw[column.name]
                x = x if column.relation is None else column.relation.distance(x, raw)
                out[:, j] = column.code(x)
            elif column.name in frame.columns:
                out[:, j] = column.encode(frame[column.name])
        if np.isinf(out).any():
            where = [
                c.name for c, bad in zip(self.columns, np.isinf(out).any(0), strict=True) if bad
            ]
            raise ValueError(
                f"columns {where} contain infinity; replace it by a missing value or a finite cap"
            )
        return out

    def natural(self, values: np.ndarray) -> np.ndarray:
        """Encoded rows, shape (..., columns), with the numbers that constraints replaced."""
        if not self._related:
            return values
        raw = {c.name: c.value(values[..., j]) for j, c in enumerate(self.columns)}
        for name in self._related:
            relation = self[name].relation
            assert relation is not None
            raw[name] = relation.restore(raw[name], raw)
        return np.stack([raw[c.name] for c in self.columns], -1)

    def decode(
        self, values: np.ndarray, columns: Sequence[Any] | None = None, index: Any = None
    ) -> pd.DataFrame:
        """Array, shape (rows, columns), to table."""
        import pandas as pd

        keep = self.names if columns is None else list(columns)
        raw = self.natural(values) if self._related else values
        parts = []
        for j, column in enumerate(self.columns):
            if column.name not in keep:
                continue
            if column.relation is not None:
                parts.append(column.cells(raw[:, j]))
            elif column.kind == "key":
                parts.append(column.keyed(values[:, j], values))
            else:
                parts.append(column.decode(values[:, j]))
        frame = pd.concat(parts, axis=1) if parts else pd.DataFrame(index=range(len(values)))
        names = [n for n in self.names if n in keep]
        frame.columns = pd.Index(names, tupleize_cols=len(self.index_names) > 1)
        frame.columns.names = self.index_names
        frame = frame[keep] if names != keep else frame
        return frame if index is None else frame.set_axis(index, axis=0)

    def summary(self) -> pd.DataFrame:
        """One row per column: what it is and its share of missing cells."""
        import pandas as pd

        rows = [
            dict(dtype=c.shown_type, model=c.describe(), missing=c.missing) for c in self.columns
        ]
        index = pd.Index(self.names, name="column", tupleize_cols=False)
        return pd.DataFrame(rows, index=index) if rows else pd.DataFrame()

    def to_json(self) -> list[dict[str, Any]]:
        """Plain lists and dicts, one a column."""
        return [c.to_json() for c in self.columns]

    @classmethod
    def from_json(cls, data: list[dict[str, Any]], index_names: Sequence[Any] = (None,)) -> Schema:
        """Inverse of :meth:`to_json`."""
        return cls((Column.from_json(c) for c in data), index_names)


def _zero(column: Column) -> Fraction:
    """What zero of a column's numbers stands for, in its unit."""
    return Fraction(column.origin, column.per_second)


def _warn(column: Column, series: pd.Series) -> None:
    """Say what a column looks like, and what to do."""
    labels = column.kind == "categorical"
    if not labels and column.kind != "numeric":
        return
    found = suspicion(canonical(series)[0], labels)
    if found is None:
        return
    warnings.warn(f"column {column.name!r} has {found}", stacklevel=users_line())


def as_frame(x: Any, names: Sequence[Any] | None = None) -> pd.DataFrame:
    """A DataFrame of any table, a Series, a mapping, or an array of shape (rows, columns).

    Raises:
        ValueError: If it has not two axes, or is sparse, complex or empty.
    """
    import pandas as pd

    x = read_table(x)
    if isinstance(x, pd.DataFrame):
        return x
    if hasattr(x, "toarray"):
        raise TypeError("Sparse data was passed, but dense data is required; use .toarray()")
    if isinstance(x, pd.Series):
        return x.to_frame()
    if isinstance(x, Mapping):
        return pd.DataFrame(x)
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
