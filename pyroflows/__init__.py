"""Normalizing flows for Pyro: priors, posteriors and densities of tables."""

from importlib import import_module
from typing import Any

from pyroflows import bases, families, transforms
from pyroflows.bijection import Bijection, Inverse
from pyroflows.compose import Compose, as_bijection
from pyroflows.divergence import entropy, kl_divergence
from pyroflows.flow import Flow
from pyroflows.recipes import glow, glow_step, iaf, maf, neural_spline, nice, realnvp
from pyroflows.training import fit

__version__ = "0.1.0"

# Imported when first asked for: they bring pandas or take time that not everyone needs.
_LAZY = {
    "AmortizedFlow": "pyroflows.guides",
    "AutoFlow": "pyroflows.guides",
    "DensityEstimator": "pyroflows.density",
    "PathGradientELBO": "pyroflows.guides",
    "diagnose": "pyroflows.diagnostics",
    "fit_guide": "pyroflows.guides",
    "flow_mcmc": "pyroflows.guides.mcmc",
    "fit_guide_to_draws": "pyroflows.guides",
    "importance_resample": "pyroflows.diagnostics",
    "to_arviz": "pyroflows.arviz",
}

__all__ = [
    "AmortizedFlow",
    "AutoFlow",
    "Bijection",
    "Compose",
    "DensityEstimator",
    "Flow",
    "Inverse",
    "PathGradientELBO",
    "__version__",
    "as_bijection",
    "bases",
    "diagnose",
    "entropy",
    "families",
    "fit",
    "fit_guide",
    "fit_guide_to_draws",
    "flow_mcmc",
    "glow",
    "glow_step",
    "iaf",
    "importance_resample",
    "kl_divergence",
    "maf",
    "neural_spline",
    "nice",
    "realnvp",
    "to_arviz",
    "transforms",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pyroflows' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
