"""Discrete values under a continuous density: a bound, and therefore a distribution."""

import math
from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

__all__ = ["UniformDequantized"]


class _Grid(constraints.Constraint):
    """Multiples of ``step``."""

    is_discrete = True

    def __init__(self, step: float) -> None:
        self.step = step
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        cells = value / self.step
        return (cells - cells.round()).abs() < 1e-3


class UniformDequantized(TorchDistribution):
    r"""Values on a grid, each as likely as a continuous density finds the cell above it.

    .. math::
        P(v) &= \int_{[0, s)^D} p(v + u)\, du \\
        \texttt{log\_prob}(v) &= \log \frac{s^D}{K} \sum_{k=1}^{K} p(v + u_k),
        \quad u_k \sim U[0, s)^D

    ``log_prob`` draws new noise at every call. Its mean is a lower bound of log P(v), in nats,
    that rises to it as K grows; with K = 1 it is the usual dequantization bound. Costs K
    evaluations of the density. ``sample`` rounds samples of p down to the grid: it is exact, and
    carries no gradient.

    Args:
        base: The density p: a distribution, or a flow without context (with one, pass
            ``flow(context)``).
        step: Width s of a cell: 1 for counts and bytes, 1/256 for bytes scaled to [0, 1).
        num_samples: Number K of draws of noise in ``log_prob``.
        validate_args: Whether values are checked to lie on the grid; PyTorch's default if None.

    Raises:
        ValueError: If ``step`` or ``num_samples`` is not positive.
        TypeError: If ``base`` is neither a distribution nor a flow.

    References:
        Theis, van den Oord, Bethge (2016), A note on the evaluation of generative models, section
        3.1. arXiv:1511.01844

        Burda, Grosse, Salakhutdinov (2016), Importance weighted autoencoders, theorem 1.
        arXiv:1509.00519
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(
        self,
        base: Distribution | nn.Module,
        *,
        step: float = 1.0,
        num_samples: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        base = base() if isinstance(base, nn.Module) else base
        if not isinstance(base, Distribution):
            raise TypeError(f"base must be a distribution or a flow; got {type(base).__name__}")
        if not step > 0:
            raise ValueError(f"step must be positive; got {step}")
        if num_samples < 1:
            raise ValueError(f"num_samples must be positive; got {num_samples}")
        self.base_dist, self.step, self.num_samples = base, step, num_samples
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Multiples of ``step``."""
        return constraints.independent(_Grid(self.step), len(self.event_shape))

    def expand(
        self, batch_shape: Sequence[int], _instance: "UniformDequantized | None" = None
    ) -> "UniformDequantized":
        """Return the same distribution with ``batch_shape``."""
        base = self.base_dist.expand(torch.Size(batch_shape))
        return UniformDequantized(
            base,
            step=self.step,
            num_samples=self.num_samples,
            validate_args=self.__dict__.get("_validate_args"),
        )

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return samples on the grid, shape ``sample_shape + batch_shape + event_shape``."""
        return torch.floor(self.base_dist.sample(torch.Size(sample_shape)) / self.step) * self.step

    def log_prob(self, value: Tensor) -> Tensor:
        """Return a draw of the bound, shape ``sample_shape + batch_shape``.

        Args:
            value: Values on the grid; integers are taken in PyTorch's default dtype.
        """
        if self._validate_args:
            self._validate_sample(value)
        if not value.is_floating_point():
            value = value.to(torch.get_default_dtype())
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        noise = torch.rand((self.num_samples, *shape), dtype=value.dtype, device=value.device)
        below = torch.nextafter(value + self.step, value)  # where rounding would leave the cell
        log_probs = self.base_dist.log_prob(torch.minimum(value + self.step * noise, below))
        cells = math.prod(self.event_shape) * math.log(self.step)
        return torch.logsumexp(log_probs, 0) - math.log(self.num_samples) + cells
