"""What a model may be: how it takes a batch, labels summed out, where its numbers fail."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex
from torch import nn
from torch.distributions import biject_to

from pyroflows import AutoFlow, fit_guide
from pyroflows.guides import batching
from pyroflows.guides.latent import LatentDensity


def single(density, u):
    """The densities of single runs, an oracle for batches."""
    return torch.stack([density.log_density(point) for point in u])


# ------------------------------------------------------------------------------- routes


class Regression(PyroModule):
    """A Bayesian layer: its weights do not take a batch on the left."""

    def __init__(self, num_inputs):
        super().__init__()
        self.linear = PyroModule[nn.Linear](num_inputs, 1)
        prior = dist.Normal(0.0, 1.0)
        self.linear.weight = PyroSample(prior.expand([1, num_inputs]).to_event(2))
        self.linear.bias = PyroSample(prior.expand([1]).to_event(1))

    def forward(self, x, y):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def indexed(groups, y):
    with pyro.plate("groups", 3):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a[groups], 1.0), obs=y)


def stepwise(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    shift = 1.0 if m.item() > 0 else 0.0
    pyro.sample("y", dist.Normal(m + shift, 1.0), obs=y)


def plated(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_one_decision_on_points_of_its_own(rows):
    y = torch.randn(rows)
    models = [
        ("native", plated, (y,)),
        ("vmap", Regression(4), (torch.randn(rows, 4), y)),
        ("vmap" if rows > 1 else None, indexed, (torch.arange(rows) % 3, y)),
        ("one by one", stepwise, (y[:1].squeeze(),)),
    ]
    for expected, model, args in models:
        density = LatentDensity(model, args)
        if expected == "one by one":
            with pytest.warns(UserWarning, match=r"one particle at a time.*\.item\(\)"):
                assert density.route == expected
        assert expected in (None, density.route) and density.vectorizes == (
            density.route == "native"
        )
        for size in (1, 2, 3, 7):  # a first batch of one decides nothing
            u = torch.randn(size, density.dim)
            torch.testing.assert_close(density(u), single(density, u))
        values = density.constrain(u)
        assert all(v.shape[0] == 7 for v in values.values())
        torch.testing.assert_close(density.unconstrain(values), u)
        total = density.likelihoods(u)["y"].reshape(7, -1).sum(-1)
        prior = dist.Normal(0.0, 1.0).log_prob(u).sum(-1)
        torch.testing.assert_close(total + prior, density(u), rtol=1e-4, atol=1e-4)


def test_a_wide_model_that_does_not_broadcast_is_fitted():
    """Above 300 latents the pre-fit begins with a batch of one."""
    model, x = Regression(310), torch.randn(4, 310)
    result = fit_guide(
        model, AutoFlow(model), x, torch.zeros(4), num_steps=3, progress=False, seed=0
    )
    assert math.isfinite(result.diagnostics.elbo)


def test_a_route_that_fails_later_is_left():
    """It agrees on three points and refuses more than five."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x.numel() > 5 and x.dim():
            raise RuntimeError("too many")

    density = LatentDensity(model)
    assert density.route == "native"
    u = torch.randn(8, 1)
    for _ in range(2):
        torch.testing.assert_close(density(u), dist.Normal(0.0, 1.0).log_prob(u[:, 0]))
    assert density.route == "vmap" and density.failures.count == 0


@pytest.mark.parametrize("draw", [np.random.rand, lambda: torch.rand(()).item()])
def test_randomness_of_any_generator_is_seen_and_frozen(draw):
    def model():
        pyro.sample("x", dist.Normal(draw(), 1.0))

    density = LatentDensity(model)
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert density.stochastic and density.route == "native"
    frozen, u = density.frozen(), torch.zeros(4, 1)
    assert torch.equal(frozen(u), frozen(u)) and frozen(u).unique().numel() == 1
    assert np.array_equal(np.random.get_state()[1], state[0])
    assert torch.equal(torch.get_rng_state(), state[1])
    assert not torch.equal(density(u), density(u))
    assert not LatentDensity(plated, (torch.zeros(2),)).stochastic


