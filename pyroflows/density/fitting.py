"""Fitting a :class:`~pyroflows.density.model.TableModel` to a table, stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyroflows.density.columns import LabelCells, NumberCells, cells_for
from pyroflows.density.engine import Fit, Settings, Shards, TrainingTable
from pyroflows.density.model import TableModel
from pyroflows.density.rare import start_rare
from pyroflows.density.reads import WIDE, choose_reads
from pyroflows.density.simple import blend_weights, fit_simple
from pyroflows.density.training import HeldOut, Plan, column_scores, train
from pyroflows.training.budget import Budget
from pyroflows.training.parallel import rank_and_world
from pyroflows.training.seeds import seeded

__all__ = ["fit_mixed", "fit_more", "folds"]

SHARD = 131072  # rows that are encoded at once, where a table is large
AT_ONCE = 200_000  # rows up to which a table is encoded whole


def fit_mixed(
    table: TrainingTable, settings: Settings, budget: Budget, generator: torch.Generator
) -> tuple[TableModel, Fit]:
    """Cells, simple models, networks, and the weights that held-out rows give to them."""
    device = settings.device_for(table.size)
    with seeded(generator.initial_seed(), device):
        model = new_model(table, settings, budget)
        fold = folds(len(table), table.size, model.members, generator)
        begun = budget.seconds()
        held = held_out(model, table.values, table.weight, fold)
        reserve = 4 * (budget.seconds() - begun)
        start_rare(model, table.values[:20000], table.weight[:20000], budget)
        simple = fit_simple(model, table, fold, generator, budget)
        model = model.to(device)
        begun = budget.seconds()
        start = held.mean(column_scores(model, held.rows).sum(1).mean(0))
        reserve += 3 * (budget.seconds() - begun)  # blending and thresholds
        history = train(
            model,
            table.shards or shards_in_memory(table, fold, generator),
            held,
            plan(model, table.size, settings, budget.limit),
            rows=table.size,
            lr=settings.learning_rate,
            budget=budget,
            reserve=min(reserve, 0.4 * budget.limit),
            generator=generator,
            progress=settings.progress and rank_and_world()[0] == 0,
        )
        model.eval()
        if simple:
            model.set_mixture(simple.pop(), blend_weights(model, held, simple))
    rows = held_rows(fold)
    return model, Fit([dict(step=0, epoch=0.0, valid=start), *history], rows, fold[rows])


def fit_more(
    model: TableModel,
    table: TrainingTable,
    settings: Settings,
    budget: Budget,
    generator: torch.Generator,
) -> Fit:
    """Train the networks of a fitted model on other rows."""
    n, values, weight = len(table), table.values, table.weight / table.weight.mean()
    fold = folds(n, n, model.members, generator)
    sizes = plan(model, n, settings, budget.limit)
    wanted = min(sizes.wanted, max(20, 5 * n // sizes.batch_size))
    with seeded(generator.initial_seed(), model.device):
        history = train(
            model,
            lambda: iter([(values, weight, fold)]),
            held_out(model, values, weight, fold),
            dataclasses.replace(sizes, wanted=wanted, steps=min(sizes.steps, wanted)),
            rows=n,
            lr=settings.learning_rate / 3,
            budget=budget,
            generator=generator,
        )
    model.eval()
    return Fit(history, held_rows(fold), fold[held_rows(fold)])


# ---------------------------------------------------------------------- stages


def default_sizes(n: int, columns: int) -> dict[str, Any]:
    """Networks for a table of n rows: small tables get many small, strongly regularized ones.

    Wide tables get fewer, so that there is time to train them.
    """
    narrow = columns <= WIDE
    if n < 2000:
        return dict(members=8 if narrow else 2, hidden_dim=32, components=3, dropout=0.2)
    if n < 8000:
        return dict(members=4 if narrow else 2, hidden_dim=64, components=6, dropout=0.2)
    if n < 25000:
        return dict(members=2, hidden_dim=128, components=8, dropout=0.1)
    return dict(members=1, hidden_dim=128, components=8, dropout=0.0)


def new_model(table: TrainingTable, settings: Settings, budget: Budget) -> TableModel:
    """Untrained networks for the cells of a table; columns with missing cells come last."""
    columns, given = table.schema.columns, table.given
    targets = [j for j in range(len(columns)) if j not in given]
    order = [*given, *sorted(targets, key=lambda j: columns[j].missing)]
    own = dict(members=settings.members, hidden_dim=settings.hidden_dim)
    sizes = default_sizes(table.size, len(targets))
    sizes |= {k: v for k, v in own.items() if v is not None}
    cells = fit_cells(table, order, budget)
    read = 32 if table.size < 8000 else 64
    reads = choose_reads(cells, table.values[:, order], len(given), columns=read)
    return TableModel(table.schema, cells, order, len(given), reads=reads, **sizes)


def fit_cells(
    table: TrainingTable, order: list[int], budget: Budget
) -> list[LabelCells | NumberCells]:
    """The columns' histograms, scores and frequencies."""
    values = table.values.numpy()
    counts = table.weight.numpy() if table.weight.unique().numel() > 1 else None
    cells: list[LabelCells | NumberCells] = []
    for j in order:
        column = table.schema.columns[j]
        bins = 8 if budget.over(0.25) else 64
        if bins < 64 and not column.is_label:
            budget.tell("left some histograms coarse")
        cells.append(cells_for(values[:, j], column, weight=counts, max_bins=bins))
    return cells


