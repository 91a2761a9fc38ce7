"""Conditioners: networks ``(x, context) -> θ`` that give a scalar map its parameters.

Every conditioner returns ``(num_params, *batch, *output)``, parameters first, and ends in a zero
layer: the scalar map starts as the identity. A wide one computes θ feature-major and hands out a
view, so that a spline's sums run over long contiguous rows (see :mod:`pyroflows.splines`); a
narrow one hands out a tuple of tensors, one a parameter, whose gradients come together in one
copy.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyroflows.numerics import functorch_active
from pyroflows.perceptron import perceptron

__all__ = ["Conv", "Dense", "Free", "Masked", "SequentialPass", "default_hidden_dims"]

Activation = Callable[[], nn.Module]
Params = Tensor | tuple[Tensor, ...]

_FEATURE_MAJOR_FROM = 5  # parameters for each scalar from which the feature-major layout pays


def default_hidden_dims(input_dim: int, context_dim: int = 0) -> list[int]:
    """Two layers, ten units a feature, between 32 and 256.

    Wide enough for most tables and posteriors.
    """
    return [max(32, min(256, 10 * (input_dim + context_dim)))] * 2


class _Conditioner(nn.Module):
    """First layer, hidden layers and zero last layer, shared by dense and masked networks.

    All weights are one packed parameter: optimizers and Pyro's param store pay for each tensor,
    not for its size.
    :meth:`layers` gives the views.
    """

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
        self.context_dim, self.residual, self.hidden_dims = context_dim, residual, hidden_dims
        self.act = activation()
        # a residual block has two layers
        widths = [hidden_dims[0], *(h for h in hidden_dims[1:] for _ in range(1 + residual))]
        fan_in = [in_features, *widths]
        fan_out = [*widths, num_params * out_features]
        shapes: list[tuple[int, ...]] = []
        for sizes in zip(fan_in, fan_out, strict=True):
            shapes += [sizes, sizes[1:]]
        if context_dim:
            shapes.append((context_dim, widths[0]))
        self._shapes = shapes
        self._sizes = [math.prod(shape) for shape in shapes]
        self.weights = nn.Parameter(torch.empty(sum(self._sizes)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights as ``nn.Linear`` does.

        Zero the last layer, and in residual blocks the second.
        """
        layers, from_context = self._unpack(self.weights)
        for i, (weight, bias) in enumerate(layers):
            limit = 1 / math.sqrt(len(weight))
            zero = i == len(layers) - 1 or (self.residual and i > 0 and i % 2 == 0)
            for tensor in (weight, bias):
                tensor.zero_() if zero else tensor.uniform_(-limit, limit)
        if from_context is not None:
            limit = 1 / math.sqrt(self.context_dim)
            from_context.uniform_(-limit, limit)

    def _unpack(self, packed: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        pieces = packed.split(self._sizes)
        views = [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
        from_context = views.pop() if self.context_dim else None
        return list(zip(views[::2], views[1::2], strict=True)), from_context

    def layers(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """Return (W, b) of each layer h W + b, and the context's weight, as they are applied."""
        return self._unpack(self.weights)

    def _theta(self, x: Tensor, context: Tensor | None) -> Params:
        """Shape ``(*batch, in_features)`` to ``(num_params, *batch, out_features)``."""
        layers, from_context = self.layers()
        batch = x.shape[:-1]
        if len(batch) != 1:
            x = x.reshape(batch.numel(), x.shape[-1])
        shift = None
        if from_context is not None and context is not None:
            shift = self._spread(context @ from_context, batch)
        narrow = self.num_params < _FEATURE_MAJOR_FROM
        if type(self.act) is nn.ReLU and not self.residual:
            theta = perceptron(x, layers, shift, feature_major=not narrow)
        else:
            h, (weight, bias) = self._hidden(x, layers, shift), layers[-1]
            if narrow:
                theta = torch.addmm(bias, h, weight)
            else:
                theta = torch.addmm(bias.unsqueeze(-1), weight.t(), h.t())
        if not narrow:
            return theta.view(self.num_params, self.out_features, *batch).movedim(1, -1)
        params = theta.split(self.out_features, -1)
        if len(batch) == 1:
            return params
        return tuple(p.view(*batch, self.out_features) for p in params)

    def _hidden(
        self, x: Tensor, layers: Sequence[tuple[Tensor, Tensor]], shift: Tensor | None
    ) -> Tensor:
        """All but the last layer, ``(batch, in_features)`` to ``(batch, width)``."""
        weight, bias = layers[0]
        h = torch.addmm(bias, x, weight)
        if shift is not None:
            h = h + shift
        if not self.residual:
            for weight, bias in layers[1:-1]:
                h = torch.addmm(bias, self.act(h), weight)
            return self.act(h)
        for (w1, b1), (w2, b2) in zip(layers[1:-1:2], layers[2:-1:2], strict=True):
            h = h + torch.addmm(b2, self.act(torch.addmm(b1, self.act(h), w1)), w2)
        return self.act(h)

    @staticmethod
    def _spread(shift: Tensor, batch: torch.Size) -> Tensor:
        """What the context adds, ``(*context batch, width)``, one row a member or one for all."""
        if shift.dim() == 1:
            return shift
        return shift.expand(*batch, -1).reshape(batch.numel(), shift.shape[-1])

    def extra_repr(self) -> str:
        """Name the sizes."""
        fan_in, fan_out = self._shapes[0][0], self.num_params * self.out_features
        sizes = " → ".join(str(n) for n in [fan_in, *self.hidden_dims, fan_out])
        notes = ", residual" * self.residual
        return sizes + notes + (f", context_dim={self.context_dim}" if self.context_dim else "")


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

    def forward(self, x: Tensor, context: Tensor | None = None) -> Params:
        """Return θ of shape ``(num_params, *batch, *output)``."""
        if len(self.input_shape) > 1:
            x = x.flatten(-len(self.input_shape))
        params = self._theta(x, context)
        if len(self.output_shape) == 1:
            return params
        if isinstance(params, Tensor):
            return params.unflatten(-1, self.output_shape)
        return tuple(p.unflatten(-1, self.output_shape) for p in params)


class Masked(_Conditioner):
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

    def forward(self, x: Tensor, context: Tensor | None = None) -> Params:
        """Return θ, ``(num_params, *shape)`` or ``(num_params, *context batch, *shape)``."""
        if not self.context_dim:
            batch_dims = x.dim() - len(self.shape)
            return self.theta.view(self.num_params, *[1] * batch_dims, *self.shape)
        return self.net(context)


class Conv(nn.Module):
    """A convolutional network ``(x, c) -> θ`` on images ``(*batch, channels, height, width)``.

    A first layer, 1×1 layers, and a zero last layer; sizes of images are free.

    Args:
        in_channels: Channels of x.
        num_params: Parameters for each scalar.
        out_channels: Channels to be moved.
        context_dim: Features of the context, added to the first layer at every pixel; 0 for none.
        hidden_dims: Channels of the hidden layers; ``[64, 64]`` if None.
        kernel_size: Odd width of the first and last layer's windows.
        activation: Constructor of the nonlinearity.

    Raises:
        ValueError: If ``kernel_size`` is even, or ``hidden_dims`` is unusable.
    """

    def __init__(
        self,
        in_channels: int,
        num_params: int,
        out_channels: int,
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
        kernel_size: int = 3,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        widths = [64, 64] if hidden_dims is None else list(hidden_dims)
        if not widths or min(widths) < 1:
            raise ValueError(f"hidden_dims must hold positive widths; got {widths}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive; got {kernel_size}")
        self.num_params, self.context_dim = num_params, context_dim
        self.act = activation()
        pad = kernel_size // 2  # keeps height and width
        self.first = nn.Conv2d(in_channels, widths[0], kernel_size, padding=pad)
        self.from_context = nn.Linear(context_dim, widths[0], bias=False) if context_dim else None
        self.hidden = nn.ModuleList(
            nn.Conv2d(a, b, 1) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.last = nn.Conv2d(widths[-1], num_params * out_channels, kernel_size, padding=pad)
        for zero in self.last.parameters():
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return θ of shape ``(num_params, *batch, out_channels, height, width)``."""
        batch = x.shape[:-3]
        h = self.first(x.reshape(batch.numel(), *x.shape[-3:]))
        if self.from_context is not None:
            shift = self.from_context(context).expand(*batch, -1)
            h = h + shift.reshape(batch.numel(), h.shape[1], 1, 1)
        for layer in self.hidden:
            h = layer(self.act(h))
        params = self.last(self.act(h)).unflatten(1, (self.num_params, -1)).movedim(1, 0)
        return params.reshape(self.num_params, *batch, *params.shape[-3:])
