"""Files of fitted estimators: safetensors for the numbers, JSON in its metadata for the rest."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from pyroflows.density.engine import Engine
from pyroflows.density.flow_engine import FlowEngine
from pyroflows.density.header import check_header
from pyroflows.density.mixed_engine import MixedEngine
from pyroflows.density.oddness import Oddness
from pyroflows.tables import Schema
from pyroflows.tables.values import from_json, to_json

__all__ = ["FORMAT", "VERSION", "load", "read_header", "save"]

FORMAT, VERSION = "pyroflows.density", 3


def save(estimator: Any, path: Any) -> None:
    """Write a fitted estimator."""
    from safetensors.torch import save_file

    engine: Engine = estimator.engine_
    tensors, fields = engine.state()
    params = {k: to_json(v) for k, v in estimator.get_params().items() if _is_plain(v)}
    header = dict(
        format=FORMAT,
        version=VERSION,
        schema=estimator.schema_.to_json(),
        index_names=to_json(estimator.schema_.index_names),
        named=hasattr(estimator, "feature_names_in_"),
        engine=engine.tag,
        order=engine.order,
        num_given=engine.num_given,
        **fields,
        params=params,
        score_quantiles=[float(x) for x in estimator._score_quantiles],
        column_nats=estimator._column_nats,
        oddness=None if estimator.oddness_ is None else estimator.oddness_.to_json(),
        history=json.loads(estimator.history_.to_json(orient="split", index=False)),
    )
    data = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    save_file(data, str(path), metadata={"pyroflows": json.dumps(header)})


def read_header(path: Any) -> dict[str, Any]:
    """The JSON part of a file.

    Raises:
        ValueError: If it is not such a file, or of a newer version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("pyroflows", "{}")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise ValueError(f"{path} is not a saved DensityEstimator: its format is {found!r}")
    version = header.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(
            f"{path} has format version {version}; this pyroflows reads up to {VERSION}"
        )
    return header


def load(kind: Any, path: Any, *, device: str = "cpu", flow: Any = None) -> Any:
    """Read a fitted estimator of class ``kind``.

    The header is checked against the tensors before anything is built from it. ``flow`` is the
    callable with which it was fitted, if it was one: files hold no code.

    Raises:
        ValueError: If the file is none, or damaged, naming the part.
    """
    from safetensors.torch import load_file

    header = read_header(path)
    name = header.get("flow")
    of_callable = header.get("engine") == FlowEngine.tag and name is None
    if flow is not None and not of_callable:
        raise ValueError(f"{path} was fitted with flow={name!r}: load it without flow=")
    if of_callable and flow is None:
        raise ValueError(
            f"{path} was fitted with a callable flow=, which files do not hold: pass it again, "
            "DensityEstimator.load(path, flow=...)"
        )
    tensors = load_file(str(path))
    try:
        check_header(header)
        schema = Schema.from_json(header["schema"], from_json(header.get("index_names", [None])))
        known = {**header, "make": flow}
        engine = _engine(header.get("engine", "mixed")).from_state(schema, tensors, known)
        out = _estimator(kind, header, schema, engine.to(device))
        return out if flow is None else out.set_params(flow=flow)
    except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError) as error:
        what = "is damaged" if flow is None else "is of another flow than flow= makes, or damaged"
        raise ValueError(f"{path} {what}: {error}") from error


def _engine(tag: str) -> type[Engine]:
    """The class that wrote a file."""
    for engine in (MixedEngine, FlowEngine):
        if tag == engine.tag:
            return engine
    raise ValueError(f"this pyroflows has no engine {tag!r}")


def _estimator(kind: Any, header: dict[str, Any], schema: Schema, engine: Engine) -> Any:
    import pandas as pd

    known = set(kind._names())
    out = kind(**{k: from_json(v) for k, v in header["params"].items() if k in known})
    out.engine_ = engine
    out.engine_.settings = out._settings()
    out.schema_ = schema
    out.n_features_in_ = len(schema)
    if header["named"]:
        out.feature_names_in_ = np.array(schema.names, dtype=object)
    out._score_quantiles = np.array(header["score_quantiles"])
    out._column_nats = header["column_nats"]
    held = header.get("oddness")
    targets = len(schema) - header["num_given"]
    out.oddness_ = None if held is None else Oddness.from_json(held, targets)
    out.history_ = pd.DataFrame(**header["history"])
    return out


def _is_plain(value: Any) -> bool:
    try:
        to_json(value)
    except TypeError:
        return False
    return True
