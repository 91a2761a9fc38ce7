"""Diagnosis against posteriors of known evidence; importance resampling; the ArviZ bridge."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal

from pyroflows import AutoFlow, diagnose, fit_guide, importance_resample, to_arviz
from pyroflows.guides import draw
from pyroflows.weights import pareto_k, smooth_weights, summarize_weights

MEAN, COV = torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.6], [0.6, 0.5]])


def correlated():
    pyro.sample("x", dist.MultivariateNormal(MEAN, COV))


def two_modes():
    x = pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
    pyro.factor(
        "f", torch.logaddexp(dist.Normal(-6.0, 0.5).log_prob(x), dist.Normal(6.0, 0.5).log_prob(x))
    )


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        effect = pyro.deterministic("effect", mu + tau * theta)
        pyro.sample("y", dist.Normal(effect, sigma), obs=y)


Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def normal_guide(loc, scale_tril):
    guide = AutoMultivariateNormal(correlated)
    guide()
    with torch.no_grad():
        guide.loc.copy_(loc)
    guide.scale = scale_tril.diagonal().clone()
    guide.scale_tril = scale_tril / scale_tril.diagonal()[:, None]
    return guide


def test_a_right_guide_is_not_flagged():
    diagnosis = diagnose(correlated, normal_guide(MEAN, torch.linalg.cholesky(COV)))
    assert diagnosis.ok and not diagnosis.problems
    assert diagnosis.weights.elbo == pytest.approx(0, abs=1e-3)
    assert diagnosis.weights.effective_sample_size == pytest.approx(1, abs=1e-3)
    assert "agrees" in str(diagnosis)


@pytest.mark.parametrize("shift, scale", [(0.6, 1.0), (0.0, 0.4), (0.0, 2.0), (3.0, 1.0)])
def test_a_wrong_guide_is_flagged(shift, scale):
    sd = COV.diagonal().sqrt()
    guide = normal_guide(MEAN + shift * sd, scale * torch.linalg.cholesky(COV))
    diagnosis = diagnose(correlated, guide)
    assert not diagnosis.ok and diagnosis.advice
    assert diagnosis.verdict.startswith("Do not trust")


def test_shifts_are_in_posterior_standard_deviations():
    factor = torch.linalg.cholesky(COV)
    guide = normal_guide(MEAN + 0.25 * COV.diagonal().sqrt(), 1.3 * factor)
    diagnosis = diagnose(correlated, guide, num_samples=20_000)
    assert diagnosis.shifts["x"] == pytest.approx(0.25, abs=0.05)
    assert diagnosis.weights.log_evidence == pytest.approx(0, abs=0.02)


def test_a_missed_mode_is_found_although_the_weights_look_perfect():
    guide = AutoDiagonalNormal(
        two_modes, init_loc_fn=lambda site: torch.tensor(6.0), init_scale=0.5
    )
    guide()
    diagnosis = diagnose(two_modes, guide)
    assert diagnosis.weights.effective_sample_size > 0.99
    assert not diagnosis.ok and "misses about 50%" in diagnosis.verdict
    assert diagnose(two_modes, guide, search=False).ok


def test_weights_that_are_not_finite_are_reported():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("hole", torch.where(x > 0, torch.nan, 0.0))

    guide = AutoNormal(model, init_scale=1.0)
    guide()
    diagnosis = diagnose(model, guide, num_samples=500)
    assert not diagnosis.ok and "not finite" in diagnosis.verdict
    assert 0.4 < diagnosis.weights.num_dropped / 500 < 0.6


def test_draws_weigh_as_the_traces_do():
    guide = AutoFlow(schools).setup(Y, SIGMA)
    draws = draw(schools, guide, Y, SIGMA, num_samples=30, batch_size=20)
    assert draws.values["theta"].shape == (30, 8) and draws.values["mu"].shape == (30,)
    assert draws.log_likelihood["y"].shape == (30, 8)
    density = guide.density(Y, SIGMA)
    u = density.unconstrain(draws.values)
    expected = density(u) - guide.get_posterior().log_prob(u)
    torch.testing.assert_close(draws.log_weights, expected, atol=1e-3, rtol=1e-4)
    by_hand = dist.Normal(
        draws.values["mu"][:, None] + draws.values["tau"][:, None] * draws.values["theta"], SIGMA
    ).log_prob(Y)
    torch.testing.assert_close(draws.log_likelihood["y"], by_hand)


def test_draws_of_a_model_that_cannot_be_batched():
    X = torch.randn(5, 3)

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(X @ w, 1.0).to_event(1), obs=torch.zeros(5))

    guide = AutoFlow(model, init_scale=1.0)
    draws = draw(model, guide, num_samples=5)
    w = draws.values["w"]
    assert w.shape == (5, 3)
    expected = dist.Normal(w @ X.T, 1.0).log_prob(torch.zeros(5))
    torch.testing.assert_close(draws.log_likelihood["y"], expected)


def test_importance_resample_corrects_a_guide():
    guide = normal_guide(MEAN + 0.5 * COV.diagonal().sqrt(), 1.3 * torch.linalg.cholesky(COV))
    draws = importance_resample(correlated, guide, num_samples=4000)["x"]
    assert draws.shape == (4000, 2)
    torch.testing.assert_close(draws.mean(0), MEAN, atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(draws.T), COV, atol=0.06, rtol=0)


def test_pareto_k_against_arviz():
    arviz = pytest.importorskip("arviz")
    if int(arviz.__version__.split(".")[0]) >= 1:
        pytest.skip("psislw moved in ArviZ 1")
    generator = torch.Generator().manual_seed(0)
    for shape in (0.1, 0.5, 1.0):
        lw = shape * -torch.log(torch.rand(3000, generator=generator, dtype=torch.float64))
        smoothed, k = smooth_weights(lw)
        expected, expected_k = arviz.psislw(lw.numpy())
        assert k == pytest.approx(float(expected_k), abs=0.02)
        np.testing.assert_allclose(smoothed.exp(), np.exp(expected), rtol=0.02, atol=1e-7)


def test_pareto_k_at_the_edges():
    assert pareto_k(torch.zeros(100)) == -math.inf
    assert pareto_k(torch.tensor([0.0, math.nan, 1.0])) == math.inf
    assert pareto_k(torch.full((10,), -math.inf)) == math.inf
    summary = summarize_weights(torch.full((10,), math.nan))
    assert summary.num_dropped == 10 and summary.effective_sample_size == 0


def test_to_arviz_and_loo():
    arviz = pytest.importorskip("arviz")
    guide = AutoFlow(schools)
    fit_guide(schools, guide, Y, SIGMA, seed=0, progress=False, num_steps=150)
    data = to_arviz(schools, guide, Y, SIGMA, num_samples=200, coords={"school": list("abcdefgh")})
    assert data["posterior"]["theta"].dims == ("chain", "draw", "school")
    assert list(data["posterior"]["school"].values) == list("abcdefgh")
    assert data["posterior_predictive"]["y"].shape == (1, 200, 8)
    assert data["log_likelihood"]["y"].shape == (1, 200, 8)
    np.testing.assert_allclose(data["observed_data"]["y"].values, Y)
    assert set(data["sample_stats"].data_vars) == {"log_weight", "lp"}
    predicted = data["posterior_predictive"]["y"].values
    assert not np.allclose(predicted, Y) and predicted.std() > 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eight points: some influential
        loo = arviz.loo(data)
    elpd = getattr(loo, "elpd_loo", None) or loo.elpd
    assert elpd == pytest.approx(-31, abs=1.5)
    effect = data["posterior"]["effect"]
    assert effect.dims == ("chain", "draw", "school")
    by_hand = data["posterior"]["mu"] + data["posterior"]["tau"] * data["posterior"]["theta"]
    np.testing.assert_allclose(effect, by_hand, rtol=1e-4, atol=1e-4)
    assert len(arviz.summary(data)) == 18


def test_to_arviz_takes_events_apart():
    pytest.importorskip("arviz")

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m[..., None], 1.0).expand(m.shape + (4,)).to_event(1), obs=y)
        pyro.factor("prior", -(m**2))

    guide = AutoFlow(model).setup(torch.ones(4))
    data = to_arviz(model, guide, torch.ones(4), num_samples=11)
    assert data["log_likelihood"]["y"].shape == (1, 11, 4)
    assert "prior" not in data["log_likelihood"]
