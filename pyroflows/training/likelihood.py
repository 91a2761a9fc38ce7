"""Maximum likelihood: the loop that owns an optimizer, so that users need not write one."""

import copy
import math
import warnings
from functools import partial

import torch
from torch import Tensor, nn

from pyroflows.flow import Flow
from pyroflows.training.budget import Budget
from pyroflows.training.clipping import MaxNorm
from pyroflows.training.history import History, progress_bar
from pyroflows.training.rows import Rows, as_rows, minibatches, part_rows
from pyroflows.training.schedule import Schedule
from pyroflows.training.seeds import seeded
from pyroflows.training.states import Best
from pyroflows.training.steps import Steps, make_adam
from pyroflows.transforms.standardization import Units

__all__ = ["fit"]


@torch.enable_grad()
def fit(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    *,
    num_epochs: int = 100,
    batch_size: int | None = None,
    lr: float = 2e-3,
    weight_decay: float = 0.0,
    validation: float | tuple[Tensor, ...] = 0.1,
    patience: int = 15,
    clip_norm: float = 10.0,
    sample_weight: Tensor | None = None,
    standardize: bool = True,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Fit a flow to data by maximum likelihood.

    The flow is left in its best state, in evaluation mode.

    Data and contexts may have any location and scale: the first fit sets the flow's own
    standardization (:meth:`pyroflows.Flow.standardize`) from the training rows and their weights.
    It is kept by later fits, and left out where the flow scores the rows better without, as one
    does whose layers have been trained on them; ``flow.standardize(x, context)`` sets it anew.

    Minibatches with Adam (fused), linear warm-up and cosine to zero, clipped gradients. A step
    whose loss or gradient is not finite is skipped and counted, with a warning where most were.
    After each epoch the validation part is scored: the best state is kept, and training stops when
    ``patience`` epochs bring nothing better. Ctrl-C keeps the best state too. Where no epoch is
    better than the state before training, that one is kept; without a validation part the training
    rows judge, at the end.

    Args:
        flow: Anything with ``log_prob(x, context)`` that is a module, such as a recipe's result;
            only a :class:`pyroflows.Flow` is standardized.
        x: Data, shape ``(n, *event)``; arrays and numeric DataFrames are taken too.
        context: One context for each row, shape ``(n, context_dim)``, or what the flow's
            ``embedding`` takes, row by row; that is not standardized.
        num_epochs: Sweeps over the training part, at most.
        batch_size: Rows a step; None for about n / 20, between 32 and 512.
        lr: Largest learning rate.
        weight_decay: Decoupled weight decay (AdamW).
        validation: Fraction of rows held out, 0 for none, or a pair ``(x,)`` / ``(x, context)`` of
            its own.
        patience: Epochs without improvement before stopping.
        clip_norm: Largest norm of a gradient.
        sample_weight: Non-negative weight of each row, shape ``(n,)``.
        standardize: Whether to set the flow's standardization of data and context if it has none.
        device: Where to train, ``"auto"`` for a GPU if there is one; None for where the flow is.
        seed: Seed of the split and the minibatches; the global generators are left as they were.
        progress: Whether to show a progress bar.

    Returns:
        The losses and what happened; see :class:`History`.

    Raises:
        ValueError: If shapes disagree, rows are not finite, too few, outside the flow's support,
            or vary by less than the flow's dtype holds.
        TypeError: If x is not numeric.
        RuntimeError: If no step, or no state's validation loss, was finite; the flow is then as
            it was.
    """
    flow = flow.to(_device(device, flow))
    parameters, generator = _learnable(flow), torch.Generator()
    generator.manual_seed(seed)
    train, held = part_rows(flow, as_rows(x, context, sample_weight), validation, generator)
    n = len(train.x)
    if num_epochs < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(
            f"fit expects positive num_epochs and batch_size; got {num_epochs} and {batch_size}"
        )
    batch_size = min(n, batch_size or max(32, min(512, n // 20)))
    history, best, clock = History(), Best(flow), Budget()
    steps = Steps(
        parameters,
        lr,
        schedule=Schedule(num_epochs * (n // batch_size)),
        clip=MaxNorm(clip_norm),
        optimizer=partial(make_adam, weight_decay=weight_decay),
        history=history,
    )
    bar = progress_bar(range(num_epochs), desc="fit", unit="epoch", show=progress)
    with seeded(seed):
        try:
            judges = (train.some(8192) if held is None else held).to(flow)
            best.offer(_score(flow, judges))
            if standardize and isinstance(flow, Flow):
                _standardize(flow, train)
            train = train.to(flow)
            flow.train()
            with torch.no_grad():  # data-dependent initialization sees the data once
                flow.log_prob(*train.part(slice(8 * batch_size))[:2])
            best.offer(_score(flow, judges))
            for epoch in bar:
                flow.train()
                batches, losses = minibatches(train, batch_size, generator), []
                for _, batch in zip(steps, batches, strict=False):
                    loss = steps.take(_loss(flow, batch))
                    losses += [] if loss is None else [loss]
                record = dict(
                    epoch=epoch + 1,
                    step=steps.count,
                    train=sum(losses) / len(losses) if losses else math.nan,
                    lr=steps.lr,
                    seconds=clock.seconds(),
                    skipped=steps.skipped,
                )
                shown = {"train": f"{record['train']:.3f}"}
                if held is not None:
                    record["valid"] = _score(flow, judges)
                    best.offer(record["valid"], epoch)
                    shown |= {"valid": f"{record['valid']:.3f}"}
                history.records.append(record)
                bar.set_postfix(shown)
                if held is not None and epoch - max(0, best.mark) >= patience:
                    steps.stop("patience")
                    break
        except KeyboardInterrupt:
            steps.stop("interrupt")
        finally:
            bar.close()
        if held is None:
            best.offer(_score(flow, judges), len(history.records) - 1)
    history.best_epoch = best.mark
    history.best_valid_loss = math.nan if held is None else best.loss
    history.seconds = clock.seconds()
    failure = _failure(history)
    best.restore(start=failure is not None)
    flow.eval()
    if failure is not None:
        raise RuntimeError(failure)
    return history


def _learnable(flow: nn.Module) -> list[Tensor]:
    if next(flow.parameters(), None) is None:
        raise ValueError("fit: the flow has no parameters to learn")
    parameters: list[Tensor] = [p for p in flow.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("fit: every parameter of the flow is frozen; call flow.requires_grad_()")
    return parameters


def _failure(history: History) -> str | None:
    """Return why nothing was learned, or None; warn where little was."""
    if history.interrupted:
        return None
    skipped, tried = history.skipped_steps, history.num_steps
    what = f"in {skipped} of {tried} steps loss or gradient was not finite"
    advice = "look for extreme rows, lower lr, or pass standardize=True"
    if skipped == tried:
        return f"fit: {what}; the flow is as it was. {advice.capitalize()}"
    if history.valid_loss and not math.isfinite(history.best_valid_loss):
        return f"fit: no state had a finite validation loss; the flow is as it was. {advice}"
    if 2 * skipped > tried:
        warnings.warn(f"fit: {what}; {advice}", stacklevel=3)
    return None


@torch.no_grad()
def _standardize(flow: Flow, rows: Rows) -> None:
    """Set the units that the flow has not, unless it scores the rows better without them."""
    transform, some = flow.transform, rows.some(2048).to(flow)
    _, context, weight = rows
    if getattr(flow, "embedding", None) is not None:
        embedded = transform.seam is not None and transform.seam < len(transform)
        context = flow.embed(rows.to(flow).context) if embedded else None
    elif context is not None:
        units = transform.context_units
        if units.active:
            _check_units(units, context, weight, "context")
        else:
            before = _score(flow, some)
            units.fit_to(context, weight, name="context", binary=True)
            _keep_if_better(units, before, _score(flow, some))
    if transform.seam is not None:
        units, values = transform.units, transform.before_seam(rows.x, context)
        if units.active:
            _check_units(units, values, weight, "x")
        else:
            before = _score(flow, some)
            units.fit_to(values, weight)
            _keep_if_better(units, before, _score(flow, some))


def _keep_if_better(units: Units, before: float, after: float) -> None:
    """Leave out units that make a density worse: its layers know the rows as they are."""
    if math.isfinite(before) and not after <= before + 1e-6 * abs(before):
        units.reset()


def _check_units(units: Units, rows: Tensor, weight: Tensor | None, name: str) -> None:
    """Warn if units that were set before do not suit these rows."""
    fresh = copy.deepcopy(units)
    fresh.fit_to(rows, weight, name=name)
    shift, ratio = (fresh.loc - units.loc) / units.scale, fresh.scale / units.scale
    if bool((shift.abs() > 10).any() | (ratio > 10).any()):
        warnings.warn(
            f"fit: {name} lies up to {float(shift.abs().max()):.3g} standard deviations from, and "
            f"varies up to {float(ratio.max()):.3g} times as much as, the rows by which the flow "
            "was standardized; flow.standardize(x, context) sets it anew, before fitting",
            stacklevel=4,
        )


def _loss(flow: nn.Module, batch: Rows) -> Tensor:
    """Mean negative log-density of a batch."""
    log_prob, weight = flow.log_prob(batch.x, batch.context), batch.weight
    if weight is None:
        return -log_prob.mean()
    return -(weight * log_prob).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)


def _score(flow: nn.Module, rows: Rows, chunk: int = 8192) -> float:
    """Mean negative log-density in evaluation mode."""
    flow.eval()
    total, weights = 0.0, 0.0
    with torch.no_grad():
        for i in range(0, len(rows.x), chunk):
            x, context, weight = rows.part(slice(i, i + chunk))
            log_prob = flow.log_prob(x, context).double()
            weight = torch.ones_like(log_prob) if weight is None else weight.double()
            total -= (weight * log_prob).sum().item()
            weights += weight.sum().item()
    return total / max(weights, 1e-300)


def _device(device: str | torch.device | None, flow: nn.Module) -> torch.device:
    if device is None:
        own = next((p.device for p in flow.parameters()), None)
        return own if own is not None else torch.device("cpu")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
