"""Pictures of odd rows and of the quality of samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyroflows.density.explain import Explanation
    from pyroflows.density.quality import Report

__all__ = ["MODEL", "REAL", "explanation", "pyplot", "quality"]

REAL, MODEL = "#4c4c4c", "#d1495b"
LEAST = 1e-6  # tail probability at the end of the axis


def pyplot() -> Any:
    """Matplotlib, which is an extra."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'pyroflows[plots]'") from error
    return plt


def explanation(
    explained: Explanation, row: Any = None, *, columns: int = 25, ax: Axes | None = None
) -> Axes:
    """How odd each cell of a row is, with its value and what was expected.

    Args:
        explained: What :meth:`DensityEstimator.explain` gave.
        row: Label of the row; default the oddest one.
        columns: How many are drawn, the most surprising ones.
        ax: Where to draw.
    """
    from pyroflows.density.explain import shown

    if not len(explained):
        raise ValueError("there is no row to draw")
    row = explained.rows.idxmin() if row is None else row
    place = int(np.flatnonzero(explained.table.index == row)[0])
    tail = explained.tail.iloc[place].dropna().sort_values(kind="stable").head(columns)[::-1]
    if ax is None:
        size = (6.5, 0.6 + 0.28 * len(tail))
        ax = pyplot().subplots(figsize=size, layout="constrained")[1]
    bars = -np.log10(np.clip(tail.to_numpy(float), LEAST, 1))
    color = [MODEL if t < 0.01 else REAL for t in tail]
    ax.barh(range(len(tail)), bars, color=color, alpha=0.6)
    ax.set_yticks(range(len(tail)), [str(c) for c in tail.index], fontsize=8)
    for k, name in enumerate(tail.index):
        value = explained.table[(name, "value")].iloc[place]
        text = f" {shown(value)[:20]}   (expected {explained.range(place, name)})"
        ax.text(bars[k], k, text, va="center", fontsize=7)
    ticks = range(0, int(-np.log10(LEAST)) + 1, 2)
    ax.set_xticks(ticks, ["1", *(f"1e-{t}" for t in ticks[1:-1]), f"≤ 1e-{ticks[-1]}"])
    ax.set(
        xlim=(0, -2.2 * np.log10(LEAST)), xlabel="share of held-out rows at least as surprising"
    )
    ax.set_title(f"row {row}", fontsize=9)
    return ax


def quality(report: Report, *, columns: int = 20) -> Figure:
    """Distances of columns, of pairs, and of nearest training rows, beside those of real rows.

    Args:
        report: What :meth:`DensityEstimator.report` gave.
        columns: How many are drawn, the worst ones.
    """
    figure, (left, middle, right) = pyplot().subplots(
        1, 3, figsize=(12, 3.8), layout="constrained"
    )
    worst = report.columns.sort_values("distance").tail(columns)
    place = np.arange(len(worst))
    left.barh(place, worst["distance"], color=MODEL, alpha=0.6, label="synthetic")
    left.plot(worst["real"], place, "|", color=REAL, ms=10, label="half of the real rows")
    left.set_yticks(place, [str(c) for c in worst.index], fontsize=7)
    left.set(xlabel="distance of columns")
    left.legend(fontsize=7)
    middle.scatter(report.pairs["real"], report.pairs["distance"], s=8, color=MODEL, alpha=0.5)
    top = float(np.nanmax([0.01, *report.pairs[["real", "distance"]].max()]))
    middle.plot([0, top], [0, top], color=REAL, lw=1)
    middle.set(xlabel="distance of pairs, half of the real rows", ylabel="synthetic")
    bins = np.linspace(0, float(max(d.max() for d in report.nearest)) or 1.0, 31).tolist()
    for near, color, name in zip(
        report.nearest, (MODEL, REAL), ("synthetic", "real"), strict=True
    ):
        right.hist(near, bins, density=True, color=color, alpha=0.5, label=name)
    right.set(xlabel="distance to the nearest training row", yticks=[])
    right.legend(fontsize=7)
    figure.suptitle(report.verdict, fontsize=9)
    return figure
