"""Recording steps and natural bounds: found, shown, drawn on, and part of the density."""

import numpy as np
import pandas as pd
import pytest
import torch

from pyroflows.density import DensityEstimator
from pyroflows.density.columns import cells_for
from pyroflows.tables import Column, Schema

QUICK = dict(max_steps=30, members=2, hidden_dim=8, random_state=0)


def column(values, name="x", **changes):
    return Column.from_series(pd.Series(values, name=name), changes)


@pytest.mark.parametrize("n", [40, 300, 15_000, 30_000])
@pytest.mark.parametrize("digits", [1, 2, 4])
def test_the_step_is_what_the_decimals_show_whatever_the_number_of_rows(n, digits):
    rng = np.random.default_rng(n)
    for values in (np.exp(rng.normal(8, 1, n)), 1e4 * rng.normal(size=n)):
        assert column(np.round(values, digits)).step == pytest.approx(10.0**-digits, rel=1e-12)
        assert column(values).step is None
    quarters = column(np.round(rng.normal(size=n) * 400) / 4 + 1e6)
    assert quarters.step == 0.25
    cents = column(np.round(np.exp(rng.normal(3, 1, n)), 2).astype("float32"))
    assert cents.step == pytest.approx(0.01)


def test_times_near_midnight_are_no_days():
    rng = np.random.default_rng(0)
    days = pd.Timestamp("2020-01-01") + pd.to_timedelta(rng.integers(0, 900, 300), "D")
    seconds = pd.Series(days + pd.to_timedelta(rng.integers(0, 5, 300), "s"), name="x")
    assert Column.from_series(seconds).step == 1.0
    assert Column.from_series(pd.Series(days, name="x")).step == 86400.0


@pytest.mark.parametrize("n", [3000, 15_000])
def test_amounts_in_cents_are_drawn_in_cents(n):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"amount": np.round(np.exp(rng.normal(8, 1.5, n)), 2)})
    model = DensityEstimator(**QUICK).fit(table)
    drawn = model.sample(4000)["amount"]
    assert (drawn == drawn.round(2)).all()
    assert (drawn > 0).all()
    # the same units as a density: P(cell) / step
    smooth = DensityEstimator(schema={"amount": {"step": None}}, **QUICK).fit(table)
    assert abs(model.score(table) - smooth.score(table)) < 0.05


RNG = np.random.default_rng(0)
BOUNDS = {
    "longitude of the world": (RNG.uniform(-180, 180, 2000), (-180, 180)),
    "latitude of the world": (RNG.uniform(-90, 90, 2000), (-90, 90)),
    "share, flat": (100 * RNG.random(500), (0, 100)),
    "share, high": (100 * RNG.beta(5, 2, 2000), (0, 100)),
    "share, round": (100 * RNG.beta(2, 2, 2000), (0, 100)),
    "probability": (RNG.beta(0.5, 0.5, 2000), (0, 1)),
    "correlation": (RNG.uniform(-1, 1, 2000), (-1, 1)),
    "hour": (24 * RNG.random(2000), (0, 24)),
    "whole hour": (RNG.integers(0, 24, 2000), (0, 23)),
    "month": (RNG.integers(1, 13, 2000), (1, 12)),
    "rating": (RNG.choice(5, 2000, p=[0.05, 0.1, 0.2, 0.35, 0.3]) + 1, (1, 5)),
    "direction": (360 * RNG.random(2000), (0, 360)),
    "price": (np.exp(RNG.normal(3, 0.5, 2000)), (0, None)),
    "gamma": (RNG.gamma(4.0, size=2000), (0, None)),
    "wait": (RNG.exponential(size=2000), (0, None)),
    "count from 1": (RNG.poisson(8, 2000).clip(1), (0, None)),
    "count": (RNG.poisson(70, 2000), (None, None)),
    "temperature": (RNG.normal(20, 5, 2000), (None, None)),
    "noise": (RNG.normal(size=2000), (None, None)),
    "heavy": (RNG.standard_t(2, 2000), (None, None)),
    "profit": (RNG.normal(50, 40, 2000), (None, None)),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_that_the_data_touch_are_inferred(name):
    values, want = BOUNDS[name]
    found = column(values)
    assert (found.lower, found.upper) == want
    assert column(values, lower=None, upper=None).lower is None


@pytest.mark.parametrize("n", [50, 200, 500])
def test_ordinary_numbers_seldom_get_an_upper_end(n):
    rng = np.random.default_rng(0)
    laws = {
        "normal": lambda: rng.normal(60, 15, n),
        "share": lambda: rng.normal(0.7, 0.1, n),
        "score": lambda: rng.normal(60, 15, n).round(),
        "count": lambda: rng.poisson(4, n),
        "tries": lambda: rng.geometric(0.3, n),
        "age": lambda: rng.integers(18, 91, n),
    }
    for name, law in laws.items():
        ends = sum(column(law()).upper is not None for _ in range(30))
        assert ends <= 5, name  # of a normal law's before: 10, of counts' 11, of ages' 30


def test_bounds_of_few_rows_that_fill_their_span():
    rng = np.random.default_rng(0)
    assert column(rng.uniform(0, 100, 200)).upper == 100
    assert column(rng.integers(0, 24, 200)).upper == 23
    rating = rng.choice([1, 2, 3, 4, 5], 60, p=[0.3, 0.3, 0.2, 0.15, 0.05])
    assert (column(rating).lower, column(rating).upper) == (1, 5)


def test_degrees_go_by_their_names():
    places = Schema.from_frame(
        pd.DataFrame({"lat": RNG.normal(40, 5, 300), "lng": RNG.normal(-100, 9, 300)})
    )
    assert (places["lat"].lower, places["lat"].upper) == (-90, 90)
    assert (places["lng"].lower, places["lng"].upper) == (-180, 180)
    assert ">= -90, <= 90" in places.summary()["model"]["lat"]


def test_samples_and_densities_keep_to_the_bounds():
    names = ["longitude of the world", "share, high", "whole hour", "price", "gamma", "month"]
    table = pd.DataFrame({name: BOUNDS[name][0] for name in names})
    model = DensityEstimator(**QUICK).fit(table)
    drawn = model.sample(20_000)
    row = table.iloc[[0]]
    for name in names:
        low, high = BOUNDS[name][1]
        assert drawn[name].min() >= low
        assert high is None or drawn[name].max() <= high
        assert model.score_samples(row.assign(**{name: low - 1}))[0] == -np.inf
    for name, top in (("price", 2000.0), ("longitude of the world", 180.0)):
        low = BOUNDS[name][1][0]
        edges = np.linspace(low, top, 40_001)
        grid = pd.DataFrame({name: (edges[1:] + edges[:-1]) / 2})
        mass = np.exp(model.log_marginal(grid.iloc[::10], draws=64)).sum() * (top - low) / 4000
        assert mass == pytest.approx(1, abs=0.01)


def test_a_far_bound_changes_nothing():
    rng = np.random.default_rng(0)
    for n in (300, 1500):
        table = pd.DataFrame({"x": rng.normal(50, 4, n), "y": rng.normal(size=n)})
        score = [
            DensityEstimator(schema={"x": {"lower": low, "upper": None}}, **QUICK)
            .fit(table)
            .score(table)
            for low in (None, 0.0)
        ]
        assert score[1] == pytest.approx(score[0], abs=0.01)


def test_bounds_and_steps_can_be_stated_in_the_columns_own_values():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "x": rng.normal(5, 1, 300),
            "t": pd.Timestamp("2020-01-01") + pd.to_timedelta(rng.integers(0, 300, 300), "h"),
        }
    )
    schema = {"x": {"lower": 0, "upper": 10}, "t": {"upper": "2020-02-01", "step": "30min"}}
    found = Schema.from_frame(table, schema)
    assert found["t"].describe() == ("lattice, step 0 days 00:30:00, <= 2020-02-01 00:00:00")
    assert found["x"].describe() == "continuous, >= 0, <= 10"
    with pytest.raises(ValueError, match="schema of 'x': lower=5, but a cell is"):
        Schema.from_frame(table, {"x": {"lower": 5}})
    with pytest.raises(ValueError, match="step=0.5, but .* are not on that lattice"):
        Schema.from_frame(table, {"x": {"step": 0.5}})
    with pytest.raises(ValueError, match="step must be positive"):
        Schema.from_frame(table, {"x": {"step": 0}})


