"""Flows of tables: exact sums, known densities, draws that are what is scored, files, errors."""

import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pyroflows as pf
from pyroflows.density import DensityEstimator
from pyroflows.density.flow_engine import FlowEngine

QUICK = dict(random_state=0, max_steps=120, members=1, hidden_dim=24)


def mixed_table(n, seed=0):
    """A label, a short lattice with a point mass's neighbour, and a continuous number."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(["a", "b"], n, p=[0.3, 0.7])
    count = rng.binomial(7, np.where(kind == "a", 0.3, 0.7))
    size = rng.normal(np.where(kind == "a", -1.0, 2.0) + 0.5 * count, 1.0)
    return pd.DataFrame({"kind": kind, "count": count, "size": size})


def capped_table(n, seed=0):
    """A continuous column of which a third are zero, tied to another."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    y = np.where(
        rng.random(n) < 1 / (1 + np.exp(-2 * x - 1)), np.exp(0.5 * x + rng.normal(size=n)), 0.0
    )
    return pd.DataFrame({"x": x, "y": y})


@pytest.fixture(scope="module")
def lattice():
    """A label and a lattice: a table of 16 outcomes."""
    table = mixed_table(900)[["kind", "count"]]
    schema = {"count": {"kind": "numeric"}}
    model = DensityEstimator(flow="realnvp", schema=schema, dequantization_draws=256, **QUICK).fit(
        table
    )
    return table, model


@pytest.fixture(scope="module")
def mixed():
    table = mixed_table(1500)
    return table, DensityEstimator(flow="maf", schema={"count": {"kind": "numeric"}}, **QUICK).fit(
        table
    )


@pytest.fixture(scope="module")
def capped():
    table = capped_table(1500)
    return table, DensityEstimator(flow="neural_spline", **QUICK).fit(table)


def grid_of(model):
    column = model.schema_["count"]
    counts = np.arange(column.lower if column.lower is not None else -3, 11)
    grid = pd.MultiIndex.from_product([["a", "b"], counts.astype(int)], names=["kind", "count"])
    return grid.to_frame(index=False)


def test_the_probabilities_of_all_outcomes_sum_to_one(lattice):
    table, model = lattice
    grid = grid_of(model)
    nats, error = model.score_samples(grid, return_error=True)
    assert np.exp(nats).sum() == pytest.approx(1, abs=0.01)
    assert (error[np.exp(nats) > 1e-3] < 0.1).all()


def test_more_points_tighten_the_bound(mixed):
    table, model = mixed
    nats = []
    for points in (1, 4, 64):
        model.engine_.points = points
        nats.append(model.score(table))
    model.engine_.points = 8
    assert nats[0] < nats[1] < nats[2]


def test_frequencies_of_draws_match_scores(lattice):
    _, model = lattice
    grid, n = grid_of(model), 20000
    drawn = model.sample(n, random_state=1)
    assert drawn["count"].dtype == np.int64
    share = drawn.groupby(["kind", "count"]).size().reindex(grid, fill_value=0).to_numpy() / n
    p = np.exp(model.score_samples(grid))
    assert (np.abs(share - p) < 4 * np.sqrt(p / n) + 0.02 * p + 1e-4).all()


def test_a_density_integrates_to_one(mixed):
    _, model = mixed
    size = np.linspace(-12, 14, 401)
    total = 0.0
    for kind in ("a", "b"):
        for count in range(8):
            rows = pd.DataFrame({"kind": kind, "count": count, "size": size})
            total += np.exp(model.score_samples(rows)).sum() * (size[1] - size[0])
    assert total == pytest.approx(1, abs=0.03)


def test_point_masses_have_their_probability(capped):
    table, model = capped
    assert model.schema_["y"].atoms == [0.0]
    x = np.linspace(-6, 6, 121)
    zero = np.exp(model.score_samples(pd.DataFrame({"x": x, "y": 0.0}))).sum() * (x[1] - x[0])
    share = float((table["y"] == 0).mean())
    assert zero == pytest.approx(share, abs=0.04)
    y = np.concatenate([np.linspace(1e-4, 20, 200), np.geomspace(20.1, 2000, 50)])
    grid = np.stack(np.meshgrid(x[::2], y, indexing="ij"), -1).reshape(-1, 2)
    p = np.exp(model.score_samples(pd.DataFrame(grid, columns=["x", "y"]))).reshape(-1, len(y))
    rest = np.trapezoid(np.trapezoid(p, y, axis=1), x[::2])
    assert zero + rest == pytest.approx(1, abs=0.03)
    drawn = model.sample(4000, random_state=0)
    assert float((drawn["y"] == 0).mean()) == pytest.approx(share, abs=0.04)
    assert (drawn["y"] >= 0).all()
    low = drawn["y"][drawn["x"] < -1] == 0
    assert float(low.mean()) == pytest.approx(
        float((table["y"][table["x"] < -1] == 0).mean()), abs=0.08
    )


