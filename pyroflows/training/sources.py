"""Where rows come from: tensors, or anything that gives batches, epoch after epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    TensorDataset,
)

from pyroflows.training.parallel import agreed, rank_and_world
from pyroflows.training.rows import NAMES, Rows, as_rows, held_count, minibatches, part_rows

__all__ = ["Loader", "Source", "Table", "sources"]

FIRST = 8192, 2**26  # rows, and numbers in them, of a loader that the flow is standardized by


class Source(Protocol):
    """Rows for training and scoring, in the dtype and on the device of the flow."""

    @property
    def rows(self) -> Rows:
        """All rows, or the first, as they came."""
        ...

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        ...

    def count(self) -> int | None:
        """Batches of an epoch; None if nobody knows."""
        ...

    def batches(self, epoch: int) -> Iterator[Rows]:
        """The batches of an epoch, to be trained on."""
        ...

    def sweep(self) -> Iterator[Rows]:
        """All rows once, to be scored."""
        ...

    def identity(self) -> str:
        """What tells these rows from others."""
        ...

    def generators(self) -> list[torch.Generator]:
        """Those of their own that order the rows."""
        ...


class Table:
    """Rows in memory; of several processes each takes its share of every batch."""

    def __init__(
        self, rows: Rows, flow: nn.Module, generator: torch.Generator, batch_size: int = 1
    ) -> None:
        self.rows, self.flow, self.generator = rows, flow, generator
        self.batch_size = min(len(rows.x), batch_size)

    @cached_property
    def _there(self) -> Rows:
        return self.rows.to(self.flow)

    def count(self) -> int | None:
        """Full batches; the rest of an epoch takes part in the next shuffle."""
        return len(self.rows.x) // self.batch_size

    def batches(self, epoch: int) -> Iterator[Rows]:
        """Full batches in random order."""
        rank, world = rank_and_world()
        for batch in minibatches(self._there, self.batch_size, self.generator):
            yield batch if world == 1 else batch.part(slice(rank, None, world))

    def sweep(self) -> Iterator[Rows]:
        """Chunks in order."""
        rank, world = rank_and_world()
        rows = self._there if world == 1 else self._there.part(slice(rank, None, world))
        return rows.chunks()

    def identity(self) -> str:
        """A digest of the rows."""
        return self.rows.digest()

    def generators(self) -> list[torch.Generator]:
        """The one of the minibatches."""
        return [self.generator]


class Loader:
    """Batches of a DataLoader, or of anything that can be iterated over again.

    Of several processes each brings its own: the sampler shares the rows out.
    """

    def __init__(self, batches: Iterable[Any], flow: nn.Module, *, name: str, once: bool) -> None:
        self.given, self.flow, self.name = batches, flow, name
        self.once = hasattr(batches, "__next__")
        if self.once and not once:
            raise ValueError(
                f"fit: {name} is an iterator, which can be read only once. Pass what can be read "
                "again, such as a DataLoader, a list of batches, or an object whose __iter__ "
                "begins anew; an iterator will do for x with num_epochs=1"
            )

    @cached_property
    def rows(self) -> Rows:
        """The rows of the first batches."""
        given, first = iter(self.given), []
        seen, numbers = 0, 0
        for batch in given:
            first.append(batch)
            x = self._read(batch, len(first)).x
            seen, numbers = seen + len(x), numbers + x.numel()
            if seen >= FIRST[0] or numbers >= FIRST[1]:
                break
        self._refuse_nothing(seen)
        if self.once:
            self.given = chain(first, given)
        return Rows.concatenate([self._read(batch, i + 1) for i, batch in enumerate(first)])

    @cached_property
    def batch_size(self) -> int:
        """Rows of the DataLoader's batches; an eighth of the first rows for others."""
        return getattr(self.given, "batch_size", None) or max(1, len(self.rows.x) // 8)

    def count(self) -> int | None:
        """What the loader says; of several the least."""
        try:
            count = len(self.given)  # type: ignore[arg-type]
        except TypeError:
            count = 0
        return int(agreed(count, like=next(self.flow.parameters()), op="MIN")) or None

    def batches(self, epoch: int) -> Iterator[Rows]:
        """Batches as the loader gives them, as long as every process has one."""
        set_epoch = getattr(getattr(self.given, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        like, batches = next(self.flow.parameters()), self.sweep()
        while True:
            batch = next(batches, None)
            if not agreed(batch is not None, like=like, op="MIN") or batch is None:
                return
            yield batch

    def sweep(self) -> Iterator[Rows]:
        """Batches as the loader gives them."""
        count = 0
        for count, batch in enumerate(self.given, 1):
            rows = self._read(batch, count)
            if len(rows.x):
                yield rows.to(self.flow)
        self._refuse_nothing(count)

    def _refuse_nothing(self, count: int) -> None:
        if not count:
            raise ValueError(f"fit: {self.name} gave no rows")

    def _read(self, batch: Any, number: int) -> Rows:
        where = f"batch {number} of {self.name}"
        if isinstance(batch, Mapping):
            if "x" not in batch or set(batch) - set(NAMES):
                raise ValueError(
                    f"fit: {where} has {sorted(map(str, batch))}; expected x, and perhaps context "
                    "and sample_weight"
                )
            parts: list[Any] = [batch.get(name) for name in NAMES]
        else:
            parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        if not 1 <= len(parts) <= 3:
            raise ValueError(
                f"fit: {where} has {len(parts)} parts; expected x, (x,), (x, context) or (x, "
                "context, sample_weight)"
            )
        try:
            return as_rows(*parts)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{error} (in {where})") from None

    def identity(self) -> str:
        """The number of batches, read or not."""
        return f"{self.count()} batches"

    def generators(self) -> list[torch.Generator]:
        """Those of a DataLoader, its dataset and its samplers, where they have their own."""
        names = "dataset", "sampler", "batch_sampler"
        owners = [self.given, *(getattr(self.given, name, None) for name in names)]
        owners.append(getattr(owners[-1], "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(g): g for g in found if g is not None}.values())


def sources(
    flow: nn.Module,
    data: tuple[Any, Any, Any],
    validation: Any,
    *,
    batch_size: int | None,
    generator: torch.Generator,
    once: bool,
) -> tuple[Source, Source | None]:
    """What to train on and what is held out.

    Args:
        flow: What is trained.
        data: x, context and weights; or what gives batches of them, and None.
        validation: See :func:`pyroflows.training.fit`.
        batch_size: Rows of a batch; None for about n / 20, between 32 and 512.
        generator: Of the split and of the minibatches.
        once: Whether it is enough that x can be read once.
    """
    x = data[0]
    if isinstance(x, TensorDataset) and data[1] is None and len(x.tensors) < 4:
        data = (*x.tensors, *data[len(x.tensors) :])
    elif _gives_batches(x, flow):
        if isinstance(x, (tuple, Mapping)):
            raise TypeError(
                "fit expects rows and contexts as fit(flow, x, context), and batches as a list or "
                f"a loader; got a {type(x).__name__} of them"
            )
        if data[1] is not None or data[2] is not None:
            raise ValueError(
                "fit: contexts and weights come with the batches of a loader, as (x, context, "
                "sample_weight)"
            )
        if isinstance(x, Dataset):
            x, validation = _load(x, validation, batch_size, generator)
        elif batch_size is not None:
            raise ValueError("fit: a loader has a batch size of its own; leave batch_size out")
        return Loader(x, flow, name="x", once=once), _held(flow, validation, generator)
    apart = _gives_batches(validation, flow) and not isinstance(validation, tuple)
    part = 0 if apart else 0.1 if validation is None else validation
    train, held = part_rows(as_rows(*data), part, generator)
    table = Table(train, flow, generator, batch_size or _default_size(len(train.x)))
    if held is not None:
        return table, Table(held, flow, generator)
    return table, _held(flow, validation if apart else None, generator)


def _default_size(n: int) -> int:
    return max(32, min(512, n // 20))


def _gives_batches(x: Any, flow: nn.Module) -> bool:
    """Whether ``x`` is read batch by batch; lists of numbers and of rows are rows."""
    if isinstance(x, (Dataset, DataLoader)) or hasattr(x, "__next__"):
        return True
    if isinstance(x, (Tensor, str)) or hasattr(x, "__array__") or not hasattr(x, "__iter__"):
        return False
    if not isinstance(x, (list, tuple)) or not x:
        return not isinstance(x, (list, tuple))
    first = x[0][0] if isinstance(x[0], (list, tuple)) and x[0] else x[0]
    return isinstance(first, Mapping) or getattr(first, "ndim", 0) > len(
        getattr(flow, "event_shape", (0,))
    )


def _load(
    data: Dataset, validation: Any, batch_size: int | None, generator: torch.Generator
) -> tuple[DataLoader, Any]:
    """Loaders of a dataset: of what is trained on, and of what is held out of it."""
    if isinstance(data, IterableDataset):
        return DataLoader(data, batch_size or 256), validation
    n = len(data)  # type: ignore[arg-type]
    if validation is None or isinstance(validation, (int, float)):
        count = held_count(n, 0.1 if validation is None else validation)
        order = torch.randperm(n, generator=generator).tolist()
        data, held = Subset(data, order[count:]), Subset(data, order[:count])
        n, validation = n - count, DataLoader(held, 512) if count else None
    size = min(n, batch_size or _default_size(n))
    world = rank_and_world()[1]
    if world == 1:
        return DataLoader(data, size, True, drop_last=True, generator=generator), validation
    shares: DistributedSampler = DistributedSampler(data, drop_last=True)
    return DataLoader(data, max(1, size // world), sampler=shares, drop_last=True), validation


def _held(flow: nn.Module, validation: Any, generator: torch.Generator) -> Source | None:
    """Rows or a loader of their own; a part of a loader cannot be held out."""
    if validation is None or (isinstance(validation, (int, float)) and not validation):
        return None
    if isinstance(validation, tuple):
        return Table(as_rows(*validation), flow, generator)
    if not _gives_batches(validation, flow):
        raise ValueError(
            "fit: beside a loader, validation must be None, a second loader, or rows (x,), (x, "
            f"context) or (x, context, sample_weight); got {validation!r:.80}"
        )
    if isinstance(validation, Dataset):
        validation = DataLoader(validation, 512)
    return Loader(validation, flow, name="validation", once=False)
