"""Fitting a guide: pre-fit, path gradients, many particles, a schedule, guards."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.checks import check_run, finite_start, model_keywords
from pyroflows.guides.elbo import PathGradientELBO
from pyroflows.guides.gaussian import Gaussian, Target, normal_points
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.mixture import Mixture, find_mixture
from pyroflows.guides.path import (
    BasePoints,
    PathGradient,
    flow_groups,
    guide_schedule,
    guide_steps,
)
from pyroflows.guides.prefit import prefit
from pyroflows.guides.saving import SavedGuide
from pyroflows.training import Best, Budget, History, Steps, progress_bar, seeded
from pyroflows.training.options import refuse_uncallable
from pyroflows.training.steps import Optimize
from pyroflows.weights import WeightSummary, summarize_weights

__all__ = ["FitResult", "Options", "fit_guide"]

_MOST_GRADIENTS = 50_000
_EVERY = 10  # steps between records

Callback = Callable[[History], object]


@dataclass(repr=False)
class FitResult(History):
    """What :func:`fit_guide` did.

    Its losses are minus the ELBO of each step, in nats; NaN for a step without a finite particle.
    Every ten steps have a record: ``step``, ``train`` (their mean loss), ``lr``, ``seconds``,
    ``skipped``. It converged where the ELBO had levelled off before the last step of the longest
    schedule, and what was reached is kept.

    Attributes:
        prefit: The Gaussian from which the flow started, or the mixture of several; None if there
            was no pre-fit.
        candidates: All Gaussians that were considered.
        diagnostics: Summary of fresh importance weights after the fit.
        num_gradients: Evaluations of the model's gradient, pre-fit included.
        num_dropped: Particles without a finite density or gradient.
        num_failed: Evaluations at which the model raised.
        reverted: Whether training made it worse than where it began, which was then put back.
        cpu_seconds: Processor time.
    """

    prefit: Gaussian | Mixture | None = None
    candidates: list[Gaussian] = field(default_factory=list)
    diagnostics: WeightSummary | None = None
    num_gradients: int = 0
    num_dropped: int = 0
    num_failed: int = 0
    reverted: bool = False
    cpu_seconds: float = 0.0

    def __repr__(self) -> str:
        """Sum the fit up in a line."""
        if self.diagnostics is not None:
            elbo = f"ELBO {self.diagnostics.elbo:.3f} ± {self.diagnostics.elbo_error:.3f}"
        else:
            recent = self.recent()
            elbo = f"ELBO about {-recent:.3f}" if math.isfinite(recent) else "no finite ELBO"
        notes = [elbo, f"{len(self.losses)} steps", f"{self.num_gradients} gradients"]
        notes += [f"{self.num_dropped} particles dropped"] if self.num_dropped else []
        notes += [f"the model raised {self.num_failed} times"] if self.num_failed else []
        notes += ["converged"] if self.converged else []
        notes += ["put back to where it began"] if self.reverted else []
        notes += [f"stopped by {self.stopped}"] if self.stopped else []
        return f"FitResult({', '.join(notes)}, {self.cpu_seconds:.1f} s of processor time)"


@dataclass
class Options:
    """How :func:`fit_guide` trains; see there."""

    num_steps: int | None
    num_particles: int
    lr: float
    iwae: bool
    temperature: float
    max_gradients: int
    max_time: float | None
    progress: bool
    callback: Callable[[int, float], object] | None
    callbacks: Sequence[Callback]
    optimizer: Optimize | None

    def __post_init__(self) -> None:
        for name in (
            "num_steps",
            "num_particles",
            "temperature",
            "lr",
            "max_gradients",
            "max_time",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"fit_guide: {name} must be positive; got {value}")
        refuse_uncallable("fit_guide", self.callbacks, self.optimizer)
        self.budget = Budget(self.max_time)

    def steps(
        self, groups: list[dict[str, Any]], most: int, result: FitResult, *, window: int = 0
    ) -> Steps:
        """Steps for these parameters, recorded in the result."""
        clock = None if math.isinf(self.budget.limit) else self.budget.window()
        schedule = guide_schedule(most, window=window, clock=clock)
        return guide_steps(groups, self.lr, schedule, result, self.optimizer)

    def longest(self, used: int, default: int | None = None) -> int:
        """Steps that are allowed after ``used`` gradients, by ``num_steps`` or its default."""
        allowed = (self.max_gradients - used) // self.num_particles
        steps = self.num_steps or default
        return max(1, allowed if steps is None else min(steps, allowed))

    def heat(self, step: int, most: int) -> float:
        """What the model's log-density is divided by at a step."""
        num_anneal = 0 if self.temperature == 1.0 else most // 2
        return self.temperature ** (1 - step / num_anneal) if step < num_anneal else 1.0

    def seconds_of_prefit(self) -> float | None:
        """Half of the time that is left; None for no end."""
        budget = self.budget
        if math.isinf(budget.limit):
            return None
        return max(0.0, budget.limit - budget.seconds()) / 2


