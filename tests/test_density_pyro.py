"""Fitted tables as Pyro distributions: exact, differentiable, usable as priors."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from scipy import stats

from pyroflows.density import DensityEstimator


@pytest.fixture(scope="module")
def estimator():
    rng = np.random.default_rng(0)
    a = rng.normal(size=800)
    frame = pd.DataFrame({"a": 3 + a, "b": np.exp(0.5 * a + 0.3 * rng.normal(size=800))})
    return DensityEstimator(max_steps=200, members=1, hidden_dim=16, random_state=0).fit(frame)


def test_log_prob_is_the_score_and_integrates(estimator):
    d = estimator.distribution()
    assert d.event_shape == (2,) and d.batch_shape == ()
    x = d.sample((500,))
    assert x.shape == (500, 2) and d.support.check(x).all()
    rows = pd.DataFrame(x.double().numpy(), columns=["a", "b"])
    np.testing.assert_allclose(d.log_prob(x).numpy(), estimator.score_samples(rows), atol=1e-4)
    box = torch.cartesian_prod(torch.linspace(-2, 8, 400), torch.linspace(1e-3, 12, 600))
    mass = d.log_prob(box).exp().sum() * (10 / 399) * (12 / 599)
    assert mass == pytest.approx(1, abs=0.03)
    assert d.expand((3,)).log_prob(x[0]).shape == (3,)
    assert d.expand((3,)).sample((5,)).shape == (5, 3, 2)
    assert d.log_prob(x.double()).dtype == torch.float64


def test_gradient_agrees_with_differences(estimator):
    d = estimator.distribution()
    x = d.sample((40,)).double().requires_grad_()
    (grad,) = torch.autograd.grad(d.log_prob(x).sum(), x)
    h = 1e-3
    for i in range(2):
        step = h * torch.eye(2, dtype=torch.float64)[i]
        slope = (d.log_prob(x + step) - d.log_prob(x - step)) / (2 * h)
        assert ((slope - grad[:, i]).abs() < 0.05 * (1 + grad[:, i].abs())).double().mean() > 0.8


def test_prior_in_nuts_and_svi(estimator):
    prior = estimator.distribution()

    def model(y):
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x[0], 0.5), obs=y)

    mcmc = MCMC(
        NUTS(model, max_tree_depth=4), num_samples=120, warmup_steps=60, disable_progbar=True
    )
    mcmc.run(torch.tensor(4.0))
    draws = mcmc.get_samples()["x"]
    # importance weighting of exact prior draws is the oracle
    x = prior.sample((20000,))
    w = stats.norm(x[:, 0], 0.5).pdf(4.0)
    for i in range(2):
        want = np.average(x[:, i], weights=w)
        assert float(draws[:, i].mean()) == pytest.approx(want, abs=0.25)
    guide = AutoNormal(model)
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(torch.tensor(4.0)) for _ in range(80)]
    assert np.mean(losses[-30:]) < np.mean(losses[:30])


def test_lattices_and_point_masses_become_smooth():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "k": rng.poisson(50, 600),
            "r": np.where(rng.random(600) < 0.3, 0.0, rng.gamma(3.0, size=600)),
        }
    )
    d = DensityEstimator(max_steps=40, members=2, random_state=0).fit(frame).distribution()
    x = d.sample((1000,)).double()
    assert (x[:, 0] != x[:, 0].round()).all() and (x[:, 1] > 0).all()
    grid = torch.cartesian_prod(
        torch.linspace(0, 120, 500), torch.linspace(1e-3, 20, 400)
    ).double()
    assert d.log_prob(grid).exp().sum() * (120 / 499) * (20 / 399) == pytest.approx(1, abs=0.03)


def test_labels_and_given_columns_are_refused():
    frame = pd.DataFrame({"a": np.random.default_rng(0).normal(size=60), "b": ["x", "y"] * 30})
    with pytest.raises(ValueError, match=r"labels: \['b'\]"):
        DensityEstimator(max_steps=3).fit(frame).distribution()
    with pytest.raises(ValueError, match=r"given: \['b'\]"):
        DensityEstimator(max_steps=3, target="a").fit(frame).distribution()
