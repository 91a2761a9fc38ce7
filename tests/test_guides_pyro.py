"""What Pyro's own auto-guides do, done by ours: estimators, plates, subsamples, lists."""

import functools
import io
import itertools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    WeighedPredictive,
)
from pyro.infer.autoguide import (
    AutoCallable,
    AutoDelta,
    AutoGuideList,
    AutoNormal,
    init_to_feasible,
    init_to_generated,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.importance import psis_diagnostic
from pyro.infer.inspect import get_dependencies
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pyroflows import AmortizedFlow, AutoFlow, fit_guide
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.prefit import Gaussian


def three():
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", 2):
        pyro.sample("z", dist.Beta(2.0, 2.0))


def perturbed(guide, *args):
    """Away from the identity, where a forgotten Jacobian or weight shows."""
    guide.setup(*args)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return guide


# ------------------------------------------------------------------------------- estimators


@pytest.mark.parametrize("particles", [1, 200])
@pytest.mark.parametrize(
    "elbo",
    [
        TraceGraph_ELBO,
        TraceMeanField_ELBO,
        TraceEnum_ELBO,
        functools.partial(JitTrace_ELBO, ignore_jit_warnings=True),
    ],
)
def test_estimators_agree_on_the_same_draws(elbo, particles):
    guide = perturbed(AutoFlow(three))
    options = {"num_particles": particles, "vectorize_particles": particles > 1}
    losses = []
    for make in (Trace_ELBO, elbo):
        pyro.set_rng_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit's own
            objective = make(max_plate_nesting=1, **options)
            losses.append(objective.loss(three, guide))
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_other_objectives_and_weights():
    def model():
        x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(x, 1.0), obs=torch.tensor(2.0))

    guide = AutoFlow(model)
    for elbo in (
        RenyiELBO(alpha=0.5, num_particles=3),
        RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True),
        ReweightedWakeSleep(num_particles=3, vectorize_particles=True),
        Trace_ELBO(num_particles=3),
    ):
        loss = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step()
        assert torch.isfinite(torch.as_tensor(loss).sum())
    guide.place(Gaussian(torch.tensor([0.2]), torch.tensor([[1.1]])))
    assert psis_diagnostic(model, guide, num_particles=500) < 0.7
    x = torch.linspace(1e-3, 30.0, 100_001)
    log_p = dist.LogNormal(0.0, 1.0).log_prob(x) + dist.Normal(x, 1.0).log_prob(torch.tensor(2.0))
    weighed = WeighedPredictive(model, guide=guide, num_samples=2000, parallel=True)()
    evidence = weighed.log_weights.logsumexp(0) - torch.tensor(2000.0).log()
    exact = torch.trapezoid(log_p.exp(), x).log()
    torch.testing.assert_close(evidence, exact, atol=0.02, rtol=0)


def test_inspection():
    guide = AutoFlow(three)
    assert get_dependencies(guide)["prior_dependencies"].keys() >= {"x", "y", "z"}


def test_masks_and_scales_from_around():
    guide = perturbed(AutoFlow(three))
    pyro.set_rng_seed(0)
    one = poutine.trace(guide).get_trace().log_prob_sum()
    pyro.set_rng_seed(0)
    scaled = poutine.trace(poutine.scale(guide, scale=3.0)).get_trace().log_prob_sum()
    torch.testing.assert_close(scaled, 3 * one)
    with poutine.mask(mask=False):
        assert poutine.trace(guide).get_trace().log_prob_sum() == 0


# ------------------------------------------------------------------------------- the posterior


def test_transform_mean_and_variance():
    guide = AutoFlow(three, init_scale=0.3).setup()
    z = torch.zeros(guide.latent_dim)
    torch.testing.assert_close(guide.transform(z), guide.whitening.loc)
    posterior = guide.get_posterior()
    torch.testing.assert_close(posterior.mean, guide.whitening.loc, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        posterior.variance, torch.full((guide.latent_dim,), 0.09), rtol=0.02, atol=0
    )
    perturbed(guide)
    draws = guide.get_posterior().sample((20_000,))
    torch.testing.assert_close(guide.get_posterior().stddev, draws.std(0), rtol=0.05, atol=0.01)
    assert guide.get_posterior().expand([3]).variance.shape == (3, guide.latent_dim)


