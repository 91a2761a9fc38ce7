"""The flows with which guides begin: bijections that start as the identity.

From noise to latents; :class:`pyroflows.AutoFlow` adds location and scale.
"""

import math
from itertools import combinations

import torch
from torch import Tensor, nn

from pyroflows.bijection import Bijection
from pyroflows.compose import Compose
from pyroflows.conditioners import Free
from pyroflows.scalar import Affine, Chain, ScalarMap
from pyroflows.splines import RationalQuadratic
from pyroflows.transforms.coupling import coupling
from pyroflows.transforms.elementwise import Elementwise

__all__ = ["local_flow", "posterior_flow", "sperner_masks"]


def sperner_masks(num_features: int, num_layers: int) -> Tensor:
    """Masks ``(num_layers, num_features)`` under which every feature acts on every other.

    Each feature moves in half of the layers, no two in the same ones, so that for any pair some
    layer moves the one and keeps the other (an antichain; Sperner 1928). Complements come in
    pairs, so that each layer moves about half.
    """
    layers = range(num_layers)
    codes = [set(c) for c in combinations(layers, num_layers // 2)]
    codes.sort(key=lambda c: sum(i + 1 in c for i in c))  # alternating ones first
    ordered: list[set[int]] = []
    for code in codes:
        if code not in ordered:
            ordered += [code, set(layers) - code] if 2 * len(code) == num_layers else [code]
    chosen = [ordered[i % len(ordered)] for i in range(num_features)]
    return torch.tensor([[layer in code for code in chosen] for layer in layers])


def posterior_flow(
    latent_dim: int, *, num_layers: int | None = None, count_bins: int = 5
) -> Bijection:
    """The default flow of a guide: couplings by a spline and an affine map.

    Every latent acts directly on every other in some layer, up to 70 latents. One network call per
    layer in either direction.

    Args:
        latent_dim: Number of latents.
        num_layers: Number of couplings; 4 (up to 6 latents), 6 (20) or 8 if None.
        count_bins: Bins of each spline.
    """
    scalar = Chain(RationalQuadratic(count_bins, bound=5.0), Affine(5.0))
    if latent_dim == 1:
        return Elementwise(scalar, Free(scalar.num_params, 1), [1])
    if num_layers is None:
        num_layers = next((n for n in (4, 6) if math.comb(n, n // 2) >= latent_dim), 8)
    width = max(16, min(64, 4 * latent_dim))
    return Compose(_couplings(scalar, latent_dim, num_layers, width))


def local_flow(
    latent_dim: int, context_dim: int, *, num_layers: int = 4, hidden_dim: int = 64
) -> Bijection:
    """The default conditional flow of a row's latents, the identity at the start.

    Affine couplings, then an affine map whose parameters depend on the context alone. The last map
    by itself is an amortized Gaussian, and the couplings bend it. One network call per layer and
    direction.

    Args:
        latent_dim: Number of latents of a row.
        context_dim: Features of the context.
        num_layers: Number of couplings.
        hidden_dim: Width of the networks' two hidden layers.
    """
    scalar, layers = Affine(5.0), list[Bijection]()
    if latent_dim > 1:
        layers += _couplings(scalar, latent_dim, num_layers, hidden_dim, context_dim)
    hidden = [hidden_dim, hidden_dim]
    free = Free(2, latent_dim, context_dim=context_dim, hidden_dims=hidden, activation=nn.SiLU)
    layers.append(Elementwise(scalar, free, [latent_dim], context_dim=context_dim))
    return Compose(layers)


def _couplings(
    scalar: ScalarMap, input_dim: int, num_layers: int, width: int, context_dim: int = 0
) -> list[Bijection]:
    """Couplings under Sperner's masks, with two hidden layers of ``width`` in each network."""
    return [
        coupling(
            scalar,
            input_dim,
            [width, width],
            mask=mask,
            context_dim=context_dim,
            activation=nn.SiLU,
        )
        for mask in sperner_masks(input_dim, num_layers)
    ]
