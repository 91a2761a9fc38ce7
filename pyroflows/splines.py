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
from dataclasses import dataclass
from typing import Any, ClassVar

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
        return _evaluate(self, x, params, inverse=False)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``y`` back in closed form; returns ``x`` and log|dx/dy|, each of the shape of ``y``."""
        return _evaluate(self, y, params, inverse=True)

    # Positions of knots are affine in the cumulative softmax c: -B + 2B (m k / K + (1 - m) c_k).

    @property
    def _range(self) -> float:
        return 2 * self.bound * (1 - self.min_bin)

    def _even(self, like: Tensor) -> Tensor:
        """The part of the interior knots that does not depend on the parameters; shape (count_bins - 1,)."""
        K, B, m = self.count_bins, self.bound, self.min_bin
        return torch.linspace(
            2 * B * m / K - B, 2 * B * m * (K - 1) / K - B, K - 1, dtype=like.dtype, device=like.device
        )

    def _knots(self, raw: Tensor) -> Tensor:
        """Knots (count_bins + 1, ...) from logits (count_bins, ...); the ends are exactly ±bound."""
        even = self._even(raw).reshape(-1, *[1] * (raw.dim() - 1))
        end = torch.full_like(raw[:1], self.bound)
        return torch.cat([-end, even + self._range * raw.softmax(0)[:-1].cumsum(0), end])

    def _reference(self, z: Tensor, params: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """Evaluate by differentiable operations; ``params`` may broadcast against ``z``."""
        K, B = self.count_bins, self.bound
        raw_w, raw_h, raw_d, *raw_bins = params.split([K, K, K - 1] + [K] * self._values_per_bin)
        inner = z.clamp(-B, B)
        x_knots, y_knots = self._knots(raw_w), self._knots(raw_h)
        index = (inner >= (y_knots if inverse else x_knots)[1:-1]).sum(0, keepdim=True)

        def at(rows: Tensor, index: Tensor) -> Tensor:
            return rows.expand(-1, *z.shape).gather(0, index).squeeze(0)

        flat = torch.zeros_like(raw_w[:1])
        slopes = torch.cat([flat, raw_d, flat])
        rows = [at(t, i) for t in (x_knots, y_knots, slopes) for i in (index, index + 1)]
        out, log_slope = self._bin(inner, *rows, *(at(t, index) for t in raw_bins), inverse=inverse)
        inside = inner == z
        return torch.where(inside, out, z), log_slope * inside.to(z.dtype)

    def _bin(self, z: Tensor, *rows: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The map inside one bin: ends of the bin x0, x1, y0, y1, raw slopes at them, raw values of the bin."""
        raise NotImplementedError

    def _bin_gradient(
        self, z: Tensor, *rows: Tensor, g_out: Tensor, g_log: Tensor, inverse: bool
    ) -> tuple[Tensor, ...]:
        """Gradients of g_out · out + g_log · log_slope with respect to ``z`` and every row."""
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (z, *rows)]
            out = self._bin(*leaves, inverse=inverse)
            return torch.autograd.grad(out, leaves, (g_out, g_log))


