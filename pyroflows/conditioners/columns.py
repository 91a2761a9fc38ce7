"""One residual network for each column, all of them evaluated as one batch of products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyroflows.conditioners.graph import before, order_and_graph
from pyroflows.memory import Twin

__all__ = ["ColumnNets", "Columns", "ColumnsPass"]


class Columns(nn.Module):
    """An autoregressive conditioner of D separate residual networks, one for each feature.

    Where a masked network shares its hidden units between the features, here each has its own: θ
    of a hard one costs the others nothing. All D are evaluated at once, as batched products; each
    step of :meth:`sequential` calls the network of one feature, so that all steps together cost
    one call. The networks work row by row, and hand out a view with the parameters first.

    Args:
        input_dim: Number of features D.
        num_params: Parameters for each feature.
        context_dim: Features of the context, which every network sees; 0 for none.
        hidden_dims: Widths of each network, all the same; three layers of 32 if None.
        order: The features in the order in which they are generated, a permutation of
            ``range(input_dim)``; the natural one if None.
        adjacency: As of :class:`pyroflows.conditioners.Masked`.
        dropout: Probability of dropping a hidden unit while training.

    Raises:
        ValueError: If ``hidden_dims`` are not equal widths, or ``order`` or ``adjacency`` is none.

    Example:
        >>> import torch
        >>> from pyroflows import transforms as T
        >>> from pyroflows.conditioners import Columns
        >>> from pyroflows.scalar import Affine
        >>> layer = T.autoregressive(Affine(), 3, [16, 16], conditioner=Columns)
        >>> layer(torch.tensor([0.5, -1.0, 2.0])).detach()
        tensor([ 0.5000, -1.0000,  2.0000])
    """

    order: Tensor

    def __init__(
        self,
        input_dim: int,
        num_params: int,
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
        order: Sequence[int] | Tensor | None = None,
        adjacency: Sequence[Sequence[bool]] | Tensor | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [32, 32, 32] if hidden_dims is None else list(hidden_dims)
        if not widths or min(widths) < 1 or len(set(widths)) > 1:
            raise ValueError(f"Columns expects hidden_dims of one width; got {widths}")
        self.input_dim, self.num_params, self.context_dim = input_dim, num_params, context_dim
        features, graph = order_and_graph(input_dim, order, adjacency)
        self.register_buffer("order", torch.tensor(features))
        self._known: Twin[list[int]] = Twin()
        self._known.read(self._read_order, self.order)
        seen = before(features) if graph is None else graph
        mask = torch.cat([seen.float(), torch.ones(input_dim, context_dim, device="cpu")], 1)
        self.nets = ColumnNets(
            mask.to(self.order.device),
            [list(range(input_dim))],
            [num_params],
            [num_params],
            hidden_dim=widths[0],
            depth=len(widths),
            dropout=dropout,
        )

    def features_in_order(self) -> list[int]:
        """The features in the order in which they are generated.

        Raises:
            RuntimeError: If the network is on the meta device and holds nothing.
        """
        order = self._known.read(self._read_order, self.order)
        if order is None:
            raise RuntimeError(
                "the network is on the meta device and holds nothing: .to_empty(device=...), "
                "then load its state"
            )
        return order

    def _read_order(self, order: Tensor) -> list[int]:
        return order_and_graph(self.input_dim, order)[0]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known.read(self._read_order, self.order)

    def rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        """What the networks read of ``(*batch, D)`` and a context: ``(N, D + context_dim)``."""
        if context is not None:
            x = torch.cat([x, context.expand(*x.shape[:-1], -1)], -1)
        return x.reshape(-1, x.shape[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return θ of shape ``(num_params, *batch, input_dim)`` for all features at once."""
        (out,) = self.nets(self.rows(x, context))
        return out.permute(2, 1, 0).reshape(self.num_params, *x.shape[:-1], self.input_dim)

    def sequential(self, batch_shape: Sequence[int], context: Tensor | None = None) -> ColumnsPass:
        """Begin a pass that gives θ of one feature after the other, as their values become known.

        Raises:
            RuntimeError: If the network is on the meta device and holds nothing.
        """
        return ColumnsPass(self, tuple(batch_shape), context)


class ColumnsPass:
    """One pass through :class:`Columns`, feature after feature in their order.

    Alternate :meth:`params`, θ of the next feature given those before, with :meth:`push`, that
    feature's value.
    """

    def __init__(self, net: Columns, batch_shape: Sequence[int], context: Tensor | None) -> None:
        self.net, self.batch_shape, self.context = net, batch_shape, context
        self.order, self.known = net.features_in_order(), 0
        unknown = net.nets.b0.new_zeros(batch_shape)
        self.values = [unknown] * net.input_dim

    def params(self) -> Tensor:
        """Return θ of the next feature, shape ``(num_params, *batch)``."""
        rows = self.net.rows(torch.stack(self.values, -1), self.context)
        (out,) = self.net.nets.selected(rows, 0, [self.order[self.known]])
        return out.T.reshape(self.net.num_params, *self.batch_shape)

    def push(self, value: Tensor) -> None:
        """Take the value of the next feature, shape batch."""
        self.values[self.order[self.known]] = value
        self.known += 1