def test_batches_are_cut_to_a_budget(monkeypatch):
    seen = []

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        seen.append(m.numel())
        with pyro.plate("rows", 1000):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    monkeypatch.setattr(batching, "BUDGET", 20_000)
    y = torch.randn(1000)
    density = LatentDensity(model, (y,))
    u = torch.randn(50, 1)
    expected = dist.Normal(0.0, 1.0).log_prob(u)[:, 0]
    expected = expected + dist.Normal(u, 1.0).log_prob(y).sum(-1)
    torch.testing.assert_close(density(u), expected)
    assert max(seen) == 20


# ------------------------------------------------------------------------------- labels


def log_prior(site, value, u):
    """Log-density of a Dirichlet's unconstrained value."""
    transform = biject_to(site.support)
    return site.log_prob(value) + transform.log_abs_det_jacobian(u, value)


def mixture(y, size=None):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    with pyro.plate("rows", len(y), subsample_size=size) as index:
        k = pyro.sample("k", dist.Categorical(w))
        pyro.sample("y", dist.Normal(m[k], 1.0), obs=y[index])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        config_enumerate,
        lambda model: poutine.block(model, hide=["k"]),
        lambda model: poutine.block(config_enumerate(model), expose=["w", "m"]),
        lambda model: config_enumerate(poutine.block(model, hide=["k"])),
    ],
)
def test_labels_are_summed_out_however_they_are_marked_or_hidden(wrap):
    y = torch.randn(9)
    density = LatentDensity(wrap(mixture), (y,))
    u = torch.randn(4, density.dim)
    values = density.constrain(u)
    assert values.keys() == {"w", "m"} and not density.stochastic
    rows = torch.logsumexp(
        values["w"].log()[:, None] + dist.Normal(values["m"][:, None], 1.0).log_prob(y[:, None]),
        -1,
    )
    expected = log_prior(dist.Dirichlet(torch.ones(2)), values["w"], u[:, :1])
    expected = expected + dist.Normal(0.0, 5.0).log_prob(values["m"]).sum(-1) + rows.sum(-1)
    torch.testing.assert_close(density(u), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(density.likelihoods(u)["y"], rows, rtol=1e-4, atol=1e-4)


def hidden_markov(y):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(2)).expand([2]).to_event(1))
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    x = 0
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x{t}", dist.Categorical(Vindex(p)[..., x, :]))
        pyro.sample(f"y{t}", dist.Normal(Vindex(m)[..., x], 1.0), obs=y[t])


def test_a_chain_of_labels_is_summed_exactly():
    y = torch.randn(5)
    density = LatentDensity(config_enumerate(hidden_markov), (y,))
    u = torch.randn(3, density.dim)
    values = density.constrain(u)
    for s in range(3):
        p, m = values["p"][s], values["m"][s]
        paths = []
        for labels in itertools.product(range(2), repeat=5):
            steps = zip((0, *labels), labels, y, strict=False)
            paths.append(
                sum(p[i, j].log() + dist.Normal(m[j], 1.0).log_prob(obs) for i, j, obs in steps)
            )
        expected = torch.logsumexp(torch.stack(paths), 0)
        torch.testing.assert_close(
            sum(density.likelihoods(u)["+".join(f"y{t}" for t in range(5))][s : s + 1]), expected
        )
        prior = dist.Dirichlet(torch.ones(2))
        expected = expected + log_prior(prior, p, u[s, :2].reshape(2, 1)).sum()
        expected = expected + dist.Normal(0.0, 1.0).log_prob(m).sum()
        torch.testing.assert_close(density(u)[s], expected)


def test_labels_of_a_minibatch_are_scaled_outside_of_the_sum():
    y = torch.randn(8)
    density = LatentDensity(config_enumerate(mixture), (y, 4))
    u = torch.randn(2, density.dim)
    at = torch.stack([density(u) for _ in range(300)])
    torch.testing.assert_close(
        at.mean(0), LatentDensity(mixture, (y,))(u), atol=4 * (at.std(0).max() / 300**0.5), rtol=0
    )


