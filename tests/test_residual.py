"""Planar, radial and Sylvester maps: formulas, inverses, and densities that integrate to one."""

import math

import pyro.distributions as dist
import pytest
import torch
from cases import disturb
from torch.func import functional_call

import pyroflows.transforms as T

MAKE = {
    "planar": lambda d, **kw: T.planar(d, **kw),
    "radial": lambda d, **kw: T.radial(d, **kw),
    "sylvester": lambda d, **kw: T.sylvester(d, **kw),
}
each = pytest.mark.parametrize("name", MAKE)


def away(name, d, seed=0, scale=1.0):
    t = MAKE[name](d).double()
    disturb(t, torch.Generator().manual_seed(seed), scale)
    return t


def grid(half, count):
    line = torch.linspace(-half, half, count, dtype=torch.float64)
    return torch.cartesian_prod(line, line), (line[1] - line[0]) ** 2


@each
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_densities_integrate_to_one(name, seed):
    t = away(name, 2, seed)
    points, cell = grid(12.0, 241)
    zeros = torch.zeros(2, dtype=torch.float64)
    flow = dist.TransformedDistribution(dist.Normal(zeros, 1.0).to_event(1), [t])
    with torch.no_grad():
        mass = flow.log_prob(points).exp().sum() * cell
    assert abs(mass - 1) < 1e-3


@each
@pytest.mark.parametrize("d", [1, 2, 7])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_inverse_is_exact(name, d, scale):
    t = away(name, d, scale=scale)
    x = torch.randn(200, d).double() * 3
    with torch.no_grad():
        y, log_det = t.forward_and_log_det(x)
        back, log_det_back = t.inverse_and_log_det(y)
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-7, atol=1e-7)


@each
def test_inverse_is_exact_far_out(name):
    t = away(name, 3)
    y = torch.logspace(0, 6, 30).double()[:, None] * torch.randn(30, 3).double()
    with torch.no_grad():
        torch.testing.assert_close(t._call(t._inverse(y)), y, rtol=1e-12, atol=1e-9)


@each
def test_gradients_of_the_inverse(name):
    """With respect to the value and to every parameter, against finite differences."""
    t = away(name, 3, scale=0.5)
    names, parameters = zip(*t.named_parameters(), strict=True)

    class Backwards(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.t = t

        def forward(self, y):
            return self.t.inverse_and_log_det(y)

    def inverse(y, *values):
        state = {f"t.{n}": v for n, v in zip(names, values, strict=True)}
        return functional_call(Backwards(), state, (y,))

    inputs = [torch.randn(4, 3).double(), *[p.detach().clone() for p in parameters]]
    torch.autograd.gradcheck(inverse, [v.requires_grad_() for v in inputs], atol=1e-6)


def test_planar_is_its_formula():
    t = away("planar", 3)
    b, u, w = t.vectors.theta[0].split([1, 3, 3])
    x = torch.randn(5, 3).double()
    a = torch.tanh(x @ w + b).unsqueeze(-1)
    bent = ((t(x) - x) / a)[0]
    torch.testing.assert_close(t(x), x + bent * a)
    across = bent - u  # only the part along w is bent
    torch.testing.assert_close(across - (across @ w) / (w @ w) * w, torch.zeros(3).double())
    assert bent @ w > -1


@pytest.mark.parametrize("strength", [-100.0, -3.0, 0.0, 3.0, 100.0])
def test_planar_is_invertible_whatever_its_parameters(strength, dtype):
    t = T.planar(2).to(dtype)
    w = torch.tensor([1.0, 0.5], dtype=dtype)
    with torch.no_grad():
        t.vectors.theta.copy_(torch.cat([torch.ones(1, dtype=dtype), strength * w, w]))
    x = torch.linspace(-5, 5, 101, dtype=dtype)[:, None] * w
    y, log_det = t.forward_and_log_det(x)
    projection = y @ w
    assert (projection.diff() > 0).all() and log_det.isfinite().all()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(t._inverse(y.detach()), x, rtol=tolerance, atol=tolerance)


def test_radial_is_its_formula():
    t = away("radial", 3)
    alpha, slope, centre = t._params(None)
    beta = alpha * (slope - 1)
    x = torch.randn(5, 3).double()
    r = (x - centre).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(t(x), x + beta / (alpha + r) * (x - centre))
    assert alpha > 0 and beta > -alpha
    at_centre = t.forward_and_log_det(centre.detach())
    torch.testing.assert_close(at_centre[0], centre)
    torch.testing.assert_close(at_centre[1], 3 * slope.log().squeeze())


def test_gradients_at_the_centre_of_radial_are_finite():
    t = away("radial", 2)
    x = t._params(None)[2].detach().clone().requires_grad_()
    for move in (t.forward_and_log_det, t.inverse_and_log_det):
        value, log_det = move(x)
        (gradient,) = torch.autograd.grad(value.sum() + log_det, x)
        assert gradient.isfinite().all()


def test_sylvester_with_one_direction_is_planar():
    """With R = e₁ r e₁ᵀ it is a planar map along Q e₁, whose determinant the lemma gives."""
    t = T.sylvester(3, 1).double()
    with torch.no_grad():
        normals, r, s, b = t.vectors.theta[0].split(t.sizes)
        r.zero_()
        r[0] = 0.7
        b.copy_(torch.randn(3))
    reflections, big_r, big_s, b = t._params(None)
    u = reflections[0] / reflections[0].norm()
    q = torch.eye(3) - 2 * torch.outer(u, u)
    direction, weights = q[:, 0], q @ big_s[0]
    x = torch.randn(5, 3).double()
    h = torch.tanh(x @ weights + b[0])
    y, log_det = t.forward_and_log_det(x)
    torch.testing.assert_close(y, x + big_r[0, 0] * torch.outer(h, direction))
    expected = torch.log1p((1 - h**2) * big_r[0, 0] * (weights @ direction))
    torch.testing.assert_close(log_det, expected)


def test_learns_a_target_without_a_density_of_its_own():
    """Maximum likelihood needs the inverse, which Pyro's planar flow does not have."""
    torch.manual_seed(0)
    y = torch.randn(256, 2)
    y = torch.stack([y[:, 0], y[:, 1] + y[:, 0] ** 2 - 1], -1)
    t = T.iterated(4, T.planar, 2)
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [t])
    optimizer = torch.optim.Adam(t.parameters(), lr=5e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = -flow.log_prob(y).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert math.isfinite(losses[-1]) and losses[-1] < losses[0] - 0.2
