"""Layers that take location and scale from the data: ActNorm and batch normalization."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.numerics import functorch_active
from pyroflows.scalar import Affine
from pyroflows.transforms._common import LOG_SCALE_BOUND, AxisBijection, Parameters
from pyroflows.transforms._factories import conditional

__all__ = [
    "ActNorm",
    "BatchNorm",
    "actnorm",
    "batchnorm",
    "conditional_actnorm",
    "conditional_batchnorm",
]


class ActNorm(AxisBijection):
    r"""Scale and shift each feature; the first batch of data sets how.

    .. math:: y_i = e^{s_i} x_i + t_i, \qquad |s_i| < \mathrm{bound}

    The first batch that comes from the data side in training mode, of two rows or more, sets t and
    s to the mean and the log standard deviation of its features, so that x has mean 0 and variance
    1. From then on they are ordinary parameters: the buffer ``initialized`` says so and is saved
    with them. Training from the noise side (variational inference) counts as initialized too: the
    layer then stays the identity that it was. Under ``torch.distributed`` the rows of all
    processes count, so that the processes agree; all of them must see their first batch together.
    Rows that are not finite and constant features take no part. Nothing is initialized in
    evaluation mode, under ``torch.func`` or while ``torch.compile`` traces: make one plain call
    first.

    One evaluation in either direction; with a context one network call, whose result is added to s
    and t.

    Args:
        input_dim: Entries along ``dim``, or the shape of the event.
        dim: Negative axis of the features; -3 for images ``(channels, height, width)``.
        context_dim: Features of the context, shape ``(*batch, context_dim)``; 0 for none.
        bound: Largest |s|, in nats.
        **network: ``hidden_dims``, ``residual`` and ``activation`` of the context's network.

    References:
        Kingma, Dhariwal (2018), Glow, section 3.1. arXiv:1807.03039
    """

    initialized: Tensor

    def __init__(
        self,
        input_dim: int | Sequence[int],
        *,
        dim: int = -1,
        context_dim: int = 0,
        bound: float = LOG_SCALE_BOUND,
        **network: Any,
    ) -> None:
        super().__init__(input_dim, dim, context_dim=context_dim)
        self.scalar = Affine(bound)
        start = torch.zeros(2, self.size, *[1] * (-dim - 1))
        self.affine = Parameters(start, context_dim=context_dim, **network)
        self.register_buffer("initialized", torch.tensor(False))
        # what the buffer is known to say, shared with views: reading it stalls a GPU
        self._known = {"initialized": False}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known["initialized"] = False

    def _may_initialize(self) -> bool:
        if not self.training or torch.compiler.is_compiling() or functorch_active():
            return False
        if not self._known["initialized"]:
            self._known["initialized"] = bool(self.initialized)
        return not self._known["initialized"]

    @torch.no_grad()
    def _initialize(self, y: Tensor | None) -> None:
        """Standardize ``y``; without it, keep the parameters as they are for good."""
        if y is not None:
            rows = y.detach().movedim(self.dim, -1).reshape(-1, self.size)
            rows = rows[rows.isfinite().all(-1)]
            count, mean = _count_and_mean(len(rows), rows.sum(0))
            if count < 2:
                return
            std = (_over_processes((rows - mean).square().sum(0)) / (count - 1)).sqrt()
            largest = torch.cat([torch.zeros_like(mean)[None], rows.abs()]).amax(0)
            noise = 8 * torch.finfo(rows.dtype).eps * _over_processes(largest, "max")
            log_std = torch.where(std > noise, std, 1.0).log()
            limit = 0.99 * self.scalar.bound
            ratio = log_std.clamp(-limit, limit) / self.scalar.bound
            raw = self.scalar.bound * ratio.atanh()  # undoes the bound
            self.affine.theta.copy_(torch.stack([mean, raw]).view_as(self.affine.theta))
        self.initialized.fill_(True)
        self._known["initialized"] = True

    def _move(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if self._may_initialize() and (inverse or torch.is_grad_enabled()):
            self._initialize(value if inverse else None)
        params = self.affine.at_context(context)
        move = self.scalar.inverse if inverse else self.scalar.forward
        value, log_slope = move(value, params)
        return value, log_slope.flatten(self.dim).sum(-1)


class BatchNorm(AxisBijection):
    r"""Batch normalization, read from data to noise; from noise to data it is undone.

    .. math:: x = e^{g} \, \frac{y - m}{\sqrt{v + \epsilon}} + \beta

    From the data side in training mode, m and v are mean and variance of the batch, over all its
    axes, and move the running averages; in evaluation mode, and always from the noise side, they
    are the running averages. So the two directions are each other's inverse in evaluation mode
    only. Under ``torch.distributed`` they are those of all processes together. The log-determinant
    takes m and v as constants. Rows that are not finite do not count; with fewer than two that do,
    the running averages serve. In evaluation mode it starts as the
    identity up to the factor √(1 + ε).

    One evaluation in either direction; with a context one network call, whose result is added to g
    and β.

    Args:
        input_dim: Number of features.
        momentum: Weight of the new batch in the running averages.
        epsilon: Added to the variance.
        context_dim: Features of the context, shape ``(*batch, context_dim)``; 0 for none.
        **network: ``hidden_dims``, ``residual`` and ``activation`` of the context's network.

    Raises:
        ValueError: If ``momentum`` is outside [0, 1], or ``epsilon`` outside (0, 1).

    References:
        Dinh, Sohl-Dickstein, Bengio (2017), Density estimation using Real NVP, appendix E.
        arXiv:1605.08803
    """

    moving_mean: Tensor
    moving_variance: Tensor
    cheaper_inverse = True  # the statistics of a batch are found on the data side alone

    def __init__(
        self,
        input_dim: int,
        momentum: float = 0.1,
        epsilon: float = 1e-5,
        *,
        context_dim: int = 0,
        **network: Any,
    ) -> None:
        super().__init__(input_dim, context_dim=context_dim)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1]; got {momentum}")
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon must lie between 0 and 1; got {epsilon}")
        self.momentum, self.epsilon = momentum, epsilon
        self.scalar = Affine(LOG_SCALE_BOUND)
        start = torch.zeros(2, input_dim)
        self.affine = Parameters(start, context_dim=context_dim, **network)
        self.register_buffer("moving_mean", torch.zeros(input_dim))
        self.register_buffer("moving_variance", torch.ones(input_dim))

    def _batch_moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased variance of the finite rows; running ones for lack of rows."""
        rows = y.reshape(-1, self.size)
        finite = rows.isfinite().all(-1, keepdim=True)
        rows = torch.where(finite, rows, 0.0)
        count, mean = _count_and_mean(finite.sum(0), rows.sum(0))
        spread = torch.where(finite, rows - mean, 0.0)
        var = _over_processes(spread.square().sum(0)) / (count - 1).clamp_min(1)
        enough = count > 1
        mean = torch.where(enough, mean, self.moving_mean)
        var = torch.where(enough, var, self.moving_variance)
        if not functorch_active():
            with torch.no_grad():
                self.moving_mean.lerp_(mean, self.momentum)
                self.moving_variance.lerp_(var, self.momentum)
        return mean, var

    def _forward_and_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x, log_slope = self.scalar.inverse(x, self.affine.at_context(context))
        var = self.moving_variance + self.epsilon
        return x * var.sqrt() + self.moving_mean, (log_slope + 0.5 * var.log()).sum(-1)

    def _inverse_and_log_det(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        mean, var = self.moving_mean, self.moving_variance
        if self.training:
            mean, var = self._batch_moments(y)
        var = var + self.epsilon
        x, log_slope = self.scalar.forward(
            (y - mean) * var.rsqrt(), self.affine.at_context(context)
        )
        return x, (log_slope - 0.5 * var.log()).sum(-1)


def _over_processes(value: Tensor, reduction: str = "sum") -> Tensor:
    """Sum or maximum over the processes of a distributed run, with gradients; else the value."""
    group = torch.distributed
    if not (group.is_available() and group.is_initialized() and group.get_world_size() > 1):
        return value
    if functorch_active():
        raise RuntimeError("statistics of a distributed run cannot be taken under torch.func")
    from torch.distributed.nn.functional import all_reduce

    operation = group.ReduceOp.MAX if reduction == "max" else group.ReduceOp.SUM
    return all_reduce(value.clone(), op=operation)


def _count_and_mean(count: int | Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Number of rows, shape ``(1,)``, and their mean ``(D,)``, over all processes."""
    rows = torch.as_tensor(count).to(total).reshape(1)
    rows, total = _over_processes(torch.cat([rows, total])).split([1, len(total)])
    return rows, total / rows.clamp_min(1)


def actnorm(
    input_dim: int | Sequence[int],
    hidden_dims: Sequence[int] | None = None,
    dim: int = -1,
    **kwargs: Any,
) -> ActNorm:
    """Return :class:`ActNorm`; ``hidden_dims`` are those of a context's network."""
    return ActNorm(input_dim, dim=dim, hidden_dims=hidden_dims, **kwargs)


def batchnorm(
    input_dim: int, momentum: float = 0.1, epsilon: float = 1e-5, **kwargs: Any
) -> BatchNorm:
    """Return :class:`BatchNorm`."""
    return BatchNorm(input_dim, momentum, epsilon, **kwargs)


conditional_actnorm = conditional(actnorm)
conditional_batchnorm = conditional(batchnorm)
