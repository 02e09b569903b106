"""How often `tune` finds the winner of the whole grid with a third of it, in drawn worlds with a known truth.

    python benchmarks/tuning_worlds.py 60 > benchmarks/results/tuning-worlds.json

Each world has a time per step for each quantization, batch size and number of threads. Kinds: `monotone`, `interior`
(beyond some batch the caches overflow), `crossing` (each quantization scales differently) and `limit` (a limit of the
time per output token bites). A hit is a trial within 2 % of the best configuration that keeps the limit. `told` and
`happened` compare the chances that the search gives to untried configurations with how many of them were better.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from mlflow_llmbench.analysis.decisions.candidates import Limit, Measure
from mlflow_llmbench.analysis.decisions.recommend import GOALS
from mlflow_llmbench.analysis.decisions.tuning import Grid, Trial, chances, choose
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.metrics import TPOT

QUANTS = ("bf16", "int8", "int4", "fp4")
GRIDS = {"3 x 5": (3, 5, 1), "4 x 6": (4, 6, 1), "2 x 5 x 3": (2, 5, 3), "1 x 12": (1, 12, 1)}
KINDS = ("monotone", "interior", "crossing", "limit")
NEAR = 0.98


@dataclass(frozen=True)
class World:
    """Throughput and time per output token of each cell, and the largest time that is allowed, if any."""

    cells: list[Cell]
    rates: list[float]
    times: list[float]
    bound: float | None

    def keeps(self, number: int) -> bool:
        return self.bound is None or self.times[number] <= self.bound


def draw(kind: str, shape: tuple[int, int, int], seed: int) -> World:
    dice = random.Random(f"{kind} {shape} {seed}")
    quants, batches, threads = QUANTS[: shape[0]], [2**i for i in range(shape[1])], range(1, shape[2] + 1)
    alone = {quant: dice.uniform(3, 20) for quant in quants}
    share = dice.uniform(0.005, 0.05)
    row = {q: alone[q] * share if kind != "crossing" else dice.uniform(0.02, 0.6) for q in quants}
    full = dice.choice(batches[1:-1]) if kind == "interior" else batches[-1]
    worse, best = dice.uniform(1, 3), dice.choice(threads)
    cells, times, rates = [], [], []
    for quant, batch, count in itertools.product(quants, batches, threads):
        step = alone[quant] * (1 + worse * max(batch - full, 0) / full) + row[quant] * (batch - 1)
        step *= 1 + 0.25 * abs(count - best)
        cells.append(Cell(quant=quant, batch_size=batch, threads=count))
        times.append(step)
        rates.append(batch / step * 1000 * dice.gauss(1, 0.005))
    bound = sorted(times)[int(len(times) * dice.uniform(0.25, 0.6))] if kind == "limit" else None
    return World(cells, rates, times, bound)


def search(world: World) -> tuple[dict[int, Trial], dict[int, float]]:
    """Return the trials of a third of the grid, and the chances of the others."""
    tpot = Measure("time per output token", (TPOT.key("mean"),), "lower")
    limits = [Limit("--max-tpot", tpot, world.bound)] if world.bound is not None else []
    grid, target, trials = Grid(world.cells), GOALS["throughput"], dict[int, Trial]()
    budget = len(world.cells) // 3
    while len(trials) < budget:
        left = [number for number in range(len(world.cells)) if number not in trials]
        number = choose(grid, trials, left, target, limits, grid.first_trials(budget))
        assert number is not None
        figures = (world.times[number],) if limits else ()
        trials[number] = Trial(world.rates[number], figures, keeps=world.keeps(number))
    left = [number for number in range(len(world.cells)) if number not in trials]
    return trials, chances(grid, trials, left, target, limits)


def main() -> None:
    worlds = int(sys.argv[1])
    found: dict[str, Any] = {"worlds_of_each_kind": worlds, "hits": defaultdict(dict)}
    told: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for (name, shape), kind in itertools.product(GRIDS.items(), KINDS):
        hits = 0
        for seed in range(worlds):
            world = draw(kind, shape, seed)
            trials, chance = search(world)
            best = max(rate for number, rate in enumerate(world.rates) if world.keeps(number))
            reached = max((world.rates[number] for number in trials if world.keeps(number)), default=0.0)
            hits += reached >= NEAR * best
            for number, one in chance.items():
                better = world.keeps(number) and world.rates[number] > reached
                told[
                    "below 1 %" if one < 0.01 else "1 to 10 %" if one < 0.1 else "10 to 50 %" if one < 0.5 else "above"
                ].append((one, better))
        found["hits"][name][kind] = round(hits / worlds, 3)
    found["chances"] = {
        band: {
            "told": round(sum(one for one, _ in pairs) / len(pairs), 4),
            "happened": round(sum(better for _, better in pairs) / len(pairs), 4),
            "cells": len(pairs),
        }
        for band, pairs in sorted(told.items())
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
