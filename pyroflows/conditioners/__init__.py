"""Conditioners: networks ``(x, context) -> θ`` that give a scalar map its parameters.

Every conditioner returns ``(num_params, *batch, *output)``, parameters first, and ends in a zero
layer: the scalar map starts as the identity. A wide one computes θ feature-major and hands out a
view, so that a spline's sums run over long contiguous rows (see :mod:`pyroflows.splines`); a
narrow one hands out a tuple of tensors, one a parameter, whose gradients come together in one
copy.
"""

from pyroflows.conditioners.columns import ColumnNets, Columns, ColumnsPass
from pyroflows.conditioners.convolutional import Conv
from pyroflows.conditioners.dense import Dense, Free
from pyroflows.conditioners.masked import Masked, SequentialPass
from pyroflows.conditioners.network import Activation, Params, default_hidden_dims

__all__ = [
    "Activation",
    "ColumnNets",
    "Columns",
    "ColumnsPass",
    "Conv",
    "Dense",
    "Free",
    "Masked",
    "Params",
    "SequentialPass",
    "default_hidden_dims",
]
