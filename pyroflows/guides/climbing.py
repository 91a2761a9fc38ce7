"""Ways up a log-density, BFGS, L-BFGS and Newton's method, and the curvature at the top."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from pyroflows.guides.gaussian import Gaussian, Target

__all__ = ["climb", "laplace", "lbfgs"]


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


def _bfgs(target: Target, u: Tensor) -> tuple[Tensor, Tensor]:
    """Climb from every row of ``u`` at once by BFGS: points ``(K, D)``, densities ``(K,)``."""
    num_steps, tol = 100, 1e-3
    log_p, g = target.gradient(u)
    H, fresh = _steepest(g), torch.ones(len(u), dtype=torch.bool, device=u.device)
    for _ in range(num_steps):
        step = (H @ g[..., None])[..., 0]
        slope = (step * g).sum(-1)
        if target.spent or not (slope > tol).any():
            break
        proposal, good = _line_search(target, u, log_p, step, slope, tol)
        moved = good & (slope > tol)
        if not moved.any():
            break
        new_log_p, new_g = target.gradient(proposal)
        moved = moved & new_g.isfinite().all(-1) & new_log_p.isfinite()
        H, updated = _inverse_hessian(H, proposal - u, g - new_g, fresh, moved)
        fresh = fresh & ~updated
        u = torch.where(moved[:, None], proposal, u)
        g = torch.where(moved[:, None], new_g, g)
        log_p = torch.where(moved, new_log_p, log_p)
        # A start whose line search failed begins anew along the gradient.
        H = torch.where(good[:, None, None], H, _steepest(g))
    return u, log_p


def _steepest(g: Tensor) -> Tensor:
    """The inverse Hessian with which BFGS begins: a first step of length 1 at most."""
    return torch.eye(g.shape[1]).to(g) / g.norm(dim=-1).clamp(min=1.0)[:, None, None]


def _line_search(
    target: Target, u: Tensor, log_p: Tensor, step: Tensor, slope: Tensor, tol: float
) -> tuple[Tensor, Tensor]:
    """Points along each step that are high enough by Armijo's rule, and for which they are."""
    size = torch.ones_like(slope)
    for _ in range(25):
        proposal = u + size[:, None] * step
        good = (target(proposal) >= log_p + 1e-4 * size * slope) | ~(slope > tol)
        if good.all():
            break
        size = torch.where(good, size, size * 0.3)
    return proposal, good


def _inverse_hessian(
    H: Tensor, s: Tensor, y: Tensor, fresh: Tensor, moved: Tensor
) -> tuple[Tensor, Tensor]:
    """The update of BFGS for minus the log-density, and for which rows it was made.

    Args:
        H: Inverse Hessians, ``(K, D, D)``.
        s: Steps, ``(K, D)``.
        y: Changes of the gradient of minus the log-density, ``(K, D)``.
        fresh: Rows that have seen no curvature: theirs is scaled first; ``(K,)``.
        moved: Rows that moved, ``(K,)``.
    """
    eye, sy = torch.eye(s.shape[1]).to(s), (s * y).sum(-1)
    updated = moved & (sy > 1e-10 * s.norm(dim=-1) * y.norm(dim=-1))
    safe, first = torch.where(updated, sy, torch.ones_like(sy)), fresh & updated
    scaled = torch.where(first, safe / y.square().sum(-1).clamp(min=1e-300), torch.ones_like(sy))
    H0 = torch.where(first[:, None, None], eye * scaled[:, None, None], H)
    A = eye - s[..., :, None] * y[..., None, :] / safe[:, None, None]
    new = A @ H0 @ A.mT + s[..., :, None] * s[..., None, :] / safe[:, None, None]
    return torch.where(updated[:, None, None], new, H), updated


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


def _newton(target: Target, u: Tensor) -> tuple[Tensor, Tensor]:
    """Saddle-free Newton ascent from ``u``, ``(D,)``: the mode and the curvature there."""
    num_steps, tol = 20, 1e-4
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


def lbfgs(target: Target, start: Tensor, num_steps: int = 100) -> Tensor:
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
