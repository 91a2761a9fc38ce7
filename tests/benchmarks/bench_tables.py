"""Densities and samples of real tables: ``python -m tests.benchmarks.bench_tables``.

Two protocols, with the defaults of ``DensityEstimator`` on one thread. *Density*: mean nats of
held-out rows on the numeric columns, by ``protocol.py`` of the data folder. *Samples*: half of a
whole table trains, a quarter tests; ``table_quality.py`` beside the folder tells real from drawn
rows (C2ST, 0.5 is best) and trains trees on drawn rows (TSTR) or real ones (TRTR). The data folder
is ``--data``, by default ``../shared/data``; without it there is nothing to run.
"""

import argparse
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import torch

from pyroflows import DensityEstimator

TABLES = ["diamonds", "california_housing", "wine_quality", "penguins", "protein_casp", "adult"]
# The best of Gaussian, mixture, zuko's and nflows' flows, with and without Gaussianized columns.
BEST_PEER = [5.46, -0.82, -10.11, -3.38, 3.54, 7.69]
BEST_FLOW = [5.46, -0.82, -10.11, -3.53, 3.54, 7.69]  # of the flows among them
FLOWS = ["maf", "realnvp", "nice", "glow", "neural_spline"]
COPULA = {
    "diamonds": (0.87, 0.864),
    "california_housing": (0.95, 0.607),
    "adult": (0.97, 0.800),
    "penguins": (0.57, 0.805),
    "wine_quality": (0.85, 0.163),
}


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def density(
    protocol: ModuleType, name: str, seed: int, flow: str | None = None
) -> tuple[float, float]:
    """Mean test nats and CPU seconds of fitting and scoring."""
    train, _, test, _, columns = protocol.load(name)
    start = time.process_time()
    model = DensityEstimator(random_state=seed, flow=flow).fit(
        pd.DataFrame(train, columns=columns)
    )
    nats = model.score(pd.DataFrame(test, columns=columns))
    return nats, time.process_time() - start


def samples(tools: ModuleType, data: Path, name: str) -> dict[str, float]:
    """Sample quality on the whole table."""
    table = pd.read_parquet(data / f"{name}.parquet").sample(frac=1, random_state=0)
    n = len(table)
    train, test = (
        table[a:b].reset_index(drop=True) for a, b in ((0, n // 2), (n // 2, n // 2 + n // 4))
    )
    model = DensityEstimator(random_state=0).fit(train)
    drawn = model.sample(len(train), missing=bool(table.isna().any().any()))
    return tools.quality(train, test, drawn, tools.TARGET[name])


def tabulate_flows(protocol: ModuleType, tables: list[str], say: Callable[[str], None]) -> None:
    """Mean test nats of every flow beside the default, CPU seconds in brackets."""
    say("| table | default | " + " | ".join(FLOWS) + " | best peer flow |")
    say("|---" * (len(FLOWS) + 3) + "|")
    for name in tables:
        runs = [density(protocol, name, 0, flow) for flow in [None, *FLOWS]]
        nats = " | ".join(f"{value:.2f} ({seconds:.0f})" for value, seconds in runs)
        say(f"| {name} | {nats} | {BEST_FLOW[TABLES.index(name)]:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tables", nargs="+", default=TABLES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--what", nargs="+", default=["density", "samples"], choices=["density", "samples"]
    )
    parser.add_argument(
        "--flow",
        choices=["none", "all", *FLOWS],
        default="none",
        help="densities of a flow instead of the default; 'all' tabulates them beside it, seed 0",
    )
    parser.add_argument("--out", type=Path, help="Markdown file")
    args = parser.parse_args()
    if not (args.data / "protocol.py").exists():
        sys.exit(f"skipped: no protocol.py in {args.data}; pass --data")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")

    if args.flow == "all":
        tabulate_flows(module(args.data / "protocol.py"), args.tables, say)
        return
    flow = None if args.flow == "none" else args.flow
    if "density" in args.what:
        protocol = module(args.data / "protocol.py")
        say(
            "| table | "
            + " | ".join(f"seed {s}" for s in args.seeds)
            + " | best peer | CPU seconds |"
        )
        say("|---|" + "---|" * (len(args.seeds) + 2))
        for name in args.tables:
            runs = [density(protocol, name, seed, flow) for seed in args.seeds]
            nats = " | ".join(f"{r[0]:.2f}" for r in runs)
            peer = BEST_PEER[TABLES.index(name)]
            say(f"| {name} | {nats} | {peer:.2f} | {statistics.median(r[1] for r in runs):.0f} |")
        say("")
    if "samples" in args.what and flow is None:
        tools = module(args.data.parent / "tools" / "table_quality.py")
        say("| table | C2ST | copula's | TSTR | copula's | TRTR |")
        say("|---|---|---|---|---|---|")
        for name in args.tables:
            if name in COPULA:
                q = samples(tools, args.data, name)
                c2st, tstr = COPULA[name]
                ours = f"{q['c2st_auc']:.2f} | {c2st} | {q['tstr']:.3f} | {tstr}"
                say(f"| {name} | {ours} | {q['trtr']:.3f} |")


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
