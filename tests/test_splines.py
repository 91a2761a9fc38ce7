"""Splines against formulas written from the papers, and the numerics that they rest on."""

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicHermiteSpline
from scipy.optimize import brentq

from pyroflows.numerics import monotone_inverse, soft_bound
from pyroflows.splines import LinearRational, RationalQuadratic, kernels

SPLINES = {
    "quadratic": RationalQuadratic(),
    "quadratic, 3 bins": RationalQuadratic(3, 2.0, min_bin=0.3, max_slope=5.0),
    "quadratic, 1 bin": RationalQuadratic(1, 1.5),
    "quadratic, 64 bins": RationalQuadratic(64, 4.0),
    "linear": LinearRational(),
    "linear, 2 bins": LinearRational(2, 2.0, min_bin=0.3, max_slope=5.0, min_lambda=0.2),
    "linear, 1 bin": LinearRational(1, 1.5),
}
spline_cases = pytest.mark.parametrize("spline", SPLINES.values(), ids=SPLINES.keys())
both_ways = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
both_orders = pytest.mark.parametrize(
    "order", [RationalQuadratic, LinearRational], ids=["quadratic", "linear"]
)


def draw(spline, shape, *, scale=2.0, dtype=torch.float64, seed=1):
    """Inputs, of which some lie in the tails, and parameters away from the identity."""
    g = torch.Generator().manual_seed(seed)
    x = 0.6 * spline.bound * torch.randn(shape, generator=g, dtype=torch.float64)
    params = scale * torch.randn(spline.num_params, *shape, generator=g, dtype=torch.float64)
    return x.to(dtype), params.to(dtype)


def apply(spline, x, params, inverse):
    return (spline.inverse if inverse else spline.forward)(x, params)


# ------------------------------------------------------------------ the formulas of the papers


def knots_of(spline, theta):
    """Knots, slopes and raw values of one spline, one parameter at a time."""
    K, B, m = spline.count_bins, spline.bound, spline.min_bin

    def positions(logits):
        e = [math.exp(v) for v in logits]
        sizes = [2 * B * (m / K + (1 - m) * v / sum(e)) for v in e]
        return [-B + sum(sizes[:k]) for k in range(K)] + [B]

    limit = math.log(spline.max_slope)
    inner = [math.exp(r / math.sqrt(1 + (r / limit) ** 2)) for r in theta[2 * K : 3 * K - 1]]
    return (
        positions(theta[:K]),
        positions(theta[K : 2 * K]),
        [1.0, *inner, 1.0],
        theta[3 * K - 1 :],
    )


