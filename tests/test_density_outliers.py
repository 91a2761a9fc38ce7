"""Wrong cells rank first, whether or not the fit saw them; what calibrates them."""

import json

import numpy as np
import pytest
import torch

from pyroflows.density import DensityEstimator
from pyroflows.density.oddness import Oddness, Tail
from tests.benchmarks.bench_outliers import PLANTED, people, planted, ranks


@pytest.fixture(scope="module")
def fitted():
    """A table that holds its three wrong cells, and the model that was fitted to it."""
    table, rows = planted(people(2000, 1, narrow=True), 1)
    model = DensityEstimator(max_steps=80, members=2, random_state=0).fit(table)
    return model, table, rows


def test_wrong_cells_that_the_fit_has_seen_rank_first(fitted):
    model, table, rows = fitted
    places = ranks(model.outlier_score(table), rows)
    assert max(places) <= 10, places
    assert model.predict_outliers(table.iloc[rows], 0.002).all()
    found = model.explain(table.iloc[rows])
    assert found.tail.idxmin(axis=1).tolist() == list(PLANTED)


def test_distances_are_saved(fitted, tmp_path):
    model, table, rows = fitted
    model.save(tmp_path / "model.safetensors")
    again = DensityEstimator.load(tmp_path / "model.safetensors")
    few = table.iloc[[*rows, *range(20)]]
    np.testing.assert_allclose(again.outlier_score(few), model.outlier_score(few), rtol=1e-9)


def test_a_file_without_distances_is_read_as_surprises_alone():
    seen = torch.rand(4, 500, 3, generator=torch.Generator().manual_seed(0)).double()
    weight = torch.ones(500)
    old = Oddness.fit(seen[:1], weight)
    held = [t.to_json() for t in (old.most, old.total, old.row, *old.tails[0])]
    again = Oddness.from_json(json.loads(json.dumps(held)), 3)
    assert len(again.tails) == 1 and not again.rarest
    np.testing.assert_allclose(again.calibrated(seen)[:, 0], old.tails[0][0](seen[0, :, 0]))


def test_a_tail_is_extrapolated_and_planted_values_do_not_set_its_scale():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.exponential(0.7, 4000))
    far = torch.tensor([0.5, 3.0, 10.0], dtype=torch.float64)
    error = 4 / np.sqrt(4000 * 0.03)  # relative, of the mean excess of so many values
    for values in (x, torch.cat([x, torch.full((8,), 500.0).double()])):
        nats = Tail.fit(values, torch.ones(len(values)), beyond=0.03)(far)
        np.testing.assert_allclose(nats, far / 0.7, rtol=error)
    # -inf is smaller than any, and counts.
    half = torch.cat([x, torch.full_like(x, -torch.inf)])
    nats = Tail.fit(half, torch.ones(len(half)), beyond=0.03)(far)
    np.testing.assert_allclose(nats, far / 0.7 + np.log(2), rtol=error)
    assert Tail.fit(half, torch.ones(len(half)))(half)[-1] == 0
