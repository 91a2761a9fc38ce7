"""Standardization as a part of the density: fixed maps between data units and unit scale."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from pyroflows.bijection import Bijection
from pyroflows.compose import Compose
from pyroflows.memory import Twin, tensors_of
from pyroflows.supports import is_real

__all__ = ["Standardized", "Units"]


class Units(Bijection):
    r"""The fixed map from unit scale to the units of some rows: :math:`y = m + s \, x`.

    The identity, at no cost, until :meth:`fit_to` sets location m and scale s. They are buffers:
    saved, moved and converted with the module, and not learned.

    Args:
        event_shape: Shape of one row.
    """

    loc: Tensor
    scale: Tensor
    calls = (0, 0)

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape)
        self.domain = self.codomain = constraints.independent(constraints.real, len(event_shape))
        self.register_buffer("loc", torch.zeros(tuple(event_shape)))
        self.register_buffer("scale", torch.ones(tuple(event_shape)))
        self._known: Twin[bool] = Twin()
        _ = self.active  # a recorded graph cannot look

    @property
    def active(self) -> bool:
        """Whether the map is anything but the identity."""
        return bool(self._known.read(_differ, self.loc, self.scale))

    @torch.no_grad()
    def fit_to(
        self,
        rows: Tensor,
        weight: Tensor | None = None,
        *,
        name: str = "x",
        binary: bool = False,
    ) -> None:
        """Set location and scale so that ``rows`` are standard: mean 0, standard deviation 1.

        One pair for each feature, or each channel of events of three axes or more, in double
        precision. A constant feature has scale 1.

        Args:
            rows: Shape ``(n, *event)``.
            weight: Non-negative, shape ``(n,)``.
            name: What the rows are, for errors.
            binary: Whether a feature that has two values becomes 0 and 1 instead.

        Raises:
            ValueError: If the rows have another shape, none is finite, or the dtype of the buffers
                cannot hold the variation of a feature.
        """
        if rows.shape[1:] != self.loc.shape:
            raise ValueError(
                f"standardization expects {name} of shape (n, "
                f"{', '.join(map(str, self.loc.shape))}); got {tuple(rows.shape)}"
            )
        loc, scale, peak = _location_and_scale(_by_feature(rows), weight, binary)
        eps = torch.finfo(self.loc.dtype).eps
        coarse = (scale > 0) & (scale < 64 * eps * peak)
        if coarse.any():
            i = int((scale / peak).where(coarse, torch.inf).argmin())
            message = (
                f"feature {i} of {name} varies by {float(scale[i]):.3g} about {float(loc[i]):.6g},"
                f" where {self.loc.dtype} holds steps of {eps * float(peak[i]):.2g}: subtract an "
                "offset, or use double precision, flow.double() and float64 values"
            )
            if scale[i] < eps * peak[i]:
                raise ValueError(message)
            warnings.warn(message, stacklevel=4)
        shape = self.loc.shape if self.loc.dim() < 3 else (*loc.shape, 1, 1)
        self.loc.copy_(loc.reshape(shape))
        self.scale.copy_(torch.where(scale > 0, scale, 1.0).reshape(shape))
        _ = self.active

    @torch.no_grad()
    def reset(self) -> None:
        """Be the identity again."""
        self.loc.zero_()
        self.scale.fill_(1)
        _ = self.active

    def standardize(self, value: Tensor) -> Tensor:
        """Return values without units; the tensor itself while the map is the identity."""
        return (value - self.loc) / self.scale if self.active else value

    def _log_det(self, value: Tensor) -> Tensor:
        """log|det| of the way to the units, shape batch."""
        batch = value.shape[: value.dim() - self.loc.dim()]
        return self.scale.log().sum().expand(batch)

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.loc + self.scale * x, self._log_det(x)

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return (y - self.loc) / self.scale, -self._log_det(y)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *rest: Any
    ) -> None:
        if strict and not {prefix + "loc", prefix + "scale"} & state_dict.keys():
            self.reset()  # a file without units: no standardization
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *rest)
        _ = self.active

    def extra_repr(self) -> str:
        """Say whether there are units."""
        return f"event_shape={tuple(self.event_shape or ())}" + ("" if self.active else ", unset")


class Standardized(Compose):
    r"""Bijections one after the other, with standardization of the event and of the context.

    .. math:: y = m + s \, f\Big(x; \frac{c - m_c}{s_c}\Big)

    Both maps are the identity until they are set. Where the last parts bound the values, the units
    are those before these parts, so that the support stays: of the logarithm of positive values,
    say. There are no ``units`` where the whole chain is bounded.

    Args:
        parts: Bijections, noise side first.
        event_shape: Shape of the noise; None for an unknown one, which leaves ``units`` out.
        context_dim: Features of the context, also where it is only the base that looks at it.
        free: Whether the noise may be scaled: its support is the whole space.

    Raises:
        ValueError: As :class:`pyroflows.bijection.Compose`.
    """

    _title = "Flow"  # which is what users have in hand

    def __init__(
        self,
        parts: Sequence[Transform | Bijection],
        event_shape: torch.Size | None,
        *,
        context_dim: int = 0,
        free: bool = True,
    ) -> None:
        super().__init__(parts)
        self.context_dim = self.context_dim or context_dim
        self.seam: int | None = None
        if event_shape is not None:
            self._lift(event_shape)
            self.seam = _seam(list(self), free)
        if event_shape is not None and self.seam is not None:
            for part in list(self)[: self.seam]:
                event_shape = part._map_shape(event_shape, inverse=False)
            self.units = Units(event_shape)
        if self.context_dim:
            self.context_units = Units([self.context_dim])

    def _lift(self, event_shape: torch.Size) -> None:
        """Sum the log-determinants of parts that act on single numbers over the whole event."""
        if self.event_shape not in (None, event_shape):
            raise ValueError(
                f"Flow: the base gives events of shape {tuple(event_shape)}, but the transforms "
                f"expect {tuple(self.event_shape)}"
            )
        lift = len(event_shape) - self.domain.event_dim
        if lift > 0:
            self.domain = constraints.independent(self.domain, lift)
            self._last_codomain = constraints.independent(self._last_codomain, lift)
            self._extra_dims = [extra + lift for extra in self._extra_dims]

    def _steps(self) -> list[tuple[Bijection, int]]:
        steps = super()._steps()
        if self.seam is not None and self.units.active:
            steps.insert(self.seam, (self.units, 0))
        return steps

    def _move(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if context is not None:
            context = self.context_units.standardize(context)
        return super()._move(value, context, inverse)

    def _check_kind(self, value: Tensor) -> None:
        # unset units are no reason to refuse a dtype
        if next((t for t in tensors_of(self.parts) if t.is_floating_point()), None) is not None:
            super()._check_kind(value)

    @torch.no_grad()
    def before_seam(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Return values as the units see them: the data, less the parts that bound them."""
        if self.seam == len(self.parts):
            return y  # in its own dtype, which may be finer
        y = y.to(self.units.loc)
        if context is not None and self.context_dim:
            context = self.context_units.standardize(context.to(self.units.loc))
        for part in reversed(self.parts[self.seam :]):
            y = part._step(y, context, inverse=True)[0]
        return y


