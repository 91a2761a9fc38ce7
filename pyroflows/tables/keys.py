"""Keys: cells that tell a row apart and nothing else. They are drawn afresh, never repeated."""

from __future__ import annotations

import dataclasses
import re
import warnings
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from pyroflows.tables.storage import dtype_named

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Keys", "suspicion"]


@dataclasses.dataclass(frozen=True)
class Keys:
    """How fresh keys are made: counted on from the largest, or spelled at random.

    Attributes:
        prefix: Text before the number.
        suffix: Text after it.
        start: First number that no key of the table had.
        digits: Digits at least, with leading zeros.
        letters: Characters at each place of a spelled key; empty for counted ones.
    """

    prefix: str = ""
    suffix: str = ""
    start: int = 1
    digits: int = 0
    letters: tuple[str, ...] = ()

    @classmethod
    def of(cls, cells: pd.Series) -> Keys:
        """From the keys of a table."""
        import pandas as pd

        if pd.api.types.is_integer_dtype(cells.dtype):
            return cls(start=int(cells.max()) + 1 if len(cells) else 1)
        texts = [str(v) for v in cells]
        found = [re.fullmatch(r"(\D*)(\d+)(\D*)", t) for t in texts]
        ends = {(m[1], m[3]) for m in found if m}
        if len(ends) == 1 and all(found):
            prefix, suffix = ends.pop()
            numbers = [m[2] for m in found if m]
            digits = min(map(len, numbers)) if any(n.startswith("0") for n in numbers) else 0
            return cls(prefix, suffix, max(map(int, numbers)) + 1, digits)
        size = max(map(len, texts), default=0)
        letters = tuple(
            "".join(sorted({t[i] for t in texts if len(t) > i})) for i in range(min(size, 40))
        )
        room = sum(np.log10(max(len(c), 1)) for c in letters)
        # Too few spellings would hit old keys: longer ones cannot.
        more = int(max(0, np.ceil(np.log10(len(texts) + 1) + 6 - room)))
        return cls(letters=(*letters, *(["0123456789"] * more)))

    def draw(self, gone: np.ndarray, rows: np.ndarray, name: Any, dtype: str) -> pd.Series:
        """One key for each row (N, D) of a table, different within it; missing where ``gone``."""
        import pandas as pd

        n = len(gone)
        if pd.api.types.is_integer_dtype(dtype_named(dtype)):
            whole = pd.Series(np.arange(n, dtype="int64") + self.start, name=name)
            return whole.astype(dtype_named(dtype)) if not gone.any() else whole.mask(gone)
        keys = (
            self._spelled(n, zlib.crc32(np.ascontiguousarray(rows).tobytes()))
            if self.letters
            else self._counted(n)
        )
        return pd.Series(keys, name=name, dtype=object).mask(gone).astype(dtype_named(dtype))

    def _counted(self, n: int) -> list[str]:
        numbers = range(self.start, self.start + n)
        return [f"{self.prefix}{i:0{self.digits}d}{self.suffix}" for i in numbers]

    def _spelled(self, n: int, seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        keys: dict[str, None] = {}
        while len(keys) < n:
            places = [rng.choice(list(c), n) for c in self.letters]
            keys |= dict.fromkeys("".join(letters) for letters in zip(*places, strict=True))
        return list(keys)[:n]

    def __str__(self) -> str:
        if self.letters:
            return f"of {len(self.letters)} characters"
        return f"from {self.prefix}{self.start:0{self.digits}d}{self.suffix}"


LEFT_OUT = "leave it out: schema={{{name!r}: {{'kind': 'ignore'}}}}"
FRESH = "draw fresh ones: schema={{{name!r}: {{'kind': 'key'}}}}"
NUMERIC = "read them as numbers: schema={{{name!r}: {{'kind': 'numeric'}}}}"
MISSING = (
    "read what is no number as missing: na_values=[{odd!r}] in pandas.read_csv, --na on the "
    "command line"
)
CONVERTED = (
    "convert them, e.g. pd.to_numeric(x.str.replace(...)), or read the file with thousands= or "
    "decimal="
)
MARKS = "$€£¥%,"  # beside the digits of amounts and shares in text


def suspicion(cells: pd.Series, labels: bool) -> str | None:
    """What to say about a column of canonical cells that looks like a key, text or numbers.

    What it has, and what to do about it.
    """
    import pandas as pd

    there = cells.dropna()
    name, n = cells.name, len(there)
    if n < 50:
        return None
    count = int(there.nunique())
    keys = f"{LEFT_OUT}; or {FRESH}".format(name=name)
    if labels:
        misread = _misread(there, count)
        if misread or (isinstance(cells.dtype, pd.CategoricalDtype) and count < 0.9 * n):
            return misread
        if count < max(0.5 * n, 21):
            return None
        texts = [str(v) for v in there.iloc[:200]]
        free = np.mean([t.count(" ") >= 2 for t in texts]) > 0.5
        word = "free text" if free else "keys or names"
        return (
            f"{count} labels in {n} rows: {word}, of which only those of the table are drawn; "
            f"{keys}"
        )
    if count < n or n < 100 or not pd.api.types.is_integer_dtype(cells.dtype):
        return None
    whole = there.to_numpy()
    if (whole[1:] > whole[:-1]).all() or int(whole.max()) - int(whole.min()) < 1.5 * n:
        return f"{n} different integers that count the rows: keys; {keys}"
    return None


def _misread(there: pd.Series, count: int) -> str | None:
    """Labels that write times, or numbers: plainly, with a mark, beside a word for missing."""
    import pandas as pd

    if count <= 20:
        return None
    levels = pd.Series(there.unique()).astype(object)
    if not all(isinstance(v, str) for v in levels):
        return None
    bare = levels.str.replace(rf"[\s{MARKS}]", "", regex=True)
    odd = levels[pd.to_numeric(bare, errors="coerce").isna()]
    if len(odd) > 0.2 * count:
        return _times(levels, there.name)
    marks = [m for m in MARKS if levels.str.contains(m, regex=False).any()]
    if not marks and levels.str.match(r"0\d").any():
        return None  # codes
    found = f"{count} labels that are numbers"
    if marks:
        found += f" written with {' '.join(marks)}, e.g. {levels.drop(odd.index).iloc[0]!r}"
    if len(odd):
        found += f", but for {len(odd)}, e.g. {odd.iloc[0]!r}"
    ways = [
        *([CONVERTED] if marks else []),
        *([MISSING.format(odd=odd.iloc[0])] if len(odd) else []),
    ]
    return f"{found}; {' and '.join(ways or [NUMERIC.format(name=there.name)])}"


def _times(levels: pd.Series, name: Any) -> str | None:
    """Labels most of which are times in text, in some way that is not read by itself."""
    import pandas as pd

    like = levels.str.fullmatch(r"(?:\d{1,4}|[A-Za-z]{3,9})[-/., ]+.*\d.*")
    if like.mean() < 0.8:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas on which of the numbers is the month
        found = pd.to_datetime(levels, format="mixed", errors="coerce", utc=True)
    if found.notna().mean() < 0.8:
        return None
    return (
        f"{len(levels)} labels that are times in text, e.g. {levels.iloc[0]!r}; convert them with "
        f"pd.to_datetime(..., format=...), or, if pandas tells day and month apart, read them so: "
        f"schema={{{name!r}: {{'kind': 'datetime'}}}}"
    )
