"""Mixtures of Gaussians and label frequencies.

The simple model that a small table is best served by.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["MixedMixture", "State", "gaussian_log_cell"]

State = tuple[Tensor, Tensor]  # log weights (N, K), whitened numbers so far (N, K, D)


def gaussian_log_cell(upper: Tensor, width: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """Log-probability of the cell (upper - width, upper] under Gaussians (..., K)."""
    width = width[..., None] / sd
    middle = (upper[..., None] - mean) / sd - width / 2
    density = -0.5 * middle**2 - 0.5 * math.log(2 * math.pi) + width.log()
    # P(cell) on the side of the lower tail, so that nothing cancels.
    a, b = -middle.abs() + width / 2, -middle.abs() - width / 2
    top = torch.special.log_ndtr(a)
    exact = top + torch.log1p(-(torch.special.log_ndtr(b) - top).exp().clamp_max(1 - 1e-12))
    return torch.where(width > 1e-2, exact, density)


class MixedMixture(nn.Module):
    r"""K classes: Gaussians of the normal scores, independent labels within a class.

    .. math:: p(s, \ell) = \sum_k \pi_k\, N(s; \mu_k, L_k L_k^\top) \prod_j \theta_{kj}(\ell_j)

    Read column by column it is an autoregressive model whose conditionals are again mixtures, with
    weights that the columns read so far have updated.

    Args:
        log_weight: :math:`\log \pi`, shape (K,).
        mean: Shape (K, D), numbers in model order.
        chol: :math:`L`, shape (K, D, D).
        labels: One table of log-probabilities per label column, shape (K, C).
        is_label: For each column in model order, whether it is one of labels.
    """

    def __init__(
        self,
        log_weight: Tensor,
        mean: Tensor,
        chol: Tensor,
        labels: list[Tensor],
        is_label: list[bool],
    ) -> None:
        super().__init__()
        self.register_buffer("log_weight", log_weight.double())
        self.register_buffer("mean", mean.double())
        self.register_buffer("chol", chol.double())
        for i, table in enumerate(labels):
            self.register_buffer(f"label{i}", table.double())
        self.is_label = is_label
        self.place, numbers, names = [], 0, 0
        for label in is_label:
            self.place.append(names if label else numbers)
            names, numbers = names + label, numbers + (not label)

    @property
    def tables(self) -> list[Tensor]:
        """The label tables."""
        return [getattr(self, f"label{i}") for i in range(sum(self.is_label))]

    def start(self, n: int) -> State:
        """The state before any column is read."""
        k, d = self.mean.shape
        return self.log_weight.expand(n, k).clone(), self.mean.new_zeros(n, k, d)

    def predict(self, j: int, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights (N, K), mean (N, K) and standard deviation (1, K) of number column j."""
        log_w, e = state
        i = self.place[j]
        row = self.chol[:, i]
        mean = self.mean[:, i] + (e[..., :i] * row[:, :i]).sum(-1)
        return log_w, mean, row[:, i][None]

    def labels(self, j: int, state: State) -> Tensor:
        """Log-probabilities of the labels of column j, shape (N, C)."""
        return (state[0][..., None] + self.tables[self.place[j]]).logsumexp(1)

    def log_prob(
        self, j: int, state: State, cell: Tensor, upper: Tensor, width: Tensor, offset: Tensor
    ) -> Tensor:
        """Log-density of the cells of column j, shape (N,).

        The arguments are those of the columns' encoding.
        """
        if self.is_label[j]:
            table = self.tables[self.place[j]]
            return (state[0] + table[:, cell.clamp(0, table.shape[1] - 1)].T).logsumexp(1)
        log_w, mean, sd = self.predict(j, state)
        return (log_w + gaussian_log_cell(upper, width, mean, sd)).logsumexp(1) + offset

    def update(self, j: int, state: State, cell: Tensor, score: Tensor, known: Tensor) -> State:
        """The state after column j is read; rows where it is not known keep their weights."""
        log_w, e = state
        if self.is_label[j]:
            table = self.tables[self.place[j]]
            known = known & (cell >= 0)
            gain = table[:, cell.clamp(0, table.shape[1] - 1)].T
        else:
            _, mean, sd = self.predict(j, state)
            z = (score[:, None] - mean) / sd
            i = self.place[j]
            read = torch.where(known[:, None], z, 0.0)
            if read.requires_grad:
                e = torch.cat([e[..., :i], read[..., None], e[..., i + 1 :]], -1)
            else:  # the state is the walker's own: a copy for each column costs their square
                e[..., i] = read
            gain = -0.5 * z**2 - sd.log()
        return (log_w + torch.where(known[:, None], gain, 0.0)).log_softmax(1), e

    @classmethod
    def union(cls, parts: list[MixedMixture]) -> MixedMixture:
        """The equal mixture of several."""
        tables = [torch.cat([p.tables[i] for p in parts]) for i in range(len(parts[0].tables))]
        return cls(
            torch.cat([p.log_weight - math.log(len(parts)) for p in parts]),
            torch.cat([p.mean for p in parts]),
            torch.cat([p.chol for p in parts]),
            tables,
            parts[0].is_label,
        )

    @classmethod
    def fit(
        cls,
        numbers: Tensor,
        labels: Tensor,
        sizes: list[int],
        is_label: list[bool],
        *,
        generator: torch.Generator,
        weight: Tensor | None = None,
        max_components: int = 24,
        iterations: int = 60,
    ) -> MixedMixture:
        """Expectation-maximization, with the number of classes that BIC prefers.

        Args:
            numbers: Normal scores, shape (N, D); missing ones at their mean.
            labels: Codes, shape (N, J); -1 where missing.
            sizes: Number of codes of each label column.
            is_label: Column kinds in model order.
            generator: Source of randomness.
            weight: Weights of the rows, shape (N,).
            max_components: Largest number of classes tried.
            iterations: EM steps per try.
        """
        n, d = numbers.shape
        w = (torch.ones(n) if weight is None else weight).double()[:, None]
        size = float(w.sum())
        hot = [
            torch.nn.functional.one_hot(labels[:, i] + 1, c + 1)[:, 1:].double()
            for i, c in enumerate(sizes)
        ]
        freq = [((w * h).sum(0) + 0.5) / ((w * h).sum() + 0.5 * h.shape[1]) for h in hot]
        middle = (w * numbers).sum(0) / size
        spread = ((w * (numbers - middle).square()).sum(0) / size).clamp_min(1e-4)
        flat = torch.cat([numbers / spread.sqrt(), *hot], 1)
        best, best_bic, worse = None, math.inf, 0
        for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
            params = k * (1 + d + d * (d + 1) / 2 + sum(c - 1 for c in sizes)) - 1
            if k > 1 and (
                k > max_components or size < 2 * params / max(d + len(sizes), 1) or worse > 1
            ):
                break
            for _ in range(2 if size < 5000 and k > 1 else 1):
                resp, last = _seeded(flat, w, k, generator), -math.inf
                for step in range(iterations if k > 1 else 1):
                    model = cls._maximize(w * resp, numbers, hot, freq, spread, is_label)
                    joint = model.joint(numbers, hot)
                    total = joint.logsumexp(1)
                    resp = (joint - total[:, None]).exp()
                    now = float((w[:, 0] * total).sum()) / size
                    if step > 5 and now - last < 1e-4:
                        break
                    last = now
                bic = params * math.log(size) - 2 * float((w[:, 0] * total).sum())
                if bic < best_bic:
                    best, best_bic, worse = model, bic, -1
            worse += 1
        if best is None:
            raise RuntimeError("no mixture could be fitted")
        if max_components == 1:
            return best
        return best.with_rare(numbers, labels, hot, freq, spread, w)

    def with_rare(
        self,
        numbers: Tensor,
        labels: Tensor,
        hot: list[Tensor],
        freq: list[Tensor],
        spread: Tensor,
        w: Tensor,
        *,
        rows: tuple[int, int] = (4, 100),
    ) -> MixedMixture:
        """One more class for each rare label, where BIC prefers it.

        Seeds by distance seldom find a class of a few rows.
        """
        best, size, d = self, float(w.sum()), numbers.shape[1]
        one = 1 + d + d * (d + 1) / 2 + sum(h.shape[1] - 1 for h in hot)
        for j, table in enumerate(hot):
            count = (w * table).sum(0)
            for b in ((count >= rows[0]) & (count <= min(rows[1], 0.02 * size))).nonzero()[:8, 0]:
                mine = (labels[:, j] == b).double()[:, None]
                joint = best.joint(numbers, hot)
                old = float((w[:, 0] * joint.logsumexp(1)).sum())
                resp = torch.cat([joint.softmax(1) * (1 - mine), mine], 1)
                for _ in range(10):
                    new = self._maximize(w * resp, numbers, hot, freq, spread, self.is_label)
                    joint = new.joint(numbers, hot)
                    resp = joint.softmax(1)
                gain = float((w[:, 0] * joint.logsumexp(1)).sum()) - old
                if 2 * gain > one * math.log(size):
                    best = new
        return best

    @classmethod
    def _maximize(
        cls,
        resp: Tensor,
        numbers: Tensor,
        hot: list[Tensor],
        freq: list[Tensor],
        spread: Tensor,
        is_label: list[bool],
    ) -> MixedMixture:
        """Parameters from weighted responsibilities (N, K)."""
        count = resp.sum(0)
        mean = (resp.T @ numbers) / count.clamp_min(1e-9)[:, None]
        centred = numbers[None] - mean[:, None]
        scatter = torch.einsum("nk,knd,kne->kde", resp, centred, centred)
        # A wishful prior of few observations: classes shrink towards the columns' variances.
        d = numbers.shape[1]
        prior = 0.05 * (d + 1)
        cov = (scatter + prior * 0.1 * torch.diag(spread)) / (count + prior)[:, None, None]
        cov = cov + 1e-5 * torch.diag(spread)
        tables = [
            ((resp.T @ h + 1.0 * f) / (resp.T @ h + 1.0 * f).sum(1, keepdim=True)).log()
            for h, f in zip(hot, freq, strict=True)
        ]
        return cls(
            ((count + 1) / (count + 1).sum()).log(),
            mean,
            torch.linalg.cholesky(cov),
            tables,
            is_label,
        )

    def joint(self, numbers: Tensor, hot: list[Tensor]) -> Tensor:
        d = numbers.shape[1]
        e = torch.linalg.solve_triangular(
            self.chol, (numbers[None] - self.mean[:, None]).mT, upper=False
        )
        half = self.chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        out = self.log_weight - 0.5 * (e**2).sum(1).T - half - 0.5 * d * math.log(2 * math.pi)
        return out + sum(h @ t.T for h, t in zip(hot, self.tables, strict=True))


def _seeded(x: Tensor, w: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Responsibilities from k-means++ seeds and a few Lloyd steps."""
    n = len(x)
    center = x[torch.randint(n, (1,), generator=generator)]
    while len(center) < k:
        far = w[:, 0] * torch.cdist(x, center).amin(1) ** 2 + 1e-12
        center = torch.cat([center, x[torch.multinomial(far, 1, generator=generator)]])
    for _ in range(10 if k > 1 else 1):
        near = torch.cdist(x, center).argmin(1)
        hot = torch.nn.functional.one_hot(near, k).double()
        size = (w * hot).sum(0)[:, None]
        center = torch.where(size > 0, hot.T @ (w * x) / size.clamp_min(1e-9), center)
    return 0.9 * hot + 0.1 / k
