r"""Scalar maps: monotone functions g(x; θ) of one real number, applied elementwise.

Each is a frozen dataclass with ``num_params`` and two methods::

    y, log_slope = g.forward(x, params)     # log_slope = log|dy/dx|
    x, log_slope = g.inverse(y, params)     # log_slope = log|dx/dy|

Parameters come first: ``params`` is ``(num_params, *shape)``, a tensor or a tuple of tensors,
where ``shape`` broadcasts with that of x, so that ``shift, raw = params`` unpacks. Every map is
the identity at θ = 0 and takes the dtype and device of its inputs. Splines, which are longer, live
in :mod:`pyroflows.splines` under the same contract; :mod:`pyroflows.families` makes maps of
distributions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

__all__ = [
    "Affine",
    "Chain",
    "Params",
    "PerFeature",
    "ScalarMap",
    "Scale",
    "Shift",
    "map_of_feature",
    "maps_of_part",
]

Params = Tensor | tuple[Tensor, ...]


class ScalarMap(Protocol):
    """What a scheme asks of a scalar map."""

    @property
    def num_params(self) -> int:
        """Parameters for each scalar."""

    def forward(self, x: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return y and log|dy/dx|, both of x's shape."""

    def inverse(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return x and log|dx/dy|, both of y's shape."""


@dataclass(frozen=True)
class Shift:
    """y = x + t: volume-preserving (NICE, Dinh et al. 2015, eq. 10). arXiv:1410.8516."""

    num_params: ClassVar[int] = 1

    def forward(self, x: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return y and its log-slope 0."""
        (shift,) = params
        y = x + shift
        return y, torch.zeros_like(y)

    def inverse(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return x and its log-slope 0."""
        (shift,) = params
        x = y - shift
        return x, torch.zeros_like(x)


@dataclass(frozen=True)
class _Scaling:
    bound: float = 4.0

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"{type(self).__name__} expects bound > 0; got {self.bound}")

    def _log_scale(self, raw: Tensor, sign: int = 1) -> Tensor:
        """Smooth, of slope one at 0 and never beyond ±bound.

        Gradients never leave, scales never overflow; unless the bound is infinite.
        """
        if self.bound == math.inf:
            return raw if sign == 1 else -raw
        return (raw * (1 / self.bound)).tanh() * (sign * self.bound)


@dataclass(frozen=True)
class Affine(_Scaling):
    """y = exp(s) x + t with |s| < bound, where s = bound tanh(raw / bound).

    Args:
        bound: Largest |s|, in nats; infinity, as in the paper, lets scales overflow.

    Raises:
        ValueError: If ``bound`` is not positive.

    References:
        Dinh, Sohl-Dickstein, Bengio (2017), Density estimation using Real NVP, eq. 8.
        arXiv:1605.08803
    """

    num_params: ClassVar[int] = 2

    def forward(self, x: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return y and s, both of the shape of x."""
        shift, raw = params
        s = self._log_scale(raw)
        y = x * s.exp() + shift
        return y, s.expand_as(y)

    def inverse(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return x and -s, both of the shape of y."""
        shift, raw = params
        s = self._log_scale(raw, -1)
        x = (y - shift) * s.exp()
        return x, s.expand_as(x)


@dataclass(frozen=True)
class Scale(_Scaling):
    """y = exp(s) x with |s| < bound: NICE's diagonal scaling.

    Args:
        bound: Largest |s|, in nats.

    Raises:
        ValueError: If ``bound`` is not positive.

    References:
        Dinh, Krueger, Bengio (2015), NICE, section 3.3. arXiv:1410.8516
    """

    num_params: ClassVar[int] = 1

    def forward(self, x: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return y and s, both of the shape of x."""
        s = self._log_scale(params[0])
        y = x * s.exp()
        return y, s.expand_as(y)

    def inverse(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return x and -s, both of the shape of y."""
        s = self._log_scale(params[0], -1)
        x = y * s.exp()
        return x, s.expand_as(x)


@dataclass(frozen=True)
class Chain:
    """The scalar map ``second(first(x))``: one network sets the parameters of both.

    Args:
        first: The map on the noise side.
        second: The map on the data side.
    """

    first: ScalarMap
    second: ScalarMap

    @property
    def num_params(self) -> int:
        """Parameters of both maps."""
        return self.first.num_params + self.second.num_params

    def forward(self, x: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return y and log|dy/dx|."""
        n = self.first.num_params
        middle, first_slope = self.first.forward(x, params[:n])
        y, second_slope = self.second.forward(middle, params[n:])
        return y, first_slope + second_slope

    def inverse(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return x and log|dx/dy|."""
        n = self.first.num_params
        middle, second_slope = self.second.inverse(y, params[n:])
        x, first_slope = self.first.inverse(middle, params[:n])
        return x, first_slope + second_slope


@dataclass(frozen=True)
class PerFeature:
    """A scalar map of its own for every feature, so that columns of several kinds share a layer.

    Serves every scheme: elementwise, coupling and autoregressive. Each feature takes the first of
    the parameters, as many as its map has; each distinct map is evaluated once, on all its
    features. The identity at θ = 0::

        wide, free = RationalQuadratic(16, bound=1.0), Affine()
        spread = autoregressive(PerFeature([wide, free, free]), 3)

    Args:
        maps: One for each feature along ``dim``. Where a coupling moves a part of the features,
            its factory takes the maps of all, and picks.
        dim: Negative axis of the features.

    Raises:
        ValueError: If there are no maps, or ``dim`` is not negative, or (when called) the value
            has another number of features.
    """

    maps: Sequence[ScalarMap]
    dim: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "maps", tuple(self.maps))
        if not self.maps:
            raise ValueError("PerFeature needs at least one map; got none")
        if self.dim >= 0:
            raise ValueError(f"PerFeature: dim must be negative; got {self.dim}")

    @property
    def num_params(self) -> int:
        """The most that one of the maps takes."""
        return max(m.num_params for m in self.maps)

    def forward(self, x: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return y and log|dy/dx|, both of x's shape."""
        return self._move(x, params, inverse=False)

    def inverse(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Return x and log|dx/dy|, both of y's shape."""
        return self._move(y, params, inverse=True)

    @cached_property
    def _runs(self) -> list[tuple[ScalarMap, list[tuple[int, int]]]]:
        """Each distinct map, and where its features begin and how many follow each other."""
        runs: list[tuple[ScalarMap, list[tuple[int, int]]]] = []
        for i, scalar in enumerate(self.maps):
            mine = next((places for other, places in runs if other == scalar), None)
            if mine is None:
                runs.append((scalar, [(i, 1)]))
            elif sum(mine[-1]) == i:
                mine[-1] = (mine[-1][0], mine[-1][1] + 1)
            else:
                mine.append((i, 1))
        return runs

    def _move(self, value: Tensor, params: Params, inverse: bool) -> tuple[Tensor, Tensor]:
        if value.shape[self.dim] != len(self.maps):
            raise ValueError(
                f"PerFeature has {len(self.maps)} maps for the features along dim {self.dim}; "
                f"got values of shape {tuple(value.shape)}"
            )
        pieces: dict[int, tuple[Tensor, Tensor]] = {}
        for scalar, places in self._runs:
            mine = params[: scalar.num_params]
            move = scalar.inverse if inverse else scalar.forward
            theta: Params = (
                self._pick(mine, places)
                if isinstance(mine, Tensor)
                else tuple(self._pick(p, places) for p in mine)
            )
            moved = move(self._pick(value, places), theta)
            sizes = [size for _, size in places]
            parts = zip(*(m.split(sizes, self.dim) for m in moved), strict=True)
            pieces.update(zip((begin for begin, _ in places), parts, strict=True))
        outs, log_slopes = zip(*(pieces[begin] for begin in sorted(pieces)), strict=True)
        return torch.cat(outs, self.dim), torch.cat(log_slopes, self.dim)

    def _pick(self, tensor: Tensor, places: list[tuple[int, int]]) -> Tensor:
        found = [tensor.narrow(self.dim, begin, size) for begin, size in places]
        return found[0] if len(found) == 1 else torch.cat(found, self.dim)


@dataclass(frozen=True)
class _First:
    """A map that takes the first of more parameters than it has."""

    scalar: ScalarMap

    @property
    def num_params(self) -> int:
        return self.scalar.num_params

    def forward(self, x: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        return self.scalar.forward(x, params[: self.num_params])

    def inverse(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        return self.scalar.inverse(y, params[: self.num_params])


def map_of_feature(scalar: ScalarMap, feature: int) -> ScalarMap:
    """Return the map of a single feature, for values that hold no other."""
    return _First(scalar.maps[feature]) if isinstance(scalar, PerFeature) else scalar


def maps_of_part(
    scalar: ScalarMap,
    event_shape: Sequence[int],
    moved: Sequence[bool] | None = None,
    dim: int = -1,
) -> ScalarMap:
    """Return the map of the entries of an event that move.

    Args:
        scalar: The map, or the maps of all features.
        event_shape: Shape of the whole event.
        moved: Which entries along ``dim`` move; all if None.
        dim: Negative axis.

    Raises:
        ValueError: If there are not as many maps as features.
    """
    if not isinstance(scalar, PerFeature):
        return scalar
    count, axis = len(scalar.maps), scalar.dim
    if -axis > len(event_shape) or event_shape[axis] != count:
        raise ValueError(
            f"PerFeature has {count} maps for the features along dim {axis}; the event has the "
            f"shape {tuple(event_shape)}"
        )
    if moved is None or axis != dim:
        return scalar
    return PerFeature([m for m, yes in zip(scalar.maps, moved, strict=True) if yes], dim)
