"""The density of tables.

Exactness against independent oracles, conventions, and behaviour on awkward tables.
"""

import copy
import pickle
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from pyroflows.density import DensityEstimator
from pyroflows.density.histogram import Histogram
from pyroflows.density.mixtures import MixedMixture
from pyroflows.density.scores import NormalScores

QUICK = dict(max_steps=60, members=3, random_state=0)


def mixed(n=600, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 2))
    return pd.DataFrame(
        {
            "size": 2 * z[:, 0] + 1,
            "count": rng.poisson(np.exp(1 + 0.3 * z[:, 0])).astype("int64"),
            "rain": np.where(rng.random(n) < 0.3, 0.0, np.exp(z[:, 1])),
            "kind": pd.Categorical(np.where(z[:, 0] + 0.3 * z[:, 1] > 0, "u", "v")),
            "length": np.round(z[:, 0] + 0.5 * z[:, 1], 1),
        }
    )


@pytest.fixture(scope="module")
def table():
    frame = mixed()
    rng = np.random.default_rng(1)
    frame["length"] = frame["length"].mask(rng.random(len(frame)) < 0.15)
    frame["kind"] = frame["kind"].mask(rng.random(len(frame)) < 0.15)
    return frame


@pytest.fixture(scope="module")
def joint(table):
    return DensityEstimator(**QUICK).fit(table)


# ---------------------------------------------------------------------- one column


@pytest.mark.parametrize("step", [None, 0.5])
@pytest.mark.parametrize("lower", [None, 0.0])
def test_histogram_is_a_density_with_the_right_distribution_function(step, lower):
    x = np.random.default_rng(0).gamma(2.0, size=3000)
    x = np.round(x / step) * step if step else x
    hist = Histogram.fit(x, step=step, lower=lower)
    ends = [
        hist.icdf_in_bin(torch.tensor([g]), torch.tensor([u]).double())[0]
        for g, u in ((0, 1e-9), (hist.num_bins - 1, 1 - 1e-9))
    ]
    cuts = torch.cat([ends[0][None], hist.edges, ends[1][None]])
    grid = torch.cat(
        [
            a + (b - a) * (torch.arange(2000).double() + 0.5) / 2000
            for a, b in zip(cuts[:-1], cuts[1:], strict=True)
        ]
    )
    width = torch.cat(
        [((b - a) / 2000).repeat(2000) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    )
    group, log_f = hist.log_density(grid)
    mass = torch.zeros(hist.num_bins, dtype=torch.float64).index_add_(
        0, group, log_f.exp() * width
    )
    torch.testing.assert_close(mass[1:-1], torch.ones_like(mass[1:-1]), atol=1e-6, rtol=0)
    assert (mass - 1).abs().max() < 0.02  # the tails reach beyond the grid
    g, u = hist.cdf_in_bin(grid)
    assert ((u[1:] - u[:-1])[g[1:] == g[:-1]] >= -1e-12).all()
    torch.testing.assert_close(hist.icdf_in_bin(g, u), grid, atol=1e-4, rtol=1e-4)


def test_histogram_finds_spikes_and_gaps_that_equal_shares_miss():
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.random(9000), 0.5 + 1e-4 * rng.random(600), 5 + 1e-3 * rng.random(400)]
    )
    hist = Histogram.fit(x)
    log_f = torch.log(hist.bin_mass)[
        hist.log_density(torch.tensor([0.50005, 5.0005, 3.0, 0.2]))[0]
    ]
    total = (log_f + hist.log_density(torch.tensor([0.50005, 5.0005, 3.0, 0.2]).double())[1]).exp()
    assert total[0] == pytest.approx(600, rel=0.2)
    assert total[1] == pytest.approx(40, rel=0.2)
    assert total[2] < 1e-3
    assert total[3] == pytest.approx(0.9, rel=0.2)


