"""The engine of flows: labels by the mixed model, numbers given labels by any flow."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from pyroflows.bijection import Bijection
from pyroflows.density.conditionals import Conditional
from pyroflows.density.engine import Engine, Fit, Settings, TrainingTable
from pyroflows.density.fitting import fit_cells
from pyroflows.density.flow_draws import ROWS, pupil_of, weighted
from pyroflows.density.flow_files import restore, stored
from pyroflows.density.flow_labels import LabelSide
from pyroflows.density.flow_numbers import NumberSide, own_uniforms
from pyroflows.density.flow_training import (
    RECIPES,
    Make,
    fit_flow,
    in_data_units,
    in_scores,
    new_flow,
    sizes_for,
)
from pyroflows.density.mixed_engine import MixedEngine
from pyroflows.flow import Flow
from pyroflows.tables import Schema
from pyroflows.tables.conditions import Condition
from pyroflows.training.budget import Budget
from pyroflows.training.seeds import seeded

__all__ = ["FlowEngine"]

LABELS = 0.35  # share of the time that labels may take


class FlowEngine(Engine):
    r"""p(labels, which atoms) by :class:`MixedEngine` × p(numbers | labels, atoms) by a flow.

    .. math:: \log p(x) = \log p(labels) + \log \frac1K \sum_{k=1}^K
        \frac{p_{flow}(y_k \mid labels)}{q(y_k \mid x)}, \qquad y_k \sim q(\cdot \mid x)

    The flow is fitted to points y: a lattice value is a uniform point of its recording cell, a
    number at an atom a point of its column's marginal law, any other number itself. Its last part
    maps normal scores to data by a fixed map a column, so that it is a density in data units; its
    context holds the given columns, the labels, and which numbers are at which atom.

    Where rows are single points, log-densities are exact. Else what is reported for a row, always
    the same, is in the mean a lower bound that rises to the log-density with K; K = 1 is the bound
    of uniform dequantization. Missing cells can be drawn, but not integrated out: fits and scores
    refuse them.

    Args:
        settings: How to fit.
        make: A recipe's name, or what makes a flow of ``(input_dim, context_dim)``.
        points: K, the points of a row where it is scored.

    Attributes:
        flow: The fitted flow, float64, in data units; its context is that of :meth:`context`.
        numbers: Points and contexts of rows.
        labels: The model of labels.
        sizes: Arguments of the recipe.

    References:
        Theis, van den Oord, Bethge (2016), A note on the evaluation of generative models.
        arXiv:1511.01844

        Burda, Grosse, Salakhutdinov (2016), Importance weighted autoencoders. arXiv:1509.00519
    """

    tag = "flow"
    flow: Flow
    numbers: NumberSide
    labels: LabelSide
    sizes: dict[str, Any]

    def __init__(
        self, settings: Settings | None = None, make: Make = "neural_spline", points: int = 8
    ) -> None:
        if not callable(make) and make not in RECIPES:
            raise ValueError(f"flow must be None, one of {RECIPES} or a callable; got {make!r}")
        self.settings = Settings() if settings is None else settings
        self.make, self.points = make, points
        self.conditions: Mapping[Any, Condition] = {}
        self.whole = self

    # ------------------------------------------------------------------ fitting

    def fit(self, table: TrainingTable, *, budget: Budget, generator: torch.Generator) -> Fit:
        """Labels, marginals, then the flow by maximum likelihood.

        Raises:
            ValueError: If there are no numbers to model, or missing cells.
        """
        self._begin(table, budget)
        share = self._share(budget)
        self.labels.fit(table, self.settings, share, generator=generator)
        for cut in share.cuts:
            budget.tell(f"{cut} for the labels")
        shape = len(self.numbers.columns), self.numbers.context_dim
        self.sizes = sizes_for(self.make, table.size, *shape)
        with seeded(generator.initial_seed() % 2**32):
            flow = new_flow(self.make, self.numbers, self.sizes)
        fit = fit_flow(flow, self.numbers, table, self.settings, budget, generator)
        self._hold(flow)
        return fit

    def partial_fit(
        self, table: TrainingTable, *, budget: Budget, generator: torch.Generator
    ) -> Fit:
        """Train on other rows; scales, bins and marginals stay."""
        self._refuse(table.values)
        self.labels.partial_fit(table, self._share(budget), generator=generator)
        flow = in_scores(self.flow.requires_grad_())
        fit = fit_flow(flow, self.numbers, table, self.settings, budget, generator, more=True)
        self._hold(flow)
        return fit

    def _begin(self, table: TrainingTable, budget: Budget) -> None:
        """What the columns are to the model, without networks."""
        name = self.make if isinstance(self.make, str) else "callable"
        columns, given = table.schema.columns, table.given
        self.schema, self.num_given = table.schema, len(given)
        targets = [j for j in range(len(columns)) if j not in given]
        label = [j for j in targets if columns[j].is_label]
        number = [j for j in targets if not columns[j].is_label]
        if not number:
            raise ValueError(
                f"flow={name!r} models numbers, and the table has only labels to model "
                f"({[columns[j].name for j in label]}); use flow=None"
            )
        if table.shards is not None:
            raise ValueError(
                f"flow={name!r} fits tables in memory: raise in_memory=, or fit a sample"
            )
        self._refuse(table.values)
        told = [*given, *label]
        self.order = [*told, *number]
        cells = fit_cells(table, list(range(len(columns))), budget)
        self.numbers = NumberSide.fit(cells, told, number, table.values, table.weight)
        self.labels = LabelSide(self.numbers, columns, told, len(given))

    @staticmethod
    def _share(budget: Budget) -> Budget:
        """The time that labels have."""
        left = budget.limit - budget.seconds()
        return Budget(max(LABELS * left, 1e-3) if left < math.inf else None)

    def _hold(self, flow: Flow) -> None:
        """Keep a fitted flow of scores as one of the data."""
        marginals = copy.deepcopy(self.numbers.marginals).to(next(flow.parameters()).device)
        self.flow = in_data_units(flow, marginals).eval().requires_grad_(False)
        self.__dict__.pop("proposal", None)

    def _refuse(self, values: Tensor) -> None:
        """Missing cells are an error that says what to do."""
        gone = values.isnan()
        if gone.any():
            places = gone.any(0).nonzero()[:, 0].tolist()  # of the schema, or given
            places = (
                places if gone.shape[1] == len(self.schema) else [self.order[i] for i in places]
            )
            names = ", ".join(repr(self.schema.columns[j].name) for j in places)
            raise ValueError(
                f"FlowEngine cannot integrate out missing cells of {names} "
                f"({int(gone.any(1).sum())} of {len(gone)} rows): use flow=None, drop these rows, "
                "or fill them, e.g. with DensityEstimator().fit(table).impute(table)"
            )

    # ------------------------------------------------------------------ densities

    @torch.no_grad()
    def log_prob(
        self, values: Tensor, *, pattern: bool = False, draws: int = 64
    ) -> tuple[Tensor, Tensor]:
        """Log-density of complete rows, and the error that K points leave, both (N,)."""
        if self.conditions:
            raise ValueError(
                "the probability of ranges, sets or predicates is not known for a flow: filter "
                "its samples, or use flow=None"
            )
        self._refuse(values)
        out, error = self.numbers_log_prob(values)
        return out + self.labels.log_prob(values), error

    @torch.no_grad()
    def numbers_log_prob(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density of the numbers given everything else, and its error in nats, both (N,)."""
        side, count = self.numbers, 1 if self.numbers.certain else self.points
        sobol = torch.quasirandom.SobolEngine(len(side.columns), scramble=True, seed=0)
        spread = sobol.draw(count, dtype=torch.float64)
        out, error = torch.zeros(2, len(values), dtype=torch.float64)
        for rows in torch.arange(len(values)).split(max(1, ROWS // count)):
            x = values[rows][:, side.columns]
            atoms, own = side.atoms(x), own_uniforms(x)
            context = side.context(values[rows], atoms)
            parts = [side.points(x, atoms, (own + u) % 1) for u in spread]
            points, log_q = (torch.stack(p) for p in zip(*parts, strict=True))
            log_w = self._flow_log_prob(points, context) - log_q
            total = log_w.logsumexp(0) - math.log(count)
            if count > 1:
                error[rows] = (log_w - total).exp().std(0) / math.sqrt(count)
            out[rows] = torch.where(side.inside(x), total, -torch.inf)
        return out, error

    def _flow_log_prob(self, points: Tensor, context: Tensor | None) -> Tensor:
        """The flow's log-density on its device, the result on the CPU."""
        told = None if context is None else context.to(self.device)
        return self.flow.log_prob(points.to(self.device), told).cpu()

    def context(self, values: Tensor) -> Tensor | None:
        """What the flow is told of rows; float64, None where there is nothing to tell."""
        told = self.numbers.context(values, self.numbers.atoms(values[:, self.numbers.columns]))
        return None if told is None else told.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the flow is."""
        return next(self.flow.parameters()).device

    def column_log_prob(self, values: Tensor) -> Tensor:
        """Of labels; a single number's too. The flow does not part several numbers: NaN."""
        targets = len(self.order) - self.num_given
        out = torch.full((targets, len(values)), torch.nan, dtype=torch.float64)
        labels, atoms = self.labels.column_log_prob(values)
        out[: len(labels)] = labels
        if len(self.numbers.columns) == 1:
            out[-1] = self.numbers_log_prob(values)[0] + atoms
        return out

    def conditionals(self, values: Tensor) -> Iterator[tuple[int, Conditional]]:
        """Those of labels."""
        return self.labels.conditionals(values)

    def smooth_log_prob(self, values: Tensor) -> Tensor:
        """The flow's own density, of no number at an atom."""
        x = values[:, self.numbers.columns]
        none = torch.zeros(x.shape, dtype=torch.long)
        return self._flow_log_prob(x, self.numbers.context(values, none))

    def bounds(self, j: int) -> tuple[float, float]:
        """Those of the column's cells."""
        cells = self.numbers.cells_of_numbers[self.numbers.columns.index(j)]
        low, high = cells.bounds.tolist()
        return low, high

    def pit(self, values: Tensor, *, generator: torch.Generator) -> dict[int, Tensor]:
        """Normal distribution functions of the noise that makes the numbers."""
        columns = self.numbers.columns
        u = torch.rand(len(values), len(columns), generator=generator, dtype=values.dtype)
        share = torch.special.ndtr(self.noise(values, u))
        return dict(zip(columns, share.T, strict=True))

    # ------------------------------------------------------------------ draws

    @torch.no_grad()
    def complete(
        self,
        values: Tensor,
        n: int,
        *,
        generator: torch.Generator,
        leave: bool = False,
        lattice: bool = True,
    ) -> Tensor:
        """Exact where a row has none of its numbers, whatever labels it has.

        Else draws of a :class:`MixedEngine` that has learned from draws of this one, resampled by
        their weights; it is fitted when it is first needed, and a warning says how many rows have
        few effective draws.
        """
        gone = values.isnan()
        self._refuse(values[:, self.order[: self.num_given]])
        out = values[:, None].repeat(1, n, 1)
        alone = gone[:, self.numbers.columns].all(1) & (not self.conditions)
        for rows in alone.nonzero()[:, 0].split(max(1, ROWS // max(n, 1))):
            out[rows] = self._ancestral(values[rows], n, generator, lattice)
        hard = (gone.any(1) & ~alone).nonzero()[:, 0]
        if len(hard):
            known = self.whole.proposal
            within = known.within(self.conditions) if self.conditions else None
            out[hard] = weighted(self.whole, known, values[hard], n, generator, within=within)
        return out

    def _ancestral(
        self, values: Tensor, n: int, generator: torch.Generator, lattice: bool
    ) -> Tensor:
        """Labels that are missing, then all numbers; (N, n, D)."""
        side = self.numbers
        out, atoms = self.labels.complete(values, n, generator)
        atoms = atoms if lattice else torch.zeros_like(atoms)
        points = self._sample(side.context(out, atoms), len(out), generator)
        out[:, side.columns] = side.values(points, atoms, lattice=lattice)
        return out.view(len(values), n, out.shape[1])

    def _sample(self, context: Tensor | None, n: int, generator: torch.Generator) -> Tensor:
        """One point of the flow for each context, or n; on the CPU."""
        with seeded(int(torch.randint(2**31, (), generator=generator))):
            if context is None:
                return self.flow.sample((n,)).cpu()
            return self.flow.sample((), context.to(self.device)).cpu()

    def within(self, conditions: Mapping[Any, Condition]) -> Self:
        """Draws within conditions, resampled as those given numbers; no log-densities."""
        if not conditions:
            return self
        out = copy.copy(self)
        out.conditions, out.whole = conditions, self.whole
        return out

    @cached_property
    def proposal(self) -> MixedEngine:
        """A model of all columns that has learned from draws of this one."""
        if self.num_given:
            names = [self.schema.columns[j].name for j in self.order[: self.num_given]]
            raise ValueError(
                f"this flow was fitted given {names}, and draws all of its numbers or none: leave "
                "all of them out, or fit another flow with the known ones in given="
            )
        return pupil_of(self, str(self.device))

    def averages(self, values: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
        """Means of numbers and most frequent labels of ``n`` draws."""
        drawn = self.complete(values, n, generator=generator)
        out = values.clone()
        for j, column in enumerate(self.schema.columns):
            gone = values[:, j].isnan()
            if gone.any():
                x = drawn[gone, :, j]
                out[gone, j] = x.mode(1).values if column.is_label else x.mean(1)
        return out

    # ------------------------------------------------------------------ noise

    @torch.no_grad()
    def noise(self, values: Tensor, u: Tensor | None = None) -> Tensor:
        """The flow's noise of complete rows, shape (N, numbers).

        Args:
            values: Rows.
            u: Where a lattice value lies in its cell, and a number at an atom in its law, uniform
                numbers of shape (N, numbers); None for the middle.
        """
        self._refuse(values)
        x = values[:, self.numbers.columns]
        u = torch.full((1, x.shape[1]), 0.5, dtype=torch.float64) if u is None else u
        points, _ = self.numbers.points(x, self.numbers.atoms(x), u)
        transform = self._transform(self.context(values))
        return transform.inverse_and_log_det(points.to(self.device))[0].cpu()

    @torch.no_grad()
    def from_noise(self, noise: Tensor, values: Tensor) -> Tensor:
        """Rows of noise: the numbers of ``values`` (N, D) replaced.

        Their other columns, and which of their numbers are at an atom, are kept.

        Raises:
            ValueError: If shapes disagree, or a column is missing that the flow is told of.
        """
        side, shape = self.numbers, (len(values), len(self.numbers.columns))
        if noise.shape != shape:
            raise ValueError(f"expected noise of shape {shape}; got {tuple(noise.shape)}")
        gone = [j for j in side.told if values[:, j].isnan().any()]
        if gone:
            names = [self.schema.columns[j].name for j in gone]
            raise ValueError(f"the flow is told of other columns: given= must have {names}")
        points = self._transform(self.context(values))(noise.double().to(self.device)).cpu()
        out = values.clone()
        out[:, side.columns] = side.values(points, side.atoms(values[:, side.columns]))
        return out

    def _transform(self, context: Tensor | None) -> Bijection:
        transform = self.flow.transform
        return transform if context is None else transform.condition(context)

    # ------------------------------------------------------------------ files

    def num_parameters(self) -> int:
        """Of the flow, and of the networks of labels."""
        labels = self.labels.engine
        count = sum(p.numel() for p in self.flow.parameters())
        return count + (0 if labels is None else labels.num_parameters())

    def to(self, device: torch.device | str) -> Self:
        """The networks; everything else stays on the CPU."""
        self.flow.to(device)
        if self.labels.engine is not None:
            self.labels.engine.to(device)
        return self

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The flow, marginals, cells, and the model of labels."""
        name = self.make if isinstance(self.make, str) else None
        tensors, fields = stored(self.flow, self.numbers, self.labels, self.order)
        return tensors, fields | dict(flow=name, sizes=self.sizes, points=self.points)

    @classmethod
    def from_state(
        cls, schema: Schema, tensors: dict[str, Tensor], header: dict[str, Any]
    ) -> Self:
        """Checked before anything is built; a callable comes as ``header["make"]``."""
        engine = cls(None, header.get("make") or header["flow"], header["points"])
        engine.schema, engine.sizes = schema, header["sizes"]
        engine.order, engine.num_given = header["order"], header["num_given"]
        engine.flow, engine.numbers, engine.labels = restore(engine.make, schema, tensors, header)
        return engine
