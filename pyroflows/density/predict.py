"""Predictions of one column given the other cells of each row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.density.conditionals import Labels
from pyroflows.density.engine import Engine
from pyroflows.density.inputs import Evidence
from pyroflows.density.queries import means

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["label_names", "label_table", "predicted", "target_of"]


def label_names(engine: Engine) -> list[Any]:
    """The targets that are labels."""
    columns = [engine.schema.columns[j] for j in sorted(engine.order[engine.num_given :])]
    return [c.name for c in columns if c.is_label and c.kind != "key" and c.relation is None]


def target_of(engine: Engine, target: Any, names: list[Any], *, label: bool) -> Any:
    """The column that is to be predicted.

    Args:
        engine: Fitted.
        target: Its name; None for the only target, the only one that the table lacks, or the last.
        names: Columns of the table.
        label: Whether it must be a label.

    Raises:
        ValueError: If it cannot be predicted, naming it.
    """
    schema, labels = engine.schema, label_names(engine)
    targets = [schema.columns[j].name for j in sorted(engine.order[engine.num_given :])]
    targets = [c for c in targets if schema[c].kind != "key"]
    if target is None:
        able = labels if label else targets
        absent = [c for c in able if c not in names]
        if not able:
            raise ValueError(f"nothing can be predicted: the model has the columns {schema.names}")
        return absent[0] if len(absent) == 1 else able[-1]
    if target not in targets:
        why = "is given or a key" if target in schema.names else "is no column of the model"
        raise ValueError(f"column {target!r} {why}; those that can be predicted are {targets}")
    if label and target not in labels:
        raise ValueError(
            f"column {target!r} holds numbers, not labels: use quantile, interval or mean for its "
            f"distribution; labels are {labels}"
        )
    return target


def label_table(given: Evidence, target: Any, *, draws: int) -> pd.DataFrame:
    """P(label | the other observed cells), one column a label; NaN where cells are impossible."""
    import pandas as pd

    schema = given.engine.schema
    j = schema.names.index(target)
    count = max(len(schema.columns[j].levels), 1)
    out = np.full((len(given.good), count), np.nan)
    out[given.good.numpy()] = _probabilities(given.engine, given.possible, j, count, draws).numpy()
    classes = pd.Index(_cells(given, j, np.arange(count)).array, name=target, tupleize_cols=False)
    return pd.DataFrame(out, given.frame.index, classes)


def predicted(
    given: Evidence, target: Any, *, draws: int, generator: torch.Generator
) -> pd.Series:
    """The most probable label, or the mean of a number, by row; missing where impossible."""
    schema = given.engine.schema
    if target in label_names(given.engine):
        share = label_table(given, target, draws=draws).to_numpy()
        code = np.where(np.isnan(share[:, 0]), np.nan, np.nan_to_num(share).argmax(1))
        cells = _cells(given, schema.names.index(target), code)
    else:
        cells = means(given, draws=max(draws, 256), generator=generator)[target]
    return cells.set_axis(given.frame.index).rename(target)


def _probabilities(engine: Engine, values: Tensor, j: int, count: int, draws: int) -> Tensor:
    """Shape (N, count): the conditional where nothing observed comes after, else Bayes' rule."""
    place = engine.order.index(j)
    earlier, later = engine.order[engine.num_given : place], engine.order[place + 1 :]
    direct = values[:, later].isnan().all(1) & ~values[:, earlier].isnan().any(1)
    out = torch.empty(len(values), count, dtype=torch.float64)
    rows = direct.nonzero()[:, 0]
    law = engine.conditional(values[rows], j) if len(rows) else None
    if isinstance(law, Labels):
        out[rows] = law.log_table()
    rest = (~direct).nonzero()[:, 0] if isinstance(law, Labels) else torch.arange(len(values))
    filled = values[rest].clone()
    for code in range(count if len(rest) else 0):
        filled[:, j] = float(code)
        out[rest, code] = engine.log_prob(filled, draws=draws)[0]
    return out.softmax(1)


def _cells(given: Evidence, j: int, codes: np.ndarray) -> pd.Series:
    """Codes of column j as cells of its own type."""
    schema = given.engine.schema
    rows = np.full((len(codes), len(schema)), np.nan)
    rows[:, j] = codes
    name = schema.names[j]
    return schema.decode(rows, [name])[name]
