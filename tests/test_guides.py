"""AutoFlow: the flat density it works on, its place in Pyro, copies, supports, errors."""

import copy
import io
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
)
from pyro.infer.autoguide import (
    AutoDiscreteParallel,
    AutoGuideList,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
)
from pyro.infer.reparam import NeuTraReparam

from pyroflows import AutoFlow, Bijection, fit_guide
from pyroflows.guides.latent import LatentDensity
from pyroflows.guides.prefit import Gaussian, Target, batch_and_match, laplace, prefit
from pyroflows.recipes.posteriors import sperner_masks


def every_support():
    """Plates, events and every kind of support."""
    pyro.sample("scalar", dist.Normal(0.0, 1.0))
    pyro.sample("vector", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 3):
        scale = pyro.sample("positive", dist.LogNormal(0.0, 1.0))
        with pyro.plate("columns", 2):
            pyro.sample("nested", dist.Normal(0.0, scale))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("interval", dist.Uniform(-1.0, 2.0))
    pyro.sample("corr", dist.LKJCholesky(3, torch.tensor(1.0)))
    ordered = dist.transforms.OrderedTransform()
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    pyro.sample("ordered", dist.TransformedDistribution(base, [ordered]))


def beta_binomial(y):
    with pyro.plate("trials", len(y)):
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        pyro.sample("y", dist.Binomial(10, p), obs=y)


# ------------------------------------------------------------------------------- the flat density


def test_density_is_the_models_with_jacobians():
    density = LatentDensity(every_support)
    u = torch.randn(4, density.dim, dtype=density.init_loc.dtype)
    batched = density(u)
    values = density.constrain(u)
    assert batched.shape == (4,)
    torch.testing.assert_close(density.unconstrain(values), u, atol=1e-3, rtol=1e-3)
    for s in range(4):  # an oracle of its own: trace the model at one point, add the Jacobians
        point = {name: v[s] for name, v in values.items()}
        trace = poutine.trace(poutine.condition(every_support, data=point)).get_trace()
        expected = trace.log_prob_sum()
        for site in density.sites:
            transform = torch.distributions.biject_to(trace.nodes[site.name]["fn"].support)
            part = u[s, site.start : site.start + site.size].reshape(site.shape)
            expected = expected + transform.log_abs_det_jacobian(part, transform(part)).sum()
        torch.testing.assert_close(batched[s], expected, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(density(u[s]), expected, atol=1e-3, rtol=1e-4)


def test_density_finds_a_model_that_cannot_be_batched():
    X = torch.randn(5, 3)

    def matrix_model():  # X @ w is wrong for a batch of w: vmap must take over
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(X @ w, 1.0).to_event(1), obs=torch.zeros(5))

    density = LatentDensity(matrix_model)
    w = torch.randn(5, 3)  # as many particles as rows: would broadcast without an error
    expected = dist.Normal(0.0, 1.0).log_prob(w).sum(-1)
    expected = expected + dist.Normal(w @ X.T, 1.0).log_prob(torch.zeros(5)).sum(-1)
    torch.testing.assert_close(density(w), expected)

    def python_model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.tensor(float(w.item() > 0)))

    one_by_one = LatentDensity(python_model)
    with pytest.warns(UserWarning, match="one particle at a time"):
        log_p = one_by_one(torch.tensor([[-1.0], [2.0]]))
    expected = dist.Normal(0.0, 1.0).log_prob(torch.tensor([-1.0, 2.0])) + torch.tensor([0.0, 1.0])
    torch.testing.assert_close(log_p, expected)


def test_density_of_one_failing_particle_is_nan_and_spares_the_others():
    def model():
        s = pyro.sample("s", dist.Normal(1.0, 1.0))
        torch.linalg.cholesky(s[..., None, None] * torch.eye(2))

    log_p = LatentDensity(model)(torch.tensor([[1.0], [-1.0], [2.0]]))
    assert log_p.isfinite().tolist() == [True, False, True]


