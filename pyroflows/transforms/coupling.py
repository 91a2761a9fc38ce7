"""Couplings: one part of the event moves the other. NICE, RealNVP and neural spline flows."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.conditioners import Dense, default_hidden_dims
from pyroflows.memory import Twin
from pyroflows.scalar import Affine, ScalarMap, Shift, maps_of_part
from pyroflows.transforms._common import AxisBijection, axis_shape
from pyroflows.transforms._factories import conditional, spline_map
from pyroflows.transforms.elementwise import Elementwise, elementwise

__all__ = [
    "Coupling",
    "additive_coupling",
    "affine_coupling",
    "alternating_mask",
    "conditional_additive_coupling",
    "conditional_affine_coupling",
    "conditional_spline_coupling",
    "coupling",
    "half_mask",
    "spline_coupling",
]


class Coupling(AxisBijection):
    r"""Move one part of the event by a scalar map whose parameters the other part sets.

    .. math:: y_a = x_a, \qquad y_b = g\big(x_b;\, \theta(x_a, c)\big)

    One network call in either direction. The identity at initialization.

    Args:
        scalar: The map :math:`g`; see :mod:`pyroflows.scalar`.
        conditioner: Network ``(x_a, c) -> θ`` of shape ``(scalar.num_params, *batch, *event_b)``.
        mask: True where the event is moved; shape ``(n,)`` along ``dim``.
        dim: Negative axis that is split; the event has ``-dim`` axes.
        context_dim: Features of the context ``c``, shape ``(*batch, context_dim)``; 0 for none.
        event_shape: Shape of the event where it is known, of ``-dim`` axes.

    Raises:
        ValueError: If the mask moves nothing or everything, or ``dim`` is not negative.

    References:
        Dinh, Sohl-Dickstein, Bengio (2017), Density estimation using Real NVP, eqs. 7-8.
        arXiv:1605.08803
    """

    moved_index: Tensor
    kept_index: Tensor
    restore_index: Tensor

    def __init__(
        self,
        scalar: ScalarMap,
        conditioner: nn.Module,
        mask: Tensor | Sequence[bool],
        *,
        dim: int = -1,
        context_dim: int = 0,
        event_shape: Sequence[int] | None = None,
    ) -> None:
        mask = check_mask(mask)
        super().__init__(event_shape or len(mask), dim, context_dim=context_dim)
        check_mask(mask, self.size)
        self.scalar, self.conditioner = scalar, conditioner
        kept, moved = (~mask).nonzero().flatten(), mask.nonzero().flatten()
        for name, index in (
            ("kept_index", kept),
            ("moved_index", moved),
            ("restore_index", torch.cat([kept, moved]).argsort()),
        ):
            self.register_buffer(name, torch.tensor(index.tolist()))
        self._known: Twin[int] = Twin()
        self._halves()

    def _halves(self) -> int:
        """Halves need no index: 1 if the kept half is in front, -1 if behind, else 0."""
        return self._known.read(_find_halves, self.kept_index, self.moved_index) or 0

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._halves()

    @property
    def calls(self) -> tuple[float, float]:
        """One network call in either direction."""
        return 1, 1

    def _split(self, value: Tensor, halves: int) -> tuple[Tensor, Tensor]:
        """Return the kept and the moved part."""
        # views of halves make torch.compile negate a gradient in place (inductor of torch 2.13)
        if not halves or torch.compiler.is_compiling():
            return (
                value.index_select(self.dim, self.kept_index),
                value.index_select(self.dim, self.moved_index),
            )
        n = len(self.kept_index) if halves > 0 else len(self.moved_index)
        front, behind = value.split([n, self.size - n], self.dim)  # one copy backward
        return (front, behind) if halves > 0 else (behind, front)

    def _merge(self, kept: Tensor, moved: Tensor, halves: int) -> Tensor:
        if halves:
            return torch.cat((kept, moved) if halves > 0 else (moved, kept), self.dim)
        return torch.cat((kept, moved), self.dim).index_select(self.dim, self.restore_index)

    def _move(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        halves = self._halves()
        kept, moved = self._split(value, halves)
        params = self.conditioner(kept, context)
        move = self.scalar.inverse if inverse else self.scalar.forward
        moved, log_slope = move(moved, params)
        log_det = log_slope.flatten(self.dim).sum(-1) if self.dim < -1 else log_slope.sum(-1)
        return self._merge(kept, moved, halves), log_det

    def extra_repr(self) -> str:
        """Name the map and what moves."""
        return f"{self.scalar}, moves {len(self.moved_index)} of {self.size} along dim {self.dim}"


def _find_halves(kept_index: Tensor, moved_index: Tensor) -> int:
    kept, moved = kept_index.tolist(), moved_index.tolist()
    front, behind = kept[-1] == len(kept) - 1, moved[-1] == len(moved) - 1
    return 1 if front else -1 if behind else 0


def check_mask(mask: Tensor | Sequence[bool], size: int | None = None) -> Tensor:
    """Return a mask as a boolean vector on the CPU.

    Raises:
        ValueError: If it is no vector (of ``size`` entries), or moves nothing or everything.
    """
    mask = torch.as_tensor(mask, device="cpu").detach().bool()
    if size is not None and mask.shape != (size,):
        raise ValueError(f"mask must have shape ({size},); got {tuple(mask.shape)}")
    if mask.dim() != 1 or mask.all() or not mask.any():
        raise ValueError(
            f"mask must be a vector that moves some entries and keeps some; got {mask.tolist()}"
        )
    return mask


def half_mask(input_dim: int, *, split_dim: int | None = None, swap: bool = False) -> Tensor:
    """Return a mask, shape ``(input_dim,)``, that moves all but the first ``split_dim`` entries.

    Args:
        input_dim: Length of the mask.
        split_dim: Entries kept; ``input_dim // 2`` if None.
        swap: Whether to move the first ``split_dim`` entries instead.
    """
    split_dim = input_dim // 2 if split_dim is None else split_dim
    behind = torch.arange(input_dim, device="cpu") >= split_dim
    return ~behind if swap else behind


def alternating_mask(input_dim: int, *, swap: bool = False) -> Tensor:
    """Return a mask, shape ``(input_dim,)``, that moves the odd entries, with ``swap`` the even.

    Example:
        >>> from pyroflows.transforms import alternating_mask
        >>> alternating_mask(4).tolist()
        [False, True, False, True]
    """
    return torch.arange(input_dim, device="cpu") % 2 == (0 if swap else 1)


def coupling(
    scalar: ScalarMap,
    input_dim: int | Sequence[int],
    hidden_dims: Sequence[int] | None = None,
    *,
    split_dim: int | None = None,
    dim: int = -1,
    mask: Tensor | Sequence[bool] | None = None,
    context_dim: int = 0,
    **network: Any,
) -> Coupling | Elementwise:
    """Return a coupling with a dense conditioner for any scalar map.

    One network call in either direction. With a single entry along ``dim`` there is nothing to
    couple: the result is then the elementwise map, whose parameters are free or depend on the
    context alone.

    Args:
        scalar: The map; see :mod:`pyroflows.scalar`.
        input_dim: Features of the event, or its shape (of ``-dim`` axes).
        hidden_dims: Widths of the conditioner; two layers of ten units a feature, 32 to 256, if
            None.
        split_dim: Entries kept, the first ones; half of them if None.
        dim: Negative axis that is split.
        mask: True where the event is moved, instead of ``split_dim``.
        context_dim: Features of the context; 0 for none.
        **network: ``residual`` and ``activation`` of :class:`pyroflows.conditioners.Dense`.

    Raises:
        ValueError: If ``input_dim``, ``dim``, ``split_dim`` and ``mask`` do not fit together.
    """
    event_shape = axis_shape([input_dim] if isinstance(input_dim, int) else input_dim, dim)
    n, rest = event_shape[0], event_shape[1:]
    if n == 1:
        return elementwise(
            scalar, event_shape, context_dim=context_dim, hidden_dims=hidden_dims, **network
        )
    if mask is None:
        if split_dim is not None and not 0 < split_dim < n:
            raise ValueError(f"split_dim must be between 1 and {n - 1}; got {split_dim}")
        mask = half_mask(n, split_dim=split_dim)
    mask = check_mask(mask, n)
    if hidden_dims is None:
        hidden_dims = default_hidden_dims(math.prod(event_shape), context_dim)
    scalar = maps_of_part(scalar, event_shape, mask.tolist(), dim)
    moved = int(mask.sum())
    conditioner = Dense(
        [n - moved, *rest],
        scalar.num_params,
        [moved, *rest],
        context_dim=context_dim,
        hidden_dims=hidden_dims,
        **network,
    )
    return Coupling(
        scalar, conditioner, mask, dim=dim, context_dim=context_dim, event_shape=event_shape
    )


def additive_coupling(
    input_dim: int | Sequence[int],
    hidden_dims: Sequence[int] | None = None,
    split_dim: int | None = None,
    dim: int = -1,
    **kwargs: Any,
) -> Coupling | Elementwise:
    """NICE's volume-preserving coupling y_b = x_b + t(x_a); arguments as in :func:`coupling`.

    References:
        Dinh, Krueger, Bengio (2015), NICE, section 3.2. arXiv:1410.8516
    """
    return coupling(Shift(), input_dim, hidden_dims, split_dim=split_dim, dim=dim, **kwargs)


def affine_coupling(
    input_dim: int | Sequence[int],
    hidden_dims: Sequence[int] | None = None,
    split_dim: int | None = None,
    dim: int = -1,
    *,
    log_scale_min_clip: float = -4.0,
    log_scale_max_clip: float = 4.0,
    **kwargs: Any,
) -> Coupling | Elementwise:
    """RealNVP's coupling y_b = exp(s(x_a)) x_b + t(x_a); further arguments as in :func:`coupling`.

    The log-scale is bounded smoothly, at ± the larger magnitude of the two clips.

    Example:
        >>> import torch
        >>> from pyroflows import transforms as T
        >>> layer = T.affine_coupling(3, context_dim=2)
        >>> context, x = torch.randn(7, 2), torch.zeros(7, 3)
        >>> layer.condition(context).log_abs_det_jacobian(x, x).shape
        torch.Size([7])

    References:
        Dinh, Sohl-Dickstein, Bengio (2017), Density estimation using Real NVP, eqs. 7-8.
        arXiv:1605.08803
    """
    scalar = Affine(max(-log_scale_min_clip, log_scale_max_clip))
    return coupling(scalar, input_dim, hidden_dims, split_dim=split_dim, dim=dim, **kwargs)


def spline_coupling(
    input_dim: int | Sequence[int],
    split_dim: int | None = None,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    order: str = "quadratic",
    **kwargs: Any,
) -> Coupling | Elementwise:
    """Neural spline flow's coupling: a monotone rational spline, the identity beyond ±bound.

    ``count_bins``, ``bound`` and ``order`` are as in :func:`pyroflows.transforms.spline`, the
    other arguments as in :func:`coupling`.

    Example:
        >>> import torch
        >>> from pyroflows import transforms as T
        >>> layer = T.spline_coupling(5, count_bins=6)
        >>> layer.calls  # network calls, from noise to data and back
        (1, 1)
        >>> x = torch.randn(10, 5)
        >>> torch.allclose(layer.inv(layer(x)), x)
        True

    References:
        Durkan, Bekasov, Murray, Papamakarios (2019), Neural spline flows. arXiv:1906.04032
    """
    scalar = spline_map(count_bins, bound, order)
    return coupling(scalar, input_dim, hidden_dims, split_dim=split_dim, **kwargs)


conditional_additive_coupling = conditional(additive_coupling)
conditional_affine_coupling = conditional(affine_coupling)
conditional_spline_coupling = conditional(spline_coupling)
