"""Draws of a guide as ArviZ data."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroflows.guides.checks import model_keywords
from pyroflows.guides.draws import draw_from, posterior_density
from pyroflows.guides.messages import is_computed, is_data, is_discrete, row_axes, site_plates
from pyroflows.guides.rows import WholeDensity

__all__ = ["to_arviz"]


@model_keywords
def to_arviz(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 1000,
    predictive: bool = True,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, list[str]] | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Draws from a guide as ArviZ data, under ArviZ 0.23 and 1.x.

    Groups: posterior, with deterministic and reparametrized sites; posterior_predictive;
    log_likelihood, pointwise also inside ``to_event``; observed_data; sample_stats with
    ``log_weight`` (log p − log q) and ``lp``. One chain. Plates give their names to the
    dimensions. Discrete latents are summed out of the likelihood and drawn anew, given the
    others, for the predictive; sites that share one have one log-likelihood, named ``a+b``. Data
    in subsampled plates come whole.

    Args:
        model: The model.
        guide: The guide, fitted.
        *args: Arguments of both.
        num_samples: Number of draws.
        predictive: Whether to add posterior_predictive, which runs the model once more.
        coords: Coordinates of dimensions, those of plates included.
        dims: Names of dimensions for some sites, instead of those of plates.
        model_kwargs: Keyword arguments of both whose names are also names of these options.
        **kwargs: Keyword arguments of both.

    Returns:
        ``arviz.InferenceData`` under 0.x, ``xarray.DataTree`` under 1.x.

    Raises:
        ImportError: If ArviZ is not installed.
        NotJudged: If the model sees only some rows of a subsampled plate and cannot be shown all.
    """
    import arviz

    kwargs = {**kwargs, **(model_kwargs or {})}
    density = posterior_density(model, guide, args, kwargs)
    draws = draw_from(guide, density, num_samples, args, kwargs, details=True)
    prototype = density.trace(density.init_loc)
    axes = row_axes(prototype)
    with torch.no_grad():
        first = draws.latent[:1]
        observed = {k: v[0] for k, v in density.whole(_observed, first, axes)["observed"].items()}
        drawn = {**draws.values, **draws.deterministic}
        groups: dict[str, dict[str, Tensor]] = {
            "posterior": drawn,
            "sample_stats": {"log_weight": draws.log_weights, "lp": draws.log_prob},
            "log_likelihood": draws.log_likelihood,
        }
        if observed and predictive:
            groups["posterior_predictive"] = _predict(density, draws.latent, axes)
    arrays = {k: {n: _array(v)[None] for n, v in g.items()} for k, g in groups.items() if g}
    if observed:
        arrays["observed_data"] = {k: _array(v) for k, v in observed.items()}
    shapes = {**{k: v[0] for k, v in drawn.items()}, **observed}
    named = {**_plate_dims(site_plates(prototype), shapes), **(dims or {})}
    attrs = {"inference_library": "pyroflows"}
    from_dict: Any = functools.partial(arviz.from_dict, coords=dict(coords or {}), dims=named)
    # hasattr tests mislead: 1.x answers True to InferenceData
    if int(arviz.__version__.split(".")[0]) >= 1:
        return from_dict(arrays, attrs={"/": attrs})
    return from_dict(**arrays, attrs=attrs)


def _array(value: Tensor) -> Any:
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _is_observed(site: Mapping[str, Any]) -> bool:
    return site["type"] == "sample" and is_data(site) and not is_computed(site)


def _observed(trace: poutine.Trace) -> dict[str, dict[str, Tensor]]:
    return {"observed": {n: s["value"] for n, s in trace.nodes.items() if _is_observed(s)}}


class _Predictive(Messenger):
    """Draw what was observed, and labels, as the model says given the latents."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if _is_observed(msg):
            msg["infer"] = {**msg["infer"], "was_observed": True}
            msg.update(is_observed=False, value=msg["fn"](), done=True)
        elif is_discrete(msg):
            msg.update(value=msg["fn"](), done=True)


def _predicted(trace: poutine.Trace) -> dict[str, dict[str, Tensor]]:
    return {
        "predicted": {
            name: site["value"]
            for name, site in trace.nodes.items()
            if site["infer"].get("was_observed")
        }
    }


def _predict(
    density: WholeDensity, u: Tensor, axes: Callable[[str, str], Mapping[str, int]]
) -> dict[str, Tensor]:
    """Draws of the observed sites, one for each of ``u``, ``(S, D)``."""
    predictive = copy.copy(density)
    predictive.model = _Predictive()(density.model)
    return predictive.whole(_predicted, u, axes, same=False)["predicted"]


def _plate_dims(
    plates: Mapping[str, list[tuple[str, int]]], samples: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """Names of the dimensions of each site, from its plates; axes of no plate are numbered."""
    named = {}
    for name, value in samples.items():
        own = {axis: plate for plate, axis in plates.get(name, []) if -axis <= value.dim()}
        if own:
            named[name] = [own.get(i - value.dim(), f"{name}_dim_{i}") for i in range(value.dim())]
    return named
