"""Fitting a :class:`~pyroflows.density.model.TableModel` to a table, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyroflows.density.columns import LabelCells, NumberCells, cells_for
from pyroflows.density.engine import Fit, Settings, TrainingTable
from pyroflows.density.mixtures import MixedMixture
from pyroflows.density.model import TableModel
from pyroflows.density.parallel import wrapped
from pyroflows.density.reads import choose_reads
from pyroflows.density.training import (
    column_scores,
    default_settings,
    fit_mixture,
    mixture_views,
    plan,
    stack,
    start_rare,
    train,
)
from pyroflows.training.budget import Budget
from pyroflows.training.parallel import rank_and_world

__all__ = ["fit_mixed", "fit_more", "folds"]

SHARD = 131072  # rows that are encoded at once, where a table is large
AT_ONCE = 200_000  # rows up to which a table is encoded whole


def fit_mixed(
    table: TrainingTable, settings: Settings, budget: Budget, generator: torch.Generator
) -> tuple[TableModel, Fit]:
    """Cells, simple models, networks, and the weights that held-out rows give to them."""
    values, weight = table.values, table.weight
    device = settings.device_for(table.size)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(generator.initial_seed())
        model = new_model(table, settings, budget)
        fold = folds(len(table), table.size, model.members, generator)
        held = (fold >= 0).nonzero()[:, 0]
        begun = budget.seconds()
        valid = model.encode(values[held])
        reserve = 4 * (budget.seconds() - begun)
        start_rare(model, values[:20000], weight[:20000], budget)
        simple = fit_simple(model, table, fold, generator, budget)
        model = model.to(device)
        steps = plan(
            model,
            table.size,
            batch_size=settings.batch_size,
            seconds=budget.limit,
            steps=settings.max_steps,
        )
        rank, world = rank_and_world()
        bar = progress_bar(settings.progress and rank == 0, steps["steps"])
        begun = budget.seconds()
        first = column_scores(model, valid).sum(1).mean(0)
        reserve += 3 * (budget.seconds() - begun)  # stacking and thresholds
        start = float(_mean(first, weight[held])) if len(held) else math.nan
        history = train(
            model,
            table.shards or shards_in_memory(table, fold, generator),
            valid,
            fold[held],
            weight[held],
            rows=table.size,
            lr=settings.learning_rate,
            budget=budget,
            reserve=min(reserve, 0.4 * budget.limit),
            checks=24 if model.reads is None else min(24, 1 + steps["steps"] // 12),
            generator=generator,
            report=bar,
            wrap=wrapped,
            **{**steps, "batch_size": max(1, steps["batch_size"] // world)},
        )
        bar(None)
        model.eval()
        if simple:
            *parts, whole = simple
            model.set_mixture(whole, stack(model, valid, fold[held], weight[held], parts))
    return model, Fit([dict(step=0, epoch=0.0, valid=start), *history], held)


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
    held = (fold >= 0).nonzero()[:, 0]
    steps = plan(
        model, n, batch_size=settings.batch_size, seconds=budget.limit, steps=settings.max_steps
    )
    steps["wanted"] = min(steps["wanted"], max(20, 5 * n // steps["batch_size"]))
    steps["steps"] = min(steps["steps"], steps["wanted"])
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(generator.initial_seed())
        history = train(
            model,
            lambda: iter([(values, weight, fold)]),
            model.encode(values[held]),
            fold[held],
            weight[held],
            rows=n,
            lr=settings.learning_rate / 3,
            budget=budget,
            generator=generator,
            wanted=steps["wanted"],
            steps=steps["steps"],
            batch_size=steps["batch_size"],
        )
    model.eval()
    return Fit(history, held)


# ---------------------------------------------------------------------- stages


def new_model(table: TrainingTable, settings: Settings, budget: Budget) -> TableModel:
    """Untrained networks for the cells of a table; columns with missing cells come last."""
    columns, given = table.schema.columns, table.given
    targets = [j for j in range(len(columns)) if j not in given]
    order = [*given, *sorted(targets, key=lambda j: columns[j].missing)]
    own = dict(members=settings.members, hidden_dim=settings.hidden_dim)
    sizes = default_settings(table.size, len(targets))
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


def fit_simple(
    model: TableModel,
    table: TrainingTable,
    fold: Tensor,
    generator: torch.Generator,
    budget: Budget,
) -> list[MixedMixture]:
    """One simple model per fold, of at most 6,000 rows, then the one to use; [] if large.

    That one is their union; for a wide table it is a single one of all rows, so that its
    state of a row, squared in the columns, is held once.
    """
    if table.size > 20000:
        return []
    out: list[MixedMixture] = []
    numbers, labels = mixture_views(model, table.values)
    last = model.members if model.reads is None else model.members + 1
    for m in range(last):
        if budget.over(0.5):
            budget.tell("left out the simple model")
            return []
        rows = (fold != m).nonzero()[:, 0]
        if len(rows) > 6000:
            rows = rows[torch.randperm(len(rows), generator=generator)[:6000]]
        if len(rows):
            out.append(
                fit_mixture(
                    model,
                    numbers[rows],
                    labels[rows],
                    table.weight[rows],
                    generator,
                    seconds=0.15 * budget.limit / model.members,
                )
            )
    if len(out) < last:
        return []
    return out if last > model.members else [*out, MixedMixture.union(out)]


def shards_in_memory(
    table: TrainingTable, fold: Tensor, generator: torch.Generator
) -> Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]:
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


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over the last axis."""
    return (x * weight).sum(-1) / weight.sum().clamp_min(1e-300)


def progress_bar(show: bool, steps: int) -> Callable[[dict[str, float] | None], None]:
    """A callback for history entries; None closes the bar."""
    if not show:
        return lambda entry: None
    from tqdm.auto import tqdm

    bar = tqdm(total=steps, unit="step")

    def report(entry: dict[str, float] | None) -> None:
        if entry is None:
            bar.close()
            return
        bar.update(int(entry["step"]) - bar.n)
        bar.set_postfix_str(f"held-out {entry['valid']:.3f} nats")

    return report
