"""ActNorm's one initialization, and batch normalization beside Pyro's."""

import copy
import math
import pickle

import pyro.distributions as dist
import pyro.distributions.transforms as stock
import pytest
import torch

import pyroflows.transforms as T
from pyroflows.flow import Flow
from pyroflows.recipes import glow


def data(*shape, dtype=torch.float64):
    return 5 + 3 * torch.randn(*shape, dtype=dtype) * torch.arange(1, shape[-1] + 1)


def is_initialized(t):
    return bool(t.initialized)


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("batch", [(200,), (10, 20)])
def test_first_batch_is_standardized(batch, context_dim, dtype):
    t = T.actnorm(3, context_dim=context_dim).to(dtype)
    y = data(*batch, 3, dtype=dtype)
    view = t.condition(torch.randn(*batch, context_dim, dtype=dtype))
    x, log_det = view.inverse_and_log_det(y)
    rows = x.reshape(-1, 3)
    torch.testing.assert_close(rows.mean(0), torch.zeros(3, dtype=dtype), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.std(0), torch.ones(3, dtype=dtype), atol=1e-5, rtol=0)
    expected = -y.reshape(-1, 3).std(0).log().sum().expand(batch)
    torch.testing.assert_close(log_det, expected, atol=1e-5, rtol=1e-5)
    assert is_initialized(t)


def test_images_are_standardized_by_channel():
    t = T.actnorm((2, 4, 5), dim=-3).double()
    y = torch.randn(30, 2, 4, 5).double() * torch.tensor([2.0, 7.0]).view(2, 1, 1) - 3
    x = t.inv(y)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(2).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(x.transpose(0, 1).flatten(1).std(1), torch.ones(2).double())


def test_the_second_batch_changes_nothing():
    t = T.actnorm(3).double()
    t.inv(data(50, 3))
    before = copy.deepcopy(t.state_dict())
    t.inv(100 * data(50, 3))
    assert all(torch.equal(before[k], v) for k, v in t.state_dict().items())


@pytest.mark.parametrize("copied", ["load", "deepcopy", "pickle"])
def test_a_copy_is_not_initialized_again(copied):
    t = T.actnorm(3).double()
    t.inv(data(50, 3))
    other = {
        "load": T.actnorm(3).double(),
        "deepcopy": copy.deepcopy(t),
        "pickle": pickle.loads(pickle.dumps(t)),
    }[copied]
    if copied == "load":
        other.load_state_dict(t.state_dict())
    y = 100 * data(50, 3)
    assert other.training
    assert torch.equal(other.inv(y), t.inv(y))


def test_loading_an_untouched_state_allows_initialization():
    t = T.actnorm(3).double()
    fresh = copy.deepcopy(t.state_dict())
    t.inv(data(50, 3))
    t.load_state_dict(fresh)
    y = data(50, 3) - 40
    assert t.inv(y).mean().abs() < 1e-8


def test_what_does_not_initialize():
    t = T.actnorm(3).double()
    t.eval().inv(data(50, 3))
    t.train().inv(data(1, 3))
    t.inv(data(3))
    t.inv(data(0, 3))
    t.inv(data(5, 3) * math.nan)
    with torch.no_grad():
        t(data(50, 3))  # a sample drawn before training
    Flow(3, [t]).double().sample((20,))
    torch.func.vmap(t.inv)(data(50, 3))
    assert not is_initialized(t)
    assert torch.equal(t.affine.theta, torch.zeros(2, 3).double())
    t.inv(data(50, 3))
    assert is_initialized(t)


def test_training_from_noise_keeps_the_identity_for_good():
    t = T.actnorm(3).double()
    x = torch.randn(50, 3).double()
    assert torch.equal(t(x), x) and is_initialized(t)
    y = data(50, 3)
    assert torch.equal(t.inv(y), y)


def test_a_view_initializes_all_views():
    t = T.actnorm(3, context_dim=1).double()
    t.condition(torch.randn(50, 1).double()).inv(data(50, 3))
    assert is_initialized(t)
    before = t.affine.theta.clone()
    t.condition(torch.randn(50, 1).double()).inv(100 * data(50, 3))
    assert torch.equal(t.affine.theta, before)


