"""The ArviZ bridge: every kind of site, with its dimensions and its right numbers."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LocScaleReparam

from pyroflows import AutoFlow, to_arviz
from pyroflows.guides import draw

pytest.importorskip("arviz")
Y = torch.tensor([-3.0, -2.5, 3.0, 3.5, 2.0])


def mixture(y):
    w = pyro.sample("w", dist.Beta(1.0, 1.0))
    with pyro.plate("component", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Bernoulli(w))
        pyro.sample("y", dist.Normal(mu[z.long()], 1.0), obs=y)


def dependent(y):
    low = pyro.sample("low", dist.Uniform(0.0, 1.0))
    high = pyro.sample("high", dist.Uniform(low, 2.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(low + high, 1.0), obs=y)


def centred(y):
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, s))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def reparametrized(y):
    with poutine.reparam(config={"x": LocScaleReparam(0.0)}):
        centred(y)


def ones(y):
    a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    with pyro.plate("single", 1):
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(a + b + c, 1.0), obs=y)


def computed(y):
    with pyro.plate("row", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.deterministic("pair", torch.stack([x, 2 * x], -1))
        pyro.deterministic("event", torch.stack([x, x + 1], -1), event_dim=1)
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)
    pyro.deterministic("sum", x.sum(-1))


def converted(model, guide=None, **kwargs):
    guide = AutoFlow(model).setup(Y) if guide is None else guide
    return to_arviz(model, guide, Y, num_samples=17, **kwargs)


def drawn(data, name, group="posterior"):
    return torch.as_tensor(np.asarray(data[group][name])[0])


def test_labels_are_summed_out():
    guide = AutoFlow(poutine.block(mixture, hide=["z"])).setup(Y)
    data = converted(mixture, guide)
    assert set(data["posterior"].data_vars) == {"w", "mu"}
    w, mu = drawn(data, "w")[:, None, None], drawn(data, "mu")[:, None]
    each = torch.cat([1 - w, w], -1).log() + dist.Normal(mu, 1.0).log_prob(Y[:, None])
    name = next(iter(data["log_likelihood"].data_vars))
    assert data["log_likelihood"][name].dims == ("chain", "draw", "row")
    torch.testing.assert_close(drawn(data, name, "log_likelihood"), each.logsumexp(-1))
    prior = dist.Normal(0.0, 5.0).log_prob(mu).sum((1, 2))
    lp = drawn(data, "lp", "sample_stats")
    torch.testing.assert_close(lp, each.logsumexp(-1).sum(-1) + prior, atol=1e-4, rtol=1e-4)
    predicted = drawn(data, "y", "posterior_predictive")
    near = (predicted[..., None] - mu).abs().amin(-1)
    assert predicted.shape == (17, 5) and near.max() < 5 and near.mean() < 1.3


def test_supports_that_depend_on_other_sites():
    data = converted(dependent)
    low, high = drawn(data, "low"), drawn(data, "high")
    assert ((0 < low) & (low < high) & (high < 2)).all()
    expected = dist.Normal((low + high)[:, None], 1.0).log_prob(Y)
    torch.testing.assert_close(drawn(data, "y", "log_likelihood"), expected)


@pytest.mark.parametrize(
    "model", [reparametrized, poutine.reparam(centred, config={"x": LocScaleReparam(0.0)})]
)
def test_reparametrized_sites_are_there(model):
    data = converted(model)
    assert set(data["posterior"].data_vars) == {"s", "x", "x_decentered"}
    assert data["posterior"]["x"].dims == ("chain", "draw", "row")
    expected = drawn(data, "s")[:, None] * drawn(data, "x_decentered")
    torch.testing.assert_close(drawn(data, "x"), expected)
    assert set(data["log_likelihood"].data_vars) == {"y"}


@pytest.mark.parametrize("kind", [AutoFlow, AutoNormal])
def test_axes_of_size_one_stay(kind):
    guide = kind(ones)
    guide(Y)
    data = converted(ones, guide)
    assert {n: v.shape for n, v in data["posterior"].data_vars.items()} == dict.fromkeys(
        "abc", (1, 17, 1)
    )
    assert data["posterior"]["c"].dims == ("chain", "draw", "single")
    mean = drawn(data, "a") + drawn(data, "b") + drawn(data, "c")
    expected = dist.Normal(mean, 1.0).log_prob(Y)
    torch.testing.assert_close(drawn(data, "y", "log_likelihood"), expected)


def test_deterministic_sites_and_their_dimensions():
    data = converted(computed, coords={"row": list("abcde")})
    x = drawn(data, "x")
    torch.testing.assert_close(drawn(data, "pair"), torch.stack([x, 2 * x], -1))
    torch.testing.assert_close(drawn(data, "event"), torch.stack([x, x + 1], -1))
    torch.testing.assert_close(drawn(data, "sum"), x.sum(-1))
    assert data["posterior"]["pair"].dims == ("chain", "draw", "row", "pair_dim_1")
    assert data["posterior"]["event"].dims == ("chain", "draw", "row", "event_dim_1")
    assert list(data["posterior"]["row"].values) == list("abcde")


def test_subsampled_data_come_whole():
    x = torch.randn(11)

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 11, subsample_size=4) as rows:
            pyro.deterministic("shifted", m + x[rows])
            pyro.sample("x", dist.Normal(m, 1.0), obs=x[rows])

    data = to_arviz(model, AutoFlow(model).setup(x), x, num_samples=9)
    m = drawn(data, "m")[:, None]
    np.testing.assert_allclose(data["observed_data"]["x"], x)
    torch.testing.assert_close(drawn(data, "shifted"), m + x)
    each = dist.Normal(m, 1.0).log_prob(x)
    torch.testing.assert_close(drawn(data, "x", "log_likelihood"), each)
    lp = drawn(data, "lp", "sample_stats")
    expected = each.sum(-1) + dist.Normal(0.0, 1.0).log_prob(m[:, 0])
    torch.testing.assert_close(lp, expected, atol=1e-4, rtol=1e-4)
    assert drawn(data, "x", "posterior_predictive").std(0).min() > 0.3


def test_predictive_draws_differ_and_follow_the_model():
    X = torch.randn(40, 2)

    def model(y):  # X @ b does not broadcast: by vmap
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("row", 40):
            pyro.sample("y", dist.Normal(X @ b, 0.5), obs=y)

    y = torch.zeros(40)
    data = to_arviz(model, AutoFlow(model).setup(y), y, num_samples=200)
    error = drawn(data, "y", "posterior_predictive") - drawn(data, "b") @ X.T
    n = error.numel()
    assert error.std().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2 * n))
    assert abs(torch.corrcoef(error[:2])[0, 1]) < 0.7  # other noise for every draw


def test_guides_that_cannot_take_a_batch_are_drawn_by_themselves():
    w = torch.nn.Parameter(torch.eye(3) + 0.1 * torch.randn(3, 3))

    def model(y):
        pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def guide(y):  # (3, 3) @ (S, 3) broadcasts wrongly for S = 3, raises otherwise
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1), infer=AUXILIARY)
        shift = -torch.linalg.slogdet(w)[1]
        pyro.sample("b", dist.Delta(w @ z, log_density=shift, event_dim=1))

    AUXILIARY = {"is_auxiliary": True}
    for num in (3, 8):
        draws = draw(model, guide, Y, num_samples=num)
        b = draws.values["b"]
        log_q = dist.MultivariateNormal(torch.zeros(3), w @ w.T).log_prob(b)
        expected = dist.Normal(0.0, 1.0).log_prob(b).sum(-1) - log_q
        torch.testing.assert_close(draws.log_weights, expected.detach(), atol=1e-4, rtol=1e-4)
