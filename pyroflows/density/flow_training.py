"""Flows for tables: sizes by the number of rows, and their fit by maximum likelihood."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyroflows import recipes
from pyroflows.density.engine import Fit, Settings, TrainingTable
from pyroflows.density.flow_numbers import NumberSide
from pyroflows.density.scores import Marginals
from pyroflows.flow import Flow
from pyroflows.supports import is_real
from pyroflows.training import fit
from pyroflows.training.budget import Budget

__all__ = ["Make", "RECIPES", "fit_flow", "new_flow", "sizes_for"]

Make = str | Callable[[int, int], Flow]
RECIPES = [
    name
    for name in recipes.__all__
    if name in ("nice", "realnvp", "glow", "iaf", "maf", "neural_spline")
]
CHECKS = 24


def sizes_for(make: Make, rows: int, numbers: int, context: int) -> dict[str, Any]:
    """Arguments of a recipe for a table: larger for more rows; none for a callable."""
    if not isinstance(make, str):
        return {}
    width = 32 if rows < 1000 else 64 if rows < 3000 else 128
    if width == 128:
        width = min(256, max(width, 2 * (numbers + context)))
    few, sizes = rows < 1000, dict[str, Any](hidden_dims=[width, width])
    if make == "neural_spline":
        return sizes | dict(
            autoregressive=True, num_transforms=2 if few else 3, count_bins=4 if few else 8
        )
    if make in ("maf", "iaf"):
        return sizes | dict(num_transforms=3 if few else 5)
    return sizes | dict(num_transforms=4 if few else 8)


def new_flow(
    make: Make,
    side: NumberSide,
    sizes: dict[str, Any] | None = None,
) -> Flow:
    """An untrained flow of normal scores for a table.

    Args:
        make: A recipe's name, or what makes a flow of ``(input_dim, context_dim)``.
        side: The numbers.
        sizes: Arguments of the recipe; see :func:`sizes_for`.

    Raises:
        ValueError: For a name that is no recipe, or a flow of another shape than asked for.
        TypeError: If a callable makes no flow.
    """
    shape = len(side.columns), side.context_dim
    if isinstance(make, str):
        return getattr(recipes, make)(*shape, **(sizes or {}))
    flow = make(*shape)
    if not isinstance(flow, Flow):
        raise TypeError(
            f"flow(input_dim, context_dim) must make a Flow; got {type(flow).__name__}"
        )
    if tuple(flow.event_shape) != shape[:1] or flow.context_dim != shape[1]:
        raise ValueError(
            f"flow({shape[0]}, {shape[1]}) must make a flow of {shape[0]} numbers with "
            f"context_dim={shape[1]}; got events of shape {tuple(flow.event_shape)} and "
            f"context_dim={flow.context_dim}"
        )
    if not is_real(flow.support):
        raise ValueError(f"flow must make a flow of all real vectors; got one on {flow.support}")
    return flow


def in_data_units(flow: Flow, marginals: Marginals) -> Flow:
    """A flow of normal scores as one of the data, float64, by sharing its parts."""
    return joined(flow, [*flow.transform, marginals]).double()


def in_scores(flow: Flow) -> Flow:
    """The inverse of :func:`in_data_units`, float32: the parts are shared again."""
    return joined(flow, list(flow.transform)[:-1]).float()


def joined(flow: Flow, transforms: list[Any]) -> Flow:
    """A flow of other transforms, with base and embedding of this one."""
    return Flow(flow.base, transforms, embedding=getattr(flow, "embedding", None))


class Points:
    """Training rows as normal scores, their lattice cells and atoms spread anew when asked.

    Args:
        side: The numbers of the table.
        values: Rows, shape (N, D).
        weight: Their weights.
        device: Where the flow is.
    """

    def __init__(
        self, side: NumberSide, values: Tensor, weight: Tensor, device: torch.device
    ) -> None:
        self.side, self.device = side, device
        self.x = values[:, side.columns]
        self.atoms = side.atoms(self.x)
        context = side.context(values, self.atoms)
        self.context = None if context is None else context.float().to(device)
        self.weight = (weight / weight.mean()).float().to(device)

    def scores(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Scores (N, numbers), float32, and what turns their log-density into that of rows."""
        u = torch.rand(self.x.shape, generator=generator, dtype=torch.float64)
        points, log_q = self.side.points(self.x, self.atoms, u)
        scores, log_slope = self.side.marginals.inverse_and_log_det(points)
        return scores.float().to(self.device), (log_slope - log_q).to(self.device)


