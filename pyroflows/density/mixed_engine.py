"""The engine of exact conditionals: networks per column, joined with a mixture of Gaussians."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from pyroflows.density.columns import LabelCells, NumberCells
from pyroflows.density.completions import averages, complete
from pyroflows.density.conditionals import Conditional
from pyroflows.density.engine import Engine, Fit, Settings, TrainingTable
from pyroflows.density.fitting import fit_mixed, fit_more
from pyroflows.density.header import check_tensors, part
from pyroflows.density.mixtures import MixedMixture
from pyroflows.density.model import TableModel
from pyroflows.density.restricted import regions_of
from pyroflows.density.uniforms import Uniforms
from pyroflows.tables import Schema
from pyroflows.tables.conditions import Condition
from pyroflows.training.budget import Budget

__all__ = ["MixedEngine", "read_cells"]


class MixedEngine(Engine):
    """Labels, atoms, lattices and missing cells, all exact: a :class:`TableModel` and its fit.

    Args:
        settings: How to fit.
        model: The fitted model, where there is one.
    """

    tag = "mixed"

    def __init__(self, settings: Settings | None = None, model: TableModel | None = None) -> None:
        self.settings = Settings() if settings is None else settings
        if model is not None:
            self._hold(model)

    def _hold(self, model: TableModel) -> None:
        self.model, self.schema = model, model.schema
        self.order, self.num_given = model.order, model.num_given

    @property
    def exact(self) -> TableModel:
        """The model itself."""
        return self.model

    def fit(self, table: TrainingTable, *, budget: Budget, generator: torch.Generator) -> Fit:
        """Cells, simple models, networks, and what held-out rows say of them."""
        model, fit = fit_mixed(table, self.settings, budget, generator)
        self._hold(model)
        return fit

    def partial_fit(
        self, table: TrainingTable, *, budget: Budget, generator: torch.Generator
    ) -> Fit:
        """Train the networks on; scales, bins and the simple model stay."""
        return fit_more(self.model, table, self.settings, budget, generator)

    def within(self, conditions: Mapping[Any, Condition]) -> Self:
        """Laws of single columns restricted; exact as sums and quadratures are."""
        if not conditions:
            return self
        return type(self)(self.settings, self.model.within(regions_of(self.model, conditions)))

    def log_prob(
        self, values: Tensor, *, pattern: bool = False, draws: int = 64
    ) -> tuple[Tensor, Tensor]:
        """Exact for complete rows; :func:`~pyroflows.density.completions.evidence` for others."""
        return self.model.log_prob(values, pattern=pattern, draws=draws)

    @torch.no_grad()
    def column_log_prob(self, values: Tensor) -> Tensor:
        """All of them exact; a missing cell before one is a value of its own."""
        return self.model.column_log_prob(self.model.encode(values))[0]

    def complete(
        self,
        values: Tensor,
        n: int,
        *,
        generator: torch.Generator,
        leave: bool = False,
        lattice: bool = True,
    ) -> Tensor:
        """By ancestral sampling; weighted particles where observed cells come after missing."""
        todo, uniforms = values.isnan().any(1).nonzero()[:, 0], _uniforms(generator)
        out = values[:, None].repeat(1, n, 1)
        options = dict(leave=leave, lattice=lattice)
        out[todo] = complete(self.model, values[todo], n, uniforms.at(todo), **options)
        return out

    def averages(self, values: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
        """Of the exact conditional where one row of earlier columns leads to it."""
        return averages(self.model, values, n, _uniforms(generator))

    @torch.no_grad()
    def conditionals(self, values: Tensor) -> Iterator[tuple[int, Conditional]]:
        """All targets; those after a region are not alone with the columns before them."""
        for place, _, law in self.model.walk(values):
            if self.model.regions.within(place):
                yield self.order[place], law

    def smooth_log_prob(self, values: Tensor) -> Tensor:
        """The histogram bins have steps."""
        rows = self.model.encode(values, lattice=False)
        return self.model.column_log_prob(rows, atoms=False)[0].sum(0)

    def bounds(self, j: int) -> tuple[float, float]:
        """Those of the column's cells."""
        low, high = self.model.cells[self.order.index(j)].bounds.tolist()
        return low, high

    def num_parameters(self) -> int:
        """Of the networks."""
        return sum(p.numel() for p in self.model.parameters())

    def to(self, device: torch.device | str) -> Self:
        """The networks; everything else stays on the CPU."""
        self.model.to(device)
        return self

    # ------------------------------------------------------------------ files

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Networks, cells and the simple model."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for i, c in enumerate(self.model.cells):
            tensors |= {f"cell{i}.{k}": v for k, v in c.state_dict().items()}
        if self.model.mixture is not None:
            tensors |= {f"mixture.{k}": v for k, v in self.model.mixture.state_dict().items()}
        return tensors, dict(reads=self.model.reads, config=self.model.config)

    @classmethod
    def from_state(
        cls, schema: Schema, tensors: dict[str, Tensor], header: dict[str, Any]
    ) -> Self:
        """Checked before anything is built."""
        check_tensors(header, schema, tensors)
        cells = read_cells(tensors, len(header["order"]))
        state = part(tensors, "mixture.")
        mixture = None
        if state:
            flags = [c.is_label for c in cells]
            labels = [state[f"label{i}"] for i in range(sum(flags))]
            mixture = MixedMixture(
                state["log_weight"], state["mean"], state["chol"], labels, flags
            )
        with torch.random.fork_rng(devices=[]):
            model = TableModel(
                schema,
                cells,
                header["order"],
                header["num_given"],
                mixture=mixture,
                reads=header.get("reads"),
                **header["config"],
            )
        model.load_state_dict(part(tensors, "model."))
        model.nets.requires_grad_(False)
        return cls(model=model.eval())


def _uniforms(generator: torch.Generator) -> Uniforms:
    """Random numbers by row and draw, seeded by a generator."""
    return Uniforms(int(torch.randint(2**62, (1,), generator=generator)))


def read_cells(tensors: Mapping[str, Tensor], count: int) -> list[LabelCells | NumberCells]:
    """Cells of a file, ``count`` columns."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        if name.startswith("cell"):
            place, _, key = name.removeprefix("cell").partition(".")
            parts[int(place)][key] = tensor
    return [(LabelCells if "group" in part else NumberCells).from_state(part) for part in parts]
