"""Other modes of a posterior than those that a guide has: found by climbing, and weighed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyroflows.guides.climbing import laplace
from pyroflows.guides.gaussian import FULL_RANK_UP_TO, Gaussian, Target, normal_points
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.prefit import prefit
from pyroflows.guides.probes import Frame, Gradients

__all__ = ["Mode", "Modes", "find_modes"]


@dataclass
class Mode:
    """A mode of the posterior.

    Attributes:
        gaussian: Its place and curvature, in latents; its ELBO.
        log_evidence: Log of the mass around it.
        inside: Share of the guide's draws around it.
        missing: Log of its mass that the guide lacks.
        surely: The same, as far as it is beyond the errors of both.
    """

    gaussian: Gaussian
    log_evidence: float
    inside: float
    missing: float
    surely: float


@dataclass
class Modes:
    """What :func:`find_modes` found.

    Attributes:
        found: The modes.
        num_starts: Where it began.
        num_gradients: Gradients used.
        troubles: What failed, for single candidates.
        complete: Whether time sufficed.
    """

    found: list[Mode] = field(default_factory=list)
    num_starts: int = 0
    num_gradients: int = 0
    troubles: list[str] = field(default_factory=list)
    complete: bool = True


def climb(
    gradients: Gradients, x: Tensor, *, num_steps: int = 100, until: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Climb from each row of ``x`` by Adam, with steps in proportion to the start's distance."""
    first = (x.norm(dim=-1, keepdim=True) / (15 * x.shape[1] ** 0.5)).clamp(min=0.3)
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    best, best_p = x, torch.full(x.shape[:1], -math.inf).to(x)
    for t in range(num_steps):
        if time.monotonic() > until:
            break
        log_p, g = gradients(x)
        better = log_p > best_p
        best, best_p = torch.where(better[:, None], x, best), torch.where(better, log_p, best_p)
        g = g / g.norm(dim=-1, keepdim=True).clamp(min=1e-300).clamp(min=1.0)  # no explosions
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g.square()
        step = (m / (1 - 0.8 ** (t + 1))) / (v / (1 - 0.9 ** (t + 1))).sqrt().clamp(min=1e-12)
        x = x + first * 0.01 ** (t / num_steps) * step
        x = torch.where(log_p.isfinite()[:, None], x, best)
    return best, best_p


