"""Convolutional networks for images."""

from collections.abc import Sequence

from torch import Tensor, nn

from pyroflows.conditioners.network import Activation

__all__ = ["Conv"]


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
        h = self.first(x.reshape(-1, *x.shape[-3:]))
        if self.from_context is not None:
            shift = self.from_context(context).expand(*batch, -1)
            h = h + shift.reshape(-1, shift.shape[-1], 1, 1)
        for layer in self.hidden:
            h = layer(self.act(h))
        params = self.last(self.act(h)).unflatten(1, (self.num_params, -1)).movedim(1, 0)
        return params.reshape(self.num_params, *batch, *params.shape[-3:])
