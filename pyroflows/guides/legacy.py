"""Guides as earlier versions saved them: their states and pickles become what guides hold now.

They had one class for the packed flow, the affine map and the fixed map, with a vector of the
flow's parameters, b, log diag A, and the rest of A row by row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.guides.plates import PlateSizes
from pyroflows.guides.sites import Site, Sites

__all__ = [
    "PackedParameters",
    "Transport",
    "upgrade_layouts",
    "upgrade_pickle",
    "upgrade_state",
]

_RENAMED = {
    "transport.loc": "transport.parts.1.loc",
    "transport.scale": "transport.parts.1.scale",
    "transport.base_weights": "noise.log_weights",
    "transport.base_locs": "noise.locs",
    "transport.base_scales": "noise.scale_trils",
}


class PackedParameters:
    """Where the parameters of a pickled flow were: ``slots``, with ``shapes`` and ``sizes``."""

    slots: list[list[tuple[nn.Module, str]]]
    shapes: list[tuple[int, ...]]

    def put_back(self) -> None:
        """Give the flow its parameters again, empty."""
        for owners, shape in zip(self.slots, self.shapes, strict=True):
            parameter = nn.Parameter(torch.zeros(shape))
            for inner, name in owners:
                setattr(inner, name, parameter)


class Transport(nn.Module):
    """The map of a pickled guide; see :func:`upgrade_pickle`."""

    flow: Any
    parts: PackedParameters
    initial: Tensor
    loc: Tensor
    scale: Tensor
    full_rank: bool


def upgrade_state(state: dict[str, Any], prefix: str = "") -> None:
    """Rename the entries of an earlier guide's state in place, and reorder its vector."""
    if f"{prefix}transport.loc" not in state:
        return
    scale = state[f"{prefix}transport.scale"]
    if f"{prefix}packed" in state:
        state[f"{prefix}packed"] = _reordered(state[f"{prefix}packed"], len(scale), scale.dim())
    for key in [k for k in state if k.startswith(f"{prefix}transport.")]:
        old = key[len(prefix) :]
        inner = old.replace("transport.flow.", "transport.parts.0.bijection.parts.0.", 1)
        state[prefix + _RENAMED.get(old, inner)] = state.pop(key)


def upgrade_layouts(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a pickled guide, whatever version wrote it."""
    supports = state.get("_model_supports")
    local = state["_modules"].get("local")
    if local is not None and not isinstance(local.sites, Sites):
        local.sites = Sites(Site.of(message) for message in local.sites.values())
    if supports is not None:
        state = {**state, "_nesting": supports.nesting}
    dropped = ("_model_supports", "local_sites")
    kept = {name: value for name, value in state.items() if name not in dropped}
    return {**kept, "_plate_sizes": PlateSizes()}


def upgrade_pickle(
    state: dict[str, Any], make: Callable[[nn.Module, Tensor, bool], dict[str, nn.Module]]
) -> None:
    """Put today's modules in the place of a pickled :class:`Transport`.

    Args:
        state: The attributes of the guide; changed in place.
        make: Callable ``(flow, loc, full_rank)`` that makes the guide's modules from the flow.
    """
    old = state["_modules"].get("transport")
    if not isinstance(old, Transport):
        return
    old.parts.put_back()
    modules = make(old.flow, old.loc, old.full_rank)
    transport: Any = modules["transport"]
    entries = {f"transport.{name}": buffer for name, buffer in old.named_buffers(recurse=False)}
    upgrade_state(entries)
    for name in ("loc", "scale"):
        getattr(transport[1], name).copy_(entries[f"transport.parts.1.{name}"])
    noise = {k.removeprefix("noise."): v for k, v in entries.items() if k.startswith("noise.")}
    modules["noise"].load_state_dict(noise)
    dim, rank = len(old.loc), old.scale.dim()
    transport[0].initial = _reordered(old.initial, dim, rank)
    state["_modules"] = {**state["_modules"], **modules}
    packed = _reordered(state["_parameters"]["packed"].detach(), dim, rank)
    state["_parameters"] = {**state["_parameters"], "packed": nn.Parameter(packed)}


def _reordered(vector: Tensor, dim: int, rank: int) -> Tensor:
    """b, log-diagonal, rest to b, triangle row by row; a diagonal's order is the same."""
    if rank == 1:
        return vector
    size = dim * (dim - 1) // 2
    kept, log_diag, rest = vector.split([len(vector) - dim - size, dim, size])
    matrix = vector.new_zeros(dim, dim)
    rows, columns = torch.tril_indices(dim, dim, -1, device=vector.device)
    matrix[rows, columns] = rest
    matrix = matrix + log_diag.diag()
    return torch.cat([kept, matrix[*torch.tril_indices(dim, dim, device=vector.device)]])
