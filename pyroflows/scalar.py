r"""Scalar maps: monotone functions g(x; θ) of one real number, applied elementwise.

Each is a frozen dataclass with ``num_params`` and two methods::

    y, log_slope = g.forward(x, params)     # log_slope = log|dy/dx|
    x, log_slope = g.inverse(y, params)     # log_slope = log|dx/dy|

Parameters come first: ``params`` is ``(num_params, *shape)``, a tensor or a tuple of tensors,
where ``shape`` broadcasts with that of x, so that ``shift, raw = params`` unpacks. Every map is
the identity at θ = 0 and takes the dtype and device of its inputs. Splines, which are longer, live
in :mod:`pyroflows.splines` under the same contract.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Affine", "Params", "ScalarMap", "Scale", "Shift"]

Params = Tensor | tuple[Tensor, ...]


@runtime_checkable
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

        Gradients never leave, scales never overflow.
        """
        return (raw * (1 / self.bound)).tanh() * (sign * self.bound)


@dataclass(frozen=True)
class Affine(_Scaling):
    """y = exp(s) x + t with |s| < bound, where s = bound tanh(raw / bound).

    Args:
        bound: Largest |s|, in nats; the paper leaves s unbounded, which overflows.

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
