r"""Monotone splines: scalar maps that bend the box [-bound, bound] and are the identity outside it.

A spline reads its parameters as rows: ``count_bins`` logits of widths, as many of heights, ``count_bins - 1`` interior knot
slopes, and what else a bin has. Softmaxes and cumulative sums run down the rows, so that every operation works on long
contiguous memory. Two paths give the same numbers:

- ``_reference``: differentiable operations on any shapes. It serves small inputs, broadcast parameters, `torch.compile`,
  and every derivative above the first.
- ``_Map`` with ``_Gradient``: kernels for the rest. They save the input and the parameters only, work in the memory order
  of the parameters (the input is the small tensor: it is the one to be transposed), and go through the tall arrays of
  count_bins rows as few times as possible; the adjoint of the softmax of widths needs no reduction, since each input meets
  one bin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from pyroflows.numerics import functorch_active, soft_bound

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
        return _evaluate(self, x, params, inverse=False)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``y`` back in closed form; returns ``x`` and log|dx/dy|, each of the shape of ``y``."""
        return _evaluate(self, y, params, inverse=True)

    @property
    def _spread(self) -> float:
        """Weight of the cumulative softmax c in the knots -B + 2B (m k / K + (1 - m) c_k)."""
        return 2 * self.bound * (1 - self.min_bin)

    def _even(self, like: Tensor) -> Tensor:
        """The part of the knots that does not depend on parameters, with the ends where c is 0; shape (count_bins + 1,)."""
        B = self.bound
        even = torch.linspace(-B, 2 * B * self.min_bin - B, self.count_bins + 1, dtype=like.dtype, device=like.device)
        even[-1] = B  # exactly
        return even

    def _reference(self, z: Tensor, params: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """Evaluate by differentiable operations; ``params`` has the axes of ``z`` behind its rows, and may broadcast."""
        K, B = self.count_bins, self.bound
        edges = [0, 0] * z.dim() + [1, 1]  # F.pad: one zero at both ends of the axis of knots
        c = params[: 2 * K].unflatten(0, (2, K)).softmax(1)[:, :-1].cumsum(1)
        knots = torch.add(self._even(z).reshape(-1, *[1] * z.dim()), F.pad(c, edges), alpha=self._spread)
        slopes = F.pad(params[2 * K : 3 * K - 1], edges)
        inner = z.clamp(-B, B)
        index = (inner >= knots[int(inverse), 1:K]).sum(0)
        ends = torch.stack([index, index + 1])
        bins = [
            knots.expand(-1, -1, *z.shape).gather(1, ends.expand(2, *ends.shape)),
            slopes.expand(-1, *z.shape).gather(0, ends),
        ]
        if self._values_per_bin:
            bins.append(params[3 * K - 1 :].expand(-1, *z.shape).gather(0, ends[:1])[0])
        out, log_slope = self._bin(inner, *bins, inverse=inverse)
        inside = inner == z
        return torch.where(inside, out, z), log_slope * inside

    def _bin(
        self, z: Tensor, ends: Tensor, raw_slopes: Tensor, *raw_bin: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """The map inside one bin.

        Args:
            z: Input, clamped to the box; any shape.
            ends: x and y at the lower and the upper end of the bin; shape (2, 2, *shape).
            raw_slopes: Unbounded log-slopes at both ends; shape (2, *shape).
            *raw_bin: What else the bin has, of the shape of ``z``.
            inverse: The direction.
        """
        raise NotImplementedError

    def _bin_gradient(
        self,
        z: Tensor,
        ends: Tensor,
        raw_slopes: Tensor,
        *raw_bin: Tensor,
        g_out: Tensor,
        g_log: Tensor,
        inverse: bool,
    ) -> tuple[Tensor, ...]:
        """Gradients of g_out · out + g_log · log_slope with respect to every argument of :meth:`_bin`."""
        raise NotImplementedError

    @staticmethod
    def _ends_gradient(
        w: Tensor, h: Tensor, xi: Tensor, r: Tensor, g_xi: Tensor, g_y: Tensor, g_s: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """From gradients of relative position, output and log(h / w) to those of the input and the ends (2, 2, N)."""
        g_z = g_xi / w
        g_ends = g_z.new_empty(2, 2, *g_z.shape)
        torch.add(g_z * xi, g_s / w, out=g_ends[0, 1]).neg_()
        torch.addcmul(g_s / h, g_y, r, out=g_ends[1, 1])
        torch.add(g_z, g_ends[0, 1], out=g_ends[0, 0]).neg_()
        torch.sub(g_y, g_ends[1, 1], out=g_ends[1, 0])
        return (-g_y if inverse else g_z), g_ends


@dataclass(frozen=True)
class RationalQuadratic(_Spline):
    """RQ."""

    def _bin(
        self, z: Tensor, ends: Tensor, raw_slopes: Tensor, *raw_bin: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        x0, y0 = ends[:, 0]
        w, h = ends[:, 1] - ends[:, 0]
        s = h / w
        a0, a1 = torch.exp(soft_bound(raw_slopes, math.log(self.max_slope))) / s
        xi, eta = self._solve((z - y0) / h, a0, a1) if inverse else self._shares((z - x0) / w)
        q = xi * eta
        den = 1 + (a0 + a1 - 2) * q
        log_slope = torch.log(s * (a1 * xi * xi + 2 * q + a0 * eta * eta) / (den * den))
        if inverse:
            return x0 + w * xi, -log_slope
        return y0 + h * (xi * (xi + a0 * eta) / den), log_slope

    @staticmethod
    def _shares(xi: Tensor) -> tuple[Tensor, Tensor]:
        """The relative position in the bin and its complement."""
        xi = xi.clamp(0, 1)
        return xi, 1 - xi

    @staticmethod
    def _solve(r: Tensor, a0: Tensor, a1: Tensor) -> tuple[Tensor, Tensor]:
        r"""The relative position ξ and its complement from the relative height r.

        With :math:`\delta = a_0 (1 - r) - a_1 r` the discriminant is :math:`\delta^2 + 4 r (1 - r)`, a sum of squares: it
        cannot become negative, and with :math:`t = |\delta| + \sqrt{\delta^2 + 4 r (1 - r)}` the root is
        :math:`2r / (2r + t)`, or :math:`t / (t + 2 (1 - r))` where :math:`\delta < 0`: no step cancels, none divides by 0.
        """
        r = r.clamp(0, 1)
        rest = 1 - r
        delta = a0 * rest - a1 * r
        right = (delta < 0).to(r.dtype)
        t = torch.sqrt(delta * delta + 4 * r * rest) + delta * (1 - 2 * right)
        low, high = torch.lerp(2 * r, t, right), torch.lerp(t, 2 * rest, right)
        total = low + high
        return low / total, high / total

    def _bin_gradient(
        self,
        z: Tensor,
        ends: Tensor,
        raw_slopes: Tensor,
        *raw_bin: Tensor,
        g_out: Tensor,
        g_log: Tensor,
        inverse: bool,
    ) -> tuple[Tensor, ...]:
        x0, y0 = ends[:, 0]
        w, h = ends[:, 1] - ends[:, 0]
        s = h / w
        limit = math.log(self.max_slope)
        tangent = (raw_slopes / limit).clamp_(-1e9, 1e9)  # of an angle whose sine is the soft bound
        cosine = torch.rsqrt(1 + tangent * tangent)
        a = torch.exp(limit * tangent * cosine) / s
        xi, eta = self._solve((z - y0) / h, *a) if inverse else self._shares((z - x0) / w)
        # Relative height r = ξ (ξ + a0 η) / den, dr/dξ = top / den²; everything below is for r = r(ξ, a0, a1).
        shares = torch.stack([eta, xi])
        a_shares = a * shares
        q, tilt, excess = xi * eta, eta - xi, a.sum(0) - 2
        over_den = torch.reciprocal(1 + excess * q)
        over_top = torch.reciprocal((a_shares * shares).sum(0) + 2 * q)
        r = xi * (xi + a_shares[0]) * over_den
        log_xi = 2 * ((a_shares[1] - a_shares[0] + tilt) * over_top - excess * tilt * over_den)
        height = h * over_den * over_den / over_top
        if inverse:  # implicitly: out solves r(out) = z, and log_slope is -log r'(out)
            g_xi, g_log = -w * g_out, -g_log
            g_y = (g_xi - g_log * log_xi) / height
        else:
            g_y, g_xi = g_out, torch.addcmul(g_log * log_xi, g_out, height)
        q *= over_den
        rise = g_y * h * q
        g_a = torch.addcmul(-2 * q * g_log - rise * r, g_log * over_top, shares * shares)
        g_a[0] += rise
        g_a *= a
        g_s = g_log - g_a.sum(0)
        g_z, g_ends = self._ends_gradient(w, h, xi, r, g_xi, g_y, g_s, inverse)
        return g_z, g_ends, g_a * (cosine * cosine * cosine)


@dataclass(frozen=True)
class LinearRational(_Spline):
    """LR."""

    min_lambda: float = 0.025
    _values_per_bin: ClassVar[int] = 1

    def _bin(
        self, z: Tensor, ends: Tensor, raw_slopes: Tensor, *raw_bin: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        x0, y0 = ends[:, 0]
        w, h = ends[:, 1] - ends[:, 0]
        e0, e1 = torch.exp(soft_bound(raw_slopes, math.log(self.max_slope)) / 2)
        lam = self.min_lambda + (1 - 2 * self.min_lambda) * torch.sigmoid(raw_bin[0])
        m = lam * e0 + (1 - lam) * e1
        u = ((z - y0) / h if inverse else (z - x0) / w).clamp(0, 1)
        left = (u <= (lam * e0 / m if inverse else lam)).to(u.dtype)
        e, share, u = torch.lerp(e1, e0, left), torch.lerp(1 - lam, lam, left), torch.lerp(1 - u, u, left)
        rise = share * e / m
        c = e * m * w / h
        if inverse:
            t = (u / rise).clamp(0, 1)
            v = t / (t + c * (1 - t))
        else:
            v = (u / share).clamp(0, 1)
        den = 1 - v + c * v
        log_slope = 2 * torch.log(e / den)
        if inverse:
            xi = share * v
            return x0 + w * torch.lerp(1 - xi, xi, left), -log_slope
        r = rise * c * v / den
        return y0 + h * torch.lerp(1 - r, r, left), log_slope

    def _bin_gradient(
        self,
        z: Tensor,
        ends: Tensor,
        raw_slopes: Tensor,
        *raw_bin: Tensor,
        g_out: Tensor,
        g_log: Tensor,
        inverse: bool,
    ) -> tuple[Tensor, ...]:
        x0, y0 = ends[:, 0]
        w, h = ends[:, 1] - ends[:, 0]
        limit = math.log(self.max_slope)
        tangent = (raw_slopes / limit).clamp_(-1e9, 1e9)  # of an angle whose sine is the soft bound
        cosine = torch.rsqrt(1 + tangent * tangent)
        e01 = torch.exp(limit / 2 * tangent * cosine)
        sigma = torch.sigmoid(raw_bin[0])
        lam = self.min_lambda + (1 - 2 * self.min_lambda) * sigma
        shares = torch.stack([lam, 1 - lam])
        parts = shares * e01
        m = parts.sum(0)
        u = ((z - y0) / h if inverse else (z - x0) / w).clamp(0, 1)
        left = (u <= (parts[0] / m if inverse else lam)).to(u.dtype)
        sign = 2 * left - 1
        e, share = torch.lerp(e01[1], e01[0], left), torch.lerp(shares[1], shares[0], left)
        u = torch.lerp(1 - u, u, left)
        rise = share * e / m
        c = e * m * w / h
        if inverse:
            t = (u / rise).clamp(0, 1)
            v = t / (t + c * (1 - t))
        else:
            v = (u / share).clamp(0, 1)
        over_den = torch.reciprocal(1 - v + c * v)
        t = c * v * over_den
        xi, r = share * v, rise * t
        # t(v; c) is a Möbius map of [0, 1]: dt/dv = c / den², dt/dc = v (1 - v) / den².
        slope = c * over_den * over_den
        if inverse:  # implicitly: out solves r(out) = z, and log_slope is -log r'(out)
            g_log = -2 * g_log
            bend = g_log * over_den
            g_v = -share * sign * w * g_out
            g_t = (g_v + bend * (c - 1)) / slope
        else:
            g_log = 2 * g_log
            bend = g_log * over_den
            g_t = sign * rise * h * g_out
            g_v = g_t * slope - bend * (c - 1)
        g_rise, g_c = g_t * t, v * (g_t * (1 - v) * slope - bend * c)  # of the logarithms, as are g_e and g_s
        g_m = (g_c - g_rise) / m
        g_e = parts * g_m
        own = g_log + g_rise + g_c
        g_e[0] += own * left
        g_e[1] += own * (1 - left)
        g_lam = g_m * (e01[0] - e01[1]) + sign * (g_rise - g_v * v) / share
        g_z, g_ends = self._ends_gradient(
            w,
            h,
            torch.lerp(1 - xi, xi, left),
            torch.lerp(1 - r, r, left),
            sign * g_v / share,
            sign * g_t / (rise * h),
            -g_c,
            inverse,
        )
        return (
            g_z,
            g_ends,
            g_e * (cosine * cosine * cosine) / 2,
            g_lam * ((1 - 2 * self.min_lambda) * sigma * (1 - sigma)),
        )


_CHUNK = 1 << 15  # columns per thread that the kernels take at once, so that their scratch stays near the core


def _evaluate(spline: _Spline, z: Tensor, params: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """Choose the path, after bringing dtypes and shapes together."""
    if params.dim() == 0 or params.shape[0] != spline.num_params:
        raise ValueError(
            f"{type(spline).__name__} with {spline.count_bins} bins expects params of shape "
            f"({spline.num_params}, *x.shape); got {tuple(params.shape)}"
        )
    dtype = torch.promote_types(z.dtype, params.dtype)
    if z.dtype != params.dtype or dtype.itemsize < 4:
        wide = torch.promote_types(dtype, torch.float32)
        out, log_slope = _evaluate(spline, z.to(wide), params.to(wide), inverse=inverse)
        return out.to(dtype), log_slope.to(dtype)
    if params.shape[1:] != z.shape:
        shape = torch.broadcast_shapes(z.shape, params.shape[1:])
        missing = len(shape) + 1 - params.dim()
        params = params.reshape(params.shape[0], *[1] * missing, *params.shape[1:])
        return spline._reference(z.expand(shape), params, inverse=inverse)
    if torch.compiler.is_compiling() or functorch_active() or forward_ad._current_level >= 0:
        return spline._reference(z, params, inverse=inverse)
    return _Map.apply(spline, inverse, z, params)


class _Map(torch.autograd.Function):
    """(z, params) -> (out, log_slope) by the kernels."""

    @staticmethod
    def forward(ctx: Any, spline: _Spline, inverse: bool, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        layout = _Layout(params)
        out, log_slope, bins, index = _in_parts(
            partial(_map_rows, spline, inverse), layout.flatten(z), layout.rows(params)
        )
        ctx.spline, ctx.inverse = spline, inverse
        ctx.save_for_backward(z, params, bins, index)
        return layout.restore(out), layout.restore(log_slope)

    @staticmethod
    def backward(ctx: Any, g_out: Tensor, g_log: Tensor) -> tuple[Tensor | None, ...]:
        z, params, bins, index = ctx.saved_tensors
        batched = functorch_active() or any(map(torch._C._functorch.is_legacy_batchedtensor, (g_out, g_log)))
        if batched or torch.is_grad_enabled():
            create_graph = torch.is_grad_enabled()
            with torch.enable_grad():
                leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in (z, params)]
                out = ctx.spline._reference(*leaves, inverse=ctx.inverse)
                return None, None, *torch.autograd.grad(out, leaves, (g_out, g_log), create_graph=create_graph)
        layout = _Layout(params)
        kernel = partial(_gradient_rows, ctx.spline, ctx.inverse)
        columns = (layout.flatten(t) for t in (z, g_out, g_log))
        g_z, g_params = _in_parts(kernel, *columns, layout.rows(params), bins, index)
        return None, None, layout.restore(g_z), layout.restore(g_params)


def _in_parts(kernel: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Call an elementwise kernel on (..., N) tensors, by chunks of columns where there are many."""
    N, chunk = tensors[0].numel(), _CHUNK * torch.get_num_threads()
    if N <= 2 * chunk or tensors[0].device.type != "cpu":
        return kernel(*tensors)
    parts = [kernel(*(t[..., i : i + chunk] for t in tensors)) for i in range(0, N, chunk)]
    return tuple(torch.cat(part, -1) for part in zip(*parts, strict=True))


class _Layout:
    """The memory order of parameters (num_params, *shape); the input and the results are brought into it."""

    def __init__(self, params: Tensor) -> None:
        self.order = self.back = None
        self.shape = params.shape[1:]
        if not params.is_contiguous():
            stride = params.stride()[1:]
            order = sorted(range(len(stride)), key=lambda i: -stride[i])
            if order != sorted(order):
                self.order = order
                self.back = sorted(range(len(order)), key=order.__getitem__)
                self.shape = [self.shape[i] for i in order]

    def flatten(self, z: Tensor) -> Tensor:
        """(N,) from a tensor of the logical shape."""
        return (z if self.order is None else z.permute(self.order)).reshape(-1)

    def rows(self, params: Tensor) -> Tensor:
        """(num_params, N) from the parameters; a view unless their memory has holes."""
        if self.order is not None:
            params = params.permute(0, *(i + 1 for i in self.order))
        return params.reshape(params.shape[0], -1)

    def restore(self, flat: Tensor) -> Tensor:
        """The logical shape from (N,) or (num_params, N)."""
        lead = flat.shape[:-1]
        full = flat.view((*lead, *self.shape))
        if self.back is None:
            return full
        return full.permute(*range(len(lead)), *(i + len(lead) for i in self.back))


def _map_rows(spline: _Spline, inverse: bool, z: Tensor, params: Tensor) -> tuple[Tensor, ...]:
    """The map on (N,) and (num_params, N), without a graph.

    Returns:
        The output and the log-slope (N,); what belongs to the bin of each input, (6 or 7, N): x and y at its lower and its
        upper end, raw slopes there, raw values of the bin; the index of the bin as a float (N,).
    """
    K, B, N = spline.count_bins, spline.bound, z.numel()
    probs, tables = params.new_empty(2, K, N), params.new_empty(3, K + 1, N)
    torch.softmax(params[: 2 * K].unflatten(0, (2, K)), 1, out=probs)
    tables[:, ::K] = 0
    if K > 1:
        if z.device.type == "cpu":
            c, p = tables[:2].unbind(1), probs.unbind(1)
            for k in range(1, K):  # a third of the time of torch.cumsum
                torch.add(c[k - 1], p[k - 1], out=c[k])
        else:
            torch.cumsum(probs[:, : K - 1], 1, out=tables[:2, 1:K])
        tables[2, 1:K] = params[2 * K : 3 * K - 1]
    knots = torch.add(spline._even(z)[:, None], tables[:2], alpha=spline._spread, out=tables[:2])
    inner = z.clamp(-B, B)
    index = torch.ge(inner, knots[int(inverse), 1:K], out=params.new_empty(K - 1, N)).sum(0)
    at = _positions(index)
    bins = tables.view(3, -1).index_select(1, at.view(-1)).view(6, N)
    if spline._values_per_bin:
        bins = torch.cat([bins, params[3 * K - 1 :].gather(0, index.long()[None])])
    out, log_slope = spline._bin(inner, *_split(bins), inverse=inverse)
    inside = inner == z
    return torch.where(inside, out, z), log_slope.mul_(inside), bins, index


def _positions(index: Tensor) -> Tensor:
    """Where rows index and index + 1 of each column lie in the memory of a (rows, N) table; shape (2, N)."""
    N = index.numel()
    return torch.add(torch.arange(2 * N, device=index.device).view(2, N), index.long(), alpha=N)


def _split(bins: Tensor) -> tuple[Tensor, ...]:
    """The arguments of :meth:`_Spline._bin` behind the first."""
    return bins[:4].view(2, 2, -1), bins[4:6], *bins[6:]


def _gradient_rows(
    spline: _Spline,
    inverse: bool,
    z: Tensor,
    g_out: Tensor,
    g_log: Tensor,
    params: Tensor,
    bins: Tensor,
    index: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients (N,) and (num_params, N).

    Logit j of the widths moves the lower end of the bin if j < bin, and the upper end if j <= bin. So the adjoint of
    softmax and cumulative sum is p_j ([j < bin] g_lower + [j <= bin] g_upper - t), where t = c_lower g_lower + c_upper
    g_upper is known from the bin alone: no reduction over the bins.
    """
    K, N = spline.count_bins, z.numel()
    inner = z.clamp(-spline.bound, spline.bound)
    inside = torch.eq(inner, z, out=torch.empty_like(z))
    g_inside = g_out * inside
    ends, raw_slopes, *raw_bin = _split(bins)
    g_z, g_ends, g_slopes, *g_bin = spline._bin_gradient(
        inner, ends, raw_slopes, *raw_bin, g_out=g_inside, g_log=g_log * inside, inverse=inverse
    )
    grads = params.new_empty(params.shape[0] + 1, N)  # a spare row: slopes at ±bound have none of their own
    flat, at = grads.view(-1), _positions(index)
    grads[2 * K :] = 0
    flat[(2 * K - 1) * N :].scatter_(0, at.view(-1), g_slopes.view(-1))
    if spline._values_per_bin:
        grads[3 * K - 1] = 0
        flat[(3 * K - 1) * N :].scatter_(0, at[0], *g_bin)
    step = 2 * spline.bound * spline.min_bin / K
    spread_c = ends + (spline.bound - step * index)  # at the upper end without its last step
    t = (spread_c * g_ends).sum(1) - step * g_ends[:, 1]
    g_lower, g_upper = (spline._spread * g_ends).unbind(1)
    logits = grads[: 2 * K].view(2, K, N)
    probs = torch.softmax(params[: 2 * K].unflatten(0, (2, K)), 1)
    passed = torch.gt(index, torch.arange(K, device=z.device)[:, None], out=params.new_empty(K, N))  # [j < bin]
    torch.addcmul(-t[:, None], passed, g_lower[:, None], out=logits)
    logits[:, 1:].addcmul_(passed[:-1], g_upper[:, None])
    logits[:, 0] += g_upper
    logits *= probs
    return g_z + (g_out - g_inside), grads[:-1]
