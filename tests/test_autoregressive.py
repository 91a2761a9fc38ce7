"""Who depends on whom in an autoregressive transform."""

import copy

import pytest
import torch
from cases import ADJACENCY, contexts, disturb

import pyroflows.transforms as T
from pyroflows.conditioners import Masked


def dependence(transform, x, move="__call__"):
    """Which entries of the Jacobian are not zero for some of the rows."""
    jacobian = torch.func.vmap(torch.func.jacrev(getattr(transform, move)))(x)
    return (jacobian != 0).any(0)


def moved(transform, seed=0):
    transform = transform.double()
    disturb(transform, torch.Generator().manual_seed(seed), 0.5)
    return transform


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_feature_depends_on_its_neighbours_and_on_no_other(residual, context_dim):
    graph = torch.tensor(ADJACENCY).bool()
    t = moved(
        T.spline_autoregressive(
            5, [20, 20], adjacency=ADJACENCY, residual=residual, context_dim=context_dim
        )
    ).condition(contexts(context_dim))
    x = torch.randn(40, 5, dtype=torch.float64)
    assert torch.equal(dependence(t, x), graph)
    # backwards a feature depends on its ancestors: the graph's transitive closure
    ancestors = torch.linalg.matrix_power(graph.double(), 5) > 0
    assert torch.equal(dependence(t.inv, t(x)), ancestors)
    torch.testing.assert_close(t.inv(t(x).clone()), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_random_graphs(seed):
    generator = torch.Generator().manual_seed(seed)
    n = 7
    place = torch.randperm(n, generator=generator)
    graph = (torch.rand(n, n, generator=generator) < 0.4) & (place < place[:, None])
    t = moved(T.affine_autoregressive(n, [32, 24, 40], adjacency=graph), seed)
    x = torch.randn(60, n, dtype=torch.float64)
    expected = graph | torch.eye(n, dtype=torch.bool)  # the diagonal does not count
    assert torch.equal(dependence(t, x), expected)
    torch.testing.assert_close(t.inv(t(x).clone()), x, rtol=1e-9, atol=1e-9)


def test_the_full_triangle_is_the_default():
    torch.manual_seed(0)
    plain = Masked(4, 2, hidden_dims=[9, 6])
    torch.manual_seed(0)
    graph = Masked(4, 2, hidden_dims=[9, 6], adjacency=torch.ones(4, 4).tril())
    assert torch.equal(plain.mask, graph.mask) and torch.equal(plain.order, graph.order)


def test_no_edges_at_all():
    t = moved(T.affine_autoregressive(3, [4], adjacency=torch.eye(3)))
    x = torch.randn(20, 3, dtype=torch.float64)
    assert torch.equal(dependence(t, x), torch.eye(3).bool())
    torch.testing.assert_close(t.inv(t(x).clone()), x)
    single = T.affine_autoregressive(1, adjacency=[[1]])
    assert single.event_shape == (1,)


def test_another_order_or_graph_is_loaded_with_what_python_knows_of_it():
    x = torch.randn(6, 4, dtype=torch.float64)
    chain = torch.diag(torch.ones(3), -1).bool()
    pairs = [
        [{"permutation": p} for p in ([0, 1, 2, 3], [2, 0, 3, 1])],
        [{"adjacency": g} for g in (chain, chain.flip(0, 1))],
    ]
    for ours, theirs in pairs:
        mine, true = (moved(T.affine_autoregressive(4, [8], **k)) for k in (ours, theirs))
        y = true(x)
        mine.inv(y)
        mine.load_state_dict(true.state_dict())
        torch.testing.assert_close(mine.inv(y.clone()), x)
        other = moved(T.affine_autoregressive(4, [8], **ours))
        for key, tensor in other.state_dict().items():
            tensor.copy_(true.state_dict()[key])  # past load_state_dict
        torch.testing.assert_close(other.inv(y.clone()), x)
        torch.testing.assert_close(copy.deepcopy(other).inv(y.clone()), x)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"adjacency": [[1, 1, 0], [0, 1, 1], [1, 0, 1]]}, r"no cycle; features \[0, 1, 2\]"),
        ({"adjacency": [[1, 0], [0, 1]]}, r"shape \(3, 3\).*got \(2, 2\)"),
        ({"adjacency": torch.eye(3), "permutation": [0, 1, 2]}, "leave out the order"),
        ({"permutation": [0, 1, 1]}, "permutation of 0..2"),
    ],
)
def test_what_is_no_order_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        T.affine_autoregressive(3, **arguments)


def test_too_few_units_for_a_graph_are_refused():
    with pytest.raises(ValueError, match="at least 3.*got"):
        T.affine_autoregressive(5, [2], adjacency=ADJACENCY)
    with pytest.raises(ValueError, match=r"shape \(1, 1\)"):
        T.affine_autoregressive(1, adjacency=torch.eye(2))
