"""Maximum likelihood.

It finds known densities, keeps the best state and refuses what it cannot use.
"""

import math

import pandas as pd
import pytest
import torch

import pyroflows as pf
from pyroflows import bases
from pyroflows import transforms as T
from pyroflows.flow import Flow


def correlated(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.tensor([[2.0, 0.0], [1.5, 0.5]])
    return torch.randn(n, 2, generator=generator) @ mix.T + torch.tensor([1.0, -3.0]), mix


def fit(flow, *args, **kwargs):
    return pf.fit(flow, *args, progress=False, **kwargs)


def test_finds_a_known_density():
    x, mix = correlated(4000)
    truth = torch.distributions.MultivariateNormal(torch.tensor([1.0, -3.0]), mix @ mix.T)
    flow = Flow(2, [T.linear(2), T.elementwise_affine(2)])
    history = fit(flow, x, num_epochs=60, lr=2e-2)
    fresh, _ = correlated(4000, seed=1)
    gap = (truth.log_prob(fresh) - flow.log_prob(fresh)).mean()
    assert abs(gap.item()) < 0.02
    assert not flow.training and history.best_valid_loss == min(history.valid_loss)
    assert "validation loss" in repr(history)


def test_context_is_used():
    c = torch.randn(3000, 1)
    x = torch.cat([3 * c + 0.5 * torch.randn_like(c), torch.randn_like(c)], 1)
    flow = pf.neural_spline(2, 1, num_transforms=2, hidden_dims=[16])
    fit(flow, x, c, num_epochs=30, lr=1e-2)
    d = flow(torch.tensor([[-1.0], [1.0]]))
    mean = d.sample((2000,)).mean(0)[:, 0]
    assert (mean - torch.tensor([-3.0, 3.0])).abs().max() < 0.4


def test_best_state_is_kept_and_patience_stops():
    x, _ = correlated(200)
    flow = pf.realnvp(2, num_transforms=4, hidden_dims=[64])
    history = fit(flow, x, num_epochs=400, lr=5e-2, patience=5)
    assert history.stopped_early and history.best_epoch < len(history.valid_loss) - 1
    # the split is the seed's: score the same held-out rows again
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    held = -flow.log_prob(x[order[:20]]).mean().item()
    assert held == pytest.approx(history.best_valid_loss, abs=1e-4)


def test_seeds_repeat_and_the_global_generator_is_untouched():
    x, _ = correlated(300)
    states = []
    for noise in (1, 2):
        torch.manual_seed(7)
        flow = pf.realnvp(2, num_transforms=2, hidden_dims=[8])
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        fit(flow, x, num_epochs=3, seed=5)
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(torch.cat([p.detach().flatten() for p in flow.parameters()]))
    assert torch.equal(*states)


def test_weights_count_rows():
    x = torch.cat([torch.randn(500, 1) - 4, torch.randn(500, 1) + 4])
    weight = torch.cat([torch.full((500,), 3.0), torch.zeros(500)])
    flow = Flow(bases.DiagonalNormal(1), [T.elementwise_affine(1)])
    fit(flow, x, sample_weight=weight, num_epochs=60, lr=0.01)
    assert abs(float(flow.sample(4000).mean()) + 4) < 0.2


def test_non_finite_steps_are_skipped():
    class Fragile(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(1))
            self.calls = 0

        def log_prob(self, x, context=None):
            self.calls += 1
            blown = math.inf if self.training and self.calls % 3 == 0 else 1.0
            return -(x - self.loc).square().sum(-1) * blown

    flow = Fragile()
    history = fit(flow, torch.randn(200, 1) + 1, num_epochs=30, lr=0.05)
    assert history.skipped_steps > 0 and abs(flow.loc.item() - 1) < 0.2


def test_other_inputs():
    x, _ = correlated(64)
    flow = Flow(2, [T.elementwise_affine(2)])
    assert len(fit(flow, x.numpy(), num_epochs=2).train_loss) == 2
    assert len(fit(flow, pd.DataFrame(x.numpy()), num_epochs=2).train_loss) == 2
    assert fit(flow, x, num_epochs=2, validation=0).valid_loss == []
    held = (x[:10],)
    assert len(fit(flow, x, num_epochs=2, validation=held).valid_loss) == 2
    bad = x.clone()
    bad[[3, 5], 0] = math.nan
    with pytest.raises(ValueError, match="2 rows of x"):
        fit(flow, bad)
    with pytest.raises(ValueError, match="context has 3"):
        fit(pf.realnvp(2, 1), x, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="too few"):
        fit(flow, x[:3])
    with pytest.raises(ValueError, match="at least 2"):
        fit(flow, x[:1], validation=0)
    with pytest.raises(ValueError, match="shape"):
        fit(flow, x[:, 0])
    with pytest.raises(ValueError, match="negative"):
        fit(flow, x, sample_weight=-torch.ones(64))
    with pytest.raises(TypeError, match="bool"):
        fit(flow, x > 0)


def test_glow_initializes_on_data():
    x, _ = correlated(500)
    flow = pf.glow(2, num_transforms=2, hidden_dims=[16])
    history = fit(flow, 100 + 50 * x, num_epochs=5, lr=1e-3)
    # the normal fitted to the data has about this entropy; an uninitialized flow is thousands of
    # nats off
    assert history.valid_loss[0] < 15


def test_losses_are_those_recorded():
    """Of the loop as it was when each objective had its own; equal to the bit on one machine."""
    z = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    x = torch.cat([3 * z[:, :1] + 5, 0.2 * z[:, 1:2] + z[:, :1] ** 2], 1)
    c = 0.2 * z[:, 2:] + z[:, :1] ** 2
    torch.manual_seed(3)
    history = fit(pf.neural_spline(2, count_bins=4, hidden_dims=[16]), x, num_epochs=3)
    assert history.train_loss == pytest.approx([4.280332506, 3.806995094, 3.555765927], rel=1e-5)
    assert history.valid_loss == pytest.approx([4.188111130, 3.924875474, 3.856705260], rel=1e-5)
    torch.manual_seed(3)
    history = fit(
        pf.realnvp(2, context_dim=1, hidden_dims=[16]), x, c, num_epochs=3, lr=1e-2, seed=4,
        sample_weight=torch.linspace(0, 1, 300), weight_decay=0.1, clip_norm=0.5, batch_size=50,
    )  # fmt: skip
    assert history.train_loss == pytest.approx([3.898827744, 3.057080269, 2.700555563], rel=1e-5)
    assert history.valid_loss == pytest.approx([3.295071385, 2.777754673, 2.673314723], rel=1e-5)


def test_warnings_point_at_the_call():
    x, _ = correlated(100)
    flow = pf.realnvp(2, num_transforms=2, hidden_dims=[8])
    pf.fit(flow, x, num_epochs=1, progress=False)
    with pytest.warns(UserWarning, match="standard deviations from") as unlike:
        pf.fit(flow, 30 * x, num_epochs=1, progress=False)
    with pytest.warns(UserWarning, match="features .1. of x are constant") as constant:
        flow = pf.realnvp(2, num_transforms=2, hidden_dims=[8])
        pf.fit(flow, x * torch.tensor([1.0, 0.0]), num_epochs=1, progress=False)
    assert {w.filename for w in [*unlike, *constant]} == {__file__}
