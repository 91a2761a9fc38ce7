"""Masked autoregressive networks, evaluated at once or feature by feature."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.conditioners.graph import before, order_and_graph
from pyroflows.conditioners.network import Activation, Conditioner, Params
from pyroflows.memory import Twin
from pyroflows.numerics import plain

__all__ = ["Masked", "SequentialPass"]


class Masked(Conditioner):
    r"""A masked autoregressive network (MADE): θ of a feature depends on the features before it.

    With ``adjacency`` it depends on the features that this names.

    Every hidden unit has a set of features that it may depend on, and sees the units below whose
    sets are part of its own. Units are sorted by their degree m, the place of the last feature of
    the set: all that a unit may see is in a prefix of the layer below. That makes the network
    sequential at little more than the price of one pass: see :meth:`sequential`.

    Args:
        input_dim: Number of features D.
        num_params: Parameters for each feature.
        context_dim: Features of the context, which every unit sees; 0 for none.
        hidden_dims: Widths; :func:`default_hidden_dims` if None. A width below ``input_dim - 1``
            leaves some features without units of their own.
        order: The features in the order in which they are generated, a permutation of
            ``range(input_dim)``; the natural one if None.
        adjacency: Boolean, ``(input_dim, input_dim)``: entry (i, j) says that θ of feature i may
            depend on feature j. Without cycles; the diagonal does not count. It sets the order.
        residual: Whether widths after the first are residual blocks of two layers.
        activation: Constructor of the nonlinearity.

    Raises:
        ValueError: If ``order`` is no permutation, ``adjacency`` has a cycle or comes with
            ``order``, or ``hidden_dims`` is unusable.

    References:
        Germain, Gregor, Murray, Larochelle (2015), MADE. arXiv:1502.03509
    """

    order: Tensor
    mask: Tensor
    adjacency: Tensor | None

    def __init__(
        self,
        input_dim: int,
        num_params: int,
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
        order: Sequence[int] | Tensor | None = None,
        adjacency: Sequence[Sequence[bool]] | Tensor | None = None,
        residual: bool = False,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__(
            input_dim,
            num_params,
            input_dim,
            context_dim=context_dim,
            hidden_dims=hidden_dims,
            residual=residual,
            activation=activation,
        )
        self.input_dim = input_dim
        order, graph = order_and_graph(input_dim, order, adjacency)
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("adjacency", None if graph is None else torch.tensor(graph.tolist()))
        self.register_buffer("mask", torch.ones(len(self.weights), dtype=torch.bool))
        self._set_mask(order, graph)
        self._known: Twin[tuple[list[int], list[list[int]]]] = Twin()
        self.plan()

    def _set_mask(self, order: list[int], graph: Tensor | None) -> None:
        sets, _ = self._sets(order, graph)
        inside = _is_part_of(sets, sets)
        layers, _ = self.unpack(self.mask)
        seen = sets.t()
        for (weight, _), width in zip(layers[:-1], self.widths, strict=True):
            units = self._spread_evenly(width, len(sets))
            weight.copy_(seen[:, units])
            seen = inside[units]
        seen = _is_part_of(sets, before(order) if graph is None else graph)[units]
        layers[-1][0].copy_(seen.repeat(1, self.num_params))

    def _sets(self, order: list[int], graph: Tensor | None) -> tuple[Tensor, list[int]]:
        """The sets that units may depend on, ``(count, D)``, and their degrees, ascending."""
        place = torch.tensor(order, device="cpu").argsort()
        sets = (before(order) if graph is None else graph).unique(dim=0)
        degrees = torch.where(sets, place + 1, 0).amax(1)
        # without a context a unit that sees nothing would be a constant
        useful = degrees > (-1 if self.context_dim or not degrees.any() else 0)
        sets, degrees = sets[useful], degrees[useful]
        by_degree = degrees.argsort(stable=True)
        return sets[by_degree], degrees[by_degree].tolist()

    def _spread_evenly(self, width: int, count: int) -> list[int]:
        """Which set each unit has; the last set has one, so that every unit below is read."""
        if self.adjacency is not None and width < count:
            raise ValueError(
                f"this adjacency needs hidden_dims of at least {count}, one unit for each set of "
                f"features that others depend on; got {self.hidden_dims}"
            )
        return [(k * count - 1) // width for k in range(1, width + 1)]

    def plan(self) -> tuple[list[int], list[list[int]]] | None:
        """Return the order, and for each hidden layer the unit at which degree m = 0..D begins."""
        graph = () if self.adjacency is None else (self.adjacency,)
        return self._known.read(self._read_plan, self.order, *graph)

    def _read_plan(
        self, order: Tensor, graph: Tensor | None = None
    ) -> tuple[list[int], list[list[int]]]:
        features = order.tolist()
        if sorted(features) != list(range(self.input_dim)):
            raise RuntimeError(
                f"the order of the features reads {features}: load the module's state first"
            )
        sets, degrees = self._sets(features, None if graph is None else graph.cpu())
        starts = []
        for width in self.widths:
            units = [degrees[i] for i in self._spread_evenly(width, len(sets))]
            starts.append([bisect_left(units, m) for m in range(self.input_dim + 1)])
        return features, starts

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.plan()

    def layers(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """Return (W, b) of each layer, masked weights zero, and the context's weight."""
        return self.unpack(self.weights * self.mask)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Params:
        """Return θ of shape ``(num_params, *batch, input_dim)`` for all features at once."""
        return self._theta(x, context)

    def sequential(
        self, batch_shape: Sequence[int], context: Tensor | None = None
    ) -> "SequentialPass":
        """Begin a pass that gives θ of one feature after the other, as their values become known.

        The whole pass multiplies by each weight once, as one call of the network does.

        Raises:
            RuntimeError: If the network is on the meta device and holds nothing.
        """
        return SequentialPass(self, tuple(batch_shape), context)