def test_a_model_without_latents():
    def model(data):
        size = len(data)
        rows, columns = pyro.plate("rows", size, dim=-2), pyro.plate("columns", size, dim=-1)
        with rows, columns:
            batch = pyro.subsample(data, event_dim=0)
            assert batch.shape in ((10, 10), (5, 5))
            pyro.sample("obs", dist.Normal(0.0, 1.0), obs=batch)

    def create_plates(data):
        rows = pyro.plate("rows", len(data), subsample_size=5, dim=-2)
        return rows, pyro.plate("columns", len(data), subsample_size=5, dim=-1)

    guide = AutoFlow(model, create_plates=create_plates)
    data = torch.randn(10, 10)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(torch.isfinite(torch.tensor(svi.step(data))) for _ in range(2))
    assert guide(data) == guide.median(data) == guide.sample_posterior(3, data) == {}
    assert AutoFlow(lambda: None)() == {}


@pytest.mark.parametrize(
    "init",
    [
        init_to_feasible,
        init_to_mean,
        init_to_median,
        init_to_median(num_samples=7),
        init_to_sample,
        init_to_uniform,
        init_to_uniform(radius=0.5),
        init_to_value(values={"x": torch.tensor(0.3)}),
        init_to_value(values={"y": torch.tensor(0.3)}, fallback=init_to_sample),
        init_to_generated(generate=lambda: init_to_value(values={"x": torch.tensor(0.1)})),
        lambda site: site["fn"].sample(),
    ],
)
def test_initial_values_in_every_form(init):
    guide = AutoFlow(three, init_loc_fn=init)
    assert guide()["z"].shape == (2,)
    if getattr(init, "keywords", {}).get("values", {}).keys() == {"x"}:
        torch.testing.assert_close(guide.median()["x"], torch.tensor(0.3))


def test_initial_values_that_cannot_be():
    for value, message in [
        (torch.zeros(2), r"'y'.*shape \(2,\); expected \(\)"),
        (torch.tensor(-1.0), "'y'.*not inside its support"),
        (torch.tensor(float("nan")), "'y'.*not inside its support"),
    ]:
        init = init_to_value(values={"y": value})
        with pytest.raises(ValueError, match=message):
            AutoFlow(three, init_loc_fn=init).setup()


# ------------------------------------------------------------------------------- lists and modules


def test_lists_nested_callables_and_masters():
    def x_guide():
        loc = pyro.param("x_loc", torch.tensor(1.0))
        pyro.sample("x", dist.Normal(loc, 0.1))

    guide = AutoGuideList(three)
    guide.append(AutoCallable(three, x_guide, lambda: {"x": pyro.param("x_loc")}))
    inner = AutoGuideList(poutine.block(three, hide=["x"]))
    inner.first = AutoFlow(poutine.block(three, expose=["y"]))
    inner.second = AutoFlow(poutine.block(three, expose=["z"]), name="unused")
    guide.append(inner)
    svi = SVI(three, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step()
    for part in (inner.first, inner.second):
        assert part.master() is guide
    trace = poutine.trace(guide).get_trace()
    assert {"x", "y", "z", "_AutoGuideList.1.first_latent"} <= set(trace.stochastic_nodes)
    names = {name for name in trace.param_nodes if "packed" in name}
    assert names == {"AutoGuideList.1.first.packed", "AutoGuideList.1.second.packed"}
    assert guide.median().keys() == inner.quantiles([0.5]).keys() | {"x"}


class Linear(nn.Linear, PyroModule):
    def __init__(self, features):
        super().__init__(features, 1)
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, features]).to_event(2))
        self.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = Linear(3)
        self.loc = nn.Parameter(torch.tensor(0.1))
        self.scale = PyroParam(torch.tensor(0.5), constraints.positive)

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1) + self.loc
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, self.scale))
        with pyro.plate("rows", len(x)):
            return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO])
