"""Bijections one after the other, and any torch or Pyro transform as a bijection."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import ComposeTransform, Transform, _InverseTransform

from pyroflows.bijection import Bijection
from pyroflows.constants import Constants
from pyroflows.supports import codomain_of, keep_inside, over, push

__all__ = ["Compose", "as_bijection", "iterated"]


class Compose(Bijection):
    r"""The parts one after the other: :math:`f = f_n \circ \dots \circ f_1`, noise side first.

    One sweep gives the value and the log-determinant; its cost is the sum of its parts'. Parts of
    different event dimension are allowed under PyTorch's rule: log-determinants of narrower parts
    are summed over the rest of the event.

    Args:
        parts: Bijections, or any transform that :func:`as_bijection` takes; parts without context
            ignore it.

    Example:
        >>> import torch
        >>> from pyroflows import transforms as T
        >>> chain = T.Compose([T.affine_coupling(4), T.permute(4), T.affine_autoregressive(4)])
        >>> chain.calls  # network calls, from noise to data and back
        (2, 5)

    Raises:
        ValueError: If there are no parts, or neighbours disagree on the event shape or on
            ``context_dim``.
    """

    def __init__(self, parts: Sequence[Transform | Bijection]) -> None:
        members = [as_bijection(part) for part in parts]
        if not members:
            raise ValueError("Compose needs at least one part; got none")
        dims = sorted({part.context_dim for part in members if part.context_dim})
        if len(dims) > 1:
            raise ValueError(f"Compose: parts disagree on context_dim: {dims}")
        super().__init__(_chain_shape(members), context_dim=dims[0] if dims else 0)
        self.parts = nn.ModuleList(members)
        self.domain, self._last_codomain, self._extra_dims = _chain_dims(members)
        # else no part has bounds
        self._pushes = any(isinstance(m, _Wrapped) for part in members for m in part.modules())

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """Where the last part takes what comes from the domain of the first."""
        return self._image(self.domain) if self._pushes else self._last_codomain

    def _image(
        self, support: constraints.Constraint, inverse: bool = False
    ) -> constraints.Constraint:
        for part in reversed(self.parts) if inverse else self.parts:
            support = part._image(support, inverse)
        return over(support, self._event_dim(not inverse))

    def _event_dim(self, inverse: bool) -> int:
        return (self._last_codomain if inverse else self.domain).event_dim

    @property
    def calls(self) -> tuple[float, float]:
        """The sums of the parts'."""
        forward, inverse = zip(*(part.calls for part in self), strict=True)
        return sum(forward), sum(inverse)

    @property
    def sign(self) -> int:
        """Product of the parts' signs."""
        sign = 1
        for part in self.parts:
            sign = sign * part.sign
        return sign

    def _steps(self) -> list[tuple[Bijection, int]]:
        """The parts, each with the number of axes over which its log-determinant is summed."""
        return list(zip(self.parts, self._extra_dims, strict=True))  # type: ignore[arg-type]

    def _move(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        steps, log_dets = self._steps(), []
        for part, extra in reversed(steps) if inverse else steps:
            value, log_det = part._step(value, context, inverse)
            log_dets.append(log_det.sum(tuple(range(-extra, 0))) if extra else log_det)
        return value, sum(log_dets[1:], log_dets[0])

    def _map_shape(self, shape: torch.Size, inverse: bool) -> torch.Size:
        for part in reversed(self.parts) if inverse else self.parts:
            shape = part._map_shape(shape, inverse)
        return shape

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Bijection]:
        yield from self.parts  # type: ignore[misc]

    def __getitem__(self, index: int) -> Bijection:
        return self.parts[index]  # type: ignore[return-value]


def _chain_shape(parts: Sequence[Bijection]) -> torch.Size | None:
    """Shape of an event entering the chain if it is known; neighbours are checked on the way."""
    entering: torch.Size | None = None
    shape: torch.Size | None = None
    for i, part in enumerate(parts):
        if shape is None and part.event_shape is not None:
            shape = part.event_shape
            entering = shape if i == 0 or _keep_shape(parts[:i]) else None
        elif shape is not None and part.event_shape is not None:
            n = min(len(shape), len(part.event_shape))
            if shape[len(shape) - n :] != part.event_shape[len(part.event_shape) - n :]:
                raise ValueError(
                    f"Compose: part {i - 1} ({type(parts[i - 1]).__name__}) gives events of shape "
                    f"{tuple(shape)}, but part {i} ({type(part).__name__}) expects "
                    f"{tuple(part.event_shape)}"
                )
            if len(part.event_shape) > len(shape):
                shape = entering = part.event_shape
        if shape is not None:
            shape = part._map_shape(shape, inverse=False)
    return entering


def _keep_shape(parts: Sequence[Bijection]) -> bool:
    return all(type(part)._map_shape is Bijection._map_shape for part in parts)


