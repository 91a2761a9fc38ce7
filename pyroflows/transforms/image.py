"""Transforms of images ``(channels, height, width)``: squeezing, nesting, convolutions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform
from torch.distributions.utils import _sum_rightmost

from pyroflows.bijection import Bijection
from pyroflows.compose import Compose, as_bijection
from pyroflows.conditioners import Conv
from pyroflows.scalar import Affine, ScalarMap, maps_of_part
from pyroflows.transforms._common import AxisBijection
from pyroflows.transforms._factories import conditional
from pyroflows.transforms.coupling import Coupling, check_mask, half_mask

__all__ = [
    "Part",
    "Squeeze",
    "conditional_conv_coupling",
    "conv_coupling",
    "multi_scale",
    "squeeze",
]


class Squeeze(Bijection):
    r"""Trade space for depth: every block of f × f pixels becomes one pixel with more channels.

    ``(C, H, W)`` becomes ``(C f², H / f, W / f)``; channel ``c f² + i f + j`` of the result holds
    the pixels at row i and column j of the blocks of channel c. The log-determinant is 0.

    Args:
        factor: Width f of a block.
        input_dim: Shape of the event; open if None.

    Raises:
        ValueError: If ``factor`` is not positive, or (also when called) does not divide height and
            width.

    References:
        Dinh, Sohl-Dickstein, Bengio (2017), Density estimation using Real NVP, section 3.6.
        arXiv:1605.08803
    """

    domain = codomain = constraints.independent(constraints.real, 3)
    calls = (0, 0)

    def __init__(self, factor: int = 2, input_dim: Sequence[int] | None = None) -> None:
        super().__init__(input_dim)
        if factor < 1:
            raise ValueError(f"factor must be positive; got {factor}")
        self.factor = factor
        if self.event_shape is not None:
            self._map_shape(self.event_shape, inverse=False)

    def _map_shape(self, shape: torch.Size, inverse: bool) -> torch.Size:
        *batch, c, h, w = shape
        f = self.factor
        if inverse:
            if c % (f * f):
                raise ValueError(
                    f"Squeeze backwards expects a multiple of {f * f} channels; got {tuple(shape)}"
                )
            return torch.Size([*batch, c // (f * f), h * f, w * f])
        if h % f or w % f:
            raise ValueError(
                f"Squeeze expects height and width divisible by {f}; got {tuple(shape)}. "
                "Pad the images"
            )
        return torch.Size([*batch, c * f * f, h // f, w // f])

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        f = self.factor
        _, h, w = self._map_shape(x.shape[-3:], inverse=False)
        blocks = x.unflatten(-1, (w, f)).unflatten(-3, (h, f))  # (*batch, C, h, f, w, f)
        y = blocks.movedim((-3, -1), (-4, -3)).flatten(-5, -3)
        return y, x.new_zeros(x.shape[:-3])

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        f = self.factor
        c, _, _ = self._map_shape(y.shape[-3:], inverse=True)
        blocks = y.unflatten(-3, (c, f, f))  # (*batch, C, f, f, h, w)
        x = blocks.movedim((-4, -3), (-3, -1)).flatten(-2, -1).flatten(-3, -2)
        return x, y.new_zeros(y.shape[:-3])


class Part(AxisBijection):
    r"""Apply a bijection to the last entries along an axis and leave the others alone.

    Nested, it makes multi-scale flows without bookkeeping: what an outer level leaves alone is its
    share of the noise, see :func:`multi_scale`. Costs what the inner bijection costs.

    Args:
        inner: A bijection that keeps the shape of its event.
        input_dim: Entries along ``dim``, or the shape of the event.
        size: How many of them ``inner`` transforms, the last ones; half of them if None.
        dim: Negative axis.

    Raises:
        ValueError: If ``size`` is not between 1 and ``input_dim``, or ``inner`` changes shapes or
            has more than ``-dim`` event axes.

    References:
        Dinh, Sohl-Dickstein, Bengio (2017), Density estimation using Real NVP, section 3.6.
        arXiv:1605.08803
    """

    def __init__(
        self,
        inner: Transform,
        input_dim: int | Sequence[int],
        size: int | None = None,
        *,
        dim: int = -1,
    ) -> None:
        inner = as_bijection(inner)
        super().__init__(input_dim, dim, context_dim=inner.context_dim)
        self.moved = self.size // 2 if size is None else size
        if not 0 < self.moved <= self.size:
            raise ValueError(f"size must be between 1 and {self.size}; got {size}")
        self.extra = -dim - inner.domain.event_dim
        if self.extra < 0 or inner.codomain.event_dim != inner.domain.event_dim:
            raise ValueError(
                f"Part along dim {dim} expects an inner bijection of at most {-dim} event axes; "
                f"got one from {inner.domain.event_dim} to {inner.codomain.event_dim}"
            )
        shape = inner.event_shape
        if shape is not None and inner._map_shape(shape, inverse=False) != shape:
            raise ValueError(
                f"Part expects an inner bijection that keeps the shape {tuple(shape)}; "
                f"got {tuple(inner._map_shape(shape, inverse=False))}"
            )
        self.inner = inner

    @property
    def calls(self) -> tuple[float, float]:
        """Those of the inner bijection."""
        return self.inner.calls

    def _move(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        kept, moved = value.split([self.size - self.moved, self.moved], self.dim)
        moved, log_det = self.inner._step(moved, context, inverse)
        return torch.cat([kept, moved], self.dim), _sum_rightmost(log_det, self.extra)


def squeeze(factor: int = 2, input_dim: Sequence[int] | None = None) -> Squeeze:
    """Return :class:`Squeeze`, space to depth; its ``inv`` is depth to space."""
    return Squeeze(factor, input_dim)


def multi_scale(
    input_dim: Sequence[int],
    step: Callable[[tuple[int, int, int]], Transform | Sequence[Transform]],
    levels: int = 2,
    *,
    factor: int = 2,
) -> Compose:
    """Return a multi-scale bijection of images that keeps their shape: any base of it fits.

    Seen from the data, each level squeezes, takes its steps, and hands half of the channels to the
    next level; the other half is noise already. ``step`` makes the steps of one level, noise side
    first, for events of a shape ``(channels, height, width)``.

    Example:
        >>> import torch
        >>> from pyroflows import transforms as T
        >>> images = T.multi_scale((3, 8, 8), lambda shape: T.conv_coupling(shape[0]), levels=3)
        >>> images(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])

    Args:
        input_dim: Shape of the images, ``(channels, height, width)``.
        step: From the shape at a level to a bijection or a sequence of them, for events of that
            shape.
        levels: Number L of levels.
        factor: Width of the squeezed blocks.

    Raises:
        ValueError: If ``levels`` is not positive, or ``factor ** levels`` does not divide height
            and width.

    References:
        Dinh, Sohl-Dickstein, Bengio (2017), Density estimation using Real NVP, section 3.6.
        arXiv:1605.08803

        Kingma, Dhariwal (2018), Glow, figure 2. arXiv:1807.03039
    """
    if levels < 1:
        raise ValueError(f"levels must be positive; got {levels}")
    channels, height, width = input_dim
    down = Squeeze(factor, input_dim)
    c, h, w = down._map_shape(torch.Size(input_dim), inverse=False)
    parts: list[Transform] = [down]
    if levels > 1:
        inner = multi_scale((c // 2, h, w), step, levels - 1, factor=factor)
        parts.append(Part(inner, (c, h, w), c // 2, dim=-3))
    steps = step((c, h, w))
    parts += [steps] if isinstance(steps, Transform) else steps
    return Compose([*parts, Squeeze(factor, input_dim).inv])


def conv_coupling(
    channels: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    scalar: ScalarMap | None = None,
    mask: Tensor | Sequence[bool] | None = None,
    context_dim: int = 0,
    **network: Any,
) -> Coupling:
    """Return a coupling of the channels of images, with a convolutional conditioner.

    One network call in either direction. The identity at initialization.

    Args:
        channels: Number of channels, at least 2.
        hidden_dims: Channels of the conditioner's hidden layers; ``[64, 64]`` if None.
        scalar: The map; RealNVP's :class:`pyroflows.scalar.Affine` with |log-scale| < 2 if None.
        mask: True where a channel is moved; the second half if None.
        context_dim: Features of the context; 0 for none.
        **network: ``kernel_size`` and ``activation`` of :class:`pyroflows.conditioners.Conv`.

    Raises:
        ValueError: If there are fewer than 2 channels, or the mask does not fit.
    """
    if channels < 2:
        raise ValueError(f"conv_coupling needs at least 2 channels; got {channels}. Squeeze first")
    mask = check_mask(half_mask(channels) if mask is None else mask, channels)
    scalar = Affine(2.0) if scalar is None else scalar
    scalar = maps_of_part(scalar, [channels, 0, 0], mask.tolist(), -3)
    moved = int(mask.sum())
    conditioner = Conv(
        channels - moved,
        scalar.num_params,
        moved,
        context_dim=context_dim,
        hidden_dims=hidden_dims,
        **network,
    )
    return Coupling(scalar, conditioner, mask, dim=-3, context_dim=context_dim)


conditional_conv_coupling = conditional(conv_coupling)
