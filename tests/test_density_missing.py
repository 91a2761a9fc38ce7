"""Missing cells and conditions: whatever is asked of a table agrees with its scores.

Oracles: sums over all rows of small discrete tables, fine grids over one or two numbers, and
draws of whole rows that are filtered.
"""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from pyroflows.density import DensityEstimator
from pyroflows.density.conditionals import Numbers
from pyroflows.density.uniforms import Uniforms

LABELS = {"a": list("pqr"), "b": ["u", "v"], "k": [0.0, 1.0, 2.0], "c": list("wxyz")}
EVERY = pd.DataFrame(list(itertools.product(*LABELS.values())), columns=list(LABELS))


def discrete(n=1500):
    rng = np.random.default_rng(0)
    a = rng.choice(3, n, p=[0.7, 0.26, 0.04])
    b = (rng.random(n) < np.where(a == 2, 0.9, 0.3)).astype(int)
    k = (a + b + rng.choice(3, n, p=[0.7, 0.2, 0.1])) % 3
    c = (k + rng.choice(4, n, p=[0.85, 0.05, 0.05, 0.05])) % 4
    return pd.DataFrame(
        {"a": np.array(list("pqr"))[a], "b": np.array(["u", "v"])[b], "k": k.astype(float)}
    ).assign(c=np.array(list("wxyz"))[c])


def mixed(n=1500):
    rng = np.random.default_rng(1)
    x = rng.normal(size=n)
    rain = np.where(rng.random(n) < 0.3, 0.0, np.exp(0.5 * x + 0.5 * rng.normal(size=n)))
    count = rng.poisson(np.exp(0.5 + 0.3 * x))
    kind = np.where(rng.random(n) < stats.norm.cdf(2 * x), "u", "v")
    y = np.round(x + 0.3 * rng.normal(size=n) + (kind == "u"), 1)
    return pd.DataFrame({"x": x, "count": count, "rain": rain, "kind": kind, "y": y})


@pytest.fixture(scope="module")
def labels():
    table = discrete()
    model = DensityEstimator(max_steps=150, members=2, hidden_dim=16, random_state=0).fit(table)
    return model, np.exp(model.score_samples(EVERY))


@pytest.fixture(scope="module")
def numbers():
    table = mixed()
    model = DensityEstimator(max_steps=150, members=2, hidden_dim=16, random_state=0).fit(table)
    return model, table


PATTERNS = [given for size in range(4) for given in itertools.combinations(LABELS, size)]


def conditions(given):
    """A likely and an unlikely assignment of the columns."""
    rows = EVERY[list(given)]
    return [rows.iloc[0].to_dict(), rows.iloc[-1].to_dict()] if given else [{}]


@pytest.mark.parametrize("given", PATTERNS, ids="-".join)
def test_all_answers_about_labels_are_sums_of_scores(labels, given):
    model, joint = labels
    for cells in conditions(given):
        held = np.logical_and.reduce([EVERY[c] == v for c, v in cells.items()] or [joint > 0])
        exact = joint * held / joint[held].sum()
        row = pd.DataFrame([cells]) if cells else pd.DataFrame({"k": [np.nan]})
        # the probability that is kept for labels never seen is all that is missing
        np.testing.assert_allclose(
            model.log_marginal(row), np.log(joint[held].sum()), atol=4 * 2 / 1500
        )
        n = 4000
        for size in (1, n):  # many rows of one draw, one row of many
            drawn = (
                model.sample(n, cells or None, random_state=3)
                if size == n
                else model.impute(pd.DataFrame(row.loc[row.index.repeat(n)]), random_state=4)
            )
            index = EVERY.reset_index().merge(drawn[list(LABELS)], on=list(LABELS), how="right")
            counts = np.bincount(index["index"], minlength=len(EVERY))
            assert counts[~held].sum() == 0
            big = exact * n >= 5
            expected = np.append(exact[big], exact[~big].sum()) * n
            observed = np.append(counts[big], counts[~big].sum())
            if expected[-1] < 5:
                expected[-2:] = 0, expected[-2:].sum()
                observed[-2:] = 0, observed[-2:].sum()
            keep = expected > 0
            test = stats.chisquare(observed[keep], expected[keep] * n / expected[keep].sum())
            assert test.pvalue > 1e-4 or keep.sum() == 1
        filled = model.impute(row, method="mean").iloc[0]
        for c in set(LABELS) - set(given):
            share = {v: exact[EVERY[c] == v].sum() for v in LABELS[c]}
            best = max(share.values())
            assert share[filled[c]] > best - 1e-3


def test_a_condition_on_a_later_label_is_drawn_as_scored(labels):
    """A missing label that is enumerated must be drawn by its weight, not evenly."""
    model, joint = labels
    rare = model.sample(4000, {"c": "w"}, random_state=0)["a"].value_counts(normalize=True)
    held = EVERY["c"] == "w"
    for v in "pqr":
        exact = joint[held & (EVERY["a"] == v)].sum() / joint[held].sum()
        assert rare.get(v, 0.0) == pytest.approx(exact, abs=4 * np.sqrt(exact / 4000))


