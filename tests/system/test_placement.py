"""Where the weights of a model would lie, by formula: on GPUs, in host memory, on the disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from mlflow_llmbench.config.model_shape import PROCESS_BYTES, Shape
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import ModelFacts
from mlflow_llmbench.system import placement
from mlflow_llmbench.system.placement import MOVING_BYTES, SPARE, Layout, Working, budgets, fill
from tests.workflows.test_preview import SEVENTY

CELL = Cell(model="m", quant="fp16", device="cpu", prompt_tokens=2048, output_tokens=256, placement="auto")
FACTS = ModelFacts("m", "folder", "/m", "r", SEVENTY, dtype="float16")


def layout(rooms: dict[str, float], **given: Any) -> Layout:
    cell = dataclasses.replace(CELL, **given)
    shape, whole = Shape.from_config(SEVENTY), {place: int(size * 1e9) for place, size in rooms.items()}
    found = placement.predict(cell, FACTS, shape, whole, placement.working([cell], FACTS))
    assert found
    return found


@pytest.mark.parametrize(
    ("rooms", "expected"),
    [
        ({"cpu": 256}, {"cpu": 138, "disk": 0}),
        ({"cpu": 64}, {"cpu": 57, "disk": 81}),
        ({"cuda:0": 80, "cuda:1": 80, "cpu": 64}, {"cuda:0": 69, "cuda:1": 69, "cpu": 0, "disk": 0}),
        ({"cuda:0": 80, "cpu": 256}, {"cuda:0": 73, "cpu": 65, "disk": 0}),
        ({"cuda:0": 24, "cpu": 64}, {"cuda:0": 20, "cpu": 57, "disk": 61}),
    ],
)
def test_places_are_filled_in_order(rooms: dict[str, float], expected: dict[str, float]) -> None:
    found = layout(rooms)
    assert {place: size / 1e9 for place, size in found.weights.items()} == pytest.approx(expected, abs=1.8)
    assert not found.lacking and sum(found.weights.values()) == pytest.approx(137.95e9, rel=0.001)
    room = sum(size for place, size in rooms.items() if place != "cpu" or len(rooms) == 1)
    assert found.loading < found.needed <= room * 1e9


def test_only_the_disk_need_not_fit() -> None:
    assert layout({"cpu": 6}).weights["disk"] > 130e9
    assert layout({"cpu": 3}).lacking == (
        "m with batch_size=1 needs about 3.37 GB of memory even with placement=auto, for the process, the KV cache, "
        "activations and one layer, and there are 3.00 GB. Use a smaller batch or shorter texts, or try it all the "
        "same with force=true."
    )
    assert layout({"cuda:0": 2, "cpu": 64}).lacking.startswith("m with batch_size=1 needs about ")
    assert " on cuda:0 even with placement=auto" in layout({"cuda:0": 2, "cpu": 64}).lacking


def test_each_place_keeps_what_the_cells_need_besides_weights() -> None:
    needs, spare = Working(cache=1000, each=100), 1 - SPARE
    rooms = {"cuda:0": 10**9, "cuda:1": 10**9, "cpu": 10**9}
    left = int(10**9 * spare) - PROCESS_BYTES
    assert budgets(rooms, needs) == {"cuda:0": left - 1100, "cuda:1": left - 600, "cpu": left - MOVING_BYTES}
    assert budgets({"cpu": 10**9}, needs) == {"cpu": left - MOVING_BYTES - 1100}
    assert budgets({"cpu": 10**9}, None) == {"cpu": left - MOVING_BYTES - 250_000_000}  # an unknown architecture
    assert budgets({"cpu": 1}, needs) == {"cpu": 0}


def test_the_most_demanding_cell_of_a_load_counts() -> None:
    cells = [dataclasses.replace(CELL, batch_size=8, prompt_tokens=64), dataclasses.replace(CELL, prompt_tokens=4096)]
    single = [placement.working([cell], FACTS) for cell in cells]
    both = placement.working(cells, FACTS)
    assert both and all(single) and both.cache == max(one.cache for one in single if one)
    assert both.each == max(one.each for one in single if one) > min(one.each for one in single if one)
    scoring = placement.working([dataclasses.replace(CELL, prompt_tokens=1)], FACTS, scores=True)
    assert scoring and scoring.each == 2 * 512 * 32000 * 4
    assert placement.working(cells, ModelFacts("m", "folder", "/m", "r")) is None


def test_a_place_that_was_full_is_not_used_again() -> None:
    assert fill([10, 4, 4, 1], {"cpu": 13}) == ["disk", "disk", "disk", "disk"]
    assert fill([4, 10, 4, 1], {"cpu": 14}) == ["cpu", "disk", "disk", "disk"]
    assert fill([4, 4, 4, 4], {"cuda:0": 100, "cuda:1": 100, "cpu": 100}) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]


def test_rooms_are_the_free_memory_of_each_place(nvml: Callable[[str], None]) -> None:
    nvml("driver 570\ngpu GPU-1 A\nmemory 80000000000 60000000000 20000000000\ngpu GPU-2 A\n"
         "memory 80000000000 70000000000 10000000000\n")  # fmt: skip
    assert placement.rooms("cuda", 10**6) == {"cuda:0": 60 * 10**9, "cuda:1": 70 * 10**9, "cpu": 10**6}
    assert placement.rooms("cuda:1", 10**6) == {"cuda:1": 70 * 10**9, "cpu": 10**6}
    assert placement.rooms("cpu", 10**6) == {"cpu": 10**6}
    assert placement.rooms("cpu", None)["cpu"] > 10**7
