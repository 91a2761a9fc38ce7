"""The mixed autoregressive model of a table.

Conditionals column by column, exact on complete rows, Monte Carlo over missing cells.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyroflows.density.columns import NEVER, Encoded, LabelCells, NumberCells
from pyroflows.density.mixtures import MixedMixture
from pyroflows.density.network import ColumnNets, log_scale, mixture_log_prob
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
    """

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
        mask = torch.zeros(t_count, max(int(ends[-1]), 1))
        for t in range(t_count):
            mask[t, : ends[num_given + t]] = 1
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
        )
        self.register_buffer("alpha", torch.zeros(t_count))
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
                bias[:, b : b + k] = -math.log(k)
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

    # ------------------------------------------------------------------ encoding

    def encode(self, values: Tensor, *, lattice: bool = True) -> Rows:
        """Rows of schema-ordered values, shape (N, D) with NaN where missing."""
        raw = values[:, self.order]
        n = len(raw)
        features = [c.features(raw[:, i]) for i, c in enumerate(self.cells)]
        encoded = [
            c.encode(raw[:, self.num_given + t], lattice=lattice)
            for t, c in enumerate(self.targets)
        ]
        return Rows(
            torch.cat(features, 1) if features else raw.new_zeros(n, 1).float(),
            torch.stack([e.cell for e in encoded]),
            torch.stack([torch.stack(e[1:]) for e in encoded], 1).float(),
            raw[:, self.num_given :].T.isnan(),
            raw,
        )

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
        assert q is not None
        state = q.start(len(rows))
        out = []
        for i, c in enumerate(self.cells):
            x = rows.raw[:, i]
            e = c.encode(x)
            if i >= self.num_given:
                log_p = q.log_prob(i, state, e.cell, e.upper, e.width, e.offset)
                # the mixture knows bins of labels only
                out.append(log_p + e.inside if c.is_label else log_p)
            state = q.update(i, state, e.cell, e.upper - e.width / 2, _regular(x, e))
        return torch.stack(out)

    def column_log_prob(self, rows: Rows, *, atoms: bool = True) -> tuple[Tensor, Tensor]:
        """Log-densities of target cells (0 where missing) and of their pattern, both (T, N)."""
        log_p, odds = self.net_log_prob(rows.to(self.device), atoms=atoms)
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
        self,
        values: Tensor,
        *,
        pattern: bool = False,
        draws: int = 64,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Log-density of rows, shape (N,); missing cells are integrated out.

        Args:
            values: Shape (N, D), NaN where missing.
            pattern: Whether to add the probability of which cells are missing, by the model that
                sees missing cells as such (exact).
            draws: Particles per row that has observed cells after a missing one.
            generator: Source of randomness.
        """
        out = values.new_empty(len(values))
        for part in torch.arange(len(values)).split(4096):
            rows = self.encode(values[part])
            log_p, log_m = self.column_log_prob(rows)
            if pattern:
                out[part] = (log_p + log_m).sum(0)
                continue
            first, last = self._gaps(rows.missing)
            place = torch.arange(len(log_p))[:, None]
            out[part] = torch.where(place < first, log_p, 0.0).sum(0)
            todo = (last > first).nonzero()[:, 0]
            for few in todo.split(max(1, 16384 // draws)):
                if len(few):
                    start = int(first[few].min())
                    out[part[few]] = self.particles(
                        values[part[few]], draws, generator=generator, start=start
                    )[2] + torch.where(place[:start] < first[few], log_p[:start, few], 0.0).sum(0)
        return out

    @staticmethod
    def _gaps(missing: Tensor) -> tuple[Tensor, Tensor]:
        """First missing and last observed place of each column of a (T, N) mask."""
        t = len(missing)
        place = torch.arange(t)[:, None]
        return torch.where(missing, place, t).amin(0), torch.where(missing, -1, place).amax(0)

    def walk(self, values: Tensor) -> Iterator[tuple[int, int, Tensor, Any, Tensor]]:
        """Yield (t, place, features, state of the simple model, raw rows) for each target."""
        raw = values[:, self.order]
        features = torch.cat([c.features(raw[:, i]) for i, c in enumerate(self.cells)], 1)
        q = self.mixture if self.mixture is not None and bool((self.alpha > 0).any()) else None
        state = None if q is None else q.start(len(raw))
        for i, c in enumerate(self.cells):
            if i >= self.num_given:
                yield i - self.num_given, i, features, state, raw
            if q is not None and state is not None:
                e = c.encode(raw[:, i])
                state = q.update(i, state, e.cell, e.upper - e.width / 2, _regular(raw[:, i], e))

    # ------------------------------------------------------------------ sampling

    def conditional(self, t: int, features: Tensor, q_state: Any) -> tuple[Tensor, Any]:
        """Outputs of the M networks of target t, shape (M, N, P), and the state as it came."""
        kind, i = self.place[t]
        rows = [m * self.sizes[kind] + i for m in range(self.members)]
        out = self._floored(self.nets.some(features.to(self.device), kind, rows), kind, i)
        return out.cpu(), q_state

    def _draw(
        self,
        t: int,
        out: Tensor,
        q_state: Any,
        generator: torch.Generator | None,
        lattice: bool = True,
    ) -> Tensor:
        """Values of target t, shape (N,), from its conditionals."""
        c, (kind, _) = self.targets[t], self.place[t]
        n = out.shape[1]
        member = torch.randint(self.members, (n,), generator=generator)
        o = out[member, torch.arange(n)][:, 1:]
        b = self.bins[kind]
        k = (o.shape[1] - b) // 3
        logits = o[:, : b + k]
        if not kind and not lattice and len(c.atoms):
            logits = logits.index_fill(1, torch.arange(c.hist.num_bins, c.num_bins), NEVER)
        pick = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        x = c.draw(pick.clamp_max(c.num_bins - 1), generator, lattice=lattice)
        if not kind:
            part = (pick - b).clamp_min(0)[:, None]
            loc, raw = (
                o[:, b + k : b + 2 * k].gather(1, part)[:, 0],
                o[:, b + 2 * k :].gather(1, part)[:, 0],
            )
            u = torch.rand(n, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
            s = loc.double() + log_scale(raw).exp().double() * u.logit()
            x = torch.where(pick >= b, c.from_score(s, lattice=lattice), x)
        alpha = float(self.alpha[t])
        if q_state is not None and alpha > 0:
            q, j = self.mixture, self.num_given + t
            if kind:
                code = torch.multinomial(q.labels(j, q_state).exp(), 1, generator=generator)[:, 0]
                simple = c.draw(code, generator)
            else:
                log_w, mean, sd = q.predict(j, q_state)
                pick = torch.multinomial(log_w.exp(), 1, generator=generator)
                noise = torch.randn(n, generator=generator, dtype=torch.float64)
                simple = c.from_score(
                    mean.gather(1, pick)[:, 0] + sd[0][pick[:, 0]] * noise, lattice=lattice
                )
            x = torch.where(torch.rand(n, generator=generator) < alpha, simple, x)
        return x

    def _cell_log_prob(self, t: int, x: Tensor, out: Tensor, q_state: Any) -> Tensor:
        """Log-density of values x of target t, shape (N,)."""
        c, (kind, _) = self.targets[t], self.place[t]
        e = c.encode(x)
        m, n, _ = out.shape
        cell = e.cell.clamp_min(0).expand(m, n)
        if kind:
            log_p = out[..., 1:].log_softmax(-1).gather(-1, cell[..., None])[..., 0] + e.inside
        else:
            inside, upper, width, offset = (p.float().expand(m, n) for p in e[1:])
            log_p = mixture_log_prob(
                out[..., 1:], cell, inside, upper, width, offset, self.bins[0]
            )
        log_p = log_p.double().logsumexp(0) - math.log(m)
        if q_state is not None:
            simple = self.mixture.log_prob(
                self.num_given + t, q_state, e.cell, e.upper, e.width, e.offset
            )
            simple = simple + e.inside if kind else simple
            alpha = self.alpha[t].double().cpu()
            log_p = torch.logaddexp(torch.log1p(-alpha) + log_p, alpha.log() + simple)
        if kind:
            log_p = torch.where(e.cell < 0, c.log_unseen, log_p)
        return torch.where(log_p < NEVER / 10, -torch.inf, log_p)

    @torch.no_grad()
    def particles(
        self,
        values: Tensor,
        draws: int,
        *,
        generator: torch.Generator | None = None,
        start: int = 0,
        leave_missing: bool = False,
        lattice: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sequential Monte Carlo over the missing cells, column by column.

        A missing cell is drawn from its conditional, an observed one weighs the particles; they
        are resampled where their effective number falls below half. The first missing label of a
        row is enumerated rather than drawn when its labels are fewer than the particles.

        Args:
            values: Shape (N, D), NaN where a cell is to be filled in.
            draws: Particles per row, S.
            generator: Source of randomness.
            start: Target place before which nothing is missing, and nothing is to be counted.
            leave_missing: Draw also whether a missing cell stays missing, as in the data.
            lattice: Draw lattice columns and point masses as such; else from the smooth density
                around them.

        Returns:
            Rows filled in, shape (N, S, D); their log-weights, shape (N, S); the log-density of
            the observed cells from ``start`` on, shape (N,).
        """
        n, d = values.shape
        raw = values[:, self.order].repeat_interleave(draws, 0)
        unknown = raw.isnan()
        features = torch.cat([c.features(raw[:, i]) for i, c in enumerate(self.cells)], 1)
        q = self.mixture if self.mixture is not None and bool((self.alpha > 0).any()) else None
        state = None if q is None else q.start(len(raw))
        log_w = values.new_full((n, draws), -math.log(draws))
        evidence = values.new_zeros(n)
        fresh = torch.ones(n, dtype=torch.bool)  # rows of identical particles
        for i, c in enumerate(self.cells):
            t = i - self.num_given
            if t >= start:
                out, _ = self.conditional(t, features, state)
                gap = unknown[:, i]
                if gap.any():
                    at = gap.nonzero()[:, 0]
                    q_at = None if state is None else (state[0][at], state[1][at])
                    x = self._draw(t, out[:, at], q_at, generator, lattice)
                    row = at // draws
                    if c.is_label and 1 < draws and not leave_missing:
                        count = len(c.group)
                        if count <= draws:
                            x, extra = self._enumerate(t, x, out[:, at], q_at, fresh[row], draws)
                            log_w.view(-1)[at] += extra
                    if leave_missing and bool(c.missing_seen):
                        odds = out[:, at, 0].sigmoid().mean(0)
                        x = torch.where(
                            torch.rand(len(at), generator=generator) < odds, torch.nan, x
                        )
                    raw[at, i] = x
                    features[at, self.slices[i]] = c.features(x)
                    fresh[row] = False
                if not gap.all():
                    log_p = self._cell_log_prob(t, raw[:, i], out, state)
                    log_w = log_w + torch.where(gap, 0.0, log_p).view(n, draws)
                    if draws > 1:
                        seen = ~gap.view(n, draws)[:, 0]
                        total = log_w.logsumexp(1)
                        share = (log_w - total[:, None]).nan_to_num(-math.log(draws)).exp()
                        poor = (
                            seen
                            & (1 / share.square().sum(1) < draws / 2)
                            & ~fresh
                            & total.isfinite()
                        )
                        if poor.any():
                            at = poor.nonzero()[:, 0]
                            offset = torch.rand(len(at), 1, generator=generator, dtype=share.dtype)
                            grid = (torch.arange(draws) + offset) / draws
                            pick = torch.searchsorted(share[at].cumsum(1), grid).clamp_max(
                                draws - 1
                            )
                            to, come = _flat(at, draws), (at[:, None] * draws + pick).reshape(-1)
                            raw[to], features[to] = raw[come], features[come]
                            if state is not None:
                                state[0][to], state[1][to] = state[0][come], state[1][come]
                            evidence[at] += total[at]
                            log_w[at] = -math.log(draws)
            if state is not None:
                e = c.encode(raw[:, i])
                state = q.update(i, state, e.cell, e.upper - e.width / 2, _regular(raw[:, i], e))
        filled = torch.empty_like(raw)
        filled[:, self.order] = raw
        total = log_w.logsumexp(1)
        return filled.view(n, draws, d), log_w - total[:, None], evidence + total

    def _enumerate(
        self, t: int, x: Tensor, out: Tensor, q_state: Any, fresh: Tensor, draws: int
    ) -> tuple[Tensor, Tensor]:
        """Replace draws of label t by all labels in turn, and their log importance weights."""
        count = len(self.targets[t].group)
        turn = torch.arange(len(x)) % draws % count
        times = torch.bincount(torch.arange(draws) % count, minlength=count).double()
        log_p = self._cell_log_prob(t, turn.double(), out, q_state)
        extra = log_p - (times[turn] / draws).log()
        return torch.where(fresh, turn.double(), x), torch.where(fresh, extra, 0.0)

    # ------------------------------------------------------------------ distribution functions

    def cdf(self, t: int, x: Tensor, out: Tensor, q_state: Any) -> Tensor:
        """P(X <= x) for number target t, shape (N,), given outputs of :meth:`conditional`."""
        c = self.targets[t]
        half = c.step / 2
        x = c.snap(x) + half if c.step > 0 else x
        b = self.bins[0]
        k = (out.shape[-1] - 1 - b) // 3
        o = out[..., 1:].double()
        w = o[..., : b + k].softmax(-1)
        cell, share = c.hist.cdf_in_bin(x)
        bins = w[..., : c.hist.num_bins]
        below = torch.cat([bins.new_zeros(*bins.shape[:-1], 1), bins.cumsum(-1)], -1)
        index = cell.expand(out.shape[:2])[..., None]
        total = below.gather(-1, index)[..., 0] + bins.gather(-1, index)[..., 0] * share
        s = c.scores(x)[0]
        scale = log_scale(o[..., b + k + k :]).exp()
        total = total + (
            w[..., b:] * ((s[:, None] - o[..., b + k : b + 2 * k]) / scale).sigmoid()
        ).sum(-1)
        for a, atom in enumerate(c.atoms):
            total = total + w[..., c.hist.num_bins + a] * (x >= atom)
        total = total.mean(0)
        if q_state is not None:
            log_w, mean, sd = self.mixture.predict(self.num_given + t, q_state)
            simple = (log_w.exp() * torch.special.ndtr((s[:, None] - mean) / sd)).sum(1)
            alpha = self.alpha[t].double().cpu()
            total = (1 - alpha) * total + alpha * simple
        total = torch.where(x < c.bounds[0], 0.0, total)
        return torch.where(x >= c.bounds[1], 1.0, total).clamp(0, 1)

    def mean(self, t: int, out: Tensor, q_state: Any) -> Tensor:
        """Mean of number target t, shape (N,), from its distribution function at 400 points."""
        c = self.targets[t]
        s = torch.linspace(-10, 10, 401, dtype=torch.float64)
        x = torch.cat([c.keep(c.scores.inverse(s)), c.atoms]).unique()
        step = c.step if c.step > 0 else 0.0
        f = torch.stack([self.cdf(t, v.expand(out.shape[1]), out, q_state) for v in x])
        middle = (x[:-1] + step + x[1:]) / 2
        share = f.diff(dim=0) / (f[-1] - f[0]).clamp_min(1e-9)
        return (middle[:, None] * share).sum(0) if len(x) > 1 else x.expand(out.shape[1])

    def icdf(self, t: int, p: Tensor, out: Tensor, q_state: Any) -> Tensor:
        """Smallest x with P(X <= x) >= p for number target t, by bisection; shape (N,)."""
        c = self.targets[t]
        lo, hi = torch.full_like(p, -30.0), torch.full_like(p, 30.0)
        for _ in range(50):
            mid = (lo + hi) / 2
            up = self.cdf(t, c.scores.inverse(mid), out, q_state) >= p
            lo, hi = torch.where(up, lo, mid), torch.where(up, mid, hi)
        return c.keep(c.scores.inverse(hi))


def _regular(x: Tensor, e: Encoded) -> Tensor:
    """Cells that tell the simple model something.

    Neither missing nor point masses of a number column.
    """
    return ~x.isnan() & (e.offset > NEVER / 10)


def _flat(rows: Tensor, draws: int) -> Tensor:
    return (rows[:, None] * draws + torch.arange(draws)).reshape(-1)
