"""Tables of polars, Arrow and other libraries, in and out."""

import datetime
import decimal

import numpy as np
import pandas as pd
import pytest

from pyroflows.density import DensityEstimator
from pyroflows.tables import Schema
from pyroflows.tables.frames import read_table

pl = pytest.importorskip("polars", reason="needs polars: pip install 'pyroflows[polars]'")
pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'pyroflows[polars]'")

FAST = dict(max_steps=5, members=1, hidden_dim=8, random_state=0)
N = 60


def cells():
    """A column of every type that polars has, some of them with gaps."""
    rng = np.random.default_rng(0)
    day = datetime.datetime(2024, 4, 1)
    steps = [day + datetime.timedelta(hours=int(h)) for h in rng.integers(0, 500, N)]
    price = [decimal.Decimal(int(c)).scaleb(-2) for c in rng.integers(100, 900, N)]
    return {
        "enum": pl.Series(rng.choice(["b", "a"], N), dtype=pl.Enum(["b", "a", "never"])),
        "cat": pl.Series(rng.choice(["x", "y"], N), dtype=pl.Categorical),
        "text": pl.Series(rng.choice(["u", "v", "w"], N)),
        "flag": pl.Series([None, *(bool(b) for b in rng.integers(0, 2, N - 1))]),
        "byte": pl.Series(rng.integers(0, 255, N), dtype=pl.UInt8),
        "count": pl.Series([None, *rng.integers(0, 30, N - 1).tolist()], dtype=pl.UInt32),
        "whole": pl.Series(rng.integers(-(2**60), 2**60, N), dtype=pl.Int64),
        "single": pl.Series(rng.normal(size=N), dtype=pl.Float32),
        "real": pl.Series([None, *rng.normal(size=N - 1)]),
        "price": pl.Series(price, dtype=pl.Decimal(10, 2)),
        "date": pl.Series([s.date() for s in steps]),
        "stamp": pl.Series(steps, dtype=pl.Datetime("ms")),
        "zoned": pl.Series(steps).dt.replace_time_zone("Europe/Berlin"),
        "clock": pl.Series([datetime.time(int(h), 30) for h in rng.integers(0, 24, N)]),
        "wait": pl.Series(
            [datetime.timedelta(minutes=int(m)) for m in rng.integers(1, 90, N)],
            dtype=pl.Duration("us"),
        ),
    }


@pytest.fixture(scope="module")
def table():
    return pl.DataFrame(cells())


@pytest.fixture(scope="module")
def fitted(table):
    return DensityEstimator(**FAST).fit(table)


def test_every_type_of_polars_comes_back(table, fitted):
    drawn = fitted.sample(20)
    assert isinstance(drawn, pl.DataFrame) and drawn.schema == table.schema
    holes = fitted.sample(50, missing=True)
    assert holes.schema == table.schema and holes["count"].null_count() < 50
    full = fitted.impute(table)
    assert full.schema == table.schema
    assert sum(full.null_count().row(0)) == 0
    kept = full.select(pl.all().slice(1))
    assert kept.equals(table.select(pl.all().slice(1)))  # gaps are in the first row alone


def test_arrow_tables_come_back_in_their_types(table):
    source = pa.table({
        "label": pa.array(["a", "b"] * 30).dictionary_encode(),
        "text": pa.array(["x", "y", "z"] * 20, pa.large_string()),
        "count": pa.array([None, *range(59)], pa.uint16()),
        "at": pa.array(range(60), pa.timestamp("s", "UTC")),
        "price": pa.array(table["price"].to_list(), pa.decimal128(12, 2)),
    })  # fmt: skip
    model = DensityEstimator(**FAST).fit(source)
    drawn = model.sample(7)
    assert isinstance(drawn, pa.Table) and drawn.schema == source.schema
    assert model.impute(source).slice(1).equals(source.slice(1))
    batch = source.to_batches()[0]
    np.testing.assert_array_equal(model.score_samples(batch), model.score_samples(source))