class Batches:
    """Minibatches of an epoch, with new noise in each; the length is the number of batches.

    Args:
        points: The rows.
        size: Rows of a batch.
        count: Batches of an epoch.
        jitter: Standard deviation of noise on the scores, which smooths the density of few rows.
        generator: Source of randomness.
    """

    def __init__(
        self, points: Points, size: int, count: int, jitter: float, generator: torch.Generator
    ) -> None:
        self.points, self.size, self.count = points, size, count
        self.jitter, self.generator = jitter, generator
        self.scores = torch.empty(0)
        self.order = torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        points = self.points
        for _ in range(self.count):
            if len(self.order) < self.size:  # the rest takes part in the next shuffle
                n = len(points.x)
                self.order = torch.randperm(n, generator=self.generator).to(points.device)
                if not len(self.scores) or not points.side.certain:
                    self.scores, _ = points.scores(self.generator)
            rows, self.order = self.order[: self.size], self.order[self.size :]
            x, context = self.scores[rows], points.context
            if self.jitter:
                x = x + self.jitter * torch.randn_like(x)
            yield x, None if context is None else context[rows], points.weight[rows]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train, by the size of the table alone.

    Attributes:
        steps: Optimizer steps.
        batch_size: Rows of each.
        lr: Largest learning rate.
        weight_decay: As in AdamW.
        jitter: As in :class:`Batches`.
        held: Rows that judge.
    """

    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    jitter: float
    held: int

    @classmethod
    def of(
        cls,
        table: TrainingTable,
        settings: Settings,
        *,
        weights: int,
        seconds: float,
        more: bool = False,
    ) -> Plan:
        """For a table and a flow of so many weights, in as many steps as fit into the time.

        A step is taken to cost what it does at 40 GFLOPS, so that one seed gives one result on
        any processor that is not much slower.
        """
        rows, distinct = table.size, len(table)
        size = settings.batch_size or (64 if rows < 1000 else 256 if rows < 8000 else 512)
        held = min(distinct // 10, 3000) if distinct >= 10 else 0
        size = max(1, min(size, distinct - held))
        epochs = 200 if rows < 1000 else 60 if rows < 8000 else 180
        cost = 2e-3 + size * weights * 6 / 4e10
        steps = min(
            max(400, round(epochs * rows / size)), 8000, round(0.8 * min(seconds, 1e5) / cost)
        )
        steps = max(1, min(steps, settings.max_steps or steps))
        rate = 5 / 3 if rows < 8000 else 8 / 3
        return cls(
            steps=max(1, steps // 4) if more else steps,
            batch_size=size,
            lr=settings.learning_rate * (rate / 3 if more else rate),
            weight_decay=0.1 if 1000 <= rows < 8000 else 0.01,
            jitter=min(0.2, 250 / rows),
            held=held,
        )


def fit_flow(
    flow: Flow,
    side: NumberSide,
    table: TrainingTable,
    settings: Settings,
    budget: Budget,
    generator: torch.Generator,
    *,
    more: bool = False,
) -> Fit:
    """Fit a flow of normal scores to the numbers of a table, in place.

    Args:
        flow: Untrained, or fitted before if ``more``.
        side: The numbers.
        table: The rows.
        settings: How to fit.
        budget: Its time; what is left of it is for the flow.
        generator: Source of randomness.
        more: Whether to go on with fewer and smaller steps.

    Returns:
        The history, valid nats those of rows in data units; and which rows were held out.
    """
    weights = sum(p.numel() for p in flow.parameters())
    plan = Plan.of(table, settings, weights=weights, seconds=budget.limit, more=more)
    order = torch.randperm(len(table), generator=generator)
    held, rows = order[: plan.held], order[plan.held :]
    device = settings.device_for(table.size)
    train = Points(side, table.values[rows], table.weight[rows], device)
    judges = Points(side, table.values[held], table.weight[held], device) if len(held) else None
    validation: Any = 0.0
    shift = 0.0
    if judges is not None:
        scores, shifts = judges.scores(generator)
        validation = scores, judges.context, judges.weight
        shift = float((judges.weight.double() * shifts).mean())
    count = max(1, min(plan.steps, math.ceil(plan.steps / CHECKS)))
    history = fit(
        flow.to(device),
        Batches(train, plan.batch_size, count, plan.jitter, generator),
        num_epochs=max(1, round(plan.steps / count)),
        lr=plan.lr,
        weight_decay=plan.weight_decay,
        validation=validation,
        patience=CHECKS,
        clip_norm=5.0,
        standardize=False,
        seed=int(torch.randint(2**31, (), generator=generator)),
        progress=settings.progress,
        ema=0.995,
        max_time=max(budget.limit - budget.seconds(), 0.1) if budget.limit < math.inf else None,
    )
    if history.stopped == "max_time":
        share = 100 * history.num_steps / max(1, plan.steps)
        budget.tell(f"ended the fit at {share:.0f} % of its planned steps for the numbers")
    entries = [{**r, "valid": shift - r.get("valid", math.nan)} for r in history.records]
    return Fit([dict(r, train=-r["train"]) for r in entries], held)
