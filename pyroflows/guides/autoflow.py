"""AutoFlow: a normalizing flow as the posterior of any Pyro model with continuous latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

from pyroflows import store
from pyroflows.bijection import Bijection
from pyroflows.compose import Compose
from pyroflows.guides.gaussian import FULL_RANK_UP_TO, Gaussian, normal_points
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.legacy import upgrade_pickle, upgrade_state
from pyroflows.guides.local import LocalNormals
from pyroflows.guides.mixture import Mixture, Noise
from pyroflows.guides.posterior import FlowPosterior, make_flow
from pyroflows.guides.prefit import prefit
from pyroflows.guides.saving import SavedGuide
from pyroflows.guides.sites import Placed, Sites
from pyroflows.guides.transport import Whitening, make_transport, start_vector

__all__ = ["AutoFlow"]

_INIT = init_to_median(num_samples=101)  # Pyro's 15 draws leave the start a third of a sd away


class AutoFlow(SavedGuide, AutoContinuous):
    r"""A flow posterior over all latents of a model, at the right place and scale from the start.

    .. math:: u = \mu + W\,(b + A f(z)), \qquad z \sim N(0, I),

    with u the concatenated unconstrained latents, f a flow that starts as the identity, A
    triangular, and :math:`\mu, W` fixed by a pre-fit (:meth:`prefit`, which :func:`fit_guide`
    calls). Without it :math:`\mu` comes from ``init_loc_fn``, W is the identity and A is
    ``init_scale`` times the identity.

    It is an :class:`~pyro.infer.autoguide.AutoContinuous` and works wherever one does. All
    trainable numbers are one parameter, ``packed``: a step of SVI costs one message.

    Latents inside a subsampled plate are not the flow's: each row of the whole plate has a normal
    of its own, linear in the flow's noise (:class:`~pyroflows.guides.local.LocalNormals`), which
    costs parameters in proportion to the plate. An :class:`AmortizedFlow` learns a network
    instead.

    Args:
        model: The model. Its latents must be continuous; supports may depend on other sites.
        flow: Callable ``latent_dim -> Bijection``, transform, list of these or Flow; or the name
            of one of :mod:`pyroflows.recipes`; None for the default,
            :func:`~pyroflows.recipes.posteriors.posterior_flow`.
            From noise, which is standard normal, to latents.
        init_loc_fn: Initial value of each site; see :mod:`pyro.infer.autoguide.initialization`.
        init_scale: Initial standard deviation of each unconstrained latent.
        full_rank: Whether A and W are triangular matrices rather than diagonal; up to 300 latents
            if None.
        create_plates: As in :class:`~pyro.infer.autoguide.AutoGuide`, for subsampled plates.
        name: Name in Pyro's param store; the class's if None. One guide of a name at a time.

    Raises:
        ValueError: When the model is first seen, for discrete latents; the message names the site.

    References:
        Kingma et al. (2016), Improved variational inference with inverse autoregressive flow.
        arXiv:1606.04934
    """

    local: Any  #: the :class:`LocalNormals` of subsampled plates, or None

    def __init__(
        self,
        model: Callable,
        *,
        flow: Callable[[int], Any] | str | None = None,
        init_loc_fn: Callable = _INIT,
        init_scale: float = 0.1,
        full_rank: bool | None = None,
        create_plates: Callable | None = None,
        name: str | None = None,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"AutoFlow: init_scale must be positive; got {init_scale}")
        super().__init__(model, init_loc_fn=init_loc_fn, create_plates=create_plates, name=name)
        self._flow, self._init_scale, self._full_rank = flow, init_scale, full_rank
        self.latent_dim, self.local = 0, None

    # ------------------------------------------------------------------------------------------
    # seeing the model

    def _adopt(self) -> None:
        if store.is_loaded(self._pyro_name):
            store.claim(self._pyro_name, self, whole=False, inherit=False)

    @staticmethod
    def _prototype_hide_fn(msg: dict[str, Any]) -> bool:
        """Leave out what Pyro leaves out, and labels that are marked for enumeration."""
        return prototype_hide_fn(msg) or bool(msg["infer"].get("enumerate"))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self._see(*args, **kwargs)
        self.latent_dim = self.flow_sites.dim
        if self.flow_sites:
            self._make_transport(self.flow_sites.start(self.prototype_trace))
        local = Sites(site for site in self.sites if site.subsampled)
        if local:
            start = local.split(local.start(self.prototype_trace))
            self.local = LocalNormals(local, start, self._init_scale, self.latent_dim)
        self._find_moving(self.sites, args, kwargs)
        if self.master is None:
            with poutine.block():
                self._create_plates(*args, **kwargs)  # NeuTraReparam asks for them

    @property
    def holds_all(self) -> bool:
        """Whether one flow holds every latent: none is local to a subsampled plate."""
        return bool(self.flow_sites) and not self._follows_plates

    @property
    def flow_sites(self) -> Sites:
        """The layout of the flow's vector: all latents but those of subsampled plates."""
        return self._layout("flow", lambda: Sites(s for s in self.sites if not s.subsampled))

    def _make_transport(self, loc: Tensor) -> None:
        full_rank = len(loc) <= FULL_RANK_UP_TO if self._full_rank is None else self._full_rank
        flow = make_flow(self._flow, len(loc))
        transport = make_transport(flow, loc, init_scale=self._init_scale, full_rank=full_rank)
        self._parameters["packed"] = transport[0].release()  # not what the store has of that name
        self._modules.update(transport=transport, noise=Noise(loc))

    # ------------------------------------------------------------------------------------------
    # the posterior

    def get_base_dist(self) -> dist.TorchDistribution:
        """The noise, event shape ``(D,)``: standard normal, or a mixture that a pre-fit found."""
        return self.noise.distribution()

    # Past PyroModule's attribute access, which would register every tensor below by itself:

    @property
    def vector(self) -> nn.Parameter:
        """All trainable numbers of the flow, ``(P,)``: the parameter ``packed``."""
        return self._parameters["packed"]

    @property
    def noise(self) -> Noise:
        """Where the flow begins."""
        return self._modules["noise"]

    @property
    def transport(self) -> Compose:
        """The map from noise to unconstrained latents: a packed flow, then a fixed affine map."""
        return self._whole()[0]

    @property
    def has_default_flow(self) -> bool:
        """Whether the flow is the default one."""
        return self._flow is None

    @property
    def whitening(self) -> Whitening:
        """The fixed part of the map, which a pre-fit sets."""
        return self._whole()[1]

    def _whole(self) -> tuple[Compose, Whitening]:
        """The map with its vector, made once, and its fixed part."""
        key, held = (self.vector, self.training), self.__dict__.get("_made")
        if held is None or held[0][0] is not key[0] or held[0][1] is not key[1]:
            packed, whitening = self._modules["transport"]
            whole = Compose([packed.at(self.vector), whitening])
            held = self.__dict__["_made"] = (key, (whole, whitening))
        return held[1]

    def get_transform(self, *args: Any, **kwargs: Any) -> Bijection:
        """The map from noise to unconstrained latents, with the present parameters."""
        self.setup(*args, **kwargs)
        if not self.latent_dim:
            raise RuntimeError(
                "AutoFlow: the model has no latents outside of subsampled plates, so there is no "
                "flow"
            )
        if self._claim():
            _ = self.packed  # tells Pyro
        return self.transport

    def _claim(self) -> bool:
        """Within inference, make the name in Pyro's store this guide's; whether it is."""
        if not (am_i_wrapped() and self._pyro_context.active):
            return False
        if "local" in self._modules:
            store.claim(self._pyro_name, self, whole=False, inherit=False)
        elif not self._is_claimed():
            store.claim(self._pyro_name, self, whole=False, inherit=False)
            self.__dict__["_claimed"] = self._claims()
        return True

    def _claims(self) -> tuple[Tensor, ...]:
        """What tells whether the guide is as it was when it claimed its name."""
        return self.vector, self.whitening.loc, self.noise.locs

    def _is_claimed(self) -> bool:
        """Whether a claim would change nothing: it is a walk through all modules."""
        pairs = zip(self.__dict__.get("_claimed", ()), self._claims(), strict=False)
        same = [a is b for a, b in pairs]
        return bool(same) and all(same) and store.holds(f"{self._pyro_name}.packed", self.vector)

    @property
    def transform(self) -> Bijection:
        """The map from noise to unconstrained latents; see :meth:`get_transform`."""
        return self.get_transform()

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """Distribution of the unconstrained latents, event shape ``(D,)``."""
        key = self.get_base_dist(), self.get_transform(*args, **kwargs)
        held = self.__dict__.get("_posterior")
        if held is None or any(a is not b for a, b in zip(key, held[0], strict=True)):
            made = FlowPosterior(key[0], [key[1]], validate_args=False)
            held = self.__dict__["_posterior"] = (key, made)
        return held[1]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; see :class:`~pyro.infer.autoguide.AutoContinuous`."""
        return self.draw(*args, **kwargs)[0]

    def draw(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Tensor], Tensor | None]:
        """Sample every latent site; return also the flow's vector, ``(*particles, D)``."""
        self.setup(*args, **kwargs)
        latent = self.sample_latent(*args, **kwargs) if self.latent_dim else None
        plates = self._create_plates(*args, **kwargs)
        unconstrained = {} if latent is None else self.flow_sites.split(latent)
        if self.local is not None:
            unconstrained.update(self._draw_local(latent, plates))
        places = self._places(unconstrained, plates, args, kwargs)
        result = {}
        for site in self.sites:
            with ExitStack() as stack:
                for frame in site.plates:
                    stack.enter_context(plates[frame.name])
                result[site.name] = pyro.sample(site.name, places[site.name])
        return result, latent

    def _draw_local(self, latent: Tensor | None, plates: Mapping[str, Any]) -> dict[str, Tensor]:
        """Unconstrained latents of the rows in the subsampled plates, given the flow's vector."""
        z = None if latent is None else self.get_posterior().transforms[0].inv(latent)
        self._claim()
        drawn, local = {}, self.local
        for site in local.sites:
            with ExitStack() as stack:
                for frame in site.plates:
                    stack.enter_context(plates[frame.name])
                drawn[site.name] = pyro.sample(
                    f"{site.name}_unconstrained",
                    local.posterior(site.name, z),
                    infer={"is_auxiliary": True},
                )
        return drawn

    def _places(
        self,
        unconstrained: Mapping[str, Tensor],
        plates: Mapping[str, Any],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Mapping[str, Placed]:
        """Each site's value and log-Jacobian; by a run of the model if supports move."""
        if not self._moving:
            return {site.name: site.delta(unconstrained[site.name]) for site in self.sites}
        rows = {}
        for name, plate in plates.items():
            with plate as index:
                rows[name] = index
        return self._model_supports.places(self.raw_model, args, kwargs, unconstrained, {}, rows)

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """As Pyro's reparametrizers ask: messages and unconstrained values."""
        for name, u in self.flow_sites.split(latent).items():
            yield self.prototype_trace.nodes[name], u

    def _constrain(
        self, latent: Tensor, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Values of the shared sites at ``latent``, ``(*batch, D)``; each ``(*batch, *site)``."""
        if not self.latent_dim:
            return {}
        sites, batch = self.flow_sites, latent.shape[:-1]
        flat = latent.reshape(-1, self.latent_dim)
        if self._moving:
            with poutine.block():
                values = self.density(*args, **(kwargs or {})).constrain(flat)
        else:
            nesting = max(len(site.batch_shape) for site in sites)
            spread = flat.reshape(len(flat), *(1,) * nesting, self.latent_dim)
            values = {n: sites.named[n].bijection()(u) for n, u in sites.split(spread).items()}
        return {s.name: values[s.name].reshape(batch + s.value_shape) for s in sites}

    # ------------------------------------------------------------------------------------------
    # pre-fit

    def density(self, *args: Any, **kwargs: Any) -> LatentDensity:
        """The model's log-density on the flat vector that this guide's flow describes."""
        self.setup(*args, **kwargs)
        return self.density_of(self.raw_model, args, kwargs)

    def density_of(self, model: Callable, args: tuple, kwargs: dict[str, Any]) -> LatentDensity:
        """A model's log-density on the flat vector that this guide's flow describes.

        Raises:
            ValueError: If the guide's latents are not sites of the model, in the same shapes.
        """
        if not self.latent_dim:
            raise RuntimeError("AutoFlow: the model has no latents that the flow holds")
        centre = self.whitening.loc.clone()
        own = {s.name: s.value_shape for s in self.flow_sites}
        density = self._density(model, args, kwargs, list(own), centre)
        found = {s.name: s.value_shape for s in density.sites}
        if list(found.items()) != list(own.items()):
            raise ValueError(
                f"the guide was made for another model: it has the latents {own}, and the model "
                f"has {found}. Make the guide of this model: AutoFlow(model)"
            )
        return density

    def place(self, found: Gaussian | Mixture) -> None:
        """Start anew from a Gaussian: W and the location become its, A and f the identity.

        Or from a mixture, whose components become those of the noise.
        """
        if isinstance(found, Mixture):
            loc, scale, mixture = found.whitened()
        else:
            loc, scale, mixture = found.loc, found.scale_tril, None
        self.whitening.fill(loc, scale)
        self.noise.fill(mixture)
        with torch.no_grad():
            self.vector.copy_(start_vector(self.transport))

    def prefit(self, *args: Any, **kwargs: Any) -> Gaussian:
        """Fit a Gaussian (:func:`pyroflows.guides.prefit.prefit`) and start the flow from it."""
        self.setup(*args, **kwargs)
        density = self.density(*args, **kwargs).frozen()
        best, _, _ = prefit(density, self.whitening.loc, full_rank=self.whitening.full_rank)
        self.place(best)
        return best

    # ------------------------------------------------------------------------------------------
    # using the posterior

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Independent draws of every site, ``(num_samples, *site)``; of all rows of a plate."""
        self.setup(*args, **kwargs)
        z = self.get_base_dist().sample((num_samples,)) if self.latent_dim else None
        values = {} if z is None else self._constrain(self.get_transform()(z), args, kwargs)
        for name in self.local or ():
            self._check_still(name)
            values[name] = self.local.sample(name, num_samples, z)
        return self._ordered(values)

    def _ordered(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: values[name] for name in self.sites.named}

    def log_prob(self, values: Mapping[str, Tensor] | Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Log-density of the guide at points from anywhere, shape batch.

        Args:
            values: A dict of constrained values ``(*batch, *site)`` with every latent site, giving
                the density of the constrained values; or a tensor of unconstrained latents
                ``(*batch, D)``, giving theirs. Sites of subsampled plates come with all rows.
            *args: Arguments of the model, needed if supports depend on other sites.
            **kwargs: Its keyword arguments.

        Raises:
            ValueError: If the value of a latent site is missing, or has a wrong shape.
        """
        self.setup(*args, **kwargs)
        if isinstance(values, Tensor):
            return self.get_posterior().log_prob(values)
        missing = [name for name in self.sites.named if name not in values]
        if missing:
            raise ValueError(
                f"AutoFlow.log_prob needs a value for every latent site; missing: {missing}"
            )
        total: Any = 0.0
        z = None
        if self.latent_dim:
            u, log_det = self._unconstrain(values, args, kwargs)
            z, log_det_noise = self.get_transform().inverse_and_log_det(u)
            total = self.get_base_dist().log_prob(z) + log_det_noise - log_det
        for name in self.local or ():
            self._check_still(name)
            total = total + self.local.log_prob(name, values[name], z)
        return total

    def _check_still(self, name: str) -> None:
        if name in self._moving:
            raise NotImplementedError(
                f"the support of '{name}' depends on other sites, and the site lies in a "
                "subsampled plate: only the model's own rows are known. Use "
                "Predictive(model, guide=guide)"
            )

    def _unconstrain(
        self, values: Mapping[str, Tensor], args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The flow's vector ``(*batch, D)`` of values, and log|det| of constraining it."""
        sites = self.flow_sites
        for site in sites:
            got = tuple(values[site.name].shape)
            if got[len(got) - len(site.value_shape) :] != site.value_shape:
                raise ValueError(
                    f"site '{site.name}' has shape {site.value_shape}; got a value of shape {got}"
                )
        first = values[sites[0].name]
        batch = first.shape[: first.dim() - len(sites[0].value_shape)]
        flat = {s.name: values[s.name].reshape(-1, *s.value_shape) for s in sites}
        u, log_det = self._origins(flat, args, kwargs)
        return u.reshape(*batch, -1), log_det.reshape(batch)

    def _origins(
        self, flat: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The vectors and log-Jacobians of values ``(S, *site)``, read at once or one by one."""
        if not self._moving:
            return self.flow_sites.unconstrain(flat)
        count = max(len(v) for v in flat.values())
        pieces = [flat]
        if count > 1 and not self.density(*args, **kwargs).vectorizes:
            pieces = [{n: v[i : i + 1] for n, v in flat.items()} for i in range(count)]
        read = self._model_supports.origins
        found = [read(self.raw_model, args, kwargs, piece) for piece in pieces]
        u, log_det = zip(*found, strict=True)
        return torch.cat(u), torch.cat(log_det)

    @torch.no_grad()
    def _deviations(self) -> Tensor:
        """Draws of u − μ, symmetric in z, so that symmetric posteriors have exact medians."""
        packed, whitening = self.transport
        z = normal_points(2048, self.latent_dim, like=whitening.loc)
        z = torch.cat([z, torch.zeros_like(z[:1]), -z])
        v, _ = packed.forward_and_log_det(self.noise.points(z))
        return whitening.spread(v)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Medians and standard deviations of the unconstrained latents, ``(D,)`` each."""
        deviations = self._deviations()
        return self.whitening.loc + deviations.median(0).values, deviations.std(0)

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Posterior quantiles of each latent.

        Marginal ones of the unconstrained values, mapped to the support.

        Args:
            quantiles: Levels between 0 and 1.
            *args: Arguments of the model, needed if supports depend on other sites.
            **kwargs: Its keyword arguments.

        Returns:
            For each site ``(len(quantiles), *site)``, with all rows of a subsampled plate.
        """
        self.setup(*args, **kwargs)
        levels = torch.as_tensor(quantiles, dtype=torch.float64).flatten()
        values = {}
        if self.latent_dim:
            deviations = self._deviations()
            ranks = levels * (len(deviations) - 1)
            ordered = deviations.sort(0).values
            below = ranks.floor().long()
            weight = (ranks - below).to(ordered).unsqueeze(-1)
            at = ordered[below].lerp(ordered[(below + 1).clamp(max=len(ordered) - 1)], weight)
            values = self._constrain(self.whitening.loc + at, args, kwargs)
        for name in self.local or ():
            self._check_still(name)
            values[name] = self.local.quantiles(name, levels)
        return self._ordered(values)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior median of each latent site; see :meth:`quantiles`."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    # ------------------------------------------------------------------------------------------
    # copies

    @property
    def _functions(self) -> tuple[str, ...]:
        return *super()._functions, "_flow"

    def _whole_state(self) -> dict[str, Any]:
        state = super()._whole_state()
        for memory in ("_made", "_posterior", "_claimed"):
            state.pop(memory, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        upgrade_pickle(state, _modules_of)
        super().__setstate__(state)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        upgrade_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _modules_of(flow: Any, loc: Tensor, full_rank: bool) -> dict[str, nn.Module]:
    """The modules of a guide, without the vector."""
    transport = make_transport(flow, loc, full_rank=full_rank)
    transport[0].release()
    return {"transport": transport, "noise": Noise(loc)}
