r"""Running a model at given latents: their values, Jacobians, and sums over discrete sites.

.. math:: \log p(u) = \log \sum_k p\big(x,\, k,\, T(u)\big) + \log|\det T'(u)|

The discrete latents k are enumerated in parallel and summed out as by
:class:`~pyro.infer.TraceEnum_ELBO`: plates and ``pyro.markov`` keep the sum cheap.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution, Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import Independent, biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint

__all__ = [
    "Evaluation",
    "Inverse",
    "Labels",
    "bijection_of",
    "exposed",
    "is_circular",
    "is_discrete",
    "likelihoods",
    "marginal_terms",
    "masked_out",
    "onto_support",
]


def is_discrete(site: Mapping[str, Any]) -> bool:
    """Whether a message is a discrete latent: a sample site, not observed, no subsample."""
    if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
        return False
    fn = site["fn"]
    return bool(getattr(fn, "has_enumerate_support", False)) or bool(
        getattr(getattr(fn, "support", None), "is_discrete", False)
    )


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
        gone = ~torch.as_tensor(mask, device=value.device).broadcast_to(batch)
        out = out | gone.reshape(batch + (1,) * (value.dim() - len(batch)))
    if not out.any():
        return None
    if out.shape != shape:  # a simplex, say: it has its prior as a whole
        batch = site["fn"].batch_shape
        out = out.flatten(len(batch)).all(-1).reshape(batch + (1,) * (len(shape) - len(batch)))
    return out.expand(shape)


def is_circular(site: Mapping[str, Any]) -> bool:
    """Whether a latent is made of angles, whose support Pyro calls real."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        if type(fn).__name__ in _CIRCULAR:
            return True
        fn = fn.base_dist
    return type(fn).__name__ in _CIRCULAR


_CIRCULAR = {"VonMises", "SineBivariateVonMises", "SineSkewed"}


def exposed(model: Callable) -> Callable:
    """The model without the ``poutine.block`` that it is wrapped in, at any depth of handlers."""
    inner = getattr(model, "func", None)
    if isinstance(inner, partial) and len(inner.args) == 2:
        context, fn = inner.args
        bare = exposed(fn)
        return bare if isinstance(context, BlockMessenger) else context(bare)
    return model


def onto_support(support: Any) -> Any:
    """``biject_to(support)``, also for a mixture's, which is that of its components."""
    mixture = isinstance(support, MixtureSameFamilyConstraint)
    return biject_to(support.base_constraint if mixture else support)


def bijection_of(site: Mapping[str, Any]) -> Any:
    """The transform from real numbers onto the support of a site.

    Raises:
        NotImplementedError: If there is none; the message names the site.
    """
    try:
        with helpful_support_errors(site):
            return onto_support(site["fn"].support)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"latent site '{site['name']}' has the support {site['fn'].support}, onto which "
            "PyTorch knows no bijection from real numbers: build the value from other latents (a "
            "covariance from LKJCholesky and scales, say), or register one in "
            "torch.distributions.biject_to"
        ) from error


class Evaluation(Messenger):
    """Substitute latents and add up log-densities while the model runs.

    Args:
        unconstrained: Unconstrained value of each latent.
        nesting: Plate dimensions of the model: what lies to the left of them is a batch.
        adds: Whether to add up the sites' log-densities, or only Jacobians: where a trace does.
        free: For some latents which entries nothing depends on, so that no Jacobian counts.
        onto: The transform to a support.

    Attributes:
        total: The log-density so far, Jacobians included; shape ``(*batch)`` or ``()``.
        jacobian: What Jacobians add to it.
        values: Constrained value of each latent.
        supports: Support of each latent.
    """

    def __init__(
        self,
        unconstrained: Mapping[str, Tensor],
        nesting: int,
        *,
        adds: bool = True,
        free: Mapping[str, Tensor] | None = None,
        onto: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.unconstrained, self.nesting, self.adds = unconstrained, nesting, adds
        self.free, self.onto = free or {}, onto or onto_support
        self.total: Tensor | float = 0.0
        self.jacobian: Tensor | float = 0.0
        self.values: dict[str, Tensor] = {}
        self.supports: dict[str, Any] = {}

    def _summed(self, terms: Tensor) -> Tensor:
        """Sum over the plates: what lies to the left of them is the batch."""
        n = terms.dim() - self.nesting
        if n <= 0:
            return terms.sum()
        return terms.flatten(n).sum(-1) if self.nesting else terms

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        u = self.unconstrained.get(msg["name"])
        if u is None or msg["is_observed"]:
            if not self.adds and is_discrete(msg):
                msg["infer"] = {**msg["infer"], "enumerate": "parallel"}
            return
        support = msg["fn"].support
        transform = self.onto(support)
        msg["value"] = transform(u)
        log_det = transform.log_abs_det_jacobian(u, msg["value"])
        free = self.free.get(msg["name"])
        if free is not None:
            inner = u.dim() - log_det.dim()  # dimensions that one Jacobian spans
            log_det = torch.where(free.flatten(-inner).all(-1) if inner else free, 0.0, log_det)
        extra = msg["fn"].event_dim - (msg["value"].dim() - log_det.dim())
        log_det = self._summed(log_det.flatten(-extra).sum(-1) if extra > 0 else log_det)
        self.total, self.jacobian = self.total + log_det, self.jacobian + log_det
        self.values[msg["name"]] = msg["value"]
        self.supports[msg["name"]] = support

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not self.adds or site_is_subsample(msg):
            return
        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        self.total = self.total + self._summed(scale_and_mask(log_prob, msg["scale"], msg["mask"]))


class Inverse(Messenger):
    """Give latents constrained values while the model runs, and keep their unconstrained ones."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.unconstrained: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        value = self.values.get(msg["name"])
        if value is not None and not msg["is_observed"]:
            msg["value"] = value
            self.unconstrained[msg["name"]] = onto_support(msg["fn"].support).inv(value)


# ---------------------------------------------------------------------------- sums over labels


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


def is_data(site: Mapping[str, Any]) -> bool:
    """Whether an observed site is one of data, not a factor or a deterministic value."""
    return (
        site["is_observed"]
        and not isinstance(site["fn"], Unit)
        and not site["infer"].get("_deterministic")
    )


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
