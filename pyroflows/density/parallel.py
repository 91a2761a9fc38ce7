"""A loss of several processes that fit one table together."""

from __future__ import annotations

from torch import nn

from pyroflows.training.parallel import rank_and_world

__all__ = ["wrapped"]


def wrapped(module: nn.Module) -> nn.Module:
    """The module itself, or one that averages its gradients over the processes."""
    if rank_and_world()[1] == 1:
        return module
    device = next(module.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        module, device_ids=ids, broadcast_buffers=False, find_unused_parameters=True
    )
