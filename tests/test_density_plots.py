"""Pictures of tables: they are drawn, and show what they say."""

import numpy as np
import pandas as pd
import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from pyroflows import plots  # noqa: E402
from pyroflows.density import DensityEstimator  # noqa: E402
from pyroflows.training import History  # noqa: E402


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    x = rng.normal(size=400)
    return pd.DataFrame(
        {"x": x, "k": rng.poisson(np.exp(1 + 0.3 * x)), "c": np.where(x > 0, "p", "n")}
    )


@pytest.fixture(scope="module")
def model(table):
    return DensityEstimator(max_steps=80, members=2, random_state=0).fit(table)


@pytest.fixture(autouse=True)
def close():
    yield
    matplotlib.pyplot.close("all")


def test_every_picture_is_drawn(model, table):
    assert len(plots.marginals(model, table).axes) == 3
    assert len(plots.pair_plot(model, table).axes) == 4
    for ax in (
        plots.pit_plot(model, table),
        plots.pit_plot(model, table, column="x"),
        plots.qq_plot(model, table),
        plots.training_curve(model),
    ):
        ax.figure.canvas.draw()
    with pytest.raises(ValueError, match="at least one number column"):
        plots.pair_plot(model, table, columns=[])


def test_the_losses_of_a_fit_are_drawn():
    records = [dict(epoch=1, step=4, train=3.0, valid=2.5), dict(epoch=2, step=8, train=2.0)]
    records[1]["valid"] = 2.0
    ax = plots.training_curve(History(records=records, best_epoch=1))
    lines = {line.get_label(): line.get_data()[1] for line in ax.lines}
    assert list(lines["training"]) == [3.0, 2.0] and list(lines["held out"]) == [2.5, 2.0]
    ax = plots.training_curve(History(losses=[5.0, 4.0, 3.0]))
    assert list(ax.lines[0].get_data()[1]) == [5.0, 4.0, 3.0]


def test_conditional_density_has_area_one(model):
    ax = plots.conditional_density(model, {"c": "p"}, "x")
    x, y = ax.lines[0].get_data()
    assert np.trapezoid(y, x) == pytest.approx(1, abs=0.1)
    bars = plots.conditional_density(model, {"x": 1.0}, "c").patches
    assert sum(b.get_height() for b in bars) == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="both given and drawn"):
        plots.conditional_density(model, {"x": 1.0}, "x")


def test_conditional_models_are_drawn_too(table):
    model = DensityEstimator(target="x", max_steps=20, members=2, random_state=0).fit(table)
    assert len(plots.marginals(model, table).axes) == 1
    plots.conditional_density(model, {"k": 3, "c": "p"}, "x")


@pytest.fixture(scope="module")
def odd():
    """Times of every kind, nothing, always the same, and a key."""
    rng = np.random.default_rng(0)
    n = 200
    day = pd.Timestamp("2019-01-01") + pd.to_timedelta(rng.integers(0, 900, n), "D")
    return pd.DataFrame(
        {
            "day": day,
            "text": day.strftime("%Y-%m-%d"),
            "took": pd.to_timedelta(rng.exponential(5000, n).round(), "s"),
            "end": day + pd.to_timedelta(rng.integers(1, 30, n), "D"),
            "empty": np.nan,
            "never": pd.Series([pd.NaT] * n),
            "same": 3.5,
            "once": pd.Timestamp("2020-01-01"),
            "id": np.arange(n),
            "x": rng.normal(size=n),
        }
    )


@pytest.fixture(scope="module")
def odd_model(odd):
    return DensityEstimator(
        max_steps=20,
        members=2,
        hidden_dim=8,
        random_state=0,
        schema={"id": {"kind": "key"}},
        constraints=["day < end"],
    ).fit(odd)


def words(ax):
    ax.figure.canvas.draw()
    return " ".join(t.get_text() for t in ax.get_xticklabels())


def test_times_have_dates_on_the_axis_and_empty_panels_say_so(odd_model, odd):
    panels = {ax.get_title(): ax for ax in plots.marginals(odd_model, odd).axes}
    for name in ("day", "text", "end"):
        assert len(panels[name].patches) > 12
        assert "2020" in words(panels[name])
        low, high = panels[name].get_xlim()
        assert matplotlib.dates.num2date(low).year >= 2018
        assert matplotlib.dates.num2date(high).year <= 2022
    assert " h" in words(panels["took"])
    for name, text in (("empty", "no values"), ("never", "no values"), ("id", "not modelled")):
        assert [t.get_text() for t in panels[name].texts][0].endswith(text)
        assert not panels[name].patches
    assert words(panels["same"]) == "3.5"
    assert words(panels["once"]) == "2020-01-01"
    grid = plots.pair_plot(odd_model, odd, columns=["day", "took", "x"]).axes
    assert "2020" in words(grid[6])
    with pytest.raises(ValueError, match=r"\['empty'\] are labels, constant or empty"):
        plots.pair_plot(odd_model, odd, columns=["empty", "x"])
    blank = odd.assign(x=np.nan)
    assert plots.pair_plot(odd_model, blank, columns=["day", "x"]).axes[3].texts


def test_conditional_densities_of_times_have_area_one(odd_model):
    ax = plots.conditional_density(odd_model, {"x": 0.5}, "day")
    days, y = ax.lines[0].get_data()
    assert np.trapezoid(y, days) == pytest.approx(1, abs=0.1)
    assert ax.get_ylabel() == "density per day"
    assert "20" in words(ax)
    given = {"day": pd.Timestamp("2020-01-01")}
    days, y = plots.conditional_density(odd_model, given, "end").lines[0].get_data()
    assert matplotlib.dates.num2date(days[0]).year == 2020
    assert y.sum() == pytest.approx(1, abs=0.1)
    assert plots.conditional_density(odd_model, {"x": 0.5}, "never").texts
    assert len(plots.conditional_density(odd_model, {"x": 0.5}, "once").patches) == 1
