"""Fitting under other people's settings: weights, absurd scales, point masses, interruptions."""

import itertools
import signal

import numpy as np
import pandas as pd
import pytest
import torch

from pyroflows.density import DensityEstimator
from pyroflows.density.columns import moments, repeated
from pyroflows.density.mixtures import MixedMixture
from pyroflows.density.training import BestColumns
from pyroflows.training.budget import Budget

QUICK = dict(max_steps=40, members=2, hidden_dim=16, random_state=0)


def small(n=300):
    rng = np.random.default_rng(0)
    x = rng.normal(size=n)
    return pd.DataFrame(
        {"x": x, "k": rng.choice(list("abc"), n), "y": np.round(x + rng.normal(size=n), 1)}
    )


# ---------------------------------------------------------------------- point masses


@pytest.mark.parametrize("cap", [500_001.0, 499_951.0])
def test_a_cap_off_the_lattice_is_trained_scored_and_sampled(cap):
    rng = np.random.default_rng(0)
    price = np.round(np.exp(rng.normal(12.1, 0.5, size=1500)) / 100) * 100
    price = np.where((price > 499_000) | (rng.random(1500) < 0.02), cap, price)
    frame = pd.DataFrame({"price": price, "rooms": rng.normal(size=1500)})
    share = (price == cap).mean()
    model = DensityEstimator(**QUICK).fit(frame)
    column = model.schema_["price"]
    assert (column.step, column.atoms) == (100.0, [cap])
    drawn = model.sample(4000, random_state=1)["price"]
    assert (drawn == cap).mean() == pytest.approx(share, abs=4 * np.sqrt(share / 4000))
    # per step, as every value of a lattice: with the lattice it sums to one
    at = np.exp(model.log_marginal(pd.DataFrame({"price": [cap]})))[0] * 100
    assert at == pytest.approx(share, abs=0.02)
    rest = np.arange(0, 3_000_000, 100.0)
    total = np.exp(model.log_marginal(pd.DataFrame({"price": rest}))).sum() * 100
    assert total + at == pytest.approx(1, abs=1e-3)
    below = model.pit(pd.DataFrame({"price": [499_900.0, cap, 500_100.0], "rooms": 0.0}))["price"]
    assert below.between(0, 1).all()


def test_the_mean_counts_a_point_mass_at_the_end_of_the_support():
    rng = np.random.default_rng(0)
    rain = np.where(rng.random(1500) < 0.6, 0.0, rng.gamma(3.0, size=1500))
    model = DensityEstimator(target="rain", **QUICK).fit(
        pd.DataFrame({"rain": rain, "z": rng.normal(size=1500)})
    )
    row = pd.DataFrame({"z": [0.1]})
    draws = model.sample(20_000, row, random_state=0)["rain"]
    assert model.mean(row)["rain"][0] == pytest.approx(
        draws.mean(), abs=4 * draws.std() / np.sqrt(20_000) + 0.01
    )
    zero = np.exp(model.score_samples(row.assign(rain=0.0)))[0]
    assert model.quantile(row, zero - 0.01)["rain"][0] == 0.0
    assert model.quantile(row, zero + 0.01)["rain"][0] > 0.0


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_weights_are_repetitions(scale):
    rng = np.random.default_rng(0)
    x = rng.normal(size=600)
    weight = np.where(x > 0, 3.0, 1.0)
    frame = pd.DataFrame({"x": x, "c": np.where(rng.random(600) < 0.5, "u", "v")})
    exact = weight[x > 0].sum() / weight.sum()
    options = dict(max_steps=150, members=2, hidden_dim=16, random_state=0)
    model = DensityEstimator(**options).fit(frame, sample_weight=scale * weight)
    above = (model.sample(20_000, random_state=1)["x"] > 0).mean()
    assert above == pytest.approx(exact, abs=0.04)
    again = frame.loc[frame.index.repeat(weight.astype(int))]
    if scale == 1.0:
        twin = DensityEstimator(**options).fit(again)
        assert model.model_.cells[0].hist.num_bins == twin.model_.cells[0].hist.num_bins
        assert above == pytest.approx(
            (twin.sample(20_000, random_state=1)["x"] > 0).mean(), abs=0.02
        )
    # thresholds: one tenth of the weight lies below
    low = model.predict_outliers(frame, 0.1)
    assert weight[low].sum() / weight.sum() == pytest.approx(0.1, abs=0.035)


