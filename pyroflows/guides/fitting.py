"""Fitting a guide: pre-fit, path gradients, many particles, a schedule, guards."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.elbo import PathGradientELBO
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
        return 0.5 * (
            1 + math.cos(math.pi * min(1.0, (step - self.decay_from) / self.decay_steps))
        )

    def see(self, losses: list[float]) -> None:
        """Begin the cosine early if the last window of losses is no lower than the one before."""
        n, w = len(losses), self.window
        if (
            not w
            or n >= self.decay_from
            or n < self.warmup + 2 * w
            or (n - self.warmup) % (w // 2)
        ):
            return
        recent, before = (
            torch.tensor(x, dtype=torch.float64) for x in (losses[-w:], losses[-2 * w : -w])
        )
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
        """Clip the gradients of ``tensors`` together; False if they are not finite."""
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
    """Standard normal batches: one Sobol set, shifted at random modulo one for each."""

    def __init__(self, num: int, dim: int, like: Tensor) -> None:
        engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=0)
        self.points = engine.draw(num, dtype=torch.float64).to(like.device)
        self.like = like

    def draw(self) -> Tensor:
        shift = torch.rand(
            self.points.shape[-1], dtype=self.points.dtype, device=self.points.device
        )
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
    leaves = [
        site["value"].unconstrained()
        for site in seen.trace.nodes.values()
        if site["type"] == "param"
    ]
    return [p for p in leaves if p.requires_grad]


def fit_guide(
    model: Callable,
    guide: AutoFlow | Callable,
    *args: Any,
    num_steps: int | None = None,
    num_particles: int = 64,
    progress: bool = True,
    seed: int | None = None,
    lr: float | None = None,
    iwae: bool = False,
    temperature: float = 1.0,
    prefit_first: bool | None = None,
    **kwargs: Any,
) -> FitResult:
    r"""Fit a guide to the posterior of a model: an :class:`AutoFlow`, or any reparameterized one.

    Each step draws base points z, maps them to latents u, and follows the gradient of the ELBO; as
    the rate falls below half, its path gradient,

    .. math:: \nabla_\theta \frac1S \sum_s \big[\log p(u_s) - \log q_{\bar\theta}(u_s)\big],
        \qquad u_s = T_\theta(z_s), \quad \bar\theta\ \text{held fixed},

    whose variance vanishes when the guide is exact. Adam with warm-up and a cosine to zero;
    particles that are not finite are dropped; gradients are clipped to twice their running median.
    The guide never ends worse than its pre-fit.

    A guide of another kind gets all of this but the pre-fit, the guard, annealing and convergence:
    1,000 steps if ``num_steps`` is None.

    Cost: by default at most 50,000 gradients of the model, the pre-fit included; one forward and
    one inverse pass of the flow per step.

    Args:
        model: The Pyro model; its own parameters, if any, are trained with the guide's.
        guide: The guide, new or partly trained.
        *args: Arguments of the model.
        num_steps: Steps; up to 700 if None, fewer where the ELBO levels off.
        num_particles: Draws per step, evaluated as one batch.
        progress: Whether to print the ELBO now and then.
        seed: Seed of everything random here; the global state is then given back untouched.
        lr: Largest learning rate of Adam; if None, 0.01, or 0.002 with iwae.
        iwae: Whether to maximize the importance-weighted bound of all particles of a step; it
            covers more of the posterior, and suits importance sampling.
        temperature: Where to begin annealing: the model's log-density is divided by it in the
            pre-fit and at the start, by less and less until half of the steps, then by 1.
            Above 1 for posteriors with several modes.
        prefit_first: Whether to pre-fit a Gaussian first; if None, only a guide that was never
            trained.
        **kwargs: Keyword arguments of the model.

    Returns:
        Losses, pre-fit and diagnostics.

    References:
        Roeder, Wu, Duvenaud (2017), Sticking the landing. arXiv:1703.09194
        Agrawal, Domke (2024), Disentangling impact of capacity, objective, batchsize, estimators,
        and step-size on flow VI. arXiv:2412.08824
    """
    result, begun = FitResult(), time.process_time()
    lr = (0.002 if iwae else 0.01) if lr is None else lr
    if num_particles < 1 or (num_steps is not None and num_steps < 1):
        raise ValueError(
            "fit_guide: num_steps and num_particles must be positive; "
            f"got {num_steps} and {num_particles}"
        )
    if not temperature > 0:
        raise ValueError(f"fit_guide: temperature must be positive; got {temperature}")
    with _seeded(seed):
        if not isinstance(guide, AutoFlow):
            _train_any(model, guide, args, kwargs, result, num_steps, num_particles, lr, progress)
            result.cpu_seconds = time.process_time() - begun
            return result
        guide.setup(*args, **kwargs)
        density = _density_for(model, guide, args, kwargs)
        packed, transport = guide._parameters["packed"], guide._modules["transport"]
        if prefit_first is None:
            prefit_first = torch.equal(packed, transport.initial)
        if prefit_first:
            frozen = density.frozen()
            found = prefit(
                lambda u: frozen(u) / temperature, transport.loc, full_rank=transport.full_rank
            )
            result.prefit, result.candidates, result.num_gradients = found
            guide.place(result.prefit)
        _train(
            density,
            guide,
            [packed, *_model_parameters(density)],
            result,
            num_steps,
            num_particles,
            lr,
            progress,
            iwae,
            temperature,
        )
        with torch.no_grad():
            result.diagnostics = _assess(density, guide, result, iwae)
    result.cpu_seconds = time.process_time() - begun
    return result


def _density_for(
    model: Callable, guide: AutoFlow, args: tuple, kwargs: dict[str, Any]
) -> LatentDensity:
    """The model's density over the latents of the guide, which must be sites of the model."""
    own = {site["name"]: tuple(site["value"].shape) for site in guide._sites()}
    density = LatentDensity(model, args, kwargs, init_loc_fn=guide._init_loc_fn, names=list(own))
    found = {s.name: s.value_shape for s in density.sites}
    if list(found.items()) != list(own.items()):
        raise ValueError(
            f"fit_guide: the guide was made for another model: it has the latents {own}, and the "
            f"model has {found}. Make the guide of this model: AutoFlow(model)"
        )
    return density


