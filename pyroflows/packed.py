"""Parameters as parts of one vector: one message in Pyro, one slot of the optimizer.

Pyro pays for each parameter tensor at each step (a message, an entry of the store, an optimizer
group), so a flow of thirty small tensors spends more on bookkeeping than on arithmetic.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.bijection import Bijection

__all__ = ["Packed"]

_LENDING = threading.RLock()  # while a vector is lent the modules are not another thread's


@dataclass(frozen=True)
class _Group:
    """Parameters of one unit, which lie side by side in the vector.

    Attributes:
        unit: What 1 in the vector is worth in the parameters.
        owners: For each parameter the modules that hold it, with its name there; tied parameters
            have several.
        shapes: Their shapes.
        sizes: Their numbers of elements.
    """

    unit: float
    owners: list[list[tuple[nn.Module, str]]]
    shapes: list[torch.Size]
    sizes: list[int]

    @property
    def size(self) -> int:
        return sum(self.sizes)


class Packed(Bijection):
    r"""A bijection whose parameters are parts of one vector.

    The map is the bijection's, :math:`f(x; c)` with :math:`\theta = (s_1 v_1, s_2 v_2, \dots)`,
    where v is the vector and s the units. Buffers and frozen parameters stay where they are. The
    cost is the bijection's, and a few microseconds for each parameter.

    Args:
        bijection: Any bijection, with or without context. Its floating-point parameters that
            require gradients move out of it, so that by itself it can no longer be called.
        units: What 1 in the vector is worth in the parameters of a module inside; 1 where it says
            nothing. An optimizer with one learning rate moves those parameters so much less.

    Attributes:
        vector: The parameter, shape ``(P,)``; None if the bijection has none.
        initial: Its value at the start, shape ``(P,)``, which no state holds; None as well.

    Raises:
        ValueError: If the parameters are not of one dtype on one device.
    """

    initial: Tensor
    vector: nn.Parameter

    def __init__(
        self, bijection: Bijection, *, units: Mapping[nn.Module, float] | None = None
    ) -> None:
        super().__init__(bijection.event_shape, context_dim=bijection.context_dim)
        self.bijection = bijection
        self.groups, found = _take_out(bijection, units or {})
        initial = torch.cat(found) if found else None
        self.register_buffer("initial", initial, persistent=False)
        vector = None if initial is None else nn.Parameter(initial.clone())
        self.register_parameter("vector", vector)

    # ------------------------------------------------------------------------- the vector

    def at(self, vector: Tensor | Sequence[Tensor]) -> "Packed":
        """The bijection at another vector, ``(P,)``, or one part for each unit.

        A view that shares everything else; gradients go to what is given.
        """
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view.__dict__.update(_entry=None, _inverse_ref=None)
        parameters = {k: p for k, p in self._parameters.items() if k != "vector"}
        view.__dict__["_parameters"] = parameters
        if isinstance(vector, Tensor):
            parameters["vector"] = vector
        else:
            parameters.update({f"part_{i}": part for i, part in enumerate(vector)})
        return view

    def release(self) -> nn.Parameter:
        """Give the vector away, to be a parameter of something else; :meth:`at` takes it back."""
        vector = self.vector
        del self.vector
        return vector

    def leaves(self, vector: Tensor) -> list[tuple[Tensor, float]]:
        """The vector's parts as an optimizer takes them, one for each unit, and the units.

        Leaves that share the vector's memory: what moves them moves it. A rate of ``lr / unit``
        for each is ``lr`` in the parameters themselves.
        """
        parts = vector.detach().split([group.size for group in self.groups])
        units = [group.unit for group in self.groups]
        return [(p.requires_grad_(), unit) for p, unit in zip(parts, units, strict=True)]

    def parts_of(self, module: nn.Module, vector: Tensor) -> list[Tensor]:
        """The pieces of ``vector`` that hold the parameters of a module inside.

        In units of the vector; they share its memory.
        """
        inside, found = set(module.modules()), []
        for group, part in zip(self.groups, self._split(vector), strict=True):
            pieces = part.split(group.sizes)
            for piece, shape, owners in zip(pieces, group.shapes, group.owners, strict=True):
                if any(owner in inside for owner, _ in owners):
                    found.append(piece.view(shape))
        return found

    def _split(self, vector: Tensor) -> Sequence[Tensor]:
        return vector.split([group.size for group in self.groups])

    def _current(self) -> Sequence[Tensor]:
        """The vector's parts, one for each unit."""
        held = self._parameters
        vector = held.get("vector")
        if vector is not None:
            return self._split(vector)
        parts = [held.get(f"part_{i}") for i in range(len(self.groups))]
        if any(part is None for part in parts):
            raise RuntimeError("Packed: the vector was given away; call .at(vector) first")
        return parts

    @contextmanager
    def _lent(self) -> Iterator[None]:
        """Put the vector's parts where the parameters were."""
        with _LENDING:
            try:
                for group, part in zip(self.groups, self._current(), strict=True):
                    theta = part if group.unit == 1.0 else part * group.unit
                    pieces = theta.split(group.sizes)
                    for piece, shape, owners in zip(
                        pieces, group.shapes, group.owners, strict=True
                    ):
                        value = piece.view(shape)
                        for inner, name in owners:
                            inner.__dict__[name] = value
                yield
            finally:
                for group in self.groups:
                    for owners in group.owners:
                        for inner, name in owners:
                            inner.__dict__.pop(name, None)

    # ------------------------------------------------------------------------- the bijection

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        with self._lent():
            return self.bijection._forward_and_log_det(x, context)

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        with self._lent():
            return self.bijection._inverse_and_log_det(y, context)

    @property
    def calls(self) -> tuple[float, float]:
        """Those of the bijection."""
        return self.bijection.calls

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """That of the bijection."""
        return self.bijection.domain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """That of the bijection."""
        return self.bijection.codomain

    @property
    def sign(self) -> int:
        """Sign of the determinant, where the bijection has one."""
        return self.bijection.sign

    def _image(
        self, support: constraints.Constraint, inverse: bool = False
    ) -> constraints.Constraint:
        with self._lent():
            return self.bijection._image(support, inverse)

    def _event_dim(self, inverse: bool) -> int:
        return self.bijection._event_dim(inverse)

    def _map_shape(self, shape: torch.Size, inverse: bool) -> torch.Size:
        return self.bijection._map_shape(shape, inverse)


def _take_out(
    module: nn.Module, units: Mapping[nn.Module, float]
) -> tuple[list[_Group], list[Tensor]]:
    """Take the parameters out of a module: where they were, and their values over their units."""
    unit_of = {inner: unit for outer, unit in units.items() for inner in outer.modules()}
    owners: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for inner in module.modules():
        for name, own in list(inner._parameters.items()):
            if own is not None and own.requires_grad and own.is_floating_point():
                owners.setdefault(own, []).append((inner, name))
    kinds = {(p.dtype, p.device) for p in owners}
    if len(kinds) > 1:
        raise ValueError(
            "Packed expects parameters of one dtype on one device; got "
            f"{sorted(map(str, kinds))}. Convert the bijection first, e.g. with .float()"
        )
    by_unit: dict[float, list[Tensor]] = {}
    for p, held in owners.items():
        by_unit.setdefault(unit_of.get(held[0][0], 1.0), []).append(p)
        for inner, name in held:
            del inner._parameters[name]
    groups = [
        _Group(unit, [owners[p] for p in ps], [p.shape for p in ps], [p.numel() for p in ps])
        for unit, ps in by_unit.items()
    ]
    values = [p.detach().reshape(-1) / unit for unit, ps in by_unit.items() for p in ps]
    return groups, values
