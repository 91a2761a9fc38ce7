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


# ---------------------------------------------------------------------- oddness


@pytest.fixture(scope="module")
def clinic():
    """Rows of many columns with heavy tails; a first half to fit, a second half to judge."""
    rng = np.random.default_rng(0)
    n = 3000
    z = rng.normal(size=n)
    sex = rng.choice(["f", "m"], n)
    age = np.clip(np.round(45 + 15 * z), 18, 95).astype(int)
    income = np.round(np.exp(10 + 0.4 * z + 0.2 * rng.standard_t(4, n)))
    table = pd.DataFrame(
        {
            "age": age,
            "sex": sex,
            "pregnant": np.where((sex == "f") & (rng.random(n) < 0.3), "yes", "no"),
            "income": income,
            "tax": np.round(income * (0.2 + 0.02 * rng.normal(size=n)) / 100, 1),
            **{f"x{i}": rng.standard_t(3, n) for i in range(4)},
        }
    )
    model = DensityEstimator(max_steps=120, members=2, random_state=0).fit(table[: n // 2])
    return model, table[n // 2 :]


def planted(rows, **cells):
    return rows.iloc[:40].assign(**cells)


PLANTED = [
    dict(age=-3),
    dict(income=9e7),
    dict(tax=5000.0),
    dict(sex="m", pregnant="yes"),
    dict(sex="female"),
]


def test_one_wrong_cell_is_not_drowned_by_ordinary_ones(clinic):
    model, rows = clinic
    ordinary = model.outlier_score(rows)
    low = model.score_samples(rows)
    for cells in PLANTED:
        odd = planted(rows, **cells)
        # odder than nearly all ordinary rows; so short a fit knows little of the combination
        place = (ordinary[:, None] > model.outlier_score(odd)).mean(0)
        assert np.median(place) < (0.05 if len(cells) > 1 else 0.01), cells
        by_density = (low[:, None] < model.score_samples(odd)).mean(0)
        assert np.mean(place) <= np.mean(by_density) + 2e-3, cells


def test_rows_of_cells_that_do_not_belong_together_are_as_odd_as_by_density(clinic):
    model, rows = clinic
    mixed = rows.iloc[:300].copy()
    for name in ("age", "sex", "pregnant", "income", "tax"):
        mixed[name] = rows[name].sample(300, random_state=len(name)).to_numpy()

    def auc(ordinary, odd):
        return (odd[:, None] > ordinary).mean()

    new = auc(model.outlier_score(rows), model.outlier_score(mixed))
    old = auc(-model.score_samples(rows), -model.score_samples(mixed))
    assert new > max(old, 0.85)


def test_contamination_is_the_share_of_fresh_rows(clinic):
    model, rows = clinic
    score, tails = model.outlier_score(rows), model.explain(rows.iloc[:400]).tail
    for share in (0.2, 0.05):
        found = score > -np.log(share)
        noise = np.sqrt(share * (1 - share) * (1 / len(rows) + 1 / 1500))
        assert abs(found.mean() - share) < 4 * noise
        few = model.predict_outliers(rows.iloc[:200], share)
        np.testing.assert_array_equal(few, found[:200])
        seen = (tails < share).mean(axis=None)
        assert 0.5 * share < seen < 1.5 * share


def test_impossible_and_broken_rows_are_infinitely_odd(joint, table):
    odd = table.iloc[:2].copy()
    odd.iloc[0, 3] = -1.0
    score = joint.outlier_score(odd)
    assert score[0] == np.inf and np.isfinite(score[1])
    assert joint.predict_outliers(odd, 1e-6).tolist() == [True, False]
    explained = joint.explain(odd)
    assert explained.tail.iloc[0]["rain"] == 0 and explained.rows.iloc[0] == 0


def test_calibration_is_saved_and_older_files_fall_back_on_densities(joint, table, tmp_path):
    joint.save(tmp_path / "model.safetensors")
    again = DensityEstimator.load(tmp_path / "model.safetensors")
    np.testing.assert_allclose(again.outlier_score(table), joint.outlier_score(table), rtol=1e-9)
    again.oddness_ = None
    low = again.predict_outliers(table, 0.1)
    assert 0.02 < low.mean() < 0.25
    assert again.score_samples(table)[low].max() <= again.score_samples(table)[~low].min()
    with pytest.raises(ValueError, match="fit it again"):
        again.explain(table)


# ---------------------------------------------------------------------- explanations


@pytest.mark.parametrize("given", ["earlier", "others"])
def test_the_wrong_cell_is_blamed_and_what_it_should_be_is_told(clinic, given):
    model, rows = clinic
    for cells in PLANTED if given == "earlier" else PLANTED[2:4]:
        odd = planted(rows, **cells).iloc[: 4 if given == "earlier" else 2]
        explained = model.explain(odd, given=given)
        worst = explained.tail.idxmin(axis=1)
        assert worst.isin(list(cells)).mean() > 0.8, (cells, worst.tolist())
    tax = model.explain(planted(rows, tax=5000.0).iloc[:4], given=given).table["tax"]
    true = rows["tax"].iloc[:4]
    assert ((tax["lower"] < true) & (true < tax["upper"])).mean() > 0.6
    assert (np.abs(np.log(tax["expected"] / true)) < 0.5).all()
    assert (tax["value"] == 5000).all()


def test_a_stranger_leaves_the_other_cells_without_blame(clinic):
    model, rows = clinic
    for given in ("earlier", "others"):  # in the others' eyes, after a second look
        few = rows.iloc[: 3 if given == "earlier" else 2]
        fair = model.explain(few, given=given).tail.drop(columns="age")
        odd = model.explain(few.assign(age=-3), given=given).tail.drop(columns="age")
        assert (odd.min(axis=1) > 0.05 * fair.min(axis=1)).all()


def test_given_all_others_agrees_with_bayes_rule(joint, table):
    few = table.iloc[:25]
    cells = joint.explain(few, given="others").table
    whole = joint.score_samples(few)
    for name, error in {"size": 0.3, "count": 0.1, "rain": 0.1, "kind": 0.01}.items():
        want = whole - joint.log_marginal(few.drop(columns=name))
        np.testing.assert_allclose(cells[name]["log_density"], want, atol=error)
    rest = few.iloc[:8].drop(columns="size")
    q = joint.quantile(rest, [0.05, 0.5, 0.95], draws=4000)["size"]
    got = cells["size"][["lower", "expected", "upper"]].iloc[:8].to_numpy(float)
    np.testing.assert_allclose(got, q.to_numpy(), atol=0.2)


def test_given_earlier_cells_agree_with_the_cells_of_the_log_density(joint, table):
    cells = joint.explain(table.iloc[:50]).table.xs("log_density", axis=1, level=1)
    np.testing.assert_allclose(cells, joint.score_columns(table.iloc[:50]), atol=1e-4)


def test_an_explanation_is_a_table_with_the_types_of_the_cells(joint, table):
    few = table.iloc[:5].copy()
    few.iloc[0, 1] = 400
    few.loc[few.index[1], "rain"] = np.nan
    explained = joint.explain(few)
    assert explained.table["kind"]["expected"].dtype == table["kind"].dtype
    assert explained.table.index.equals(few.index)
    assert np.isnan(explained.tail.loc[few.index[1], "rain"])
    top = explained.top(3)
    assert len(top) == 3 and top["tail"].is_monotonic_increasing
    assert (top["row"].iloc[0], top["column"].iloc[0]) == (few.index[0], "count")
    assert top["value"].iloc[0] == 400
    assert "count" in repr(explained) and "<table" in explained._repr_html_()
    assert len(joint.explain(few.iloc[:0]).top()) == 0
    for wrong in (dict(given="all"), dict(coverage=1.0)):
        with pytest.raises(ValueError, match="given|coverage"):
            joint.explain(few, **wrong)


def test_days_are_shown_as_days():
    days = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(200) % 90, unit="D")
    table = pd.DataFrame({"day": days, "clock": days + pd.to_timedelta(np.arange(200), unit="s")})
    why = DensityEstimator(random_state=0, max_steps=20).fit(table).explain(table.head(5))
    assert all(
        ":" not in why.range(i, "day") and " to 2024-" in why.range(i, "day") for i in (0, 4)
    )
    assert ":" in why.range(4, "clock")
    pytest.importorskip("matplotlib").use("agg")
    ax = why.plot()
    day = next(
        t.get_text() for t in ax.texts if "2024" in t.get_text() and ":" not in t.get_text()
    )
    assert day.strip().startswith("2024-01-0") and ax.get_xticklabels()[-1].get_text() == "≤ 1e-6"
