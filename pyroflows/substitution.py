"""A module with other values in the places of some parameters: draws, or what a handler gave."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["draws_of", "has_draws", "substituted"]


def has_draws(module: nn.Module) -> bool:
    """Whether anything below a module is a :class:`~pyro.nn.PyroSample`.

    A plain walk, several times faster than ``modules()``: every call of a flow asks.
    """
    stack: list[nn.Module | None] = [module]
    while stack:
        inner = stack.pop()
        if inner is not None:
            held = inner.__dict__
            if held.get("_pyro_samples"):
                return True
            stack.extend(held["_modules"].values())
    return False


def draws_of(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Draw every :class:`~pyro.nn.PyroSample` below a module, each a site of its own.

    To be called where Pyro's names are known: while the module, or the one that holds it, is
    called.

    Raises:
        ValueError: If plates made several draws of one.
    """
    found: list[tuple[nn.Module, str, Tensor]] = []
    if not has_draws(module):
        return found
    for inner in module.modules():
        for name, prior in inner.__dict__.get("_pyro_samples", {}).items():
            value = getattr(inner, name)
            if hasattr(prior, "shape") and value.shape != prior.shape():
                raise ValueError(
                    f"{name!r} of {type(inner).__name__} was drawn with shape "
                    f"{tuple(value.shape)} from a prior of shape {tuple(prior.shape())}: a flow "
                    "takes one draw of its weights at a time. Call the flow outside of plates, "
                    "d = flow(), and use d in them; use no vectorized particles"
                )
            found.append((inner, name, value))
    return found


def substituted(
    module: nn.Module,
    values: Mapping[Tensor, Tensor],
    draws: list[tuple[nn.Module, str, Tensor]] | None = None,
) -> Any:
    """Return a view of a module that reads other tensors; all else is shared.

    Args:
        module: The module; itself is returned where there is nothing to replace.
        values: The tensor to read in place of each parameter.
        draws: What :func:`draws_of` drew.

    Raises:
        ValueError: If a value has not the shape of its parameter.
    """
    for old, new in values.items():
        if new.shape != old.shape:
            raise ValueError(
                f"a parameter of shape {tuple(old.shape)} was given a value of shape "
                f"{tuple(new.shape)}: a flow takes one draw of its weights at a time. Give the "
                "prior the parameter's shape, .expand(shape).to_event(), and use no vectorized "
                "particles"
            )
    by_id = {id(old): new for old, new in values.items()}
    by_owner: dict[int, dict[str, Tensor]] = {}
    for owner, name, value in draws or ():
        by_owner.setdefault(id(owner), {})[name] = value
    return _view(module, by_id, by_owner, {}) if by_id or by_owner else module


def _view(
    module: nn.Module,
    values: dict[int, Tensor],
    draws: dict[int, dict[str, Tensor]],
    done: dict[int, nn.Module],
) -> nn.Module:
    if id(module) not in done:
        children = {
            name: child if child is None else _view(child, values, draws, done)
            for name, child in module._modules.items()
        }
        parameters = {name: values.get(id(p), p) for name, p in module._parameters.items()}
        drawn = draws.get(id(module), {})
        same = all(child is module._modules[name] for name, child in children.items())
        same = same and all(p is module._parameters[name] for name, p in parameters.items())
        view = module
        if drawn or not same:
            view = object.__new__(type(module))
            view.__dict__.update(module.__dict__)
            for memory in ("_entry", "_inverse_ref"):
                view.__dict__.pop(memory, None)
            view.__dict__.update(
                _modules=children, _parameters={**parameters, **drawn}, _substituted=True
            )
            if drawn:
                view.__dict__["_pyro_samples"] = {}
        done[id(module)] = view
    return done[id(module)]