def test_density_counts_scales_masks_and_subsamples():
    x = torch.arange(6.0)

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6, subsample=torch.tensor([0, 2])) as index:
            pyro.sample("x", dist.Normal(m, 1.0), obs=x[index])
        pyro.sample("masked", dist.Normal(m, 1.0).mask(False), obs=torch.tensor(3.0))

    density = LatentDensity(model)
    expected = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5))
    expected = expected + 3 * dist.Normal(0.5, 1.0).log_prob(x[[0, 2]]).sum()
    torch.testing.assert_close(density(torch.tensor([[0.5]])), expected[None])
    assert density.stochastic


# ------------------------------------------------------------------------------- the pre-fit


def gaussian_target(dim=6, condition=1e8):
    scales = torch.logspace(0, 0.5 * torch.log10(torch.tensor(condition)).item(), dim).double()
    Q = torch.linalg.qr(torch.randn(dim, dim).double()).Q
    cov = Q * scales @ Q.T
    cov = cov @ cov.T
    loc = torch.randn(dim).double() * scales[-1]
    normal = dist.MultivariateNormal(loc, cov)
    return normal.log_prob, loc, cov


@pytest.mark.parametrize("method", ["batch-and-match", "Laplace", "choice"])
def test_prefit_finds_an_ill_conditioned_gaussian(method):
    log_prob, loc, cov = gaussian_target(condition=1e2 if method == "batch-and-match" else 1e8)
    start = torch.zeros(len(loc)).double()
    target = Target(log_prob, torch.float64)
    if method == "batch-and-match":
        unit = Gaussian(start, torch.eye(len(loc)).double())
        found = batch_and_match(target, unit, num_steps=300, tol=1e-8).with_elbo(target)
        assert found.elbo > -10
        return
    found = laplace(target, start) if method == "Laplace" else prefit(log_prob, start)[0]
    root = torch.linalg.cholesky(cov)
    whitened = torch.linalg.solve(root, found.scale_tril)
    torch.testing.assert_close(
        whitened @ whitened.T, torch.eye(len(loc)).double(), atol=1e-3, rtol=0
    )
    assert torch.linalg.solve(root, found.loc - loc).norm() < 1e-2


def test_prefit_diagonal():
    scale = torch.logspace(-2, 2, 40)
    best, _, num_gradients = prefit(
        dist.Normal(torch.ones(40), scale).to_event(1).log_prob, torch.zeros(40), full_rank=False
    )
    torch.testing.assert_close(best.scale_tril.float(), scale, rtol=0.1, atol=0)
    assert abs(best.elbo) < 0.1 and num_gradients < 10_000


def test_masks_let_every_latent_act_on_every_other():
    for dim, layers in [(2, 4), (6, 4), (7, 6), (20, 6), (70, 8)]:
        masks = sperner_masks(dim, layers)
        acts = (~masks[:, :, None] & masks[:, None, :]).any(0)
        assert (acts | torch.eye(dim, dtype=bool)).all()


# ------------------------------------------------------------------------------- the guide in Pyro


@pytest.mark.parametrize("init", [init_to_feasible, init_to_mean, init_to_median, init_to_sample])
def test_every_support_under_every_elbo(init):
    guide = AutoFlow(every_support, init_loc_fn=init).setup()
    for elbo in (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO):
        for particles in (1, 3):
            objective = elbo(
                num_particles=particles,
                vectorize_particles=particles > 1,
                strict_enumeration_warning=False,
            )
            assert torch.isfinite(torch.tensor(objective.loss_and_grads(every_support, guide)))


def test_parameters_exist_after_setup_and_all_learn():
    guide = AutoFlow(every_support).setup()
    assert [name for name, _ in guide.named_parameters()] == ["packed"]
    Trace_ELBO().loss_and_grads(every_support, guide)
    guide.zero_grad()
    with torch.no_grad():  # away from the identity, every weight matters
        guide.packed.add_(torch.randn_like(guide.packed))
    v, log_det = guide.transport[0].forward_and_log_det(torch.randn(64, guide.latent_dim))
    (v.square().sum() + log_det.sum()).backward()
    assert (guide.packed.grad != 0).float().mean() > 0.95


