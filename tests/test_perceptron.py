"""The fused perceptron against the formula, in every way that its gradient can be asked for."""

import pytest
import torch

from pyroflows.perceptron import _gain, _onednn_is_right, _onednn_pays, _plain, perceptron

DIMS = {"small": (5, [3, 8, 6, 4]), "large": (200, [7, 64, 64, 33])}


@pytest.fixture(autouse=True)
def by_our_gradient(monkeypatch):
    """Small networks are the formula itself."""
    monkeypatch.setattr("pyroflows.perceptron._is_large", lambda x, weights: True)


def problem(size, shift, dtype=torch.float64):
    """Inputs (a strided x among them), a function of them, and the formula it must equal."""
    batch, dims = DIMS[size]
    x = torch.randn(batch, 2 * dims[0], dtype=dtype)[:, : dims[0]].requires_grad_()
    parameters = [
        torch.randn(*shape, dtype=dtype).div_(fan_in**0.5).requires_grad_()
        for fan_in, fan_out in zip(dims, dims[1:], strict=False)
        for shape in ((fan_in, fan_out), (fan_out,))
    ]
    shapes = {"none": None, "row": (dims[1],), "rows": (batch, dims[1])}
    if shapes[shift] is not None:
        parameters.append(torch.randn(shapes[shift], dtype=dtype, requires_grad=True))

    def arguments(parameters):
        n = 2 * (len(dims) - 1)
        return parameters[:n:2], parameters[1:n:2], parameters[n] if shift != "none" else None

    def fused(x, *parameters, feature_major=False):
        weights, biases, shift = arguments(parameters)
        layers = list(zip(weights, biases, strict=True))
        return perceptron(x, layers, shift, feature_major=feature_major)

    def formula(x, *parameters, feature_major=False):
        weights, biases, shift = arguments(parameters)
        return _plain(x, shift, feature_major, *weights, *biases)

    return [x, *parameters], fused, formula


@pytest.mark.parametrize("size", DIMS)
@pytest.mark.parametrize("shift", ["none", "row", "rows"])
@pytest.mark.parametrize("feature_major", [False, True])
def test_value_and_gradient_are_those_of_the_formula(size, shift, feature_major, dtype):
    inputs, fused, formula = problem(size, shift, dtype)
    out = fused(*inputs, feature_major=feature_major)
    expected = formula(*inputs, feature_major=feature_major)
    grad = torch.randn(out.t().shape, dtype=dtype).t()
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(out, expected, **close)
    found = torch.autograd.grad(out, inputs, grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, grad), **close)


@pytest.mark.parametrize("shift", ["none", "row", "rows"])
def test_gradients_of_first_and_second_order(shift):
    inputs, fused, _ = problem("small", shift)
    inputs = [t.detach().contiguous().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(fused, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(fused, inputs)


def test_only_the_wanted_gradients_are_made():
    inputs, fused, formula = problem("large", "rows")
    for wanted in inputs:
        for t in inputs:
            t.requires_grad_(t is wanted)
        (found,) = torch.autograd.grad(fused(*inputs).sum(), [wanted])
        (expected,) = torch.autograd.grad(formula(*inputs).sum(), [wanted])
        torch.testing.assert_close(found, expected)


def test_functional_transforms_and_forward_mode():
    inputs, fused, formula = problem("small", "none")
    x, *parameters = [t.detach() for t in inputs]

    def of_x(function):
        return lambda x: function(x, *parameters).sum(0)

    torch.testing.assert_close(
        torch.func.jacrev(of_x(fused))(x), torch.func.jacfwd(of_x(formula))(x)
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(fused(dual, *parameters)).tangent
    _, expected = torch.func.jvp(lambda x: formula(x, *parameters), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected)


def test_nan_stays_in_its_row():
    inputs, fused, _ = problem("large", "none", torch.float32)
    with torch.no_grad():
        inputs[0][3] = torch.nan
    out = fused(*inputs).detach()
    assert out[3].isnan().all()
    assert out[torch.arange(len(out)) != 3].isfinite().all()


@pytest.mark.parametrize("batch", [0, 1])
def test_tiny_batches(batch):
    inputs, fused, formula = problem("large", "none", torch.float32)
    x = inputs[0].detach()[:batch].requires_grad_()
    out = fused(x, *inputs[1:])
    torch.testing.assert_close(out, formula(x, *inputs[1:]))
    out.sum().backward()
    assert x.grad.shape == x.shape


has_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and _onednn_is_right()), reason="no oneDNN here"
)


@has_onednn
def test_with_and_without_onednn_the_numbers_are_the_same(monkeypatch):
    inputs, fused, _ = problem("large", "rows", torch.float32)
    found = []
    for pays in (True, False):
        monkeypatch.setattr("pyroflows.perceptron._onednn_pays", lambda p=pays: p)
        found.append(torch.autograd.grad(fused(*inputs).square().sum(), inputs))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@has_onednn
@pytest.mark.parametrize("gain, pays", [(0.9, False), (1.1, False), (1.5, True)])
def test_onednn_is_taken_where_it_is_clearly_faster(monkeypatch, gain, pays):
    monkeypatch.setattr("pyroflows.perceptron._gain", lambda: gain)
    assert _onednn_pays.__wrapped__() is pays


@has_onednn
def test_the_trial_is_right_and_leaves_no_trace():
    state = torch.get_rng_state()
    assert 0.01 < _gain() < 100
    assert _onednn_is_right()
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert _onednn_is_right()
            assert _gain() > 0
    finally:
        torch.set_default_dtype(torch.float32)
