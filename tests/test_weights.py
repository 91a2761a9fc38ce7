"""Weights of draws: what they are worth, and draws picked by them."""

import pytest
import torch

from pyroflows.weights import effective_sample_size, systematic_resample


def test_effective_sample_size_counts_equal_weights():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0], [0, 1, 0, 0]])
    assert effective_sample_size(weights).tolist() == [4.0, 2.0, 1.0]
    assert effective_sample_size(torch.tensor([0.6, 0.3, 0.1])).item() == pytest.approx(1 / 0.46)


def test_draws_come_as_often_as_they_weigh():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    weights[0, 2] = weights[1, 0] = weights[2, -1] = 0.0
    share = 1000 * weights / weights.sum(-1, keepdim=True)
    for shift in (torch.zeros(3), torch.rand(3, generator=generator), torch.full((3,), 1 - 1e-7)):
        pick = systematic_resample(weights, 1000, shift.double())
        count = torch.nn.functional.one_hot(pick, 5).sum(1)
        assert (count - share).abs().max() < 1 and not count[weights == 0].any()
    one = systematic_resample(weights[0], 1000, torch.tensor(0.5, dtype=torch.float64))
    assert one.shape == (1000,) and (one.diff() >= 0).all()


def test_resampling_is_unbiased():
    weights = torch.tensor([0.1, 0.62, 0.28], dtype=torch.float64)
    shifts = (torch.arange(4000) + 0.5) / 4000  # quadrature over the uniform number
    pick = systematic_resample(weights.expand(4000, 3), 3, shifts.double())
    mean = torch.nn.functional.one_hot(pick, 3).sum(1).double().mean(0)
    torch.testing.assert_close(mean, 3 * weights, atol=2e-3, rtol=0)


def test_the_old_names_still_import():
    from pyroflows import weights
    from pyroflows.guides.weights import pareto_k, smooth_weights

    assert pareto_k is weights.pareto_k and smooth_weights is weights.smooth_weights
