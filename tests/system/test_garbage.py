"""What a measurement leaves of the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from mlflow_llmbench.system.garbage import frozen_heap


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    frozen = gc.get_freeze_count() > 0
    yield
    if frozen:
        gc.freeze()
    else:
        gc.unfreeze()


def test_objects_are_hidden_while_it_runs_and_back_afterwards() -> None:
    gc.unfreeze()
    with frozen_heap():
        assert gc.get_freeze_count() > 1000
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_has_frozen_stays_so() -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    with pytest.raises(ValueError, match="stop"), frozen_heap():
        raise ValueError("stop")
    assert gc.get_freeze_count() >= before > 1000
