"""Why a row is odd: what each of its cells was expected to be, and how odd it is."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.density.cellwise import target_names
from pyroflows.density.completions import averages
from pyroflows.density.conditionals import Labels
from pyroflows.density.model import TableModel
from pyroflows.density.oddness import Oddness
from pyroflows.density.others import given_others
from pyroflows.density.pictures import picture
from pyroflows.density.surprise import (
    STATISTICS,
    STRANGE,
    distance,
    expected,
    gap_or_tail,
    judged,
    own_cells,
    stranger,
)
from pyroflows.density.uniforms import Uniforms
from pyroflows.tables import Schema
from pyroflows.tables.inputs import check_half_known

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FIELDS", "Explanation", "calibrated", "explain"]

NAMED = 3  # labels of a set that are written out
FIELDS = ("value", "expected", "lower", "upper", "log_density", "tail")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What is odd about the rows of a table.

    Attributes:
        table: The rows; columns (column, field), fields ``value`` (as it came), ``expected`` (the
            most probable label, the median of a number), ``lower`` and ``upper`` (of numbers, at
            the ``coverage``), ``log_density``, and ``tail``: the share of held-out rows whose
            cell is at least as surprising, NaN where it is missing.
        rows: Series, the share of held-out rows that are at least as odd as the row.
        labels: For each label column, the labels that hold the ``coverage``, as text.
        coverage: Of the intervals.
    """

    table: pd.DataFrame
    rows: pd.Series
    labels: dict[Any, list[str]]
    coverage: float

    @property
    def tail(self) -> pd.DataFrame:
        """Tail probabilities, one column a column."""
        return self.table.xs("tail", axis=1, level=1)

    def top(self, n: int = 10) -> pd.DataFrame:
        """The most surprising cells, most surprising first.

        Columns ``row``, ``column``, ``value``, ``expected``, ``range`` and ``tail``; ``range`` is
        the interval of a number, the most probable labels of a label.
        """
        import pandas as pd

        tail = self.tail
        flat = tail.to_numpy().ravel()
        order = np.argsort(np.where(np.isnan(flat), np.inf, flat), kind="stable")[: max(int(n), 0)]
        cells = [divmod(int(k), tail.shape[1]) for k in order if not np.isnan(flat[k])]
        names = list(tail.columns)
        return pd.DataFrame(
            [
                dict(
                    row=tail.index[i],
                    column=names[j],
                    value=self._at(i, names[j], "value"),
                    expected=self._at(i, names[j], "expected"),
                    range=self.range(i, names[j]),
                    tail=float(tail.iat[i, j]),
                )
                for i, j in cells
            ],
            columns=["row", "column", "value", "expected", "range", "tail"],
        )

    def range(self, i: int, column: Any) -> str:
        """The interval of a number in the i-th row, or its most probable labels, as text."""
        if column in self.labels:
            return self.labels[column][i]
        low, high = (shown(self._at(i, column, end)) for end in ("lower", "upper"))
        return f"{low} to {high}"

    def plot(self, row: Any = None, **options: Any) -> Any:
        """One row's cells against their intervals; see :func:`pyroflows.plots.explanation`.

        Args:
            row: Label of the row; default the oddest one.
            options: Of that function.
        """
        return picture("explanation", self, row, **options)

    def _at(self, i: int, column: Any, field: str) -> Any:
        return self.table[(column, field)].iloc[i]

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"{self._title()}\n{self.top().to_string(index=False)}"

    def _repr_html_(self) -> str:
        return f"<p>{self._title()}</p>{self.top().to_html(index=False)}"

    def _title(self) -> str:
        return f"The most surprising cells of {len(self)} rows (range: {self.coverage:.0%})"


def calibrated(oddness: Oddness | None) -> Oddness:
    """What held-out rows said, which files of older versions lack."""
    if oddness is None:
        raise ValueError(
            "this model was saved by a version that kept no calibration of cells; fit it again"
        )
    return oddness


def shown(value: Any) -> str:
    """A cell as text; a day without its midnight."""
    if isinstance(value, (float, np.floating)):
        return f"{value:.6g}"
    return str(value).removesuffix(" 00:00:00")


@dataclasses.dataclass
class _Verdicts:
    """Of the cells of N rows and T targets: numbers of shape (N, T), most probable codes.

    Distances have shape (3, N, T).
    """

    odd: Tensor
    far: Tensor
    nats: Tensor
    lower: Tensor
    middle: Tensor
    upper: Tensor
    codes: list[Tensor]  # up to NAMED codes of each row, (N, k); (N, 0) for numbers
    count: Tensor  # how many codes hold the coverage

    @classmethod
    def blank(cls, n: int, t_count: int) -> _Verdicts:
        """Nothing known."""
        odd, nats, *ends = torch.full((5, n, t_count), torch.nan, dtype=torch.float64)
        far = torch.full((STATISTICS - 1, n, t_count), torch.nan, dtype=torch.float64)
        codes = [torch.zeros(n, 0)] * t_count
        low, middle, high = ends
        return cls(odd, far, nats, low, middle, high, codes, torch.zeros(n, t_count).long())

    def note(self, rows: Tensor, t: int, law: Any, x: Tensor, odd: Tensor, cover: float) -> None:
        """Write down what a distribution says of the cells x of target t."""
        self.odd[rows, t], self.far[:, rows, t] = odd, distance(law, x, odd)
        self.nats[rows, t] = torch.where(x.isnan(), torch.nan, law.log_prob(x.nan_to_num(0.0)))
        if not isinstance(law, Labels):
            p = torch.tensor([0.5 - cover / 2, 0.5, 0.5 + cover / 2], dtype=torch.float64)
            ends = law.quantile(p.repeat(len(x), 1))
            self.lower[rows, t], self.middle[rows, t], self.upper[rows, t] = ends.T
            return
        self.middle[rows, t] = expected(law)
        share, code = law.log_table().exp().sort(1, descending=True)
        if not self.codes[t].shape[1]:
            self.codes[t] = torch.zeros(len(self.odd), min(NAMED, share.shape[1]))
        self.codes[t][rows] = code[:, :NAMED].float()
        self.count[rows, t] = (share.cumsum(1) < cover).sum(1) + 1