def _seam(parts: Iterable[Bijection], free: bool) -> int | None:
    """After how many parts values are last free of bounds; None if they never are."""
    seam = 0 if free else None
    for k, part in enumerate(parts, 1):
        # a part from the line to the line keeps the bounds that an earlier one brought in
        free = is_real(part.codomain) and (free or not is_real(part.domain))
        seam = k if free else seam
    return seam


def _by_feature(rows: Tensor) -> Tensor:
    """Rows as ``(n, features, values)``, where all values of a feature share a scale."""
    if rows.dim() > 3:  # images: the channels are the features
        rows = rows.movedim(-3, 1)
        return rows.reshape(*rows.shape[:2], math.prod(rows.shape[2:]))
    return rows.reshape(len(rows), math.prod(rows.shape[1:]), 1)


def _location_and_scale(
    values: Tensor, weight: Tensor | None, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Location, scale (0 if constant) and largest magnitude of each feature, in float64."""
    keep = values.isfinite().flatten(1).all(-1)
    weight = values.new_ones(len(values)) if weight is None else weight.to(values.device)
    keep &= weight > 0
    if not keep.any():
        raise ValueError("standardization needs finite rows of positive weight; got none")
    weight = weight[keep].double()
    weight = weight / (weight.sum() * values.shape[-1])
    count = max(1, 2**22 // values[:, :1].numel())  # features at once: the copies stay small
    blocks = [_of_features(v[keep].double(), weight, binary) for v in values.split(count, 1)]
    loc, scale, peak = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return loc, scale, peak


def _of_features(values: Tensor, weight: Tensor, binary: bool) -> tuple[Tensor, Tensor, Tensor]:
    low, high = values.amin((0, 2)), values.amax((0, 2))
    peak = torch.maximum(low.abs(), high.abs())
    unit = torch.where(peak > 0, peak, 1.0)  # so that no square overflows
    scaled = values / unit[:, None] - (low / unit)[:, None]  # zero, and exact, if constant
    mean = torch.einsum("n,nfv->f", weight, scaled)
    var = torch.einsum("n,nfv->f", weight, (scaled - mean[:, None]).square())
    loc, scale = low + mean * unit, var.sqrt() * unit
    scale = torch.where(scale > 4 * torch.finfo(scale.dtype).eps * peak, scale, 0.0)
    if binary:
        ends = ((values == low[:, None]) | (values == high[:, None])).all(0).all(-1) & (scale > 0)
        loc, scale = torch.where(ends, low, loc), torch.where(ends, high - low, scale)
    return torch.where(scale > 0, loc, low), scale, peak


def _differ(loc: Tensor, scale: Tensor) -> bool:
    """Whether location and scale are anything but those of the identity."""
    return bool(((loc != 0) | (scale != 1)).any())
