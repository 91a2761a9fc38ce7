"""Weights of draws: effective sample size, resampling, evidence, whether they can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "OUTSIDE",
    "WeightSummary",
    "bound",
    "effective_sample_size",
    "pareto_k",
    "smooth_weights",
    "summarize_weights",
    "systematic_resample",
]

OUTSIDE = 10.0  #: factor of log q(inside) in the ELBO: the least for a bound is 1, without a cost


def effective_sample_size(weights: Tensor) -> Tensor:
    r"""How many equal draws weights that sum to one are worth, :math:`1 / \sum_s w_s^2`.

    Args:
        weights: Shape ``(*batch, S)``.

    Returns:
        Between 1 and S, shape ``batch``.

    References:
        Kong (1992), A note on importance sampling using standardized weights.
    """
    return 1 / weights.square().sum(-1)


def systematic_resample(weights: Tensor, count: int, shift: Tensor) -> Tensor:
    """Pick draws by their weights, with the least noise that leaves expectations right.

    Args:
        weights: Non-negative, not all 0, of any sum; shape ``(*batch, S)``.
        count: How many to pick.
        shift: A uniform number for each batch, shape ``batch``.

    Returns:
        Indices into the draws, in increasing order, shape ``(*batch, count)``. Draw s comes
        ``count`` times its share, rounded down or up.

    References:
        Kitagawa (1996), Monte Carlo filter and smoother for non-Gaussian nonlinear state space
        models, appendix.
    """
    grid = (torch.arange(count, device=weights.device) + shift[..., None]) / count
    below = weights.cumsum(-1)
    pick = torch.searchsorted(below / below[..., -1:], grid, right=True)
    return pick.clamp_max(weights.shape[-1] - 1)


def _fit_generalized_pareto(x: Tensor) -> tuple[float, float]:
    """Shape k and scale of a generalized Pareto on sorted x > 0 (Zhang and Stephens 2009)."""
    n = len(x)
    m = 30 + int(n**0.5)
    j = torch.arange(1, m + 1).to(x)
    theta = 1 / x[-1] + (1 - (m / (j - 0.5)).sqrt()) / (3 * x[int(n / 4 + 0.5) - 1])
    k = torch.log1p(-theta[:, None] * x).mean(1)
    profile = n * ((-theta / k).log() - k - 1)
    weights = torch.softmax(profile, 0)
    theta_hat = (theta * weights).sum()
    shape = torch.log1p(-theta_hat * x).mean()
    return shape.item(), (-shape / theta_hat).item()


def smooth_weights(log_weights: Tensor) -> tuple[Tensor, float]:
    """Pareto-smoothed log-weights, shape ``(S,)``, normalized to sum to one, and k-hat.

    Equal weights have k = -inf; a weight that is not finite counts as 0, or gives k = inf if it is
    +inf or NaN.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling.
        arXiv:1507.02646
    """
    lw = log_weights.detach().double().flatten()
    if lw.isnan().any() or (lw == math.inf).any() or not lw.isfinite().any():
        return lw - torch.logsumexp(lw, 0), math.inf
    lw = lw - lw.max()
    spread = lw[lw.isfinite()]
    if (spread.max() - spread.min()) < 1e-12:
        return lw - torch.logsumexp(lw, 0), -math.inf
    S = len(lw)
    tail = min(S // 5, math.ceil(3 * S**0.5))
    order = lw.argsort()
    cut = lw[order[S - tail - 1]].clamp(min=math.log(torch.finfo(torch.float64).tiny))
    top = order[S - tail :]
    top = top[lw[top] > cut]
    if len(top) <= 4:
        return lw - torch.logsumexp(lw, 0), math.inf
    exceedances = lw[top].exp() - cut.exp()
    k, scale = _fit_generalized_pareto(exceedances)
    n = len(top)
    k = (n * k + 10 * 0.5) / (n + 10)  # weak prior towards 0.5
    p = (torch.arange(n).to(lw) + 0.5) / n
    quantiles = (
        scale * torch.expm1(-k * torch.log1p(-p)) / k
        if abs(k) > 1e-12
        else -scale * torch.log1p(-p)
    )
    smoothed = lw.clone()
    smoothed[top] = (quantiles + cut.exp()).log().clamp(max=0.0)
    return smoothed - torch.logsumexp(smoothed, 0), k


def pareto_k(log_weights: Tensor) -> float:
    """The shape k-hat of the tail of the weights: below 0.7 importance sampling can be trusted."""
    return smooth_weights(log_weights)[1]


def bound(log_weights: Tensor, *, iwae: bool = False) -> float:
    r"""A lower bound of the log-evidence from log-weights log p - log q, ``(S,)``, in nats.

    .. math:: E_q[\log w \mid \text{inside}] + 10 \log q(\text{inside})
        \quad\text{or}\quad \log \frac1S \sum_s w_s

    A draw is inside where its weight is finite; NaN if none is.
    """
    inside = log_weights[log_weights.isfinite()]
    if not len(inside):
        return math.nan
    if iwae:
        return (inside.logsumexp(0) - math.log(len(log_weights))).item()
    return inside.mean().item() + OUTSIDE * math.log(len(inside) / len(log_weights))


@dataclass(frozen=True)
class WeightSummary:
    """What the log-weights log p - log q at draws from a guide say about it.

    Attributes:
        elbo: Their mean, in nats; a lower bound of the log-evidence. With weights of zero it is
            the mean of the others plus ten times the logarithm of their share: a lower bound too
            (once would do), in which each per cent of impossible draws costs a tenth of a nat.
        elbo_error: Its standard error.
        log_evidence: The importance-sampling estimate of the log-evidence.
        effective_sample_size: As a fraction of the draws; 1 is exact.
        log_weight_sd: Standard deviation of the log-weights, robust: half the distance of the 16%
            and 84% quantiles.
        pareto_k: Tail shape; see :func:`pareto_k`.
        num_dropped: Draws whose weight was not finite.
        num_draws: Number of draws.
    """

    elbo: float
    elbo_error: float
    log_evidence: float
    effective_sample_size: float
    log_weight_sd: float
    pareto_k: float
    num_dropped: int
    num_draws: int


def summarize_weights(log_weights: Tensor) -> WeightSummary:
    """Summary of log-weights of shape ``(S,)``."""
    lw = log_weights.detach().double()
    finite = lw[lw.isfinite()]
    if len(finite) < 2:
        return WeightSummary(
            math.nan, math.nan, math.nan, 0.0, math.nan, math.inf, len(lw) - len(finite), len(lw)
        )
    low, high = torch.quantile(finite, torch.tensor([0.16, 0.84]).to(finite)).tolist()
    return WeightSummary(
        elbo=bound(lw),
        elbo_error=(finite.std() / len(finite) ** 0.5).item(),
        log_evidence=bound(lw, iwae=True),
        effective_sample_size=(effective_sample_size(torch.softmax(finite, 0)) / len(lw)).item(),
        log_weight_sd=(high - low) / 2,
        pareto_k=pareto_k(lw),
        num_dropped=len(lw) - len(finite),
        num_draws=len(lw),
    )
