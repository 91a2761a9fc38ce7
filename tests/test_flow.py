"""Flow, bases and recipes: a flow is a distribution, and Pyro can use it wherever it uses one."""

import copy
import math
import pickle
import threading

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from cases import disturb
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.reparam import TransformReparam
from pyro.nn import PyroModule

import pyroflows as pf
from pyroflows import bases
from pyroflows import transforms as T
from pyroflows.families import LogisticMixture
from pyroflows.flow import Flow

RECIPES = {
    "nice": pf.nice,
    "realnvp": pf.realnvp,
    "glow": pf.glow,
    "maf": pf.maf,
    "iaf": pf.iaf,
    "neural_spline": pf.neural_spline,
    "neural_spline_autoregressive": lambda *a, **k: pf.neural_spline(*a, autoregressive=True, **k),
}
BASES = {
    "standard_normal": lambda: bases.StandardNormal(2),
    "diagonal_normal": lambda: bases.DiagonalNormal(2, 1.0, torch.tensor([0.5, 2.0])),
    "fixed_normal": lambda: bases.DiagonalNormal(2, 1.0, 2.0, learnable=False),
    "student_t": lambda: bases.StudentT(2, 4.0, learnable=True),
    "mixture": lambda: bases.GaussianMixture(2, 3),
    "family": lambda: bases.Factorized(LogisticMixture(3), 2),
    "distribution": lambda: dist.Laplace(torch.zeros(2), torch.ones(2)),
}


def trained_like(flow, scale=0.2):
    disturb(flow, torch.Generator().manual_seed(4), scale)
    return flow.eval()


def make(recipe, input_dim, context_dim=0, dtype=torch.float32):
    flow = RECIPES[recipe](input_dim, context_dim, num_transforms=2, hidden_dims=[16, 16])
    return trained_like(flow.to(dtype))


