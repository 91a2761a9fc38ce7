"""What the factories of several families share."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from pyroflows.bijection import Bijection
from pyroflows.scalar import ScalarMap
from pyroflows.splines import LinearRational, RationalQuadratic

__all__ = ["conditional", "spline_map"]


def conditional(factory: Callable[..., Bijection]) -> Callable[..., Bijection]:
    """Return the factory under Pyro's conditional signature: ``context_dim`` comes second."""

    @wraps(factory)
    def make(input_dim: Any, context_dim: int, *args: Any, **kwargs: Any) -> Bijection:
        if context_dim < 1:
            raise ValueError(f"{make.__name__} needs context_dim of at least 1; got {context_dim}")
        return factory(input_dim, *args, context_dim=context_dim, **kwargs)

    make.__name__ = make.__qualname__ = f"conditional_{factory.__name__}"
    make.__doc__ = f":func:`{factory.__name__}` with a context of ``context_dim`` features."
    del make.__wrapped__  # its signature is not the factory's
    return make


def spline_map(count_bins: int, bound: float, order: str) -> ScalarMap:
    """Return the spline of Pyro's ``order`` keyword.

    Raises:
        ValueError: If ``order`` is neither "linear" nor "quadratic".
    """
    if order == "quadratic":
        return RationalQuadratic(count_bins, bound)
    if order == "linear":
        return LinearRational(count_bins, bound)
    raise ValueError(f"order must be 'linear' or 'quadratic'; got {order!r}")
