"""Fitting a guide: pre-fit, path gradients, many particles, a schedule, guards."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.checks import check_run, finite_start, model_keywords
from pyroflows.guides.elbo import PathGradientELBO
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.mixture import Mixture, find_mixture
from pyroflows.guides.prefit import Gaussian, Target, normal_points, prefit
from pyroflows.guides.routes import seeded
from pyroflows.guides.saving import SavedGuide
from pyroflows.guides.schedule import BasePoints, GradientClipper, Schedule
from pyroflows.weights import OUTSIDE, WeightSummary, summarize_weights

__all__ = [
    "FitResult",
    "GradientClipper",
    "Schedule",
    "fit_guide",
    "leaves_of",
]

_MOST_GRADIENTS = 50_000


@dataclass(repr=False)
class FitResult:
    """What :func:`fit_guide` did.

    Attributes:
        losses: Minus the ELBO of each step, in nats; NaN for a step without a finite particle.
        prefit: The Gaussian from which the flow started, or the mixture of several; None if there
            was no pre-fit.
        candidates: All Gaussians that were considered.
        diagnostics: Summary of fresh importance weights after the fit.
        num_gradients: Evaluations of the model's gradient, pre-fit included.
        num_dropped: Particles without a finite density or gradient.
        num_failed: Evaluations at which the model raised.
        converged: Whether the ELBO had levelled off before the last step of the longest schedule,
            and what was reached is kept.
        reverted: Whether training made it worse than where it began, which was then put back.
        stopped: What ended the fit early: ``"max_time"``, ``"callback"``, ``"interrupt"``; or "".
        cpu_seconds: Processor time.
    """

    losses: list[float] = field(default_factory=list)
    prefit: Gaussian | Mixture | None = None
    candidates: list[Gaussian] = field(default_factory=list)
    diagnostics: WeightSummary | None = None
    num_gradients: int = 0
    num_dropped: int = 0
    num_failed: int = 0
    converged: bool = False
    reverted: bool = False
    stopped: str = ""
    cpu_seconds: float = 0.0

    def __repr__(self) -> str:
        """Sum the fit up in a line."""
        finite = [x for x in self.losses[-50:] if math.isfinite(x)]
        if self.diagnostics is not None:
            elbo = f"ELBO {self.diagnostics.elbo:.3f} ± {self.diagnostics.elbo_error:.3f}"
        else:
            elbo = f"ELBO about {-sum(finite) / len(finite):.3f}" if finite else "no finite ELBO"
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
    deadline: float
    progress: bool
    callback: Callable[[int, float], object] | None


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
        max_time: Seconds after which it comes to an end, half of them for the pre-fit at most; the
            rate falls to zero by then.
        callback: Called as ``callback(step, loss)`` after each step; what is true ends the fit.
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
    positive = {
        "num_steps": num_steps,
        "num_particles": num_particles,
        "temperature": temperature,
        "lr": lr,
        "max_gradients": max_gradients,
        "max_time": max_time,
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"fit_guide: {name} must be positive; got {value}")
    result, begun, now = FitResult(), time.process_time(), time.monotonic()
    options = Options(
        num_steps,
        num_particles,
        (0.002 if iwae else 0.01) if lr is None else lr,
        iwae,
        temperature,
        max_gradients or (_MOST_GRADIENTS if num_steps is None else 2**62),
        math.inf if max_time is None else now + max_time,
        progress,
        callback,
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
    result.cpu_seconds = time.process_time() - begun
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
    target = Target(
        frozen,
        start.dtype,
        max_gradients=min(10_000, options.max_gradients // 5),
        deadline=_half(options.deadline),
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


def _half(deadline: float) -> float:
    """Half of the time that is left until a deadline, as a deadline."""
    now = time.monotonic()
    return deadline if math.isinf(deadline) else now + max(0.0, deadline - now) / 2


def _prefit(
    log_density: LatentDensity | _Tempered,
    start: Tensor,
    full_rank: bool,
    options: Options,
    result: FitResult,
) -> Gaussian:
    left = _half(options.deadline) - time.monotonic()
    best, result.candidates, used = prefit(
        log_density,
        start,
        full_rank=full_rank,
        max_gradients=min(10_000, options.max_gradients // 5),
        max_time=left if math.isfinite(left) else None,
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


def _steps(most: int, schedule: Schedule, options: Options, result: FitResult) -> Iterator[int]:
    """Numbers of steps, with a progress bar, until something ends them; losses are in result."""
    bar = tqdm(range(most), desc="fit_guide", unit="step", disable=not options.progress)
    begun = time.monotonic()
    try:
        for step in bar:
            if step and time.monotonic() >= options.deadline:
                result.stopped = "max_time"
                return
            yield step
            if step % 10 == 9:
                if math.isfinite(options.deadline):
                    now = time.monotonic()
                    left = (options.deadline - now) * (step + 1) / max(now - begun, 1e-9)
                    schedule.end_within(step + 1, left)
                window = [x for x in result.losses[-50:] if math.isfinite(x)]
                elbo = f"{-sum(window) / len(window):.3f}" if window else "not finite"
                bar.set_postfix(ELBO=elbo)
            if options.callback is not None and options.callback(step, result.losses[-1]):
                result.stopped = "callback"
                return
    finally:
        bar.close()


class _State:
    """A copy of tensors, and the way back to it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.kept = [t.detach().clone() for t in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, kept in zip(self.tensors, self.kept, strict=True):
            tensor.copy_(kept)


def _shares(log_weights: Tensor, iwae: bool, along_path: bool) -> Tensor:
    """Weight of each particle in the gradient: equal, or by the normalized weights of the bound.

    Along the path these are squared (Tucker et al. 2019, eq. 8). A tenth of the objective is the
    ELBO: the bound alone does not see draws where the posterior has no mass.
    """
    equal = torch.full_like(log_weights, 1 / len(log_weights))
    if not iwae:
        return equal
    w = torch.softmax(log_weights, 0).nan_to_num(0.0)
    return torch.lerp(w.square() if along_path else w, equal, 0.1)


def leaves_of(
    guide: AutoFlow, lr: float, others: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[float], torch.optim.Optimizer]:
    """Leaves, rates and Adam: the flow's own parameters at their own rate, and the affine map."""
    parts = guide.transport[0].leaves(guide.vector)
    leaves = [part for part, _ in parts] + list(others)
    rates = [lr / unit for _, unit in parts] + [lr] * len(others)
    return (
        leaves,
        rates,
        torch.optim.Adam([{"params": [p]} for p in leaves], betas=(0.9, 0.99), fused=True),
    )


class _FlowFit:
    """The training of an :class:`AutoFlow` on a density, and the guard around it."""

    def __init__(
        self, density: LatentDensity, guide: AutoFlow, options: Options, result: FitResult
    ) -> None:
        self.density, self.guide, self.options, self.result = density, guide, options, result
        self.vector, self.noise, self.whitening = guide.vector, guide.noise, guide.whitening
        self.others = _model_parameters(density)
        self.leaves, self.rates, self.optimizer = leaves_of(guide, options.lr, self.others)
        packed = guide.transport[0]
        parts = self.leaves[: len(packed.groups)]
        self.flow, self.fixed = packed.at(parts), packed.at([p.detach() for p in parts])
        # The path gradient costs an inverse pass and pays near the optimum: from the start for
        # the default flow, which is pre-fitted and cheap to invert, late for others, never where
        # the inverse takes a pass for each latent.
        forward, inverse = packed.calls
        cheap = inverse <= 2 * forward
        self.path_below = 0.0 if not cheap else 0.3 if guide._flow else math.inf

    def run(self) -> None:
        """Train, then keep what is better: the end or the beginning."""
        began = _State([self.vector, *self.others])
        with torch.no_grad():
            before = self.log_weights()
        if not before.isfinite().any():
            raise ValueError(
                "fit_guide: no draw of the guide has a finite density under the model, so there "
                "is no slope to follow: make the guide anew, or pre-fit it (prefit_first=True)"
            )
        try:
            self.train()
        except KeyboardInterrupt:
            self.result.stopped = "interrupt"
        with torch.no_grad():
            after = self.log_weights()
            if self.is_worse(after, before):
                began.restore()
                self.result.reverted, after = True, before
        self.result.converged &= not self.result.reverted
        self.result.diagnostics = summarize_weights(after)

    def log_weights(self, num: int = 1024) -> Tensor:
        """Log p - log q at fixed base points; -inf outside. Minibatches: eight fixed ones."""
        whitening = self.whitening
        z = self.noise.points(normal_points(num, self.density.dim, like=whitening.loc, seed=1))
        v, log_det = self.flow._step(z, None, inverse=False)
        u = whitening.loc + whitening.spread(v)
        if self.density.stochastic:
            parts = [self.density.frozen(k)(part) for k, part in enumerate(u.chunk(8))]
            log_p = torch.cat(parts)
        else:
            log_p = self.density(u)
        log_q = self.noise.log_prob(z) - log_det - whitening.log_det
        return torch.where(log_p.isfinite(), log_p, -math.inf) - log_q

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
        options, result = self.options, self.result
        points = BasePoints(options.num_particles, self.density.dim, self.whitening.loc)
        allowed = (options.max_gradients - result.num_gradients) // options.num_particles
        most = max(1, allowed if options.num_steps is None else min(options.num_steps, allowed))
        levels_off = (
            options.num_steps is None
            and options.temperature == 1.0
            and not self.density.stochastic
        )
        schedule, clip = Schedule(most, window=60 if levels_off else 0), GradientClipper()
        num_anneal = 0 if options.temperature == 1.0 else most // 2
        for step in _steps(most, schedule, options, result):
            factor = schedule.factor(step)
            if factor == 0.0 and step:
                break
            heat = options.temperature ** (1 - step / num_anneal) if step < num_anneal else 1.0
            self.optimizer.zero_grad()
            usable = self.gradient(self.noise.points(points.draw()), factor, heat)
            schedule.see(result.losses)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            if usable and clip(self.leaves):
                self.optimizer.step()
        result.converged = schedule.converged
        result.num_gradients += len(result.losses) * options.num_particles

    def gradient(self, z: Tensor, factor: float, heat: float) -> bool:
        """Put the gradient at base points ``z`` into the leaves; whether there is one."""
        whitening, iwae, num = self.whitening, self.options.iwae, len(z)
        v, log_det = self.flow._step(z, None, inverse=False)
        v_leaf = v.detach().requires_grad_()
        along_path = factor < self.path_below or (iwae and self.path_below > 0)
        log_p = self.density(whitening.loc + whitening.spread(v_leaf)) / heat
        log_q = self.noise.log_prob(z) - log_det.detach()
        lw = log_p.detach() - log_q
        inside = lw.isfinite()
        ok = inside
        if along_path:
            z_back, log_det_back = self.fixed._step(v_leaf, None, inverse=True)
            log_q = self.noise.log_prob(z_back) + log_det_back
            # where rounding spoils the inverse, the gradient is not to be trusted
            ok = ok & ((log_det_back + log_det).abs() < 0.1)
        share = _shares(lw.where(ok, -math.inf), iwae, along_path)
        (log_p - log_q).backward(share.where(ok, 0.0))
        ok = ok & v_leaf.grad.isfinite().all(-1)
        count, num_inside = int(ok.sum()), int(inside.sum())
        self.result.num_dropped += num - count
        bound = lw[inside].logsumexp(0) - math.log(num)
        if not iwae and num_inside:
            bound = lw[inside].mean() + OUTSIDE * math.log(num_inside / num)
        loss = -(bound + whitening.log_det).item() if num_inside else math.nan
        self.result.losses.append(loss)
        if not count:
            return False
        kept = 1.0 if iwae else num / count
        pull = torch.where(ok[:, None], -kept * v_leaf.grad, 0.0)
        if along_path:
            v.backward(pull)
        else:
            entropy = -kept * share.where(ok, 0.0)
            torch.autograd.backward([v, log_det], [pull, entropy])
        if num_inside < num:
            self.drive_inside(v_leaf.detach()[~inside], num_inside)
        if self.others:
            self.of_the_model(v_leaf.detach(), ok, share * kept / heat)
        return True

    def drive_inside(self, outside: Tensor, num_inside: int) -> None:
        r"""Add the gradient of :math:`-10 \log q(\text{inside})`, which the points outside tell.

        .. math:: \nabla \log q(\text{inside})
            = -\tfrac{q(\text{outside})}{q(\text{inside})} E_q[\nabla\log q \mid \text{outside}]
        """
        z, log_det = self.flow._step(outside, None, inverse=True)
        log_q = self.noise.log_prob(z) + log_det
        log_q = log_q[log_q.detach().isfinite()]
        if len(log_q):
            (OUTSIDE * log_q.sum() / num_inside).backward()

    def of_the_model(self, v: Tensor, ok: Tensor, share: Tensor) -> None:
        """Turn the gradients of the model's parameters, without particles that spoil them."""
        if not bool(ok.all()):
            for p in self.others:
                p.grad = None
            log_p = self.density(self.whitening.loc + self.whitening.spread(v[ok]))
            if log_p.requires_grad:
                log_p.backward(share[ok])
        for p in self.others:
            if p.grad is not None:
                p.grad.neg_()


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
    clip = GradientClipper()
    allowed = options.max_gradients // options.num_particles
    most = max(1, min(options.num_steps or 1000, allowed))
    schedule = Schedule(most, window=0)
    num_anneal = 0 if options.temperature == 1.0 else most // 2

    def judge() -> float:
        """Loss at fixed random numbers, to compare states by."""
        judged = PathGradientELBO(options.num_particles, iwae=options.iwae)
        losses = []
        for k in range(8):
            with seeded(k):
                losses.append(judged.loss(model, guide, *args, **kwargs))
        return sum(losses) / len(losses)

    with poutine.trace(param_only=True) as seen:
        before = judge()
    parameters = _leaves(seen.trace)
    optimizer = torch.optim.Adam(parameters.values(), lr=options.lr, betas=(0.9, 0.99), fused=True)
    began = _State(list(parameters.values()))
    try:
        for step in _steps(most, schedule, options, result):
            elbo.temperature = (
                options.temperature ** (1 - step / num_anneal) if step < num_anneal else 1.0
            )
            loss = elbo.loss_and_grads(model, guide, *args, **kwargs)
            for group in optimizer.param_groups:
                group["lr"] = options.lr * schedule.factor(step)
            if clip(list(parameters.values())):
                optimizer.step()
            optimizer.zero_grad()
            result.losses.append(loss)
    except KeyboardInterrupt:
        result.stopped = "interrupt"
    result.num_gradients += len(result.losses) * options.num_particles
    if not judge() <= before + 0.5:
        began.restore()
        result.reverted = True


def _leaves(trace: poutine.Trace) -> dict[str, Tensor]:
    """Unconstrained leaves of the parameters of a trace, each once whatever names it has."""
    found: dict[Tensor, str] = {}
    for name, site in trace.nodes.items():
        if site["type"] == "param":
            found.setdefault(site["value"].unconstrained(), name)
    return {name: leaf for leaf, name in found.items()}
