"""Conditions in ``given=``: ranges, sets and predicates, against sums and filtered draws."""

import datetime

import numpy as np
import pandas as pd
import pytest
import torch
from test_density_missing import EVERY, discrete, mixed

from pyroflows.density import DensityEstimator
from pyroflows.density.restricted import restrict
from pyroflows.tables.conditions import Interval, between, one_of, read_conditions, where

FAST = dict(max_steps=60, members=1, hidden_dim=16, random_state=0)


def fulfils(frame, given):
    """Rows that meet conditions, read anew."""
    out = np.ones(len(frame), dtype=bool)
    for name, wanted in given.items():
        cells = frame[name]
        if callable(wanted):
            held = wanted(cells)
        elif isinstance(wanted, tuple):
            low, high = wanted
            held = (low is None) | (cells >= (cells if low is None else low))
            held &= cells <= (cells if high is None else high)
        elif isinstance(wanted, (set, list)):
            held = cells.isin(list(wanted))
        else:
            held = cells == wanted
        out &= np.asarray(held, dtype=bool)
    return out


@pytest.fixture(scope="module")
def labels():
    model = DensityEstimator(**FAST)
    model.fit(discrete())
    return model, np.exp(model.score_samples(EVERY))


@pytest.fixture(scope="module")
def numbers():
    model = DensityEstimator(**FAST)
    model.fit(mixed())
    return model, model.sample(20_000, random_state=5)


# ---------------------------------------------------------------------- right values


SETS = [
    {"a": {"q", "r"}},
    {"a": {"q", "r"}, "c": ["w", "x"]},
    {"k": (1, None), "b": "u"},
    {"c": lambda cells: cells.isin(["w", "z"]), "k": (0, 1)},
]


@pytest.mark.parametrize("given", SETS, ids=["set", "list", "range", "predicate"])
def test_conditions_on_labels_are_sums(labels, given):
    model, joint = labels
    held = fulfils(EVERY, given)
    exact = joint[held] / joint[held].sum()
    # the probability that is kept for labels never seen is all that is missing
    assert model.probability(given) == pytest.approx(joint[held].sum(), abs=4 * 2 / 1500)
    np.testing.assert_allclose(model.log_marginal(given), np.log(model.probability(given)))
    n = 4000
    drawn = model.sample(n, given).value_counts(normalize=True)
    every = pd.MultiIndex.from_frame(EVERY[held])
    assert drawn.index.isin(every).all()
    share = drawn.reindex(every, fill_value=0).to_numpy()
    assert (np.abs(share - exact) < 4 * np.sqrt(exact * (1 - exact) / n) + 3e-3).all()


RANGES = [
    {"x": (0.5, 1.0)},
    {"y": (1.0, None)},
    {"count": (2, 4), "rain": (0, 0.5)},
    {"rain": (0, 0)},
    {"kind": {"u"}, "y": (-0.5, 0.5), "x": (None, 0)},
    {"count": [1, 3, 5], "x": lambda cells: cells > 1},
    {"y": {1.0, 1.1}, "kind": "u"},
]


@pytest.mark.parametrize("given", RANGES, ids=lambda given: "-".join(given))
def test_conditional_rows_are_the_filtered_ones(numbers, given):
    model, whole = numbers
    held = fulfils(whole, given)
    p, error = model.probability(given, return_error=True)
    sd = np.sqrt(p * (1 - p) / len(whole))
    assert abs(p - held.mean()) < 4 * np.hypot(error, sd)
    drawn, real = model.sample(1500, given), whole[held]
    assert fulfils(drawn, given).all()
    for name in ("x", "count", "rain", "y"):
        a, b = drawn[name].astype(float), real[name].astype(float)
        # draws of a weighted cloud repeat each other a little
        se = np.sqrt(2 * a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) < 4 * se + 1e-9
    a, b = (drawn.kind == "u").mean(), (real.kind == "u").mean()
    assert abs(a - b) < 4 * np.sqrt(0.5 / len(drawn) + 0.25 / len(real))


