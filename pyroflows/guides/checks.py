"""What can be known to be wrong before a fit begins: Pyro's own checks, and where to begin."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor, nn

from pyroflows.guides.gaussian import normal_points
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.messages import is_discrete
from pyroflows.guides.substitute import Substitute
from pyroflows.training.seeds import preserved

__all__ = ["check_run", "finite_start", "model_keywords"]


def check_run(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    values: Mapping[str, Tensor] | None = None,
    sums_labels: bool = True,
) -> None:
    """Run guide and model once with Pyro's validation on, as ``Trace_ELBO`` does at every step.

    Args:
        model: The model.
        guide: The guide.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
        values: Latents at which the model runs; the guide's own if None.
        sums_labels: Whether discrete latents that the guide does not know are summed out.

    Raises:
        ValueError: What Pyro raises: a log-density that is not of the plates' shape, a value
            outside of the support or NaN, guide and model that disagree; or that the log-density
            of a site, which is named, is not finite.
    """
    with pyro.validation_enabled(True), torch.no_grad(), poutine.block(), preserved():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        at: Any = poutine.replay(trace=guide_trace) if values is None else Substitute(given=values)
        model_trace = poutine.trace(at(model)).get_trace(*args, **kwargs)
        for name, site in list(model_trace.nodes.items()):
            if is_discrete(site) and name not in guide_trace.nodes:
                if not sums_labels:
                    raise ValueError(
                        f"the discrete latent '{name}' is summed out for an AutoFlow over all "
                        "other latents only; fit this guide by SVI with TraceEnum_ELBO"
                    )
                site["is_observed"] = True  # summed out: the guide need not know it
        check_model_guide_match(model_trace, guide_trace)
        model_trace = prune_subsample_sites(model_trace)
        model_trace.compute_log_prob()
        sites = [s for s in model_trace.nodes.values() if s["type"] == "sample"]
        for site in sites:
            check_site_shape(site, math.inf)
    bad = [s for s in sites if not s["log_prob"].isfinite().all()]
    if bad:
        raise ValueError(
            "the model has no finite density at the start: "
            + "; ".join(f"log-density of site '{s['name']}' is {_worst(s)}" for s in bad)
            + ". Start where it is finite (init_loc_fn=), or look for data that are impossible "
            "under the model"
        )


def _worst(site: Mapping[str, Any]) -> str:
    log_prob = site["log_prob"].flatten()
    wrong = log_prob[~log_prob.isfinite()]
    entries = f" in {len(wrong)} of {len(log_prob)} entries" if len(log_prob) > 1 else ""
    return f"{wrong[0].item()}{entries}"


@torch.no_grad()
def finite_start(density: LatentDensity, init: Tensor, num: int = 64) -> Tensor | None:
    """``init``, or else a point around it, or else a draw from the prior, of finite density."""
    if density(init).isfinite():
        return init
    z = normal_points(num, density.dim, like=init, seed=3)
    around = init + z * torch.logspace(-2, 0.5, num).to(init)[:, None]
    prior = (density.start(init_to_sample) for _ in range(num))
    # one by one: where nothing is finite, no batch tells how the model takes one
    return next((u for u in itertools.chain(around, prior) if density(u).isfinite()), None)


def _parameters(model: Callable, args: tuple) -> set[str]:
    """Names that a model takes by keyword, after the arguments ``args``."""
    fn: Any = poutine.unwrap(model)
    if isinstance(fn, nn.Module):
        fn = fn.forward
    try:
        signature = inspect.signature(fn)
        taken = signature.bind_partial(*args).arguments
    except (TypeError, ValueError):
        return set()
    return {
        name
        for name, p in signature.parameters.items()
        if name not in taken and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def model_keywords(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tell a function's own keywords from the model's, which come in ``**kwargs`` too.

    ``function(model, guide, *args, own=..., model_kwargs=None, **kwargs)`` gets all keyword
    arguments of the model in ``model_kwargs``. A name that both have is an error, unless
    ``model_kwargs`` is given: what stands outside of it is then the function's.
    """
    parameters = inspect.signature(function).parameters.items()
    own = {name for name, p in parameters if p.kind is p.KEYWORD_ONLY}
    leading = [name for name, p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(function)
    def told_apart(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop("model_kwargs", None)
        lead = {name: kwargs.pop(name) for name in leading if name in kwargs}
        names = [name for name in leading if name not in lead]
        lead |= dict(zip(names, args, strict=False))
        args = args[len(names) :]
        guide = lead.get("guide")
        model: Any = lead["model"] if "model" in lead else getattr(guide, "model", guide)
        clash = sorted(own & set(kwargs) & _parameters(model, args)) if given is None else []
        if clash:
            raise ValueError(
                f"{function.__name__} and the model both have the keyword {clash[0]!r}: pass the "
                f"model's by model_kwargs={{{clash[0]!r}: ...}}, or model_kwargs={{}} if it is "
                f"meant for {function.__name__}"
            )
        rest = {name: kwargs.pop(name) for name in set(kwargs) - own}
        twice = sorted(rest.keys() & (given or {}).keys())
        if twice:
            raise ValueError(
                f"{function.__name__} got {twice} both by themselves and in model_kwargs"
            )
        first = [lead[name] for name in leading if name in lead]
        return function(*first, *args, **kwargs, model_kwargs={**rest, **(given or {})})

    return told_apart