def test_regression_with_random_weights(elbo):
    model, x, y = Regression(), torch.randn(10, 3), torch.randn(10)
    guide = AutoFlow(model)
    optimizer = pyro.optim.Adam({"lr": 0.005})
    svi = SVI(model, guide, optimizer, elbo(strict_enumeration_warning=False))
    svi.step(x, y)
    assert "loc" in dict(model.named_parameters()) and model.loc.grad is not None
    draws = Predictive(model, guide=guide, num_samples=4)(x)
    assert draws["linear.weight"].shape == (4, 1, 1, 3) or draws["linear.weight"].shape[0] == 4


def test_predictive_with_a_guide_traces():
    model, x, y = Regression(), torch.randn(10, 3), torch.randn(10)
    guide = AutoFlow(model).setup(x, y)
    draws = Predictive(model, guide=guide, num_samples=4)(x)
    predictive = Predictive(model, guide=guide, num_samples=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's own
        traced = torch.jit.trace_module(predictive, {"call": (x,)}, check_trace=False)
        stream = io.BytesIO()
        torch.jit.save(traced, stream)
        stream.seek(0)
        assert len(torch.jit.load(stream).call(x)) == len(draws)


# ------------------------------------------------------------------------------- subsamples


def states(batch, subsample, full_size):
    """A drift, and a random walk for each row of a plate of which a part is seen."""
    drift = pyro.sample("drift", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("data", full_size, subsample=subsample):
        z = 0.0
        for t, observed in enumerate(batch):
            z = pyro.sample(f"state_{t}", dist.Normal(z, drift))
            pyro.sample(f"obs_{t}", dist.Bernoulli(logits=z), obs=observed)


@pytest.mark.parametrize("create", [True, False])
def test_batches_of_named_rows_change_only_their_rows(create):
    def create_plates(batch, subsample, full_size):
        return pyro.plate("data", full_size, subsample=subsample)

    data = torch.bernoulli(torch.full((2, 50), 0.5))
    first = torch.arange(20)
    guide = AutoFlow(states, create_plates=create_plates if create else None)
    guide.setup(data[:, first], first, 50)
    svi = SVI(states, guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO())
    before = guide.local.loc["state_0"].detach().clone()
    rows = torch.tensor([49, 3, 11])  # another size, in any order
    svi.step(data[:, rows], rows, 50)
    moved = (guide.local.loc["state_0"] != before).nonzero().flatten()
    assert moved.tolist() == sorted(rows.tolist())
    assert guide.median(data[:, first], first, 50)["state_1"].shape == (50,)


def test_local_latents_hold_an_exact_posterior():
    """Normal rows around a normal mean: every draw has the evidence as its weight."""
    y = torch.tensor([-1.0, 0.5, 2.0, 3.0, 1.0, 0.0])

    def model(index):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6, subsample=index) as rows:
            t = pyro.sample("t", dist.Normal(m, 1.0))
            pyro.sample("y", dist.Normal(t, 0.5), obs=y[rows])

    guide = AutoFlow(model).setup(torch.arange(3))
    precision = 1 + 6 / 1.25
    mean, sd = y.sum() / 1.25 / precision, torch.tensor(precision**-0.5)
    guide.place(Gaussian(mean[None], sd[None, None]))
    with torch.no_grad():
        guide.local.loc["t"].copy_((mean + 4 * y) / 5)
        guide.local.log_scale["t"].fill_(torch.tensor(0.2).log() / 2)
        guide.local.slope["t"].fill_(sd / 5)
    covariance = torch.ones(6, 6) + 1.25 * torch.eye(6)
    evidence = dist.MultivariateNormal(torch.zeros(6), covariance).log_prob(y).item()
    for _ in range(3):
        loss = Trace_ELBO().loss(model, guide, torch.arange(6))
        assert -loss == pytest.approx(evidence, abs=1e-4)
    batched = Trace_ELBO(50, max_plate_nesting=1, vectorize_particles=True)
    assert -batched.loss(model, guide, torch.arange(6)) == pytest.approx(evidence, abs=1e-4)
    pairs = [torch.tensor(p) for p in itertools.combinations(range(6), 2)]
    averaged = [
        Trace_ELBO(200, max_plate_nesting=1, vectorize_particles=True).loss(model, guide, p)
        for p in pairs
    ]
    assert -sum(averaged) / len(pairs) == pytest.approx(evidence, abs=0.1)  # rows are scaled
    draws = guide.sample_posterior(20_000)
    exact = torch.quantile(draws["t"], torch.tensor([0.1, 0.5, 0.9]), dim=0)
    torch.testing.assert_close(guide.quantiles([0.1, 0.5, 0.9])["t"], exact, atol=0.02, rtol=0)
    torch.testing.assert_close(
        draws["t"].var(0), torch.full((6,), 0.2 + sd.item() ** 2 / 25), atol=0.01, rtol=0
    )


def test_log_prob_of_all_rows_is_the_density():
    """At full size the guide's trace and log_prob are one number."""
    rows = torch.arange(4)

    def model(index):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("outer", 3, dim=-2), pyro.plate("rows", 4, subsample=index, dim=-1):
            pyro.sample("d", dist.Dirichlet(s * torch.ones(3)))

    guide = perturbed(AutoFlow(model), rows[:2])
    trace = poutine.trace(guide).get_trace(rows)
    values = {name: trace.nodes[name]["value"] for name in ("s", "d")}
    assert values["d"].shape == (3, 4, 3)
    torch.testing.assert_close(guide.log_prob(values), trace.log_prob_sum(), atol=1e-3, rtol=1e-4)
    draws = guide.sample_posterior(7)
    assert draws["d"].shape == (7, 3, 4, 3) and guide.log_prob(draws).shape == (7,)
    with pytest.raises(ValueError, match=r"'d' has shape \(3, 4, 3\).*\(3, 2, 3\)"):
        guide.log_prob({"s": values["s"], "d": values["d"][:, :2]})


def test_latents_of_a_plate_of_another_size_are_refused():
    def model(y):
        with pyro.plate("rows", len(y)):
            t = pyro.sample("t", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(t, 1.0), obs=y)

    guide = AutoFlow(model).setup(torch.randn(5))
    for size in (1, 4, 9):  # one row would broadcast
        with pytest.raises(ValueError, match=f"5 rows of the plate 'rows'.*takes {size} of"):
            Trace_ELBO().loss(model, guide, torch.randn(size))
    assert guide(torch.randn(5))["t"].shape == (5,)


def test_only_local_latents():
    def model():
        with pyro.plate("rows", 6, subsample_size=2):
            pyro.sample("t", dist.Gamma(2.0, 1.0))

    for kind in (AutoNormal, AutoFlow):
        guide = kind(model)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(3))
        assert torch.isfinite(torch.tensor(svi.step()))
        assert guide.median()["t"].shape == (6,)
    assert guide.sample_posterior(3)["t"].shape == (3, 6)
    assert guide.log_prob(guide.sample_posterior(3)).shape == (3,)
    with pytest.raises(RuntimeError, match="no latents outside of subsampled plates"):
        guide.get_transform()


