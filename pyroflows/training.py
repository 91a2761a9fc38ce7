"""Maximum likelihood: the loop that owns an optimizer, so that users need not write one."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyroflows.flow import Flow

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
        skipped_steps: Steps left out because loss or gradient was not finite.
        stopped_early: Whether patience ran out before the epochs did.
        interrupted: Whether the user stopped it; the best state so far is kept.
    """

    train_loss: list[float] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    best_epoch: int = -1
    best_valid_loss: float = math.nan
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
        if self.stopped_early:
            notes.append("stopped early")
        if self.interrupted:
            notes.append("interrupted")
        if self.skipped_steps:
            notes.append(f"{self.skipped_steps} non-finite steps skipped")
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
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Fit a flow to data by maximum likelihood.

    The flow is left in its best state, in evaluation mode.

    Minibatches with Adam (fused), linear warm-up and cosine to zero, clipped gradients. A step
    whose loss or gradient is not finite is skipped and counted. After each epoch the validation
    part is scored: the best state is kept, and training stops when ``patience`` epochs bring
    nothing better. Ctrl-C keeps the best state too.

    Args:
        flow: Anything with ``log_prob(x, context)`` that is a module, such as a recipe's result.
        x: Data, shape ``(n, *event)``, best of unit scale; arrays and numeric DataFrames are
            taken too.
        context: One context for each row, shape ``(n, context_dim)``.
        num_epochs: Sweeps over the training part, at most.
        batch_size: Rows a step; None for about n / 20, between 32 and 512.
        lr: Largest learning rate.
        weight_decay: Decoupled weight decay (AdamW).
        validation: Fraction of rows held out, 0 for none, or a pair ``(x,)`` / ``(x, context)`` of
            its own.
        patience: Epochs without improvement before stopping.
        clip_norm: Largest norm of a gradient.
        sample_weight: Non-negative weight of each row, shape ``(n,)``.
        device: Where to train, ``"auto"`` for a GPU if there is one; None for where the flow is.
        seed: Seed of the split and the minibatches; the global generators are left as they were.
        progress: Whether to show a progress bar.

    Returns:
        The losses and what happened; see :class:`History`.

    Raises:
        ValueError: If shapes disagree, rows are not finite, or there are too few.
        TypeError: If x is not numeric.
        RuntimeError: If no state with a finite validation loss was met.
    """
    flow = flow.to(_device(device, flow))
    like = next((p for p in flow.parameters()), None)
    if like is None:
        raise ValueError("fit: the flow has no parameters to learn")
    train, generator = _as_rows(like, x, context, sample_weight), torch.Generator()
    generator.manual_seed(seed)
    held: _Rows | None
    if isinstance(validation, tuple):
        held = _as_rows(like, validation[0], *validation[1:2])
    elif isinstance(validation, (int, float)) and 0 <= validation < 1:
        held, train = _split(train, validation, generator)
    else:
        raise ValueError(
            f"fit: validation must be a number in [0, 1) or a tuple (x,) or (x, context); "
            f"got {validation!r:.80}"
        )
    n = len(train.x)
    if n < 2:
        raise ValueError(f"fit needs at least 2 training rows; got {n}")
    for part, rows in (("training", train), ("validation", held)):
        if rows is not None and (
            not len(rows.x) or (rows.weight is not None and not rows.weight.any())
        ):
            raise ValueError(f"fit: the {part} part has no rows of positive weight")
    if num_epochs < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(
            f"fit expects positive num_epochs and batch_size; got {num_epochs} and {batch_size}"
        )
    batch_size = min(n, batch_size or max(32, min(512, n // 20)))
    num_steps = num_epochs * (n // batch_size)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("fit: every parameter of the flow is frozen; call flow.requires_grad_()")
    optimizer = make_adam(parameters, lr, weight_decay=weight_decay)
    step = 0
    history, best = History(), _Best(flow)
    bar = tqdm(range(num_epochs), desc="fit", unit="epoch", disable=not progress)
    devices = [like.device] if like.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            for epoch in bar:
                flow.train()
                # data-dependent initialization sees the data once, before anything is scored
                if epoch == 0:
                    with torch.no_grad():
                        flow.log_prob(*train.part(slice(8 * batch_size))[:2])
                    best.offer(-1, _score(flow, held), history)
                    flow.train()
                losses = []
                for batch in _minibatches(train, batch_size, generator):
                    optimizer.param_groups[0]["lr"] = lr * warmup_cosine(step, num_steps)
                    step += 1
                    loss = _step(flow, batch, optimizer, parameters, clip_norm)
                    if loss is None:
                        history.skipped_steps += 1
                    else:
                        losses.append(loss)
                history.train_loss.append(sum(losses) / len(losses) if losses else math.nan)
                shown = {"train": f"{history.train_loss[-1]:.3f}"}
                if held is not None:
                    history.valid_loss.append(_score(flow, held))
                    best.offer(epoch, history.valid_loss[-1], history)
                    shown |= {"valid": f"{history.valid_loss[-1]:.3f}"}
                    if epoch - max(0, history.best_epoch) >= patience:
                        history.stopped_early = True
                        break
                bar.set_postfix(shown)
        except KeyboardInterrupt:
            history.interrupted = True
        finally:
            bar.close()
    if held is None:
        history.best_epoch = len(history.train_loss) - 1
    elif not math.isfinite(history.best_valid_loss) and not history.interrupted:
        raise RuntimeError(
            "fit: no state had a finite validation loss; standardize the data, or lower lr"
        )
    else:
        best.restore()
    flow.eval()
    return history


class _Rows(NamedTuple):
    """Data, context and weights, one row each."""

    x: Tensor
    context: Tensor | None
    weight: Tensor | None

    def part(self, index: Tensor | slice) -> "_Rows":
        """Return some of the rows."""
        x, context, weight = (None if v is None else v[index] for v in self)
        return _Rows(cast(Tensor, x), context, weight)


def _step(
    flow: nn.Module,
    batch: _Rows,
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


def _score(flow: nn.Module, rows: _Rows | None, chunk: int = 8192) -> float:
    """Mean negative log-density in evaluation mode; NaN for no rows."""
    if rows is None:
        return math.nan
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
    """The state with the lowest validation loss."""

    def __init__(self, flow: nn.Module) -> None:
        self.flow = flow
        self.state: dict[str, Tensor] | None = None

    def offer(self, epoch: int, loss: float, history: History) -> None:
        if math.isfinite(loss) and not loss >= history.best_valid_loss:
            history.best_epoch, history.best_valid_loss = epoch, loss
            self.state = {k: v.detach().clone() for k, v in self.flow.state_dict().items()}

    def restore(self) -> None:
        if self.state is not None:
            self.flow.load_state_dict(self.state)


def _device(device: str | torch.device | None, flow: nn.Module) -> torch.device:
    if device is None:
        own = next((p.device for p in flow.parameters()), None)
        return own if own is not None else torch.device("cpu")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _tensor(values: Any) -> Tensor:
    return values.detach() if isinstance(values, Tensor) else torch.tensor(np.asarray(values))


def _as_rows(
    like: Tensor, x: Tensor, context: Tensor | None = None, weight: Tensor | None = None
) -> _Rows:
    """Data, context and weights as finite tensors of the flow's dtype and device."""
    x = _tensor(x)
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"fit expects real numbers; got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"fit expects x of shape (n, *event); got {tuple(x.shape)}")

    def checked(name: str, value: Tensor) -> Tensor:
        value = _tensor(value).to(like.device, like.dtype)
        count = len(value) if value.dim() else 0
        if count != len(x) or not value.dim():
            raise ValueError(f"fit: x has {len(x)} rows, but {name} has {count}")
        finite = value.isfinite().reshape(len(value), math.prod(value.shape[1:])).all(-1)
        bad = int((~finite).sum())
        if bad:
            raise ValueError(
                f"fit: {bad} rows of {name} have missing or infinite values; drop or impute them"
            )
        return value

    rows = _Rows(
        checked("x", x),
        None if context is None else checked("context", context),
        None if weight is None else checked("sample_weight", weight),
    )
    if rows.weight is not None and rows.weight.dim() > 1:
        raise ValueError(
            f"fit expects sample_weight of shape (n,); got {tuple(rows.weight.shape)}"
        )
    if rows.weight is not None and bool((rows.weight < 0).any()):
        raise ValueError("fit: sample_weight must not be negative")
    return rows


def _split(rows: _Rows, fraction: float, generator: torch.Generator) -> tuple[_Rows | None, _Rows]:
    n = len(rows.x)
    count = round(fraction * n)
    if fraction and not count:
        raise ValueError(
            f"fit: {n} rows are too few to hold out {fraction:.0%}; pass validation=0"
        )
    order = torch.randperm(n, generator=generator).to(rows.x.device)
    return (rows.part(order[:count]) if count else None), rows.part(order[count:])


def _minibatches(rows: _Rows, size: int, generator: torch.Generator) -> Iterator[_Rows]:
    """Full batches in random order; the rest of an epoch takes part in the next shuffle."""
    n = len(rows.x)
    order = torch.randperm(n, generator=generator).to(rows.x.device)
    for i in range(0, n - size + 1, size):
        yield rows.part(order[i : i + size])
