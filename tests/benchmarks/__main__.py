"""Time pyroflows beside its peers: ``make bench`` or ``python -m tests.benchmarks --items nsf64``.

Process CPU time on one thread. All libraries of an item take turns in one process, round by round,
so that a disturbance hits them alike; figures are medians over the rounds, ratios medians of the
rounds' ratios. Ratios below 1.1 are ties. A peer that is not installed is left out with a note
(``pip install -e ".[bench]"``).
"""

import argparse
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks.libraries import BUILDERS, Model, matrix_products

ITEMS = {
    "realnvp8": ("RealNVP D=8, train step", "realnvp", 8, "train"),
    "realnvp64": ("RealNVP D=64, train step", "realnvp", 64, "train"),
    "nsf8": ("NSF coupling D=8, train step", "nsf", 8, "train"),
    "nsf64": ("NSF coupling D=64, train step", "nsf", 64, "train"),
    "maf64": ("MAF D=64, train step", "maf", 64, "train"),
    "mafsample64": ("MAF D=64, sampling", "maf", 64, "sample"),
}
BATCH = 512
FLOOR = "matrix products"
PACKAGES = ["torch", "pyro-ppl", "zuko", "nflows", "normflows", "FrEIA"]


def train_step(model: Model, x: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        # A new view each time, as from a data loader: no cache may answer from the step before.
        (-model.log_prob(x.view(x.shape)).mean()).backward()
        optimizer.step()

    return step


def sampling(model: Model) -> Callable[[], None]:
    def draw() -> None:
        with torch.no_grad():
            model.sample(BATCH)

    return draw


def runnables(kind: str, dim: int, task: str) -> tuple[dict[str, Callable[[], None]], list[str]]:
    """Every library's step, and notes on those that are not there."""
    steps, notes = {}, []
    x = torch.randn(BATCH, dim)
    for name, build in BUILDERS.items():
        torch.manual_seed(0)
        try:
            model = build(kind, dim)
        except ImportError as error:
            notes.append(f"{name} is left out: {error}")
            continue
        if model is None:
            continue
        with torch.no_grad():  # away from the identity, where an inverse might be found too easily
            for p in model.module.parameters():
                p.add_(0.02 * torch.randn_like(p))
        steps[name] = train_step(model, x) if task == "train" else sampling(model)
    steps[FLOOR] = matrix_products(kind, dim, BATCH, backward=task == "train")
    return steps, notes


def interleave(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of one call by library and round; a measurement is 20 ms of calls or more."""
    repeats = {}
    for name, step in steps.items():
        for _ in range(3):
            start = time.process_time()
            step()
            repeats[name] = 1 + int(0.02 / max(time.process_time() - start, 1e-5))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            for _ in range(repeats[name]):
                step()
            seconds[name].append((time.process_time() - start) / repeats[name])
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def cell(seconds: list[float] | None, own: list[float] | None) -> str:
    if seconds is None:
        return ""
    text = f"{1e3 * statistics.median(seconds):.1f}"
    return text if own is None or seconds is own else f"{text} ({ratio(seconds, own):.1f} x)"


def import_seconds() -> float:
    """CPU seconds of ``import pyroflows`` after torch and Pyro, median of five interpreters."""
    code = (
        "import time, torch, pyro; start = time.process_time(); import pyroflows; "
        "print(time.process_time() - start)"
    )
    runs = [subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(5)]
    return statistics.median(map(float, runs))


def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", default=",".join(ITEMS), help="comma-separated; all by default")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, help="also write the table there, e.g. for the docs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers' own

    columns = [*BUILDERS, FLOOR]
    lines = [
        f"Milliseconds of CPU time on one thread, batch {BATCH}; in brackets, over pyroflows.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    print("\n".join(lines), flush=True)
    remarks: dict[str, None] = {}
    for item in args.items.split(","):
        title, kind, dim, task = ITEMS[item]
        steps, notes = runnables(kind, dim, task)
        remarks.update(dict.fromkeys(notes))
        seconds = interleave(steps, args.rounds)
        own = seconds.get("pyroflows")
        row = [title, *(cell(seconds.get(name), own) for name in columns)]
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    tail = [
        "",
        f"`import pyroflows` after torch and Pyro: {1e3 * import_seconds():.0f} ms.",
        "",
        f"Python {platform.python_version()}, {versions()}; {args.rounds} rounds.",
        *(f"\n{remark}" for remark in remarks),
    ]
    print("\n".join(tail))
    if args.out:
        args.out.write_text("\n".join([*lines, *tail]) + "\n")


if __name__ == "__main__":
    main()
