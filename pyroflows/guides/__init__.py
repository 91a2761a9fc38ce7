"""Flow guides for variational inference: start at the right place, fit, and say how good the fit is."""

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.fitting import FitResult, fit_guide

__all__ = ["AutoFlow", "FitResult", "fit_guide"]