def test_fit_guide_trains_local_latents():
    y = torch.tensor([-2.0, 0.0, 2.0, 4.0])

    def model():
        with pyro.plate("rows", 4, subsample_size=2) as rows:
            t = pyro.sample("t", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(t, 1.0), obs=y[rows])

    guide = AutoFlow(model)
    fit_guide(model, guide, num_steps=150, num_particles=8, lr=0.1, seed=0)
    torch.testing.assert_close(guide.median()["t"], y / 2, atol=0.15, rtol=0)


def test_random_subsamples_in_the_model_alone():
    x = torch.randn(50)

    def model(x, batch_size=None):
        with pyro.plate("batch", len(x), subsample_size=batch_size):
            rows = pyro.subsample(x, event_dim=0)
            sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(rows, sigma), obs=rows)

    guide = AutoFlow(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for size in (20, 20, 7):
        svi.step(x, batch_size=size)
    assert guide.median(x, batch_size=20)["sigma"].shape == (50,)


# ------------------------------------------------------------------------------- moving supports


def chained(x):
    """Bounds of one latent by another, of rows by both, and data of another size."""
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    b = pyro.sample("b", dist.Uniform(0.0, a))
    with pyro.plate("groups", 2, dim=-2):
        c = pyro.sample("c", dist.Uniform(b, b + 1))
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("x", dist.Normal(c + a, 1.0), obs=x.expand(2, -1))


def test_supports_that_depend_on_others_beside_a_data_plate():
    x = torch.randn(7)
    first = SVI(chained, AutoFlow(chained), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert torch.isfinite(torch.tensor(first.step(x)))  # the guide sees its model inside a trace
    guide = perturbed(AutoFlow(chained), x)
    for draws in (
        guide.sample_posterior(5, x),
        guide.quantiles([0.1, 0.5, 0.9], x),
        Predictive(chained, guide=guide, num_samples=5, parallel=True)(x),
        Predictive(chained, guide=guide, num_samples=5)(x),
    ):
        a, b = (draws[n].reshape(len(draws["a"])) for n in "ab")
        c = draws["c"].reshape(len(a), 2)
        assert ((0 < b) & (b < a) & (a < 1)).all()
        assert ((b[:, None] < c) & (c < b[:, None] + 1)).all()
    draws = guide.sample_posterior(5, x)
    expected = []
    for i in range(5):
        point = {n: v[i] for n, v in draws.items()}
        u, log_det = guide.density(x).unconstrain(point), 0.0
        for name, low, high in (
            ("a", 0.0, 1.0),
            ("b", 0.0, point["a"]),
            ("c", point["b"], point["b"] + 1),
        ):
            p = (point[name] - low) / (high - low)
            log_det = log_det + ((high - low) * p * (1 - p)).log().sum()
        expected.append(guide.log_prob(u) - log_det)
    torch.testing.assert_close(
        guide.log_prob(draws, x), torch.stack(expected), atol=1e-3, rtol=1e-3
    )
    losses = []
    for options in ({}, {"vectorize_particles": True}):
        pyro.set_rng_seed(0)
        elbo = Trace_ELBO(2000 if options else 1, max_plate_nesting=2, **options)
        losses.append(sum(elbo.loss(chained, guide, x) for _ in range(1 if options else 100)))
    assert losses[0] / 100 == pytest.approx(losses[1], abs=0.3)


def test_reparametrized_and_deterministic_sites():
    x = torch.tensor([0.5, 1.5, -0.5])

    def model(x):
        config = {"t": LocScaleReparam(0.0), "s": TransformReparam()}
        with poutine.reparam(config=config):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            a = pyro.sample("a", dist.Uniform(0.0, 1.0))
            b = pyro.sample("b", dist.Uniform(0.0, a))
            log_normal = dist.transforms.ExpTransform()
            s = pyro.sample("s", dist.TransformedDistribution(dist.Normal(0.0, 1.0), log_normal))
            with pyro.plate("rows", len(x)):
                t = pyro.sample("t", dist.Normal(m, s))
                twice = pyro.deterministic("twice", 2 * t * b)
                pyro.sample("x", dist.Normal(twice, 1.0), obs=x)

    guide = AutoFlow(model)
    fit_guide(model, guide, x, num_steps=5, num_particles=4)
    draws = guide.sample_posterior(4, x)
    assert set(draws) == {"m", "a", "b", "s_base", "t_decentered"}
    assert guide.log_prob(draws, x).shape == (4,)
    for parallel in (True, False):
        found = Predictive(model, guide=guide, num_samples=4, parallel=parallel)(x)
        values = {k: found[k].reshape(4, -1) for k in ("t", "b", "twice", "s", "s_base")}
        torch.testing.assert_close(values["twice"], 2 * values["t"] * values["b"])
        torch.testing.assert_close(values["s"], values["s_base"].exp())
    Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1).loss(
        model, guide, x
    )


def test_reparam_around_the_model():
    x = torch.tensor([0.5, 1.5, -0.5])

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            t = pyro.sample("t", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(t, 1.0), obs=x)

    moved = poutine.reparam(model, config={"t": LocScaleReparam(0.0)})
    guide = AutoFlow(moved)
    fit_guide(moved, guide, x, num_steps=5, num_particles=4)
    assert set(guide.median(x)) == {"m", "t_decentered"}


# ------------------------------------------------------------------------------- amortized


def rows_model(x):
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, s))
        top = pyro.sample("top", dist.Uniform(0.0, s))
        pyro.sample("x", dist.Normal(z + top, 0.5), obs=x[:, 0])


