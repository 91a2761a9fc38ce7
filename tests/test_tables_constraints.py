"""Constraints hold in every sample and are scored right; keys and free text are said."""

import warnings

import numpy as np
import pandas as pd
import pytest

from pyroflows.density import DensityEstimator
from pyroflows.tables import Schema

QUICK = dict(max_steps=30, members=2, hidden_dim=8, random_state=0)


def orders(n=400):
    rng = np.random.default_rng(0)
    start = pd.Timestamp("2020-01-01") + pd.to_timedelta(rng.integers(0, 300, n), "D")
    a, b = (np.round(rng.exponential(s, n), 2) for s in (10, 5))
    return pd.DataFrame(
        {
            "start": start,
            "end": start + pd.to_timedelta(rng.geometric(0.1, n), "D"),
            "a": a,
            "b": b,
            "c": np.round(a + b, 2),
            "x": rng.normal(size=n),
        }
    )


def test_every_sample_keeps_every_constraint(tmp_path):
    pytest.importorskip("safetensors")
    table = orders()
    rules = ["start < end", "a + b == c", "x <= 10"]
    model = DensityEstimator(constraints=rules, **QUICK).fit(table)
    drawn = model.sample(5000)
    assert (drawn["start"] < drawn["end"]).all()
    np.testing.assert_allclose(drawn["a"] + drawn["b"], drawn["c"], atol=1e-9)
    assert drawn.dtypes.equals(table.dtypes)
    assert (drawn["c"] == drawn["c"].round(2)).all()
    score = model.score_samples(table)
    assert np.isfinite(score).all()
    for broken in (
        table.assign(c=table["c"] + 1),
        table.assign(end=table["start"]),
        table.assign(x=11.0),
    ):
        assert (model.score_samples(broken) == -np.inf).all()
    summary = model.summary()["model"]
    assert summary["c"] == "= a + b, determined"
    assert summary["end"].startswith("> start; the difference: lattice, step 1 days, >= 1 days")
    model.save(tmp_path / "m")
    again = DensityEstimator.load(tmp_path / "m")
    np.testing.assert_array_equal(again.score_samples(table), score)
    pd.testing.assert_frame_equal(again.sample(10), model.sample(10))


def test_a_constraint_scores_what_a_column_of_differences_would():
    table = orders()[["start", "end", "x"]]
    rest = (table["end"] - table["start"]).dt.total_seconds()
    model = DensityEstimator(constraints=["start < end"], **QUICK).fit(table)
    other = DensityEstimator(schema={"end": {"lower": 86400.0}}, **QUICK).fit(
        table.assign(end=rest)
    )
    np.testing.assert_allclose(
        model.score_samples(table), other.score_samples(table.assign(end=rest)), atol=1e-6
    )
    given = DensityEstimator(
        target=["end"], given=["start"], constraints=["start < end"], **QUICK
    ).fit(table)
    ends = pd.Timestamp("2020-01-02") + pd.to_timedelta(np.arange(4000), "D")
    rows = pd.DataFrame({"start": pd.Timestamp("2020-01-01"), "end": ends})
    assert np.exp(given.score_samples(rows)).sum() * 86400 == pytest.approx(1, abs=1e-3)


def test_a_determined_column_costs_nothing_and_fills_in():
    table = orders()[["a", "b", "c"]]
    model = DensityEstimator(constraints=["a + b == c"], **QUICK).fit(table)
    other = DensityEstimator(**QUICK).fit(table[["a", "b"]])
    gain = model.score_samples(table) - other.score_samples(table[["a", "b"]])
    assert np.abs(gain).mean() < 0.2  # another model of the same two columns
    holes = table.copy()
    holes.loc[::2, "a"] = np.nan
    np.testing.assert_allclose(model.impute(holes)["a"], table["a"], atol=1e-9)
    np.testing.assert_allclose(model.score_samples(holes), model.score_samples(table), atol=1e-9)


def test_the_given_column_stays_and_the_target_is_replaced():
    table = orders()[["start", "end"]]
    model = DensityEstimator(
        target=["start"], given=["end"], constraints=["start < end"], **QUICK
    ).fit(table)
    drawn = model.sample(20, table[["end"]])
    assert (drawn["start"] < drawn["end"]).all()
    quantile = model.quantile(table[["end"]], 0.9)["start"]
    assert (quantile < table["end"].to_numpy()).all()
    assert (model.mean(table[["end"]])["start"] < table["end"].to_numpy()).all()


