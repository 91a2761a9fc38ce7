r"""The map of a flow guide, :math:`u = \mu + W (b + A f(z))`, with one trainable vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroflows.bijection import Bijection
from pyroflows.compose import Compose
from pyroflows.conditioners import Free
from pyroflows.guides.legacy import PackedParameters, Transport
from pyroflows.packed import Packed
from pyroflows.recipes.posteriors import posterior_flow
from pyroflows.recipes.posteriors import sperner_masks as who_moves
from pyroflows.scalar import Affine, Chain
from pyroflows.transforms.elementwise import Elementwise
from pyroflows.transforms.linear import TriangularAffine

__all__ = ["FLOW_UNIT", "Whitening", "make_transport", "start_vector"]

# old imports, and classes that old pickles name
_MOVED = (Chain, PackedParameters, Transport, posterior_flow, who_moves)

#: What 1 in the vector is worth in the flow's own parameters: a rate good for b is far too large
#: for weights, many of which move one output.
FLOW_UNIT = 0.03


class Whitening(Bijection):
    r"""The fixed map :math:`u = \mu + W v`: what a pre-fit finds and nothing trains.

    In the coordinates v a posterior is near standard normal. O(D²), or O(D) where W is diagonal.

    Args:
        loc: :math:`\mu`; shape ``(D,)``.
        scale: W with a positive diagonal, lower triangular ``(D, D)``; or its diagonal ``(D,)``.
    """

    loc: Tensor
    scale: Tensor
    calls = (0, 0)

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(loc.shape)
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    @property
    def full_rank(self) -> bool:
        """Whether W is a triangular matrix, or diagonal."""
        return self.scale.dim() == 2

    @property
    def log_det(self) -> Tensor:
        """log|det W|."""
        return (self.scale.diagonal() if self.full_rank else self.scale).log().sum()

    def fill(self, loc: Tensor, scale: Tensor) -> None:
        """Set the numbers; ``scale`` is ``(D, D)`` lower triangular or ``(D,)``, whatever W is."""
        self.loc.copy_(loc)
        if scale.dim() > self.scale.dim():
            scale = scale.norm(dim=-1)  # the standard deviations
        self.scale.copy_(scale if scale.dim() == self.scale.dim() else scale.diag())

    def spread(self, v: Tensor) -> Tensor:
        """W v."""
        return v @ self.scale.T if self.full_rank else v * self.scale

    def gather(self, away: Tensor) -> Tensor:
        r""":math:`W^{-1}` times what lies away from the location, ``(*batch, D)``."""
        if not self.full_rank:
            return away / self.scale
        rows = away.reshape(-1, away.shape[-1])
        return torch.linalg.solve_triangular(self.scale, rows.T, upper=False).T.reshape(away.shape)

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.loc + self.spread(x), self.log_det

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.gather(y - self.loc), -self.log_det


def make_transport(
    flow: Bijection, loc: Tensor, *, init_scale: float = 1.0, full_rank: bool = True
) -> Compose:
    r"""From the noise to the latents: :math:`u = \mu + W v`, :math:`v = b + A f(z)`.

    A :class:`~pyroflows.packed.Packed` flow and affine map, then a :class:`Whitening`, which is
    the identity but for its location.

    Args:
        flow: The flow f; its parameters move into one vector.
        loc: :math:`\mu`; shape ``(D,)``.
        init_scale: A at the start, times the identity.
        full_rank: Whether W and A are triangular matrices, or diagonal.
    """
    flow, D = flow.to(loc), len(loc)
    affine: Bijection
    if full_rank:
        affine = TriangularAffine(D, scale_tril=init_scale * torch.eye(D), bound=math.inf)
    else:
        free = Free(2, D)
        with torch.no_grad():
            free.theta[1] = math.log(init_scale)
        affine = Elementwise(Affine(math.inf), free, [D])
    packed = Packed(Compose([flow, affine.to(loc)]), units={flow: FLOW_UNIT})
    return Compose([packed, Whitening(loc, torch.eye(D) if full_rank else torch.ones(D))]).to(loc)


def start_vector(transport: Compose) -> Tensor:
    """The packed vector at which the flow is as it was made and A is the identity."""
    packed = transport[0]
    start = packed.initial.clone()
    for part in packed.parts_of(packed.bijection[1], start):
        part.zero_()
    return start
