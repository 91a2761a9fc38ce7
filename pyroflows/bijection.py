"""The one abstraction.

An invertible map with its log-determinant, context optional, at home in Pyro.

A subclass of :class:`Bijection` writes two methods; everything Pyro and PyTorch expect of a
transform (calls, ``log_abs_det_jacobian``, ``inv``, ``condition``, shapes, copies, caching) is
written here once.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransform, ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import ComposeTransform, Transform, _InverseTransform

from pyroflows.constants import Constants
from pyroflows.memory import Entry, show_nan, tensors_of, untracked
from pyroflows.store import follow
from pyroflows.supports import codomain_of, keep_inside, over, push

__all__ = ["Bijection", "Compose", "Inverse", "as_bijection"]


class Bijection(TransformModule):
    r"""An invertible, differentiable map :math:`y = f(x; c)` from noise x to data y.

    Shapes: x and y are ``(*batch, *event)``, the context c is ``(*batch, context_dim)``; batches
    broadcast. Every log-determinant has exactly the batch shape. dtype and device are those of the
    input and the parameters.

    With ``context_dim=0`` it is a transform. With ``context_dim > 0`` it is a family of
    transforms, one for each context: ``condition(c)`` returns the member, which shares every
    parameter.

    A call remembers its value and log-determinant, so that Pyro's pair of calls costs one
    evaluation. The memory is dropped as soon as it could be wrong: after a backward pass through
    it, when a parameter, a buffer or one of the tensors has changed, or when gradients are wanted
    that it lacks.

    Args:
        event_shape: Shape of x without its batch; ``None`` leaves the size open.
        context_dim: Number of context features; 0 for none.

    Raises:
        ValueError: If ``context_dim`` is negative.
    """

    domain: constraints.Constraint = constraints.real_vector
    codomain: constraints.Constraint = constraints.real_vector
    bijective = True

    _context: Tensor | None = None
    _entry: "Entry | None" = None
    _inverse_ref: "weakref.ref[Inverse] | None" = None

    def __init__(self, event_shape: Sequence[int] | None = None, *, context_dim: int = 0) -> None:
        super().__init__()
        if context_dim < 0:
            raise ValueError(f"context_dim must be 0 or more; got {context_dim}")
        self.event_shape = None if event_shape is None else torch.Size(event_shape)
        self.context_dim = context_dim

    @property
    def calls(self) -> tuple[float, float]:
        """What the two directions cost, in network calls one after the other.

        From noise to data, and from data to noise; ``(1, 1)`` unless a class says otherwise. Free
        parameters and fixed maps cost 0; a root search costs its evaluations of the map; an
        unknown cost is infinite.
        """
        return 1, 1

    @property
    def cheaper_inverse(self) -> bool:
        """Whether data to noise costs fewer network calls than noise to data."""
        forward, inverse = self.calls
        return inverse < forward

    @property
    def _title(self) -> str:
        """What errors call it."""
        return type(self).__name__

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return y and log|det dy/dx|, shape batch (or broadcastable to it)."""
        raise NotImplementedError(f"{self._title} has no forward direction")

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x and log|det dx/dy|, shape batch (or broadcastable to it)."""
        raise NotImplementedError(f"{self._title} has no inverse direction")

    def _image(
        self, support: constraints.Constraint, inverse: bool = False
    ) -> constraints.Constraint:
        """Where values end that lie in ``support``; the codomain unless more is known."""
        return self.domain if inverse else self.codomain

    def _event_dim(self, inverse: bool) -> int:
        """Axes of an event on the data side (``inverse``) or the noise side."""
        return (self.codomain if inverse else self.domain).event_dim

    def _step(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        """Either direction, inputs unchecked: for bijections made of bijections."""
        context = context if self.context_dim else None
        if inverse:
            return self._inverse_and_log_det(value, context)
        return self._forward_and_log_det(value, context)

    # --------------------------------------------------------------------------- value and log-det

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``f(x)`` and ``log|det df/dx|``, evaluated once or remembered."""
        return self._both(x, inverse=False)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the x of ``f(x) = y`` and ``log|det dx/dy|``, evaluated once or remembered."""
        return self._both(y, inverse=True)

    def _both(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        entry = self._entry  # read once: another thread may drop it
        if entry is not None and not untracked():
            known = entry.input_of(self, value, inverse)
            if known is not None:
                return known
        out, log_det = self._evaluate(value, inverse)
        return out, show_nan(out, log_det)

    def _evaluate(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Check and broadcast ``value``, then move it.

        NaN need not show in the log-determinant.
        """
        event_dim = self._event_dim(inverse)
        self._check(value, event_dim, inverse)
        context = self._context
        if context is not None:
            batch = self._broadcast(value.shape, event_dim)
            value = value.expand(batch + value.shape[value.dim() - event_dim :])
        out, log_det = self._step(value, context, inverse)
        event_dim = self._event_dim(not inverse)
        return out, log_det.expand(out.shape[: out.dim() - event_dim])

    def _check(self, value: Tensor, event_dim: int, inverse: bool) -> None:
        if self.context_dim and self._context is None:
            raise RuntimeError(
                f"{self._title} needs a context of shape (..., {self.context_dim}): "
                "call .condition(context) first"
            )
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{self._title} expects a tensor; got {type(value).__name__}. "
                "Convert it, e.g. torch.as_tensor(x)"
            )
        if not value.is_floating_point():
            raise TypeError(
                f"{self._title} expects floating-point values; got {value.dtype}. "
                "Convert them, e.g. x.float()"
            )
        expected = self.event_shape
        if expected is not None and inverse:
            expected = self._map_shape(expected, inverse=False)
            expected = expected[len(expected) - event_dim :]
        given = value.shape[max(0, value.dim() - event_dim) :]
        if len(given) < event_dim or (expected is not None and given != expected):
            want = ["..."] + ([str(n) for n in expected] if expected else ["*"] * event_dim)
            raise ValueError(
                f"{self._title} expects values of shape ({', '.join(want)}); "
                f"got {tuple(value.shape)}"
            )
        if not torch.compiler.is_compiling():
            self._check_kind(value)
            follow(self)

    def _check_kind(self, value: Tensor) -> None:
        own = next((t for t in tensors_of(self) if t.is_floating_point()), None)
        if own is None:
            return
        for what, given in (("values", value), ("context", self._context)):
            if given is None or (own.dtype == given.dtype and own.device == given.device):
                continue
            same = own.device == given.device and torch.float64 not in (own.dtype, given.dtype)
            if same and torch.is_autocast_enabled(given.device.type):  # it leaves float64 alone
                continue
            raise ValueError(
                f"{self._title} has parameters of {own.dtype} on {own.device}; got "
                f"{what} of {given.dtype} on {given.device}. Convert one of them, e.g. with "
                f".to({what})"
            )

    # ---------------------------------------------------------------------------- torch's protocol

    def __call__(self, x: Tensor) -> Tensor:
        """Return y = f(x)."""
        return self._recall(x, inverse=False)

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._recall(y, inverse=True)

    def _call(self, x: Tensor) -> Tensor:
        return self._evaluate(x, inverse=False)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._evaluate(y, inverse=True)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log|det dy/dx| at a pair with y = f(x), shape batch.

        Free right after the call that made it.
        """
        entry = self._entry
        if entry is not None:
            log_det = entry.log_det_of(self, x, y)
            if log_det is not None:
                return log_det
        if self.cheaper_inverse:
            return -self._both(y, inverse=True)[1]
        return self._both(x, inverse=False)[1]

    def _recall(self, value: Tensor, inverse: bool) -> Tensor:
        """Return the other side of ``value``.

        Remembered if that is sure to be right, else computed.
        """
        if untracked():
            return self._evaluate(value, inverse)[0]
        entry = self._entry
        if entry is not None:
            known = entry.input_of(self, value, inverse)
            if known is not None:
                return known[0]
        out, log_det = self._evaluate(value, inverse)
        log_det = show_nan(out, log_det)
        if out is not value and not out.is_inference():
            # past nn.Module.__setattr__, and in one assignment: threads see the old entry or the
            # new one
            self.__dict__["_entry"] = Entry(self, value, out, log_det, inverse)
        return out

    @property
    def sign(self) -> int:
        """Sign of the determinant, where it is fixed.

        Else there is no such attribute (torch.jit asks every module).
        """
        raise AttributeError(f"{self._title} has no sign of its own")

    def with_cache(self, cache_size: int = 1) -> "Bijection":
        """Return self: the memory of the last call is always right, so it needs no switch."""
        return self

    def clear_cache(self) -> None:
        """Forget the last call. Never needed; Pyro's distributions may call it."""
        self.__dict__.pop("_entry", None)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of y for x of ``shape``, broadcast against the context's batch."""
        shape = self._map_shape(torch.Size(shape), inverse=False)
        return self._broadcast_shape(shape, self.codomain.event_dim)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of x for y of ``shape``, broadcast against the context's batch."""
        shape = self._map_shape(torch.Size(shape), inverse=True)
        return self._broadcast_shape(shape, self.domain.event_dim)

    def _map_shape(self, shape: torch.Size, inverse: bool) -> torch.Size:
        """Shape of the result for an input of ``shape``, context aside.

        Overridden where events change shape.
        """
        return shape

    def _broadcast_shape(self, shape: torch.Size, event_dim: int) -> torch.Size:
        if self._context is None:
            return shape
        return self._broadcast(shape, event_dim) + shape[len(shape) - event_dim :]

    def _broadcast(self, shape: torch.Size, event_dim: int) -> torch.Size:
        """Return the common batch shape of a value of ``shape`` and the context."""
        batch, context = shape[: len(shape) - event_dim], self._context
        if context is None:
            return batch
        try:
            return torch.broadcast_shapes(batch, context.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"{self._title}: a batch {tuple(batch)} of values does not broadcast with "
                f"a context of shape {tuple(context.shape)}"
            ) from None

    # --------------------------------------------------------------------------------------- views

    @property
    def inv(self) -> "Bijection":
        """The inverse, a module with the same parameters; ``t.inv.inv is t``."""
        inverse = self._inverse_ref() if self._inverse_ref is not None else None
        if inverse is None:
            inverse = Inverse(self)
        return inverse

    def condition(self, context: Tensor) -> "Bijection":
        """Fix the context: return a view that shares every parameter and buffer.

        A bijection without context is a constant family and returns itself.

        Args:
            context: Shape ``(*batch, context_dim)``; its batch broadcasts against that of x.

        Raises:
            TypeError: If ``context`` is no tensor.
            ValueError: If the last size of ``context`` is not ``context_dim``.
        """
        if not self.context_dim:
            return self
        check_context(context, self.context_dim, self._title)
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view.__dict__.update(_context=context, _entry=None, _inverse_ref=None)
        return view

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Bijection":
        super()._apply(fn, recurse)
        if "_context" in self.__dict__:
            self.__dict__["_context"] = fn(self.__dict__["_context"])
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for memory in ("_entry", "_inverse_ref"):
            state.pop(memory, None)
        return state

    __repr__ = nn.Module.__repr__

    def extra_repr(self) -> str:
        """Say what is particular, for ``repr``."""
        return f"context_dim={self.context_dim}" if self.context_dim else ""


