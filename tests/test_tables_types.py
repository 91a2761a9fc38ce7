"""Whatever pandas, Arrow and Python hold in a cell comes back as it came, or is named at fit."""

import datetime
import decimal
import json
import subprocess
import sys
import uuid

import numpy as np
import pandas as pd
import pytest

from pyroflows.density import DensityEstimator
from pyroflows.tables import Schema

pa = pytest.importorskip("pyarrow")
pytest.importorskip("safetensors")

N = 200
RNG = np.random.default_rng(0)
QUICK = dict(max_steps=10, members=2, hidden_dim=8, draws=8, random_state=0)


def objects(make):
    return pd.Series([make() for _ in range(N)], dtype=object)


def whole(*ends):
    return int(RNG.integers(*ends))


def gaps(series):
    return series.mask(np.random.default_rng(1).random(len(series)) < 0.2)


def arrow(series, kind):
    return gaps(series).astype(pd.ArrowDtype(kind))


def day():
    return datetime.date(2020, 1, 1) + datetime.timedelta(days=whole(0, 500))


def clock():
    return datetime.time(whole(0, 24), whole(0, 60))


def cents():
    return decimal.Decimal(whole(0, 10**7)).scaleb(-2)


STAMPS = pd.Series(pd.Timestamp("2020-01-01") + pd.to_timedelta(RNG.integers(0, 10**7, N), "s"))
NUMBERS = pd.Series(RNG.normal(size=N))
COUNTS = pd.Series(RNG.poisson(50, N))
WORDS = pd.Series(RNG.choice(["a", "b"], N))

