"""What is asked of a fitted engine: densities, draws, quantiles, means, transforms, as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.density.conditionals import Numbers
from pyroflows.density.engine import Engine, Fit, TrainingTable
from pyroflows.density.flow_engine import FlowEngine
from pyroflows.density.inputs import Evidence
from pyroflows.tables.inputs import check_half_known, fill_gaps

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "calibrate",
    "imputed",
    "intervals",
    "log_prob",
    "means",
    "noise_of",
    "pit",
    "quantiles",
    "rows_of",
    "sampled",
    "summary",
]


def log_prob(
    engine: Engine,
    frame: pd.DataFrame,
    *,
    partial: bool = False,
    pattern: bool = False,
    draws: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-density of the cells of a frame and its error, (rows,); ``-inf`` outside the support.

    Rows that break a constraint lie outside. Columns may be absent if the table is ``partial``.
    """
    schema = engine.schema
    check_half_known(schema, frame)
    values = torch.from_numpy(schema.encode(frame, partial=partial))
    nats, error = engine.log_prob(values, pattern=pattern, draws=draws)
    return np.where(schema.broken(frame), -np.inf, nats.numpy()), error.numpy()


# ---------------------------------------------------------------------- draws


def sampled(
    engine: Engine,
    n: int,
    given: Evidence | None,
    *,
    generator: torch.Generator,
    leave: bool,
) -> pd.DataFrame:
    """``n`` rows, or as many for each row of evidence."""
    if n < 0 or int(n) != n:
        raise ValueError(f"n must be a nonnegative integer; got {n}")
    n, schema = int(n), engine.schema
    options: dict[str, Any] = dict(generator=generator, leave=leave)
    if given is None:
        names = [schema.columns[j].name for j in engine.order[: engine.num_given]]
        if names:
            raise ValueError(f"this model is conditional: pass given= with the columns {names}")
        blank = torch.full((n, len(schema)), torch.nan, dtype=torch.float64)
        return schema.decode(engine.complete(blank, 1, **options)[:, 0].numpy())
    if not len(given.values) or not n:
        return schema.decode(given.values[:0].numpy())
    filled = given.values[:, None].repeat(1, n, 1)
    filled[given.good] = given.engine.complete(given.possible, n, **options)
    drawn = schema.decode(filled.flatten(0, 1).numpy())
    same = [c for c in given.frame.columns if given.frame[c].dtype == drawn[c].dtype]
    return fill_gaps(given.frame[same].iloc[np.arange(len(given.frame)).repeat(n)], drawn)


def imputed(
    engine: Engine,
    frame: pd.DataFrame,
    n: int = 1,
    *,
    draws: int | None,
    generator: torch.Generator,
) -> list[pd.DataFrame]:
    """A frame with its gaps filled in ``n`` times: by a draw of a row, or by averages of draws."""
    check_half_known(engine.schema, frame)
    values = torch.from_numpy(engine.schema.encode(frame, partial=True))
    if draws is None:
        filled = engine.complete(values, n, generator=generator)
    else:
        todo, filled = values.isnan().any(1).nonzero()[:, 0], values[:, None].clone()
        filled[todo, 0] = engine.averages(values[todo], draws, generator=generator)
    tables = (engine.schema.decode(x.numpy(), index=frame.index) for x in filled.unbind(1))
    return [fill_gaps(frame, table) for table in tables]


# ---------------------------------------------------------------------- summaries of conditionals


def quantiles(
    given: Evidence,
    q: float | Sequence[float],
    *,
    draws: int,
    generator: torch.Generator,
) -> pd.DataFrame:
    """Quantiles of the open number targets, one column each, or per (target, q)."""
    import pandas as pd

    levels = np.atleast_1d(np.asarray(q, float))
    if ((levels < 0) | (levels > 1)).any():
        raise ValueError(f"q must lie in [0, 1]; got {q}")
    engine, values, schema = given.engine, given.possible, given.engine.schema
    exact, filled = _alone(engine, values), None
    out: dict[Any, np.ndarray] = {}
    for j in _open(engine, values):
        column = schema.columns[j]
        law = engine.conditional(values, j) if j == exact and not column.relation else None
        if isinstance(law, Numbers):
            p = torch.as_tensor(levels).expand(len(values), -1)
            found = law.quantile(p).numpy().T
        else:
            if filled is None:
                drawn = engine.complete(values, draws, generator=generator)
                filled = schema.natural(drawn.numpy())
            method = "inverted_cdf" if column.step else "linear"
            found = np.quantile(filled[:, :, j], levels, axis=1, method=method)
        for level, x in zip(levels, found, strict=True):
            name = (column.name, float(level)) if np.ndim(q) else column.name
            out[name] = _times(column, given.spread(x))
    frame = pd.DataFrame(out, index=given.frame.index)
    if np.ndim(q):
        frame.columns = pd.MultiIndex.from_tuples(frame.columns, names=["column", "q"])
    return frame


def intervals(pairs: pd.DataFrame) -> pd.DataFrame:
    """Columns (target, "lower") and (target, "upper") of two quantiles each."""
    names = [(name, side) for name in pairs.columns.unique(0) for side in ("lower", "upper")]
    index = type(pairs.columns).from_tuples(names, names=["column", "end"])
    return pairs.set_axis(index, axis=1)


