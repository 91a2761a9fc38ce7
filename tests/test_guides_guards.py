"""What a fit refuses, what it survives, and that it never ends worse than it began."""

import io
import math
import sys
import time
from contextlib import redirect_stderr

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal

from pyroflows import (
    AutoFlow,
    PathGradientELBO,
    diagnose,
    fit_guide,
    flow_mcmc,
    importance_resample,
    to_arviz,
)
from pyroflows.guides.prefit import Gaussian as PrefitGaussian
from pyroflows.guides.prefit import Target, batch_and_match, prefit
from pyroflows.weights import summarize_weights


def fitted(model, *args, seed=0, **kwargs):
    guide = AutoFlow(model)
    return guide, fit_guide(model, guide, *args, seed=seed, progress=False, **kwargs)


def banana():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.3))


# ------------------------------------------------------------------------------- before it begins


def regression(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def coin(y):
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


def impossible():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("never", torch.where(x > 1e9, 0.0, -math.inf))


X, Y = torch.linspace(-1, 1, 20), torch.linspace(-2, 2, 20)
GAP = torch.where(torch.arange(20) == 3, math.nan, Y)


@pytest.mark.parametrize(
    "model, args, message",
    [
        (regression, (X[:, None], Y), "invalid log_prob shape"),
        (regression, (X, GAP), "'y'|site .y.|\"y\""),
        (coin, (torch.tensor([0.0, 1.0, 2.0]),), "Boolean"),
        (impossible, (), "'never' is -inf"),
    ],
)
@pytest.mark.parametrize("make", [AutoFlow, AutoNormal])
def test_what_svi_refuses_is_refused(model, args, message, make):
    with pytest.raises(ValueError, match=message):
        fit_guide(model, make(model), *args, progress=False)


def test_a_start_outside_of_the_support_is_moved_inside():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(x > 1.5, 0.0, -math.inf))

    guide, result = fitted(model, num_steps=200)
    evidence = dist.Normal(0.0, 1.0).cdf(torch.tensor(-1.5)).log().item()
    assert result.diagnostics.log_evidence == pytest.approx(evidence, abs=0.03)


def test_keywords_of_the_model_and_of_the_fit():
    seen = []

    def model(y, temperature=1.0, seed=0, lr=None):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x * temperature, 1.0), obs=y)
        seen.append((temperature, seed, lr))

    y, options = torch.tensor(1.0), {"num_steps": 1, "progress": False}
    with pytest.raises(ValueError, match="both have the keyword 'temperature'.*model_kwargs"):
        fit_guide(model, AutoFlow(model), y, temperature=2.0, **options)
    asked = {"temperature": 3.0, "seed": 7, "lr": "rate"}
    fit_guide(model, AutoFlow(model), y, model_kwargs=asked, seed=1, lr=0.02, **options)
    assert set(seen) == {(3.0, 7, "rate")}
    seen.clear()
    fit_guide(model=model, guide=AutoFlow(model), y=y, model_kwargs={}, temperature=2.0, **options)
    assert set(seen) == {(1.0, 0, None)}
    seen.clear()
    fit_guide(
        model, AutoFlow(model), y, 4.0, temperature=2.0, **options
    )  # the model's by position
    assert set(seen) == {(4.0, 0, None)}
    with pytest.raises(ValueError, match="both by themselves"):
        fit_guide(model, AutoFlow(model), model_kwargs={"y": y}, y=y, **options)


# ------------------------------------------------------------------------------- outside


def half():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.where(x > 1.0, 0.0, -math.inf))


EVIDENCE = dist.Normal(0.0, 1.0).cdf(torch.tensor(-1.0)).log().item()  # -1.841


def test_leaving_the_support_counts():
    guide, result = fitted(half)
    summary = result.diagnostics
    assert EVIDENCE - 0.2 < summary.elbo < EVIDENCE + 3 * summary.elbo_error
    assert summary.log_evidence == pytest.approx(EVIDENCE, abs=0.03)
    assert all(c.elbo < EVIDENCE + 0.05 for c in result.candidates)
    x = guide.sample_posterior(4000)["x"]
    assert (x < 1.0).float().mean() < 0.02
    inside = x[x > 1.0]
    density = dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0)).exp().item()
    assert inside.mean().item() == pytest.approx(density / math.exp(EVIDENCE), abs=0.05)


def test_weights_of_zero_lower_the_bound():
    lw = torch.tensor([0.5, 0.7, -math.inf, -math.inf])
    summary = summarize_weights(lw)
    assert summary.elbo == pytest.approx(0.6 + 10 * math.log(0.5))
    assert summary.elbo < summary.log_evidence


