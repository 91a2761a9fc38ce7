"""Models that another process can import: a guide that was saved finds its own again."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyroflows import AmortizedFlow, AutoFlow


def regression(x, y):
    """Slope, noise and a bound that depends on another site."""
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    pyro.sample("part", dist.Uniform(0.0, noise))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, noise), obs=y)


def factor_model(x):
    """A latent of each row, and a global scale."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        likelihood = dist.Normal(z.unsqueeze(-1), 0.5).expand([*z.shape, 2]).to_event(1)
        pyro.sample("x", likelihood, obs=x)


def regression_data():
    """Twenty rows with a slope of 2."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-1.0, 1.0, 20)
    return x, 2 * x + 0.3 * torch.randn(20, generator=generator)


def make_regression_guide():
    """A guide with everything that a pickle might lose."""
    return AutoFlow(regression, flow=lambda d: _flow(d))


def _flow(dim):
    from pyroflows.recipes.posteriors import posterior_flow

    return posterior_flow(dim, num_layers=2)


def make_factor_guide():
    """An amortized guide."""
    return AmortizedFlow(factor_model, nn.Linear(2, 4), 4)
