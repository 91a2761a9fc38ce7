"""Fitting: known posteriors, the path gradient, minibatches, other objectives, chains."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from torch import nn

from pyroflows import (
    AmortizedFlow,
    AutoFlow,
    PathGradientELBO,
    diagnose,
    fit_guide,
    fit_guide_to_draws,
    neural_spline,
)
from pyroflows.guides import flow_mcmc
from pyroflows.guides.elbo import outside_term, shares
from pyroflows.weights import bound


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(4), (v / 2).exp()[..., None]).to_event(1))


def banana():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.3))


def ring():
    angle = torch.arange(8) * math.pi / 4
    centres = 4 * torch.stack([angle.cos(), angle.sin()], -1)
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
    each = dist.Normal(centres, 0.5).log_prob(x[..., None, :]).sum(-1)
    pyro.factor("modes", torch.logsumexp(each, -1) - math.log(8))


def regression(X, y):
    """Raw scales: its posterior has a correlation of -0.9999."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
    pyro.sample("y", dist.Normal(b @ X.T, 1.0).to_event(1), obs=y)


def fitted(model, *args, seed=0, **kwargs):
    guide = AutoFlow(model)
    return guide, fit_guide(model, guide, *args, seed=seed, progress=False, **kwargs)


@pytest.mark.parametrize("model, gap", [(banana, 0.02), (funnel, 0.06)])
def test_known_evidence_is_reached(model, gap):
    guide, result = fitted(model, num_steps=300)
    assert abs(result.diagnostics.elbo) < gap
    assert result.num_gradients <= 50_000
    draws = guide.sample_posterior(20_000)
    name, sd = ("x", 1.0) if model is banana else ("v", 3.0)
    assert abs(draws[name].mean() / sd) < 0.05
    assert abs(math.log(draws[name].std() / sd)) < 0.06


def test_raw_scales_against_the_closed_form():
    torch.set_default_dtype(torch.float64)
    try:
        x = torch.linspace(4000, 4100, 30)
        X = torch.stack([torch.ones(30), x], -1)
        y = X @ torch.tensor([3.0, -0.2]) + torch.randn(30)
        guide, result = fitted(regression, X, y)
        cov = torch.linalg.inv(X.T @ X)
        b = guide.sample_posterior(20_000)["b"]
        mean_error = (b.mean(0) - cov @ X.T @ y).abs() / cov.diagonal().sqrt()
        assert mean_error.max() < 0.03
        assert (b.std(0) / cov.diagonal().sqrt()).log().abs().max() < 0.03
        assert result.converged and len(result.losses) < 400
    finally:
        torch.set_default_dtype(torch.float32)


def test_seed_repeats_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    first, second = (fitted(banana, num_steps=5)[0].packed for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fit_never_ends_worse_than_its_prefit():
    guide, result = fitted(banana, num_steps=60, lr=5.0)
    assert result.reverted
    assert result.diagnostics.elbo == pytest.approx(result.prefit.elbo, abs=0.1)


def test_particles_that_are_not_finite_are_dropped():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("hole", torch.where(x > 1.5, torch.nan, 0.0))

    guide, result = fitted(model, num_steps=100)
    assert result.num_dropped > 0
    assert guide.packed.isfinite().all() and math.isfinite(result.losses[-1])


def test_model_parameters_are_trained_too():
    x = torch.randn(200) * 0.5 + 2.0

    def model(x):
        scale = pyro.param("scale", torch.tensor(3.0), constraint=dist.constraints.positive)
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        pyro.sample("x", dist.Normal(m[..., None] + torch.zeros(200), scale).to_event(1), obs=x)

    fitted(model, x, num_steps=300, lr=0.05)
    assert pyro.param("scale").item() == pytest.approx(x.std().item(), rel=0.1)


def test_minibatches_give_the_whole_posterior():
    x = torch.randn(300) + 1.0

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", 300, subsample_size=60) as index:
            pyro.sample("x", dist.Normal(m, 1.0), obs=x[index])

    guide, _ = fitted(model, x, num_steps=500)
    (loc,), (scale,) = guide._loc_scale()
    assert abs(loc - x.mean()) < 0.5 * 300**-0.5
    assert scale == pytest.approx(300**-0.5, rel=0.15)


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal, AutoIAFNormal, AutoFlow])
def test_path_gradient_agrees_with_the_elbos(make):
    """Same expectation as Trace_ELBO's, for guides with and without transforms."""
    y = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 1.5]])

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 3):
            t = pyro.sample("t", dist.Normal(m, 1.0))
            with pyro.plate("rows", 2):
                pyro.sample("y", dist.Normal(t, 1.0), obs=y)

    guide = make(model, init_scale=0.7) if make is not AutoIAFNormal else make(model)
    guide(y)
    grads = {}
    for elbo in (Trace_ELBO, PathGradientELBO):
        objective = elbo(20_000, vectorize_particles=True)
        guide.zero_grad()
        pyro.set_rng_seed(0)
        loss = objective.loss_and_grads(model, guide, y)
        parts = [p.grad.flatten() for p in guide.parameters() if p.grad is not None]
        grads[elbo] = loss, torch.cat(parts)
    (loss, g), (path_loss, path_g) = grads.values()
    assert path_loss == pytest.approx(loss, rel=1e-4)
    assert (path_g - g).norm() < 0.05 * g.norm() + 0.05
    objective = PathGradientELBO(64)
    guide.zero_grad()
    objective.differentiable_loss(model, guide, y).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in guide.parameters())


