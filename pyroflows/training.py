"""Maximum likelihood: the loop that owns an optimizer, so that users need not write one."""

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyroflows.flow import Flow
from pyroflows.training_rows import Rows, as_rows, minibatches, part_rows
from pyroflows.transforms.standardization import Units

__all__ = ["History", "fit", "make_adam", "warmup_cosine"]


@dataclass
class History:
    """What happened during :func:`fit`; losses are mean negative log-densities, in nats a row.

    Attributes:
        train_loss: One for each epoch, averaged over its steps.
        valid_loss: One for each epoch; empty without a validation part.
        best_epoch: Epoch, counted from 0, whose state was kept; -1 if it is the state before
            training.
        best_valid_loss: Validation loss of that state; NaN without a validation part.
        num_steps: Optimizer steps tried.
        skipped_steps: Steps left out because loss or gradient was not finite.
        stopped_early: Whether patience ran out before the epochs did.
        interrupted: Whether the user stopped it; the best state so far is kept.
    """

    train_loss: list[float] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    best_epoch: int = -1
    best_valid_loss: float = math.nan
    num_steps: int = 0
    skipped_steps: int = 0
    stopped_early: bool = False
    interrupted: bool = False

    def __repr__(self) -> str:
        """Sum the run up in a line."""
        loss = self.best_valid_loss if self.valid_loss else (self.train_loss or [math.nan])[-1]
        what = "validation" if self.valid_loss else "training"
        notes = [
            f"{what} loss {loss:.4f} nats at epoch {self.best_epoch + 1} of {len(self.train_loss)}"
        ]
        if self.best_epoch < 0:
            notes.append("the state before training is kept")
        if self.stopped_early:
            notes.append("stopped early")
        if self.interrupted:
            notes.append("interrupted")
        if self.skipped_steps:
            notes.append(f"{self.skipped_steps} of {self.num_steps} steps skipped, not finite")
        return f"History({', '.join(notes)})"


def make_adam(
    parameters: Sequence[Tensor], lr: float, *, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Return Adam, fused where the device has it.

    A third to a sixth of the default's time on the CPU.
    """
    parameters = list(parameters)
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused)


def warmup_cosine(step: int, num_steps: int, *, warmup: float = 0.02) -> float:
    """Return the factor of the learning rate.

    Linear up over the first part, then half a cosine to zero.
    """
    rise = max(1, round(warmup * num_steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, num_steps - rise)))


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
    num_steps = num_epochs * (n // batch_size)
    like = parameters[0]
    optimizer = make_adam(parameters, lr, weight_decay=weight_decay)
    history, best = History(), _Best(flow)
    bar = tqdm(range(num_epochs), desc="fit", unit="epoch", disable=not progress)
    with torch.random.fork_rng([like.device] if like.device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            judges = (train.some(8192) if held is None else held).to(flow)
            best.offer(-1, _score(flow, judges))
            if standardize and isinstance(flow, Flow):
                _standardize(flow, train)
            train = train.to(flow)
            flow.train()
            with torch.no_grad():  # data-dependent initialization sees the data once
                flow.log_prob(*train.part(slice(8 * batch_size))[:2])
            best.offer(-1, _score(flow, judges))
            for epoch in bar:
                flow.train()
                losses = []
                for batch in minibatches(train, batch_size, generator):
                    optimizer.param_groups[0]["lr"] = lr * warmup_cosine(
                        history.num_steps, num_steps
                    )
                    history.num_steps += 1
                    loss = _step(flow, batch, optimizer, parameters, clip_norm)
                    if loss is None:
                        history.skipped_steps += 1
                    else:
                        losses.append(loss)
                history.train_loss.append(sum(losses) / len(losses) if losses else math.nan)
                shown = {"train": f"{history.train_loss[-1]:.3f}"}
                if held is not None:
                    history.valid_loss.append(_score(flow, judges))
                    best.offer(epoch, history.valid_loss[-1])
                    shown |= {"valid": f"{history.valid_loss[-1]:.3f}"}
                    if epoch - max(0, best.epoch) >= patience:
                        history.stopped_early = True
                        break
                bar.set_postfix(shown)
        except KeyboardInterrupt:
            history.interrupted = True
        finally:
            bar.close()
        if held is None:
            best.offer(len(history.train_loss) - 1, _score(flow, judges))
    history.best_epoch = best.epoch
    history.best_valid_loss = math.nan if held is None else best.loss
    failure = _failure(history)
    flow.load_state_dict(best.state if failure is None else best.start)
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


def _step(
    flow: nn.Module,
    batch: Rows,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    clip_norm: float,
) -> float | None:
    """One optimizer step; None if loss or gradient is not finite."""
    optimizer.zero_grad(set_to_none=True)
    log_prob, weight = flow.log_prob(batch.x, batch.context), batch.weight
    if weight is None:
        loss = -log_prob.mean()
    else:
        loss = -(weight * log_prob).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    if not math.isfinite(loss.item() + norm.item()):
        return None
    optimizer.step()
    return loss.item()


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


class _Best:
    """The state with the lowest loss, and the one at the start."""

    def __init__(self, flow: nn.Module) -> None:
        self.flow, self.epoch, self.loss = flow, -1, math.nan
        self.state = self.start = self._copy()

    def _copy(self) -> dict[str, Tensor]:
        return {k: v.detach().clone() for k, v in self.flow.state_dict().items()}

    def offer(self, epoch: int, loss: float) -> None:
        if math.isfinite(loss) and not loss >= self.loss:
            self.epoch, self.loss, self.state = epoch, loss, self._copy()


def _device(device: str | torch.device | None, flow: nn.Module) -> torch.device:
    if device is None:
        own = next((p.device for p in flow.parameters()), None)
        return own if own is not None else torch.device("cpu")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