def quadratic_by_hand(spline, x, theta):
    """Durkan et al. (2019), eqs. 4 and 5."""
    if abs(x) > spline.bound:
        return x, 1.0
    xs, ys, d, _ = knots_of(spline, theta)
    k = max(i for i in range(spline.count_bins) if xs[i] <= x)
    w, h = xs[k + 1] - xs[k], ys[k + 1] - ys[k]
    s, xi = h / w, (x - xs[k]) / w
    den = s + (d[k + 1] + d[k] - 2 * s) * xi * (1 - xi)
    y = ys[k] + h * (s * xi**2 + d[k] * xi * (1 - xi)) / den
    top = d[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + d[k] * (1 - xi) ** 2
    return y, s**2 * top / den**2


def linear_by_hand(spline, x, theta):
    """Dolatabadi et al. (2020), algorithm 1: interpolation of three weighted points."""
    if abs(x) > spline.bound:
        return x, 1.0
    xs, ys, d, raw = knots_of(spline, theta)
    k = max(i for i in range(spline.count_bins) if xs[i] <= x)
    lam = spline.min_lambda + (1 - 2 * spline.min_lambda) / (1 + math.exp(-raw[k]))
    w, h = xs[k + 1] - xs[k], ys[k + 1] - ys[k]
    w_a, w_b = 1.0, math.sqrt(d[k] / d[k + 1])
    w_c = (lam * w_a * d[k] + (1 - lam) * w_b * d[k + 1]) * w / h
    y_a, y_b = ys[k], ys[k + 1]
    y_c = ((1 - lam) * w_a * y_a + lam * w_b * y_b) / ((1 - lam) * w_a + lam * w_b)
    xi = (x - xs[k]) / w
    if xi <= lam:
        den = w_a * (lam - xi) + w_c * xi
        y = (w_a * y_a * (lam - xi) + w_c * y_c * xi) / den
        return y, lam * w_a * w_c * (y_c - y_a) / den**2 / w
    den = w_c * (1 - xi) + w_b * (xi - lam)
    y = (w_c * y_c * (1 - xi) + w_b * y_b * (xi - lam)) / den
    return y, (1 - lam) * w_b * w_c * (y_b - y_c) / den**2 / w


@spline_cases
def test_values_are_those_of_the_paper(spline):
    by_hand = quadratic_by_hand if isinstance(spline, RationalQuadratic) else linear_by_hand
    x, params = draw(spline, (200,))
    y, log_slope = spline.forward(x, params)
    expected = [by_hand(spline, float(a), b.tolist()) for a, b in zip(x, params.T, strict=True)]
    expected_y, expected_slope = torch.tensor(expected, dtype=x.dtype).T
    torch.testing.assert_close(y, expected_y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(log_slope, expected_slope.log(), rtol=1e-10, atol=1e-10)


@both_orders
def test_knots_are_met_with_their_slopes(order):
    spline = order(6, 2.5)
    theta = 2 * torch.randn(spline.num_params, dtype=torch.float64)
    xs, ys, slopes, _ = knots_of(spline, theta.tolist())
    y, log_slope = spline.forward(
        torch.tensor(xs, dtype=torch.float64), theta[:, None].expand(-1, 7)
    )
    np.testing.assert_allclose(y, ys, atol=1e-12)
    np.testing.assert_allclose(log_slope.exp(), slopes, rtol=1e-9)
    assert y[0] == -2.5 and y[-1] == 2.5


def test_with_gentle_slopes_it_is_close_to_the_cubic_hermite_spline():
    spline = RationalQuadratic(8, 2.0)
    theta = 0.2 * torch.randn(spline.num_params, dtype=torch.float64)
    cubic = CubicHermiteSpline(*knots_of(spline, theta.tolist())[:3])
    x = torch.linspace(-2, 2, 101, dtype=torch.float64)
    y, _ = spline.forward(x, theta[:, None].expand(-1, 101))
    np.testing.assert_allclose(y, cubic(x), atol=5e-3)


# ------------------------------------------------------------------ the contract of a scalar map


@spline_cases
@both_ways
def test_log_slope_is_the_derivative(spline, inverse):
    x, params = draw(spline, (500,))
    x.requires_grad_()
    y, log_slope = apply(spline, x, params, inverse)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope, slope.log(), rtol=0, atol=1e-10)


@spline_cases
def test_round_trip(spline, dtype):
    x, params = draw(spline, (40, 50), dtype=dtype)
    y, log_slope = spline.forward(x, params)
    back, back_log_slope = spline.inverse(y, params)
    assert y.dtype == log_slope.dtype == back.dtype == dtype
    allowed = 32 * torch.finfo(dtype).eps * spline.bound * (1 + torch.exp(-log_slope))
    assert ((back - x).abs() <= allowed).all()
    tolerance = 1e-10 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(back_log_slope, -log_slope, rtol=tolerance, atol=tolerance)


@spline_cases
def test_identity_at_zero(spline, dtype):
    x, params = draw(spline, (300,), dtype=dtype)
    y, log_slope = spline.forward(x, 0 * params)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, x, rtol=0, atol=8 * eps * spline.bound)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=64 * eps)


@both_orders
@pytest.mark.parametrize("scale", [1, 10, 100])
def test_float32_inverse_is_as_good_as_its_conditioning(order, scale):
    spline = order(8, 5.0)
    x = (2 * torch.rand(20_000) - 1) * 5
    params = scale * torch.randn(spline.num_params, 20_000)
    y, log_slope = spline.forward(x, params)
    back, _ = spline.inverse(y, params)
    allowed = 32 * 1.2e-7 * 5 * (1 + torch.exp(-log_slope))
    assert ((back - x).abs() <= allowed).all()


@spline_cases
@both_ways
def test_edges_and_tails(spline, inverse, dtype):
    B = torch.tensor(spline.bound, dtype=dtype)
    up, down = torch.nextafter(B, 2 * B), torch.nextafter(B, 0 * B)
    x = torch.stack([B, up, down, 2 * B, B + 1e6, 1e30 * B, torch.full_like(B, math.inf)])
    x = torch.cat([x, -x])
    _, params = draw(spline, x.shape, scale=10.0, dtype=dtype)
    x.requires_grad_(), params.requires_grad_()
    y, log_slope = apply(spline, x, params, inverse)
    outside = x.detach().abs() > B
    assert torch.equal(y[outside], x[outside])
    assert torch.equal(log_slope[outside], torch.zeros_like(x[outside]))
    torch.testing.assert_close(y[~outside], x[~outside], rtol=1e-6, atol=0)
    assert (y.abs() <= B)[~outside].all()
    g_x, g_params = torch.autograd.grad(y[:6].sum() + log_slope.sum(), (x, params))
    assert g_x.isfinite().all() and g_params.isfinite().all()
    assert torch.equal(g_params[:, outside], torch.zeros_like(g_params[:, outside]))


