r"""Einsum of exponentials, in logarithms: a backend of opt_einsum that :func:`torch.vmap` can run.

.. math:: \text{out} = \log \sum \prod_i \exp(x_i)
"""

from __future__ import annotations

import math

import torch
from pyro.ops.einsum.util import Tensordot
from torch import Tensor

__all__ = ["einsum", "tensordot", "transpose"]


def transpose(a: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Permute the axes."""
    return a.permute(axes)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Each operand is shifted by its maximum over what is summed out; zeros have no gradient."""
    inputs, output = equation.split("->")
    if inputs == output:
        return operands[0].clone()
    shifts, scaled = [], []
    for dims, x in zip(inputs.split(","), operands, strict=True):
        summed = [i for i, d in enumerate(dims) if d not in output]
        top = x.detach().amax(summed, keepdim=True) if summed else x.detach()
        top = torch.where(top.isfinite(), top, 0.0)
        scaled.append((x - top).exp())
        sizes = dict(zip(dims, top.shape, strict=True))
        kept = [d for d in dims if d in output]
        top = top.reshape([sizes[d] for d in kept]).permute(
            [kept.index(d) for d in output if d in kept]
        )
        shifts.append(top.reshape([sizes[d] if d in kept else 1 for d in output]))
    letters = dict(zip(sorted(set(equation) - set(",->")), _ALPHABET, strict=False))
    result = torch.einsum("".join(letters.get(c, c) for c in equation), *scaled)
    positive = result > 0
    log = torch.where(positive, torch.where(positive, result, 1.0).log(), -math.inf)
    return sum(shifts, log)


_ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


tensordot = Tensordot(einsum)
