"""Soft bounds and root finding: numerical helpers shared by scalar maps and transforms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["functorch_active", "gradients_of", "monotone_inverse", "plain", "soft_bound"]


def soft_bound(raw: Tensor, bound: float) -> Tensor:
    r"""Bound ``raw`` smoothly to (-bound, bound), with slope 1 at zero.

    .. math:: b \, \frac{r}{\sqrt{1 + r^2}}, \qquad r = \mathrm{raw} / b

    The slope decays like :math:`|r|^{-3}` and not exponentially as that of tanh, so that a
    parameter that has run away finds its way back. Finite with finite gradients for every input
    but NaN, the infinities included.

    Args:
        raw: Any shape.
        bound: Half-width of the range; infinity leaves ``raw`` as it is.

    Returns:
        Same shape as ``raw``.
    """
    if bound == math.inf:
        return raw
    most = min(1e9, torch.finfo(raw.dtype).max ** 0.5 / 2)  # r * r must not overflow
    r = (raw / bound).clamp(-most, most)
    return bound * r * torch.rsqrt(1 + r * r)


def functorch_active() -> bool:
    """Tell whether a `torch.func` transform is running, under which no value can be looked at."""
    return torch._C._are_functorch_transforms_active()


def plain(*tensors: Tensor) -> bool:
    """Tell whether nothing but eager autograd is looking on, so that kernels may do the work.

    Not so under `torch.compile`, `torch.export`, `torch.jit.trace`, `torch.func` and forward mode,
    nor where one of ``tensors`` stands for a batch of them, as under
    ``torch.autograd.grad(..., is_grads_batched=True)``. Values must not be looked at then.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return False
    functorch = torch._C._functorch
    for t in tensors:  # no generator: this is asked in every layer
        if functorch.is_legacy_batchedtensor(t) or functorch.is_batchedtensor(t):
            return False
    return True


def gradients_of(
    formula: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Any],
    needs: Sequence[bool],
    grads: Tensor | tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """Differentiate a formula, within the backward of the kernel that stands for it.

    Where gradients are enabled the result has a graph, so that it can be differentiated in turn.
    The inputs may depend on each other (parameters on x): a walk from one back to another would
    count that path twice, and free a graph that is not ours. So it is fresh views that the
    gradients are taken with respect to.

    Args:
        formula: Differentiable operations; takes ``inputs``.
        inputs: What the kernel was given.
        needs: Which of them ask for a gradient, such as ``ctx.needs_input_grad``.
        grads: Gradients of what ``formula`` returns.

    Returns:
        For each input its gradient, or None if it asks for none.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
        wanted = [view for view, need in zip(views, needs, strict=True) if need]
        found = torch.autograd.grad(formula(*views), wanted, grads, create_graph=create_graph)
    rest = iter(found)
    return tuple(next(rest) if need else None for need in needs)


def monotone_inverse(
    forward: Callable[[Tensor], tuple[Tensor, Tensor]],
    y: Tensor,
    *,
    low: Tensor | float,
    high: Tensor | float,
    num_steps: int | None = None,
    rounding: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Solve f(x) = y elementwise for an increasing f, with exact derivatives up to the third.

    The root :math:`x_*` is found without gradients by Newton's method inside a shrinking bracket:
    a step that leaves the bracket, or is more than half of the one before, becomes a bisection.
    Then two more Newton steps, which leave the value alone, bring in the derivatives of the root
    up to the third order, to ``y`` and to every tensor that ``forward`` closes over; the first:

    .. math:: dx = \frac{dy - \partial_\theta f(x_*; \theta) \, d\theta}{f'(x_*)}

    Where ``y`` lies outside f([low, high]), the nearer end is returned; NaN and infinities are
    returned as they are, with log-slope NaN, and disturb no other element.

    Costs ``num_steps`` evaluations of ``forward`` at most, and three with gradients. Eager calls
    stop as soon as every element has converged; under `torch.compile` and `torch.func` the number
    of steps is fixed.

    Args:
        forward: ``x -> (f(x), log f'(x))``, both of the shape of ``x``.
        y: Values to invert; any shape.
        low: Lower end of the bracket, broadcastable to ``y``.
        high: Upper end of the bracket, broadcastable to ``y``.
        num_steps: Iterations at most; by default 96 in double precision, else 48.
        rounding: Error of ``forward`` in units of ε (1 + \|y\|): a value as near to ``y`` will not
            be improved. Where it is above that of a single operation, 0 wastes half of the steps.

    Returns:
        ``x`` and ``log f'(x)``, both of the shape of ``y``.
    """
    eps = torch.finfo(y.dtype).eps
    if num_steps is None:
        num_steps = 96 if eps < 1e-10 else 48
    can_stop = plain(y)
    look_every = 1 if y.device.type == "cpu" else 8  # looking makes an accelerator wait
    finite = y.isfinite()
    with torch.no_grad():
        target = torch.where(finite, y, torch.zeros_like(y))
        a = torch.where(finite, low, -torch.ones_like(y))
        b = torch.where(finite, high, torch.ones_like(y))
        x, step = a + (b - a) / 2, b - a
        enough = rounding * eps * (1 + target.abs())
        for k in range(num_steps):
            value, log_slope = forward(x)
            residual = value - target
            a, b = torch.where(residual <= 0, x, a), torch.where(residual >= 0, x, b)
            newton = x - residual * torch.exp(-log_slope)
            # False for NaN: bisect.
            good = (newton >= a) & (newton <= b) & (2 * (newton - x).abs() <= step.abs())
            new = torch.where(good, newton, a + (b - a) / 2)
            if rounding:
                new = torch.where(residual.abs() <= enough, x, new)
            x, step = new, new - x
            if can_stop and (k + 1) % look_every == 0:
                if bool((step.abs() <= 2 * eps * x.abs()).all()):
                    break
    y_finite = torch.where(finite, y, torch.zeros_like(y))
    for _ in range(2):  # the first makes first derivatives right, the second those up to the third
        value, log_slope = forward(x)
        # Zero, with the derivatives of the residual.
        change = (value - value.detach()) - (y_finite - y_finite.detach())
        x = x - change * torch.exp(-log_slope.clamp_min(-math.log(torch.finfo(y.dtype).max)))
    log_slope = forward(x)[1]
    return torch.where(finite, x, y), torch.where(finite, log_slope, torch.full_like(y, torch.nan))
