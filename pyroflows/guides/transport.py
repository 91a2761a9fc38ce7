r"""The map of a flow guide, :math:`u = \mu + W (b + A f(z))`, with one trainable vector.

Pyro pays for each parameter tensor at each step (a message, an entry of the store, an optimizer
group), so a flow of thirty small tensors spends more on bookkeeping than on arithmetic. Here they
are parts of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyroflows.bijection import Bijection
from pyroflows.compose import Compose
from pyroflows.conditioners import Dense, Free
from pyroflows.guides.mixture import Mixture
from pyroflows.scalar import Affine, Chain
from pyroflows.splines import RationalQuadratic
from pyroflows.transforms.coupling import Coupling
from pyroflows.transforms.elementwise import Elementwise

__all__ = ["Chain", "PackedParameters", "Transport", "posterior_flow", "who_moves"]


def who_moves(num_features: int, num_layers: int) -> Tensor:
    """Masks ``(num_layers, num_features)`` under which every feature acts on every other.

    Each feature moves in half of the layers, no two in the same ones, so that for any pair some
    layer moves the one and keeps the other (an antichain; Sperner 1928). Complements come in
    pairs, so that each layer moves about half.
    """
    layers = range(num_layers)
    codes = [set(c) for c in combinations(layers, num_layers // 2)]
    codes.sort(key=lambda c: sum(i + 1 in c for i in c))  # those that take turns first
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
    layers = []
    for mask in who_moves(latent_dim, num_layers):
        moved = int(mask.sum())
        net = Dense(
            latent_dim - moved,
            scalar.num_params,
            moved,
            hidden_dims=[width, width],
            activation=nn.SiLU,
        )
        layers.append(Coupling(scalar, net, mask))
    return Compose(layers)


class PackedParameters:
    """The trainable parameters of a module as parts of one vector.

    The module keeps its buffers and its code, but gives its parameters away; :meth:`lend` puts the
    parts of a vector in their places for as long as the module is evaluated.

    Args:
        module: The module; its floating-point parameters that require gradients are taken out of
            it.

    Attributes:
        initial: The parameters at the time, as one vector; shape ``(P,)``.
    """

    def __init__(self, module: nn.Module) -> None:
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        found: list[Tensor] = []
        for inner in module.modules():
            for name, p in list(inner._parameters.items()):
                if p is None or not p.requires_grad or not p.is_floating_point():
                    continue
                if id(p) not in owners:
                    found.append(p)
                owners.setdefault(id(p), []).append(
                    (inner, name)
                )  # tied weights have several owners
                del inner._parameters[name]
        self.slots = [owners[id(p)] for p in found]
        self.shapes = [tuple(p.shape) for p in found]
        self.sizes = [p.numel() for p in found]
        parts = [p.detach().reshape(-1) for p in found]
        self.initial = torch.cat(parts) if parts else torch.zeros(0)

    def __len__(self) -> int:
        return sum(self.sizes)

    @contextmanager
    def lend(self, vector: Tensor) -> Iterator[None]:
        """Put the parts of ``vector``, ``(P,)``, where the parameters were."""
        for part, shape, owners in zip(
            vector.split(self.sizes), self.shapes, self.slots, strict=True
        ):
            for inner, name in owners:
                inner.__dict__[name] = part.view(shape)
        try:
            yield
        finally:
            for owners in self.slots:
                for inner, name in owners:
                    inner.__dict__.pop(name, None)


class Transport(Bijection):
    r"""From the base distribution to the latents: :math:`u = \mu + W v`, :math:`v = b + A f(z)`.

    :math:`\mu, W` are buffers that a pre-fit sets and nothing trains: in the coordinates v the
    posterior is near standard normal. A is lower triangular with positive diagonal (diagonal for
    many latents), :math:`f` any flow.

    Args:
        flow: The flow f; its parameters move into one vector.
        loc: Initial :math:`\mu`; shape ``(D,)``.
        init_scale: Initial A, times the identity.
        full_rank: Whether W and A are triangular matrices, or diagonal.

    Attributes:
        initial: Initial value of the trainable vector: the flow's parameters divided by
            ``flow_rate``, b, log diag A, the rest of A. A rate good for b is far too large for
            weights, many of which move one output.
    """

    flow_rate = (
        0.03  #: what an optimizer's step in the vector is worth in the flow's own parameters
    )

    loc: Tensor
    scale: Tensor

    def __init__(
        self, flow: Bijection, loc: Tensor, *, init_scale: float = 1.0, full_rank: bool = True
    ) -> None:
        D = len(loc)
        super().__init__((D,))
        self.flow = flow.to(loc)
        self.parts = PackedParameters(self.flow)
        self.full_rank = full_rank
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale", torch.eye(D).to(loc) if full_rank else torch.ones_like(loc))
        rows, cols = (
            torch.tril_indices(D, D, -1) if full_rank else torch.zeros(2, 0, dtype=torch.long)
        )
        self.register_buffer("below", (rows * D + cols).to(loc.device), persistent=False)
        for name, shape in self._no_mixture(D).items():
            self.register_buffer(name, loc.new_zeros(shape))
        zeros, log_diag = torch.zeros_like(loc), torch.full_like(loc, math.log(init_scale))
        self.initial = torch.cat(
            [
                self.parts.initial.to(loc) / self.flow_rate,
                zeros,
                log_diag,
                loc.new_zeros(len(rows)),
            ]
        )

    # ------------------------------------------------------------------------- the base

    @staticmethod
    def _no_mixture(dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the buffers of a mixture of no components: the base is standard normal."""
        return {"base_weights": (0,), "base_locs": (0, dim), "base_scales": (0, dim, dim)}

    @property
    def mixture(self) -> Mixture | None:
        """The mixture from which the noise comes; None for the standard normal."""
        buffers = self._buffers
        locs = buffers["base_locs"]
        if locs is None or not len(locs):
            return None
        weights, scales = buffers["base_weights"], buffers["base_scales"]
        return Mixture(cast(Tensor, weights), locs, cast(Tensor, scales))

    def set_mixture(self, mixture: Mixture | None) -> None:
        """Let the noise come from a mixture, or from the standard normal."""
        if mixture is None:
            shapes = self._no_mixture(len(self.loc))
            values = {name: self.loc.new_zeros(shape) for name, shape in shapes.items()}
        else:
            parts = (mixture.log_weights, mixture.locs, mixture.scale_trils)
            values = dict(zip(self._no_mixture(0), parts, strict=True))
        for name, value in values.items():
            self._buffers[name] = value.to(self.loc)

    def noise(self, points: Tensor) -> Tensor:
        """Draws of the base from standard normal ``points``, ``(S, D)``."""
        mixture = self.mixture
        return points if mixture is None else mixture.points(points)

    def log_noise(self, z: Tensor) -> Tensor:
        """Log-density of the base, ``(*batch, D)`` to ``(*batch)``."""
        mixture = self.mixture
        if mixture is not None:
            return mixture.log_prob(z)
        return -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A mixture has as many components as the file says; older files know of none."""
        for name in self._no_mixture(0):
            held = self._buffers[name]
            found = state_dict.setdefault(prefix + name, held)
            if found.shape != held.shape:
                self._buffers[name] = held.new_zeros(found.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # ------------------------------------------------------------------------- the map

    def whiten(self, loc: Tensor, scale: Tensor) -> None:
        """Set the buffers to a Gaussian; ``scale`` is ``(D, D)`` lower triangular, or ``(D,)``."""
        self.loc.copy_(loc)
        self.scale.copy_(
            scale
            if scale.dim() == self.scale.dim()
            else scale.norm(dim=-1)
            if scale.dim() == 2
            else scale.diag()
        )

    @property
    def calls(self) -> tuple[float, float]:
        """Those of the flow."""
        return self.flow.calls

    @property
    def inverts_cheaply(self) -> bool:
        """Whether the inverse of the flow costs about as much as the flow, as for couplings."""
        forward, inverse = self.flow.calls
        return inverse <= 2 * forward

    @property
    def log_det_scale(self) -> Tensor:
        """log|det W|."""
        return (self.scale.diagonal() if self.full_rank else self.scale).log().sum()

    def spread(self, v: Tensor) -> Tensor:
        """W v."""
        return v @ self.scale.T if self.full_rank else v * self.scale

    def _split(self, vector: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        D = len(self.loc)
        theta, b, log_diag, rest = vector.split([len(self.parts), D, D, len(self.below)])
        return self.flow_rate * theta, b, log_diag, rest

    def _triangle(self, log_diag: Tensor, rest: Tensor) -> Tensor:
        D = len(self.loc)
        return log_diag.exp().diag() + rest.new_zeros(D * D).index_copy(0, self.below, rest).view(
            D, D
        )

    def from_base(self, vector: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return v, ``(*batch, D)``, and log|det dv/dz|, ``(*batch)``, at ``vector``."""
        theta, b, log_diag, rest = self._split(vector)
        with self.parts.lend(theta):
            v, log_det = self.flow._forward_and_log_det(z, None)
        v = v @ self._triangle(log_diag, rest).T if self.full_rank else v * log_diag.exp()
        return v + b, log_det + log_diag.sum()

    def to_base(self, vector: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and log|det dz/dv| at parameters ``vector``."""
        theta, b, log_diag, rest = self._split(vector)
        v = v - b
        if self.full_rank:
            v = torch.linalg.solve_triangular(
                self._triangle(log_diag, rest), v.reshape(-1, len(b)).T, upper=False
            ).T.reshape(v.shape)
        else:
            v = v * (-log_diag).exp()
        with self.parts.lend(theta):
            z, log_det = self.flow._inverse_and_log_det(v, None)
        return z, log_det - log_diag.sum()

    def at(self, vector: Tensor) -> Transport:
        """A view with the given trainable vector, a bijection that shares every buffer."""
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view.__dict__.update(_entry=None, _inverse_ref=None, _parameters={"vector": vector})
        # the flow as a plain attribute: nothing in it changes, so no call need look through its
        # buffers
        view.__dict__.update(
            _modules={}, flow=self._modules.get("flow", self.__dict__.get("flow"))
        )
        return view

    def _vector(self) -> Tensor:
        vector = self._parameters.get("vector")
        if vector is None:
            raise RuntimeError("Transport has no parameters of its own: call .at(vector) first")
        return vector

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        v, log_det = self.from_base(self._vector(), x)
        return self.loc + self.spread(v), log_det + self.log_det_scale

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        v = y - self.loc
        if self.full_rank:
            v = torch.linalg.solve_triangular(
                self.scale, v.reshape(-1, len(self.loc)).T, upper=False
            ).T.reshape(v.shape)
        else:
            v = v / self.scale
        z, log_det = self.to_base(self._vector(), v)
        return z, log_det - self.log_det_scale
