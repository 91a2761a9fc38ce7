"""What happens inside one bin: formulas of tensors alone, for whoever has knots and slopes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ends_gradient", "exp_soft_bound", "rational_quadratic", "shares_of"]


def rational_quadratic(
    z: Tensor, ends: Tensor, slopes: Tensor, *, inverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A rational-quadratic map inside one bin; the formula of :class:`RationalQuadratic`.

    Args:
        z: x, or y if ``inverse``; any shape. Beyond the bin counts as its nearer end.
        ends: x and y (first axis) of the lower and the upper end of the bin (second axis);
            shape ``(2, 2, *shape)``.
        slopes: Positive dy/dx at both ends; shape ``(2, *shape)``.
        inverse: The direction.

    Returns:
        The output, the log-slope of this direction, ξ, η = 1 - ξ, and the slopes over the mean
        slope of the bin, shape ``(2, *shape)``.
    """
    lower, upper = ends.unbind(1)
    (x0, y0), (w, h) = lower.unbind(), (upper - lower).unbind()
    s = h / w
    a = slopes / s
    a0, a1 = a.unbind()
    xi, eta = (
        _rational_quadratic_root((z - y0) / h, a0, a1) if inverse else shares_of((z - x0) / w)
    )
    P, Q = torch.addcmul(xi, a0, eta), torch.addcmul(eta, a1, xi)
    low = xi * P
    den = torch.addcmul(low, eta, Q)
    log_slope = torch.log(s * torch.addcmul(xi * Q, eta, P) / (den * den))
    if inverse:
        return torch.addcmul(x0, w, xi), -log_slope, xi, eta, a
    return torch.addcmul(y0, h, low / den), log_slope, xi, eta, a


def _rational_quadratic_root(r: Tensor, a0: Tensor, a1: Tensor) -> tuple[Tensor, Tensor]:
    r"""The shares ξ and η from the relative height r.

    With :math:`2 \delta = a_0 (1 - r) - a_1 r` a quarter of the discriminant is
    :math:`\delta^2 + r (1 - r)`, a sum of two terms that are not negative. With
    :math:`t = |\delta| + \sqrt{\delta^2 + r (1 - r)}` the root is :math:`r / (r + t)`, or
    :math:`t / (t + 1 - r)` where δ < 0. Nothing cancels and nothing divides by zero, so
    that Newton steps would have nothing to improve.
    """
    r, rest = shares_of(r)
    delta = torch.addcmul(a0 * rest, a1, r, value=-1) / 2
    right = (delta < 0).to(r.dtype)  # lerp by 0 or 1 is exact, and faster than where
    root = torch.sqrt(torch.addcmul(r * rest, delta, delta))
    t = root + torch.lerp(delta, -delta, right)
    low, high = torch.lerp(r, t, right), torch.lerp(t, rest, right)
    total = low + high
    return low / total, high / total


def shares_of(xi: Tensor) -> tuple[Tensor, Tensor]:
    """A relative position, kept in [0, 1] against rounding, and its complement."""
    xi = xi.clamp(0, 1)
    return xi, 1 - xi


def ends_gradient(
    w: Tensor,
    h: Tensor,
    xi: Tensor,
    r: Tensor,
    *,
    g_xi: Tensor,
    g_y: Tensor,
    g_s: Tensor,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the ends of the bin, whose width and height are w and h.

    They follow from ξ = (x - x0) / w, y = y0 + h r and s = log(h / w), given the gradients of ξ, y
    and s.
    """
    g_x = g_xi / w
    g_ends = g_x.new_empty(4, g_x.numel())
    g_x0, g_x1, g_y0, g_y1 = g_ends.unbind()
    torch.div(g_s, w, out=g_x1).addcmul_(g_x, xi).neg_()
    torch.div(g_s, h, out=g_y1).addcmul_(g_y, r)
    torch.add(g_x, g_x1, out=g_x0).neg_()
    torch.sub(g_y, g_y1, out=g_y0)
    return (-g_y if inverse else g_x), g_ends.view(2, 2, -1)


def exp_soft_bound(raw: Tensor, bound: float, power: float = 1.0) -> tuple[Tensor, Tensor]:
    """E = exp(power * soft_bound(raw, bound)), and a cosine: dlog(E)/draw = power * cosine³."""
    tangent = (raw * (1 / bound)).clamp(-1e9, 1e9)  # of an angle whose sine is bounded / bound
    cosine = torch.rsqrt(1 + tangent * tangent)
    return torch.exp((power * bound) * tangent * cosine), cosine