def find_modes(
    gradients: Gradients,
    starts: Tensor,
    draws: Tensor,
    log_evidence: float,
    *,
    num_modes: int = 8,
    num_steps: int = 100,
    until: float = math.inf,
) -> Modes:
    """Climb from ``starts``, ``(K, D)``, and compare each mode's mass with the guide's there.

    Args:
        gradients: Of the log-density, in the guide's frame.
        starts: Latents to begin from.
        draws: The guide's, ``(S, D)``.
        log_evidence: Log of the mass that the guide's own draws see.
        num_modes: Most modes to weigh.
        num_steps: Steps of the climb.
        until: When to stop, by :func:`time.monotonic`.
    """
    before = gradients.count
    x, log_p = climb(gradients, gradients.frame.to_x(starts), num_steps=num_steps, until=until)
    modes = Modes(num_starts=len(starts))
    gaussians: list[Gaussian] = []
    ends = gradients.frame.to_u(x)
    for i in log_p.argsort(descending=True).tolist():
        if len(gaussians) == num_modes or not math.isfinite(log_p[i]):
            break
        if any(_depth(g, ends[i : i + 1]) < _radius(len(g.loc)) for g in gaussians):
            continue
        if time.monotonic() > until:
            break
        try:
            gaussian, count = _gaussian_at(gradients.density, ends[i])
        except (RuntimeError, ValueError) as error:  # one candidate's failure, kept and reported
            modes.troubles.append(f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
            continue
        gradients.count += count
        if not any(_depth(g, gaussian.loc[None]) < 1.0 for g in gaussians):
            gaussians.append(gaussian)
    modes.complete = time.monotonic() <= until
    modes.num_gradients = gradients.count - before
    modes.found = _weighed(gradients.density, gaussians, draws, log_evidence)
    return modes


def _gaussian_at(density: LatentDensity, mode: Tensor) -> tuple[Gaussian, int]:
    """The Gaussian at a mode with its ELBO, and the gradients that it took."""
    if len(mode) > FULL_RANK_UP_TO:
        best, _, count = prefit(density, mode.to(density.init_loc), full_rank=False)
        return best, count
    target = Target(density, density.init_loc.dtype)
    gaussian = laplace(target, mode)
    return gaussian.with_elbo(target), target.num_gradients


def _radius(dim: int) -> float:
    """The 99% quantile of the length of a standard normal vector (Wilson and Hilferty 1931)."""
    return (dim * (1 - 2 / (9 * dim) + 2.33 * (2 / (9 * dim)) ** 0.5) ** 3) ** 0.5


def _depth(gaussian: Gaussian, u: Tensor) -> Tensor:
    """Mahalanobis distances of ``u``, ``(S, D)``."""
    return Frame(gaussian.loc, gaussian.scale_tril).to_x(u.to(gaussian.loc)).norm(dim=-1)


def _weighed(
    density: LatentDensity, gaussians: list[Gaussian], draws: Tensor, log_evidence: float
) -> list[Mode]:
    """The mass around each mode, in the posterior and in the guide; no point counts twice."""
    free = torch.ones(len(draws), dtype=torch.bool, device=draws.device)
    modes: list[Mode] = []
    for k, gaussian in enumerate(gaussians):
        D = len(gaussian.loc)
        inside = free & (_depth(gaussian, draws) < _radius(D))
        free = free & ~inside
        share = inside.double().mean().item()
        most = share + 3 * (share * (1 - share) / len(draws)) ** 0.5 + 3 / len(draws)
        widen = 1.1 if D <= 10 else 1 + 1 / D
        frame = Frame(gaussian.loc, widen * gaussian.scale_tril)
        z = normal_points(512, D, like=gaussian.loc, seed=7 + k)
        points = frame.to_u(z)
        counted = _depth(gaussian, points) < _radius(D)
        for earlier in gaussians[:k]:
            counted &= _depth(earlier, points) >= _radius(D)
        scale = frame.scale if frame.scale.dim() == 1 else frame.scale.diagonal()
        with torch.no_grad():
            log_p = density(points.to(density.init_loc)).double()
        log_q = -0.5 * (z.square().sum(-1) + D * math.log(2 * math.pi)) - scale.log().sum()
        log_w = torch.where(counted, (log_p - log_q).nan_to_num(-math.inf), -math.inf)
        apart = gaussian.elbo if share == 0 and counted.double().mean() > 0.9 else -math.inf
        mean, low = (max(value, apart) for value in _log_mean(log_w))
        if gaussian.elbo < mean - 3 - D / 2:  # flat there, or nothing like a Gaussian
            low = apart
        modes.append(
            Mode(
                gaussian,
                mean,
                share,
                _log_excess(mean, math.log(max(share, 1e-300)) + log_evidence),
                _log_excess(low, math.log(most) + log_evidence),
            )
        )
    return modes


def _log_mean(log_w: Tensor) -> tuple[float, float]:
    """Logarithm of the mean of weights, and of three errors below it; -inf if that is negative."""
    top = log_w.max().item()
    if not math.isfinite(top):
        return -math.inf, -math.inf
    w = (log_w - top).exp()
    mean, error = w.mean().item(), (w.std() / len(w) ** 0.5).item()
    low = mean - 3 * error
    return top + math.log(mean), top + math.log(low) if low > 0 else -math.inf


def _log_excess(log_a: float, log_b: float) -> float:
    """log(a - b), -inf where that is negative."""
    return log_a + math.log(-math.expm1(log_b - log_a)) if log_a > log_b else -math.inf
