"""The path gradient for Pyro's SVI, of the ELBO or of its importance-weighted kin."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, warn_if_nan
from torch import Tensor

from pyroflows.guides.messages import is_discrete
from pyroflows.weights import OUTSIDE, bound

__all__ = ["PathGradientELBO", "outside_term", "shares"]


def shares(
    log_weights: Tensor, *, iwae: bool = False, squared: bool = True, mix: float = 0.0
) -> Tensor:
    """Weight of each particle in the gradient of a bound, ``(S,)``.

    Equal; or for the importance-weighted bound the normalized weights, which are squared along
    the path (Tucker et al. 2019, eq. 8).

    Args:
        log_weights: Log p - log q; -inf for what does not count.
        iwae: Whether the bound is the importance-weighted one.
        squared: Whether the gradient is the path's.
        mix: Share of the ELBO in the importance-weighted objective: the bound alone does not see
            draws where the posterior has no mass.
    """
    equal = torch.full_like(log_weights, 1 / len(log_weights))
    if not iwae:
        return equal
    w = torch.softmax(log_weights, 0).nan_to_num(0.0)
    return torch.lerp(w.square() if squared else w, equal, mix)


def outside_term(log_q: Tensor, num_inside: int | Tensor) -> Tensor:
    r"""A scalar whose gradient is that of :math:`-10 \log q(\text{inside})`.

    .. math:: \nabla \log q(\text{inside})
        = -\tfrac{q(\text{outside})}{q(\text{inside})} E_q[\nabla\log q \mid \text{outside}]

    Args:
        log_q: The guide's log-density at the draws outside.
        num_inside: Draws inside.
    """
    return OUTSIDE * log_q[log_q.detach().isfinite()].sum() / num_inside


class PathGradientELBO(ELBO):
    r"""The ELBO, differentiated along the path of the samples only ("sticking the landing").

    .. math:: \mathrm{ELBO} = \mathbb E_{z \sim q_\theta}[\log p(x, z) - \log q_\theta(z)], \qquad
        \hat\nabla_\theta = \nabla_\theta \big[\log p(x, z_\theta) - \log
        q_{\bar\theta}(z_\theta)\big]

    with :math:`\bar\theta` held fixed. The part left out has mean zero; without it the gradient's
    variance vanishes where the guide is exact. With ``iwae=True`` the bound is the
    importance-weighted one,
    :math:`\log \frac1S \sum_s p(x, z_s)/q(z_s)`, whose path gradient weights each sample by the
    square of its normalized weight (doubly reparameterized; Tucker et al. 2019, eq. 8).

    Works with any guide whose latents are reparameterized, in place of
    :class:`~pyro.infer.Trace_ELBO`. Where the model has no finite density a sample lies
    outside of the posterior: the bound and its gradient are then those of
    :math:`E_q[\log p - \log q \mid \text{inside}] + 10 \log q(\text{inside})`. Discrete
    latents are not summed out.

    Cost: the guide runs twice per step, the second time to invert its transforms.

    Args:
        num_particles: Samples S per step.
        max_plate_nesting: Found by itself if not given.
        vectorize_particles: Whether all samples are one batch.
        iwae: Whether to use the importance-weighted bound; it needs ``vectorize_particles``.
        temperature: Divides the model's log-density, priors and all; above 1 it flattens the
            posterior so that a guide can find several modes. An attribute that may be changed
            between steps.
        **kwargs: Others of :class:`~pyro.infer.ELBO`.

    References:
        Roeder, Wu, Duvenaud (2017), Sticking the landing. arXiv:1703.09194
        Tucker, Lawson, Gu, Maddison (2019), Doubly reparameterized gradient estimators.
        arXiv:1810.04152
    """

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = True,
        *,
        iwae: bool = False,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_particles, max_plate_nesting, vectorize_particles=vectorize_particles, **kwargs
        )
        if iwae and not vectorize_particles:
            raise ValueError("PathGradientELBO: iwae=True needs vectorize_particles=True")
        if not temperature > 0:
            raise ValueError(f"PathGradientELBO: temperature must be positive; got {temperature}")
        self.iwae, self.temperature = iwae, temperature

    def _get_trace(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[poutine.Trace, poutine.Trace, poutine.Trace]:
        """Traces of model and fixed guide on leaves, and of the guide whose values they hold."""
        with poutine.trace(param_only=True) as seen:
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        leaves = drawn.copy()
        for name, site in drawn.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site) or site["is_observed"]:
                continue
            if not site["fn"].has_rsample:
                raise ValueError(
                    f"PathGradientELBO needs reparameterized latents; guide site '{name}' "
                    f"({type(site['fn']).__name__}) is not. Use Trace_ELBO"
                )
            # a new tensor object too, so that no transform recalls it together with its graph
            leaves.nodes[name] = {**site, "value": site["value"].detach().clone().requires_grad_()}
        with _frozen(
            [s["value"].unconstrained() for s in seen.trace.nodes.values() if s["type"] == "param"]
        ):
            fixed = poutine.trace(poutine.replay(guide, trace=leaves)).get_trace(*args, **kwargs)
            fixed.compute_log_prob()
        model_trace = poutine.trace(poutine.replay(model, trace=leaves)).get_trace(*args, **kwargs)
        for name, site in model_trace.nodes.items():
            if name not in leaves.nodes and is_discrete(site):
                raise ValueError(
                    f"PathGradientELBO does not sum out the discrete latent '{name}'. Use "
                    "TraceEnum_ELBO, or fit_guide with an AutoFlow"
                )
        if is_validation_enabled():
            check_model_guide_match(model_trace, fixed, self.max_plate_nesting)
        model_trace.compute_log_prob()
        return prune_subsample_sites(model_trace), prune_subsample_sites(fixed), drawn

    def _log_weights(
        self, model_trace: poutine.Trace | None, guide_trace: poutine.Trace
    ) -> Tensor:
        """Log p - log q of each particle; ``(S,)``, or ``()`` when they come one at a time."""
        batched = self.vectorize_particles and self.num_particles > 1
        total: Any = 0.0
        for trace, sign in ((model_trace, 1 / self.temperature), (guide_trace, -1.0)):
            for site in trace.nodes.values() if trace is not None else ():
                if site["type"] != "sample" or is_identically_zero(site["log_prob"]):
                    continue
                log_prob, inner = site["log_prob"], self.max_plate_nesting - 1
                if batched and log_prob.dim() > inner:
                    log_prob = log_prob.flatten(1).sum(1) if log_prob.dim() > 1 else log_prob
                else:
                    log_prob = log_prob.sum()
                total = total + sign * log_prob
        return total.expand(self.num_particles) if batched else total

    def _objective(self, log_weights: Tensor) -> tuple[float, Tensor]:
        """The bound and a scalar whose gradient is the estimator's."""
        log_weights = log_weights.reshape(-1)
        ok = log_weights.detach().isfinite()
        safe = torch.where(ok, log_weights, torch.zeros_like(log_weights))
        seen = log_weights.detach().masked_fill(~ok, -math.inf)
        if self.iwae:
            share = shares(seen, iwae=True)
        else:
            share = ok.to(safe) / ok.sum().clamp(min=1)
        return bound(seen, iwae=self.iwae), (share * safe).sum()

    def _outside(
        self,
        guide: Callable,
        drawn: poutine.Trace,
        log_weights: Tensor,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """A scalar whose gradient is that of -log q(inside), from the samples outside."""
        outside = ~log_weights.detach().reshape(-1).isfinite()
        if not bool(outside.any()) or bool(outside.all()):
            return None
        fixed = drawn.copy()
        for name, site in drawn.nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site):
                fixed.nodes[name] = {**site, "value": site["value"].detach().clone()}
        again = poutine.trace(poutine.replay(guide, trace=fixed)).get_trace(*args, **kwargs)
        again.compute_log_prob()
        log_q = self._log_weights(None, prune_subsample_sites(again)).reshape(-1).neg()
        return outside_term(log_q[outside], (~outside).sum())

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Minus the bound."""
        with torch.no_grad():
            bounds = [
                self._objective(self._log_weights(*t[:2]))[0]
                for t in self._get_traces(model, guide, args, kwargs)
            ]
        return -sum(bounds) / len(bounds)

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the bound, with the path gradient."""
        loss, surrogate, _ = self._paths(model, guide, args, kwargs, keep_graph=True)
        return loss + (surrogate - surrogate.detach())

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Minus the bound; adds its path gradient to the parameters'."""
        loss, _, paths = self._paths(model, guide, args, kwargs, keep_graph=False)
        if paths:
            values, grads = zip(*paths, strict=True)
            torch.autograd.backward(values, grads, retain_graph=self.retain_graph)
        warn_if_nan(loss, "loss")
        return loss

    def _paths(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        keep_graph: bool,
    ) -> tuple[float, Tensor, list[tuple[Tensor, Tensor]]]:
        """The loss, a surrogate of its gradient, and pairs of value and gradient there.

        The model's own parameters get their gradients at once, or through the surrogate if
        ``keep_graph``.
        """
        loss, surrogate, paths = 0.0, torch.zeros(()), []
        share = 1.0 if self.vectorize_particles else 1.0 / self.num_particles
        for model_trace, fixed, drawn in self._get_traces(model, guide, args, kwargs):
            log_weights = self._log_weights(model_trace, fixed)
            bound, objective = self._objective(log_weights)
            loss = loss - share * bound
            if not objective.requires_grad:
                continue
            pairs = [
                (site["value"], fixed.nodes[name]["value"])
                for name, site in drawn.nodes.items()
                if site["type"] == "sample" and site["value"].requires_grad
            ]
            if keep_graph:
                grads = torch.autograd.grad(
                    -share * objective,
                    [leaf for _, leaf in pairs],
                    retain_graph=True,
                    allow_unused=True,
                )
                surrogate = surrogate - share * objective
            else:
                (-share * objective).backward()
                grads = tuple(leaf.grad for _, leaf in pairs)
            found = [
                (value, grad)
                for (value, _), grad in zip(pairs, grads, strict=True)
                if grad is not None
            ]
            found = self._drop(found)
            outside = self._outside(guide, drawn, log_weights, args, kwargs)
            found += [] if outside is None else [(outside, torch.full_like(outside, share))]
            surrogate = surrogate + sum((value * grad).sum() for value, grad in found)
            paths += found
        return loss, surrogate, paths

    def _drop(self, paths: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Gradients with those of particles that are anywhere not finite set to zero."""
        if not (self.vectorize_particles and self.num_particles > 1):
            finite = all(bool(grad.isfinite().all()) for _, grad in paths)
            return paths if finite else []
        ok = torch.stack(
            [
                g.isfinite().reshape(len(g), -1).all(1)
                for _, g in paths
                if len(g) == self.num_particles
            ]
        ).all(0)
        return [
            (
                value,
                torch.where(ok.view(-1, *[1] * (grad.dim() - 1)), grad, 0.0)
                if len(grad) == len(ok)
                else grad,
            )
            for value, grad in paths
        ]


@contextmanager
def _frozen(leaves: list[Tensor]) -> Iterator[None]:
    """Nothing that is computed meanwhile depends on these leaves."""
    flags = [leaf.requires_grad for leaf in leaves]
    for leaf in leaves:
        leaf.requires_grad_(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".*was not registered in the param store", UserWarning
            )
            yield
    finally:
        for leaf, flag in zip(leaves, flags, strict=True):
            leaf.requires_grad_(flag)
