"""The functions that judge and compare, by their public names alone: a world of one's own is put before them."""

from __future__ import annotations

import inspect
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import mlflow_llmbench
from mlflow_llmbench import compare, judge, load_results, summarize

from .results import made, write_sweep

RATE = "throughput/output_tokens_per_s"


@pytest.fixture
def template(tmp_path: Path) -> Any:
    """A result as `llmbench run` writes it, loaded by its folder."""
    [result] = load_results(write_sweep(tmp_path / "measured", [made()]))
    return result


def world(template: Any, speeds: list[float], number: int) -> Any:
    """The result with a repetition for each speed, relative to that of its first repetition."""
    first = template.repetitions[0]
    made = []
    for index, speed in enumerate(speeds):
        request = first.requests[0]
        stamps = tuple(request.t0_ns + round((t - request.t0_ns) / speed) for t in request.stamps_ns)
        made.append(replace(first, index=index, requests=(replace(request, stamps_ns=stamps),)))
    cell = replace(template.cell, repetitions=len(speeds))
    return replace(template, cell=cell, repetitions=tuple(made), started_ms=number, ended_ms=number + 1)


def test_they_are_public_documented_and_typed() -> None:
    for name in ("load_results", "summarize", "judge", "compare"):
        function = getattr(mlflow_llmbench, name)
        assert name in mlflow_llmbench.__all__ and name in dir(mlflow_llmbench)
        assert inspect.getdoc(function)
        assert set(get_type_hints(function)) == {*inspect.signature(function).parameters, "return"}
    page = (Path(__file__).parents[1] / "docs" / "compare.md").read_text(encoding="utf-8")
    assert all(f"`{call}" in page for call in ("load_results(", "summarize(", "judge(", "compare("))


def test_a_result_is_loaded_summed_up_and_judged(template: Any) -> None:
    figures = summarize(template)
    assert figures[RATE] == pytest.approx(5 / 0.060, rel=0.01)
    assert judge(template).word == "valid"
    assert judge(template) == judge(template, figures)
    json.dumps(figures)


def test_a_slower_world_is_worse_where_the_noise_is_known(template: Any) -> None:
    draw = random.Random(5)
    quiet = [[draw.gauss(1, 0.01) for _ in range(10)] for _ in range(2)]
    a, b = world(template, quiet[0], 1), world(template, [0.7 * speed for speed in quiet[1]], 3)
    slower = compare(a, b, calibrations=())
    assert slower.effect(RATE).effect == "worse"  # type: ignore[union-attr]
    assert slower.effect(RATE).ratio == pytest.approx(0.7, rel=0.02)  # type: ignore[union-attr]
    near = compare(a, world(template, [0.93 * speed for speed in quiet[1]], 5), calibrations=())
    assert near.effect(RATE).effect == "cannot be told"  # type: ignore[union-attr]


def test_processes_of_a_world_that_differ_raise_few_alarms(template: Any) -> None:
    """Of 60 comparisons of like with like at most 3, if processes differ by 3 % and repetitions by 1 %."""
    draw = random.Random(6)
    alarms = 0
    for number in range(60):
        sides = []
        for side in range(2):
            own = draw.gauss(1, 0.03)
            sides.append(world(template, [own * draw.gauss(1, 0.01) for _ in range(5)], 10 * number + side))
        found = compare(*sides, calibrations=())
        alarms += any(effect.effect in ("better", "worse") for effect in found.effects)
    assert alarms <= 3


def test_references_are_compared_too(template: Any, tmp_path: Path) -> None:
    folders = [write_sweep(tmp_path / name, [made(step=step)]) for name, step in (("a", 10), ("b", 20))]
    assert compare(folders[0], str(folders[1]), calibrations=()).effect(RATE).effect == "worse"  # type: ignore[union-attr]


def test_results_of_a_sweep_are_in_the_order_in_which_they_were_measured(tmp_path: Path) -> None:
    begun = {1: 3_000, 2: 1_000, 4: 2_000}  # the folder of a batch size is named by it here
    made_then = [replace(made(batch=batch), started_ms=started) for batch, started in begun.items()]
    found = load_results(write_sweep(tmp_path / "sweep", made_then))
    assert [result.cell.batch_size for result in found] == [2, 4, 1]
