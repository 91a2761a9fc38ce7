"""Tables in files, also larger than memory: text through pandas, Parquet through pyarrow."""

from __future__ import annotations

import codecs
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch

from pyroflows.checks import users_line
from pyroflows.density.engine import Shards
from pyroflows.tables import Schema
from pyroflows.training.parallel import rank_and_world

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TEXT_ENDINGS", "Source", "TableFile", "ending_of", "is_text", "shards_of"]

TEXT_ENDINGS = (".csv", ".tsv", ".tab", ".txt")
PACKED_ENDINGS = (".gz", ".bz2", ".xz", ".zip", ".zst")
PARQUET_ENDINGS = (".parquet", ".pq")
CHUNK = 65536  # rows that are held at once
SHARD = 131072  # training rows that are encoded at once

Piece = Callable[[], Iterator["pd.DataFrame"]]


def ending_of(path: Any) -> str:
    """The ending that tells the format of a table, lower case: ``.csv`` for ``t.CSV.gz`` too."""
    endings = [e.lower() for e in Path(path).suffixes]
    if endings and endings[-1] in PACKED_ENDINGS:
        endings.pop()
    return endings[-1] if endings else ""


def is_text(path: Any) -> bool:
    """Whether a table is text, and not Parquet: a file, or a folder of them."""
    return any(ending_of(p) in TEXT_ENDINGS for p in _files(Path(path)))


@runtime_checkable
class Source(Protocol):
    """Rows that need not fit into memory: a file, or what has these methods, e.g. a database.

    Attributes:
        columns: Names of the columns that are read; None for all.
    """

    columns: list[Any] | None

    def count(self) -> int:
        """Number of rows."""
        ...

    def read(self) -> pd.DataFrame:
        """All of them."""
        ...

    def sample(self, rows: int, rng: np.random.Generator) -> pd.DataFrame:
        """About so many random rows."""
        ...

    def shuffled(
        self, rows: int, rng: np.random.Generator, *, rank: int = 0, world: int = 1
    ) -> Iterator[pd.DataFrame]:
        """About all rows in shuffled chunks of ``rows``; a process's own share of them."""
        ...