@pytest.mark.parametrize("flow", ["neural_spline", "glow"])
def test_a_gaussian_table_has_its_true_density(flow):
    rng = np.random.default_rng(0)
    cov = np.array([[1.0, 0.8, 0.0], [0.8, 1.0, -0.3], [0.0, -0.3, 1.0]])
    table = pd.DataFrame(
        rng.multivariate_normal(np.zeros(3), cov, 2500) * [1, 10, 1e6], columns=[*"abc"]
    )
    train, test = table[:1500], table[1500:]
    model = DensityEstimator(flow=flow, random_state=0, max_steps=200).fit(train)
    law = torch.distributions.MultivariateNormal(torch.zeros(3), torch.tensor(cov))
    z = torch.as_tensor(test.to_numpy() / [1, 10, 1e6])
    true = float(law.log_prob(z).mean()) - np.log(1e7)
    assert model.score(test) == pytest.approx(true, abs=0.08)
    assert np.corrcoef(model.sample(2000), rowvar=False)[0, 1] == pytest.approx(0.8, abs=0.06)


def test_conditional_draws_match_filtered_draws(mixed):
    """By context and labels exactly, given a number by resampling."""
    _, model = mixed
    joint = model.sample(20000, random_state=0)
    given_b = model.sample(4000, {"kind": "b"}, random_state=1)
    assert (given_b["kind"] == "b").all()
    of_b = joint[joint["kind"] == "b"]
    assert given_b["size"].mean() == pytest.approx(of_b["size"].mean(), abs=0.12)
    given_5 = model.sample(3000, {"count": 5}, random_state=2)
    of_5 = joint[joint["count"] == 5]
    assert (given_5["count"] == 5).all()
    assert (given_5["kind"] == "b").mean() == pytest.approx((of_5["kind"] == "b").mean(), abs=0.04)
    assert given_5["size"].mean() == pytest.approx(of_5["size"].mean(), abs=0.15)
    rows = pd.DataFrame({"kind": ["a", "b"], "count": [2, 6]})
    quantile = model.quantile(rows, 0.5, draws=512)["size"]
    mean = model.mean(rows, draws=512)["size"]
    assert np.allclose(quantile, [0.0, 5.0], atol=0.6) and np.allclose(mean, [0.0, 5.0], atol=0.6)
    ranged = model.sample(3000, {"size": (1.0, 4.0), "count": [3, 4, 5]}, random_state=3)
    inside = joint[joint["size"].between(1, 4) & joint["count"].isin([3, 4, 5])]
    assert ranged["size"].between(1, 4).all() and ranged["count"].isin([3, 4, 5]).all()
    assert ranged["size"].mean() == pytest.approx(inside["size"].mean(), abs=0.06)
    assert (ranged["kind"] == "b").mean() == pytest.approx(
        (inside["kind"] == "b").mean(), abs=0.04
    )
    with pytest.raises(ValueError, match="probability of ranges, sets or predicates is not known"):
        model.probability({"size": (1.0, 4.0)})
    gaps = pd.DataFrame({"kind": ["a", None], "count": [2, 6], "size": [np.nan, 5.0]})
    filled = model.impute(gaps)
    assert filled.notna().all().all() and filled["kind"][0] == "a" and filled["size"][1] == 5.0


def test_given_columns_are_the_context():
    table = mixed_table(1200)
    model = DensityEstimator(target=["size"], flow="maf", **QUICK).fit(table)
    assert model.flow_context(table).shape[1] == model.flow_.context_dim > 0
    rows = pd.DataFrame({"kind": ["a", "b"], "count": [2, 6]})
    drawn = model.sample(1000, rows, random_state=0)["size"].to_numpy().reshape(2, -1)
    assert np.allclose(drawn.mean(1), [0, 5], atol=0.4)
    size = np.linspace(-15, 25, 2001)
    one = pd.DataFrame({"kind": "b", "count": 6, "size": size})
    assert model.predict_outliers(table.head(3).assign(size=1e6)).all()
    assert np.exp(model.score_samples(one)).sum() * 0.02 == pytest.approx(1, abs=5e-3)
    # the flow itself is the density of the numbers, in data units
    points = torch.as_tensor(size)[:, None]
    nats = model.flow_.log_prob(points, model.flow_context(one))
    np.testing.assert_allclose(nats.numpy(), model.score_samples(one), atol=1e-9)
    assert model.summary().loc["size", "nats"] > -3


