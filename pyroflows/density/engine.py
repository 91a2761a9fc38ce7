"""What a table's estimator asks of what models its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from pyroflows.density.conditionals import Conditional, Numbers
from pyroflows.tables import Schema
from pyroflows.tables.conditions import Condition
from pyroflows.training.budget import Budget

if TYPE_CHECKING:
    from pyroflows.density.model import TableModel

__all__ = ["Engine", "Fit", "Settings", "TrainingTable"]

Shards = Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to fit; None stands for a choice by the size of the table.

    Attributes:
        max_steps: Optimizer steps, at most.
        members: Networks per column.
        hidden_dim: Width of the networks.
        batch_size: Rows per step.
        learning_rate: Peak of the schedule.
        device: ``"auto"`` (a GPU for large tables where there is one), or a name torch knows.
        progress: Show a bar.
    """

    max_steps: int | None = None
    members: int | None = None
    hidden_dim: int | None = None
    batch_size: int | None = None
    learning_rate: float = 3e-3
    device: str = "auto"
    progress: bool = False

    def device_for(self, rows: int) -> torch.device:
        """Where a table of so many rows is fitted."""
        if self.device == "auto":
            return torch.device("cuda" if rows >= 5000 and torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


@dataclasses.dataclass(frozen=True)
class TrainingTable:
    """Encoded rows to fit.

    Attributes:
        schema: The columns.
        values: float64, shape (N, D) in the schema's order, NaN where missing.
        weight: Weights of the rows, shape (N,): repetitions, or relative with mean one.
        given: Columns of the schema to condition on.
        shards: For a table larger than memory, the source of its training rows, as (values,
            weight, fold) with fold -1; ``values`` then are a sample.
        total: Its number of rows.
    """

    schema: Schema
    values: Tensor
    weight: Tensor
    given: list[int]
    shards: Shards | None = None
    total: int | None = None

    def __len__(self) -> int:
        return len(self.values)

    def cloned(self) -> TrainingTable:
        """The same with tensors of its own: of the present mode, as inference mode needs it."""
        values, weight = self.values.clone(), self.weight.clone()
        return dataclasses.replace(self, values=values, weight=weight)

    @property
    def size(self) -> int:
        """Rows that the fit can learn from, repetitions counted."""
        return self.total or max(len(self), round(float(self.weight.sum())))


class Fit(NamedTuple):
    """What a fit tells: the entries of its history, and which rows it held out.

    Where several networks are averaged, ``fold`` names the one that did not train on each.
    """

    history: list[dict[str, float]]
    held: Tensor
    fold: Tensor | None = None


class Engine(Protocol):
    r"""A model of encoded rows, :math:`p(x) = \prod_t p(x_t \mid x_{<t}, given)` in its order.

    Values are float64 of shape (N, D) in the schema's order, NaN where missing. A row's result
    never depends on the rows beside it; one seed gives one result; what is drawn is what is
    scored. All answers lie on the CPU. Log-densities are in data units: probabilities of labels,
    P(cell) / step on a lattice. A subclass inherits what has a body here.

    Attributes:
        tag: Names the engine in saved files.
        settings: How to fit.
        schema: The columns.
        order: Columns of the schema in the model's order, given ones first.
        num_given: How many are given.
    """

    tag: str
    settings: Settings
    schema: Schema
    order: list[int]
    num_given: int

    @property
    def exact(self) -> TableModel | None:
        """The model of every column's exact conditional, where the engine is one."""
        return None

    def fit(self, table: TrainingTable, *, budget: Budget, generator: torch.Generator) -> Fit:
        """Fit within the budget; its first history entry is that of step 0."""
        ...

    def partial_fit(
        self, table: TrainingTable, *, budget: Budget, generator: torch.Generator
    ) -> Fit:
        """Go on with other rows of the same columns."""
        ...

    def within(self, conditions: Mapping[Any, Condition]) -> Self:
        """The same model of rows that fulfil conditions on their columns.

        Its log-densities are those of the cells and of fulfilling the conditions; what it draws
        and averages is given both.

        Raises:
            ValueError: If a condition cannot be fulfilled, naming the column.
        """
        if conditions:
            raise ValueError(
                f"a model of kind {self.tag!r} takes no ranges, sets or predicates; got them for "
                f"{list(conditions)}. Filter its samples, or fit with flow=None"
            )
        return self

    def log_prob(
        self, values: Tensor, *, pattern: bool = False, draws: int = 64
    ) -> tuple[Tensor, Tensor]:
        """Log-density of rows and its error in nats, both (N,); missing cells are integrated out.

        Args:
            values: Rows.
            pattern: Whether to add the probability of which cells are missing.
            draws: Per row and batch, where it takes draws.
        """
        ...

    def column_log_prob(self, values: Tensor) -> Tensor:
        """Log-density of each target cell given those before it, (T, N) in the model's order.

        0 where a cell is missing, NaN for columns whose share of the row is not known.
        """
        ...

    def complete(
        self,
        values: Tensor,
        n: int,
        *,
        generator: torch.Generator,
        leave: bool = False,
        lattice: bool = True,
    ) -> Tensor:
        """``n`` joint draws of each row's missing cells given the observed ones, (N, n, D).

        Args:
            values: Rows.
            n: Draws per row.
            generator: Source of randomness.
            leave: Draw also whether a missing cell stays missing, as in the data.
            lattice: Draw lattice columns and point masses as such; else from the smooth density
                around them.
        """
        ...

    def averages(self, values: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
        """Rows with missing numbers at their mean, labels at the most probable one, (N, D).

        Exact where it can be, from ``n`` draws else.
        """
        ...

    def conditionals(self, values: Tensor) -> Iterator[tuple[int, Conditional]]:
        """Targets, as columns of the schema, and their distributions given the cells before them.

        In the model's order, one at a time; only those that are exact.
        """
        yield from ()

    def conditional(self, values: Tensor, j: int) -> Conditional | None:
        """The distribution of column j of the schema given the cells before it, where exact."""
        return next((law for i, law in self.conditionals(values) if i == j), None)

    def pit(self, values: Tensor, *, generator: torch.Generator) -> dict[int, Tensor]:
        """Uniform numbers, if the model is right, of columns of the schema, shape (N,) each.

        Here the probability integral transforms of numbers with exact conditionals; jumps are
        spread uniformly.
        """
        return {
            j: law.pit(values[:, j], _uniform(len(values), generator))
            for j, law in self.conditionals(values)
            if isinstance(law, Numbers)
        }

    def smooth_log_prob(self, values: Tensor) -> Tensor:
        """Log-density of complete rows of numbers, shape (N,), differentiable in them.

        Lattice columns have the density of their dequantized values, point masses none.
        """
        ...

    def bounds(self, j: int) -> tuple[float, float]:
        """Ends of the support of number column j of the schema."""
        ...

    def num_parameters(self) -> int:
        """Trained numbers."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same, with its networks on a device."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and the fields of the header that :meth:`from_state` needs.

        Beside the order and ``num_given``, which every header has.
        """
        ...

    @classmethod
    def from_state(
        cls, schema: Schema, tensors: dict[str, Tensor], header: dict[str, Any]
    ) -> Self:
        """The engine that was saved.

        Raises:
            ValueError: If tensors do not fit the header, naming the tensor; before memory is
                taken.
        """
        ...


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64)
