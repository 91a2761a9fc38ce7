"""The flow of a guide, made from what a user gave, and its distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Transform

from pyroflows.bijection import Bijection
from pyroflows.compose import Compose, as_bijection
from pyroflows.guides.gaussian import normal_points
from pyroflows.guides.mixture import MixtureNoise
from pyroflows.recipes.posteriors import posterior_flow

__all__ = ["FlowPosterior", "make_flow"]


class FlowPosterior(dist.TransformedDistribution):
    """A flow's distribution, with mean and variance from 4,097 quasi-random points."""

    def _moments(self) -> tuple[Tensor, Tensor]:
        base = self.base_dist.mean
        z = normal_points(2048, base.shape[-1], like=base)
        x = torch.cat([z, torch.zeros_like(z[:1]), -z])
        if isinstance(self.base_dist, MixtureNoise):
            x = self.base_dist.mixture.points(x)
        for transform in self.transforms:
            x = transform(x)
        mean = x.mean(0)
        return mean.expand(self.shape()), (x - mean).square().mean(0).expand(self.shape())

    @property
    def mean(self) -> Tensor:
        """Mean, shape ``(*batch, D)``."""
        return self._moments()[0]

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate, shape ``(*batch, D)``."""
        return self._moments()[1]


def make_flow(flow: Callable[[int], Any] | str | None, latent_dim: int) -> Bijection:
    """The bijection from noise to latents that was asked for; see :class:`AutoFlow`.

    Raises:
        ValueError: If the name is of no recipe, or the base can be trained.
    """
    if flow is None:
        return posterior_flow(latent_dim)
    if isinstance(flow, str):
        from pyroflows import recipes

        if flow not in recipes.__all__:
            raise ValueError(
                f"AutoFlow: flow must be one of {sorted(recipes.__all__)}; got {flow!r}"
            )
        made = getattr(recipes, flow)(latent_dim)
    else:
        made = flow(latent_dim)
    if any(True for _ in getattr(made, "base", nn.Module()).parameters()):
        raise ValueError(
            "AutoFlow: the flow's base must be the standard normal; got a learnable one"
        )
    made = getattr(made, "transform", made)
    if isinstance(made, Transform):
        return as_bijection(made)
    return Compose(list(made))
