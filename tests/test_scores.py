"""Maps between normal scores and data: known densities, exact slopes, both directions."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pyroflows import Flow
from pyroflows import transforms as T
from pyroflows.density.histogram import Histogram
from pyroflows.density.scores import Marginals, NormalScores

SPIKY = np.concatenate(
    [
        np.random.default_rng(0).uniform(0, 1, 9000),  # nine tenths in a spike
        np.random.default_rng(1).uniform(500, 900, 1000),
    ]
)


def normal(s, log_slope):
    """Log-density of values whose scores are standard normal."""
    return log_slope - 0.5 * s * s - 0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize("lower", [None, 0.0])
def test_scores_of_a_histogram_have_its_density(lower):
    if lower == 0.0:
        values = np.concatenate([[0.0, 0.0], SPIKY])  # the support ends where the data do
        hist = Histogram.fit(values, lower=0.0)
    else:
        values, hist = SPIKY, Histogram.fit(SPIKY)
    scores = NormalScores.of(hist)
    x = torch.as_tensor(np.sort(values)[20:-20:7])
    s, log_slope = scores.inverse_and_log_det(x)
    group, inside = hist.log_density(x)
    error = (normal(s, log_slope) - hist.bin_mass[group].log() - inside).abs()
    assert error.quantile(0.99) < 1e-3
    assert s.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("make", ["fit", "of"])
def test_scores_of_both_kinds_are_bijections_with_exact_slopes(make):
    if make == "fit":
        scores = NormalScores.fit(SPIKY, lower=0.0)
    else:
        scores = NormalScores.of(Histogram.fit(SPIKY, lower=-0.5), lower=-0.5)
    s = torch.linspace(-6, 6, 1001, dtype=torch.float64, requires_grad=True)
    x, log_det = scores.forward_and_log_det(s)
    (slope,) = torch.autograd.grad(x.sum(), s)
    torch.testing.assert_close(log_det, slope.log(), atol=1e-8, rtol=1e-8)
    back, log_slope = scores.inverse_and_log_det(x)
    torch.testing.assert_close(back, s, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(log_slope, -log_det, atol=1e-4, rtol=1e-4)
    assert (x.diff() > 0).all()


def test_edges_themselves_have_scores():
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=3000) ** 3
        hist = Histogram.fit(values)
        scores = NormalScores.of(hist)
        at = torch.cat([hist.edges, hist.edges.nextafter(torch.tensor(torch.inf).double())])
        s, log_slope = scores.inverse_and_log_det(at)
        assert s.isfinite().all() and log_slope.isfinite().all()
        assert scores(scores.scores).isfinite().all()


def test_an_end_of_the_support_is_the_image_of_infinity():
    values = np.random.default_rng(0).exponential(size=4000)
    values[0] = 0.0
    scores = NormalScores.of(Histogram.fit(values, lower=0.0), lower=0.0)
    x = scores(torch.tensor([-60.0, -8.0, 40.0]).double())
    assert x[0] >= 0 and x[0] < 1e-9 and x[1] >= 0 and x[2] > values.max()


def test_a_map_in_another_unit():
    scores = NormalScores.fit(stats.gamma(2).rvs(3000, random_state=0))
    x = torch.linspace(0.1, 20, 50, dtype=torch.float64)
    s, log_slope = scores.inverse_and_log_det(x)
    other, other_slope = scores.rescaled(8.0).inverse_and_log_det(8 * x)
    torch.testing.assert_close(other, s)
    torch.testing.assert_close(other_slope, log_slope - math.log(8))


def test_a_flow_in_data_units_integrates_to_one():
    """Marginals are the data side of a flow: the density of the data itself."""
    rng = np.random.default_rng(0)
    columns = [rng.gamma(2, 10, 4000), rng.normal(3, 1, 4000)]
    parts = [NormalScores.of(Histogram.fit(columns[0])), NormalScores.fit(columns[1])]
    torch.manual_seed(0)
    layer = T.affine_coupling(2, [8])
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    flow = Flow(2, [layer, Marginals(parts)]).double()
    a = torch.linspace(-40, 260, 1201, dtype=torch.float64)
    b = torch.linspace(-4, 10, 281, dtype=torch.float64)
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(a, b)).exp()
        total = density.sum() * (a[1] - a[0]) * (b[1] - b[0])
        assert total.item() == pytest.approx(1, abs=3e-3)
        draws = flow.sample(2000)
        noise, log_det = flow.transform.inverse_and_log_det(draws)
        again, forward = flow.transform.forward_and_log_det(noise)
    torch.testing.assert_close(again, draws, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(forward, -log_det, atol=1e-5, rtol=1e-5)