def test_noise_and_back(mixed, capped):
    table, model = mixed
    u = model.pit(mixed_table(1500, seed=5))  # uniform, as far as so short a fit goes
    assert list(u) == ["count", "size"] and u.max().max() < 1
    assert u.mean().to_numpy() == pytest.approx(0.5, abs=0.05)
    assert u.std().to_numpy() == pytest.approx(12**-0.5, abs=0.04)
    some = table.head(200)
    noise = model.transform(some)
    assert list(noise.columns) == ["count", "size"] and abs(float(noise.to_numpy().mean())) < 0.2
    back = model.inverse_transform(noise, some)
    assert (back["count"] == some["count"]).all() and (back["kind"] == some["kind"]).all()
    np.testing.assert_allclose(back["size"], some["size"], atol=1e-6)
    table, model = capped
    some = table.tail(100)
    back = model.inverse_transform(model.transform(some), some)
    np.testing.assert_allclose(back.to_numpy(), some.to_numpy(), atol=1e-5, rtol=1e-5)
    assert ((back["y"] == 0) == (some["y"] == 0)).all()


def test_a_row_keeps_its_score_whatever_is_beside_it(mixed):
    table, model = mixed
    whole = model.score_samples(table[:50])
    alone = [float(model.score_samples(table[i : i + 1])[0]) for i in range(5)]
    np.testing.assert_allclose(whole[:5], alone, atol=1e-9)
    again = DensityEstimator(flow="maf", schema={"count": {"kind": "numeric"}}, **QUICK).fit(table)
    np.testing.assert_array_equal(again.score_samples(table[:50]), whole)


LOADED = """
import sys, numpy as np, pandas as pd
from pyroflows import DensityEstimator
model = DensityEstimator.load(sys.argv[1])
table = pd.read_parquet(sys.argv[2])
np.save(sys.argv[3], model.score_samples(table))
print(repr(model.sample(3, random_state=0).to_dict()))
"""


def test_a_fresh_process_loads_the_same_model(mixed, tmp_path):
    table, model = mixed
    model.save(tmp_path / "m.safetensors")
    table[:100].to_parquet(tmp_path / "t.parquet")
    names = [str(tmp_path / n) for n in ("m.safetensors", "t.parquet", "out.npy")]
    out = subprocess.run(
        [sys.executable, "-c", LOADED, *names], capture_output=True, text=True, check=True
    )
    np.testing.assert_allclose(np.load(names[2]), model.score_samples(table[:100]), atol=1e-10)
    assert out.stdout.strip() == repr(model.sample(3, random_state=0).to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("marginal1.xi"), "'marginal1.xi' is missing"),
        (
            lambda t: t.update({"marginal0.slopes": t["marginal0.slopes"][1:]}),
            "'marginal0.slopes'",
        ),
        (lambda t: t.update({"marginal2.xi": t["marginal1.xi"].clone()}), "belong nowhere"),
    ],
)
def test_damaged_maps_of_numbers_are_refused_by_name(mixed, tmp_path, change, message):
    path = tmp_path / "m.safetensors"
    mixed[1].save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    with pytest.raises(ValueError, match=rf"is damaged: .*{message}"):
        DensityEstimator.load(path)


def make_small(input_dim, context_dim):
    return pf.realnvp(input_dim, context_dim, num_transforms=2, hidden_dims=[8])


def test_a_callable_makes_the_flow_and_comes_again_with_the_file(tmp_path):
    table = mixed_table(400)
    model = DensityEstimator(flow=make_small, random_state=0, max_steps=30).fit(table)
    model.save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="fitted with a callable flow=.*pass it again"):
        DensityEstimator.load(tmp_path / "m.safetensors")
    again = DensityEstimator.load(tmp_path / "m.safetensors", flow=make_small)
    np.testing.assert_allclose(again.score_samples(table), model.score_samples(table), atol=1e-10)
    with pytest.raises(ValueError, match="another flow than flow= makes.*expected shape"):
        DensityEstimator.load(tmp_path / "m.safetensors", flow=lambda d, c: pf.maf(d, c))


def test_a_file_that_needs_no_callable_refuses_one(mixed, tmp_path):
    table, model = mixed
    plain = DensityEstimator(max_steps=5).fit(table[["size"]].head(50))
    for m, name in ((model, repr(model.flow)), (plain, "None")):
        m.save(tmp_path / "m.safetensors")
        with pytest.raises(ValueError, match=f"fitted with flow={name}: load it without flow="):
            DensityEstimator.load(tmp_path / "m.safetensors", flow=make_small)