def folds(n: int, size: int, members: int, generator: torch.Generator) -> Tensor:
    """Member that does not train on a row, -1 for none, shape (n,); every member has as many."""
    share = 1 / max(members, 5) if size < 15000 else min(0.05, 3000 / size)
    held = int(min(share * n, 3000))
    fold = torch.full((n,), -1)
    if n >= 10 and held >= 1:
        rows = torch.randperm(n, generator=generator)[: held * members]
        fold[rows] = torch.arange(len(rows)) % members
    return fold


def held_rows(fold: Tensor) -> Tensor:
    """Numbers of the rows that some member does not train on."""
    return (fold >= 0).nonzero()[:, 0]


def held_out(model: TableModel, values: Tensor, weight: Tensor, fold: Tensor) -> HeldOut:
    """Those rows, encoded."""
    at = held_rows(fold)
    return HeldOut(model.encode(values[at]), fold[at], weight[at])


def plan(model: TableModel, n: int, settings: Settings, seconds: float) -> Plan:
    """Batch size and optimizer steps for n rows: what fits the time on one core of 2020.

    The plan depends on sizes alone, so that a seed gives one result; the clock cuts it short only
    on slower machines.
    """
    few = 1000 if model.reads is None else 4000
    batch = settings.batch_size or (64 if n < few else 256 if n < 15000 else 1024)
    batch = min(batch, n)
    passes = 60 if n >= 15000 else 100
    wanted = max(150, min(passes * n // batch, 3000)) if n >= 100 else 100
    wanted = min(wanted, settings.max_steps or wanted)
    affordable = max(20, int(0.9 * min(seconds, 1e9) / _seconds_per_step(model, batch)))
    steps = min(wanted, affordable)
    checks = 24 if model.reads is None else min(24, 1 + steps // 12)
    return Plan(max(1, batch // rank_and_world()[1]), steps, wanted, checks)


def _seconds_per_step(model: TableModel, batch: int) -> float:
    """What one step takes, about."""
    width = model.config["hidden_dim"]
    outputs = sum(len(g) * (g.bins + 3 * model.config["components"]) for g in model.groups)
    targets = len(model.targets) * (0.8 + 1.2e-4 * width * width)
    cost, fixed = 1e-6 * model.members * (outputs * 0.03 + targets), 5e-3
    if model.reads is not None:
        weights = sum(p.numel() for p in model.nets.parameters())
        cost, fixed = cost + 3e-10 * weights, fixed + 1e-8 * weights
    return cost * batch + fixed


def shards_in_memory(table: TrainingTable, fold: Tensor, generator: torch.Generator) -> Shards:
    """This process's share of the rows; in random portions where they are many."""
    n, (rank, world) = len(table), rank_and_world()
    mine = torch.arange(n)[rank : world * (n // world) if n >= world else None : world]
    relative = table.weight / table.weight.mean()
    whole = table.values[mine], relative[mine], fold[mine]

    def shards() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = torch.randperm(len(mine), generator=generator)
        if len(mine) <= AT_ONCE:
            yield whole
            return
        for i in order.split(SHARD):
            yield tuple(part[i] for part in whole)  # type: ignore[misc]

    return shards
