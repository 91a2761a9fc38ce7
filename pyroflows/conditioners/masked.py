"""Masked autoregressive networks, at once or feature by feature."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.conditioners.network import Activation, Conditioner, Params
from pyroflows.numerics import functorch_active

__all__ = ["Masked", "SequentialPass"]


class Masked(Conditioner):
    r"""A masked autoregressive network (MADE).

    Θ of a feature depends only on the features before it.

    Hidden units are sorted by their degree m, so that all a unit may see is a prefix of the layer
    below. That makes the network sequential at little more than the price of one pass: see
    :meth:`sequential`.

    Args:
        input_dim: Number of features D.
        num_params: Parameters for each feature.
        context_dim: Features of the context, which every unit sees; 0 for none.
        hidden_dims: Widths; :func:`default_hidden_dims` if None. A width below ``input_dim - 1``
            leaves some features without units of their own.
        order: The features in the order in which they are generated, a permutation of
            ``range(input_dim)``; the natural one if None.
        residual: Whether widths after the first are residual blocks of two layers.
        activation: Constructor of the nonlinearity.

    Raises:
        ValueError: If ``order`` is no permutation, or ``hidden_dims`` is unusable.

    References:
        Germain, Gregor, Murray, Larochelle (2015), MADE. arXiv:1502.03509
    """

    order: Tensor
    mask: Tensor

    def __init__(
        self,
        input_dim: int,
        num_params: int,
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
        order: Sequence[int] | Tensor | None = None,
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
        order = torch.arange(input_dim) if order is None else torch.as_tensor(order)
        order = order.detach().cpu().long().clone()
        if sorted(order.tolist()) != list(range(input_dim)):
            raise ValueError(
                f"order must be a permutation of 0..{input_dim - 1}; got {order.tolist()}"
            )
        self.register_buffer("order", order)
        # m(k): a unit of degree m sees the first m features; the feature of degree d sees units
        # with m < d
        degree = torch.empty_like(order)
        degree[order] = torch.arange(1, input_dim + 1)
        # without a context a unit of degree 0 would be a constant
        lowest = 0 if context_dim or input_dim == 1 else 1
        count = max(1, input_dim - lowest)
        mask = torch.ones(len(self.weights), dtype=torch.bool)
        layers, _ = self._unpack(mask)
        below, self._starts = degree, []
        for weight, _ in layers[:-1]:
            # spread evenly, the highest always among them: no unit below goes unseen
            width = weight.shape[1]
            units = lowest + (torch.arange(1, width + 1) * count - 1) // width
            weight.copy_(units >= below[:, None])
            # unit numbers at which degree m begins, m = 0..D
            self._starts.append(torch.searchsorted(units, torch.arange(input_dim + 1)).tolist())
            below = units
        layers[-1][0].copy_((degree > below[:, None]).repeat(1, num_params))
        self.register_buffer("mask", mask)

    def layers(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """Return (W, b) of each layer, masked weights zero, and the context's weight."""
        return self._unpack(self.weights * self.mask)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Params:
        """Return θ of shape ``(num_params, *batch, input_dim)`` for all features at once."""
        return self._theta(x, context)

    def sequential(
        self, batch_shape: Sequence[int], context: Tensor | None = None
    ) -> "SequentialPass":
        """Begin a pass that gives θ of one feature after the other, as their values become known.

        The whole pass multiplies by each weight once, as one call of the network does.
        """
        return SequentialPass(self, torch.Size(batch_shape), context)


class SequentialPass:
    """One pass through a :class:`Masked` network, feature after feature in its order.

    Alternate :meth:`params`, θ of the next feature given those before, with :meth:`push`, that
    feature's value. Only what is newly known is computed. Values are held feature-major, ``(units,
    batch)``.
    """

    def __init__(self, net: Masked, batch_shape: torch.Size, context: Tensor | None) -> None:
        self.net, self.batch_shape = net, batch_shape
        self.order: list[int] = net.order.tolist()
        self.known = 0
        # a buffer cannot take what torch.func wraps
        batch, grad = batch_shape.numel(), torch.is_grad_enabled() or functorch_active()
        # sorted degrees make all that a unit sees a prefix, so the mask is not needed
        layers, from_context = net._unpack(net.weights)
        (first, bias), *hidden, (last, last_bias) = layers
        self.hidden = [(first[net.order].t().contiguous(), bias.unsqueeze(-1))]
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
            shift = net._spread(context @ from_context, batch_shape)
            self.from_context = shift.view(-1, shift.shape[-1]).t()
        self._advance()

    def params(self) -> Tensor:
        """Return θ of the next feature, shape ``(num_params, *batch)``."""
        feature, h = self.order[self.known], self.acts[-1].so_far()
        theta = torch.addmm(self.last_bias[feature], self.last[feature][:, : len(h)], h)
        return theta.view(self.net.num_params, *self.batch_shape)

    def push(self, value: Tensor) -> None:
        """Take the value of the next feature, shape batch."""
        self.x.append(value.reshape(1, self.x.batch))
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
        """Units ``begin`` to ``end`` of hidden layer i, before their activation.

        Shape ``(units, batch)``.
        """
        below = (self.acts[i - 1] if i else self.x).so_far()
        weight, bias = self.hidden[i]
        bias = bias[begin:end]
        if not i and self.from_context is not None:
            bias = bias + self.from_context[begin:end]
        return torch.addmm(bias, weight[begin:end, : len(below)], below)

    def _units(self, layer: int) -> tuple[int, int]:
        starts = self.net._starts[layer]
        return starts[self.known], starts[self.known + 1]


class _Rows:
    """Rows that arrive block by block.

    One buffer without gradients, concatenated blocks with them.
    """

    def __init__(self, size: int, batch: int, like: Tensor, grad: bool) -> None:
        self.batch, self.count = batch, 0
        self.buffer = None if grad else like.new_empty(size, batch)
        self.whole = like.new_empty(0, batch)

    def append(self, block: Tensor) -> None:
        end = self.count + len(block)
        if self.buffer is None:
            self.whole = torch.cat([self.whole, block]) if self.count else block
        else:
            self.buffer[self.count : end] = block
            self.whole = self.buffer[:end]
        self.count = end

    def so_far(self) -> Tensor:
        return self.whole
