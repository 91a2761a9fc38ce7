"""How far to trust a guide, and its draws in ArviZ."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroflows.guides.draws import GuideDraws, draw, importance_resample
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.prefit import normal_points, prefit
from pyroflows.guides.weights import WeightSummary, pareto_k, smooth_weights, summarize_weights

__all__ = ["Diagnosis", "diagnose", "importance_resample", "pareto_k", "to_arviz"]


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on a guide; ``print`` it.

    Attributes:
        weights: ELBO with its error, evidence, effective sample size, spread and tail of the
            log-weights.
        divergence: Estimate of KL(guide || posterior) in nats: the larger of log-evidence minus
            ELBO and half the squared spread of the log-weights.
        shifts: For each site, how far its means move under importance weights, in posterior
            standard deviations; the largest over its entries.
        wider_evidence: Largest log-evidence found by proposals that do not come from the guide: a
            larger one than the guide's own means posterior mass that the guide misses. NaN if not
            searched.
        ok: Whether nothing speaks against the guide.
        problems: What does, in plain words.
        advice: What to try next.
    """

    weights: WeightSummary
    divergence: float
    shifts: dict[str, float]
    wider_evidence: float
    ok: bool
    problems: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.ok:
            return (
                "The guide agrees with the posterior, as far as its own draws and a search for "
                "other modes can tell."
            )
        return "Do not trust this guide as it is: " + "; ".join(self.problems) + "."

    def __str__(self) -> str:
        w = self.weights
        shifts = sorted(self.shifts.items(), key=lambda item: -item[1])[:5]
        lines = [
            self.verdict,
            f"  ELBO {w.elbo:.3f} ± {w.elbo_error:.3f}   log-evidence {w.log_evidence:.3f}   "
            f"KL to the posterior about {self.divergence:.3f} nats",
            f"  effective sample size {w.effective_sample_size:.1%}   "
            f"log-weight sd {w.log_weight_sd:.3f}   "
            f"Pareto k {w.pareto_k:.2f}   ({w.num_draws} draws, {w.num_dropped} not finite)",
            "  largest shifts of means under weights (sd): "
            + ", ".join(f"{k} {v:.2f}" for k, v in shifts),
        ]
        if math.isfinite(self.wider_evidence):
            lines.append(f"  log-evidence from wider proposals {self.wider_evidence:.3f}")
        return "\n".join(lines + [f"  Try: {a}." for a in self.advice])


