"""The numbers of a distribution or transform that is no module, as buffers and parameters."""

import copy
import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import _InverseTransform
from torch.distributions.utils import lazy_property

__all__ = ["Constants"]

_CONTAINERS = (list, dict)  # a union of types is more than torch.compile reads


class Constants(nn.Module):
    """What a distribution or transform is made of, where ``state_dict`` and ``.to()`` see it.

    The object is copied, so that nothing outside changes with it. Its tensors become buffers;
    parameters, and leaves that require gradients, stay those that they are and become parameters;
    modules are shared. :meth:`bind` returns the copy with the present tensors. Plain numbers of
    transforms are saved and loaded too. Nesting is followed through distributions, transforms,
    constraints, lists and dicts.

    Args:
        thing: The distribution or transform.

    Raises:
        ValueError: If one of its tensors was computed from parameters, whose training it would not
            follow.
    """

    def __init__(self, thing: Any) -> None:
        super().__init__()
        # holder, its key or attribute, name here, shape there
        self._slots: list[tuple[Any, Any, str, torch.Size]] = []
        self._numbers: list[tuple[Any, str, str]] = []
        self._made: list[Distribution] = []
        self._names: dict[int, str] = {}  # a tensor that is held twice is one buffer
        self._kind = type(thing).__name__
        self.__dict__["thing"] = self._copy(thing, "", {})
        del self._names

    def bind(self) -> Any:
        """Return the object with the tensors that this module holds now."""
        changed = False
        for holder, key, name, shape in self._slots:
            tensor: Any = self._parameters.get(name)
            if tensor is None:
                tensor = self._buffers[name]
            elif tensor.shape != shape:
                tensor = tensor.expand(shape)
            if isinstance(holder, _CONTAINERS):
                if holder[key] is not tensor:
                    holder[key], changed = tensor, True
            elif getattr(holder, key) is not tensor:
                setattr(holder, key, tensor)
                changed = True
        if changed and not torch.compiler.is_compiling():
            self._forget()
        return self.__dict__["thing"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Constants":
        super()._apply(fn, recurse)
        self.bind()  # leaves nothing behind on the old device
        return self

    def _forget(self) -> None:
        """Drop what distributions computed from their parameters when they were asked."""
        for made in self._made:
            held = vars(made)
            # of probabilities and log-odds one was given, and not every class says which
            given = held.get("_param", held.get("probs", held.get("logits")))
            for name in [n for n in held if n in _lazy_names(type(made))]:  # type: ignore[arg-type]
                if held[name] is not given:
                    del held[name]

    def _copy(self, thing: Any, name: str, done: dict[int, Any]) -> Any:
        if id(thing) in done:
            return done[id(thing)][0]
        if isinstance(thing, _InverseTransform):
            new = self._copy(thing.inv, name, done).inv
        elif isinstance(thing, nn.Module):
            new = thing
            self.add_module(_free(self, name or "module"), thing)
            if isinstance(vars(thing).get("_context"), Tensor):
                self._keep(thing, "_context", f"{name}_context")
        elif isinstance(thing, Distribution | Transform | Constraint | list | dict):
            new = copy.copy(thing)
            done[id(thing)] = new, thing  # the original too, so that its id is not used again
            if isinstance(new, Distribution):
                self._made.append(new)
                self._forget()
            self._fill(new, name, done)
        else:
            return thing
        done[id(thing)] = new, thing
        return new

    def _fill(self, holder: Any, name: str, done: dict[int, Any]) -> None:
        place = _place(holder)
        for key, value in list(enumerate(place) if isinstance(place, list) else place.items()):
            inner = f"{name}_{key}".strip("_")
            if key == "_cached_x_y":
                place[key] = (None, None)
            elif isinstance(value, Tensor):
                self._keep(holder, key, inner)
            elif isinstance(holder, Transform) and _is_number(key, value):
                self._numbers.append((holder, key, _free(self, inner)))
            else:
                place[key] = self._copy(value, inner, done)

    def _keep(self, holder: Any, key: Any, name: str) -> None:
        place = _place(holder)
        value = place[key]
        known = self._names.get(id(value))
        if known is None:
            known = self._names[id(value)] = _free(self, name.strip("_"))
            if not value.requires_grad:
                self.register_buffer(
                    known, value.detach().clone(memory_format=torch.contiguous_format)
                )
            else:
                self._parameters[known] = self._leaf(value, known)  # type: ignore[assignment]
        self._slots.append((holder, key, known, value.shape))

    def _leaf(self, value: Tensor, name: str) -> Tensor:
        leaf = value if value.is_leaf else _expanded(value)
        if leaf is None:
            raise ValueError(
                f"{self._kind}: its {name} was computed from parameters and would not follow "
                "them. Pass the module that makes the distribution (a flow itself, or one of "
                "pyroflows.bases), or detach the tensor"
            )
        return leaf

    def __getstate__(self) -> dict[str, Any]:
        for holder, key, name, _ in self._slots:  # no tensor with a graph
            tensor = self._parameters.get(name)
            _place(holder)[key] = self._buffers[name] if tensor is None else tensor
        self._forget()
        return self.__dict__.copy()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for place, key, name in self._numbers:
            destination[prefix + name] = torch.tensor(vars(place)[key], dtype=torch.float64)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        for place, key, name in self._numbers:
            if prefix + name in state_dict:
                vars(place)[key] = state_dict[prefix + name].item()
                if prefix + name in unexpected:
                    unexpected.remove(prefix + name)
            elif strict:
                missing.append(prefix + name)
        self._forget()


def _place(holder: Any) -> Any:
    return holder if isinstance(holder, _CONTAINERS) else vars(holder)


@functools.cache
def _lazy_names(kind: type) -> frozenset[str]:
    """Attributes that the class computes when asked, and keeps."""
    return frozenset(
        n for n in dir(kind) if isinstance(inspect.getattr_static(kind, n, None), lazy_property)
    )


def _is_number(key: str, value: Any) -> bool:
    """Whether a transform's attribute is a number of the map, rather than a count of axes."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return isinstance(value, float) or key in ("loc", "scale", "exponent")


def _free(module: nn.Module, name: str) -> str:
    """A name that the module does not use yet."""
    taken = {*module._buffers, *module._parameters, *module._modules, *vars(module)}
    taken |= {known for *_, known in getattr(module, "_numbers", ())}
    candidate, n = name, 2
    while candidate in taken or hasattr(nn.Module, candidate):
        candidate, n = f"{name}_{n}", n + 1
    return candidate


def _expanded(value: Tensor) -> Tensor | None:
    """The leaf that ``value`` is, or shows expanded, as distributions do with parameters."""
    leaf = value._base
    if leaf is None or not leaf.is_leaf:
        return None
    try:
        shown = leaf.detach().expand(value.shape)
    except RuntimeError:
        return None
    same = shown.stride() == value.stride() and shown.data_ptr() == value.data_ptr()
    return leaf if same else None
