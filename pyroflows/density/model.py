"""The mixed autoregressive model of a table.

Conditionals column by column, exact on complete rows, Monte Carlo over missing cells.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from pyroflows.conditioners import ColumnNets
from pyroflows.density.columns import NEVER, Encoded, LabelCells, NumberCells
from pyroflows.density.completions import evidence
from pyroflows.density.conditionals import (
    Labels,
    Numbers,
    labels_of,
    mixture_log_prob,
    numbers_of,
)
from pyroflows.density.mixtures import MixedMixture, State
from pyroflows.density.particles import Particles
from pyroflows.density.restricted import Regions, restrict
from pyroflows.tables import Schema

__all__ = ["Rows", "TableModel"]

FLOOR = 1e-4  # share of the marginal in every conditional


@dataclasses.dataclass
class Rows:
    """Encoded rows.

    Attributes:
        features: What the networks see, shape (N, F), float32.
        bin: Bins of the targets, shape (T, N).
        parts: inside, upper, width, offset of the targets, shape (4, T, N), float32.
        missing: Which target cells are missing, shape (T, N).
        raw: float64 values in model order, shape (N, D).
    """

    features: Tensor
    bin: Tensor
    parts: Tensor
    missing: Tensor
    raw: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Tensor | slice) -> Rows:
        return Rows(
            self.features[rows],
            self.bin[:, rows],
            self.parts[:, :, rows],
            self.missing[:, rows],
            self.raw[rows],
        )

    def to(self, device: torch.device) -> Rows:
        """The network's inputs on a device; raw values stay."""
        return Rows(
            self.features.to(device),
            self.bin.to(device),
            self.parts.to(device),
            self.missing.to(device),
            self.raw,
        )


@dataclasses.dataclass(frozen=True)
class ColumnSpec:
    """One column of a model, whose places count in model order.

    Attributes:
        column: Its number in the schema.
        cells: Its cells, on the CPU.
        slice: Where its features lie among those of all columns.
        position: Where a target lies among the targets of its kind.
    """

    column: int
    cells: LabelCells | NumberCells
    slice: slice
    position: int = 0


@dataclasses.dataclass
class Group:
    """The targets of one kind, labels or numbers; their networks have the same outputs.

    Those are the log-odds of a missing cell, then logits of ``bins`` bins, and for numbers logits,
    locations and raw scales of ``components`` logistics each. What depends on the features
    linearly too are the last of them: all but the bins for numbers, all for labels.

    Attributes:
        targets: Which targets they are.
        bins: Bins of the largest histogram.
        components: Logistics, 0 for labels.
        log_mass: Marginal log-probabilities of the bins, shape (len(targets), bins).
    """

    targets: list[int]
    bins: int
    components: int
    log_mass: Tensor

    @classmethod
    def of(cls, targets: Sequence[LabelCells | NumberCells], components: int) -> Group:
        """The targets with components, or those without: the labels."""
        own = [t for t, c in enumerate(targets) if c.is_label == (components == 0)]
        bins = max([targets[t].num_bins for t in own], default=1)
        log_mass = torch.full((len(own), bins), NEVER, dtype=torch.float32)
        for i, t in enumerate(own):
            log_mass[i, : targets[t].num_bins] = targets[t].bin_mass.log()
        return cls(own, bins, components, log_mass)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def num_outputs(self) -> int:
        """Of each network."""
        return 1 + self.bins + 3 * self.components

    @property
    def num_linear(self) -> int:
        """How many of them depend on the features linearly too."""
        return 3 * self.components or self.num_outputs

    def rows(self, members: int, i: int) -> list[int]:
        """The networks of the target at a position, in the group."""
        return [m * len(self) + i for m in range(members)]

    def start(self, bias: Tensor, cells: LabelCells | NumberCells, missing: float) -> None:
        """Let outputs begin as a column's marginal, shape (M, 1, num_outputs).

        Args:
            bias: Changed in place.
            cells: The column.
            missing: Its share of missing cells.
        """
        odds, bins, logits, loc, raw = bias.split([1, self.bins, *[self.components] * 3], -1)
        bins[:] = -30.0
        bins[..., : cells.num_bins] = cells.bin_mass.float().clamp_min(1e-12).log()
        odds[:] = math.log(max(missing, 1e-6) / max(1 - missing, 1e-6))
        if isinstance(cells, LabelCells):
            return
        # halves for bins and logistics; the atoms' own probability is whole from the start
        first, k = cells.hist.num_bins, self.components
        bins[..., first : cells.num_bins] += math.log(2)
        logits[:] = math.log(max(1 - float(cells.bin_mass[first:].sum()), 1e-6) / k)
        spread = torch.linspace(-1.5, 1.5, k) if k > 1 else torch.zeros(1)
        loc[:, 0] = spread + 0.1 * torch.randn(len(bias), k)
        raw[:] = -0.5


