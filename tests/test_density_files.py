"""Files: what is written is what is read, also by later versions, and nothing runs."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

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


def edited(path, change):
    """The golden file with another header or other tensors."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(GOLDEN))
    with safe_open(str(GOLDEN), "pt") as file:
        header = json.loads(file.metadata()["pyroflows"])
    change(header, tensors)
    save_file(tensors, str(path), metadata={"pyroflows": json.dumps(header)})
    return path


def test_every_field_and_tensor_is_needed_and_checked(tmp_path):
    """Whatever is left out, or put in its place, is a ValueError that names the file."""
    header = files.read_header(GOLDEN)
    from safetensors.torch import load_file

    names = list(load_file(str(GOLDEN)))
    junk = [None, "x", -1, 10**9, [], {}, [[1]], {"a": 1}, 0.5]
    for field in set(header) - {"params"}:
        with pytest.raises(ValueError, match="m"):
            DensityEstimator.load(edited(tmp_path / "m", lambda h, t: h.pop(field)))  # noqa: B023
        for value in junk:
            path = edited(tmp_path / "m", lambda h, t: h.update({field: value}))  # noqa: B023
            if value != header[field]:
                with pytest.raises(ValueError, match=str(path)):
                    DensityEstimator.load(path)
    for name in names:
        for change in (
            lambda h, t: t.pop(name),  # noqa: B023
            lambda h, t: t.update({name: torch.zeros(3, 7)}),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"is damaged: .*(tensor|layers)"):
                DensityEstimator.load(edited(tmp_path / "m", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h["config"].update(hidden_dim=10**6), "expected shape"),
        (lambda h, t: h["config"].update(members=10**9), "expected shape"),
        (lambda h, t: h["config"].update(components=10**9), "expected shape"),
        (lambda h, t: h["config"].update(depth=10**9), "hidden layers"),
        (lambda h, t: h["config"].update(dropout="a"), "dropout"),
        (lambda h, t: h["config"].update(width=1), "config has fields"),
        (lambda h, t: h.update(order=[0, 0, 1, 2, 3]), "permutation"),
        (lambda h, t: h["params"].update(draws=10**12), "draws"),
        (lambda h, t: h["schema"][0].update(kind="categorical"), "tensor"),
        (lambda h, t: h["schema"][0].update(kind="spam"), "wrong type"),
        (lambda h, t: h["schema"][0].update(step="a"), "wrong type|not supported"),
        (lambda h, t: h["schema"][0].pop("dtype"), "not a stored column"),
        (lambda h, t: h["schema"][3].update(levels=["b"]), "group"),
        (lambda h, t: h["schema"][1].update(name="x"), "must be unique"),
        (lambda h, t: t["cell0.hist.group"].fill_(10**10), "names bins"),
        (lambda h, t: t["cell4.group"].fill_(-1), "names bins"),
        (lambda h, t: t.update({"more": t["cell0.loc"].clone()}), "belong nowhere"),
    ],
)
def test_edited_and_hostile_files_are_refused_before_they_ask_for_memory(
    tmp_path, change, message
):
    with pytest.raises(ValueError, match=rf"m is damaged: .*({message})"):
        DensityEstimator.load(edited(tmp_path / "m", change))


def test_truncated_files_are_refused(tmp_path):
    whole = GOLDEN.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "m").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="m is not a safetensors file"):
            DensityEstimator.load(tmp_path / "m")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    GOLDEN.parent.mkdir(exist_ok=True)
    made = golden_model()
    made.save(GOLDEN)
    GOLDEN.with_suffix(".json").write_text(json.dumps(made.score_samples(table(12)).tolist()))