def _chain_dims(
    parts: Sequence[Bijection],
) -> tuple[constraints.Constraint, constraints.Constraint, list[int]]:
    """Domain, codomain, and over how many axes to sum each part's log-determinant."""
    whole = ComposeTransform(list(parts))
    event_dim, extra = whole.domain.event_dim, []
    for part in parts:
        extra.append(event_dim - part.domain.event_dim)
        event_dim += part.codomain.event_dim - part.domain.event_dim
    return whole.domain, whole.codomain, extra


class _Wrapped(Bijection):
    """Any torch or Pyro transform as a :class:`Bijection`.

    A conditional one is conditioned at every call. Its numbers are buffers. What lies outside the
    codomain has log-determinant -inf on the way to the noise.
    """

    def __init__(self, transform: Any, context_dim: int = 0) -> None:
        super().__init__(getattr(transform, "event_shape", None), context_dim=context_dim)
        self.constants = Constants(transform)

    @property
    def transform(self) -> Any:
        """The transform, with the present numbers."""
        return self.constants.bind()

    @property
    def calls(self) -> tuple[float, float]:
        """What a foreign network's inverse costs is not known; without a network nothing."""
        return (1, math.inf) if any(True for _ in self.parameters()) else (0, 0)

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        return self.constants.thing.domain

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        return codomain_of(self.constants.thing)

    @property
    def sign(self) -> int:
        return self.transform.sign

    def _member(self, context: Tensor | None) -> Transform:
        transform = self.transform
        return transform if context is None else transform.condition(context)

    # A fresh view of the input never meets what the transform itself cached.
    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        transform = self._member(context)
        x = x.view_as(x)
        y = transform(x)
        return y, _over_events(transform, x, y)

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        transform = self._member(context)
        y, inside = keep_inside(codomain_of(transform), y.view_as(y))
        x = transform.inv(y)
        log_det = -_over_events(transform, x, y)
        if inside is None:
            return x, log_det
        event = inside.reshape(inside.shape + (1,) * transform.domain.event_dim)
        return torch.where(event, x, 0.0), torch.where(inside, log_det, -math.inf)

    def _image(
        self, support: constraints.Constraint, inverse: bool = False
    ) -> constraints.Constraint:
        return push(self.transform.inv if inverse else self.transform, support)

    def _map_shape(self, shape: torch.Size, inverse: bool) -> torch.Size:
        if self.context_dim:
            return shape
        transform = self.transform
        return torch.Size((transform.inverse_shape if inverse else transform.forward_shape)(shape))


def _over_events(transform: Transform, x: Tensor, y: Tensor) -> Tensor:
    """log|det dy/dx| of whole events; torch's StackTransform leaves it elementwise."""
    log_det: Tensor = transform.log_abs_det_jacobian(x, y)
    # a batch of the transform's own, such as of a context, shows in what it returned
    batch = max(x.dim() - transform.domain.event_dim, y.dim() - transform.codomain.event_dim)
    excess = log_det.dim() - batch
    return log_det.sum(tuple(range(-excess, 0))) if excess > 0 else log_det


def as_bijection(
    transform: Transform | ConditionalTransform, context_dim: int | None = None
) -> Bijection:
    """Return ``transform`` as a :class:`Bijection`: itself if it is one, else wrapped.

    A view that ``condition`` returned keeps its context: as a part of another bijection it takes
    none.

    Args:
        transform: A bijective torch or Pyro transform, or a conditional one of Pyro's.
        context_dim: Number of context features of a conditional transform.

    Raises:
        TypeError: If ``transform`` is no bijective transform.
        ValueError: If a conditional transform of Pyro's comes without ``context_dim``.
    """
    if isinstance(transform, Bijection):
        return transform if transform._context is None else _Wrapped(transform)
    if isinstance(transform, ConditionalTransform):
        if not context_dim:
            raise ValueError(
                f"as_bijection needs context_dim= for the conditional {type(transform).__name__}"
            )
        return _Wrapped(transform, context_dim)
    if not isinstance(transform, Transform):
        raise TypeError(f"as_bijection expects a transform; got {type(transform).__name__}")
    if not transform.bijective:
        raise TypeError(
            f"as_bijection expects a bijective transform; {type(transform).__name__} is not"
        )
    if type(transform) is ComposeTransform and transform.parts:
        return Compose(transform.parts)
    if isinstance(transform, _InverseTransform):
        return as_bijection(transform.inv).inv
    return _Wrapped(transform)


def iterated(
    repeats: int, base_fn: Callable[..., Bijection], *args: Any, **kwargs: Any
) -> Compose:
    """Return ``repeats`` bijections made by ``base_fn(*args, **kwargs)``, one after the other.

    Raises:
        ValueError: If ``repeats`` is not positive.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be positive; got {repeats}")
    return Compose([base_fn(*args, **kwargs) for _ in range(repeats)])