SERIES = {
    "date objects": objects(day),
    "date objects, gaps": gaps(objects(day)).where(lambda s: s.notna(), None),
    "date text": objects(day).map(str).astype(WORDS.dtype),
    "date text objects": objects(day).map(str).astype(object),
    "date text, string": gaps(objects(day).map(str).astype("string")),
    "date text, Arrow": arrow(objects(day).map(str), pa.string()),
    "month text": STAMPS.dt.strftime("%Y-%m"),
    "time text": STAMPS.dt.strftime("%Y-%m-%dT%H:%M:%S"),
    "milliseconds text": STAMPS.dt.strftime("%Y-%m-%dT%H:%M:%S.123Z"),
    "clock text": STAMPS.dt.strftime("%H:%M"),
    "date32": arrow(objects(day), pa.date32()),
    "date64": arrow(objects(day), pa.date64()),
    "clock objects": objects(clock),
    "time32": arrow(objects(clock), pa.time32("s")),
    "time64": arrow(objects(clock), pa.time64("us")),
    "stamp objects": pd.Series(list(STAMPS), dtype=object),
    "datetime objects": pd.Series([t.to_pydatetime() for t in STAMPS], dtype=object),
    "zoned objects": pd.Series(list(STAMPS.dt.tz_localize("Europe/Berlin")), dtype=object),
    "duration objects": objects(lambda: datetime.timedelta(seconds=whole(0, 10**6))),
    "Decimal": objects(cents),
    "decimal128": arrow(objects(cents), pa.decimal128(10, 2)),
    "integers in objects": gaps(pd.Series(list(COUNTS), dtype=object)).where(
        lambda s: s.notna(), None
    ),
    "floats in objects": pd.Series(list(NUMBERS), dtype=object),
    "True and 1 in objects": pd.Series([True, 1, 0, False] * (N // 4), dtype=object),
    "booleans in objects": gaps(pd.Series([True, False] * (N // 2), dtype=object)).where(
        lambda s: s.notna(), None
    ),
    "labels of many types": pd.Series(
        ["a", 1, 2.5, (1, "b"), datetime.date(2020, 1, 1)] * (N // 5), dtype=object
    ),
    "UUID": objects(lambda: uuid.UUID(int=whole(0, 5))),
    "bytes": objects(lambda: bytes([whole(0, 5)])),
    "cut": gaps(pd.cut(NUMBERS, 5)),
    "qcut": pd.qcut(NUMBERS, 4),
    "intervals": pd.cut(NUMBERS, 5).astype(pd.IntervalDtype("float64", "right")),
    "whole intervals": pd.Series(pd.arrays.IntervalArray.from_breaks(range(6)))
    .sample(N, replace=True, random_state=0)
    .reset_index(drop=True),
    "category of times": pd.Series(pd.Categorical(STAMPS.dt.normalize().where(STAMPS.index < 9))),
    "period": pd.Series(STAMPS.dt.to_period("M")),
    "sparse integers": pd.Series(pd.arrays.SparseArray(RNG.poisson(1.0, N))),
    "sparse numbers": pd.Series(pd.arrays.SparseArray(NUMBERS.clip(0), fill_value=0.0)),
    "sparse booleans": pd.Series(pd.arrays.SparseArray(RNG.random(N) < 0.3)),
    "no time": pd.Series([pd.NaT] * N),
    "no zoned time": pd.Series(pd.DatetimeIndex([pd.NaT] * N, tz="UTC")),
    "no duration": pd.Series(pd.to_timedelta([pd.NaT] * N)),
    "no object": pd.Series([None] * N, dtype=object),
    "no integer": pd.Series([pd.NA] * N, dtype="Int64"),
    "null": pd.Series([None] * N, dtype=pd.ArrowDtype(pa.null())),
    "one time": pd.Series([pd.Timestamp("2020-01-01")] * N),
    "two times": pd.Series(pd.to_datetime(["2020-01-01", "2021-03-01"] * (N // 2))),
    "Arrow integers": arrow(COUNTS, pa.int64()),
    "Arrow bytes": arrow(COUNTS, pa.uint8()),
    "Arrow doubles": arrow(NUMBERS, pa.float64()),
    "Arrow booleans": arrow(NUMBERS > 0, pa.bool_()),
    "Arrow text": arrow(WORDS, pa.string()),
    "Arrow large text": arrow(WORDS, pa.large_string()),
    "Arrow times": arrow(STAMPS, pa.timestamp("us")),
    "Arrow zoned times": arrow(
        STAMPS.dt.tz_localize("Europe/Berlin"), pa.timestamp("ns", "Europe/Berlin")
    ),
    "Arrow durations": arrow(STAMPS - STAMPS[0], pa.duration("ms")),
    "Arrow dictionary": arrow(WORDS, pa.dictionary(pa.int32(), pa.string())),
    "Python strings": WORDS.astype("string[python]"),
    "ids": pd.Series(2**60 + RNG.integers(0, 10**9, N)),
    "ids, gaps": gaps(pd.Series(2**60 + RNG.integers(0, 10**9, N)).astype("Int64")),
    "uint64": pd.Series(2**64 - 1 - RNG.integers(0, 10**6, N).astype("uint64")),
    "float16": NUMBERS.astype("float16"),
}


@pytest.mark.parametrize("name", SERIES)
def test_every_type_comes_back(name):
    frame = SERIES[name].rename("x").to_frame()
    schema = Schema.from_frame(frame)
    again = Schema.from_json(json.loads(json.dumps(schema.to_json())))
    values = schema.encode(frame)
    np.testing.assert_array_equal(values, again.encode(frame))
    np.testing.assert_array_equal(np.isnan(values[:, 0]), frame["x"].isna())
    pd.testing.assert_frame_equal(again.decode(values), frame)
    assert again.decode(np.full((3, 1), np.nan))["x"].isna().all()
    assert len(again.decode(values[:0])) == len(again.encode(frame[:0])) == 0


FRESH = """
import sys, numpy as np, pandas as pd
from pyroflows.density import DensityEstimator
for path in sys.argv[1:]:
    frame, score, drawn = pd.read_pickle(path + ".pickle")
    model = DensityEstimator.load(path)
    np.testing.assert_array_equal(model.score_samples(frame), score)
    pd.testing.assert_frame_equal(model.sample(20), drawn)
"""


def test_tables_of_every_type_are_fitted_drawn_imputed_and_read_by_another_process(tmp_path):
    table = pd.DataFrame(SERIES)
    named = pd.DataFrame(
        {("a", pd.Timestamp("2020-01-01")): NUMBERS, ("b", datetime.date(2020, 1, 1)): WORDS}
    )
    named.columns.names = ["letter", "day"]
    days = pd.DataFrame(RNG.normal(size=(N, 2)), columns=pd.date_range("2020", periods=2))
    tables = [table.iloc[:, i : i + 20] for i in range(0, len(SERIES), 20)] + [named, days]
    for k, frame in enumerate(tables):
        model = DensityEstimator(**QUICK).fit(frame)
        score, drawn = model.score_samples(frame), model.sample(20)
        assert np.isfinite(score).all()
        assert drawn.dtypes.equals(frame.dtypes)
        assert drawn.columns.equals(frame.columns) and drawn.columns.names == frame.columns.names
        holes = frame.apply(lambda c: c if c.dtype == "Sparse[bool, False]" else gaps(c))
        full = model.impute(holes)
        for j, name in enumerate(frame):
            known = holes.iloc[:, j].notna()
            assert full.iloc[:, j].dtype == holes.iloc[:, j].dtype, name
            assert (
                full.iloc[:, j][known]
                .astype(object)
                .equals(holes.iloc[:, j][known].astype(object))
            ), name
            assert full.iloc[:, j].notna().all() or frame.iloc[:, j].isna().all(), name
        model.save(tmp_path / f"{k}")
        pd.to_pickle((frame, score, drawn), tmp_path / f"{k}.pickle")
    paths = [str(tmp_path / f"{k}") for k in range(len(tables))]
    run = subprocess.run(
        [sys.executable, "-c", FRESH, *paths], check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_times_in_text_and_objects_are_times_of_their_step():
    columns = {c.name: c for c in Schema.from_frame(pd.DataFrame(SERIES))}
    for name in ("date objects", "date text", "date text, Arrow", "date32", "date64"):
        assert (columns[name].kind, columns[name].step) == ("datetime", 86400.0)
    few = Schema.from_frame(pd.DataFrame({"t": ["2020-01-01", "2020-01-04", "2020-01-10"] * 3}))
    assert few["t"].step == 86400.0
    for name in ("clock text", "clock objects", "time32"):
        assert (columns[name].lower, columns[name].upper) == (0.0, 86340.0)
    for name in ("Decimal", "decimal128"):
        assert (columns[name].kind, columns[name].step, columns[name].lower) == (
            "numeric",
            0.01,
            0.0,
        )
    assert columns["integers in objects"].step == 1.0
    assert columns["True and 1 in objects"].levels == [0.0, 1.0]


def test_new_tables_may_hold_times_in_another_type():
    model = Schema.from_frame(pd.DataFrame({"t": SERIES["date text"]}))
    stamps = pd.DataFrame({"t": pd.to_datetime(SERIES["date text"])})
    days = pd.DataFrame({"t": stamps["t"].dt.date})
    for other in (stamps, days):
        np.testing.assert_array_equal(
            model.encode(other), model.encode(pd.DataFrame({"t": SERIES["date text"]}))
        )
    with pytest.raises(ValueError, match="column 't' was text like %Y-%m-%d in fitting; got"):
        model.encode(pd.DataFrame({"t": ["soon"]}))


@pytest.mark.parametrize("cell", [[1, 2], {"a": 1}, np.zeros(2), {1, 2}, object()])
def test_what_cannot_be_a_cell_is_named_at_fit(cell):
    table = pd.DataFrame({"x": NUMBERS[:5], "bad": pd.Series([cell] * 5, dtype=object)})
    with pytest.raises(ValueError, match="column 'bad' has cells of type .*'ignore'"):
        DensityEstimator(**QUICK).fit(table)
    model = DensityEstimator(schema={"bad": {"kind": "ignore"}}, **QUICK).fit(table)
    assert list(model.sample(2)) == ["x"]
    assert np.isfinite(model.score_samples(table)).all()
    nested = pd.DataFrame({"bad": pd.Series([[1]] * 5, dtype=pd.ArrowDtype(pa.list_(pa.int64())))})
    with pytest.raises(ValueError, match="column 'bad' has cells of type list"):
        DensityEstimator(**QUICK).fit(nested)


def test_observed_cells_are_copied_bit_for_bit():
    rng = np.random.default_rng(0)
    n = 60
    stamps = pd.date_range("2020", periods=n) + pd.to_timedelta(rng.integers(0, 10**15, n), "ns")
    table = pd.DataFrame(
        {
            "id": 2**60 + rng.integers(0, 10**12, n),
            "wide": rng.integers(-(2**63), 2**63 - 1, n),
            "u": rng.integers(2**63, 2**64 - 1, n, dtype="uint64"),
            "t": stamps.astype("datetime64[ns]"),
            "x": rng.normal(size=n),
            "k": rng.choice(["a", "b"], n),
        }
    )
    model = DensityEstimator(**QUICK).fit(table)
    holes = table.copy()
    holes.loc[::3, "x"] = np.nan
    holes.loc[1::2, "k"] = None
    holes.loc[0, "k"] = "unseen"
    for method in ("draw", "mean"):
        full = model.impute(holes, method=method)
        assert full.notna().all(axis=None)
        pd.testing.assert_frame_equal(
            full[["id", "wide", "u", "t"]], table[["id", "wide", "u", "t"]]
        )
        assert full["k"][0] == "unseen"
        pd.testing.assert_series_equal(full["x"][holes["x"].notna()], holes["x"].dropna())
    part = model.impute(holes.astype({"x": "float32"}))
    assert part["x"].dtype == "float32"
    given = model.sample(2, table[["t", "id"]][:5])
    pd.testing.assert_series_equal(
        given["t"], table["t"][:5].repeat(2).reset_index(drop=True), check_freq=False
    )
    drawn = model.sample(200)
    assert drawn["id"].between(2**60 - 10**13, 2**60 + 10**13).all()
    assert drawn["id"].nunique() > 150


def test_a_zip_code_can_be_a_label_and_a_label_a_number():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "zip": rng.integers(10000, 10030, 300),
            "n": [str(i / 4) for i in rng.integers(0, 99, 300)],
        }
    )
    schema = {"zip": {"kind": "categorical"}, "n": {"kind": "numeric"}}
    model = DensityEstimator(schema=schema, **QUICK).fit(table)
    assert (model.schema_["zip"].kind, model.schema_["n"].step) == ("categorical", 0.25)
    drawn = model.sample(300)
    assert drawn.dtypes.equals(table.dtypes)
    assert drawn["zip"].isin(table["zip"]).all()
    assert ((pd.to_numeric(drawn["n"]) * 4) % 1 == 0).all()
    assert np.isfinite(model.score_samples(table)).all()
    with pytest.raises(ValueError, match="'n' was declared numeric; 1 cells are not numbers"):
        Schema.from_frame(table.assign(n=["?", *table["n"][1:]]), schema)
    with pytest.raises(ValueError, match="expected a kind of"):
        Schema.from_frame(table, {"zip": {"kind": "label"}})