def test_weighted_parts_equal_repeated_ones():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=50), rng.integers(1, 5, 50).astype(float)
    np.testing.assert_array_equal(repeated(x, weight), np.sort(np.repeat(x, weight.astype(int))))
    numbers = torch.tensor(rng.normal(size=(80, 2)))
    codes, w = torch.tensor(rng.integers(0, 3, (80, 1))), torch.tensor(rng.integers(1, 4, 80))
    parts = [
        MixedMixture.fit(
            numbers.repeat_interleave(r, 0),
            codes.repeat_interleave(r, 0),
            [3],
            [False, True, False],
            generator=torch.Generator().manual_seed(0),
            weight=v,
            max_components=1,
        )
        for r, v in ((torch.ones(80).long(), w.double()), (w, None))
    ]
    for (name, a), b in zip(
        parts[0].state_dict().items(), parts[1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=name)


# ---------------------------------------------------------------------- scales

RANDOM = np.random.default_rng(5).normal(size=400)
SCALES = {
    "1e45": RANDOM * 1e45,
    "far": 1.42e9 + 0.5 * RANDOM,
    "very far": 1e15 + 50 * RANDOM,
    "subnormal": np.exp(0.3 * RANDOM) * 1e-310,
    "huge": RANDOM * 1e300,
    "small": RANDOM * 1e-200,
}


@pytest.mark.parametrize("name", SCALES)
def test_columns_of_absurd_scale_keep_their_spread(name):
    x = SCALES[name]
    frame = pd.DataFrame({"x": x, "z": RANDOM + np.random.default_rng(1).normal(size=400)})
    model = DensityEstimator(**QUICK).fit(frame)
    score = model.score_samples(frame)
    assert np.isfinite(score).all()
    middle, spread = moments(x)
    drawn = model.sample(4000, random_state=0)["x"].to_numpy()
    z = drawn / spread - middle / spread
    assert z.std() == pytest.approx(1, abs=0.15)
    assert abs(z.mean()) < 0.15
    plain = DensityEstimator(**QUICK).fit(frame.assign(x=(x - middle) / spread))
    assert score.mean() + np.log(spread) == pytest.approx(
        plain.score(frame.assign(x=(x - middle) / spread)), abs=0.25
    )
    given = model.mean(frame.head(3)[["z"]])["x"]
    assert np.isfinite(given).all()


# ---------------------------------------------------------------------- settings and interruptions


def test_global_settings_of_torch_change_nothing():
    frame = small()
    want = DensityEstimator(**QUICK).fit(frame).score_samples(frame)
    for setting in (torch.no_grad(), torch.inference_mode()):
        with setting:
            model = DensityEstimator(**QUICK).fit(frame)
            model.partial_fit(frame)
        np.testing.assert_allclose(
            DensityEstimator(**QUICK).fit(frame).score_samples(frame), want, atol=1e-5
        )
    torch.set_default_dtype(torch.float64)
    try:
        model = DensityEstimator(**QUICK).fit(frame)
        np.testing.assert_allclose(model.score_samples(frame), want, atol=1e-4)
        blank = frame.assign(x=np.nan, k=None)
        assert model.impute(blank, method="mean").notna().all(axis=None)
        assert model.sample(5, {"k": "a"}).shape == (5, 3)
        assert model.quantile({"k": "a"}).notna().all(axis=None)
        model.partial_fit(frame)
        assert model.model_.nets.w0.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_interrupted_fit_keeps_its_best_state():
    frame = small()
    calls = []

    offer = BestColumns.offer

    def interrupt(best):
        out = offer(best)
        calls.append(out)
        if len(calls) == 4:  # also where a shell in the background ignores the signal
            signal.default_int_handler(signal.SIGINT, None)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BestColumns, "offer", interrupt)
        with pytest.warns(UserWarning, match=r"interrupted after \d+ of 200 steps"):
            model = DensityEstimator(**{**QUICK, "max_steps": 200}).fit(frame)
    assert len(calls) == 5 and len(model.history_) < 5
    assert model.score(frame) > DensityEstimator(**{**QUICK, "max_steps": 1}).fit(frame).score(
        frame
    )
    assert model.sample(3).shape == (3, 3)