def test_batches_of_any_size():
    guide = AmortizedFlow(rows_model, nn.Linear(1, 3), 3)
    svi = SVI(
        rows_model,
        guide,
        pyro.optim.Adam({"lr": 0.01}),
        Trace_ELBO(2, 1, vectorize_particles=True),
    )
    x = torch.randn(10, 1)
    for rows in (x, x[:4], x[:1], torch.randn(23, 1)):
        svi.step(rows)
        values = guide(rows)
        assert values["z"].shape == (len(rows),) and (values["top"] < values["s"]).all()
        assert guide.median(rows)["z"].shape == (len(rows),)
    draws = guide.sample_posterior(11, x)
    assert draws["z"].shape == (11, 10) and (draws["top"] < draws["s"][:, None]).all()
    assert Predictive(rows_model, guide=guide, num_samples=5, parallel=True)(x)["z"].shape[0] == 5


@pytest.mark.parametrize("vectorize", [True, False])
def test_amortized_supports_that_depend_on_globals_have_their_jacobian(vectorize):
    guide, x = AmortizedFlow(rows_model, nn.Linear(1, 3), 3), torch.randn(4, 1)
    perturbed(guide, x)
    trace = poutine.trace(guide).get_trace(x)
    values = {name: trace.nodes[name]["value"] for name in ("s", "z", "top")}
    u = trace.nodes["_AmortizedFlow_local"]["value"]
    p = torch.sigmoid(u[:, 1])
    torch.testing.assert_close(values["top"], values["s"] * p)
    log_det = (values["s"] * p * (1 - p)).log()
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["top"]["log_prob"], -log_det, atol=1e-4, rtol=1e-4)