def test_path_gradient_vanishes_where_the_guide_is_exact():
    def model():
        pyro.sample(
            "x", dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])).to_event(1)
        )

    guide = AutoMultivariateNormal(model)
    guide()
    with torch.no_grad():
        guide.loc.copy_(torch.tensor([1.0, -2.0]))
    guide.scale = torch.tensor([0.5, 2.0])
    PathGradientELBO(5).loss_and_grads(model, guide)
    assert guide.loc.grad.abs().max() < 1e-4


def test_path_gradient_in_svi_and_its_errors():
    guide = AutoFlow(banana)
    for kwargs in ({}, {"iwae": True}, {"temperature": 2.0}):
        svi = SVI(banana, guide, pyro.optim.Adam({"lr": 0.01}), PathGradientELBO(16, **kwargs))
        assert all(math.isfinite(svi.step()) for _ in range(3))
        assert math.isfinite(svi.evaluate_loss())

    def discrete():
        pyro.sample("k", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="'k'"):
        PathGradientELBO().loss_and_grads(discrete, discrete)
    with pytest.raises(ValueError, match="vectorize_particles"):
        PathGradientELBO(4, vectorize_particles=False, iwae=True)
    with pytest.raises(ValueError, match="temperature"):
        PathGradientELBO(4, temperature=0.0)
    with pytest.raises(ValueError, match="positive"):
        fit_guide(banana, guide, num_steps=0)


def test_importance_weighted_bound_is_tighter():
    guide, _ = fitted(funnel, num_steps=30)
    elbo = -PathGradientELBO(2000).loss(funnel, guide)
    bound = -PathGradientELBO(2000, iwae=True).loss(funnel, guide)
    assert elbo < bound < 0.1


