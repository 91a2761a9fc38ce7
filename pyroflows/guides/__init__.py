"""Flow guides for variational inference.

Start at the right place, fit, and say how good the fit is.
"""

from pyroflows.guides.amortized import AmortizedFlow
from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.draws import GuideDraws, draw
from pyroflows.guides.elbo import PathGradientELBO
from pyroflows.guides.fitting import FitResult, fit_guide
from pyroflows.guides.forward import fit_guide_to_draws
from pyroflows.guides.mcmc import FlowChains, flow_mcmc

__all__ = [
    "AmortizedFlow",
    "AutoFlow",
    "FitResult",
    "FlowChains",
    "GuideDraws",
    "PathGradientELBO",
    "draw",
    "fit_guide",
    "fit_guide_to_draws",
    "flow_mcmc",
]
