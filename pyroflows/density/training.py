"""Fitting a :class:`~pyroflows.density.model.TableModel` within a budget of processor time."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.conditioners import ColumnNets
from pyroflows.density.columns import NEVER, NumberCells
from pyroflows.density.mixtures import MixedMixture
from pyroflows.density.model import Rows, TableModel
from pyroflows.density.reads import WIDE
from pyroflows.training.budget import Budget
from pyroflows.training.parallel import agreed

__all__ = [
    "column_scores",
    "default_settings",
    "fit_mixture",
    "mixture_views",
    "plan",
    "stack",
    "start_rare",
    "train",
]

Shards = Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]


def default_settings(n: int, columns: int) -> dict[str, Any]:
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


def plan(
    model: TableModel,
    n: int,
    *,
    batch_size: int | None = None,
    seconds: float = math.inf,
    steps: int | None = None,
) -> dict[str, int]:
    """Batch size and optimizer steps for n rows: what fits the budget on one core of 2020.

    The plan depends on sizes alone, so that a seed gives one result; the clock cuts it short only
    on slower machines. ``wanted`` are the steps of a budget without end.
    """
    few = 1000 if model.reads is None else 4000
    batch = batch_size or (64 if n < few else 256 if n < 15000 else 1024)
    batch = min(batch, n)
    width = model.config["hidden_dim"]
    outputs = sum(
        s * (p + 3 * model.config["components"])
        for s, p in zip(model.sizes, model.bins, strict=True)
    )
    cost = (
        1e-6
        * model.members
        * (outputs * 0.03 + len(model.targets) * (0.8 + 1.2e-4 * width * width))
    )
    fixed = 5e-3
    if model.reads is not None:
        weights = sum(p.numel() for p in model.nets.parameters())
        cost, fixed = cost + 3e-10 * weights, fixed + 1e-8 * weights
    passes = 60 if n >= 15000 else 100
    wanted = max(150, min(passes * n // batch, 3000)) if n >= 100 else 100
    affordable = max(20, int(0.9 * min(seconds, 1e9) / (cost * batch + fixed)))
    wanted = min(wanted, steps or wanted)
    return dict(batch_size=batch, steps=min(wanted, affordable), wanted=wanted)


class _Loss(nn.Module):
    """Negative log-likelihood of a batch, as a forward pass for DistributedDataParallel."""

    def __init__(self, model: TableModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Rows, weight: Tensor) -> Tensor:
        """Mean over rows of the sum over columns and members; ``weight`` has shape (M, N)."""
        return -_column_terms(self.model, rows).mul(weight[:, None]).sum() / rows.cell.shape[1]


def _column_terms(model: TableModel, rows: Rows) -> Tensor:
    """Log-likelihood of cells and of their pattern under each network, shape (M, T, N)."""
    log_p, odds = model.net_log_prob(rows)
    known = ~rows.missing & (rows.cell >= 0)
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


def mixture_views(model: TableModel, values: Tensor) -> tuple[Tensor, Tensor]:
    """Normal scores (N, J), NaN where unknown, and codes (N, C), -1 where missing, of a table."""
    numbers, labels = [], []
    for i, c in zip(model.order, model.cells, strict=True):
        x = values[:, i]
        e = c.encode(x)
        if c.is_label:
            labels.append(torch.where(x.isnan(), -1, e.cell))
        else:
            known = ~x.isnan() & (e.offset > NEVER / 10)
            numbers.append(torch.where(known, e.upper - e.width / 2, torch.nan))
    n = len(values)
    return (
        torch.stack(numbers, 1) if numbers else torch.zeros(n, 0, dtype=torch.float64),
        torch.stack(labels, 1) if labels else torch.zeros(n, 0, dtype=torch.long),
    )


def fit_mixture(
    model: TableModel,
    numbers: Tensor,
    labels: Tensor,
    weight: Tensor,
    generator: torch.Generator,
    *,
    seconds: float,
) -> MixedMixture:
    """The simple model on :func:`mixture_views` of rows of weights (N,).

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


RARE = (4, 100)  # rows of a label that gradients hardly meet, and that say enough


