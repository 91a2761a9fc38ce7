r"""Sums over discrete latents, enumerated in parallel while the model runs.

.. math:: \log p(u) = \log \sum_k p\big(x,\, k,\, T(u)\big) + \log|\det T'(u)|

The discrete latents k are summed out as by :class:`~pyro.infer.TraceEnum_ELBO`: plates and
``pyro.markov`` keep the sum cheap.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Independent

from pyroflows.guides.messages import is_data

__all__ = ["Labels", "likelihoods", "marginal_terms"]


class Labels(EnumMessenger):
    """Pyro's parallel enumeration, asking only for shapes: :func:`torch.vmap` has those."""

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        value = msg["value"]
        if isinstance(value, Tensor):
            msg = {**msg, "value": torch.empty(()).expand(value.shape)}
        super()._pyro_post_sample(msg)


class _Ring(LogRing):
    """Sums of products in logarithms that :func:`torch.vmap` can run."""

    _backend = "pyroflows.guides.log_einsum"


def _split(trace: poutine.Trace) -> tuple[list[dict[str, Any]], list[dict[str, Any]], set[str]]:
    """Sites that no enumerated dimension reaches, those that one does, and these dimensions."""
    trace.compute_log_prob()
    trace.pack_tensors()
    sites = [s for s in trace.nodes.values() if s["type"] == "sample"]
    dims = {
        d
        for s in sites
        if s["infer"].get("_enumerate_dim") is not None
        for d in s["packed"]["log_prob"]._pyro_dims
    } - set(trace.plate_to_symbol.values())
    reached = [s for s in sites if not dims.isdisjoint(s["packed"]["log_prob"]._pyro_dims)]
    return [s for s in sites if not any(s is r for r in reached)], reached, dims


def _contracted(trace: poutine.Trace, sites: list[dict[str, Any]], dims: set[str]) -> list[Tensor]:
    """Log-factors of ``sites`` with ``dims`` summed out: one term for each independent part."""
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for site in sites:
        ordinal = frozenset(
            trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized
        )
        factor = site["packed"]["unscaled_log_prob"]
        if site["infer"].get("_enumerate_dim") is None:  # the mask belongs inside of the sum
            factor = packed.scale_and_mask(factor, mask=site["packed"]["mask"])
        tree.setdefault(ordinal, []).append(factor)
    return [t for terms in contract_tensor_tree(tree, dims, ring=_Ring()).values() for t in terms]


def _common_scale(sites: list[dict[str, Any]]) -> Any:
    scales = {float(s["scale"]) for s in sites}
    if len(scales) > 1:
        raise ValueError(
            "sites that share an enumerated latent must have one scale; got "
            + ", ".join(f"{s['name']}: {float(s['scale']):g}" for s in sites)
            + ". Put them in the same subsampled plate"
        )
    return sites[0]["scale"]


def marginal_terms(trace: poutine.Trace) -> list[Tensor]:
    """Terms whose sum is the log-density of a trace, enumerated sites summed out.

    The scale of a subsampled plate stands outside of the sum over labels; see ``TraceEnum_ELBO``.
    """
    trace = prune_subsample_sites(trace)
    plain, reached, dims = _split(trace)
    terms = [s["log_prob"] for s in plain]
    if reached:
        scale = _common_scale(reached)
        terms += [scale * t for t in _contracted(trace, reached, dims)]
    return terms


def likelihoods(trace: poutine.Trace) -> dict[str, Tensor]:
    """Pointwise log-likelihoods of the observed sites of one run, enumerated sites summed out.

    A site that no label reaches is taken apart also inside ``to_event``. Sites that share a label
    that is summed out have one likelihood, under their names joined by ``+``; it keeps the plates
    that the label has, so that the rows of a mixture stay apart.
    """
    trace = prune_subsample_sites(trace)
    plain, reached, dims = _split(trace)
    found = {s["name"]: _pointwise(s) for s in plain if is_data(s)}
    rest = [s for s in reached if is_data(s)]
    while rest:
        part = _connected(rest[0], reached, dims)
        names = "+".join(s["name"] for s in part if is_data(s))
        found[names] = sum(_contracted(trace, part, dims), torch.zeros(()))
        rest = [s for s in rest if not any(s is p for p in part)]
    return found


def _pointwise(site: Mapping[str, Any]) -> Tensor:
    fn, mask = site["fn"], site["mask"]
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    log_prob = fn.log_prob(site["value"])
    if mask is None or isinstance(mask, bool):
        return scale_and_mask(log_prob, 1.0, mask)
    return scale_and_mask(
        log_prob, 1.0, mask.reshape(mask.shape + (1,) * (log_prob.dim() - site["log_prob"].dim()))
    )


def _connected(
    first: dict[str, Any], sites: list[dict[str, Any]], dims: set[str]
) -> list[dict[str, Any]]:
    """Sites that share enumerated dimensions with ``first``, directly or through others."""
    held, found = dims & set(first["packed"]["log_prob"]._pyro_dims), [first]
    while True:
        more = [
            s
            for s in sites
            if not any(s is f for f in found)
            and not held.isdisjoint(s["packed"]["log_prob"]._pyro_dims)
        ]
        if not more:
            return found
        found += more
        held |= {d for s in more for d in s["packed"]["log_prob"]._pyro_dims if d in dims}