@dataclass(frozen=True)
class RationalQuadratic(_Spline):
    """RQ."""

    def _bin(self, z, x0, x1, y0, y1, r0, r1, *, inverse):
        w, h = x1 - x0, y1 - y0
        s = h / w
        limit = math.log(self.max_slope)
        a0, a1 = soft_bound(r0, limit).exp() / s, soft_bound(r1, limit).exp() / s
        xi, eta = self._solve(((z - y0) / h).clamp(0, 1), a0, a1) if inverse else _share((z - x0) / w)
        q = xi * eta
        den = 1 + (a0 + a1 - 2) * q
        log_slope = torch.log(s * (a1 * xi * xi + 2 * q + a0 * eta * eta) / (den * den))
        if inverse:
            return x0 + w * xi, -log_slope
        return y0 + h * (xi * (xi + a0 * eta) / den), log_slope

    @staticmethod
    def _solve(r: Tensor, a0: Tensor, a1: Tensor) -> tuple[Tensor, Tensor]:
        """Relative position (ξ, 1 - ξ) in the bin from the relative height r."""
        delta = a0 * (1 - r) - a1 * r
        right = delta < 0
        t = torch.sqrt(delta * delta + 4 * r * (1 - r)) + torch.where(right, -delta, delta)
        a, b = torch.where(right, t, 2 * r), torch.where(right, 2 * (1 - r), t)
        return a / (a + b), b / (a + b)

    def _bin_gradient(self, z, x0, x1, y0, y1, r0, r1, *, g_out, g_log, inverse):
        limit = math.log(self.max_slope)
        w, h = x1 - x0, y1 - y0
        s = h / w
        b0, b0_raw = _soft_bound_with_slope(r0, limit)
        b1, b1_raw = _soft_bound_with_slope(r1, limit)
        a0, a1 = b0.exp() / s, b1.exp() / s
        xi, eta = self._solve(((z - y0) / h).clamp(0, 1), a0, a1) if inverse else _share((z - x0) / w)
        # r = xi (xi + a0 eta) / den is the relative height; d r / d xi = top / den^2
        q, tilt, a = xi * eta, eta - xi, a0 + a1 - 2
        over_den = 1 / (1 + a * q)
        a1_xi, a0_eta = a1 * xi, a0 * eta
        over_top = 1 / (a1_xi * xi + 2 * q + a0_eta * eta)
        r = xi * (xi + a0_eta) * over_den
        log_xi = 2 * ((a1_xi - a0_eta + tilt) * over_top - a * tilt * over_den)
        height = h * over_den * over_den / over_top
        if inverse:
            g_xi, g_log = -w * g_out, -g_log
            g_y = (g_xi - g_log * log_xi) / height
        else:
            g_y = g_out
            g_xi = g_y * height + g_log * log_xi
        q = q * over_den
        common = 2 * q * g_log
        level, rise = g_log * over_top, g_y * h * q
        g_a0 = a0 * (rise * (1 - r) + level * (eta * eta) - common)
        g_a1 = a1 * (level * (xi * xi) - rise * r - common)
        g_s = g_log - g_a0 - g_a1
        g_x = g_xi / w
        g_w = -(g_x * xi + g_s / w)
        g_h = g_y * r + g_s / h
        return (-g_y if inverse else g_x), -g_x - g_w, g_w, g_y - g_h, g_h, g_a0 * b0_raw, g_a1 * b1_raw


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


def _share(xi: Tensor) -> tuple[Tensor, Tensor]:
    """The relative position in a bin and its complement."""
    xi = xi.clamp(0, 1)
    return xi, 1 - xi