def test_weights_count_as_repeated_rows():
    table = mixed_table(600).round({"size": 1})
    weight = np.random.default_rng(0).integers(1, 4, len(table))
    repeated = table.loc[table.index.repeat(weight)]
    options = dict(flow="realnvp", random_state=0, max_steps=1)
    a = DensityEstimator(**options).fit(table, sample_weight=weight)
    b = DensityEstimator(**options).fit(repeated)
    for one, other in zip(
        a.engine_.numbers.marginals.state_dict().values(),
        b.engine_.numbers.marginals.state_dict().values(),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    heavy = np.where(table["kind"] == "a", 50, 1)  # nearly all of the weight on one label
    model = DensityEstimator(flow="realnvp", **QUICK).fit(table, sample_weight=heavy)
    share = (model.sample(2000, random_state=0)["kind"] == "a").mean()
    true = heavy[table["kind"] == "a"].sum() / heavy.sum()
    assert share == pytest.approx(true, abs=0.03)


@pytest.mark.parametrize("flow", ["nice", "realnvp", "glow", "iaf", "maf", "neural_spline"])
def test_every_recipe_fits_one_number_of_any_dtype(flow):
    rng = np.random.default_rng(0)
    when = pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 300, 400), unit="D")
    table = pd.DataFrame({"when": when})
    model = DensityEstimator(flow=flow, random_state=0, max_steps=20).fit(table)
    drawn = model.sample(50)
    assert drawn.dtypes.equals(table.dtypes)
    assert (drawn["when"] == drawn["when"].dt.normalize()).all()
    assert np.isfinite(model.score_samples(table)).all()
    assert model.history_["valid"].notna().any()


def test_constraints_and_ends_hold_in_draws():
    rng = np.random.default_rng(0)
    start = rng.integers(0, 100, 500)
    table = pd.DataFrame(
        {"start": start, "end": start + rng.integers(1, 9, 500), "share": rng.uniform(size=500)}
    )
    model = DensityEstimator(
        flow="realnvp",
        constraints=["start < end"],
        schema={"share": {"lower": 0, "upper": 1}},
        **QUICK,
    ).fit(table)
    drawn = model.sample(3000, random_state=0)
    assert (drawn["start"] < drawn["end"]).all() and drawn["share"].between(0, 1).all()
    broken = table.head(3).assign(end=-1)
    assert (model.score_samples(broken) == -np.inf).all()
    assert (model.score_samples(table.head(3).assign(share=1.5)) == -np.inf).all()


def test_a_distribution_for_pyro():
    table = mixed_table(800)[["size"]].assign(other=np.random.default_rng(1).normal(size=800))
    model = DensityEstimator(flow="maf", **QUICK).fit(table)
    law = model.distribution()
    x = torch.as_tensor(table.to_numpy()[:20]).requires_grad_()
    nats = law.log_prob(x)
    np.testing.assert_allclose(nats.detach().numpy(), model.score_samples(table[:20]), atol=1e-9)
    assert torch.autograd.grad(nats.sum(), x)[0].abs().sum() > 0
    torch.manual_seed(0)
    assert law.sample((2000,)).mean(0).double().numpy() == pytest.approx(
        table.mean().to_numpy(), abs=0.2
    )


def test_a_second_fit_goes_on(mixed):
    table, _ = mixed
    model = DensityEstimator(flow="realnvp", random_state=0, max_steps=60).fit(table[:500])
    before, steps = model.score(table[500:]), len(model.history_)
    model.partial_fit(table)
    assert len(model.history_) > steps and model.score(table[500:]) > before


def test_errors_say_what_to_do(mixed):
    table, model = mixed
    gaps = table.head(20).copy()
    gaps.loc[3, "size"] = np.nan
    with pytest.raises(
        ValueError, match="cannot integrate out missing cells of 'size'.*flow=None"
    ):
        model.score_samples(gaps)
    with pytest.raises(ValueError, match="cannot integrate out missing cells of 'size'.*impute"):
        DensityEstimator(flow="maf").fit(gaps)
    with pytest.raises(ValueError, match="only labels to model.*use flow=None"):
        DensityEstimator(flow="maf").fit(table[["kind"]])
    with pytest.raises(ValueError, match="flow must be None, one of .*'maf'"):
        DensityEstimator(flow="mfa").fit(table)
    with pytest.raises(TypeError, match="must make a Flow; got int"):
        DensityEstimator(flow=lambda d, c: 3).fit(table)
    with pytest.raises(ValueError, match="context_dim=2; got"):
        DensityEstimator(flow=lambda d, c: pf.maf(d)).fit(table[["kind", "size"]])
    plain = DensityEstimator(max_steps=5).fit(table[["size"]].head(50))
    for name in ("flow_", "transform", "inverse_transform"):
        with pytest.raises(AttributeError, match=f"{name} needs a flow"):
            getattr(plain, name)
    with pytest.raises(ValueError, match=r"given= must have \['kind'\]"):
        model.inverse_transform(np.zeros((2, 2)))


def test_time_is_kept_and_said():
    table = mixed_table(4000)
    with pytest.warns(UserWarning, match="max_time=1 s .* % of its planned steps") as said:
        model = DensityEstimator(flow="realnvp", random_state=0, max_time=1.0).fit(table)
    assert isinstance(model.engine_, FlowEngine)
    assert {w.filename for w in said} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(model.score(table[:100]))
