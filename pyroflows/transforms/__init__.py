"""Transforms under Pyro's factory names and keywords; each has a ``conditional_*`` variant.

Changing ``import pyro.distributions.transforms as T`` to ``import pyroflows.transforms as T`` is
enough: names that are not defined here are Pyro's own. Every plain name that has parameters takes
``context_dim=`` as well.
"""

from typing import Any

import pyro.distributions.transforms as _stock

from pyroflows.bijection import Bijection, Inverse
from pyroflows.compose import Compose, as_bijection, iterated
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
from pyroflows.transforms.image import (
    Part,
    Squeeze,
    conditional_conv_coupling,
    conv_coupling,
    multi_scale,
    squeeze,
)
from pyroflows.transforms.linear import (
    Linear,
    TriangularAffine,
    conditional_generalized_channel_permute,
    conditional_linear,
    conditional_lower_cholesky_affine,
    generalized_channel_permute,
    linear,
    lower_cholesky_affine,
)
from pyroflows.transforms.normalization import (
    ActNorm,
    BatchNorm,
    actnorm,
    batchnorm,
    conditional_actnorm,
    conditional_batchnorm,
)
from pyroflows.transforms.orthogonal import (
    Householder,
    MatrixExponential,
    conditional_householder,
    conditional_matrix_exponential,
    householder,
    matrix_exponential,
)
from pyroflows.transforms.permutation import Permute, permute, reverse
from pyroflows.transforms.residual import (
    Planar,
    Radial,
    Sylvester,
    conditional_planar,
    conditional_radial,
    conditional_sylvester,
    planar,
    radial,
    sylvester,
)
from pyroflows.transforms.stateless import (
    elu,
    exp,
    leaky_relu,
    logit,
    ordered,
    sigmoid,
    softplus,
    tanh,
)

__all__ = [
    "ActNorm",
    "Autoregressive",
    "BatchNorm",
    "Bijection",
    "Compose",
    "Coupling",
    "Elementwise",
    "Householder",
    "Inverse",
    "Linear",
    "MatrixExponential",
    "Part",
    "Permute",
    "Planar",
    "Radial",
    "Squeeze",
    "Sylvester",
    "TriangularAffine",
    "actnorm",
    "additive_coupling",
    "affine_autoregressive",
    "affine_coupling",
    "alternating_mask",
    "as_bijection",
    "autoregressive",
    "batchnorm",
    "conditional_actnorm",
    "conditional_additive_coupling",
    "conditional_affine_autoregressive",
    "conditional_affine_coupling",
    "conditional_batchnorm",
    "conditional_conv_coupling",
    "conditional_elementwise_affine",
    "conditional_elementwise_scale",
    "conditional_generalized_channel_permute",
    "conditional_householder",
    "conditional_linear",
    "conditional_lower_cholesky_affine",
    "conditional_matrix_exponential",
    "conditional_planar",
    "conditional_radial",
    "conditional_spline",
    "conditional_spline_autoregressive",
    "conditional_spline_coupling",
    "conditional_sylvester",
    "conv_coupling",
    "coupling",
    "elementwise",
    "elementwise_affine",
    "elementwise_scale",
    "elu",
    "exp",
    "generalized_channel_permute",
    "half_mask",
    "householder",
    "iterated",
    "leaky_relu",
    "linear",
    "logit",
    "lower_cholesky_affine",
    "matrix_exponential",
    "multi_scale",
    "ordered",
    "permute",
    "planar",
    "radial",
    "reverse",
    "sigmoid",
    "softplus",
    "spline",
    "spline_autoregressive",
    "spline_coupling",
    "squeeze",
    "sylvester",
    "tanh",
]


def __getattr__(name: str) -> Any:
    """Return Pyro's (and PyTorch's) transform of that name."""
    if name.startswith("_") or not hasattr(_stock, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_stock, name)
