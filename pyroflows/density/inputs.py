"""What users bring to an estimator of tables: frames, evidence, roles and weights, checked."""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.checks import users_line
from pyroflows.density.engine import Engine
from pyroflows.tables import Schema, as_frame
from pyroflows.tables.conditions import as_events, read_conditions
from pyroflows.tables.inputs import check_half_known, possible
from pyroflows.tables.schema import ignored

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Evidence", "Inputs", "check_settings", "count", "read_schema", "weights"]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Rows to condition on.

    Attributes:
        engine: The model, within what conditions ask for.
        values: Encoded cells, shape (N, D), NaN where they are to be found.
        good: Rows that can be conditioned on, shape (N,); the others are blank.
        frame: The cells as they came.
    """

    engine: Engine
    values: Tensor
    good: Tensor
    frame: pd.DataFrame

    @property
    def possible(self) -> Tensor:
        """The encoded cells of the good rows."""
        return self.values[self.good]

    def spread(self, x: np.ndarray) -> np.ndarray:
        """Results of the good rows among all, NaN for the others."""
        out = np.full(len(self.good), np.nan)
        out[self.good.numpy()] = x
        return out


class Inputs:
    """Tables that come to a fitted estimator.

    Args:
        owner: Name of the estimator's class, for errors.
        engine: The fitted model.
        named: Whether the fit had names that are strings.
        others: Whether a table may have other columns, which are left out.
    """

    def __init__(self, owner: str, engine: Engine, *, named: bool, others: bool) -> None:
        self.owner, self.engine, self.schema = owner, engine, engine.schema
        self.named, self.others = named, others
        self.names = [self.schema.columns[j].name for j in engine.order]

    def frame(self, x: Any, *, partial: bool = False) -> pd.DataFrame:
        """A table with the columns of the fit, or some of them.

        Raises:
            ValueError: If the names or the number of columns are others.
        """
        import pandas as pd

        named = isinstance(x, (pd.DataFrame, Mapping))
        frame = as_frame(_rows_of(x), self.schema.names)
        if named and self.others:
            frame = self._own_part(frame, partial)
        if not named:
            self._check_count(frame)
        elif not partial and all(isinstance(c, str) for c in frame.columns):
            frame = self._check_names(frame)
        return frame

    def values(self, x: Any, *, partial: bool = False) -> Tensor:
        """The encoded cells, shape (N, D), NaN where missing."""
        return self.encode(self.frame(x, partial=partial), partial=partial)

    def encode(self, frame: pd.DataFrame, *, partial: bool = False) -> Tensor:
        """Those of a checked frame."""
        return torch.from_numpy(self.schema.encode(frame, partial=partial))

    def given(self, x: Any) -> Evidence:
        """Rows and conditions to condition on.

        Targets of a conditional model are blanked, its given columns must be there.

        Raises:
            ValueError: If given columns are missing, or no row can be conditioned on.
        """
        engine, frame = self.part(x)
        scored = self.names
        if engine.num_given:
            names, scored = self.names[: engine.num_given], []
            absent = [c for c in names if c not in frame.columns]
            if absent:
                raise ValueError(
                    f"this model is conditional: the given columns {absent} are missing"
                )
            frame = frame[[c for c in frame.columns if c in names]]
        check_half_known(self.schema, frame)
        values = self.schema.encode(frame, partial=True)
        good = possible(self.schema, frame, values, scored) if len(frame) else np.ones(0, bool)
        values[~good] = np.nan
        return Evidence(engine, torch.from_numpy(values), torch.from_numpy(good), frame)

    def part(self, x: Any) -> tuple[Engine, pd.DataFrame]:
        """Some of the columns, and the model within the conditions on others."""
        x, conditions = read_conditions(x)
        return self.engine.within(conditions), self.frame(x, partial=True)

    def events(self, condition: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], bool]:
        """Conditions of which there are probabilities, and whether they are those of one row."""
        targets = self.engine.order[self.engine.num_given :]
        events = as_events(condition, [self.schema.columns[j] for j in targets])
        return events, all(np.ndim(v) == 0 for v in read_conditions(events)[0].values())

    def _own_part(self, frame: pd.DataFrame, partial: bool) -> pd.DataFrame:
        """The columns of the fit; the rest of a table is not our concern."""
        keep = [c for c in self.schema.names if c in frame.columns]
        return frame[keep] if partial or len(keep) == len(self.schema) else frame

    def _check_count(self, frame: pd.DataFrame) -> None:
        if frame.shape[1] != len(self.schema):
            raise ValueError(
                f"X has {frame.shape[1]} features, but {self.owner} is expecting "
                f"{len(self.schema)} features as input"
            )
        if self.named:
            warnings.warn(
                f"X does not have valid feature names, but {self.owner} "
                "was fitted with feature names",
                stacklevel=users_line(),
            )

    def _check_names(self, frame: pd.DataFrame) -> pd.DataFrame:
        have, want = list(frame.columns), self.schema.names
        if self.named:
            if have != want:
                raise ValueError(_other_names(have, want))
            return frame
        warnings.warn(
            f"X has feature names, but {self.owner} was fitted without feature names",
            stacklevel=users_line(),
        )
        return frame.set_axis(want, axis=1) if len(have) == len(want) else frame


def _rows_of(x: Any) -> Any:
    """A mapping of scalars is one row."""
    import pandas as pd

    if not isinstance(x, Mapping) or isinstance(x, pd.DataFrame):
        return x
    one = all(np.ndim(v) == 0 or isinstance(v, str) for v in x.values())
    return pd.DataFrame({k: [v] for k, v in x.items()} if one else x, index=[0] if one else None)


def _other_names(have: list[str], want: list[str]) -> str:
    """What scikit-learn says of names that differ."""
    differences = {
        "Feature names unseen at fit time:": sorted(set(have) - set(want)),
        "Feature names seen at fit time, yet now missing:": sorted(set(want) - set(have)),
    }
    lines = ["The feature names should match those that were passed during fit."]
    for title, names in differences.items():
        lines += [title, *(f"- {name}" for name in names)] if names else []
    if len(lines) == 1:
        lines.append("Feature names must be in the same order as they were in fit.")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- what a fit is given


def read_schema(
    frame: pd.DataFrame,
    *,
    target: Any,
    given: Any,
    changes: Mapping[Any, Any],
    constraints: Sequence[Any],
) -> tuple[Schema, list[Any]]:
    """What the columns are that are modelled, and the names of the given ones.

    Raises:
        ValueError: For names that are no columns.
    """
    unknown = [c for c in changes if c not in frame.columns]
    if unknown:
        raise ValueError(f"schema names no columns of the table: {unknown}")
    kept = [c for c in frame.columns if c not in ignored(changes)]
    targets, given = roles(kept, target, given)
    used = [c for c in kept if c in {*targets, *given}]
    own = {c: v for c, v in changes.items() if c in used}
    schema = Schema.from_frame(frame[used], own, constraints, given=given)
    half = schema.half_known(frame[used])
    if half:
        rows = {c: int(where.sum()) for c, where in half.items()}
        warnings.warn(
            f"cells that a constraint ties to a missing one tell the fit nothing: {rows}",
            stacklevel=users_line(),
        )
    return schema, given


def roles(columns: list[Any], target: Any, given: Any) -> tuple[list[Any], list[Any]]:
    """Names of the targets and of the given columns; what is not said is the rest.

    Raises:
        ValueError: If they are no columns, or the same ones.
    """
    target, given = _listed(target), _listed(given)
    if target is None:
        target = [c for c in columns if c not in (given or [])]
    elif given is None:
        given = [c for c in columns if c not in target]
    given = given or []
    unknown = [c for c in [*target, *given] if c not in columns]
    both = [c for c in target if c in given]
    if unknown or both or not target:
        raise ValueError(
            "target and given must be disjoint columns of the table, at least one target; "
            f"unknown: {unknown}, in both: {both}"
        )
    return target, given


def _listed(x: Any) -> list[Any] | None:
    if x is None:
        return None
    return [x] if isinstance(x, str) or not isinstance(x, Sequence) else list(x)


def weights(weight: Any, n: int) -> np.ndarray:
    """Whole weights count repetitions of a row; others are relative, and have mean one.

    Raises:
        ValueError: If they are no ``n`` finite, nonnegative numbers, or all zero.
    """
    if weight is None:
        return np.ones(n)
    if isinstance(weight, numbers.Real):
        weight = np.full(n, float(float(weight) > 0) if weight == weight else weight)
    out = np.array(weight, dtype=float)
    if out.ndim != 1 or len(out) != n:
        raise ValueError(
            f"Sample weights must be 1D array or scalar of length {n}; got shape {out.shape}"
        )
    if not np.isfinite(out).all() or (out < 0).any() or out.sum() == 0:
        raise ValueError("sample_weight must be finite, nonnegative and not all zero")
    whole = bool((out == np.round(out)).all()) and out.sum() <= 64 * n
    return out if whole else out / out[out > 0].mean()


def count(name: str, value: Any) -> int:
    """A positive integer."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}")
    return int(value)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Constructor arguments that have a range.

    Raises:
        ValueError: Naming the argument.
    """
    for name in ("draws", "dequantization_draws"):
        count(name, settings[name])
    for name in ("max_steps", "members", "hidden_dim", "batch_size"):
        if settings[name] is not None:
            count(name, settings[name])
    for name in ("max_time", "learning_rate"):
        value = settings[name]
        if name == "max_time" and value is None:
            continue
        if not isinstance(value, numbers.Real) or not float(value) > 0:
            raise ValueError(f"{name} must be a positive number; got {value!r}")
    if settings["missing"] not in ("ignore", "model"):
        raise ValueError(f"missing must be 'ignore' or 'model'; got {settings['missing']!r}")