def test_impossible_evidence_is_named_and_other_rows_are_served():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "v": rng.exponential(size=400),
            "k": rng.choice(["a", "b"], 400),
            "c": rng.normal(size=400),
        }
    )
    model = DensityEstimator(**QUICK).fit(table)
    with pytest.raises(
        ValueError, match=r"'v' has no value -5.0; its smallest possible value is 0"
    ):
        model.sample(2, {"v": -5.0})
    with pytest.raises(ValueError, match=r"'k' has no label \['z'\]; it has \['a', 'b'\]"):
        model.sample(2, {"k": "z"})
    rows = pd.DataFrame({"k": ["a", "z", "b"], "v": [1.0, 1.0, 2.0]})
    with pytest.warns(match=r"1 of 3 rows .*'k' has no label \['z'\]"):
        drawn = model.sample(2, rows, random_state=1)
    assert drawn["c"].isna().tolist() == [False, False, True, True, False, False]
    assert drawn["k"].tolist() == ["a", "a", "z", "z", "b", "b"]
    with pytest.warns(match="1 of 3 rows"):
        assert model.mean(rows)["c"].isna().tolist() == [False, True, False]


@pytest.mark.parametrize("step", [0.01, 0.25, 1e-5, 1.0, 2.54, 1e-9])
def test_a_value_of_a_lattice_is_written_alike_beside_any_other(step):
    x = np.random.default_rng(0).integers(-500, 500, 200) * step
    cells = cells_for(x, column(x, step=step))
    held = torch.tensor(x[:20])
    beside = torch.cat([held, torch.tensor([1e14, 1e300, torch.inf, -torch.inf])]).double()
    assert torch.equal(cells.snap(beside)[:20], cells.snap(held))
    assert cells.snap(held).tolist() == pytest.approx(x[:20].tolist(), rel=1e-15, abs=1e-15 * step)
    assert cells.snap(beside)[-2:].tolist() == [np.inf, -np.inf]
    if step in (0.01, 1e-5):
        digits = 2 if step == 0.01 else 5
        assert cells.snap(held).tolist() == [round(v, digits) for v in x[:20]]


def test_draws_of_a_lattice_between_open_ends():
    x = np.random.default_rng(0).poisson(5, 300)
    model = DensityEstimator(**QUICK).fit(pd.DataFrame({"x": x, "z": x * 0.1}))
    blank = torch.full((1, 2), torch.nan).double()
    law = next(law for i, _, law in model.model_.walk(blank) if model.model_.order[i] == 0)
    ends = torch.tensor([[-torch.inf], [torch.inf]]).double()
    assert law.cdf(ends.T).tolist() == [[0.0, 1.0]]
    u = torch.linspace(0.01, 0.99, 99)[None].double()
    drawn = law.sample_between(ends[:1], ends[1:], u)
    assert torch.equal(drawn, law.quantile(u))
