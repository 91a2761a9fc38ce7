"""A fitted table of numbers as a Pyro distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.density.engine import Engine

__all__ = ["TableDistribution"]


class TableDistribution(dist.TorchDistribution):
    r"""The joint density of number columns, in the table's order, as a distribution of vectors.

    Lattice columns have the density that their dequantized values have, point masses none.
    ``log_prob`` is differentiable in its argument almost everywhere (the histogram bins have
    steps); draws are exact, and not reparameterized.

    Args:
        engine: A fitted one without given columns and without label targets.
        batch_shape: Independent copies.

    Raises:
        ValueError: If a target is a label or a column is given.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(
        self,
        engine: Engine,
        batch_shape: Sequence[int] = (),
        *,
        validate_args: bool | None = None,
    ) -> None:
        columns = engine.schema.columns
        names = [columns[j].name for j in engine.order if columns[j].is_label]
        given = [columns[j].name for j in engine.order[: engine.num_given]]
        if names or given:
            raise ValueError(
                f"distribution() needs number targets and no given columns; "
                f"labels: {names}, given: {given}. "
                "Fit the wanted columns alone, e.g. DensityEstimator(target=[...], given=[])"
            )
        self.engine = engine
        super().__init__(
            torch.Size(batch_shape), torch.Size([len(columns)]), validate_args=validate_args
        )

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Real vectors, or the columns' bounds."""
        parts = [_between(*self.engine.bounds(j)) for j in range(self.event_shape[0])]
        if all(p is constraints.real for p in parts):
            return constraints.real_vector
        return constraints.stack(parts, dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, shape of the batch."""
        if self._validate_args:
            self._validate_sample(value)
        flat = value.reshape(-1, self.event_shape[0]).double().cpu()
        log_p = self.engine.smooth_log_prob(flat)
        return (
            log_p.view(value.shape[:-1])
            .to(value)
            .expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))
        )

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, shape (*sample_shape, *batch_shape, D), in torch's default dtype."""
        shape = self._extended_shape(torch.Size(sample_shape))
        blank = torch.full((shape[:-1].numel(), shape[-1]), torch.nan, dtype=torch.float64)
        generator = torch.default_generator
        drawn = self.engine.complete(blank, 1, generator=generator, lattice=False)[:, 0]
        return drawn.view(shape).to(torch.get_default_dtype())

    def expand(self, batch_shape: Any, _instance: Any = None) -> TableDistribution:
        """The same with another batch shape."""
        return type(self)(self.engine, torch.Size(batch_shape), validate_args=self._validate_args)


def _between(lower: float, upper: float) -> constraints.Constraint:
    low, high = lower > -torch.inf, upper < torch.inf
    if low and high:
        return constraints.interval(lower, upper)
    return (
        constraints.greater_than(lower)
        if low
        else constraints.less_than(upper)
        if high
        else constraints.real
    )
