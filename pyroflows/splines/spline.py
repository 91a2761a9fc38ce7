"""What both splines share: knots from softmaxes, the search for the bin, the tails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pyroflows.scalar import Params
from pyroflows.splines.kernels import evaluate

__all__ = ["Spline"]


@dataclass(frozen=True)
class Spline:
    """What both splines share: knots from softmaxes, the search for the bin, the tails."""

    count_bins: int = 8
    bound: float = 3.0
    min_bin: float = 0.1
    max_slope: float = 20.0
    values_per_bin: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.count_bins < 1:
            raise ValueError(f"count_bins must be at least 1; got {self.count_bins}")
        if not 0 < self.bound < math.inf:
            raise ValueError(f"bound must be positive and finite; got {self.bound}")
        if not 0 < self.min_bin < 1:
            raise ValueError(
                "min_bin is the smallest bin as a fraction of the mean bin and must lie between "
                f"0 and 1; got {self.min_bin}"
            )
        if not 1 < self.max_slope < math.inf:
            raise ValueError(f"max_slope must be above 1 and finite; got {self.max_slope}")

    @property
    def num_params(self) -> int:
        """Rows of ``params``: widths, heights, interior slopes, and further values of each bin."""
        return (3 + self.values_per_bin) * self.count_bins - 1

    def forward(self, x: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return y and log|dy/dx|, both of x's shape."""
        return evaluate(self, x, params, inverse=False)

    def inverse(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return x and log|dx/dy|, both of y's shape."""
        return evaluate(self, y, params, inverse=True)

    @property
    def spread(self) -> float:
        """Weight of the cumulative softmax c in the knots -B + 2B (m k / K + (1 - m) c_k)."""
        return 2 * self.bound * (1 - self.min_bin)

    def even_knots(self, like: Tensor) -> Tensor:
        """What is added to c's part to give all K + 1 knots; at both ends c counts as 0."""
        B, K = self.bound, self.count_bins
        last = 2 * B * self.min_bin - B
        even = torch.linspace(-B, last, K + 1, dtype=like.dtype, device=like.device)
        even[-1].fill_(B)  # exactly
        return even

    def reference(self, z: Tensor, params: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """Evaluate by differentiable operations.

        ``params`` has as many axes behind its rows as ``z``, and may broadcast against it.
        """
        K, B = self.count_bins, self.bound
        edges = [0, 0] * z.dim() + [1, 1]  # for F.pad: a zero at both ends of the axis of knots
        even = self.even_knots(z).reshape(-1, *[1] * z.dim())
        c = params[: 2 * K].unflatten(0, (2, K)).softmax(1)[:, :-1].cumsum(1)
        knots = torch.add(even, F.pad(c, edges), alpha=self.spread)
        slopes = F.pad(params[2 * K : 3 * K - 1], edges)
        inner = z.clamp(-B, B)
        index = (inner >= knots[int(inverse), 1:K]).sum(0)
        at = torch.stack([index, index + 1])
        bins = [
            knots.expand(-1, -1, *z.shape).gather(1, at.expand(2, *at.shape)),
            slopes.expand(-1, *z.shape).gather(0, at),
        ]
        if self.values_per_bin:
            bins.append(params[3 * K - 1 :].expand(-1, *z.shape).gather(0, at[:1])[0])
        out, log_slope, *_ = self.in_bin(inner, *bins, inverse=inverse)
        inside = inner == z
        return torch.where(inside, out, z), log_slope * inside

    def in_bin(
        self, z: Tensor, ends: Tensor, raw_slopes: Tensor, *raw_bin: Tensor, inverse: bool
    ) -> tuple[Tensor, ...]:
        """The map inside one bin.

        Args:
            z: Input, clamped to the box; any shape.
            ends: x and y (first axis) of the lower and the upper end of the bin (second axis);
                shape ``(2, 2, *shape)``.
            raw_slopes: Unbounded log-slopes at both ends; shape ``(2, *shape)``.
            *raw_bin: Further values of the bin, of the shape of ``z``.
            inverse: The direction.

        Returns:
            The output, the log-slope, and whatever `in_bin_gradient` shall be given again.
        """
        raise NotImplementedError(f"{type(self).__name__} is no spline by itself")

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
        """Gradients of g_out · out + g_log · log_slope, one for each tensor given to `in_bin`.

        Gradients are named ``g_`` and what they belong to. Read backwards, the map is implicit:
        out solves y(out) = z, and log_slope is -log y'(out). So g_out turns into a gradient of y,
        g_y = -(g_out + ...) / y', and from there on both directions are one.

        Args:
            ends: As in `in_bin`; shape (2, 2, N).
            raw_slopes: As in `in_bin`; shape (2, N).
            raw_bin: As in `in_bin`.
            known: What `in_bin` has returned after the log-slope.
            g_out: Gradient of the output; shape (N,).
            g_log: Gradient of the log-slope; shape (N,).
            inverse: The direction.
        """
        raise NotImplementedError(f"{type(self).__name__} is no spline by itself")