def means(given: Evidence, *, draws: int, generator: torch.Generator) -> pd.DataFrame:
    """Means of the open number targets."""
    import pandas as pd

    engine, values, schema = given.engine, given.possible, given.engine.schema
    places = _open(engine, values)
    filled = engine.averages(values, draws, generator=generator).numpy()
    if any(len(c.relation.exprs) > 1 for c in schema if c.relation is not None):
        drawn = engine.complete(values, draws, generator=generator)
        filled = schema.natural(drawn.numpy()).mean(1)  # the largest of means is no mean of it
    else:
        filled = schema.natural(filled)
    columns = {j: schema.columns[j] for j in places}
    return pd.DataFrame(
        {c.name: _times(c, given.spread(filled[:, j])) for j, c in columns.items()},
        index=given.frame.index,
    )


def pit(engine: Engine, frame: pd.DataFrame, generator: torch.Generator) -> pd.DataFrame:
    """Probability integral transforms of the number targets, one column each."""
    import pandas as pd

    values = torch.from_numpy(engine.schema.encode(frame))
    told = engine.pit(values, generator=generator)
    names = {engine.schema.columns[j].name: u.numpy() for j, u in told.items()}
    return pd.DataFrame(names, index=frame.index)


def _alone(engine: Engine, values: Tensor) -> int | None:
    """The target that every row misses first, with nothing observed after it, if any."""
    targets = engine.order[engine.num_given :]
    gone = values[:, targets].isnan()
    first = gone.long().argmax(1)
    if len(gone) and bool((first == first[0]).all()) and bool(gone[:, first[0] :].all()):
        return targets[int(first[0])]
    return None


def _open(engine: Engine, values: Tensor) -> list[int]:
    """The number targets that are missing in every row, in the model's order."""
    gone, columns = values.isnan().all(0), engine.schema.columns
    targets = engine.order[engine.num_given :]
    places = [j for j in targets if bool(gone[j]) and not columns[j].is_label]
    if not places:
        raise ValueError(
            "no number column is left to predict: leave the wanted columns out of given"
        )
    return places


def _times(column: Any, x: np.ndarray) -> Any:
    """Numbers of a datetime column as datetimes, others as they are."""
    return column.cells(x).to_numpy() if column.kind == "datetime" or column.origin else x


# ---------------------------------------------------------------------- noise of a flow


def noise_of(engine: FlowEngine, frame: pd.DataFrame) -> pd.DataFrame:
    """The noise from which the flow makes the rows' numbers, one column a number."""
    import pandas as pd

    noise = engine.noise(torch.from_numpy(engine.schema.encode(frame))).numpy()
    names = [engine.schema.columns[j].name for j in engine.numbers.columns]
    return pd.DataFrame(noise, index=frame.index, columns=names)


def rows_of(engine: FlowEngine, noise: Any, frame: pd.DataFrame | None) -> pd.DataFrame:
    """The rows that noise makes, of the context that a frame has."""
    noise, schema, index = torch.as_tensor(np.array(noise, float)), engine.schema, None
    values = np.full((len(noise), len(schema)), np.nan)
    if frame is not None:
        values, index = schema.encode(frame, partial=True), frame.index
    rows = engine.from_noise(noise, torch.from_numpy(values)).numpy()
    return schema.decode(rows, index=index)


# ---------------------------------------------------------------------- held-out rows


def calibrate(
    engine: Engine, table: TrainingTable, fit: Fit, rows: int = 2000
) -> tuple[Any, list[float]]:
    """Quantiles of the held-out rows' log-densities, at 201 levels, and each target's mean nats.

    Of all rows where none was held out.
    """
    few = (fit.held if len(fit.held) else torch.arange(len(table)))[:rows]
    values, weight = table.values[few], table.weight[few]
    nats = engine.column_log_prob(values)
    score = nats.sum(0)
    if bool(values.isnan().any() | score.isnan().any()):
        score = engine.log_prob(values, draws=16)[0]
    score, order = score.sort()
    below = weight[order].cumsum(0)
    place = torch.linspace(0, 1, 201, dtype=below.dtype) * (below[-1] - weight[order[-1]])
    there = ~values[:, engine.order[engine.num_given :]].T.isnan()
    known = (there * weight).sum(1).clamp_min(1e-9)
    mean = ((nats * weight).sum(1) / known).tolist()
    quantiles = np.interp(place.numpy(), (below - weight[order]).numpy(), score.numpy())
    return quantiles, mean


def summary(engine: Engine, nats: Sequence[float]) -> pd.DataFrame:
    """One row per column: its role, kind, share of missing cells, place, and held-out nats."""
    schema, given = engine.schema, engine.num_given
    names = [schema.columns[j].name for j in engine.order]
    place = {name: i for i, name in enumerate(names)}
    told = dict(zip(names[given:], nats, strict=True))
    frame = schema.summary()
    role = ["given" if place[n] < given else "target" for n in frame.index]
    frame.insert(0, "role", role)
    frame["place"] = [place[n] for n in frame.index]
    frame["nats"] = [told.get(n, math.nan) for n in frame.index]
    return frame
