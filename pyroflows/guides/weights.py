"""Another name of :mod:`pyroflows.weights`."""

from pyroflows.weights import (
    OUTSIDE,
    WeightSummary,
    pareto_k,
    smooth_weights,
    summarize_weights,
)

__all__ = ["OUTSIDE", "WeightSummary", "pareto_k", "smooth_weights", "summarize_weights"]
