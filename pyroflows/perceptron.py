"""A ReLU perceptron as one differentiable operation, with oneDNN's matrix products where faster.

PyTorch multiplies float32 matrices with MKL, which leaves half of some processors unused (AVX-512
on AMD's); oneDNN does not, and PyTorch's compiler reaches it by the operator
``mkldnn::_linear_pointwise``. On other processors it is the slower one, so both are tried at the
first large product. Where that operator is absent, disagrees with the plain product, gains nothing
or does not apply (other devices and dtypes, small products), the plain product is used.

The gradient is written out. Second derivatives, batches of gradients, torch.func transforms,
forward-mode differentiation, torch.compile and autocast go by the plain formula, and so do small
networks, where going through Python costs more than the arithmetic.
"""

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.numerics import gradients_of, plain

__all__ = ["perceptron"]

Layers = Sequence[tuple[Tensor, Tensor]]

_WORTH_IT = 1 << 18  # multiply-adds from which oneDNN is faster than the shorter way to MKL
_FEW_ROWS = 256  # up to which the formula's gradients are rounded alike
_SMALL, _LARGE = 1 << 22, 1 << 25  # of a network: where ours pays with oneDNN, and without


def perceptron(
    x: Tensor, layers: Layers, shift: Tensor | None = None, *, feature_major: bool = False
) -> Tensor:
    r"""Return the last of :math:`h_l W_l + b_l`, where :math:`h_1 = x`.

    .. math:: h_{l+1} = \max(0, h_l W_l + b_l)

    Args:
        x: Shape ``(batch, inputs)``.
        layers: ``(weight, bias)`` of two layers or more, ``(inputs, outputs)`` and ``(outputs,)``.
        shift: Added to the first layer, ``(batch, outputs)`` or ``(outputs,)``; None for nothing.
        feature_major: Whether to return the transpose, ``(outputs, batch)``.

    Returns:
        Shape ``(batch, outputs)``, or its transpose.
    """
    weights, biases = zip(*layers, strict=True)
    # sizes are asked last: where a graph is traced, asking would bind it to them
    if _applies(x) and _is_large(x, weights) and all(w.dtype == x.dtype for w in weights):
        return _Perceptron.apply(x, shift, feature_major, *weights, *biases)
    return _plain(x, shift, feature_major, *weights, *biases)


