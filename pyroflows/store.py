"""Names in Pyro's parameter store: who owns them, and what a saved store brings back.

Pyro's store holds parameters that are trained, and nothing else: buffers and frozen parameters
would be lost when it is saved. Here they are kept beside them, where the store keeps its
constraints: an entry ``name$$$`` that ``save``, ``load``, ``get_state``, ``set_state``, ``scope``
and ``clear`` carry along, and that no ``pyro.param`` asks for. So nothing that walks through the
store's parameters, such as an optimizer, meets them. In a file the entry is a plain dict of
tensors.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.params.param_store import normalize_param_name, param_with_module_name
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

__all__ = ["claim", "follow", "holds", "is_loaded", "register"]


class _Record:
    """What the store keeps of one owner beside its parameters.

    Copies and files hold a dict of tensors in its place, with the values of that moment.
    """

    def __init__(self, owner: nn.Module | None) -> None:
        self.owner = (lambda: None) if owner is None else weakref.ref(owner)
        # the store's dict; the store has another one once it was cleared, or cleared and set again
        self.home: Any = None
        self.params: dict[str, Tensor] = {}  # what the owner registered, by its key in the store
        self.held: dict[str, Tensor] = {}  # persistent buffers and frozen parameters, by path

    def __reduce__(self) -> tuple[Any, ...]:
        owner = self.owner()
        held = self.held if owner is None else _held(owner)
        return dict, ({path: tensor.detach() for path, tensor in held.items()},)


def claim(
    name: str, module: nn.Module, *, whole: bool = True, inherit: bool = True
) -> dict[str, Tensor]:
    """Make ``name`` in Pyro's store the module's, and take over what a loaded store holds for it.

    Parameters, frozen parameters and persistent buffers are taken over as ``load_state_dict``
    does. Parameters that were replaced in the module win over those that it had registered.
    Cost: one walk through the module.

    Args:
        name: The name, as ``pyro.module`` takes it.
        module: Its owner.
        whole: Whether the keys are those of ``pyro.module``, ``name$$$path``; else those of a
            :class:`~pyro.nn.PyroModule` whose attributes are registered one by one.
        inherit: Whether the module also takes over what an earlier owner of this process left, as
            Pyro's modules do, so that two living owners are an error. If not, only what was
            loaded; the name passes from one owner to the next, and two in one run are an error.

    Returns:
        The parameters that are trained, by their keys in the store.

    Raises:
        RuntimeError: If another living module owns the name, or what the store holds does not fit.
    """
    store = pyro.get_param_store()
    own = list(_own(name, module, whole))
    paths, params = {key: path for key, path, _ in own}, {key: p for key, _, p in own}
    record = _entry(name)
    if not isinstance(record, _Record) or record.owner() is not module:
        _check_owner(name, module, record, params, inherit)
        mine = _Record(module)
    else:
        mine = record
    foreign = {k: store._params[k] for k, p in params.items() if store._params.get(k, p) is not p}
    if mine is record:
        state = {paths[k]: v for k, v in foreign.items() if record.params.get(k) is not v}
    elif inherit or _was_loaded(record):
        state = {paths[k]: v for k, v in foreign.items()}
        if foreign or _was_loaded(record):
            state |= _values(record)
    else:
        state = {}
    _take_over(name, module, state)
    for key in foreign:
        _drop(key)
    mine.home, mine.held = store._constraints, _held(module)
    mine.params = {key: p for key, p in params.items() if p.requires_grad}
    store._constraints[_key(name)] = mine
    return mine.params


def register(
    name: str, module: nn.Module, *, whole: bool = True, inherit: bool = True
) -> dict[Tensor, Tensor]:
    """Claim the name, and tell Pyro of every parameter that is trained.

    ``pyro.module`` that also keeps buffers and does not warn about frozen parameters. Arguments
    and errors as in :func:`claim`.

    Returns:
        For each parameter that a handler, such as ``poutine.lift``, replaced: its value.
    """
    params = claim(name, module, whole=whole, inherit=inherit)
    values = {p: pyro.param(key, p) for key, p in params.items()}
    return {p: value for p, value in values.items() if value is not p}


def holds(key: str, parameter: Tensor) -> bool:
    """Whether the store's value of a key is this very parameter: nothing to claim then."""
    return pyro.get_param_store()._params.get(key) is parameter


def is_loaded(name: str) -> bool:
    """Whether the store holds something for ``name`` that no module has taken over yet."""
    record = _entry(name)
    return _was_loaded(record) and not (isinstance(record, _Record) and record.owner() is not None)