def test_several_modes_become_components_of_the_base():
    """Eight overlapping modes on a ring, of equal mass."""
    guide, result = fitted(ring, num_steps=60)
    assert result.prefit.locs.shape == (8, 2)
    assert abs(result.diagnostics.elbo) < 0.01
    x = guide.sample_posterior(4000)["x"]
    octant = (torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round().long() % 8
    share = torch.bincount(octant, minlength=8) / 4000
    assert (share - 1 / 8).abs().max() < 4 * (7 / 64 / 4000) ** 0.5


def test_modes_far_apart_and_of_unequal_mass():
    """Two and one parts of the mass at a distance of forty standard deviations, searched for."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
        near, far = (dist.Normal(m, 0.5).log_prob(x) for m in (-10.0, 10.0))
        pyro.factor("f", torch.logaddexp(near + math.log(2 / 3), far + math.log(1 / 3)))

    guide, result = fitted(model, temperature=30.0, num_steps=40)
    assert abs(result.diagnostics.elbo) < 0.01
    x = guide.sample_posterior(4000)["x"]
    assert (x > 0).float().mean().item() == pytest.approx(1 / 3, abs=4 * (2 / 9 / 4000) ** 0.5)
    assert x.abs().mean().item() == pytest.approx(10.0, abs=0.05)
    assert guide.median()["x"] < -8


def test_both_labels_of_a_mixture_are_covered():
    y = torch.cat([torch.randn(30) - 3, torch.randn(15) + 3])

    def model(y):
        w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        with pyro.plate("rows", len(y)):
            k = pyro.sample("k", dist.Categorical(w), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(m[k], 1.0), obs=y)

    guide, result = fitted(model, y, num_steps=60)
    assert result.diagnostics.effective_sample_size > 0.9
    draws = guide.sample_posterior(4000)
    first = draws["m"][:, 0] > 0
    assert first.float().mean().item() == pytest.approx(0.5, abs=0.04)
    for switched in (first, ~first):  # the same posterior under either order of the labels
        m = draws["m"][switched].mean(0).sort().values
        assert (m - torch.tensor([y[:30].mean(), y[30:].mean()])).abs().max() < 0.1
    assert (draws["w"][first, 0].mean() - draws["w"][~first, 1].mean()).abs() < 0.03
    loaded = AutoFlow(model)  # the base travels
    loaded.load_state_dict(guide.state_dict())
    torch.testing.assert_close(loaded.log_prob(draws, y), guide.log_prob(draws, y))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), TraceEnum_ELBO(max_plate_nesting=1))
    assert math.isfinite(svi.step(y))


def test_forward_divergence_covers_every_mode():
    angle = torch.randint(8, (4000,)) * math.pi / 4
    draws = 4 * torch.stack([angle.cos(), angle.sin()], -1) + 0.5 * torch.randn(4000, 2)
    guide = AutoFlow(ring)
    result = fit_guide_to_draws(guide, {"x": draws}, num_steps=600, seed=0)
    assert result.losses[-1] < result.losses[0] - 1
    assert diagnose(ring, guide).weights.effective_sample_size > 0.5
    with pytest.raises(ValueError, match="draws"):
        fit_guide_to_draws(guide, {"x": draws[:2]})


def test_amortized_flow_matches_the_exact_posterior():
    """Conjugate rows: the exact local posterior and global marginal are known."""
    n, sd = 60, 0.5
    x = 1.5 + (1 + sd**2) ** 0.5 * torch.randn(n, 2)

    def model(x, size=None):
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(x), subsample_size=size):
            batch = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(m[..., None] + torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, sd).to_event(1), obs=batch)

    guide = AmortizedFlow(model, nn.Linear(2, 4), 4)
    fit_guide(model, guide, x, 20, num_particles=8, num_steps=400, lr=0.02, progress=False, seed=0)
    with pyro.plate("particles", 500, dim=-2), torch.no_grad():
        draws = AmortizedFlow.forward(guide, x, 20)
    assert draws["z"].shape == (500, 20, 2)
    variance = (1 + sd**2) / (2 * n)
    assert abs(draws["m"].mean() - x.mean()) < 0.5 * variance**0.5 + 0.02
    assert math.log(draws["m"].std() / variance**0.5) == pytest.approx(0, abs=0.3)
    context = torch.cat([guide.encoder(x), torch.full((n, 1), 1.5)], -1)
    local = guide.local_posterior(context).sample((1000,))
    gain = 1 / (1 + sd**2)
    assert (local.mean(0) - (1.5 + gain * (x - 1.5))).abs().mean() < 0.12
    assert local.std(0).mean() == pytest.approx((gain * sd**2) ** 0.5, rel=0.15)


def test_amortized_flow_scales_minibatches():
    x = torch.randn(40, 2)

    def model(x, size):
        with pyro.plate("rows", 40, subsample_size=size):
            batch = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample(
                "x", dist.Normal(z[..., None] + torch.zeros(2), 1.0).to_event(1), obs=batch
            )

    losses = []
    for size in (40, 8):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AmortizedFlow(model, nn.Linear(2, 3), 3, local_names=["z"])
        guide(x, size)
        with torch.no_grad():
            losses.append(sum(Trace_ELBO().loss(model, guide, x, size) for _ in range(300)) / 300)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_amortized_flow_errors():
    def no_locals(x):
        pyro.sample("m", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="use AutoFlow"):
        AmortizedFlow(no_locals, nn.Linear(1, 1), 1).setup(torch.zeros(3, 1))


def test_flow_as_prior():
    flow = neural_spline(2, num_transforms=2, hidden_dims=[16])

    def model():
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=torch.tensor([1.0, -1.0]))

    guide, result = fitted(model, num_steps=60)
    assert math.isfinite(result.diagnostics.elbo)


def test_chains_in_the_flows_coordinates_are_exact():
    guide, _ = fitted(funnel, num_steps=200)
    pyro.set_rng_seed(0)
    chains = flow_mcmc(funnel, guide, num_samples=80, num_chains=64, warmup_steps=30)
    v = chains.samples["v"]
    assert v.shape == (64, 80) and chains.samples["x"].shape == (64, 80, 4)
    assert abs(v.mean()) < 0.3 and abs(v.std() - 3) < 0.3
    assert chains.rhat < 1.2 and chains.independence_rate > 0.5 and chains.hmc_rate > 0.5


def test_bounds_and_shares_of_known_weights():
    log_w = torch.tensor([1.0, 2.0, 6.0, 0.0]).log()  # the last lies outside
    inside = (math.log(2.0) + math.log(6.0)) / 3
    assert bound(log_w) == pytest.approx(inside + 10 * math.log(3 / 4))
    assert bound(log_w, iwae=True) == pytest.approx(math.log(9 / 4))
    assert math.isnan(bound(torch.full((3,), -math.inf))) and bound(log_w[:1]) == 0.0
    assert shares(log_w).tolist() == [0.25] * 4
    w = torch.tensor([1.0, 2.0, 6.0, 0.0]) / 9
    torch.testing.assert_close(shares(log_w, iwae=True, squared=False), w)
    mixed = shares(log_w, iwae=True, mix=0.1)
    torch.testing.assert_close(mixed, 0.9 * w**2 + 0.1 / 4)
    log_q = torch.tensor([-1.0, -math.inf], requires_grad=True)
    outside_term(log_q, 2).backward()
    assert log_q.grad.tolist() == [5.0, 0.0]


def test_callbacks_see_records_and_optimizers_are_called():
    seen, made = [], []

    def optimizer(groups, lr):
        made.append(([g["lr"] for g in groups], lr))
        return torch.optim.SGD(groups, lr=lr)

    def stop(history):
        seen.append(history.records[-1])
        return len(seen) == 3

    _, result = fitted(banana, num_steps=100, lr=1e-3, callbacks=stop, optimizer=optimizer)
    assert result.stopped == "callback" and len(result.losses) == 30
    assert [r["step"] for r in seen] == [10, 20, 30]
    mean = sum(result.losses[10:20]) / 10
    assert seen[1]["train"] == pytest.approx(mean) and seen[1]["skipped"] == 0
    assert made == [([pytest.approx(1e-3 / 0.03), 1e-3], 1e-3)]
    assert list(result.frame()["step"]) == [10, 20, 30]


def test_fit_of_the_importance_weighted_bound():
    guide, result = fitted(banana, num_steps=200, iwae=True)
    assert not result.reverted
    assert abs(result.diagnostics.log_evidence) < 0.03
    assert result.diagnostics.effective_sample_size > 0.8


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(callbacks=[3]), TypeError, "callbacks to be functions"),
        (dict(optimizer=pyro.optim.Adam({"lr": 0.1})), TypeError, "functools.partial"),
        (dict(optimizer=partial(torch.optim.SGD, lr=0.1)), ValueError, "pass lr to fit_guide"),
    ],
)
def test_what_cannot_be_called_is_refused(options, error, match):
    with pytest.raises(error, match=match):
        fit_guide(banana, AutoFlow(banana), progress=False, **options)