# For isinstance; inheriting would bring the ABC metaclass, which forbids PyroModule[Bijection].
ConditionalTransformModule.register(Bijection)


def check_context(context: Any, context_dim: int, owner: str) -> None:
    """Refuse what is no tensor of shape ``(*batch, context_dim)``, in the name of ``owner``."""
    if not isinstance(context, Tensor):
        raise TypeError(
            f"{owner} expects a context tensor of shape (..., {context_dim}); "
            f"got {type(context).__name__}"
        )
    if context.dim() == 0 or context.shape[-1] != context_dim:
        raise ValueError(
            f"{owner} expects a context of shape (..., {context_dim}); got {tuple(context.shape)}"
        )


class Inverse(Bijection):
    """A bijection read backwards: the same parameters and the same memory of calls.

    Args:
        transform: The bijection to invert; ``t.inv`` is the short form.
    """

    def __init__(self, transform: Bijection) -> None:
        super().__init__(context_dim=transform.context_dim)
        self.transform = transform
        # weak: a module cycle would make .to() recurse for ever
        transform.__dict__["_inverse_ref"] = weakref.ref(self)
        if transform.event_shape is not None:
            self.event_shape = transform._map_shape(transform.event_shape, inverse=False)

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        """What the transform maps to."""
        return self.transform.codomain

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        """What the transform maps from."""
        return self.transform.domain

    @property
    def calls(self) -> tuple[float, float]:
        """Those of the transform, swapped."""
        forward, inverse = self.transform.calls
        return inverse, forward

    @property
    def sign(self) -> int:
        """Sign of the determinant, where the transform has one."""
        return self.transform.sign

    @property
    def _context(self) -> Tensor | None:  # type: ignore[override]
        return self.transform._context

    def _image(
        self, support: constraints.Constraint, inverse: bool = False
    ) -> constraints.Constraint:
        return self.transform._image(support, not inverse)

    def _event_dim(self, inverse: bool) -> int:
        return self.transform._event_dim(not inverse)

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform._inverse_and_log_det(x, context)

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform._forward_and_log_det(y, context)

    def _evaluate(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return self.transform._evaluate(value, not inverse)

    def _both(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return self.transform._both(value, not inverse)

    def _recall(self, value: Tensor, inverse: bool) -> Tensor:
        return self.transform._recall(value, not inverse)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log|det dy/dx| at a pair with y = f(x), shape batch."""
        return -self.transform.log_abs_det_jacobian(y, x)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of y for x of ``shape``."""
        return self.transform.inverse_shape(shape)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of x for y of ``shape``."""
        return self.transform.forward_shape(shape)

    def _map_shape(self, shape: torch.Size, inverse: bool) -> torch.Size:
        return self.transform._map_shape(shape, not inverse)

    @property
    def inv(self) -> Bijection:
        """The transform itself."""
        reference = self.transform._inverse_ref
        if reference is None or reference() is None:  # after deepcopy or pickle
            self.transform.__dict__["_inverse_ref"] = weakref.ref(self)
        return self.transform

    def condition(self, context: Tensor) -> Bijection:
        """Fix the context: the inverse of the transform's view."""
        return self.transform.condition(context).inv if self.context_dim else self


class Compose(Bijection):
    r"""The parts one after the other: :math:`f = f_n \circ \dots \circ f_1`, noise side first.

    One sweep gives the value and the log-determinant; its cost is the sum of its parts'. Parts of
    different event dimension are allowed under PyTorch's rule: log-determinants of narrower parts
    are summed over the rest of the event.

    Args:
        parts: Bijections, or any transform that :func:`as_bijection` takes; parts without context
            ignore it.

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

    def _sweep(
        self, value: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        steps, log_dets = self._steps(), []
        for part, extra in reversed(steps) if inverse else steps:
            value, log_det = part._step(value, context, inverse)
            log_dets.append(log_det.sum(tuple(range(-extra, 0))) if extra else log_det)
        return value, sum(log_dets[1:], log_dets[0])

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._sweep(x, context, inverse=False)

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._sweep(y, context, inverse=True)

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
