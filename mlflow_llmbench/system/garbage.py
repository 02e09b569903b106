"""Keep Python's garbage collector away from the objects that exist before a measurement."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Collect garbage once, then hide all objects from the collector while the block runs.

    The collector still runs for new objects, unless it is disabled. Afterwards all objects are as before, but if
    somebody else had frozen some already, they all stay frozen: the collector cannot tell whose they are.
    """
    frozen_before = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen_before:
            gc.unfreeze()