def _train_any(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    result: FitResult,
    num_steps: int | None,
    num_particles: int,
    lr: float,
    progress: bool,
) -> None:
    """Fit a guide that is no :class:`AutoFlow` through Pyro's messages; see :func:`fit_guide`."""
    elbo, clip = PathGradientELBO(num_particles), GradientClipper()
    schedule = Schedule(1000 if num_steps is None else num_steps, window=0)
    parameters: dict[str, Tensor] = {}
    optimizer: torch.optim.Optimizer | None = None
    for step in range(schedule.num_steps):
        with poutine.trace(param_only=True) as seen:
            loss = elbo.loss_and_grads(model, guide, *args, **kwargs)
        found = {
            name: site["value"].unconstrained()
            for name, site in seen.trace.nodes.items()
            if site["type"] == "param"
        }
        if found.keys() - parameters.keys() or optimizer is None:
            parameters.update(found)
            optimizer = torch.optim.Adam(parameters.values(), lr=lr, betas=(0.9, 0.99), fused=True)
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule.factor(step)
        if clip(list(parameters.values())):
            optimizer.step()
        optimizer.zero_grad()
        result.losses.append(loss)
        _report(step, result.losses, progress)
    result.num_gradients += len(result.losses) * num_particles


def _report(step: int, losses: list[float], progress: bool) -> None:
    if progress and (step + 1) % 50 == 0:
        window = [x for x in losses[-50:] if math.isfinite(x)]
        print(f"step {step + 1}: ELBO {-sum(window) / max(1, len(window)):.3f}", flush=True)


def _log_weights(density: LatentDensity, guide: AutoFlow, z: Tensor) -> Tensor:
    transport = guide._modules["transport"]
    v, log_det = transport.from_base(guide._parameters["packed"], z)
    log_q = _standard_normal(z) - log_det - transport.log_det_scale
    return density(transport.loc + transport.spread(v)) - log_q


def _assess(
    density: LatentDensity, guide: AutoFlow, result: FitResult, iwae: bool
) -> WeightSummary:
    """Summary of the weights; a guide that is clearly worse than its pre-fit goes back there."""
    z = normal_points(1000, density.dim, like=guide._modules["transport"].loc, seed=1)
    summary = summarize_weights(_log_weights(density, guide, z))
    before = result.prefit
    if before is None or density.stochastic:
        return summary
    elbo = before.rate(
        lambda u: density(u.to(z)).double()
    ).elbo  # as rated by the model itself, untempered
    if math.isfinite(elbo):
        error = summary.elbo_error if math.isfinite(summary.elbo_error) else 0.0
        margin = 10.0 if iwae else 0.1  # the bound of many particles may cost some ELBO
        if not summary.elbo > elbo - max(margin, min(3 * error, 5 * margin)):
            guide.place(before)
            summary = summarize_weights(_log_weights(density, guide, z))
            result.reverted = True
    return summary