def integral(flow, context=None, half_width=12.0, n=241):
    """The density's integral over a square by the midpoint rule."""
    edges = torch.linspace(-half_width, half_width, n, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    grid = torch.cartesian_prod(middle, middle)
    if context is not None:
        context = context.expand(len(grid), -1)
    cell = (edges[1] - edges[0]) ** 2
    return float(flow.log_prob(grid, context).exp().sum() * cell)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("context_dim", [0, 3])
def test_recipe_integrates_to_one(recipe, context_dim):
    flow = make(recipe, 2, context_dim, torch.float64)
    with torch.no_grad():
        context = torch.randn(3, dtype=torch.float64) if context_dim else None
        assert abs(integral(flow, context) - 1) < 1e-2


@pytest.mark.parametrize("base", BASES)
def test_base_integrates_to_one_and_samples_agree(base):
    flow = trained_like(Flow(BASES[base](), T.affine_coupling(2, [8])).double(), 0.1)
    with torch.no_grad():
        wide = base in ("student_t", "family", "distribution", "fixed_normal", "diagonal_normal")
        total = integral(flow, half_width=40.0 if wide else 12.0, n=801)
        assert abs(total - 1) < 2e-2
        x = flow.sample(20_000)
        # E[1/q] over a box is its volume if samples and density agree
        inside = (x.abs() < 1).all(-1)
        volume = torch.where(inside, (-flow.log_prob(x)).exp(), 0.0).mean()
        assert abs(float(volume) - 4) < 0.6


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("input_dim", [1, 2, 5])
@pytest.mark.parametrize("context_dim", [0, 3])
def test_recipe_shapes_and_gradients(recipe, input_dim, context_dim, dtype):
    flow = make(recipe, input_dim, context_dim, dtype)
    context = torch.randn(4, context_dim, dtype=dtype) if context_dim else None
    d = flow(context)
    batch = (4,) if context_dim else ()
    assert d.batch_shape == batch and d.event_shape == (input_dim,)
    y = d.rsample((3,))
    assert y.shape == (3, *batch, input_dim) and y.dtype == dtype
    assert d.log_prob(y).shape == (3, *batch)
    assert d.support.check(y).all()
    loss = -flow.log_prob(y.detach(), context).mean() + flow.rsample(8, context).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
    assert flow.log_prob(torch.empty(0, *batch, input_dim, dtype=dtype), context).shape == (
        0,
        *batch,
    )


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "glow"])
def test_recipe_starts_as_its_base(recipe):
    flow = RECIPES[recipe](4)
    x = torch.randn(5, 4)
    expected = dist.Normal(0.0, 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(flow.log_prob(x), expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_moderate_flows_survive_extreme_values(recipe):
    flow = make(recipe, 3)
    x = torch.tensor([[1e6, -1e6, 1e6], [math.nan, 0.0, 0.0], [0.0, 0.0, 0.0]]).requires_grad_()
    log_prob = flow.log_prob(x)
    assert log_prob[0].isfinite() and log_prob[1].isnan() and log_prob[2].isfinite()
    (gradient,) = torch.autograd.grad(log_prob[0] + log_prob[2], x)
    assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_copies(recipe):
    flow = make(recipe, 3, 2)
    x, c = torch.randn(5, 3), torch.randn(5, 2)
    before = flow.log_prob(x, c)
    flow.sample(2, c)
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.testing.assert_close(other.log_prob(x, c), before)
    fresh = RECIPES[recipe](3, 2, num_transforms=2, hidden_dims=[16, 16])
    fresh.load_state_dict(flow.state_dict())
    torch.testing.assert_close(fresh.eval().log_prob(x, c), before)
    with pytest.raises(RuntimeError, match="state_dict|size mismatch"):
        RECIPES[recipe](4, 2, num_transforms=2, hidden_dims=[16, 16]).load_state_dict(
            flow.state_dict()
        )


def test_bad_input_is_named():
    flow, conditional = pf.realnvp(3), pf.realnvp(3, 2)
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="takes no context"):
        flow(torch.randn(4, 2))
    with pytest.raises(ValueError, match="needs a context"):
        conditional.log_prob(x)
    with pytest.raises(
        ValueError, match=r"expects a context of shape \(\.\.\., 2\); got \(4, 5\)"
    ):
        conditional(torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"\(\.\.\., 3\).*got \(4, 2\)"):
        flow.log_prob(torch.randn(4, 2))
    with pytest.raises(ValueError, match="float64"):
        flow.log_prob(x.double())
    with pytest.raises(TypeError, match="int64"):
        flow.log_prob(torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="expect"):
        Flow(3, [T.affine_coupling(4)])
    with pytest.raises(ValueError, match="part 0.*part 1"):
        Flow(3, [T.affine_coupling(3), T.affine_coupling(4)])
    with pytest.raises(ValueError, match=r"disagree on context_dim: \[2, 3\]"):
        Flow(3, [T.affine_coupling(3, context_dim=2), T.affine_coupling(3, context_dim=3)])
    with pytest.raises(ValueError, match="context_dim"):
        Flow(bases.ConditionalNormal(3, 2), [T.affine_coupling(3, context_dim=4)])
    with pytest.raises(TypeError, match="base"):
        Flow("normal", [T.affine_coupling(3)])


def test_conditional_base():
    flow = trained_like(Flow(bases.ConditionalNormal(2, 3, [8]), [T.spline(2)]).double())
    c = torch.randn(5, 3, dtype=torch.float64)
    assert flow(c).batch_shape == (5,) and flow.sample((4,), c).shape == (4, 5, 2)
    with torch.no_grad():
        assert abs(integral(flow, c[0]) - 1) < 1e-2


# ------------------------------------------------------------------------------------- inside Pyro


def test_model_with_flow_likelihood_learns():
    target = torch.randn(200, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.3]]) + 1
    flow = pf.neural_spline(2, num_transforms=2, hidden_dims=[16])

    def model(data):
        with pyro.plate("rows", len(data)):
            pyro.sample("y", flow(), obs=data)

    svi = SVI(model, lambda data: None, pyro.optim.ClippedAdam({"lr": 2e-2}), Trace_ELBO())
    losses = [svi.step(target) / 200 for _ in range(120)]
    assert losses[-1] < losses[0] - 0.5
    with torch.no_grad():  # ClippedAdam writes through .data: the density is the present one
        assert abs(float(-flow.log_prob(target).mean()) - losses[-1]) < 0.2


def test_flow_as_guide_and_attribute():
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.flow = pf.iaf(2, num_transforms=2, hidden_dims=[8])

        def forward(self):
            pyro.sample("z", self.flow())

    def model():
        pyro.sample("z", dist.Normal(torch.tensor([2.0, -1.0]), 0.5).to_event(1))

    guide = Guide()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 2e-2}), Trace_ELBO(8, vectorize_particles=True))
    for _ in range(250):
        svi.step()
    z = guide.flow.sample(4000)
    assert (z.mean(0) - torch.tensor([2.0, -1.0])).abs().max() < 0.15
    assert (z.std(0) - 0.5).abs().max() < 0.15
    assert all(name.startswith("flow") for name in pyro.get_param_store().keys())


def test_two_unnamed_flows_do_not_share_parameters():
    first, second = pf.realnvp(2), pf.realnvp(2)
    poutine.trace(lambda: pyro.sample("x", first())).get_trace()
    with pytest.raises(RuntimeError, match="name="):
        poutine.trace(second).get_trace()
    named = pf.realnvp(2, name="second")
    poutine.trace(lambda: (pyro.sample("x", first()), pyro.sample("y", named()))).get_trace()
    names = set(pyro.get_param_store().keys())
    assert len(names) == len(list(first.parameters())) + len(list(named.parameters()))


