"""Ready-made flows.

Those for vectors return a :class:`pyroflows.flow.Flow`; :mod:`pyroflows.recipes.posteriors` holds
the bijections with which guides begin.
"""

from pyroflows.recipes.vectors import glow, glow_step, iaf, maf, neural_spline, nice, realnvp

__all__ = ["glow", "glow_step", "iaf", "maf", "neural_spline", "nice", "realnvp"]
