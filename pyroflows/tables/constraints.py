r"""Constraints between columns, which hold in every sample: ``"start < end"``, ``"a + b == c"``.

One column of a constraint is replaced by its distance to the others,

.. math:: x'_j = \sigma\,(x_j - \max_k e_k(x)), \qquad e_k(x) = c_k + \sum_i s_{ki} x_i,
    \quad s_{ki} = \pm 1,

nonnegative for an inequality and zero for an equation, which leaves nothing to model. The map
has Jacobian 1, so densities are those of the columns themselves.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

__all__ = ["Parsed", "Relation", "in_words", "parse_constraint"]

OPERATORS = ("<=", ">=", "==", "<", ">", "=")


@dataclasses.dataclass
class Relation:
    """What replaces a column: its distance to the largest (smallest) of linear expressions.

    Attributes:
        exprs: Each a list of (sign, name).
        constants: One number per expression.
        sign: 1 if the column lies above, -1 if below.
        equal: Whether the column is their value.
        strict: Whether it differs from them.
        step: The column's own recording step, on which results are rounded.
        anchor: A value on that lattice.
        slack: Largest rounding error that still counts as equal.
        words: The expressions as they were written.
    """

    exprs: list[list[tuple[int, Any]]]
    constants: list[float]
    sign: int = 1
    equal: bool = False
    strict: bool = False
    step: float | None = None
    anchor: float = 0.0
    slack: float = 0.0
    words: list[str] = dataclasses.field(default_factory=list)

    @property
    def names(self) -> list[Any]:
        """The other columns."""
        return list(dict.fromkeys(name for expr in self.exprs for _, name in expr))

    def value(self, x: dict[Any, np.ndarray]) -> np.ndarray:
        """The bound, NaN where a column is missing."""
        each = [
            sum((s * x[name] for s, name in expr), np.zeros(1)) + c
            for expr, c in zip(self.exprs, self.constants, strict=True)
        ]
        pick = np.maximum if self.sign > 0 else np.minimum
        return pick.reduce(np.broadcast_arrays(*each))

    def distance(self, own: np.ndarray, x: dict[Any, np.ndarray]) -> np.ndarray:
        """What replaces the column."""
        out = self.sign * (own - self.value(x))
        out = np.where(np.abs(out) <= self.slack, 0.0, out)
        if self.equal:  # a determined cell tells nothing, missing or not
            return np.where(np.isnan(out), 0.0, out)
        return out

    def restore(self, distance: np.ndarray, x: dict[Any, np.ndarray]) -> np.ndarray:
        """The column from what replaced it."""
        bound = self.value(x)
        out = bound + (0.0 if self.equal else self.sign * distance)
        if self.step:
            place = np.round((out - self.anchor) / self.step) * self.step + self.anchor
            digits = int(np.clip(5 - np.floor(np.log10(self.step)), 0, 12))
            out = np.where(np.abs(place - out) < 1e-3 * self.step, np.round(place, digits), out)
        elif self.strict and not self.equal:
            beyond = np.nextafter(bound, self.sign * np.inf)
            out = np.maximum(out, beyond) if self.sign > 0 else np.minimum(out, beyond)
        return out

    def __str__(self) -> str:
        if len(self.words) == 1:
            both = self.words[0]
        else:
            both = f"{'max' if self.sign > 0 else 'min'}({', '.join(self.words)})"
        word = "=" if self.equal else (">" if self.sign > 0 else "<") + "=" * (not self.strict)
        return f"{word} {both}"

    @classmethod
    def from_json(cls, data: Any) -> Relation:
        """From stored fields whose names are already values."""
        out = cls(**data)
        out.exprs = [[(int(s), name) for s, name in expr] for expr in out.exprs]
        return out


@dataclasses.dataclass
class Parsed:
    """``left (op) 0``: signed columns and a constant, from one constraint.

    Attributes:
        terms: (sign, name), moved to the left side.
        constant: Added to them; text if it is no number.
        op: ``"<"``, ``"<="`` or ``"=="``.
        alone: A column that stands alone on one side, or None.
        source: As it was written.
    """

    terms: list[tuple[int, Any]]
    constant: Any
    op: str
    alone: Any
    source: Any

    def solved(self, name: Any) -> tuple[list[tuple[int, Any]], int]:
        """The expression that bounds this column, and 1 if the column lies above it."""
        own = next(s for s, n in self.terms if n == name)
        return [(-s * own, n) for s, n in self.terms if n != name], -own


def in_words(expr: Sequence[tuple[int, Any]], constant: float) -> str:
    """``a - b + 2``."""
    terms = sorted(expr, key=lambda term: -term[0])
    text = " ".join(f"{'+' if s > 0 else '-'} {name}" for s, name in terms)
    number = f" {'+' if constant > 0 else '-'} {abs(constant):g}" if constant else ""
    return text.removeprefix("+ ") + number


def parse_constraint(source: Any, columns: Iterable[Any]) -> Parsed:
    """Read ``"start < end"`` or, for names that are no plain text, ``("start", "<", "end")``.

    Args:
        source: The constraint: columns and one number, joined by ``+``, ``-`` and one of
            ``<``, ``<=``, ``>``, ``>=``, ``==``.
        columns: Names of the table's columns.

    Raises:
        ValueError: If it cannot be read, naming the part.
    """
    known = list(columns)
    if isinstance(source, str):
        tokens = _tokens(source, known)
    elif isinstance(source, Sequence) and not isinstance(source, (bytes, str)):
        tokens = list(source)
    else:
        raise ValueError(f"constraint {source!r}: expected text such as 'start < end'")
    marks = [i for i, t in enumerate(tokens) if isinstance(t, str) and t in OPERATORS]
    if len(marks) != 1:
        raise ValueError(f"constraint {source!r}: expected one of {OPERATORS}, once")
    op = tokens[marks[0]]
    sides = _side(tokens[: marks[0]], known, source), _side(tokens[marks[0] + 1 :], known, source)
    if op in (">", ">="):
        sides, op = sides[::-1], op.replace(">", "<")
    (left, a), (right, b) = sides
    terms = [*left, *((-s, n) for s, n in right)]
    names = [n for _, n in terms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"constraint {source!r}: every column must stand in it once")
    alone = [side[0][1] for side in (right, left) if len(side) == 1 and side[0][0] > 0]
    constant = a - b if not isinstance(a, str) and not isinstance(b, str) else (a or b)
    return Parsed(terms, constant, "==" if op == "=" else op, next(iter(alone), None), source)


def _tokens(text: str, known: list[Any]) -> list[Any]:
    """Names, numbers and operators; a name may hold any of their characters."""
    names = sorted((str(k) for k in known if isinstance(k, str)), key=len, reverse=True)
    name = "|".join(re.escape(n) for n in names) or r"(?!)"
    pattern = rf"\s*(?:`([^`]+)`|({name})(?![\w.])|(<=|>=|==|[<>=])|(\+|-(?=\s|\D))|([^\s<>=+]+))"
    out: list[Any] = []
    for ticked, column, op, sign, rest in re.findall(pattern, text):
        out.append(ticked or column or op or sign or rest)
    return out


def _side(tokens: Sequence[Any], known: list[Any], source: Any) -> tuple[list[Any], Any]:
    """Signed columns and the constant of one side."""
    terms: list[tuple[int, Any]] = []
    constant: Any = 0.0
    sign = 1
    for token in tokens:
        if isinstance(token, str) and token in "+-" and token not in known:
            sign = -1 if token == "-" else 1
            continue
        if token in known:
            terms.append((sign, token))
        else:
            constant = _constant(token, constant, sign, source, known)
        sign = 1
    if not terms and len(tokens) == 0:
        raise ValueError(f"constraint {source!r}: a side is empty")
    return terms, constant


def _constant(token: Any, so_far: Any, sign: int, source: Any, known: list[Any]) -> Any:
    try:
        return so_far + sign * float(token)
    except (TypeError, ValueError):
        if re.fullmatch(r"\d[\w:.-]*", str(token)):
            return str(token)  # a date; the column will read it
    raise ValueError(
        f"constraint {source!r}: {token!r} is neither a column of {known} nor a number"
    )
