"""Command line: ``pyroflows fit | score | sample | inspect`` on CSV and Parquet tables.

Under ``torchrun`` the fit is shared by all processes and rank 0 saves.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"pyroflows {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyroflows", description="Densities of tables.")
    commands = parser.add_subparsers(dest="command", required=True)

    fit = commands.add_parser("fit", help="fit a table and save the model")
    fit.add_argument(
        "table", help="CSV or Parquet file, or a folder of them; large ones are streamed"
    )
    fit.add_argument("-o", "--output", required=True, help="model file, .safetensors")
    fit.add_argument(
        "--target",
        nargs="+",
        metavar="COLUMN",
        help="columns to model; default all that are not given",
    )
    fit.add_argument("--given", nargs="+", metavar="COLUMN", help="columns to condition on")
    fit.add_argument("--missing", choices=["ignore", "model"], default="ignore")
    fit.add_argument("--max-time", type=float, default=90.0, help="seconds of processor time")
    fit.add_argument("--max-steps", type=int, help="optimizer steps, at most")
    fit.add_argument(
        "--in-memory", type=int, default=1_000_000, help="stream tables with more rows than this"
    )
    fit.add_argument("--seed", type=int, help="for a repeatable result")
    fit.add_argument("--device", default="auto")
    fit.add_argument("--quiet", action="store_true", help="no progress bar")
    fit.set_defaults(run=_fit)

    score = commands.add_parser("score", help="log-density of every row")
    score.add_argument("model")
    score.add_argument("table", help="CSV or Parquet; streamed")
    score.add_argument(
        "-o",
        "--output",
        help="CSV or Parquet with a column log_density; default: print the mean only",
    )
    score.set_defaults(run=_score)

    sample = commands.add_parser("sample", help="draw rows")
    sample.add_argument("model")
    sample.add_argument("-n", type=int, default=10, help="rows, or rows per given row")
    sample.add_argument("-o", "--output", help="CSV or Parquet; default: CSV to the terminal")
    sample.add_argument(
        "--given", nargs="+", metavar="COLUMN=VALUE", help="values to condition on"
    )
    sample.add_argument("--given-table", help="CSV or Parquet with values to condition on")
    sample.add_argument(
        "--missing", action="store_true", help="leave cells missing as often as in the data"
    )
    sample.add_argument("--seed", type=int)
    sample.set_defaults(run=_sample)

    inspect = commands.add_parser(
        "inspect", help="what a model file holds, or what a table would be taken for"
    )
    inspect.add_argument("file")
    inspect.set_defaults(run=_inspect)
    return parser


def _fit(args: argparse.Namespace) -> None:
    import torch

    from pyroflows.density import DensityEstimator

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.distributed.is_initialized():
        gpu = torch.cuda.is_available() and args.device in ("auto", "cuda")
        if gpu:
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
    seed = args.seed if args.seed is not None or world == 1 else 0  # the processes must agree
    model = DensityEstimator(
        target=args.target,
        given=args.given,
        missing=args.missing,
        max_time=args.max_time,
        max_steps=args.max_steps,
        random_state=seed,
        device=args.device,
        progress=not args.quiet,
    )
    model.fit_file(args.table, in_memory=args.in_memory)
    model.save(args.output)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{args.output}: held-out {model.history_['valid'].iloc[-1]:.3f} nats per row")
    if world > 1:
        torch.distributed.destroy_process_group()


def _score(args: argparse.Namespace) -> None:
    from pyroflows.density import DensityEstimator
    from pyroflows.density.streaming import TableFile

    model = DensityEstimator.load(args.model)
    columns = list(model.feature_names_in_) if hasattr(model, "feature_names_in_") else None
    total, rows = 0.0, 0
    with _Writer(args.output) as out:
        for frame in TableFile(args.table, columns).batches():
            nats = model.score_samples(frame)
            total, rows = total + float(nats.sum()), rows + len(nats)
            out.write(frame.assign(log_density=nats))
    print(f"{total / max(rows, 1):.6f} nats per row, {rows} rows")


def _sample(args: argparse.Namespace) -> None:
    from pyroflows.density import DensityEstimator
    from pyroflows.density.streaming import TableFile

    model = DensityEstimator.load(args.model)
    given: Any = TableFile(args.given_table).read() if args.given_table else None
    if args.given:
        bad = [g for g in args.given if "=" not in g]
        if bad:
            raise ValueError(f"--given expects COLUMN=VALUE; got {bad}")
        texts = dict(g.split("=", 1) for g in args.given)
        unknown = [c for c in texts if c not in model.schema_.names]
        if unknown:
            raise ValueError(f"--given: no columns {unknown}; the model has {model.schema_.names}")
        given = {c: model.schema_[c].parse(text) for c, text in texts.items()}
    chunk = args.n if given is not None else 50_000
    with _Writer(args.output, show=True) as out:
        for k, start in enumerate(range(0, max(args.n, 1), max(chunk, 1))):
            seed = None if args.seed is None else args.seed + k
            count = min(chunk, args.n - start)
            out.write(model.sample(count, given, missing=args.missing or None, random_state=seed))


def _inspect(args: argparse.Namespace) -> None:
    import pandas as pd

    with pd.option_context(
        "display.width", 160, "display.max_columns", 20, "display.max_rows", 500
    ):
        if Path(args.file).suffix in (".csv", ".parquet"):
            import numpy as np

            from pyroflows.density.streaming import TableFile
            from pyroflows.tables import Schema

            print(
                Schema.from_frame(
                    TableFile(args.file).sample(200_000, np.random.default_rng(0))
                ).summary()
            )
            return
        from pyroflows.density import DensityEstimator

        model = DensityEstimator.load(args.file)
        print(f"{model}\n{sum(p.numel() for p in model.model_.parameters())} parameters")
        print(model.summary())
        print(model.history_.tail(3).to_string(index=False))


class _Writer:
    """Tables to a CSV or Parquet file piece by piece, or to the terminal, or nowhere."""

    def __init__(self, path: str | None, *, show: bool = False) -> None:
        self.path, self.show = path, show
        self._file: Any = None
        if path and Path(path).suffix not in (".csv", ".parquet"):
            raise ValueError(f"{path}: expected a name ending in .csv or .parquet")

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, frame: pd.DataFrame) -> None:
        """Append rows."""
        if self.path is None:
            if self.show:
                frame.to_csv(sys.stdout, index=False)
        elif self.path.endswith(".csv"):
            first = self._file is None
            self._file = self._file or open(self.path, "w", newline="")  # noqa: SIM115
            frame.to_csv(self._file, index=False, header=first)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = pa.Table.from_pandas(frame, preserve_index=False)
            self._file = self._file or pq.ParquetWriter(self.path, table.schema)
            self._file.write_table(table.cast(self._file.schema))


if __name__ == "__main__":
    sys.exit(main())
