"""Where values may lie: bounds of elementwise maps, pushed from the noise to the data."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.transforms import ELUTransform
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import (
    AffineTransform,
    CatTransform,
    ComposeTransform,
    IndependentTransform,
    StackTransform,
    _InverseTransform,
)

__all__ = ["Bounds", "codomain_of", "is_real", "keep_inside", "over", "push"]

Bound = float | Tensor


@dataclass(frozen=True)
class Bounds:
    """The interval in which each entry of an event lies; ±inf for none."""

    low: Bound = -math.inf
    high: Bound = math.inf
    closed: bool = False  # whether finite ends belong to it

    @staticmethod
    def of(constraint: Any) -> "Bounds | None":
        """Return the bounds of a constraint; None if it has a form that no bounds describe."""
        constraint = _base(constraint)
        low = getattr(constraint, "lower_bound", -math.inf)
        high = getattr(constraint, "upper_bound", math.inf)
        kinds = (
            constraints.greater_than,
            constraints.less_than,
            constraints.half_open_interval,
            constraints.greater_than_eq,
            constraints.interval,
        )
        if is_real(constraint):
            return Bounds()
        if not isinstance(constraint, kinds):
            return None
        return Bounds(low, high, closed=isinstance(constraint, kinds[3:]))

    def contain(self, other: "Bounds | None") -> bool:
        """Whether another interval lies in this one; True where that is not known."""
        if other is None:
            return True
        return _all(_smallest(self.low, other.low), self.low) and _all(
            _largest(self.high, other.high), self.high
        )

    def constraint(self, event_dim: int) -> constraints.Constraint:
        """Return it as a constraint on events of so many axes."""
        below, above = _all(self.low, -math.inf), _all(self.high, math.inf)
        found: constraints.Constraint
        if below and above:
            found = constraints.real
        elif above:
            found = (
                constraints.greater_than_eq(self.low)
                if self.closed
                else constraints.greater_than(self.low)
            )
        elif below:
            found = constraints.less_than(self.high)
        else:
            found = constraints.interval(self.low, self.high)
        return over(found, event_dim)


def over(support: Any, event_dim: int) -> constraints.Constraint:
    """Return the constraint on events of so many axes, all of whose entries meet it."""
    dims = event_dim - support.event_dim
    return constraints.independent(support, dims) if dims > 0 else support


def is_real(constraint: Any) -> bool:
    """Whether the constraint allows every number."""
    return isinstance(_base(constraint), type(constraints.real))


def codomain_of(transform: Transform) -> constraints.Constraint:
    """Return where a transform takes its whole domain, chains within it included."""
    if isinstance(transform, IndependentTransform | ComposeTransform):
        return push(transform, transform.domain)
    if isinstance(transform, StackTransform):
        return constraints.stack([codomain_of(t) for t in transform.transforms], transform.dim)
    if isinstance(transform, CatTransform):
        parts = [codomain_of(t) for t in transform.transforms]
        return constraints.cat(parts, transform.dim, transform.lengths)
    if isinstance(transform, ELUTransform):
        return constraints.greater_than(-1.0)  # Pyro's class says that it is positive
    return transform.codomain


def _domain_of(transform: Transform) -> constraints.Constraint:
    inverted = isinstance(transform, _InverseTransform)
    return codomain_of(transform.inv) if inverted else transform.domain


def push(transform: Transform, support: Any) -> constraints.Constraint:
    """Return where a transform takes values that lie in ``support``.

    Exact for monotone elementwise transforms and chains of them; else the codomain.
    """
    if isinstance(transform, IndependentTransform | ComposeTransform):
        for part in getattr(transform, "parts", None) or [transform.base_transform]:
            support = push(part, support)
        return over(support, transform.codomain.event_dim)
    codomain = codomain_of(transform)
    entering, domain = Bounds.of(support), Bounds.of(_domain_of(transform))
    image = Bounds.of(codomain)
    if entering is None or domain is None or image is None or not _elementwise(transform):
        return codomain
    low, high = _largest(entering.low, domain.low), _smallest(entering.high, domain.high)
    if _all(low, domain.low) and _all(high, domain.high):
        return codomain
    like = next((v for v in vars(transform).values() if isinstance(v, Tensor)), None)
    dtype = torch.float64 if like is None else like.dtype
    with torch.no_grad():
        device = None if like is None else like.device
        ends = [transform(torch.as_tensor(end, dtype=dtype, device=device)) for end in (low, high)]
    low, high = _smallest(*ends), _largest(*ends)
    bounds = Bounds(
        _largest(low, image.low), _smallest(high, image.high), entering.closed or image.closed
    )
    return bounds.constraint(codomain.event_dim)


def keep_inside(constraint: Any, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return values that a transform can take, and which events were inside the constraint.

    What lies outside by rounding counts as inside. Rows with NaN stay as they are. None for a
    constraint that allows everything, or that cannot be checked.
    """
    if is_real(constraint) or isinstance(_base(constraint), type(constraints.dependent)):
        return value, None
    bounds, event_dim = Bounds.of(constraint), constraint.event_dim
    if bounds is None:
        return _keep_events_inside(constraint, value)
    low, high = (torch.as_tensor(b, dtype=value.dtype, device=value.device)
                 for b in (bounds.low, bounds.high))  # fmt: skip
    if bounds.closed:
        slack = 4 * torch.finfo(value.dtype).eps
        inside = (value >= low - slack * (1 + low.abs()).nan_to_num(posinf=0.0)) & (
            value <= high + slack * (1 + high.abs()).nan_to_num(posinf=0.0)
        )
        kept = torch.minimum(torch.maximum(value, low), high)
        both = low.isfinite() & high.isfinite()
        kept = torch.where(both, _strictly(kept, low, high), kept)
    else:
        inside, kept = (value > low) & (value < high), value
    inside = inside | value.isnan()
    somewhere = torch.where(
        low.isfinite(), torch.where(high.isfinite(), (low + high) / 2, low + 1), high - 1
    )
    kept = torch.where(inside, kept, somewhere)
    return kept, inside.flatten(inside.dim() - event_dim).all(-1) if event_dim else inside


