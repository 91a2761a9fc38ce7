"""Guides for local latents: a flow for the global ones, a conditional flow for each row's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_median
from pyro.nn import PyroModule
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

from pyroflows import store
from pyroflows.bijection import Bijection
from pyroflows.compose import as_bijection
from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.saving import SavedGuide
from pyroflows.guides.sites import Site, Sites
from pyroflows.guides.substitute import Substitute
from pyroflows.recipes.posteriors import local_flow

__all__ = ["AmortizedFlow", "local_flow"]


class AmortizedFlow(SavedGuide):
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
        create_plates: As in :class:`~pyro.infer.autoguide.AutoGuide`. Not needed for batches of
            varying size, nor for rows that the model's arguments choose: see
            :meth:`SavedGuide._create_plates` for what that costs.
        name: As in :class:`AutoFlow`.

    Raises:
        ValueError: When the model is first seen, if it has no local latents or they lie in
            different plates; at any call, if data or features do not have the plates' rows.

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
        super().__init__(model, init_loc_fn=init_loc_fn, create_plates=create_plates, name=name)
        self.encoder, self.encoder_dim = encoder, encoder_dim
        self._inputs, self._init_scale = inputs or _first_argument, init_scale
        self._flow, self._local, self._local_names = flow, local or local_flow, local_names

    def attach(self, model: Callable) -> AmortizedFlow:
        """Give the guide, one from a file say, its model; return self."""
        super().attach(model)
        if "global_guide" in self._modules:
            self._modules["global_guide"].attach(poutine.block(model, hide=self._names))
        return self

    @property
    def _follows_plates(self) -> bool:
        return True

    @property
    def _functions(self) -> tuple[str, ...]:
        return *super()._functions, "_inputs", "_flow", "_local"

    def _adopt(self) -> None:
        for name in ("encoder", "local_transform"):
            if store.is_loaded(f"{self._pyro_name}.{name}"):
                self._claim(name, store.claim)

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
        self._see(*args, **kwargs)
        self._names = names = self._find_local()
        self._frames = list(self.sites.named[names[0]].plates)
        self.local_dim, self.global_dim = self.local_sites.dim, 0
        if len(names) < len(self.sites):
            self.global_guide = AutoFlow(
                poutine.block(self.raw_model, hide=names),
                flow=self._flow,
                init_loc_fn=self._init_loc_fn,
                init_scale=self._init_scale,
            )
            self.global_guide.setup(*args, **kwargs)
            self.global_dim = self.global_guide.latent_dim
        self._find_moving(self.local_sites, args, kwargs)
        made = self._local(self.local_dim, self.encoder_dim + self.global_dim)
        like = self.prototype_trace.nodes[names[0]]["value"]
        self.local_transform = as_bijection(made).to(like)

    @property
    def local_sites(self) -> Sites:
        """The layout of a row's local latents."""
        return self._layout("rows", lambda: self.sites.only(self._names).of_rows())

    def _find_local(self) -> list[str]:
        sites = self.sites.named
        names = (
            self._local_names
            or [s.name for s in self.sites if s.subsampled]
            or [s.name for s in self.sites if s.plates]
        )
        unknown = [n for n in names if n not in sites]
        if unknown:
            raise ValueError(
                f"AmortizedFlow: local_names {unknown} are no latents; there are {list(sites)}"
            )
        if not names:
            raise ValueError(
                "AmortizedFlow: the model has no latents inside a plate; use AutoFlow"
            )
        stacks = {tuple(sorted(f.name for f in sites[n].plates)) for n in names}
        if len(stacks) > 1 or () in stacks:
            raise ValueError(
                f"AmortizedFlow: local latents lie in different plates: {sorted(stacks)}"
            )
        return [n for n in sites if n in names]

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
        shared = None
        if self.global_dim:
            result, shared = self.global_guide.draw(*args, **kwargs)
        rows = {}
        with ExitStack() as stack:
            for frame in self._frames:
                rows[frame.name] = stack.enter_context(plates[frame.name])
            latent = pyro.sample(
                f"_{self._pyro_name}_local",
                self.local_posterior(self._context(shared, args, kwargs)),
                infer={"is_auxiliary": True},
            )
        if self._moving:
            unconstrained = self.local_sites.split(latent)
            places = self._model_supports.places(
                self.raw_model, args, kwargs, unconstrained, result, rows
            )
        else:
            places = self.local_sites.deltas(latent)
        with ExitStack() as stack:
            for frame in self._frames:
                stack.enter_context(plates[frame.name])
            for site in self.local_sites:
                result[site.name] = pyro.sample(site.name, places[site.name])
        return {name: result[name] for name in self.sites.named}

    def _context(self, shared: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """What the local flow sees, inside the plates: features and the global vector."""
        depth = max(-frame.dim for frame in self._frames)
        rows = self._rows(self._inputs(*args, **kwargs), depth)
        features = self._part("encoder")(rows)
        sizes = {f.dim: self.plates[f.name].subsample_size for f in self._frames}
        expected = (*(sizes.get(dim, 1) for dim in range(-depth, 0)), self.encoder_dim)
        got = tuple(features.shape[-1 - depth :])
        if (
            len(got) != len(expected)
            or any(a not in (1, b) for a, b in zip(got[:-1], expected[:-1], strict=True))
            or got[-1] != expected[-1]
        ):
            raise ValueError(
                f"AmortizedFlow: for data of shape {tuple(rows.shape)} the encoder gave features "
                f"of shape {tuple(features.shape)}; expected {expected}: the plates, then "
                "encoder_dim"
            )
        return features if shared is None else _join(features, shared)

    def _rows(self, data: Tensor, depth: int) -> Tensor:
        """The rows of ``data`` that the plates chose; a batch stays as it is."""
        if not isinstance(data, Tensor) or data.dim() < depth:
            raise ValueError(
                "AmortizedFlow: the data to encode must be a tensor whose leading "
                f"{depth} axes are the plates'; got "
                f"{tuple(data.shape) if isinstance(data, Tensor) else type(data).__name__}. "
                "Say with inputs= where it is among the model's arguments"
            )
        sizes = {f: data.shape[depth + f.dim] for f in self._frames}
        plates = {f: self.plates[f.name] for f in self._frames}
        if all(n in (1, plates[f].size) for f, n in sizes.items()):
            return pyro.subsample(data, event_dim=data.dim() - depth)
        for frame, n in sizes.items():
            if n not in (1, plates[frame].subsample_size):
                raise ValueError(
                    f"AmortizedFlow: plate '{frame.name}' has {plates[frame].size} rows, of which "
                    f"the model takes {plates[frame].subsample_size}; the data to encode has {n}"
                )
        return data

    # ------------------------------------------------------------------------------------------
    # using the posterior

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of every site, ``(num_samples, *site)``, all of the same rows of the plates."""
        self.setup(*args, **kwargs)
        with poutine.block():
            plates = self._create_plates(*args, **kwargs)
            rows = {}
            for name, plate in plates.items():
                with plate as index:
                    rows[name] = index
            nesting = max(-frame.dim for frame in self._prototype_frames.values())
            draws = pyro.plate("_draws", num_samples, dim=-1 - nesting)
            with Substitute(rows=rows), draws:
                values = self(*args, **kwargs)
        found = {}
        for name, value in values.items():
            lead = value.dim() - len(self.sites.named[name].value_shape)
            found[name] = value.reshape(num_samples, *value.shape[lead:]) if lead else value
        return found

    @torch.no_grad()
    def quantiles(
        self,
        quantiles: Sequence[float] | Tensor,
        *args: Any,
        num_samples: int = 1001,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Quantiles of each site over draws at these arguments, ``(len(quantiles), *site)``."""
        draws = self.sample_posterior(num_samples, *args, **kwargs)
        return {
            name: torch.quantile(d, torch.as_tensor(quantiles).to(d), dim=0)
            for name, d in draws.items()
        }

    def median(self, *args: Any, num_samples: int = 201, **kwargs: Any) -> dict[str, Tensor]:
        """Median of each site over draws at these arguments."""
        draws = self.sample_posterior(num_samples, *args, **kwargs)
        return {name: d.median(0).values for name, d in draws.items()}


_LocalSite = Site  # what old pickles call it


def _first_argument(*args: Any, **kwargs: Any) -> Tensor:
    if not args:
        raise ValueError(
            "AmortizedFlow encodes the model's first argument, and there is none by position: say "
            "with inputs= what to encode"
        )
    return args[0]


def _join(features: Tensor, global_part: Tensor) -> Tensor:
    """Context of each row: its features and the global latents, ``(*batch, both)``."""
    batch = torch.broadcast_shapes(features.shape[:-1], global_part.shape[:-1])
    return torch.cat(
        [part.expand(batch + part.shape[-1:]) for part in (features, global_part)], -1
    )
