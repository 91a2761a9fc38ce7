"""Maximum likelihood: the loop that owns an optimizer, so that users need not write one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from pyroflows.flow import Flow
from pyroflows.training.clipping import Clip
from pyroflows.training.history import History
from pyroflows.training.options import Callback, Options
from pyroflows.training.parallel import alone
from pyroflows.training.run import Run
from pyroflows.training.seeds import seeded
from pyroflows.training.steps import Optimize

__all__ = ["fit"]


@torch.enable_grad()
def fit(
    flow: Flow,
    x: Tensor | Iterable[Any],
    context: Tensor | None = None,
    *,
    num_epochs: int = 100,
    batch_size: int | None = None,
    lr: float = 2e-3,
    weight_decay: float = 0.0,
    validation: float | tuple[Tensor, ...] | Iterable[Any] | None = None,
    patience: int = 15,
    clip_norm: float | Clip = 10.0,
    sample_weight: Tensor | None = None,
    standardize: bool = True,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
    callbacks: Callback | Sequence[Callback] | None = (),
    optimizer: Optimize | None = None,
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    ema: float | None = None,
    max_time: float | None = None,
    checkpoint: str | os.PathLike | None = None,
    distributed: bool = True,
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
    ``patience`` epochs bring nothing better. Ctrl-C keeps the best state too, and so does an
    error, which is then raised. Where no epoch is better than the state before training, that one
    is kept; without a validation part the training rows judge, at the end.

    Args:
        flow: Anything with ``log_prob(x, context)`` that is a module, such as a recipe's result;
            only a :class:`pyroflows.Flow` is standardized.
        x: Data, shape ``(n, *event)``; arrays and numeric DataFrames are taken too. Or what gives
            batches, however many: a ``DataLoader``, a ``Dataset``, or anything that can be
            iterated over again in every epoch. A batch is ``x``, ``(x,)``, ``(x, context)``,
            ``(x, context, sample_weight)``, or a dictionary of these. The first 8,192 rows then
            standardize; an iterator that can be read once serves for one epoch.
        context: One context for each row, shape ``(n, context_dim)``, or what the flow's
            ``embedding`` takes, row by row; that is not standardized.
        num_epochs: Sweeps over the training part, at most.
        batch_size: Rows a step; None for about n / 20, between 32 and 512.
        lr: Largest learning rate.
        weight_decay: Decoupled weight decay (AdamW).
        validation: Fraction of rows held out, 0 for none; rows ``(x,)``, ``(x, context)`` or ``(x,
            context, sample_weight)``; or a loader of its own. None for a tenth of the rows, of a
            loader for none.
        patience: Epochs without improvement before stopping.
        clip_norm: Largest norm of a gradient; or a clipper, such as :class:`MedianNorm`.
        sample_weight: Non-negative weight of each row, shape ``(n,)``.
        standardize: Whether to set the flow's standardization of data and context if it has none.
        device: Where to train, ``"auto"`` for a GPU if there is one; None for where the flow is.
        seed: Seed of the split and the minibatches; the global generators are left as they were.
        progress: Whether to show a progress bar.
        callbacks: Called with the :class:`History` after each epoch; its last record is
            ``history.records[-1]``. What returns true ends the fit.
        optimizer: Called as ``optimizer(parameters, lr=lr)`` in place of AdamW; a class of
            ``torch.optim`` will do, ``LBFGS`` too.
        scheduler: Called with the optimizer in place of warm-up and cosine. Its ``step`` is called
            after each epoch, with the loss if it is ``ReduceLROnPlateau``; after each step if it
            is ``OneCycleLR`` or ``CyclicLR``.
        ema: Decay of an exponential moving average of the parameters, such as 0.999, which is then
            what is scored and kept; None for no average.
        max_time: Seconds, on the clock of :class:`Budget`, by which the learning rate has fallen
            to zero and the fit ends.
        checkpoint: File that is written after each epoch. Where it exists already, the fit goes on
            from it to the same numbers as without the interruption; if that fit had ended, the
            flow takes its result.
        distributed: Whether the processes of ``torch.distributed``, if there are several, train
            one flow together: each takes its share of every batch, or brings a loader of its own;
            gradients are averaged; the first process reports and writes.

    Returns:
        The losses and what happened; see :class:`History`.

    Raises:
        ValueError: If shapes disagree, rows are not finite, too few, outside the flow's support,
            or vary by less than the flow's dtype holds; if the checkpoint is of another fit.
        TypeError: If x is not numeric.
        RuntimeError: If no step, or no state's validation loss, was finite; the flow is then as
            it was.
    """
    options = Options(
        num_epochs=num_epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        validation=validation,
        patience=patience,
        clip_norm=clip_norm,
        standardize=standardize,
        seed=seed,
        progress=progress,
        callbacks=[callbacks] if callable(callbacks) else list(callbacks or ()),
        optimizer=optimizer,
        scheduler=scheduler,
        ema=ema,
        max_time=max_time,
        checkpoint=checkpoint,
    )
    where = _device(device, flow)
    with seeded(seed, where), nullcontext() if distributed else alone():
        return Run(flow.to(where), (x, context, sample_weight), options).fit()


def _device(device: str | torch.device | None, flow: nn.Module) -> torch.device:
    if device is None:
        own = next((p.device for p in flow.parameters()), None)
        return own if own is not None else torch.device("cpu")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
