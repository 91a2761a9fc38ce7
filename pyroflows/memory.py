"""The memory of one call, value and log-determinant, handed out only while it is right.

Pyro asks for a value and for its log-determinant in two calls.
:class:`pyroflows.bijection.Bijection` keeps the last evaluation as an :class:`Entry`, written and
read in one assignment, so that threads see the old one or the new one.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from pyroflows.numerics import plain

__all__ = ["Entry", "Twin", "show_nan", "tensors_of"]

T = TypeVar("T")


class Twin(Generic[T]):
    """What Python must know of a module's buffers, read once and again when they have changed.

    Reading a buffer stalls a GPU, and a recorded graph or a batch of modules has no values to
    read. A module therefore asks in its constructor and after loading too.
    """

    def __init__(self) -> None:
        self.stamp: list[tuple[weakref.ref[Tensor], int]] = []
        self.known: T | None = None

    def read(self, make: Callable[..., T], *buffers: Tensor) -> T | None:
        """Return ``make(*buffers)``, or None while they are on the meta device, empty."""
        if self.known is not None and (
            torch.compiler.is_compiling() or not self._is_stale(buffers) or not plain(*buffers)
        ):
            return self.known
        if any(b.is_meta for b in buffers):
            return None
        self.known = make(*buffers)
        self.stamp = [(weakref.ref(b), _version(b)) for b in buffers]
        return self.known

    def _is_stale(self, buffers: tuple[Tensor, ...]) -> bool:
        if len(self.stamp) != len(buffers):
            return True
        for (reference, version), buffer in zip(self.stamp, buffers, strict=True):
            if reference() is not buffer or version != _version(buffer):
                return True
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {"stamp": [], "known": self.known}  # a copy has buffers of its own


def show_nan(out: Tensor, log_det: Tensor) -> Tensor:
    """A row with NaN in its value has NaN for its log-determinant, and no other row has."""
    nan = out.isnan()
    if out.dim() > log_det.dim():
        nan = nan.flatten(log_det.dim()).any(-1)
    return torch.where(nan, torch.nan, log_det)


class Entry:
    """One evaluation: input, output (weakly held), log-determinant, and what makes them valid.

    It is found only through the output: whoever holds that holds its graph, so nothing is kept
    alive for the memory's sake. A backward pass through the evaluation ends the entry: its graph
    may be freed, and a parameter update is near (also one through ``.data``, which leaves no other
    trace).
    """

    __slots__ = (
        "input",
        "output",
        "log_det",
        "is_inverse",
        "grad",
        "mode",
        "state",
        "tensors",
        "stamp",
        "alive",
    )

    def __init__(
        self, owner: Any, value: Tensor, out: Tensor, log_det: Tensor, inverse: bool
    ) -> None:
        self.input, self.log_det, self.is_inverse = value, log_det, inverse
        self.grad = torch.is_grad_enabled()
        self.mode = owner.training
        self.state = _state(value, out, owner._context)
        self.tensors = _all_tensors(owner)  # strong, so that no id is used twice
        self.stamp = _stamp(self.tensors)
        self.alive = alive = [True]
        for node in {out.grad_fn, log_det.grad_fn} - {None, value.grad_fn}:
            node.register_prehook(lambda grads: alive.clear())
        owner_ref = weakref.ref(owner)

        def forget(reference: "weakref.ref[Tensor]") -> None:
            module = owner_ref()
            entry = None if module is None else module._entry
            if module is not None and entry is not None and entry.output is reference:
                module.__dict__["_entry"] = None

        self.output = weakref.ref(out, forget)

    def input_of(self, owner: Any, out: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
        """Return what ``out`` was made from, and the log-determinant of the way back, if known."""
        if self.is_inverse == inverse or self.output() is not out or not self._valid(owner, out):
            return None
        return self.input, -self.log_det

    def log_det_of(self, owner: Any, x: Tensor, y: Tensor) -> Tensor | None:
        """Return log|det dy/dx| if (x, y) is the pair of this entry."""
        out = self.output()
        value, other = (y, x) if self.is_inverse else (x, y)
        if out is None or self.input is not value or out is not other:
            return None
        if not self._valid(owner, out):
            return None
        return -self.log_det if self.is_inverse else self.log_det

    def _valid(self, owner: Any, out: Tensor) -> bool:
        if not self.alive or (torch.is_grad_enabled() and not self.grad):
            return False
        if self.mode != owner.training or self.state != _state(self.input, out, owner._context):
            return False
        return self.stamp == _stamp(_all_tensors(owner))


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Yield every parameter and buffer below ``module``, several times faster than torch does."""
    stack = [module]
    while stack:
        inner = stack.pop().__dict__
        for tensor in inner["_parameters"].values():
            if tensor is not None:
                yield tensor
        for tensor in inner["_buffers"].values():
            if tensor is not None:
                yield tensor
        stack.extend(child for child in inner["_modules"].values() if child is not None)


def _all_tensors(module: nn.Module) -> list[Tensor]:
    """What :func:`tensors_of` yields, in half of its time: every call and log-density asks."""
    found: list[Tensor | None] = []
    stack: list[nn.Module | None] = [module]
    while stack:
        inner = stack.pop()
        if inner is None:
            continue
        held = inner.__dict__
        for name in ("_parameters", "_buffers"):
            if held[name]:
                found.extend(held[name].values())
        if held["_modules"]:
            stack.extend(held["_modules"].values())
    return [tensor for tensor in found if tensor is not None]


def _stamp(tensors: Any) -> list[tuple[int, int, bool]]:
    return [(id(t), _version(t), t.requires_grad) for t in tensors]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _state(*tensors: Tensor | None) -> list[tuple[int, bool]]:
    known = [t for t in tensors if t is not None]
    return [(-1 if t.is_inference() else t._version, t.requires_grad) for t in known]
