"""A backend with its model loaded, as a worker would have it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlflow_llmbench.backends.base import backend_class
from mlflow_llmbench.cell import Cell
from mlflow_llmbench.records import LoadInfo


@contextmanager
def loaded(cell: Cell) -> Iterator[tuple[Any, LoadInfo]]:
    """The backend of a cell, found, prepared and loaded, with what the load gave; it is closed afterwards, also where that failed."""
    kind = backend_class(cell.backend)
    facts = kind.resolve(cell)
    kind.prepare(cell, facts)
    backend = kind(cell, facts)
    try:
        yield backend, backend.load()
    finally:
        backend.close()
