"""One network for each feature as a conditioner: who depends on whom, and what it costs."""

import pytest
import torch
from cases import disturb

import pyroflows.transforms as T
from pyroflows.conditioners import ColumnNets, Columns
from pyroflows.scalar import Affine
from pyroflows.splines import RationalQuadratic

GRAPH = [[0, 0, 0], [1, 0, 0], [0, 1, 0]]  # a chain: the third sees the second alone


def made(**kwargs):
    net = Columns(3, 2, hidden_dims=[5, 5], **kwargs).double()
    disturb(net, torch.Generator().manual_seed(0), 1.0)
    return net.eval()


@pytest.mark.parametrize(
    "kwargs, seen",
    [
        ({}, [[0, 0, 0], [1, 0, 0], [1, 1, 0]]),
        ({"order": [2, 0, 1]}, [[0, 0, 1], [1, 0, 1], [0, 0, 0]]),
        ({"adjacency": GRAPH}, GRAPH),
    ],
)
def test_who_depends_on_whom(kwargs, seen):
    net = made(**kwargs)
    x = torch.randn(3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x).sum(0), x)
    assert torch.equal(jacobian.abs() > 1e-12, torch.tensor(seen).bool())


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_one_after_the_other_is_all_at_once(batch):
    net = made(order=[1, 2, 0], context_dim=2)
    x, context = torch.randn(*batch, 3).double(), torch.randn(*batch, 2).double()
    expected = net(x, context)
    assert expected.shape == (2, *batch, 3)
    sequence = net.sequential(batch, context)
    assert sequence.order == [1, 2, 0]
    for i in sequence.order:
        torch.testing.assert_close(sequence.params(), expected[..., i], rtol=1e-12, atol=1e-12)
        sequence.push(x[..., i])


def test_a_step_multiplies_by_the_weights_of_one_feature(monkeypatch):
    """All steps of the inverse together read each weight once."""
    layer = T.autoregressive(
        RationalQuadratic(4), 5, [8, 8], conditioner=Columns, permutation=[4, 2, 0, 1, 3]
    )
    disturb(layer.double(), torch.Generator().manual_seed(0))
    read, trunk = [], ColumnNets.trunk
    monkeypatch.setattr(
        ColumnNets, "trunk", lambda self, x, *nets: read.extend(nets) or trunk(self, x, *nets)
    )
    x = torch.randn(7, 5).double()
    with torch.no_grad():
        y = layer(x)
        read.clear()
        torch.testing.assert_close(layer._inverse(y), x, rtol=1e-9, atol=1e-9)
    assert read == [[4], [2], [0], [1], [3]]


def test_a_saved_order_is_used():
    net, other = made(order=[2, 0, 1]), made()
    other.load_state_dict(net.state_dict())
    x = torch.randn(4, 3).double()
    assert torch.equal(other(x), net(x))
    assert other.sequential((4,)).order == [2, 0, 1]


def test_errors():
    with pytest.raises(ValueError, match=r"hidden_dims of one width; got \[3, 4\]"):
        Columns(3, 2, hidden_dims=[3, 4])
    with pytest.raises(ValueError, match="permutation of 0..2"):
        T.autoregressive(Affine(), 3, conditioner=Columns, permutation=[0, 0, 1])
    with pytest.raises(ValueError, match="cycle"):
        Columns(2, 2, adjacency=[[0, 1], [1, 0]])
