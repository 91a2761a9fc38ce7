"""Densities of tables: :class:`DensityEstimator` and the model behind it."""

from pyroflows.density.estimator import DensityEstimator, NotFittedError

__all__ = ["DensityEstimator", "NotFittedError"]
