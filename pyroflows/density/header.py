"""What a model file must hold before anything is built from it: sizes first, then memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyroflows.tables import Schema

__all__ = ["check_cells", "check_header", "check_sizes", "check_tensors", "claim", "part"]

FIELDS: dict[str, type | tuple[type, ...]] = dict(
    schema=list,
    named=bool,
    order=list,
    num_given=int,
    params=dict,
    score_quantiles=list,
    column_nats=list,
    history=dict,
)
SIZES = ("members", "hidden_dim", "depth", "components")
FLOATS = (torch.float32, torch.float64)


def check_header(header: Mapping[str, Any]) -> None:
    """Fields and their types.

    Raises:
        ValueError: Naming the field.
    """
    for name, kind in FIELDS.items():
        claim(isinstance(header.get(name), kind), f"field {name!r} is missing or of a wrong type")
    d = len(header["schema"])
    claim(
        all(_whole(i) for i in header["order"]) and sorted(header["order"]) == list(range(d)),
        f"order is no permutation of the {d} columns",
    )
    claim(_whole(header["num_given"]) and 0 <= header["num_given"] < d, "num_given is no count")
    if header.get("engine", "mixed") == "mixed":
        _check_mixed(header)
    else:
        _check_flow(header)
    for name in ("score_quantiles", "column_nats"):
        claim(all(isinstance(v, (int, float)) for v in header[name]), f"{name} are no numbers")
    claim(len(header["score_quantiles"]) == 201, "there are not 201 score_quantiles")
    claim(len(header["column_nats"]) == d - header["num_given"], "column_nats do not fit")
    _check_oddness(header.get("oddness"), d - header["num_given"])
    claim(set(header["history"]) == {"columns", "data"}, "history is no table")
    draws = header["params"].get("draws", 1)
    claim(_whole(draws) and 1 <= draws <= 10**6, "draws is no number of draws")


def _check_oddness(held: Any, targets: int) -> None:
    """Tails of row statistics and of targets: values, nats, a scale; older files lack them."""
    if held is None:
        return
    sizes = (3 + targets, 3 + 5 * targets)  # without and with distances
    claim(isinstance(held, list) and len(held) in sizes, "oddness does not fit the columns")
    for tail in held:
        fits = isinstance(tail, list) and len(tail) == 3 and all(isinstance(p, list) for p in tail)
        fits = fits and 1 <= len(tail[0]) == len(tail[1]) <= 256 and len(tail[2]) == 1
        claim(
            fits
            and all(isinstance(v, (int, float)) and math.isfinite(v) for p in tail for v in p)
            and tail[0] == sorted(tail[0])
            and tail[2][0] > 0,
            "oddness holds a tail that is none",
        )


def _check_mixed(header: Mapping[str, Any]) -> None:
    """Fields of the mixed model."""
    claim(isinstance(header.get("config"), dict), "field 'config' is missing or of a wrong type")
    d, config = len(header["schema"]), header["config"]
    claim(set(config) == {*SIZES, "dropout"}, f"config has fields {sorted(config)}")
    claim(all(_whole(config[k]) and config[k] >= 1 for k in SIZES), "config has no sizes")
    dropout = config["dropout"]
    claim(isinstance(dropout, (int, float)) and 0 <= dropout < 1, "dropout is no probability")
    _check_reads(header.get("reads"), header["num_given"], d)


def _check_flow(header: Mapping[str, Any]) -> None:
    """Fields of a flow and of its model of labels."""
    claim(_whole(header.get("points")) and 1 <= header["points"] <= 10**4, "points is no count")
    claim(isinstance(header.get("sizes"), dict), "field 'sizes' is missing or of a wrong type")
    claim(header.get("flow") is None or isinstance(header["flow"], str), "flow is no name")
    labels = header.get("labels")
    claim(labels is None or isinstance(labels, dict), "labels is no model")
    if labels is not None:
        d = len(labels["schema"])
        order = labels["order"]
        claim(all(map(_whole, order)) and sorted(order) == list(range(d)), "labels have no order")
        claim(_whole(labels["num_given"]) and 0 <= labels["num_given"] < d, "labels have no given")
        _check_mixed(labels)


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Arguments of a flow's recipe: small whole numbers."""
    known = {"hidden_dims", "num_transforms", "count_bins", "autoregressive"}
    claim(set(sizes) <= known, f"sizes are no arguments of a recipe: {sorted(sizes)}")
    hidden = sizes.get("hidden_dims", [])
    claim(isinstance(hidden, list) and len(hidden) <= 64, "hidden_dims are no widths")
    count, bins = sizes.get("num_transforms", 1), sizes.get("count_bins", 1)
    claim(all(_whole(v) and 1 <= v <= 2**16 for v in [*hidden, count, bins]), "sizes are no sizes")
    claim(count <= 64, f"a flow of {count} transforms")