@pytest.mark.parametrize("ends", [(-np.inf, 1.0), (0.0, 0.0), (2.0, np.inf), (12.0, 15.0)])
def test_a_restricted_law_is_the_law_within(numbers, ends):
    model, whole = numbers
    values = torch.from_numpy(model.schema_.encode(whole[:3]))
    rows = torch.zeros(20_000, dtype=torch.long)
    uniforms = torch.rand(2, len(rows), dtype=torch.float64)
    for _, _, law in model.model_.walk(values):
        if law.cells.is_label:
            continue
        c, own = law.cells, restrict(law, Interval(*ends))
        low, high = (torch.full((3,), float(e), dtype=torch.float64) for e in ends)
        below = law.cdf(c.below(low)) if np.isfinite(ends[0]) else torch.zeros(3)
        above = law.cdf(high) if np.isfinite(ends[1]) else torch.ones(3)
        mass = own.log_mass.exp()
        torch.testing.assert_close(mass, (above - below).double(), atol=1e-9, rtol=1e-6)
        if not float(mass[0]):
            continue
        x = own[rows].sample(*uniforms)
        assert bool(((x >= ends[0]) & (x <= ends[1])).all())
        # sampled by components, the mean by quantiles of the whole
        se = float(x.std()) / np.sqrt(len(x))
        mean = float(own.mean_value()[0])
        assert float(x.mean()) == pytest.approx(mean, abs=4 * se + 0.02 * (se > 0))
        torch.testing.assert_close(own.log_prob(x[:3]), law.log_prob(x[:3]) - own.log_mass)


def test_rare_conditions_are_drawn(numbers):
    model, _ = numbers
    # first in the model's order: exact; what follows is drawn given it
    p = model.probability({"x": (4.5, None)})
    law = next(model.model_.walk(torch.full((1, 5), torch.nan).double()))[2]
    assert p == pytest.approx(1 - float(law.cdf(torch.tensor([4.5]).double())), rel=1e-6)
    assert p < 1e-4 and (model.sample(50, {"x": (4.5, None)}).x >= 4.5).all()
    # counts beyond 20 by enumeration, labels beside them by draws; then both at once
    many = {"count": (20, None)}
    drawn = model.sample(1000, many)
    share = (drawn.kind == "v").mean()
    both, error = model.probability({**many, "kind": "v"}, return_error=True)
    once = model.probability(many)
    assert both < 1e-5
    se = np.sqrt(2 * share * (1 - share) / len(drawn)) * once
    assert abs(both - once * share) < 4 * np.hypot(se, error)
    rows = model.sample(50, {**many, "kind": "v"})
    assert (rows["count"] >= 20).all() and (rows.kind == "v").all()


def test_means_and_quantiles_take_conditions(numbers):
    model, whole = numbers
    real = whole[fulfils(whole, {"x": (0.5, 1.0)})]
    mean = model.mean({"x": (0.5, 1.0)}).iloc[0]
    # x alone comes from its own law within the range; the others are averages of draws
    assert mean["x"] == pytest.approx(real.x.mean(), abs=4 * real.x.std() / np.sqrt(len(real)))
    assert mean["y"] == pytest.approx(real.y.mean(), abs=4 * real.y.std() * np.sqrt(2 / 1024))
    half = model.quantile({"x": (0.5, 1.0)}, 0.5)["x"][0]
    assert (real.x <= half).mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(len(real)))
    ends = model.interval({"x": (0.5, 1.0)}, 0.8)["x"].iloc[0]
    assert 0.5 <= ends["lower"] < half < ends["upper"] <= 1


def test_rows_beside_conditions(numbers):
    model, _ = numbers
    drawn = model.sample(3, {"x": np.array([-1.0, 0.0, 1.0]), "y": (0.0, None)}, random_state=1)
    assert drawn.x.tolist() == [-1.0] * 3 + [0.0] * 3 + [1.0] * 3 and (drawn.y >= 0).all()
    nats = model.log_marginal({"x": np.array([-1.0, 0.0, 1.0]), "y": (0.0, None)})
    each = [model.log_marginal({"x": x, "y": (0.0, None)})[0] for x in (-1.0, 0.0, 1.0)]
    np.testing.assert_allclose(nats, each)


