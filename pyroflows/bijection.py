"""The one abstraction: an invertible map with its log-determinant, at home in Pyro.

A subclass of :class:`Bijection` writes one method, or two; everything Pyro and PyTorch expect of a
transform (calls, ``log_abs_det_jacobian``, ``inv``, ``condition``, shapes, copies, caching) is
written here once. Chains of bijections are in :mod:`pyroflows.compose`.
"""

import weakref
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.checks import broadcast_batch, check_context, check_kind, check_value
from pyroflows.memory import Entry, show_nan, tensors_of
from pyroflows.numerics import plain
from pyroflows.store import follow

__all__ = ["Bijection", "Inverse"]


class Bijection(TransformModule):
    r"""An invertible, differentiable map :math:`y = f(x; c)` from noise x to data y.

    Shapes: x and y are ``(*batch, *event)``, the context c is ``(*batch, context_dim)``; batches
    broadcast. Every log-determinant has exactly the batch shape. dtype and device are those of the
    input and the parameters.

    With ``context_dim=0`` it is a transform. With ``context_dim > 0`` it is a family of
    transforms, one for each context: ``condition(c)`` returns the member, which shares every
    parameter.

    A subclass writes ``_move(value, context, inverse)`` where the directions mirror each other,
    else ``_forward_and_log_det`` and ``_inverse_and_log_det``; where events change their shape
    ``_map_shape`` too. Bijections made of bijections ask their parts by ``_step``, ``_map_shape``,
    ``_event_dim`` and ``_image``: these names are for subclasses and for the house, not for users.

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

    def _move(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        """Return the other side and log|det| of the way there, shape batch (or broadcastable)."""
        raise NotImplementedError(
            f"{self._title} has no {'inverse' if inverse else 'forward'} direction"
        )

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return y and log|det dy/dx|."""
        return self._move(x, context, inverse=False)

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x and log|det dx/dy|."""
        return self._move(y, context, inverse=True)

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
        return self._once(x, inverse=False)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the x of ``f(x) = y`` and ``log|det dx/dy|``, evaluated once or remembered."""
        return self._once(y, inverse=True)

    def _once(
        self, value: Tensor, inverse: bool, *, remember: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the other side of ``value`` and the log-determinant, remembered or computed."""
        tracked = plain()  # Python objects are no guide to values while a graph is recorded
        entry = self._entry  # read once: another thread may drop it
        if entry is not None and tracked:
            known = entry.input_of(self, value, inverse)
            if known is not None:
                return known
        out, log_det = self._evaluate(value, inverse)
        log_det = show_nan(out, log_det)
        if remember and tracked and out is not value and not out.is_inference():
            # past nn.Module.__setattr__, and in one assignment: threads see the old entry or the
            # new one
            self.__dict__["_entry"] = Entry(self, value, out, log_det, inverse)
        return out, log_det

    def _evaluate(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Check and broadcast ``value``, then move it: NaN may not show in the log-determinant."""
        event_dim = self._event_dim(inverse)
        self._check(value, event_dim, inverse)
        context = self._context
        if context is not None:
            batch = broadcast_batch(self._title, value.shape[: value.dim() - event_dim], context)
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
        expected = self.event_shape
        if expected is not None and inverse:
            expected = self._map_shape(expected, inverse=False)
            expected = expected[len(expected) - event_dim :]
        check_value(self._title, value, event_dim, expected)
        if not torch.compiler.is_compiling():
            self._check_kind(value)
            follow(self)

    def _check_kind(self, value: Tensor) -> None:
        own = next((t for t in tensors_of(self) if t.is_floating_point()), None)
        if own is not None:
            check_kind(self._title, own, "values", value)
            if self._context is not None:
                check_kind(self._title, own, "context", self._context)

    # ---------------------------------------------------------------------------- torch's protocol

    def __call__(self, x: Tensor) -> Tensor:
        """Return y = f(x)."""
        return self._once(x, inverse=False, remember=True)[0]

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._once(y, inverse=True, remember=True)[0]

    def _call(self, x: Tensor) -> Tensor:
        return self._evaluate(x, inverse=False)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._evaluate(y, inverse=True)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log|det dy/dx| at a pair with y = f(x), shape batch; free after its call."""
        entry = self._entry
        if entry is not None:
            log_det = entry.log_det_of(self, x, y)
            if log_det is not None:
                return log_det
        if self.cheaper_inverse:
            return -self._once(y, inverse=True)[1]
        return self._once(x, inverse=False)[1]

    @property
    def sign(self) -> int:
        """Sign of the determinant where it is fixed, else no attribute: torch.jit asks for all."""
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
        """Shape of the result for an input of ``shape``, context aside."""
        return shape

    def _broadcast_shape(self, shape: torch.Size, event_dim: int) -> torch.Size:
        if self._context is None:
            return shape
        cut = len(shape) - event_dim
        return broadcast_batch(self._title, shape[:cut], self._context) + shape[cut:]

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

    def _once(
        self, value: Tensor, inverse: bool, *, remember: bool = False
    ) -> tuple[Tensor, Tensor]:
        return self.transform._once(value, not inverse, remember=remember)

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


def __getattr__(name: str) -> Any:
    """What lived here once: :mod:`pyroflows.compose` and :mod:`pyroflows.checks`."""
    if name in ("Compose", "as_bijection", "_Wrapped"):  # also in what was pickled whole
        return getattr(import_module("pyroflows.compose"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