def _check_reads(reads: Any, num_given: int, d: int) -> None:
    """What networks of a wide table read: earlier places, in order."""
    if reads is None:
        return
    claim(isinstance(reads, list) and len(reads) == d - num_given, "reads do not fit the columns")
    for place, own in enumerate(reads, num_given):
        claim(
            isinstance(own, list)
            and all(_whole(i) and 0 <= i < place for i in own)
            and all(a < b for a, b in zip(own, own[1:], strict=False)),
            f"reads of place {place} are no earlier places in order",
        )


def check_tensors(
    header: Mapping[str, Any], schema: Schema, tensors: Mapping[str, Tensor]
) -> None:
    """Names, types and shapes of a mixed model's tensors; nothing larger than they is made.

    Raises:
        ValueError: Naming the tensor, what was expected and what came.
    """
    at = _Tensors(tensors)
    features, bins, label = _cells(at, header["order"], schema)
    inputs = sum(features)
    if header.get("reads") is not None:
        inputs = max(sum(features[i] for i in own) for own in header["reads"])
    _nets(at, header["config"], header["num_given"], max(inputs, 1), bins, label)
    if any(name.startswith("mixture.") for name in tensors):
        k = at.shape("mixture.log_weight", None)[0]
        d = label.count(False)
        at.shape("mixture.mean", k, d)
        at.shape("mixture.chol", k, d, d)
        sizes = [b for b, is_label in zip(bins, label, strict=True) if is_label]
        for i, size in enumerate(sizes):
            at.shape(f"mixture.label{i}", k, size)
    at.nothing_else()


def check_cells(
    tensors: Mapping[str, Tensor], order: list[int], schema: Schema, numbers: int
) -> None:
    """Cells and marginals of a flow's table; errors as in :func:`check_tensors`."""
    at = _Tensors({k: v for k, v in tensors.items() if k.startswith(("cell", "marginal"))})
    _cells(at, order, schema)
    for i in range(numbers):
        _scores(at, f"marginal{i}.")
    at.nothing_else()


def _cells(
    at: _Tensors, order: list[int], schema: Schema
) -> tuple[list[int], list[int], list[bool]]:
    """Features and bins of the columns in an order, and which are labels."""
    features, bins, label = [], [], []
    for i, j in enumerate(order):
        column, prefix = schema.columns[j], f"cell{i}."
        width, count = (
            _label(at, prefix, max(len(column.levels), 1))
            if column.is_label
            else _number(at, prefix)
        )
        features.append(width)
        bins.append(count)
        label.append(column.is_label)
    return features, bins, label


def _nets(
    at: _Tensors,
    config: Mapping[str, Any],
    num_given: int,
    f: int,
    bins: list[int],
    label: list[bool],
) -> None:
    m, h, depth, k = (config[name] for name in SIZES)
    targets = list(zip(bins, label, strict=True))[num_given:]
    t = len(targets)
    at.shape("model.alpha", t)
    at.shape("model.has_missing", t, dtype=(torch.bool,))
    at.shape("model.nets.mask", m * t, f, 1)
    at.shape("model.nets.w0", m * t, f, h)
    at.shape("model.nets.b0", m * t, 1, h)
    layers = sum(name.startswith("model.nets.w.") for name in at.tensors)
    claim(layers == depth - 1, f"depth is {depth}, but there are {layers + 1} hidden layers")
    for i in range(layers):
        at.shape(f"model.nets.w.{i}", m * t, h, h)
        at.shape(f"model.nets.b.{i}", m * t, 1, h)
    for kind in (0, 1):
        own = [b for b, is_label in targets if is_label == bool(kind)]
        size, most = m * len(own), max(own, default=1)
        out = 1 + most + (0 if kind else 3 * k)
        at.shape(f"model.nets.head.{kind}", size, h, out)
        at.shape(f"model.nets.skip.{kind}", size, f, 1 + most if kind else 3 * k)
        at.shape(f"model.nets.bias.{kind}", size, 1, out)


