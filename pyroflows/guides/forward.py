"""Fitting a guide to draws that are given, by the forward divergence."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.checks import model_keywords
from pyroflows.guides.fitting import FitResult
from pyroflows.guides.gaussian import Gaussian
from pyroflows.guides.path import flow_groups, guide_schedule, guide_steps
from pyroflows.training import Best, Budget, seeded

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
    result, begun, budget = FitResult(), time.process_time(), Budget()
    with seeded(seed):
        guide.setup(*args, **kwargs)
        rows = _rows(guide, draws, weights, args, kwargs)
        result.prefit = _moments(*rows)
        guide.place(result.prefit)
        _maximize(guide, rows, result, num_steps, batch_size, lr, held_out)
    result.cpu_seconds, result.seconds = time.process_time() - begun, budget.seconds()
    return result


def _rows(
    guide: AutoFlow,
    draws: Mapping[str, Tensor] | Tensor,
    weights: Tensor | None,
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Unconstrained draws ``(N, D)``, and their weights, which sum to one."""
    if not isinstance(draws, Tensor):
        draws = guide.density(*args, **kwargs).unconstrain(draws)
    u = draws.detach().to(guide.vector).reshape(-1, guide.latent_dim)
    if len(u) <= guide.latent_dim + 1 or not u.isfinite().all():
        raise ValueError(
            f"fit_guide_to_draws needs more than {guide.latent_dim + 1} draws, all finite; "
            f"got {len(u)}"
        )
    w = torch.ones(len(u)) if weights is None else weights.detach().reshape(-1)
    return u, w.to(u) / w.sum().to(u)


def _moments(u: Tensor, w: Tensor) -> Gaussian:
    """The Gaussian of the draws' mean and covariance."""
    mean = w @ u
    centred = (u - mean).double()
    cov = centred.T @ (w.double()[:, None] * centred)
    jitter = 1e-12 * cov.diagonal().mean() * torch.eye(len(mean)).to(cov)
    factor = torch.linalg.cholesky(cov + jitter)
    return Gaussian(mean.double(), factor, method="moments of the draws")


def _maximize(
    guide: AutoFlow,
    rows: tuple[Tensor, Tensor],
    result: FitResult,
    num_steps: int,
    batch_size: int,
    lr: float,
    held_out: float,
) -> None:
    """Raise the likelihood of the draws; keep what is best on those held out."""
    (u, w), whitening, noise = rows, guide.whitening, guide.noise
    v, constant = whitening.gather(u - whitening.loc), whitening.log_det
    groups = flow_groups(guide, lr)
    flow = guide.transport[0].at([group["params"] for group in groups])

    def loss_of(index: Tensor) -> Tensor:
        z, log_det = flow.inverse_and_log_det(v[index])
        log_q = noise.log_prob(z) + log_det - constant
        return -(w[index] * log_q).sum() / w[index].sum()

    order = torch.randperm(len(u), device=u.device)
    valid, train = order.split([int(held_out * len(u)), len(u) - int(held_out * len(u))])
    steps = guide_steps(groups, lr, guide_schedule(num_steps), result)
    best = Best([guide.vector])
    for step in steps:
        index = torch.randint(len(train), (min(batch_size, len(train)),), device=u.device)
        steps.take(loss_of(train[index]))
        if len(valid) and (step % 50 == 49 or step == num_steps - 1):
            with torch.no_grad():
                best.offer(loss_of(valid).item(), step)
    if len(valid):
        best.restore()
