"""Subsampled data, whole again: a plate's rows visited block by block, each row once."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyroflows.guides.batching import BUDGET
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.routes import operations
from pyroflows.guides.substitute import Substitute
from pyroflows.training.seeds import preserved, seeded

__all__ = ["NotJudged", "Subsampled", "WholeDensity", "subsampled_plates"]

_MOST_BLOCKS = 200


class NotJudged(ValueError):
    """Why a guide cannot be compared with the posterior of all rows."""


@dataclass(frozen=True)
class Subsampled:
    """A plate that sees ``size`` of ``full_size`` rows at a time.

    Attributes:
        name: Its name.
        dim: Its (negative) axis.
        size: Rows of one run.
        full_size: Rows in all.
    """

    name: str
    dim: int
    size: int
    full_size: int

    @property
    def num_blocks(self) -> int:
        """Blocks of ``size`` rows that cover all."""
        return -(-self.full_size // self.size)

    def block(self, number: int) -> tuple[Tensor, Tensor]:
        """Indices of a block's rows, and which of them no earlier block had."""
        start = min(number * self.size, self.full_size - self.size)
        index = torch.arange(start, start + self.size)
        return index, index >= number * self.size


def subsampled_plates(trace: poutine.Trace) -> list[Subsampled]:
    """The plates of a trace that do not see all of their rows."""
    found = {}
    for site in trace.nodes.values():
        for f in site["cond_indep_stack"] if site["type"] == "sample" else ():
            if f.vectorized and f.full_size is not None and f.full_size != f.size:
                found[f.name] = Subsampled(f.name, f.dim, f.size, f.full_size)
    return list(found.values())


class _Rows(Messenger):
    """Run a model on chosen blocks of rows, without the scale of a subsample.

    A site counts once: where it lies in no subsampled plate, or not in all, with the first block
    of the others. Without blocks nothing counts.
    """

    def __init__(self, plates: list[Subsampled]) -> None:
        super().__init__()
        self.plates = plates
        self.numbers: dict[str, int] | None = {p.name: 0 for p in plates}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        chosen = {p.name: p for p in self.plates}
        if site_is_subsample(msg):
            if msg["name"] in chosen:
                number = (self.numbers or {}).get(msg["name"], 0)
                msg["value"] = chosen[msg["name"]].block(number)[0]
            return
        inside = {f.name for f in msg["cond_indep_stack"]} & chosen.keys()
        numbers = self.numbers
        if numbers is None or any(numbers[name] for name in chosen.keys() - inside):
            msg["mask"] = False
            return
        for name in inside:
            plate = chosen[name]
            msg["scale"] = msg["scale"] * plate.size / plate.full_size
            unseen = plate.block(numbers[name])[1]
            if not unseen.all() and msg["mask"] is not False:
                rows = unseen.reshape((-1,) + (1,) * (-plate.dim - 1))
                msg["mask"] = rows if msg["mask"] is None else rows & msg["mask"]


class _Index(Messenger):
    """Give one plate these indices."""

    def __init__(self, name: str, index: Tensor) -> None:
        super().__init__()
        self.name, self.index = name, index

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] == self.name and site_is_subsample(msg):
            msg["value"] = self.index