def _is_large(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether there are many rows, or what is saved outweighs some 80 µs of Python."""
    if x.shape[0] > _FEW_ROWS:
        return True
    work = x.shape[0] * sum(w.numel() for w in weights)
    return work >= _LARGE or (work >= _SMALL and _onednn_pays())


def _applies(tensor: Tensor) -> bool:
    return plain(tensor) and not torch.is_autocast_enabled(tensor.device.type)


def _plain(x: Tensor, shift: Tensor | None, feature_major: bool, *parameters: Tensor) -> Tensor:
    n = len(parameters) // 2
    weights, biases = parameters[:n], parameters[n:]
    h = torch.addmm(biases[0], x, weights[0])
    h = (h if shift is None else h + shift).relu_()
    for weight, bias in zip(weights[1:-1], biases[1:-1], strict=True):
        h = torch.addmm(bias, h, weight).relu_()
    if feature_major:
        return torch.addmm(biases[-1].unsqueeze(-1), weights[-1].t(), h.t())
    return torch.addmm(biases[-1], h, weights[-1])


class _Perceptron(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, feature_major: bool, *parameters: Tensor
    ) -> Tensor:
        n = len(parameters) // 2
        weights, biases = parameters[:n], parameters[n:]
        h = x.contiguous()
        hidden = []
        for i in range(n - 1):
            h = _affine(h, weights[i], biases[i])
            if i == 0 and shift is not None:
                h += shift
            hidden.append(h.relu_())  # oneDNN could do it on the way, but turns NaN into 0
        ctx.feature_major = feature_major
        ctx.save_for_backward(x, shift, *parameters, *hidden)
        if feature_major:
            return _product(weights[-1].t(), h.t()).add_(biases[-1].unsqueeze(-1))
        return _affine(h, weights[-1], biases[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, *saved = ctx.saved_tensors
        n = (len(saved) + 1) // 3
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() or not _applies(grad):
            inputs = (x, shift, ctx.feature_major, *saved[: 2 * n])
            return gradients_of(_plain, inputs, needs, grad)
        weights, hidden = saved[:n], saved[2 * n :]
        grad = grad.contiguous()
        if ctx.feature_major:
            grad = grad.t()
        to_weights: list[Tensor | None] = [None] * n
        to_biases: list[Tensor | None] = [None] * n
        for i in reversed(range(n)):
            below = hidden[i - 1] if i else x.contiguous()
            if needs[3 + i]:
                if ctx.feature_major and i == n - 1:  # the copy spared is the larger one
                    to_weights[i] = _product(grad.t(), below).t()
                else:
                    to_weights[i] = _product(below.t(), grad)
            if needs[3 + n + i]:
                to_biases[i] = grad.sum(0)
            if i:
                grad = _product(grad, weights[i].t())
                # in place: a second array of this size would have to come through the caches
                torch.ops.aten.threshold_backward.grad_input(grad, below, 0, grad_input=grad)
        to_x = _product(grad, weights[0].t()) if needs[0] else None
        to_shift = None
        if shift is not None and needs[1]:
            to_shift = grad if shift.dim() == 2 else grad.sum(0)
        return to_x, to_shift, None, *to_weights, *to_biases


# --------------------------------------------------------------------------------------- products


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x W + b; x is contiguous."""
    if _by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight.t(), bias, "none", [], "")
    return torch.addmm(bias, x, weight)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return A B; each is contiguous or the transpose of what is: other layouts are slow."""
    if _by_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b)


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape[0] * b.shape[0] * b.shape[1] >= _WORTH_IT
        and a.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and _onednn_pays()
    )


@functools.cache
def _onednn_pays() -> bool:
    """Try the operator once: whether it is right on the layouts used, and clearly faster.

    Clearly, so that noise does not decide and a seed gives one result on one machine. Costs some
    milliseconds.
    """
    return torch.backends.mkldnn.is_available() and _onednn_is_right() and _gain() > 1.2


def _onednn_is_right() -> bool:
    a, b = _counted(2, 3), _counted(3, 4) - 0.5
    expected = a @ b
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        found = [
            operator(a, b.t(), torch.ones_like(b[0]), "none", [], ""),
            operator(a, b.t().contiguous(), None, "none", [], ""),
            operator(a.t().contiguous().t(), b.t(), None, "none", [], ""),
        ]
    except (AttributeError, RuntimeError):
        return False
    wanted = [expected + 1, expected, expected]
    return all(torch.allclose(f, w) for f, w in zip(found, wanted, strict=True))


@torch.no_grad()
def _gain() -> float:
    """How many times faster oneDNN makes the products of a layer's forward and backward pass."""
    x, weight, bias = _counted(512, 128), _counted(128, 128), _counted(128)
    operator = torch.ops.mkldnn._linear_pointwise

    def by_onednn() -> None:
        operator(x, weight.t(), bias, "none", [], "")
        operator(x, weight, None, "none", [], "")
        operator(x.t(), x.t(), None, "none", [], "")

    def by_mkl() -> None:
        torch.addmm(bias, x, weight)
        torch.mm(x, weight.t())
        torch.mm(x.t(), x)

    best = {by_onednn: math.inf, by_mkl: math.inf}
    for _ in range(10):  # alternating; the fastest of each is the least disturbed
        for products in best:
            start = time.perf_counter()
            products()
            best[products] = min(best[products], time.perf_counter() - start)
    return best[by_mkl] / best[by_onednn]


def _counted(*shape: int) -> Tensor:
    count = torch.arange(math.prod(shape), dtype=torch.float32, device="cpu")
    return count.view(shape) / count.numel()