def test_minibatches_that_the_arguments_choose():
    def model(x, rows):
        with pyro.plate("rows", 10, subsample=rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x[rows][:, 0])

    x = torch.arange(10.0)[:, None]
    seen = []

    class Encoder(nn.Module):
        def forward(self, batch):
            seen.append(batch[:, 0].tolist())
            return batch

    guide = AmortizedFlow(model, Encoder(), 1)
    for rows in ([1, 2, 3], [7, 2]):
        guide(x, torch.tensor(rows))
        assert seen[-1] == [float(r) for r in rows]


def test_data_and_encoders_of_wrong_shapes():
    x = torch.randn(6, 2)

    def model(x, size=6):
        with pyro.plate("rows", size):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"features of shape \(6, 4\); expected \(6, 3\)"):
        AmortizedFlow(model, nn.Linear(2, 4), 3)(x)
    with pytest.raises(ValueError, match=r"plate 'rows' has 5 rows.*has 6"):
        AmortizedFlow(model, nn.Linear(2, 3), 3)(x, size=5)
    with pytest.raises(ValueError, match=r"first argument.*inputs="):
        AmortizedFlow(model, nn.Linear(2, 3), 3)(x=x)
    with pytest.raises(ValueError, match=r"must be a tensor.*list"):
        AmortizedFlow(model, nn.Linear(2, 3), 3)([x])
    with pytest.raises(ValueError, match=r"local_names \['w'\] are no latents"):
        AmortizedFlow(model, nn.Linear(2, 3), 3, local_names=["w"])(x)


