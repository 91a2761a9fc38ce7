"""Conditions on cells: a range, one of some values, or whatever a function takes.

In a mapping of columns, as ``given=`` takes it,

- ``(low, high)`` is a closed range, None an open end: ``{"age": (18, None)}``;
- a set, or :func:`one_of`, is one of these values: ``{"country": {"DE", "FR"}}``;
- a function, or :func:`where`, takes the cells of the column as a Series and tells which will do:
  ``{"name": lambda cells: cells.str.startswith("A")}``;
- a scalar is that value.

Beside any of these a list is a set too: ``{"age": (18, 30), "country": ["DE", "FR"]}``. A mapping
without them, of lists or arrays, is a table of rows; arrays and Series are columns of rows always.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyroflows.tables.columns import Column

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Codes",
    "Condition",
    "Interval",
    "Points",
    "Predicate",
    "Region",
    "as_events",
    "between",
    "one_of",
    "read_conditions",
    "where",
]


# ---------------------------------------------------------------------- encoded cells


@dataclasses.dataclass(frozen=True)
class Region:
    """Some of the encoded values of a column."""


@dataclasses.dataclass(frozen=True)
class Codes(Region):
    """Labels: whether each of the C codes is in it, shape (C,)."""

    allowed: np.ndarray


@dataclasses.dataclass(frozen=True)
class Points(Region):
    """Numbers that are these values, shape (Q,)."""

    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Interval(Region):
    """Numbers from ``low`` to ``high``, both included."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Predicate(Region):
    """Numbers, shape (n,), of which ``holds`` says so, shape (n,)."""

    holds: Callable[[np.ndarray], np.ndarray]


# ---------------------------------------------------------------------- what users write


class Condition(abc.ABC):
    """What the cells of a column must be."""

    @abc.abstractmethod
    def holds(self, column: Column, numbers: np.ndarray) -> np.ndarray:
        """Which numbers or codes of a column, shape (n,), fulfil it; missing ones do not."""

    def region(self, column: Column) -> Region:
        """The same for encoded cells.

        Raises:
            ValueError: If no cell of the column can fulfil it, naming column and condition.
        """
        if column.kind == "key":
            raise ValueError(f"column {column.name!r} holds keys, which are not modelled")
        if not column.is_label:
            return self._numbers(column)
        size = max(len(column.levels), 1)
        known = np.arange(len(column.levels))
        allowed = np.zeros(size, dtype=bool)
        allowed[known] = self.holds(column, column.value(known.astype(float)))
        if not allowed.any():
            raise ValueError(f"column {column.name!r} has no {self}; it has {column.few()}")
        return Codes(allowed)

    @abc.abstractmethod
    def _numbers(self, column: Column) -> Region:
        """The region of a column of numbers."""


@dataclasses.dataclass(frozen=True)
class _Between(Condition):
    low: Any
    high: Any

    def _ends(self, column: Column) -> tuple[float, float]:
        if column.kind == "categorical" and not column.ordered:
            raise ValueError(
                f"column {column.name!r} holds labels without an order, so that nothing lies "
                f"{self}; for 'one of these' write a list or a set"
            )
        low = -np.inf if self.low is None else _number(column, self.low)
        high = np.inf if self.high is None else _number(column, self.high)
        for end, number in ((self.low, low), (self.high, high)):
            if column.kind == "categorical" and number == len(column.levels):
                raise ValueError(
                    f"column {column.name!r} has no label {end!r}; it has {column.few()}"
                )
        if not low <= high:
            raise ValueError(f"column {column.name!r}: the range {self} is empty")
        return low, high

    def holds(self, column: Column, numbers: np.ndarray) -> np.ndarray:
        low, high = self._ends(column)
        return (numbers >= low) & (numbers <= high)

    def _numbers(self, column: Column) -> Region:
        low, high = self._ends(column)
        lower = -np.inf if column.lower is None else column.lower
        upper = np.inf if column.upper is None else column.upper
        atoms = np.asarray(column.atoms, float)
        atom = ((atoms >= low) & (atoms <= high)).any()
        if not atom and (high < lower or low > upper):
            raise ValueError(
                f"column {column.name!r} has no value {self}; it goes from "
                f"{column.shown(column.lower)} to {column.shown(column.upper)}"
            )
        if column.step:
            place = (np.array([low, high]) - column.anchor) / column.step
            first, last = np.ceil(place[0] - 1e-6), np.floor(place[1] + 1e-6)
            if first > last and not atom:
                raise ValueError(
                    f"column {column.name!r} has no value {self}: it goes by steps of "
                    f"{column.step:g}"
                )
        return Interval(low, high)

    def __str__(self) -> str:
        if self.low is None:
            return f"up to {self.high!r}"
        return f"from {self.low!r}" + ("" if self.high is None else f" to {self.high!r}")


@dataclasses.dataclass(frozen=True)
class _OneOf(Condition):
    values: tuple[Any, ...]

    def holds(self, column: Column, numbers: np.ndarray) -> np.ndarray:
        own = np.array([_number(column, v) for v in self.values])
        if column.is_label:
            self._refuse(column, ~np.isin(own, column.value(np.arange(len(column.levels)))))
        return np.isin(numbers, own)

    def _numbers(self, column: Column) -> Region:
        own = np.unique([_number(column, v) for v in self.values])
        atom = np.isin(own, column.atoms)
        beyond = own < (-np.inf if column.lower is None else column.lower)
        beyond |= own > (np.inf if column.upper is None else column.upper)
        if column.step:
            place = (own - column.anchor) / column.step
            beyond |= np.abs(place - np.round(place)) > 1e-3
        self._refuse(column, beyond & ~atom, own)
        # beside values of their own probability, single values of a density have none
        return Points(own[atom] if atom.any() and not column.step else own)

    def _refuse(self, column: Column, bad: np.ndarray, own: np.ndarray | None = None) -> None:
        if bad.any():
            values = self.values if own is None else [column.shown(v) for v in own]
            worst = values[int(np.flatnonzero(bad)[0])]
            has = f"has {column.few()}" if column.is_label else column.describe()
            raise ValueError(f"column {column.name!r} has no value {worst!r}; it {has}")

    def __str__(self) -> str:
        return f"one of {list(self.values)}"


