"""Tables in files, also larger than memory: CSV and Parquet through pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TableFile"]


class TableFile:
    """Rows of a CSV or Parquet file, or of a folder of them, without holding them all.

    Args:
        path: The file or folder.
        columns: Columns to read; None for all.

    Raises:
        ValueError: If the ending is not known.
        ImportError: If pyarrow is missing.
    """

    def __init__(self, path: Any, columns: Sequence[str] | None = None) -> None:
        try:
            import pyarrow.dataset as ds
        except ImportError as error:
            raise ImportError(
                "reading files needs pyarrow: pip install 'pyroflows[parquet]'"
            ) from error
        self.path = Path(path)
        names = (
            [self.path]
            if self.path.is_file()
            else sorted(p for p in self.path.iterdir() if p.is_file())
        )
        kinds = {p.suffix.lower() for p in names}
        if not kinds <= {".csv", ".parquet"} or len(kinds) != 1:
            raise ValueError(
                f"{path}: expected .csv or .parquet, got {sorted(kinds) or 'nothing'}"
            )
        self.kind = kinds.pop()[1:]
        self.columns = list(columns) if columns is not None else None
        self._data = ds.dataset([str(p) for p in names], format=self.kind)
        unknown = [c for c in self.columns or [] if c not in self._data.schema.names]
        if unknown:
            raise ValueError(f"{path} has no columns {unknown}; it has {self._data.schema.names}")

    def count(self) -> int:
        """Number of rows (CSV: one pass)."""
        return self._data.count_rows()

    def batches(self, rows: int = 65536) -> Iterator[pd.DataFrame]:
        """All rows in file order."""
        for batch in self._data.to_batches(
            columns=self.columns, batch_size=rows, batch_readahead=1, fragment_readahead=1
        ):
            if batch.num_rows:
                yield batch.to_pandas()

    def _pieces(self) -> list[Any]:
        if self.kind == "csv":
            return list(self._data.get_fragments())
        return [piece for f in self._data.get_fragments() for piece in f.split_by_row_group()]

    def read(self) -> pd.DataFrame:
        """All rows at once."""
        return self._data.to_table(columns=self.columns).to_pandas()

    def shuffled(
        self, rows: int, rng: np.random.Generator, *, rank: int = 0, world: int = 1
    ) -> Iterator[pd.DataFrame]:
        """About all rows in shuffled chunks of ``rows``, from row groups in random order.

        A process gets its own share of them.
        """
        import pandas as pd

        pieces = self._pieces()
        order = rng.permutation(len(pieces))
        mine = order[rank::world] if len(pieces) >= world else order
        held: list[pd.DataFrame] = []
        size = 0
        for i in mine:
            for k, batch in enumerate(
                pieces[i].to_batches(columns=self.columns, batch_size=65536, batch_readahead=1)
            ):
                if not batch.num_rows or (len(pieces) < world and k % world != rank):
                    continue
                held.append(batch.to_pandas())
                size += batch.num_rows
                if size >= rows:
                    yield pd.concat(held, ignore_index=True).sample(
                        frac=1, random_state=int(rng.integers(2**31))
                    )
                    held, size = [], 0
        if held:
            yield pd.concat(held, ignore_index=True).sample(
                frac=1, random_state=int(rng.integers(2**31))
            )

    def sample(self, rows: int, rng: np.random.Generator) -> pd.DataFrame:
        """About ``rows`` random rows, a share of each of up to 64 random row groups.

        Of a CSV file, which has no groups, a share of the whole.
        """
        import pandas as pd

        total = self.count()
        if total <= rows:
            return self.read()
        pieces = self._pieces()
        if self.kind == "csv":
            share = rows / total
            parts = [
                b.sample(frac=share, random_state=int(rng.integers(2**31))) for b in self.batches()
            ]
            return pd.concat(parts, ignore_index=True)
        few = rng.permutation(len(pieces))[:64]
        each = -(-rows // len(few))
        parts = []
        for i in few:
            table = pieces[i].to_table(columns=self.columns)
            pick = np.sort(rng.permutation(table.num_rows)[:each])
            parts.append(table.take(pick).to_pandas())
        return pd.concat(parts, ignore_index=True)


def shards_of(
    file: TableFile,
    schema: Any,
    rng: np.random.Generator,
    rank: int,
    world: int,
    rows: int = 131072,
) -> Any:
    """A source of training rows for :func:`pyroflows.density.training.train`."""

    def shards() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for frame in file.shuffled(rows, rng, rank=rank, world=world):
            values = torch.from_numpy(schema.encode(frame))
            yield (
                values,
                torch.ones(len(values), dtype=torch.float64),
                torch.full((len(values),), -1),
            )

    return shards
