r"""A mixture of the Gaussians at several modes: the base of a guide that covers them all.

.. math:: q(u) = \sum_k w_k\, N(u;\, \mu_k, \Sigma_k)

A flow from one normal has to tear it apart, and the ELBO charges for every thread that is left
between the modes; a mixture has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.guides.climbing import climb, laplace
from pyroflows.guides.gaussian import Gaussian, Target, normal_points
from pyroflows.weights import bound

__all__ = ["Mixture", "MixtureNoise", "Noise", "find_mixture"]


@dataclass(repr=False)
class Mixture:
    """Log-weights ``(K,)``, locations ``(K, D)``, triangular factors ``(K, D, D)``; its ELBO."""

    log_weights: Tensor
    locs: Tensor
    scale_trils: Tensor
    elbo: float = -math.inf

    def __repr__(self) -> str:
        """One line."""
        shares = ", ".join(f"{w:.3f}" for w in self.log_weights.exp().tolist())
        return f"Mixture({self.locs.shape[-1]} latents, weights {shares}, ELBO {self.elbo:.3f})"

    def terms(self, u: Tensor) -> Tensor:
        """Log of weight times density of each component, ``(*batch, D)`` to ``(*batch, K)``."""
        away = u.reshape(-1, 1, u.shape[-1]) - self.locs  # (N, K, D)
        white = torch.linalg.solve_triangular(
            self.scale_trils, away.permute(1, 2, 0), upper=False
        )  # (K, D, N)
        log_det = self.scale_trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_q = (
            -0.5 * white.square().sum(1).T - log_det - 0.5 * u.shape[-1] * math.log(2 * math.pi)
        )
        return (self.log_weights + log_q).reshape(u.shape[:-1] + self.log_weights.shape)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log-density, ``(*batch, D)`` to ``(*batch)``."""
        return self.terms(u).logsumexp(-1)

    def move(self, noise: Tensor, ranks: Tensor) -> Tensor:
        """Draws from standard normal ``noise``, ``(*batch, D)``, and ``ranks`` in (0, 1)."""
        edges = self.log_weights.exp().cumsum(0)
        k = torch.searchsorted(edges / edges[-1], ranks.contiguous()).clamp(max=len(edges) - 1)
        return self.locs[k] + (self.scale_trils[k] @ noise[..., None])[..., 0]

    def points(self, noise: Tensor) -> Tensor:
        """Stratified draws from standard normal ``noise``, ``(S, D)``: w_k S of each component."""
        ranks = (torch.arange(len(noise), dtype=noise.dtype, device=noise.device) + 0.5) / len(
            noise
        )
        return self.move(noise, ranks)

    def whitened(self) -> tuple[Tensor, Tensor, Mixture]:
        """Mean, common factor W, and the mixture in the coordinates v of u = mean + W v.

        W comes from the mean covariance within the components.
        """
        w = self.log_weights.softmax(0)
        loc = w @ self.locs
        within = (w[:, None, None] * (self.scale_trils @ self.scale_trils.mT)).sum(0)
        W = torch.linalg.cholesky(within)
        locs = torch.linalg.solve_triangular(W, (self.locs - loc).T, upper=False).T
        scales = torch.linalg.solve_triangular(W, self.scale_trils, upper=False)
        return loc, W, Mixture(self.log_weights, locs, scales)


