"""Predictions of one column given the others, against Bayes' rule and known laws."""

import numpy as np
import pandas as pd
import pytest

from pyroflows.density import DensityEstimator

QUICK = dict(max_steps=80, members=2, random_state=0)


def flowers(n=500, seed=0):
    rng = np.random.default_rng(seed)
    kind = rng.choice(["rose", "lily", "iris"], n, p=[0.5, 0.3, 0.2])
    shift = np.select([kind == "rose", kind == "lily"], [0.0, 2.0], -2.0)
    return pd.DataFrame(
        {
            "kind": pd.Categorical(kind, categories=["rose", "lily", "iris"], ordered=True),
            "tall": rng.random(n) < 1 / (1 + np.exp(-shift)),
            "petals": rng.choice([3, 5, 8], n),
            "size": shift + rng.normal(size=n),
            "mark": np.round(10 + shift + rng.normal(size=n), 1),
        },
        index=[f"n{i}" for i in range(n)],
    )


@pytest.fixture(scope="module")
def table():
    return flowers()


@pytest.fixture(scope="module")
def joint(table):
    return DensityEstimator(**QUICK).fit(table)


@pytest.mark.parametrize("target", ["kind", "tall", "petals"])
def test_probabilities_are_those_of_bayes_rule_over_all_labels(joint, table, target):
    few = table.iloc[:30]
    got = joint.predict_proba(few, target)
    assert got.index.equals(few.index) and got.columns.name == target
    labels = list(got.columns)
    assert sorted(labels, key=str) == sorted(table[target].unique(), key=str)
    score = [
        joint.score_samples(few.assign(**{target: pd.Series(v, few.index, few[target].dtype)}))
        for v in labels
    ]
    want = np.exp(np.array(score).T)
    np.testing.assert_allclose(got, want / want.sum(1, keepdims=True), atol=1e-6)
    # The cell itself is not looked at, and need not be there.
    pd.testing.assert_frame_equal(joint.predict_proba(few.drop(columns=target)), got)


def test_missing_cells_are_integrated_out(joint, table):
    few = table.iloc[:10].drop(columns=["tall", "petals"])
    got = joint.predict_proba(few, "kind")
    seen = few.drop(columns="kind")
    score = [
        joint.log_marginal(seen.assign(kind=pd.Series(v, seen.index, table["kind"].dtype)))
        for v in got.columns
    ]
    want = np.exp(np.array(score).T)
    np.testing.assert_allclose(got, want / want.sum(1, keepdims=True), atol=1e-6)


def test_predictions_have_the_types_of_their_columns(joint, table):
    few = table.iloc[:40]
    for target in ("kind", "tall", "petals"):
        got = joint.predict(few, target)
        assert got.dtype == table[target].dtype and got.index.equals(few.index)
        assert got.name == target
        best = joint.predict_proba(few, target).to_numpy().argmax(1)
        names = joint.predict_proba(few, target).columns
        assert got.astype(object).tolist() == [names[k] for k in best]
    assert (joint.predict(few, "kind") == few["kind"]).mean() > 0.6


def test_a_number_is_predicted_by_its_conditional_mean(joint, table):
    few = table.iloc[:15]
    rest = few.drop(columns="mark")
    got = joint.predict(few, "mark")
    np.testing.assert_allclose(got, joint.predict(rest))
    np.testing.assert_allclose(got, joint.mean(rest)["mark"], atol=1e-9)  # exact: the last column
    for found in (joint.mean(rest), joint.quantile(rest), joint.interval(rest)):
        assert found.index.equals(rest.index)
    shift = few["kind"].map({"rose": 0.0, "lily": 2.0, "iris": -2.0}).astype(float)
    assert np.corrcoef(got, 10 + shift)[0, 1] > 0.8


def test_a_conditional_model_needs_no_name(table):
    model = DensityEstimator(target="kind", given=["size", "mark"], **QUICK).fit(table)
    rows = table[["size", "mark"]].iloc[:20]
    proba = model.predict_proba(rows)
    np.testing.assert_allclose(proba.sum(axis=1), 1)
    for v in proba.columns:
        cell = pd.Series(v, rows.index, table["kind"].dtype)
        want = np.exp(model.score_samples(rows.assign(kind=cell)[["kind", "size", "mark"]]))
        np.testing.assert_allclose(proba[v], want, atol=1e-2)  # less what an unseen label has
    assert model.predict(rows).tolist() == proba.idxmax(axis=1).tolist()
    with pytest.raises(ValueError, match="'size' is given"):
        model.predict(rows, "size")


def test_the_posterior_is_near_the_true_one():
    """Two normal classes, whose posterior is a logistic function."""
    train, test = flowers(2000, 1), flowers(1000, 2)
    model = DensityEstimator(max_steps=200, members=2, random_state=0).fit(
        train[["size", "mark", "kind"]]
    )
    got = model.predict_proba(test[["size", "mark"]])
    shifts = np.array([0.0, 2.0, -2.0])
    size, mark = test["size"].to_numpy()[:, None], test["mark"].to_numpy()[:, None] - 10
    log_p = np.log([0.5, 0.3, 0.2]) - 0.5 * (size - shifts) ** 2 - 0.5 * (mark - shifts) ** 2
    true = np.exp(log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True))
    labels = ["rose", "lily", "iris"]
    assert np.abs(got[labels].to_numpy() - true).mean() < 0.03
    best = (np.array(labels)[true.argmax(1)] == test["kind"]).mean()
    assert (model.predict(test[["size", "mark"]]).to_numpy() == test["kind"]).mean() > best - 0.02


def test_what_cannot_be_predicted_is_named(joint, table):
    with pytest.raises(ValueError, match="'size' holds numbers"):
        joint.predict_proba(table, "size")
    with pytest.raises(ValueError, match="'weight' is no column"):
        joint.predict(table, "weight")
    odd = table.iloc[:2].astype({"kind": object})
    odd.iloc[0, 0] = "tulip"
    with pytest.warns(UserWarning, match="tulip"):
        got = joint.predict_proba(odd, "tall")
    assert got.iloc[0].isna().all() and got.iloc[1].sum() == pytest.approx(1)
    numbers = DensityEstimator(max_steps=3, members=2, random_state=0).fit(table[["size", "mark"]])
    assert not hasattr(numbers, "predict_proba")
