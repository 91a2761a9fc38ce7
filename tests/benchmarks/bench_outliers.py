"""Wrong cells in a large table: ``python -m tests.benchmarks.bench_outliers``.

One impossible age, income and tax each is planted into a row of a table of 25 mixed columns that
depend on each other. The table is fitted as it is, wrong cells and all, and all its rows are
ranked, by ``outlier_score`` and by density. Other rows of the same kind, which the fit does not
see, tell how many are flagged at a contamination, and where such cells rank among 30,000 rows.
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pyroflows import DensityEstimator

PLANTED = dict(age=-3, income=9e7, tax=5000.0)
FRESH = 10_000  # rows that no fit sees
TOP = 10  # ranks among the rows of the table


def people(rows: int, seed: int, *, narrow: bool = False) -> pd.DataFrame:
    """Mixed columns that depend on each other through four hidden ones: 25, or 10 if narrow."""
    rng = np.random.default_rng(seed)
    hidden, mix = rng.normal(size=(rows, 4)), rng.normal(size=(4, 20)) / 2

    def mixed(k: int) -> np.ndarray:
        return hidden @ mix[:, k] + 0.6 * rng.normal(size=rows)

    # Ages that pile up at both ends, or are spread evenly, by turns.
    age = np.clip(np.round(45 + 15 * mixed(0)), 18, 95) if seed % 2 else rng.integers(18, 90, rows)
    income = np.round(np.exp(10.3 + 0.6 * mixed(1)), 2)
    work = pd.cut(mixed(2), [-np.inf, -1, 0, 0.5, 1.5, np.inf], labels=list("uvwxy"))
    columns = dict(
        age=age.astype(int),
        income=income,
        tax=np.round(0.0022 * income * np.exp(0.15 * rng.normal(size=rows)), 2),
        sex=rng.choice(["f", "m"], rows),
        work=work.astype(str),
        rain=np.where(rng.random(rows) < 0.6, 0, np.exp(mixed(4))),
        visits=rng.poisson(np.exp(1.5 + 0.8 * mixed(6))),
        normal=mixed(7),
        lognormal=np.exp(0.8 * mixed(8)),
        heavy=mixed(9) + rng.standard_t(3, rows),
    )
    if not narrow:
        columns |= dict(
            region=rng.choice(list("abcdefgh"), rows, p=np.arange(8, 0, -1) / 36),
            member=mixed(3) > 0.5,
            children=rng.poisson(np.exp(0.3 * mixed(5))),
            score=np.round(100 / (1 + np.exp(-mixed(10))), 1),
            weight=np.round(70 + 12 * mixed(11), 1),
            **{f"normal{i}": mixed(12 + i) for i in range(6)},
            **{f"lognormal{i}": np.exp(0.8 * mixed(i)) for i in range(3)},
            heavy1=mixed(18) + rng.standard_t(3, rows),
        )
    return pd.DataFrame(columns)


def planted(table: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """The table with one wrong cell each in three rows, and the numbers of the rows."""
    rows = np.random.default_rng(100 + seed).choice(len(table), len(PLANTED), replace=False)
    out = table.copy()
    for row, (name, value) in zip(rows, PLANTED.items(), strict=True):
        out.loc[row, name] = value
    return out, rows


def ranks(score: np.ndarray, rows: np.ndarray) -> list[int]:
    """Places of rows, the oddest first, ties to their disadvantage."""
    return [int((score >= score[row]).sum()) for row in rows]


def tried(rows: int, seed: int, seconds: float) -> list[str]:
    """The cells of one line of the table."""
    whole = people(rows + FRESH, seed)
    table, at = planted(whole[:rows], seed)
    fresh = whole[rows:].reset_index(drop=True)
    start = time.process_time()
    model = DensityEstimator(random_state=seed, max_time=seconds).fit(table)
    spent = time.process_time() - start
    by_oddness = ranks(model.outlier_score(table), at)
    by_density = ranks(-model.score_samples(table), at)
    score = model.outlier_score(fresh)
    flagged = [f"{np.mean(score > -np.log(share)):.2%}" for share in (0.1, 0.01, 0.001)]
    bar = np.sort(score)[-max(1, TOP * FRESH // rows)]
    unseen = [
        f"{np.mean(model.outlier_score(fresh[:100].assign(**{name: value})) >= bar):.0%}"
        for name, value in PLANTED.items()
    ]
    parts = [by_oddness, by_density, flagged, unseen]
    return [str(seed), *(", ".join(map(str, part)) for part in parts), f"{spent:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=30.0, help="max_time of a fit")
    parser.add_argument("--out", type=Path, help="Markdown file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = ", ".join(PLANTED)
    head = [
        "seed",
        f"ranks of {names}",
        "by density",
        "flagged at 10 %, 1 %, 0.1 %",
        f"unseen {names} in the top {TOP} of {args.rows}",
        "CPU seconds of fit",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    print(*lines, sep="\n", flush=True)
    for seed in args.seeds:
        lines.append(f"| {' | '.join(tried(args.rows, seed, args.seconds))} |")
        print(lines[-1], flush=True)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
