"""Training the networks of a :class:`~pyroflows.density.model.TableModel`."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.checks import users_line
from pyroflows.density.engine import Shards
from pyroflows.density.model import Rows, TableModel
from pyroflows.training.budget import Budget
from pyroflows.training.clipping import MedianNorm
from pyroflows.training.history import progress_bar
from pyroflows.training.parallel import rank_and_world
from pyroflows.training.schedule import Schedule
from pyroflows.training.states import Average
from pyroflows.training.steps import Steps, make_adam

__all__ = ["BestColumns", "HeldOut", "Plan", "column_scores", "train"]

CHECKED = 0.15  # share of the time that validation may take


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a fit means to do.

    Attributes:
        batch_size: Rows per step, of each process.
        steps: Optimizer steps of the schedule.
        wanted: Steps of a budget without end.
        checks: Validations over the schedule, at most.
        patience: Checks without gain in any column before stopping.
    """

    batch_size: int
    steps: int
    wanted: int
    checks: int = 24
    patience: int = 6


@dataclasses.dataclass
class HeldOut:
    """Encoded rows that some networks do not train on.

    Attributes:
        rows: Those of all folds.
        fold: The member that does not train on each, shape (N,).
        weight: Their weights, shape (N,).
    """

    rows: Rows
    fold: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def mean(self, terms: Tensor) -> float:
        """Weighted mean of one number for each row; NaN without rows."""
        if not len(self):
            return math.nan
        return float((terms * self.weight).sum() / self.weight.sum().clamp_min(1e-300))


def _loss(model: TableModel, rows: Rows, weight: Tensor) -> Tensor:
    """Mean over rows of minus the sum over columns and members; weights of shape (M, N)."""
    return -_column_terms(model, rows).mul(weight[:, None]).sum() / rows.bin.shape[1]


def _column_terms(model: TableModel, rows: Rows) -> Tensor:
    """Log-likelihood of cells and of their pattern under each network, shape (M, T, N)."""
    log_p, odds = model.net_log_prob(rows)
    known = ~rows.missing & (rows.bin >= 0)
    log_p = torch.where(known, log_p, 0.0)
    sign = torch.where(rows.missing, 1.0, -1.0)
    pattern = torch.nn.functional.logsigmoid(sign * odds)
    return log_p + torch.where(model.has_missing[:, None], pattern, 0.0)


@torch.no_grad()
def column_scores(model: TableModel, rows: Rows) -> Tensor:
    """:func:`_column_terms` in evaluation mode, in chunks, on the CPU."""
    was = model.training
    model.eval()
    parts = [
        _column_terms(model, rows[i].to(model.device)).cpu()
        for i in torch.arange(len(rows)).split(model.chunk)
    ]
    model.train(was)
    return torch.cat(parts, -1)


def train(
    model: TableModel,
    shards: Shards,
    held: HeldOut,
    plan: Plan,
    *,
    rows: int,
    lr: float,
    budget: Budget,
    reserve: float = 0.0,
    generator: torch.Generator,
    progress: bool = False,
) -> list[dict[str, float]]:
    """Maximum likelihood; early stopping per network and column.

    Args:
        model: Trained in place.
        shards: Training rows; fold m keeps a row from member m, -1 from none.
        held: Held-out rows.
        plan: Sizes.
        rows: Training rows in one pass, for the history.
        lr: Peak learning rate; a short warm-up, then a cosine to zero.
        budget: The clock of the fit; it rules the schedule once that lags behind it.
        reserve: Seconds to leave for what comes after.
        generator: Source of randomness for shuffling.
        progress: Show a bar.

    Returns:
        History: dicts of step, epoch, train and valid mean nats per row, lr, seconds, skipped.
    """
    live = list(model.nets.requires_grad_(True).parameters())
    average, best = Average(live), BestColumns(model, held)
    checks = _Checks(best, plan, budget, reserve, rows)
    clock = budget.window(reserve=reserve, device=model.device)
    schedule = Schedule(plan.steps, warmup=30, hold=0, clock=clock)
    steps = _steps(live, lr, schedule)
    batches = _batches(model, shards, plan.batch_size, generator)
    bar = progress_bar(steps, desc="fit", total=plan.steps, show=progress)
    try:
        for _, (batch, weights) in zip(bar, batches, strict=False):
            share = schedule.position
            if steps.take(_loss(model, batch, weights)) is None:
                _refuse_many(steps.skipped)
                continue
            average.update()
            if checks.due(share):
                with average.swapped():
                    bar.set_postfix_str(checks.check(steps, share))
                if best.stale >= plan.patience:
                    steps.stop("patience")
        if steps.history.stopped != "patience":
            _tell(budget, steps.count, plan)
    except KeyboardInterrupt:
        warnings.warn(
            f"fit was interrupted after {steps.count} of {plan.steps} steps and keeps its best "
            "state",
            stacklevel=users_line(),
        )
    bar.close()
    with average.swapped():
        best.offer()
    best.restore()
    model.nets.requires_grad_(False)
    return checks.history


