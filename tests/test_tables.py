"""The schema: what a column is taken for, and the way there and back."""

import json

import numpy as np
import pandas as pd
import pytest

from pyroflows.tables import Column, Schema, as_frame, find_step

RNG = np.random.default_rng(0)
N = 400


def _stamps(n, **options):
    return pd.Series(
        pd.Timestamp("2021-03-01") + pd.to_timedelta(RNG.integers(0, 900, n), unit="D"), **options
    )


SERIES = {
    "float64": lambda: pd.Series(RNG.normal(size=N)),
    "float32": lambda: pd.Series(RNG.normal(size=N).astype(np.float32)),
    "Float64 nullable": lambda: (
        pd.Series(RNG.normal(size=N)).mask(RNG.random(N) < 0.2).astype("Float64")
    ),
    "int64": lambda: pd.Series(RNG.integers(-900, 900, N)),
    "uint8": lambda: pd.Series(RNG.integers(0, 255, N).astype("uint8")),
    "Int64 nullable": lambda: (
        pd.Series(RNG.poisson(40, N)).astype("Int64").mask(RNG.random(N) < 0.2)
    ),
    "int64[pyarrow]": lambda: pd.Series(RNG.poisson(40, N)).astype("int64[pyarrow]"),
    "bool": lambda: pd.Series(RNG.random(N) < 0.3),
    "boolean nullable": lambda: (
        pd.Series(RNG.random(N) < 0.3).astype("boolean").mask(RNG.random(N) < 0.2)
    ),
    "str": lambda: pd.Series(RNG.choice(["a", "b", "ccc"], N)).mask(RNG.random(N) < 0.2),
    "string": lambda: (
        pd.Series(RNG.choice(["a", "b"], N)).astype("string").mask(RNG.random(N) < 0.2)
    ),
    "object": lambda: pd.Series(RNG.choice(["a", "b"], N)).astype(object),
    "category": lambda: pd.Series(pd.Categorical(RNG.choice(["x", "y"], N), ["y", "unused", "x"])),
    "ordered": lambda: pd.Series(
        pd.Categorical(RNG.choice(["lo", "hi"], N), ["lo", "hi"], ordered=True)
    ),
    "category of int": lambda: pd.Series(pd.Categorical(RNG.integers(0, 4, N))),
    "datetime": lambda: _stamps(N),
    "datetime ns": lambda: _stamps(N).astype("datetime64[ns]"),
    "datetime tz": lambda: _stamps(N).dt.tz_localize("UTC").dt.tz_convert("Europe/Berlin"),
    "datetime missing": lambda: _stamps(N).mask(RNG.random(N) < 0.2),
    "timedelta": lambda: pd.Series(pd.to_timedelta(RNG.integers(0, 10**6, N), unit="s")),
    "constant": lambda: pd.Series(np.full(N, 3.5)),
    "all missing": lambda: pd.Series(np.full(N, np.nan)),
    "empty category": lambda: pd.Series(pd.Categorical([None] * N)),
}


@pytest.mark.parametrize("name", SERIES)
def test_columns_come_back_as_they_were(name):
    series = SERIES[name]().rename("x")
    schema = Schema.from_frame(series.to_frame())
    again = Schema.from_json(json.loads(json.dumps(schema.to_json())))
    values = schema.encode(series.to_frame())
    np.testing.assert_array_equal(values, again.encode(series.to_frame()))
    np.testing.assert_array_equal(np.isnan(values[:, 0]), series.isna())
    pd.testing.assert_series_equal(again.decode(values)["x"], series)


@pytest.mark.parametrize(
    ("values", "step"),
    [
        (np.round(RNG.normal(size=2000), 2), 0.01),
        (RNG.integers(0, 200, 2000) * 25.0, 25.0),
        (RNG.integers(0, 100, 2000) * 2.54, 2.54),
        (RNG.integers(0, 100, 2000) * 1e9, 1e9),
        (np.round(RNG.normal(size=2000), 1) + 1e6, 0.1),
        (RNG.normal(size=2000), None),
        (RNG.random(2000).astype(np.float32).astype(float), None),
        (np.exp(RNG.normal(size=2000)), None),
    ],
)
def test_recording_steps_are_found(values, step):
    found, atoms = find_step(values)
    assert (found is None) if step is None else found == pytest.approx(step, rel=1e-9)
    assert len(atoms) == 0


def test_caps_off_the_lattice_and_zeros_of_continuous_columns_are_point_masses():
    house = RNG.integers(150, 4900, 4000) * 100.0
    house[:200] = 500_001
    column = Column.from_series(pd.Series(house, name="v"))
    assert (column.step, column.atoms) == (100.0, [500_001.0])
    rain = np.where(RNG.random(1000) < 0.4, 0.0, RNG.gamma(2.0, size=1000))
    column = Column.from_series(pd.Series(rain, name="v"))
    assert (column.step, column.atoms, column.lower) == (None, [0.0], 0.0)


def test_a_repeated_value_among_few_single_ones_is_a_point_mass_but_repeated_levels_are_not():
    single = RNG.exponential(size=6)
    column = Column.from_series(pd.Series(np.append(np.zeros(494), single), name="v"))
    assert (column.step, column.atoms) == (None, [0.0])
    column = Column.from_series(pd.Series(np.append(single, single.repeat(50)), name="v"))
    assert column.atoms == []
    column = Column.from_series(pd.Series(np.append(single, single[0].repeat(3)), name="v"))
    assert column.atoms == []  # by chance


def test_overrides_and_their_errors():
    table = pd.DataFrame({"a": RNG.integers(0, 500, 300)})
    assert Schema.from_frame(table, {"a": {"step": None}})["a"].step is None
    with pytest.raises(ValueError, match="no attribute 'stride'"):
        Schema.from_frame(table, {"a": {"stride": 1}})
    with pytest.raises(KeyError, match="no column 'b'"):
        Schema.from_frame(table, {"b": {"step": None}})


def test_bad_tables_are_named():
    schema = Schema.from_frame(pd.DataFrame({"a": [1.5, 2.5, 3.7], "b": ["x", "y", "x"]}))
    with pytest.raises(ValueError, match=r"missing \['b'\], unknown \['c'\]"):
        schema.encode(pd.DataFrame({"a": [1.0], "c": [2.0]}))
    with pytest.raises(ValueError, match="'a' was numeric"):
        schema.encode(pd.DataFrame({"a": ["many"], "b": ["x"]}))
    with pytest.raises(ValueError, match="'a' contains infinity"):
        Schema.from_frame(pd.DataFrame({"a": [1.0, np.inf, 2.0]}))
    with pytest.raises(ValueError, match="must be unique"):
        Schema.from_frame(pd.DataFrame(np.zeros((3, 2)), columns=["a", "a"]))
    with pytest.raises(ValueError, match="Reshape your data"):
        as_frame(np.zeros(3))
    unseen = schema.encode(pd.DataFrame({"a": [1.0], "b": ["new"]}))
    assert unseen[0, 1] == 2  # one past the known labels
