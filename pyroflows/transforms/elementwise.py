"""Elementwise maps: every feature by itself, with parameters that are free or set by a context."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.bijection import Bijection
from pyroflows.conditioners import Free
from pyroflows.scalar import Affine, ScalarMap, Scale, maps_of_part
from pyroflows.transforms._factories import conditional, spline_map

__all__ = [
    "Elementwise",
    "conditional_elementwise_affine",
    "conditional_elementwise_scale",
    "conditional_spline",
    "elementwise",
    "elementwise_affine",
    "elementwise_scale",
    "spline",
]


class Elementwise(Bijection):
    r"""Move every feature by a scalar map: :math:`y_i = g(x_i; \theta_i(c))`.

    One evaluation of the map in either direction; one network call if there is a context. The
    identity at initialization.

    Args:
        scalar: The increasing map :math:`g`; see :mod:`pyroflows.scalar`.
        conditioner: ``(x, c) -> θ`` of shape ``(scalar.num_params, *batch, *event)`` that does not
            look at x, such as :class:`pyroflows.conditioners.Free`.
        event_shape: Shape of the event.
        context_dim: Features of the context ``c``, shape ``(*batch, context_dim)``; 0 for none.
    """

    sign = 1

    def __init__(
        self,
        scalar: ScalarMap,
        conditioner: nn.Module,
        event_shape: Sequence[int],
        *,
        context_dim: int = 0,
    ) -> None:
        super().__init__(event_shape, context_dim=context_dim)
        self.scalar, self.conditioner = scalar, conditioner
        self.domain = self.codomain = constraints.independent(constraints.real, len(event_shape))

    @property
    def calls(self) -> tuple[float, float]:
        """One network call in either direction if there is a context, else none."""
        return (1, 1) if self.context_dim else (0, 0)

    def _move(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        params = self.conditioner(value, context)
        move = self.scalar.inverse if inverse else self.scalar.forward
        value, log_slope = move(value, params)
        return value, log_slope.flatten(-self.domain.event_dim).sum(-1)

    def extra_repr(self) -> str:
        """Name the map and the event."""
        return f"{self.scalar}, event_shape={tuple(self.event_shape or ())}"


def elementwise(
    scalar: ScalarMap,
    input_dim: int | Sequence[int],
    *,
    context_dim: int = 0,
    hidden_dims: Sequence[int] | None = None,
    **network: Any,
) -> Elementwise:
    """Return the elementwise transform of any scalar map.

    Args:
        scalar: The map; see :mod:`pyroflows.scalar`.
        input_dim: Number of features, or the shape of the event.
        context_dim: Features of the context; 0 for none, and then θ are free parameters.
        hidden_dims: Widths of the context's network.
        **network: ``residual`` and ``activation`` of that network.

    Raises:
        ValueError: If ``input_dim`` is not positive.
    """
    event_shape = [input_dim] if isinstance(input_dim, int) else list(input_dim)
    if min(event_shape) < 1:
        raise ValueError(f"input_dim must be positive; got {input_dim}")
    scalar = maps_of_part(scalar, event_shape)
    conditioner = Free(
        scalar.num_params, event_shape, context_dim=context_dim, hidden_dims=hidden_dims, **network
    )
    return Elementwise(scalar, conditioner, event_shape, context_dim=context_dim)


def elementwise_affine(
    input_dim: int | Sequence[int],
    hidden_dims: Sequence[int] | None = None,
    *,
    bound: float = 16.0,
    **kwargs: Any,
) -> Elementwise:
    """Scale and shift every feature: y_i = exp(s_i) x_i + t_i, |s_i| < bound.

    The arguments are those of :func:`elementwise`.
    """
    return elementwise(Affine(bound), input_dim, hidden_dims=hidden_dims, **kwargs)


def elementwise_scale(
    input_dim: int | Sequence[int],
    hidden_dims: Sequence[int] | None = None,
    *,
    bound: float = 16.0,
    **kwargs: Any,
) -> Elementwise:
    """NICE's diagonal scaling: y_i = exp(s_i) x_i, |s_i| < bound.

    The arguments are those of :func:`elementwise`.

    References:
        Dinh, Krueger, Bengio (2015), NICE, section 3.3. arXiv:1410.8516
    """
    return elementwise(Scale(bound), input_dim, hidden_dims=hidden_dims, **kwargs)


def spline(
    input_dim: int | Sequence[int],
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    order: str = "quadratic",
    **kwargs: Any,
) -> Elementwise:
    """A monotone rational spline for every feature on [-bound, bound], the identity outside.

    Args:
        input_dim: Number of features, or the shape of the event.
        hidden_dims: Widths of the context's network, if there is a context.
        count_bins: Bins K of each spline.
        bound: Half-width of the spline's box.
        order: ``"quadratic"`` (Durkan et al. 2019) or ``"linear"`` (Dolatabadi et al. 2020).
        **kwargs: Further arguments of :func:`elementwise`.

    Raises:
        ValueError: If ``order`` is neither "linear" nor "quadratic", or a size is not positive.

    References:
        Durkan, Bekasov, Murray, Papamakarios (2019), Neural spline flows. arXiv:1906.04032
        Dolatabadi, Erfani, Leckie (2020), Invertible generative modeling using linear rational
        splines. arXiv:2001.05168
    """
    scalar = spline_map(count_bins, bound, order)
    return elementwise(scalar, input_dim, hidden_dims=hidden_dims, **kwargs)


conditional_elementwise_affine = conditional(elementwise_affine)
conditional_elementwise_scale = conditional(elementwise_scale)
conditional_spline = conditional(spline)
