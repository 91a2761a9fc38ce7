"""One fit by maximum likelihood under way."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau

from pyroflows.flow import Flow
from pyroflows.training.budget import Budget
from pyroflows.training.checkpoint import Checkpoint
from pyroflows.training.clipping import MaxNorm
from pyroflows.training.history import History, progress_bar
from pyroflows.training.options import Options
from pyroflows.training.parallel import agreed, broadcast, rank_and_world
from pyroflows.training.rows import Rows
from pyroflows.training.schedule import Schedule
from pyroflows.training.seeds import random_state, set_random_state
from pyroflows.training.sources import sources
from pyroflows.training.standardizing import score, standardize_by
from pyroflows.training.states import Average, Best
from pyroflows.training.steps import Steps, make_adam

__all__ = ["Run"]


class Run:
    """One fit: what it trains, on what, and how far it is."""

    def __init__(self, flow: nn.Module, data: tuple[Any, Any, Any], options: Options) -> None:
        self.flow, self.options, self.budget = flow, options, Budget(options.max_time)
        self.parameters, generator = _learnable(flow), torch.Generator()
        generator.manual_seed(options.seed)
        self.rank, self.world = rank_and_world()
        self.train, self.held = sources(
            flow,
            data,
            options.validation,
            batch_size=options.batch_size,
            generator=generator,
            once=options.num_epochs == 1,
        )
        self.rows = self.train.rows  # read now: random loaders then go on as they began
        broadcast(flow)
        clip = copy.deepcopy(options.clip_norm)  # what it has seen is of this fit
        self.steps = Steps(
            self.parameters,
            options.lr,
            schedule=self._schedule(),
            clip=clip if callable(clip) else MaxNorm(clip),
            optimizer=options.optimizer or partial(make_adam, weight_decay=options.weight_decay),
            shared=self.world > 1,
        )
        self.history, self.best = self.steps.history, Best(flow)
        self.average: Average | None = None
        self.scheduler = options.scheduler and options.scheduler(self.steps.optimizer)
        self.checkpoint: Checkpoint | None = None
        if options.checkpoint is not None:
            rows = [s and s.identity() for s in (self.train, self.held)]
            settings = {**options.settings(), "rows": rows, "processes": self.world}
            self.checkpoint = Checkpoint(options.checkpoint, flow, settings)

    def _schedule(self) -> Schedule | None:
        """Warm-up and cosine; the level part of an epoch whose length nobody knows is open."""
        if self.options.scheduler is not None:
            return None
        clock, count = self.budget.window(device=self.parameters[0].device), self.train.count()
        if count is None:
            return Schedule(_OPEN, warmup=100, hold=_OPEN, clock=clock)
        return Schedule(self.options.num_epochs * count, clock=clock)

    def fit(self) -> History:
        """Train, from the beginning or from the checkpoint; leave the best state."""
        saved = self.checkpoint and self.checkpoint.load()
        try:
            if saved:
                self._resume(saved)
            else:
                self._begin()
            if not (saved and saved["ended"]):
                self._train()
                self._conclude()
        except BaseException:
            try:
                if self.held is None and self.steps.count:
                    self._offer(len(self.history.records) - 1)
            finally:
                self._restore()
            raise
        failure = _failure(self.history)
        self._restore(start=failure is not None)
        if failure is not None:
            raise RuntimeError(failure)
        return self.history

    def _begin(self) -> None:
        """Units and data-dependent layers see the data, once."""
        flow = self.flow
        try:
            self._offer(-1)
            if self.options.standardize and isinstance(flow, Flow):
                standardize_by(flow, self.rows)
            flow.train()
            with torch.no_grad():
                rows = self.rows.part(slice(8 * self.train.batch_size))
                flow.log_prob(*rows.to(flow)[:2])
            broadcast(flow)
            self._offer(-1)
        except KeyboardInterrupt:
            self.steps.stop("interrupt")
        self._average()

    def _average(self) -> None:
        if self.options.ema is not None:
            self.average = Average(self.parameters, self.options.ema)

    def _train(self) -> None:
        """Epochs, until something ends them."""
        total, done = self.options.num_epochs, len(self.history.records)
        show = self.options.progress and self.rank == 0
        bar = progress_bar(
            range(done, total), desc="fit", unit="epoch", total=total, begun=done, show=show
        )
        try:
            for epoch in bar:
                if self.history.stopped or (epoch and self.steps.factor == 0):
                    break
                record = self._epoch(epoch)
                losses = {k: f"{record[k]:.3f}" for k in ("train", "valid") if k in record}
                bar.set_postfix(losses)
                self._save()
                self._tell()
        except KeyboardInterrupt:
            self.steps.stop("interrupt")
        finally:
            bar.close()

    def _epoch(self, epoch: int) -> dict[str, float]:
        """Train on every batch, then see what the held-out rows say."""
        self.flow.train()
        losses = []
        for _, batch in zip(self.steps, self.train.batches(epoch), strict=False):
            loss = self.steps.take(partial(self._loss, batch))
            if loss is not None:
                losses.append(loss)
                if self.average is not None:
                    self.average.update()
            self._after_step()
        schedule, count = self.steps.schedule, self.steps.count
        if epoch == 0 and schedule is not None and schedule.num_steps == _OPEN:
            schedule.retime(count, count * self.options.num_epochs)
        return self._record(epoch, losses)

    def _record(self, epoch: int, losses: list[float]) -> dict[str, float]:
        history = self.history
        record = dict(
            epoch=epoch + 1,
            step=self.steps.count,
            train=sum(losses) / len(losses) if losses else math.nan,
            lr=self.steps.lr,
            skipped=self.steps.skipped,
        )
        monitored = record["train"]
        if self.held is not None:
            monitored = record["valid"] = self._offer(epoch)
            history.best_epoch, history.best_valid_loss = self.best.mark, self.best.loss
            if epoch - max(0, self.best.mark) >= self.options.patience:
                self.steps.stop("patience")
        history.seconds = record["seconds"] = self.budget.seconds()
        history.records.append(record)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(monitored)
        elif self.scheduler is not None and not isinstance(self.scheduler, _EACH_STEP):
            self.scheduler.step()
        return record

    def _after_step(self) -> None:
        """What our own schedule does by itself."""
        if self.scheduler is None:
            return
        if isinstance(self.scheduler, _EACH_STEP):
            self.scheduler.step()
        if agreed(self.budget.over(), like=self.parameters[0]):
            self.steps.stop("max_time")

    def _loss(self, batch: Rows) -> Tensor:
        """Mean negative log-density of a batch, its share of the mean of all processes."""
        log_prob, weight = self.flow.log_prob(batch.x, batch.context), batch.weight
        if weight is None and self.world == 1:
            return -log_prob.mean()
        weight = torch.ones_like(log_prob) if weight is None else weight
        total = weight.sum()
        if self.world > 1:
            total = total.new_tensor(agreed(float(total), like=total, op="SUM") / self.world)
        return -(weight * log_prob).sum() / total.clamp_min(torch.finfo(weight.dtype).tiny)

    @cached_property
    def _judges(self) -> list[Rows]:
        """Training rows that judge where none are held out."""
        return list(self.rows.some(8192).to(self.flow).chunks())

    def _offer(self, mark: int) -> float:
        """Score the state, averaged if it is to be, and keep it if it is the best."""
        with nullcontext() if self.average is None else self.average.swapped():
            rows = self._judges if self.held is None else self.held.sweep()
            loss = score(self.flow, rows, shared=self.world > 1)
            self.best.offer(loss, mark)
        return loss

    def _tell(self) -> None:
        """Call the callbacks; what is true ends the fit."""
        self.flow.eval()
        wants = [callback(self.history) for callback in self.options.callbacks if not self.rank]
        if self.options.callbacks and agreed(any(wants), like=self.parameters[0]):
            self.steps.stop("callback")

    def _conclude(self) -> None:
        """Judge the last state if no held-out rows have."""
        if self.held is None:
            self._offer(len(self.history.records) - 1)
            self.history.best_epoch = self.best.mark
        self.history.seconds = self.budget.seconds()
        if self.history.stopped not in ("interrupt", "callback"):  # those may go on
            self._save(ended=True)

    def _restore(self, *, start: bool = False) -> None:
        self.best.restore(start=start)
        self.flow.eval()

    def _stateful(self) -> dict[str, Any]:
        parts = dict(flow=self.flow, steps=self.steps, best=self.best, average=self.average)
        parts["scheduler"] = self.scheduler
        return {name: part for name, part in parts.items() if part is not None}

    def _generators(self) -> list[torch.Generator]:
        """What orders the rows of either part."""
        return [g for s in (self.train, self.held) if s is not None for g in s.generators()]

    def _save(self, *, ended: bool = False) -> None:
        if self.checkpoint is None or self.rank:
            return
        self.checkpoint.save(
            parts={name: part.state_dict() for name, part in self._stateful().items()},
            generators=[g.get_state() for g in self._generators()],
            random=random_state(),
            ended=ended,
        )

    def _resume(self, saved: dict[str, Any]) -> None:
        """Go on as if there had been no interruption."""
        self._average()
        for name, part in self._stateful().items():
            part.load_state_dict(saved["parts"][name])
        for generator, state in zip(self._generators(), saved["generators"], strict=True):
            generator.set_state(state)
        set_random_state(saved["random"])
        self.budget.spend(self.history.seconds)


_EACH_STEP = (OneCycleLR, CyclicLR)
_OPEN = 2**62  # steps of a schedule whose end nobody knows yet


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
    if tried and skipped == tried:
        return f"fit: {what}; the flow is as it was; {advice}"
    if history.valid_loss and not math.isfinite(history.best_valid_loss):
        return f"fit: no state had a finite validation loss; the flow is as it was; {advice}"
    if 2 * skipped > tried:
        warnings.warn(f"fit: {what}; {advice}", stacklevel=5)
    return None