def _search(
    draws: GuideDraws, model: Callable, args: tuple, kwargs: dict[str, Any], num: int
) -> tuple[float, float]:
    """Log-evidence, and its lower bound, from a mixture of Gaussians that knows of other modes.

    Its parts are the modes found from many starts, with the curvature there or matched scores, and
    the moments of the guide's own draws, widened.
    """
    density = LatentDensity(model, args, kwargs)
    u = density.unconstrain(draws.values).double()
    u = u[u.isfinite().all(-1)]
    parts: list[tuple[Tensor, Tensor]] = []
    if len(u) > 2 * density.dim:
        factor, bad = torch.linalg.cholesky_ex(torch.cov(u.T).reshape(density.dim, density.dim))
        if not bad:
            parts += [(u.mean(0), widen * factor) for widen in (1.2, 2.0)]
    frozen = density.frozen()
    _, found, _ = prefit(frozen, density.init_loc, num_starts=16, num_modes=8)
    parts += [(g.loc, 1.1 * g.scale_tril) for g in found[1:] if math.isfinite(g.elbo)]
    mixture = [torch.distributions.MultivariateNormal(m, scale_tril=L) for m, L in parts]
    z = normal_points(max(200, num // len(parts)), density.dim, like=u, seed=7)
    points = torch.cat([m + z @ L.T for m, L in parts])
    with torch.no_grad():
        log_q = torch.stack([q.log_prob(points) for q in mixture]).logsumexp(0) - math.log(
            len(parts)
        )
        log_p = (
            frozen(points.to(density.init_loc)).double().nan_to_num(-math.inf, posinf=-math.inf)
        )
    log_w = log_p - log_q
    top = log_w.max()
    w = (log_w - top).exp()
    low = w.mean() - 2 * w.std() / len(w) ** 0.5
    return (top + w.mean().log()).item(), (top + low.clamp(min=0).log()).item()


def diagnose(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 4000,
    search: bool = True,
    **kwargs: Any,
) -> Diagnosis:
    """Say how far to trust a guide: any flow or auto-guide, or a custom one.

    Importance weights tell how well the guide matches the posterior where it puts its draws. They
    cannot see mass that the guide misses, so a search from elsewhere (the pre-fit's, and the
    guide's own draws spread wider) compares evidence. No single number suffices: k-hat is
    scale-free, so that a guide with log-weights of spread 0.01 can show 0.7.

    Cost: ``num_samples`` evaluations of the model and, for the search, a few thousand gradients.

    Args:
        model: The model.
        guide: The guide, fitted.
        *args: Arguments of both.
        num_samples: Draws from the guide.
        search: Whether to search for missed mass; skipped beyond 300 latents.
        **kwargs: Keyword arguments of both.
    """
    draws = draw(model, guide, *args, num_samples=num_samples, **kwargs)
    weights = summarize_weights(draws.log_weights)
    log_w, k = smooth_weights(draws.log_weights)
    w = log_w.exp().nan_to_num(0.0)
    shifts = {name: _shift(value, w) for name, value in draws.values.items()}
    wider, wider_low = math.nan, -math.inf
    size = sum(v[0].numel() for v in draws.values.values())
    if search and size <= 300:
        try:
            wider, wider_low = _search(draws, model, args, kwargs, num_samples)
        except (RuntimeError, ValueError, NotImplementedError):  # latents that cannot be flattened
            pass
    divergence = max(weights.log_evidence - weights.elbo, 0.5 * weights.log_weight_sd**2)
    problems, advice = [], []
    if weights.num_dropped > 0.01 * weights.num_draws or not math.isfinite(weights.elbo):
        problems.append(
            f"{weights.num_dropped} of {weights.num_draws} draws have weights that are not finite"
        )
        advice.append("bound the supports, or look for overflow in the model; run in float64")
    if not divergence < 0.12:
        problems.append(f"it is about {divergence:.2f} nats from the posterior where it looks")
        advice.append(
            "fit longer or with a larger flow (fit_guide with num_steps=); then reparameterize "
            "the model"
        )
    far = {name: s for name, s in shifts.items() if not s < 0.3}
    if far and (k < 0.7 or divergence > 0.05):
        worst = max(far, key=lambda name: far[name])
        problems.append(
            f"importance weights move '{worst}' by {far[worst]:.2f} posterior standard deviations"
        )
        if k < 0.7:
            advice.append("use importance_resample: the weights are good enough (k-hat below 0.7)")
    if wider_low > weights.log_evidence + 0.2:
        missed = -math.expm1(weights.log_evidence - wider)
        problems.append(f"it misses about {missed:.0%} of the posterior mass, found elsewhere")
        advice.append(
            "fit with tempering (fit_guide with temperature=30.0) or from another init_loc_fn; "
            "several modes may exist"
        )
    return Diagnosis(
        weights, divergence, shifts, wider, not problems, tuple(problems), tuple(advice)
    )


def _shift(value: Tensor, w: Tensor) -> float:
    """Largest |weighted mean − mean| over the entries of a site, in weighted sd."""
    x = value.detach().double().reshape(len(value), -1)
    if not x.isfinite().all():
        return math.inf
    mean = w @ x
    sd = (w @ (x - mean).square()).sqrt()
    sd = torch.maximum(sd, 1e-3 * x.std(0)).clamp(min=1e-300)
    return ((mean - x.mean(0)).abs() / sd).max().item() if x.shape[1] else 0.0


# ------------------------------------------------------------------------------------ ArviZ


def _array(value: Tensor) -> Any:
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


class _Predictive(Messenger):
    """Give latents values and sample what was observed, factors and deterministic sites aside."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.predicted: list[dict[str, Any]] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
        elif msg["is_observed"] and not _no_data(msg):
            msg.update(is_observed=False, value=None, done=False)
            self.predicted.append(msg)


def _no_data(site: Mapping[str, Any]) -> bool:
    """Whether an observed site is a factor or a deterministic one."""
    return isinstance(site["fn"], Unit) or bool(site["infer"].get("_deterministic"))


def _predict(
    model: Callable, values: Mapping[str, Tensor], args: tuple, kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Draws of the observed sites, one for each draw of the latents."""
    found: dict[str, list[Tensor]] = {}
    for s in range(len(next(iter(values.values())))):
        run = _Predictive({name: value[s] for name, value in values.items()})
        with torch.no_grad(), poutine.block(), run:
            model(*args, **kwargs)
        for msg in run.predicted:
            found.setdefault(msg["name"], []).append(msg["value"])
    return {name: torch.stack(draws) for name, draws in found.items()}


def to_arviz(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 1000,
    predictive: bool = True,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, list[str]] | None = None,
    **kwargs: Any,
) -> Any:
    """Draws from a guide as ArviZ data, under ArviZ 0.23 and 1.x.

    Groups: posterior; posterior_predictive; log_likelihood, pointwise also inside ``to_event``;
    observed_data; sample_stats with ``log_weight`` (log p − log q) and ``lp``. One chain. Plates
    give their names to the dimensions.

    Args:
        model: The model.
        guide: The guide, fitted.
        *args: Arguments of both.
        num_samples: Number of draws.
        predictive: Whether to add posterior_predictive, which runs the model once per draw.
        coords: Coordinates of dimensions, those of plates included.
        dims: Names of dimensions for some sites, instead of those of plates.
        **kwargs: Keyword arguments of both.

    Returns:
        ``arviz.InferenceData`` under 0.x, ``xarray.DataTree`` under 1.x.

    Raises:
        ImportError: If ArviZ is not installed.
    """
    import arviz

    draws = draw(model, guide, *args, num_samples=num_samples, **kwargs)
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(
            poutine.replay(model, trace=poutine.trace(guide).get_trace(*args, **kwargs))
        ).get_trace(*args, **kwargs)
    observed = {
        name: trace.nodes[name]["value"]
        for name in draws.log_likelihood
        if not _no_data(trace.nodes[name])
    }
    drawn = {**draws.values, **draws.deterministic}
    groups: dict[str, dict[str, Any]] = {
        "posterior": {k: _array(v)[None] for k, v in drawn.items()},
        "sample_stats": {
            "log_weight": _array(draws.log_weights)[None],
            "lp": _array(draws.log_prob)[None],
        },
    }
    if observed:
        groups["observed_data"] = {k: _array(v) for k, v in observed.items()}
        groups["log_likelihood"] = {k: _array(v)[None] for k, v in draws.log_likelihood.items()}
        if predictive:
            predicted = _predict(model, draws.values, args, kwargs)
            groups["posterior_predictive"] = {
                k: _array(v)[None] for k, v in predicted.items() if k in observed
            }
    named = _plate_dims(draws, {**{k: v[0] for k, v in drawn.items()}, **observed})
    named.update(dims or {})
    attrs = {"inference_library": "pyroflows"}
    from_dict: Any = functools.partial(arviz.from_dict, coords=dict(coords or {}), dims=named)
    # hasattr tests mislead: 1.x answers True to InferenceData
    if int(arviz.__version__.split(".")[0]) >= 1:
        return from_dict(groups, attrs={"/": attrs})
    return from_dict(**groups, attrs=attrs)


def _plate_dims(draws: GuideDraws, samples: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names of the dimensions of each site, from its plates; axes of no plate are numbered."""
    named = {}
    for name, value in samples.items():
        own = {axis: plate for plate, axis in draws.plates.get(name, [])}
        if own:
            named[name] = [own.get(i - value.dim(), f"{name}_dim_{i}") for i in range(value.dim())]
    return named
