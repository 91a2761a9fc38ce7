"""How far to trust a guide."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyroflows.arviz import to_arviz
from pyroflows.diagnostics_search import Findings, look_elsewhere
from pyroflows.guides.checks import model_keywords
from pyroflows.guides.draws import (
    GuideDraws,
    draw_from,
    importance_resample,
    posterior_density,
)
from pyroflows.guides.rows import NotJudged, WholeDensity
from pyroflows.guides.sites import Site
from pyroflows.training.seeds import seeded
from pyroflows.weights import WeightSummary, pareto_k, smooth_weights, summarize_weights

__all__ = ["Diagnosis", "diagnose", "importance_resample", "pareto_k", "to_arviz"]

_BLIND = "narrow modes far from every start, and what the chains are too short to reach"


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """The verdict on a guide; ``print`` it.

    Attributes:
        weights: ELBO with its error, evidence, effective sample size, spread and tail of the
            log-weights.
        divergence: Estimate of KL(guide || posterior) in nats: the larger of log-evidence minus
            ELBO and half the squared spread of the log-weights. A lower bound, as the evidence is,
            where the tail of the weights (k-hat) is above 0.7.
        shifts: For each site, how far its means move under importance weights, in posterior
            standard deviations; the largest over its entries. Constant entries do not move.
        wider_evidence: Log-evidence with the modes that the search found and the guide lacks: more
            than the guide's own means posterior mass that it misses. NaN if not searched.
        ok: Whether the guide was judged and nothing speaks against it.
        problems: What does, in plain words.
        advice: What to try next.
        checks: What was looked at, and what was not and why; a line each.
        searched: Whether the search for mass elsewhere ran, chains and all.
        seconds: Time it took.
        not_judged: Why there is no verdict, empty if there is one.
    """

    weights: WeightSummary
    divergence: float
    shifts: dict[str, float]
    wider_evidence: float
    ok: bool
    problems: tuple[str, ...]
    advice: tuple[str, ...]
    checks: tuple[str, ...] = ()
    searched: bool = False
    seconds: float = 0.0
    not_judged: str = ""

    @property
    def verdict(self) -> str:
        """One sentence, or two."""
        if self.not_judged:
            return f"Not judged: {self.not_judged}."
        if self.problems:
            return "Do not trust this guide as it is: " + "; ".join(self.problems) + "."
        if self.searched:
            return (
                "The guide agrees with the posterior, as far as its own draws, a search for other "
                "modes and chains from its draws can tell."
            )
        return (
            "The guide agrees with the posterior as far as its own draws can tell; whether it "
            "misses something elsewhere was not, or not wholly, searched."
        )

    def __str__(self) -> str:
        w = self.weights
        if self.not_judged:
            return f"{self.verdict}\n  {self.seconds:.1f} seconds"
        above = "" if w.pareto_k < 0.7 else "at least "
        shifts = sorted(self.shifts.items(), key=lambda item: -item[1])[:4]
        lines = [
            self.verdict,
            f"  ELBO {w.elbo:.3f} ± {w.elbo_error:.3f}   log-evidence {above}"
            f"{w.log_evidence:.3f}   KL to the posterior {above or 'about '}"
            f"{self.divergence:.3f} nats",
            f"  effective sample size {w.effective_sample_size:.1%}   "
            f"log-weight sd {w.log_weight_sd:.3f}   "
            f"Pareto k {w.pareto_k:.2f}   ({w.num_draws} draws, {w.num_dropped} not finite)",
            "  largest shifts of means under weights (sd): "
            + ", ".join(f"{k} {v:.2f}" for k, v in shifts),
            *(f"  {check}" for check in self.checks),
            f"  not seen by any: {_BLIND}; {self.seconds:.1f} seconds",
        ]
        return "\n".join(lines + [f"  Try: {a}." for a in self.advice])

    __repr__ = __str__


@model_keywords
def diagnose(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 4000,
    search: bool = True,
    max_time: float = 300.0,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Diagnosis:
    """Say how far to trust a guide: any flow or auto-guide, or a custom one.

    - *Importance weights* of the guide's draws tell how well it matches the posterior where it
      puts them. No single number suffices: k-hat is scale-free, so that a guide with log-weights
      of spread 0.01 can show 0.7.
    - *Modes* are climbed to from some 70 starts: around the initial point, at draws from the
      prior, on spheres up to 100 of the guide's standard deviations away. The mass around each is
      compared with the guide's.
    - *Chains* from the guide's draws keep the posterior: if the guide is right they stay in it,
      if its tails are too light or cut, or it is too narrow, they leave.
    - *The prior's* draws, weighted by the likelihood, are compared too where enough of them count.

    None sees a narrow mode far from every start. Subsampled plates are visited whole; what cannot
    be, is not judged. A guide that is a point (``AutoDelta``) has no density, and is said to.

    Cost: ``num_samples`` evaluations of the model; for the search, some 150 batches of 80
    gradients and 500 of up to 256, as time allows.

    Args:
        model: The model.
        guide: The guide, fitted.
        *args: Arguments of both.
        num_samples: Draws from the guide.
        search: Whether to look beyond them.
        max_time: Seconds after which the search stops; the verdict then says so.
        model_kwargs: Keyword arguments of both whose names are also names of these options.
        **kwargs: Keyword arguments of both.

    Raises:
        ValueError: If the guide draws no value for a continuous latent of the model.
    """
    begun = time.monotonic()
    kwargs = {**kwargs, **(model_kwargs or {})}
    try:
        density = posterior_density(model, guide, args, kwargs)
    except NotJudged as reason:
        return _without_verdict(str(reason), time.monotonic() - begun)
    draws = draw_from(guide, density, num_samples, args, kwargs)
    weights = summarize_weights(draws.log_weights)
    w = smooth_weights(draws.log_weights)[0].exp().nan_to_num(0.0)
    shifts = {s.name: _shift(_entries(density, draws, s), w) for s in density.sites}
    found, points = Findings(), _points(density, draws)
    if points:
        found.complete = False
        found.against(
            f"{points} a point, not a density: ELBO, evidence and weights mean nothing",
            "take it as a point estimate, or fit a guide with a density (AutoFlow, AutoNormal)",
        )
    else:
        _judge_weights(found, weights, shifts)
        if search:
            with seeded(0), pyro.validation_enabled(False):
                look_elsewhere(found, density, draws, weights, w, begun + max_time)
        else:
            found.skipped("no search for other modes, no chains (search=False)")
    return _verdict(found, weights, shifts, time.monotonic() - begun)


def _divergence(weights: WeightSummary) -> float:
    """Estimate of KL(guide || posterior); see :class:`Diagnosis`."""
    return max(weights.log_evidence - weights.elbo, 0.5 * weights.log_weight_sd**2)


def _verdict(
    found: Findings, weights: WeightSummary, shifts: dict[str, float], seconds: float
) -> Diagnosis:
    return Diagnosis(
        weights,
        _divergence(weights),
        shifts,
        wider_evidence=found.wider,
        ok=not found.problems,
        problems=tuple(found.problems),
        advice=tuple(found.advice),
        checks=tuple(found.checks),
        searched=found.complete,
        seconds=seconds,
    )


def _without_verdict(reason: str, seconds: float) -> Diagnosis:
    empty = summarize_weights(torch.empty(0))
    return Diagnosis(
        empty, math.nan, {}, math.nan, False, (), (), seconds=seconds, not_judged=reason
    )


def _points(density: WholeDensity, draws: GuideDraws) -> str:
    """Names of the sites of which all draws are the same, as the subject of a sentence."""
    still = (draws.latent == draws.latent[0]).all(0)
    names = [s.name for s in density.sites if still[s.part].all() and s.size]
    if not names or len(draws.latent) == 1:
        return ""
    return ", ".join(f"'{n}'" for n in names[:4]) + (" is" if len(names) == 1 else " are each")


def _entries(density: WholeDensity, draws: GuideDraws, site: Site) -> Tensor:
    """Values of a site, angles in one turn around their centre; ``(S, *site)``."""
    if density.circular[site.part].any():
        return density.turned(draws.latent)[:, site.part]
    return draws.values[site.name]


def _shift(value: Tensor, w: Tensor) -> float:
    """Largest |weighted mean − mean| over the moving entries of a site, in weighted sd."""
    x = value.detach().double().reshape(len(value), -1)
    if not x.isfinite().all():
        return math.inf
    eps = torch.finfo(value.dtype if value.is_floating_point() else torch.float64).eps
    x = x[:, x.std(0) > 100 * eps * x.abs().amax(0)]
    if not x.shape[1]:
        return 0.0
    mean = w @ x
    sd = (w @ (x - mean).square()).sqrt()
    sd = torch.maximum(sd, 1e-3 * x.std(0))
    return ((mean - x.mean(0)).abs() / sd).max().item()


def _judge_weights(found: Findings, weights: WeightSummary, shifts: dict[str, float]) -> None:
    """What the importance weights say against the guide."""
    divergence = _divergence(weights)
    if weights.num_dropped > 0.01 * weights.num_draws or not math.isfinite(weights.elbo):
        found.against(
            f"{weights.num_dropped} of {weights.num_draws} draws have weights that are not finite",
            "bound the supports, or look for overflow in the model; run in float64",
        )
    if not divergence < 0.12:
        found.against(
            f"it is {'at least' if weights.pareto_k > 0.7 else 'about'} {divergence:.2f} nats "
            "from the posterior where it looks",
            "fit longer or with a larger flow (fit_guide with num_steps=); then reparameterize "
            "the model",
        )
    if weights.pareto_k > 1 and divergence > 0.02:
        found.against(
            "its tails are too light: the weights, far out, have no mean (k-hat "
            f"{weights.pareto_k:.1f})",
            "use a flow or family with heavier tails, or reparameterize the model",
        )
    far = {name: s for name, s in shifts.items() if not s < 0.3}
    if far and (weights.pareto_k < 0.7 or divergence > 0.05):
        worst = max(far, key=lambda name: far[name])
        found.against(
            f"importance weights move '{worst}' by {far[worst]:.2f} posterior standard deviations"
        )
        if weights.pareto_k < 0.7:
            found.advice.append(
                "use importance_resample: the weights are good enough (k-hat below 0.7)"
            )
