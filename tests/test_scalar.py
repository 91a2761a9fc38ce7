"""A scalar map of its own for every feature."""

import pytest
import torch
from cases import MAPS, disturb

import pyroflows.transforms as T
from pyroflows.scalar import Affine, PerFeature
from pyroflows.splines import LinearRational, RationalQuadratic


@pytest.mark.parametrize("inverse", [False, True])
def test_each_feature_is_moved_by_its_own_map(inverse):
    x = torch.randn(6, 5, dtype=torch.float64)
    params = torch.randn(MAPS.num_params, 6, 5, dtype=torch.float64)
    for given in (params, tuple(params)):
        out, log_slope = (MAPS.inverse if inverse else MAPS.forward)(x, given)
        assert out.shape == log_slope.shape == x.shape
        for i, scalar in enumerate(MAPS.maps):
            move = scalar.inverse if inverse else scalar.forward
            found = out[:, i], log_slope[:, i]
            torch.testing.assert_close(found, move(x[:, i], params[: scalar.num_params, :, i]))


def test_bounded_and_free_columns_share_a_layer():
    """A column that a spline moves inside its box stays there, whatever the others do."""
    maps = PerFeature([LinearRational(6, bound=1.0), Affine(), RationalQuadratic(6, bound=1.0)])
    for make in (T.autoregressive, T.coupling):
        layer = make(maps, 3, [16]).double()
        disturb(layer, torch.Generator().manual_seed(0), 1.0)
        x = torch.randn(500, 3, dtype=torch.float64)
        x[:, ::2] = torch.rand(500, 2, dtype=torch.float64) * 2 - 1
        y = layer(x)
        assert y[:, ::2].abs().max() <= 1
        assert (y[:, 2] - x[:, 2]).abs().max() > 0.05
        torch.testing.assert_close(layer.inv(y.clone()), x, rtol=1e-9, atol=1e-9)


def test_channels_of_images():
    maps = PerFeature([Affine(), RationalQuadratic(4), RationalQuadratic(4)], dim=-3)
    layer = T.conv_coupling(3, [4], scalar=maps).double()
    disturb(layer, torch.Generator().manual_seed(0))
    x = torch.rand(2, 3, 2, 2, dtype=torch.float64) * 4 - 2
    y = layer(x)
    assert torch.equal(y[:, 0], x[:, 0]) and y[:, 1:].abs().max() <= 3
    torch.testing.assert_close(layer.inv(y.clone()), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [T.autoregressive, T.coupling, T.elementwise])
def test_as_many_maps_as_features(make):
    with pytest.raises(ValueError, match=r"5 maps.*shape \(4,\)"):
        make(MAPS, 4)
    with pytest.raises(ValueError, match=r"5 maps.*shape \(2, 4\)"):
        MAPS.forward(torch.zeros(2, 4), torch.zeros(MAPS.num_params, 2, 4))
    with pytest.raises(ValueError, match="at least one"):
        PerFeature([])
    with pytest.raises(ValueError, match="negative"):
        PerFeature([Affine()], dim=0)