def test_the_mean_of_a_number_is_the_sum_over_its_gaps():
    rng = np.random.default_rng(0)
    k = rng.choice(["common", "rare"], 1200, p=[0.85, 0.15])
    x = np.where(k == "rare", 10.0, 1.0) + 0.5 * rng.normal(size=1200)
    z = np.where(rng.random(1200) < np.where(k == "rare", 0.9, 0.1), "yes", "no")
    model = DensityEstimator(max_steps=200, members=2, hidden_dim=16, random_state=0).fit(
        pd.DataFrame({"k": k, "x": x, "z": z})
    )
    for given in ({"z": "no"}, {"z": "yes"}, {"k": "common"}, {"k": "rare", "z": "no"}):
        xs = np.linspace(-5, 18, 3001)
        total = np.zeros(len(xs))
        for v in [given["k"]] if "k" in given else ["common", "rare"]:
            for w in [given["z"]] if "z" in given else ["yes", "no"]:
                total += np.exp(model.score_samples(pd.DataFrame({"k": v, "x": xs, "z": w})))
        exact = (xs * total).sum() / total.sum()
        sd = np.sqrt(((xs - exact) ** 2 * total).sum() / total.sum())
        close = 4 * sd / np.sqrt(1024)
        assert model.mean(given)["x"][0] == pytest.approx(exact, abs=close)
        cdf = total.cumsum() / total.sum()
        for q in (0.2, 0.6):
            got = np.interp(model.quantile(given, q)["x"][0], xs, cdf)
            assert got == pytest.approx(q, abs=4 * 0.5 / np.sqrt(1024))


# ---------------------------------------------------------------------- scores


def grid_sum(model, row, names):
    """Log of the integral of whole rows over one or two number columns."""
    grids = {"x": np.linspace(-6, 6, 3001 if len(names) == 1 else 161)}
    grids["count"] = np.arange(30)
    step = np.exp(np.linspace(-9, 5, 4001 if len(names) == 1 else 101))
    grids["rain"] = np.append(0.0, np.sqrt(step[1:] * step[:-1]))
    widths = {
        "x": np.gradient(grids["x"]),
        "count": np.ones(30),
        "rain": np.append(1, np.diff(step)),
    }
    values = np.array(list(itertools.product(*(grids[n] for n in names))))
    width = np.array(list(itertools.product(*(widths[n] for n in names)))).prod(1)
    rows = row.loc[row.index.repeat(len(values))].reset_index(drop=True)
    for i, name in enumerate(names):
        rows[name] = values[:, i].astype(rows[name].dtype)
    return logsumexp(model.score_samples(rows) + np.log(width))


@pytest.mark.parametrize("names", [["x"], ["count"], ["rain"], ["x", "count"], ["x", "rain"]])
def test_scores_of_rows_with_gaps_are_integrals(numbers, names):
    model, table = numbers
    rows = table.head(3).reset_index(drop=True)
    blank = rows.astype({"count": "Int64"})
    for name in names:
        blank[name] = pd.NA if name == "count" else np.nan
    got, error = model.score_samples(blank, return_error=True)
    want = [grid_sum(model, rows.iloc[[i]], names) for i in range(len(rows))]
    if len(names) == 1:
        np.testing.assert_allclose(got, want, atol=3e-3)
        assert (error < 2e-3).all()
    else:
        assert (np.abs(got - want) < 5 * error + 5e-3).all()
        assert (error < 0.15).all() and (error > 0).all()
    both = [model.score_samples(blank.assign(kind=v)) for v in "uv"]
    got = model.score_samples(blank.assign(kind=None))
    np.testing.assert_allclose(got, np.logaddexp(*both), atol=0.005 if len(names) == 1 else 0.3)


def test_a_score_does_not_depend_on_the_rows_beside_it(numbers):
    model, table = numbers
    rng = np.random.default_rng(0)
    rows = table.head(40).astype({"count": "Int64"})
    rows = rows.mask(rng.random(rows.shape) < 0.4)
    want = model.score_samples(rows)
    np.testing.assert_allclose(model.score_samples(rows[::-1])[::-1], want, atol=1e-5)
    np.testing.assert_allclose(model.score_samples(rows[7:8]), want[7:8], atol=1e-5)
    assert np.isfinite(want).all()


def test_draws_of_a_row_do_not_depend_on_the_rows_beside_it(numbers):
    model, table = numbers
    rows = table.head(30).assign(rain=np.nan, kind=None)
    other = rows.copy()
    other.loc[10:, ["x", "y"]] = np.nan
    a, b = (model.impute(t, random_state=2).head(10) for t in (rows, other))
    np.testing.assert_allclose(a["rain"], b["rain"], atol=1e-4)
    assert (a["kind"] == b["kind"]).all()


# ---------------------------------------------------------------------- draws


@pytest.fixture(scope="module")
def whole(numbers):
    return numbers[0].sample(40_000, random_state=11)


