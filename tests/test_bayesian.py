"""Weights of a flow with a prior: sites of the trace, and what the density is made of."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.distributions.transforms import AffineTransform

import pyroflows as pf
from pyroflows.flow import Flow

DATA = torch.tensor([[0.8], [1.9], [2.4], [1.1]])
# y ~ N(m, 1) with m ~ N(0, 1): posterior N(sum y / (n + 1), 1 / (n + 1))
MEAN, SD = float(DATA.sum()) / (len(DATA) + 1), (len(DATA) + 1) ** -0.5


def shift_flow(where):
    loc = nn.Parameter(torch.zeros(1))
    if where == "transform":
        return Flow(1, AffineTransform(loc, 1.0, event_dim=1)), "transform.parts.0.constants.loc"
    base = dist.Normal(loc, 1.0).to_event(1)
    return Flow(base, AffineTransform(torch.zeros(1), 1.0)), "base.constants.base_dist_loc"


def model_of(flow):
    def model(data=DATA):
        y = flow()  # outside of the plate: the rows share their weights
        with pyro.plate("rows", len(data)):
            pyro.sample("y", y, obs=data)

    return model


def with_priors(flow):
    """The documented way: a prior on each parameter."""
    to_pyro_module_(flow)
    for module in list(flow.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            prior = dist.Normal(0.0, 1.0).expand(p.shape).to_event(p.dim())
            setattr(module, name, PyroSample(prior))
    return flow


def check_posterior(model, site):
    grid = torch.linspace(-4, 6, 401)
    log_joint = torch.stack(
        [
            poutine.trace(poutine.condition(model, {site: m.view(1)})).get_trace().log_prob_sum()
            for m in grid
        ]
    )
    weight = log_joint.softmax(0)
    mean = (weight * grid).sum()
    assert float(mean) == pytest.approx(MEAN, abs=1e-3)
    assert float((weight * (grid - mean).square()).sum().sqrt()) == pytest.approx(SD, abs=1e-3)
    evidence = float(log_joint.logsumexp(0)) + math.log(float(grid[1] - grid[0]))
    covariance = torch.eye(4) + torch.ones(4, 4)
    exact = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(DATA[:, 0])
    assert evidence == pytest.approx(float(exact), abs=1e-3)


@pytest.mark.parametrize("where", ["transform", "base"])
def test_pyro_samples_give_the_known_posterior(where):
    flow, site = shift_flow(where)
    model = model_of(with_priors(flow))
    assert site in poutine.trace(model).get_trace().stochastic_nodes
    check_posterior(model, site)
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), Trace_ELBO(4))
    for _ in range(200):
        svi.step()
    assert float(guide.median()[site]) == pytest.approx(MEAN, abs=0.1)


@pytest.mark.parametrize("where", ["transform", "base"])
def test_lifted_parameters_give_the_known_posterior(where):
    flow, path = shift_flow(where)
    prior = {path: dist.Normal(torch.zeros(1), 1.0).to_event(1)}
    model = poutine.lift(model_of(flow), prior=prior)
    check_posterior(model, f"flow$$${path}")


@pytest.mark.filterwarnings("ignore:The `random_module`:FutureWarning")
def test_random_module_gives_the_known_posterior():
    flow, path = shift_flow("transform")
    prior = {path: dist.Normal(torch.zeros(1), 1.0).to_event(1)}

    def model():
        drawn = pyro.random_module("net", flow, prior)()
        model_of(drawn)()

    check_posterior(model, f"net$$${path}")


@pytest.mark.parametrize("way", ["samples", "lift"])
def test_a_whole_flow(way):
    """Draws shape density and draws of the flow, one set of weights for each run."""
    flow = pf.realnvp(2, 1, num_transforms=2, hidden_dims=[4])
    shapes = {p.shape for p in flow.parameters()}
    context, y = torch.randn(5, 1), torch.randn(5, 2)

    def model():
        d = flow(context)
        torch.testing.assert_close(d.log_prob(y), d.log_prob(y.clone()))
        x, log_det = d.transforms[0].inverse_and_log_det(y)
        torch.testing.assert_close(d.transforms[0](x), y, atol=1e-3, rtol=1e-3)
        with pyro.plate("rows", 5):
            pyro.sample("y", d, obs=y)
        return d.log_prob(y)

    if way == "samples":
        with_priors(flow)
    else:
        prior = {
            name: dist.Normal(torch.zeros(p.shape), 0.3).to_event(p.dim())
            for name, p in flow.named_parameters()
        }
        model = poutine.lift(model, prior=prior)
    trace = poutine.trace(model).get_trace()
    sites = [site["value"] for name, site in trace.nodes.items() if "transform" in name]
    assert {s.shape for s in sites} == shapes
    again = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
    torch.testing.assert_close(again.nodes["_RETURN"]["value"], trace.nodes["_RETURN"]["value"])
    assert not torch.allclose(model(), model())
    if way == "samples":
        draws = Predictive(model, num_samples=3)()
        assert len(draws) >= len(sites)
        assert not torch.allclose(flow.log_prob(y, context), flow.log_prob(y, context))


def test_values_of_other_shapes_are_named():
    drawn = with_priors(shift_flow("transform")[0])
    with pytest.raises(ValueError, match="outside of plates"), pyro.plate("rows", 4):
        poutine.trace(drawn).get_trace()
    flow, path = shift_flow("transform")
    model = poutine.lift(model_of(flow), prior={path: dist.Normal(0.0, 1.0).expand([3, 1, 1])})
    with pytest.raises(ValueError, match="one draw of its weights at a time"):
        model()
