"""AutoFlow: a normalizing flow as the posterior of any Pyro model with continuous latents."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.distributions import Transform, biject_to

from pyroflows import store
from pyroflows.bijection import Bijection, Compose, as_bijection
from pyroflows.guides.latent import LatentDensity, init_where_possible
from pyroflows.guides.prefit import Gaussian, normal_points, prefit
from pyroflows.guides.transport import Transport, posterior_flow

__all__ = ["AutoFlow"]

_INIT = init_to_median(num_samples=101)  # Pyro's 15 draws leave the start a third of a sd away
_FULL_RANK_UP_TO = 300  # latents; beyond, the triangular matrices become diagonal


class AutoFlow(AutoContinuous):
    r"""A flow posterior over all latents of a model, at the right place and scale from the start.

    .. math:: u = \mu + W\,(b + A f(z)), \qquad z \sim N(0, I),

    with u the concatenated unconstrained latents, f a flow that starts as the identity, A
    triangular, and :math:`\mu, W` fixed by a pre-fit (:meth:`prefit`, which :func:`fit_guide`
    calls). Without it :math:`\mu` comes from ``init_loc_fn``, W is the identity and A is
    ``init_scale`` times the identity.

    It is an :class:`~pyro.infer.autoguide.AutoContinuous` and works wherever one does. All
    trainable numbers are one parameter, ``packed``: a step of SVI costs one message.

    Args:
        model: The model. Its latents must be continuous; supports may depend on other sites.
        flow: Callable ``latent_dim -> Bijection``, transform, list of these or Flow; or the name
            of one of :mod:`pyroflows.recipes`; None for the default, :func:`posterior_flow`.
            From noise, which is standard normal, to latents.
        init_loc_fn: Initial value of each site; see :mod:`pyro.infer.autoguide.initialization`.
        init_scale: Initial standard deviation of each unconstrained latent.
        full_rank: Whether A and W are triangular matrices rather than diagonal; up to 300 latents
            if None.
        create_plates: As in :class:`~pyro.infer.autoguide.AutoGuide`, for subsampled plates.
        name: Name in Pyro's param store; the class's if None. One guide of a name at a time.

    Raises:
        ValueError: When the model is first seen: for discrete latents, and for latents inside a
            subsampled plate, which need an amortized guide; the message names the site.

    References:
        Kingma et al. (2016), Improved variational inference with inverse autoregressive flow.
        arXiv:1606.04934
    """

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
        super().__init__(model, init_loc_fn=functools.partial(init_where_possible, init_loc_fn))
        self.create_plates = create_plates
        self._pyro_name = name or self._pyro_name
        self._flow, self._init_scale, self._full_rank = flow, init_scale, full_rank
        self._raw_model, self._init_loc_fn = (model,), init_loc_fn
        self._pending_state: dict[str, Any] | None = None

    # ------------------------------------------------------------------------------------------
    # seeing the model

    def setup(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Run the model once with these arguments, create the parameters, and return self."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        if store.is_loaded(self._pyro_name):
            store.claim(self._pyro_name, self, whole=False, inherit=False)
        return self

    @staticmethod
    def _prototype_hide_fn(msg: dict[str, Any]) -> bool:
        """Leave out what Pyro leaves out, and labels that are marked for enumeration."""
        return prototype_hide_fn(msg) or bool(msg["infer"].get("enumerate"))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        for name, stack in self._cond_indep_stacks.items():
            for frame in stack:
                if frame.full_size is not None and frame.full_size != frame.size:
                    raise ValueError(
                        f"AutoFlow: latent site '{name}' is local to the subsampled plate "
                        f"'{frame.name}' ({frame.size} of {frame.full_size}), so one flow cannot "
                        "hold it. Use AmortizedFlow, or "
                        f"hide the site: AutoFlow(poutine.block(model, hide=['{name}']))"
                    )
        self._moving_supports = self._find_moving_supports(args, kwargs)
        loc = self._init_loc()
        full_rank = (
            self.latent_dim <= _FULL_RANK_UP_TO if self._full_rank is None else self._full_rank
        )
        self.transport = Transport(
            _make_flow(self._flow, self.latent_dim),
            loc,
            init_scale=self._init_scale,
            full_rank=full_rank,
        )
        self._parameters["packed"] = nn.Parameter(self.transport.initial.clone())
        if self.master is None:
            with poutine.block():
                self._create_plates(*args, **kwargs)  # NeuTraReparam asks for them
        if self._pending_state is not None:
            state, self._pending_state = self._pending_state, None
            self.load_state_dict(state)

    def _find_moving_supports(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether supports depend on other sites; then the guide runs the model to know them."""
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        if not any(_has_tensors(site["fn"].support) for site in sites.values()):
            return False
        density = LatentDensity(self._raw_model[0], args, kwargs, init_loc_fn=self._init_loc_fn)
        step = normal_points(1, density.dim, like=density.init_loc, seed=5)[0]
        with torch.no_grad():
            there, here = (density.evaluate(density.init_loc + s * step).supports for s in (1, -1))
        return any(_differ(there[name], here[name]) for name in sites if name in there)

    # ------------------------------------------------------------------------------------------
    # the posterior

    def get_base_dist(self) -> dist.TorchDistribution:
        """Standard normal noise, event shape ``(D,)``."""
        loc = self._modules["transport"].loc
        held = self.__dict__.get("_base")
        if held is None or held[0] is not loc:
            unit = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc), validate_args=False)
            held = self.__dict__["_base"] = (loc, unit.to_event(1))
        return held[1]

    def get_transform(self, *args: Any, **kwargs: Any) -> Bijection:
        """The map from noise to unconstrained latents, with the present parameters."""
        self.setup(*args, **kwargs)
        # past PyroModule's attribute access, which would register every tensor below by itself
        transport, packed = self._modules["transport"], self._parameters["packed"]
        if am_i_wrapped() and self._pyro_context.active:
            store.claim(self._pyro_name, self, whole=False, inherit=False)
            packed = self.packed
        return transport.at(packed)

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """Distribution of the unconstrained latents, event shape ``(D,)``."""
        transform = self.get_transform(*args, **kwargs)
        vector, held = transform._parameters["vector"], self.__dict__.get("_posterior")
        if held is None or held[0] is not vector or held[1] is not transform.loc:
            made = dist.TransformedDistribution(
                self.get_base_dist(), [transform], validate_args=False
            )
            held = self.__dict__["_posterior"] = (vector, transform.loc, made)
        return held[2]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; see :class:`~pyro.infer.autoguide.AutoContinuous`."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        seen = self._run_model(latent, args, kwargs) if self._moving_supports else None
        result = {}
        for site, u in self._unpack_latent(latent):
            name, event_dim = site["name"], site["fn"].event_dim
            transform = biject_to(seen.supports[name] if seen else site["fn"].support)
            value = seen.values[name] if seen else transform(u)
            log_density: Tensor | float = 0.0
            if poutine.get_mask() is not False:
                log_det = transform.log_abs_det_jacobian(u, value)
                log_density = -sum_rightmost(log_det, log_det.dim() - value.dim() + event_dim)
            delta = dist.Delta(value, log_density, event_dim=event_dim, validate_args=False)
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[name]:
                    stack.enter_context(plates[frame.name])
                result[name] = pyro.sample(name, delta)
        return result

    def _run_model(self, latent: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the model at packed latents to see its supports."""
        run = _Seen({site["name"]: u for site, u in self._unpack_latent(latent)})
        with poutine.block(), poutine.mask(mask=False), run:
            self._raw_model[0](*args, **kwargs)
        return run

    def _constrain(
        self, latent: Tensor, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Values of the sites at ``latent``, ``(*batch, D)``; each ``(*batch, *site)``."""
        nesting = max(len(s["fn"].batch_shape) for s in self._sites())
        batch = latent.shape[:-1]
        spread = latent.reshape((-1,) + (1,) * nesting + latent.shape[-1:]) if batch else latent
        if self._moving_supports:
            values = self._run_model(spread, args, kwargs or {}).values
        else:
            values = {
                s["name"]: biject_to(s["fn"].support)(u) for s, u in self._unpack_latent(spread)
            }
        return {
            s["name"]: values[s["name"]].reshape(batch + s["value"].shape) for s in self._sites()
        }

    def _sites(self) -> list[dict[str, Any]]:
        return [site for _, site in self.prototype_trace.iter_stochastic_nodes()]

    # ------------------------------------------------------------------------------------------
    # pre-fit

    def density(self, *args: Any, **kwargs: Any) -> LatentDensity:
        """The model's log-density on the flat vector that this guide's flow describes."""
        self.setup(*args, **kwargs)
        names = [site["name"] for site in self._sites()]
        model, init = self._raw_model[0], self._init_loc_fn
        centre = self._modules["transport"].loc.clone()
        return LatentDensity(model, args, kwargs, init_loc_fn=init, names=names, centre=centre)

    def place(self, gaussian: Gaussian) -> None:
        """Start anew from a Gaussian: W and the location become its, A and f the identity."""
        transport = self._modules["transport"]
        transport.whiten(gaussian.loc, gaussian.scale_tril)
        D = self.latent_dim
        start = transport.initial.clone()
        start[len(transport.parts) + D : len(transport.parts) + 2 * D] = 0.0
        with torch.no_grad():
            self._parameters["packed"].copy_(start)

    def prefit(self, *args: Any, **kwargs: Any) -> Gaussian:
        """Fit a Gaussian (:func:`pyroflows.guides.prefit.prefit`) and start the flow from it."""
        self.setup(*args, **kwargs)
        transport, density = self._modules["transport"], self.density(*args, **kwargs).frozen()
        best, _, _ = prefit(density, transport.loc, full_rank=transport.full_rank)
        self.place(best)
        return best

    # ------------------------------------------------------------------------------------------
    # using the posterior

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Independent draws of every site, ``(num_samples, *site)``."""
        self.setup(*args, **kwargs)
        return self._constrain(self.get_posterior().sample((num_samples,)), args, kwargs)

    def log_prob(self, values: Mapping[str, Tensor] | Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Log-density of the guide at points from anywhere, shape batch.

        Args:
            values: A dict of constrained values ``(*batch, *site)`` with every latent site, giving
                the density of the constrained values; or a tensor of unconstrained latents
                ``(*batch, D)``, giving theirs.
            *args: Arguments of the model, needed if supports depend on other sites.
            **kwargs: Its keyword arguments.
        """
        self.setup(*args, **kwargs)
        if isinstance(values, Tensor):
            return self.get_posterior().log_prob(values)
        missing = [s["name"] for s in self._sites() if s["name"] not in values]
        if missing:
            raise ValueError(
                f"AutoFlow.log_prob needs a value for every latent site; missing: {missing}"
            )
        supports: Mapping[str, Any] = {s["name"]: s["fn"].support for s in self._sites()}
        if self._moving_supports:
            run = _Seen({}, values)
            with poutine.block(), poutine.mask(mask=False), run:
                self._raw_model[0](*args, **kwargs)
            supports = run.supports
        parts, log_det = [], 0.0
        for site in self._sites():
            value, transform = values[site["name"]], biject_to(supports[site["name"]])
            batch = value.shape[: value.dim() - site["value"].dim()]
            u = transform.inv(value)
            log_det = log_det + transform.log_abs_det_jacobian(u, value).reshape(
                batch + (-1,)
            ).sum(-1)
            parts.append(u.reshape(batch + (-1,)))
        return self.get_posterior().log_prob(torch.cat(parts, -1)) - log_det

    @torch.no_grad()
    def _deviations(self) -> Tensor:
        """Draws of u − μ, symmetric in z, so that symmetric posteriors have exact medians."""
        transport = self._modules["transport"]
        z = normal_points(2048, self.latent_dim, like=transport.loc)
        v, _ = transport.from_base(
            self._parameters["packed"], torch.cat([z, torch.zeros_like(z[:1]), -z])
        )
        return transport.spread(v)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Medians and standard deviations of the unconstrained latents, ``(D,)`` each."""
        deviations = self._deviations()
        return self._modules["transport"].loc + deviations.median(0).values, deviations.std(0)

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
            For each site a tensor ``(len(quantiles), *site)``.
        """
        self.setup(*args, **kwargs)
        deviations = self._deviations()
        ranks = torch.as_tensor(quantiles, dtype=torch.float64).flatten() * (len(deviations) - 1)
        ordered = deviations.sort(0).values
        below = ranks.floor().long()
        weight = (ranks - below).to(ordered).unsqueeze(-1)
        at = ordered[below].lerp(ordered[(below + 1).clamp(max=len(ordered) - 1)], weight)
        return self._constrain(self._modules["transport"].loc + at, args, kwargs)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior median of each latent site; see :meth:`quantiles`."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    # ------------------------------------------------------------------------------------------
    # copies

    def __getstate__(self) -> dict[str, Any]:
        kept = self._model, self.master
        state = dict(super().__getstate__())
        self.__dict__.update(
            _model=kept[0], master=kept[1]
        )  # Pyro's takes the model away from the original
        state.update(_model=None, _raw_model=None, master=None)
        for memory in ("_base", "_posterior"):
            state.pop(memory, None)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlow:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new.__dict__.update(_model=self._model, _raw_model=self._raw_model)
        return new

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any
    ) -> None:
        if self.prototype_trace is None:  # kept for when the model is seen
            own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
            self._pending_state = own or None
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Seen(poutine.messenger.Messenger):
    """Give latents their values while the model runs, and remember their supports."""

    def __init__(
        self, unconstrained: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.unconstrained, self.values = unconstrained, dict(values or {})
        self.supports: dict[str, Any] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if name in self.unconstrained:
            self.values[name] = biject_to(msg["fn"].support)(self.unconstrained[name])
        if name in self.values:
            msg["value"], self.supports[name] = self.values[name], msg["fn"].support


def _make_flow(flow: Callable[[int], Any] | str | None, latent_dim: int) -> Bijection:
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


def _tensors(support: Any) -> list[Tensor]:
    """Bounds of a constraint, those of its base included."""
    found = []
    for value in vars(support).values():
        if isinstance(value, Tensor):
            found.append(value)
        elif hasattr(value, "check"):
            found += _tensors(value)
    return found


def _has_tensors(support: Any) -> bool:
    return bool(_tensors(support))


def _differ(one: Any, other: Any) -> bool:
    return any(
        a.shape != b.shape or not torch.equal(a, b)
        for a, b in zip(_tensors(one), _tensors(other), strict=True)
    )