@pytest.mark.parametrize(
    "bad",
    [
        dict(max_time=-1),
        dict(max_time=0),
        dict(max_time=float("nan")),
        dict(draws=0),
        dict(draws=2.5),
        dict(max_steps=0),
        dict(members=0),
        dict(batch_size=-2),
        dict(learning_rate=0.0),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} must be a positive"):
        DensityEstimator(**bad).fit(small(20))


def test_draws_of_methods_are_checked():
    model = DensityEstimator(**{**QUICK, "max_steps": 2}).fit(small(40))
    for ask in (
        lambda: model.log_marginal({"k": "a"}, draws=0),
        lambda: model.mean({"k": "a"}, draws=0),
        lambda: model.quantile({"k": "a"}, draws=-1),
    ):
        with pytest.raises(ValueError, match="draws must be a positive integer"):
            ask()


# ---------------------------------------------------------------------- rare labels


@pytest.mark.parametrize("first", [True, False])
def test_rare_labels_are_learned(first):
    rng = np.random.default_rng(0)
    n = 3000
    kind = np.where(rng.random(n) < 0.4, "u", "v").astype(object)
    kind[rng.permutation(n)[:10]] = "rare"
    x = rng.normal(size=(n, 2)) + 4 * (kind == "rare")[:, None]
    group = np.where(rng.random(n) < np.where(kind == "rare", 0.95, 0.2), "yes", "no")
    frame = pd.DataFrame({"kind": kind, "x": x[:, 0], "y": x[:, 1], "group": group})
    names = ["kind", "x", "y", "group"] if first else ["x", "y", "kind", "group"]
    model = DensityEstimator(max_steps=100, members=2, hidden_dim=16, random_state=0)
    model.fit(frame[names])
    given = model.mean({"kind": "rare"})
    for c in "xy":
        assert given[c][0] == pytest.approx(frame[c][kind == "rare"].mean(), abs=1.0)
    drawn = model.sample(4000, random_state=1)
    assert (drawn["kind"] == "rare").mean() == pytest.approx(10 / n, abs=4e-3)
    assert (model.sample(1000, {"kind": "rare"})["group"] == "yes").mean() > 0.6
    assert model.mean({"kind": "u"})["x"][0] == pytest.approx(0, abs=0.25)


def test_the_clock_enters_the_schedule_only_where_it_cuts_it(monkeypatch):
    frame = small(150)

    def fitted(pace):
        """A fit on a clock of so many seconds per reading, of 90."""
        readings = itertools.count(1)
        monkeypatch.setattr(Budget, "seconds", lambda self: pace * next(readings))
        return DensityEstimator(**QUICK).fit(frame)

    quick, loaded = fitted(0.01), fitted(0.2)
    with pytest.warns(UserWarning, match="max_time=90 s .* of its planned steps"):
        slow = fitted(9.0)
    np.testing.assert_array_equal(quick.score_samples(frame), loaded.score_samples(frame))
    assert quick.history_["lr"].equals(loaded.history_["lr"])
    assert slow.history_["step"].max() < 12 < quick.history_["step"].max()


def test_warnings_point_at_the_call(tmp_path):
    table = pd.DataFrame({"id": range(200), "a": np.random.default_rng(0).normal(size=200)})
    table.to_csv(tmp_path / "t.csv", sep=";", index=False, encoding="latin-1")
    with pytest.warns(UserWarning, match="keys|max_time") as said:
        model = DensityEstimator(random_state=0, max_time=0.01).fit(table)
        model.partial_fit(table)
        DensityEstimator(max_steps=2).fit_file(tmp_path / "t.csv")
        model.impute(pd.DataFrame({"id": [10**7, 5], "a": [np.nan, 0.0]}))
    assert len(said) > 3 and {w.filename for w in said} == {__file__}
