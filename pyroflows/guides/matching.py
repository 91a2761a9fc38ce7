"""Batch-and-match: Gaussians whose scores agree with those of a log-density."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroflows.guides.gaussian import Gaussian, Target, normal_points

__all__ = ["batch_and_match", "diagonal_match"]


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
        # In coordinates where the current Gaussian is standard: V = L (...) L^T, so that
        # ill-conditioned targets are safe.
        white = torch.linalg.solve_triangular(L, (z[ok] - mu).T, upper=False).T
        matched = _match(white, g[ok] @ L, rate=len(white) * D / (t + 1))
        if matched is None:
            break
        shift, new = matched
        mu, L = mu + L @ shift, L @ new
        change = 0.5 * (new.square().sum() + shift.square().sum() - D) - new.diagonal().log().sum()
        if change < tol:
            break
    return Gaussian(mu, L, method="batch-and-match")


def _match(z: Tensor, g: Tensor, rate: float) -> tuple[Tensor, Tensor] | None:
    """One step from the standard normal, given its draws and the scores there, ``(B, D)`` each.

    Returns:
        The new mean and triangular scale; None if the scores are beyond what doubles hold.
    """
    D = z.shape[1]
    z_bar, g_bar, shrink = z.mean(0), g.mean(0), rate / (1 + rate)
    U = rate * torch.cov(g.T, correction=0).reshape(D, D) + shrink * torch.outer(g_bar, g_bar)
    V = (
        torch.eye(D).to(z)
        + rate * torch.cov(z.T, correction=0).reshape(D, D)
        + shrink * torch.outer(z_bar, z_bar)
    )
    try:
        root = torch.linalg.cholesky(V)
        values, Q = torch.linalg.eigh(root.T @ U @ root)
    except torch.linalg.LinAlgError:
        return None
    # factor factor^T = Sigma'
    factor = root @ Q * (2 / (1 + (1 + 4 * values.clamp(min=0)).sqrt())).sqrt()
    scale = torch.linalg.qr(factor.T).R.T
    scale = scale * scale.diagonal().sign()
    loc = shrink * (scale @ (scale.T @ g_bar) + z_bar)
    return (loc, scale) if scale.isfinite().all() and loc.isfinite().all() else None


def diagonal_match(
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
