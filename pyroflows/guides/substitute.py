"""The messenger that runs a model at given latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyroflows.guides.messages import is_discrete
from pyroflows.guides.sites import onto_support, place

__all__ = ["Substitute", "outside_of_plates"]


class Substitute(Messenger):
    """Run a model at given latents; record their supports, values and log-densities.

    Args:
        latents: Unconstrained values of some latents.
        given: Constrained values of others.
        rows: The rows that some subsampled plates take.
        nesting: Plate dimensions of the model, to the left of which lies a batch: then
            log-densities are added up. None if they are not wanted.
        enumerates: Whether discrete latents are marked for parallel enumeration, and only
            Jacobians are added up: a trace has the densities.
        free: For some latents the entries on which nothing depends, whose Jacobians do not count.
        onto: The transform onto a support.

    Attributes:
        values: Constrained value of each latent that was met.
        supports: Support of each.
        log_dets: log|det| of constraining each of ``latents``, in the shape of its batch.
        total: The log-density so far, Jacobians included; shape ``(*batch)`` or ``()``.
        jacobian: What Jacobians add to it.
    """

    def __init__(
        self,
        latents: Mapping[str, Tensor] | None = None,
        given: Mapping[str, Tensor] | None = None,
        *,
        rows: Mapping[str, Tensor] | None = None,
        nesting: int | None = None,
        enumerates: bool = False,
        free: Mapping[str, Tensor] | None = None,
        onto: Callable[[Any], Any] = onto_support,
    ) -> None:
        super().__init__()
        self.latents, self.given, self.rows = latents or {}, given or {}, rows or {}
        self.nesting, self.enumerates = nesting, enumerates
        self.free, self.onto = free or {}, onto
        self.values: dict[str, Tensor] = {}
        self.supports: dict[str, Any] = {}
        self.log_dets: dict[str, Tensor] = {}
        self.total: Tensor | float = 0.0
        self.jacobian: Tensor | float = 0.0

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name, fn = msg["name"], msg["fn"]
        if site_is_subsample(msg):
            if name in self.rows:
                msg["value"] = self.rows[name]
        elif msg["is_observed"]:
            return
        elif name in self.latents:
            self.supports[name] = support = fn.support
            value, log_det = place(
                self.latents[name], self.onto(support), fn.event_dim, self.free.get(name)
            )
            msg["value"] = self.values[name] = value
            self.log_dets[name] = log_det
            if self.nesting is not None:
                log_det = self._summed(log_det, self.nesting)
                self.total, self.jacobian = self.total + log_det, self.jacobian + log_det
        elif name in self.given:
            msg["value"] = self.values[name] = self.given[name]
            self.supports[name] = fn.support
        elif self.enumerates and is_discrete(msg):
            msg["infer"] = {**msg["infer"], "enumerate": "parallel"}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if self.nesting is None or self.enumerates or site_is_subsample(msg):
            return
        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        log_prob = scale_and_mask(log_prob, msg["scale"], msg["mask"])
        self.total = self.total + self._summed(log_prob, self.nesting)

    @staticmethod
    def _summed(terms: Tensor, nesting: int) -> Tensor:
        """Sum over the plates: what lies to the left of them is the batch."""
        n = terms.dim() - nesting
        if n <= 0:
            return terms.sum()
        return terms.flatten(n).sum(-1) if nesting else terms


@contextmanager
def outside_of_plates() -> Iterator[None]:
    """The model finds for its plates the dimensions that it has by itself."""
    taken, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack = taken
