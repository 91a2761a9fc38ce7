r"""The ELBO of a flow guide, and its gradient along the path of the draws: an objective.

.. math:: \nabla_\theta \frac1S \sum_s \big[\log p(u_s) - \log q_{\bar\theta}(u_s)\big],
    \qquad u_s = T_\theta(z_s), \quad \bar\theta\ \text{held fixed}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.elbo import outside_term, shares
from pyroflows.guides.gaussian import normal_points
from pyroflows.training import History, MedianNorm, Schedule, Steps, make_adam
from pyroflows.training.steps import Optimize
from pyroflows.weights import bound

__all__ = ["BasePoints", "PathGradient", "flow_groups", "guide_schedule", "guide_steps"]


def flow_groups(guide: AutoFlow, lr: float) -> list[dict[str, Any]]:
    """Parts of a guide's vector as groups of an optimizer, each with its own rate.

    They share the vector's memory. The flow's own parameters move by ``lr``, as the affine map's.
    """
    parts = guide.transport[0].leaves(guide.vector)
    return [{"params": part, "lr": lr / unit} for part, unit in parts]


def guide_schedule(
    num_steps: int, *, window: int = 0, clock: Callable[[], float] | None = None
) -> Schedule:
    """Warm-up, level for a third of the steps or until the loss levels off, and a cosine."""
    warmup = max(1, min(20, num_steps // 10))
    return Schedule(num_steps, warmup=warmup, hold=num_steps // 3, window=window, clock=clock)


def guide_steps(
    groups: list[dict[str, Any]],
    lr: float,
    schedule: Schedule,
    history: History,
    optimizer: Optimize | None = None,
) -> Steps:
    """Steps of Adam, or of another, with gradients clipped to twice their running median."""
    adam = partial(make_adam, betas=(0.9, 0.99))
    return Steps(
        groups,
        lr,
        schedule=schedule,
        clip=MedianNorm(),
        optimizer=optimizer or adam,
        history=history,
    )


class BasePoints:
    """Standard normal batches: one Sobol set, shifted at random modulo one for each."""

    def __init__(self, num: int, dim: int, like: Tensor) -> None:
        like64 = like.new_zeros(0, dtype=torch.float64)
        self.points = torch.special.ndtr(normal_points(num, dim, like=like64))
        self.like = like

    def draw(self) -> Tensor:
        """The next batch, ``(num, dim)``."""
        shift = torch.rand(
            self.points.shape[-1], dtype=self.points.dtype, device=self.points.device
        )
        eps = 1e-10
        return torch.special.ndtri(((self.points + shift) % 1.0).clamp(eps, 1 - eps)).to(self.like)


class PathGradient:
    """Minus the bound of the evidence at base points, whose gradients it adds to the leaves.

    It works in the coordinates v of the pre-fit, where nothing is lost to rounding. Particles
    without a finite density or gradient are left out and counted.

    Args:
        density: The model's log-density, ``(S, D)`` to ``(S,)``.
        guide: The guide.
        leaves: The parts of its vector that are trained; see :func:`flow_groups`.
        others: Leaves of the model's own parameters.
        iwae: Whether to maximize the importance-weighted bound.
        path_below: Factor of the learning rate below which the gradient is the path's.

    Attributes:
        num_dropped: Particles left out so far.
    """

    def __init__(
        self,
        density: Callable[[Tensor], Tensor],
        guide: AutoFlow,
        leaves: Sequence[Tensor],
        others: Sequence[Tensor] = (),
        *,
        iwae: bool = False,
        path_below: float = math.inf,
    ) -> None:
        self.density, self.others, self.iwae = density, others, iwae
        self.path_below, self.num_dropped = path_below, 0
        packed = guide.transport[0]
        self.flow, self.fixed = packed.at(leaves), packed.at([leaf.detach() for leaf in leaves])
        self.noise, self.whitening = guide.noise, guide.whitening

    def latents(self, v: Tensor) -> Tensor:
        """U of v."""
        return self.whitening.loc + self.whitening.spread(v)

    def log_weights(self, z: Tensor) -> Tensor:
        """Log p - log q at base points; -inf where the model has no finite density."""
        v, log_det = self.flow.forward_and_log_det(z)
        log_p = self.density(self.latents(v))
        log_q = self.noise.log_prob(z) - log_det - self.whitening.log_det
        return torch.where(log_p.isfinite(), log_p, -math.inf) - log_q

    def __call__(self, z: Tensor, factor: float = 0.0, heat: float = 1.0) -> float:
        """Minus the bound, in nats; NaN without a finite particle.

        Args:
            z: Base points, ``(S, D)``.
            factor: Factor of the learning rate.
            heat: What the log-density is divided by.
        """
        v, log_det = self.flow._step(z, None, inverse=False)
        at = v.detach().requires_grad_()
        along_path = factor < self.path_below or (self.iwae and self.path_below > 0)
        log_p = self.density(self.latents(at)) / heat
        log_q = self.noise.log_prob(z) - log_det.detach()
        log_w = log_p.detach() - log_q
        usable = inside = log_w.isfinite()
        if along_path:
            back, log_det_back = self.fixed._step(at, None, inverse=True)
            log_q = self.noise.log_prob(back) + log_det_back
            # where rounding spoils the inverse, the gradient is not to be trusted
            usable = inside & ((log_det_back + log_det).abs() < 0.1)
        share = shares(log_w.where(usable, -math.inf), iwae=self.iwae, squared=along_path, mix=0.1)
        (log_p - log_q).backward(share.where(usable, 0.0))
        usable = usable & at.grad.isfinite().all(-1)
        count = int(usable.sum())
        self.num_dropped += len(z) - count
        if count:
            kept = 1.0 if self.iwae else len(z) / count
            share = kept * share
            pull = torch.where(usable[:, None], -kept * at.grad, 0.0)
            if along_path:
                v.backward(pull)
            else:
                torch.autograd.backward([v, log_det], [pull, -share.where(usable, 0.0)])
            self._drive_inside(at.detach(), inside)
            self._turn_model_gradients(at.detach(), usable, share / heat)
        return -bound(log_w, iwae=self.iwae) - self.whitening.log_det.item()

    def _drive_inside(self, v: Tensor, inside: Tensor) -> None:
        """Add the gradient of the term of the draws outside, if there are any."""
        num_inside = int(inside.sum())
        if num_inside == len(v):
            return
        z, log_det = self.flow._step(v[~inside], None, inverse=True)
        term = outside_term(self.noise.log_prob(z) + log_det, num_inside)
        if term.requires_grad:
            term.backward()

    def _turn_model_gradients(self, v: Tensor, usable: Tensor, share: Tensor) -> None:
        """The model's parameters get minus their gradients, without particles that spoil them."""
        if not self.others:
            return
        if not bool(usable.all()):
            for p in self.others:
                p.grad = None
            log_p = self.density(self.latents(v[usable]))
            if log_p.requires_grad:
                log_p.backward(share[usable])
        for p in self.others:
            if p.grad is not None:
                p.grad.neg_()
