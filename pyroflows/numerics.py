"""Soft bounds and monotone root finding: small numerical helpers shared by the scalar maps and transforms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["functorch_active", "monotone_inverse", "soft_bound"]


def soft_bound(raw: Tensor, bound: float) -> Tensor:
    r"""Bound ``raw`` smoothly to (-bound, bound), with slope 1 at zero.

    .. math:: b \, \frac{r}{\sqrt{1 + r^2}}, \qquad r = \mathrm{raw} / b

    The slope decays like :math:`|r|^{-3}` and not exponentially as that of tanh, so that a parameter that has run away finds
    its way back. Finite with finite gradients for every input but NaN, the infinities included.

    Args:
        raw: Any shape.
        bound: Half-width of the range.

    Returns:
        Same shape as ``raw``.
    """
    r = (raw / bound).clamp(-1e9, 1e9)  # r * r must not overflow in float32
    return bound * r * torch.rsqrt(1 + r * r)


def functorch_active() -> bool:
    """Tell whether a torch.func transform (vmap, grad, ...) is running, where no value can be looked at."""
    return torch._C._are_functorch_transforms_active()


def monotone_inverse(
    forward: Callable[[Tensor], tuple[Tensor, Tensor]],
    y: Tensor,
    *,
    low: Tensor | float,
    high: Tensor | float,
    num_steps: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Solve f(x) = y elementwise for a strictly increasing f, with exact first-order gradients.

    The root is found without gradients by Newton's method inside a shrinking bracket (a step that leaves the bracket, or
    does not halve the residual's step, is replaced by bisection), then one correction carries the gradients of the
    implicit function theorem to ``y`` and to whatever ``forward`` closes over:

    .. math:: x = x_* - \frac{f(x_*; \theta) - y}{f'(x_*)}

    Where ``y`` lies outside f([low, high]), the nearer end is returned. Costs ``num_steps + 2`` evaluations of ``forward``
    at most; eager CPU calls stop as soon as every element has converged. Second derivatives are not those of the root.

    Args:
        forward: ``x -> (f(x), log f'(x))``, both of the shape of ``x``.
        y: Values to invert, any shape; NaN gives NaN in its element only.
        low: Lower end of the bracket, broadcastable to ``y``.
        high: Upper end of the bracket, broadcastable to ``y``.
        num_steps: Iterations at most; by default what bisection needs to exhaust the dtype, 1.25 times.

    Returns:
        ``x`` and ``log f'(x)``, both of the shape of ``y``.
    """
    if num_steps is None:
        num_steps = 80 if y.dtype == torch.float64 else 48
    can_stop = y.device.type == "cpu" and not torch.compiler.is_compiling() and not functorch_active()
    with torch.no_grad():
        a, b = torch.zeros_like(y) + low, torch.zeros_like(y) + high
        x = a + (b - a) / 2
        step = b - a
        for _ in range(num_steps):
            value, log_slope = forward(x)
            residual = value - y
            a, b = torch.where(residual <= 0, x, a), torch.where(residual >= 0, x, b)
            newton = residual * torch.exp(-log_slope)
            middle = a + (b - a) / 2
            candidate = x - newton
            # `<` is false for NaN and for infinite steps: they bisect.
            take = (candidate >= a) & (candidate <= b) & (2 * newton.abs() < step.abs())
            new = torch.where(take, candidate, middle)
            new = torch.where(residual == 0, x, new)
            step = new - x
            x = new
            if can_stop and bool((step == 0).all()):
                break
        x = torch.where(y.isnan(), y, x)
    value, log_slope = forward(x)
    inside = (value.detach() - y.detach()).abs() < torch.inf
    correction = torch.where(inside, (value - y) * torch.exp(-log_slope.detach()), 0.0 * y)
    x = torch.minimum(torch.maximum(x - correction, x.detach() - 1.0), x.detach() + 1.0)
    return x, forward(x)[1]