def test_a_conditional_model_takes_conditions_on_its_targets():
    model = DensityEstimator(target=["y", "kind"], given=["x"], **FAST).fit(mixed())
    drawn = model.sample(400, {"x": 0.3, "y": (0.5, 1.0)})
    assert (drawn.x == 0.3).all() and drawn.y.between(0.5, 1.0).all()
    free = model.sample(8000, {"x": 0.3})
    held = free.y.between(0.5, 1.0)
    p, error = model.probability({"x": 0.3, "y": (0.5, 1.0)}, return_error=True)
    assert abs(p - held.mean()) < 4 * np.hypot(error, 0.5 / np.sqrt(8000))
    a, b = (drawn.kind == "u").mean(), (free[held].kind == "u").mean()
    assert abs(a - b) < 4 * np.sqrt(0.25 / 400 + 0.25 / held.sum())
    with pytest.raises(ValueError, match="conditional on 'x': pass its value"):
        model.sample(2, {"x": (0, 1)})


def test_constrained_and_missing_columns_take_conditions():
    rng = np.random.default_rng(0)
    start = rng.integers(0, 20, 400)
    table = pd.DataFrame({"start": start, "end": start + rng.integers(0, 10, 400)})
    table["note"] = np.where(rng.random(400) < 0.3, None, np.where(start > 10, "late", "early"))
    model = DensityEstimator(constraints=["start <= end"], missing="model", **FAST).fit(table)
    free = model.sample(20_000)
    given = {"end": (10, 12), "note": {"late"}}
    drawn = model.sample(300, given)
    assert drawn.end.between(10, 12).all() and (drawn.note == "late").all()
    real = free[free.end.between(10, 12) & (free.note == "late")]
    spread = np.sqrt(2 * drawn.start.var() / 300 + real.start.var() / len(real))
    assert abs(drawn.start.mean() - real.start.mean()) < 4 * spread


# ---------------------------------------------------------------------- words


def kinds(n=300):
    rng = np.random.default_rng(0)
    day = rng.integers(0, 60, n)
    return pd.DataFrame({
        "when": pd.Timestamp("2024-01-01") + pd.to_timedelta(day, "D"),
        "wait": pd.to_timedelta(rng.integers(1, 90, n), "min"),
        "size": pd.Categorical.from_codes(rng.integers(0, 3, n), ["S", "M", "L"], ordered=True),
        "date": [datetime.date(2024, 1, 1) + datetime.timedelta(int(d)) for d in day],
        "country": rng.choice(["DE", "FR", "US"], n),
        "age": rng.integers(16, 80, n),
    })  # fmt: skip


@pytest.fixture(scope="module")
def several():
    return DensityEstimator(**FAST).fit(kinds())


@pytest.mark.parametrize(
    "given",
    [
        {"age": (18, 30), "country": ["DE", "FR"]},
        {"when": ("2024-01-10", "2024-01-20")},
        {"when": (pd.Timestamp("2024-01-10"), None), "wait": (None, pd.Timedelta("30min"))},
        {"date": (datetime.date(2024, 2, 1), None)},
        {"size": ("M", "L"), "age": {20, 21, 22}},
        {"age": lambda cells: cells % 2 == 0, "country": "US"},
    ],
    ids="-".join,
)
def test_spellings_of_every_kind(several, given):
    assert fulfils(several.sample(40, given), given).all()


def test_objects_say_the_same_as_spellings(several):
    spelled = several.sample(5, {"age": (18, 30), "country": {"DE", "FR"}}, random_state=0)
    said = {"age": between(18, 30), "country": one_of(["DE", "FR"])}
    pd.testing.assert_frame_equal(spelled, several.sample(5, said, random_state=0))
    even = several.sample(5, {"age": where(lambda cells: cells % 2 == 0)})
    assert (even.age % 2 == 0).all()


def test_lists_alone_are_rows_as_ever(several):
    rows = several.sample(2, {"age": [20, 30], "country": ["DE", "FR"]})
    assert rows.age.tolist() == [20, 20, 30, 30]
    assert rows.country.tolist() == ["DE", "DE", "FR", "FR"]
    assert read_conditions(rows)[1] == {}
    with pytest.raises(ValueError, match="lists of different lengths .*write sets"):
        several.sample(2, {"age": [20, 30, 40], "country": ["DE", "FR"]})


