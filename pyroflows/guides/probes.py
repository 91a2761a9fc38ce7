"""Looking for what a guide's own draws cannot show: its frame, its marginals, chains, starts.

All work in coordinates in which the guide's draws have mean 0 and covariance 1, on the model's
density alone: nothing is asked of the guide but its draws.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.guides.gaussian import FULL_RANK_UP_TO, normal_points
from pyroflows.guides.hamiltonian import State, hamiltonian
from pyroflows.guides.latent import LatentDensity

__all__ = ["ChainRun", "Frame", "Gradients", "Marginals", "chains", "scattered_starts"]


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
        if D <= FULL_RANK_UP_TO and S > 2 * D:
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
    state = State(x, *gradients(x))
    uniform = functools.partial(torch.rand, generator=generator, dtype=x.dtype)
    kept, rates, before = [], [], gradients.count
    for _ in range(num_steps):
        if time.monotonic() > until:
            break
        size = 1.2 / D**0.25 * 10 ** (-2 * uniform((len(x), 1)).to(x))
        state, rate = hamiltonian(gradients, state, size, num_leapfrog, generator=generator)
        rates.append(rate)
        kept.append(state.position)
    states = torch.stack(kept[len(kept) // 2 :] or [x])
    return ChainRun(
        gradients.frame.to_u(states.reshape(-1, D)).reshape(states.shape),
        torch.stack(rates).mean().item() if rates else math.nan,
        gradients.count - before,
        len(kept) == num_steps,
    )


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
