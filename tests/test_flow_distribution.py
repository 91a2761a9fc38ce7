"""What a flow's distribution tells beyond density and draws, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from cases import disturb
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import AffineTransform, ExpTransform, SigmoidTransform

import pyroflows as pf
from pyroflows import bases
from pyroflows import transforms as T
from pyroflows.families import LogisticMixture
from pyroflows.flow import Flow


def away(flow, scale=0.3):
    disturb(flow, torch.Generator().manual_seed(4), scale)
    return flow.double().eval()


def affine(loc, scale):
    """A flow that is the normal N(loc, scale**2), with its parameters."""
    loc = torch.as_tensor(loc).double().requires_grad_()
    scale = torch.as_tensor(scale).double().requires_grad_()
    flow = Flow(bases.DiagonalNormal(len(loc), loc, scale), [T.elementwise_affine(len(loc))])
    return flow.double()


BASES = {
    "normal": lambda: bases.DiagonalNormal(1, 0.3, 2.0),
    "student_t": lambda: bases.StudentT(1, 3.0),
    "mixture": lambda: bases.GaussianMixture(1, 3),
    "family": lambda: bases.Factorized(LogisticMixture(2), 1),
    "laplace": lambda: dist.Laplace(torch.zeros(1).double(), torch.ones(1).double()),
}
MAPS = {
    "spline": lambda: [T.spline(1, bound=4.0), T.elementwise_affine(1)],
    "decreasing": lambda: [T.spline(1), AffineTransform(1.0, -2.0)],
    "planar": lambda: [T.planar(1)],
    "autoregressive": lambda: [T.affine_autoregressive(1, [4]).inv, T.linear(1)],
    "positive": lambda: [T.elementwise_affine(1), ExpTransform()],
    "decreasing_share": lambda: [AffineTransform(0.0, -0.5), SigmoidTransform()],
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", MAPS)
def test_distribution_function_and_quantiles(base, name):
    flow = away(Flow(BASES[base](), MAPS[name]()))
    p = torch.linspace(0.02, 0.98, 24).double()
    y = flow.icdf(p)
    assert y.shape == (24, 1) and (y.diff(dim=0) > 0).all()
    torch.testing.assert_close(flow.cdf(y), p, rtol=0, atol=1e-9)
    # the derivative is the density, and the integral of the density the difference
    y = y.detach().requires_grad_()
    (slope,) = torch.autograd.grad(flow.cdf(y).sum(), y)
    torch.testing.assert_close(slope[:, 0].log(), flow.log_prob(y), rtol=1e-6, atol=1e-6)
    low, high = y[[5, 18]].detach()
    edges = low + (high - low) * torch.linspace(0, 1, 20_001).double()[:, None]
    middle = (edges[1:] + edges[:-1]) / 2
    mass = flow.log_prob(middle).exp().sum() * (edges[1] - edges[0])
    assert float(mass.detach()) == pytest.approx(float(p[18] - p[5]), abs=1e-5)


def test_quantiles_for_a_batch_of_contexts_of_either_sign():
    class Signed(T.Elementwise):
        def _move(self, value, context, inverse):
            slope = context
            y = value / slope if inverse else value * slope
            log = slope.abs().log().sum(-1)
            return y, (-log if inverse else log).expand(y.shape[:-1])

    part = T.elementwise_affine(1, context_dim=1)
    part.__class__ = Signed
    flow = Flow(1, [part]).double()
    c = torch.tensor([[2.0], [-3.0], [0.5]]).double()
    y = torch.tensor([[1.0], [1.0], [-1.0]]).double()
    expected = dist.Normal(0.0, c.abs()).cdf(y)[:, 0]
    torch.testing.assert_close(flow.cdf(y, c), expected)
    torch.testing.assert_close(flow(c).cdf(y.expand(4, 3, 1)), expected.expand(4, 3))
    torch.testing.assert_close(flow.icdf(expected, c), y)
    assert flow(c).icdf(torch.rand(4, 3).double()).shape == (4, 3, 1)
    assert flow.icdf(torch.tensor(0.5).double(), c).abs().max() < 1e-12


def test_distribution_functions_of_standardized_and_scalar_flows_and_errors():
    x = 1e3 + 50 * torch.randn(400, 1).double()
    flow = away(pf.neural_spline(1, num_transforms=2), 0.05)
    flow.standardize(x)
    y = flow.sample(20_000)
    torch.testing.assert_close(
        (y < 1010).double().mean(), flow.cdf(torch.tensor([1010.0]).double()), rtol=0, atol=0.015
    )
    scalar = pf.flow.FlowDistribution(dist.Normal(0.0, 1.0), pf.as_bijection(ExpTransform()))
    assert scalar.icdf(torch.tensor(0.5)) == pytest.approx(1.0)
    assert scalar.cdf(torch.tensor(math.e)) == pytest.approx(0.8413447, abs=1e-6)
    assert flow.icdf(torch.tensor([0.0, 1.0]).double()).isinf().all()
    with pytest.raises(NotImplementedError, match=r"one dimension.*\(2,\)"):
        pf.realnvp(2).cdf(torch.zeros(2))
    with pytest.raises(NotImplementedError, match=r"one dimension.*\(2,\)"):
        pf.realnvp(2).icdf(torch.zeros(2))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        flow.icdf(torch.tensor(1.5).double())


@pytest.mark.parametrize("df", [1.0, 2.0, 5.0, 30.0, 1000.0])
def test_student_t_against_closed_forms_and_quadrature(df):
    flow = Flow(bases.StudentT(1, df), [T.elementwise_affine(1)]).double()
    t = torch.tensor([-40.0, -3.0, -0.5, 0.0, 1.0, 8.0]).double()[:, None]
    if df == 1:
        expected = 0.5 + t.atan() / math.pi
    elif df == 2:
        expected = 0.5 + t / (2 * (2 + t * t).sqrt())
    else:
        grid = torch.linspace(0, 1, 200_001).double()
        middle = (grid[1:] + grid[:-1]) / 2
        density = dist.StudentT(torch.tensor(df).double()).log_prob(t * middle).exp()
        expected = 0.5 + (density.sum(-1, keepdim=True) / 200_000) * t
    torch.testing.assert_close(flow.cdf(t), expected[:, 0], rtol=0, atol=1e-7)


def test_entropy_and_divergence_of_normals_with_their_errors():
    p, q = affine([0.5, -1.0], [2.0, 0.5]), affine([0.0, 0.0], [1.0, 1.5])
    exact_p, exact_q = (
        dist.Normal(f.base.loc, f.base.log_scale.exp()).to_event(1) for f in (p, q)
    )
    exact = torch.distributions.kl_divergence(exact_p, exact_q)
    for got, right in [
        (p.entropy(4000, return_error=True), exact_p.entropy()),
        (p.kl_divergence(q, 4000, return_error=True), exact),
        (p.kl_divergence(exact_q, 4000, return_error=True), exact),
        (pf.kl_divergence(exact_p, q(), 4000, return_error=True), exact),
        (pf.kl_divergence(exact_p, q, 4000, return_error=True), exact),
        (pf.kl_divergence(p, exact_q, 4000, return_error=True), exact),
        (pf.entropy(p, 4000, return_error=True), exact_p.entropy()),
    ]:
        value, error = got
        assert 0 < error < 0.05 and abs(value - right) < 4 * error
    # the error is that of the estimate
    runs = torch.stack([p.entropy(50).detach() for _ in range(200)])
    assert float(p.entropy(2000, return_error=True)[1]) * math.sqrt(40) == pytest.approx(
        float(runs.std()), rel=0.3
    )
    with pytest.raises(ValueError, match="event shapes"):
        p.kl_divergence(dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="2 or more"):
        p.entropy(1, return_error=True)


def test_gradients_of_entropy_and_divergence():
    p, q = affine([0.5], [2.0]), affine([0.0], [1.0])
    kl = p.kl_divergence(q, 20_000)
    names = [p.base.loc, p.base.log_scale, q.base.loc, q.base.log_scale]
    # KL = log s_q - log s_p + (s_p² + (m_p - m_q)²) / (2 s_q²) - 1/2
    expected = [0.5, -1 + 4.0, -0.5, 1 - 4.25]
    for got, right in zip(torch.autograd.grad(kl, names), expected, strict=True):
        assert float(got) == pytest.approx(right, abs=0.15)
    (got,) = torch.autograd.grad(p.entropy(200), p.base.log_scale)
    assert float(got) == pytest.approx(1.0, abs=1e-6)
    # no draw carries gradients here: the score function does
    mixture = bases.GaussianMixture(1, 1).double()
    flow = Flow(mixture, [T.elementwise_affine(1)]).double()
    (got,) = torch.autograd.grad(flow.entropy(20_000), mixture.log_scale)
    assert float(got) == pytest.approx(1.0, abs=0.1)


def test_divergences_of_batches_and_through_the_registry():
    torch.manual_seed(0)
    f, g = away(pf.realnvp(2, 3, num_transforms=2)), away(pf.maf(2, num_transforms=2), 0.1)
    c = torch.randn(5, 3).double()
    prior = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
    assert pf.kl_divergence(f(c), g()).shape == pf.kl_divergence(g(), f(c)).shape == (5,)
    kl = torch.distributions.kl_divergence
    for p, q in [
        (f(c), g()),
        (g(), f(c)),
        (f(c), prior),
        (prior, f(c)),
        (f(c), f(c).expand((5,))),
    ]:
        got = kl(p, q)
        value, error = pf.kl_divergence(p, q, 2000, return_error=True)
        assert (
            got.shape == (5,)
            and (abs(got - value) < 6 * math.sqrt(2000 / 256) * error + 1e-9).all()
        )
    log_normal = dist.LogNormal(torch.zeros(2).double(), 1.0).to_event(1)
    positive = Flow(2, [ExpTransform()]).double()
    assert float(kl(positive(), log_normal)) == pytest.approx(0, abs=1e-9)
    transformed = dist.TransformedDistribution(prior, [AffineTransform(1.0, 2.0, event_dim=1)])
    assert kl(g(), transformed).isfinite() and kl(transformed, g()).isfinite()
    point = dist.Delta(torch.zeros(2).double(), event_dim=1)
    torch.testing.assert_close(kl(point, g()), -g().log_prob(torch.zeros(2).double()))
    same = dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0)
    assert float(kl(*same)) == 0.5  # others are as they were


def test_mean_field_elbo_takes_the_divergence():
    flow = affine([0.5, -1.0], [2.0, 0.5])

    def model():
        with pyro.plate("n", 3):
            pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))

    def guide():
        with pyro.plate("n", 3):
            pyro.sample("z", flow())

    exact = torch.distributions.kl_divergence(
        dist.Normal(flow.base.loc, flow.base.log_scale.exp()), dist.Normal(0.0, 1.0)
    )
    loss = TraceMeanField_ELBO(num_particles=20).loss(model, guide)
    assert loss == pytest.approx(3 * float(exact.sum().detach()), rel=0.1)


@pytest.mark.parametrize("recipe", ["iaf", "maf", "neural_spline", "glow"])
def test_draws_with_their_log_densities_in_one_pass(recipe):
    flow = away(getattr(pf, recipe)(3, 2, num_transforms=2, hidden_dims=[8]))
    flow.standardize(40 * torch.randn(50, 3).double() + 100, torch.randn(50, 2).double())
    c = torch.randn(4, 2).double()
    torch.manual_seed(1)
    y, log_prob = flow.rsample_and_log_prob(5, c)
    assert y.shape == (5, 4, 3) and log_prob.shape == (5, 4)
    copied = (y.detach() * 2 - 1 + 1) / 2  # nothing remembered
    torch.testing.assert_close(flow.log_prob(copied, c), log_prob)
    torch.manual_seed(1)
    x = flow.rsample(5, c)
    assert torch.equal(x, y)
    params = list(flow.parameters())
    got = torch.autograd.grad(log_prob.sum(), params, allow_unused=True)
    expected = torch.autograd.grad(flow.log_prob(x * 1.0, c).sum(), params, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_one_pass_means_no_inverse():
    calls = []
    part = T.affine_coupling(2, [4])
    inverse = part._inverse_and_log_det
    part._inverse_and_log_det = lambda *a: calls.append(1) or inverse(*a)
    d = Flow(2, [part])()
    y, log_prob = d.rsample_and_log_prob((7,))
    assert not calls
    torch.testing.assert_close(d.log_prob(y.clone()), log_prob)


def test_temperature_scales_the_noise():
    flow = Flow(bases.DiagonalNormal(2, 3.0, 2.0), [T.elementwise_affine(2)])
    torch.manual_seed(0)
    plain = flow.sample(8000)
    torch.manual_seed(0)
    torch.testing.assert_close(flow.sample(8000, temperature=0.5), 3 + (plain - 3) / 2)
    hot = flow().rsample((8000,), temperature=2.0)
    assert (hot.std(0) - 4).abs().max() < 0.2 and hot.requires_grad
    assert torch.equal(flow.sample(2, temperature=0), torch.full((2, 2), 3.0))
    conditional = Flow(bases.ConditionalNormal(2, 3), [T.elementwise_affine(2)])
    assert conditional.sample(5, torch.randn(4, 3), temperature=0.1).std() < 0.3
    heavy = Flow(bases.StudentT(2, 4.0), [ExpTransform()])
    assert heavy.sample(5, temperature=0.5).shape == (5, 2)
    with pytest.raises(ValueError, match="0 or more"):
        flow.sample(2, temperature=-1.0)
    angles = dist.VonMises(torch.zeros(1), 1.0)
    for base in (bases.GaussianMixture(2), dist.Uniform(torch.zeros(1), 1.0), angles):
        with pytest.raises(ValueError, match="location-scale"):
            Flow(
                base, [T.elementwise_affine(2 if isinstance(base, torch.nn.Module) else 1)]
            ).sample(2, temperature=0.5)


def test_flow_in_a_trace_keeps_its_kind():
    flow = pf.realnvp(2, num_transforms=2, hidden_dims=[4])
    with pyro.plate("n", 3):
        site = poutine.trace(lambda: pyro.sample("z", flow())).get_trace().nodes["z"]
    assert site["fn"].entropy().shape == (3,)
    assert site["fn"].rsample_and_log_prob((2,))[1].shape == (2, 3)


def test_distribution_functions_of_bases_with_ends_and_without_quantiles():
    """Exact also beyond the ends, and where torch's own checks refuse what is in the support."""
    y = torch.tensor([-3.0, 0.5, 2.0, 1e6]).double()[:, None]
    two, one = torch.tensor([2.0]).double(), torch.ones(1).double()
    erlang = 1 - (1 + y.clamp_min(0)) * (-y.clamp_min(0)).exp()  # of shape 2 and rate 1
    for base, expected in (
        (dist.Gamma(two, one), erlang),
        (dist.LogNormal(0 * one, one), dist.Normal(0.0, 1.0).cdf(y.clamp_min(1e-300).log())),
        (dist.Uniform(-one, two), ((y + 1) / 3).clamp(0, 1)),
        (dist.Gumbel(0 * one, one), (-(-(3 * y)).exp()).exp()),
    ):
        scale = 3.0 if isinstance(base, dist.Gumbel) else 1.0  # P(Y < -3) = exp(-8103)
        for sign in (1.0, -1.0):
            t = AffineTransform(torch.zeros(1).double(), sign / scale * one)
            flow = Flow(base.to_event(1), [T.elementwise_affine(1), t]).double()()
            flow._validate_args = False
            below = flow.cdf(sign * y)
            right = expected[:, 0] if sign > 0 else 1 - expected[:, 0]
            torch.testing.assert_close(below, right, rtol=0, atol=1e-9)
            p = torch.linspace(0.02, 0.98, 7).double()
            torch.testing.assert_close(flow.cdf(flow.icdf(p)), p, rtol=0, atol=1e-9)
    ends = Flow(dist.Gamma(two, one).to_event(1), [T.elementwise_affine(1)]).double()
    ends = ends.icdf(torch.tensor([0.0, 1.0]).double())[:, 0]
    assert ends.tolist() == [0.0, math.inf]