@pytest.mark.parametrize("lower", [None, 0.0])
@pytest.mark.parametrize(
    "law", [stats.norm(5, 1), stats.t(2, 100), stats.lognorm(1.0), stats.uniform(1, 1)]
)
def test_normal_scores_are_smooth_increasing_and_invertible(law, lower):
    x = law.rvs(5000, random_state=0)
    if lower is not None:
        x = np.abs(x)
    scores = NormalScores.fit(x, lower=lower)
    at = torch.tensor(
        np.concatenate([np.quantile(x, np.linspace(0, 1, 400)), [x.max() * 3]]), requires_grad=True
    )
    s, log_slope = scores.inverse_and_log_det(at)
    (slope,) = torch.autograd.grad(s.sum(), at)
    torch.testing.assert_close(log_slope, slope.log(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scores(s.detach()), at.detach(), atol=1e-7, rtol=1e-6)
    assert (s[1:] >= s[:-1]).all()
    assert abs(float(scores.inv(torch.tensor(x)).std()) - 1) < 0.15


@pytest.mark.parametrize("n", [100, 500, 5000])
def test_normal_scores_rise_beyond_a_largest_value_that_many_rows_share(n):
    """Excesses that are all zero have no scale: the tail was flat, and logistics reached 1e18."""
    rng = np.random.default_rng(0)
    for x in (rng.integers(1, 40, n), rng.integers(1, 11, n), -np.floor(rng.exponential(3, n))):
        scores = NormalScores.fit(x, lower=x.min())
        far = x.max() + x.std() * np.array([10.0, 100.0])
        # A unit logistic has a part in 100 beyond 4.6, and in 3,000 beyond 8.
        assert (scores.inv(torch.as_tensor(far)) > torch.tensor([4.6, 8.0])).all()


def test_draws_of_whole_numbers_stay_near_the_data():
    rng = np.random.default_rng(1)
    table = pd.DataFrame({"days": rng.integers(1, 40, 400), "z": rng.normal(size=400)})
    model = DensityEstimator(random_state=0, max_steps=60).fit(table)
    days = model.sample(5000)["days"]
    assert days.max() < 200
    assert abs(days.mean() - 20) < 4 * 11.3 / np.sqrt(5000) + 11.3 / np.sqrt(400) * 3


def test_mixture_agrees_with_scipy_and_reads_columns_in_order():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 2, 2))
    cov = a @ a.transpose(0, 2, 1) + 0.1 * np.eye(2)
    weight, mean = np.array([0.2, 0.5, 0.3]), rng.normal(size=(3, 2))
    label = rng.dirichlet(np.ones(4), 3)
    q = MixedMixture(
        torch.tensor(weight).log(),
        torch.tensor(mean),
        torch.linalg.cholesky(torch.tensor(cov)),
        [torch.tensor(label).log()],
        [False, True, False],
    )
    x, code = rng.normal(size=(50, 2)), rng.integers(0, 4, 50)
    want = logsumexp(
        [
            np.log(w) + stats.multivariate_normal(m, c).logpdf(x) + np.log(p[code])
            for w, m, c, p in zip(weight, mean, cov, label, strict=True)
        ],
        axis=0,
    )
    state, total, known = q.start(50), torch.zeros(50), torch.ones(50, dtype=torch.bool)
    for j, value in enumerate([x[:, 0], None, x[:, 1]]):
        cell = torch.tensor(code) if value is None else torch.zeros(50, dtype=torch.long)
        s = torch.zeros(50) if value is None else torch.tensor(value)
        width = torch.full((50,), 1e-8, dtype=torch.float64)
        total = total + q.log_prob(j, state, cell, s.double(), width, -width.log())
        state = q.update(j, state, cell, s, known)
    np.testing.assert_allclose(total.numpy(), want, atol=1e-6)


# ---------------------------------------------------------------------- whole rows


def test_density_of_a_complete_row_integrates_to_one():
    rng = np.random.default_rng(0)
    n = 400
    x = np.where(rng.random(n) < 0.2, 0.0, rng.gamma(2.0, size=n))
    frame = pd.DataFrame({"x": x, "k": rng.integers(0, 60, n) * 5, "c": rng.choice(["a", "b"], n)})
    model = DensityEstimator(**QUICK).fit(frame)
    assert (model.schema_["k"].step, model.schema_["x"].atoms) == (5.0, [0.0])
    # The point mass, a fine grid over the rest of x, all of k's lattice, both labels.
    fine = np.exp(np.linspace(np.log(1e-6), np.log(1e4), 1500))
    middle, width = np.sqrt(fine[1:] * fine[:-1]), np.diff(fine)
    xs = np.concatenate([[0.0], middle])
    ks = np.arange(-0, 1500, 5)
    base = pd.DataFrame({"x": xs})
    total = 0.0
    marginal = np.exp(model.log_marginal(base))
    assert marginal[0] + (marginal[1:] * width).sum() == pytest.approx(1, abs=5e-3)
    for c in "ab":
        for value in (0.0, 1.3):
            rows = pd.DataFrame({"x": value, "k": ks, "c": c})
            total = np.exp(model.score_samples(rows)).sum() * 5
            np.testing.assert_allclose(
                total,
                np.exp(model.log_marginal(pd.DataFrame({"x": [value], "c": [c]}))),
                rtol=2e-2,
            )