@torch.no_grad()
def start_rare(model: TableModel, values: Tensor, weight: Tensor, budget: Budget) -> None:
    """Start the networks of rare labels where their rows say, in closed form.

    A few rows in thousands move no held-out mean: training would stop before it had learned them.
    Given a rare label, later numbers start at the mean of its rows, later labels at their
    frequencies; the label itself starts as a linear discriminant of earlier numbers. Only what
    differs by four standard errors is told.

    Args:
        model: With untrained networks.
        values: Rows as the schema orders them, shape (N, D).
        weight: Their weights.
        budget: A third of it may be gone.
    """
    if not any(c.is_label for c in model.cells) or len(values) < 20 * RARE[0]:
        return
    rows = model.encode(values)
    scores = [
        _standing(c, rows.raw[:, i]) if isinstance(c, NumberCells) else None
        for i, c in enumerate(model.cells)
    ]
    for i, c in enumerate(model.cells):
        if not c.is_label:
            continue
        codes = torch.where(rows.raw[:, i].isnan(), -1, c.encode(rows.raw[:, i]).cell)
        for b in range(c.num_bins):
            mine = weight * (codes == b)
            if budget.over(0.33):
                return budget.tell("left rare labels to be learned by gradients")
            if RARE[0] <= float(mine.sum()) <= min(RARE[1], 0.02 * float(weight.sum())):
                _start_given(model, rows, scores, mine, i, b)
                if i >= model.num_given:
                    _start_label(model, scores, mine, i, b)


def _standing(c: NumberCells, x: Tensor) -> Tensor:
    """Normal scores as later columns see them, 0 where missing."""
    return c.features(x)[:, 0].double()


def _start_given(
    model: TableModel, rows: Rows, scores: list[Any], mine: Tensor, i: int, b: int
) -> None:
    """Later columns given bin b of label column i, whose rows weigh ``mine``."""
    count, k = float(mine.sum()), model.config["components"]
    for t in range(max(0, i + 1 - model.num_given), len(model.targets)):
        kind, place = model.place[t]
        slot = model.slot(t, i)
        if slot is None:
            continue
        skip = model.nets.skip[kind]
        skip = skip.view(model.members, model.sizes[kind], *skip.shape[1:])[:, place, slot + b]
        s = scores[model.num_given + t]
        if s is not None:
            shift = float((mine * s).sum()) / count
            spread = float((mine * (s - shift).square()).sum() / count) ** 0.5
            if abs(shift) > 4 * max(spread, 0.5) / math.sqrt(count):
                skip[:, :k], skip[:, k : 2 * k] = 4.0, shift  # logistics rather than bins
            continue
        mass = model.targets[t].bin_mass.double()
        known = ~rows.missing[t] & (rows.cell[t] >= 0)
        seen = torch.zeros_like(mass).index_add_(0, rows.cell[t][known], mine[known])
        error = (seen - count * mass).abs() / (count * mass).clamp_min(0.5).sqrt()
        if error.max() > 4:
            ratio = ((seen + mass) / (seen.sum() + 1)).log() - mass.log()
            skip[:, 1 : 1 + len(mass)] = ratio.float()


def _start_label(model: TableModel, scores: list[Any], mine: Tensor, i: int, b: int) -> None:
    """Bin b of label column i given earlier numbers: Fisher's discriminant."""
    t = i - model.num_given
    earlier = [j for j in range(i) if scores[j] is not None and model.slot(t, j) is not None]
    if not earlier:
        return
    s = torch.stack([scores[j] for j in earlier], 1)
    count = float(mine.sum())
    shift = (mine[:, None] * s).sum(0) / count - s.mean(0)
    told = shift.abs() > 4 * s.std(0).clamp_min(0.5) / math.sqrt(count)
    shift = torch.where(told, shift, 0.0)
    cov = s.T.cov().reshape(len(earlier), -1) + 0.1 * torch.eye(len(earlier), dtype=s.dtype)
    slope = torch.linalg.solve(cov, shift)
    kind, place = model.place[t]
    skip, bias = (
        part[kind].view(model.members, model.sizes[kind], *part[kind].shape[1:])[:, place]
        for part in (model.nets.skip, model.nets.bias)
    )
    for j, w in zip(earlier, slope.tolist(), strict=True):
        skip[:, model.slot(t, j), 1 + b] = w
    bias[..., 1 + b] -= float(slope @ (s.mean(0) + shift / 2))


