"""How good synthetic rows are, beside real ones: any two tables of the same columns.

Whatever is measured between synthetic and real rows is measured between two halves of the real
rows too: that is what perfect samples would show.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyroflows.density.pictures import picture
from pyroflows.tables import Schema

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Report", "compare", "drawn_like"]

BINS = 10  # of a number, in tables of pairs
LEVELS = 20  # labels of a column there; the rarer ones count as one
NEIGHBOURS = 3000  # rows whose nearest neighbours are looked for


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`compare` found.

    Attributes:
        summary: Measures, columns ``synthetic`` and ``real`` (what two halves of the real rows
            have).
        columns: One row a column: ``distance`` (Kolmogorov-Smirnov of numbers, total variation of
            labels), ``real``, ``wasserstein`` (in standard deviations; numbers only), ``missing``
            (difference of the shares of missing cells).
        pairs: One row a pair: ``distance``, the total variation of their joint table (numbers in
            ten parts), and ``real``; the worst first.
        classifier: What told synthetic from real rows.
        nearest: Distances to the nearest training row, of synthetic and of real rows.
        verdict: In plain words.
    """

    summary: pd.DataFrame
    columns: pd.DataFrame
    pairs: pd.DataFrame
    classifier: str
    nearest: tuple[np.ndarray, np.ndarray]
    verdict: str

    def plot(self, **options: Any) -> Any:
        """Columns, pairs and nearest rows; see :func:`pyroflows.plots.quality`."""
        return picture("quality", self, **options)

    def __repr__(self) -> str:
        worst = self.columns.sort_values("distance", ascending=False).head(5)
        parts = (self.verdict, self.summary.to_string(), worst.to_string())
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        tables = (self.summary, self.columns, self.pairs.head(10))
        return f"<p>{self.verdict}</p>" + "".join(t.to_html() for t in tables)


