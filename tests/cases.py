"""THE dictionary of transforms.

A new transform is a new line here, and the harness does the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import pyroflows.transforms as T
from pyroflows.bijection import Bijection
from pyroflows.compose import Compose
from pyroflows.conditioners import Columns
from pyroflows.families import CDF, LogisticMixture
from pyroflows.packed import Packed
from pyroflows.scalar import Affine, Chain, PerFeature, Shift
from pyroflows.splines import LinearRational, RationalQuadratic


@dataclass(frozen=True)
class Case:
    """How to build a transform for a number of context features, and what to expect of it."""

    make: Callable[[int], Bijection]
    event_shape: tuple[int, ...]
    identity: bool = True  # starts as the identity
    takes_context: bool = True
    tolerance: float = 1.0  # factor on the round trip's tolerance, for iterative inverses


PERMUTATION = [3, 1, 4, 0, 2]
# 3 stands alone; 1 depends on it, 0 and 4 on 1, 2 on 0 and 3; neither a chain nor in order
ADJACENCY = [
    [1, 1, 0, 0, 0],
    [0, 1, 0, 1, 0],
    [1, 0, 1, 1, 0],
    [0, 0, 0, 1, 0],
    [0, 1, 0, 0, 1],
]

# free, bounded and shifted features side by side, equal ones apart from each other
MAPS = PerFeature([Affine(), RationalQuadratic(4), Affine(), Shift(), RationalQuadratic(4)])

CASES: dict[str, Case] = {
    "additive_coupling": Case(lambda c: T.additive_coupling(5, [8], context_dim=c), (5,)),
    "affine_coupling": Case(lambda c: T.affine_coupling(5, [8, 8], context_dim=c), (5,)),
    "affine_coupling_alternating": Case(
        lambda c: T.affine_coupling(4, [8], mask=T.alternating_mask(4), context_dim=c), (4,)
    ),
    "affine_coupling_swapped": Case(
        lambda c: T.affine_coupling(5, [8], mask=T.half_mask(5, swap=True), context_dim=c), (5,)
    ),
    "affine_coupling_matrix": Case(
        lambda c: T.affine_coupling((4, 3), [8], dim=-2, context_dim=c), (4, 3)
    ),
    "affine_coupling_one_feature": Case(lambda c: T.affine_coupling(1, [8], context_dim=c), (1,)),
    "affine_coupling_residual": Case(
        lambda c: T.affine_coupling(3, [8, 8], residual=True, context_dim=c), (3,)
    ),
    "spline_coupling": Case(lambda c: T.spline_coupling(5, None, [8], context_dim=c), (5,)),
    "spline_coupling_custom_mask": Case(
        lambda c: T.spline_coupling(3, hidden_dims=[8], mask=[True, False, True], context_dim=c),
        (3,),
    ),
    "spline_coupling_linear": Case(
        lambda c: T.spline_coupling(3, None, [8], 4, order="linear", context_dim=c), (3,)
    ),
    "affine_autoregressive": Case(
        lambda c: T.affine_autoregressive(5, [16, 8], context_dim=c), (5,)
    ),
    "affine_autoregressive_permuted": Case(
        lambda c: T.affine_autoregressive(5, [8], permutation=PERMUTATION, context_dim=c), (5,)
    ),
    "affine_autoregressive_residual": Case(
        lambda c: T.affine_autoregressive(4, [9, 9, 9], residual=True, context_dim=c), (4,)
    ),
    "affine_autoregressive_adjacency": Case(
        lambda c: T.affine_autoregressive(5, [16, 8], adjacency=ADJACENCY, context_dim=c), (5,)
    ),
    "affine_autoregressive_adjacency_residual": Case(
        lambda c: T.affine_autoregressive(
            5, [9, 9], adjacency=ADJACENCY, residual=True, context_dim=c
        ),
        (5,),
    ),
    "affine_autoregressive_narrow": Case(
        lambda c: T.affine_autoregressive(6, [4, 3], context_dim=c), (6,)
    ),
    "affine_autoregressive_one_feature": Case(
        lambda c: T.affine_autoregressive(1, [4], context_dim=c), (1,)
    ),
    "autoregressive_columns": Case(
        lambda c: T.autoregressive(
            Affine(), 4, [6, 6], permutation=[2, 0, 3, 1], context_dim=c, conditioner=Columns
        ),
        (4,),
    ),
    "spline_autoregressive": Case(
        lambda c: T.spline_autoregressive(4, [8], permutation=[2, 0, 3, 1], context_dim=c), (4,)
    ),
    "spline_autoregressive_linear": Case(
        lambda c: T.spline_autoregressive(3, [8], 4, order="linear", context_dim=c), (3,)
    ),
    "spline": Case(lambda c: T.spline(3, [8], context_dim=c), (3,)),
    "spline_linear": Case(lambda c: T.spline(3, [8], order="linear", context_dim=c), (3,)),
    "coupling_per_feature": Case(
        lambda c: T.coupling(MAPS, 5, [8], mask=[True, True, False, True, True], context_dim=c),
        (5,),
    ),
    "autoregressive_per_feature": Case(
        lambda c: T.autoregressive(MAPS, 5, [8], permutation=PERMUTATION, context_dim=c), (5,)
    ),
    "elementwise_per_feature": Case(
        lambda c: T.elementwise(
            PerFeature([Affine(), LinearRational(4)], dim=-2), (2, 3), context_dim=c
        ),
        (2, 3),
    ),
    "mixture_coupling": Case(
        lambda c: T.coupling(CDF(LogisticMixture(3)), 2, [4], context_dim=c), (2,)
    ),
    "mixture_autoregressive": Case(
        lambda c: T.autoregressive(
            Chain(CDF(LogisticMixture(1)), Affine()), 2, [4], permutation=[1, 0], context_dim=c
        ),
        (2,),
    ),
    "mixture_elementwise": Case(
        lambda c: T.elementwise(CDF(LogisticMixture(4)), 1, hidden_dims=[4], context_dim=c), (1,)
    ),
    "elementwise_affine": Case(lambda c: T.elementwise_affine(3, [8], context_dim=c), (3,)),
    "elementwise_scale": Case(lambda c: T.elementwise_scale((2, 2), [8], context_dim=c), (2, 2)),
    "permute": Case(
        lambda c: T.permute(5, PERMUTATION), (5,), identity=False, takes_context=False
    ),
    "permute_matrix": Case(
        lambda c: T.permute((3, 2), dim=-2), (3, 2), identity=False, takes_context=False
    ),
    "reverse": Case(lambda c: T.reverse(4), (4,), identity=False, takes_context=False),
    "linear": Case(lambda c: T.linear(4, [8], context_dim=c), (4,)),
    "linear_permuted": Case(
        lambda c: T.linear(4, [8], [2, 0, 3, 1], context_dim=c), (4,), identity=False
    ),
    "linear_channels": Case(lambda c: T.linear((3, 2, 2), [8], dim=-3, context_dim=c), (3, 2, 2)),
    "lower_cholesky_affine": Case(lambda c: T.lower_cholesky_affine(3, [8], context_dim=c), (3,)),
    # behind an affine map, since a rotation of N(0, I) has no gradient of its likelihood
    "householder": Case(
        lambda c: Compose(
            [T.elementwise_affine(5), T.householder(5, hidden_dims=[8], context_dim=c)]
        ),
        (5,),
    ),
    "householder_odd": Case(
        lambda c: Compose(
            [T.elementwise_affine(3), T.householder(3, 1, hidden_dims=[8], context_dim=c)]
        ),
        (3,),
        identity=False,
    ),
    "matrix_exponential": Case(
        lambda c: T.matrix_exponential(3, hidden_dims=[8], context_dim=c), (3,)
    ),
    "matrix_exponential_bounded": Case(
        lambda c: T.matrix_exponential(3, bound=2.0, hidden_dims=[8], context_dim=c), (3,)
    ),
    "actnorm": Case(lambda c: T.actnorm(3, [8], context_dim=c), (3,)),
    "actnorm_channels": Case(
        lambda c: T.actnorm((3, 2, 2), [8], dim=-3, context_dim=c), (3, 2, 2)
    ),
    "batchnorm": Case(
        lambda c: T.batchnorm(3, hidden_dims=[8], context_dim=c), (3,), identity=False
    ),
    "planar": Case(lambda c: T.planar(3, [8], context_dim=c), (3,)),
    "planar_one_feature": Case(lambda c: T.planar(1, [8], context_dim=c), (1,)),
    "radial": Case(lambda c: T.radial(3, [8], context_dim=c), (3,)),
    "sylvester": Case(lambda c: T.sylvester(3, hidden_dims=[8], context_dim=c), (3,)),
    "part": Case(lambda c: T.Part(T.affine_coupling(3, [8], context_dim=c), 5, 3), (5,)),
    "conv_coupling": Case(
        lambda c: Compose(
            [T.elementwise_scale((2, 2, 3)), T.conv_coupling(2, [4, 4], context_dim=c)]
        ),
        (2, 2, 3),
    ),
    "multi_scale": Case(
        lambda c: T.multi_scale(
            (1, 4, 4),
            lambda shape: [
                T.conv_coupling(shape[0], [4], context_dim=c),
                T.linear(shape, dim=-3),
                T.actnorm(shape, dim=-3),
            ],
        ),
        (1, 4, 4),
    ),
    "inverse": Case(lambda c: T.affine_autoregressive(3, [8], context_dim=c).inv, (3,)),
    "compose": Case(
        lambda c: Compose(
            [
                T.affine_coupling(4, [8], context_dim=c),
                T.spline(4, [8]),
                T.affine_autoregressive(4, [8], context_dim=c).inv,
            ]
        ),
        (4,),
    ),
    "packed": Case(
        lambda c: Packed(
            Compose([T.spline_coupling(3, None, [8], context_dim=c), T.lower_cholesky_affine(3)])
        ),
        (3,),
    ),
    "wrapped": Case(
        lambda c: Compose(
            [T.affine_coupling(3, [8], context_dim=c), torch.distributions.ExpTransform()]
        ),
        (3,),
        identity=False,
    ),
}


def build(name: str, context_dim: int = 0, dtype: torch.dtype = torch.float64) -> Bijection:
    """Return the case's transform away from its initial state, in evaluation mode."""
    case = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transform = case.make(context_dim).to(dtype)
    generator = torch.Generator().manual_seed(1)
    if any(isinstance(m, (T.ActNorm, T.BatchNorm)) for m in transform.modules()):
        data = 1 + 2 * torch.randn(64, *case.event_shape, generator=generator, dtype=dtype)
        context = torch.randn(64, context_dim, generator=generator, dtype=dtype)
        transform.condition(context).inv(data)  # what is initialized by data sees some
    disturb(transform, generator)
    return transform.eval()


@torch.no_grad()
def disturb(module: nn.Module, generator: torch.Generator, scale: float = 0.3) -> None:
    """Move every parameter by normal noise."""
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(scale * noise.to(parameter.dtype))


def contexts(context_dim: int, *batch: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return a context of the batch shape."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*batch, context_dim, generator=generator, dtype=torch.float64).to(dtype)


def noise(name: str, *batch: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return standard normal values of the case's event."""
    generator = torch.Generator().manual_seed(3)
    shape = (*batch, *CASES[name].event_shape)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
