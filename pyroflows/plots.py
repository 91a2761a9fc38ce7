"""Pictures of fitted tables; every function returns the matplotlib objects it drew on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyroflows.density import DensityEstimator

__all__ = [
    "conditional_density",
    "marginals",
    "pair_plot",
    "pit_plot",
    "qq_plot",
    "training_curve",
]

REAL, MODEL = "#4c4c4c", "#d1495b"


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'pyroflows[plots]'") from error
    return plt


def _axes(ax: Axes | None) -> Axes:
    return _pyplot().subplots(figsize=(5, 3.5), layout="constrained")[1] if ax is None else ax


def _is_number(series: pd.Series) -> bool:
    import pandas as pd

    return pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series)


def _numbers(series: pd.Series) -> np.ndarray:
    return series.dropna().to_numpy(dtype=float)


def _draws(
    model: DensityEstimator, table: pd.DataFrame, rows: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of the table and as many draws, given the same columns if the model is conditional."""
    real = table.sample(min(rows, len(table)), random_state=seed)
    if model.model_.num_given:
        return real, model.sample(1, given=real, random_state=seed)
    return real, model.sample(len(real), random_state=seed)


def marginals(
    model: DensityEstimator,
    table: pd.DataFrame,
    *,
    columns: Sequence[Any] | None = None,
    rows: int = 5000,
    seed: int = 0,
) -> Figure:
    """Histograms of each column, real against sampled.

    Args:
        model: Fitted.
        table: Real rows, best held-out ones.
        columns: Which; default all modelled ones.
        rows: Rows of either kind.
        seed: Of the draws.
    """
    plt = _pyplot()
    real, drawn = _draws(model, table, rows, seed)
    names = list(columns) if columns is not None else _targets(model)
    wide = min(4, len(names))
    figure, grid = plt.subplots(
        math.ceil(len(names) / wide),
        wide,
        squeeze=False,
        layout="constrained",
        figsize=(3 * wide, 2.4 * math.ceil(len(names) / wide)),
    )
    for ax in grid.flat[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(grid.flat, names, strict=False):
        if _is_number(real[name]):
            a, b = _numbers(real[name]), _numbers(drawn[name])
            ends = np.quantile(a, [0.002, 0.998]) if len(a) else (0, 1)
            ends = (ends[0], ends[1]) if ends[1] > ends[0] else (ends[0] - 0.5, ends[0] + 0.5)
            bins = np.linspace(*ends, 41)
            ax.hist(a, bins, density=True, color=REAL, alpha=0.5, label="real")
            ax.hist(b, bins, density=True, color=MODEL, histtype="step", label="model")
        else:
            levels = real[name].value_counts(normalize=True).head(12)
            share = drawn[name].value_counts(normalize=True).reindex(levels.index).fillna(0)
            place = np.arange(len(levels))
            ax.bar(place - 0.2, levels, 0.4, color=REAL, alpha=0.5, label="real")
            ax.bar(place + 0.2, share, 0.4, color=MODEL, alpha=0.7, label="model")
            ax.set_xticks(
                place, [str(v)[:10] for v in levels.index], rotation=45, ha="right", fontsize=7
            )
        ax.set_title(str(name), fontsize=9)
        ax.set_yticks([])
    grid.flat[0].legend(fontsize=7)
    return figure


def pair_plot(
    model: DensityEstimator,
    table: pd.DataFrame,
    *,
    columns: Sequence[Any] | None = None,
    rows: int = 1500,
    seed: int = 0,
) -> Figure:
    """Scatter of every pair of number columns: real below the diagonal, sampled above it.

    Args:
        model: Fitted.
        table: Real rows.
        columns: Which; default the first six number columns.
        rows: Rows of either kind.
        seed: Of the draws.
    """
    plt = _pyplot()
    real, drawn = _draws(model, table, rows, seed)
    names = (
        list(columns)
        if columns is not None
        else [n for n in _targets(model) if _is_number(real[n])][:6]
    )
    if not names:
        raise ValueError("pair_plot needs at least one number column")
    d = len(names)
    figure, grid = plt.subplots(
        d, d, squeeze=False, layout="constrained", figsize=(1.8 * d + 1, 1.8 * d + 1)
    )
    for i, row in enumerate(names):
        y = _numbers(real[row])
        limits_y = np.quantile(y, [0.005, 0.995])
        for j, column in enumerate(names):
            ax = grid[i, j]
            x = _numbers(real[column])
            limits = np.quantile(x, [0.005, 0.995])
            if i == j:
                bins = np.linspace(limits[0], max(limits[1], limits[0] + 1e-9), 31)
                ax.hist(x, bins, density=True, color=REAL, alpha=0.5)
                ax.hist(_numbers(drawn[column]), bins, density=True, color=MODEL, histtype="step")
            else:
                source, color = (real, REAL) if i > j else (drawn, MODEL)
                ax.scatter(
                    source[column].to_numpy(float),
                    source[row].to_numpy(float),
                    s=3,
                    alpha=0.3,
                    color=color,
                    linewidths=0,
                )
                if limits_y[1] > limits_y[0]:
                    ax.set_ylim(*limits_y)
            if limits[1] > limits[0]:
                ax.set_xlim(*limits)
            ax.tick_params(labelsize=6)
            ax.set_yticks([]) if i == j or j else None
            ax.set_xlabel(str(column), fontsize=8) if i == d - 1 else ax.set_xticklabels([])
            ax.set_ylabel(str(row), fontsize=8) if j == 0 else None
    figure.suptitle("real (grey, below), model (red, above)", fontsize=9)
    return figure


def pit_plot(
    model: DensityEstimator,
    table: pd.DataFrame,
    *,
    column: Any = None,
    ax: Axes | None = None,
    bins: int = 20,
) -> Axes:
    """Histogram of probability integral transforms.

    Flat, within the band of sampling error, if the model is calibrated.

    Args:
        model: Fitted.
        table: Held-out rows.
        column: Which number target; default all together.
        ax: Where to draw.
        bins: Bars.
    """
    pit = model.pit(table)
    u = _numbers(pit[column]) if column is not None else pit.to_numpy(float).ravel()
    u = u[~np.isnan(u)]
    ax = _axes(ax)
    ax.hist(u, np.linspace(0, 1, bins + 1).tolist(), density=True, color=MODEL, alpha=0.7)
    band = 2 * math.sqrt(bins / max(len(u), 1))
    ax.axhspan(1 - band, 1 + band, color=REAL, alpha=0.2, label="95 % if calibrated")
    ax.set(
        xlabel="probability integral transform" + (f" of {column}" if column is not None else ""),
        ylabel="density",
        xlim=(0, 1),
    )
    ax.legend(fontsize=7)
    return ax


def qq_plot(
    model: DensityEstimator,
    table: pd.DataFrame,
    *,
    columns: Sequence[Any] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Quantiles of the probability integral transforms against uniform ones."""
    pit = model.pit(table)
    ax = _axes(ax)
    ax.plot([0, 1], [0, 1], color=REAL, lw=1)
    for name in columns if columns is not None else pit.columns:
        u = np.sort(_numbers(pit[name]))
        ax.plot((np.arange(len(u)) + 0.5) / max(len(u), 1), u, lw=1, label=str(name))
    ax.set(xlabel="uniform quantile", ylabel="quantile of the transform", aspect="equal")
    ax.legend(fontsize=6)
    return ax


def training_curve(model: DensityEstimator, *, ax: Axes | None = None) -> Axes:
    """Held-out and training nats per row over the passes."""
    history = model.history_
    ax = _axes(ax)
    ax.plot(history["epoch"], history["train"], color=REAL, label="training")
    ax.plot(history["epoch"], history["valid"], color=MODEL, label="held out (best so far)")
    ax.set(xlabel="passes over the table", ylabel="nats per row")
    low = history["valid"].dropna()
    if len(low) > 2:
        ax.set_ylim(
            bottom=float(low.iloc[1:].min()) - 0.3 * float(low.max() - low.iloc[1:].min() + 1e-3)
        )
    ax.legend(fontsize=8)
    return ax


def conditional_density(
    model: DensityEstimator,
    given: Mapping[Any, Any],
    column: Any,
    *,
    grid: Sequence[float] | np.ndarray | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Density of one column given some cells of a row, all others integrated out.

    Args:
        model: Fitted.
        given: Cells to condition on, by name.
        column: The column on the axis.
        grid: Its values; default 200 between the 0.5 % and 99.5 % quantiles, or the labels.
        ax: Where to draw.
    """
    import pandas as pd

    if column in given:
        raise ValueError(f"column {column!r} is both given and drawn")
    spec = model.schema_[column]
    ax = _axes(ax)
    if grid is None and not spec.is_label:
        x = _numbers(model.sample(2000, given, random_state=0)[column])
        place = np.linspace(*np.quantile(x, [0.005, 0.995]), 200)
        if spec.step:
            place = (
                np.unique(np.round((place - spec.anchor) / spec.step)) * spec.step + spec.anchor
            )
        grid = place
    values = list(spec.levels) if grid is None else list(grid)
    frame = pd.DataFrame([{**given, column: v} for v in values])
    log_p = model.log_marginal(frame, draws=256)
    if not model.model_.num_given:
        log_p = log_p - model.log_marginal(pd.DataFrame([dict(given)]), draws=8192)[0]
    if spec.is_label:
        share = np.exp(log_p - log_p.max())
        ax.bar([str(v) for v in values], share / share.sum(), color=MODEL)
        ax.set_ylabel("probability")
    else:
        ax.plot(
            values, np.exp(log_p), color=MODEL, drawstyle="steps-mid" if spec.step else "default"
        )
        ax.set_ylabel("density")
    ax.set_xlabel(str(column))
    ax.set_title(", ".join(f"{k} = {v}" for k, v in given.items()), fontsize=8)
    return ax


def _targets(model: DensityEstimator) -> list[Any]:
    given = set(model.model_.order[: model.model_.num_given])
    return [c.name for j, c in enumerate(model.schema_) if j not in given]