def _is_part_of(sets: Tensor, others: Tensor) -> Tensor:
    """Whether each set of the one is a subset of each of the other, ``(len, len)``."""
    return sets.float() @ (~others).float().t() == 0


class SequentialPass:
    """One pass through a :class:`Masked` network, feature after feature in its order.

    Alternate :meth:`params`, θ of the next feature given those before, with :meth:`push`, that
    feature's value. Only what is newly known is computed. Values are held feature-major, ``(units,
    batch)``.
    """

    def __init__(self, net: Masked, batch_shape: Sequence[int], context: Tensor | None) -> None:
        plan = net.plan()
        if plan is None:
            raise RuntimeError(
                "the network is on the meta device and holds nothing: .to_empty(device=...), "
                "then load its state"
            )
        self.net, self.batch_shape = net, batch_shape
        self.order, self.starts = plan
        self.known = 0
        # a buffer cannot take what torch.func wraps
        batch, grad = math.prod(batch_shape), torch.is_grad_enabled() or not plain()
        # sorted degrees make all that a unit sees a prefix, and by default it sees all of that
        seen = net.weights if net.adjacency is None else net.weights * net.mask
        layers, from_context = net.unpack(seen)
        (first, bias), *hidden, (last, last_bias) = layers
        self.hidden = [(first.index_select(0, net.order).t().contiguous(), bias.unsqueeze(-1))]
        self.hidden += [(weight.t().contiguous(), bias.unsqueeze(-1)) for weight, bias in hidden]
        shape = (net.num_params, net.input_dim, -1)
        self.last = last.t().contiguous().view(shape).unbind(1)
        self.last_bias = last_bias.view(shape).unbind(1)
        self.x = _Rows(net.input_dim, batch, first, grad)
        # what the next layer reads, for each hidden layer
        self.acts = [_Rows(len(weight), batch, first, grad) for weight, _ in self.hidden]
        self.act = torch.relu_ if type(net.act) is nn.ReLU and not net.residual else net.act
        self.from_context: Tensor | None = None
        if from_context is not None and context is not None:
            shift = net.spread_context(context @ from_context, batch_shape)
            self.from_context = shift.view(-1, shift.shape[-1]).t()
        self._advance()

    def params(self) -> Tensor:
        """Return θ of the next feature, shape ``(num_params, *batch)``."""
        feature, h = self.order[self.known], self.acts[-1].so_far()
        theta = torch.addmm(self.last_bias[feature], self.last[feature][:, : len(h)], h)
        return theta.view(self.net.num_params, *self.batch_shape)

    def push(self, value: Tensor) -> None:
        """Take the value of the next feature, shape batch."""
        self.x.append(value.reshape(1, -1))
        self.known += 1
        if self.known < len(self.order):
            self._advance()

    def _advance(self) -> None:
        """Compute the hidden units whose degree is the number of known features."""
        if self.net.residual:
            self._advance_blocks()
            return
        for i, rows in enumerate(self.acts):
            begin, end = self._units(i)
            if end > begin:
                rows.append(self.act(self._linear(i, begin, end)))

    def _advance_blocks(self) -> None:
        begin, end = self._units(0)
        if end == begin:
            return
        h = self._linear(0, begin, end)
        self.acts[0].append(self.act(h))
        for i in range(1, len(self.acts), 2):
            self.acts[i].append(self.act(self._linear(i, begin, end)))
            h = h + self._linear(i + 1, begin, end)
            self.acts[i + 1].append(self.act(h))

    def _linear(self, i: int, begin: int, end: int) -> Tensor:
        """Units ``begin`` to ``end`` of hidden layer i before activation, ``(units, batch)``."""
        below = (self.acts[i - 1] if i else self.x).so_far()
        weight, bias = self.hidden[i]
        bias = bias[begin:end]
        if not i and self.from_context is not None:
            bias = bias + self.from_context[begin:end]
        return torch.addmm(bias, weight[begin:end, : len(below)], below)

    def _units(self, layer: int) -> tuple[int, int]:
        starts = self.starts[layer]
        return starts[self.known], starts[self.known + 1]


class _Rows:
    """Rows that arrive block by block: in one buffer, or concatenated where gradients flow."""

    def __init__(self, size: int, batch: int, like: Tensor, grad: bool) -> None:
        self.batch, self.count = batch, 0
        self.buffer = None if grad else like.new_empty(size, batch)
        self.whole = like.new_empty(0, batch)

    def append(self, block: Tensor) -> None:
        end = self.count + len(block)
        if type(block) is not Tensor:  # a buffer would lose what a subclass knows
            self.buffer = None
        if self.buffer is None:
            self.whole = torch.cat([self.whole, block]) if self.count else block
        else:
            self.buffer[self.count : end] = block
            self.whole = self.buffer[:end]
        self.count = end

    def so_far(self) -> Tensor:
        return self.whole
