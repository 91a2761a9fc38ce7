"""Why a row is odd: its log-density cell by cell."""

import numpy as np
import pandas as pd
import pytest

from pyroflows.density import DensityEstimator

QUICK = dict(max_steps=60, members=2, random_state=0)


def mixed(n=400, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n)
    return pd.DataFrame(
        {
            "size": 2 * z + 1,
            "count": rng.poisson(np.exp(1 + 0.3 * z)),
            "kind": pd.Categorical(np.where(z + 0.5 * rng.normal(size=n) > 0, "u", "v")),
            "rain": np.where(rng.random(n) < 0.3, 0.0, np.exp(0.5 * z + rng.normal(size=n))),
            "id": [f"row {i}" for i in range(n)],
        },
        index=pd.RangeIndex(100, 100 + n, name="row"),
    )


def holes(table, seed=1, share=0.2):
    rng = np.random.default_rng(seed)
    return table.assign(
        **{c: table[c].mask(rng.random(len(table)) < share) for c in ("count", "kind", "rain")}
    )


KEY = {"id": {"kind": "key"}}


@pytest.fixture(scope="module")
def table():
    return mixed()


@pytest.fixture(scope="module")
def joint(table):
    return DensityEstimator(schema=KEY, **QUICK).fit(table)


# ---------------------------------------------------------------------- cells of the log-density


def test_cells_of_a_complete_row_sum_to_its_log_density(joint, table):
    cells = joint.score_columns(table)
    assert list(cells.columns) == list(table.columns)
    pd.testing.assert_index_equal(cells.index, table.index)
    np.testing.assert_allclose(cells.sum(axis=1), joint.score_samples(table), rtol=1e-12)
    assert np.ptp(cells["id"]) < 1e-9 and -0.01 < cells["id"].iloc[0] <= 0  # a key tells nothing
    # The first column of the model's order has its marginal density.
    first = min(table.columns, key=lambda c: joint.summary()["place"][c])
    alone = joint.log_marginal(table[[first]])
    np.testing.assert_allclose(cells[first], alone, rtol=1e-9)


@pytest.mark.parametrize("gaps_at_fit", [False, True])
def test_cells_of_a_row_with_gaps_sum_to_the_density_of_what_is_there(table, joint, gaps_at_fit):
    few = holes(table).iloc[:40]
    few.iloc[:10, 0] = np.nan  # before others in either order
    model = DensityEstimator(schema=KEY, **QUICK).fit(holes(table)) if gaps_at_fit else joint
    cells = model.score_columns(few)
    assert (cells.isna() == few.isna()).all(axis=None)
    np.testing.assert_allclose(cells.sum(axis=1), model.score_samples(few), atol=1e-9)
    # A cell after a gap is scored given the observed ones alone.
    order = model.summary()["place"].sort_values().index
    row = few.iloc[[int(np.argmax(few[order[0]].isna() & few[order[2]].notna()))]]
    before = model.log_marginal(row[order[:2]])
    upto = model.log_marginal(row[order[:3]])
    np.testing.assert_allclose(cells.loc[row.index, order[2]], upto - before, atol=1e-6)


def test_missing_cells_that_are_modelled_have_the_log_probability_of_being_missing(table):
    few = holes(table)
    model = DensityEstimator(schema=KEY, missing="model", **QUICK).fit(few)
    cells = model.score_columns(few)
    np.testing.assert_allclose(cells.sum(axis=1), model.score_samples(few), rtol=1e-12)
    gone = np.exp(cells["rain"][few["rain"].isna()])
    assert ((gone > 0.02) & (gone < 0.9)).all()


def test_cells_of_a_conditional_model_are_those_of_its_targets(table):
    model = DensityEstimator(target=["rain", "kind"], given=["size"], **QUICK).fit(table)
    cells = model.score_columns(table)
    assert list(cells.columns) == ["kind", "rain"]
    np.testing.assert_allclose(cells.sum(axis=1), model.score_samples(table), rtol=1e-12)


def test_impossible_cells_have_no_density_and_unseen_labels_their_share(joint, table):
    odd = table.iloc[:3].astype({"kind": object})
    odd.iloc[0, 3], odd.iloc[1, 1], odd.iloc[2, 2] = -1.0, 3000, "w"
    cells = joint.score_columns(odd)
    assert cells["rain"].iloc[0] == -np.inf and joint.score_samples(odd)[0] == -np.inf
    assert np.isfinite(cells["count"].iloc[0])
    assert cells["count"].iloc[1] < -15
    assert cells["kind"].iloc[2] == pytest.approx(-np.log(len(table) + 2))
    with pytest.raises(ValueError, match="feature names"):
        joint.score_columns(odd.drop(columns="kind"))


def test_a_broken_constraint_is_the_fault_of_the_column_it_binds():
    rng = np.random.default_rng(0)
    start = rng.normal(size=200)
    net, tax = rng.integers(1, 90, 200), rng.integers(1, 9, 200)
    table = pd.DataFrame(
        {"start": start, "end": start + rng.exponential(size=200), "net": net, "tax": tax}
    ).assign(gross=net + tax)
    model = DensityEstimator(constraints=["start < end", "net + tax == gross"], **QUICK).fit(table)
    odd = table.iloc[:3].copy()
    odd.iloc[0, 1], odd.iloc[1, 4] = odd.iloc[0, 0], 500
    cells = model.score_columns(odd)
    assert np.isneginf(cells).sum().to_dict() == dict(start=0, end=1, net=0, tax=0, gross=1)
    np.testing.assert_array_equal(np.isneginf(cells).any(axis=1), [True, True, False])
    np.testing.assert_allclose(cells.sum(axis=1), model.score_samples(odd), rtol=1e-12)
