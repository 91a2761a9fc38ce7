r"""Gaussian fits that place a flow before it trains, from a few thousand gradients.

Three candidates, each of which fails somewhere, and the ELBO to choose among them: batch-and-match
from the initial point, BFGS with a Laplace approximation from several starts, and batch-and-match
from the best of those.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroflows.guides.weights import OUTSIDE

__all__ = ["Gaussian", "batch_and_match", "climb", "laplace", "prefit"]


def normal_points(num: int, dim: int, *, like: Tensor, seed: int = 0) -> Tensor:
    """Standard normal points ``(num, dim)`` from a scrambled Sobol sequence; no random state.

    Beyond the 21,201 dimensions of the sequence they are pseudo-random.
    """
    if dim > torch.quasirandom.SobolEngine.MAXDIM:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(num, dim, generator=generator, dtype=torch.float64).to(like)
    uniform = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(
        num, dtype=torch.float64
    )
    eps = torch.finfo(torch.float64).eps
    return torch.special.ndtri(uniform.clamp(eps, 1 - eps)).to(like)


@dataclass(repr=False)
class Gaussian:
    """N(loc, scale_tril scale_tril^T) and its ELBO; ``(D,)`` and ``(D, D)``, or twice ``(D,)``."""

    loc: Tensor
    scale_tril: Tensor
    elbo: float = -math.inf
    method: str = ""

    def rate(self, log_density: Callable[[Tensor], Tensor], num: int = 256) -> Gaussian:
        r"""Set ``elbo``, from ``num`` quasi-random points.

        With points of no finite density it is
        :math:`E_q[\log p - \log q \mid \text{finite}] + 10 \log q(\text{finite})`: a bound too,
        and leaving the support costs. -inf if no point is finite.
        """
        z, scale = normal_points(num, len(self.loc), like=self.loc), self.scale_tril
        diagonal = scale.dim() == 1
        log_det = (scale if diagonal else scale.diagonal()).log().sum()
        entropy = log_det + 0.5 * len(self.loc) * math.log(2 * math.pi * math.e)
        u = self.loc + (z * scale if diagonal else z @ scale.T)
        log_p = log_density(u)
        fine = log_p.isfinite()
        log_q = -0.5 * z.square().sum(-1) - log_det - 0.5 * len(self.loc) * math.log(2 * math.pi)
        if fine.all():
            self.elbo = (log_p.mean() + entropy).item()
        elif fine.any():
            self.elbo = (
                (log_p - log_q)[fine].mean() + OUTSIDE * fine.double().mean().log()
            ).item()
        if not math.isfinite(self.elbo):
            self.elbo = -math.inf
        return self

    def __repr__(self) -> str:
        """One line."""
        return f"Gaussian({len(self.loc)} latents, ELBO {self.elbo:.3f}, {self.method or 'given'})"


class Target:
    """A log-density in float64 with its gradient, counting the points.

    Args:
        log_density: Function ``(S, D) -> (S,)``.
        dtype: Type in which it is evaluated.
        max_gradients: Gradients after which it is ``spent``.
        deadline: Time (:func:`time.monotonic`) after which it is.
        batch_size: Points of one batch, at most.
    """

    def __init__(
        self,
        log_density: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        *,
        max_gradients: float = math.inf,
        deadline: float = math.inf,
        batch_size: int | None = None,
    ) -> None:
        self.log_density, self.dtype = log_density, dtype
        self.max_gradients, self.deadline, self.batch_size = max_gradients, deadline, batch_size
        self.num_gradients = 0

    @property
    def spent(self) -> bool:
        """Whether the budget is spent: every method then returns what it has."""
        return self.num_gradients >= self.max_gradients or time.monotonic() >= self.deadline

    def __call__(self, u: Tensor) -> Tensor:
        with torch.no_grad():
            return self.log_density(u.to(self.dtype)).double()

    def gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities ``(S,)`` and gradients ``(S, D)``."""
        self.num_gradients += len(u)
        values, grads = [], []
        for part in u.detach().to(self.dtype).split(self.batch_size or len(u)):
            part = part.requires_grad_()
            with torch.enable_grad():
                log_p = self.log_density(part)
                (grad,) = torch.autograd.grad(log_p.sum(), part)
            values.append(log_p.detach())
            grads.append(grad)
        return torch.cat(values).double(), torch.cat(grads).double()

    def hessian(self, u: Tensor) -> Tensor:
        """Hessian ``(D, D)`` at ``u``, ``(D,)``, by autograd, a part of its rows at a time."""
        D, rows = len(u), []
        for part in torch.eye(D).to(u).to(self.dtype).split(self.batch_size or D):
            at = u.to(self.dtype).expand(len(part), D).clone().requires_grad_()
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(self.log_density(at).sum(), at, create_graph=True)
                (hessian,) = torch.autograd.grad((grad * part).sum(), at)
            rows.append(hessian)
        return torch.cat(rows)


