"""Autoregressive transforms, MAF and IAF: the features before it set the map of each feature."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pyroflows.bijection import Bijection
from pyroflows.conditioners import Masked, Params
from pyroflows.conditioners.graph import check_adjacency
from pyroflows.scalar import Affine, ScalarMap, map_of_feature, maps_of_part
from pyroflows.transforms._factories import conditional, spline_map
from pyroflows.transforms.elementwise import Elementwise, elementwise

__all__ = [
    "Autoregressive",
    "affine_autoregressive",
    "autoregressive",
    "conditional_affine_autoregressive",
    "conditional_spline_autoregressive",
    "spline_autoregressive",
]


class Sequential(Protocol):
    """One pass in which θ of a feature is asked for when the features before it are known."""

    order: list[int]

    def params(self) -> Tensor:
        """Return θ of the next feature, shape ``(num_params, *batch)``."""

    def push(self, value: Tensor) -> None:
        """Take the value of the next feature, shape batch."""


class AutoregressiveConditioner(Protocol):
    """What :class:`Autoregressive` asks of a network."""

    input_dim: int
    num_params: int

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Params:
        """Return θ of shape ``(num_params, *batch, input_dim)``, each by the features before."""

    def sequential(self, batch_shape: Sequence[int], context: Tensor | None = None) -> Sequential:
        """Begin a pass feature by feature."""


class Autoregressive(Bijection):
    r"""Move each feature by a scalar map whose parameters the features before it set.

    .. math:: y_i = g\big(x_i;\, \theta_i(x_{<i}, c)\big)

    One network call from x to y. From y to x the features come one after the other; units are
    computed as they become known, so all D steps together multiply by each weight once. Gradients
    are exact in both directions. As it stands it is an inverse autoregressive flow (fast samples);
    its ``inv`` is a masked autoregressive flow (fast densities). The identity at initialization.

    Args:
        scalar: The map :math:`g`; see :mod:`pyroflows.scalar`.
        conditioner: A :class:`pyroflows.conditioners.Masked` network with ``scalar.num_params``
            parameters, or :class:`pyroflows.conditioners.Columns`.
        context_dim: Features of the context ``c``, shape ``(*batch, context_dim)``; 0 for none.

    Raises:
        ValueError: If scalar and conditioner disagree on the number of parameters.

    References:
        Kingma et al. (2016), Improving variational inference with inverse autoregressive flow.
        arXiv:1606.04934

        Papamakarios, Pavlakou, Murray (2017), Masked autoregressive flow. arXiv:1705.07057
    """

    autoregressive = True

    def __init__(
        self, scalar: ScalarMap, conditioner: AutoregressiveConditioner, *, context_dim: int = 0
    ) -> None:
        if conditioner.num_params != scalar.num_params:
            raise ValueError(
                f"Autoregressive: {scalar} takes {scalar.num_params} parameters a feature; "
                f"the conditioner gives {conditioner.num_params}"
            )
        super().__init__([conditioner.input_dim], context_dim=context_dim)
        self.scalar, self.conditioner = scalar, conditioner

    @property
    def calls(self) -> tuple[float, float]:
        """One network call forward; as many steps as features back."""
        return 1, self.conditioner.input_dim

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y, log_slope = self.scalar.forward(x, self.conditioner(x, context))
        return y, log_slope.sum(-1)

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if y.dim() == 1:  # torch promotes the derivatives of tensors without an axis
            row, log_det = self._inverse_and_log_det(y.unsqueeze(0), context)
            return row.squeeze(0), log_det.squeeze(0)
        columns = y.movedim(-1, 0).contiguous().unbind(0)
        sequence = self.conditioner.sequential(y.shape[:-1], context)
        x, log_slopes = list(columns), []
        for i in sequence.order:
            scalar = map_of_feature(self.scalar, i)
            x[i], log_slope = scalar.inverse(columns[i], sequence.params())
            sequence.push(x[i])
            log_slopes.append(log_slope)
        return torch.stack(x, -1), torch.stack(log_slopes).sum(0)

    def extra_repr(self) -> str:
        """Name the map."""
        return f"{self.scalar}, input_dim={self.conditioner.input_dim}"


def autoregressive(
    scalar: ScalarMap,
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    permutation: Sequence[int] | Tensor | None = None,
    adjacency: Sequence[Sequence[bool]] | Tensor | None = None,
    context_dim: int = 0,
    conditioner: Callable[..., AutoregressiveConditioner] = Masked,
    **network: Any,
) -> Autoregressive | Elementwise:
    """Return an autoregressive transform with a masked network for any scalar map.

    Args:
        scalar: The map; see :mod:`pyroflows.scalar`.
        input_dim: Number of features D. A single one depends on nothing before it: the result is
            then the elementwise map, whose parameters are free or depend on the context alone.
        hidden_dims: Widths of the network; if None those of a masked network are two layers of ten
            units a feature, 32 to 256.
        permutation: The features in the order in which they depend on each other; the natural one
            if None.
        adjacency: Instead of ``permutation`` a boolean ``(input_dim, input_dim)``: entry (i, j)
            says that the parameters of feature i may depend on feature j. No cycles; the diagonal
            does not count. For ``inv`` the features are those of the data.
        context_dim: Features of the context; 0 for none.
        conditioner: Class of the network: :class:`pyroflows.conditioners.Masked`, or
            :class:`pyroflows.conditioners.Columns` for one network a feature.
        **network: ``residual`` and ``activation`` of a masked network, ``dropout`` of the other.

    Raises:
        ValueError: If ``input_dim`` is not positive, or ``permutation`` or ``adjacency`` is none.
    """
    if input_dim < 1:
        raise ValueError(f"input_dim must be positive; got {input_dim}")
    if adjacency is not None and input_dim == 1:
        check_adjacency(adjacency, 1)
    if input_dim == 1:
        return elementwise(scalar, 1, context_dim=context_dim, hidden_dims=hidden_dims, **network)
    scalar = maps_of_part(scalar, [input_dim])
    net = conditioner(
        input_dim,
        scalar.num_params,
        context_dim=context_dim,
        hidden_dims=hidden_dims,
        order=permutation,
        adjacency=adjacency,
        **network,
    )
    return Autoregressive(scalar, net, context_dim=context_dim)


def affine_autoregressive(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    log_scale_min_clip: float = -4.0,
    log_scale_max_clip: float = 4.0,
    stable: bool = False,
    **kwargs: Any,
) -> Autoregressive | Elementwise:
    """IAF's layer y_i = exp(s(x_<i)) x_i + t(x_<i); its ``inv`` is MAF's.

    Further arguments are those of :func:`autoregressive`. The log-scale is bounded smoothly, at ±
    the larger magnitude of the two clips, so it is always numerically stable: ``stable`` is taken
    for Pyro's sake and changes nothing.

    References:
        Kingma et al. (2016), Improving variational inference with inverse autoregressive flow.
        arXiv:1606.04934

        Papamakarios, Pavlakou, Murray (2017), Masked autoregressive flow. arXiv:1705.07057
    """
    scalar = Affine(max(-log_scale_min_clip, log_scale_max_clip))
    return autoregressive(scalar, input_dim, hidden_dims, **kwargs)


def spline_autoregressive(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    order: str = "quadratic",
    **kwargs: Any,
) -> Autoregressive | Elementwise:
    """The autoregressive neural spline flow's layer; its ``inv`` has the fast density.

    ``count_bins``, ``bound`` and ``order``, which is that of the spline, are as in
    :func:`pyroflows.transforms.spline`, the other arguments as in :func:`autoregressive`, where
    the order of the features is ``permutation``.

    Example:
        >>> import torch
        >>> from pyroflows import transforms as T
        >>> layer = T.spline_autoregressive(4).inv  # a fast density
        >>> y = torch.randn(100, 4)
        >>> x, log_det = layer.forward_and_log_det(y)
        >>> x.shape, log_det.shape
        (torch.Size([100, 4]), torch.Size([100]))

    References:
        Durkan, Bekasov, Murray, Papamakarios (2019), Neural spline flows. arXiv:1906.04032
    """
    return autoregressive(spline_map(count_bins, bound, order), input_dim, hidden_dims, **kwargs)


conditional_affine_autoregressive = conditional(affine_autoregressive)
conditional_spline_autoregressive = conditional(spline_autoregressive)
