"""Rows to train on: data, context and weights, checked, parted and cut into minibatches."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from pyroflows.flow import Flow
from pyroflows.supports import is_real

__all__ = ["Rows", "as_rows", "held_count", "minibatches", "part_rows"]


NAMES = ("x", "context", "sample_weight")


class Rows(NamedTuple):
    """Data, context and weights, one row each."""

    x: Tensor
    context: Tensor | None
    weight: Tensor | None

    def part(self, index: Tensor | slice) -> Rows:
        """Return some of the rows."""
        x, context, weight = (None if v is None else v[index] for v in self)
        return Rows(cast(Tensor, x), context, weight)

    def some(self, count: int) -> Rows:
        """Return about ``count`` rows, evenly spread."""
        return self.part(slice(None, None, max(1, len(self.x) // count)))

    def chunks(self) -> Iterator[Rows]:
        """Yield the rows in order, as many at a time as are scored at once."""
        size = max(1, min(8192, 2**20 // max(1, self.x[:1].numel())))
        return (self.part(slice(i, i + size)) for i in range(0, len(self.x), size))

    @classmethod
    def concatenate(cls, parts: Sequence[Rows]) -> Rows:
        """Return the rows of several.

        Raises:
            ValueError: If they have not all the same parts and shapes.
        """
        columns: list[Any] = []
        for name, values in zip(NAMES, zip(*parts, strict=True), strict=True):
            shapes = {None if v is None else tuple(v.shape[1:]) for v in values}
            if len(shapes) > 1:
                raise ValueError(f"fit: batches disagree on the shape of {name}: {shapes}")
            columns.append(None if values[0] is None else torch.cat(values))
        return cls(*columns)

    def digest(self) -> str:
        """Return what tells the rows from others, by some of them."""
        found = hashlib.sha256()
        for value in self.some(8192):
            if value is not None:
                found.update(f"{len(self.x)} {tuple(value.shape)} {value.dtype}".encode())
                found.update(value.detach().double().cpu().numpy().tobytes())
        return found.hexdigest()[:16]

    def to(self, flow: nn.Module) -> Rows:
        """Return the rows in the dtype and on the device of the flow.

        Raises:
            ValueError: If that dtype cannot hold them, or they are outside the flow's support.
        """
        like = next(flow.parameters())
        x, context, weight = (None if v is None else v.to(like) for v in self)
        if getattr(flow, "embedding", None) is not None and self.context is not None:
            if not self.context.is_floating_point():
                context = self.context.to(like.device)  # the embedding's business: ids, say
        rows = Rows(cast(Tensor, x), context, weight)
        for name, value in zip(NAMES, rows, strict=True):
            _refuse(value, torch.isfinite, f"of {name} are beyond {like.dtype}; use flow.double()")
        if isinstance(flow, Flow) and not is_real(flow.support):
            inside = flow.support.check
            _refuse(rows.x, inside, f"of x lie outside the flow's support, {flow.support}")
        return rows


def _refuse(value: Tensor | None, good: Callable[[Tensor], Tensor], what: str) -> None:
    """Raise an error if some rows of ``value`` are not good."""
    if value is None:
        return
    bad = int((~good(value)).reshape(len(value), -1).any(-1).sum()) if value.numel() else 0
    if bad:
        raise ValueError(f"fit: {bad} rows {what}")


def _tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    found = np.asarray(values)
    if found.dtype.kind not in "biufc":
        raise TypeError(
            f"fit expects numbers; got {type(values).__name__} of {found.dtype}. Of a table with "
            "text or dates, DensityEstimator learns the density"
        )
    return torch.tensor(found)


def as_rows(x: Tensor, context: Tensor | None = None, weight: Tensor | None = None) -> Rows:
    """Data, context and weights as finite tensors, in the dtype in which they came."""
    x = _tensor(x)
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"fit expects real numbers; got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"fit expects x of shape (n, *event); got {tuple(x.shape)}")
    rows = Rows(
        x,
        None if context is None else _tensor(context),
        None if weight is None else _tensor(weight),
    )
    for name, value in zip(NAMES, rows, strict=True):
        if value is None:
            continue
        count = len(value) if value.dim() else 0
        if count != len(x) or not value.dim():
            raise ValueError(f"fit: x has {len(x)} rows, but {name} has {count}")
        _refuse(
            value,
            torch.isfinite,
            f"of {name} have missing or infinite values; drop or impute them",
        )
    if rows.weight is not None and rows.weight.dim() > 1:
        raise ValueError(
            f"fit expects sample_weight of shape (n,); got {tuple(rows.weight.shape)}"
        )
    if rows.weight is not None and bool((rows.weight < 0).any()):
        raise ValueError("fit: sample_weight must not be negative")
    return rows


def part_rows(
    rows: Rows,
    validation: float | tuple[Tensor, ...],
    generator: torch.Generator,
) -> tuple[Rows, Rows | None]:
    """Return the rows to train on and those held out.

    Raises:
        ValueError: If a part is too small.
    """
    held: Rows | None
    if isinstance(validation, tuple):
        train, held = rows, as_rows(*validation)
    elif isinstance(validation, (int, float)) and 0 <= validation < 1:
        held, train = _split(rows, validation, generator)
    else:
        raise ValueError(
            "fit: validation must be a number in [0, 1), a loader, or a tuple (x,), (x, context) "
            f"or (x, context, sample_weight); got {validation!r:.80}"
        )
    if len(train.x) < 2:
        raise ValueError(f"fit needs at least 2 training rows; got {len(train.x)}")
    for part, some in (("training", train), ("validation", held)):
        if some is not None and (
            not len(some.x) or (some.weight is not None and not some.weight.any())
        ):
            raise ValueError(f"fit: the {part} part has no rows of positive weight")
    constant = (train.x == train.x[:1]).flatten(1).all(0)
    if constant.any():
        which = constant.nonzero().flatten().tolist()
        warnings.warn(
            f"fit: features {which[:8]} of x are constant, where no density is the best: leave "
            "them out, or add noise of the size of their resolution",
            stacklevel=6,
        )
    return train, held


def held_count(n: int, fraction: float) -> int:
    """Return how many of n rows a fraction holds out.

    Raises:
        ValueError: If that is none, though the fraction is not 0; or if it is no fraction.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fit: validation must be in [0, 1); got {fraction}")
    count = round(fraction * n)
    if fraction and not count:
        raise ValueError(
            f"fit: {n} rows are too few to hold out {fraction:.0%}; pass validation=0"
        )
    return count


def _split(rows: Rows, fraction: float, generator: torch.Generator) -> tuple[Rows | None, Rows]:
    n = len(rows.x)
    count = held_count(n, fraction)
    order = torch.randperm(n, generator=generator).to(rows.x.device)
    return (rows.part(order[:count]) if count else None), rows.part(order[count:])


def minibatches(rows: Rows, size: int, generator: torch.Generator) -> Iterator[Rows]:
    """Full batches in random order; the rest of an epoch takes part in the next shuffle."""
    n = len(rows.x)
    order = torch.randperm(n, generator=generator).to(rows.x.device)
    for i in range(0, n - size + 1, size):
        yield rows.part(order[i : i + size])
