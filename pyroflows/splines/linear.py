"""The monotone linear-rational spline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyroflows.numerics import soft_bound
from pyroflows.splines.formula import ends_gradient, exp_soft_bound, shares_of
from pyroflows.splines.spline import Spline

__all__ = ["LinearRational"]


@dataclass(frozen=True)
class LinearRational(Spline):
    r"""Monotone linear-rational spline with linear tails (Dolatabadi et al. 2020).

    Pyro's default order. Each bin is cut in two at the fraction λ of its width. With δ₀, δ₁ the
    slopes at the ends of the bin, s = h / w its mean slope, v the relative position in the left
    half, and :math:`m = \lambda \sqrt{\delta_0} + (1 - \lambda) \sqrt{\delta_1}`, the half is a
    Möbius map,

    .. math::
        y = y_0 + h\, \frac{\lambda \sqrt{\delta_0}}{m}\, \frac{c v}{1 - v + c v},
        \qquad c = \frac{\sqrt{\delta_0}\, m}{s}.

    The right half is its mirror image, with δ₁ for δ₀ and 1 - λ for λ, counted from the right end.
    (This is the paper's spline; the weights and the point in the middle have been eliminated.)
    Continuously differentiable, with slope 1 at ±bound and beyond; the inverse is in closed form.
    The identity at θ = 0. NaN stays in its element, in value and log-slope; infinities map to
    themselves. Invertible in float32 as :class:`RationalQuadratic` is.

    Args:
        count_bins: Number of bins K.
        bound: Half-width B of the box.
        min_bin: Smallest width and height of a bin, as a fraction of the mean one, 2 B / K.
        max_slope: Slopes at knots are bounded smoothly to (1 / max_slope, max_slope).
        min_lambda: λ lies in (min_lambda, 1 - min_lambda).

    Raises:
        ValueError: If a field is out of range, or ``params`` has not 4 K - 1 rows.

    References:
        Dolatabadi, Erfani, Leckie (2020), Invertible generative modeling using linear rational
        splines. arXiv:2001.05168
    """

    min_lambda: float = 0.025
    values_per_bin: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_lambda < 0.5:
            raise ValueError(f"min_lambda must lie between 0 and 0.5; got {self.min_lambda}")

    def in_bin(
        self, z: Tensor, ends: Tensor, raw_slopes: Tensor, *raw_bin: Tensor, inverse: bool
    ) -> tuple[Tensor, ...]:
        x0, y0 = ends[:, 0]
        w, h = ends[:, 1] - ends[:, 0]
        root = torch.exp(soft_bound(raw_slopes, math.log(self.max_slope)) / 2)
        lam = self.min_lambda + (1 - 2 * self.min_lambda) * torch.sigmoid(raw_bin[0])
        u = (z - y0) / h if inverse else (z - x0) / w
        shares = torch.stack([lam, 1 - lam])
        left, e, _, _, c, v, xi, r = self._half(u, w / h, root, shares, inverse)
        log_slope = 2 * torch.log(e / (1 - v + c * v))
        if inverse:
            return x0 + w * torch.lerp(1 - xi, xi, left), -log_slope, z
        return y0 + h * torch.lerp(1 - r, r, left), log_slope, z

    @staticmethod
    def _half(
        u: Tensor, over_s: Tensor, root: Tensor, shares: Tensor, inverse: bool
    ) -> tuple[Tensor, ...]:
        """Choose the half of the bin, and place the element in it.

        Returns:
            1 for left and 0 for right; of the half √δ, its width and height as fractions of the
            bin's, and c; of the element v, and its position and height in the bin, from that side.
        """
        parts = root * shares
        m = parts.sum(0)
        u, rest = shares_of(u)
        left = (u <= (parts[0] / m if inverse else shares[0])).to(u.dtype)
        e, share = torch.lerp(root[1], root[0], left), torch.lerp(shares[1], shares[0], left)
        u = torch.lerp(rest, u, left)
        rise = share * e / m
        c = e * m * over_s
        if inverse:
            t = (u / rise).clamp(0, 1)
            v = t / (t + c * (1 - t))
            return left, e, share, rise, c, v, share * v, u
        v = (u / share).clamp(0, 1)
        return left, e, share, rise, c, v, u, rise * c * v / (1 - v + c * v)

    @staticmethod
    def _moebius_gradient(
        c: Tensor, v: Tensor, g_half: Tensor, g_log: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the half's map t = c v / (1 - v + c v) and of the logarithm of its slope.

        Args:
            c: Its parameter.
            v: Its input.
            g_half: Gradient of t, or of v if ``inverse``.
            g_log: Gradient of -log(1 - v + c v).
            inverse: Whether v is the output.

        Returns:
            t; gradients of t, v and log c.
        """
        # dt/dv = c / den² and dt/dc = v (1 - v) / den²
        over_den = torch.reciprocal(1 - v + c * v)
        t_v = c * over_den * over_den
        bend = g_log * over_den
        if inverse:
            g_v = -g_half
            g_t = (g_v + bend * (c - 1)) / t_v
        else:
            g_t = g_half
            g_v = g_t * t_v - bend * (c - 1)
        return c * v * over_den, g_t, g_v, v * ((1 - v) * g_t * t_v - bend * c)

    def in_bin_gradient(
        self,
        ends: Tensor,
        raw_slopes: Tensor,
        raw_bin: Sequence[Tensor],
        known: Sequence[Tensor],
        *,
        g_out: Tensor,
        g_log: Tensor,
        inverse: bool,
    ) -> tuple[Tensor, ...]:
        (z,) = known
        x0, y0 = ends[:, 0]
        w, h = ends[:, 1] - ends[:, 0]
        root, cosine = exp_soft_bound(raw_slopes, math.log(self.max_slope), 0.5)
        sigma = torch.sigmoid(raw_bin[0])
        lam = self.min_lambda + (1 - 2 * self.min_lambda) * sigma
        shares = torch.stack([lam, 1 - lam])
        u = (z - y0) / h if inverse else (z - x0) / w
        left, e, share, rise, c, v, xi, r = self._half(u, w / h, root, shares, inverse)
        sign = 2 * left - 1
        g_log = -2 * g_log if inverse else 2 * g_log
        g_half = sign * (share * w if inverse else rise * h) * g_out
        t, g_t, g_v, g_c = self._moebius_gradient(c, v, g_half, g_log, inverse)
        g_rise = g_t * t
        parts = root * shares
        g_m = (g_c - g_rise) / parts.sum(0)
        g_e = g_log + g_rise + g_c
        g_root = parts * g_m
        g_root[0] += g_e * left
        g_root[1] += g_e * (1 - left)
        g_lam = g_m * (root[0] - root[1]) + sign * (g_rise - g_v * v) / share
        g_z, g_ends = ends_gradient(
            w,
            h,
            torch.lerp(1 - xi, xi, left),
            torch.lerp(1 - r, r, left),
            g_xi=sign * g_v / share,
            g_y=sign * g_t / (rise * h),
            g_s=-g_c,
            inverse=inverse,
        )
        g_lam *= (1 - 2 * self.min_lambda) * sigma * (1 - sigma)
        return g_z, g_ends, g_root * (0.5 * cosine.pow(3)), g_lam
