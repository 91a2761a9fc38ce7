r"""Local latents of a subsampled plate: a normal for each row of the whole plate.

.. math:: u_i = a_i + B_i z + s_i \varepsilon_i, \qquad \varepsilon_i \sim N(0, I),

with z the noise of the global latents. The numbers of row i are parameters of their own, chosen
by the subsample at each step, as in Pyro's ``AutoNormal``, to which it comes down while B is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor, nn

from pyroflows.guides.sites import Sites

__all__ = ["LocalNormals"]

_COUPLED_UP_TO = 1_000_000  # numbers B of a site; beyond, its rows do not see the globals


class LocalNormals(nn.Module):
    """Normals over the unconstrained local latents, given the noise of the global ones.

    Args:
        sites: The sites.
        start: For each its initial unconstrained value.
        init_scale: Initial standard deviation.
        global_dim: Features of the global noise z; 0 for none.
    """

    def __init__(
        self, sites: Sites, start: Mapping[str, Tensor], init_scale: float, global_dim: int
    ) -> None:
        super().__init__()
        self.sites = sites
        self.loc, self.log_scale, self.slope = (nn.ParameterDict() for _ in range(3))
        for site in sites:
            u, key = start[site.name], _key(site.name)
            for frame in site.plates:
                if frame.full_size is not None and frame.full_size != frame.size:
                    u = periodic_repeat(u, frame.full_size, frame.dim - len(site.base_shape))
            self.loc[key] = nn.Parameter(u.clone())
            self.log_scale[key] = nn.Parameter(torch.full_like(u, math.log(init_scale)))
            if 0 < global_dim * u.numel() <= _COUPLED_UP_TO:
                self.slope[key] = nn.Parameter(u.new_zeros(*u.shape, global_dim))

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites.named)

    def coupled(self, name: str) -> bool:
        """Whether the rows of a site see the globals."""
        return _key(name) in self.slope

    def posterior(self, name: str, z: Tensor | None) -> dist.TorchDistribution:
        """Distribution of a site's unconstrained value; inside its plates, of the rows there.

        Args:
            name: The site.
            z: Noise of the globals, ``(*batch, D)``, the batch left of all plates; None if the
                model has no globals.
        """
        key, event_dim = _key(name), len(self.sites.named[name].base_shape)
        loc = pyro.subsample(self.loc[key], event_dim=event_dim)
        scale = pyro.subsample(self.log_scale[key], event_dim=event_dim).exp()
        if z is not None and self.coupled(name):
            z = z.reshape(z.shape[:-1] + (1,) * event_dim + z.shape[-1:])
            slope = pyro.subsample(self.slope[key], event_dim=event_dim + 1)
            loc = loc + (slope * z).sum(-1)
        return dist.Normal(loc, scale, validate_args=False).to_event(event_dim)

    def sample(self, name: str, num_samples: int, z: Tensor | None) -> Tensor:
        """Values of all rows, ``(num_samples, *site)``, at noise ``z``, ``(num_samples, D)``."""
        rows = self.posterior(name, self._beside(name, z))
        return self._value(name, rows.sample(() if self.coupled(name) else (num_samples,)))

    def log_prob(self, name: str, value: Tensor, z: Tensor | None) -> Tensor:
        """Log-density of values of all rows, ``(*batch, *site)``, at noise ``z``."""
        rows = self.posterior(name, self._beside(name, z))
        site, loc = self.sites.named[name], self.loc[_key(name)]
        shape = self._value(name, loc).shape
        if value.shape[value.dim() - len(shape) :] != shape:
            raise ValueError(
                f"site '{name}' has shape {tuple(shape)} over all rows of its plates; got a value "
                f"of shape {tuple(value.shape)}"
            )
        u, log_det = site.unconstrain(value)
        batch = value.shape[: value.dim() - len(shape)]
        log_prob = rows.log_prob(u.reshape(batch + loc.shape))
        return log_prob.reshape(*batch, -1).sum(-1) - log_det.reshape(*batch, -1).sum(-1)

    def quantiles(self, name: str, levels: Tensor) -> Tensor:
        """Quantiles of all rows, the globals integrated out: exact, since z is normal."""
        key = _key(name)
        loc, scale = self.loc[key], self.log_scale[key].exp()
        if self.coupled(name):
            scale = (scale.square() + self.slope[key].square().sum(-1)).sqrt()
        at = levels.to(loc).reshape(-1, *[1] * loc.dim())
        return self._value(name, dist.Normal(loc, scale, validate_args=False).icdf(at))

    def _beside(self, name: str, z: Tensor | None) -> Tensor | None:
        """``z``, ``(*batch, D)``, with its batch left of the site's plates."""
        plates = len(self.sites.named[name].batch_shape)
        return None if z is None else z.reshape(z.shape[:-1] + (1,) * plates + z.shape[-1:])

    def _value(self, name: str, u: Tensor) -> Tensor:
        return self.sites.named[name].bijection()(u)


def _key(name: str) -> str:
    """A site's name as torch takes it for a parameter."""
    return name.replace(".", "__")
