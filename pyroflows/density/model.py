"""The mixed autoregressive model of a table.

Conditionals column by column, exact on complete rows, Monte Carlo over missing cells.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyroflows.conditioners import ColumnNets
from pyroflows.density.columns import NEVER, Encoded, LabelCells, NumberCells
from pyroflows.density.conditionals import (
    Labels,
    Numbers,
    labels_of,
    mixture_log_prob,
    numbers_of,
)
from pyroflows.density.mixtures import MixedMixture, State
from pyroflows.density.particles import Particles, evidence
from pyroflows.density.restricted import Regions, restrict
from pyroflows.tables import Schema

__all__ = ["Rows", "TableModel"]

FLOOR = 1e-4  # share of the marginal in every conditional


@dataclasses.dataclass
class Rows:
    """Encoded rows.

    Attributes:
        features: What the networks see, shape (N, F), float32.
        cell: Bins of the targets, shape (T, N).
        parts: inside, upper, width, offset of the targets, shape (4, T, N), float32.
        missing: Which target cells are missing, shape (T, N).
        raw: float64 values in model order, shape (N, D).
    """

    features: Tensor
    cell: Tensor
    parts: Tensor
    missing: Tensor
    raw: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Tensor | slice) -> Rows:
        return Rows(
            self.features[rows],
            self.cell[:, rows],
            self.parts[:, :, rows],
            self.missing[:, rows],
            self.raw[rows],
        )

    def to(self, device: torch.device) -> Rows:
        """The network's inputs on a device; raw values stay."""
        return Rows(
            self.features.to(device),
            self.cell.to(device),
            self.parts.to(device),
            self.missing.to(device),
            self.raw,
        )