def train(
    model: TableModel,
    shards: Shards,
    valid: Rows,
    fold: Tensor,
    weight: Tensor,
    *,
    rows: int,
    steps: int,
    batch_size: int,
    lr: float = 3e-3,
    weight_decay: float = 1e-2,
    wanted: int,
    budget: Budget,
    reserve: float = 0.0,
    patience: int = 6,
    checks: int = 24,
    generator: torch.Generator | None = None,
    report: Callable[[dict[str, float]], None] = lambda entry: None,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> list[dict[str, float]]:
    """Maximum likelihood; each network ends where its held-out rows liked its column best.

    Args:
        model: Trained in place.
        shards: Yields (values, weights, fold) of training rows; fold m keeps a row from member m,
            -1 from none.
        valid: Held-out rows of all folds.
        fold: Their folds.
        weight: Their weights.
        rows: Training rows in one pass, for the history.
        steps: Optimizer steps of the schedule.
        batch_size: Rows per step.
        lr: Peak learning rate; a short warm-up, then a cosine to zero.
        weight_decay: Decoupled, on matrices.
        wanted: Steps of a budget without end.
        budget: The clock of the fit; it rules the schedule once that lags behind it.
        reserve: Seconds to leave for what comes after.
        patience: Checks without gain in any column before stopping.
        checks: Validations over the schedule.
        generator: Source of randomness for dropout-free shuffling.
        report: Called with each history entry.
        wrap: Wraps the loss, e.g. in DistributedDataParallel.

    Returns:
        History: dicts of step, epoch, train and valid mean nats per row, lr, seconds.
    """
    device = model.device
    nets = model.nets.requires_grad_(True)
    loss_of = wrap(_Loss(model))
    matrices = [p for p in nets.parameters() if p.shape[1] > 1]
    others = [p for p in nets.parameters() if p.shape[1] == 1]
    groups = [
        dict(params=matrices, weight_decay=weight_decay),
        dict(params=others, weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=lr, betas=(0.9, 0.99), fused=device.type in ("cpu", "cuda")
    )
    average = copy.deepcopy(nets).requires_grad_(False)
    live: list[Tensor] = list(nets.parameters())
    mean: list[Tensor] = list(average.parameters())
    keeper = _Keeper(model, valid, fold, weight)
    keeper.check(average)
    history: list[dict[str, float]] = []
    begun = budget.seconds()
    window = max(budget.limit - reserve - begun, 1e-9)
    step, skipped, next_check = 0, 0, 1.0 / checks
    recent: list[float] = []
    limit = math.inf
    norms: list[float] = []

    def batches() -> Iterator[tuple[Rows, Tensor, float]]:
        """Batches, their weights for each member, and the share of the schedule that is over."""
        last: Tensor | None = None
        encoded: Any = None
        while True:
            for values, share_of, part in shards():
                encoded = model.encode(values) if values is not last else encoded
                last = values
                for i in torch.randperm(len(values), generator=generator).split(batch_size):
                    if len(i) < min(batch_size, len(values)):
                        continue
                    spent = agreed(_late(budget.seconds() - begun, window), like=live[0])
                    own = part[i][None] != torch.arange(model.members)[:, None]
                    share = max(step / steps, spent)
                    if share >= 1:
                        return
                    yield encoded[i].to(device), (own * share_of[i]).float().to(device), share

    try:
        for batch, weights, share in batches():
            for g in optimizer.param_groups:
                g["lr"] = lr * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * share))
            loss = loss_of(batch, weights)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(live, limit)
            step += 1
            if not bool(norm.isfinite()):
                skipped += 1
                if skipped > 100:
                    raise RuntimeError(
                        "100 steps had non-finite gradients: look for cells of absurd size"
                    )
                continue
            norms = [*norms[-49:], float(norm)]
            limit = 3 * sorted(norms)[len(norms) // 2]
            optimizer.step()
            recent.append(-float(loss.detach()) / model.members)
            torch._foreach_lerp_(
                mean, [p.detach() for p in live], 1 - min(0.995, step / (step + 10))
            )
            if share < next_check:
                continue
            next_check += math.floor((share - next_check) * checks + 1) / checks
            nats = keeper.check(average)
            entry = dict(
                step=step,
                epoch=step * batch_size / max(rows, 1),
                train=sum(recent) / len(recent),
                valid=nats,
                lr=optimizer.param_groups[0]["lr"],
                seconds=budget.seconds() - begun,
                skipped=skipped,
            )
            recent = []
            history.append(entry)
            report(entry)
            if keeper.stale >= patience:
                break
        else:
            if step < max(0.95 * min(steps, wanted), 0.5 * wanted):
                budget.tell(f"ended the fit at {100 * step / wanted:.0f} % of its planned steps")
    except KeyboardInterrupt:
        warnings.warn(
            f"fit was interrupted after {step} of {steps} steps and keeps its best state",
            stacklevel=4,
        )
    keeper.check(average)
    keeper.restore()
    nets.requires_grad_(False)
    return history


def _late(seconds: float, window: float) -> float:
    """Share of the budget that is spent, a tenth of it being free.

    So the schedule follows its steps alone, and the seed, unless the clock is well behind them.
    """
    return max(0.0, (seconds / window - 0.1) / 0.9)


class _Keeper:
    """The best averaged weights so far of every network, by rows it did not train on."""

    def __init__(self, model: TableModel, valid: Rows, fold: Tensor, weight: Tensor) -> None:
        self.model, self.valid = model, valid
        mine = fold[None] == torch.arange(model.members)[:, None]
        self.own = (mine * weight).float()[:, None]  # (M, 1, N)
        t = len(model.targets)
        self.best = torch.full((model.members, t), -math.inf)
        self.kept = [p.detach().clone() for p in model.nets.parameters()]
        self.stale = 0

    @torch.no_grad()
    def check(self, average: ColumnNets) -> float:
        """Compare; returns the held-out nats of the best."""
        if not len(self.valid):
            for k, p in zip(self.kept, average.parameters(), strict=True):
                k.copy_(p)
            return math.nan
        nets = self.model.nets
        self.model.nets = average
        try:
            terms = column_scores(self.model, self.valid)
        finally:
            self.model.nets = nets
        now = (terms * self.own).sum(-1) / self.own.sum(-1).clamp_min(1e-9)
        now = now.nan_to_num(-math.inf)
        better = now > self.best
        gain = torch.where(better, now - self.best, 0.0).sum(1).nan_to_num(posinf=1.0)
        self.best = torch.where(better, now, self.best)
        self.stale = 0 if bool((gain > 1e-3).any()) else self.stale + 1
        flat = better.reshape(-1)
        for kept, (name, p) in zip(self.kept, average.named_parameters(), strict=True):
            rows = flat
            if name.split(".")[0] in ("head", "skip", "bias"):
                rows = flat[self.model.nets.groups[int(name.split(".")[1])]]
            rows = rows.to(p.device)
            kept.copy_(torch.where(rows.view(-1, *[1] * (p.dim() - 1)), p, kept))
        return float(self.best.mean(0).sum())

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights into the model."""
        for p, kept in zip(self.model.nets.parameters(), self.kept, strict=True):
            p.copy_(kept)


def stack(
    model: TableModel,
    valid: Rows,
    fold: Tensor,
    weight: Tensor,
    parts: list[MixedMixture],
    *,
    prior: tuple[float, float] = (20.0, 1.0),
) -> Tensor:
    """Weight of the simple model in each column, by EM on held-out rows, shape (T,).

    Args:
        model: Trained.
        valid: Held-out rows of all folds.
        fold: Their folds.
        weight: Their weights.
        parts: The simple models, one per fold.
        prior: Pseudo-rows for the simple model and for the networks, whose held-out rows flatter
            them: they also chose when to stop.
    """
    t = len(model.targets)
    terms = column_scores(model, valid).double()
    net = terms.new_empty(t, len(valid))
    simple = terms.new_empty(t, len(valid))
    for m in range(model.members):
        at = (fold == m).nonzero()[:, 0]
        if len(at):
            odds = _pattern(model, valid[at])
            net[:, at] = terms[m][:, at] - odds[m]
            simple[:, at] = model.mixture_log_prob(valid[at], parts[m])
    known = (~valid.missing & (valid.cell >= 0)) * weight.double()
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
