"""Transforms without parameters, under Pyro's factory names: each wraps Pyro's or PyTorch's own.

The elementwise ones have no event axis; in a chain their log-determinants are summed over the
event. They bound or unbound the data side of a flow: ``Compose([..., sigmoid()])`` has its values
in (0, 1). Any constraint will do: ``as_bijection(biject_to(constraint))``.
"""

import pyro.distributions.transforms as stock

from pyroflows.bijection import Bijection
from pyroflows.compose import as_bijection

__all__ = ["elu", "exp", "leaky_relu", "logit", "ordered", "sigmoid", "softplus", "tanh"]


def elu() -> Bijection:
    """Keep what is positive; exp(x) - 1 below."""
    return as_bijection(stock.ELUTransform())


def exp() -> Bijection:
    """Map to the positive numbers by the exponential."""
    return as_bijection(stock.ExpTransform())


def leaky_relu() -> Bijection:
    """Keep what is positive; x / 100 below."""
    return as_bijection(stock.LeakyReLUTransform())


def logit() -> Bijection:
    """Map from (0, 1) by log(x / (1 - x)): the inverse of :func:`sigmoid`."""
    return as_bijection(stock.SigmoidTransform().inv)


def ordered() -> Bijection:
    """Map to increasing vectors: the first entry is kept, each next one adds exp(x)."""
    return as_bijection(stock.OrderedTransform())


def sigmoid() -> Bijection:
    """Map to (0, 1) by 1 / (1 + exp(-x))."""
    return as_bijection(stock.SigmoidTransform())


def softplus() -> Bijection:
    """Map to the positive numbers by log(1 + exp(x))."""
    return as_bijection(stock.SoftplusTransform())


def tanh() -> Bijection:
    """Map to (-1, 1) by the hyperbolic tangent."""
    return as_bijection(stock.TanhTransform())
