"""Transforms under Pyro's factory names and keywords; each has a ``conditional_*`` variant.

Changing ``import pyro.distributions.transforms as T`` to ``import pyroflows.transforms as T`` is enough. Every plain
name takes ``context_dim=`` as well.
"""

from pyroflows.bijection import Bijection, Compose, Inverse, as_bijection
from pyroflows.transforms.autoregressive import (
    Autoregressive,
    affine_autoregressive,
    autoregressive,
    conditional_affine_autoregressive,
    conditional_spline_autoregressive,
    spline_autoregressive,
)
from pyroflows.transforms.coupling import (
    Coupling,
    additive_coupling,
    affine_coupling,
    alternating_mask,
    conditional_additive_coupling,
    conditional_affine_coupling,
    conditional_spline_coupling,
    coupling,
    half_mask,
    spline_coupling,
)
from pyroflows.transforms.elementwise import (
    Elementwise,
    conditional_elementwise_affine,
    conditional_elementwise_scale,
    conditional_spline,
    elementwise,
    elementwise_affine,
    elementwise_scale,
    spline,
)

__all__ = [
    "Autoregressive",
    "Bijection",
    "Compose",
    "Coupling",
    "Elementwise",
    "Inverse",
    "additive_coupling",
    "affine_autoregressive",
    "affine_coupling",
    "alternating_mask",
    "as_bijection",
    "autoregressive",
    "conditional_additive_coupling",
    "conditional_affine_autoregressive",
    "conditional_affine_coupling",
    "conditional_elementwise_affine",
    "conditional_elementwise_scale",
    "conditional_spline",
    "conditional_spline_autoregressive",
    "conditional_spline_coupling",
    "coupling",
    "elementwise",
    "elementwise_affine",
    "elementwise_scale",
    "half_mask",
    "spline",
    "spline_autoregressive",
    "spline_coupling",
]