def batch_and_match(
    target: Target,
    start: Gaussian,
    *,
    num_steps: int = 60,
    batch_size: int = 32,
    tol: float = 1e-3,
) -> Gaussian:
    r"""Match the scores of a Gaussian to the target's by proximal steps.

    With z_b drawn from the current Gaussian, g_b the target's score there, bars and :math:`C,
    \Gamma` their means and covariances, and learning rate :math:`\lambda = BD/(t+1)`,

    .. math::
        U = \lambda\Gamma + \tfrac{\lambda}{1+\lambda}\,\bar g\bar g^\top, \quad
        V = \Sigma + \lambda C + \tfrac{\lambda}{1+\lambda}\,(\mu-\bar z)(\mu-\bar z)^\top, \quad
        \Sigma' U \Sigma' + \Sigma' = V, \quad
        \mu' = \tfrac{1}{1+\lambda}\,\mu + \tfrac{\lambda}{1+\lambda}(\Sigma'\bar g + \bar z).

    Args:
        target: The log-density.
        start: Where to begin.
        num_steps: Largest number of steps; it stops when a step moves the Gaussian by less than
            ``tol`` nats.
        batch_size: Points per step.
        tol: Smallest Kullback-Leibler divergence between successive Gaussians worth going on for.

    References:
        Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei, Saul (2024), Batch and match: black-box
        variational inference with a score-based divergence, algorithm 1. arXiv:2402.14758
    """
    mu, L = start.loc.double(), start.scale_tril.double()
    D = len(mu)
    for t in range(num_steps):
        if target.spent:
            break
        z = mu + normal_points(batch_size, D, like=mu, seed=t) @ L.T
        log_p, g = target.gradient(z)
        ok = log_p.isfinite() & g.isfinite().all(-1)
        if ok.sum() < 2:
            L = L / 4
            continue
        z, g = z[ok], g[ok]
        rate = len(z) * D / (t + 1)
        # In coordinates where the current Gaussian is standard: V = L (...) L^T, so that
        # ill-conditioned targets are safe.
        white = torch.linalg.solve_triangular(L, (z - mu).T, upper=False).T
        w_bar, h = white.mean(0), g @ L
        h_bar = h.mean(0)
        shrink = rate / (1 + rate)
        U = rate * torch.cov(h.T, correction=0).reshape(D, D) + shrink * torch.outer(h_bar, h_bar)
        V = (
            torch.eye(D).to(mu)
            + rate * torch.cov(white.T, correction=0).reshape(D, D)
            + shrink * torch.outer(w_bar, w_bar)
        )
        try:
            root = torch.linalg.cholesky(V)
            values, Q = torch.linalg.eigh(root.T @ U @ root)
        except torch.linalg.LinAlgError:  # scores beyond what doubles hold: keep what there is
            break
        factor = (
            root @ Q * (2 / (1 + (1 + 4 * values.clamp(min=0)).sqrt())).sqrt()
        )  # factor factor^T = Sigma'
        new = torch.linalg.qr(factor.T).R.T
        new = new * new.diagonal().sign()
        shift = shrink * (new @ (new.T @ h_bar) + w_bar)
        if not (new.isfinite().all() and shift.isfinite().all()):
            break
        mu, L = mu + L @ shift, L @ new
        change = 0.5 * (new.square().sum() + shift.square().sum() - D) - new.diagonal().log().sum()
        if change < tol:
            break
    return Gaussian(mu, L, method="batch-and-match")