def test_log_prob_is_the_guides_own():
    guide = AutoFlow(every_support).setup()
    trace = poutine.trace(guide).get_trace()
    values = {s.name: trace.nodes[s.name]["value"] for s in guide.flow_sites}
    torch.testing.assert_close(guide.log_prob(values), trace.log_prob_sum(), atol=1e-3, rtol=1e-4)
    draws = guide.sample_posterior(5)
    assert guide.log_prob(draws).shape == (5,)
    assert draws["nested"].shape == (5, 2, 3) and draws["corr"].shape == (5, 3, 3)
    with pytest.raises(ValueError, match="missing: \\['scalar'\\]"):
        guide.log_prob({k: v for k, v in draws.items() if k != "scalar"})


def test_init_loc_init_scale_median_and_quantiles():
    inits = {"x": torch.randn(()), "y": torch.randn(5)}

    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(5), torch.eye(5)))

    for scale in (1.0, 0.1, 1e-8):
        guide = AutoFlow(model, init_loc_fn=lambda s: inits[s["name"]], init_scale=scale)
        median = guide.median()
        assert all(torch.equal(median[k], inits[k]) for k in inits)
        torch.testing.assert_close(
            guide._loc_scale()[1], torch.full((6,), scale), rtol=0.05, atol=0
        )
    guide = AutoFlow(model, init_scale=1.0, init_loc_fn=lambda s: inits[s["name"]])
    quantiles = guide.quantiles([0.025, 0.5, 0.975])
    torch.testing.assert_close(quantiles["y"][1], guide.median()["y"])
    torch.testing.assert_close(
        quantiles["x"][2] - inits["x"], torch.tensor(1.96), atol=0.02, rtol=0
    )


def test_plain_svi_finds_the_median():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Beta(2.0, 2.0))

    guide = AutoFlow(model)
    elbo = Trace_ELBO(num_particles=100, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    for _ in range(200):
        svi.step()
    median = guide.median()
    assert abs(median["x"]) < 0.15 and abs(median["y"] - 1) < 0.15 and abs(median["z"] - 0.5) < 0.1


def test_factors_count_once():
    def model(f):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f1", f)
        with pyro.plate("plate", 3):
            pyro.factor("f2", f)
            pyro.sample("w", dist.Normal(0.0, 1.0))

    guide, elbo = AutoFlow(model), Trace_ELBO()
    elbo.loss(model, guide, torch.tensor(0.0))
    losses = []
    for f in (5.0, 4.0):
        pyro.set_rng_seed(1)
        losses.append(elbo.loss(model, guide, torch.tensor(f)))
    assert losses[0] - losses[1] == pytest.approx(-4, abs=1e-4)


def test_jit_elbo_jit_trace_and_predictive():
    y = torch.tensor([3.0, 7.0])
    guide = AutoFlow(beta_binomial).setup(y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's own
        elbo = JitTrace_ELBO(4, vectorize_particles=True, ignore_jit_warnings=True)
        svi = SVI(beta_binomial, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        losses = [svi.step(y) for _ in range(40)]
        traced = torch.jit.trace_module(guide, {"call": (y,)}, check_trace=False)
        stream = io.BytesIO()
        torch.jit.save(traced, stream)
        stream.seek(0)
        loaded = torch.jit.load(stream)
    assert sum(losses[-10:]) < sum(losses[:10])
    pyro.set_rng_seed(0)
    expected = guide.call(y)
    pyro.set_rng_seed(0)
    for a, b in zip(loaded.call(y), expected, strict=True):
        torch.testing.assert_close(a, b)
    draws = Predictive(beta_binomial, guide=guide, num_samples=7, parallel=True)(y)
    assert draws["p"].shape == (7, 2)


def test_guide_list_with_discrete_sites():
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])

    def model(data):
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
        with pyro.plate("data", len(data)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[k], 1.0), obs=data)

    guide = AutoGuideList(model)
    guide.append(AutoFlow(poutine.block(model, hide=["k"])))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["k"])))
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(model, guide, data)
    assert torch.isfinite(torch.tensor(loss))
    with pytest.raises(ValueError, match="'k'"):
        AutoFlow(model).setup(data)
    with pytest.raises(ValueError, match="'k'"):
        fit_guide(model, AutoFlow(model), data)


