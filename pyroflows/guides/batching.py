"""A log-density of one vector, evaluated at many: by the model's own way, in pieces."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Self

import torch
from torch import Tensor

from pyroflows.guides.routes import (
    Failures,
    gathered,
    largest_tensor,
    one_by_one,
)
from pyroflows.training.seeds import preserved, seeded

__all__ = ["BUDGET", "BatchedDensity", "Route"]

BUDGET = 2**23  #: elements of the largest tensor of a batch that is evaluated without gradients


class Route(StrEnum):
    """How a function of one vector, ``(D,)``, is evaluated at many, ``(S, D)``; fastest first."""

    NATIVE = "native"  #: it takes a batch itself
    VMAP = "vmap"
    ONE_BY_ONE = "one by one"

    def batched(
        self, function: Callable[[Tensor], Any], *, rewinds: bool = False
    ) -> Callable[[Tensor], Any]:
        """``function`` on many vectors, which see the same random numbers.

        Args:
            function: Gives tensors in any containers.
            rewinds: Whether it uses any, so that they must be given back between calls.
        """
        if self is Route.NATIVE:
            return function
        if self is Route.VMAP:
            return torch.vmap(function, randomness="same")
        return one_by_one(function, rewinds=rewinds)


class BatchedDensity:
    """A log-density of one flat vector, and everything that evaluates it at many.

    A subclass gives :meth:`log_density` of one vector, which may take a batch as well, and sets
    ``init_loc`` and ``dim``. The route of a batch is decided at the first, on three points whose
    values must agree with single runs. Batches are cut so that no tensor grows beyond a budget,
    where no gradient is taken.

    Attributes:
        init_loc: A vector to begin from; shape ``(D,)``.
        dim: Its length.
        failures: Points at which the function raised, so far.
        seed: Seed of every call; None for the running random states.
    """

    init_loc: Tensor
    dim: int

    def __init__(self) -> None:
        self.failures = Failures()
        self.seed: int | None = None
        self._route: Route | None = None
        self._size: int | None = None
        self._stochastic: bool | None = None

    def log_density(self, u: Tensor) -> Tensor:
        """Log-density at ``(D,)``, or natively at ``(S, D)``; raises where the model does."""
        raise NotImplementedError

    @property
    def takes_batches(self) -> bool:
        """Whether it may take a batch natively; tried before it is believed."""
        return True

    @property
    def route(self) -> Route:
        """How a batch is evaluated."""
        if self._route is None:
            self._route = self._choose(list(Route))
        return self._route

    @property
    def vectorizes(self) -> bool:
        """Whether the model itself takes a batch of latents to the left of its plates."""
        return self.route is Route.NATIVE

    @property
    def stochastic(self) -> bool:
        """Whether its value is random, by any generator."""
        if self._stochastic is None:
            with preserved(), self._uncounted(), torch.no_grad():
                runs = torch.stack([self._alone(self.init_loc) for _ in range(4)])
            same = runs.eq(runs[0]) | (runs.isnan() & runs[0].isnan())
            self._stochastic = not bool(same.all())
        return self._stochastic

    @property
    def batch_size(self) -> int:
        """Points that are evaluated at once where no gradient is taken."""
        if self._size is None:
            with preserved(), self._uncounted():
                numel = largest_tensor(lambda: self._alone(self.init_loc))
            self._size = max(1, BUDGET // numel)
        return self._size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self._size = size

    def frozen(self, seed: int = 0) -> Self:
        """The same function with one choice of subsamples for all calls; no random state."""
        if not self.stochastic:
            return self
        _ = self.route, self.batch_size  # decided once for both
        return self._with(seed=seed)

    def _with(self, **changes: Any) -> Self:
        """The same function with other attributes."""
        view = copy.copy(self)
        vars(view).update(changes)
        return view

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Points of our own that fail are not counted."""
        kept, self.failures = self.failures, Failures()
        try:
            yield
        finally:
            self.failures = kept

    def _alone(self, u: Tensor) -> Tensor:
        """Log-density at one point; NaN if the model raises there."""
        try:
            return self.log_density(u)
        except Exception as error:  # whatever it is: it costs this point, is counted and kept
            self.failures.add(error)
            return u.sum() * math.nan

    # -------------------------------------------------------------------------- the route

    def _choose(self, routes: list[Route]) -> Route:
        """The first of these routes that agrees with single runs."""
        trouble: str | None = "nothing"
        with preserved() as rewind, self._uncounted(), torch.no_grad():
            points, expected = self._probes(rewind)
            for route in routes:
                if route is Route.ONE_BY_ONE or (route is Route.NATIVE and not self.takes_batches):
                    continue
                trouble = self._disagreement(route, points, expected, rewind)
                if trouble is None:
                    return route
        warnings.warn(
            "the model cannot be run on a batch of latents: evaluating one particle at a time, "
            f"which is slow. torch.vmap says: {trouble}. Let the model work with extra dimensions "
            "on the left of each latent ((X @ w[..., None])[..., 0] for X @ w, a[..., g] for a[g] "
            "outside of plates), without .item(), branches on values, or a random generator of "
            "its own",
            stacklevel=4,
        )
        return Route.ONE_BY_ONE

    def _disagreement(
        self, route: Route, points: Tensor, expected: Tensor, rewind: Callable[[], None]
    ) -> str | None:
        """How a batch differs from single runs; None if it does not."""
        tol = math.sqrt(torch.finfo(self.init_loc.dtype).eps)
        batched = route.batched(self.log_density)
        for part in (slice(None), slice(1, None)):  # two sizes: one may fit by accident
            rewind()
            try:
                found = batched(points[part])
            except Exception as error:  # whatever a model raises on a batch
                return f"{type(error).__name__}: {str(error).strip()[:200]}"
            if not torch.allclose(found, expected[part], rtol=tol, atol=tol, equal_nan=True):
                return "values differ from those of single runs"
        return None

    def _probes(self, rewind: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """Three distinct points near the start, at least two of finite density if need be."""
        generator = torch.Generator().manual_seed(5)
        z = torch.randn(3, self.dim, generator=generator, dtype=torch.float64).to(self.init_loc)
        for scale in (0.5, 0.1, 0.01, 1e-3):
            points = self.init_loc + scale * z
            values = []
            for point in points:
                rewind()
                values.append(self._alone(point))
            expected = torch.stack(values)
            fine = expected.isfinite()
            if fine.sum() >= 2:
                return points[fine], expected[fine]
        return points, expected

    # -------------------------------------------------------------------------- many points

    def __call__(self, u: Tensor) -> Tensor:
        """Log-density at ``u``; ``(*batch, D)`` to ``(*batch)``."""
        if u.shape[-1] != self.dim:
            raise ValueError(
                f"expected a latent vector of shape (..., {self.dim}); got {tuple(u.shape)}"
            )
        with seeded(self.seed):
            if u.dim() == 1:
                return self._alone(u)
            flat = u.reshape(-1, self.dim)
            return self._in_pieces(self._spared, flat).reshape(u.shape[:-1])

    def _in_pieces(
        self, function: Callable[[Tensor], Any], u: Tensor, *, same: bool = True
    ) -> Any:
        """``function`` on ``u``, ``(S, D)``, cut to the budget; the same randomness for all."""
        _ = self.route  # decided before any piece
        cut = len(u) > 1 and not (torch.is_grad_enabled() and u.requires_grad)
        pieces = u.split(self.batch_size) if cut else (u,)
        if len(pieces) == 1:
            return function(u)
        return gathered(function, pieces, torch.cat, rewinds=same and self.stochastic)

    def _spared(self, u: Tensor) -> Tensor:
        """Log-densities ``(S,)``, where one point that raises does not take others with it."""
        if len(u) == 1:
            return self._alone(u[0])[None]
        slow = self.route is Route.ONE_BY_ONE
        single = self._alone if slow else self.log_density
        try:
            return self.route.batched(single, rewinds=slow and self.stochastic)(u)
        except Exception as error:  # found by halves which points raise
            before, half = self.failures.count, len(u) // 2
            parts = torch.cat([self._spared(u[:half]), self._spared(u[half:])])
            if _out_of_memory(error):
                self._size = max(1, half)
            elif self.failures.count == before and self.route is not Route.ONE_BY_ONE:
                # no point raises by itself
                routes = list(Route)
                self._route = self._choose(routes[routes.index(self.route) + 1 :])
            return parts

    def _mapped(self, function: Callable[[Tensor], Any], u: Tensor, *, same: bool = True) -> Any:
        """``function`` of single points, tensors in any containers, at ``u``, ``(S, D)``.

        Every point sees the same random numbers if ``same``, else its own.
        """
        with seeded(self.seed):
            slow = one_by_one(function, rewinds=same and self.stochastic)
            if self.route is Route.ONE_BY_ONE:
                return self._in_pieces(slow, u, same=same)
            try:
                fast = torch.vmap(function, randomness="same" if same else "different")
                return self._in_pieces(fast, u, same=same)
            except Exception:  # native code that vmap does not know; what is wrong raises again
                return self._in_pieces(slow, u, same=same)

    def _natively(self, function: Callable[[Tensor], Any], u: Tensor) -> Any:
        """``function``, of points or of batches as the model is, at ``u``, ``(S, D)``."""
        return self._in_pieces(function, u) if self.vectorizes else self._mapped(function, u)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate" in str(error)