class ColumnNets(nn.Module):
    r"""G independent residual networks over shared features, each seeing what its mask allows.

    .. math:: h_0 = \phi(W_0 x + b_0), \quad h_{l} = h_{l-1} + \phi(W_l h_{l-1} + b_l), \quad
        out = W h_L + V x + b

    The networks fall into groups with different numbers of outputs. All outputs are independent of
    the features at initialization.

    Args:
        mask: Features each network may see, shape (G, F).
        groups: Networks of each group; together every network once.
        num_outputs: Outputs of the networks of each group.
        num_linear: How many of them, the last ones, depend on the features linearly too (V).
        hidden_dim: Width.
        depth: Hidden layers.
        dropout: Probability of dropping a hidden unit while training.
        index: Where given, the features that each target's networks read, shape (T, F'); the mask
            is then (G, F') and tells which of them are real. Weights, memory and time grow with
            F', not with F. Networks of one target are T apart.
    """

    def __init__(
        self,
        mask: Tensor,
        groups: list[list[int]],
        num_outputs: list[int],
        num_linear: list[int],
        *,
        hidden_dim: int,
        depth: int = 3,
        dropout: float = 0.0,
        index: Tensor | None = None,
    ) -> None:
        super().__init__()
        g, f = mask.shape
        self.register_buffer("index", index, persistent=False)
        f32 = dict(dtype=torch.float32)
        self.register_buffer("mask", mask.float()[:, :, None])
        seen = mask.sum(1).clamp_min(1).float()[:, None, None]
        self.groups = groups
        self.w0 = nn.Parameter(torch.randn(g, f, hidden_dim, **f32) * (1.5 / seen.sqrt()))
        self.b0 = nn.Parameter(torch.randn(g, 1, hidden_dim, **f32) * 0.5)
        self.w = nn.ParameterList(
            nn.Parameter(torch.randn(g, hidden_dim, hidden_dim, **f32) / math.sqrt(hidden_dim))
            for _ in range(depth - 1)
        )
        self.b = nn.ParameterList(
            nn.Parameter(torch.zeros(g, 1, hidden_dim, **f32)) for _ in range(depth - 1)
        )
        sizes = [(len(i), p) for i, p in zip(groups, num_outputs, strict=True)]
        self.head = nn.ParameterList(
            nn.Parameter(torch.zeros(m, hidden_dim, p, **f32)) for m, p in sizes
        )
        self.skip = nn.ParameterList(
            nn.Parameter(torch.zeros(len(i), f, p, **f32))
            for i, p in zip(groups, num_linear, strict=True)
        )
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(m, 1, p, **f32)) for m, p in sizes)
        self.dropout = dropout

    def trunk(self, x: Tensor, nets: list[int] | slice = slice(None)) -> Tensor:
        """Features (N, F) to the last hidden layer of some networks (G, N, H)."""
        w0 = self.w0[nets] * self.mask[nets]
        hidden = F.silu(self._product(x, w0, nets) + self.b0[nets])
        for w, b in zip(self.w, self.b, strict=True):
            z = self._drop(hidden)
            hidden = hidden + F.silu(torch.baddbmm(b[nets], z, w[nets]))
        return hidden

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features (N, F) to the outputs of each group, shape (members, N, num_outputs)."""
        hidden = self._drop(self.trunk(x))
        whole = list(range(len(hidden)))
        return [
            self._head(i, slice(None), hidden if nets == whole else hidden[nets], x)
            for i, nets in enumerate(self.groups)
        ]

    def _head(self, i: int, rows: list[int] | slice, hidden: Tensor, x: Tensor) -> Tensor:
        net = [self.groups[i][r] for r in rows] if isinstance(rows, list) else self.groups[i]
        skip = self.skip[i][rows] * self.mask[net]
        linear, p = self._product(x, skip, net), skip.shape[-1]
        out = torch.baddbmm(self.bias[i][rows], hidden, self.head[i][rows])
        out[..., out.shape[-1] - p :] += linear
        return out

    def _product(self, x: Tensor, w: Tensor, nets: list[int] | slice) -> Tensor:
        """Features (N, F) times the weights (G, F, P) of some networks, shape (G, N, P)."""
        g, f, p = w.shape
        if self.index is None:
            return (x @ w.permute(1, 0, 2).reshape(f, g * p)).unflatten(-1, (g, p)).transpose(0, 1)
        every = len(self.index)
        read = (
            self.index[list(dict.fromkeys(i % every for i in nets))]
            if isinstance(nets, list)
            else self.index[nets]
        )
        t, m = len(read), g // max(len(read), 1)
        wide = w.view(m, t, f, p).permute(1, 0, 3, 2).reshape(t, m * p, f)
        out = wide @ x.T[read]
        return out.view(t, m, p, len(x)).permute(1, 0, 3, 2).reshape(g, len(x), p)

    def _drop(self, hidden: Tensor) -> Tensor:
        """Dropout; the networks share the mask, which costs them nothing: they are independent."""
        if not self.training or self.dropout == 0:
            return hidden
        keep = torch.rand_like(hidden[:1]) >= self.dropout
        return hidden * (keep.to(hidden.dtype) / (1 - self.dropout))

    def selected(self, x: Tensor, group: int, rows: list[int]) -> Tensor:
        """Outputs of a few networks of one group only, shape (len(rows), N, num_outputs)."""
        return self._head(group, rows, self.trunk(x, [self.groups[group][r] for r in rows]), x)
