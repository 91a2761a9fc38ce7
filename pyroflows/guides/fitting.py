"""Fitting a flow guide: pre-fit, path gradients, many particles, a schedule, and a guard at every step."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.prefit import Gaussian, normal_points, prefit
from pyroflows.guides.weights import WeightSummary, summarize_weights

__all__ = ["FitResult", "GradientClipper", "fit_guide", "Schedule"]


@dataclass
class FitResult:
    """What :func:`fit_guide` did.

    Attributes:
        losses: Minus the ELBO of each step, in nats.
        prefit: The Gaussian from which the flow started, None if there was no pre-fit.
        candidates: All Gaussians that were considered.
        diagnostics: Summary of fresh importance weights after the fit.
        num_gradients: Evaluations of the model's gradient, pre-fit included.
        num_dropped: Particles that were dropped because something was not finite.
        converged: Whether the ELBO had levelled off before the last step of the longest schedule.
        reverted: Whether training made it worse than the pre-fit, which was then put back.
        cpu_seconds: Processor time.
    """

    losses: list[float] = field(default_factory=list)
    prefit: Gaussian | None = None
    candidates: list[Gaussian] = field(default_factory=list)
    diagnostics: WeightSummary | None = None
    num_gradients: int = 0
    num_dropped: int = 0
    converged: bool = False
    reverted: bool = False
    cpu_seconds: float = 0.0


class Schedule:
    """Learning rate: linear warm-up, level until the loss levels off, then a cosine to zero.

    Args:
        num_steps: Longest schedule; two thirds of it, if never levelled off, are the cosine.
        window: Steps over which losses are averaged to see whether they still fall; 0 never looks.
        tol: Fall of the loss per window, in nats, that is worth another window at the full rate.
    """

    def __init__(self, num_steps: int, *, window: int = 60, tol: float = 0.005) -> None:
        self.num_steps, self.window, self.tol = num_steps, window, tol
        self.warmup = max(1, min(20, num_steps // 10))
        self.decay_from, self.decay_steps = num_steps // 3, num_steps - num_steps // 3
        self.converged = False

    def factor(self, step: int) -> float:
        """Factor of the learning rate at a step; 0 ends the fit."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if step < self.decay_from:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - self.decay_from) / self.decay_steps)))

    def see(self, losses: list[float]) -> None:
        """Begin the cosine early if the last window of losses is no lower than the one before."""
        n, w = len(losses), self.window
        if not w or n >= self.decay_from or n < self.warmup + 2 * w or (n - self.warmup) % (w // 2):
            return
        recent, before = (torch.tensor(x, dtype=torch.float64) for x in (losses[-w:], losses[-2 * w : -w]))
        noise = ((recent.var() + before.var()) / w).sqrt()
        if not before.mean() - recent.mean() > max(self.tol, noise.item()):
            self.decay_from, self.converged = n, True
            self.decay_steps = min(self.decay_steps, max(2 * w, n))


class GradientClipper:
    """Scale a gradient down to a multiple of the running median of its norm.

    Args:
        factor: The multiple.
        window: Steps over which the median runs.
    """

    def __init__(self, factor: float = 2.0, window: int = 50) -> None:
        self.factor, self.norms = factor, deque[float](maxlen=window)

    def __call__(self, tensors: list[Tensor]) -> bool:
        """Clip the gradients of ``tensors`` together; False, and no gradient, if they are not finite."""
        grads = [t.grad for t in tensors if t.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm().item() if grads else 0.0
        if not math.isfinite(norm):
            return False
        if len(self.norms) >= 5:
            limit = self.factor * sorted(self.norms)[len(self.norms) // 2]
            if norm > limit > 0:
                for g in grads:
                    g.mul_(limit / norm)
        self.norms.append(norm)
        return True


class _BasePoints:
    """Standard normal batches: one Sobol set, shifted at random modulo one for each batch (Owen 1997)."""

    def __init__(self, num: int, dim: int, like: Tensor) -> None:
        engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=0)
        self.points = engine.draw(num, dtype=torch.float64).to(like.device)
        self.like = like

    def draw(self) -> Tensor:
        shift = torch.rand(self.points.shape[-1], dtype=self.points.dtype, device=self.points.device)
        eps = 1e-10
        return torch.special.ndtri(((self.points + shift) % 1.0).clamp(eps, 1 - eps)).to(self.like)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Run under a seed and give the random state back; do nothing without one."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _model_parameters(density: LatentDensity) -> list[Tensor]:
    """Unconstrained leaves of the model's own parameters."""
    with torch.no_grad(), poutine.trace(param_only=True) as seen:
        density.evaluate(density.init_loc)
    leaves = [site["value"].unconstrained() for site in seen.trace.nodes.values() if site["type"] == "param"]
    return [p for p in leaves if p.requires_grad]


def fit_guide(
    model: Callable,
    guide: AutoFlow,
    *args: Any,
    num_steps: int | None = None,
    num_particles: int = 64,
    progress: bool = True,
    seed: int | None = None,
    lr: float = 0.01,
    prefit_first: bool | None = None,
    **kwargs: Any,
) -> FitResult:
    r"""Fit an :class:`AutoFlow` to the posterior of a model, ready to use.

    Each step draws base points z, maps them to latents u, and follows the path gradient of the ELBO,

    .. math:: \nabla_\theta \frac1S \sum_s \big[\log p(u_s) - \log q_{\bar\theta}(u_s)\big],
        \qquad u_s = T_\theta(z_s), \quad \bar\theta\ \text{held fixed},

    whose variance vanishes when the guide is exact. Adam with warm-up and a cosine to zero; particles that are not finite
    are dropped; gradients are clipped to twice their running median. The guide never ends worse than its pre-fit.

    Cost: by default at most 50,000 gradients of the model, the pre-fit included; one forward and one inverse pass of the
    flow per step.

    Args:
        model: The Pyro model; its own parameters, if any, are trained with the guide's.
        guide: The guide, new or partly trained.
        *args: Arguments of the model.
        num_steps: Steps; up to 700 if None, fewer where the ELBO levels off.
        num_particles: Draws per step, evaluated as one batch.
        progress: Whether to print the ELBO now and then.
        seed: Seed of everything random here; the global state is then given back untouched.
        lr: Largest learning rate of Adam.
        prefit_first: Whether to pre-fit a Gaussian first; if None, only a guide that was never trained.
        **kwargs: Keyword arguments of the model.

    Returns:
        Losses, pre-fit and diagnostics.

    References:
        Roeder, Wu, Duvenaud (2017), Sticking the landing. arXiv:1703.09194
        Agrawal, Domke (2024), Disentangling impact of capacity, objective, batchsize, estimators, and step-size on flow VI.
        arXiv:2412.08824
    """
    result, begun = FitResult(), time.process_time()
    with _seeded(seed):
        guide.setup(*args, **kwargs)
        density = LatentDensity(model, args, kwargs, init_loc_fn=guide._init_loc_fn)
        packed, transport = guide._parameters["packed"], guide._modules["transport"]
        if prefit_first is None:
            prefit_first = torch.equal(packed, transport.initial)
        if prefit_first:
            result.prefit, result.candidates, result.num_gradients = prefit(density.frozen(), transport.loc)
            guide.place(result.prefit)
        _train(density, guide, [packed, *_model_parameters(density)], result, num_steps, num_particles, lr, progress)
        with torch.no_grad():
            result.diagnostics = _assess(density, guide, result)
    result.cpu_seconds = time.process_time() - begun
    return result


def _log_weights(density: LatentDensity, guide: AutoFlow, z: Tensor) -> Tensor:
    transport = guide._modules["transport"]
    v, log_det = transport.from_base(guide._parameters["packed"], z)
    log_q = guide.get_base_dist().log_prob(z) - log_det - transport.log_det_scale
    return density(transport.loc + transport.spread(v)) - log_q


def _assess(density: LatentDensity, guide: AutoFlow, result: FitResult) -> WeightSummary:
    """Summary of the weights; a guide that is clearly worse than its pre-fit goes back there."""
    z = normal_points(1000, density.dim, like=guide._modules["transport"].loc, seed=1)
    summary = summarize_weights(_log_weights(density, guide, z))
    before = result.prefit
    if before is not None and math.isfinite(before.elbo) and not density.stochastic:
        error = summary.elbo_error if math.isfinite(summary.elbo_error) else 0.0
        if not summary.elbo > before.elbo - max(0.1, 3 * error):
            guide.place(before)
            summary = summarize_weights(_log_weights(density, guide, z))
            result.reverted = True
    return summary


def _train(
    density: LatentDensity,
    guide: AutoFlow,
    parameters: list[Tensor],
    result: FitResult,
    num_steps: int | None,
    num_particles: int,
    lr: float,
    progress: bool,
) -> None:
    packed, transport, base = parameters[0], guide._modules["transport"], guide.get_base_dist()
    points = _BasePoints(num_particles, density.dim, transport.loc)
    # The flow's own parameters at their own rate: one leaf for them, one for the triangular map.
    cut = len(transport.parts)
    theta, affine = (part.detach().clone().requires_grad_() for part in packed.split([cut, len(packed) - cut]))
    leaves = [theta, affine, *parameters[1:]]
    rates = [lr / transport.flow_rate, *[lr] * (len(leaves) - 1)]
    optimizer = torch.optim.Adam([{"params": [p]} for p in leaves], betas=(0.9, 0.99), fused=True)
    clip = GradientClipper()
    most = (50_000 - result.num_gradients) // num_particles if num_steps is None else num_steps
    schedule = Schedule(max(most, 1), window=60 if num_steps is None and not density.stochastic else 0)
    for step in range(most):
        factor = schedule.factor(step)
        if factor == 0.0:
            break
        z = points.draw()
        vector = torch.cat([theta, affine])
        v, _ = transport.from_base(vector, z)
        v_leaf = v.detach().requires_grad_()
        z_back, log_det = transport.to_base(vector.detach(), v_leaf)
        log_weight = density(transport.loc + transport.spread(v_leaf)) - base.log_prob(z_back) - log_det
        optimizer.zero_grad()
        log_weight.sum().backward()
        grad = v_leaf.grad
        ok = log_weight.isfinite() & grad.isfinite().all(-1)
        count = int(ok.sum())
        result.num_dropped += num_particles - count
        loss = -(log_weight.detach()[ok].mean() + transport.log_det_scale).item() if count else math.nan
        result.losses.append(loss)
        if count:
            v.backward(torch.where(ok[:, None], -grad, 0.0) / count)
            for p in leaves[2:]:
                if p.grad is not None:
                    p.grad.div_(-num_particles)
        schedule.see(result.losses)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        if count and clip(leaves):
            optimizer.step()
            with torch.no_grad():
                torch.cat([theta, affine], out=packed)
        if progress and (step + 1) % 50 == 0:
            window = [x for x in result.losses[-50:] if math.isfinite(x)]
            print(f"step {step + 1}: ELBO {-sum(window) / max(1, len(window)):.3f}", flush=True)
    result.converged = schedule.converged
    result.num_gradients += len(result.losses) * num_particles
