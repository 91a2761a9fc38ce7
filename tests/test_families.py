"""Families against closed forms, and what is made of them: maps, couplings, bases."""

import math

import mpmath
import pytest
import torch
from cases import disturb

import pyroflows.transforms as T
from pyroflows.bases import Factorized
from pyroflows.families import CDF, Family, LogisticMixture
from pyroflows.flow import Flow
from pyroflows.guides import transport
from pyroflows.scalar import Affine, Chain

FAMILY = LogisticMixture(3)


def theta(*shape, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return scale * torch.randn(9, *shape, generator=generator, dtype=torch.float64).to(dtype)


def exact_cdf(x, params):
    """F(x) and 1 - F(x) in fifty digits."""
    with mpmath.workdps(50):
        w = [mpmath.exp(mpmath.mpf(float(v))) for v in params[:3]]
        below = above = mpmath.mpf(0)
        for k, rate in enumerate((0.5, 1.0, 1.5)):
            loc = rate * mpmath.mpf(float(params[3 + k]))
            raw = rate * mpmath.mpf(float(params[6 + k])) / 7
            scale = mpmath.exp(7 * raw / mpmath.sqrt(1 + raw**2))
            a = (mpmath.mpf(x) - loc) / scale
            below += w[k] / sum(w) / (1 + mpmath.exp(-a))
            above += w[k] / sum(w) / (1 + mpmath.exp(a))
        return below, above


def test_density_and_distribution_function():
    params = theta(1)
    edges = torch.linspace(-60, 60, 60_001, dtype=torch.float64)
    middle, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    p = FAMILY.log_prob(middle, params).exp() * width
    assert float(p.sum()) == pytest.approx(1, abs=1e-9)
    below = FAMILY.logit_cdf(edges[1:], params).sigmoid()
    torch.testing.assert_close(p.cumsum(0), below, rtol=0, atol=1e-6)


@pytest.mark.parametrize("x", [-300.0, -30.0, -1.0, 0.7, 30.0, 300.0])
def test_tails_against_fifty_digits(x):
    params = theta()
    below, above = exact_cdf(x, params)
    y = FAMILY.logit_cdf(torch.tensor(x, dtype=torch.float64), params)
    assert float(y) == pytest.approx(float(mpmath.log(below / above)), rel=1e-13, abs=1e-13)
    single = FAMILY.logit_cdf(torch.tensor(x), params.float())
    assert float(single) == pytest.approx(float(y), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_that_of_its_digits(dtype):
    x, params = torch.linspace(-4, 4, 9, dtype=dtype), theta(1, dtype=dtype)
    exact = FAMILY.log_prob(x.double(), params.double())
    eps, found = torch.finfo(dtype).eps, FAMILY.log_prob(x, params)
    torch.testing.assert_close(found.double(), exact, rtol=8 * eps, atol=4 * eps)
    back, _ = CDF(FAMILY).inverse(CDF(FAMILY).forward(x, params)[0], params)
    torch.testing.assert_close(back, x, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("upper", [-40.0, 0.3, 40.0])
@pytest.mark.parametrize("width", [1e-12, 1e-3, 1.0, 50.0])
def test_cells_however_narrow(upper, width):
    params = theta()
    with mpmath.workdps(50):
        lower = mpmath.mpf(upper) - mpmath.mpf(width)
        ends = exact_cdf(upper, params), exact_cdf(lower, params)
        expected = float(mpmath.log(ends[0][0] - ends[1][0]))
    found = FAMILY.log_cell(
        torch.tensor(upper, dtype=torch.float64), torch.tensor(width, dtype=torch.float64), params
    )
    assert float(found) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_far_into_the_tails(dtype):
    params = theta(2001, scale=2.0, dtype=dtype)
    x = torch.linspace(-80, 80, 2001, dtype=dtype)
    scalar = CDF(FAMILY)
    y, log_slope = scalar.forward(x, params)
    back, log_slope_back = scalar.inverse(y, params)
    assert y.isfinite().all() and log_slope.isfinite().all()
    # what one unit in the last place of y is worth in x
    eps = torch.finfo(dtype).eps
    error = (back - x).abs() / (eps * (x.abs() + y.abs() * (-log_slope).exp() + 1))
    assert float(error.max()) < 64
    torch.testing.assert_close(log_slope_back, -scalar.forward(back, params)[1])
    ends = torch.tensor([-math.inf, math.inf, math.nan], dtype=dtype)
    torch.testing.assert_close(
        scalar.inverse(ends, params[:, :3])[0], ends, equal_nan=True, rtol=0, atol=0
    )


def test_derivatives_of_quantiles_up_to_the_third():
    params = theta().requires_grad_()
    u = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    x = FAMILY.quantile(u, params)
    assert float(FAMILY.logit_cdf(x, params).sigmoid().detach()) == pytest.approx(0.8, abs=1e-14)

    def derivative(order, at):
        point = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        value = FAMILY.quantile(point, params)
        for _ in range(order):
            (value,) = torch.autograd.grad(value, point, create_graph=True)
        return value

    h = 2e-5
    for order in (0, 1, 2):
        slope = (derivative(order, 0.8 + h) - derivative(order, 0.8 - h)) / (2 * h)
        found = derivative(order + 1, 0.8)
        torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(x, params)
    # implicitly, dx = -dF / f
    below = FAMILY.logit_cdf(x.detach(), params).sigmoid()
    (shift,) = torch.autograd.grad(below, params)
    expected = -shift * (-FAMILY.log_prob(x.detach(), params)).exp()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-9)


def test_equal_components_part():
    """Two modes are found from a start where all components are the same."""
    torch.manual_seed(0)
    data = torch.cat([torch.randn(400) * 0.5 - 3, torch.randn(200) * 0.3 + 2])[:, None].double()
    base = Factorized(LogisticMixture(4), 1).double()
    optimizer = torch.optim.Adam(base.parameters(), 0.1)
    for _ in range(200):
        loss = -base().log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # two normals of these weights have an entropy of 1.3 nats; one logistic costs above 2.3
    assert float(loss.detach()) < 1.4


def test_a_family_of_ones_own():
    """Two methods and a bracket make a map, quantiles and a base."""

    class Gumbel(Family):
        num_params = 1

        def log_prob(self, x, params):
            z = x - params[0]
            return -z - (-z).exp()

        def logit_cdf(self, x, params):
            low = -(-(x - params[0])).exp()  # log F
            return low - torch.log(-torch.expm1(low))

        def bracket(self, y, params):
            return params[0] + y.minimum(-y.abs().log1p()) - 2, params[0] + y.abs() + 2

    params = torch.full((1, 7), 0.4, dtype=torch.float64)
    u = torch.linspace(0.01, 0.99, 7, dtype=torch.float64)
    expected = 0.4 - (-u.log()).log()
    torch.testing.assert_close(Gumbel().quantile(u, params), expected, rtol=1e-9, atol=1e-9)
    y, log_slope = CDF(Gumbel()).forward(expected, params)
    torch.testing.assert_close(y, u.logit(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(CDF(Gumbel()).inverse(y, params)[1], -log_slope)


def test_coupling_of_images():
    layer = T.conv_coupling(3, [4], scalar=CDF(LogisticMixture(2)), context_dim=2).double()
    x, context = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 2).double()
    torch.testing.assert_close(layer.condition(context)(x), x, rtol=1e-12, atol=1e-12)
    disturb(layer, torch.Generator().manual_seed(0))
    y = layer.condition(context)(x)
    assert (y - x).abs().max() > 0.01
    back = layer.condition(context).inv(y.clone())
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)


def test_base_draws_what_it_scores(tmp_path):
    """Draws of a conditional flow fall below its own quantiles as often as they should."""
    flow = Flow(Factorized(LogisticMixture(2), 1, context_dim=2), T.elementwise_affine(1))
    disturb(flow.double(), torch.Generator().manual_seed(1), 0.5)
    context = torch.randn(5, 2).double()
    y = flow.sample(20_000, context)
    assert y.shape == (20_000, 5, 1)
    for p in (0.1, 0.5, 0.9):
        share = (y <= flow.icdf(torch.full((5,), p).double(), context)).double().mean(0)
        assert float((share - p).abs().max()) < 4.5 * math.sqrt(p * (1 - p) / 20_000)
    torch.save(flow.state_dict(), tmp_path / "flow.pt")
    other = Flow(Factorized(LogisticMixture(2), 1, context_dim=2), T.elementwise_affine(1))
    other.double().load_state_dict(torch.load(tmp_path / "flow.pt", weights_only=True))
    assert torch.equal(other.log_prob(y, context), flow.log_prob(y, context))


def test_gradients_of_draws():
    """Of E[X²], from the draws, against quadrature of the density."""
    base = Factorized(FAMILY, 1).double()
    with torch.no_grad():
        base.net.theta.copy_(theta(1, scale=0.5))
    x = torch.linspace(-60, 60, 20_001, dtype=torch.float64)[:, None]
    second = (base().log_prob(x).exp() * x[:, 0] ** 2).sum() * (x[1, 0] - x[0, 0])
    (expected,) = torch.autograd.grad(second, base.net.theta)
    torch.manual_seed(0)
    blocks = torch.stack(
        [
            torch.autograd.grad(base().rsample((2000,)).square().mean(), base.net.theta)[0]
            for _ in range(20)
        ]
    )
    error = blocks.std(0) / math.sqrt(20)
    assert ((blocks.mean(0) - expected).abs() < 5 * error).all()


def test_errors():
    with pytest.raises(ValueError, match="count_components must be at least 1; got 0"):
        LogisticMixture(0)
    with pytest.raises(ValueError, match="bound > 0; got -1"):
        LogisticMixture(bound=-1)
    with pytest.raises(ValueError, match=r"params of shape \(9, \*x.shape\); got \(8, 2\)"):
        FAMILY.log_prob(torch.zeros(2), torch.zeros(8, 2))
    with pytest.raises(ValueError, match=r"context of shape \(..., 2\); got none"):
        Factorized(FAMILY, 1, context_dim=2)()


def test_old_place_of_chains():
    assert transport.Chain is Chain
    chain = Chain(Affine(), CDF(FAMILY))
    assert chain.num_params == 11


def test_only_a_family_makes_a_map():
    with pytest.raises(TypeError, match=r"CDF expects a family.*got Normal\(loc"):
        CDF(torch.distributions.Normal(0.0, 1.0))
