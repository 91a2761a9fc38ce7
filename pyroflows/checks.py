"""What is refused, in the name of its owner: kinds, shapes and dtypes of values and contexts."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["broadcast_batch", "check_context", "check_kind", "check_value", "users_line"]


def users_line() -> int:
    """The ``stacklevel`` at which a warning points at the call from outside, past decorators."""
    frame, level = inspect.currentframe(), 0
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in ("pyroflows", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def check_value(owner: str, value: Any, event_dim: int, expected: Sequence[int] | None) -> None:
    """Refuse what is no floating-point tensor of shape ``(*batch, *event)``.

    Args:
        owner: What the error calls it.
        value: What was given.
        event_dim: Axes of an event.
        expected: Shape of an event; any if None.

    Raises:
        TypeError: If ``value`` is no tensor, or not of floating-point numbers.
        ValueError: If its shape does not end in an event.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{owner} expects a tensor; got {type(value).__name__}. "
            "Convert it, e.g. torch.as_tensor(x)"
        )
    if not value.is_floating_point():
        raise TypeError(
            f"{owner} expects floating-point values; got {value.dtype}. "
            "Convert them, e.g. x.float()"
        )
    given = value.shape[max(0, value.dim() - event_dim) :]
    if len(given) < event_dim or (expected is not None and given != expected):
        want = ["..."] + ([str(n) for n in expected] if expected else ["*"] * event_dim)
        raise ValueError(
            f"{owner} expects values of shape ({', '.join(want)}); got {tuple(value.shape)}"
        )


def check_kind(owner: str, own: Tensor, what: str, given: Tensor) -> None:
    """Refuse a tensor of another dtype or on another device than the owner's, but by autocast."""
    if own.dtype == given.dtype and own.device == given.device:
        return
    same = own.device == given.device and torch.float64 not in (own.dtype, given.dtype)
    if same and torch.is_autocast_enabled(given.device.type):  # it leaves float64 alone
        return
    raise ValueError(
        f"{owner} has parameters of {own.dtype} on {own.device}; got {what} of {given.dtype} on "
        f"{given.device}. Convert one of them, e.g. with .to({what})"
    )


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


def broadcast_batch(owner: str, batch: torch.Size, context: Tensor) -> torch.Size:
    """Return the common batch shape of values and of a context, ``(*batch, context_dim)``.

    Raises:
        ValueError: If they do not broadcast.
    """
    try:
        return torch.broadcast_shapes(batch, context.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{owner}: a batch {tuple(batch)} of values does not broadcast with "
            f"a context of shape {tuple(context.shape)}"
        ) from None