def test_missing_cells_are_integrated_out(joint, table):
    rows = table.dropna().head(40).reset_index(drop=True)
    both = [
        joint.score_samples(rows.assign(kind=pd.Categorical([v] * 40, ["u", "v"]))) for v in "uv"
    ]
    blank = joint.score_samples(rows.assign(kind=pd.Categorical([None] * 40, ["u", "v"])))
    np.testing.assert_allclose(blank, np.logaddexp(*both), atol=1e-5)
    # `count` comes before observed columns in the model's order: Monte Carlo against summation.
    few = rows.head(8)
    every = np.stack([joint.score_samples(few.assign(count=v)) for v in range(60)])
    blank = joint.score_samples(few.astype({"count": "Int64"}).assign(count=pd.NA))
    np.testing.assert_allclose(blank, logsumexp(every, axis=0), atol=0.35)


def test_missingness_can_be_modelled(table):
    model = DensityEstimator(missing="model", **QUICK).fit(table)
    drawn = model.sample(2000, random_state=1)
    assert drawn["length"].isna().mean() == pytest.approx(0.15, abs=0.05)
    assert not joint_has_missing(model.sample(200, missing=False))
    pattern = model.score_samples(table.dropna())
    assert (pattern < model.set_params(missing="ignore").score_samples(table.dropna())).all()


def joint_has_missing(frame):
    return bool(frame.isna().any().any())


def test_samples_look_like_the_table(joint, table):
    drawn = joint.sample(3000, random_state=1)
    assert list(drawn.columns) == list(table.columns)
    assert drawn.dtypes.equals(table.dtypes)
    assert (drawn["rain"] == 0).mean() == pytest.approx(0.3, abs=0.05)
    assert (drawn["rain"] >= 0).all() and (drawn["count"] >= 0).all()
    np.testing.assert_allclose(drawn["length"], drawn["length"].round(1), atol=1e-12)
    assert stats.ks_2samp(drawn["size"], table["size"]).statistic < 0.07
    pd.testing.assert_frame_equal(joint.sample(5), joint.sample(5))


def test_conditional_samples_follow_bayes(joint):
    drawn = joint.sample(4000, {"kind": "u"}, random_state=0)
    assert (drawn["kind"] == "u").all()
    free = joint.sample(8000, random_state=2)
    assert stats.ks_2samp(drawn["size"], free["size"][free["kind"] == "u"]).statistic < 0.12
    assert len(joint.sample(3, pd.DataFrame({"kind": ["u", "v"]}))) == 6


def test_rows_to_condition_on_come_in_any_number_under_any_index(joint, table):
    given = table[["kind", "size"]].dropna().head(4)
    want = joint.sample(3, given.reset_index(drop=True), random_state=0)
    for index in ([7, 7, 7, 8], list("abab")):
        pd.testing.assert_frame_equal(
            joint.sample(3, given.set_axis(index), random_state=0).reset_index(drop=True), want
        )
    assert len(joint.sample(5, {})) == 5 and len(joint.mean({})) == 1


def test_impute_fills_gaps_only(joint, table):
    for method in ("draw", "mean"):
        full = joint.impute(table, method=method)
        assert not joint_has_missing(full)
        known = table["length"].notna()
        pd.testing.assert_series_equal(full["length"][known], table["length"][known])
    truth = mixed()["length"]
    gap = table["length"].isna()
    error = (joint.impute(table, method="mean")["length"] - truth)[gap].std()
    assert error < 0.8 * truth.std()


# ---------------------------------------------------------------------- conditionals


