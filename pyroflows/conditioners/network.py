"""What dense and masked networks share: packed weights, hidden layers, a zero last layer."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyroflows.perceptron import perceptron
from pyroflows.scalar import Params

__all__ = ["Activation", "Conditioner", "Params", "default_hidden_dims"]

Activation = Callable[[], nn.Module]

_FEATURE_MAJOR_FROM = 5  # parameters for each scalar from which the feature-major layout pays


def default_hidden_dims(input_dim: int, context_dim: int = 0) -> list[int]:
    """Return the widths of two layers, ten units a feature, between 32 and 256."""
    return [max(32, min(256, 10 * (input_dim + context_dim)))] * 2


class Conditioner(nn.Module):
    """First layer, hidden layers and zero last layer, shared by dense and masked networks.

    All weights are one packed parameter, of which :meth:`layers` gives the views: optimizers and
    Pyro's param store pay for each tensor, not for its size.
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
        self.widths = widths
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
        """Draw the weights as ``nn.Linear`` does; zero the last layers of network and blocks."""
        layers, from_context = self.unpack(self.weights)
        for i, (weight, bias) in enumerate(layers):
            limit = 1 / math.sqrt(len(weight))
            zero = i == len(layers) - 1 or (self.residual and i > 0 and i % 2 == 0)
            for tensor in (weight, bias):
                tensor.zero_() if zero else tensor.uniform_(-limit, limit)
        if from_context is not None:
            limit = 1 / math.sqrt(self.context_dim)
            from_context.uniform_(-limit, limit)

    def unpack(self, packed: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """Return the views of a packed vector: (W, b) of each layer, and the context's weight."""
        pieces = packed.split(self._sizes)
        views = [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
        from_context = views.pop() if self.context_dim else None
        return list(zip(views[::2], views[1::2], strict=True)), from_context

    def layers(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """Return (W, b) of each layer h W + b, and the context's weight, as they are applied."""
        return self.unpack(self.weights)

    def _theta(self, x: Tensor, context: Tensor | None) -> Params:
        """Shape ``(*batch, in_features)`` to ``(num_params, *batch, out_features)``."""
        layers, from_context = self.layers()
        batch = x.shape[:-1]
        if len(batch) != 1:
            x = x.reshape(-1, x.shape[-1])
        shift = None
        if from_context is not None and context is not None:
            shift = self.spread_context(context @ from_context, batch)
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
    def spread_context(shift: Tensor, batch: Sequence[int]) -> Tensor:
        """What the context adds, ``(*context batch, width)``, one row a member or one for all."""
        if shift.dim() == 1:
            return shift
        return shift.expand(*batch, -1).reshape(-1, shift.shape[-1])

    def extra_repr(self) -> str:
        """Name the sizes."""
        fan_in, fan_out = self._shapes[0][0], self.num_params * self.out_features
        sizes = " → ".join(str(n) for n in [fan_in, *self.hidden_dims, fan_out])
        notes = ", residual" * self.residual
        return sizes + notes + (f", context_dim={self.context_dim}" if self.context_dim else "")
