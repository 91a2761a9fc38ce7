"""Conditioners: networks ``(x, context) -> θ`` that give a scalar map its parameters.

Every conditioner returns ``(num_params, *batch, *output)``, parameters first, and ends in a zero layer: the scalar
map starts as the identity. A wide one computes θ feature-major and hands out a view, so that a spline's sums run
over long contiguous rows (see :mod:`pyroflows.splines`).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Dense", "Free", "Masked", "SequentialPass", "default_hidden_dims"]

Activation = Callable[[], nn.Module]

_FEATURE_MAJOR_FROM = 5  # parameters for each scalar from which the feature-major layout pays


def default_hidden_dims(input_dim: int, context_dim: int = 0) -> list[int]:
    """Two layers, ten units a feature, between 32 and 256: wide enough for most tables and posteriors."""
    return [max(32, min(256, 10 * (input_dim + context_dim)))] * 2


class _Conditioner(nn.Module):
    """First layer, hidden layers and zero last layer, shared by dense and masked networks."""

    def __init__(
        self,
        in_features: int,
        num_params: int,
        out_features: int,
        *,
        context_dim: int,
        hidden_dims: Sequence[int] | None,
        residual: bool,
        activation: Activation,
    ) -> None:
        super().__init__()
        if hidden_dims is None:
            hidden_dims = default_hidden_dims(in_features, context_dim)
        hidden_dims = list(hidden_dims)
        if not hidden_dims or min(hidden_dims) < 1:
            raise ValueError(f"hidden_dims must hold positive widths; got {hidden_dims}")
        if residual and len(set(hidden_dims)) > 1:
            raise ValueError(f"residual=True needs hidden_dims of one width; got {hidden_dims}")
        self.num_params, self.out_features = num_params, out_features
        self.context_dim, self.residual = context_dim, residual
        self.act = activation()
        self.first = nn.Linear(in_features, hidden_dims[0])
        self.from_context = (
            nn.Linear(context_dim, hidden_dims[0], bias=False) if context_dim else None
        )
        widths = [hidden_dims[0]]
        if residual:  # a block of two layers for each further width
            widths += [h for h in hidden_dims[1:] for _ in range(2)]
        else:
            widths += hidden_dims[1:]
        self.hidden = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.last = nn.Linear(widths[-1], num_params * out_features)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        if residual:  # ReZero-style: every block starts as the identity of its stream
            for layer in self.hidden[1::2]:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def _weight(self, index: int) -> Tensor:
        """Weight of layer ``index`` (first 0, hidden 1 and up, last -1) as it is applied."""
        return self._layer(index).weight

    def _layer(self, index: int) -> nn.Linear:
        if index == -1:
            return self.last
        return self.hidden[index - 1] if index else self.first

    def _features(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Last hidden layer, ``(*batch, width)``."""
        h = F.linear(x, self._weight(0), self.first.bias)
        if self.from_context is not None:
            h = h + self.from_context(context)
        if not self.residual:
            for i, layer in enumerate(self.hidden, start=1):
                h = F.linear(self.act(h), self._weight(i), layer.bias)
            return self.act(h)
        for i in range(1, len(self.hidden), 2):
            inner = F.linear(self.act(h), self._weight(i), self.hidden[i - 1].bias)
            h = h + F.linear(self.act(inner), self._weight(i + 1), self.hidden[i].bias)
        return self.act(h)

    def _params(self, h: Tensor) -> Tensor:
        """Last layer: ``(*batch, width)`` to ``(num_params, *batch, out_features)``."""
        weight, bias = self._weight(-1), self.last.bias
        if self.num_params < _FEATURE_MAJOR_FROM:
            theta = F.linear(h, weight, bias)
            return theta.unflatten(-1, (self.num_params, self.out_features)).movedim(-2, 0)
        batch = h.shape[:-1]
        h = h.reshape(batch.numel(), h.shape[-1])
        theta = torch.addmm(bias.unsqueeze(-1), weight, h.t())
        return theta.view(self.num_params, self.out_features, *batch).movedim(1, -1)