def test_two_guides_of_one_name_do_not_share_parameters():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    first, second = AutoFlow(model, init_scale=1e-3), AutoFlow(model, init_scale=10.0)
    assert first()["x"].abs().max() < 1 < second()["x"].abs().max()
    assert first()["x"].abs().max() < 1


def test_bad_arguments():
    with pytest.raises(ValueError, match="init_scale"):
        AutoFlow(lambda: None, init_scale=0.0)
    with pytest.raises(ValueError, match="flow must be one of"):
        AutoFlow(every_support, flow="no such flow").setup()


def test_supports_that_depend_on_other_sites():
    def model():
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        pyro.sample("b", dist.Uniform(torch.zeros_like(a), a))

    guide = AutoFlow(model)
    draws = guide.sample_posterior(500)
    assert (draws["b"] < draws["a"]).all()
    log_prob = guide.log_prob(draws)
    assert log_prob.shape == (500,)
    with pyro.plate("particles", 4, dim=-1):
        trace = poutine.trace(guide).get_trace()
    assert (trace.nodes["b"]["value"] < trace.nodes["a"]["value"]).all()
    outside = {"a": torch.tensor(0.3), "b": torch.tensor(0.2)}
    assert guide.log_prob(outside).isfinite()


def test_improper_priors_need_no_init():
    def model():
        pyro.sample("m", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("s", dist.ImproperUniform(constraints.positive, (2,), ()).to_event(1))

    guide = AutoFlow(model)
    assert guide()["s"].shape == (2,) and (guide()["s"] > 0).all()


@pytest.mark.parametrize("flow", ["realnvp", "iaf", "maf", "neural_spline", None])
def test_flows_by_name_and_callable(flow):
    guide = AutoFlow(every_support, flow=flow).setup()
    transform = guide.get_transform()
    assert isinstance(transform, Bijection)
    u = guide.get_posterior().rsample((3,))
    z, log_det = transform.inverse_and_log_det(u)
    torch.testing.assert_close(transform.forward_and_log_det(z)[0], u, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(transform.forward_and_log_det(z)[1], -log_det, atol=1e-3, rtol=1e-3)
    other = AutoFlow(
        every_support,
        flow=lambda d: dist.transforms.iterated(2, dist.transforms.affine_autoregressive, d),
    )
    assert other()["simplex"].shape == (3,)


def test_one_latent():
    guide = AutoFlow(lambda: pyro.sample("x", dist.Gamma(2.0, 1.0)))
    assert guide()["x"].shape == ()


def test_dtype_follows_the_model(dtype):
    one = torch.ones((), dtype=dtype)
    guide = AutoFlow(lambda: pyro.sample("x", dist.Gamma(2 * one, one))).setup()
    assert guide.packed.dtype == dtype and guide()["x"].dtype == dtype
    assert guide.median()["x"].dtype == dtype


def test_copies_are_whole():
    guide = AutoFlow(every_support)
    guide()
    guide.get_posterior().log_prob(guide.get_posterior().sample())
    twin = copy.deepcopy(guide)
    assert twin.model is guide.model and guide.model is not None
    restored = pickle.loads(pickle.dumps(guide))
    fresh = AutoFlow(every_support)
    fresh.load_state_dict(guide.state_dict())  # before it has seen its model
    later = AutoFlow(every_support).setup()
    later.load_state_dict(guide.state_dict())
    expected = guide.median()
    for other in (twin, restored, fresh, later):
        median = other.median()
        assert all(torch.equal(median[k], expected[k]) for k in expected)
    with torch.no_grad():
        twin.packed.add_(1.0)
    assert torch.equal(guide.median()["vector"], expected["vector"])


def test_neutra():
    def model():
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, v.exp()))

    guide = AutoFlow(model, init_scale=1.0).setup()
    neutra = NeuTraReparam(guide.requires_grad_(False))
    mcmc = MCMC(NUTS(neutra.reparam(model)), num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    z = mcmc.get_samples()["v_shared_latent"]
    draws = neutra.transform_sample(z)
    assert draws["v"].shape == (20,) and draws["x"].shape == (20,)