@spline_cases
@both_ways
@pytest.mark.parametrize("scale", [1e2, 1e6, 1e30])
def test_nothing_is_infinite_for_finite_inputs(spline, inverse, scale, dtype):
    x, params = draw(spline, (2000,), scale=scale, dtype=dtype)
    x.requires_grad_(), params.requires_grad_()
    y, log_slope = apply(spline, x, params, inverse)
    gradients = torch.autograd.grad(y.sum() + log_slope.sum(), (x, params))
    assert all(t.isfinite().all() for t in (y, log_slope, *gradients))


@spline_cases
@both_ways
@pytest.mark.parametrize("where", ["input", "params"])
def test_nan_stays_in_its_element_and_shows(spline, inverse, where):
    x, params = draw(spline, (10, 20))
    clean = apply(spline, x, params, inverse)
    x[3, 4] = 0.1
    (x if where == "input" else params)[..., 3, 4] = math.nan
    x.requires_grad_(), params.requires_grad_()
    y, log_slope = apply(spline, x, params, inverse)
    bad = torch.zeros(10, 20, dtype=torch.bool)
    bad[3, 4] = True
    if spline.count_bins > 1 or where == "input":
        assert torch.equal(y.isnan(), bad) and torch.equal(log_slope.isnan(), bad)
    for t, expected in zip((y, log_slope), clean, strict=True):
        assert torch.equal(t[~bad], expected[~bad])
    g_x, g_params = torch.autograd.grad(y.sum() + log_slope.sum(), (x, params))
    assert g_x[~bad].isfinite().all() and g_params[:, ~bad].isfinite().all()


# ------------------------------------------------------------------ shapes, layouts, dtypes


@both_orders
@both_ways
@pytest.mark.parametrize("shape", [(), (3,), (4, 3), (2, 4, 3), (0, 3), (5, 1)])
def test_every_layout_gives_the_same(order, inverse, shape):
    spline = order(5)
    x, params = draw(spline, shape)
    expected = spline.reference(x, params, inverse=inverse)
    views = {"contiguous": params}
    if len(shape) > 1:
        views["feature-major"] = params.movedim(-1, 1).contiguous().movedim(1, -1)
        views["params last"] = params.movedim(0, -1).contiguous().movedim(-1, 0)
        views["with holes"] = torch.cat([params, params], -1)[..., : shape[-1]]
    g = torch.randn(2, *shape, dtype=x.dtype)
    x.requires_grad_(), params.requires_grad_()
    expected = spline.reference(x, params, inverse=inverse)
    expected_g = torch.autograd.grad(expected, (x, params), tuple(g))
    for name, view in views.items():
        view = view.detach().requires_grad_()
        result = apply(spline, x, view, inverse)
        result_g = torch.autograd.grad(result, (x, view), tuple(g))
        for a, b in zip((*result, *result_g), (*expected, *expected_g), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: n + m)


