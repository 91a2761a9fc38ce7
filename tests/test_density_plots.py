"""Pictures of tables: they are drawn, and show what they say."""

import numpy as np
import pandas as pd
import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from pyroflows import plots  # noqa: E402
from pyroflows.density import DensityEstimator  # noqa: E402


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