def test_values_loaded_into_the_param_store_are_used(tmp_path):
    first = trained_like(pf.realnvp(2, name="prior"))
    poutine.trace(first).get_trace()
    pyro.get_param_store().save(tmp_path / "params.pt")
    x = torch.randn(3, 2)
    expected = first.log_prob(x).detach()
    del first
    pyro.clear_param_store()
    state = torch.load(tmp_path / "params.pt", weights_only=False)
    pyro.get_param_store().set_state(state)
    second = pf.realnvp(2, name="prior")
    poutine.trace(lambda: pyro.sample("x", second())).get_trace()
    torch.testing.assert_close(second.log_prob(x), expected)


def test_calls_outside_inference_leave_the_param_store_alone():
    flow = pf.realnvp(2)
    flow().sample()
    flow.log_prob(torch.zeros(2))
    assert not list(pyro.get_param_store().keys())


def test_plates_with_vectorized_particles_and_contexts():
    flow = trained_like(pf.realnvp(2, 3, num_transforms=2, hidden_dims=[8]))
    features = torch.randn(6, 3)

    def model():
        shift = pyro.sample("shift", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", 6):
            return pyro.sample("y", flow(features + shift))

    with pyro.plate("particles", 5, dim=-2):
        trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["y"]["value"].shape == (5, 6, 2)
    assert trace.nodes["y"]["log_prob"].shape == (5, 6)
    samples = Predictive(model, num_samples=7, parallel=True)()
    assert samples["y"].shape[0] == 7 and samples["y"].shape[-2:] == (6, 2)


@pytest.mark.parametrize("reparam", [False, True])
def test_flow_prior_in_nuts(reparam):
    flow = trained_like(pf.neural_spline(2, num_transforms=2, hidden_dims=[8]), 0.1)
    flow.requires_grad_(False)

    def model():
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.tensor([0.5, -0.5]))

    config = {"z": TransformReparam()} if reparam else {}
    kernel = NUTS(poutine.reparam(model, config=config), jit_compile=False, max_tree_depth=5)
    mcmc = MCMC(kernel, num_samples=150, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    site = "z_base" if reparam else "z"
    z = mcmc.get_samples()[site]
    if reparam:
        z = flow().transforms[0](z)
    prior = flow.sample(20_000)
    weight = dist.Normal(prior, 1.0).log_prob(torch.tensor([0.5, -0.5])).sum(-1).softmax(0)
    expected = (weight.unsqueeze(-1) * prior).sum(0)
    assert (z.mean(0) - expected).abs().max() < 0.35


def test_threads_get_their_own_answers():
    flow = make("neural_spline", 3)
    batches = [torch.randn(16, 3) for _ in range(8)]
    expected = [flow.log_prob(b).detach() for b in batches]
    transform, wrong = flow().transforms[0], []
    d = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [transform])

    def work(i):
        for _ in range(40):
            with torch.no_grad():
                if not torch.allclose(d.log_prob(batches[i]), expected[i], atol=1e-5):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "recipe", ["realnvp", "maf", "neural_spline", "neural_spline_autoregressive"]
)
def test_log_prob_compiles_to_one_graph(recipe):
    flow, x = make(recipe, 4), torch.randn(32, 4)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), flow.log_prob(x))
    torch._dynamo.reset()
    direct = torch.compile(lambda x: flow().log_prob(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(direct(x), flow.log_prob(x))
    gradient = torch.autograd.grad(direct(x).sum(), flow.parameters())
    for a, b in zip(
        gradient, torch.autograd.grad(flow.log_prob(x).sum(), flow.parameters()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_gives_the_same_gradients():
    """Swapped halves once made PyTorch's default backend reuse a buffer it still needed."""
    masks = [T.half_mask(4), T.half_mask(4, swap=True)]
    flow = trained_like(Flow(4, [T.spline_coupling(4, None, [16], mask=m) for m in masks]))
    x = torch.randn(32, 4)
    compiled = torch.compile(flow.log_prob, fullgraph=True)
    got = torch.autograd.grad(compiled(x).sum(), flow.parameters())
    expected = torch.autograd.grad(flow.log_prob(x).sum(), flow.parameters())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_errors_of_shape_name_the_flow():
    with pytest.raises(
        ValueError, match=r"Flow expects values of shape \(\.\.\., 2\); got \(5, 3\)"
    ):
        pf.realnvp(2).log_prob(torch.zeros(5, 3))