@pytest.mark.parametrize(
    "given, words",
    [
        ({"country": ("DE", "FR")}, "'country' holds labels without an order"),
        ({"country": {"DE", "XX"}}, "'country' has no value 'XX'; it has"),
        ({"age": (30, 18)}, "'age': the range from 30 to 18 is empty"),
        ({"age": (18.2, 18.4)}, "'age' has no value .*steps of 1"),
        ({"wait": (None, datetime.timedelta(minutes=-5))}, "'wait' has no value up to"),
        ({"age": lambda cells: 3}, "'age': the function .* True or False"),
        ({"age": (1, 2), "country": ("DE", "FR", "US")}, "'country' has a tuple of 3"),
        ({"age": (1, 2), "country": []}, "'country' has an empty set"),
        ({"nobody": (1, 2)}, "nobody"),
        ({"country": lambda cells: cells == "XX"}, "'country' has no value of which"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_conditions_that_cannot_be_are_named(several, given, words):
    with pytest.raises(ValueError, match=words):
        several.sample(2, given)


def test_what_no_draw_meets_is_said(several, numbers):
    with pytest.raises(ValueError, match="no row fulfils the conditions 'age'"):
        several.sample(2, {"age": lambda cells: cells > 1e9})
    with pytest.raises(ValueError, match="'x' is continuous: .* no probability"):
        numbers[0].probability({"x": 1.0})
    with pytest.raises(TypeError, match="expected conditions by column"):
        numbers[0].probability(mixed())
    assert numbers[0].probability({"count": 2}) == pytest.approx(
        np.exp(numbers[0].log_marginal({"count": 2})[0])
    )


# ---------------------------------------------------------------------- several imputations


def test_several_imputations_are_draws_of_the_law(labels):
    model, joint = labels
    table = pd.DataFrame({"a": ["p", "q"], "b": [None, "v"], "k": [1.0, np.nan], "c": ["x", None]})
    n = 3000
    many = model.impute(table, n, random_state=3)
    assert len(many) == n and not any(t.isna().any(axis=None) for t in many[:5])
    first = pd.concat([t.iloc[:1] for t in many])["b"]
    held = fulfils(EVERY, {"a": "p", "k": 1.0, "c": "x"})
    exact = joint[held & (EVERY.b == "u")].sum() / joint[held].sum()
    assert (first == "u").mean() == pytest.approx(exact, abs=4 * np.sqrt(0.25 / n))
    second = pd.concat([t.iloc[1:] for t in many])
    held = fulfils(EVERY, {"a": "q", "b": "v"})
    both = held & fulfils(EVERY, {"k": 2.0, "c": "y"})  # gaps of one row are drawn together
    drawn = ((second.k == 2.0) & (second.c == "y")).mean()
    assert drawn == pytest.approx(joint[both].sum() / joint[held].sum(), abs=4 * np.sqrt(0.25 / n))


def test_imputations_keep_what_is_there_and_ignore_the_rows_beside(numbers):
    model, _ = numbers
    table = mixed().head(40).set_index(pd.Index(range(100, 140), name="id"))
    table.loc[::2, ["rain", "kind"]] = None
    one, two = model.impute(table, 2, random_state=1)
    assert one.index.equals(table.index) and not one.isna().any(axis=None)
    pd.testing.assert_frame_equal(one[1::2], table[1::2], check_dtype=False)
    assert (one.rain[::2] != two.rain[::2]).mean() > 0.5
    filled = table.copy()
    filled.iloc[:20] = one.iloc[:20]  # no gaps among the first rows any more
    again = model.impute(filled, 2, random_state=1)
    pd.testing.assert_frame_equal(again[0].iloc[20:], one.iloc[20:], rtol=1e-4)
    with pytest.raises(ValueError, match="'mean' of n=1; got 'mean', n=2"):
        model.impute(table, 2, method="mean")
    with pytest.raises(ValueError, match="n must be a positive integer"):
        model.impute(table, 0)


def test_what_a_function_leaves_missing_is_not_true(numbers):
    model, _ = numbers
    name = next(c.name for c in model.schema_.columns if not c.is_label)

    def above(cells):
        return (cells > cells.median()).astype("boolean")

    for gap in (np.nan, None, pd.NA):

        def held(cells, gap=gap):
            return above(cells).astype(object).where(cells > 0, gap)

        drawn = model.sample(200, {name: held})
        assert (drawn[name] > 0).all()
    with pytest.raises(ValueError, match="must return True or False"):
        model.sample(5, {name: lambda cells: cells.astype(object)})
