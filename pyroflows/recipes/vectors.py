"""Ready-made flows: each recipe returns a :class:`pyroflows.flow.Flow` with good defaults.

Every recipe takes ``(input_dim, context_dim=0, *, num_transforms, hidden_dims, base, embedding,
name)``. All start as their base distribution (the identity), except Glow, whose first batch of
data sets its ActNorm layers.

Which one: ``neural_spline`` for densities and guides; ``realnvp`` where every microsecond counts;
``maf`` for densities that are never sampled in an inner loop; ``iaf`` for guides; ``nice`` for
volume preservation up to a scaling.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

from pyroflows.bijection import Bijection
from pyroflows.compose import Compose
from pyroflows.flow import Flow
from pyroflows.transforms.autoregressive import affine_autoregressive, spline_autoregressive
from pyroflows.transforms.coupling import (
    additive_coupling,
    affine_coupling,
    alternating_mask,
    half_mask,
    spline_coupling,
)
from pyroflows.transforms.elementwise import elementwise_affine, elementwise_scale
from pyroflows.transforms.linear import linear
from pyroflows.transforms.normalization import actnorm

__all__ = ["glow", "glow_step", "iaf", "maf", "neural_spline", "nice", "realnvp"]

BaseLike = int | Distribution | nn.Module | None


def _hidden(hidden_dims: Sequence[int] | None, input_dim: int, context_dim: int) -> list[int]:
    if input_dim < 1:
        raise ValueError(f"input_dim must be positive; got {input_dim}")
    if context_dim < 0:
        raise ValueError(f"context_dim must be 0 or more; got {context_dim}")
    if hidden_dims is not None:
        return list(hidden_dims)
    return [max(64, min(256, 8 * (input_dim + context_dim)))] * 2


def _masks(input_dim: int, count: int) -> list[Tensor | None]:
    """Halves, then every second feature, in turn; all depend on all after two layers.

    Features of one half and one parity act on each other through the rest only; under
    :func:`sperner_masks` of as many layers they would in one.
    """
    if input_dim == 1:
        return [None] * count
    cycle = [
        half_mask(input_dim),
        half_mask(input_dim, swap=True),
        alternating_mask(input_dim),
        alternating_mask(input_dim, swap=True),
    ]
    return [cycle[i % 4] for i in range(count)]


def _couplings(
    factory: Callable[..., Bijection],
    input_dim: int,
    context_dim: int,
    count: int,
    hidden_dims: Sequence[int] | None,
    **kwargs: Any,
) -> list[Bijection]:
    """``count`` couplings under the masks in turn."""
    hidden_dims = _hidden(hidden_dims, input_dim, context_dim)
    return [
        factory(input_dim, hidden_dims=hidden_dims, mask=m, context_dim=context_dim, **kwargs)
        for m in _masks(input_dim, count)
    ]


def _autoregressives(
    factory: Callable[..., Bijection],
    input_dim: int,
    context_dim: int,
    count: int,
    hidden_dims: Sequence[int] | None,
    **kwargs: Any,
) -> list[Bijection]:
    """``count`` autoregressive layers, in the natural order of the features and its reverse."""
    hidden_dims = _hidden(hidden_dims, input_dim, context_dim)
    natural = list(range(input_dim))
    return [
        factory(
            input_dim,
            hidden_dims=hidden_dims,
            permutation=natural[::-1] if i % 2 else natural,  # what came last now comes first
            context_dim=context_dim,
            **kwargs,
        )
        for i in range(count)
    ]


def _flow(
    base: BaseLike,
    input_dim: int,
    transforms: Sequence[Bijection],
    embedding: nn.Module | None,
    name: str | None,
) -> Flow:
    return Flow(input_dim if base is None else base, transforms, embedding=embedding, name=name)


def nice(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 8,
    hidden_dims: Sequence[int] | None = None,
    base: BaseLike = None,
    embedding: nn.Module | None = None,
    name: str | None = None,
    **network: Any,
) -> Flow:
    """NICE: additive couplings and a diagonal scaling.

    One network call a coupling in either direction.

    Args:
        input_dim: Number of features.
        context_dim: Features of the context; 0 for none.
        num_transforms: Number of couplings.
        hidden_dims: Widths of each network; two layers of 8 units a feature, 64 to 256, if None.
        base: A module of :mod:`pyroflows.bases` or a distribution; the standard normal if None.
        embedding: Network that makes the context; see :class:`pyroflows.Flow`.
        name: Name for Pyro's param store.
        **network: ``residual`` and ``activation`` of :class:`pyroflows.conditioners.Dense`.

    References:
        Dinh, Krueger, Bengio (2015), NICE. arXiv:1410.8516
    """
    couplings = _couplings(
        additive_coupling, input_dim, context_dim, num_transforms, hidden_dims, **network
    )
    return _flow(base, input_dim, [*couplings, elementwise_scale(input_dim)], embedding, name)


def realnvp(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 8,
    hidden_dims: Sequence[int] | None = None,
    base: BaseLike = None,
    embedding: nn.Module | None = None,
    name: str | None = None,
    **network: Any,
) -> Flow:
    """RealNVP: affine couplings with alternating masks; arguments as in :func:`nice`.

    One network call a coupling in either direction.

    References:
        Dinh, Sohl-Dickstein, Bengio (2017), Density estimation using Real NVP. arXiv:1605.08803
    """
    couplings = _couplings(
        affine_coupling, input_dim, context_dim, num_transforms, hidden_dims, **network
    )
    return _flow(base, input_dim, couplings, embedding, name)


def glow_step(
    input_dim: int,
    context_dim: int = 0,
    *,
    hidden_dims: Sequence[int] | None = None,
    **network: Any,
) -> Compose:
    """One step of Glow on vectors, data side last: affine coupling, PLU linear map, ActNorm.

    Args:
        input_dim: Number of features.
        context_dim: Features of the context, which the coupling sees; 0 for none.
        hidden_dims: Widths of the network; two layers of 8 units a feature, 64 to 256, if None.
        **network: ``residual`` and ``activation`` of :class:`pyroflows.conditioners.Dense`.

    References:
        Kingma, Dhariwal (2018), Glow, section 3. arXiv:1807.03039
    """
    hidden_dims = _hidden(hidden_dims, input_dim, context_dim)
    move = affine_coupling(input_dim, hidden_dims, context_dim=context_dim, **network)
    # what one step keeps the next one moves, before the linear map has learned anything
    mix = linear(input_dim, permutation=range(input_dim - 1, -1, -1))
    return Compose([move, mix, actnorm(input_dim)])


def glow(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 8,
    hidden_dims: Sequence[int] | None = None,
    base: BaseLike = None,
    embedding: nn.Module | None = None,
    name: str | None = None,
    **network: Any,
) -> Flow:
    """Glow on vectors: ``num_transforms`` times :func:`glow_step`; arguments as in :func:`nice`.

    One network call a step in either direction. The first batch whose density is asked for in
    training mode sets the ActNorm layers.

    References:
        Kingma, Dhariwal (2018), Glow. arXiv:1807.03039
    """
    steps = [
        glow_step(input_dim, context_dim, hidden_dims=hidden_dims, **network)
        for _ in range(num_transforms)
    ]
    return _flow(base, input_dim, steps, embedding, name)


def iaf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 4,
    hidden_dims: Sequence[int] | None = None,
    base: BaseLike = None,
    embedding: nn.Module | None = None,
    name: str | None = None,
    **network: Any,
) -> Flow:
    """Inverse autoregressive flow: fast draws with their densities.

    One network call a layer for a draw, D short steps for the density of a value from elsewhere.

    The density of its own draws is free. Arguments as in :func:`nice`.

    References:
        Kingma et al. (2016), Improving variational inference with inverse autoregressive flow.
        arXiv:1606.04934
    """
    layers = _autoregressives(
        affine_autoregressive, input_dim, context_dim, num_transforms, hidden_dims, **network
    )
    return _flow(base, input_dim, layers, embedding, name)


def maf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 5,
    hidden_dims: Sequence[int] | None = None,
    base: BaseLike = None,
    embedding: nn.Module | None = None,
    name: str | None = None,
    **network: Any,
) -> Flow:
    """Masked autoregressive flow: fast densities.

    One network call a layer for a density, D short steps for a draw.

    Arguments as in :func:`nice`.

    References:
        Papamakarios, Pavlakou, Murray (2017), Masked autoregressive flow. arXiv:1705.07057
    """
    layers = _autoregressives(
        affine_autoregressive, input_dim, context_dim, num_transforms, hidden_dims, **network
    )
    return _flow(base, input_dim, [layer.inv for layer in layers], embedding, name)


def neural_spline(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int | None = None,
    hidden_dims: Sequence[int] | None = None,
    base: BaseLike = None,
    embedding: nn.Module | None = None,
    autoregressive: bool = False,
    count_bins: int = 8,
    bound: float = 5.0,
    name: str | None = None,
    **network: Any,
) -> Flow:
    """Neural spline flow: rational-quadratic layers, coupled or autoregressive, and a scaling.

    Couplings cost one network call a layer in either direction; autoregressive layers one for a
    density, D short steps for a sample. Splines act within ±``bound`` base standard deviations and
    are the identity beyond.

    Args:
        input_dim: Number of features.
        context_dim: Features of the context; 0 for none.
        num_transforms: Number of layers; 6 couplings or 3 autoregressive layers if None.
        hidden_dims: Widths of each network; two layers of 8 units a feature, 64 to 256, if None.
        base: A module of :mod:`pyroflows.bases` or a distribution; the standard normal if None.
        embedding: Network that makes the context; see :class:`pyroflows.Flow`.
        autoregressive: Whether layers are autoregressive instead of couplings.
        count_bins: Bins of each spline.
        bound: Half-width of each spline's box.
        name: Name for Pyro's param store.
        **network: ``residual`` and ``activation`` of the networks.

    References:
        Durkan, Bekasov, Murray, Papamakarios (2019), Neural spline flows. arXiv:1906.04032
    """
    count = num_transforms if num_transforms is not None else 3 if autoregressive else 6
    sizes = (input_dim, context_dim, count, hidden_dims)
    network.update(count_bins=count_bins, bound=bound)
    if autoregressive:
        layers = [t.inv for t in _autoregressives(spline_autoregressive, *sizes, **network)]
    else:
        layers = _couplings(spline_coupling, *sizes, **network)
    return _flow(base, input_dim, [*layers, elementwise_affine(input_dim)], embedding, name)
