"""Files of tables' flows: tensors and the fields of a header, checked before memory is taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyroflows.density.flow_labels import LabelSide
from pyroflows.density.flow_numbers import NumberSide
from pyroflows.density.flow_training import Make, in_data_units, new_flow
from pyroflows.density.header import check_cells, check_sizes, claim, part
from pyroflows.density.mixed_engine import MixedEngine, read_cells
from pyroflows.density.scores import Marginals, NormalScores
from pyroflows.flow import Flow
from pyroflows.tables import Schema

__all__ = ["restore", "stored"]


def stored(
    flow: Flow, numbers: NumberSide, labels: LabelSide, order: list[int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and fields of a fitted flow in data units and of what surrounds it."""
    last = f"transform.parts.{len(flow.transform) - 1}."
    state = flow.state_dict()
    tensors = {f"flow.{k}": v for k, v in state.items() if not k.startswith(last)}
    for i, scores in enumerate(numbers.marginals.parts):
        tensors |= {f"marginal{i}.{k}": v for k, v in scores.state_dict().items()}
    for i, j in enumerate(order):
        cells = numbers.cells[j].state_dict()
        tensors |= {f"cell{i}.{k}": v for k, v in cells.items()}
    if labels.engine is None:
        return tensors, dict(labels=None)
    own, fields = labels.engine.state()
    tensors |= {f"labels.{k}": v for k, v in own.items()}
    fields |= dict(order=labels.engine.order, num_given=labels.engine.num_given)
    return tensors, dict(labels=fields | dict(schema=labels.engine.schema.to_json()))


def restore(
    make: Make, schema: Schema, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> tuple[Flow, NumberSide, LabelSide]:
    """What :func:`stored` was given.

    Raises:
        ValueError: If tensors do not fit the header, naming the tensor.
    """
    order, given = header["order"], header["num_given"]
    check_sizes(header["sizes"])
    columns = [j for j in order[given:] if not schema.columns[j].is_label]
    claim(len(columns) > 0, "there are no numbers to model")
    check_cells(tensors, order, schema, len(columns))
    found = read_cells(tensors, len(order))
    cells = [found[order.index(j)] for j in range(len(order))]
    told = [j for j in order if j not in columns]
    maps = [NormalScores.from_state(part(tensors, f"marginal{i}.")) for i in range(len(columns))]
    numbers = NumberSide(cells, told, columns, Marginals(maps))
    flow = _flow(make, numbers, header["sizes"], part(tensors, "flow."))
    engine, fields = None, header["labels"]
    if fields is not None:
        own = Schema.from_json(fields["schema"])
        engine = MixedEngine.from_state(own, part(tensors, "labels."), fields)
    return flow, numbers, LabelSide(numbers, schema.columns, told, given, engine)


def _flow(
    make: Make, numbers: NumberSide, sizes: dict[str, Any], state: dict[str, Tensor]
) -> Flow:
    """The flow of a state, in data units; shapes are compared before anything is made."""
    with torch.device("meta"):
        want = {k: tuple(v.shape) for k, v in new_flow(make, numbers, sizes).state_dict().items()}
    got = {k: tuple(v.shape) for k, v in state.items()}
    wrong = sorted(k for k in want | got if want.get(k) != got.get(k))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"tensor 'flow.{name}': expected shape {want.get(name)}, got {got.get(name)}"
        )
    with torch.random.fork_rng(devices=[]):
        flow = new_flow(make, numbers, sizes).double()
    flow.load_state_dict(state)
    return in_data_units(flow, numbers.marginals).eval().requires_grad_(False)
