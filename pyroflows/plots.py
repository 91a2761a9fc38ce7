"""Pictures of fitted tables; every function returns the matplotlib objects it drew on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyroflows.plots_quality import MODEL, REAL, explanation, quality
from pyroflows.plots_quality import pyplot as _pyplot
from pyroflows.tables import as_frame
from pyroflows.training.history import History

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyroflows.density import DensityEstimator
    from pyroflows.tables import Column

__all__ = [
    "conditional_density",
    "explanation",
    "marginals",
    "pair_plot",
    "pit_plot",
    "qq_plot",
    "quality",
    "training_curve",
]

DAY = 86400.0  # seconds
TICKS = [
    m * unit
    for unit, times in (
        (1, (1, 5, 15)),
        (60, (1, 5, 15)),
        (3600, (1, 3, 6)),
        (DAY, (1, 2, 5, 10, 50, 100, 500, 1000)),
    )
    for m in times
]


def _axes(ax: Axes | None) -> Axes:
    return _pyplot().subplots(figsize=(5, 3.5), layout="constrained")[1] if ax is None else ax


def _is_number(spec: Column) -> bool:
    return spec.kind in ("numeric", "datetime") or spec.relation is not None


def _numbers(spec: Column, series: pd.Series) -> np.ndarray:
    """Cells as places on an axis, NaN where missing: days for times, else as they are."""
    x = spec.raw(series) + spec.origin / spec.per_second
    return x / DAY if spec.is_time else x


def _there(x: Any) -> np.ndarray:
    x = np.asarray(x, dtype=float)
    return x[~np.isnan(x)]


def _dress(axis: Any, spec: Column) -> None:
    """Dates and durations on an axis of days."""
    if not spec.is_time:
        return
    from matplotlib import dates, ticker

    if spec.dtype.startswith("datetime64"):
        locator = dates.AutoDateLocator(minticks=2, maxticks=5)
        axis.set_major_locator(locator)
        axis.set_major_formatter(dates.ConciseDateFormatter(locator))
    else:
        low, high = axis.get_view_interval()
        step = next((s for s in TICKS if (high - low) * DAY / s <= 5), (high - low) * DAY / 4)
        axis.set_major_locator(ticker.MultipleLocator(step / DAY))
        axis.set_major_formatter(ticker.FuncFormatter(lambda days, _: _duration(days)))


def _duration(days: float) -> str:
    for unit, size in (("d", 1.0), ("h", 1 / 24), ("min", 1 / 1440)):
        if abs(days) >= 2 * size:
            return f"{days / size:.4g} {unit}"
    return f"{days * DAY:.4g} s"


def _ends(x: np.ndarray, tail: float) -> tuple[float, float]:
    """Quantiles that frame values, apart also where all are equal."""
    low, high = (float(v) for v in np.quantile(x, [tail, 1 - tail]))
    room = 0.0 if high > low else max(abs(low) * 1e-3, 0.5)
    return low - room, high + room


def _say(ax: Axes, text: str) -> None:
    """An empty panel that says why."""
    ax.set(xticks=[], yticks=[])
    ax.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, transform=ax.transAxes)


def _draws(
    model: DensityEstimator, table: pd.DataFrame, rows: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of the table and as many draws, given the same columns if the model is conditional."""
    real = table.sample(min(rows, len(table)), random_state=seed)
    if model.engine_.num_given:
        return real, as_frame(model.sample(1, given=real, random_state=seed))
    return real, as_frame(model.sample(len(real), random_state=seed))


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
        spec = model.schema_[name]
        if spec.kind == "key":
            _say(ax, "a key: not modelled")
        elif not real[name].notna().any():
            _say(ax, "no values")
        elif _is_number(spec):
            a, b = (_there(_numbers(spec, frame[name])) for frame in (real, drawn))
            bins = np.linspace(*_ends(a, 0.002), 41).tolist()
            ax.hist(a, bins, density=True, color=REAL, alpha=0.5, label="real")
            if len(b):
                ax.hist(b, bins, density=True, color=MODEL, histtype="step", label="model")
            _dress(ax.xaxis, spec)
            ax.tick_params(axis="x", labelsize=7)
        else:
            _bars(ax, real[name], drawn[name])
        ax.set_title(str(name), fontsize=9)
        ax.set_yticks([])
    for ax in grid.flat:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
            break
    return figure


