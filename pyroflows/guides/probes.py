"""Looking for what a guide's own draws cannot show: chains, other modes, the prior.

All work in coordinates in which the guide's draws have mean 0 and covariance 1, on the model's
density alone: nothing is asked of the guide but its draws.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.mcmc import leapfrog
from pyroflows.guides.prefit import Gaussian, Target, laplace, normal_points, prefit

__all__ = ["Frame", "Marginals", "Mode", "chains", "find_modes"]

_FULL_RANK_UP_TO = 300  # latents; beyond, covariances are diagonal


@dataclass(frozen=True)
class Frame:
    """The guide's mean and (lower triangular or diagonal) scale: u = loc + scale x."""

    loc: Tensor
    scale: Tensor

    @classmethod
    def of(cls, u: Tensor) -> Frame:
        """From draws ``(S, D)`` in float64, the outer tenth of each coordinate drawn in.

        A funnel's mouth does not set the scale of its neck.
        """
        low, high = _quantiles(u, torch.tensor([0.05, 0.95]).to(u))
        u = torch.where(low < high, u.clamp(low, high), u)
        loc, (S, D) = u.mean(0), u.shape
        if D <= _FULL_RANK_UP_TO and S > 2 * D:
            sd = u.std(0).clamp(min=1e-300)
            factor, bad = torch.linalg.cholesky_ex(torch.cov(((u - loc) / sd).T).reshape(D, D))
            if not bad:
                return cls(loc, sd[:, None] * factor)
        return cls(loc, u.std(0).clamp(min=1e-300))

    def to_u(self, x: Tensor) -> Tensor:
        """Latents of ``x``, ``(S, D)``."""
        return self.loc + (x * self.scale if self.scale.dim() == 1 else x @ self.scale.T)

    def to_x(self, u: Tensor) -> Tensor:
        """The inverse."""
        v = u - self.loc
        if self.scale.dim() == 1:
            return v / self.scale
        return torch.linalg.solve_triangular(self.scale, v.T, upper=False).T


