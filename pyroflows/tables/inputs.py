"""Tables that users bring to a fitted schema: evidence that can be, gaps that are filled."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from pyroflows.checks import users_line
from pyroflows.tables.columns import Column
from pyroflows.tables.schema import Schema

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["check_half_known", "fill_gaps", "possible"]


def fill_gaps(frame: pd.DataFrame, filled: pd.DataFrame) -> pd.DataFrame:
    """The cells of ``frame``, and those of ``filled`` where it has none.

    Observed cells are the very ones of ``frame``, in its dtype where that can hold the others.

    Args:
        frame: The table as it came; some columns may be absent.
        filled: The same rows with all columns.
    """
    out = filled.copy()
    for place, name in enumerate(filled.columns):
        if name in frame.columns:
            own = frame[name].set_axis(filled.index)
            out.isetitem(place, _filled(own, filled.iloc[:, place]))
    return out


def _filled(own: pd.Series, other: pd.Series) -> pd.Series:
    import pandas as pd

    gap = own.isna().to_numpy()
    if not gap.any():
        return own
    if gap.all():
        return other
    if isinstance(own.dtype, pd.SparseDtype):
        return _filled(own.sparse.to_dense(), other).astype(own.dtype)
    if isinstance(own.dtype, pd.CategoricalDtype):
        fresh = [v for v in other[gap].dropna().unique() if v not in own.cat.categories]
        own = own.cat.add_categories(fresh) if fresh else own
        return own.where(~gap, other.astype(own.dtype))
    if own.dtype == other.dtype:
        return own.where(~gap, other)
    try:
        new = other[gap].astype(own.dtype)
    except (TypeError, ValueError):  # e.g. objects among numbers: nothing but objects holds both
        own, new = own.astype(object), other[gap].astype(object)
    out = own.copy()
    out[gap] = new
    return out


def possible(
    schema: Schema, frame: pd.DataFrame, values: np.ndarray, scored: Iterable[Any]
) -> np.ndarray:
    """Rows whose cells the fitted model can be conditioned on, shape (rows,).

    Args:
        schema: Of the fit.
        frame: Cells to condition on.
        values: Their encoding, shape (rows, columns).
        scored: Columns that must also lie within their bounds.

    Raises:
        ValueError: If no row can be, naming column, value and bound.

    Warns:
        UserWarning: If some rows cannot be; the caller gives them no draws.
    """
    good = np.ones(len(frame), dtype=bool)
    said = []
    scored = set(scored)
    for j, column in enumerate(schema):
        if column.name not in frame.columns:
            continue
        bad, why = _impossible(column, values[:, j], column.name in scored)
        if bad.any():
            cells = list(dict.fromkeys(frame[column.name][bad].tolist()))
            shown = ", ".join(repr(c) for c in cells[:5]) + (", ..." if len(cells) > 5 else "")
            said.append(f"column {column.name!r} has no {why(shown)}")
            good &= ~bad
    broken = schema.broken(frame)
    if broken.any():
        told = ", ".join(f"{c.name!r} {c.relation}" for c in schema if c.relation is not None)
        said.append(f"{int(broken.sum())} rows break a constraint ({told})")
        good &= ~broken
    if said and not good.any():
        raise ValueError("; ".join(said))
    if said:
        warnings.warn(
            f"{int((~good).sum())} of {len(good)} rows cannot be conditioned on and get missing "
            f"cells: {'; '.join(said)}",
            stacklevel=users_line(),
        )
    return good


def _impossible(column: Column, x: np.ndarray, scored: bool) -> tuple[np.ndarray, Any]:
    if column.is_label:
        one = "value" if column.kind == "discrete" else "label"
        return x == max(len(column.levels), 1), lambda c: f"{one} [{c}]; it has {column.few()}"
    low = -np.inf if column.lower is None else column.lower
    high = np.inf if column.upper is None else column.upper
    if not scored:
        return np.zeros(len(x), dtype=bool), None
    ends = f"{column.shown(column.lower)} to {column.shown(column.upper)}"
    it, its = ("it", "its") if column.relation is None else ("the difference", "the difference's")
    bounds = (
        f"{its} smallest possible value is {column.shown(low)}"
        if column.upper is None
        else f"{its} largest possible value is {column.shown(high)}"
        if column.lower is None
        else f"{it} goes from {ends}"
    )
    slack = 1e-6 * (column.step or 0.0)
    return (x < low - slack) | (x > high + slack), lambda c: f"value {c}; {bounds}"


def check_half_known(schema: Schema, frame: pd.DataFrame) -> None:
    """Refuse rows where a constraint ties a known cell to a missing one.

    Raises:
        ValueError: Naming the columns.
    """
    for name, where in schema.half_known(frame).items():
        relation = schema[name].relation
        row = int(np.flatnonzero(where)[0])
        raise ValueError(
            f"{int(where.sum())} rows (the first is row {row}) have column {name!r} but lack "
            f"others that the constraint {name!r} {relation} ties it to; leave out both or none"
        )