def _standard_normal(z: Tensor) -> Tensor:
    """Log-density of independent standard normals; ``(*batch, D)`` to ``(*batch)``."""
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))


def _shares(log_weights: Tensor, iwae: bool, along_path: bool) -> Tensor:
    """Weight of each particle in the gradient: equal, or by the normalized weights of the bound.

    Along the path these are squared (Tucker et al. 2019, eq. 8).
    """
    if not iwae:
        return torch.full_like(log_weights, 1 / len(log_weights))
    w = torch.softmax(log_weights, 0).nan_to_num(0.0)
    return w.square() if along_path else w


def _leaves(
    transport: Any, packed: Tensor, lr: float, others: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[float], torch.optim.Optimizer]:
    """Leaves, rates and Adam: the flow's own parameters at their own rate, and the affine map."""
    cut = len(transport.parts)
    leaves = [
        part.detach().clone().requires_grad_() for part in packed.split([cut, len(packed) - cut])
    ]
    leaves += others
    rates = [lr / transport.flow_rate] + [lr] * (len(leaves) - 1)
    return (
        leaves,
        rates,
        torch.optim.Adam([{"params": [p]} for p in leaves], betas=(0.9, 0.99), fused=True),
    )


def _train(
    density: LatentDensity,
    guide: AutoFlow,
    parameters: list[Tensor],
    result: FitResult,
    num_steps: int | None,
    num_particles: int,
    lr: float,
    progress: bool,
    iwae: bool,
    temperature: float,
) -> None:
    packed, transport = parameters[0], guide._modules["transport"]
    points = _BasePoints(num_particles, density.dim, transport.loc)
    (theta, affine, *others), rates, optimizer = _leaves(transport, packed, lr, parameters[1:])
    leaves = [theta, affine, *others]
    clip = GradientClipper()
    most = (50_000 - result.num_gradients) // num_particles if num_steps is None else num_steps
    schedule = Schedule(
        max(most, 1),
        window=60 if num_steps is None and temperature == 1.0 and not density.stochastic else 0,
    )
    # The path gradient costs an inverse pass and pays near the optimum: from the start for the
    # default flow, which is pre-fitted and cheap to invert, late for others, never where the
    # inverse takes a pass for each latent.
    num_anneal = 0 if temperature == 1.0 else most // 2
    path_below = 0.0 if not transport.inverts_cheaply else 0.3 if guide._flow else math.inf
    for step in range(most):
        factor = schedule.factor(step)
        if factor == 0.0:
            break
        z = points.draw()
        vector = torch.cat([theta, affine])
        v, log_det = transport.from_base(vector, z)
        v_leaf = v.detach().requires_grad_()
        along_path = factor < path_below or (iwae and path_below > 0)
        log_p = density(transport.loc + transport.spread(v_leaf))
        if step < num_anneal:
            log_p = log_p / temperature ** (1 - step / num_anneal)
        log_q = _standard_normal(z) - log_det.detach()
        lw = log_p.detach() - log_q
        ok = lw.isfinite()
        if along_path:
            z_back, log_det_back = transport.to_base(vector.detach(), v_leaf)
            log_q = _standard_normal(z_back) + log_det_back
            # where rounding spoils the inverse, the gradient is not to be trusted
            ok = ok & ((log_det_back + log_det).abs() < 0.1)
        share = _shares(lw.where(ok, -math.inf), iwae, along_path)
        optimizer.zero_grad()
        (log_p - log_q).backward(share.where(ok, 0.0))
        ok = ok & v_leaf.grad.isfinite().all(-1)
        count = int(ok.sum())
        result.num_dropped += num_particles - count
        bound = lw[ok].logsumexp(0) - math.log(num_particles) if iwae else lw[ok].mean()
        result.losses.append(-(bound + transport.log_det_scale).item() if count else math.nan)
        if count:
            kept = 1.0 if iwae else num_particles / count
            pull = torch.where(ok[:, None], -kept * v_leaf.grad, 0.0)
            if along_path:
                v.backward(pull)
            else:
                entropy = -kept * share.where(ok, 0.0)
                torch.autograd.backward([v, log_det], [pull, entropy])
            for p in others:
                if p.grad is not None:
                    p.grad.neg_()
        schedule.see(result.losses)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        if count and clip(leaves):
            optimizer.step()
            with torch.no_grad():
                torch.cat([theta, affine], out=packed)
        _report(step, result.losses, progress)
    result.converged = schedule.converged
    result.num_gradients += len(result.losses) * num_particles