def test_all_kinds_of_tables_mean_the_same(table, fitted):
    frame = read_table(table)
    nats = fitted.score_samples(table)
    for same in (frame, table.lazy(), table.to_arrow(), Capsule(table)):
        np.testing.assert_allclose(fitted.score_samples(same), nats)
    assert Schema.from_frame(frame)["enum"].levels == ["b", "a", "never"]
    assert Schema.from_frame(frame)["enum"].ordered
    plain = pa.table({"a": [1.5, 2.5, None] * 10, "b": list(range(30))})
    pd.testing.assert_frame_equal(read_table(Interchange(plain)), read_table(plain))


class Capsule:
    """Any library whose tables speak Arrow's C interface."""

    def __init__(self, table):
        self.columns, self._table = table.columns, table

    def __arrow_c_stream__(self, requested_schema=None):
        return self._table.__arrow_c_stream__(requested_schema)


class Interchange:
    """Any library whose tables speak the interchange protocol alone."""

    def __init__(self, table):
        self.columns, self.__dataframe__ = table.column_names, table.__dataframe__


def test_answers_come_in_the_kind_of_the_question(table, fitted):
    few = table.head(3)
    gap = few.drop("real", "single")
    assert isinstance(fitted.mean(gap), pl.DataFrame)
    assert fitted.quantile(gap, [0.1, 0.9])["real_0.1"].dtype == pl.Float64
    assert "real_upper" in fitted.interval(gap).columns
    assert isinstance(fitted.mean(gap.to_arrow()), pa.Table)
    assert isinstance(fitted.mean(read_table(gap)), pd.DataFrame)
    assert isinstance(fitted.sample(2, few.select("text")), pl.DataFrame)
    assert isinstance(fitted.sample(2, {"text": "u", "count": (3, None)}), pl.DataFrame)
    assert isinstance(fitted.sample(2, pd.DataFrame({"text": ["u"]})), pd.DataFrame)
    rows = fitted.sample(1, {"text": pl.Series(["u", "v"])})
    assert rows["text"].to_list() == ["u", "v"]


def test_set_output_goes_before_what_came(table):
    model = DensityEstimator(**FAST).fit(table.select("text", "byte"))
    for name, kind in (("pandas", pd.DataFrame), ("pyarrow", pa.Table), ("polars", pl.DataFrame)):
        assert isinstance(model.set_output(transform=name).sample(2), kind)
    assert isinstance(model.set_output(transform="default").sample(2), np.ndarray)
    with pytest.raises(ValueError, match="'pandas', 'polars', 'pyarrow'"):
        model.set_output(transform="excel")


def test_saved_models_take_all_kinds(tmp_path, table, fitted):
    pytest.importorskip("safetensors")
    fitted.save(tmp_path / "m.safetensors")
    other = DensityEstimator.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(other.score_samples(table), fitted.score_samples(table))
    assert isinstance(other.impute(table), pl.DataFrame)
    assert other.set_output(transform="polars").sample(3)["zoned"].dtype == table["zoned"].dtype


def test_cells_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="column 'lists' has cells of type"):
        DensityEstimator(**FAST).fit(pl.DataFrame({"lists": [[1, 2], [3]] * 10}))
    with pytest.raises(ValueError, match="missing"):
        DensityEstimator(**FAST).fit(pl.DataFrame({"a": range(20), "b": range(20)})).score_samples(
            pl.DataFrame({"a": range(3)})
        )


def test_methods_that_depend_on_the_fit_read_every_kind():
    pl = pytest.importorskip("polars")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"n": rng.integers(0, 9, 90), "x": rng.normal(size=90), "k": ["a", "b"] * 45}
    )
    table = pl.from_pandas(frame)
    model = DensityEstimator(random_state=0, max_steps=5).fit(table)
    proba = model.predict_proba(table.drop("k"), "k")
    assert isinstance(proba, pl.DataFrame) and proba.columns == ["a", "b"]
    asked = model.predict_proba(frame.drop(columns="k"), "k")
    np.testing.assert_allclose(proba.to_numpy(), asked.to_numpy())
    assert list(model.predict(table, "k")) == list(model.predict(frame, "k"))
    flow = DensityEstimator(flow="realnvp", random_state=0, max_steps=5).fit(table)
    noise = flow.transform(table)
    assert isinstance(noise, pl.DataFrame)
    np.testing.assert_allclose(noise.to_numpy(), flow.transform(frame).to_numpy())
    assert flow.inverse_transform(noise, table)["n"].to_list() == frame["n"].to_list()
