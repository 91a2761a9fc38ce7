"""Tables as arrays of numbers, and back: what each column is, and which constraints hold."""

from pyroflows.tables.columns import Column
from pyroflows.tables.infer import find_step
from pyroflows.tables.schema import Schema, as_frame

__all__ = ["Column", "Schema", "as_frame", "find_step"]
