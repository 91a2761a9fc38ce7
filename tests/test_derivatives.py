"""First and second derivatives of every transform, in all the ways to ask for them."""

import pytest
import torch
from cases import CASES, build, contexts, noise
from torch.autograd import forward_ad
from torch.autograd.functional import hessian

from pyroflows.bases import GaussianMixture
from pyroflows.perceptron import perceptron
from pyroflows.splines import LinearRational, RationalQuadratic

KINDS = [(n, c) for n, case in CASES.items() for c in ((0, 2) if case.takes_context else (0,))]
each_kind = pytest.mark.parametrize("name, context_dim", KINDS)
both_ways = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


class Energy(torch.nn.Module):
    """A scalar that depends on the output and the log-determinant of each row, nonlinearly."""

    def __init__(self, name, context_dim, inverse):
        super().__init__()
        self.transform, self.inverse = build(name, context_dim), inverse
        self.context = contexts(context_dim, 2)
        with torch.no_grad():
            fixed, x = self.transform.condition(self.context), noise(name, 2)
            self.value = fixed._call(x) if inverse else x

    def forward(self, x, context=None):
        t = self.transform.condition(self.context if context is None else context)
        out, log_det = t.inverse_and_log_det(x) if self.inverse else t.forward_and_log_det(x)
        weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
        return (log_det + 0.3 * log_det.square()).sum() + (weight * out).sin().sum()


def central(function, h=2e-5):
    """The derivative at 0 by finite differences, with an error of order h⁶."""
    first, second, third = ((function(k * h) - function(-k * h)) / (2 * k * h) for k in (1, 2, 3))
    return 1.5 * first - 0.6 * second + 0.1 * third


def check_derivatives(function, x):
    """First and second derivatives of a scalar function are right, however they are asked for."""
    x, n = x.detach().requires_grad_(), x.numel()

    def exactly(found, expected):
        scale = float(expected.abs().max().clamp_min(1))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * scale)

    (score,) = torch.autograd.grad(function(x), x, create_graph=True)
    rows = [torch.autograd.grad(s, x, retain_graph=True)[0] for s in score.flatten()]
    curvature = torch.stack(rows).reshape(n, n)
    score = score.detach()

    # an oracle that knows nothing of derivatives
    direction = torch.randn_like(x)
    with torch.no_grad():
        along = central(lambda t: function(x + t * direction))
    torch.testing.assert_close((score * direction).sum(), along, rtol=1e-7, atol=1e-7)

    def score_at(t):
        moved = (x + t * direction).detach().requires_grad_()
        return torch.autograd.grad(function(moved), moved)[0]

    bend = (curvature @ direction.flatten()).view_as(x)
    torch.testing.assert_close(bend, central(score_at), rtol=1e-7, atol=1e-7)

    exactly(torch.autograd.grad(function(x), x)[0], score)
    exactly(torch.func.grad(function)(x), score)
    exactly(torch.func.jacfwd(function)(x), score)
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(x, direction))
        exactly(forward_ad.unpack_dual(dual).tangent, (score * direction).sum())
    for found in (
        hessian(function, x),
        hessian(function, x, vectorize=True),
        hessian(function, x, vectorize=True, outer_jacobian_strategy="forward-mode"),
        torch.func.hessian(function)(x),
        torch.func.jacrev(torch.func.jacrev(function))(x),
    ):
        exactly(found.reshape(n, n), curvature)


@each_kind
@both_ways
def test_of_every_transform(name, context_dim, inverse):
    energy = Energy(name, context_dim, inverse)
    check_derivatives(energy, energy.value)


@pytest.mark.parametrize("name", list(CASES))
@both_ways
def test_of_one_point_in_single_precision(name, inverse):
    """Tensors without an axis are promoted by torch's own derivatives, where there are any."""
    context_dim = 2 if CASES[name].takes_context else 0
    t = build(name, context_dim, torch.float32).condition(contexts(context_dim).float())
    x = t._call(noise(name).float()).detach() if inverse else noise(name).float()

    def of(x):
        out, log_det = t.inverse_and_log_det(x) if inverse else t.forward_and_log_det(x)
        return log_det + out.square().sum()

    found = torch.func.jacfwd(of)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.func.grad(of)(x), rtol=1e-3, atol=1e-3)


@both_ways
@pytest.mark.parametrize("spline", [RationalQuadratic(4), LinearRational(4)], ids=repr)
def test_of_a_spline_whose_parameters_depend_on_what_it_moves(spline, inverse):
    mix = torch.randn(spline.num_params, 3, 3, dtype=torch.float64)

    def function(x):
        move = spline.inverse if inverse else spline.forward
        y, log_slope = move(x, (mix @ x).tanh())
        return (y.sin() + log_slope.square()).sum()

    check_derivatives(function, torch.linspace(-2.0, 2.5, 3, dtype=torch.float64))


@pytest.mark.parametrize("feature_major", [False, True])
def test_of_a_perceptron_whose_weights_depend_on_its_input(feature_major):
    sizes = ((3, 4), (4,), (4, 2), (2,), (4,))
    mix = [torch.randn(3, *size, dtype=torch.float64) for size in sizes]

    def function(x):
        w1, b1, w2, b2, shift = (torch.tensordot(x.sum(0).sin(), m, 1) for m in mix)
        layers = [(w1, b1), (w2, b2)]
        out = perceptron(x, layers, shift.relu(), feature_major=feature_major)
        return out.sin().sum()

    check_derivatives(function, torch.linspace(-2.0, 2.5, 6, dtype=torch.float64).view(2, 3))


@each_kind
@both_ways
def test_a_penalty_on_the_score_trains_the_parameters_and_the_context(name, context_dim, inverse):
    energy = Energy(name, context_dim, inverse)
    names = [key for key, _ in energy.named_parameters()]
    wanted = [*(p for _, p in energy.named_parameters()), energy.context.requires_grad_()]

    def penalty(*tensors):
        parameters = dict(zip(names, tensors, strict=False))
        context = tensors[-1]

        def of(x):
            return torch.func.functional_call(energy, parameters, (x, context))

        return torch.func.grad(of)(energy.value).square().sum()

    expected = torch.func.grad(penalty, tuple(range(len(wanted))))(*wanted)
    x = energy.value.requires_grad_()
    (score,) = torch.autograd.grad(energy(x), x, create_graph=True)
    if score.requires_grad:
        found = torch.autograd.grad(
            score.square().sum(), wanted, allow_unused=True, materialize_grads=True
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    else:  # a permutation has nothing to learn
        assert not names


def test_draws_of_a_mixture_refuse_second_derivatives_in_its_parameters():
    """Pyro's kernel has first ones alone, and torch's guard lets ``autograd.grad`` pass it."""
    with torch.device("meta"):
        base = GaussianMixture(2, 3)
    base = base.to_empty(device="cpu")
    torch.manual_seed(0)
    base.load_state_dict(GaussianMixture(2, 3).state_dict())
    mixture = base()
    x = mixture.expand([4]).rsample((5,))
    assert x.shape == (5, 4, 2)
    first = torch.autograd.grad(x.sin().sum(), list(base.parameters()), create_graph=True)
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in first)
    for g in first:
        with pytest.raises(RuntimeError, match="first derivatives"):
            torch.autograd.grad(g.sum(), list(base.parameters()), retain_graph=True)
    score = torch.autograd.grad(mixture.log_prob(x).sum(), base.loc, create_graph=True)[0]
    assert torch.autograd.grad(score.sum(), base.log_scale)[0].isfinite().all()