@model_keywords
def fit_guide(
    model: Callable,
    guide: AutoFlow | Callable,
    *args: Any,
    num_steps: int | None = None,
    num_particles: int = 64,
    progress: bool = True,
    seed: int | None = None,
    lr: float | None = None,
    iwae: bool = False,
    temperature: float = 1.0,
    prefit_first: bool | None = None,
    max_gradients: int | None = None,
    max_time: float | None = None,
    callback: Callable[[int, float], object] | None = None,
    callbacks: Callback | Sequence[Callback] | None = (),
    optimizer: Optimize | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> FitResult:
    r"""Fit a guide to the posterior of a model: an :class:`AutoFlow`, or any reparameterized one.

    Each step draws base points z, maps them to latents u, and follows the gradient of the ELBO; as
    the rate falls below half, its path gradient,

    .. math:: \nabla_\theta \frac1S \sum_s \big[\log p(u_s) - \log q_{\bar\theta}(u_s)\big],
        \qquad u_s = T_\theta(z_s), \quad \bar\theta\ \text{held fixed},

    whose variance vanishes when the guide is exact. Adam with warm-up and a cosine to zero;
    gradients are clipped to twice their running median. Model and guide first run once under
    Pyro's validation. The guide never ends worse than where it began: the pre-fit, or the state it
    came in.

    Where the model has no finite density (-inf, NaN, an exception) a particle lies outside of the
    posterior: the ELBO is
    :math:`E_q[\log p - \log q \mid \text{inside}] + 10 \log q(\text{inside})`, still a lower bound
    of the evidence. A per cent of impossible draws costs a tenth of a nat, and the gradient
    of :math:`\log q(\text{inside})` drives the guide inside.

    A guide of another kind gets all of this but the pre-fit and convergence: 1,000 steps if
    ``num_steps`` is None.

    Cost: by default at most 50,000 gradients of the model, the pre-fit included; one forward and
    one inverse pass of the flow per step.

    Args:
        model: The Pyro model; its own parameters, if any, are trained with the guide's.
        guide: The guide, new or partly trained.
        *args: Arguments of the model.
        num_steps: Steps; up to 700 if None, fewer where the ELBO levels off.
        num_particles: Draws per step, evaluated as one batch.
        progress: Whether to show a progress bar.
        seed: Seed of everything random here; the global states are then given back untouched.
        lr: Largest learning rate of Adam; if None, 0.01, or 0.002 with iwae.
        iwae: Whether to maximize the importance-weighted bound of all particles of a step; it
            covers more of the posterior, and suits importance sampling.
        temperature: Where to begin annealing: the model's log-density is divided by it in the
            pre-fit and at the start, by less and less until half of the steps, then by 1.
            Above 1 for posteriors with several modes that overlap.
        prefit_first: Whether to pre-fit a Gaussian first; if None, only a guide that was never
            trained.
        max_gradients: Gradients of the model at most, the pre-fit included (which takes a fifth at
            most); 50,000 if None, unless ``num_steps`` says how many.
        max_time: Seconds, on the clock of :class:`pyroflows.training.Budget`, by which the rate
            has fallen to zero and the fit ends; half of them for the pre-fit at most.
        callback: Called as ``callback(step, loss)`` after each step; what is true ends the fit.
        callbacks: Called with the :class:`FitResult` after every ten steps; its last record is
            ``result.records[-1]``. What returns true ends the fit.
        optimizer: Called as ``optimizer(groups, lr=lr)`` in place of Adam; a class of
            ``torch.optim`` will do. The groups of an AutoFlow have rates of their own.
        model_kwargs: Keyword arguments of the model whose names are also names of these options.
        **kwargs: Keyword arguments of the model.

    Returns:
        Losses, pre-fit and diagnostics.

    Raises:
        ValueError: What Pyro's validation finds; a start without finite density, naming the site;
            a guide of another model; a keyword that model and fit both have.

    References:
        Roeder, Wu, Duvenaud (2017), Sticking the landing. arXiv:1703.09194
        Agrawal, Domke (2024), Disentangling impact of capacity, objective, batchsize, estimators,
        and step-size on flow VI. arXiv:2412.08824
    """
    kwargs = {**kwargs, **(model_kwargs or {})}
    result, begun = FitResult(), time.process_time()
    options = Options(
        num_steps=num_steps,
        num_particles=num_particles,
        lr=(0.002 if iwae else 0.01) if lr is None else lr,
        iwae=iwae,
        temperature=temperature,
        max_gradients=(
            (_MOST_GRADIENTS if num_steps is None else 2**62)
            if max_gradients is None
            else max_gradients
        ),
        max_time=max_time,
        progress=progress,
        callback=callback,
        callbacks=[callbacks] if callable(callbacks) else list(callbacks or ()),
        optimizer=optimizer,
    )
    with seeded(seed):
        if isinstance(guide, SavedGuide):
            guide.remember(model).setup(*args, **kwargs)
        if isinstance(guide, AutoFlow) and guide.holds_all:
            density = guide.density_of(model, args, kwargs)
            _begin(density, guide, prefit_first, options, result)
            _FlowFit(density, guide, options, result).run()
            _tell_failures(density, result)
        else:
            check_run(model, guide, args, kwargs, sums_labels=False)
            with pyro.validation_enabled(False), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Encountered NaN: loss")  # the losses tell
                _train_any(model, guide, args, kwargs, options, result)
    result.cpu_seconds, result.seconds = time.process_time() - begun, options.budget.seconds()
    return result


# ---------------------------------------------------------------------------- where it begins


def _begin(
    density: LatentDensity,
    guide: AutoFlow,
    prefit_first: bool | None,
    options: Options,
    result: FitResult,
) -> None:
    """Check model and guide, find a start of finite density, and pre-fit."""
    whitening = guide.whitening
    fresh = torch.equal(guide.vector, guide.transport[0].initial.to(guide.vector))
    if not (fresh if prefit_first is None else prefit_first):
        check_run(density.model, guide, density.args, density.kwargs)
        return
    start = finite_start(density, whitening.loc.clone())
    values = None if start is None else density.constrain(start)
    check_run(density.model, guide, density.args, density.kwargs, values)
    if start is None:
        raise ValueError(
            "fit_guide: neither the start, nor points around it, nor draws from the prior have a "
            "finite density together"
        )
    for _ in range(3):  # again where it leaves the middle of the turn of an angle
        before = density.centre
        best = _prefit(density.frozen(), start, whitening.full_rank, options, result)
        best.loc = density.recentre(best.loc)
        start = best.loc.to(start)
        moved = (density.centre - before)[density.circular].abs()
        if not (moved > 0.5).any():
            break
    frozen, temperature = density.frozen(), options.temperature
    left = options.seconds_of_prefit()
    target = Target(
        frozen,
        start.dtype,
        max_gradients=min(10_000, options.max_gradients // 5),
        deadline=math.inf if left is None else time.monotonic() + left,
        batch_size=frozen.batch_size,
    )
    mixture = find_mixture(target, result.candidates, best.loc, search=temperature > 1.0)
    result.num_gradients += target.num_gradients
    result.prefit = best
    if mixture is not None and mixture.elbo > best.elbo + 0.05:
        result.prefit, options.temperature = mixture, 1.0  # the modes are there already
    elif temperature != 1.0:
        tempered = _Tempered(frozen, temperature)
        result.prefit = _prefit(tempered, start, whitening.full_rank, options, result)
    guide.place(result.prefit)


def _prefit(
    log_density: LatentDensity | _Tempered,
    start: Tensor,
    full_rank: bool,
    options: Options,
    result: FitResult,
) -> Gaussian:
    best, result.candidates, used = prefit(
        log_density,
        start,
        full_rank=full_rank,
        max_gradients=min(10_000, options.max_gradients // 5),
        max_time=options.seconds_of_prefit(),
    )
    result.num_gradients += used
    return best


@dataclass
class _Tempered:
    """A log-density divided by a temperature."""

    density: LatentDensity
    temperature: float

    @property
    def batch_size(self) -> int:
        """That of the density."""
        return self.density.batch_size

    def __call__(self, u: Tensor) -> Tensor:
        return self.density(u) / self.temperature


def _tell_failures(density: LatentDensity, result: FitResult) -> None:
    result.num_failed = density.failures.count
    if result.num_failed:
        warnings.warn(
            f"fit_guide: the model raised at {density.failures}; such points count as impossible. "
            "Guard the model if they are not",
            stacklevel=4,
        )


def _model_parameters(density: LatentDensity) -> list[Tensor]:
    """Unconstrained leaves of the model's own parameters."""
    with torch.no_grad(), poutine.trace(param_only=True) as seen:
        density(density.init_loc)
    return [p for p in _leaves(seen.trace).values() if p.requires_grad]


# ---------------------------------------------------------------------------- steps


def _train(steps: Steps, objective: Callable[[int], float], most: int, options: Options) -> None:
    """Take the objective's steps until something ends them."""
    result, begun = steps.history, steps.count
    bar = progress_bar(steps, desc="fit_guide", total=most, show=options.progress)
    try:
        for step in bar:
            steps.take(partial(objective, step))
            if options.callback is not None and options.callback(step, result.losses[-1]):
                steps.stop("callback")
            if (step + 1 - begun) % _EVERY == 0:
                result.records.append(
                    dict(
                        step=steps.count,
                        train=result.recent(_EVERY),
                        lr=steps.lr,
                        seconds=options.budget.seconds(),
                        skipped=steps.skipped,
                    )
                )
                bar.set_postfix(ELBO=f"{-result.recent():.3f}")
                if any([callback(result) for callback in options.callbacks]):
                    steps.stop("callback")
    except KeyboardInterrupt:
        steps.stop("interrupt")
    finally:
        bar.close()


class _FlowFit:
    """The training of an :class:`AutoFlow` on a density, and the guard around it."""

    def __init__(
        self, density: LatentDensity, guide: AutoFlow, options: Options, result: FitResult
    ) -> None:
        self.density, self.options, self.result = density, options, result
        self.vector, self.like = guide.vector, guide.whitening.loc
        self.others = _model_parameters(density)
        self.groups = flow_groups(guide, options.lr)
        leaves = [group["params"] for group in self.groups]
        # The path gradient costs an inverse pass and pays near the optimum: from the start for
        # the default flow, which is pre-fitted and cheap to invert, late for others, never where
        # the inverse takes a pass for each latent.
        forward, inverse = guide.transport.calls
        cheap = inverse <= 2 * forward
        self.objective = PathGradient(
            density,
            guide,
            leaves,
            self.others,
            iwae=options.iwae,
            path_below=0.0 if not cheap else math.inf if guide.has_default_flow else 0.3,
        )

    def run(self) -> None:
        """Train, then keep what is better: the end or the beginning."""
        began = Best([self.vector, *self.others])
        with torch.no_grad():
            before = self.log_weights()
        if not before.isfinite().any():
            raise ValueError(
                "fit_guide: no draw of the guide has a finite density under the model, so there "
                "is no slope to follow: make the guide anew, or pre-fit it (prefit_first=True)"
            )
        self.train()
        with torch.no_grad():
            after = self.log_weights()
            if self.is_worse(after, before):
                began.restore(start=True)
                self.result.reverted, after = True, before
        self.result.converged &= not self.result.reverted
        self.result.diagnostics = summarize_weights(after)

    def log_weights(self, num: int = 1024) -> Tensor:
        """Log p - log q at fixed base points; -inf outside. Minibatches: eight fixed ones."""
        noise, dim, like = self.objective.noise, self.density.dim, self.like
        z = noise.points(normal_points(num, dim, like=like, seed=1))
        if not self.density.stochastic:
            return self.objective.log_weights(z)
        parts, objective = [], copy.copy(self.objective)
        for k, part in enumerate(z.chunk(8)):
            objective.density = self.density.frozen(k)
            parts.append(objective.log_weights(part))
        return torch.cat(parts)

    def is_worse(self, after: Tensor, before: Tensor) -> bool:
        """Whether the bound fell by more than its error: three of them, half a nat at most.

        The error is that of differences at the same base points. The bound of many particles may
        cost half a nat of the ELBO.
        """
        gain = (after - before)[after.isfinite() & before.isfinite()].double()
        error = (gain.std() / len(gain) ** 0.5).item() if len(gain) > 1 else 0.0
        margin = min(max(3 * error, 0.01), 0.5)
        new, old = summarize_weights(after).elbo, summarize_weights(before).elbo
        return not new > old - (0.5 if self.options.iwae else margin)

    def train(self) -> None:
        """Follow the gradient for as long as the schedule says."""
        options, result, noise = self.options, self.result, self.objective.noise
        points = BasePoints(options.num_particles, self.density.dim, self.like)
        most = options.longest(result.num_gradients)
        levels_off = options.num_steps is None and options.temperature == 1.0
        window = 60 if levels_off and not self.density.stochastic else 0
        groups = self.groups + [{"params": p} for p in self.others]
        steps = options.steps(groups, most, result, window=window)

        def objective(step: int) -> float:
            z = noise.points(points.draw())
            return self.objective(z, steps.factor, options.heat(step, most))

        _train(steps, objective, most, options)
        result.num_dropped = self.objective.num_dropped
        result.num_gradients += len(result.losses) * options.num_particles


def _train_any(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    options: Options,
    result: FitResult,
) -> None:
    """Fit a guide that is no :class:`AutoFlow` through Pyro's messages; see :func:`fit_guide`."""
    elbo = PathGradientELBO(options.num_particles, iwae=options.iwae)
    most = options.longest(0, default=1000)
    with poutine.trace(param_only=True) as seen:
        before = _fixed_loss(model, guide, args, kwargs, options)
    leaves = list(_leaves(seen.trace).values())
    began = Best(leaves)
    steps = options.steps([{"params": leaves}], most, result)

    def objective(step: int) -> float:
        elbo.temperature = options.heat(step, most)
        return elbo.loss_and_grads(model, guide, *args, **kwargs)

    _train(steps, objective, most, options)
    result.num_gradients += len(result.losses) * options.num_particles
    if not _fixed_loss(model, guide, args, kwargs, options) <= before + 0.5:
        began.restore(start=True)
        result.reverted = True


def _fixed_loss(
    model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any], options: Options
) -> float:
    """The loss at fixed random numbers, to compare states by."""
    elbo, losses = PathGradientELBO(options.num_particles, iwae=options.iwae), []
    for k in range(8):
        with seeded(k):
            losses.append(elbo.loss(model, guide, *args, **kwargs))
    return sum(losses) / len(losses)


def _leaves(trace: poutine.Trace) -> dict[str, Tensor]:
    """Unconstrained leaves of the parameters of a trace, each once whatever names it has."""
    found: dict[Tensor, str] = {}
    for name, site in trace.nodes.items():
        if site["type"] == "param":
            found.setdefault(site["value"].unconstrained(), name)
    return {name: leaf for leaf, name in found.items()}
