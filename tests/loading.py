"""A backend with its model loaded, as a worker would have it, in one rank or in several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from mlflow_llmbench.backends.base import backend_class
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import LoadInfo


@contextmanager
def loaded(cell: Cell) -> Iterator[tuple[Any, LoadInfo]]:
    """Yield the backend of a cell, prepared and loaded, and its LoadInfo; close it afterwards, also after an error."""
    kind = backend_class(cell.backend)
    facts = kind.resolve(cell)
    kind.prepare(cell, facts)
    backend = kind(cell, facts)
    try:
        yield backend, backend.load()
    finally:
        backend.close()


@contextmanager
def in_ranks(cell: Cell) -> Iterator[tuple[Any, LoadInfo]]:
    """Yield the backend of a cell with its other ranks, loaded; end them afterwards, also after an error.

    This process is a rank meanwhile, with the environment of one, in which no GPU is visible.
    """
    import torch

    kind: Any = backend_class(cell.backend)
    backend = kind(cell, kind.resolve(cell))
    with patch.dict(os.environ):
        try:
            backend.start_ranks()
            yield backend, backend.load()
        finally:
            backend.end_ranks()
            if torch.distributed.is_initialized():  # ranks that failed are not left in order
                torch.distributed.destroy_process_group()
