"""Kernels of the splines, with an analytic backward, and the choice between them and the formula.

They save the inputs and, for each element, its bin and its place there (10 or 14 numbers), and
compute the softmaxes again; they work in the memory order of the parameters, since the input is
the smaller one to transpose; and they go through the tall arrays of ``count_bins`` rows as few
times as possible. With few elements the price is that of the calls, to be counted: a view costs as
much as a product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyroflows.numerics import gradients_of, plain
from pyroflows.scalar import Params

if TYPE_CHECKING:
    from pyroflows.splines.spline import Spline

__all__ = ["evaluate"]


def evaluate(spline: Spline, z: Tensor, params: Params, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """Bring dtypes and shapes together, and choose the path."""
    if not isinstance(params, Tensor):
        params = torch.stack(torch.broadcast_tensors(*params))
    if params.dim() == 0 or params.shape[0] != spline.num_params:
        raise ValueError(
            f"{type(spline).__name__} with {spline.count_bins} bins expects params of shape "
            f"({spline.num_params}, *x.shape); got {tuple(params.shape)}"
        )
    if z.dtype != params.dtype or z.dtype.itemsize < 4:  # half precision is computed in single
        dtype = torch.promote_types(z.dtype, params.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        out, log_slope = evaluate(spline, z.to(wide), params.to(wide), inverse=inverse)
        return out.to(dtype), log_slope.to(dtype)
    if params.shape[1:] != z.shape:
        shape = torch.broadcast_shapes(z.shape, params.shape[1:])
        missing = len(shape) + 1 - params.dim()
        params = params.reshape(params.shape[0], *[1] * missing, *params.shape[1:])
        return spline.reference(z.expand(shape), params, inverse=inverse)
    if not plain(z, params):
        return spline.reference(z, params, inverse=inverse)
    return _Map.apply(spline, inverse, z, params)


class _Map(torch.autograd.Function):
    """(z, params) -> (out, log_slope) by the kernels."""

    @staticmethod
    def forward(
        ctx: Any, spline: Spline, inverse: bool, z: Tensor, params: Tensor
    ) -> tuple[Tensor, Tensor]:
        layout = _Layout(params)
        kernel = partial(_map_rows, spline, inverse, any(ctx.needs_input_grad))
        out, log_slope, *place = _in_parts(kernel, layout.flatten(z), layout.rows(params))
        ctx.spline, ctx.inverse, ctx.layout = spline, inverse, layout
        ctx.save_for_backward(z, params, *place)
        # .data: a view leaving a Function with two outputs could not be changed in place.
        return layout.restore(out).data, layout.restore(log_slope).data

    @staticmethod
    def backward(ctx: Any, g_out: Tensor, g_log: Tensor) -> tuple[Tensor | None, ...]:
        z, params, *place = ctx.saved_tensors
        if torch.is_grad_enabled() or not plain(g_out, g_log):
            formula = partial(ctx.spline.reference, inverse=ctx.inverse)
            needs = ctx.needs_input_grad[2:]
            return None, None, *gradients_of(formula, (z, params), needs, (g_out, g_log))
        layout, kernel = ctx.layout, partial(_gradient_rows, ctx.spline, ctx.inverse)
        columns = (layout.flatten(g_out), layout.flatten(g_log), layout.rows(params))
        g_z, g_params = _in_parts(kernel, *columns, *place)
        return None, None, layout.restore(g_z), layout.restore(g_params)


class _Layout:
    """The memory order of parameters (num_params, *shape), into which the rest is brought."""

    def __init__(self, params: Tensor) -> None:
        stride = params.stride()[1:]
        order = sorted(range(len(stride)), key=lambda i: -stride[i])
        self.in_order = params.is_contiguous() or order == sorted(order)
        self.order = sorted(order) if self.in_order else order
        self.back = sorted(range(len(order)), key=self.order.__getitem__)
        self.shape = [params.shape[i + 1] for i in self.order]

    def flatten(self, z: Tensor) -> Tensor:
        """(N,) from a tensor of the logical shape."""
        return (z if self.in_order else z.permute(self.order)).reshape(-1)

    def rows(self, params: Tensor) -> Tensor:
        """(num_params, N) from the parameters; a view unless their memory has holes."""
        if not self.in_order:
            params = params.permute(0, *(i + 1 for i in self.order))
        return params.reshape(params.shape[0], -1)

    def restore(self, flat: Tensor) -> Tensor:
        """The logical shape from (N,) or (num_params, N)."""
        lead = flat.shape[:-1]
        full = flat.view((*lead, *self.shape))
        if self.in_order:
            return full
        return full.permute(*range(len(lead)), *(i + len(lead) for i in self.back))


_CHUNK = 1 << 15  # columns for each thread: the scratch memory of the kernels stays near the core


def _in_parts(kernel: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Call an elementwise kernel on (..., N) tensors, in chunks of columns if there are many."""
    N, chunk = tensors[0].numel(), _CHUNK * torch.get_num_threads()
    if N <= 2 * chunk or tensors[0].device.type != "cpu":
        return kernel(*tensors)
    parts = [kernel(*(t[..., i : i + chunk] for t in tensors)) for i in range(0, N, chunk)]
    return tuple(torch.cat(part, -1) for part in zip(*parts, strict=True))