def compare(
    real: pd.DataFrame,
    synthetic: pd.DataFrame,
    *,
    train: pd.DataFrame | None = None,
    nats: float | None = None,
    rows: int = 20000,
    seed: int = 0,
) -> Report:
    """Compare synthetic rows of any origin with real ones.

    Args:
        real: Best rows that the generator did not see.
        synthetic: The same columns.
        train: What it saw; None takes half of the real rows for it.
        nats: Mean log-density of the real rows, to be shown too.
        rows: Of each table that are looked at, drawn at random; the cost is bounded by them.
        seed: Of that draw and of the classifier.

    Raises:
        ValueError: If columns are missing, naming them, or a table has fewer than 20 rows.
    """
    absent = [c for c in real.columns if c not in synthetic.columns]
    if absent:
        raise ValueError(f"the synthetic table lacks the columns {absent}")
    if min(len(real), len(synthetic)) < 20:
        raise ValueError(f"20 rows are needed; got {len(real)} real, {len(synthetic)} synthetic")
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a column looks like, the fit has said
        schema = Schema.from_frame(real)
    drawn = [f.iloc[rng.permutation(len(f))[:rows]] for f in (real, synthetic)]
    x, s = (schema.encode(f[schema.names]) for f in drawn)
    a, b, s = x[: len(x) // 2], x[len(x) // 2 :], s[: max(len(x) - len(x) // 2, 20)]
    label = np.array([c.is_label for c in schema.columns])
    columns = _columns(schema, a, b, s, label)
    pairs = _pairs(schema, a, b, s, label)
    auc, classifier = _told_apart(x, _same_size(schema, drawn[1], len(x)), label, rng, seed)
    kept = a
    if train is not None:
        kept = schema.encode(train[schema.names].iloc[rng.permutation(len(train))[:rows]])
    near = tuple(_nearest(kept, y[:NEIGHBOURS], label, x) for y in (s, b))
    close = tuple(float((d < np.quantile(near[1], 0.05) + 1e-12).mean()) for d in near)
    copies = tuple(float((d < 1e-9).mean()) for d in near)
    summary = _summary(columns, pairs, auc, close, copies, nats)
    verdict = _verdict(columns, auc, close, copies)
    return Report(summary, columns, pairs, classifier, (near[0], near[1]), verdict)


def drawn_like(model: Any, real: pd.DataFrame, seed: int) -> pd.DataFrame:
    """As many draws of a fitted estimator as there are rows, given the same columns, if any."""
    engine, gaps = model.engine_, bool(real.isna().any(axis=None))
    if not engine.num_given:
        return model.sample(len(real), missing=gaps, random_state=seed)
    return model.sample(1, given=real, missing=gaps, random_state=seed)


def _same_size(schema: Schema, frame: pd.DataFrame, n: int) -> np.ndarray:
    return schema.encode(frame[schema.names].iloc[:n])


def _summary(
    columns: pd.DataFrame,
    pairs: pd.DataFrame,
    auc: float,
    close: tuple[float, ...],
    copies: tuple[float, ...],
    nats: float | None,
) -> pd.DataFrame:
    import pandas as pd

    lines = {
        "two-sample AUC (0.5 is best)": (auc, 0.5),
        "distance of columns, mean": (columns["distance"].mean(), columns["real"].mean()),
        "distance of columns, largest": (columns["distance"].max(), columns["real"].max()),
        "distance of pairs, mean": (pairs["distance"].mean(), pairs["real"].mean()),
        "difference of rank correlations, mean": (
            pairs["correlation"].abs().mean(),
            pairs["correlation_real"].abs().mean(),
        ),
        "share nearer to training rows than 95 % of real ones": close,
        "share of exact copies": copies,
    }
    if nats is not None:
        lines["nats per real row"] = (nats, math.nan)
    return pd.DataFrame.from_dict(lines, orient="index", columns=["synthetic", "real"])


def _verdict(
    columns: pd.DataFrame, auc: float, close: tuple[float, ...], copies: tuple[float, ...]
) -> str:
    """The measures in words."""
    words = (
        "cannot be told from real ones"
        if auc < 0.55
        else "are hard to tell from real ones"
        if auc < 0.65
        else "differ visibly from real ones"
        if auc < 0.8
        else "are easily told from real ones"
    )
    out = f"Synthetic rows {words} (AUC {auc:.2f})."
    excess = (columns["distance"] - 2 * columns["real"]).sort_values(ascending=False)
    bad = [str(c) for c in excess.index[excess > 0.03][:3]]
    out += f" Weakest columns: {', '.join(bad)}." if bad else ""
    if copies[0] > 2 * copies[1] + 0.01 or close[0] > 2 * close[1] + 0.02:
        return out + (
            f" They repeat training rows: {copies[0]:.1%} are exact copies (real rows: "
            f"{copies[1]:.1%}), {close[0]:.1%} lie nearer to one than 95 % of real rows do."
        )
    if copies[1] > 0.5:
        return out + (
            f" They repeat training rows no more than real ones, of which {copies[1]:.1%} are "
            "exact copies: compare with rows that training did not see."
        )
    return out + " They are no copies of training rows."


def _columns(
    schema: Schema, a: np.ndarray, b: np.ndarray, s: np.ndarray, label: np.ndarray
) -> pd.DataFrame:
    import pandas as pd

    lines = []
    for j in range(len(schema)):
        ours, theirs, other = (y[:, j][~np.isnan(y[:, j])] for y in (a, s, b))
        distance = _total_variation if label[j] else _kolmogorov
        lines.append(
            dict(
                kind="labels" if label[j] else "numbers",
                distance=distance(ours, theirs),
                real=distance(ours, other),
                wasserstein=math.nan if label[j] else _wasserstein(ours, theirs),
                missing=np.isnan(s[:, j]).mean() - np.isnan(a[:, j]).mean(),
            )
        )
    return pd.DataFrame(lines, index=pd.Index(schema.names, name="column", tupleize_cols=False))


def _kolmogorov(x: np.ndarray, y: np.ndarray) -> float:
    """Largest difference of the distribution functions."""
    if not len(x) or not len(y):
        return float(len(x) != len(y))
    at = np.concatenate([x, y])
    f, g = (np.searchsorted(np.sort(z), at, side="right") / len(z) for z in (x, y))
    return float(np.abs(f - g).max())


def _wasserstein(x: np.ndarray, y: np.ndarray) -> float:
    """Mean distance of quantiles, in standard deviations of x."""
    if not len(x) or not len(y):
        return math.nan
    p = (np.arange(1000) + 0.5) / 1000
    gap = np.abs(np.quantile(x, p) - np.quantile(y, p)).mean()
    return float(gap / (x.std() or 1.0))


def _total_variation(x: np.ndarray, y: np.ndarray) -> float:
    """Half the summed differences of the shares of codes."""
    if not len(x) or not len(y):
        return float(len(x) != len(y))
    size = int(max(x.max(), y.max())) + 1
    f, g = (np.bincount(z.astype(int), minlength=size) / len(z) for z in (x, y))
    return float(np.abs(f - g).sum() / 2)


def _pairs(
    schema: Schema, a: np.ndarray, b: np.ndarray, s: np.ndarray, label: np.ndarray
) -> pd.DataFrame:
    """Joint tables of every two columns, and rank correlations of numbers."""
    import pandas as pd

    cut = [_coarse(a[:, j], label[j]) for j in range(a.shape[1])]
    x, y, z = (np.stack([c(t[:, j]) for j, c in enumerate(cut)], 1) for t in (a, s, b))
    rank = [_correlations(t, label) for t in (a, s, b)]
    width, lines = max(LEVELS, BINS) + 2, []
    for i in range(a.shape[1]):
        for j in range(i):
            cells = [t[:, i] * width + t[:, j] for t in (x, y, z)]
            lines.append(
                dict(
                    first=schema.names[j],
                    second=schema.names[i],
                    distance=_total_variation(cells[0], cells[1]),
                    real=_total_variation(cells[0], cells[2]),
                    correlation=rank[1][i, j] - rank[0][i, j],
                    correlation_real=rank[2][i, j] - rank[0][i, j],
                )
            )
    names = ["first", "second", "distance", "real", "correlation", "correlation_real"]
    return pd.DataFrame(lines, columns=names).sort_values(
        "distance", ascending=False, ignore_index=True
    )


def _coarse(x: np.ndarray, label: bool) -> Any:
    """A function from cells to a few codes, the last of them for missing ones."""
    known = x[~np.isnan(x)]
    if label:
        codes, count = np.unique(known, return_counts=True)
        common = np.sort(codes[np.argsort(-count)][:LEVELS])
        place = {v: k for k, v in enumerate(common)}
        return lambda t: np.array([LEVELS + 1 if v != v else place.get(v, LEVELS) for v in t])
    edges = np.unique(np.quantile(known, np.arange(1, BINS) / BINS)) if len(known) else known
    return lambda t: np.where(np.isnan(t), LEVELS + 1, np.searchsorted(edges, t, side="right"))


def _correlations(t: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Rank correlations (D, D); NaN of labels and constants, missing cells in the middle."""
    rank = np.stack([_ranks(t[:, j]) for j in range(t.shape[1])], 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        out = np.atleast_2d(np.corrcoef(rank, rowvar=False))
    out[label], out[:, label] = math.nan, math.nan
    return out


def _ranks(x: np.ndarray) -> np.ndarray:
    """Mean ranks in (-0.5, 0.5), 0 where missing."""
    known = ~np.isnan(x)
    if not known.any():
        return np.zeros(len(x))
    _, place, count = np.unique(x[known], return_inverse=True, return_counts=True)
    middle = (np.cumsum(count) - count / 2) / count.sum()
    out = np.zeros(len(x))
    out[known] = middle[place] - 0.5
    return out


def _told_apart(
    x: np.ndarray, s: np.ndarray, label: np.ndarray, rng: np.random.Generator, seed: int
) -> tuple[float, str]:
    """AUC of a classifier on rows that it did not train on, and its name."""
    n = min(len(x), len(s))
    both = np.concatenate([x[:n], s[:n]])
    truth = np.repeat([0, 1], n)
    mixed = rng.permutation(2 * n)
    fit, test = mixed[:n], mixed[n:]
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier as Trees
    except ImportError:
        features = _features(both, label, x)
        score = features[test] @ _logistic(features[fit], truth[fit])
        return _auc(score, truth[test]), "logistic regression"
    trees = Trees(max_iter=80, random_state=seed).fit(both[fit], truth[fit])
    return _auc(trees.predict_proba(both[test])[:, 1], truth[test]), "boosted trees"


def _auc(score: np.ndarray, truth: np.ndarray) -> float:
    """P(a synthetic row scores higher than a real one), ties half."""
    rank = _ranks(score)
    return float(rank[truth == 1].mean() - rank[truth == 0].mean() + 0.5)


def _features(y: np.ndarray, label: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Places in the real columns, their squares and products, indicators of labels and gaps."""
    base, parts = [], [np.ones(len(y))]
    for j in range(y.shape[1]):
        gone = np.isnan(y[:, j])
        parts.append(gone.astype(float))
        if label[j]:
            codes = np.unique(x[:, j][~np.isnan(x[:, j])])[:LEVELS]
            parts += [(y[:, j] == c).astype(float) for c in codes]
        else:
            base.append(_places(y[:, j], x[:, j]))
    parts += base + [p * q for i, p in enumerate(base[:30]) for q in base[: i + 1]]
    return np.stack(parts, 1)


def _places(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Normal scores of y among x, 0 where missing."""
    held = np.sort(x[~np.isnan(x)])
    if not len(held):
        return np.zeros(len(y))
    low, high = (np.searchsorted(held, y, side=side) for side in ("left", "right"))
    p = torch.from_numpy(((low + high) / 2 + 0.5) / (len(held) + 1))
    return np.where(np.isnan(y), 0.0, torch.special.ndtri(p.clamp(1e-6, 1 - 1e-6)).numpy())


def _logistic(x: np.ndarray, truth: np.ndarray, steps: int = 15) -> np.ndarray:
    """Weights of a ridge-penalized logistic regression, by Newton's method."""
    w = np.zeros(x.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        slope = x.T @ (truth - p) - w
        bend = (x * (p * (1 - p))[:, None]).T @ x + np.eye(len(w))
        w = w + np.linalg.solve(bend, slope)
    return w


def _nearest(kept: np.ndarray, y: np.ndarray, label: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Distance of rows to the nearest kept one: normal scores of numbers, unequal labels 1."""

    def spread(t: np.ndarray) -> torch.Tensor:
        parts = []
        for j in range(t.shape[1]):
            gone = np.isnan(t[:, j])
            parts.append(2.0 * gone)
            if not label[j]:
                parts.append(_places(t[:, j], x[:, j]))
                continue
            for code in np.unique(x[:, j][~np.isnan(x[:, j])])[:LEVELS]:
                parts.append((t[:, j] == code) / math.sqrt(2))
        return torch.from_numpy(np.stack(parts, 1))

    far, held = spread(y), spread(kept)
    return torch.cdist(far, held, compute_mode="donot_use_mm_for_euclid_dist").amin(1).numpy()
