"""Command line: ``pyroflows fit | score | sample | inspect`` on text and Parquet tables.

Under ``torchrun`` the fit is shared by all processes and rank 0 saves.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from pyroflows.density import DensityEstimator
    from pyroflows.density.streaming import TableFile

__all__ = ["main"]

CHUNK = 50_000  # rows drawn at once
WRITABLE = (".csv", ".csv.gz", ".tsv", ".parquet")
SEVERAL: dict[str, Any] = dict(nargs="+", action="extend")
SEED: dict[str, Any] = dict(type=int, help="for a repeatable result; default the fit's")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _say(args, f"note: {message}")
        try:
            args.run(args)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyError as error:  # its str is the repr of its text
            _say(args, str(error.args[0] if error.args else error))
            return 1
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            _say(args, str(error))
            return 1
    return 0


def _say(args: argparse.Namespace, text: str) -> None:
    print(f"pyroflows {args.command}: {text}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyroflows", description="Densities of tables.")
    version = sys.modules["pyroflows"].__version__
    parser.add_argument("--version", action="version", version=f"pyroflows {version}")
    commands = parser.add_subparsers(dest="command", required=True)
    formats = _format_options()

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
        added = commands.add_parser(name, parents=[formats], help=text)
        added.set_defaults(run=run)
        return added.add_argument

    _fit_options(command("fit", _fit, "fit a table and save the model"))

    add = command("score", _score, "log-density of every row")
    add("model")
    add("table", help="text or Parquet, read in pieces")
    kinds = ", ".join(WRITABLE[:-1])
    text = f"the table with a column log_density, {kinds} or {WRITABLE[-1]}"
    add("-o", "--output", help=f"{text}; default: print the mean only")

    add = command("sample", _sample, "draw rows")
    add("model")
    add("-n", type=_count, default=10, help="rows, or rows per given row")
    add("-o", "--output", help="a table; default: CSV to the terminal")
    text = "values to condition on; may be repeated"
    add("--given", metavar="COLUMN=VALUE", help=text, **SEVERAL)
    add("--given-table", help="table with values to condition on")
    add("--missing", action="store_true", help="leave cells missing as often as in the data")
    add("--seed", **SEED)

    add = command("report", _report, "how good samples are")
    add("model")
    add("table", help="real rows, best ones that the fit did not see")
    add("--train", help="the rows of the fit, so that copies of them are seen")
    add("--seed", **SEED)

    text = "what a model file holds, or what a table would be taken for"
    add = command("inspect", _inspect, text)
    add("file")
    add("--schema", type=_schema, metavar="JSON", help="as for fit")
    return parser


def _fit_options(add: Any) -> None:
    add("table", help="text or Parquet file, or a folder of them; large ones are streamed")
    add("-o", "--output", required=True, help="model file, .safetensors")
    text = "columns to model; default all that are not given"
    add("--target", metavar="COLUMN", help=text, **SEVERAL)
    add("--given", metavar="COLUMN", help="columns to condition on", **SEVERAL)
    text = (
        "what columns are taken for, as text or as a file: "
        '{"zip": {"kind": "categorical"}, "id": {"kind": "ignore"}, "price": {"step": null}}'
    )
    add("--schema", type=_schema, metavar="JSON", help=text)
    text = "what holds in every row, e.g. 'start < end' 'a + b == c'"
    add("--constraint", metavar="RELATION", help=text, **SEVERAL)
    add("--flow", help="a flow for the numbers: neural_spline, maf, realnvp, ...")
    add("--missing", choices=["ignore", "model"], default="ignore")
    add("--max-time", type=float, default=90.0, help="seconds of processor time")
    add("--max-steps", type=int, help="optimizer steps, at most")
    text = "stream tables with more rows than this"
    add("--in-memory", type=int, default=1_000_000, help=text)
    add("--seed", type=int, help="for a repeatable result")
    add("--device", default="auto")
    add("--quiet", action="store_true", help="no progress bar")


def _format_options() -> argparse.ArgumentParser:
    """How a text table is written, in the words of :func:`pandas.read_csv`."""
    options = argparse.ArgumentParser(add_help=False)
    group = options.add_argument_group("text tables, as in pandas.read_csv")
    keep: dict[str, Any] = dict(default=argparse.SUPPRESS)
    group.add_argument("--sep", type=_character, help="separator; default: looked for", **keep)
    group.add_argument("--decimal", help="decimal mark, '.' by default", **keep)
    group.add_argument("--thousands", help="mark between thousands, e.g. ','", **keep)
    group.add_argument("--encoding", help="utf-8 by default", **keep)
    text = "further texts that mean a missing cell, e.g. '?'"
    group.add_argument("--na", dest="na_values", metavar="TEXT", help=text, **SEVERAL, **keep)
    keep |= dict(action="store_const", const=None, dest="header")
    text = "the first line is data; columns are x0, x1, ..."
    group.add_argument("--no-header", help=text, **keep)
    return options


def _character(text: str) -> str:
    return {r"\t": "\t", "tab": "\t"}.get(text, text)


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError(f"expected a number of rows, 0 or more; got {text}")
    return count


def _schema(text: str) -> dict[str, Any]:
    source = Path(text).read_text() if text.endswith(".json") else text
    try:
        changes = json.loads(source)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(changes, dict) or not all(isinstance(v, dict) for v in changes.values()):
        raise argparse.ArgumentTypeError(
            f'expected {{"column": {{"attribute": value}}}}; got {text!r}'
        )
    return changes


def _table(args: argparse.Namespace, path: str, **options: Any) -> TableFile:
    """A table, read as the command line says."""
    from pyroflows.density.streaming import TableFile, is_text

    said = {k: v for k, v in vars(args).items() if k in _READING}
    return TableFile(path, **said, **(options if is_text(path) else {}))


_READING = ("sep", "decimal", "thousands", "encoding", "na_values", "header")


def _labels_as_text(model: DensityEstimator) -> dict[str, Any]:
    """Options for text tables by which labels stay text, also where they look like numbers."""
    columns = [c for c in model.schema_ if c.is_label and c.levels]
    return {"dtype": {c.name: str for c in columns if all(isinstance(v, str) for v in c.levels)}}


def _fit(args: argparse.Namespace) -> None:
    import torch

    from pyroflows.density import DensityEstimator

    _refuse_overwriting(args.output, args.table)
    if Path(args.output).exists() and not _is_model(args.output):
        raise ValueError(f"{args.output} exists and is no model file; nothing was written")
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
        schema=args.schema,
        constraints=args.constraint,
        flow=args.flow,
        missing=args.missing,
        max_time=args.max_time,
        max_steps=args.max_steps,
        random_state=seed,
        device=args.device,
        progress=not args.quiet,
    )
    model.fit_file(_table(args, args.table), in_memory=args.in_memory)
    model.save(args.output)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{args.output}: held-out {model.history_['valid'].iloc[-1]:.3f} nats per row")
    if world > 1:
        torch.distributed.destroy_process_group()


def _score(args: argparse.Namespace) -> None:
    from pyroflows.density import DensityEstimator

    _refuse_overwriting(args.output, args.table, args.model)
    model = DensityEstimator.load(args.model)
    names = model.schema_.names
    file = _table(args, args.table, **_labels_as_text(model))
    absent = [c for c in names if c not in file.names]
    if absent:
        raise ValueError(f"{args.table} lacks columns {absent} of the model; it has {file.names}")
    if args.output and "log_density" in file.names:
        raise ValueError(f"{args.table} has a column log_density already: rename it first")
    total, rows = 0.0, 0
    with _Writer(args.output) as out:
        for frame in file.batches():
            nats = model.score_samples(frame[names])
            total, rows = total + float(nats.sum()), rows + len(nats)
            out.write(frame.assign(log_density=nats))
    print(f"{total / max(rows, 1):.6f} nats per row, {rows} rows")


def _report(args: argparse.Namespace) -> None:
    import numpy as np

    from pyroflows.density import DensityEstimator

    model = DensityEstimator.load(args.model)
    rng = np.random.default_rng(args.seed)

    def rows(path: str) -> pd.DataFrame:
        frame = _table(args, path, **_labels_as_text(model)).sample(100_000, rng)
        return frame[[c for c in model.schema_.names if c in frame.columns]]

    train = None if args.train is None else rows(args.train)
    print(model.report(rows(args.table), train=train, random_state=args.seed))


def _sample(args: argparse.Namespace) -> None:
    import numpy as np

    from pyroflows.density import DensityEstimator

    _refuse_overwriting(args.output, args.given_table, args.model)
    if args.given and args.given_table:
        raise ValueError("pass --given or --given-table, not both")
    model = DensityEstimator.load(args.model)
    given: Any = None
    if args.given_table:
        given = _table(args, args.given_table, **_labels_as_text(model)).read()
    elif args.given:
        given = _parsed(args.given, model)
    rng = np.random.default_rng(model.random_state if args.seed is None else args.seed)
    chunk = args.n if given is not None else CHUNK
    with _Writer(args.output, show=True) as out:
        for count in _chunks(args.n, chunk):
            out.write(model.sample(count, given, missing=args.missing or None, random_state=rng))


def _chunks(n: int, size: int) -> Iterator[int]:
    """Sizes of the pieces of n rows; one empty piece for none, so that the header is written."""
    yield min(n, size)
    for start in range(size, n, max(size, 1)):
        yield min(size, n - start)


def _parsed(pairs: Sequence[str], model: DensityEstimator) -> dict[str, Any]:
    """``["color=E", ...]`` as values of the columns."""
    bad = [p for p in pairs if "=" not in p]
    if bad:
        raise ValueError(f"--given expects COLUMN=VALUE; got {bad}")
    texts: dict[str, str] = {}
    columns = {str(c.name): c for c in model.schema_}
    for name, text in (p.split("=", 1) for p in pairs):
        if name not in columns:
            raise ValueError(f"--given: no column {name!r}; the model has {list(columns)}")
        if name in texts:
            raise ValueError(f"--given: {name!r} is given twice, {texts[name]!r} and {text!r}")
        texts[name] = text
    return {columns[name].name: columns[name].parse(text) for name, text in texts.items()}


def _inspect(args: argparse.Namespace) -> None:
    import numpy as np
    import pandas as pd

    from pyroflows.density import DensityEstimator
    from pyroflows.tables import Schema

    with pd.option_context(
        "display.width", 160, "display.max_columns", 20, "display.max_rows", 500
    ):
        if not _is_model(args.file):
            rows = _table(args, args.file).sample(200_000, np.random.default_rng(0))
            print(Schema.from_frame(rows, args.schema).summary())
            return
        model = DensityEstimator.load(args.file)
        print(f"{model}\n{model.engine_.num_parameters()} parameters")
        print(model.summary())
        print(model.history_.tail(3).to_string(index=False))


def _is_model(path: str) -> bool:
    """Whether a file is a model rather than a table: by its first bytes, as safetensors has them.

    Eight bytes of a length, then the brace of the header.
    """
    if Path(path).is_dir():
        return False
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _refuse_overwriting(output: str | None, *inputs: str | None) -> None:
    """Know before the work begins that the result can be written, and over nothing it needs."""
    if output is None:
        return
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"{output} is a folder; expected the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist; create it first")
    for source in inputs:
        if source and path.exists() and Path(source).exists() and path.samefile(source):
            raise ValueError(f"{output} is read here and cannot be the output as well")


class _Writer:
    """Tables to a text or Parquet file piece by piece, or to the terminal, or nowhere."""

    def __init__(self, path: str | None, *, show: bool = False) -> None:
        self.path, self.show = path, show
        self._file: Any = None
        if path and not path.lower().endswith(WRITABLE):
            raise ValueError(f"{path}: expected a name ending in {', '.join(WRITABLE)}")

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is None or self.path is None:
            return
        self._file.close()
        if error[0] is not None:  # half a table must not pass for a whole one
            Path(self.path).unlink()

    def write(self, frame: pd.DataFrame) -> None:
        """Append rows."""
        if self.path is not None and self.path.lower().endswith(".parquet"):
            self._write_parquet(frame)
        elif self.path is not None or self.show:
            self._write_text(frame)

    def _write_text(self, frame: pd.DataFrame) -> None:
        import gzip

        first, path = self._file is None, (self.path or "").lower()
        if first and self.path is None:
            self._file = sys.stdout
        elif first:
            opened: Any = gzip.open if path.endswith(".gz") else open
            self._file = opened(self.path, "wt", newline="", encoding="utf-8")
        sep = "\t" if path.endswith(".tsv") else ","
        frame.to_csv(self._file, index=False, header=first, sep=sep)

    def _write_parquet(self, frame: pd.DataFrame) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pandas(frame, preserve_index=False)
        if self._file is None:
            fields = [f.with_type(pa.string()) if f.type == pa.null() else f for f in table.schema]
            schema = pa.schema(fields, metadata=table.schema.metadata)
            self._file = pq.ParquetWriter(self.path, schema)
        self._file.write_table(table.cast(self._file.schema))


if __name__ == "__main__":
    sys.exit(main())
