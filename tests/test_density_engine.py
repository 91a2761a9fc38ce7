"""What the estimator of tables asks: any engine, any source of rows, checks that cost little."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from pyroflows.density import DensityEstimator
from pyroflows.density.engine import Engine, Fit
from pyroflows.density.fitting import plan
from pyroflows.density.training import BestColumns, HeldOut, _Checks
from pyroflows.training.budget import Budget

QUICK = dict(max_steps=30, members=2, hidden_dim=8, max_time=None, random_state=0)


def numbers(n=200, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"a": rng.normal(1, 2, n), "b": rng.normal(-3, 1, n)})


class Normals(Engine):
    """Independent normals, by their moments."""

    tag = "normals"

    def __init__(self, settings):
        self.settings = settings

    def fit(self, table, *, budget, generator):
        self.schema, self.given = table.schema, table.given
        self.order, self.num_given = list(range(len(table.schema))), 0
        self.normal = torch.distributions.Normal(table.values.mean(0), table.values.std(0))
        return Fit([dict(step=0, epoch=0.0, valid=0.0)], torch.arange(len(table)))

    def column_log_prob(self, values):
        log_p = self.normal.log_prob(values.nan_to_num(0.0))
        return torch.where(values.isnan(), 0.0, log_p).T

    def log_prob(self, values, *, pattern=False, draws=64):
        return self.column_log_prob(values).sum(0), torch.zeros(len(values))

    def complete(self, values, n, *, generator, leave=False, lattice=True):
        noise = torch.randn(len(values), n, 2, generator=generator, dtype=values.dtype)
        drawn = self.normal.loc + self.normal.scale * noise
        return torch.where(values[:, None].isnan(), drawn, values[:, None])

    def averages(self, values, n, *, generator):
        return torch.where(values.isnan(), self.normal.loc, values)


class NormalTable(DensityEstimator):
    def _engine(self):
        return Normals(self._settings())


def test_the_estimator_asks_nothing_but_the_engine():
    table = numbers(2000)
    model = NormalTable(random_state=0).fit(table)
    loc, scale = table.mean(), table.std()
    z = (table - loc) / scale
    want = (-0.5 * z**2 - np.log(scale) - 0.5 * math.log(2 * math.pi)).sum(axis=1)
    np.testing.assert_allclose(model.score_samples(table), want)
    np.testing.assert_allclose(model.log_marginal(table[["a"]]).mean(), model.summary().nats["a"])
    assert model.sample(3).columns.tolist() == ["a", "b"]
    given = pd.DataFrame({"b": [0.0, 1.0]})
    np.testing.assert_allclose(model.mean(given)["a"], loc["a"])
    quartile = model.quantile(given, 0.25, draws=20000)["a"]
    error = math.sqrt(0.25 * 0.75 / 20000) / 0.3178 * scale["a"]  # by the normal's density there
    np.testing.assert_allclose(quartile, loc["a"] - 0.6745 * scale["a"], atol=4 * error)
    gaps = table.head(5).assign(a=np.nan)
    np.testing.assert_allclose(model.impute(gaps, method="mean")["a"], loc["a"])
    assert model.predict_outliers(table, 0.05).mean() == pytest.approx(0.05, abs=0.01)
    at = torch.tensor(table.to_numpy())  # independent numbers: their distribution functions
    model.engine_.pit = lambda x, *, generator: dict(enumerate(model.engine_.normal.cdf(x).T))
    np.testing.assert_allclose(model.pit(table), model.engine_.normal.cdf(at))
    del model.engine_.pit
    assert model.pit(table).empty  # this engine has no exact conditionals
    assert model.engine_.exact is None
    with pytest.raises(ValueError, match="which Normals has not"):
        model.explain(table)
    with pytest.raises(AttributeError, match="transform needs a flow"):
        model.set_params(flow="maf").transform(table)  # was fitted without
    model.set_params(flow=None)
    with pytest.raises(AttributeError, match="Normals has no model_"):
        model.model_  # noqa: B018


class Rows:
    """Rows in portions, as a database would hand them out."""

    def __init__(self, frame):
        self.frame, self.columns, self.portions = frame, None, 0

    def count(self):
        return len(self.frame)

    def read(self):
        return self.frame

    def sample(self, rows, rng):
        return self.frame.sample(rows, random_state=int(rng.integers(2**31)))

    def shuffled(self, rows, rng, *, rank=0, world=1):
        for i in rng.permutation(4):
            self.portions += 1
            yield self.frame.iloc[i::4][self.columns]


def test_any_source_of_rows_is_fitted():
    table = numbers(400).assign(note="?")
    options = dict(QUICK, schema={"note": {"kind": "ignore"}})
    model = DensityEstimator(**options).fit(Rows(table))
    whole = DensityEstimator(**options).fit(table)
    np.testing.assert_array_equal(model.score_samples(table), whole.score_samples(table))
    source = Rows(table)
    model = DensityEstimator(**options).fit_file(source, in_memory=100, sample_rows=150)
    assert source.portions > 4 and source.columns == ["a", "b"]
    truth = -2 * (0.5 + 0.5 * math.log(2 * math.pi)) - math.log(2)
    assert model.score(numbers(1000, seed=1)) == pytest.approx(truth, abs=0.4)
    with pytest.raises(ValueError, match="sample_weight"):
        DensityEstimator(**options).fit(Rows(table), sample_weight=1.0)


class Ticking(Budget):
    """A clock that goes on by a second whenever somebody looks."""

    def __init__(self, seconds):
        super().__init__(seconds)
        self.ticks = itertools.count()

    def seconds(self):
        return float(next(self.ticks))


@pytest.mark.parametrize(("seconds", "checks"), [(None, 24), (1000, 24), (41, 6), (3, 1)])
def test_checks_leave_the_time_to_the_steps(seconds, checks):
    """Where one takes a second, they are as many as fit into 15 % of the time."""
    model = DensityEstimator(**QUICK).fit(numbers())
    table = torch.tensor(numbers(40).to_numpy())
    rows = model.model_.encode(table)
    held = HeldOut(rows, torch.zeros(40, dtype=torch.long), torch.ones(40))
    sizes = plan(model.model_, 200, model._settings(), math.inf)
    found = _Checks(BestColumns(model.model_, held), sizes, Ticking(seconds), 0.0, 200)
    assert found.count == pytest.approx(checks, rel=0.05)
    assert not found.due(0.9 / checks) and found.due(1.1 / checks)


def test_every_network_keeps_its_own_best():
    """A worse head of one column's network, a better one of the other's: each by itself."""
    table = numbers()
    model = DensityEstimator(**dict(QUICK, members=1)).fit(table)
    net = model.model_
    rows = net.encode(torch.tensor(table.to_numpy()))
    held = HeldOut(rows, torch.zeros(len(table), dtype=torch.long), torch.ones(len(table)))
    best = BestColumns(net, held)
    best.offer()
    start = best.nats.clone()
    with torch.no_grad():
        net.nets.bias[0][0, :, -3:] += 3.0  # absurd scales
    best.offer()
    assert torch.equal(best.nats, start) and best.stale == 1
    best.restore()
    with torch.no_grad():
        net.nets.head[0][1] = 0.0
    worse = BestColumns(net, held)
    worse.offer()
    assert worse.nats[0, 0] == start[0, 0] and worse.nats[0, 1] != start[0, 1]
