"""Ranks that fail, and say which one and how, and architectures whose plans transformers realises or does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MeasurementError, NotRealised, WorkerCrashed
from tests.architectures import write_tiny
from tests.loading import in_ranks, loaded

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]

PROMPTS = [[5, 40, 7, 200], [8, 2, 111, 5]]


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


@pytest.mark.parametrize("model_type", ["gpt_neox", "phi3", "gemma2", "mixtral"])
def test_other_architectures_give_the_tokens_of_one_rank(model_type: str, tmp_path: Path) -> None:
    """With fused projections, a tied head, and experts."""
    cell = Cell(model=str(write_tiny(model_type, tmp_path / "model")), quant="fp32")
    with loaded(cell) as (one, whole), in_ranks(dataclasses.replace(cell, tensor_parallel=2)) as (two, info):
        found: list[list[Any]] = [[], []]
        for backend, steps in zip((one, two), found, strict=True):
            backend.generate(PROMPTS, 6, lambda step, steps=steps: steps.append(step.tolist()))
        assert found[0] == found[1]
        assert torch.allclose(two.logits(PROMPTS[0], 4), one.logits(PROMPTS[0], 4), atol=1e-4)
        assert info.facts["quant.bits_per_weight"] == whole.facts["quant.bits_per_weight"] == 32
        assert info.ranks[0].weight_bytes < 0.7 * whole.weight_bytes


def test_a_plan_that_shards_hardly_anything_is_not_measured(tmp_path: Path) -> None:
    folder = write_tiny("phi4_multimodal", tmp_path / "model")
    message = r"^tensor_parallel=2 was asked for, but each rank holds 99% of the model"
    with pytest.raises(NotRealised, match=message), in_ranks(Cell(model=str(folder), quant="fp32", tensor_parallel=2)):
        pass
