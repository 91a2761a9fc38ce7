"""The log-density of a row, cell by cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyroflows.density.engine import Engine
from pyroflows.density.model import TableModel
from pyroflows.density.particles import gaps
from pyroflows.tables.inputs import check_half_known

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["cell_log_prob", "exact_model", "score_columns", "target_names"]


def exact_model(engine: Engine, what: str) -> TableModel:
    """The model of an engine whose conditionals are all exact.

    Raises:
        ValueError: For another engine, saying what to do.
    """
    if engine.exact is None:
        raise ValueError(
            f"{what} needs the exact conditionals of the default engine, which "
            f"{type(engine).__name__} has not; fit a DensityEstimator(flow=None) for it"
        )
    return engine.exact


def target_names(model: TableModel) -> list[object]:
    """The modelled columns, in the table's order."""
    return [model.schema.columns[j].name for j in sorted(model.order[model.num_given :])]


def score_columns(
    model: TableModel, frame: pd.DataFrame, *, pattern: bool, draws: int
) -> pd.DataFrame:
    """Log-density of each target cell given the earlier ones; one column a target.

    Args:
        model: Fitted.
        frame: Rows of the columns of the fit.
        pattern: Whether missing cells are part of the row; each column then also holds the
            log-probability that its cell is missing, or that it is not.
        draws: As in :meth:`pyroflows.density.model.TableModel.log_prob`.
    """
    import pandas as pd

    schema = model.schema
    check_half_known(schema, frame)
    values = torch.from_numpy(schema.encode(frame))
    names = [schema.columns[j].name for j in model.order[model.num_given :]]
    nats = cell_log_prob(model, values, pattern=pattern, draws=draws).numpy()
    for name, bad in schema.breaks(frame).items():
        if name in names:
            nats[bad, names.index(name)] = -np.inf
    wanted = target_names(model)
    index = pd.Index(wanted, tupleize_cols=len(schema.index_names) > 1)
    out = pd.DataFrame(nats[:, [names.index(n) for n in wanted]], frame.index, index)
    out.columns.names = schema.index_names
    return out


@torch.no_grad()
def cell_log_prob(
    model: TableModel, values: Tensor, *, pattern: bool = False, draws: int = 64
) -> Tensor:
    """Log-density of target cells given the earlier observed ones, shape (N, T), model order.

    NaN where missing, unless ``pattern``. A row's cells sum to its log-density: where gaps come
    before a cell, its part is the difference that it makes to the density of the observed cells.
    """
    out = torch.empty(len(values), len(model.targets), dtype=torch.float64)
    for part in torch.arange(len(values)).split(4096):
        rows = model.encode(values[part])
        log_p, log_m = model.column_log_prob(rows)
        out[part] = (log_p + log_m if pattern else log_p.masked_fill(rows.missing, torch.nan)).T
        if not pattern:
            _with_gaps(out, model, values, part, draws)
    return out


def _with_gaps(out: Tensor, model: TableModel, values: Tensor, part: Tensor, draws: int) -> None:
    """Integrate the gaps before a cell out: log p(cells up to it) - log p(cells before it)."""
    missing, last, _ = gaps(model, values[part])
    first = torch.where(last >= 0, missing.long().argmax(1), len(model.order))
    known = torch.zeros(len(part), dtype=torch.float64)
    for t in range(len(model.targets)):
        place = model.num_given + t
        seen = ~missing[:, place]
        late = (seen & (first < place)).nonzero()[:, 0]
        early = (seen & (first > place)).nonzero()[:, 0]
        known[early] += out[part[early], t]
        if len(late):
            prefix = values[part[late]].clone()
            prefix[:, model.order[place + 1 :]] = torch.nan
            total = model.log_prob(prefix, draws=draws)[0]
            step = torch.where(known[late].isfinite(), total - known[late], out[part[late], t])
            out[part[late], t], known[late] = step, total
