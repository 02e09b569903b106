"""Ranks that fail: the first rank says which one, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MeasurementError, WorkerCrashed
from tests.loading import in_ranks

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]

PROMPTS = [[5, 40, 7, 300], [8, 2, 411, 5]]


def test_a_rank_that_is_killed_ends_the_call_and_says_so(tiny_model: Path) -> None:
    with in_ranks(Cell(model=str(tiny_model), quant="fp32", tensor_parallel=2)) as (backend, _):

        def kill(step: Any) -> None:
            backend.ranks.processes[0].kill()

        with pytest.raises(
            WorkerCrashed, match="^Rank 1 of 2 ended with signal SIGKILL, perhaps because memory ran out"
        ):
            backend.generate(PROMPTS, 64, kill)
        with pytest.raises(WorkerCrashed, match="SIGKILL"):
            backend.generate(PROMPTS, 4, lambda _: None)
    assert backend.ranks.processes[0].returncode is not None and not backend.ranks.folder.exists()


def test_an_error_of_another_rank_is_told_with_its_number(tiny_model: Path) -> None:
    with in_ranks(Cell(model=str(tiny_model), quant="fp32", tensor_parallel=2)) as (backend, _):
        backend.ranks.begin("generate", [["no id"]], 4)
        with pytest.raises(MeasurementError, match=r"^Rank 1 of 2: too many dimensions 'str'"):
            backend.ranks.answers()
        with pytest.raises(MeasurementError, match=r"^Rank 1 of 2: too many dimensions 'str'"):
            backend.trim()