@torch.no_grad()
def explain(
    model: TableModel,
    oddness: Oddness,
    frame: pd.DataFrame,
    *,
    given: str = "earlier",
    coverage: float = 0.9,
    pattern: bool = False,
) -> Explanation:
    """See :meth:`pyroflows.density.DensityEstimator.explain`."""
    import pandas as pd

    if given not in ("others", "earlier"):
        raise ValueError(f"given must be 'others' or 'earlier'; got {given!r}")
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must lie in (0, 1); got {coverage}")
    schema = model.schema
    check_half_known(schema, frame)
    values = torch.from_numpy(schema.encode(frame))
    found = _Verdicts.blank(len(values), len(model.targets))
    early = torch.empty(STATISTICS, *found.odd.shape, dtype=torch.float64)
    for part in torch.arange(len(values)).split(model.chunk):
        for t, law, odd in judged(model, values[part], pattern=pattern):
            own = own_cells(model, values[part], t)
            early[0, part, t], early[1:, part, t] = odd, distance(law, own, odd)
            if given == "earlier":
                found.note(part, t, law, own, odd, coverage)
    if given == "others":
        _among_others(found, model, values, coverage, pattern)
    nats = oddness(early)
    nats[torch.from_numpy(schema.broken(frame))] = torch.inf
    rows = pd.Series((-nats).exp().numpy(), frame.index, name="tail")
    found.odd = oddness.calibrated(torch.cat([found.odd[None], found.far]))
    return _assembled(found, model, frame, values, rows, coverage)


def _among_others(
    found: _Verdicts, model: TableModel, values: Tensor, coverage: float, pattern: bool
) -> None:
    """Judge each cell by all others; then once more by those that are no strangers."""
    every = torch.arange(len(values))
    own = values[:, model.order[model.num_given :]]
    free = torch.zeros_like(own, dtype=torch.bool)
    for again in (False, True):
        rows = free.any(1).nonzero()[:, 0] if again else every
        if not len(rows):
            return
        doubtful = free | (found.odd > -math.log(STRANGE))
        context = _freed(model, values[rows], free[rows], doubtful[rows]) if again else values
        for t, c in enumerate(model.targets):
            mine = (~free[rows, t]).nonzero()[:, 0] if again else every
            if not len(mine):
                continue
            law, at = given_others(model, context[mine], t), rows[mine]
            odd = gap_or_tail(law, own[at, t], pattern)
            found.note(at, t, law, own[at, t], odd, coverage)
            if not again:
                free[:, t] = stranger(c, own[:, t], odd)


def _freed(model: TableModel, values: Tensor, free: Tensor, doubtful: Tensor) -> Tensor:
    """Rows whose strangers have been replaced by what cells expect that are not doubtful."""
    targets = torch.tensor(model.order[model.num_given :])
    out = values.clone()
    out[:, targets] = out[:, targets].masked_fill(doubtful, torch.nan)
    filled = averages(model, out, 256, Uniforms(0))
    out[:, targets] = torch.where(free, filled[:, targets], values[:, targets])
    return out


def _assembled(
    found: _Verdicts,
    model: TableModel,
    frame: pd.DataFrame,
    values: Tensor,
    rows: pd.Series,
    coverage: float,
) -> Explanation:
    """The verdicts as a table of the original types."""
    import pandas as pd

    schema, broken = model.schema, model.schema.breaks(frame)
    parts, keys, labels = [], [], {}
    for name in target_names(model):
        j = schema.names.index(name)
        t = model.order.index(j) - model.num_given
        bad = broken.get(name, np.zeros(len(frame), bool))
        middle, lower, upper = (
            _decoded(schema, values, j, x[:, t]) for x in (found.middle, found.lower, found.upper)
        )
        nats = np.where(bad, -np.inf, found.nats[:, t].numpy())
        tail = np.where(bad, 0.0, (-found.odd[:, t]).exp().numpy())
        cells = (frame[name], middle, lower, upper, pd.Series(nats), pd.Series(tail))
        parts += [x.set_axis(frame.index) for x in cells]
        keys += [(name, field) for field in FIELDS]
        if schema.columns[j].is_label and schema.columns[j].relation is None:
            labels[name] = _named(schema, j, found.codes[t], found.count[:, t].tolist())
    table = pd.concat(parts, axis=1)
    table.columns = pd.MultiIndex.from_tuples(keys, names=["column", "field"])
    return Explanation(table, rows, labels, coverage)


def _decoded(schema: Schema, values: Tensor, j: int, x: Tensor) -> pd.Series:
    """Codes of column j as its cells, in rows whose other cells are as they were."""
    name = schema.columns[j].name
    rows = values.clone()
    rows[:, j] = x
    return schema.decode(rows.numpy(), [name])[name]


def _named(schema: Schema, j: int, codes: Tensor, count: list[int]) -> list[str]:
    """The most probable labels of each row as text."""
    n, most = codes.shape
    if not codes.numel():
        return [""] * n
    names = schema.columns[j].decode(codes.double().flatten().numpy()).astype(object)
    return [
        ", ".join(map(str, row[:k])) + (f" and {k - most} more" if k > most else "")
        for row, k in zip(np.asarray(names).reshape(n, most), count, strict=True)
    ]
