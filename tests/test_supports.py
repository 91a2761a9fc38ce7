"""The support of a flow follows its bounds, and nothing has a density outside of it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, constraints
from torch.distributions import transforms as stock

from pyroflows import transforms as T
from pyroflows.compose import Compose, as_bijection
from pyroflows.flow import Flow

INF = math.inf
UP = torch.tensor([1.0, 10.0])
# name: transforms, lower and upper ends, values outside (finite ends are tried too)
BOUNDED = {
    "interval": (lambda: [as_bijection(biject_to(constraints.interval(-5, 5)))], -5, 5),
    "sigmoid of sigmoid": (lambda: [stock.SigmoidTransform()] * 2, 0.5, 1 / (1 + math.exp(-1))),
    "sigmoid of exp": (lambda: [stock.ExpTransform(), stock.SigmoidTransform()], 0.5, 1),
    "exp": (lambda: stock.ExpTransform(), 0, INF),
    "softplus": (lambda: [T.elementwise_affine(2), stock.SoftplusTransform()], 0, INF),
    "tanh": (lambda: stock.TanhTransform(), -1, 1),
    "elu": (lambda: T.elu(), -1, INF),
    "exp of elu": (lambda: [T.elu(), stock.ExpTransform()], math.exp(-1), INF),
    "negative": (
        lambda: [stock.ExpTransform(), stock.AffineTransform(3.0, -2.0)], -INF, 3),
    "log of interval": (
        lambda: [as_bijection(biject_to(constraints.interval(2.0, 3.0))),
                 as_bijection(stock.ExpTransform()).inv], math.log(2), math.log(3)),
    "of each feature": (
        lambda: [stock.SigmoidTransform(), stock.AffineTransform(UP, UP)], UP, 2 * UP),
    "independent": (
        lambda: stock.IndependentTransform(
            stock.ComposeTransform([stock.SigmoidTransform(), stock.AffineTransform(1.0, 4.0)]), 1
        ), 1, 5),
    "half line": (lambda: [as_bijection(biject_to(constraints.greater_than(2.0)))], 2, INF),
    "less": (lambda: [as_bijection(biject_to(constraints.less_than(2.0)))], -INF, 2),
    "then free": (
        lambda: [Compose([stock.SigmoidTransform()]), stock.AffineTransform(0.0, 1.0)], 0, 1),
}  # fmt: skip


@pytest.fixture(params=[True, False], ids=["validated", "not validated"])
def validated(request):
    with pyro.validation_enabled(request.param):
        yield request.param


def ends(low, high):
    return torch.as_tensor(low).expand(2).double(), torch.as_tensor(high).expand(2).double()


@pytest.mark.parametrize("name", BOUNDED)
def test_support_follows_the_bounds(name, validated):
    make, low, high = BOUNDED[name]
    low, high = ends(low, high)
    flow = Flow(2, make()).double()
    y = flow.sample((64,))
    found = flow.log_prob(y)
    assert found.isfinite().all() and flow().support.check(y).all()
    for support in (flow.support, flow().support):
        assert support.event_dim == 1
        inner = support.base_constraint
        for end, attribute in ((low, "lower_bound"), (high, "upper_bound")):
            if end.isfinite().all():
                bound = torch.as_tensor(getattr(inner, attribute)).double().expand(2)
                torch.testing.assert_close(bound, end, atol=1e-6, rtol=0)
    for end, step in ((low, -1e-4), (high, 1e-4)):
        if not end.isfinite().all():
            continue
        outside = y[:3].clone()
        outside[1, 1] = end[1] + step  # one entry of one row
        if validated:
            with pytest.raises(ValueError, match="within the support"):
                flow.log_prob(outside)
        else:
            log_prob = flow.log_prob(outside)
            assert log_prob[1] == -INF
            torch.testing.assert_close(log_prob[[0, 2]], found[[0, 2]])
            plain = dist.TransformedDistribution(flow.base(), [flow.transform])
            if flow.transform._event_dim(inverse=True):
                assert plain.log_prob(outside)[1] == -INF


@pytest.mark.parametrize("name", ["interval", "sigmoid of sigmoid", "tanh", "of each feature"])
def test_densities_within_bounds_integrate_to_one(name):
    make, low, high = BOUNDED[name]
    low, high = ends(low, high)
    flow, edges = Flow(2, make()).double(), torch.linspace(0, 1, 402, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    grid = low + (high - low) * torch.cartesian_prod(middle, middle)
    total = flow.log_prob(grid).exp().mean() * (high - low).prod()
    assert abs(float(total) - 1) < 2e-3


def test_saturated_draws_keep_a_density(dtype):
    flow = Flow(1, as_bijection(biject_to(constraints.interval(-5.0, 5.0)))).to(dtype)
    x = torch.tensor([[-200.0], [-40.0], [0.0], [40.0], [200.0]], dtype=dtype)
    y = flow().transforms[0](x)
    assert flow().support.check(y).all()
    assert not flow.log_prob(y).isnan().any() and (flow.log_prob(y) > -INF).all()


def test_values_outside_have_no_gradient_and_nan_stays_in_its_row():
    flow = Flow(2, [T.elementwise_affine(2), stock.ExpTransform()])
    y = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [math.nan, 1.0]])
    with pyro.validation_enabled(False):
        log_prob = flow.log_prob(y)
    assert log_prob[0].isfinite() and log_prob[1] == -INF and log_prob[2].isnan()
    with pyro.validation_enabled(False):
        gradient = torch.autograd.grad(flow.log_prob(y[:2]).sum(), flow.parameters())
    assert all(g.isfinite().all() for g in gradient)


def test_bounds_of_the_base_count():
    flow = Flow(dist.Uniform(torch.zeros(2), 1.0), stock.AffineTransform(3.0, -2.0))
    inner = flow.support.base_constraint
    assert (inner.lower_bound == 1).all() and (inner.upper_bound == 3).all()
    torch.testing.assert_close(flow.log_prob(torch.tensor([1.5, 2.5])).exp(), torch.tensor(0.25))
    log = as_bijection(stock.ExpTransform()).inv
    with pytest.raises(ValueError, match="base draws from"):
        Flow(2, log)
    positive = Flow(dist.Gamma(torch.ones(2), 1.0).to_event(1), log)
    assert positive.sample((5,)).isfinite().all()


def test_a_bounded_flow_as_prior():
    """Inference runs where the prior lives: NUTS's unconstrained space is the interval's."""
    flow = Flow(1, as_bijection(biject_to(constraints.interval(-5.0, 5.0))))
    u = biject_to(flow().support).inv(flow.sample((100,)))
    assert u.isfinite().all() and u.abs().max() < 10


def test_stacks_of_bounded_transforms():
    parts = [biject_to(constraints.interval(0.0, n)) for n in (1.0, 2.0)]
    flow = Flow(2, stock.StackTransform(parts, -1))
    y = flow.sample((5,))
    with pyro.validation_enabled(False):
        assert flow.log_prob(y).isfinite().all()
        outside = y.clone()
        outside[1, 0] = 1.5
        assert (flow.log_prob(outside) == -INF).tolist() == [False, True, False, False, False]
    with pytest.raises(ValueError, match="within the support"):
        flow.log_prob(outside)


def test_other_supports_have_no_density_outside():
    flow = Flow(2, stock.StickBreakingTransform())
    y = flow.sample((5,))
    with pyro.validation_enabled(False):
        assert flow.log_prob(y).isfinite().all()
        assert flow.log_prob(2 * y).eq(-INF).all()


def test_parts_of_a_vector_with_bounds_of_their_own():
    """A stock CatTransform answers number by number."""
    joined = stock.CatTransform(
        [stock.AffineTransform(1.0, 2.0), stock.ExpTransform()], dim=-1, lengths=[1, 1]
    )
    flow = Flow(2, [T.elementwise_affine(2), as_bijection(joined)])
    y = torch.tensor([[3.0, 0.5], [-4.0, 2.0]])
    expected = dist.Normal(1.0, 2.0).log_prob(y[:, 0]) + dist.LogNormal(0.0, 1.0).log_prob(y[:, 1])
    torch.testing.assert_close(flow.log_prob(y), expected)
    inside = flow.distribution()
    inside._validate_args = False
    outside = inside.log_prob(torch.tensor([[0.0, -0.5], [0.0, 0.5], [math.nan, 0.5]]))
    assert outside[0] == -math.inf and outside[1].isfinite() and outside[2].isnan()