def _map_rows(
    spline: Spline, inverse: bool, keep: bool, z: Tensor, params: Tensor
) -> tuple[Tensor, ...]:
    """The map on (N,) and (num_params, N), without a graph.

    Returns:
        The output and the log-slope (N,). If ``keep``, also what `gradient_rows` needs: whether
        the element is in the box, as a float (N,); the index of its bin, as a float (N,); the bin,
        (6, N) or (7, N): x of both ends, y of both ends, raw slopes at both ends, raw value; and
        what the spline knows of the place in the bin, each (..., N).
    """
    K, B, N = spline.count_bins, spline.bound, z.numel()
    probs, tables = params.new_empty(2, K, N), params.new_empty(3, K + 1, N)
    torch.softmax(params[: 2 * K].view(2, K, N), 1, out=probs)
    tables[:, ::K].zero_()
    knots = tables[:2]
    if K > 1:
        if z.is_cuda:  # few launches
            torch.cumsum(probs[:, : K - 1], 1, out=knots[:, 1:K])
        else:  # a third of the time of torch.cumsum on the CPU
            c, p = knots.unbind(1), probs.unbind(1)
            for k in range(1, K):
                torch.add(c[k - 1], p[k - 1], out=c[k])
        tables[2, 1:K].copy_(params[2 * K : 3 * K - 1])
    torch.add(spline.even_knots(z)[:, None], knots, alpha=spline.spread, out=knots)
    inner = z.clamp(-B, B)
    passed = torch.ge(inner, knots[int(inverse), 1:K], out=params.new_empty(K - 1, N))
    index = passed.sum(0)
    bins = tables.view(3, -1).index_select(1, _positions(index)).view(6, N)
    if spline.values_per_bin:
        bins = torch.cat([bins, params[3 * K - 1 :].gather(0, index.long()[None])])
    out, log_slope, *known = spline.in_bin(inner, *_split(bins), inverse=inverse)
    is_inside = inner == z
    inside = is_inside.to(z.dtype)
    result = torch.where(is_inside, out, z), log_slope.mul_(inside)
    return (*result, inside, index, bins, *known) if keep else result


def _gradient_rows(
    spline: Spline,
    inverse: bool,
    g_out: Tensor,
    g_log: Tensor,
    params: Tensor,
    inside: Tensor,
    index: Tensor,
    bins: Tensor,
    *known: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients (N,) and (num_params, N).

    Logit j of the widths moves the lower end of the bin if j < bin, the upper end if j <= bin. So
    the adjoint of softmax and cumulative sum is p_j ([j < bin] g_lower + [j <= bin] g_upper - t),
    where t = c_lower g_lower + c_upper g_upper is known from the bin: no reduction over the rows.
    """
    K, N = spline.count_bins, index.numel()
    ends, raw_slopes, *raw_bin = _split(bins)
    g_inside = g_out * inside
    g_z, g_ends, g_slopes, *g_bin = spline.in_bin_gradient(
        ends, raw_slopes, raw_bin, known, g_out=g_inside, g_log=g_log * inside, inverse=inverse
    )
    # Rows 2K - 1 and 3K - 1 take what falls to the slopes at ±bound, which have no parameter.
    grads = params.new_empty(params.shape[0] + 1, N)
    at = _positions(index)
    grads[2 * K :].zero_()
    grads[2 * K - 1 :].view(-1).scatter_(0, at, g_slopes.view(-1))
    if spline.values_per_bin:
        grads[3 * K - 1].zero_()
        grads[3 * K - 1 :].view(-1).scatter_(0, at[:N], *g_bin)
    step = 2 * spline.bound * spline.min_bin / K
    c_spread = ends + index.mul(-step).add_(spline.bound)  # too large by a step at the upper end
    t = (c_spread.mul_(g_ends)).sum(1)
    t = torch.sub(t, g_ends[:, 1], alpha=step).neg_()
    g_lower, g_upper = g_ends.mul_(spline.spread).unsqueeze(2).unbind(1)
    before = torch.arange(-1, K, dtype=index.dtype, device=index.device)[:, None]
    above = torch.gt(index, before, out=params.new_empty(K + 1, N))  # [j - 1 < bin]
    logits = grads[: 2 * K].view(2, K, N)
    torch.addcmul(t[:, None], above[1:], g_lower, out=logits)
    logits.addcmul_(above[:-1], g_upper)
    logits *= torch.softmax(params[: 2 * K].view(2, K, N), 1)
    return g_z.add_(g_out - g_inside), grads[:-1]


def _positions(index: Tensor) -> Tensor:
    """Where rows index and index + 1 of each column lie in a flat (rows, N) table: (2 N,)."""
    N = index.numel()
    columns = torch.arange(2 * N, device=index.device).view(2, N)
    return columns.add_(index.long(), alpha=N).view(-1)


def _split(bins: Tensor) -> tuple[Tensor, ...]:
    """The arguments of `in_bin` after the first, from the rows that are saved."""
    return bins[:4].view(2, 2, -1), bins[4:6], *bins[6:]