@dataclasses.dataclass(frozen=True)
class _Where(Condition):
    predicate: Callable[[Any], Any]

    def holds(self, column: Column, numbers: np.ndarray) -> np.ndarray:
        import pandas as pd

        known = ~np.isnan(numbers)
        cells = column.restored(numbers[known])
        found = np.asarray(self.predicate(cells))
        if found.dtype == object:  # what is missing is not True
            found = np.where(pd.isna(found), False, found)
            if all(isinstance(v, (bool, np.bool_)) for v in found.flat):
                found = found.astype(bool)
        if found.shape != (int(known.sum()),) or found.dtype != bool:
            raise ValueError(
                f"column {column.name!r}: the function in given= must return True or False for "
                f"each of {int(known.sum())} cells; got {found.dtype} of shape {found.shape}"
            )
        out = np.zeros(len(numbers), dtype=bool)
        out[known] = found
        return out

    def _numbers(self, column: Column) -> Region:
        return Predicate(lambda x: self.holds(column, x))

    def __str__(self) -> str:
        return "value of which the function in given= holds"


def between(low: Any = None, high: Any = None) -> Condition:
    """Cells from ``low`` to ``high``, both included; None for an open end.

    Of numbers, times, and ordered labels.
    """
    return _Between(low, high)


def one_of(values: Iterable[Any]) -> Condition:
    """Cells that are one of these values."""
    found = tuple(values)
    if not found:
        raise ValueError("one_of: expected at least one value; got none")
    return _OneOf(found)


def where(predicate: Callable[[pd.Series], Any]) -> Condition:
    """Cells of which a function holds.

    Args:
        predicate: From a Series of cells, as they stand in the table, to booleans, one a cell.
            It is called with cells that the table never had.
    """
    return _Where(predicate)


def _number(column: Column, value: Any) -> float:
    """The number, or the code of a label, that stands for a cell."""
    import pandas as pd

    if column.kind == "categorical":
        code = column.encode(pd.Series([value], name=column.name, dtype=object))[0]
        return float(code)
    return float(column.raw(pd.Series([value], name=column.name))[0])


# ---------------------------------------------------------------------- mappings


def read_conditions(given: Any) -> tuple[Any, dict[Any, Condition]]:
    """Divide a mapping into cells to be as they are, and conditions by column.

    Args:
        given: What users bring; see the head of this module.

    Returns:
        Rows: a mapping of scalars and of columns, or what came if it is none. And the conditions.

    Raises:
        ValueError: If it may be read in more than one way.
    """
    if not isinstance(given, Mapping) or hasattr(given, "columns"):
        return given, {}
    marked = {name for name, value in given.items() if _is_condition(value)}
    if not marked:
        sizes = {name: len(v) for name, v in given.items() if isinstance(v, (list, tuple))}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"given: lists of different lengths {sizes} are no table of rows; for 'one of "
                "these' write sets, e.g. {'country': {'DE', 'FR'}}"
            )
        return given, {}
    conditions = {n: _condition(n, v) for n, v in given.items() if n in marked or _is_list(v)}
    rows = {name: value for name, value in given.items() if name not in conditions}
    return rows, conditions


def as_events(given: Mapping[Any, Any], columns: Iterable[Column]) -> dict[Any, Any]:
    """Conditions of which each has a probability: equal to a scalar is one of one.

    Args:
        given: As for :func:`read_conditions`.
        columns: Those that are modelled; others stay as they are.

    Raises:
        ValueError: If single values of a density are asked for, which have no probability.
    """
    if not isinstance(given, Mapping) or hasattr(given, "columns"):
        raise TypeError(f"expected conditions by column in a dict; got {type(given).__name__}")
    out = dict(given)
    for column in columns:
        if column.name not in given:
            continue
        value = given[column.name]
        if hasattr(value, "dtype") and np.ndim(value):
            raise ValueError(
                f"column {column.name!r}: expected one condition; got an array of "
                f"{np.shape(value)}; log_marginal takes rows"
            )
        if not _is_condition(value):
            value = one_of(value if _is_list(value) else [value])
        value = _condition(column.name, value)
        if isinstance(value, _OneOf) and not (column.is_label or column.step):
            region = value.region(column)
            if not np.isin(getattr(region, "values", ()), column.atoms).all():
                raise ValueError(
                    f"column {column.name!r} is continuous: a single value has a density but no "
                    "probability; give a range (low, high), or ask log_marginal for the density"
                )
        out[column.name] = value
    return out


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, range))


def _is_condition(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) == 2
    return isinstance(value, (Condition, set, frozenset)) or callable(value)


def _condition(name: Any, value: Any) -> Condition:
    if isinstance(value, Condition):
        return value
    if callable(value):
        return where(value)
    if isinstance(value, tuple):
        if len(value) != 2:
            raise ValueError(
                f"given: column {name!r} has a tuple of {len(value)}; a range has two ends, and "
                "'one of these' is a list or a set"
            )
        return between(*value)
    if not len(value):
        raise ValueError(f"given: column {name!r} has an empty set; no cell is one of none")
    return one_of(value)