class TableModel(nn.Module):
    r"""p(targets | given), a product over columns in a fixed order, seldom complete ones last.

    .. math:: p(x_t \mid x_{<t}) = (1 - \alpha_t)\, \frac1M \sum_m p_m(x_t \mid x_{<t}) +
    \alpha_t\, q(x_t \mid x_{<t})

    with M networks per column and, for small tables, a mixed mixture q; every term is an exact
    conditional density. One network call per column in either direction.

    Args:
        schema: The table's columns.
        cells: One module per column in model order; it stays on the CPU in float64.
        order: Column of the schema at each place of the model order, given columns first.
        num_given: How many are given.
        members: Networks per column, M.
        hidden_dim: Width.
        depth: Hidden layers.
        components: Logistics per numeric conditional.
        dropout: While training.
        mixture: q, if any.
        reads: For a wide table, the places in model order that each target's networks read; None
            where they read all earlier ones. See :func:`pyroflows.density.reads.choose_reads`.
    """

    regions = Regions()

    def __init__(
        self,
        schema: Schema,
        cells: Sequence[LabelCells | NumberCells],
        order: Sequence[int],
        num_given: int,
        *,
        members: int,
        hidden_dim: int,
        depth: int = 3,
        components: int = 8,
        dropout: float = 0.0,
        mixture: MixedMixture | None = None,
        reads: list[list[int]] | None = None,
    ) -> None:
        super().__init__()
        self.schema, self.order, self.num_given = schema, list(order), num_given
        # a tuple hides them from .to(): decoding wants float64 on the CPU
        self._host = list(cells), mixture
        self.config = dict(
            members=members,
            hidden_dim=hidden_dim,
            depth=depth,
            components=components,
            dropout=dropout,
        )
        self.members = members
        ends = np.cumsum([0, *(c.num_features for c in cells)])
        self.slices = [slice(int(a), int(b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        targets = self.targets
        t_count = len(targets)
        self.reads = reads
        mask = torch.zeros(t_count, max(int(ends[-1]), 1))
        for t in range(t_count):
            mask[t, : ends[num_given + t]] = 1
        index = None
        if reads is not None:
            index, mask = _index_of(reads, self.slices)
        self.place: list[tuple[int, int]] = []  # group and position of each target
        sizes = [0, 0]
        for c in targets:
            self.place.append((int(c.is_label), sizes[c.is_label]))
            sizes[c.is_label] += 1
        self.sizes = sizes
        groups = [
            [
                m * t_count + t
                for m in range(members)
                for t in range(t_count)
                if self.place[t][0] == kind
            ]
            for kind in (0, 1)
        ]
        self.bins = [
            max([c.num_bins for c in targets if c.is_label == bool(kind)], default=1)
            for kind in (0, 1)
        ]
        outputs = [1 + self.bins[0] + 3 * components, 1 + self.bins[1]]
        self.nets = ColumnNets(
            mask.repeat(members, 1),
            groups,
            outputs,
            [3 * components, 1 + self.bins[1]],
            hidden_dim=hidden_dim,
            depth=depth,
            dropout=dropout,
            index=index,
        )
        self.register_buffer("alpha", torch.zeros(t_count, dtype=torch.float32))
        self.register_buffer(
            "has_missing", torch.tensor([bool(c.missing_seen) for c in targets], dtype=torch.bool)
        )
        for kind in (0, 1):
            log_mass = torch.full((sizes[kind], self.bins[kind]), NEVER, dtype=torch.float32)
            for t, c in enumerate(targets):
                if self.place[t][0] == kind:
                    log_mass[self.place[t][1], : c.num_bins] = c.bin_mass.log()
            self.register_buffer(f"log_mass{kind}", log_mass, persistent=False)
        self._start(components)

    @torch.no_grad()
    def _start(self, components: int) -> None:
        """Every conditional starts as the column's marginal."""
        for t, c in enumerate(self.targets):
            kind, i = self.place[t]
            bias = self.nets.bias[kind].view(self.members, self.sizes[kind], -1)[:, i]
            bias[:, 1 : 1 + self.bins[kind]] = -30.0
            bias[:, 1 : 1 + c.num_bins] = c.bin_mass.float().clamp_min(1e-12).log()
            share = self.schema.columns[self.order[self.num_given + t]].missing
            bias[:, 0] = math.log(max(share, 1e-6) / max(1 - share, 1e-6))
            if not kind:
                k, b = components, 1 + self.bins[0]
                # halves for bins and logistics; the atoms' own probability is whole from the start
                atoms = float(c.bin_mass[c.hist.num_bins :].sum())
                bias[:, 1 + c.hist.num_bins : 1 + c.num_bins] += math.log(2)
                bias[:, b : b + k] = math.log(max(1 - atoms, 1e-6) / k)
                spread = torch.linspace(-1.5, 1.5, k) if k > 1 else torch.zeros(1)
                bias[:, b + k : b + 2 * k] = spread + 0.1 * torch.randn(self.members, k)
                bias[:, b + 2 * k :] = -0.5

    @property
    def cells(self) -> list[LabelCells | NumberCells]:
        """All columns in model order."""
        return self._host[0]

    @property
    def mixture(self) -> MixedMixture | None:
        """The simple model."""
        return self._host[1]

    def set_mixture(self, mixture: MixedMixture, alpha: Tensor) -> None:
        """Join the simple model with weights alpha, shape (T,)."""
        self._host = self.cells, mixture
        self.alpha.copy_(alpha)

    @property
    def targets(self) -> list[LabelCells | NumberCells]:
        """The modelled columns."""
        return self.cells[self.num_given :]

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.alpha.device

    @property
    def chunk(self) -> int:
        """Rows that networks serve at once: what they hold of a wide table is bounded."""
        if self.nets.index is None:
            return 4096
        outputs = sum(
            s * (1 + b + 3 * self.config["components"])
            for s, b in zip(self.sizes, self.bins, strict=True)
        )
        held = self.nets.index.numel() + self.members * (
            3 * outputs + 4 * len(self.targets) * self.config["hidden_dim"]
        )
        return max(16, min(4096, 2**26 // held))

    def slot(self, t: int, i: int) -> int | None:
        """Where the networks of target t read the first feature of place i; None: nowhere."""
        if self.reads is None:
            return self.slices[i].start
        if i not in self.reads[t]:
            return None
        return sum(self.cells[j].num_features for j in self.reads[t] if j < i)

    # ------------------------------------------------------------------ encoding

    def encode(self, values: Tensor, *, lattice: bool = True) -> Rows:
        """Rows of schema-ordered values, shape (N, D) with NaN where missing."""
        raw = values[:, self.order]
        encoded = [
            c.encode(raw[:, self.num_given + t], lattice=lattice)
            for t, c in enumerate(self.targets)
        ]
        return Rows(
            self.features(raw),
            torch.stack([e.cell for e in encoded]),
            torch.stack([torch.stack(e[1:]) for e in encoded], 1).float(),
            raw[:, self.num_given :].T.isnan(),
            raw,
        )

    def portions(self, rows: Rows) -> list[Rows]:
        """Rows in portions that the networks can serve at once."""
        if len(rows) <= self.chunk or self.reads is None:
            return [rows]
        return [rows[i] for i in torch.arange(len(rows)).split(self.chunk)]

    # ------------------------------------------------------------------ densities

    def net_log_prob(self, rows: Rows, *, atoms: bool = True) -> tuple[Tensor, Tensor]:
        """Log-densities of the target cells and log-odds of being missing, both (M, T, N).

        Without ``atoms``, point masses get no probability. Unknown labels and missing cells get
        some number for the caller to replace.
        """
        out = self.nets(rows.features)
        if not self.training:
            out = [self._floored(o, kind) if len(o) else o for kind, o in enumerate(out)]
        t_count, n = rows.cell.shape
        log_p: list[Any] = [None] * t_count
        gone: list[Any] = [None] * t_count
        for kind in (0, 1):
            which = [t for t in range(t_count) if self.place[t][0] == kind]
            if not which:
                continue
            o = out[kind]
            cell = rows.cell[which].clamp_min(0).repeat(self.members, 1)
            inside, upper, width, offset = (p[which].repeat(self.members, 1) for p in rows.parts)
            if kind:
                value = o[..., 1:].log_softmax(-1).gather(-1, cell[..., None])[..., 0] + inside
            else:
                if not atoms:
                    hide = torch.zeros(len(which), o.shape[-1], dtype=torch.bool, device=o.device)
                    for i, t in enumerate(which):
                        c = self.targets[t]
                        hide[i, 1 + c.hist.num_bins : 1 + c.num_bins] = True
                    o = o.masked_fill(hide.repeat(self.members, 1)[:, None], NEVER)
                value = mixture_log_prob(
                    o[..., 1:], cell, inside, upper, width, offset, self.bins[0]
                )
            value = value.view(self.members, len(which), n)
            odds = o[..., 0].view(self.members, len(which), n)
            for i, t in enumerate(which):
                log_p[t], gone[t] = value[:, i], odds[:, i]
        return torch.stack(log_p, 1), torch.stack(gone, 1)

    def _floored(self, out: Tensor, kind: int, only: int | None = None) -> Tensor:
        """Outputs with normalized logits, the bins mixed with a little of the marginal ones.

        A row that contradicts what the networks have learned then costs -log(FLOOR) nats more than
        its marginal density, not any number.
        """
        mass = self.get_buffer(f"log_mass{kind}")
        mass = mass[only] if only is not None else mass.repeat(self.members, 1)[:, None]
        k = (out.shape[-1] - 1 - self.bins[kind]) // 3
        odds, logits, rest = out.split([1, self.bins[kind] + k, 2 * k], -1)
        log_w = logits.log_softmax(-1) + math.log1p(-FLOOR)
        bins, smooth = log_w.split([self.bins[kind], k], -1)
        return torch.cat([odds, torch.logaddexp(bins, mass + math.log(FLOOR)), smooth, rest], -1)

    def mixture_log_prob(self, rows: Rows, mixture: MixedMixture | None = None) -> Tensor:
        """Log-densities of the target cells under the simple model, shape (T, N)."""
        q = mixture or self.mixture
        if q is None:
            raise RuntimeError("the model has no simple part")
        state = q.start(len(rows))
        out = []
        for i, c in enumerate(self.cells):
            e = c.encode(rows.raw[:, i])
            if i >= self.num_given:
                log_p = q.log_prob(i, state, e.cell, e.upper, e.width, e.offset)
                # the mixture knows bins of labels only
                out.append(log_p + e.inside if c.is_label else log_p)
            state = _read(q, i, e, rows.raw[:, i], state)
        return torch.stack(out)

    def column_log_prob(self, rows: Rows, *, atoms: bool = True) -> tuple[Tensor, Tensor]:
        """Log-densities of target cells (0 where missing) and of their pattern, both (T, N)."""
        parts = [
            self.net_log_prob(part.to(self.device), atoms=atoms) for part in self.portions(rows)
        ]
        log_p, odds = (torch.cat(p, -1) for p in zip(*parts, strict=True))
        gone = odds.sigmoid().mean(0).clamp(1e-7, 1 - 1e-7).cpu().double()
        gone = torch.where(self.has_missing.cpu()[:, None], gone, 1e-7)
        out = (log_p.logsumexp(0) - math.log(self.members)).cpu().double()
        if self.mixture is not None:
            alpha = self.alpha.cpu().double()[:, None]
            out = torch.logaddexp(
                torch.log1p(-alpha) + out, alpha.log() + self.mixture_log_prob(rows)
            )
        for t, c in enumerate(self.targets):
            if c.is_label:
                out[t] = torch.where(rows.cell[t] < 0, c.log_unseen, out[t])
        out = torch.where(out < NEVER / 10, -torch.inf, out)
        pattern = torch.where(rows.missing, gone.log(), torch.log1p(-gone))
        return torch.where(rows.missing, 0.0, out), pattern

    @torch.no_grad()
    def log_prob(
        self, values: Tensor, *, pattern: bool = False, draws: int = 64
    ) -> tuple[Tensor, Tensor]:
        """Log-density of rows and its error in nats, both (N,); missing cells are integrated out.

        Args:
            values: Shape (N, D), NaN where missing.
            pattern: Whether to add the probability of which cells are missing, by the model that
                sees missing cells as such (exact).
            draws: Particles per row and batch, where two or more numbers before an observed cell
                are missing; see :func:`pyroflows.density.particles.evidence`.
        """
        out, error = torch.zeros(2, len(values), dtype=torch.float64)
        for part in torch.arange(len(values)).split(4096):
            log_p, log_m = self.column_log_prob(self.encode(values[part]))
            out[part] = (log_p + log_m if pattern else log_p).sum(0)
            if not pattern:
                rows, log_z, off = evidence(self, values[part], draws=draws)
                out[part[rows]], error[part[rows]] = log_z, off
        return out, error

    # ------------------------------------------------------------------ column by column

    @property
    def simple(self) -> MixedMixture | None:
        """The simple model, if any column listens to it."""
        return self.mixture if bool((self.alpha > 0).any()) else None

    def features(self, raw: Tensor) -> Tensor:
        """What the networks see of values in model order, shape (N, F)."""
        parts = [c.features(raw[:, i]) for i, c in enumerate(self.cells)]
        return torch.cat(parts, 1) if parts else raw.new_zeros(len(raw), 1).float()

    def read(self, i: int, x: Tensor, state: State | None) -> State | None:
        """The simple model's state after it has read column i."""
        if state is None or self.mixture is None:
            return None
        return _read(self.mixture, i, self.cells[i].encode(x), x, state)

    @torch.no_grad()
    def conditional(
        self, t: int, features: Tensor, state: State | None = None, *, atoms: bool = True
    ) -> Any:
        """The distribution of target t for N rows, given the columns before it.

        Args:
            t: Target.
            features: Shape (N, F).
            state: What the simple model has read.
            atoms: Whether point masses have their probability.
        """
        law = self._law(t, features, state, atoms)
        region = self.regions.at.get(self.num_given + t)
        return law if region is None else restrict(law, region)

    def _law(self, t: int, features: Tensor, state: State | None, atoms: bool) -> Labels | Numbers:
        (kind, i), c = self.place[t], self.targets[t]
        rows = [m * self.sizes[kind] + i for m in range(self.members)]
        out = self._floored(self.nets.some(features.to(self.device), kind, rows), kind, i).cpu()
        alpha, j, q = float(self.alpha[t]), self.num_given + t, self.mixture
        q = q if alpha > 0 else None
        if isinstance(c, LabelCells):
            known = q.labels(j, state) if q is not None and state is not None else None
            return labels_of(c, out, known, alpha)
        simple = q.predict(j, state) if q is not None and state is not None else None
        return numbers_of(c, out, self.bins[0], simple, alpha, atoms=atoms)

    def within(self, regions: Regions) -> TableModel:
        """The same model of rows that lie in regions; its laws there are restricted."""
        out = copy.copy(self)
        out.regions = regions
        return out

    def walk(self, values: Tensor) -> Iterator[tuple[int, Tensor, Labels | Numbers]]:
        """Yield (place, column of values, conditional) for each target of rows, shape (N, D)."""
        p = Particles.start(self, values)
        for t, i in p.walk():
            yield i, p.raw[:, i], p.conditional(t, torch.arange(len(values)))


def _index_of(reads: list[list[int]], slices: list[slice]) -> tuple[Tensor, Tensor]:
    """Features that each target reads, and which of them are real, both (T, most of them)."""
    rows = [[f for i in r for f in range(slices[i].start, slices[i].stop)] for r in reads]
    most = max(1, *map(len, rows))
    index = torch.tensor([r + [0] * (most - len(r)) for r in rows])
    mask = torch.tensor([[1.0] * len(r) + [0.0] * (most - len(r)) for r in rows])
    return index, mask


def _read(q: MixedMixture, i: int, e: Encoded, x: Tensor, state: State) -> State:
    """The state after column i; missing cells and point masses tell the simple model nothing."""
    known = ~x.isnan() & (e.offset > NEVER / 10)
    return q.update(i, state, e.cell, e.upper - e.width / 2, known)