def test_quantiles_invert_the_distribution_function_and_transforms_are_uniform():
    rng = np.random.default_rng(0)
    x = rng.normal(size=1500)
    frame = pd.DataFrame({"x": x, "y": 2 * x + np.exp(0.5 * x) * rng.normal(size=1500)})
    model = DensityEstimator(target="y", max_steps=300, members=2, random_state=0).fit(
        frame[:1200]
    )
    held = frame[1200:]
    q = model.quantile(held, [0.1, 0.5, 0.9])
    for p in (0.1, 0.5, 0.9):
        u = model.pit(held.assign(y=q["y", p].to_numpy()))["y"]
        np.testing.assert_allclose(u, p, atol=1e-6)
    assert stats.kstest(model.pit(held)["y"], "uniform").pvalue > 1e-3
    inside = model.interval(held, 0.8)
    share = (
        (held["y"].to_numpy() >= inside["y", "lower"])
        & (held["y"].to_numpy() <= inside["y", "upper"])
    ).mean()
    assert share == pytest.approx(0.8, abs=0.08)
    truth = stats.norm(2 * held["x"], np.exp(0.5 * held["x"])).logpdf(held["y"]).mean()
    assert model.score(held) > truth - 0.15
    np.testing.assert_allclose(model.mean(held)["y"], 2 * held["x"], atol=1.5)
    assert len(model.sample(2, held)) == 2 * len(held)
    with pytest.raises(ValueError, match="conditional: pass given"):
        model.sample(2)
    with pytest.raises(ValueError, match=r"given columns \['x'\] are missing"):
        model.sample(2, held[["y"]])


def test_roles_are_checked():
    frame = mixed(50)
    with pytest.raises(ValueError, match=r"unknown: \['nope'\]"):
        DensityEstimator(target=["nope"]).fit(frame)
    with pytest.raises(ValueError, match=r"in both: \['size'\]"):
        DensityEstimator(target=["size"], given=["size"]).fit(frame)
    model = DensityEstimator(target="size", given=["kind"], **QUICK).fit(frame)
    assert model.score_samples(frame).shape == (50,)  # other columns do not matter


# ---------------------------------------------------------------------- awkward tables