def _steps(live: Sequence[Tensor], lr: float, schedule: Schedule) -> Steps:
    """Adam with decay of the matrices alone."""
    groups = [
        dict(params=[p for p in live if p.shape[1] > 1], weight_decay=1e-2),
        dict(params=[p for p in live if p.shape[1] == 1], weight_decay=0.0),
    ]
    return Steps(
        groups,
        lr,
        schedule=schedule,
        clip=MedianNorm(3.0, after=1),
        optimizer=functools.partial(make_adam, betas=(0.9, 0.99)),
        shared=rank_and_world()[1] > 1,
    )


def _batches(
    model: TableModel, shards: Shards, size: int, generator: torch.Generator
) -> Iterator[tuple[Rows, Tensor]]:
    """Batches without end, and their weights for each member, (M, N)."""
    last: Tensor | None = None
    encoded: Any = None
    members = torch.arange(model.members)[:, None]
    while True:
        for values, weight, fold in shards():
            encoded = model.encode(values) if values is not last else encoded
            last = values
            for i in torch.randperm(len(values), generator=generator).split(size):
                if len(i) == min(size, len(values)):
                    weights = (fold[i][None] != members) * weight[i]
                    yield encoded[i].to(model.device), weights.float().to(model.device)


def _refuse_many(skipped: int) -> None:
    if skipped > 100:
        raise RuntimeError("100 steps had non-finite gradients: look for cells of absurd size")


def _tell(budget: Budget, count: int, plan: Plan) -> None:
    """Say so where the clock cut the fit."""
    if count < max(0.95 * min(plan.steps, plan.wanted), 0.5 * plan.wanted):
        share = 100 * count / plan.wanted
        budget.tell(f"ended the fit at {share:.0f} % of its planned steps")


class _Checks:
    """Validations: evenly over the schedule, fewer where they would take too much of the time.

    The first judges the start; what that takes tells how many there is time for.
    """

    def __init__(
        self, best: BestColumns, plan: Plan, budget: Budget, reserve: float, rows: int
    ) -> None:
        self.best, self.plan, self.budget, self.rows = best, plan, budget, rows
        self.history: list[dict[str, float]] = []
        begun, self.last_step = budget.seconds(), 0
        best.offer()
        self.begun = budget.seconds()
        window = CHECKED * max(budget.limit - reserve - self.begun, 1e-9)
        self.count = min(float(plan.checks), max(1.0, window / max(self.begun - begun, 1e-9)))
        self.next = 1.0 / self.count

    def due(self, share: float) -> bool:
        """Whether it is time, at a share of the schedule."""
        return share >= self.next

    def check(self, steps: Steps, share: float) -> str:
        """Judge the present weights; returns a line for the bar."""
        self.next += math.floor((share - self.next) * self.count + 1) / self.count
        members = self.best.model.members
        recent = [-y / members for y in steps.losses[self.last_step :] if math.isfinite(y)]
        self.last_step = steps.count
        nats = self.best.offer()
        self.history.append(
            dict(
                step=steps.count,
                epoch=steps.count * self.plan.batch_size / max(self.rows, 1),
                train=sum(recent) / len(recent),
                valid=nats,
                lr=steps.lr,
                seconds=self.budget.seconds() - self.begun,
                skipped=steps.skipped,
            )
        )
        return f"held-out {nats:.3f} nats"


class BestColumns:
    """The best weights so far of every network, by the column's rows it did not train on.

    Attributes:
        model: What is trained.
        stale: Offers in a row that made no column better.
    """

    def __init__(self, model: TableModel, held: HeldOut) -> None:
        self.model, self.held, self.stale = model, held, 0
        mine = held.fold[None] == torch.arange(model.members)[:, None]
        self.own = (mine * held.weight).float()[:, None]  # (M, 1, N)
        self.nats = torch.full((model.members, len(model.targets)), -math.inf)
        self.kept = [p.detach().clone() for p in model.nets.parameters()]

    @torch.no_grad()
    def offer(self) -> float:
        """Keep the present weights of the networks that are better; the best held-out nats."""
        if not len(self.held):
            self._keep(torch.ones(self.nats.numel(), dtype=torch.bool))
            return math.nan
        terms = column_scores(self.model, self.held.rows)
        now = (terms * self.own).sum(-1) / self.own.sum(-1).clamp_min(1e-9)
        now = now.nan_to_num(-math.inf)
        better = now > self.nats
        gain = torch.where(better, now - self.nats, 0.0).sum(1).nan_to_num(posinf=1.0)
        self.nats = torch.where(better, now, self.nats)
        self.stale = 0 if bool((gain > 1e-3).any()) else self.stale + 1
        self._keep(better.reshape(-1))
        return float(self.nats.mean(0).sum())

    def _keep(self, better: Tensor) -> None:
        """Keep the weights of some networks, shape (M T,)."""
        nets = self.model.nets
        for kept, (name, p) in zip(self.kept, nets.named_parameters(), strict=True):
            part, *number = name.split(".")
            rows = better[nets.groups[int(number[0])]] if part in GROUPED else better
            rows = rows.to(p.device)
            kept.copy_(torch.where(rows.view(-1, *[1] * (p.dim() - 1)), p, kept))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights into the model."""
        for p, kept in zip(self.model.nets.parameters(), self.kept, strict=True):
            p.copy_(kept)


GROUPED = ("head", "skip", "bias")  # parameters of the networks of one group