class Dense(_Conditioner):
    """A multilayer perceptron ``(x, c) -> θ``.

    Args:
        input_dim: Features of x, or the shape of an event that is flattened.
        num_params: Parameters for each scalar.
        output_dim: Scalars to be moved, or their shape.
        context_dim: Features of the context; 0 for none.
        hidden_dims: Widths; :func:`default_hidden_dims` if None.
        residual: Whether widths after the first are residual blocks of two layers.
        activation: Constructor of the nonlinearity.

    Raises:
        ValueError: If there is no input, or ``hidden_dims`` is unusable.
    """

    def __init__(
        self,
        input_dim: int | Sequence[int],
        num_params: int,
        output_dim: int | Sequence[int],
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
        residual: bool = False,
        activation: Activation = nn.ReLU,
    ) -> None:
        input_shape = [input_dim] if isinstance(input_dim, int) else list(input_dim)
        output_shape = [output_dim] if isinstance(output_dim, int) else list(output_dim)
        if not math.prod(input_shape):
            raise ValueError(f"Dense needs an input of at least one feature; got {input_dim}")
        super().__init__(
            math.prod(input_shape),
            num_params,
            math.prod(output_shape),
            context_dim=context_dim,
            hidden_dims=hidden_dims,
            residual=residual,
            activation=activation,
        )
        self.input_shape, self.output_shape = input_shape, output_shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return θ of shape ``(num_params, *batch, *output)``."""
        if len(self.input_shape) > 1:
            x = x.flatten(-len(self.input_shape))
        params = self._params(self._features(x, context))
        if len(self.output_shape) > 1:
            params = params.unflatten(-1, self.output_shape)
        return params


class Masked(_Conditioner):
    r"""A masked autoregressive network (MADE): θ of a feature depends only on the features before it.

    Hidden units are sorted by their degree m, so that all a unit may see is a prefix of the layer below. That makes
    the network sequential at little more than the price of one pass: see :meth:`sequential`.

    Args:
        input_dim: Number of features D.
        num_params: Parameters for each feature.
        context_dim: Features of the context, which every unit sees; 0 for none.
        hidden_dims: Widths; :func:`default_hidden_dims` if None. A width below ``input_dim - 1`` leaves some
            features without units of their own.
        order: The features in the order in which they are generated, a permutation of ``range(input_dim)``;
            the natural one if None.
        residual: Whether widths after the first are residual blocks of two layers.
        activation: Constructor of the nonlinearity.

    Raises:
        ValueError: If ``order`` is no permutation, or ``hidden_dims`` is unusable.

    References:
        Germain, Gregor, Murray, Larochelle (2015), MADE. arXiv:1502.03509
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
        # m(k): a unit of degree m sees the first m features; the feature of degree d sees units with m < d
        degree = torch.empty_like(order)
        degree[order] = torch.arange(1, input_dim + 1)
        # without a context a unit of degree 0 would be a constant
        lowest = 0 if context_dim or input_dim == 1 else 1
        below, self._starts = degree, []
        for i in range(1 + len(self.hidden)):
            width = self._layer(i).out_features
            # spread evenly, the highest always among them: no unit below goes unseen
            count = max(1, input_dim - lowest)
            units = lowest + ((torch.arange(width) + 1) * count + width - 1) // width - 1
            self.register_buffer(f"mask_{i}", units[:, None] >= below)
            # unit numbers at which degree m begins, m = 0..D
            starts = torch.searchsorted(units, torch.arange(input_dim + 1)).tolist()
            self._starts.append(starts)
            below = units
        self.register_buffer("mask_last", (degree[:, None] > below).repeat(num_params, 1))

    def _weight(self, index: int) -> Tensor:
        mask = self.get_buffer("mask_last" if index == -1 else f"mask_{index}")
        return self._layer(index).weight * mask

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return θ of shape ``(num_params, *batch, input_dim)`` for all features at once."""
        return self._params(self._features(x, context))

    def sequential(
        self, batch_shape: Sequence[int], context: Tensor | None = None
    ) -> "SequentialPass":
        """Begin a pass that gives θ of one feature after the other, while their values become known.

        The whole pass multiplies by each weight once, as one call of the network does.
        """
        return SequentialPass(self, torch.Size(batch_shape), context)


class SequentialPass:
    """One pass through a :class:`Masked` network, feature after feature in its order.

    Alternate :meth:`params`, θ of the next feature given those before, with :meth:`push`, that feature's value.
    Only what is newly known is computed. Values are held feature-major, ``(units, batch)``.
    """

    def __init__(self, net: Masked, batch_shape: torch.Size, context: Tensor | None) -> None:
        self.net, self.batch_shape = net, batch_shape
        self.order: list[int] = net.order.tolist()
        self.known = 0
        batch = batch_shape.numel()
        grad = torch.is_grad_enabled()
        like = net.first.weight
        rows = lambda size: _Rows(size, batch, like, grad)  # noqa: E731
        self.x = rows(net.input_dim)
        # per layer of the network, the activations that the next one reads
        self.acts = [rows(net._layer(i).out_features) for i in range(1 + len(net.hidden))]
        self.weights = [net.first.weight[:, net.order]]
        self.weights += [layer.weight for layer in net.hidden]
        self.biases = [layer.bias.unsqueeze(-1) for layer in [net.first, *net.hidden]]
        self.last = net.last.weight.view(net.num_params, net.input_dim, -1)
        self.last_bias = net.last.bias.view(net.num_params, net.input_dim, 1)
        self.from_context: Tensor | None = None
        if net.from_context is not None:
            shift = net.from_context(context).expand(*batch_shape, -1)
            self.from_context = shift.reshape(batch, shift.shape[-1]).t()
        self._advance()

    def params(self) -> Tensor:
        """Return θ of the next feature, shape ``(num_params, *batch)``."""
        feature = self.order[self.known]
        h = self.acts[-1].so_far()
        theta = torch.matmul(self.last[:, feature, : h.shape[0]], h) + self.last_bias[:, feature]
        return theta.view(self.net.num_params, *self.batch_shape)

    def push(self, value: Tensor) -> None:
        """Take the value of the next feature, shape batch."""
        self.x.append(value.reshape(1, self.x.batch))
        self.known += 1
        if self.known < len(self.order):
            self._advance()

    def _advance(self) -> None:
        """Compute the hidden units whose degree is the number of known features."""
        net, known = self.net, self.known
        begin, end = self._units(0)
        if end > begin:
            h = self.biases[0][begin:end]
            if self.from_context is not None:
                h = h + self.from_context[begin:end]
            h = (
                torch.addmm(h, self.weights[0][begin:end, :known], self.x.so_far())
                if known
                else h.expand(-1, self.x.batch)
            )
            self.acts[0].append(net.act(h))
            if net.residual:
                self._advance_blocks(h)
        if not net.residual:
            for i in range(1, len(self.acts)):
                begin, end = self._units(i)
                if end > begin:
                    self.acts[i].append(net.act(self._linear(i, begin, end, self.acts[i - 1])))

    def _advance_blocks(self, h: Tensor) -> None:
        net, (begin, end) = self.net, self._units(0)
        for i in range(1, len(self.acts), 2):
            self.acts[i].append(net.act(self._linear(i, begin, end, self.acts[i - 1])))
            h = h + self._linear(i + 1, begin, end, self.acts[i])
            self.acts[i + 1].append(net.act(h))

    def _linear(self, i: int, begin: int, end: int, below: "_Rows") -> Tensor:
        h = below.so_far()
        return torch.addmm(self.biases[i][begin:end], self.weights[i][begin:end, : h.shape[0]], h)

    def _units(self, layer: int) -> tuple[int, int]:
        starts = self.net._starts[layer]
        return starts[self.known], starts[self.known + 1]


class _Rows:
    """Rows that arrive block by block: one buffer without gradients, concatenated blocks with them."""

    def __init__(self, size: int, batch: int, like: Tensor, grad: bool) -> None:
        self.batch, self.count = batch, 0
        self.buffer = None if grad else like.new_empty(size, batch)
        self.whole = like.new_empty(0, batch)

    def append(self, block: Tensor) -> None:
        end = self.count + block.shape[0]
        if self.buffer is None:
            self.whole = torch.cat([self.whole, block]) if self.count else block
        else:
            self.buffer[self.count : end] = block
            self.whole = self.buffer[:end]
        self.count = end

    def so_far(self) -> Tensor:
        return self.whole


class Free(nn.Module):
    """θ as free parameters, the same for every x; with a context, a network of the context alone.

    Args:
        num_params: Parameters for each scalar.
        shape: Shape of the event they move, or its length.
        context_dim: Features of the context; 0 for none.
        hidden_dims: Widths of the context's network; :func:`default_hidden_dims` if None.
        residual: Whether widths after the first are residual blocks of two layers.
        activation: Constructor of the nonlinearity.
    """

    def __init__(
        self,
        num_params: int,
        shape: int | Sequence[int],
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
        residual: bool = False,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        self.shape = [shape] if isinstance(shape, int) else list(shape)
        if context_dim:
            self.net = Dense(
                context_dim,
                num_params,
                self.shape,
                hidden_dims=hidden_dims,
                residual=residual,
                activation=activation,
            )
        else:
            self.theta = nn.Parameter(torch.zeros(num_params, *self.shape))
        self.num_params, self.context_dim = num_params, context_dim

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return θ, ``(num_params, *shape)`` or ``(num_params, *context batch, *shape)``."""
        if not self.context_dim:
            batch_dims = x.dim() - len(self.shape)
            return self.theta.view(self.num_params, *[1] * batch_dims, *self.shape)
        return self.net(context)
