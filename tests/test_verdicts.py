"""Verdicts on guides that are known to be right, and on guides that are known to be wrong."""

import math
import random
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta

from pyroflows import AutoFlow, diagnose, fit_guide, importance_resample
from pyroflows.guides.routes import _Largest as Largest


def one(distribution, name="x"):
    """A model, or a guide, of one site."""

    def program(*args):
        pyro.sample(name, distribution)

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
    "angle across the cut": one(dist.VonMises(3.0, 4.0)),
    "flat angle": one(dist.VonMises(3.0, 0.3)),
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
    "angle too narrow": (
        RIGHT["angle across the cut"],
        one(dist.VonMises(3.0, 16.0)),
        "guide's (upper|lower) 1%",
    ),
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


X = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
GROUP = torch.arange(30) % 2


def by_vmap(y):
    """|X b| + a[G]: two modes in b, and a model that takes no batch."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("row", 30):
        pyro.sample("y", dist.Normal(((X @ b)[0] * X[:, 0]).abs() + a[GROUP], 0.5), obs=y)


def batch_of_one(y):
    """Batch shape (1,) without a plate."""
    m = pyro.sample("m", dist.Normal(torch.zeros(1), 3.0))
    pyro.sample("y", dist.Normal(m.abs(), 0.5), obs=y[:1])


@pytest.mark.parametrize("model", [by_vmap, batch_of_one])
def test_the_search_runs_wherever_the_fit_ran(model):
    y = torch.full((30,), 4.0) if model is batch_of_one else 2 * X[:, 0].abs()
    half, both = AutoFlow(model), AutoFlow(model)
    half.prefit(y)  # a Gaussian at one of the two modes
    verdict = diagnose(model, half, y, num_samples=1000)
    assert re.search("misses about (4[4-9]|5[0-6])%", verdict.verdict), verdict
    fit_guide(model, both, y, seed=0, progress=False, num_steps=20)
    verdict = diagnose(model, both, y, num_samples=1000)
    assert verdict.ok and verdict.searched, verdict


def test_what_was_not_searched_is_said():
    verdict = diagnose(RIGHT["normal"], RIGHT["normal"], num_samples=200, search=False)
    assert verdict.ok and not verdict.searched
    assert "not wholly, searched" in verdict.verdict and "search=False" in str(verdict)
    verdict = diagnose(RIGHT["normal"], RIGHT["normal"], num_samples=200, max_time=0.0)
    assert verdict.ok and not verdict.searched and "stopped by max_time" in str(verdict)


def test_errors_of_the_search_are_not_swallowed(monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("a bug")

    monkeypatch.setattr("pyroflows.diagnostics_search.find_modes", broken)
    with pytest.raises(KeyError, match="a bug"):
        diagnose(RIGHT["normal"], RIGHT["normal"], num_samples=200)


def test_candidates_that_cannot_be_weighed_are_said(monkeypatch):
    def failing(*args, **kwargs):
        raise torch.linalg.LinAlgError("linalg.eigh: did not converge")

    monkeypatch.setattr("pyroflows.guides.modes.laplace", failing)
    verdict = diagnose(RIGHT["normal"], RIGHT["normal"], num_samples=200)
    assert not verdict.searched and "did not converge" in str(verdict)


def test_points_are_not_densities():
    guide = AutoDelta(lkj)
    guide()
    verdict = diagnose(lkj, guide, num_samples=100)
    assert not verdict.ok and "'L', 's' are each a point, not a density" in verdict.verdict
    assert verdict.shifts == {"L": 0.0, "s": 0.0}


N, SIZE = 103, 20
ROWS = torch.randn(N, generator=torch.Generator().manual_seed(1)) + 1


def subsampled(y):
    m = pyro.sample("m", dist.Normal(0.0, 10.0))
    with pyro.plate("row", N, subsample_size=SIZE) as index:
        pyro.sample("y", dist.Normal(m, 1.0), obs=y[index] if len(y) == N else y)


def numpy_rows():
    return np.random.randint(0, N, SIZE)


def python_rows():
    return random.sample(range(N), SIZE)


def torch_rows():
    return torch.randperm(N)[:SIZE]


def posterior_of_the_mean(shift=0.0):
    precision = N + 1 / 100
    mean = ROWS.double().sum() / precision + shift * precision**-0.5
    return one(dist.Normal(mean.float(), precision**-0.5), "m")


def test_subsampled_data_are_judged_whole():
    exact = diagnose(subsampled, posterior_of_the_mean(), ROWS, num_samples=500)
    evidence = dist.MultivariateNormal(
        torch.zeros(N).double(), torch.eye(N).double() + 100
    ).log_prob(ROWS.double())
    assert exact.ok and exact.weights.elbo == pytest.approx(evidence.item(), abs=1e-3), exact
    assert exact.weights.log_weight_sd < 1e-3
    wrong = diagnose(subsampled, posterior_of_the_mean(1.0), ROWS, num_samples=500, search=False)
    assert not wrong.ok


def test_a_minibatch_alone_is_not_judged():
    verdict = diagnose(subsampled, posterior_of_the_mean(), ROWS[:SIZE], num_samples=500)
    assert not verdict.ok and not verdict.problems
    assert "Not judged: the plate 'row' has 103 rows and the model was given 20" in str(verdict)


def test_entries_that_nothing_depends_on_are_right():
    y, seen = torch.tensor([1.0, 2.0, 3.0, 0.5]), torch.tensor([True, False, True, True])

    def model():
        m = pyro.sample("m", dist.Normal(3.0, 1.0))
        with pyro.plate("row", 4):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y, obs_mask=seen)

    def guide():
        m = pyro.sample("m", dist.Normal((3 + y[seen].sum()) / 4, 0.5))
        with pyro.plate("row", 4):
            mean, sd = torch.where(seen, 0.0, m), 1.0  # standard where y was observed
            pyro.sample("y_unobserved", dist.Normal(mean, sd))

    verdict = diagnose(model, guide, num_samples=1000)
    assert verdict.ok and verdict.weights.log_weight_sd < 1e-3, verdict
    assert "compared" in str(verdict)


def test_latents_of_a_subsampled_plate_are_not_judged():
    def model(y):
        with pyro.plate("row", N, subsample_size=SIZE) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    verdict = diagnose(model, AutoFlow(model), ROWS, num_samples=100)
    assert not verdict.ok and "Not judged: 'z' lies in the plate 'row'" in str(verdict)
    with pytest.raises(ValueError, match="take a plate of all rows"):
        importance_resample(model, AutoFlow(model), ROWS, num_samples=10)


@pytest.mark.parametrize("draw", [numpy_rows, python_rows, torch_rows])
def test_a_model_that_draws_rows_by_itself_is_not_judged(draw):
    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyro.poutine.scale(scale=N / SIZE), pyro.plate("row", SIZE):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y[draw()])

    verdict = diagnose(model, posterior_of_the_mean(), ROWS, num_samples=100)
    assert not verdict.ok and not verdict.problems
    assert "Not judged: the model's log-density at one and the same point" in str(verdict)
    with pytest.raises(ValueError, match="draws rows or noise by itself"):
        importance_resample(model, posterior_of_the_mean(), ROWS, num_samples=10)


def test_heavy_weights_make_evidence_and_divergence_lower_bounds():
    text = str(diagnose(RIGHT["Cauchy"], one(dist.Normal(0.0, 1.6)), search=False))
    assert "log-evidence at least" in text and "KL to the posterior at least" in text


def test_memory_is_bounded_with_many_rows():
    y = torch.randn(50_000, generator=torch.Generator().manual_seed(0))

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    precision = len(y) + 1
    guide = one(dist.Normal(y.sum() / precision, precision**-0.5), "m")
    with Largest() as seen:
        verdict = diagnose(model, guide, y, num_samples=200)
    assert seen.numel < 2**23 + 1 and verdict.weights.log_weight_sd < 0.05
