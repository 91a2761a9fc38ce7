"""Looking for posterior mass that a guide's own draws do not show."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from pyro import poutine
from pyro.distributions import ImproperUniform, MaskedDistribution
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor
from torch.distributions import Independent

from pyroflows.guides.draws import GuideDraws
from pyroflows.guides.modes import find_modes
from pyroflows.guides.probes import Frame, Gradients, Marginals, chains, scattered_starts
from pyroflows.guides.rows import WholeDensity
from pyroflows.guides.runner import Runner
from pyroflows.weights import WeightSummary, effective_sample_size

__all__ = ["Findings", "look_elsewhere"]


@dataclass
class Findings:
    """What is found on the way to a verdict.

    Attributes:
        problems: What speaks against the guide.
        advice: What to try next.
        checks: What was looked at, and what was not and why; a line each.
        wider: Log-evidence with the modes that the guide lacks; NaN if not searched.
        complete: Whether all that was asked for was looked at.
    """

    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    wider: float = math.nan
    complete: bool = True

    def against(self, problem: str, *advice: str) -> None:
        """Something speaks against the guide."""
        self.problems.append(problem)
        self.advice += [a for a in advice if a not in self.advice]

    def blame(self, departures: list[tuple[float, str]], source: str) -> None:
        """Departures from the guide, the worst first, speak against it if there are any."""
        if departures:
            more = f" (and {len(departures) - 1} more)" if len(departures) > 1 else ""
            self.against(
                f"{source}, {departures[0][1]}{more}",
                "fit longer or with a larger flow, or sample with flow_mcmc; then reparameterize "
                "the model",
            )

    def skipped(self, check: str) -> None:
        """Something could not be looked at."""
        self.checks.append(check)
        self.complete = False


def look_elsewhere(
    found: Findings,
    density: WholeDensity,
    draws: GuideDraws,
    weights: WeightSummary,
    w: Tensor,
    until: float,
) -> None:
    """Modes, chains, prior: each says what it found, or why it did not look.

    Args:
        found: Where it is said.
        density: The model's log-density.
        draws: The guide's draws, S of them.
        weights: Summary of their weights.
        w: Smoothed weights; ``(S,)``.
        until: Time (:func:`time.monotonic`) after which nothing is begun.
    """
    ok = draws.latent.isfinite().all(-1)
    u, w = draws.latent[ok].double(), w[ok]
    if len(u) < 100:
        found.skipped(f"no search: {len(u)} of {len(ok)} draws are finite")
        return
    search = _Search(found, density, u, until)
    search.climb(weights.log_evidence)
    if weights.pareto_k < 0.7:
        search.compare(u, w, "by the importance weights")
    search.follow_chains()
    search.ask_prior()


class _Search:
    """Ways of looking, in coordinates in which the guide's draws are near standard normal."""

    def __init__(self, found: Findings, density: WholeDensity, u: Tensor, until: float) -> None:
        self.found, self.density, self.u, self.until = found, density, u, until
        self.gradients = Gradients(density, Frame.of(u))
        self.marginals = Marginals(u, _coordinates(density), density.turned)

    def compare(self, u: Tensor, w: Tensor, source: str) -> None:
        """Whether weighted latents ``(n, D)`` lie where the guide does."""
        self.found.blame(self.marginals.departures(self.marginals.of(u), w), source)

    def climb(self, log_evidence: float) -> None:
        """Climb to other modes, and compare the mass around each with the guide's."""
        density, found = self.density, self.found
        starts = scattered_starts(
            self.gradients.frame, self.u, density.init_loc, _prior_starts(density, 16)
        )
        if density.elements > 2**14 or density.route == "one by one":  # a third of every kind
            starts = starts[::3]
        steps = max(50, min(100, 100_000 // density.operations))
        modes = find_modes(
            self.gradients, starts, self.u, log_evidence, num_steps=steps, until=self.until
        )
        missing = [m for m in modes.found if math.isfinite(m.surely)]
        found.wider = _log_sum(log_evidence, *(m.missing for m in missing))
        surely = _log_sum(log_evidence, *(m.surely for m in missing))
        share, least = (max(0.0, -math.expm1(log_evidence - z)) for z in (found.wider, surely))
        line = (
            f"modes: {len(modes.found)} from {len(starts)} starts, {len(missing)} with mass that "
            f"the guide lacks ({share:.0%} of the posterior)"
        )
        if modes.troubles:
            line += f"; {len(modes.troubles)} could not be weighed ({modes.troubles[0]})"
        if not modes.complete:
            line += "; stopped by max_time"
        found.checks.append(line)
        found.complete &= modes.complete and bool(modes.found)
        if least > 0.1:
            found.against(
                f"it misses about {share:.0%} of the posterior mass, found elsewhere",
                "fit from another init_loc_fn, or to draws of all modes (fit_guide_to_draws)",
            )

    def follow_chains(self) -> None:
        """Whether chains that begin at the guide's draws stay where the guide is."""
        density, each = self.density, self.density.elements
        num = min(len(self.u), max(64, min(1024, 2**19 // each, 2**18 // self.u.shape[1])))
        length = max(10, min(40, 2**27 // (6 * num * each), 40_000 // density.operations))
        if density.route == "one by one":
            num, length = 64, 20
        generator = torch.Generator().manual_seed(1)
        run = chains(
            self.gradients, self.u[-num:], num_steps=length, until=self.until, generator=generator
        )
        f = torch.stack([self.marginals.of(state) for state in run.states]).mean(0)
        departures = self.marginals.departures(f)
        line = f"chains: {num} of {2 * len(run.states)} steps from the guide's draws"
        if not run.complete:
            self.found.skipped(f"{line}, stopped by max_time")
        else:
            line += f", acceptance {run.acceptance:.0%}, " + (
                "left the guide" if departures else "stayed in the guide"
            )
            self.found.checks.append(line)
        self.found.blame(departures, "by chains from its draws")

    def ask_prior(self) -> None:
        """Compare with the prior's draws, weighted by the likelihood, where these suffice."""
        density, checks = self.density, self.found.checks
        reason = self._why_no_prior()
        if reason:
            checks.append(f"prior: not compared ({reason})")
            return
        prior = poutine.block(density.model, hide_fn=lambda msg: bool(msg.get("is_observed")))
        with torch.no_grad():
            few = density.route == "one by one"
            num = 500 if few else max(500, min(len(self.u), 2**27 // density.elements))
            drawn = Runner(prior, density.args, density.kwargs, density)(num)
            u = density.unconstrain(drawn.values)
            u = torch.where(density.free, torch.randn_like(u), u)  # as their density is
            log_w = density.of_values(drawn.values) - drawn.log_q
        w = torch.softmax(log_w.double().nan_to_num(-math.inf), 0)
        u, w = u[u.isfinite().all(-1)].double(), w[u.isfinite().all(-1)]
        effective = effective_sample_size(w).item()
        if effective < 100:
            checks.append(f"prior: {num} draws, worth {effective:.0f}, too few to compare")
            return
        checks.append(f"prior: {num} draws, worth {effective:.0f}, compared")
        self.compare(u, w, "by the prior's weighted draws")

    def _why_no_prior(self) -> str:
        flat = _improper(self.density)
        if flat:
            return f"that of '{flat}' is improper"
        if self.density.enumerated:
            return "labels are summed out"
        return "max_time" if time.monotonic() > self.until else ""


def _coordinates(density: WholeDensity) -> list[str]:
    """A name for each entry of the flat vector."""
    return [
        s.name if s.size == 1 else f"{s.name}[{i}]" for s in density.sites for i in range(s.size)
    ]


def _log_sum(*terms: float) -> float:
    return torch.tensor(terms, dtype=torch.float64).logsumexp(0).item()


def _prior_starts(density: WholeDensity, num: int) -> Tensor:
    """Flat latents drawn from the prior, ``(num, D)``; improper sites at their middle."""
    u = torch.stack([density.start(init_to_sample) for _ in range(num)])
    return u[u.isfinite().all(-1)]


def _improper(density: WholeDensity) -> str | None:
    """Name of a site whose prior is no distribution."""
    trace = density.trace(density.init_loc)
    for site in density.sites:
        fn, masked = trace.nodes[site.name]["fn"], trace.nodes[site.name]["mask"] is False
        while isinstance(fn, Independent | MaskedDistribution):
            masked |= getattr(fn, "_mask", None) is False
            fn = fn.base_dist
        if masked or isinstance(fn, ImproperUniform):
            return site.name
    return None