NORMAL = np.random.default_rng(3).normal(size=(300, 3))
AWKWARD = {
    "constant column": pd.DataFrame({"a": NORMAL[:, 0], "b": 7.0}),
    "empty column": pd.DataFrame({"a": NORMAL[:, 0], "b": np.nan}),
    "all missing": pd.DataFrame({"a": [np.nan] * 20}),
    "duplicate": pd.DataFrame({"a": NORMAL[:, 0], "b": NORMAL[:, 0]}),
    "scaled": pd.DataFrame(NORMAL[:, :2] * 1e9, columns=["a", "b"]),
    "tiny": pd.DataFrame(NORMAL[:, :2] * 1e-9, columns=["a", "b"]),
    "shifted": pd.DataFrame(NORMAL[:, :2] + 1e9, columns=["a", "b"]),
    "shifted float32": pd.DataFrame((NORMAL[:, :2] + 1e9).astype("float32"), columns=["a", "b"]),
    "one column": pd.DataFrame({"a": NORMAL[:, 0]}),
    "one row": pd.DataFrame({"a": [1.0], "b": ["x"]}),
    "wide": pd.DataFrame(np.random.default_rng(0).normal(size=(6, 15))).add_prefix("c"),
    "outlier": pd.DataFrame({"a": np.append(NORMAL[:, 0], 1e12), "b": np.append(NORMAL[:, 1], 0)}),
    "heavy": pd.DataFrame({"a": np.tan(NORMAL[:, 0]), "b": np.exp(5 * NORMAL[:, 1])}),
    "many labels": pd.DataFrame({"a": [f"id{i}" for i in range(300)], "b": NORMAL[:, 0]}),
    "integers as names": pd.DataFrame(NORMAL),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_tables_give_finite_densities_and_samples(name):
    frame = AWKWARD[name]
    model = DensityEstimator(max_steps=20, members=2, random_state=0)
    with pytest.warns(match="keys or names") if name == "many labels" else nullcontext():
        model.fit(frame)
    score = model.score_samples(frame)
    assert np.isfinite(score).all()
    drawn = model.sample(50)
    assert drawn.dtypes.equals(frame.dtypes)
    numbers = drawn.select_dtypes("number").dropna(axis=1, how="all")
    assert np.isfinite(numbers.to_numpy(float)).all()
    far = frame.apply(lambda c: c * 10 + 1 if c.dtype.kind == "f" else c)
    assert not np.isnan(model.score_samples(far)).any()


def test_scale_and_shift_change_the_density_by_the_jacobian_only():
    one = DensityEstimator(**QUICK).fit(pd.DataFrame(NORMAL, columns=list("abc")))
    two = DensityEstimator(**QUICK).fit(pd.DataFrame(NORMAL * 1024 + 2048, columns=list("abc")))
    a = one.score_samples(pd.DataFrame(NORMAL, columns=list("abc")))
    b = two.score_samples(pd.DataFrame(NORMAL * 1024 + 2048, columns=list("abc")))
    np.testing.assert_allclose(a, b + 3 * np.log(1024), atol=0.02)


def test_bad_input_is_named(joint, table):
    with pytest.raises(ValueError, match="not fitted"):
        DensityEstimator().score_samples(table)
    with pytest.raises(ValueError, match="now missing:\n- kind"):
        joint.score_samples(table.drop(columns="kind"))
    with pytest.raises(ValueError, match="unseen at fit time:\n- colour"):
        joint.score_samples(table.assign(colour=1))
    with pytest.raises(ValueError, match="infinity"):
        joint.score_samples(table.assign(size=np.inf))
    with pytest.raises(ValueError, match="contamination"):
        joint.predict_outliers(table, 2.0)
    with pytest.raises(ValueError, match="random_state"):
        DensityEstimator(random_state="seed").fit(table)
    with pytest.raises(ValueError, match="schema of 'kind': expected a dict"):
        DensityEstimator(schema={"kind": "categorical"}).fit(table)
    with pytest.raises(ValueError, match="missing must be"):
        DensityEstimator(missing="drop").fit(table)
    assert np.isfinite(joint.score_samples(table.assign(kind="never seen").iloc[:3])).all()
    with pytest.raises(ValueError, match=r"'kind' has no label \['w'\]; it has"):
        joint.sample(2, {"kind": "w"})


# ---------------------------------------------------------------------- conventions


def test_a_seed_gives_one_result_and_leaves_the_global_generators_alone(table):
    torch.manual_seed(5)
    np.random.seed(5)
    want = torch.rand(2), np.random.rand(2)
    torch.manual_seed(5)
    np.random.seed(5)
    a, b = (DensityEstimator(max_steps=15, members=2, random_state=3).fit(table) for _ in range(2))
    np.testing.assert_array_equal(a.score_samples(table), b.score_samples(table))
    torch.testing.assert_close(torch.rand(2), want[0])
    np.testing.assert_array_equal(np.random.rand(2), want[1])


@pytest.mark.filterwarnings("ignore:Estimator DensityEstimator does not inherit:UserWarning")
def test_scikit_learn_conventions():
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    results = checks.check_estimator(
        DensityEstimator(max_steps=3, members=2, random_state=0), on_fail=None, on_skip=None
    )
    failed = {r["check_name"]: str(r["exception"]) for r in results if r["status"] == "failed"}
    assert not failed
    from sklearn.base import clone
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    assert clone(DensityEstimator(draws=7)).draws == 7
    grid = GridSearchCV(
        DensityEstimator(max_steps=3, members=2, random_state=0), {"hidden_dim": [8, 16]}, cv=2
    )
    assert "hidden_dim" in grid.fit(NORMAL).best_params_
    pipe = make_pipeline(DensityEstimator(max_steps=3, members=2, random_state=0)).fit(NORMAL)
    assert pipe.score_samples(NORMAL).shape == (300,)


def test_weights_count_like_repetitions_and_zero_like_absence():
    frame = mixed(300)
    weight = np.where(frame["size"] > 1, 3.0, 0.0)
    model = DensityEstimator(**QUICK).fit(frame, sample_weight=weight)
    assert (model.sample(300)["size"] > 0.5).mean() > 0.97
    heavy = DensityEstimator(**QUICK).fit(frame, sample_weight=1.0 + 9.0 * (frame["kind"] == "u"))
    assert (heavy.sample(2000)["kind"] == "u").mean() > 0.8


def test_copies_outliers_summary_history_and_partial_fit(joint, table):
    want = joint.score_samples(table)
    for twin in (copy.deepcopy(joint), pickle.loads(pickle.dumps(joint))):
        np.testing.assert_array_equal(twin.score_samples(table), want)
    strange = table.dropna().head(3).assign(size=40.0)
    assert joint.predict_outliers(strange).all()
    assert joint.predict_outliers(table, 0.05).mean() < 0.2
    assert {"role", "model", "missing", "nats"} <= set(joint.summary().columns)
    assert joint.history_["valid"].iloc[-1] > joint.history_["valid"].iloc[0]
    twin.partial_fit(table)
    assert len(twin.history_) > len(joint.history_)
    assert twin.score(table) > joint.score(table) - 0.2
    assert isinstance(joint.set_output(transform="default").sample(2), np.ndarray)
    joint.set_output(transform="pandas")


def test_no_pandas_or_sklearn_for_the_core():
    import subprocess
    import sys

    heavy = ("pandas", "sklearn", "safetensors", "matplotlib", "pyarrow")
    code = f"import sys, pyroflows; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