def _bars(ax: Axes, real: pd.Series, drawn: pd.Series) -> None:
    """Shares of the most frequent labels."""
    levels = real.astype(object).value_counts(normalize=True).head(12)
    share = drawn.astype(object).value_counts(normalize=True).reindex(levels.index).fillna(0)
    place = np.arange(len(levels))
    ax.bar(place - 0.2, levels, 0.4, color=REAL, alpha=0.5, label="real")
    ax.bar(place + 0.2, share, 0.4, color=MODEL, alpha=0.7, label="model")
    ax.set_xlim(-0.7, max(len(levels), 2) - 0.3)
    ax.set_xticks(place, [str(v)[:10] for v in levels.index], rotation=45, ha="right", fontsize=7)


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
    real_rows, drawn_rows = _draws(model, table, rows, seed)
    numbers = [n for n in _targets(model) if _is_number(model.schema_[n])]
    names = numbers[:6] if columns is None else list(columns)
    if not names:
        raise ValueError("pair_plot needs at least one number column")
    specs = {n: model.schema_[n] for n in names}
    labels = [n for n in names if not _is_number(specs[n])]
    if labels:
        raise ValueError(f"pair_plot draws number columns; {labels} are labels, constant or empty")
    real, drawn = (
        {n: _numbers(specs[n], frame[n]) for n in names} for frame in (real_rows, drawn_rows)
    )
    d = len(names)
    figure, grid = plt.subplots(
        d, d, squeeze=False, layout="constrained", figsize=(1.8 * d + 1, 1.8 * d + 1)
    )
    for i, row in enumerate(names):
        for j, column in enumerate(names):
            ax = grid[i, j]
            if not len(_there(real[column])) or not len(_there(real[row])):
                _say(ax, "no values")
                continue
            if i == j:
                _histograms(ax, real[column], drawn[column])
            else:
                source, color = (real, REAL) if i > j else (drawn, MODEL)
                ax.scatter(source[column], source[row], s=3, alpha=0.3, color=color, linewidths=0)
                ax.set_ylim(*_ends(_there(real[row]), 0.005))
                _dress(ax.yaxis, specs[row])
            ax.set_xlim(*_ends(_there(real[column]), 0.005))
            _dress(ax.xaxis, specs[column])
            _label_outside(ax, str(row), str(column), left=j == 0, bottom=i == d - 1, own=i == j)
    figure.suptitle("real (grey, below), model (red, above)", fontsize=9)
    return figure


def _histograms(ax: Axes, real: np.ndarray, drawn: np.ndarray) -> None:
    """Shares of a number's real values and of the model's, over the same bins."""
    bins = np.linspace(*_ends(_there(real), 0.005), 31).tolist()
    ax.hist(_there(real), bins, density=True, color=REAL, alpha=0.5)
    if len(_there(drawn)):
        ax.hist(_there(drawn), bins, density=True, color=MODEL, histtype="step")


def _label_outside(
    ax: Axes, row: str, column: str, *, left: bool, bottom: bool, own: bool
) -> None:
    """Ticks and names at the outer axes of a grid of pairs alone.

    Args:
        ax: The panel.
        row: Name of what its y axis shows.
        column: Name of what its x axis shows.
        left: Whether it stands at the left edge.
        bottom: Whether it stands at the bottom.
        own: Whether it is on the diagonal: its y axis shows shares.
    """
    ticks = left and not own
    ax.tick_params(labelsize=6)
    ax.tick_params(left=ticks, labelleft=ticks)
    ax.tick_params(labelbottom=bottom)
    ax.xaxis.get_offset_text().set_visible(bottom)
    ax.yaxis.get_offset_text().set_visible(ticks)
    if bottom:
        ax.set_xlabel(column, fontsize=8)
    if left:
        ax.set_ylabel(row, fontsize=8)


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
    u = _there(pit[column] if column is not None else pit.to_numpy(float).ravel())
    ax = _axes(ax)
    if not len(u):
        _say(ax, "no values")
        return ax
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
        u = np.sort(_there(pit[name]))
        ax.plot((np.arange(len(u)) + 0.5) / max(len(u), 1), u, lw=1, label=str(name))
    ax.set(xlabel="uniform quantile", ylabel="quantile of the transform", aspect="equal")
    ax.legend(fontsize=6) if len(ax.lines) > 1 else _say(ax, "no number columns")
    return ax


