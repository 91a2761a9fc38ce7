"""Monotone splines: scalar maps that bend the box [-bound, bound] and are the identity outside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyroflows.numerics import soft_bound

__all__ = ["LinearRational", "RationalQuadratic"]


@dataclass(frozen=True)
class _Spline:
    """What both splines share: knots from softmaxes, the search for the bin, the tails."""

    count_bins: int = 8
    bound: float = 3.0
    min_bin: float = 0.1
    max_slope: float = 20.0
    _values_per_bin: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.count_bins < 1:
            raise ValueError(f"count_bins must be at least 1; got {self.count_bins}")
        if not 0 < self.bound < math.inf:
            raise ValueError(f"bound must be positive and finite; got {self.bound}")
        if not 0 < self.min_bin < 1:
            raise ValueError(
                "min_bin, the smallest bin as a fraction of the mean bin 2 * bound / count_bins, "
                f"must lie strictly between 0 and 1; got {self.min_bin}"
            )
        if not 1 < self.max_slope < math.inf:
            raise ValueError(f"max_slope must be above 1 and finite; got {self.max_slope}")

    @property
    def num_params(self) -> int:
        """Rows of ``params``: widths, heights, interior knot slopes, and what else a bin has."""
        return (3 + self._values_per_bin) * self.count_bins - 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x``; returns ``y`` and log|dy/dx|, each of the shape of ``x``."""
        return self._reference(x, params, inverse=False)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``y`` back in closed form; returns ``x`` and log|dx/dy|, each of the shape of ``y``."""
        return self._reference(y, params, inverse=True)

    def _knots(self, raw: Tensor) -> Tensor:
        """Knots (count_bins + 1, ...) from logits (count_bins, ...); the ends are exactly ±bound."""
        K, B, m = self.count_bins, self.bound, self.min_bin
        c = raw.softmax(0)[:-1].cumsum(0)
        even = torch.linspace(2 * B * m / K - B, 2 * B * m * (K - 1) / K - B, K - 1, dtype=raw.dtype, device=raw.device)
        interior = even.reshape(-1, *[1] * (raw.dim() - 1)) + 2 * B * (1 - m) * c
        end = torch.full_like(raw[:1], B)
        return torch.cat([-end, interior, end])

    def _reference(self, z: Tensor, params: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """Evaluate by differentiable operations on the logical layout."""
        K, B = self.count_bins, self.bound
        shape = torch.broadcast_shapes(z.shape, params.shape[1:])
        z = z.expand(shape)
        raw_w, raw_h, raw_d, *raw_bins = params.split([K, K, K - 1] + [K] * self._values_per_bin)
        if raw_w.dim() <= len(shape):
            raise ValueError
        inner = z.clamp(-B, B)
        x_knots, y_knots = self._knots(raw_w), self._knots(raw_h)
        index = (inner >= (y_knots if inverse else x_knots)[1:-1]).sum(0, keepdim=True)

        def at(rows: Tensor, index: Tensor) -> Tensor:
            return rows.expand(-1, *shape).gather(0, index).squeeze(0)

        flat = torch.zeros_like(raw_w[:1])
        slopes = torch.cat([flat, raw_d, flat])
        rows = [at(t, i) for t in (x_knots, y_knots, slopes) for i in (index, index + 1)]
        out, log_slope = self._bin(inner, *rows, *(at(t, index) for t in raw_bins), inverse=inverse)
        inside = inner == z
        return torch.where(inside, out, z), log_slope * inside.to(z.dtype)


@dataclass(frozen=True)
class RationalQuadratic(_Spline):
    """RQ."""

    def _bin(self, z, x0, x1, y0, y1, r0, r1, *, inverse):
        limit = math.log(self.max_slope)
        w, h = x1 - x0, y1 - y0
        s = h / w
        a0, a1 = soft_bound(r0, limit).exp() / s, soft_bound(r1, limit).exp() / s
        if inverse:
            r = ((z - y0) / h).clamp(0, 1)
            delta = a0 * (1 - r) - a1 * r
            right = delta < 0
            t = torch.sqrt(delta * delta + 4 * r * (1 - r)) + torch.where(right, -delta, delta)
            left_part, right_part = torch.where(right, t, 2 * r), torch.where(right, 2 * (1 - r), t)
            xi = left_part / (left_part + right_part)
        else:
            xi = ((z - x0) / w).clamp(0, 1)
        eta = 1 - xi
        q = xi * eta
        den = 1 + (a0 + a1 - 2) * q
        log_slope = torch.log(s * (a1 * xi * xi + 2 * q + a0 * eta * eta) / (den * den))
        if inverse:
            return x0 + w * xi, -log_slope
        return y0 + h * (xi * xi + a0 * q) / den, log_slope


@dataclass(frozen=True)
class LinearRational(_Spline):
    """LR."""

    min_lambda: float = 0.025
    _values_per_bin: ClassVar[int] = 1

    def _bin(self, z, x0, x1, y0, y1, r0, r1, raw_lambda, *, inverse):
        limit = math.log(self.max_slope)
        w, h = x1 - x0, y1 - y0
        s = h / w
        e0, e1 = (soft_bound(r0, limit) / 2).exp(), (soft_bound(r1, limit) / 2).exp()
        lam = self.min_lambda + (1 - 2 * self.min_lambda) * torch.sigmoid(raw_lambda)
        m = lam * e0 + (1 - lam) * e1
        u = ((z - y0) / h if inverse else (z - x0) / w).clamp(0, 1)
        middle = lam * e0 / m if inverse else lam
        left = u <= middle
        e, part = torch.where(left, e0, e1), torch.where(left, lam, 1 - lam)
        u = torch.where(left, u, 1 - u)
        height = part * e / m
        c = e * m / s
        if inverse:
            t = (u / height).clamp(0, 1)
            v = t / (t + c * (1 - t))
        else:
            v = (u / part).clamp(0, 1)
            t = c * v / (1 - v + c * v)
        log_slope = 2 * torch.log(e / (1 - v + c * v))
        if inverse:
            v = part * v
            return x0 + w * torch.where(left, v, 1 - v), -log_slope
        t = height * t
        return y0 + h * torch.where(left, t, 1 - t), log_slope
