r"""Gaussian fits that place a flow before it trains, from a few thousand gradients.

Three candidates, each of which fails somewhere, and the ELBO to choose among them: batch-and-match
from the initial point, BFGS with a Laplace approximation from several starts, and batch-and-match
from the best of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Gaussian", "batch_and_match", "laplace", "prefit"]


def normal_points(num: int, dim: int, *, like: Tensor, seed: int = 0) -> Tensor:
    """Standard normal points ``(num, dim)`` from a scrambled Sobol sequence; no random state."""
    uniform = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(
        num, dtype=torch.float64
    )
    eps = torch.finfo(torch.float64).eps
    return torch.special.ndtri(uniform.clamp(eps, 1 - eps)).to(like)


@dataclass
class Gaussian:
    """N(loc, scale_tril scale_tril^T) and its ELBO; ``(D,)`` and ``(D, D)``, or twice ``(D,)``."""

    loc: Tensor
    scale_tril: Tensor
    elbo: float = -math.inf
    method: str = ""

    def rate(self, log_density: Callable[[Tensor], Tensor], num: int = 256) -> Gaussian:
        """Set ``elbo``, from ``num`` quasi-random points; -inf if any density is not finite."""
        z, scale = normal_points(num, len(self.loc), like=self.loc), self.scale_tril
        diagonal = scale.dim() == 1
        log_det = (scale if diagonal else scale.diagonal()).log().sum()
        entropy = log_det + 0.5 * len(self.loc) * math.log(2 * math.pi * math.e)
        u = self.loc + (z * scale if diagonal else z @ scale.T)
        elbo = (log_density(u).mean() + entropy).item()
        self.elbo = elbo if math.isfinite(elbo) else -math.inf
        return self


class Target:
    """A log-density in float64 with its gradient, counting the points."""

    def __init__(self, log_density: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        self.log_density, self.dtype = log_density, dtype
        self.num_gradients = 0

    def __call__(self, u: Tensor) -> Tensor:
        with torch.no_grad():
            return self.log_density(u.to(self.dtype)).double()

    def gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities ``(S,)`` and gradients ``(S, D)``."""
        self.num_gradients += len(u)
        u = u.detach().to(self.dtype).requires_grad_()
        with torch.enable_grad():
            log_p = self.log_density(u)
            (grad,) = torch.autograd.grad(log_p.sum(), u)
        return log_p.detach().double(), grad.double()


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
        root = torch.linalg.cholesky(V)
        values, Q = torch.linalg.eigh(root.T @ U @ root)
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
        if not (slope > tol).any():
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
    rows = u.to(target.dtype).expand(D, D).clone().requires_grad_()
    eye = torch.eye(D).to(rows)
    try:
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(target.log_density(rows).sum(), rows, create_graph=True)
            (hessian,) = torch.autograd.grad((grad * eye).sum(), rows)
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
        if not curvature.isfinite().all():
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
    optimizer = torch.optim.LBFGS([u], max_iter=num_steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
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


def prefit(
    log_density: Callable[[Tensor], Tensor],
    init_loc: Tensor,
    *,
    full_rank: bool = True,
    num_starts: int = 4,
    num_modes: int = 2,
    num_steps: int = 60,
    batch_size: int = 32,
) -> tuple[Gaussian, list[Gaussian], int]:
    """The Gaussian of best ELBO among the candidates.

    Args:
        log_density: Function ``(S, D) -> (S,)``.
        init_loc: Where to begin; shape ``(D,)``. Its type and device are those of the density.
        full_rank: Whether to fit full covariances, or diagonal ones, for many latents.
        num_starts: Starts of BFGS: ``init_loc`` and points around it.
        num_modes: Distinct modes to consider.
        num_steps: Largest number of batch-and-match steps, each time it runs.
        batch_size: Points per batch-and-match step.

    Returns:
        The best candidate in float64, all candidates, and the number of gradients used.
    """
    target = Target(log_density, init_loc.dtype)
    loc = init_loc.detach().double()
    D = len(loc)
    if not full_rank:
        start = Gaussian(loc, torch.ones_like(loc), method="initial point")
        mode = Gaussian(_climb(target, loc), torch.ones_like(loc))
        fit = {"num_steps": num_steps, "batch_size": batch_size}
        candidates = [start] + [_diagonal_match(target, g, **fit) for g in (start, mode)]
        candidates = [c.rate(target) for c in candidates]
        return max(candidates, key=lambda c: c.elbo), candidates, target.num_gradients
    start = Gaussian(loc, torch.eye(D).to(loc), method="initial point")
    candidates = [start.rate(target)]

    def consider(candidate: Gaussian) -> Gaussian:
        candidates.append(candidate.rate(target))
        return candidate

    consider(batch_and_match(target, start, num_steps=num_steps, batch_size=batch_size))
    spread = 2 * torch.tanh(normal_points(num_starts, D, like=loc, seed=1))
    modes, log_p = _bfgs(target, loc + torch.cat([torch.zeros_like(spread[:1]), spread[1:]]))
    laplaces: list[Gaussian] = []
    for i in log_p.nan_to_num(-math.inf).argsort(descending=True):
        if len(laplaces) < num_modes and not any(_near(modes[i], g) for g in laplaces):
            laplaces.append(consider(laplace(target, modes[i])))
    for candidate in sorted(laplaces, key=lambda c: -c.elbo)[:1]:
        consider(batch_and_match(target, candidate, num_steps=num_steps, batch_size=batch_size))
        candidates[-1].method = "batch-and-match from Laplace"
    return max(candidates, key=lambda c: c.elbo), candidates, target.num_gradients