def _bfgs(
    target: Target, u: Tensor, *, num_steps: int = 100, tol: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Climb from every row of ``u`` at once by BFGS: points ``(K, D)``, densities ``(K,)``."""
    K, D = u.shape
    eye = torch.eye(D).to(u)
    log_p, g = target.gradient(u)
    H = eye / g.norm(dim=-1).clamp(min=1.0)[:, None, None]
    first = torch.ones(K, dtype=torch.bool, device=u.device)
    for _ in range(num_steps):
        step = (H @ g[..., None])[..., 0]
        slope = (step * g).sum(-1)
        if target.spent or not (slope > tol).any():
            break
        size = torch.ones_like(slope)
        for _ in range(25):
            proposal = u + size[:, None] * step
            new_log_p = target(proposal)
            good = (new_log_p >= log_p + 1e-4 * size * slope) | ~(slope > tol)
            if good.all():
                break
            size = torch.where(good, size, size * 0.3)
        moved = good & (slope > tol)
        if not moved.any():
            break
        new_log_p, new_g = target.gradient(proposal)
        s, y = proposal - u, g - new_g  # curvature of -log p
        sy = (s * y).sum(-1)
        moved = moved & new_g.isfinite().all(-1) & new_log_p.isfinite()
        update = moved & (sy > 1e-10 * s.norm(dim=-1) * y.norm(dim=-1))
        safe = torch.where(update, sy, torch.ones_like(sy))
        scaled = torch.where(
            first & update, safe / y.square().sum(-1).clamp(min=1e-300), torch.ones_like(sy)
        )
        H0 = torch.where((first & update)[:, None, None], eye * scaled[:, None, None], H)
        A = eye - s[..., :, None] * y[..., None, :] / safe[:, None, None]
        new_H = A @ H0 @ A.mT + s[..., :, None] * s[..., None, :] / safe[:, None, None]
        H = torch.where(update[:, None, None], new_H, H)
        first = first & ~update
        u = torch.where(moved[:, None], proposal, u)
        g = torch.where(moved[:, None], new_g, g)
        log_p = torch.where(moved, new_log_p, log_p)
        # A start whose line search failed begins afresh along the gradient.
        stuck = ~good
        H = torch.where(
            stuck[:, None, None], eye / g.norm(dim=-1).clamp(min=1.0)[:, None, None], H
        )
    return u, log_p


def _curvature(target: Target, u: Tensor) -> Tensor:
    """Minus the Hessian of the log-density at ``u``, ``(D,)``.

    Exact where autograd can, else by central differences.
    Cost: 2 D gradients, in one batch.
    """
    D = len(u)
    target.num_gradients += 2 * D
    try:
        hessian = target.hessian(u)
    except RuntimeError:
        step = (1e-2 if target.dtype == torch.float32 else 1e-4) * (1 + u.abs()).diag()
        _, grads = target.gradient(torch.cat([u + step, u - step]))
        hessian = (grads[:D] - grads[D:]) / (2 * step.diagonal()[:, None])
    hessian = hessian.double()
    return -(hessian + hessian.T) / 2


def _eigh_scaled(curvature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Jacobi scales d and the eigen-decomposition of d K d: raw scales do no harm."""
    d = curvature.diagonal().abs().clamp(min=1e-30).rsqrt()
    values, Q = torch.linalg.eigh(d[:, None] * curvature * d)
    return d, values, Q


def _newton(
    target: Target, u: Tensor, *, num_steps: int = 20, tol: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Saddle-free Newton ascent from ``u``, ``(D,)``: the mode and the curvature there."""
    sizes = torch.tensor([1.0, 0.5, 0.2, 0.05, 0.01, 1e-3, 0.0]).to(u)
    curvature = _curvature(target, u)
    for _ in range(num_steps):
        if target.spent or not curvature.isfinite().all():
            break
        _, g = target.gradient(u[None])
        d, values, Q = _eigh_scaled(curvature)
        step = d * (Q @ ((Q.T @ (d * g[0])) / values.abs().clamp(min=1e-10 * values.abs().max())))
        log_p = target(u + sizes[:, None] * step).nan_to_num(-math.inf, posinf=-math.inf)
        u = u + sizes[log_p.argmax()] * step
        curvature = _curvature(target, u)
        if (step * g[0]).sum() < tol or log_p.argmax() == len(sizes) - 1:
            break
    return u, curvature


def laplace(target: Target, start: Tensor) -> Gaussian:
    """The Gaussian of the curvature at the mode that Newton's method finds from ``start``.

    A direction without curvature, relative to the others, gets a standard deviation of 10 of its
    Jacobi-scaled units.
    """
    mode, curvature = _newton(target, start)
    if not curvature.isfinite().all():
        return Gaussian(mode, torch.eye(len(mode)).to(mode), method="Laplace")
    d, values, Q = _eigh_scaled(curvature)
    floor = torch.where(values > 0, 1e-12 * values.abs().max(), 1e-2)
    L = torch.linalg.qr((d[:, None] * Q * torch.maximum(values, floor).rsqrt()).T).R.T
    return Gaussian(mode, L * L.diagonal().sign(), method="Laplace")


def _diagonal_match(
    target: Target, start: Gaussian, *, num_steps: int, batch_size: int, tol: float = 1e-3
) -> Gaussian:
    """:func:`batch_and_match` among Gaussians of diagonal covariance; scales are ``(D,)``."""
    mu, scale = start.loc, start.scale_tril
    D = len(mu)
    for t in range(num_steps):
        if target.spent:
            break
        white = normal_points(batch_size, D, like=mu, seed=t)
        log_p, g = target.gradient(mu + scale * white)
        ok = log_p.isfinite() & g.isfinite().all(-1)
        if ok.sum() < 2:
            scale = scale / 4
            continue
        white, h = white[ok], g[ok] * scale
        rate = len(white) * D / (t + 1)
        w_bar, h_bar, shrink = white.mean(0), h.mean(0), rate / (1 + rate)
        U = rate * h.var(0, correction=0) + shrink * h_bar.square()
        V = 1 + rate * white.var(0, correction=0) + shrink * w_bar.square()
        variance = 2 * V / (1 + (1 + 4 * U * V).sqrt())
        shift = shrink * (variance * h_bar + w_bar)
        mu, scale = mu + scale * shift, scale * variance.sqrt()
        change = 0.5 * (variance + shift.square() - 1 - variance.log()).sum()
        if change < tol:
            break
    return Gaussian(mu, scale, method="diagonal batch-and-match")


def _climb(target: Target, start: Tensor, num_steps: int = 100) -> Tensor:
    """A mode by L-BFGS, for many latents."""
    u = start.clone().requires_grad_()
    left = max(1, int(min(10 * num_steps, target.max_gradients - target.num_gradients)))
    optimizer = torch.optim.LBFGS(
        [u], max_iter=num_steps, max_eval=left, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        if time.monotonic() >= target.deadline:  # no slope: nowhere to go
            u.grad = torch.zeros_like(u)
            return torch.zeros((), dtype=u.dtype, device=u.device)
        log_p, g = target.gradient(u[None])
        u.grad = -g[0].nan_to_num(0.0)
        return -log_p[0].nan_to_num(-math.inf)

    optimizer.step(closure)
    mode = u.detach()
    return mode if mode.isfinite().all() else start


def _near(u: Tensor, gaussian: Gaussian) -> bool:
    """Whether ``u`` lies within half a standard deviation of the mean."""
    offset = (u - gaussian.loc)[:, None]
    return bool(
        torch.linalg.solve_triangular(gaussian.scale_tril, offset, upper=False).norm() < 0.5
    )


class _Candidates:
    """Gaussians rated one after the other; one that fails is noted, and the next is tried."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.found: list[Gaussian] = []
        self.failures: list[Exception] = []

    def consider(
        self, make: Callable[..., Gaussian], *args: Any, **kwargs: Any
    ) -> Gaussian | None:
        """Make a Gaussian and rate it; None if it fails, or there is no budget left to try."""
        if self.target.spent and self.found:
            return None
        try:
            candidate = make(*args, **kwargs)
            if not (candidate.loc.isfinite().all() and candidate.scale_tril.isfinite().all()):
                return None
            self.found.append(candidate.rate(self.target))
        except (RuntimeError, ValueError, ArithmeticError) as error:
            self.failures.append(error)
            return None
        return candidate

    def best(self) -> Gaussian:
        """The one of best ELBO."""
        if not self.found:
            raise RuntimeError(
                "prefit: the log-density could not be evaluated at any start"
            ) from self.failures[0]
        return max(self.found, key=lambda c: c.elbo)


def prefit(
    log_density: Callable[[Tensor], Tensor],
    init_loc: Tensor,
    *,
    full_rank: bool = True,
    num_starts: int = 4,
    num_modes: int = 2,
    num_steps: int = 60,
    batch_size: int = 32,
    max_gradients: float = 10_000,
    max_time: float | None = None,
) -> tuple[Gaussian, list[Gaussian], int]:
    """The Gaussian of best ELBO among the candidates.

    A candidate that fails does not stop the others. Cost: two to five thousand gradients for up to
    ten latents.

    Args:
        log_density: Function ``(S, D) -> (S,)``.
        init_loc: Where to begin; shape ``(D,)``. Its type and device are those of the density.
        full_rank: Whether to fit full covariances, or diagonal ones, for many latents.
        num_starts: Starts of BFGS: ``init_loc`` and points around it.
        num_modes: Distinct modes to consider.
        num_steps: Largest number of batch-and-match steps, each time it runs.
        batch_size: Points per batch-and-match step.
        max_gradients: Gradients after which no further step is begun; up to one step more is used.
        max_time: Seconds after which none is.

    Returns:
        The best candidate in float64, all candidates, and the number of gradients used.
    """
    target = Target(
        log_density,
        init_loc.dtype,
        max_gradients=max_gradients,
        deadline=math.inf if max_time is None else time.monotonic() + max_time,
        batch_size=getattr(log_density, "batch_size", None),
    )
    loc, candidates = init_loc.detach().double(), _Candidates(target)
    fit: dict[str, Any] = {"num_steps": num_steps, "batch_size": batch_size}
    if full_rank:
        start = Gaussian(loc, torch.eye(len(loc)).to(loc), method="initial point")
        candidates.consider(lambda: start)
        candidates.consider(batch_and_match, target, start, **fit)
        spread = 2 * torch.tanh(normal_points(num_starts, len(loc), like=loc, seed=1))
        starts = loc + torch.cat([torch.zeros_like(spread[:1]), spread[1:]])
        _around_modes(candidates, climb(target, starts), num_modes, fit)
    else:
        start = Gaussian(loc, torch.ones_like(loc), method="initial point")
        candidates.consider(lambda: start)
        candidates.consider(_diagonal_match, target, start, **fit)
        candidates.consider(
            lambda: _diagonal_match(
                target, Gaussian(_climb(target, loc), torch.ones_like(loc)), **fit
            )
        )
    return candidates.best(), candidates.found, target.num_gradients


def climb(target: Target, starts: Tensor) -> list[Tensor]:
    """Points that BFGS climbs to from ``starts``, ``(K, D)``, the highest first; or none."""
    if target.spent:
        return []
    try:
        modes, log_p = _bfgs(target, starts)
    except (RuntimeError, ValueError, ArithmeticError):  # a candidate less
        return []
    order = log_p.nan_to_num(-math.inf, posinf=-math.inf).argsort(descending=True)
    return [modes[i] for i in order if modes[i].isfinite().all()]


def _around_modes(
    candidates: _Candidates, modes: Iterable[Tensor], num_modes: int, fit: dict[str, Any]
) -> None:
    """Laplace's approximation at distinct modes, and matched scores from the best of them."""
    target, laplaces = candidates.target, list[Gaussian]()
    for mode in modes:
        if len(laplaces) < num_modes and not any(_near(mode, g) for g in laplaces):
            found = candidates.consider(laplace, target, mode)
            laplaces += [found] if found else []
    for best in sorted(laplaces, key=lambda c: -c.elbo)[:1]:
        matched = candidates.consider(batch_and_match, target, best, **fit)
        if matched:
            matched.method = "batch-and-match from Laplace"
