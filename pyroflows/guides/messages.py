"""What a message of a model says of its site: data or latent, labels, angles, masks, plates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import (
    Delta,
    MaskedDistribution,
    SineBivariateVonMises,
    SineSkewed,
    Unit,
)
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import Independent, VonMises

__all__ = [
    "exposed",
    "is_circular",
    "is_computed",
    "is_data",
    "is_discrete",
    "is_latent",
    "is_subsampled",
    "masked_out",
    "plate_nesting",
    "row_axes",
    "site_plates",
]


def is_latent(site: Mapping[str, Any]) -> bool:
    """Whether a message is a latent: a sample site, not observed, no subsample of a plate."""
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)


def is_discrete(site: Mapping[str, Any]) -> bool:
    """Whether a message is a discrete latent."""
    if not is_latent(site):
        return False
    fn = site["fn"]
    return bool(getattr(fn, "has_enumerate_support", False)) or bool(
        getattr(getattr(fn, "support", None), "is_discrete", False)
    )


def is_data(site: Mapping[str, Any]) -> bool:
    """Whether an observed site is one of data, not a factor or a deterministic value."""
    return (
        site["is_observed"]
        and not isinstance(site["fn"], Unit)
        and not site["infer"].get("_deterministic")
    )


def is_computed(site: Mapping[str, Any]) -> bool:
    """Whether a site holds a value computed from others: deterministic, or reparametrized."""
    fn = site["fn"]
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    return site["is_observed"] and (
        bool(site["infer"].get("_deterministic")) or isinstance(fn, Delta)
    )


def is_subsampled(site: Mapping[str, Any]) -> bool:
    """Whether the site lies in a plate of which the model sees a part at a time."""
    return any(f.full_size is not None and f.full_size != f.size for f in site["cond_indep_stack"])


def masked_out(site: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    """Which entries of a latent's unconstrained value, of ``shape``, masks take the prior from.

    None if none. By ``poutine.mask``, ``obs_mask`` or ``.mask()`` of the distribution, also inside
    of ``to_event``.
    """
    fn, value = site["fn"], site["value"]
    masks = [(site["mask"], fn.batch_shape)]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, fn.batch_shape))
        fn = fn.base_dist
    out = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
    for mask, batch in masks:
        if mask is None or mask is True:
            continue
        masked = ~torch.as_tensor(mask, device=value.device).broadcast_to(batch)
        out = out | masked.reshape(batch + (1,) * (value.dim() - len(batch)))
    if not out.any():
        return None
    if out.shape != shape:  # a simplex, say: it has its prior as a whole
        batch = site["fn"].batch_shape
        out = out.flatten(len(batch)).all(-1).reshape(batch + (1,) * (len(shape) - len(batch)))
    return out.expand(shape)


def is_circular(site: Mapping[str, Any]) -> bool:
    """Whether a latent is made of angles, whose support Pyro calls real."""
    fn = site["fn"]
    while hasattr(fn, "base_dist") and not isinstance(fn, _CIRCULAR):
        fn = fn.base_dist
    return isinstance(fn, _CIRCULAR)


_CIRCULAR = (VonMises, SineBivariateVonMises, SineSkewed)


def plate_nesting(trace: poutine.Trace) -> int:
    """Number of batch dimensions, to the left of every event, that the sites of a trace occupy."""
    sites = [s for s in prune_subsample_sites(trace).nodes.values() if s["type"] == "sample"]
    plates = [-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized]
    batches = [len(s["fn"].batch_shape) for s in sites]
    return max(plates + batches, default=0)


def exposed(model: Callable) -> Callable:
    """The model without the ``poutine.block`` that it is wrapped in, at any depth of handlers."""
    inner = getattr(model, "func", None)
    if isinstance(inner, partial) and len(inner.args) == 2:
        context, fn = inner.args
        bare = exposed(fn)
        return bare if isinstance(context, BlockMessenger) else context(bare)
    return model


def site_plates(trace: poutine.Trace) -> dict[str, list[tuple[str, int]]]:
    """Names and (negative) axes of the plates in the value of each sample site of one run."""
    plates = {}
    for name, site in prune_subsample_sites(trace).nodes.items():
        if site["type"] != "sample" or isinstance(site["fn"], Unit):
            continue
        frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != "_draws"]
        shift = site["fn"].event_dim
        if site["infer"].get("_deterministic") and shift == site["value"].dim():
            shift = _axes_to_the_right(site["value"].shape, frames)
        plates[name] = [(f.name, f.dim - shift) for f in frames]
    return plates


def _axes_to_the_right(shape: torch.Size, frames: list[Any]) -> int:
    """Axes of a deterministic value, all called event by Pyro, that lie right of its plates."""
    for shift in range(len(shape)):
        axes = [(f.dim - shift, f.size) for f in frames]
        if all(-axis <= len(shape) and shape[axis] == size for axis, size in axes):
            return shift
    return 0


def row_axes(prototype: poutine.Trace) -> Callable[[str, str], dict[str, int]]:
    """Where the plates of a site lie in tensors ``(S, ...)`` of its values or likelihoods."""
    plates = site_plates(prototype)

    def axes(group: str, name: str) -> dict[str, int]:
        first = name.split("+")[0]  # labels that are summed out join sites
        dim = prototype.nodes[first]["value"].dim()
        return {plate: 1 + dim + axis for plate, axis in plates[first] if dim + axis >= 0}

    return axes