@pytest.mark.parametrize(
    "given",
    [{"y": 0.5}, {"count": 2, "y": 1.0}, {"kind": "v"}, {"rain": 0.0, "kind": "u"}],
    ids=str,
)
def test_conditional_draws_are_the_filtered_ones(numbers, whole, given):
    model, _ = numbers
    held = np.logical_and.reduce(
        [np.isclose(whole[c], v) if c != "kind" else whole[c] == v for c, v in given.items()]
    )
    want = whole[held]
    got = model.sample(3000, given, random_state=5)
    assert len(want) > 100
    for c in ("x", "rain", "y", "count"):
        if c not in given:
            assert stats.ks_2samp(got[c], want[c]).pvalue > 1e-4, c
    if "kind" not in given:
        p, m = (want["kind"] == "u").mean(), len(want)
        assert (got["kind"] == "u").mean() == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / m))
    means = model.mean(given)
    for c in set(means) & {"x", "count"}:
        error = want[c].std() * np.sqrt(1 / len(want) + 1 / 500)
        assert means[c][0] == pytest.approx(want[c].mean(), abs=4 * error), c


def test_what_cannot_be_is_known_without_error(numbers):
    model, table = numbers
    row = table.iloc[:3].assign(count=[-1, 2, -1])
    for gone in ([], ["x"], ["x", "rain"], ["x", "rain", "kind"]):
        nats, error = model.log_marginal(row.drop(columns=gone), return_error=True)
        assert np.isneginf(nats[[0, 2]]).all() and np.isfinite(nats[1])
        assert error[0] == error[2] == 0 and np.isfinite(error[1])


def test_improbable_conditions_are_said(numbers):
    model, _ = numbers
    with pytest.warns(UserWarning, match="so improbable given the cells before them"):
        model.sample(5000, {"kind": "v", "y": 9.0, "rain": 30.0}, random_state=0)


def test_uniform_numbers_belong_to_their_place():
    u = Uniforms(3)
    row, draw = torch.arange(400).repeat_interleave(50), torch.arange(50).repeat(400)
    every = u(row, draw, 2)
    assert stats.kstest(every.numpy(), "uniform").pvalue > 1e-3
    for other in (
        u(row, draw, 3),
        u(row, draw, 2, 1),
        u(row + 400, draw, 2),
        Uniforms(4)(row, draw, 2),
    ):
        assert abs(np.corrcoef(every, other)[0, 1]) < 4 / np.sqrt(len(every))
    torch.testing.assert_close(
        u.at(torch.arange(100, 400))(row[:50], draw[:50], 2), every[100 * 50 : 101 * 50]
    )
    strata = Uniforms(3, strata=64)(torch.zeros(128).long(), torch.arange(128), 0)
    for part in strata.split(64):
        assert (part * 64).long().sort().values.tolist() == list(range(64))


def test_conditionals_are_one_law(numbers):
    """Score, distribution function, quantiles, mean and draws of the same conditional."""
    model, table = numbers
    values = torch.from_numpy(model.schema_.encode(table.head(3)))
    laws = [law for _, _, law in model.model_.walk(values) if isinstance(law, Numbers)]
    for law in laws:
        c = law.cells
        ends = torch.tensor([-torch.inf, torch.inf]).double().expand(3, -1)
        torch.testing.assert_close(law.cdf(ends), torch.tensor([0.0, 1.0]).double().expand(3, -1))
        if c.step > 0:
            alone, beside = (
                c.snap(torch.tensor([0.3]).double()),
                torch.tensor([0.3, 1e15]).double(),
            )
            assert alone == c.snap(beside)[:1]
            x = (c.anchor + c.step * torch.arange(-400, 400)).expand(3, -1)
            p = law.log_prob(x).exp() * c.step
            torch.testing.assert_close(law.cdf(x), p.cumsum(1), atol=1e-5, rtol=0)
        else:
            x = torch.linspace(-6, 12, 60001).double().expand(3, -1)
            p = law.log_prob(x).exp() * (x[0, 1] - x[0, 0])
            p[:, (x[0, :, None] == c.atoms).any(1)] = 0
            smooth = law.cdf(x, atoms=False)
            torch.testing.assert_close(smooth, p.cumsum(1), atol=2e-3, rtol=0)
        q = torch.linspace(0.02, 0.98, 49).double().expand(3, -1)
        at = law.quantile(q)
        assert (law.cdf(at) >= q - 1e-9).all()
        assert (law.cdf(c.below(at.reshape(-1)).view_as(at) - 1e-7) <= q + 1e-4).all()
        grid = torch.linspace(0.0005, 0.9995, 1000).double().expand(3, -1)
        exact = law.quantile(grid).mean(1)
        torch.testing.assert_close(law.mean_value(), exact, atol=0.02, rtol=0.01)
        draws = law.sample(*torch.rand(2, 3, 20000, dtype=torch.float64))
        for a, b in zip(law.cdf(draws), draws, strict=True):
            if not len(c.atoms) and c.step == 0:
                assert stats.kstest(a, "uniform").pvalue > 1e-4
            assert b.isfinite().all()
        share = (draws[..., None] == c.atoms).double().mean(1)
        torch.testing.assert_close(share, law.log_atoms.exp(), atol=0.02, rtol=0)
