"""Where Pyro's own flows fail: each failure with its test, for every transform concerned."""

import copy

import pyro.distributions as dist
import pytest
import torch
from cases import CASES, build, contexts, noise
from pyro.distributions.conditional import ConditionalComposeTransformModule
from pyro.nn import PyroModule
from test_transforms import each_kind, standard_normal
from torch.distributions import ComposeTransform

import pyroflows.transforms as T
from pyroflows.bijection import Bijection
from pyroflows.compose import as_bijection
from pyroflows.dequantization import UniformDequantized
from pyroflows.splines import RationalQuadratic


def distribution(name, context_dim, batch=4):
    t = build(name, context_dim)
    base = standard_normal(tuple(noise(name).shape))
    return t, dist.TransformedDistribution(base, [t.condition(contexts(context_dim, batch))])


@each_kind
def test_deepcopy_after_a_call(name, context_dim):
    t, d = distribution(name, context_dim)
    d.log_prob(d.rsample((4,) if not context_dim else ()))
    assert copy.deepcopy(t) is not t
    copy.deepcopy(t.condition(contexts(context_dim, 4)))


@each_kind
def test_two_steps_on_one_tensor(name, context_dim):
    t, d = distribution(name, context_dim)
    y = d.sample((4,) if not context_dim else ()).detach()
    parameters = list(t.parameters())
    if not parameters:
        pytest.skip("nothing to learn")
    optimizer, losses = torch.optim.Adam(parameters, 1e-2), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = -d.log_prob(y).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(set(losses)) == 3


@each_kind
@pytest.mark.parametrize("through_data", [False, True])
def test_log_prob_after_a_step_is_the_new_density(name, context_dim, through_data):
    """Also where an optimizer writes through ``.data``, as Pyro's ClippedAdam does."""
    t, d = distribution(name, context_dim)
    y = d.rsample((4,) if not context_dim else ())
    log_prob = d.log_prob(y)
    if log_prob.requires_grad:
        log_prob.sum().backward()
    elif through_data:
        pytest.skip("without a backward pass, writing through .data leaves no trace")
    for p in t.parameters():
        if through_data:
            p.data.add_(0.05)
        else:
            with torch.no_grad():
                p.add_(0.05)
    torch.testing.assert_close(d.log_prob(y), d.log_prob(y.detach().clone()))


@each_kind
def test_log_prob_of_a_sample_has_a_gradient(name, context_dim):
    t, d = distribution(name, context_dim)
    if not list(t.parameters()):
        pytest.skip("nothing to learn")
    assert d.log_prob(d.sample()).requires_grad
    y = d.sample().requires_grad_()
    (gradient,) = torch.autograd.grad(d.log_prob(y).sum(), y)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@each_kind
def test_through_pyros_containers(name, context_dim):
    """Pyro's ways to compose and to condition give the same density."""
    t, d = distribution(name, context_dim)
    y = d.sample(() if context_dim else (4,))
    expected = d.log_prob(y)
    c, base = contexts(context_dim, 4), standard_normal(tuple(noise(name).shape))
    composed = dist.TransformedDistribution(base, [ComposeTransform([t.condition(c)])])
    torch.testing.assert_close(composed.log_prob(y), expected)
    stack = ConditionalComposeTransformModule([t], cache_size=1)
    conditional = dist.ConditionalTransformedDistribution(base, [stack])
    torch.testing.assert_close(conditional.condition(c).log_prob(y), expected)
    if name == "wrapped":
        return  # positive values only: no density of a normal through its inverse
    inverse = dist.ConditionalTransformedDistribution(base, [t.inv])
    x = inverse.condition(c).sample(() if context_dim else (4,))
    assert inverse.condition(c).log_prob(x).isfinite().all()


@each_kind
def test_with_cache(name, context_dim):
    t = build(name, context_dim).condition(contexts(context_dim, 4))
    assert t.with_cache(0) is t and t.with_cache(1) is t and t.inv.with_cache(0) is t.inv


@pytest.mark.parametrize("kind", [T.Coupling, T.Autoregressive, T.Elementwise, T.Compose])
def test_pyro_modules_of_transforms(kind):
    assert issubclass(PyroModule[kind], Bijection)
    parts = {
        T.Coupling: lambda: build("affine_coupling", 2),
        T.Autoregressive: lambda: build("affine_autoregressive", 2),
        T.Elementwise: lambda: build("spline", 2),
        T.Compose: lambda: build("compose", 2),
    }
    t = parts[kind]()
    if kind is T.Compose:
        module = PyroModule[kind](list(t.parts))
    elif kind is T.Coupling:
        module = PyroModule[kind](
            t.scalar, t.conditioner, [False, False, True, True, True], context_dim=2
        )
    elif kind is T.Autoregressive:
        module = PyroModule[kind](t.scalar, t.conditioner, context_dim=2)
    else:
        module = PyroModule[kind](t.scalar, t.conditioner, t.event_shape, context_dim=2)
    x, c = torch.randn(4, *t.event_shape, dtype=torch.float64), contexts(2, 4)
    torch.testing.assert_close(module.condition(c)(x), t.condition(c)(x))


def test_random_permutations_are_saved():
    first, second = T.permute(32), T.permute(32)
    x = torch.randn(32)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_rational_quadratic_splines_are_reachable():
    for factory in (T.spline, T.spline_coupling, T.spline_autoregressive):
        t = factory(3, order="quadratic", count_bins=5)
        assert isinstance(t.scalar, RationalQuadratic) and t.scalar.count_bins == 5
        assert factory(3, order="linear").scalar != t.scalar
        with pytest.raises(ValueError, match="order must be"):
            factory(3, order="cubic")


def test_what_pyro_lacks_is_there():
    assert {"additive_coupling", "actnorm", "multi_scale", "squeeze", "linear"} <= set(dir(T))
    lattice = UniformDequantized(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    assert lattice.log_prob(torch.tensor([0.0, 1.0])).isfinite()


def test_stock_transforms_are_wrapped():
    own = torch.distributions.AffineTransform(torch.tensor([1.0, 2.0]), 3.0, event_dim=1)
    t = as_bijection(own)
    assert as_bijection(t) is t
    x = torch.randn(5, 2)
    torch.testing.assert_close(t(x), own(x))
    assert t.double()(x.double()).dtype == torch.float64
    stock = dist.transforms.conditional_affine_coupling(3, 2)
    with pytest.raises(ValueError, match="context_dim"):
        as_bijection(stock)
    wrapped = as_bijection(stock, context_dim=2)
    c, x = torch.randn(4, 2), torch.randn(4, 3)
    torch.testing.assert_close(wrapped.condition(c)(x), stock.condition(c)(x))
    for _ in range(2):  # Pyro's own cache would hand out a freed graph
        wrapped.condition(c)(x).sum().backward()
    with pytest.raises(TypeError, match="bijective"):
        as_bijection(torch.distributions.SoftmaxTransform())
    with pytest.raises(TypeError, match="transform"):
        as_bijection("exp")


def test_every_factory_of_the_issue_has_a_conditional_variant():
    for name in CASES:
        stem = next((f for f in dir(T) if name == f), None)
        if stem and hasattr(T, f"conditional_{stem}"):
            assert callable(getattr(T, f"conditional_{stem}"))
    t = T.conditional_affine_coupling(4, 3, [8])
    assert t.context_dim == 3 and t.conditioner.hidden_dims == [8]
    assert T.conditional_spline(4, 3, count_bins=5).scalar.count_bins == 5
    assert T.conditional_spline_autoregressive(4, 3, hidden_dims=[8]).context_dim == 3