def training_curve(model: DensityEstimator | History, *, ax: Axes | None = None) -> Axes:
    """Held-out and training nats per row over the passes; of a :class:`History` its losses."""
    if isinstance(model, History):
        return _loss_curve(model, _axes(ax))
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


def _loss_curve(history: History, ax: Axes) -> Axes:
    frame = history.frame()
    along = "epoch" if "epoch" in frame else "step"
    names = {"train": ("training", REAL), "valid": ("held out", MODEL), "loss": ("steps", REAL)}
    for name, (label, color) in names.items():
        if name in frame:
            ax.plot(frame[along], frame[name], color=color, label=label)
    if history.best_epoch >= 0:
        ax.axvline(history.best_epoch + 1, color="0.7", lw=1, label="kept")
    ax.set(xlabel=along, ylabel="loss, nats")
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
    if grid is None and not spec.levels and not _is_number(spec):
        _say(ax, "no values")
        return ax
    if grid is None:
        drawn = None
        if _is_number(spec):
            drawn = as_frame(model.sample(2000, given, random_state=0))[column]
        cells = _grid(spec, drawn)
    else:
        cells = pd.Series(list(grid))
    frame = pd.DataFrame([dict(given)] * len(cells)).assign(**{"": cells.to_numpy()})
    frame.columns = pd.Index([*given, column], tupleize_cols=False)
    log_p = model.log_marginal(frame, draws=256)
    if not model.engine_.num_given:
        log_p = log_p - model.log_marginal(pd.DataFrame([dict(given)]), draws=8192)[0]
    if not _is_number(spec):
        share = np.exp(log_p - log_p.max())
        ax.bar([str(v) for v in cells], share / share.sum(), color=MODEL)
        ax.set_ylabel("probability")
    else:
        unit, word = (DAY, "density per day") if spec.is_time else (1.0, "density")
        if spec.is_label:  # differences of few values, which count as labels
            unit, word = 1.0, "probability"
        style = "steps-mid" if _lattice(spec)[0] else "default"
        ax.plot(_numbers(spec, cells), unit * np.exp(log_p), color=MODEL, drawstyle=style)
        _dress(ax.xaxis, spec)
        ax.set_ylabel(word)
    ax.set_xlabel(str(column))
    ax.set_title(", ".join(f"{k} = {v}" for k, v in given.items()), fontsize=8)
    return ax


def _lattice(spec: Column) -> tuple[float | None, float]:
    """Step and anchor of the column itself."""
    own = spec if spec.relation is None else spec.relation
    return own.step, own.anchor


def _grid(spec: Column, drawn: pd.Series | None) -> pd.Series:
    """Cells of a column that show its density: its labels, or 200 places among draws."""
    import pandas as pd

    if drawn is None:
        levels = spec.levels
        return (
            spec.cells(np.array(levels))
            if spec.kind == "discrete"
            else pd.Series(levels, dtype=object)
        )
    x = np.linspace(*_ends(_there(spec.raw(drawn)), 0.005), 200)
    step, anchor = _lattice(spec)
    return spec.cells(np.unique(np.round((x - anchor) / step)) * step + anchor if step else x)


def _targets(model: DensityEstimator) -> list[Any]:
    given = set(model.engine_.order[: model.engine_.num_given])
    return [c.name for j, c in enumerate(model.schema_) if j not in given]
