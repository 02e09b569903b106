"""A tiny Llama in two ranks on a CPU, this process and another one, which meet by gloo."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.backends.parallel import host_of
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.system import machine, memory
from tests.loading import in_ranks, loaded

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

PROMPTS = [[5, 40, 7, 300, 12, 9, 77, 130], [8, 2, 411, 5, 90, 33, 6, 210], [1] * 8, [400, 3, 4, 5, 6, 7, 8, 9]]


def tokens(backend: Any, prompts: list[list[int]], count: int = 8) -> list[list[int]]:
    steps: list[Any] = []
    backend.generate(prompts, count, steps.append)
    return [step.tolist() for step in steps]


@pytest.fixture(scope="module", params=["fp32", *(pytest.param(q, marks=pytest.mark.slow) for q in ("bf16", "fp16"))])
def both(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[tuple[Any, ...]]:
    """One rank, and the first of two: backend and LoadInfo of each."""
    cells = [Cell(model=str(tiny_model), quant=request.param, threads=2, tensor_parallel=count) for count in (1, 2)]
    with loaded(cells[0]) as one, in_ranks(cells[1]) as two:
        yield *one, *two


@pytest.mark.parametrize("rows", [1, 4])
def test_ranks_give_the_tokens_and_logits_of_one(both: tuple[Any, ...], rows: int) -> None:
    one, _, two, _ = both
    two.ready(PROMPTS[:rows], 8)  # as before a timed region; below, generate() hands the call over itself
    assert tokens(two, PROMPTS[:rows]) == tokens(one, PROMPTS[:rows]) == tokens(two, PROMPTS[:rows])
    ids = [*PROMPTS[0], *PROMPTS[1]]
    close = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}[two.cell.quant]
    assert torch.allclose(two.logits(ids, 5).float(), one.logits(ids, 5).float(), atol=close)


def test_the_ranks_hold_the_model_once_in_equal_parts(both: tuple[Any, ...]) -> None:
    _, whole, two, info = both
    first, second = info.ranks
    assert first.weight_bytes == second.weight_bytes
    assert 0.5 <= first.weight_bytes / whole.weight_bytes < 0.51  # norms and biases are in both
    assert info.weight_bytes == first.weight_bytes + second.weight_bytes
    assert info.facts["model.parameters"] == whole.facts["model.parameters"]
    assert info.facts["quant.bits_per_weight"] == whole.facts["quant.bits_per_weight"]
    assert info.facts["quant.kernel"] == whole.facts["quant.kernel"]
    assert (info.facts["model.ranks"], info.facts["model.collectives"], info.devices) == (2, "gloo", None)
    assert (info.kv_bytes_per_token, info.flops_per_token) == (whole.kv_bytes_per_token, whole.flops_per_token)
    assert two.describe().weight_bytes == info.weight_bytes
    assert not two.ranks.folder.exists()  # nothing is left in the folder for temporary files if the worker is killed
    assert info.mapped_weight_bytes <= info.weight_bytes
    if two.cell.quant == "fp32":  # the checkpoint's own dtype, of which rows stay mapped
        assert max(first.mapped, second.mapped) < info.mapped_weight_bytes <= first.mapped + second.mapped


def test_the_memory_and_the_cpu_time_of_all_ranks_count(both: tuple[Any, ...]) -> None:
    _, _, two, _ = both
    ranks = two.rank_memory()
    own, whole = memory.read(), host_of(ranks)
    assert len(ranks) == 2 and own and own.anonymous and whole and whole.anonymous
    assert whole.anonymous == sum(rank.host.anonymous for rank in ranks) > own.anonymous
    assert whole.rss < sum(rank.host.rss for rank in ranks)  # pages of the libraries are shared
    begun, before = time.process_time(), machine.take_readings("cpu", two.rank_pids)
    tokens(two, PROMPTS, 32)
    two.trim()  # waits for the other rank
    after = machine.take_readings("cpu", two.rank_pids)
    assert after.own_s - before.own_s > time.process_time() - begun


def test_the_time_in_collectives_is_a_share(both: tuple[Any, ...]) -> None:
    """Two layers with 6 all-reduces in each step: some of the time, and never all of it."""
    _, _, two, _ = both
    assert 0 < two.collective_share(PROMPTS, 4) < 1


def test_logits_can_be_watched(both: tuple[Any, ...]) -> None:
    _, _, two, _ = both
    with two.watch_logits() as watch:
        tokens(two, PROMPTS[:2], 3)
    assert (watch.checked, watch.nonfinite, watch.weights()) == (6, 0, ())
    watch.nonfinite = 1
    assert watch.weights() == ()  # looks at the parameters of this rank only, which are finite