class Gradients:
    """Log-densities and gradients at ``x``, cut to the density's budget; counts the points."""

    def __init__(self, density: LatentDensity, frame: Frame) -> None:
        self.density, self.frame, self.count = density, frame, 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(S, D)`` to ``(S,)`` and ``(S, D)``; -inf and 0 where they are not finite."""
        self.count += len(x)
        found = [self._piece(piece) for piece in x.split(max(1, self.density.batch_size // 4))]
        log_p, grad = (torch.cat(part) for part in zip(*found, strict=True))
        ok = log_p.isfinite() & grad.isfinite().all(-1)
        return torch.where(ok, log_p, -math.inf), torch.where(ok[:, None], grad, 0.0)

    def _piece(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            log_p = self.density(self.frame.to_u(x).to(self.density.init_loc))
            (grad,) = torch.autograd.grad(log_p.sum(), x, allow_unused=True)
        return log_p.detach().double(), torch.zeros_like(x) if grad is None else grad


# --------------------------------------------------------------------------------- comparisons


class Marginals:
    """Functions of each coordinate whose means tell a guide from the posterior.

    Coordinates t are centred at the guide's medians and scaled by its standard deviations
    (half the distance of the 16 % and 84 % quantiles, where that is more).

    Args:
        values: The guide's draws of each coordinate, ``(S, D)``.
        names: A name for each coordinate.
        turned: Brings angles into one turn.
    """

    def __init__(
        self, values: Tensor, names: list[str], turned: Callable[[Tensor], Tensor]
    ) -> None:
        self.names, self.turned = names, turned
        values = turned(values)
        levels = torch.tensor([0.01, 0.16, 0.5, 0.84, 0.99]).to(values)
        low, left, self.centre, right, high = _quantiles(values, levels)
        self.scale = torch.maximum((right - left) / 2, values.std(0))
        self.moving = self.scale > 1e-6 * (values.abs().mean(0) + 1e-300)
        self.scale = torch.where(self.moving, self.scale, 1.0)
        self.low, self.high = low, high
        f = self.of(values)
        self.mean = f.mean(0)
        self.error = f.std(0) / len(values) ** 0.5

    def of(self, values: Tensor) -> Tensor:
        """Place, spread, lower and upper tail of each; ``(S, D)`` to ``(S, 4, D)``."""
        values = self.turned(values)
        t = ((values - self.centre) / self.scale).clamp(-20, 20)
        tails = values < self.low, values > self.high
        return torch.stack([t, t.abs(), *(tail.to(t) for tail in tails)], 1)

    def departures(self, f: Tensor, weights: Tensor | None = None) -> list[tuple[float, str]]:
        """What means of ``f``, ``(n, 4, D)``, under weights say: how bad, and in words."""
        sigmas = -torch.special.ndtri(torch.tensor(1e-5 / self.mean.numel())).item()
        w = torch.full((len(f),), 1 / len(f)).to(f) if weights is None else weights
        mean = torch.tensordot(w, f, 1)
        error = torch.tensordot(w.square(), (f - mean).square(), 1).sqrt()
        z = (mean - self.mean) / (error.square() + self.error.square()).sqrt().clamp(min=1e-12)
        ratio = mean[1] / self.mean[1].clamp(min=1e-12)
        found: list[tuple[float, str]] = []
        for j in self.moving.nonzero().flatten().tolist():
            name, place = self.names[j], (mean - self.mean)[0, j].item()
            if abs(place) > 0.3 and abs(z[0, j]) > sigmas:
                found.append((abs(place), f"'{name}' lies {place:+.2f} guide sd away"))
            wide = ratio[j].item()
            if not 0.75 < wide < 1.25 and abs(z[1, j]) > sigmas:
                found.append((abs(math.log(wide)), f"'{name}' spreads {wide:.2f} times as wide"))
            for side, tail in ((2, "lower"), (3, "upper")):
                share = mean[side, j].item()
                if share > 0.025 and z[side, j] > sigmas:
                    found.append(
                        (10 * share, f"{share:.1%} of '{name}' lies in the guide's {tail} 1%")
                    )
        return sorted(found, reverse=True)


def _quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """Quantiles along the first axis, of any number of values."""
    ordered = values.sort(0).values
    index = (levels * (len(values) - 1)).round().long()
    return ordered[index]


# -------------------------------------------------------------------------------------- chains


@dataclass
class ChainRun:
    """States of chains that started at the guide's draws; see :func:`chains`.

    Attributes:
        states: The second half of each, in latents; ``(steps, chains, D)``.
        acceptance: Mean rate.
        num_gradients: Gradients used.
        complete: Whether all steps ran.
    """

    states: Tensor
    acceptance: float
    num_gradients: int
    complete: bool


def chains(
    gradients: Gradients,
    u: Tensor,
    *,
    num_steps: int = 40,
    num_leapfrog: int = 6,
    until: float = math.inf,
    generator: torch.Generator,
) -> ChainRun:
    """Hamiltonian chains from the guide's draws ``u``, ``(C, D)``, which keep the posterior.

    If the guide is right they stay in it, however badly they mix; where it is wrong they leave.
    Step sizes are drawn anew for each chain and step, over two orders, so that funnels' necks are
    entered. Stops at the time ``until``.
    """
    x, D = gradients.frame.to_x(u), u.shape[1]
    log_p, grad = gradients(x)
    draw = functools.partial(torch.randn, generator=generator, dtype=x.dtype)
    uniform = functools.partial(torch.rand, generator=generator, dtype=x.dtype)
    kept, rates, before = [], [], gradients.count
    for _ in range(num_steps):
        if time.monotonic() > until:
            break
        size = 1.2 / D**0.25 * 10 ** (-2 * uniform((len(x), 1)).to(x))
        momentum = draw(x.shape).to(x)
        energy = log_p - 0.5 * momentum.square().sum(-1)
        q, momentum, new, g = leapfrog(gradients, x, momentum, grad, size, num_leapfrog)
        log_ratio = (new - 0.5 * momentum.square().sum(-1) - energy).nan_to_num(-math.inf)
        move = uniform((len(x),)).to(x).log() < log_ratio
        x = torch.where(move[:, None], q, x)
        grad, log_p = torch.where(move[:, None], g, grad), torch.where(move, new, log_p)
        rates.append(log_ratio.exp().clamp(max=1.0).mean())
        kept.append(x)
    states = torch.stack(kept[len(kept) // 2 :] or [x])
    shape = states.shape
    return ChainRun(
        gradients.frame.to_u(states.reshape(-1, D)).reshape(shape),
        torch.stack(rates).mean().item() if rates else math.nan,
        gradients.count - before,
        len(kept) == num_steps,
    )


# --------------------------------------------------------------------------------------- modes


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
    """The Gaussian at a mode, rated, and the gradients that it took."""
    if len(mode) > _FULL_RANK_UP_TO:
        best, _, count = prefit(density, mode.to(density.init_loc), full_rank=False)
        return best, count
    target = Target(density, density.init_loc.dtype)
    gaussian = laplace(target, mode)
    return gaussian.rate(target), target.num_gradients


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


def scattered_starts(frame: Frame, u: Tensor, init_loc: Tensor, prior: Tensor | None) -> Tensor:
    """Where to look for modes, ``(K, D)``: all that is cheap to think of.

    Points around the model's initial point and its mirror image, on spheres of 5 to 100 of the
    guide's standard deviations, at draws from the prior, and at a few of the guide's own.
    """
    D = len(init_loc)
    z = normal_points(64, D, like=u, seed=1)
    directions = z / z.norm(dim=-1, keepdim=True)
    radii = torch.tensor([5.0, 15.0, 40.0, 100.0]).to(u).repeat(8)
    parts = [
        init_loc.to(u)[None],
        2 * init_loc.to(u)[None] - frame.loc,
        init_loc.to(u) + 2 * torch.tanh(z[32:48]),
        frame.to_u(directions[:32] * radii[:, None]),
        u[:8],
    ]
    return torch.cat(parts + ([] if prior is None else [prior.to(u)]))