def follow(module: nn.Module) -> None:
    """Keep the buffers of a module whose parameters the store already holds under some name.

    For modules that were registered from outside, by ``pyro.module`` or as a plain attribute of a
    ``PyroModule``. The name is found through the first parameter; nothing happens where the store
    does not know it.
    """
    store = pyro.get_param_store()
    if not store._params:
        return
    parameter = next(module.parameters(), None)
    key = None if parameter is None else store._param_to_name.get(parameter)
    if key is None or store._params.get(key) is not parameter:
        return
    known = _entry(key.split("$$$")[0])
    if isinstance(known, _Record) and known.params.get(key) is parameter:
        return  # its owner takes care of it
    path, _ = next(module.named_parameters())
    name = normalize_param_name(key)
    if not name.endswith("." + path):
        return
    name = name[: -len(path) - 1]
    record = _entry(name)
    if not isinstance(record, _Record) or record.home is not store._constraints:
        _take_over(name, module, _values(record))
        record = store._constraints[_key(name)] = _Record(None)
        record.home = store._constraints
    record.held = _held(module)


def _key(name: str) -> str:
    return param_with_module_name(name, "")


def _entry(name: str) -> Any:
    return pyro.get_param_store()._constraints.get(_key(name))


def _was_loaded(record: Any) -> bool:
    """Whether the entry came by ``load`` or ``set_state``."""
    if isinstance(record, _Record):
        return record.home is not pyro.get_param_store()._constraints
    return record is not None


def _check_owner(
    name: str, module: nn.Module, record: Any, params: dict[str, Tensor], inherit: bool
) -> None:
    """Refuse a name whose living owner would share its parameters."""
    store = pyro.get_param_store()
    if not isinstance(record, _Record) or record.owner() is None:
        return
    if not any(store._params.get(key) is p for key, p in record.params.items()):
        return
    traces = [h.trace for h in _PYRO_STACK if isinstance(h, TraceMessenger)]
    if inherit or any(key in trace.nodes for trace in traces for key in params):
        raise RuntimeError(
            f"two modules use the name {name!r} in Pyro's param store and would share "
            f"parameters: give each its own, {type(module).__name__}(..., name=...), or make "
            "them attributes of a PyroModule; pyro.clear_param_store() forgets the first"
        )


def _own(name: str, module: nn.Module, whole: bool) -> Iterator[tuple[str, str, Tensor]]:
    """Key in the store, path in the module, and value, of every parameter of its own."""
    if whole:
        for path, p in module.named_parameters():
            if _is_own(p):
                yield param_with_module_name(name, path), path, p
        return
    managed = getattr(module, "_pyro_params", {})  # those Pyro keeps in step by itself
    for path, p in module.named_parameters(recurse=False):
        if _is_own(p) and path.removesuffix("_unconstrained") not in managed:
            yield f"{name}.{path}", path, p
    for child_name, child in module.named_children():
        below = _own(f"{name}.{child_name}", child, not isinstance(child, PyroModule))
        yield from ((key, f"{child_name}.{path}", p) for key, path, p in below)


def _is_own(p: Tensor) -> bool:
    """Whether it is the module's, and no value that a handler has put in the place of one."""
    return isinstance(p, nn.Parameter) or (p.is_leaf and p.requires_grad)


def _held(module: nn.Module) -> dict[str, Tensor]:
    """What ``state_dict`` would carry and Pyro's store does not."""
    held: dict[str, Tensor] = {}
    stack = [("", module)]
    while stack:
        prefix, inner = stack.pop()
        for name, p in inner._parameters.items():
            if isinstance(p, nn.Parameter) and not p.requires_grad:
                held[prefix + name] = p
        for name, buffer in inner._buffers.items():
            if buffer is not None and name not in inner._non_persistent_buffers_set:
                held[prefix + name] = buffer
        stack += [(f"{prefix}{n}.", m) for n, m in inner._modules.items() if m is not None]
    return held


def _values(record: Any) -> dict[str, Tensor]:
    if not isinstance(record, _Record):
        return record or {}
    owner = record.owner()
    return record.held if owner is None else _held(owner)


def _take_over(name: str, module: nn.Module, state: dict[str, Tensor]) -> None:
    if not state:
        return
    try:
        with torch.no_grad():
            unexpected = module.load_state_dict(state, strict=False).unexpected_keys
        reason = f"it has no {', '.join(unexpected)}" if unexpected else None
    except RuntimeError as error:
        reason = str(error)
    if reason:
        raise RuntimeError(
            f"what the param store holds for {name!r} does not fit this {type(module).__name__}: "
            f"{reason}. Give it a name of its own, name=..., or forget the old one: "
            "pyro.clear_param_store()"
        )


def _drop(key: str) -> None:
    store = pyro.get_param_store()
    store._param_to_name.pop(store._params.pop(key), None)
    store._constraints.pop(key, None)
