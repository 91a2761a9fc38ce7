"""Running any guide for many draws, with its density of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor

from pyroflows.guides.batching import BUDGET
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.messages import is_circular, is_latent, plate_nesting
from pyroflows.guides.routes import largest_tensor

__all__ = ["Drawn", "Runner", "traced"]


def traced(fn: Callable, args: tuple, kwargs: dict[str, Any]) -> poutine.Trace:
    """The trace of a run with its log-densities, unseen from around it."""
    with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        trace = poutine.trace(fn).get_trace(*args, **kwargs)
        trace.compute_log_prob()
    return trace


@dataclass(frozen=True)
class Drawn:
    """Draws from a guide, S of them, or one without the leading axis.

    Attributes:
        values: For each site ``(S, *site)``.
        log_q: The guide's log-density of them; ``(S,)``.
    """

    values: dict[str, Tensor]
    log_q: Tensor

    @staticmethod
    def joined(
        parts: Sequence[Drawn], join: Callable[[list[Tensor]], Tensor] = torch.cat
    ) -> Drawn:
        """The draws of all parts; single ones by :func:`torch.stack`."""
        values = {name: join([part.values[name] for part in parts]) for name in parts[0].values}
        return Drawn(values, join([part.log_q for part in parts]))

    def agrees(self, s: int, alone: Drawn) -> bool:
        """Whether draw ``s`` and its density are those of a draw by itself."""
        mine = [*(value[s] for value in self.values.values()), self.log_q[s]]
        pairs = zip(mine, [*alone.values.values(), alone.log_q], strict=True)
        return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True) for a, b in pairs)


class Runner:
    """Runs a guide for draws, by the first way that works: native, vmap, one by one.

    Args:
        guide: The guide; a model without data draws from its prior.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        density: Whose latents to draw.

    Attributes:
        turns: Whether the guide knows that angles lie on a circle.
    """

    def __init__(
        self, guide: Callable, args: tuple, kwargs: dict[str, Any], density: LatentDensity
    ) -> None:
        self.guide, self.args, self.kwargs = guide, args, kwargs
        self.shapes = {s.name: s.value_shape for s in density.sites}
        self.prototype = traced(guide, args, kwargs)
        self.nesting = max(density.nesting, plate_nesting(self.prototype))
        self.batch_size = max(1, BUDGET // largest_tensor(self.single))
        self.turns = any(is_circular(self.prototype.nodes[name]) for name in self.shapes)
        self._ways = [self._native, self._vectorized, self._one_by_one]

    def __call__(self, num: int) -> Drawn:
        """So many draws, in batches of a bounded size."""
        sizes = [self.batch_size] * (num // self.batch_size) + [num % self.batch_size]
        return Drawn.joined([self.batch(n) for n in sizes if n])

    def single(self, guide: Callable | None = None) -> Drawn:
        """One draw, of this guide or of one of the same sites."""
        seen = traced(guide or self.guide, self.args, self.kwargs)
        log_q = sum(s["log_prob"].sum() for s in self._counted(seen)) + torch.zeros(())
        values = {n: seen.nodes[n]["value"].reshape(s) for n, s in self.shapes.items()}
        return Drawn(values, log_q)

    def batch(self, num: int) -> Drawn:
        """So many draws at once; a way that fails is not tried again."""
        while True:
            try:
                return self._ways[0](num)
            except Exception:  # whatever a guide raises on a batch; one by one it is raised
                if len(self._ways) == 1:
                    raise
                self._ways = self._ways[1:]

    def _counted(self, trace: poutine.Trace) -> list[dict[str, Any]]:
        """Sites whose densities make up the guide's: its latents and the noise behind them."""
        return [
            site
            for name, site in trace.nodes.items()
            if is_latent(site) and (name in self.shapes or site["infer"].get("is_auxiliary"))
        ]

    def _one_by_one(self, num: int) -> Drawn:
        return Drawn.joined([self.single() for _ in range(num)], torch.stack)

    def _vectorized(self, num: int) -> Drawn:
        def one(_: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            drawn = self.single()
            return drawn.values, drawn.log_q

        return Drawn(*torch.vmap(one, randomness="different")(torch.zeros(num)))

    def _native(self, num: int) -> Drawn:
        """Under one more plate, outermost; a draw by itself must have the same density."""
        plate = pyro.plate("_draws", num, dim=-1 - self.nesting)
        seen = traced(plate(self.guide), self.args, self.kwargs)
        log_q = torch.zeros(num)
        for site in self._counted(seen):
            each = site["log_prob"]
            log_q = log_q + (
                each.reshape(num, -1).sum(-1) if each.dim() > self.nesting else each.sum()
            )
        values = {n: _rows(seen.nodes[n]["value"], num, s) for n, s in self.shapes.items()}
        drawn = Drawn(values, log_q)
        for s in {0, num - 1}:
            alone = self.single(poutine.replay(self.guide, trace=self._draw_of(seen, num, s)))
            if not drawn.agrees(s, alone):
                raise ValueError("a batch of the guide is not its draws side by side")
        return drawn

    def _draw_of(self, seen: poutine.Trace, num: int, s: int) -> poutine.Trace:
        """The trace of a single draw; what is computed from others is left to the guide."""
        trace = self.prototype.copy()
        for name, node in self.prototype.nodes.items():
            if not is_latent(node):
                continue
            if isinstance(node["fn"], Delta):
                trace.remove_node(name)
            else:
                value = _rows(seen.nodes[name]["value"], num, tuple(node["value"].shape))[s]
                trace.nodes[name] = {**node, "value": value}
        return trace


def _rows(value: Tensor, num: int, shape: tuple[int, ...]) -> Tensor:
    """``(num, *shape)`` of what a batch gave, ``(num, 1, ..., *shape)`` or the same for all."""
    if value.dim() and len(value) == num and value.numel() == num * math.prod(shape):
        return value.reshape((num, *shape))
    if value.numel() == math.prod(shape):
        return value.reshape(shape).expand((num, *shape))
    raise ValueError(f"expected {num} values of shape {shape}; got {tuple(value.shape)}")