def test_bad_rows_and_constant_features_take_no_part():
    t = T.actnorm(3).double()
    y = data(50, 3)
    y[:, 1] = 1e3
    y[4, 0], y[7, 2] = math.nan, math.inf
    x = t.inv(y)
    good = torch.ones(50, dtype=torch.bool)
    good[4] = good[7] = False
    assert x[good].isfinite().all()
    torch.testing.assert_close(x[good].mean(0), torch.zeros(3).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(x[good][:, ::2].std(0), torch.ones(2).double())
    assert torch.equal(x[good][:, 1], torch.zeros(48).double())


def test_glow_starts_near_the_data():
    torch.manual_seed(0)
    y = data(500, 2)
    flow = glow(2, num_transforms=2, hidden_dims=[8]).double()
    got = flow.log_prob(y).mean()
    gaussian = dist.Normal(y.mean(0), y.std(0)).to_event(1).log_prob(y).mean()
    torch.testing.assert_close(got, gaussian, atol=1e-6, rtol=1e-6)


def pyros_and_ours(momentum=0.1):
    theirs, ours = (
        stock.BatchNorm(3, momentum=momentum).double(),
        T.batchnorm(3, momentum).double(),
    )
    return theirs, ours


def test_batchnorm_does_what_pyros_does():
    theirs, ours = pyros_and_ours(0.3)
    for _ in range(3):
        y = data(20, 3)
        x = theirs._inverse(y)
        got, log_det = ours.inverse_and_log_det(y)
        torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)
        expected = -theirs.log_abs_det_jacobian(x, y).sum(-1).expand(20)
        torch.testing.assert_close(log_det, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.moving_mean, theirs.moving_mean)
        torch.testing.assert_close(ours.moving_variance, theirs.moving_variance)
    theirs.eval()
    ours.eval()
    y = data(20, 3)
    torch.testing.assert_close(ours._inverse(y), theirs._inverse(y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours._call(y), theirs._call(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [(60,), (6, 10), (3, 4, 5)])
def test_batchnorm_takes_any_batch_shape(batch):
    t = T.batchnorm(3).double()
    y = data(*batch, 3)
    flat = T.batchnorm(3).double()._inverse(y.reshape(-1, 3))
    torch.testing.assert_close(t._inverse(y).reshape(-1, 3), flat)
    t.eval()
    torch.testing.assert_close(t._call(t._inverse(y)), y)


def test_batchnorm_through_a_distribution_uses_one_batch():
    """Value and log-determinant belong together, and the running averages move once a call."""
    t, y = T.batchnorm(3, 0.5).double(), data(40, 3)
    log_prob = dist.TransformedDistribution(
        dist.Normal(torch.zeros(3).double(), 1.0).to_event(1), [t]
    ).log_prob(y)
    std = (y.var(0) + 1e-5).sqrt()
    expected = dist.Normal(y.mean(0), std).to_event(1).log_prob(y)
    torch.testing.assert_close(log_prob, expected)
    torch.testing.assert_close(t.moving_mean, 0.5 * y.mean(0))


@pytest.mark.parametrize("shape", [(3,), (1, 3), (0, 3)])
def test_batchnorm_without_a_batch_uses_the_running_averages(shape):
    t = T.batchnorm(3).double()
    t._inverse(data(40, 3))
    state = copy.deepcopy(t.state_dict())
    y = data(*shape)
    x = t._inverse(y)
    torch.testing.assert_close(x, copy.deepcopy(t).eval()._inverse(y))
    assert all(torch.equal(state[k], v) for k, v in t.state_dict().items())


def test_batchnorm_keeps_nan_in_its_row():
    t, y = T.batchnorm(3).double(), data(10, 3)
    y[4, 1] = math.nan
    x, log_det = t.inverse_and_log_det(y)
    bad = torch.arange(10) == 4
    assert torch.equal(x.isnan().any(-1), bad) and torch.equal(log_det.isnan(), bad)
    assert t.moving_mean.isfinite().all() and t.moving_variance.isfinite().all()
    torch.testing.assert_close(x[~bad].mean(0), torch.zeros(3).double(), atol=1e-8, rtol=0)


def test_batchnorm_does_not_remember_old_averages():
    t = T.batchnorm(3).double()
    x = torch.randn(5, 3).double()
    y = t(x)
    t._inverse(data(40, 3))  # moves the averages
    assert not torch.equal(t.eval().inv(y), x)


@pytest.mark.parametrize("arguments", [dict(momentum=2.0), dict(epsilon=0.0)])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="must lie"):
        T.batchnorm(3, **arguments)