def test_delta_part_beside_a_flow():
    guide = AutoGuideList(three)
    guide.append(AutoDelta(poutine.block(three, expose=["x"])))
    guide.append(AutoFlow(poutine.block(three, hide=["x"])))
    assert set(guide()) == {"x", "y", "z"}


# ------------------------------------------------------------------------------- supports

SUPPORTS = {
    "real": (constraints.real, ()),
    "real of one": (constraints.real, (1,)),
    "positive": (constraints.positive, ()),
    "nonnegative": (constraints.nonnegative, ()),
    "softplus": (constraints.softplus_positive, ()),
    "unit": (constraints.unit_interval, ()),
    "interval": (constraints.interval(torch.tensor(-2.0), 3.0), ()),
    "half open": (constraints.half_open_interval(0.0, 2.0), ()),
    "above": (constraints.greater_than(1.0), ()),
    "below": (constraints.less_than(1.0), ()),
    "simplex": (constraints.simplex, (4,)),
    "correlation factor": (constraints.corr_cholesky, (3, 3)),
    "correlation": (constraints.corr_matrix, (3, 3)),
    "ordered": (constraints.ordered_vector, (3,)),
    "positive ordered": (constraints.positive_ordered_vector, (3,)),
    "independent": (constraints.independent(constraints.positive, 1), (2,)),
    "stack": (constraints.stack([constraints.positive, constraints.unit_interval], dim=-1), (2,)),
    "cat": (
        constraints.cat([constraints.positive, constraints.real], dim=-1, lengths=[2, 1]),
        (3,),
    ),
}


@pytest.mark.parametrize("batch", [(), (1,), (2,)])
@pytest.mark.parametrize("name", SUPPORTS)
def test_draws_lie_in_the_support_and_have_their_density(name, batch):
    support, event = SUPPORTS[name]

    def model():
        with pyro.plate_stack("plates", batch):
            pyro.sample("x", dist.ImproperUniform(support, (), event))

    guide = perturbed(AutoFlow(model))
    draws = guide.sample_posterior(50)["x"]
    assert draws.shape == (50, *batch, *event) and support.check(draws).all()
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(guide).get_trace()
    value = trace.nodes["x"]["value"].reshape(4, *batch, *event)
    trace.compute_log_prob()
    log_q = trace.nodes["_AutoFlow_latent"]["log_prob"].reshape(4)
    log_q = log_q + trace.nodes["x"]["log_prob"].reshape(4, -1).sum(-1)
    torch.testing.assert_close(guide.log_prob({"x": value}), log_q, atol=1e-2, rtol=1e-3)
    if not event and not batch:  # it integrates to one
        u = torch.linspace(-4.0, 4.0, 4001)
        x = torch.distributions.biject_to(support)(u).sort().values
        total = torch.trapezoid(guide.log_prob({"x": x}).exp(), x)
        torch.testing.assert_close(total, torch.tensor(1.0), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "support",
    [constraints.lower_cholesky, constraints.symmetric, constraints.lower_triangular]
    + [constraints.square, constraints.independent(constraints.symmetric, 1)],
    ids=str,
)
def test_supports_without_a_bijection_are_named(support):
    def model():
        pyro.sample("factor", dist.ImproperUniform(support, (), (3, 3)))

    for use in (lambda: AutoFlow(model).setup(), lambda: LatentDensity(model)):
        with pytest.raises(NotImplementedError, match="'factor'.*no bijection"):
            use()