def test_elbo_of_a_guide_beside_labels_is_that_of_enumeration():
    y = torch.cat([torch.randn(8) - 3, torch.randn(8) + 3])
    model = config_enumerate(mixture)
    guide = AutoFlow(model)
    result = fit_guide(model, guide, y, num_steps=150, seed=0, progress=False)
    m = guide.sample_posterior(2000, y)["m"].sort(-1).values.mean(0)  # under both labels
    assert (m - torch.tensor([y[:8].mean(), y[8:].mean()])).abs().max() < 0.2
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    with torch.no_grad():
        losses = torch.tensor([elbo.loss(model, guide, y) for _ in range(200)])
    assert -losses.mean() == pytest.approx(
        result.diagnostics.elbo, abs=4 * losses.std().item() / 200**0.5 + 0.02
    )


def test_labels_that_cannot_be_summed_are_named():
    def counts():
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        pyro.sample("n", dist.Poisson(rate))

    for model in (counts, poutine.block(counts, hide=["n"])):
        with pytest.raises(ValueError, match="'n' \\(Poisson\\).*finite list"):
            LatentDensity(model)

    def unmarked():
        pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="enumeration"):
        AutoFlow(unmarked).setup()


def test_a_guide_of_another_model_is_refused():
    def one():
        pyro.sample("a", dist.Normal(0.0, 1.0))

    def other():
        pyro.sample("b", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="another model"):
        fit_guide(other, AutoFlow(one), progress=False)


# ------------------------------------------------------------------------------- masks, angles


ROWS, THERE = torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0]), torch.tensor([1, 1, 0, 0, 1]).bool()


def missing(y, there):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 5):
        pyro.sample("y", dist.LogNormal(m, 1.0), obs=y.clamp(min=0.1), obs_mask=there)


def ragged(y, there):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 5), poutine.mask(mask=there):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def ragged_shares(y, there):
    with pyro.plate("rows", 5), poutine.mask(mask=there):
        z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
        pyro.sample("y", dist.Categorical(z), obs=y.long().clamp(max=2))


def masked_inside(y, there):
    z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).mask(there).to_event(1))
    pyro.sample("y", dist.Normal(torch.where(there, z, 0.0), 1.0).to_event(1), obs=y)


