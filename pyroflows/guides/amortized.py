"""Guides for local latents: a flow for the global ones, a conditional flow for each row's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoGuide, init_to_median
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.nn import PyroModule
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.distributions import biject_to

from pyroflows import store
from pyroflows.bijection import Bijection, Compose, as_bijection
from pyroflows.conditioners import Dense, Free
from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.latent import init_where_possible
from pyroflows.guides.transport import who_moves
from pyroflows.scalar import Affine
from pyroflows.transforms.coupling import Coupling
from pyroflows.transforms.elementwise import Elementwise

__all__ = ["AmortizedFlow", "local_flow"]


def local_flow(
    latent_dim: int, context_dim: int, *, num_layers: int = 4, hidden_dim: int = 64
) -> Bijection:
    """The default conditional flow of a row's latents, the identity at the start.

    Affine couplings, then an affine map whose parameters depend on the context alone.

    The last map by itself is an amortized Gaussian; the couplings bend it. One network call per
    layer and direction.
    """
    hidden, scalar = [hidden_dim, hidden_dim], Affine(5.0)
    layers: list[Bijection] = []
    if latent_dim > 1:
        for mask in who_moves(latent_dim, num_layers):
            moved = int(mask.sum())
            net = Dense(
                latent_dim - moved,
                2,
                moved,
                context_dim=context_dim,
                hidden_dims=hidden,
                activation=nn.SiLU,
            )
            layers.append(Coupling(scalar, net, mask, context_dim=context_dim))
    free = Free(2, latent_dim, context_dim=context_dim, hidden_dims=hidden, activation=nn.SiLU)
    layers.append(Elementwise(scalar, free, [latent_dim], context_dim=context_dim))
    return Compose(layers)


class AmortizedFlow(AutoGuide):
    r"""A guide for models with latents inside a plate, subsampled or not.

    .. math:: q(z_{\text{global}})\,\prod_i q(z_i \mid h(x_i),\, z_{\text{global}})

    The global latents, those outside the plate, follow an :class:`AutoFlow`; those of row i follow
    a conditional flow whose context is an encoding h of the row's data and the (unconstrained)
    global latents. Everything inside the plate is scaled as the model's: losses of minibatches are
    unbiased.

    Args:
        model: The model. All local latents lie in the same plates.
        encoder: Module ``(*plate, *features) -> (*plate, encoder_dim)``.
        encoder_dim: Features that the encoder gives.
        inputs: Callable of the model's arguments that gives the data to encode, whole; its leading
            axes are the plate's and are subsampled with it. The first argument if None.
        flow: The global flow, as in :class:`AutoFlow`.
        local: Callable ``(latent_dim, context_dim) -> Bijection`` with context; :func:`local_flow`
            if None.
        local_names: Local sites; those inside a subsampled plate if None, or inside any plate if
            none is subsampled.
        init_loc_fn: As in :class:`AutoFlow`; for the global latents.
        init_scale: As in :class:`AutoFlow`.
        create_plates: As in :class:`~pyro.infer.autoguide.AutoGuide`; needed where batches vary in
            size.
        name: As in :class:`AutoFlow`.

    Raises:
        ValueError: When the model is first seen, if it has no local latents or they lie in
            different plates.

    References:
        Kingma, Welling (2014), Auto-encoding variational Bayes. arXiv:1312.6114
        Rezende, Mohamed (2015), Variational inference with normalizing flows. arXiv:1505.05770
    """

    def __init__(
        self,
        model: Callable,
        encoder: nn.Module,
        encoder_dim: int,
        *,
        inputs: Callable[..., Tensor] | None = None,
        flow: Callable[[int], Any] | str | None = None,
        local: Callable[[int, int], Bijection] | None = None,
        local_names: list[str] | None = None,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        create_plates: Callable | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        self._pyro_name = name or self._pyro_name
        self.encoder, self.encoder_dim = encoder, encoder_dim
        self._inputs = inputs or (lambda *args, **kwargs: args[0])
        self._flow, self._local, self._local_names = flow, local or local_flow, local_names
        self._init_loc_fn, self._init_scale = init_loc_fn, init_scale

    def setup(self, *args: Any, **kwargs: Any) -> AmortizedFlow:
        """Run the model once with these arguments, create the parameters, and return self."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        for name in ("encoder", "local_transform"):
            if store.is_loaded(f"{self._pyro_name}.{name}"):
                self._claim(name, store.claim)
        return self

    def _claim(self, name: str, how: Callable) -> None:
        """Claim or register what the global guide does not look after."""
        part = self._modules[name]
        whole = not isinstance(part, PyroModule)
        how(f"{self._pyro_name}.{name}", part, whole=whole, inherit=False)

    def _part(self, name: str) -> Any:
        """Encoder or local transform; within inference, Pyro is told of its parameters."""
        if not am_i_wrapped():
            return self._modules[name]
        if pyro.settings.get("module_local_params"):
            return getattr(self, name)  # PyroModule's own way
        self._claim(name, store.register)
        return self._modules[name]

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        model: Any = self.__dict__["_model"]  # past PyroModule, whose typing is lost on it
        init = functools.partial(init_where_possible, self._init_loc_fn)
        self._model = (InitMessenger(init)(model[0]),)
        try:
            super()._setup_prototype(*args, **kwargs)
        finally:
            self._model = model
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        names = (
            self._local_names
            or _inside_plates(sites, subsampled=True)
            or _inside_plates(sites, subsampled=False)
        )
        if not names:
            raise ValueError(
                "AmortizedFlow: the model has no latents inside a plate; use AutoFlow"
            )
        stacks = {tuple(sorted(f.name for f in sites[n]["cond_indep_stack"])) for n in names}
        if len(stacks) > 1:
            raise ValueError(
                f"AmortizedFlow: local latents lie in different plates: {sorted(stacks)}"
            )
        self.local_sites = [_LocalSite(sites[n]) for n in sites if n in names]
        self._frames = list(sites[names[0]]["cond_indep_stack"])
        self.local_dim = sum(s.size for s in self.local_sites)
        self.global_dim = 0
        like = sites[names[0]]["value"]
        if len(names) < len(sites):
            guide = AutoFlow(
                poutine.block(self.model, hide=names),
                flow=self._flow,
                init_loc_fn=self._init_loc_fn,
                init_scale=self._init_scale,
            )
            self.global_guide = guide
            self.global_guide.setup(*args, **kwargs)
            self.global_dim = guide.latent_dim
        made = self._local(self.local_dim, self.encoder_dim + self.global_dim)
        self.local_transform = as_bijection(made).to(like)

    def _check_prototype(self, part_trace: poutine.Trace) -> None:
        """Asked by the global guide, whose model is a part of this one: nothing to check."""

    def local_posterior(self, context: Tensor) -> dist.TorchDistribution:
        """Distribution of the unconstrained local latents given a context.

        Args:
            context: Encoded rows and global latents, ``(*batch, encoder_dim + global_dim)``.
        """
        base = dist.Normal(context.new_zeros(self.local_dim), 1.0, validate_args=False).to_event(1)
        transform = self._part("local_transform").condition(context)
        return dist.TransformedDistribution(base, [transform], validate_args=False)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site."""
        self.setup(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result: dict[str, Tensor] = {}
        global_part = None
        if self.global_dim:
            result = dict(self.global_guide(*args, **kwargs))
            global_part = self._flatten_globals(result)
        data = self._inputs(*args, **kwargs)
        with ExitStack() as stack:
            for frame in self._frames:
                stack.enter_context(plates[frame.name])
            depth = max(-frame.dim for frame in self._frames)
            features = self._part("encoder")(self._rows(data, depth))
            context = features if global_part is None else _join(features, global_part)
            latent = pyro.sample(
                f"_{self._pyro_name}_local",
                self.local_posterior(context),
                infer={"is_auxiliary": True},
            )
            start = 0
            for site in self.local_sites:
                u = latent[..., start : start + site.size].reshape(
                    latent.shape[:-1] + site.event_shape
                )
                start += site.size
                transform = biject_to(site.support)
                value = transform(u)
                log_det = transform.log_abs_det_jacobian(u, value)
                log_density = -sum_rightmost(log_det, log_det.dim() - value.dim() + site.event_dim)
                delta = dist.Delta(value, log_density=log_density, event_dim=site.event_dim)
                result[site.name] = pyro.sample(site.name, delta)
        return result

    def _rows(self, data: Tensor, depth: int) -> Tensor:
        """The rows of ``data`` that the plates chose; a batch stays as it is."""
        axes = [(depth + frame.dim, frame) for frame in self._frames]
        if all(data.shape[axis] in (1, self.plates[frame.name].size) for axis, frame in axes):
            return pyro.subsample(data, event_dim=data.dim() - depth)
        return data

    def _flatten_globals(self, values: dict[str, Tensor]) -> Tensor:
        """Unconstrained globals, ``(*particles, *ones, global_dim)``, a one for each plate."""
        parts, batch = [], torch.Size()
        for name, site in self.global_guide.prototype_trace.iter_stochastic_nodes():
            u, value = biject_to(site["fn"].support).inv(values[name]), values[name]
            particles = value.shape[: max(0, value.dim() - site["value"].dim())]
            plates = value.dim() - site["fn"].event_dim - len(particles)
            batch = particles + (1,) * plates if particles.numel() > 1 else torch.Size()
            parts.append(u.reshape(particles.numel(), -1))
        return torch.cat(parts, -1).reshape(batch + (-1,))

    @torch.no_grad()
    def median(self, *args: Any, num_samples: int = 201, **kwargs: Any) -> dict[str, Tensor]:
        """Median of each site over draws at these arguments."""
        with poutine.block():
            draws = [self(*args, **kwargs) for _ in range(num_samples)]
        return {name: torch.stack([d[name] for d in draws]).median(0).values for name in draws[0]}


class _LocalSite:
    """What unpacking needs to know of a local site."""

    def __init__(self, site: dict[str, Any]) -> None:
        self.name, self.support, self.event_dim = (
            site["name"],
            site["fn"].support,
            site["fn"].event_dim,
        )
        with helpful_support_errors(site):
            u = biject_to(self.support).inv(site["value"])
        event_dim = self.event_dim + u.dim() - site["value"].dim()
        self.event_shape = u.shape[u.dim() - event_dim :]
        self.size = math.prod(self.event_shape)


def _inside_plates(sites: dict[str, Any], subsampled: bool) -> list[str]:
    return [
        name
        for name, site in sites.items()
        if any(not subsampled or f.full_size != f.size for f in site["cond_indep_stack"])
    ]


def _join(features: Tensor, global_part: Tensor) -> Tensor:
    """Context of each row: its features and the global latents, ``(*batch, both)``."""
    batch = torch.broadcast_shapes(features.shape[:-1], global_part.shape[:-1])
    return torch.cat(
        [part.expand(batch + part.shape[-1:]) for part in (features, global_part)], -1
    )
