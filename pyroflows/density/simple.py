"""The simple model of a small table, and how much each column listens to it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroflows.density.columns import NEVER
from pyroflows.density.engine import TrainingTable
from pyroflows.density.mixtures import MixedMixture
from pyroflows.density.model import Rows, TableModel
from pyroflows.density.training import HeldOut, column_scores
from pyroflows.training.budget import Budget

__all__ = ["blend_weights", "fit_simple"]

LARGE = 20_000  # rows from which networks alone do
ENOUGH = 6_000  # rows that one simple model is fitted to


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
    if table.size > LARGE:
        return []
    out: list[MixedMixture] = []
    numbers, labels = _views(model, table.values)
    last = model.members if model.reads is None else model.members + 1
    for m in range(last):
        if budget.over(0.5):
            budget.tell("left out the simple model")
            return []
        rows = (fold != m).nonzero()[:, 0]
        if len(rows) > ENOUGH:
            rows = rows[torch.randperm(len(rows), generator=generator)[:ENOUGH]]
        if len(rows):
            own = numbers[rows], labels[rows], table.weight[rows]
            seconds = 0.15 * budget.limit / model.members
            out.append(_fit(model, *own, generator, seconds=seconds))
    if len(out) < last:
        return []
    return out if last > model.members else [*out, MixedMixture.union(out)]


def _views(model: TableModel, values: Tensor) -> tuple[Tensor, Tensor]:
    """Normal scores (N, J), NaN where unknown, and codes (N, C), -1 where missing, of a table."""
    numbers, labels = [], []
    for i, c in zip(model.order, model.cells, strict=True):
        x = values[:, i]
        e = c.encode(x)
        if c.is_label:
            labels.append(torch.where(x.isnan(), -1, e.bin))
        else:
            known = ~x.isnan() & (e.offset > NEVER / 10)
            numbers.append(torch.where(known, e.upper - e.width / 2, torch.nan))
    n = len(values)
    return (
        torch.stack(numbers, 1) if numbers else torch.zeros(n, 0, dtype=torch.float64),
        torch.stack(labels, 1) if labels else torch.zeros(n, 0, dtype=torch.long),
    )


def _fit(
    model: TableModel,
    numbers: Tensor,
    labels: Tensor,
    weight: Tensor,
    generator: torch.Generator,
    *,
    seconds: float,
) -> MixedMixture:
    """The simple model on :func:`_views` of rows of weights (N,).

    So many classes that a core of 2020 finds them in the given time; that depends on sizes alone.
    """
    filled = []
    for s in numbers.unbind(1):
        known = ~s.isnan()
        filled.append(torch.where(known, s, s[known].mean() if known.any() else 0.0))
    n = len(numbers)
    return MixedMixture.fit(
        torch.stack(filled, 1) if filled else numbers,
        labels,
        [c.num_bins for c in model.cells if c.is_label],
        [c.is_label for c in model.cells],
        generator=generator,
        weight=weight,
        max_components=int(min(max(seconds * 2e9 / (400 * n * (len(filled) + 1) ** 2), 1), 24)),
    )


def blend_weights(
    model: TableModel,
    held: HeldOut,
    parts: list[MixedMixture],
    *,
    prior: tuple[float, float] = (20.0, 1.0),
) -> Tensor:
    """Weight of the simple model in each column, by EM on held-out rows, shape (T,).

    Args:
        model: Trained.
        held: Rows of all folds.
        parts: The simple models, one per fold.
        prior: Pseudo-rows for the simple model and for the networks, whose held-out rows flatter
            them: they also chose when to stop.
    """
    t, rows = len(model.targets), held.rows
    terms = column_scores(model, rows).double()
    net = terms.new_empty(t, len(rows))
    simple = terms.new_empty(t, len(rows))
    for m in range(model.members):
        at = (held.fold == m).nonzero()[:, 0]
        if len(at):
            odds = _pattern(model, rows[at])
            net[:, at] = terms[m][:, at] - odds[m]
            simple[:, at] = model.mixture_log_prob(rows[at], parts[m])
    known = (~rows.missing & (rows.bin >= 0)) * held.weight.double()
    alpha = torch.full((t, 1), 0.5, dtype=torch.float64)
    for _ in range(200):
        share = torch.sigmoid(alpha.log() - torch.log1p(-alpha) + simple - net) * known
        alpha = (share.sum(1, keepdim=True) + prior[0]) / (known.sum(1, keepdim=True) + sum(prior))
    # The simple model knows no point masses.
    smooth = [c.is_label or not len(c.atoms) for c in model.targets]
    return (alpha[:, 0] * torch.tensor(smooth)).float()


@torch.no_grad()
def _pattern(model: TableModel, rows: Rows) -> Tensor:
    """Log-probabilities of the pattern of missing cells under each network, (M, T, N)."""
    if not bool(model.has_missing.any()):
        return torch.zeros(model.members, *rows.missing.shape)
    model.eval()
    parts = [model.net_log_prob(part.to(model.device))[1] for part in model.portions(rows)]
    odds = torch.cat(parts, -1).cpu()
    sign = torch.where(rows.missing, 1.0, -1.0)
    return torch.where(
        model.has_missing.cpu()[:, None], torch.nn.functional.logsigmoid(sign * odds), 0.0
    )