class TableFile:
    """Rows of a text or Parquet file, or of a folder of them, without holding them all.

    Text is read by :func:`pandas.read_csv`, so that a file means the same here as in Python. The
    separator is a tab for ``.tsv`` and ``.tab``; else a semicolon, tab or bar is taken where the
    first line has no comma. Text that is no UTF-8 is read as Windows-1252, with a warning. A
    column whose numbers begin with zeros, or that is text anywhere, is text everywhere. Folders
    may be Spark's (``_SUCCESS`` and hidden files are passed over) or Hive's:
    ``year=2024/part.csv`` gives a column ``year``.

    Args:
        path: The file or folder.
        columns: Columns to read; None for all.
        options: Keywords of :func:`pandas.read_csv`: ``sep``, ``decimal``, ``thousands``,
            ``encoding``, ``na_values``, ``header=None`` for a file without names, ``dtype``.

    Raises:
        ValueError: If the format is unknown, columns are missing, or a Parquet file is given
            options.
        OSError: If there is no such file.
        ImportError: If Parquet is asked for and pyarrow is missing.
    """

    def __init__(self, path: Any, columns: Sequence[str] | None = None, **options: Any) -> None:
        self.path = Path(path)
        files = _files(self.path)
        kinds = {ending_of(p) for p in files}
        if kinds <= set(PARQUET_ENDINGS) and kinds:
            if options:
                raise ValueError(f"{path} is Parquet: {sorted(options)} are for text")
            self._source: _Text | _Parquet = _Parquet(self.path, files)
        elif kinds <= set(TEXT_ENDINGS) and len(kinds) == 1:
            self._source = _Text(self.path, files, options)
        else:
            raise ValueError(
                f"{path}: expected a file or folder of one kind, {'/'.join(TEXT_ENDINGS)} (also "
                f"packed: {'/'.join(PACKED_ENDINGS)}) or {'/'.join(PARQUET_ENDINGS)}; got "
                f"{sorted(kinds) or 'nothing'}"
            )
        self.columns: list[Any] | None = list(columns) if columns is not None else None
        unknown = [c for c in self.columns or [] if c not in self.names]
        if unknown:
            raise ValueError(f"{path} has no columns {unknown}; it has {self.names}")

    @property
    def names(self) -> list[str]:
        """All columns of the file."""
        return self._source.names

    def count(self) -> int:
        """Number of rows (text: one pass)."""
        return self._source.count()

    def batches(self) -> Iterator[pd.DataFrame]:
        """All rows in file order, some tens of thousands at a time."""
        for piece in self._source.pieces(self.columns):
            yield from piece()

    def read(self) -> pd.DataFrame:
        """All rows at once."""
        import pandas as pd

        parts = list(self.batches())
        return pd.concat(parts, ignore_index=True) if parts else self._source.empty(self.columns)

    def shuffled(
        self, rows: int, rng: np.random.Generator, *, rank: int = 0, world: int = 1
    ) -> Iterator[pd.DataFrame]:
        """About all rows in shuffled chunks of ``rows``, from row groups or files in random order.

        A process gets its own share of them.
        """
        pieces = self._source.pieces(self.columns)
        order = rng.permutation(len(pieces))
        whole = len(pieces) >= world  # pieces can be dealt out; else batches are
        held: list[pd.DataFrame] = []
        for i in order[rank::world] if whole else order:
            for k, batch in enumerate(pieces[i]()):
                if not whole and k % world != rank:
                    continue
                held.append(batch)
                if sum(map(len, held)) >= rows:
                    yield _shuffle(held, rng)
                    held = []
        if held:
            yield _shuffle(held, rng)

    def sample(self, rows: int, rng: np.random.Generator) -> pd.DataFrame:
        """About ``rows`` random rows: a share of up to 64 random row groups, or of all text."""
        import pandas as pd

        total = self.count()
        if total <= rows:
            return self.read()
        parts = []
        if isinstance(self._source, _Text):
            for frame in self.batches():
                parts.append(frame.sample(frac=rows / total, random_state=_seed(rng)))
            return pd.concat(parts, ignore_index=True)
        pieces = self._source.pieces(self.columns)
        few = rng.permutation(len(pieces))[:64]
        each = -(-rows // len(few))
        for i in few:
            frame = pd.concat(list(pieces[i]()), ignore_index=True)
            parts.append(frame.sample(min(each, len(frame)), random_state=_seed(rng)))
        return pd.concat(parts, ignore_index=True)


class _Parquet:
    """Parquet files; a piece is a row group."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise ImportError(
                "reading Parquet needs pyarrow: pip install 'pyroflows[parquet]'"
            ) from error
        self._open = pq.ParquetFile  # not a dataset: its threads may outlive a scan that is left
        self._files = [(p, _keys(p, path)) for p in files]
        names = [_columns_of(self._open(p).schema_arrow) for p, _ in self._files]
        _refuse_other_names(files, names)
        self.names: list[str] = [*names[0], *self._files[0][1]]

    def count(self) -> int:
        return sum(self._open(p).metadata.num_rows for p, _ in self._files)

    def empty(self, columns: list[str] | None) -> pd.DataFrame:
        file, keys = self._files[0]
        frame = self._open(file).schema_arrow.empty_table().to_pandas().reset_index(drop=True)
        return frame.assign(**keys)[columns or self.names]

    def pieces(self, columns: list[str] | None) -> list[Piece]:
        wanted = columns or self.names

        def group(file: Path, keys: dict[str, Any], k: int) -> Iterator[pd.DataFrame]:
            stored = [c for c in wanted if c not in keys]
            with self._open(file) as opened:
                for batch in opened.iter_batches(CHUNK, row_groups=[k], columns=stored):
                    if batch.num_rows:
                        yield batch.to_pandas().reset_index(drop=True).assign(**keys)[wanted]

        return [
            functools.partial(group, file, keys, k)
            for file, keys in self._files
            for k in range(self._open(file).metadata.num_row_groups)
        ]


def _columns_of(schema: Any) -> list[str]:
    """Names in a Parquet file, without a pandas index that lies there unnamed."""
    return [n for n in schema.names if not n.startswith("__index_level_")]


def _refuse_other_names(files: Sequence[Path], names: Sequence[list[str]]) -> None:
    for file, own in zip(files, names, strict=True):
        if own != names[0]:
            raise ValueError(
                f"the files of a folder must have the same columns; {files[0].name} has "
                f"{names[0]}, {file.name} has {own}"
            )


class _Text:
    """Text files, read by pandas; a piece is a file."""

    def __init__(self, path: Path, files: list[Path], options: dict[str, Any]) -> None:
        self._files = [(p, _keys(p, path)) for p in files]
        self._options = {"index_col": False, "low_memory": False, **options}
        self._rows: int | None = None
        if ending_of(files[0]) in (".tsv", ".tab"):
            self._options.setdefault("sep", "\t")
        try:
            codecs.lookup(options.get("encoding") or "utf-8")
        except LookupError as error:
            raise ValueError(f"encoding={options['encoding']!r}: {error}") from None
        names = [self._decoded(functools.partial(self._names, p)) for p in files]
        _refuse_other_names(files, names)
        self.names: list[str] = [*names[0], *self._files[0][1]]
        zeros = self._decoded(self._zero_padded)
        if zeros:
            warnings.warn(
                f"{path}: {zeros} are read as text, since their numbers begin with zeros; "
                "dtype={name: float} reads them as numbers",
                stacklevel=users_line(),
            )
        self._as_text(zeros)

    def _decoded(self, read: Callable[[], Any]) -> Any:
        """What ``read`` returns; the encoding is settled by the first text that is no UTF-8."""
        try:
            return read()
        except UnicodeDecodeError as error:
            if "encoding" in self._options:
                raise ValueError(
                    f"{self._files[0][0]} is not {self._options['encoding']}: {error}; "
                    "pass another encoding="
                ) from None
            warnings.warn(
                f"{self._files[0][0]} is not UTF-8; it is read as Windows-1252. "
                "If that is wrong, pass encoding=",
                stacklevel=users_line(),
            )
            self._options["encoding"] = "cp1252"
            return read()

    def _names(self, file: Path) -> list[str]:
        """The names in the first line; settles separator and missing names on the way."""
        import pandas as pd

        nameless = self._options.get("header", 0) is None

        def head() -> list[str]:
            options = {k: v for k, v in self._options.items() if k not in ("dtype", "names")}
            first = pd.read_csv(file, nrows=int(nameless), **options)
            return [str(c) for c in (first.iloc[0] if nameless else first.columns)]

        found = head()
        if "sep" not in self._options and len(found) == 1:
            other = [s for s in ";\t|" if s in found[0]]
            if other:
                self._options["sep"] = other[0]
                found = head()
        if nameless:
            names = [f"x{i}" for i in range(len(found))]
            self._options["names"] = self._options.get("names", names)
            return list(self._options["names"])
        if pd.to_numeric(pd.Series(found), errors="coerce").notna().all():
            warnings.warn(
                f"{file}: the first line looks like data, not like names: {found[:5]}; "
                "for a file without names pass header=None",
                stacklevel=users_line(),
            )
        return found

    def _zero_padded(self) -> list[str]:
        """Columns with codes such as ``00501``, which are no numbers."""
        import pandas as pd

        file, _ = self._files[0]
        given = self._options.get("dtype") or {}
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            try:
                head = pd.read_csv(file, nrows=10_000, **{**self._options, "dtype": str})
            except pd.errors.ParserWarning as error:
                raise ValueError(
                    f"{file}: rows have more fields than the {len(self.names)} names: {error}"
                ) from None

        def padded(text: pd.Series) -> bool:
            return bool(text.str.fullmatch(r"\d+").all() and text.str.match(r"0\d").any())

        return [str(c) for c in head.columns if c not in given and padded(head[c].dropna())]

    def _as_text(self, names: Iterable[str]) -> None:
        have = self._options.get("dtype") or {}
        given = have if isinstance(have, dict) else dict.fromkeys(self.names, have)
        self._options["dtype"] = {**dict.fromkeys(names, str), **given}

    def count(self) -> int:
        """Read everything once: count the rows, and find the columns that are text somewhere."""
        if self._rows is None:
            self._rows, kinds = self._decoded(self._scan)
            self._as_text(name for name, k in kinds.items() if "text" in k and len(k) > 1)
        return self._rows

    def _scan(self) -> tuple[int, dict[str, set[str]]]:
        rows = 0
        kinds: dict[str, set[str]] = {name: set() for name in self.names}
        for frame in self._chunks(None):
            rows += len(frame)
            for name in frame:
                kinds[name] |= _kind(frame[name])
        return rows, kinds

    def empty(self, columns: list[str] | None) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(columns=columns or self.names)

    def pieces(self, columns: list[str] | None) -> list[Piece]:
        self.count()
        return [functools.partial(self._chunks, columns, [entry]) for entry in self._files]

    def _chunks(self, columns: list[str] | None, entries: Any = None) -> Iterator[pd.DataFrame]:
        import pandas as pd

        for file, keys in entries or self._files:
            options = dict(self._options)
            if columns is not None:
                options["usecols"] = [c for c in columns if c not in keys]
            with pd.read_csv(file, chunksize=CHUNK, **options) as reader:
                for frame in reader:
                    frame = frame.assign(**keys).reset_index(drop=True)
                    if len(frame):
                        yield frame if columns is None else frame[columns]


def _files(path: Path) -> list[Path]:
    """The files of a table: Spark's and editors' own files in a folder are none of it."""
    if not path.is_dir():
        path.stat()  # raises where there is nothing
        return [path]
    inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
    return [
        p
        for p in inside
        if not any(part.startswith(("_", ".")) for part in p.relative_to(path).parts)
    ]


def _keys(file: Path, base: Path) -> dict[str, Any]:
    """What Hive wrote into the folders' names: ``{"year": 2024}`` of ``year=2024/part.csv``."""
    import pandas as pd

    folders = file.relative_to(base).parts[:-1] if base.is_dir() else ()
    pairs = [part.split("=", 1) for part in folders if "=" in part]
    return {k: v if pd.isna(n := pd.to_numeric(v, errors="coerce")) else n for k, v in pairs}


def _kind(series: pd.Series) -> set[str]:
    """What some rows of a column were read as; nothing if all are missing."""
    import pandas as pd

    if series.isna().all():
        return set()
    kind = pd.api.types.infer_dtype(series, skipna=True)
    return {
        "number"
        if kind in ("integer", "floating", "mixed-integer-float")
        else kind
        if kind == "boolean"
        else "text"
    }


def _shuffle(frames: list[pd.DataFrame], rng: np.random.Generator) -> pd.DataFrame:
    import pandas as pd

    whole = pd.concat(frames, ignore_index=True)
    return whole.sample(frac=1, random_state=_seed(rng))


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def shards_of(source: Source, schema: Schema, rng: np.random.Generator) -> Shards:
    """This process's training rows of a table larger than memory."""
    source.columns = schema.names
    rank, world = rank_and_world()

    def shards() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for frame in source.shuffled(SHARD, rng, rank=rank, world=world):
            values = torch.from_numpy(schema.encode(frame))
            weight = torch.ones(len(values), dtype=torch.float64)
            yield values, weight, torch.full((len(values),), -1)

    return shards