class TableModel:
    r"""p(targets | given), a product over columns in a fixed order, with missing cells last.

    .. math:: p(x_t \mid x_{<t}) = (1 - \alpha_t)\, \frac1M \sum_m p_m(x_t \mid x_{<t}) +
    \alpha_t\, q(x_t \mid x_{<t})

    with M networks per column and, for small tables, a mixed mixture q; every term is an exact
    conditional density. One network call per column in either direction. The networks have a
    device; all else stays on the CPU.

    Args:
        schema: The table's columns.
        cells: One module per column in model order, float64.
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

    Attributes:
        specs: The columns in model order.
        groups: The targets that are numbers, and those that are labels.
        nets: Their networks.
        alpha: Weights of the simple model, shape (T,).
        has_missing: Which targets have missing cells, shape (T,).
        regions: What rows are restricted to.
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
        self.schema, self.num_given = schema, num_given
        self.members, self.reads, self.mixture = members, reads, mixture
        sizes = dict(hidden_dim=hidden_dim, depth=depth, dropout=dropout)
        self.config = dict(members=members, components=components, **sizes)
        self.specs = _specs(cells, order, num_given)
        self.order, self.cells = list(order), list(cells)
        self.targets = self.cells[num_given:]
        self.groups = (Group.of(self.targets, components), Group.of(self.targets, 0))
        t = len(self.targets)
        index, mask = self._seen()
        self.nets = ColumnNets(
            mask.repeat(members, 1),
            [[m * t + i for m in range(members) for i in g.targets] for g in self.groups],
            [g.num_outputs for g in self.groups],
            [g.num_linear for g in self.groups],
            hidden_dim=hidden_dim,
            depth=depth,
            dropout=dropout,
            index=index,
        )
        self.alpha = torch.zeros(t, dtype=torch.float32)
        self.has_missing = torch.tensor([bool(c.missing_seen) for c in self.targets])
        self._start()

    def _seen(self) -> tuple[Tensor | None, Tensor]:
        """Features that each target's networks read, None for all; which they may see, (T, F)."""
        if self.reads is not None:
            return _index_of(self.reads, [spec.slice for spec in self.specs])
        mask = torch.zeros(len(self.targets), max(self.specs[-1].slice.stop, 1))
        for t, spec in enumerate(self.specs[self.num_given :]):
            mask[t, : spec.slice.start] = 1
        return None, mask

    @torch.no_grad()
    def _start(self) -> None:
        """Every conditional starts as the column's marginal."""
        for t, spec in enumerate(self.specs[self.num_given :]):
            missing = self.schema.columns[spec.column].missing
            self.group(t).start(self.own(self.nets.bias, t), spec.cells, missing)

    def group(self, t: int) -> Group:
        """The kind of target t."""
        return self.groups[self.targets[t].is_label]

    def own(self, parts: Sequence[Tensor] | nn.ParameterList, t: int) -> Tensor:
        """A view of the parameters of target t's networks, (M, ...), in those of each group."""
        group, part = self.group(t), parts[self.targets[t].is_label]
        position = self.specs[self.num_given + t].position
        return part.view(self.members, len(group), *part.shape[1:])[:, position]

    def set_mixture(self, mixture: MixedMixture, alpha: Tensor) -> None:
        """Join the simple model with weights alpha, shape (T,)."""
        self.mixture, self.alpha = mixture, alpha

    # ------------------------------------------------------------------ as a module has it

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.nets.b0.device

    @property
    def training(self) -> bool:
        """Whether the networks are in training mode."""
        return self.nets.training

    def train(self, mode: bool = True) -> Self:
        """Set the networks' mode."""
        self.nets.train(mode)
        return self

    def eval(self) -> Self:
        """Leave training mode."""
        return self.train(False)

    def to(self, device: torch.device | str) -> Self:
        """Move the networks, and what is added to their outputs."""
        self.nets.to(device)
        self.has_missing = self.has_missing.to(device)
        for group in self.groups:
            group.log_mass = group.log_mass.to(device)
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the networks."""
        return self.nets.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """All but cells and simple model."""
        nets = {f"nets.{k}": v for k, v in self.nets.state_dict().items()}
        return dict(alpha=self.alpha, has_missing=self.has_missing, **nets)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What :meth:`state_dict` gave."""
        self.alpha, self.has_missing = state["alpha"], state["has_missing"]
        nets = {k[5:]: v for k, v in state.items() if k.startswith("nets.")}
        self.nets.load_state_dict(nets)

    # ------------------------------------------------------------------ sizes

    @property
    def chunk(self) -> int:
        """Rows that networks serve at once: what they hold of a wide table is bounded."""
        if self.nets.index is None:
            return 4096
        k = 3 * self.config["components"]
        outputs = sum(len(g) * (1 + g.bins + k) for g in self.groups)
        held = self.nets.index.numel() + self.members * (
            3 * outputs + 4 * len(self.targets) * self.config["hidden_dim"]
        )
        return max(16, min(4096, 2**26 // held))

    def slot(self, t: int, i: int) -> int | None:
        """Where the networks of target t read the first feature of place i; None: nowhere."""
        if self.reads is None:
            return self.specs[i].slice.start
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
            torch.stack([e.bin for e in encoded]),
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
            pairs = zip(out, self.groups, strict=True)
            out = [self._floored(o, group) if len(o) else o for o, group in pairs]
        t_count, n = rows.bin.shape
        log_p: list[Any] = [None] * t_count
        gone: list[Any] = [None] * t_count
        for group, o in zip(self.groups, out, strict=True):
            if not len(group):
                continue
            which = group.targets
            cell = rows.bin[which].clamp_min(0).repeat(self.members, 1)
            inside, upper, width, offset = (p[which].repeat(self.members, 1) for p in rows.parts)
            if group.components:
                o = o if atoms else self._without_atoms(o)
                value = mixture_log_prob(
                    o[..., 1:], cell, inside, upper, width, offset, group.bins
                )
            else:
                value = o[..., 1:].log_softmax(-1).gather(-1, cell[..., None])[..., 0] + inside
            value = value.view(self.members, len(which), n)
            odds = o[..., 0].view(self.members, len(which), n)
            for i, t in enumerate(which):
                log_p[t], gone[t] = value[:, i], odds[:, i]
        return torch.stack(log_p, 1), torch.stack(gone, 1)

    def _without_atoms(self, out: Tensor) -> Tensor:
        """Outputs for numbers whose point masses get no probability."""
        which = self.groups[0].targets
        hide = torch.zeros(len(which), out.shape[-1], dtype=torch.bool, device=out.device)
        for i, t in enumerate(which):
            c = self.targets[t]
            hide[i, 1 + c.hist.num_bins : 1 + c.num_bins] = True
        return out.masked_fill(hide.repeat(self.members, 1)[:, None], NEVER)

    def _floored(self, out: Tensor, group: Group, only: int | None = None) -> Tensor:
        """Outputs with normalized logits, the bins mixed with a little of the marginal ones.

        A row that contradicts what the networks have learned then costs -log(FLOOR) nats more than
        its marginal density, not any number.
        """
        mass, b, k = group.log_mass, group.bins, group.components
        mass = mass[only] if only is not None else mass.repeat(self.members, 1)[:, None]
        odds, logits, rest = out.split([1, b + k, 2 * k], -1)
        log_w = logits.log_softmax(-1) + math.log1p(-FLOOR)
        bins, smooth = log_w.split([b, k], -1)
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
                log_p = q.log_prob(i, state, e.bin, e.upper, e.width, e.offset)
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
            alpha = self.alpha.double()[:, None]
            out = torch.logaddexp(
                torch.log1p(-alpha) + out, alpha.log() + self.mixture_log_prob(rows)
            )
        for t, c in enumerate(self.targets):
            if c.is_label:
                out[t] = torch.where(rows.bin[t] < 0, c.log_unseen, out[t])
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
                are missing; see :func:`pyroflows.density.completions.evidence`.
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
        self,
        t: int,
        features: Tensor,
        state: State | None = None,
        *,
        atoms: bool = True,
        member: int | None = None,
    ) -> Any:
        """The distribution of target t for N rows, given the columns before it.

        Args:
            t: Target.
            features: Shape (N, F).
            state: What the simple model has read.
            atoms: Whether point masses have their probability.
            member: The network that speaks for the column; None for all of them.
        """
        law = self._law(t, features, state, atoms, member)
        region = self.regions.at.get(self.num_given + t)
        return law if region is None else restrict(law, region)

    def _law(
        self, t: int, features: Tensor, state: State | None, atoms: bool, member: int | None
    ) -> Labels | Numbers:
        c, group, i = self.targets[t], self.group(t), self.specs[self.num_given + t].position
        rows = group.rows(self.members, i)
        rows = rows if member is None else rows[member : member + 1]
        out = self.nets.selected(features.to(self.device), int(c.is_label), rows)
        out = self._floored(out, group, i).cpu()
        alpha, j, q = float(self.alpha[t]), self.num_given + t, self.mixture
        q = q if alpha > 0 else None
        if isinstance(c, LabelCells):
            known = q.labels(j, state) if q is not None and state is not None else None
            return labels_of(c, out, known, alpha)
        simple = q.predict(j, state) if q is not None and state is not None else None
        return numbers_of(c, out, group.bins, simple, alpha, atoms=atoms)

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


def _specs(
    cells: Sequence[LabelCells | NumberCells], order: Sequence[int], num_given: int
) -> list[ColumnSpec]:
    """The columns in model order."""
    specs, end, seen = [], 0, [0, 0]
    for i, (j, c) in enumerate(zip(order, cells, strict=True)):
        place = slice(end, end + c.num_features)
        specs.append(ColumnSpec(j, c, place, seen[c.is_label]))
        end, seen[c.is_label] = place.stop, seen[c.is_label] + (i >= num_given)
    return specs


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
    return q.update(i, state, e.bin, e.upper - e.width / 2, known)
