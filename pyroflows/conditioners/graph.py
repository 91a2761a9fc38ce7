"""Which feature depends on which: an order, or a graph without cycles."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["before", "check_adjacency", "order_and_graph"]


def order_and_graph(
    input_dim: int,
    order: Sequence[int] | Tensor | None = None,
    adjacency: Sequence[Sequence[bool]] | Tensor | None = None,
) -> tuple[list[int], Tensor | None]:
    """Return the features in the order in which they are generated, and the graph if one is given.

    Args:
        input_dim: Number of features.
        order: A permutation of ``range(input_dim)``; the natural one if None.
        adjacency: Boolean, ``(input_dim, input_dim)``: entry (i, j) says that feature i may depend
            on feature j. It sets the order.

    Raises:
        ValueError: If ``order`` is no permutation, or ``adjacency`` has another shape, has a cycle
            or comes with ``order``.
    """
    graph = None
    if adjacency is not None:
        if order is not None:
            raise ValueError("adjacency sets the order of the features: leave out the order")
        graph = check_adjacency(adjacency, input_dim)
        order = _sorted_by(graph)
    order = range(input_dim) if order is None else order
    order = order.tolist() if isinstance(order, Tensor) else list(order)
    if sorted(order) != list(range(input_dim)):
        raise ValueError(f"order must be a permutation of 0..{input_dim - 1}; got {order}")
    return order, graph


def check_adjacency(adjacency: Sequence[Sequence[bool]] | Tensor, input_dim: int) -> Tensor:
    """Return the graph without its diagonal, checked for its shape."""
    graph = torch.as_tensor(adjacency, device="cpu").bool()
    if graph.shape != (input_dim, input_dim):
        raise ValueError(
            f"adjacency must be of shape ({input_dim}, {input_dim}), entry (i, j) for feature i "
            f"depends on feature j; got {tuple(graph.shape)}"
        )
    return graph & ~torch.eye(input_dim, dtype=torch.bool, device="cpu")


def _sorted_by(graph: Tensor) -> list[int]:
    """The features, each behind those it depends on."""
    order: list[int] = []
    waits_for = {i: set(row.nonzero().flatten().tolist()) for i, row in enumerate(graph)}
    while waits_for:
        ready = next((i for i, rest in waits_for.items() if not rest), None)
        if ready is None:
            raise ValueError(
                f"adjacency must have no cycle; features {sorted(waits_for)} depend on each other"
            )
        order.append(ready)
        del waits_for[ready]
        for rest in waits_for.values():
            rest.discard(ready)
    return order


def before(order: list[int]) -> Tensor:
    """The graph in which each feature depends on all before it."""
    place = torch.tensor(order, device="cpu").argsort()
    return place < place[:, None]
