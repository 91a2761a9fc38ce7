"""Markov chains in the coordinates of a fitted flow: exact where a guide is only near."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.checks import model_keywords
from pyroflows.guides.draws import posterior_density
from pyroflows.guides.hamiltonian import State, hamiltonian
from pyroflows.guides.latent import LatentDensity

__all__ = ["FlowChains", "flow_mcmc", "split_rhat"]


@dataclass
class FlowChains:
    """Draws of :func:`flow_mcmc`.

    Attributes:
        samples: For each site ``(num_chains, num_samples, *site)``.
        independence_rate: Share of accepted independence proposals.
        hmc_rate: Share of accepted Hamiltonian proposals.
        step_size: Step of the Hamiltonian moves after warm-up, in units of the flow's noise.
        rhat: Largest split R-hat over the flow's noise; below 1.01 the chains agree.
    """

    samples: dict[str, Tensor]
    independence_rate: float
    hmc_rate: float
    step_size: float
    rhat: float


def split_rhat(draws: Tensor) -> Tensor:
    """Split R-hat of ``(chains, draws, *event)``, shape event; each chain is halved.

    References:
        Gelman et al. (2013), Bayesian Data Analysis, section 11.4.
    """
    half = draws.shape[1] // 2
    x = torch.cat([draws[:, :half], draws[:, half : 2 * half]])
    within = x.var(1).mean(0)
    between = x.mean(1).var(0)
    return (((half - 1) / half * within + between) / within).sqrt()


@model_keywords
def flow_mcmc(
    model: Callable,
    guide: AutoFlow,
    *args: Any,
    num_samples: int = 500,
    num_chains: int = 16,
    warmup_steps: int = 100,
    num_leapfrog: int = 4,
    target_rate: float = 0.8,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> FlowChains:
    r"""Sample the posterior in the noise of a fitted guide, where it is near standard normal.

    With the flow u = T(z), the chains live in z, with density :math:`p(T(z))\,|\det T'(z)|`. Each
    step is an independence proposal from the guide, which moves between modes and far into tails,
    then a Hamiltonian one, which moves where the guide is wrong (Gabrié et al. 2022). All chains
    are one batch.

    Cost: per step 1 evaluation and ``num_leapfrog`` gradients of model and flow for all chains
    together.

    Args:
        model: The model.
        guide: The guide, fitted.
        *args: Arguments of the model.
        num_samples: Draws kept from each chain.
        num_chains: Chains; they start from the guide's draws.
        warmup_steps: Steps before, in which the step size adapts.
        num_leapfrog: Leapfrog steps of a Hamiltonian proposal.
        target_rate: Acceptance rate to which the step size adapts.
        model_kwargs: Keyword arguments of the model whose names are also names of these options.
        **kwargs: Keyword arguments of the model.

    Raises:
        TypeError: If the guide is no AutoFlow.
        NotJudged: If the model sees only some rows of a subsampled plate and cannot be shown all.

    References:
        Hoffman et al. (2019), NeuTra-lizing bad geometry in HMC using neural transport.
        arXiv:1903.03704

        Gabrié, Rotskoff, Vanden-Eijnden (2022), Adaptive Monte Carlo augmented with normalizing
        flows. arXiv:2105.12603
    """
    kwargs = {**kwargs, **(model_kwargs or {})}
    if not isinstance(guide, AutoFlow):
        raise TypeError(
            f"flow_mcmc samples in the noise of an AutoFlow; got {type(guide).__name__}. Fit an "
            "AutoFlow to the model, or use importance_resample"
        )
    target = _NoiseTarget(guide, posterior_density(model, guide, args, kwargs))
    start = target.base.sample((num_chains,))
    state = State(start, *target.with_gradient(start))
    log_step = math.log(0.5 / target.dim**0.25)
    kept, jumps, moves = [], 0.0, 0.0
    for step in range(warmup_steps + num_samples):
        state, jump = target.jump(state)
        jitter = 0.8 + 0.4 * torch.rand(()).item()  # against resonance
        state, acceptance = hamiltonian(
            target.with_gradient, state, math.exp(log_step) * jitter, num_leapfrog
        )
        rate = acceptance.item()
        if step < warmup_steps:
            log_step += (rate - target_rate) / (step + 1) ** 0.6
        else:
            kept.append(state.position)
            jumps, moves = jumps + jump.float().mean().item(), moves + rate
    draws = torch.stack(kept, 1)
    return FlowChains(
        target.values(draws),
        jumps / num_samples,
        moves / num_samples,
        math.exp(log_step),
        split_rhat(draws).max().item(),
    )


class _NoiseTarget:
    """The posterior in the noise z of a guide: the log-density p(T(z)) |det T'(z)|."""

    def __init__(self, guide: AutoFlow, density: LatentDensity) -> None:
        self.density, self.transform = density, guide.get_transform()
        self.base, self.dim = guide.get_base_dist(), guide.latent_dim

    def __call__(self, z: Tensor) -> Tensor:
        u, log_det = self.transform.forward_and_log_det(z)
        return (self.density(u) + log_det).nan_to_num(-math.inf, posinf=-math.inf)

    def with_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities ``(C,)`` and gradients ``(C, D)``."""
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            log_p = self(z)
            (grad,) = torch.autograd.grad(log_p.sum(), z)
        return log_p.detach(), grad.nan_to_num(0.0)

    def jump(self, state: State) -> tuple[State, Tensor]:
        """A step by a proposal from the guide, and which chains took it."""
        z, base = state.position, self.base
        with torch.no_grad():
            proposal = base.sample((len(z),))
            log_ratio = self(proposal) - state.log_p + base.log_prob(z) - base.log_prob(proposal)
        jump = torch.rand_like(log_ratio).log() < log_ratio
        z = torch.where(jump[:, None], proposal, z)
        return State(z, *self.with_gradient(z)), jump

    @torch.no_grad()
    def values(self, draws: Tensor) -> dict[str, Tensor]:
        """Values of the sites at noise ``(chains, draws, D)``; ``(chains, draws, *site)``."""
        values = self.density.constrain(self.transform(draws).reshape(-1, self.dim))
        return {name: v.reshape(*draws.shape[:2], *v.shape[1:]) for name, v in values.items()}