def _soft_bound_with_slope(raw: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """:func:`soft_bound` and its derivative."""
    r = (raw / bound).clamp(-1e9, 1e9)
    cosine = torch.rsqrt(1 + r * r)
    return bound * r * cosine, cosine * cosine * cosine


_SMALL = 1024  # elements below which plain autograd is cheaper than the kernels


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
    if z.numel() < _SMALL or torch.compiler.is_compiling():
        return spline._reference(z, params, inverse=inverse)
    return _Map.apply(spline, inverse, z, params)


class _Map(torch.autograd.Function):
    """(z, params) -> (out, log_slope) by the kernels."""

    @staticmethod
    def forward(spline: _Spline, inverse: bool, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        layout = _Layout(params)
        out, log_slope = _map_rows(spline, layout.flatten(z), layout.rows(params), inverse)
        return layout.restore(out), layout.restore(log_slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.spline, ctx.inverse, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, g_out: Tensor, g_log: Tensor) -> tuple:
        if torch._C._functorch.is_legacy_batchedtensor(g_out) or torch._C._functorch.is_legacy_batchedtensor(g_log):
            return None, None, *_legacy_batched_gradient(ctx, g_out, g_log)
        return None, None, *_Gradient.apply(ctx.spline, ctx.inverse, *ctx.saved_tensors, g_out, g_log)

    @staticmethod
    def jvp(ctx: Any, _spline: None, _inverse: None, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        return _tangent(_reference_of(ctx), ctx.saved_tensors, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, spline: _Spline, inverse: bool, *tensors: Tensor) -> tuple:
        z, params = _batched(info, in_dims[2:], tensors, rows=(False, True))
        return _evaluate(spline, z, params, inverse=inverse), (0, 0)


class _Gradient(torch.autograd.Function):
    """(z, params, g_out, g_log) -> gradients with respect to (z, params), by the kernels."""

    @staticmethod
    def forward(
        spline: _Spline, inverse: bool, z: Tensor, params: Tensor, g_out: Tensor, g_log: Tensor
    ) -> tuple[Tensor, Tensor]:
        layout = _Layout(params)
        g_z, g_params = _gradient_rows(
            spline, layout.flatten(z), layout.rows(params), layout.flatten(g_out), layout.flatten(g_log), inverse
        )
        return layout.restore(g_z), layout.restore(g_params)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.spline, ctx.inverse, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        return None, None, *torch.func.vjp(_reference_gradient_of(ctx), *ctx.saved_tensors)[1](cotangents)

    @staticmethod
    def jvp(ctx: Any, _spline: None, _inverse: None, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        return _tangent(_reference_gradient_of(ctx), ctx.saved_tensors, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, spline: _Spline, inverse: bool, *tensors: Tensor) -> tuple:
        batched = _batched(info, in_dims[2:], tensors, rows=(False, True, False, False))
        g_z, g_params = _Gradient.apply(spline, inverse, *batched)
        return (g_z, g_params), (0, 1)


def _reference_of(ctx: Any) -> Any:
    return lambda z, params: ctx.spline._reference(z, params, inverse=ctx.inverse)


def _reference_gradient_of(ctx: Any) -> Any:
    return lambda z, params, *g: torch.func.vjp(_reference_of(ctx), z, params)[1](g)


def _legacy_batched_gradient(ctx: Any, *g: Tensor) -> tuple[Tensor, ...]:
    """The gradient under `torch.autograd.grad(..., is_grads_batched=True)`, whose vmap no Function can hook into."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = [t if t.requires_grad else t.detach().requires_grad_() for t in ctx.saved_tensors]
        out = ctx.spline._reference(*tensors, inverse=ctx.inverse)
        return torch.autograd.grad(out, tensors, g, create_graph=create_graph)


def _tangent(function: Any, primals: tuple, tangents: tuple) -> tuple:
    """Forward-mode derivative of ``function``: the adjoint of its adjoint, since forward modes do not nest."""
    dense = tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True))
    out, pull = torch.func.vjp(function, *primals)
    return torch.func.vjp(lambda *g: pull(g), *(torch.zeros_like(o) for o in out))[1](dense)


def _batched(info: Any, in_dims: tuple, tensors: tuple, *, rows: tuple) -> list[Tensor]:
    """Bring vmap's axis to the front of each tensor, behind the rows of parameters."""
    moved = []
    for tensor, dim, has_rows in zip(tensors, in_dims, rows, strict=True):
        to = 1 if has_rows else 0
        if dim is None:
            tensor = tensor.unsqueeze(to)
            moved.append(tensor.expand(*tensor.shape[:to], info.batch_size, *tensor.shape[to + 1 :]))
        else:
            moved.append(tensor.movedim(dim, to))
    return moved


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
        full = flat.view(*lead, *self.shape)
        if self.back is None:
            return full
        return full.permute(*range(len(lead)), *(i + len(lead) for i in self.back))


def _map_rows(spline: _Spline, z: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """The map on (N,) and (num_params, N), without a graph."""
    inner, _, _, _, rows, _ = _look_up(spline, z, params, inverse)
    out, log_slope = spline._bin(inner, *rows, inverse=inverse)
    inside = inner == z
    return torch.where(inside, out, z), log_slope.mul_(inside)


def _look_up(spline: _Spline, z: Tensor, params: Tensor, inverse: bool) -> tuple:
    """Build the knots and find each input's bin.

    Returns:
        The input clamped to the box; softmaxes (2, K, N) of widths and heights; ``reached`` (K + 1, N), 1 where the input
        is not below the knot (by definition 1 at the first and 0 at the last); the bin's index as a float; the rows that
        belong to the bin (x0, x1, y0, y1, raw slopes, raw values); the position of (bin, column) in flat memory.
    """
    K, B, N = spline.count_bins, spline.bound, z.numel()
    probs, tables = params.new_empty(2, K, N), params.new_empty(3, K + 1, N)
    torch.softmax(params[: 2 * K].unflatten(0, (2, K)), 1, out=probs)
    knots, slopes = tables[:2], tables[2]
    if K > 1:
        interior = knots[:, 1:K]
        if z.device.type == "cpu":
            c, p = interior.unbind(1), probs.unbind(1)
            c[0].copy_(p[0])
            for k in range(1, K - 1):  # half the time of torch.cumsum
                torch.add(c[k - 1], p[k], out=c[k])
        else:
            torch.cumsum(probs[:, : K - 1], 1, out=interior)
        torch.add(spline._even(z)[:, None], interior, alpha=spline._range, out=interior)
        slopes[1:K] = params[2 * K : 3 * K - 1]
    knots[:, 0], knots[:, K] = -B, B
    slopes[0] = slopes[K] = 0
    inner = z.clamp(-B, B)
    reached = params.new_empty(K + 1, N)
    reached[0], reached[K] = 1, 0
    torch.ge(inner, knots[int(inverse), 1:K], out=reached[1:K])
    index = reached[1:K].sum(0)
    at = torch.add(torch.arange(N, device=z.device), index.long(), alpha=N)
    flat = tables.view(-1)
    rows = [flat[(i * (K + 1) + j) * N :].index_select(0, at) for i in range(3) for j in (0, 1)]
    if spline._values_per_bin:
        rows.append(params[3 * K - 1 :].gather(0, index.long()[None])[0])
    return inner, probs, reached, index, rows, at


def _gradient_rows(
    spline: _Spline, z: Tensor, params: Tensor, g_out: Tensor, g_log: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Gradients on (N,) and (num_params, N).

    A width's logit j meets the output through the lower knot if j < bin and through the upper one if j <= bin. So the
    adjoint of softmax and cumulative sum is p_j ([j < bin] g_lower + [j <= bin] g_upper - t), with
    t = c_lower g_lower + c_upper g_upper known from the bin alone.
    """
    K, B, N = spline.count_bins, spline.bound, z.numel()
    inner, probs, reached, index, rows, at = _look_up(spline, z, params, inverse)
    inside = torch.eq(inner, z, out=torch.empty_like(z))
    g_inside = g_out * inside
    g_z, *g_rows = spline._bin_gradient(inner, *rows, g_out=g_inside, g_log=g_log * inside, inverse=inverse)
    grads = params.new_empty(params.shape[0] + 1, N)  # a spare row for the slopes at the ends of the box
    flat = grads.view(-1)
    grads[2 * K :].zero_()
    flat[(2 * K - 1) * N :].scatter_(0, at, g_rows[4])
    flat[2 * K * N :].scatter_(0, at, g_rows[5])
    if spline._values_per_bin:
        grads[3 * K - 1].zero_()
        flat[(3 * K - 1) * N :].scatter_(0, at, g_rows[6])
    step = 2 * B * spline.min_bin / K
    offset = B - step * index
    for i in (0, 1):
        lower, upper = rows[2 * i : 2 * i + 2]
        g_lower, g_upper = g_rows[2 * i : 2 * i + 2]
        t = (lower + offset) * g_lower + (upper + (offset - step)) * g_upper
        block = grads[i * K : (i + 1) * K]
        torch.addcmul(-t, reached[1:], g_lower * spline._range, out=block)
        block.addcmul_(reached[:-1], g_upper * spline._range).mul_(probs[i])
    return g_z + (g_out - g_inside), grads[:-1]
