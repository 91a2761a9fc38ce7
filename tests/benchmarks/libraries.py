"""The same flow in every library: equal depths, widths, bins and parameter counts.

Pyro alone ends up larger with splines, whose order there has one more parameter for each bin. A
builder takes ``(kind, input_dim)`` with kind ``"realnvp"``, ``"nsf"`` or ``"maf"`` and returns a
:class:`Model`, or ``None`` where the library has no such flow. RealNVP and NSF have 8 couplings,
each moving half of the features; MAF has 5 layers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["BUILDERS", "Model", "matrix_products"]

HIDDEN, BINS, BOUND = [128, 128], 8, 5.0
LAYERS = {"realnvp": 8, "nsf": 8, "maf": 5}
SCALAR_PARAMS = {"realnvp": 2, "nsf": 3 * BINS - 1, "maf": 2}


class Model(NamedTuple):
    """What is timed; ``module`` holds the parameters."""

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]


def perceptron(inputs: int, outputs: int) -> nn.Sequential:
    widths = [inputs, *HIDDEN, outputs]
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class WithoutContext(nn.Module):
    """A perceptron that is handed a context and ignores it, as nflows and normflows ask."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net = perceptron(inputs, outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x)


def pyroflows(kind: str, dim: int) -> Model:
    from pyroflows import Flow, bases, transforms

    steps: list[nn.Module] = []
    for i in range(LAYERS[kind]):
        half = torch.arange(dim) < dim // 2
        mask = half if i % 2 else ~half
        if kind == "realnvp":
            steps.append(transforms.affine_coupling(dim, HIDDEN, mask=mask))
        elif kind == "nsf":
            steps.append(
                transforms.spline_coupling(
                    dim,
                    hidden_dims=HIDDEN,
                    count_bins=BINS,
                    bound=BOUND,
                    order="quadratic",
                    mask=mask,
                )
            )
        else:
            order = torch.arange(dim) if i % 2 else torch.arange(dim).flip(0)
            steps.append(transforms.affine_autoregressive(dim, HIDDEN, permutation=order).inv)
    flow = Flow(bases.StandardNormal(dim), steps)
    return Model(flow, flow.log_prob, lambda n: flow.sample((n,)))


def pyro(kind: str, dim: int) -> Model:
    import pyro.distributions as dist
    from pyro.distributions import transforms

    learned: list[nn.Module] = []
    chain: list[object] = []
    for i in range(LAYERS[kind]):
        if kind == "maf":
            learned.append(transforms.affine_autoregressive(dim, HIDDEN))
            chain.append(learned[-1].inv)
            continue
        if kind == "realnvp":
            learned.append(transforms.affine_coupling(dim, HIDDEN))
        else:
            learned.append(
                transforms.spline_coupling(dim, hidden_dims=HIDDEN, count_bins=BINS, bound=BOUND)
            )
        chain.append(learned[-1])
        if i < LAYERS[kind] - 1:
            chain.append(transforms.Permute(torch.arange(dim).flip(0)))
    base = dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)
    flow = dist.TransformedDistribution(base, chain)
    return Model(nn.ModuleList(learned), flow.log_prob, lambda n: flow.sample((n,)))


def zuko(kind: str, dim: int) -> Model:
    from functools import partial

    from zuko.flows import MAF, NICE
    from zuko.transforms import MonotonicRQSTransform

    sizes = {"transforms": LAYERS[kind], "hidden_features": HIDDEN}
    if kind == "nsf":
        sizes["univariate"] = partial(MonotonicRQSTransform, bound=BOUND)
        sizes["shapes"] = [(BINS,), (BINS,), (BINS - 1,)]
    flow = (MAF if kind == "maf" else NICE)(dim, **sizes)
    return Model(flow, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)))


def nflows(kind: str, dim: int) -> Model:
    from nflows import transforms
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.utils.torchutils import create_alternating_binary_mask

    steps: list[nn.Module] = []
    for i in range(LAYERS[kind]):
        mask = create_alternating_binary_mask(dim, even=i % 2 == 0)
        if kind == "realnvp":
            steps.append(transforms.AffineCouplingTransform(mask, WithoutContext))
        elif kind == "nsf":
            steps.append(
                transforms.PiecewiseRationalQuadraticCouplingTransform(
                    mask, WithoutContext, num_bins=BINS, tails="linear", tail_bound=BOUND
                )
            )
        else:
            steps += [transforms.ReversePermutation(dim)] if i else []
            steps.append(
                transforms.MaskedAffineAutoregressiveTransform(
                    dim, HIDDEN[0], num_blocks=1, use_residual_blocks=False
                )
            )
    flow = Flow(transforms.CompositeTransform(steps), StandardNormal([dim]))
    return Model(flow, flow.log_prob, flow.sample)


class Inverted(nn.Module):
    """normflows ships the direction that samples fast; this reads it the other way."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.flow.inverse(z)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.flow(z)


def normflows(kind: str, dim: int) -> Model | None:
    import normflows as nf

    if kind != "maf":
        return None
    steps: list[nn.Module] = []
    for _ in range(LAYERS[kind]):
        layer = nf.flows.MaskedAffineAutoregressive(
            dim, HIDDEN[0], num_blocks=1, use_residual_blocks=False
        )
        steps += [Inverted(layer), nf.flows.Permute(dim)]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), steps)
    return Model(flow, flow.log_prob, lambda n: flow.sample(n)[0])


def freia(kind: str, dim: int) -> Model | None:
    import FrEIA.framework
    import FrEIA.modules

    if kind != "realnvp":
        return None
    flow = FrEIA.framework.SequenceINN(dim)
    for _ in range(LAYERS[kind] // 2):  # a block is two couplings
        flow.append(FrEIA.modules.GLOWCouplingBlock, subnet_constructor=perceptron)

    def log_prob(x: Tensor) -> Tensor:
        z, log_det = flow(x)
        return log_det - 0.5 * z.square().sum(-1) - 0.5 * dim * math.log(2 * math.pi)

    return Model(flow, log_prob, lambda n: flow(torch.randn(n, dim), rev=True)[0])


BUILDERS: dict[str, Callable[[str, int], Model | None]] = {
    "pyroflows": pyroflows,
    "Pyro": pyro,
    "zuko": zuko,
    "nflows": nflows,
    "normflows": normflows,
    "FrEIA": freia,
}


def matrix_products(kind: str, dim: int, batch: int, backward: bool) -> Callable[[], None]:
    """Only the products of the networks' layers, into memory that is there: the floor of all."""
    inputs, moved = (dim, dim) if kind == "maf" else (dim // 2, dim - dim // 2)
    widths = [inputs, *HIDDEN, moved * SCALAR_PARAMS[kind]]
    layers = []
    for a, b in zip(widths, widths[1:], strict=False):
        x, g, weight = torch.randn(batch, a), torch.randn(batch, b), torch.randn(b, a)
        layers.append((x, g, weight, torch.empty_like(x), torch.empty_like(g), weight.clone()))

    def run() -> None:
        for _ in range(LAYERS[kind]):
            for x, g, weight, to_x, to_g, to_weight in layers:
                torch.mm(x, weight.t(), out=to_g)
                if backward:
                    torch.mm(g.t(), x, out=to_weight)
                    torch.mm(g, weight, out=to_x)

    return run