def test_the_gradient_of_a_bound_with_points_outside():
    """Against the closed form of log q(inside) where log p - log q is constant inside."""
    sd = 0.8

    def model():
        x = pyro.sample("x", dist.Normal(0.3, sd))
        pyro.factor("f", torch.where(x > 0.0, 0.0, -math.inf))

    guide = AutoNormal(model, init_scale=sd)
    guide()
    with torch.no_grad():
        guide.locs.x.copy_(torch.tensor(0.3))
    loss = PathGradientELBO(100_000).loss_and_grads(model, guide)
    m = torch.tensor(0.3, requires_grad=True)
    log_inside = dist.Normal(0.0, 1.0).cdf(m / sd).log()
    log_inside.backward()
    assert loss == pytest.approx(-10 * log_inside.item(), abs=0.1)
    assert guide.locs.x_unconstrained.grad.item() == pytest.approx(-10 * m.grad.item(), rel=0.03)


def test_a_particle_at_which_the_model_raises_is_counted():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if bool((x > 1.0).any()):
            raise KeyError("beyond one")

    guide = AutoFlow(model)
    with pytest.warns(UserWarning, match="raised at .*KeyError.*beyond one"):
        result = fit_guide(model, guide, num_steps=60, seed=0, progress=False)
    assert result.num_failed > 0 and result.num_dropped > 0
    evidence = dist.Normal(0.0, 1.0).cdf(torch.tensor(1.0)).log().item()
    assert result.diagnostics.log_evidence == pytest.approx(evidence, abs=0.05)
    assert result.diagnostics.num_dropped < 0.03 * result.diagnostics.num_draws


def test_parameters_of_the_model_learn_beside_particles_outside():
    def model():
        shift = pyro.param("shift", torch.tensor(0.0))
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("hole", torch.where(x > 1.0, torch.log(1.0 - x), 0.0 * x))
        pyro.sample("y", dist.Normal(shift, 1.0), obs=torch.tensor(2.0))

    fitted(model, num_steps=150, lr=0.1)
    assert pyro.param("shift").item() == pytest.approx(2.0, abs=0.1)


# ------------------------------------------------------------------------------- pre-fit


def test_no_failure_of_a_candidate_stops_the_others(monkeypatch):
    def broken(*args, **kwargs):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    normal = dist.Normal(torch.tensor([1.0, -1.0]).double(), 0.5).to_event(1)
    candidates = {"laplace": "prefit", "batch_and_match": "prefit", "_bfgs": "climbing"}
    for name, file in candidates.items():
        with monkeypatch.context() as patch:
            # by sys.modules: the package's attribute of that name may be a function
            patch.setattr(sys.modules[f"pyroflows.guides.{file}"], name, broken)
            best, _, _ = prefit(normal.log_prob, torch.zeros(2).double())
        assert best.elbo > -0.01


def test_scores_that_overflow_leave_the_gaussian_finite():
    start = PrefitGaussian(torch.zeros(2).double(), torch.eye(2).double())
    steep = Target(lambda u: -1e150 * u.square().sum(-1), torch.float64)
    found = batch_and_match(steep, start)
    assert found.loc.isfinite().all() and found.scale_tril.isfinite().all()


@pytest.mark.parametrize("full_rank", [True, False])
def test_the_budget_of_the_prefit(full_rank):
    rosenbrock = lambda u: -((1 - u[:, 0]) ** 2) - 100 * (u[:, 1] - u[:, 0] ** 2) ** 2  # noqa: E731
    start = torch.tensor([-3.0, 5.0]).double()
    _, _, used = prefit(rosenbrock, start, full_rank=full_rank, max_gradients=100)
    assert used < 200

    def slow(u):
        time.sleep(0.02)
        return rosenbrock(u)

    begun = time.monotonic()
    prefit(slow, start, full_rank=full_rank, max_time=0.2)
    assert time.monotonic() - begun < 5.0
    _, result = fitted(banana, max_gradients=2000)
    assert result.num_gradients < 2300


# ------------------------------------------------------------------------------- never worse


def test_a_resumed_fit_never_ends_worse_than_it_began():
    guide, first = fitted(banana, num_steps=100)
    before = guide.packed.detach().clone()
    second = fit_guide(banana, guide, num_steps=60, lr=5.0, seed=1, progress=False)
    assert second.reverted and not second.converged and torch.equal(guide.packed, before)
    assert second.diagnostics.elbo == pytest.approx(first.diagnostics.elbo, abs=1e-3)
    pyro_guide = AutoNormal(banana)
    fit_guide(banana, pyro_guide, num_steps=200, seed=0, progress=False)
    kept = [p.detach().clone() for p in pyro_guide.parameters()]
    again = fit_guide(banana, pyro_guide, num_steps=30, lr=50.0, seed=0, progress=False)
    assert again.reverted
    assert all(torch.equal(a, b) for a, b in zip(kept, pyro_guide.parameters(), strict=True))


def test_the_importance_weighted_bound_keeps_the_elbo():
    def funnel():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(4), (v / 2).exp()[..., None]).to_event(1))

    _, result = fitted(funnel, num_steps=200, iwae=True)
    assert not result.reverted
    assert result.diagnostics.elbo > -0.3
    assert result.diagnostics.effective_sample_size > 0.7


