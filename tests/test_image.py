"""Image transforms and dequantization."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from cases import disturb

import pyroflows.transforms as T
from pyroflows.compose import Compose
from pyroflows.conditioners import Conv
from pyroflows.dequantization import UniformDequantized
from pyroflows.flow import Flow
from pyroflows.recipes import realnvp
from pyroflows.scalar import Shift


def away(transform, scale=0.3):
    disturb(transform.double(), torch.Generator().manual_seed(0), scale)
    return transform.eval()


def log_det_by_autograd(t, x):
    n = x.numel()
    jacobian = torch.autograd.functional.jacobian(
        lambda v: t._call(v.view_as(x)).flatten(), x.flatten()
    )
    return torch.linalg.slogdet(jacobian.view(n, n))[1]


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_squeeze_is_pixel_unshuffle(batch, factor):
    x = torch.randn(*batch, 2, 6, 12)
    t = T.squeeze(factor)
    y = t(x)
    if 0 not in batch:
        assert torch.equal(y, F.pixel_unshuffle(x, factor))
    assert y.shape == t.forward_shape(x.shape) and t.inverse_shape(y.shape) == x.shape
    assert torch.equal(t.inv(t._call(x)), x)
    assert torch.equal(t.log_abs_det_jacobian(x, y), torch.zeros(batch))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: T.squeeze(0), "positive"),
        (lambda: T.squeeze(2, (1, 3, 4)), "divisible by 2"),
        (lambda: T.squeeze()(torch.randn(1, 4, 5)), "divisible by 2"),
        (lambda: T.squeeze().inv(torch.randn(3, 4, 4)), "multiple of 4"),
        (lambda: T.squeeze(2, (1, 4, 4))(torch.randn(1, 6, 6)), r"\(\.\.\., 1, 4, 4\)"),
        (lambda: T.conv_coupling(1), "Squeeze first"),
        (lambda: T.conv_coupling(2, mask=[True]), "mask must have shape"),
        (lambda: T.conv_coupling(2, kernel_size=2), "odd"),
        (lambda: T.conv_coupling(2, []), "hidden_dims"),
        (lambda: T.Part(T.planar(2), 3, 4), "between 1 and 3"),
        (lambda: T.Part(T.linear((4, 2, 2), dim=-3), 4, dim=-1), "at most 1"),
        (lambda: T.Part(T.squeeze(2, (1, 2, 2)), 2, 1, dim=-3), "keeps the shape"),
        (lambda: T.multi_scale((1, 4, 4), lambda shape: [], 0), "positive"),
        (lambda: T.multi_scale((1, 6, 6), lambda shape: T.linear(shape, dim=-3), 2), "divisible"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_part_leaves_the_rest_alone():
    t = away(T.Part(T.linear(2), 5, 2))
    x = torch.randn(4, 5).double()
    y, log_det = t.forward_and_log_det(x)
    inner = t.inner.forward_and_log_det(x[:, 3:])
    assert torch.equal(y[:, :3], x[:, :3]) and torch.equal(y[:, 3:], inner[0])
    assert torch.equal(log_det, inner[1])


def test_part_sums_the_log_determinants_of_narrower_bijections():
    t = T.Part(T.exp(), (2, 3), 1, dim=-2)
    x = torch.randn(4, 2, 3)
    y, log_det = t.forward_and_log_det(x)
    assert torch.equal(y[:, 1], x[:, 1].exp())
    torch.testing.assert_close(log_det, x[:, 1].sum(-1))


def step(channels, context_dim=0):
    return Compose(
        [
            T.conv_coupling(channels, [8], context_dim=context_dim),
            T.generalized_channel_permute(channels),
            T.actnorm(channels, dim=-3),
        ]
    )


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_multi_scale_keeps_the_shape_and_its_log_det(levels, context_dim):
    t = away(T.multi_scale((1, 4, 4), lambda shape: step(shape[0], context_dim), levels))
    assert t.event_shape == (1, 4, 4)
    t = t.condition(torch.randn(context_dim).double())
    x = torch.randn(1, 4, 4).double()
    y, log_det = t.forward_and_log_det(x)
    back, log_det_back = t.inverse_and_log_det(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(log_det_back, -log_det)
    torch.testing.assert_close(log_det, log_det_by_autograd(t, x), rtol=1e-8, atol=1e-8)


def test_multi_scale_hands_on_half_of_the_channels():
    shapes = []

    def identity(shape):
        shapes.append(shape)
        return T.linear(shape, dim=-3)

    t = T.multi_scale((3, 16, 8), identity, 3)
    assert shapes == [(48, 2, 1), (24, 4, 2), (12, 8, 4)]
    x = torch.randn(2, 3, 16, 8)
    torch.testing.assert_close(t(x), x)


def test_an_image_flow_learns():
    torch.manual_seed(0)
    y = torch.randn(64, 1, 4, 4).cumsum(-1)
    flow = Flow(
        dist.Normal(torch.zeros(1, 4, 4), torch.ones(1, 4, 4)).to_event(3),
        T.multi_scale((1, 4, 4), lambda shape: T.iterated(2, step, shape[0]), 2),
    )
    assert flow().sample((5,)).shape == (5, 1, 4, 4)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = -flow.log_prob(y).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("batch", [(), (5,), (2, 5), (0,)])
def test_conv_conditioner(batch):
    net = Conv(2, 3, 4, context_dim=6, hidden_dims=[8, 7])
    x, context = torch.randn(*batch, 2, 5, 3), torch.randn(batch[-1:] + (6,))
    params = net(x, context)
    assert params.shape == (3, *batch, 4, 5, 3)
    assert not params.any()  # a zero last layer
    disturb(net, torch.Generator().manual_seed(0))
    params = net(x, context)
    if batch == (2, 5):
        torch.testing.assert_close(net(x[1, 3], context[3]), params[:, 1, 3])


def test_conv_coupling_keeps_and_moves_channels():
    t = away(
        T.conv_coupling(4, [8], scalar=Shift(), mask=[True, False, False, True], kernel_size=1)
    )
    x = torch.randn(2, 4, 3, 3).double()
    y, log_det = t.forward_and_log_det(x)
    assert torch.equal(y[:, 1:3], x[:, 1:3]) and not torch.equal(y[:, ::3], x[:, ::3])
    assert torch.equal(log_det, torch.zeros(2).double())
    moved = x.clone()
    moved[0, 1, 0, 0] += 1  # a 1×1 network sees nothing of its neighbours
    assert torch.equal(t(moved)[0, :, 1:], y[0, :, 1:])


# ------------------------------------------------------------------------------ dequantization


def cell_log_probs(v, scale, step=1.0):
    normal = torch.distributions.Normal(torch.zeros_like(v), scale)
    return (normal.cdf(v + step) - normal.cdf(v)).log().sum(-1)


def test_dequantized_is_a_bound_that_tightens():
    base = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    d = UniformDequantized(base)
    v = d.sample((20,))
    assert torch.equal(v, v.floor())
    exact = cell_log_probs(v, 1.0)
    bounds = [
        torch.stack(
            [UniformDequantized(base, num_samples=k).log_prob(v) for _ in range(2000 // k)]
        )
        .mean(0)
        .mean()
        for k in (1, 10, 1000)
    ]
    assert bounds[0] < bounds[1] < exact.mean() + 1e-2
    torch.testing.assert_close(bounds[2], exact.mean(), rtol=0, atol=1e-2)


def test_dequantized_probabilities_sum_to_one():
    base = dist.Normal(torch.zeros(1).double(), 2.0).to_event(1)
    d = UniformDequantized(base, num_samples=4000, step=0.5)
    v = torch.arange(-20, 20).double()[:, None] / 2
    assert abs(d.log_prob(v).exp().sum() - 1) < 5e-3
    torch.testing.assert_close(
        d.log_prob(v[10:30]), cell_log_probs(v[10:30], 2.0, 0.5), rtol=0, atol=0.1
    )


def test_noise_stays_in_its_cell_where_float32_would_round_it_out():
    bytes_ = UniformDequantized(dist.Uniform(0.0, 256.0).expand([1_000_000]))
    log_prob = bytes_.log_prob(torch.full((1_000_000,), 255.0))  # some draws round to 256
    assert (log_prob + math.log(256)).abs().max() < 1e-5


def test_dequantized_is_a_distribution():
    d = UniformDequantized(
        dist.Normal(torch.zeros(4, 3), 1.0).to_event(1), step=0.25, num_samples=3
    )
    assert d.batch_shape == (4,) and d.event_shape == (3,) and not d.has_rsample
    assert d.sample((5,)).shape == (5, 4, 3) and d.log_prob(d.sample((5,))).shape == (5, 4)
    e = d.expand((2, 4))
    assert e.batch_shape == (2, 4) and (e.step, e.num_samples) == (0.25, 3)
    assert UniformDequantized(dist.Normal(0.0, 1.0)).log_prob(torch.arange(3)).shape == (3,)
    assert d.support.check(d.sample()).all() and not d.support.check(d.sample() + 0.1).any()


def test_dequantized_flow_in_a_model():
    flow = realnvp(2, num_transforms=2, hidden_dims=[8])
    counts = torch.randint(0, 4, (16, 2)).float()

    def model():
        with pyro.plate("rows", 16):
            pyro.sample("y", UniformDequantized(flow), obs=counts)

    trace = pyro.poutine.trace(model).get_trace()
    total = trace.log_prob_sum()
    assert math.isfinite(total.item())
    total.backward()
    assert any(p.grad is not None and p.grad.any() for p in flow.parameters())


@pytest.mark.parametrize(
    "arguments, error",
    [(dict(step=0.0), ValueError), (dict(num_samples=0), ValueError), (dict(base=3), TypeError)],
)
def test_dequantized_bad_arguments(arguments, error):
    with pytest.raises(error, match="must be"):
        UniformDequantized(**{"base": dist.Normal(0.0, 1.0), **arguments})


def test_dequantized_refuses_values_off_the_grid():
    with pytest.raises(ValueError, match="support"):
        UniformDequantized(dist.Normal(0.0, 1.0), validate_args=True).log_prob(torch.tensor(0.5))