class WholeDensity(LatentDensity):
    r"""The log-density given all rows, of a model whose plates see some of them at a time.

    .. math:: \log p(u) = \log|\det T'(u)| + \sum_b \log p_b(u)

    with the sum over blocks of rows, each row in one of them and unscaled, and what lies outside
    of the plates in the first. Cost: a run of the model for each block, and one.

    Raises:
        NotJudged: If the model does not follow the plate's indices, has latents inside of a
            subsampled plate, or too many blocks; or draws rows or noise by itself.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.plates: list[Subsampled] = []
        super().__init__(model, args, kwargs, **options)
        seen = self.trace(self.init_loc)
        self.plates = subsampled_plates(seen)
        if self.plates:
            self._make_whole(seen)
        if self.stochastic:
            raise NotJudged(
                "the model's log-density at one and the same point differs from run to run, as it "
                "draws rows or noise by itself: give it all rows, or let pyro.plate draw them "
                "(subsample_size=)"
            )

    def _make_whole(self, seen: poutine.Trace) -> None:
        """Visit all rows from now on."""
        for site in self.sites:
            inside = {f.name for f in seen.nodes[site.name]["cond_indep_stack"]}
            for plate in self.plates:
                if plate.name in inside:
                    raise NotJudged(
                        f"'{site.name}' lies in the plate '{plate.name}', which sees "
                        f"{plate.size} of {plate.full_size} rows, and the posterior of one "
                        "subsample is another one: take a plate of all rows"
                    )
        count = math.prod(p.num_blocks for p in self.plates)
        if count > _MOST_BLOCKS:
            raise NotJudged(
                f"all rows take {count} runs of the model for each batch of latents "
                f"(at most {_MOST_BLOCKS}): enlarge the subsample of '{self.plates[0].name}'"
            )
        self._check_indices()
        self._rows = _Rows(self.plates)
        self.model = self._rows(self.model)
        self._subsampled = False

    @property
    def elements(self) -> int:
        """Elements of the largest tensors of all runs for one point: what an evaluation costs."""
        runs = math.prod(p.num_blocks for p in self.plates) + bool(self.plates)
        return BUDGET // self.batch_size * runs

    @functools.cached_property
    def operations(self) -> int:
        """Operations on tensors of an evaluation: what it costs however small the batch."""
        with preserved():
            return operations(lambda: self(self.init_loc))

    def _blocks(self) -> Iterator[dict[str, int]]:
        names = [p.name for p in self.plates]
        for numbers in itertools.product(*(range(p.num_blocks) for p in self.plates)):
            yield dict(zip(names, numbers, strict=True))

    @contextmanager
    def _at(self, numbers: dict[str, int] | None) -> Iterator[None]:
        self._rows.numbers, before = numbers, self._rows.numbers
        try:
            yield
        finally:
            self._rows.numbers = before

    def _check_indices(self) -> None:
        """Whether the data follow the indices of each plate."""
        model = self.model
        for plate in self.plates:
            totals = []
            for number in (0, plate.num_blocks - 1):
                self.model = _Index(plate.name, plate.block(number)[0])(model)
                with torch.no_grad(), seeded(0):
                    totals.append(super().evaluate(self.init_loc).total)
            self.model = model
            if totals[0] == totals[1]:
                raise NotJudged(
                    f"the plate '{plate.name}' has {plate.full_size} rows and the model was given "
                    f"{plate.size}: give diagnose all of them"
                )

    def evaluate(self, u: Tensor) -> Substitute:
        """As in :class:`LatentDensity`, with all rows."""
        if not self.plates:
            return super().evaluate(u)
        with self._at(None):
            run = super().evaluate(u)
        jacobian = run.total
        for numbers in self._blocks():
            with self._at(numbers):
                run.total = run.total + (super().evaluate(u).total - jacobian)
        return run

    def whole(
        self,
        function: Callable[[poutine.Trace], dict[str, dict[str, Tensor]]],
        u: Tensor,
        axes: Callable[[str, str], Mapping[str, int]],
        *,
        same: bool = True,
    ) -> dict[str, dict[str, Tensor]]:
        """``function(trace)``, groups of tensors by name, at each of ``u``; of all rows.

        Args:
            function: As in :meth:`map`.
            u: Latents, ``(S, D)``.
            axes: Callable ``(group, name)`` that gives the axes of the tensor ``(S, ...)`` on
                which each plate lies.
            same: As in :meth:`map`.
        """
        if not self.plates:
            return self.map(function, u, same=same)
        whole: dict[str, dict[str, Tensor]] = {}
        for numbers in self._blocks():
            with self._at(numbers):
                groups = self.map(function, u, same=same)
            for group, found in groups.items():
                for name, part in found.items():
                    held = whole.setdefault(group, {})
                    held[name] = self._placed(held.get(name), part, axes(group, name), numbers)
        return whole

    def _placed(
        self,
        full: Tensor | None,
        part: Tensor,
        axes: Mapping[str, int],
        numbers: dict[str, int],
    ) -> Tensor:
        """``full`` with the rows of ``part`` that are new in this block."""
        axes = {n: a for n, a in axes.items() if n in numbers}
        plates = {p.name: p for p in self.plates}
        if full is None:
            shape = list(part.shape)
            for name, axis in axes.items():
                shape[axis] = plates[name].full_size
            full = part.new_zeros(shape)
        if any(number for name, number in numbers.items() if name not in axes):
            return full
        rows = [torch.arange(n) for n in part.shape]
        for name, axis in axes.items():
            index, unseen = plates[name].block(numbers[name])
            part, rows[axis] = part.index_select(axis, unseen.nonzero().flatten()), index[unseen]
        where = [r.reshape([-1] + [1] * (full.dim() - 1 - a)) for a, r in enumerate(rows)]
        full[tuple(where)] = part
        return full