@both_orders
@both_ways
def test_many_columns_are_computed_in_chunks(order, inverse, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK", 8)
    spline = order(5)
    x, params = draw(spline, (25, 4 * torch.get_num_threads()))
    x.requires_grad_(), params.requires_grad_()
    results = [
        apply(spline, x, params, inverse),
        spline.reference(x, params, inverse=inverse),
    ]
    g = tuple(torch.randn(2, *x.shape, dtype=x.dtype))
    for a, b in zip(
        *[(*r, *torch.autograd.grad(r, (x, params), g)) for r in results], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@both_orders
@both_ways
def test_parameters_and_input_broadcast(order, inverse):
    spline = order(4)
    _, params = draw(spline, (3,))
    x = torch.randn(5, 3, dtype=torch.float64)
    params.requires_grad_()
    full = params[:, None].expand(-1, 5, 3)
    for a, p, shape in [(x, params, (5, 3)), (x[:, None], full, (5, 5, 3)), (x[0], full, (5, 3))]:
        y, log_slope = apply(spline, a, p, inverse)
        assert y.shape == log_slope.shape == shape
        whole = p.reshape(p.shape[0], *[1] * (len(shape) + 1 - p.dim()), *p.shape[1:])
        expected = apply(spline, a.expand(shape), whole.expand(-1, *shape).contiguous(), inverse)
        torch.testing.assert_close((y, log_slope), expected)
        g, expected_g = (torch.autograd.grad(t[0].sum(), params)[0] for t in ((y,), expected))
        torch.testing.assert_close(g, expected_g)
    torch.testing.assert_close(
        apply(spline, x[0], tuple(params), inverse), apply(spline, x[0], params, inverse)
    )


def test_dtypes_meet_in_the_wider_one():
    spline = RationalQuadratic()
    x, params = draw(spline, (100,), dtype=torch.float32)
    y, _ = spline.forward(x, params)
    half, log_slope = spline.forward(x.bfloat16(), params.bfloat16())
    assert half.dtype == log_slope.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.2, atol=0.2)
    mixed, log_slope = spline.forward(x, params.bfloat16())
    assert mixed.dtype == log_slope.dtype == torch.float32
    assert spline.forward(x.double(), params)[0].dtype == torch.float64


# ------------------------------------------------------------------ derivatives


@spline_cases
@both_ways
def test_gradients_and_second_derivatives(spline, inverse):
    if spline.num_params > 40:
        pytest.skip("the numeric Jacobian would be large and show nothing new")
    x, params = draw(spline, (6,), scale=1.0)
    x.requires_grad_(), params.requires_grad_()

    def function(x, params):
        return apply(spline, x, params, inverse)

    assert torch.autograd.gradcheck(
        function, (x, params), check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(function, (x, params))


@both_orders
@both_ways
def test_only_what_is_asked_for_gets_a_gradient(order, inverse):
    spline = order(4)
    x, params = draw(spline, (7,))
    for leaf in (x, params):
        leaf.requires_grad_()
        y, log_slope = apply(spline, x, params, inverse)
        (g,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
        (twice,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        torch.testing.assert_close(g, twice.detach())
        leaf.requires_grad_(False)
    assert not apply(spline, x, params, inverse)[0].requires_grad


@both_orders
@both_ways
def test_the_output_may_be_changed_in_place(order, inverse):
    spline = order(4)
    x, params = draw(spline, (4, 3))
    x.requires_grad_()
    for view in (params, params.movedim(-1, 1).contiguous().movedim(1, -1)):
        y, log_slope = apply(spline, x, view, inverse)
        y.mul_(2), y[0].add_(log_slope[0])
        (g,) = torch.autograd.grad(y[1:].sum(), x)
        torch.testing.assert_close(g[1:], 2 * log_slope[1:].exp())


@both_orders
@both_ways
def test_torch_func(order, inverse):
    spline = order(4)
    x, params = draw(spline, (3, 5))
    y, log_slope = apply(spline, x, params, inverse)
    mapped = torch.func.vmap(lambda x, p: apply(spline, x, p, inverse), in_dims=(0, 1))(x, params)
    torch.testing.assert_close(mapped, (y, log_slope))
    jacobian = torch.func.jacfwd(lambda x: apply(spline, x, params[:, 0], inverse)[0])(x[0])
    torch.testing.assert_close(jacobian, torch.diag(log_slope[0].exp()))
    backward = torch.func.jacrev(lambda x: apply(spline, x, params[:, 0], inverse)[0])(x[0])
    torch.testing.assert_close(backward, jacobian)
    per_row = torch.func.vmap(
        torch.func.grad(lambda x, p: apply(spline, x, p, inverse)[1].sum()), in_dims=(0, 1)
    )(x, params)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(apply(spline, x, params, inverse)[1].sum(), x)
    torch.testing.assert_close(per_row, expected)


def test_a_graph_outside_vmap_can_be_differentiated_inside():
    spline = RationalQuadratic(4)
    x, params = draw(spline, (5,))
    x.requires_grad_()
    y, log_slope = spline.forward(x, params)
    basis = torch.eye(5, dtype=x.dtype)
    rows = torch.func.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(basis)
    torch.testing.assert_close(rows, torch.diag(log_slope.detach().exp()))


# ------------------------------------------------------------------ arguments


@both_orders
@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(count_bins=0), "count_bins must be at least 1; got 0"),
        (dict(bound=-1.0), "bound must be positive"),
        (dict(bound=math.inf), "bound must be positive and finite"),
        (dict(min_bin=1.0), "min_bin is the smallest bin as a fraction of the mean bin"),
        (dict(min_bin=0.0), "min_bin"),
        (dict(max_slope=1.0), "max_slope must be above 1"),
    ],
)
def test_fields_out_of_range(order, fields, message):
    with pytest.raises(ValueError, match=message):
        order(**fields)


def test_min_lambda_out_of_range():
    with pytest.raises(ValueError, match="min_lambda must lie between 0 and 0.5; got 0.5"):
        LinearRational(min_lambda=0.5)


def test_wrong_number_of_parameters():
    with pytest.raises(ValueError, match=r"8 bins expects params of shape \(23, \*x.shape\)"):
        RationalQuadratic().forward(torch.zeros(4), torch.zeros(24, 4))
    with pytest.raises(ValueError, match=r"\(31, \*x.shape\); got \(23, 4\)"):
        LinearRational().inverse(torch.zeros(4), torch.zeros(23, 4))


# ------------------------------------------------------------------ numerics


def test_soft_bound():
    raw = torch.tensor([0.0, 1e-3, 1.0, 1e4, 1e30, math.inf], requires_grad=True)
    for sign in (1, -1):
        bounded = soft_bound(sign * raw, 3.0)
        assert (bounded.abs() <= 3).all()
        expected = [sign * r / math.hypot(1, r / 3) for r in raw[:-1].tolist()] + [sign * 3.0]
        np.testing.assert_allclose(bounded.detach(), expected, rtol=1e-6)
        (slope,) = torch.autograd.grad(bounded.sum(), raw)
        assert slope.isfinite().all() and slope[0] == sign
    raw = torch.linspace(-9, 9, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda r: soft_bound(r, 3.0), (raw,))


def bumpy(x, tilt):
    """An increasing function with steep and flat parts, and its log-slope."""
    y = 0.1 * x + 4 * torch.tanh(3 * (x - tilt)) + 0.01 * x**3
    return y, torch.log(
        0.1 + 12 / torch.cosh((3 * (x - tilt)).clamp(-300, 300)) ** 2 + 0.03 * x**2
    )


def test_monotone_inverse_finds_the_root():
    y = torch.linspace(-40, 40, 201, dtype=torch.float64)
    tilt = torch.linspace(-3, 3, 201, dtype=torch.float64)
    x, log_slope = monotone_inverse(lambda x: bumpy(x, tilt), y, low=-100.0, high=100.0)
    expected = [
        brentq(lambda v, a=a, t=t: float(bumpy(torch.tensor(v).double(), t)[0] - a), -100, 100)
        for a, t in zip(y, tilt, strict=True)
    ]
    np.testing.assert_allclose(x, expected, atol=1e-9)
    torch.testing.assert_close(log_slope, bumpy(x, tilt)[1])


def test_monotone_inverse_in_float32():
    y = torch.linspace(-40, 40, 201)
    tilt = torch.linspace(-3, 3, 201)
    x, log_slope = monotone_inverse(lambda x: bumpy(x, tilt), y, low=-100.0, high=100.0)
    exact, _ = monotone_inverse(
        lambda x: bumpy(x, tilt.double()), y.double(), low=-100.0, high=100.0
    )
    assert ((x - exact).abs() <= 1e-5 * (1 + torch.exp(-log_slope))).all()


def test_monotone_inverse_has_implicit_gradients():
    y = torch.linspace(-20, 20, 11, dtype=torch.float64, requires_grad=True)
    tilt = torch.linspace(-2, 2, 11, dtype=torch.float64, requires_grad=True)

    def solve(y, tilt):
        return monotone_inverse(lambda x: bumpy(x, tilt), y, low=-50.0, high=50.0)

    assert torch.autograd.gradcheck(solve, (y, tilt), atol=1e-4)


def test_monotone_inverse_returns_the_end_of_the_bracket_and_keeps_nan_apart():
    y = torch.tensor([-1e3, 0.5, math.nan, math.inf, -math.inf, 1e3], dtype=torch.float64)
    x, log_slope = monotone_inverse(
        lambda x: (x, torch.zeros_like(x)), y, low=-2 * torch.ones_like(y), high=3.0
    )
    torch.testing.assert_close(x[[0, 1, 5]], torch.tensor([-2.0, 0.5, 3.0]).double())
    assert x[2].isnan() and x[3] == math.inf and x[4] == -math.inf
    assert torch.equal(log_slope.isnan(), ~y.isfinite())


def test_monotone_inverse_under_vmap():
    y, tilt = torch.randn(2, 4, 3, dtype=torch.float64)

    def solve(y, tilt):
        return monotone_inverse(lambda x: bumpy(x, tilt), y, low=-100.0, high=100.0)

    torch.testing.assert_close(torch.func.vmap(solve)(y, tilt), solve(y, tilt))
