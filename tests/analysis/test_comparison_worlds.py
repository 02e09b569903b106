"""Alarms and power of comparisons in scripted worlds: the benchmark, with fewer simulations."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks" / "comparison_worlds.py"
    spec = importlib.util.spec_from_file_location("comparison_worlds", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["comparison_worlds"] = module
    spec.loader.exec_module(module)
    return module


WORLDS = load()


@pytest.mark.parametrize("world", WORLDS.WORLDS)
def test_at_most_one_in_twenty_raises_an_alarm(world: str) -> None:
    """Of 400 comparisons, 8 % would be three standard deviations above a true share of 5 %."""
    for repetitions in (5, 10, 30):
        row = WORLDS.simulate(world, repetitions, 400, seed=1)
        shares = {name: row.alarms[name] for name in ("not calibrated", "calibrated", "5 processes")}
        assert max(shares.values()) <= 0.05, (repetitions, shares)


def test_auto_raises_few_alarms_and_finds_a_change_of_5_percent_where_the_noise_is_known() -> None:
    for world in ("processes differ by 3 %, repetitions by 1 %", "two speeds, repetition by repetition"):
        row = WORLDS.simulate(world, None, 100, seed=2)
        assert max(row.alarms[name] for name in ("not calibrated", "calibrated")) <= 0.05
    for repetitions in (10, 30, 67):
        assert WORLDS.simulate("normal, 2 %", repetitions, 400, seed=3).found["calibrated"] >= 0.9
    assert WORLDS.simulate("normal, 2 %", 10, 400, seed=3).found["5 processes"] >= 0.9


def test_the_simulation_answers_as_compare_does() -> None:
    assert [WORLDS.check(world, 5, seed=4) for world in WORLDS.WORLDS] == [0] * len(WORLDS.WORLDS)


def test_without_the_noise_between_processes_most_would_be_alarms() -> None:
    row = WORLDS.simulate("processes differ by 3 %, repetitions by 1 %", 10, 400, seed=5)
    assert row.alarms["as before"] > 0.5
