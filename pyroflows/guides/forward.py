"""Fitting a guide to draws that are given, by the forward divergence."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.checks import model_keywords
from pyroflows.guides.fitting import FitResult, leaves_of
from pyroflows.guides.prefit import Gaussian
from pyroflows.guides.routes import seeded
from pyroflows.guides.schedule import GradientClipper, Schedule

__all__ = ["fit_guide_to_draws"]


@model_keywords
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
    model_kwargs: dict[str, Any] | None = None,
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
        model_kwargs: Keyword arguments of the model whose names are also names of these options.
        **kwargs: Keyword arguments of the model.

    Returns:
        Losses: mean negative log-density of the unconstrained draws, in nats.

    Raises:
        ValueError: If there are fewer draws than latents, or some are not finite.
    """
    kwargs = {**kwargs, **(model_kwargs or {})}
    result, begun = FitResult(), time.process_time()
    with seeded(seed):
        guide.setup(*args, **kwargs)
        whitening, vector, noise = guide.whitening, guide.vector, guide.noise
        u = (
            draws
            if isinstance(draws, Tensor)
            else guide.density(*args, **kwargs).unconstrain(draws)
        )
        u = u.detach().to(whitening.loc).reshape(-1, guide.latent_dim)
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
            if whitening.full_rank
            else (u - mean) / whitening.scale
        )
        constant = whitening.log_det
        leaves, rates, optimizer = leaves_of(guide, lr)
        flow = guide.transport[0].at(leaves)

        def loss_of(index: Tensor) -> Tensor:
            z, log_det = flow.inverse_and_log_det(v[index])
            return -(w[index] * (noise.log_prob(z) + log_det - constant)).sum() / w[index].sum()

        order = torch.randperm(len(u), device=u.device)
        kept = int(held_out * len(u))
        valid, train = order[:kept], order[kept:]
        schedule, clip = Schedule(num_steps, window=0), GradientClipper()
        best, best_loss = vector.detach().clone(), math.inf
        for step in range(num_steps):
            index = train[
                torch.randint(len(train), (min(batch_size, len(train)),), device=u.device)
            ]
            loss = loss_of(index)
            optimizer.zero_grad()
            loss.backward()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule.factor(step)
            if clip(leaves):
                optimizer.step()
            result.losses.append(loss.item())
            if kept and (step % 50 == 49 or step == num_steps - 1):
                with torch.no_grad():
                    now = loss_of(valid).item()
                if now < best_loss:
                    best, best_loss = vector.detach().clone(), now
        if kept:
            with torch.no_grad():
                vector.copy_(best)
    result.cpu_seconds = time.process_time() - begun
    return result