def _label(at: _Tensors, prefix: str, levels: int) -> tuple[int, int]:
    """Features and bins of a column of labels."""
    group = at.group(prefix + "group", levels)
    at.shape(prefix + "log_inside", levels)
    bins = at.shape(prefix + "bin_mass", None)[0]
    claim(int(group.max()) < bins, f"{prefix}group names bins beyond the {bins} of bin_mass")
    at.shape(prefix + "log_unseen")
    missing = at.flag(prefix + "missing_seen")
    return bins + missing, bins


def _number(at: _Tensors, prefix: str) -> tuple[int, int]:
    """Features and bins of a column of numbers."""
    pieces = at.shape(prefix + "hist.edges", None)[0] + 1
    at.shape(prefix + "hist.mass", pieces)
    group = at.group(prefix + "hist.group", pieces)
    claim(pieces >= 3, f"{prefix}hist has too few pieces")
    _scores(at, prefix + "scores.")
    for name in ("hist.scale", "hist.xi", "bounds"):
        at.shape(prefix + name, 2)
    for name in ("loc", "scale", "step", "anchor"):
        at.shape(prefix + name)
    atoms = at.shape(prefix + "atoms", None)[0]
    waves = at.shape(prefix + "waves", None, dtype=(torch.int64,))[0]
    bins = int(group[-1]) + 1 + atoms
    at.shape(prefix + "bin_mass", bins)
    missing = at.flag(prefix + "missing_seen")
    return 2 + 2 * waves + atoms + missing, bins


def _scores(at: _Tensors, prefix: str) -> None:
    """A column's map to normal scores."""
    knots = at.shape(prefix + "knots", None)[0]
    claim(knots >= 2, f"{prefix}knots are too few")
    at.shape(prefix + "scores", knots)
    at.shape(prefix + "slopes", knots)
    at.shape(prefix + "scale", 2)
    at.shape(prefix + "xi", 2)


class _Tensors:
    """The tensors of a file, and which of them have been asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.seen = tensors, set[str]()

    def shape(
        self, name: str, *want: int | None, dtype: tuple[torch.dtype, ...] = FLOATS
    ) -> tuple[int, ...]:
        """Its shape, which must be the one wanted (None: any size)."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ValueError(f"tensor {name!r} is missing")
        self.seen.add(name)
        got = tuple(tensor.shape)
        fits = len(got) == len(want) and all(
            w in (None, g) for w, g in zip(want, got, strict=True)
        )
        claim(fits, f"tensor {name!r}: expected shape {want}, got {got}")
        claim(tensor.dtype in dtype, f"tensor {name!r} is of type {tensor.dtype}")
        return got

    def group(self, name: str, size: int) -> Tensor:
        """Bins of codes or pieces: small nonnegative integers."""
        self.shape(name, size, dtype=(torch.int64,))
        group = self.tensors[name]
        fits = bool(((group >= 0) & (group < size)).all())
        claim(fits, f"tensor {name!r} names bins that are not there")
        return group

    def flag(self, name: str) -> bool:
        """A boolean."""
        self.shape(name, dtype=(torch.bool,))
        return bool(self.tensors[name])

    def nothing_else(self) -> None:
        """Every tensor must have been asked for."""
        rest = sorted(set(self.tensors) - self.seen)
        claim(not rest, f"tensors that belong nowhere: {rest[:5]}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def claim(holds: bool, message: str) -> None:
    """Raise an error unless something holds."""
    if not holds:
        raise ValueError(message)


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
