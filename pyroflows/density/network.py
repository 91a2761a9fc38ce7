"""Conditional densities of table columns.

One small residual network per column, all evaluated as one batch of products.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyroflows.families import Logistics

__all__ = ["ColumnNets", "log_scale", "mixture_log_prob"]


def log_scale(raw: Tensor) -> Tensor:
    """Log-scale of a logistic.

    Softly bounded below by -8 (3e-4 of a normal score), linear above.
    """
    return F.softplus(raw + 8.0) - 8.0


def mixture_log_prob(
    out: Tensor,
    cell: Tensor,
    inside: Tensor,
    upper: Tensor,
    width: Tensor,
    offset: Tensor,
    bins: int,
) -> Tensor:
    r"""Log-density of cells under a mixture of histogram bins and logistics of the normal scores.

    .. math:: p = w_{b(x)}\, f(x \mid b) + \sum_k w_k
        \Big[\sigma\big(\tfrac{s^+ - \mu_k}{\sigma_k}\big) - \sigma\big(\tfrac{s^- -
        \mu_k}{\sigma_k}\big)\Big] e^{offset}

    Args:
        out: Network outputs, shape (G, N, bins + 3 K): logits of bins and logistics, locations,
            log-scales.
        cell: Bin of each cell, shape (G, N).
        inside: log f(x | b), shape (G, N).
        upper: Upper end of the cell in normal scores, shape (G, N).
        width: Its width there, shape (G, N).
        offset: Log of density per unit of score probability, shape (G, N).
        bins: Number of bins.
    """
    k = (out.shape[-1] - bins) // 3
    logits, loc, raw = out.split([bins + k, k, k], -1)
    log_w = logits.log_softmax(-1)
    log_bin = log_w[..., :bins].gather(-1, cell[..., None])[..., 0] + inside
    smooth = Logistics(log_w[..., bins:], loc, log_scale(raw), dim=-1)
    return torch.logaddexp(log_bin, smooth.log_cell(upper, width) + offset)


class ColumnNets(nn.Module):
    r"""G independent residual networks over shared features, each seeing what its mask allows.

    .. math:: h_0 = \phi(W_0 x + b_0), \quad h_{l} = h_{l-1} + \phi(W_l h_{l-1} + b_l), \quad out =
    W h_L + V x + b

    The networks fall into groups with different numbers of outputs. All outputs are independent of
    the features at initialization.

    Args:
        mask: Features each network may see, shape (G, F).
        groups: Networks of each group; together every network once.
        num_outputs: Outputs of the networks of each group.
        num_linear: How many of them, the last ones, depend on the features linearly too (V).
        hidden_dim: Width.
        depth: Hidden layers.
        dropout: Probability of dropping a hidden unit while training.
        index: Where given, the features that each target's networks read, shape (T, F'); the mask
            is then (G, F') and tells which of them are real. Weights, memory and time grow with
            F', not with F. Networks of one target are T apart.
    """

    def __init__(
        self,
        mask: Tensor,
        groups: list[list[int]],
        num_outputs: list[int],
        num_linear: list[int],
        *,
        hidden_dim: int,
        depth: int = 3,
        dropout: float = 0.0,
        index: Tensor | None = None,
    ) -> None:
        super().__init__()
        g, f = mask.shape
        self.register_buffer("index", index, persistent=False)
        f32 = dict(dtype=torch.float32)
        self.register_buffer("mask", mask.float()[:, :, None])
        seen = mask.sum(1).clamp_min(1).float()[:, None, None]
        self.groups = groups
        self.w0 = nn.Parameter(torch.randn(g, f, hidden_dim, **f32) * (1.5 / seen.sqrt()))
        self.b0 = nn.Parameter(torch.randn(g, 1, hidden_dim, **f32) * 0.5)
        self.w = nn.ParameterList(
            nn.Parameter(torch.randn(g, hidden_dim, hidden_dim, **f32) / math.sqrt(hidden_dim))
            for _ in range(depth - 1)
        )
        self.b = nn.ParameterList(
            nn.Parameter(torch.zeros(g, 1, hidden_dim, **f32)) for _ in range(depth - 1)
        )
        sizes = [(len(i), p) for i, p in zip(groups, num_outputs, strict=True)]
        self.head = nn.ParameterList(
            nn.Parameter(torch.zeros(m, hidden_dim, p, **f32)) for m, p in sizes
        )
        self.skip = nn.ParameterList(
            nn.Parameter(torch.zeros(len(i), f, p, **f32))
            for i, p in zip(groups, num_linear, strict=True)
        )
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(m, 1, p, **f32)) for m, p in sizes)
        self.dropout = dropout

    def trunk(self, x: Tensor, nets: list[int] | slice = slice(None)) -> Tensor:
        """Features (N, F) to the last hidden layer of some networks (G, N, H)."""
        w0 = self.w0[nets] * self.mask[nets]
        hidden = F.silu(self._product(x, w0, nets) + self.b0[nets])
        for w, b in zip(self.w, self.b, strict=True):
            z = self._drop(hidden)
            hidden = hidden + F.silu(torch.baddbmm(b[nets], z, w[nets]))
        return hidden

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features (N, F) to the outputs of each group, shape (members, N, num_outputs)."""
        hidden = self._drop(self.trunk(x))
        return [self._head(i, slice(None), hidden[nets], x) for i, nets in enumerate(self.groups)]

    def _head(self, i: int, rows: list[int] | slice, hidden: Tensor, x: Tensor) -> Tensor:
        net = [self.groups[i][r] for r in rows] if isinstance(rows, list) else self.groups[i]
        skip = self.skip[i][rows] * self.mask[net]
        linear, p = self._product(x, skip, net), skip.shape[-1]
        out = torch.baddbmm(self.bias[i][rows], hidden, self.head[i][rows])
        out[..., out.shape[-1] - p :] += linear
        return out

    def _product(self, x: Tensor, w: Tensor, nets: list[int] | slice) -> Tensor:
        """Features (N, F) times the weights (G, F, P) of some networks, shape (G, N, P)."""
        g, f, p = w.shape
        if self.index is None:
            return (x @ w.permute(1, 0, 2).reshape(f, g * p)).view(len(x), g, p).transpose(0, 1)
        own = range(len(self.index))
        read = self.index[[i for i in nets if i in own] if isinstance(nets, list) else nets]
        t, m = len(read), g // max(len(read), 1)
        wide = w.view(m, t, f, p).permute(1, 0, 3, 2).reshape(t, m * p, f)
        out = wide @ x.T[read]
        return out.view(t, m, p, len(x)).permute(1, 0, 3, 2).reshape(g, len(x), p)

    def _drop(self, hidden: Tensor) -> Tensor:
        """Dropout; the networks share the mask, which costs them nothing: they are independent."""
        if not self.training or self.dropout == 0:
            return hidden
        keep = torch.rand_like(hidden[:1]) >= self.dropout
        return hidden * (keep.to(hidden.dtype) / (1 - self.dropout))

    def some(self, x: Tensor, group: int, rows: list[int]) -> Tensor:
        """Outputs of a few networks of one group only, shape (len(rows), N, num_outputs)."""
        return self._head(group, rows, self.trunk(x, [self.groups[group][r] for r in rows]), x)
