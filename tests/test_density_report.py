"""How good samples are: two tables side by side, and pictures of what was found."""

import builtins

import numpy as np
import pandas as pd
import pytest

from pyroflows.density import DensityEstimator
from pyroflows.density.quality import compare


def people(n, seed):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n)
    return pd.DataFrame(
        {
            "size": z,
            "weight": 2 * z + 0.5 * rng.normal(size=n),
            "kind": pd.Categorical(np.where(z + rng.normal(size=n) > 0, "u", "v")),
            "seen": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 99, n), "D"),
            "rain": np.where(rng.random(n) < 0.2, np.nan, rng.exponential(size=n)),
        }
    )


@pytest.fixture(scope="module")
def tables():
    return people(2000, 0), people(2000, 1), people(2000, 2)


def without(name):
    """An import that does not find a package."""
    real = builtins.__import__

    def find(module, *args, **options):
        if module.split(".")[0] == name:
            raise ImportError(name)
        return real(module, *args, **options)

    return find


@pytest.mark.parametrize("trees", [True, False])
def test_rows_of_one_law_cannot_be_told_apart(tables, trees, monkeypatch):
    if trees:
        pytest.importorskip("sklearn")
    else:
        monkeypatch.setattr(builtins, "__import__", without("sklearn"))
    train, real, other = tables
    report = compare(real, other, train=train)
    assert report.classifier == ("boosted trees" if trees else "logistic regression")
    line = report.summary["synthetic"]
    noise = np.sqrt(2 * 1000 / (12 * 1000**2))  # of an AUC of two times 1000 rows
    assert abs(line["two-sample AUC (0.5 is best)"] - 0.5) < 4 * noise
    assert report.columns["distance"].max() < 0.06
    assert line["share of exact copies"] == 0
    near = line["share nearer to training rows than 95 % of real ones"]
    assert abs(near - 0.05) < 4 * np.sqrt(2 * 0.05 / 1000)
    assert "cannot be told" in report.verdict and "no copies" in report.verdict


@pytest.mark.parametrize("trees", [True, False])
def test_columns_drawn_apart_are_found_in_pairs(tables, trees, monkeypatch):
    if not trees:
        monkeypatch.setattr(builtins, "__import__", without("sklearn"))
    train, real, other = tables
    apart = other.assign(weight=other["weight"].sample(frac=1, random_state=0).to_numpy())
    report = compare(real, apart, train=train)
    assert report.summary.loc["two-sample AUC (0.5 is best)", "synthetic"] > 0.85
    assert report.columns["distance"].max() < 0.06
    worst = report.pairs.iloc[0]
    assert {worst["first"], worst["second"]} == {"size", "weight"}
    true = np.corrcoef(real["size"].rank(), real["weight"].rank())[0, 1]
    assert worst["correlation"] == pytest.approx(-true, abs=0.1)


def test_distances_of_a_column_are_known(tables):
    train, real, other = tables
    moved = other.assign(size=other["size"] + 1, rain=np.nan)
    report = compare(real, moved, train=train).columns
    from scipy.stats import norm

    noise = 2 / np.sqrt(1000)
    assert report.loc["size", "distance"] == pytest.approx(2 * norm.cdf(0.5) - 1, abs=noise)
    assert report.loc["size", "wasserstein"] == pytest.approx(1, abs=0.15)
    assert report.loc["rain", "missing"] == pytest.approx(0.8, abs=0.05)
    assert report["real"].drop("rain").max() < 2 * noise


def test_copies_are_seen(tables):
    train, real, other = tables
    half = pd.concat([train.iloc[:1000], other.iloc[:1000]]).sample(frac=1, random_state=0)
    report = compare(real, half, train=train)
    copies = report.summary.loc["share of exact copies", "synthetic"]
    assert copies == pytest.approx(0.5, abs=0.06)
    assert "repeat training rows" in report.verdict
    blind = compare(train, half, train=train).verdict  # real rows that are those of training
    assert "100.0% are exact copies" in blind and "They are no copies" not in blind


def test_a_model_reports_on_its_samples_in_words_tables_and_pictures(tables):
    train, real, _ = (t.iloc[:400] for t in tables)
    model = DensityEstimator(max_steps=60, members=2, random_state=0).fit(train)
    report = model.report(real, train=train)
    line = report.summary["synthetic"]
    assert line["nats per real row"] == pytest.approx(model.score(real))
    assert line["two-sample AUC (0.5 is best)"] < 0.9
    assert report.verdict in repr(report) and "<table" in report._repr_html_()
    assert "easily told" in model.report(real, real.assign(size=9.0)).verdict
    target = DensityEstimator(target="kind", given=["size"], max_steps=9, members=2).fit(train)
    assert set(target.report(real).columns.index) == {"kind", "size"}
    pytest.importorskip("matplotlib").use("Agg")
    figure = report.plot()
    assert [ax.get_xlabel()[:8] for ax in figure.axes] == ["distance"] * 3
    odd = real.iloc[:3].assign(size=[0.0, 40.0, 0.0])
    ax = model.explain(odd).plot()
    assert ax.get_title() == f"row {odd.index[1]}"
    assert ax.get_yticklabels()[-1].get_text() == "size"


def test_tables_that_cannot_be_compared_are_refused(tables):
    train, real, _ = tables
    with pytest.raises(ValueError, match="lacks the columns \\['rain'\\]"):
        compare(real, real.drop(columns="rain"))
    with pytest.raises(ValueError, match="20 rows"):
        compare(real, real.iloc[:3])
