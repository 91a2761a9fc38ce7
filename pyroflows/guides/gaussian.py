"""Gaussians as approximations of a posterior, and the log-density that they are fitted to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.weights import bound

__all__ = ["FULL_RANK_UP_TO", "Gaussian", "Target", "normal_points"]

FULL_RANK_UP_TO = 300  # latents; beyond, triangular matrices become diagonal


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

    def with_elbo(self, log_density: Callable[[Tensor], Tensor], num: int = 256) -> Gaussian:
        r"""Set ``elbo`` and return itself, from ``num`` quasi-random points.

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
        log_q = -0.5 * z.square().sum(-1) - log_det - 0.5 * len(self.loc) * math.log(2 * math.pi)
        inside = bool(log_p.isfinite().all())
        self.elbo = (log_p.mean() + entropy).item() if inside else bound(log_p - log_q)
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
