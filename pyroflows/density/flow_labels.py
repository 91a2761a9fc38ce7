"""The labels of a table whose numbers are a flow's, and which of its numbers are at an atom."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyroflows.density.conditionals import Conditional
from pyroflows.density.engine import Settings, TrainingTable
from pyroflows.density.flow_numbers import NumberSide
from pyroflows.density.mixed_engine import MixedEngine
from pyroflows.tables import Column, Schema
from pyroflows.training.budget import Budget

__all__ = ["LabelSide"]


class LabelSide:
    """p(labels, which atoms | given) by a mixed model of a table of labels, 1 without any.

    Args:
        numbers: The other side.
        columns: The table's.
        order: Given columns, then labels.
        num_given: How many are given.
        engine: The fitted model; None before a fit, and for a table without labels and atoms.
    """

    def __init__(
        self,
        numbers: NumberSide,
        columns: list[Column],
        order: list[int],
        num_given: int,
        engine: MixedEngine | None = None,
    ) -> None:
        self.numbers, self.columns, self.order = numbers, columns, order
        self.num_given, self.engine = num_given, engine
        self.has_atoms = [len(c.atoms) > 0 for c in numbers.cells_of_numbers]

    @property
    def count(self) -> int:
        """Labels to model, atoms aside."""
        return len(self.order) - self.num_given

    def fit(self, table: TrainingTable, settings: Settings, budget: Budget, **seed: Any) -> None:
        """Fit the model, if there is anything to model."""
        if self.count or any(self.has_atoms):
            self.engine = MixedEngine(dataclasses.replace(settings, progress=False))
            self.engine.fit(self._table(table), budget=budget, **seed)

    def partial_fit(self, table: TrainingTable, budget: Budget, **seed: Any) -> None:
        """Go on with other rows."""
        if self.engine is not None:
            self.engine.partial_fit(self._table(table), budget=budget, **seed)

    def _table(self, table: TrainingTable) -> TrainingTable:
        columns = [self.columns[j] for j in self.order]
        cells = zip(self.numbers.columns, self.numbers.cells_of_numbers, strict=True)
        for j, c in cells:
            if len(c.atoms):
                name = f"atom of {self.columns[j].name}"
                levels = list(range(len(c.atoms) + 1))
                columns.append(Column(name, "categorical", "int64", levels))
        given = list(range(self.num_given))
        return TrainingTable(Schema(columns), self._rows(table.values), table.weight, given)

    def _rows(self, values: Tensor) -> Tensor:
        """Rows of the table of labels: label columns, then which atoms; NaN where missing."""
        x = values[:, self.numbers.columns]
        which = torch.where(x.isnan(), torch.nan, self.numbers.atoms(x).double())
        return torch.cat([values[:, self.order], which[:, self.has_atoms]], 1)

    def log_prob(self, values: Tensor) -> Tensor | float:
        """Log-probability of labels and atoms of rows, shape (N,)."""
        return 0.0 if self.engine is None else self.engine.log_prob(self._rows(values))[0]

    def column_log_prob(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of each label (count, N), and of all atoms (N,)."""
        if self.engine is None:
            return values.new_zeros(0, len(values)), values.new_zeros(len(values))
        own = self.engine.column_log_prob(self._rows(values))
        return own[: self.count], own[self.count :].sum(0)

    def conditionals(self, values: Tensor) -> Iterator[tuple[int, Conditional]]:
        """Those of the labels."""
        if self.engine is not None:
            for i, law in self.engine.conditionals(self._rows(values)):
                if i < len(self.order):
                    yield self.order[i], law

    def complete(
        self, values: Tensor, n: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Rows ``n`` times each with labels, (N n, D), and which atoms, (N n, numbers)."""
        out = values.repeat_interleave(n, 0)
        atoms = torch.zeros(len(out), len(self.has_atoms), dtype=torch.long)
        if self.engine is not None:
            drawn = self.engine.complete(self._rows(values), n, generator=generator).flatten(0, 1)
            out[:, self.order] = drawn[:, : len(self.order)]
            atoms[:, self.has_atoms] = drawn[:, len(self.order) :].long()
        return out, atoms
