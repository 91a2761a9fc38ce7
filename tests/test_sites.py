"""The layout of latents as one vector, and the messenger that runs a model at given ones."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to, constraints

from pyroflows import AutoFlow
from pyroflows.guides.batching import Route
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.sites import Placed, Sites
from pyroflows.guides.substitute import Substitute

Y = torch.tensor([0.3, -1.0, 0.2, 2.0])


def model():
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("cols", 2, dim=-2), pyro.plate("rows", 4, subsample_size=3, dim=-1) as rows:
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        pyro.sample("low", dist.Uniform(0.0, scale))
        pyro.sample("y", dist.Normal(shares[..., 0], scale), obs=Y[rows].expand(2, 3))


@pytest.fixture
def sites():
    return Sites.of(poutine.trace(model).get_trace())


def test_layout_knows_shapes_and_plates(sites):
    assert list(sites.named) == ["scale", "shares", "low"] and sites.dim == 1 + 12 + 6
    scale, shares, low = sites
    assert (scale.shape, scale.value_shape, scale.plates) == ((), (), ())
    assert shares.batch_shape == (2, 3)
    assert (shares.base_shape, shares.event_shape) == ((2,), (3,))
    assert (shares.part, low.part) == (slice(1, 13), slice(13, 19))
    rows, cols = ({f.name: f for f in shares.plates}[name] for name in ("rows", "cols"))
    assert (rows.dim, rows.size, rows.full_size) == (-1, 3, 4)
    assert (cols.dim, cols.size) == (-2, 2)
    assert shares.subsampled and not scale.subsampled
    assert sites.only(["low"]).dim == 6 and sites.only(["low"])[0].start == 0


def test_values_and_jacobians_are_those_of_each_support(sites):
    u = torch.randn(5, 1, 1, sites.dim, dtype=torch.float64)
    support = {"low": constraints.interval(torch.tensor(-2.0), torch.tensor([[3.0], [5.0]]))}
    values, log_dets = sites.constrain(u, support)
    assert {n: tuple(v.shape) for n, v in values.items()} == {
        "scale": (5, 1, 1), "shares": (5, 2, 3, 3), "low": (5, 2, 3)
    }  # fmt: skip
    assert log_dets["shares"].shape == (5, 2, 3)  # the event is summed, plates are not
    low = biject_to(support["low"])
    part = u[..., 13:].reshape(5, 2, 3)
    torch.testing.assert_close(values["low"], low(part))
    torch.testing.assert_close(log_dets["low"], low.log_abs_det_jacobian(part, low(part)))
    row = u[2, 0, 0, 1:13].reshape(2, 3, 2)[1, 2]  # an oracle: two free entries of a simplex
    jacobian = torch.autograd.functional.jacobian(lambda z: biject_to(constraints.simplex)(z), row)
    expected = jacobian[:2].det().abs().log()
    torch.testing.assert_close(log_dets["shares"][2, 1, 2], expected)


def test_vectors_come_back_from_values(sites):
    u = torch.randn(5, sites.dim, dtype=torch.float64)
    values, log_dets = sites.constrain(u.reshape(5, 1, 1, -1))
    again, log_det = sites.unconstrain(
        {s.name: values[s.name].reshape(5, *s.value_shape) for s in sites}
    )
    torch.testing.assert_close(again, u)
    torch.testing.assert_close(log_det, sum(d.reshape(5, -1).sum(-1) for d in log_dets.values()))
    torch.testing.assert_close(sites.join(sites.split(u[0])), u[0])


def test_deltas_have_minus_the_jacobian_as_density(sites):
    u = torch.randn(sites.dim)
    deltas = sites.deltas(u)
    values, log_dets = sites.constrain(u)
    for name, delta in deltas.items():
        assert isinstance(delta, Placed)
        torch.testing.assert_close(delta.log_prob(values[name]), -log_dets[name])
    with poutine.mask(mask=False):
        assert not sites.deltas(u)["low"].log_density.any()


def test_a_row_is_a_layout_of_its_own(sites):
    rows = sites.only(["shares", "low"]).of_rows()
    assert rows.dim == 3
    u = torch.randn(7, 2, 3, rows.dim)
    values, _ = rows.constrain(u)
    torch.testing.assert_close(values["shares"], biject_to(constraints.simplex)(u[..., :2]))
    torch.testing.assert_close(rows.named["low"].bijection().inv(values["low"]), u[..., 2])


def test_the_start_is_where_a_trace_is(sites):
    trace = poutine.trace(model).get_trace()
    u = sites.start(trace)
    values, _ = sites.constrain(u, {"low": trace.nodes["low"]["fn"].support})
    for name, value in values.items():
        torch.testing.assert_close(value, trace.nodes[name]["value"])


def test_a_run_adds_up_what_a_trace_does(sites):
    """Of rows that are chosen, with supports that are read, and a value that is given."""
    u = torch.randn(sites.dim)
    rows = torch.tensor([3, 0, 2])
    parts = sites.split(u)
    scale = torch.tensor(1.7)
    run = Substitute(
        {n: parts[n] for n in ("shares", "low")}, {"scale": scale}, rows={"rows": rows}, nesting=2
    )
    with run:
        model()
    low, shares = run.values["low"], run.values["shares"]
    expected = dist.LogNormal(0.0, 1.0).log_prob(scale)
    weight = 4 / 3  # of rows in a subsample
    priors = dist.Dirichlet(torch.ones(3)).log_prob(shares) + dist.Uniform(0.0, 1.7).log_prob(low)
    data = dist.Normal(shares[..., 0], 1.7).log_prob(Y[rows].expand(2, 3))
    expected = expected + weight * (priors + data).sum()
    jacobian = sum(run.log_dets[n].sum() for n in ("shares", "low"))
    torch.testing.assert_close(run.jacobian, jacobian)
    torch.testing.assert_close(run.total, expected + jacobian)
    assert float(run.supports["low"].upper_bound) == pytest.approx(1.7)
    assert bool((low < 1.7).all()) and math.isfinite(float(run.total))


def test_routes_are_named_and_tried_in_order():
    density = LatentDensity(model)
    assert density.route == "native" == Route.NATIVE and density.vectorizes
    u = torch.randn(3, 2)
    for route in Route:
        found = route.batched(lambda point: point.sum(-1))(u)
        torch.testing.assert_close(found, u.sum(-1))


def test_guide_and_density_share_a_layout():
    def fixed():
        with pyro.plate("rows", 3):
            shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
            pyro.sample("y", dist.Normal(shares[..., 0], 1.0), obs=Y[:3])
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))

    guide = AutoFlow(fixed).setup()
    sites, density = guide.flow_sites, guide.density()
    layout = [(s.name, s.part, s.shape, s.value_shape) for s in sites]
    assert layout == [(s.name, s.part, s.shape, s.value_shape) for s in density.sites]
    assert sites.dim == guide.latent_dim == 3 * 2 + 1
    u = torch.randn(4, sites.dim)
    values = density.constrain(u)
    again, log_det = sites.unconstrain(values)
    torch.testing.assert_close(again, u, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_det, density.log_jacobian(u), atol=1e-4, rtol=1e-4)
