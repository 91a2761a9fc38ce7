"""Verdicts on guides that are known to be right, and on guides that are known to be wrong."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

from pyroflows import diagnose


def one(distribution):
    """A model, or a guide, of one site."""

    def program(*args):
        pyro.sample("x", distribution)

    return program


def vector(distribution):
    return one(distribution.to_event(1))


class Truncated(dist.TorchDistribution):
    """A distribution below or above a bound."""

    arg_constraints = {}

    def __init__(self, base, log_mass, low=-math.inf, high=math.inf):
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)
        self.base, self.low, self.high, self.log_mass = base, low, high, log_mass

    @property
    def support(self):
        return self.base.support

    def expand(self, batch_shape, _instance=None):
        return Truncated(self.base.expand(batch_shape), self.log_mass, self.low, self.high)

    def sample(self, sample_shape=()):
        x = self.base.sample(sample_shape)
        while ((x < self.low) | (x > self.high)).any():
            x = torch.where((x < self.low) | (x > self.high), self.base.sample(sample_shape), x)
        return x

    def log_prob(self, value):
        return self.base.log_prob(value) - self.log_mass


def lkj():
    pyro.sample("L", dist.LKJCholesky(4, torch.tensor(1.5)))
    with pyro.plate("scales", 3):
        pyro.sample("s", dist.HalfCauchy(1.0))


def edges():
    pyro.sample("p", dist.Dirichlet(torch.full((4,), 0.3)))
    pyro.sample("b", dist.Beta(0.3, 0.3))
    pyro.sample("u", dist.Uniform(-1.0, 3.0))


def funnel(v):
    def program():
        mouth = pyro.sample("v", v)
        with pyro.plate("rows", 4):
            pyro.sample("x", dist.Normal(0.0, (mouth / 2).exp()))

    return program


def likelihood_of(log_density, dim):
    """A model whose prior is flat, so that its draws say nothing."""

    def program():
        x = pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1).mask(False))
        pyro.factor("f", log_density(x))

    return program


def two_normals(x, distance, scale=1.0):
    apart = torch.zeros(x.shape[-1])
    apart[0] = distance
    both = (dist.Normal(c, scale).log_prob(x).sum(-1) for c in (torch.zeros_like(apart), apart))
    return torch.logaddexp(*both)


RIGHT = {
    "normal": one(dist.Normal(2.0, 1e-3)),
    "t(3)": one(dist.StudentT(3.0, 0.0, 1.0)),
    "Cauchy": one(dist.Cauchy(0.0, 1.0)),
    "Cholesky factor": lkj,
    "at the edges": edges,
    "two modes": one(
        dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-6.0, 6.0]), 0.5)
        )
    ),
    "funnel": funnel(dist.Normal(0.0, 3.0)),
    "310 latents": vector(dist.Normal(torch.zeros(310), 1.0)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_exact_guides_are_right(name):
    verdict = diagnose(RIGHT[name], RIGHT[name], num_samples=2000)
    assert verdict.ok and verdict.searched, verdict
    assert max(verdict.shifts.values()) < 1e-3
    assert verdict.weights.elbo == pytest.approx(0, abs=1e-3)
    assert verdict.wider_evidence == pytest.approx(0, abs=0.05)
    assert len(str(verdict).splitlines()) <= 15 and repr(verdict) == str(verdict)


NORMAL, GAMMA = dist.Normal(0.0, 3.0), dist.Gamma(1.5, 0.2)
NECK = Truncated(NORMAL, math.log(0.8413), low=-3.0)
WRONG = {
    "normal for t(3)": (
        RIGHT["t(3)"],
        one(dist.Normal(0.0, 1.2)),
        "guide's upper 1%|tails are too light",
    ),
    "normal for Cauchy": (RIGHT["Cauchy"], one(dist.Normal(0.0, 1.6)), "tails are too light"),
    "upper tail cut": (
        one(GAMMA),
        one(Truncated(GAMMA, math.log(0.8423), high=13.0)),
        "guide's upper 1%",
    ),
    "neck cut": (RIGHT["funnel"], funnel(NECK), "'v' lies in the guide's lower 1%"),
    "too narrow": (
        one(dist.Normal(0.0, 1.0)),
        one(dist.Normal(0.0, 0.7)),
        "guide's (upper|lower) 1%",
    ),
    "mode 30 sd away in ten dimensions": (
        likelihood_of(lambda x: two_normals(x, 30.0), 10),
        vector(dist.Normal(torch.zeros(10), 1.0)),
        "misses about (4[7-9]|5[0-3])%",
    ),
    "mode among 310 latents": (
        likelihood_of(lambda x: two_normals(x, 4.0, 0.1), 310),
        vector(dist.Normal(torch.zeros(310), 0.1)),
        "misses about (4[7-9]|5[0-3])%",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_guides_are_flagged(name):
    model, guide, reason = WRONG[name]
    verdict = diagnose(model, guide, num_samples=2000)
    assert not verdict.ok
    assert re.search(reason, verdict.verdict), verdict