def test_largest_of_several_and_chains():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 400))
    c = np.maximum(a, b) + rng.exponential(size=400)
    table = pd.DataFrame({"d": c + rng.exponential(size=400), "c": c, "b": b, "a": a})
    rules = ["a <= c", "b <= c", "c <= d"]
    drawn = DensityEstimator(constraints=rules, **QUICK).fit(table).sample(3000)
    assert (drawn["c"] >= drawn[["a", "b"]].max(axis=1)).all()
    assert (drawn["d"] >= drawn["c"]).all()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("start < nope", "'nope' is neither a column"),
        ("a + b", "expected one of"),
        ("start < end < c", "expected one of"),
        ("a < x", r"does not hold in \d+ of 400 rows"),
        ("a <= 5", r"does not hold in \d+ rows, e.g. 'a' = "),
        ("k < a", "'k' holds labels"),
        (["a <= c", "c <= a"], "form a circle"),
        (7, "expected text"),
        ("2*a <= c", r"'2\*a' is neither a column"),
    ],
)
def test_bad_constraints_are_named(rule, message):
    table = orders().assign(k="u")
    with pytest.raises(ValueError, match=message):
        Schema.from_frame(table, constraints=rule if isinstance(rule, list) else [rule])


def test_one_constraint_may_be_text():
    assert Schema.from_frame(orders(), constraints="a <= c")["c"].relation.names == ["a"]


def test_a_constraint_between_given_columns_is_said_to_bind_nothing():
    table = pd.DataFrame({"a": [1.0, 2.5, 4.0], "b": [2.0, 3.5, 7.0], "y": [0.0, 1.5, 2.0]})
    with pytest.warns(UserWarning, match="'a < b' is between given columns only"):
        Schema.from_frame(table, constraints=["a < b"], given=["a", "b"])


def test_half_known_rows_are_refused():
    table = orders()[["start", "end", "x"]]
    model = DensityEstimator(constraints=["start < end"], **QUICK).fit(table)
    holes = table.copy()
    holes.loc[3, "start"] = pd.NaT
    for ask in (model.score_samples, model.impute):
        with pytest.raises(ValueError, match="1 rows .first is row 3. have column 'end'|row 3"):
            ask(holes)
    holes.loc[3, "end"] = pd.NaT
    full = model.impute(holes)
    assert (full["start"] < full["end"]).all()
    with pytest.raises(ValueError, match="ties it to"):
        model.sample(2, {"end": table["end"][0]})
    with pytest.raises(ValueError, match=r"difference's smallest .* 1 days; .*'end' > start"):
        model.sample(2, {"start": "2024-05-01", "end": "2024-04-01"})
    with pytest.raises(ValueError, match=r"^unknown columns \['stop'\]; the fit had"):
        model.sample(2, {"stop": 1})


# ---------------------------------------------------------------------- keys and text


def people(n=300):
    rng = np.random.default_rng(0)
    words = rng.choice(["red", "blue", "very", "small", "house", "of", "cards"], (n, 6))
    return pd.DataFrame(
        {
            "id": np.arange(1000, 1000 + n),
            "code": [f"A{i:05d}-x" for i in rng.permutation(n)],
            "hash": ["".join(rng.choice(list("0123456789abcdef"), 12)) for _ in range(n)],
            "comment": [" ".join(w) for w in words],
            "city": rng.choice(["Rome", "Oslo", "Bern"], n),
            "x": rng.normal(size=n),
        }
    )


def test_keys_and_free_text_are_said():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Schema.from_frame(people())
    texts = {str(w.message).split("'")[1]: str(w.message) for w in said}
    assert set(texts) == {"id", "code", "hash", "comment"}
    assert "keys" in texts["id"] and "keys" in texts["code"] and "free text" in texts["comment"]
    assert all("'kind': 'ignore'" in t and "'kind': 'key'" in t for t in texts.values())


def test_fresh_keys_are_drawn_and_text_is_left_out():
    table = people()
    schema = {c: {"kind": "key"} for c in ("id", "code", "hash")} | {"comment": {"kind": "ignore"}}
    model = DensityEstimator(schema=schema, **QUICK).fit(table)
    drawn = model.sample(500, random_state=1)
    assert list(drawn) == ["id", "code", "hash", "city", "x"]
    for name in ("id", "code", "hash"):
        assert drawn[name].nunique() == 500
        assert not drawn[name].isin(table[name]).any()
        assert drawn[name].dtype == table[name].dtype
    assert drawn["code"].str.fullmatch(r"A\d{5}-x").all()
    assert drawn["hash"].str.fullmatch(r"[0-9a-f]{12}").all()
    assert (model.sample(5, random_state=2)["hash"] != drawn["hash"][:5]).all()
    # they cost no nats: what is scored are the other columns
    other = DensityEstimator(**QUICK).fit(table[["city", "x"]])
    gain = model.score_samples(table) - other.score_samples(table[["city", "x"]])
    assert np.abs(gain).mean() < 0.2
    with_text = model.impute(table.assign(city=table["city"].mask(table["x"] > 0)))
    pd.testing.assert_series_equal(with_text["id"], table["id"])
