"""What happened during a fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["History", "progress_bar"]


@dataclass(repr=False)
class History:
    """What happened during a fit; losses are in nats, for :func:`fit` those of a row.

    Attributes:
        losses: One for each step tried; not finite where the step was left out.
        records: One dictionary for each epoch or check: ``epoch``, ``step``, ``train`` (the mean
            loss of its steps), ``valid``, ``lr``, ``seconds``, ``skipped``.
        best_epoch: Epoch, counted from 0, whose state was kept; -1 if it is the state before
            training.
        best_valid_loss: Validation loss of that state; NaN without a validation part.
        skipped_steps: Steps left out because loss or gradient was not finite.
        converged: Whether the loss levelled off before the schedule ended.
        stopped: What ended the fit before its schedule: ``"patience"``, ``"max_time"``,
            ``"callback"``, ``"interrupt"``; or "".
        seconds: What it took, on the clock of :class:`Budget`.
    """

    losses: list[float] = field(default_factory=list)
    records: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1
    best_valid_loss: float = math.nan
    skipped_steps: int = 0
    converged: bool = False
    stopped: str = ""
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All of it, in what ``torch.load(weights_only=True)`` reads."""
        return {**vars(self), "losses": torch.tensor(self.losses, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        vars(self).update({**state, "losses": state["losses"].tolist()})

    @property
    def train_loss(self) -> list[float]:
        """Training loss of each epoch, averaged over its steps."""
        return [r["train"] for r in self.records]

    @property
    def valid_loss(self) -> list[float]:
        """Validation loss of each epoch; empty without a validation part."""
        return [r["valid"] for r in self.records if "valid" in r]

    @property
    def num_steps(self) -> int:
        """Optimizer steps tried."""
        return len(self.losses)

    @property
    def stopped_early(self) -> bool:
        """Whether patience ran out before the epochs did."""
        return self.stopped == "patience"

    @property
    def interrupted(self) -> bool:
        """Whether the user stopped it; the best state so far is kept."""
        return self.stopped == "interrupt"

    def frame(self) -> pd.DataFrame:
        """The records as a DataFrame; the losses of the steps where there are none."""
        import pandas as pd

        if self.records:
            return pd.DataFrame(self.records)
        return pd.DataFrame({"step": range(1, len(self.losses) + 1), "loss": self.losses})

    def recent(self, window: int = 50) -> float:
        """Mean of the last finite losses of steps; NaN if there are none."""
        finite = [x for x in self.losses[-window:] if math.isfinite(x)]
        return sum(finite) / len(finite) if finite else math.nan

    def __repr__(self) -> str:
        """Sum the run up in a line."""
        loss = self.best_valid_loss if self.valid_loss else (self.train_loss or [math.nan])[-1]
        what = "validation" if self.valid_loss else "training"
        notes = [
            f"{what} loss {loss:.4f} nats at epoch {self.best_epoch + 1} of {len(self.records)}"
        ]
        if self.best_epoch < 0:
            notes.append("the state before training is kept")
        if self.stopped:
            notes.append(_ENDS.get(self.stopped, f"stopped by {self.stopped}"))
        if self.skipped_steps:
            notes.append(f"{self.skipped_steps} of {self.num_steps} steps skipped, not finite")
        return f"History({', '.join(notes)}, {self.seconds:.1f} s)"


_ENDS = {"patience": "stopped early", "interrupt": "interrupted"}


def progress_bar(
    steps: Iterable[Any],
    *,
    desc: str,
    unit: str = "step",
    total: int | None = None,
    begun: int = 0,
    show: bool,
) -> tqdm:
    """The one progress bar, over steps or epochs; ``set_postfix`` shows losses beside it."""
    return tqdm(steps, desc=desc, unit=unit, total=total, initial=begun, disable=not show)
