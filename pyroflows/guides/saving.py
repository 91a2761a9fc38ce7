"""What the flow guides share: seeing the model once, its plates, and copies that stay whole."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import pickle
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from pyro.nn import PyroModule
from torch import Tensor

from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.legacy import upgrade_layouts
from pyroflows.guides.plates import PlateSize, PlateSizes
from pyroflows.guides.references import Lost, Reference
from pyroflows.guides.sites import (
    Sites,
    bijection_of,
    detached,
    init_where_possible,
    teach_divergence,
)
from pyroflows.guides.supports import ModelSupports, moving_supports

__all__ = ["SavedGuide"]


class SavedGuide(AutoGuide):
    """A guide that sees its model once, and that pickle, joblib and ``state_dict`` keep whole.

    A pickled guide needs no arguments of the model to draw and to score. Its model comes along if
    it is a function of a module that can be imported; else :meth:`attach` gives it back, and so
    does whatever takes both, as ``fit_guide`` and ``diagnose`` do. A ``state_dict`` may be loaded
    before the model was seen; it then waits for :meth:`setup`.

    Args:
        model: The model.
        init_loc_fn: Initial value of each site; see :mod:`pyro.infer.autoguide.initialization`.
        create_plates: As in :class:`~pyro.infer.autoguide.AutoGuide`.
        name: Name in Pyro's parameter store; that of the class if None.
    """

    prototype_trace: Any
    _init_loc_fn: Callable
    _pending_state: dict[str, Any] | None

    def __init__(
        self,
        model: Callable,
        *,
        init_loc_fn: Callable,
        create_plates: Callable | None,
        name: str | None,
    ) -> None:
        teach_divergence()
        AutoGuide.__init__(self, model, create_plates=create_plates)
        self._pyro_name: str = name or self._pyro_name
        self._init_loc_fn, self._pending_state = init_loc_fn, None
        self._plate_sizes = PlateSizes()
        self.attach(model)

    # ------------------------------------------------------------------------------------------
    # the model

    @property
    def model(self) -> Callable:
        """The model, with its latents set to their initial values.

        Raises:
            RuntimeError: If the guide was loaded and its model could not be saved with it.
        """
        if self.__dict__.get("_model") is None:
            raise RuntimeError(
                f"this {type(self).__name__} was loaded from a file without its model: give it "
                "back with guide.attach(model)"
            )
        return self.__dict__["_model"][0]

    @property
    def raw_model(self) -> Callable:
        """The model as it was given; raises as :attr:`model`."""
        _ = self.model
        return self.__dict__["_raw_model"][0]

    @property
    def attached(self) -> bool:
        """Whether the guide has its model; one from a file may lack it."""
        return self.__dict__.get("_model") is not None

    def attach(self, model: Callable) -> Self:
        """Give the guide, one from a file say, its model; return self."""
        init = functools.partial(init_where_possible, self._init_loc_fn)
        self._model, self._raw_model = (InitMessenger(init)(model),), (model,)
        return self

    def remember(self, model: Callable) -> Self:
        """Attach the model if the guide lost its own; return self."""
        return self if self.attached else self.attach(model)

    def setup(self, *args: Any, **kwargs: Any) -> Self:
        """Run the model once with these arguments, create the parameters, and return self.

        Raises:
            TypeError: If the model was not yet seen and these are not its arguments.
            ValueError: If a latent starts at a value of wrong shape or outside its support.
        """
        if self.prototype_trace is None:
            self._check_arguments(args, kwargs)
            try:
                self._setup_prototype(*args, **kwargs)
                self.register_buffer("site_names", self._site_names())
                if self._pending_state is not None:
                    self.load_state_dict(self._pending_state)
            except BaseException:
                self.prototype_trace = None  # nothing half made
                raise
            self._pending_state = None
        if pyro.settings.get("module_local_params"):
            for parameter in self.parameters():  # Pyro asks for it, of its own parameters only
                parameter.unconstrained = weakref.ref(parameter)
        self._adopt()
        return self

    def _adopt(self) -> None:
        """Take over what a loaded parameter store holds for this guide."""

    def _check_arguments(self, args: tuple, kwargs: dict[str, Any]) -> None:
        model = self.raw_model
        try:
            signature = inspect.signature(
                model.forward if isinstance(model, torch.nn.Module) else model
            )
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"this {type(self).__name__} has not seen its model yet, and needs the model's "
                f"arguments for that ({error}): call guide.setup(*args), or pass them here"
            ) from error
        except ValueError:  # a callable without a signature
            return

    def _see(self, *args: Any, **kwargs: Any) -> None:
        """Trace the model, and check where its latents start."""
        with torch.no_grad():
            AutoGuide._setup_prototype(self, *args, **kwargs)
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            value, fn = site["value"], site["fn"]
            if isinstance(fn, dist.Delta):
                raise ValueError(
                    f"latent site '{name}' is a point (Delta), which has no density: write "
                    f"pyro.deterministic('{name}', value), or pyro.param for what is trained"
                )
            if tuple(value.shape) != tuple(fn.shape()):
                raise ValueError(
                    f"init_loc_fn gave site '{name}' a value of shape {tuple(value.shape)}; "
                    f"expected {tuple(fn.shape())}"
                )
            transform = bijection_of(site)
            again = transform(transform.inv(value))
            if not torch.allclose(again, value, rtol=1e-2, atol=1e-2):
                raise ValueError(
                    f"init_loc_fn gave site '{name}' a value that is not inside its support, "
                    f"{fn.support}: {value.flatten()[:5].tolist()}"
                )

    @property
    def sites(self) -> Sites:
        """The layout of all latents, as the model was first seen."""
        return self._layout("all", lambda: Sites.of(self.prototype_trace))

    def _layout(self, which: str, make: Callable[[], Sites]) -> Sites:
        """A layout that is read off the prototype, once for each."""
        trace = self.prototype_trace
        known = self.__dict__.get("_layouts")
        if known is None or known[0] is not trace:
            known = self.__dict__["_layouts"] = (trace, dict[str, Sites]())
        if which not in known[1]:
            known[1][which] = make()
        return known[1][which]

    def _find_moving(self, sites: Sites, args: tuple, kwargs: dict[str, Any]) -> None:
        """Which of these sites have supports that depend on others, and how to read them."""
        self._moving: frozenset[str] = frozenset()
        if self.sites:
            density = self._density(self.raw_model, args, kwargs, list(self.sites.named))
            self._moving = moving_supports(density, sites)
            self._nesting = density.nesting

    def _density(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        names: list[str],
        centre: Tensor | None = None,
    ) -> LatentDensity:
        """The model's log-density over these latents."""
        init = self._init_loc_fn
        return LatentDensity(model, args, kwargs, init_loc_fn=init, names=names, centre=centre)

    @property
    def _model_supports(self) -> ModelSupports:
        return ModelSupports(self.sites, self._nesting)

    # ------------------------------------------------------------------------------------------
    # plates

    @property
    def _follows_plates(self) -> bool:
        """Whether sizes and rows of the model's plates may change from call to call."""
        return any(site.subsampled for site in self.sites)

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, pyro.plate]:
        """Plates of the sizes, and of the subsamples, that the model has at these arguments.

        Where they may change, the model runs once for each new shape of its arguments, and at
        every call if its arguments say which rows it takes.
        """
        if self.master is not None or not self._follows_plates:
            if self.master is None and self._prototype_frames:
                self._check_sizes(args, kwargs)
            return super()._create_plates(*args, **kwargs)
        made = self.create_plates(*args, **kwargs) if self.create_plates is not None else ()
        self.plates = {p.name: p for p in ([made] if isinstance(made, pyro.plate) else made)}
        missing = [
            f for name, f in sorted(self._prototype_frames.items()) if name not in self.plates
        ]
        sizes = self._sizes(args, kwargs) if missing else {}
        for frame in missing:
            size = sizes.get(frame.name) or PlateSize(frame.full_size or frame.size, frame.size)
            self.plates[frame.name] = size.made(frame.name, frame.dim)
        return self.plates

    def _sizes(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, PlateSize]:
        if torch._C._get_tracing_state():
            return {}
        known = self._plate_sizes.known(args, kwargs)
        if known is not None and all(p.subsample is None for p in known.values()):
            return known
        if not self.attached:
            return {}
        return self._plate_sizes.see(self.model, self._prototype_frames, args, kwargs)

    def _check_sizes(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise if a plate of latents has other rows than those that the guide was made for."""
        if torch._C._get_tracing_state() or not self.attached:
            return
        if self._plate_sizes.known(args, kwargs) is not None:
            return
        found = self._plate_sizes.see(self.model, self._prototype_frames, args, kwargs)
        for name, plate in found.items():
            frame = self._prototype_frames[name]
            if (plate.size, plate.rows) != (frame.full_size or frame.size, frame.size):
                self._plate_sizes.forget(args, kwargs)
                raise ValueError(
                    f"this {type(self).__name__} holds latents for {frame.size} rows of the plate "
                    f"'{name}'; the model now takes {plate.rows} of {plate.size}. Make a guide "
                    "for these data; AmortizedFlow takes batches of any size"
                )

    # ------------------------------------------------------------------------------------------
    # copies

    def __getstate__(self) -> dict[str, Any]:
        PyroModule.__getstate__(self)  # takes Pyro's weak references off the parameters
        state = self._whole_state()
        reference = Reference.of(self._raw_model[0]) if self.attached else None
        state.update(_model=None, _raw_model=reference, _plate_sizes=PlateSizes())
        for name in self._functions:
            state[name] = self._portable(name, state.get(name))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        teach_divergence()
        reference = state.get("_raw_model")
        super().__setstate__({**upgrade_layouts(state), "_raw_model": None})
        model = reference.find() if isinstance(reference, Reference) else None
        if model is not None:
            self.attach(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        state = self._whole_state()
        shared = {name: state.pop(name) for name in ("_model", "_raw_model", *self._functions)}
        super(SavedGuide, new).__setstate__({**copy.deepcopy(state, memo), **shared})
        return new

    @property
    def _functions(self) -> tuple[str, ...]:
        """Names of the attributes that a pickle may lose."""
        return "_init_loc_fn", "create_plates"

    def _whole_state(self) -> dict[str, Any]:
        """Everything, with the light trace and without what is remembered between calls."""
        state = dict(self.__dict__)
        trace = state.get("prototype_trace")
        state.update(
            master=None,
            prototype_trace=None if trace is None else _light(trace),
        )
        for memory in ("plates", "_layouts"):
            state.pop(memory, None)
        return state

    def _portable(self, name: str, thing: Any) -> Any:
        """``thing`` if a pickle of it can be read anywhere, else something that says so."""
        try:
            if b"__main__" not in pickle.dumps(thing):
                return thing
        except Exception:  # whatever pickle raises for what it cannot take
            pass
        if name == "_init_loc_fn" and self.prototype_trace is not None:
            sites = self.prototype_trace.iter_stochastic_nodes()
            values = {n: site["value"].detach().clone() for n, site in sites}
            return functools.partial(init_to_value, values=values)
        if self.prototype_trace is None and name != "create_plates":
            raise pickle.PicklingError(
                f"{type(self).__name__}: {name.strip('_')}={thing!r} cannot be pickled, and is "
                "needed until the guide has seen its model: call guide.setup(*args) first, or use "
                "a function that can be imported"
            )
        return Lost(name)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in (self._pending_state or {}).items():
            destination[prefix + key] = value

    def _site_names(self) -> Tensor:
        """Names and shapes of the latents, as the bytes of a text: a buffer, so that all carry it.

        Without the rows of plates where these change.
        """
        changing = self._follows_plates
        sites = [[s.name, list(s.event_shape if changing else s.value_shape)] for s in self.sites]
        return torch.tensor(list(json.dumps(sites).encode()), dtype=torch.uint8)

    def _check_sites(self, found: Tensor) -> None:
        """Raise if a state is that of a guide for other latents."""
        theirs, mine = (bytes(t.tolist()).decode() for t in (found, self._buffers["site_names"]))
        if theirs != mine:
            raise RuntimeError(
                f"this state is of a guide for the latents {theirs}; this {type(self).__name__} "
                f"is for {mine}: load it into a guide of the model that it was made for"
            )

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        *args: Any,
    ) -> None:
        if self.prototype_trace is None:  # kept for when the model is seen
            own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
            self._pending_state = own or None
            return
        key = f"{prefix}site_names"
        if key in state_dict:
            self._check_sites(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)
        if key in missing:  # an old file: without names
            missing.remove(key)


def _light(trace: poutine.Trace) -> poutine.Trace:
    """The latent sites of a trace: their values, supports and shapes; no data, no graph."""
    light = poutine.Trace()
    for name, site in trace.iter_stochastic_nodes():
        fn = site["fn"]
        kept = dist.ImproperUniform(detached(fn.support), fn.batch_shape, fn.event_shape)
        value = site["value"].detach().clone()
        light.add_node(name, **{**site, "fn": kept, "value": value, "args": (), "kwargs": {}})
    return light


# by these names guides that were pickled before the files were divided ask for them
_Reference, _Lost = Reference, Lost
