"""Entropy and Kullback-Leibler divergence by Monte Carlo, with gradients and standard errors."""

import math
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution, register_kl

__all__ = ["entropy", "kl_divergence", "register_kl_of"]


def entropy(p: Any, num_samples: int | None = None, *, return_error: bool = False) -> Any:
    r"""Estimate :math:`H(p) = -E_p[\log p(x)]` in nats.

    The gradient is right: along the draws where p can, else by the score function with the other
    draws' mean as baseline.

    Args:
        p: A distribution, such as ``flow(context)``; or a flow that needs no context.
        num_samples: Number of draws; 256 if None, fewer for large batches.
        return_error: Whether to return the standard error of the estimate too.

    Returns:
        The estimate, shape ``p.batch_shape``; with ``return_error`` the pair of it and its error.

    Raises:
        ValueError: If ``num_samples`` is below 1, or below 2 where the error is asked for.
    """
    p = _distribution(p)
    x, log_p = _draw(p, (_count(p, num_samples, return_error),))
    return _mean(-log_p, log_p, p.has_rsample, return_error)


def kl_divergence(
    p: Any,
    q: Any,
    num_samples: int | None = None,
    *,
    return_error: bool = False,
) -> Any:
    r"""Estimate :math:`KL(p \,\|\, q) = E_p[\log p(x) - \log q(x)]` in nats.

    Gradients as in :func:`entropy`, to p and q. Infinite where p draws what q excludes.

    Args:
        p: A distribution, such as ``flow(context)``, or a flow that needs no context; it is drawn
            from.
        q: The same, of the same event shape; its batch shape broadcasts with that of p.
        num_samples: Number of draws; 256 if None, fewer for large batches.
        return_error: Whether to return the standard error of the estimate too.

    Returns:
        The estimate, of the broadcast batch shape; with ``return_error`` the pair of it and its
        error.

    Raises:
        ValueError: If event shapes differ, or ``num_samples`` is below 1, or below 2 where the
            error is asked for.
    """
    p, q = _distribution(p), _distribution(q)
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"kl_divergence expects distributions of the same events; got event shapes "
            f"{tuple(p.event_shape)} and {tuple(q.event_shape)}"
        )
    wider = max(0, len(q.batch_shape) - len(p.batch_shape))
    x, log_p = _draw(p, (_count(p, num_samples, return_error), *[1] * wider))
    return _mean(log_p - q.log_prob(x), log_p, p.has_rsample, return_error)


def _distribution(p: Any) -> Any:
    """The distribution of a flow without context; a distribution as it is."""
    return p if isinstance(p, Distribution) else p.distribution()


def _count(p: Distribution, num_samples: int | None, return_error: bool) -> int:
    if num_samples is None:
        numbers = math.prod(p.batch_shape) * math.prod(p.event_shape)
        return max(8, min(256, 2**18 // max(1, numbers)))
    if num_samples < 1 + return_error:
        raise ValueError(
            f"num_samples must be {1 + return_error} or more{' for an error' * return_error}; "
            f"got {num_samples}"
        )
    return num_samples


def _draw(p: Distribution, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Draws and their log-densities, along which gradients flow if the distribution allows."""
    if p.has_rsample and hasattr(p, "rsample_and_log_prob"):
        return p.rsample_and_log_prob(shape)
    x = p.rsample(torch.Size(shape)) if p.has_rsample else p.sample(torch.Size(shape))
    return x, p.log_prob(x)


def _mean(f: Tensor, log_p: Tensor, pathwise: bool, return_error: bool) -> Any:
    """Mean over the draws and its standard error; the score function joins for the gradient."""
    n = len(f)
    mean = f.mean(0)
    if not pathwise and n > 1:
        others = (f - mean).detach() * (n / (n - 1))
        mean = mean + (others * (log_p - log_p.detach())).mean(0)
    return (mean, f.detach().std(0) / math.sqrt(n)) if return_error else mean


_registered: set[type] = set()


def register_kl_of(kind: type[Distribution]) -> None:
    """Make torch's and Pyro's ``kl_divergence`` estimate divergences from and to this class.

    At its first use and not at import, which changes nothing elsewhere.
    """
    if kind in _registered:
        return
    _registered.add(kind)
    # pairs with other registered base classes too, so that none is ambiguous
    for other in (Distribution, TransformedDistribution):
        register_kl(kind, other)(kl_divergence)
        register_kl(other, kind)(kl_divergence)
    register_kl(kind, kind)(kl_divergence)
    register_kl(Delta, kind)(lambda p, q: -q.log_prob(p.v))