class MixtureNoise(TorchDistribution):
    """A fixed mixture as the base of a guide.

    Its draws depend on no parameters, so that whatever is made of them is reparameterized.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mixture: Mixture, batch_shape: Sequence[int] = ()) -> None:
        self.mixture = mixture
        super().__init__(torch.Size(batch_shape), mixture.locs.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> MixtureNoise:
        """The same with another batch shape."""
        return MixtureNoise(self.mixture, batch_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Independent draws."""
        like = self.mixture.locs
        shape = torch.Size(sample_shape) + self.batch_shape
        noise = torch.randn(shape + self.event_shape, dtype=like.dtype, device=like.device)
        ranks = torch.rand(shape, dtype=like.dtype, device=like.device)
        return self.mixture.move(noise, ranks)

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture."""
        mixture = self.mixture
        return (mixture.log_weights.softmax(0) @ mixture.locs).expand(self.shape())

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate."""
        mixture = self.mixture
        w, locs = mixture.log_weights.softmax(0), mixture.locs
        within = w @ mixture.scale_trils.square().sum(-1)
        between = w @ (locs - w @ locs).square()
        return (within + between).expand(self.shape())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density."""
        log_prob = self.mixture.log_prob(value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))


class Noise(nn.Module):
    """The noise of a guide: standard normal, or a mixture that a pre-fit found, in buffers.

    Args:
        like: Its dtype and device, and the number of latents D: shape ``(D,)``.
    """

    log_weights: Tensor
    locs: Tensor
    scale_trils: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        dim = len(like)
        self.register_buffer("log_weights", like.new_zeros(0))
        self.register_buffer("locs", like.new_zeros(0, dim))
        self.register_buffer("scale_trils", like.new_zeros(0, dim, dim))
        self._made: tuple[Tensor, TorchDistribution] | None = None

    @property
    def mixture(self) -> Mixture | None:
        """The mixture; None for the standard normal."""
        if not len(self.locs):
            return None
        return Mixture(self.log_weights, self.locs, self.scale_trils)

    def fill(self, mixture: Mixture | None) -> None:
        """Let the noise come from a mixture, or from the standard normal."""
        for name, held in list(self._buffers.items()):
            none = held.new_zeros(0, *held.shape[1:])
            self._buffers[name] = none if mixture is None else getattr(mixture, name).to(held)

    def points(self, normal: Tensor) -> Tensor:
        """Draws from standard normal points, ``(S, D)``."""
        mixture = self.mixture
        return normal if mixture is None else mixture.points(normal)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density, ``(*batch, D)`` to ``(*batch)``."""
        mixture = self.mixture
        if mixture is not None:
            return mixture.log_prob(z)
        return -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))

    def distribution(self) -> TorchDistribution:
        """It as Pyro's distribution, event shape ``(D,)``; made once."""
        if self._made is None or self._made[0] is not self.locs:
            mixture, zeros = self.mixture, self.locs.new_zeros(self.locs.shape[-1:])
            unit = dist.Normal(zeros, torch.ones_like(zeros), validate_args=False)
            made = unit.to_event(1) if mixture is None else MixtureNoise(mixture)
            self._made = self.locs, made
        return self._made[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A mixture has as many components as the file says; older files know of none."""
        for name, held in list(self._buffers.items()):
            found = state_dict.setdefault(prefix + name, held)
            if found.shape != held.shape:
                self._buffers[name] = held.new_zeros(found.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


# ---------------------------------------------------------------------------- finding it


def _apart(target: Target, a: Tensor, b: Tensor, depth: float = 1.0) -> bool:
    """Whether a valley of ``depth`` nats lies on the way from ``a`` to ``b``."""
    t = torch.linspace(0, 1, 17).to(a)[:, None]
    log_p = target(a + t * (b - a)).nan_to_num(-math.inf, posinf=-math.inf)
    return bool(log_p[1:-1].min() < min(log_p[0], log_p[-1]) - depth)


def _distinct(target: Target, found: Sequence[Gaussian], known: list[Gaussian]) -> list[Gaussian]:
    """``known``, and those of ``found`` that valleys part from them and from each other."""
    known = list(known)
    for g in sorted(found, key=lambda g: -g.elbo):
        if math.isfinite(g.elbo) and all(_apart(target, g.loc, k.loc) for k in known):
            known.append(g)
    return known


def _adapt(target: Target, mixture: Mixture, *, num_rounds: int = 5, num: int = 512) -> Mixture:
    """Weights, means and covariances by importance sampling from the mixture itself.

    References:
        Cappé, Douc, Guillin, Marin, Robert (2008), Adaptive importance sampling in general mixture
        classes, eqs. 13-15. arXiv:0710.4242
    """
    K, D = mixture.locs.shape
    for i in range(num_rounds):
        even = Mixture(
            torch.logaddexp(mixture.log_weights, torch.full((K,), -math.log(K)).to(mixture.locs))
            - math.log(2),
            mixture.locs,
            mixture.scale_trils,
        )  # at least half as many draws from each as from any
        u = even.points(normal_points(num * K, D, like=mixture.locs, seed=20 + i))
        log_p = target(u).nan_to_num(-math.inf, posinf=-math.inf)
        if target.spent or not log_p.isfinite().any():
            break
        w = torch.softmax(log_p - even.log_prob(u), 0)
        r = w[:, None] * torch.softmax(mixture.terms(u), -1)  # (N, K)
        share = r.sum(0)
        log_weights = share.clamp(min=1e-12).log()
        ess = share.square() / r.square().sum(0).clamp(min=1e-300)
        r = r / share.clamp(min=1e-300)
        locs = torch.einsum("nk,nd->kd", r, u)
        away = u[:, None] - locs
        covs = torch.einsum("nk,nkd,nke->kde", r, away, away)
        factors, bad = torch.linalg.cholesky_ex(covs)
        good = (ess > 10 * D) & (bad == 0)
        mixture = Mixture(
            log_weights - log_weights.logsumexp(0),
            torch.where(good[:, None], locs, mixture.locs),
            torch.where(good[:, None, None], factors, mixture.scale_trils),
        )
    kept = mixture.log_weights > math.log(1e-3)
    log_weights = mixture.log_weights[kept]
    return Mixture(
        log_weights - log_weights.logsumexp(0), mixture.locs[kept], mixture.scale_trils[kept]
    )


def find_mixture(
    target: Target,
    candidates: Sequence[Gaussian],
    loc: Tensor,
    *,
    search: bool = False,
    num_starts: int = 64,
    num_modes: int = 16,
) -> Mixture | None:
    """The mixture at the modes of comparable evidence, if there are several; else None.

    Where the candidates of a pre-fit lie in one basin nothing is searched for, unless asked.
    Cost: some evaluations; where there are several modes, two to ten thousand gradients more.

    Args:
        target: The log-density.
        candidates: What a pre-fit found; those beside its first, the start.
        loc: Around which to search; shape ``(D,)``.
        search: Whether to search for modes also where the candidates know only of one.
        num_starts: Points to climb from.
        num_modes: Modes to consider.
    """
    found = [g for g in candidates if g.method != "initial point" and g.scale_tril.dim() == 2]
    if not found:
        return None
    known = _distinct(target, found, [])
    if len(known) < 2 and not search:
        return None
    D = len(loc)
    spread = normal_points(num_starts, D, like=loc.double(), seed=11)
    centre = torch.stack([g.loc for g in known]).mean(0)
    reach = torch.stack([g.loc - centre for g in known]).norm(dim=-1).max().clamp(min=2.0)
    starts = centre + spread * torch.where(
        torch.arange(num_starts).to(spread)[:, None] % 2 == 0, 2.0, reach / D**0.5
    )
    for mode in climb(target, starts):
        if len(known) >= num_modes or target.spent:
            break
        if all(_apart(target, mode, g.loc) for g in known):
            known = _distinct(target, [laplace(target, mode).with_elbo(target)], known)
    best = max(g.elbo for g in known)
    known = [g for g in known if g.elbo > best - 10.0]
    if len(known) < 2:
        return None
    mixture = Mixture(
        torch.tensor([g.elbo for g in known]).to(known[0].loc).log_softmax(0),
        torch.stack([g.loc for g in known]),
        torch.stack([g.scale_tril for g in known]),
    )
    return _rated(target, _adapt(target, mixture))


def _rated(target: Callable[[Tensor], Tensor], mixture: Mixture, num: int = 1024) -> Mixture:
    """Set the ELBO, from quasi-random points, as :meth:`Gaussian.with_elbo` does."""
    u = mixture.points(normal_points(num, mixture.locs.shape[-1], like=mixture.locs, seed=2))
    elbo = bound(target(u) - mixture.log_prob(u))
    mixture.elbo = elbo if math.isfinite(elbo) else -math.inf
    return mixture
