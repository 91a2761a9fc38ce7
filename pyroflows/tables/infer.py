"""What the numbers of a column say about it: recording step, point masses, natural bounds."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

__all__ = ["Numbers", "find_atoms", "find_bounds", "find_step"]

NONE: tuple[None, np.ndarray] = None, np.empty(0)
# Steps of clocks and calendars in seconds, beside 1, 2, 2.5 and 5 times a power of ten.
CLOCK = (86400.0, 43200.0, 21600.0, 3600.0, 1800.0, 900.0, 600.0, 300.0, 60.0, 30.0, 15.0)
# Where shares, hours, angles, dates and bytes end. Whole numbers end exactly there.
ENDS = (1.0, 10.0, 24.0, 60.0, 90.0, 100.0, 180.0, 360.0, 1000.0)
WHOLE_TWINS = (90.0, 100.0, 180.0, 360.0)
FROM_ONE = (4.0, 5.0, 6.0, 7.0, 10.0, 12.0, 31.0, 52.0, 53.0, 366.0)  # ratings, days, weeks
WHOLE_ENDS = (*FROM_ONE, 11.0, 23.0, 24.0, 59.0, 60.0, 99.0, 255.0, 359.0, 365.0, 999.0, 1000.0)


@dataclasses.dataclass
class Numbers:
    """The distinct values of a column and how often each occurs.

    Attributes:
        level: Increasing, shape (k,).
        count: Shape (k,).
        eps: Relative rounding error of a value.
        times: Whether they are seconds.
    """

    level: np.ndarray
    count: np.ndarray
    eps: float = float(np.finfo(float).eps)
    times: bool = False

    @classmethod
    def of(cls, values: np.ndarray, *, single: bool = False, times: bool = False) -> Numbers:
        """From finite values, shape (n,); ``single`` if they were float32."""
        level, count = np.unique(values, return_counts=True)
        return cls(level, count, float(np.finfo(np.float32 if single else float).eps), times)

    @property
    def size(self) -> int:
        """Number of values."""
        return int(self.count.sum())

    @property
    def span(self) -> float:
        """Largest minus smallest."""
        return float(self.level[-1] - self.level[0])

    @property
    def whole(self) -> bool:
        """Whether all are integers that float64 tells apart."""
        level = self.level
        return bool(np.all(level == np.round(level))) and abs(level[[0, -1]]).max() < 2**53

    def quantile(self, p: float) -> float:
        """Smallest value with at least this share at or below it."""
        below = self.count.cumsum()
        return float(self.level[min(np.searchsorted(below, p * below[-1]), len(below) - 1)])


def find_step(values: np.ndarray | Numbers) -> tuple[float | None, np.ndarray]:
    """The recording step, or None, and the few values that do not keep to it (caps).

    A step that the decimals show (1, 2, 2.5 or 5 times a power of ten; for times also minutes,
    hours, days) holds whatever the number of rows. Any other must be repeated: the smallest gap
    between values says nothing where nearly every value is different.

    Args:
        values: Finite values, shape (n,).
    """
    x = values if isinstance(values, Numbers) else Numbers.of(values)
    if len(x.level) < 3 or not 0 < x.span < np.inf:
        return NONE
    repeated = 1 - (x.count == 1).sum() / x.size
    own = [float(np.diff(x.level).min())] if repeated >= 0.05 or x.whole else []
    few = x.level[np.linspace(0, len(x.level) - 1, min(512, len(x.level))).astype(int)]
    for step in sorted({*_decimal_steps(x), *own}, reverse=True):
        # A round step is exact; a gap between two values has their errors.
        loose = 1e-4 if step in own else 1e-6
        tolerance = loose + 4 * x.eps * float(np.abs(x.level).max()) / step
        # A step so fine that rounding errors reach a tenth of it is not seen.
        if tolerance > 0.1 or x.span / step > 2**40:
            continue
        if _off(few, np.ones(len(few)), step, tolerance).sum() > 8 + 0.1 * len(few):
            continue
        off = _off(x.level, x.count, step, tolerance)
        rare = off.sum() <= min(8, 0.02 * len(off)) and x.count[off].sum() <= 0.06 * x.size
        caps = off.sum() <= 3 or x.count[off].min() >= 5
        chance = (len(few) - off.sum() - 1) * math.log10(2 * tolerance) < -6
        if rare and caps and chance and len(off) - off.sum() >= 3:
            return float(step), x.level[off]
    return NONE


def _decimal_steps(x: Numbers) -> list[float]:
    """Round steps from the span down to what the digits of the values can show."""
    top = math.floor(math.log10(x.span))
    steps = [m * 10.0**k for k in range(top, top - 13, -1) for m in (5.0, 2.5, 2.0, 1.0)]
    steps = [s if s >= 1 else 1 / round(1 / s, 6) if s > 1e-6 else s for s in steps]
    # Text and floats that print as integers are integers.
    return [*steps, *([1.0] if x.whole else []), *([s for s in CLOCK if x.times and s < x.span])]


def _off(level: np.ndarray, count: np.ndarray, step: float, tolerance: float) -> np.ndarray:
    """Which values miss the lattice, anchored where the fewest rows miss it."""
    # A cap may be the most frequent value: try a few as the anchor.
    picks = {int(np.argmax(count)), 0, len(level) // 3, len(level) // 2}
    places = [(level - level[i]) / step for i in sorted(picks)]
    misses = [np.abs(p - np.round(p)) > tolerance for p in places]
    return min(misses, key=lambda miss: float((miss * count).sum()))


def find_atoms(x: Numbers) -> np.ndarray:
    """Values that a continuous column repeats far more often than chance.

    Among few values only where the others, which are more, are single: else all are repeated.
    """
    often = x.count >= max(5, 0.005 * x.size)
    rest = x.count[~often]
    few = len(x.level) <= 20 and not (len(rest) > max(2, often.sum()) and rest.max() == 1)
    return np.empty(0) if few or often.sum() > 16 else x.level[often]


def find_bounds(x: Numbers, step: float | None) -> tuple[float | None, float | None]:
    """Natural ends of the support, None where there is none.

    - 0, if the data come within a step or 1 % of the median of it, or if a law of positive
      amounts (lognormal) describes them better than a normal law.
    - Ends of shares, hours, angles (1, 24, 100, 180, 360, ...) that the data touch: they stay
      within, come close, and do not thin out before. Negative ends only with their positive twin.
    - For whole numbers also 12, 23, 31, 59 and the like, if attained.
    """
    if x.size == 0:
        return None, None
    low, high = float(x.level[0]), float(x.level[-1])
    near = max(step or 0.0, 0.01 * abs(x.quantile(0.5)))
    lower = 0.0 if 0 <= low <= near or _amounts(x) else None
    upper = 0.0 if 0 <= -high <= near else None
    if x.size < 30 or len(x.level) < 3:
        return lower, upper
    reach = 0.05 * x.span
    ends = [e for e in (WHOLE_TWINS if x.whole else ENDS) if 0 <= e - high <= reach]
    if x.whole and low >= 0 and high in WHOLE_ENDS:
        ends = [high]
        if low == 1 and high == len(x.level) and high in FROM_ONE:
            return 1.0, high  # none is missing
    if upper is not None or not ends or not _sharp(x, high):
        return (0.0 if lower is None and 0 <= low <= reach and _sharp(x, low) else lower), upper
    end = ends[0]
    if low < 0:  # a negative end only with its positive twin
        twins = low + end >= 0 and low + end <= reach and _sharp(x, low)
        return (-end, end) if twins else (None, None)
    if x.whole and low == 1 and end in FROM_ONE:
        return 1.0, end
    if end in (90.0, 180.0) and lower is None:  # angles begin at 0; ages up to 90 need not end
        return None, None
    return 0.0, end


def _sharp(x: Numbers, end: float) -> bool:
    """Whether the outermost hundredth of the rows lies close together, as before a wall.

    It fills 1 % of the span of uniform data, 6 % of a parabola's, 14 % or more of a normal law's.
    Fewer than eight rows may do so by chance.
    """
    share = min(max(0.01, 8 / x.size), 0.5)
    inner = x.quantile(share if end == x.level[0] else 1 - share)
    return abs(end - inner) <= 0.1 * x.span


def _amounts(x: Numbers) -> bool:
    """Whether all are positive and a lognormal law is clearly likelier than a normal one."""
    if x.size < 20 or x.level[0] <= 0 or len(x.level) < 5:
        return False
    share = x.count / x.size
    log = np.log(x.level)
    middle, log_middle = share @ x.level, share @ log
    sd = math.sqrt(share @ (x.level - middle) ** 2)
    log_sd = math.sqrt(share @ (log - log_middle) ** 2)
    if not sd > 1e-6 * middle:
        return False
    gain = math.log(sd) - math.log(log_sd) - log_middle  # nats per row
    return gain * x.size > 5 + math.log(x.size) and gain > 0.02
