r"""Monotone splines: scalar maps that bend the box [-bound, bound] and are the identity outside.

A spline reads its parameters as rows: ``count_bins`` logits of widths, ``count_bins`` logits of
heights, ``count_bins - 1`` log-slopes at the interior knots, and for the linear-rational one
``count_bins`` positions of a knot inside each bin. Softmaxes and cumulative sums run down the
rows, so that every operation works on long contiguous memory.

Two paths give the same numbers: differentiable operations on any shapes
(:meth:`pyroflows.splines.spline.Spline.reference`), and :mod:`pyroflows.splines.kernels` where
nothing but eager autograd looks on. Whoever has knots and slopes of his own calls the formula of
one bin, :func:`rational_quadratic`.
"""

from pyroflows.splines.formula import rational_quadratic
from pyroflows.splines.linear import LinearRational
from pyroflows.splines.quadratic import RationalQuadratic

__all__ = ["LinearRational", "RationalQuadratic", "rational_quadratic"]