# ------------------------------------------------------------------------------- what it says


def test_progress_callbacks_time_and_one_line():
    said = io.StringIO()
    with redirect_stderr(said):
        result = fit_guide(banana, AutoFlow(banana), num_steps=20, seed=0)
    assert "fit_guide" in said.getvalue() and "ELBO" in said.getvalue()
    assert "\n" not in repr(result) and len(repr(result)) < 200 and "ELBO" in repr(result)
    seen = []

    def stop(step, loss):
        seen.append((step, loss))
        return step == 4

    result = fitted(banana, callback=stop)[1]
    assert [s for s, _ in seen] == [0, 1, 2, 3, 4] and [x for _, x in seen] == result.losses
    assert result.stopped == "callback"
    begun = time.monotonic()
    result = fitted(banana, num_steps=10**6, max_time=1.0)[1]
    assert time.monotonic() - begun < 20 and result.stopped in ("max_time", "")
    assert len(result.losses) < 10**6

    def interrupt(step, loss):
        if step == 3:
            raise KeyboardInterrupt

    result = fitted(banana, callback=interrupt)[1]
    assert result.stopped == "interrupt" and math.isfinite(result.diagnostics.elbo)
    for bad in ({"max_time": -1.0}, {"max_gradients": 0}, {"lr": 0.0}):
        with pytest.raises(ValueError, match="must be positive"):
            fitted(banana, **bad)


def test_labels_under_the_path_gradient_are_refused():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("k", dist.Bernoulli(x.sigmoid()), infer={"enumerate": "parallel"})

    guide = AutoFlow(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), PathGradientELBO())
    with pytest.raises(ValueError, match="'k'.*TraceEnum_ELBO"):
        svi.step()
    with pytest.raises(ValueError, match="'k'.*TraceEnum_ELBO"):
        fit_guide(model, AutoNormal(poutine.block(model, hide=["k"])), progress=False)


def test_data_of_wrong_shape_or_range_are_told_before_anything_else():
    def labels():
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Categorical(p), obs=torch.tensor([0, 1, 3]))

    def rows():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 5):
            pyro.sample("y", dist.Normal(m, 1.0), obs=torch.zeros(3))

    for model, reason in ((labels, "at site 'y'"), (rows, "'rows'|site 'y'")):
        with pytest.raises(ValueError, match=reason):
            fit_guide(model, AutoFlow(model), progress=False)


def test_a_latent_that_is_a_point_is_refused():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("square", dist.Delta(x.square()))

    with pytest.raises(ValueError, match=r"'square' is a point.*pyro\.deterministic"):
        AutoFlow(model).setup()


def test_keywords_of_the_model_reach_it_through_everything():
    def model(num_samples, search=False):
        pyro.sample("x", dist.Normal(torch.tensor(float(num_samples)), 1.0))

    guide = AutoFlow(model)
    fit_guide(model, guide, num_samples=7, num_steps=2, progress=False)
    own = {"num_samples": 7}
    with pytest.raises(ValueError, match="diagnose and the model both have the keyword 'num_samp"):
        diagnose(model, guide, num_samples=200)
    verdict = diagnose(model, guide, num_samples=200, search=False, model_kwargs=own)
    assert verdict.weights.num_draws == 200 and abs(verdict.weights.elbo) < 0.02
    for use in (importance_resample, flow_mcmc, to_arviz):
        with pytest.raises(ValueError, match="both have the keyword 'num_samples'"):
            use(model, guide, num_samples=20)
    draws = importance_resample(model, guide, num_samples=20, model_kwargs=own)["x"]
    chains = flow_mcmc(model, guide, num_samples=20, num_chains=4, model_kwargs=own)
    for x in (draws, chains.samples["x"]):
        assert x.mean().item() == pytest.approx(7, abs=4 / 20**0.5)
    idata = to_arviz(model, guide, num_samples=20, model_kwargs=own)
    assert float(idata.posterior["x"].mean()) == pytest.approx(7, abs=4 / 20**0.5)


def test_a_parameter_of_two_names_takes_one_step():
    for make in (AutoIAFNormal, lambda model: AutoNormal(model, init_scale=0.5)):
        pyro.clear_param_store()
        guide = make(banana)
        guide()
        before = [p.detach().clone() for p in guide.parameters()]
        fit_guide(banana, guide, num_steps=1, lr=0.01, seed=0, progress=False)
        moved = [
            (p - b).abs().max().item() for p, b in zip(guide.parameters(), before, strict=True)
        ]
        assert 0 < max(moved) <= 0.011  # a first step of Adam is of the size of its rate


def test_chains_need_a_flow():
    with pytest.raises(TypeError, match="AutoFlow; got AutoNormal"):
        flow_mcmc(banana, AutoNormal(banana))
