"""Wide tables: what each network reads, what that costs, and the clock of the whole fit."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from pyroflows.density import DensityEstimator
from pyroflows.density.header import check_header
from pyroflows.density.reads import WIDE
from pyroflows.training.budget import Budget


def chain(columns: int, rows: int, seed: int = 0) -> pd.DataFrame:
    """x_t = 0.8 x_{t-1} + noise, and labels that say the sign of the number before them."""
    rng = np.random.default_rng(seed)
    x = np.empty((rows, columns))
    x[:, 0] = rng.normal(size=rows)
    for t in range(1, columns):
        x[:, t] = 0.8 * x[:, t - 1] + 0.6 * rng.normal(size=rows)
    frame = pd.DataFrame(x, columns=[f"x{t}" for t in range(columns)])
    for t in range(10, columns, 40):
        frame[f"x{t}"] = np.where(frame[f"x{t - 1}"] > 0, "up", "down")
    return frame


def fitted(columns: int, rows: int = 200, **options: object) -> DensityEstimator:
    options = dict(max_steps=6, members=1, hidden_dim=8, max_time=None, random_state=0) | options
    return DensityEstimator(**options).fit(chain(columns, rows))


@pytest.fixture(scope="module")
def wide() -> DensityEstimator:
    return fitted(120)


def test_parameters_grow_linearly(wide: DensityEstimator) -> None:
    """Beyond what is read, a column costs the same however many there are."""

    def count(model: DensityEstimator) -> float:
        nets = model.model_.nets
        held = sum(p.numel() for p in [*nets.parameters(), *nets.buffers()])
        return held / len(model.model_.targets)

    twice = fitted(240, max_steps=1)
    assert count(twice) == pytest.approx(count(wide), rel=0.15)
    assert all(len(r) <= 32 for r in twice.model_.reads)
    assert fitted(WIDE, max_steps=1).model_.reads is None


def test_neighbours_are_read(wide: DensityEstimator) -> None:
    """The strongest dependence is that on the column before, also of labels."""
    model = wide.model_
    place = {model.schema.columns[j].name: i for i, j in enumerate(model.order)}
    for t in range(1, 120):
        assert place[f"x{t - 1}"] in model.reads[place[f"x{t}"]]


def test_conditionals_ignore_what_they_do_not_read(wide: DensityEstimator) -> None:
    """The density's terms and the samplers' conditionals, before and after the unread moved."""
    model, frame = wide.model_, chain(120, 50, seed=1)
    values = torch.from_numpy(wide.schema_.encode(frame))
    t = 100
    unread = [model.order[i] for i in range(t) if i not in model.reads[t]]
    moved = values.clone()
    moved[:, unread] = values.roll(1, 0)[:, unread]
    assert not torch.equal(values, moved)
    read = [model.encode(v) for v in (values, moved)]
    before, after = (model.net_log_prob(r)[0][:, t] for r in read)
    torch.testing.assert_close(before, after)
    nets = [model.conditional(t, r.features) for r in read]
    x = values[:, model.order[t]]
    torch.testing.assert_close(nets[0].log_prob(x), nets[1].log_prob(x))
    shifted = values.clone()
    shifted[:, [model.order[i] for i in model.reads[t]]] = values.roll(1, 0)[
        :, [model.order[i] for i in model.reads[t]]
    ]
    other = model.net_log_prob(model.encode(shifted))[0][:, t]
    assert (other - before).abs().max() > 1e-4


def test_what_is_walked_is_what_is_scored(wide: DensityEstimator) -> None:
    """The product of the conditionals, simple model included, is the density of complete rows."""
    frame = chain(120, 20, seed=2)
    values = torch.from_numpy(wide.schema_.encode(frame))
    total = torch.zeros(20, dtype=torch.float64)
    for _, x, given in wide.model_.walk(values):
        total += given.log_prob(x).double()
    np.testing.assert_allclose(total.numpy(), wide.score_samples(frame), atol=1e-2)
    assert np.isfinite(wide.score_samples(wide.sample(20))).all()


def test_portions_change_nothing(wide: DensityEstimator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are served in portions, so that what a wide table holds is bounded."""
    frame = chain(120, 30, seed=3)
    whole = wide.score_samples(frame)
    monkeypatch.setattr(type(wide.model_), "chunk", 7)
    np.testing.assert_allclose(wide.score_samples(frame), whole, atol=1e-3)


def test_files_keep_what_is_read(wide: DensityEstimator, tmp_path) -> None:
    path = tmp_path / "wide.safetensors"
    wide.save(path)
    other = DensityEstimator.load(path)
    frame = chain(120, 20, seed=4)
    assert other.model_.reads == wide.model_.reads
    np.testing.assert_array_equal(other.score_samples(frame), wide.score_samples(frame))


def test_headers_read_backwards_only(wide: DensityEstimator, tmp_path) -> None:
    """A network that read its own column would be no density: such a file is refused."""
    from safetensors import safe_open

    path = tmp_path / "wide.safetensors"
    wide.save(path)
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["pyroflows"])
    check_header(header)
    for bad in ([5], [-1], [3, 3], [2, 1], ["1"], None):
        reads = [list(r) for r in header["reads"]]
        reads[5] = bad
        with pytest.raises(ValueError, match="reads of place 5"):
            check_header(header | {"reads": reads})
    with pytest.raises(ValueError, match="reads do not fit"):
        check_header(header | {"reads": header["reads"][1:]})


@pytest.mark.parametrize("columns", [3, 80])
def test_no_time_is_said(columns: int) -> None:
    """Marginals at least, and a warning that says how much of the plan ran."""
    frame = chain(columns, 200)
    with pytest.warns(UserWarning, match=r"max_time=1e-06 s .* at 0 % of its planned steps; more"):
        model = DensityEstimator(max_time=1e-6, random_state=0).fit(frame)
    assert np.isfinite(model.score_samples(chain(columns, 50, seed=1))).mean() > 0.9
    draws = model.sample(400)
    assert abs(draws["x0"].mean()) < 5 * frame["x0"].std() / 20 + abs(frame["x0"].mean())
    assert list(draws.columns) == list(frame.columns)


def test_time_enough_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(3)
        fitted(80, max_steps=2)


def test_budget_tells_once() -> None:
    budget = Budget(1e-9)
    assert budget.over() and not Budget().over() and not Budget(1e9).over(0.5)
    budget.tell("did less")
    budget.tell("did less")
    with pytest.warns(UserWarning, match="max_time=1e-09 s did less; more time would help"):
        budget.warn()


def test_the_clock_changes_nothing_that_it_does_not_cut() -> None:
    """Two budgets that suffice give one result: the schedule follows steps."""
    frame = chain(4, 100)
    one, other = (
        DensityEstimator(max_steps=8, max_time=t, random_state=0).fit(frame) for t in (60.0, 600.0)
    )
    np.testing.assert_array_equal(one.score_samples(frame), other.score_samples(frame))