def _keep_events_inside(constraint: Any, value: Tensor) -> tuple[Tensor, Tensor | None]:
    event_dim = constraint.event_dim
    tolerance = torch.finfo(value.dtype).eps ** 0.5
    if _base(constraint) is constraints.simplex:
        inside = (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() < tolerance)
    elif isinstance(_base(constraint), type(constraints.corr_cholesky)):
        unit = (value.square().sum(-1) - 1).abs() < tolerance
        inside = unit.all(-1) & constraints.lower_cholesky.check(value)
    else:
        try:
            inside = constraint.check(value)
        except NotImplementedError:
            return value, None
    missing = value.isnan()
    if event_dim:
        batch_dim = value.dim() - event_dim
        if inside.dim() > batch_dim:  # torch's stack of constraints answers elementwise
            inside = inside.flatten(batch_dim).all(-1)
        missing = missing.flatten(batch_dim).any(-1)
    return value, inside | missing


def _strictly(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Off the ends, where an inverse would be infinite."""
    return torch.minimum(
        torch.maximum(value, torch.nextafter(low, high)), torch.nextafter(high, low)
    )


def _elementwise(transform: Transform) -> bool:
    if isinstance(transform, _InverseTransform):
        return _elementwise(transform.inv)
    return isinstance(transform, AffineTransform) or transform.domain.event_dim == 0


def _base(constraint: Any) -> Any:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _all(one: Bound, other: Bound) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return bool(torch.as_tensor(one == other).all())
    return one == other


def _largest(one: Bound, other: Bound) -> Bound:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return -_smallest(-one, -other)
    return max(one, other)


def _smallest(one: Bound, other: Bound) -> Bound:
    if not isinstance(one, Tensor) and not isinstance(other, Tensor):
        return min(one, other)
    like = one if isinstance(one, Tensor) else torch.as_tensor(other)
    one, other = (torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in (one, other))
    return torch.minimum(one, other)
