"""Files: what is written is what is read, also by later versions, and nothing runs."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("safetensors")

from pyroflows.density import DensityEstimator, files  # noqa: E402

GOLDEN = Path(__file__).parent / "data" / "density-v1.safetensors"


def table(n=300):
    rng = np.random.default_rng(0)
    x = rng.normal(size=n)
    frame = pd.DataFrame(
        {
            "x": x,
            "k": rng.poisson(20, n).astype("int64"),
            "r": np.where(x > 1, 0.0, np.abs(x) + rng.random(n)),
            "c": pd.Categorical(np.where(rng.random(n) < 0.5, "a", "b"), ["b", "a"], ordered=True),
            "t": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 400, n), unit="D"),
        }
    )
    frame["c"] = frame["c"].mask(rng.random(n) < 0.1)
    return frame


def golden_model():
    return DensityEstimator(max_steps=40, members=2, hidden_dim=8, random_state=0).fit(table())


def test_round_trip(tmp_path):
    model = golden_model()
    model.save(tmp_path / "m.safetensors")
    again = DensityEstimator.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(again.score_samples(table()), model.score_samples(table()))
    pd.testing.assert_frame_equal(again.sample(20), model.sample(20))
    pd.testing.assert_frame_equal(again.summary(), model.summary())
    np.testing.assert_array_equal(again.predict_outliers(table()), model.predict_outliers(table()))
    assert again.get_params() == model.get_params()
    again.partial_fit(table())


def test_golden_file_reads_as_ever():
    """Written by ``python tests/test_density_files.py``, once per format version."""
    model = DensityEstimator.load(GOLDEN)
    want = json.loads(GOLDEN.with_suffix(".json").read_text())
    np.testing.assert_allclose(model.score_samples(table(12)), want, atol=1e-3)
    assert model.sample(3).dtypes.equals(table().dtypes)


def test_wrong_files_and_columns_are_named(tmp_path):
    from safetensors.torch import save_file

    junk = tmp_path / "junk"
    junk.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        DensityEstimator.load(junk)
    save_file({}, str(junk))
    with pytest.raises(ValueError, match="not a saved DensityEstimator"):
        DensityEstimator.load(junk)
    save_file(
        {}, str(junk), metadata={"pyroflows": json.dumps({"format": files.FORMAT, "version": 99})}
    )
    with pytest.raises(ValueError, match="format version 99"):
        DensityEstimator.load(junk)
    with pytest.raises(ValueError, match="now missing:\n- k"):
        DensityEstimator.load(GOLDEN).score_samples(table().drop(columns="k"))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    GOLDEN.parent.mkdir(exist_ok=True)
    made = golden_model()
    made.save(GOLDEN)
    GOLDEN.with_suffix(".json").write_text(json.dumps(made.score_samples(table(12)).tolist()))
