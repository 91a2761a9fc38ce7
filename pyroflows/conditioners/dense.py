"""Networks of the kept features and the context, and of the context alone."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.conditioners.network import Activation, Conditioner, Params

__all__ = ["Dense", "Free"]


class Dense(Conditioner):
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
        """Return θ as it broadcasts with x: :meth:`params`, and axes of length 1 for the batch."""
        if not self.context_dim:
            batch_dims = x.dim() - len(self.shape)
            return self.theta.view(self.num_params, *[1] * batch_dims, *self.shape)
        return self.net(context)

    def params(self, context: Tensor | None = None) -> Params:
        """Return θ, ``(num_params, *shape)`` or ``(num_params, *context batch, *shape)``."""
        return self.net(context) if self.context_dim else self.theta
