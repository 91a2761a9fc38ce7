"""Generalized Pareto tails beyond the ends of a sample."""

from __future__ import annotations

import numpy as np

__all__ = ["ended", "tail_index", "tails"]


def tails(
    values: np.ndarray,
    lo: float,
    hi: float,
    lower: float | None,
    upper: float | None,
    *,
    floor: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shape of the tails beyond lo and hi, which end at the bounds."""
    out = []
    for sign, end, bound in ((-1, lo, lower), (1, hi, upper)):
        beta, xi = tail_index(sign * values)
        room = np.inf if bound is None else max(sign * (bound - end), 1e-9 * max(hi - lo, floor))
        out.append(ended(max(beta, floor), xi, room))
    scale, shape = np.array(out).T
    return scale, shape


def ended(beta: float, xi: float, room: float) -> tuple[float, float]:
    """A tail that ends after ``room``: uniform if it would reach there, else of its own scale."""
    if not np.isfinite(room):
        return beta, xi
    return (room, -1.0) if beta >= room else (beta, -beta / room)


def tail_index(values: np.ndarray) -> tuple[float, float]:
    """Scale and shape of the generalized Pareto law beyond the maximum, by L-moments.

    References:
        Hosking and Wallis (1987), Parameter and quantile estimation for the generalized Pareto
        distribution.
    """
    k = int(min(max(10, len(values) // 50), 500, len(values) - 1))
    if k < 5:
        spread = float(np.std(values)) or 1.0
        return spread, 0.2
    top = np.sort(np.partition(values, len(values) - k - 1)[-k - 1 :])
    excess = top[1:] - top[0]
    b0 = excess.mean()
    b1 = (excess * (k - np.arange(1, k + 1)) / (k - 1)).mean()
    if b0 <= 0 or b0 - 2 * b1 <= 0:
        return float(max(b0, 0.0)), 0.2
    xi = float(np.clip(2 - b0 / (b0 - 2 * b1), 0.05, 0.9))
    beta = b0 * (1 - xi)
    return float(beta + xi * (top[-1] - top[0])), xi