@pytest.mark.parametrize(
    "model, free",
    [
        (missing, [0, 1, 1, 0, 0, 1]),
        (ragged, [0, 0, 0, 1, 1, 0]),
        (ragged_shares, [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]),
        (masked_inside, [0, 0, 1, 1, 0]),
    ],
)
def test_entries_on_which_nothing_depends_are_standard_normal(model, free):
    density = LatentDensity(model, (ROWS, THERE))
    assert density.free.tolist() == [bool(f) for f in free]
    u = torch.randn(4, density.dim)
    other = torch.where(density.free, torch.randn(4, density.dim), u)
    normal = dist.Normal(0.0, 1.0)
    expected = torch.where(density.free, normal.log_prob(other) - normal.log_prob(u), 0.0).sum(-1)
    torch.testing.assert_close(density(other) - density(u), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(density(u), single(density, u))


def test_a_fit_leaves_masked_entries_at_the_base():
    guide = AutoFlow(ragged)
    result = fit_guide(ragged, guide, ROWS, THERE, num_steps=60, seed=0, progress=False)
    # y_i ~ N(m, 2), m ~ N(0, 1): the evidence of the three rows that are there
    cov = 2 * torch.eye(3) + 1
    evidence = dist.MultivariateNormal(torch.zeros(3), cov).log_prob(ROWS[THERE]).item()
    assert result.diagnostics.elbo == pytest.approx(evidence, abs=0.02)
    z = guide.sample_posterior(4000, ROWS, THERE)["z"][:, ~THERE]
    assert z.mean(0).abs().max() < 0.1 and (z.std(0) - 1).abs().max() < 0.1


def test_flat_priors_by_a_mask_stay_flat():
    def model():
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
        pyro.sample("y", dist.Normal(b, 1.0).to_event(1), obs=torch.ones(2))

    density, u = LatentDensity(model), torch.randn(3, 2)
    assert not density.free.any()
    torch.testing.assert_close(density(u), dist.Normal(1.0, 1.0).log_prob(u).sum(-1))


def compass(concentration, seen):
    with pyro.plate("two", 2):
        a = pyro.sample("a", dist.VonMises(torch.tensor([0.0, 3.0]), concentration))
        at = torch.stack([a.cos(), a.sin()], -1)
        pyro.sample("seen", dist.Normal(at, 0.5).to_event(1), obs=seen)


@pytest.mark.parametrize("concentration, seen", [(0.1, [-1.0, 0.1]), (3.0, [-1.0, 0.3])])
def test_an_angle_counts_once(concentration, seen):
    """Also where the posterior lies across the end of the circle, and where the start does not."""
    seen = torch.tensor(seen)
    guide = AutoFlow(compass)
    result = fit_guide(compass, guide, concentration, seen, num_steps=150, seed=0, progress=False)
    grid = torch.linspace(-math.pi, math.pi, 10_001)[:-1, None]
    log_p = dist.VonMises(torch.tensor([0.0, 3.0]), concentration).log_prob(grid)
    at = torch.stack([grid.cos(), grid.sin()], -1)
    log_p = log_p + dist.Normal(at, 0.5).log_prob(seen).sum(-1)
    evidence = (torch.logsumexp(log_p, 0) + math.log(2 * math.pi / 10_000)).sum().item()
    assert result.diagnostics.log_evidence == pytest.approx(evidence, abs=0.02)
    weights = torch.softmax(log_p, 0)
    a = guide.sample_posterior(4000)["a"]
    for trig in (torch.cos, torch.sin):
        assert (trig(a).mean(0) - (weights * trig(grid)).sum(0)).abs().max() < 0.04
    assert a.std(0).max() < 1.5 and a.abs().max() < 8
    diagnosed = guide.density(concentration, seen)  # centred where the guide is
    u = torch.cat([a[:500]], -1)
    torch.testing.assert_close(
        torch.logsumexp(diagnosed(u) - guide.log_prob(u), 0) - math.log(500),
        torch.tensor(evidence),
        atol=0.03,
        rtol=0,
    )


def test_angles_that_are_not_used_as_such_keep_the_priors_range():
    def model():
        a = pyro.sample("a", dist.VonMises(0.0, 1.0))
        pyro.sample("y", dist.Normal(2 * a, 3.0), obs=torch.tensor(4.0))

    density, grid = LatentDensity(model), torch.linspace(-6.0, 6.0, 2001)[:, None]
    mass = torch.trapezoid(density(grid).exp(), grid[:, 0])
    inside = torch.linspace(-math.pi, math.pi, 2001)
    expected = dist.VonMises(0.0, 1.0).log_prob(inside)
    expected = expected + dist.Normal(2 * inside, 3.0).log_prob(torch.tensor(4.0))
    assert mass.item() == pytest.approx(torch.trapezoid(expected.exp(), inside).item(), rel=0.02)


def test_nothing_of_the_model_is_seen_around_its_density():
    def model(y):
        scale = pyro.param("scale", torch.tensor(1.0))
        m = pyro.sample("m", dist.Normal(0.0, scale))
        pyro.factor("f", -m.square())
        pyro.deterministic("twice", 2 * m)
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    density = LatentDensity(model, (torch.zeros(3),))
    with poutine.trace() as seen:
        density(torch.zeros(4, 1))
    assert {n for n, s in seen.trace.nodes.items() if s["type"] == "sample"} == set()
    assert "scale" in seen.trace.nodes  # a parameter of the model is trained with the guide