def fit_guide_to_draws(
    guide: AutoFlow,
    draws: Mapping[str, Tensor] | Tensor,
    *args: Any,
    weights: Tensor | None = None,
    num_steps: int = 1000,
    batch_size: int = 512,
    lr: float = 0.01,
    held_out: float = 0.1,
    seed: int | None = None,
    **kwargs: Any,
) -> FitResult:
    r"""Fit a guide to given draws by the forward divergence.

    .. math:: \max_\theta \sum_n w_n \log q_\theta(z_n)

    Unlike the ELBO it covers every mode that has draws. The flow starts from their mean and
    covariance, and the state that is best on held-out draws is kept. The model is run only to
    learn its shapes. Cost: one inverse pass of the flow per step.

    Args:
        guide: The guide.
        draws: Constrained values ``(N, *site)`` for each site, or unconstrained vectors ``(N,
            D)``.
        *args: Arguments of the model.
        weights: Weight of each draw, shape ``(N,)``; equal if None.
        num_steps: Steps.
        batch_size: Draws per step.
        lr: Largest learning rate of Adam.
        held_out: Fraction of the draws kept for choosing the state; 0 for none.
        seed: Seed of the batches; the global state is then given back untouched.
        **kwargs: Keyword arguments of the model.

    Returns:
        Losses: mean negative log-density of the unconstrained draws, in nats.

    Raises:
        ValueError: If there are fewer draws than latents, or some are not finite.
    """
    result, begun = FitResult(), time.process_time()
    with _seeded(seed):
        guide.setup(*args, **kwargs)
        transport, packed = guide._modules["transport"], guide._parameters["packed"]
        u = (
            draws
            if isinstance(draws, Tensor)
            else guide.density(*args, **kwargs).unconstrain(draws)
        )
        u = u.detach().to(transport.loc).reshape(-1, guide.latent_dim)
        if len(u) <= guide.latent_dim + 1 or not u.isfinite().all():
            raise ValueError(
                f"fit_guide_to_draws needs more than {guide.latent_dim + 1} draws, all finite; "
                f"got {len(u)}"
            )
        w = torch.ones(len(u)) if weights is None else weights.detach().reshape(-1)
        w = w.to(u) / w.sum().to(u)
        mean = w @ u
        centred = (u - mean).double()
        cov = centred.T @ (w.double()[:, None] * centred)
        factor = torch.linalg.cholesky(
            cov + 1e-12 * cov.diagonal().mean() * torch.eye(len(mean)).to(cov)
        )
        result.prefit = Gaussian(mean.double(), factor, method="moments of the draws")
        guide.place(result.prefit)
        v = (
            torch.linalg.solve_triangular(factor.to(u), (u - mean).T, upper=False).T
            if transport.full_rank
            else (u - mean) / transport.scale
        )
        constant = transport.log_det_scale

        def loss_of(vector: Tensor, index: Tensor) -> Tensor:
            z, log_det = transport.to_base(vector, v[index])
            return -(w[index] * (_standard_normal(z) + log_det - constant)).sum() / w[index].sum()

        order = torch.randperm(len(u), device=u.device)
        kept = int(held_out * len(u))
        valid, train = order[:kept], order[kept:]
        leaves, rates, optimizer = _leaves(transport, packed, lr)
        schedule, clip = Schedule(num_steps, window=0), GradientClipper()
        best, best_loss = packed.detach().clone(), math.inf
        for step in range(num_steps):
            index = train[
                torch.randint(len(train), (min(batch_size, len(train)),), device=u.device)
            ]
            loss = loss_of(torch.cat(leaves), index)
            optimizer.zero_grad()
            loss.backward()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule.factor(step)
            if clip(leaves):
                optimizer.step()
                with torch.no_grad():
                    torch.cat(leaves, out=packed)
            result.losses.append(loss.item())
            if kept and (step % 50 == 49 or step == num_steps - 1):
                with torch.no_grad():
                    now = loss_of(packed, valid).item()
                if now < best_loss:
                    best, best_loss = packed.detach().clone(), now
        if kept:
            with torch.no_grad():
                packed.copy_(best)
    result.cpu_seconds = time.process_time() - begun
    return result
