"""Does keeping a cell change the next one? `python benchmarks/between_cells.py [--pairs N] [--out FILE]`.

One worker measures the same cell again and again, A against A. Before one cell of each pair the cell that was measured
last is written and uploaded to a SQLite store, as a sweep does between cells; before the other nothing is done. Which
comes first changes from pair to pair. Prints for each figure the ratio of its geometric means with a 95 % interval over
the pairs. A figure whose interval leaves out 1 is counted; of 20 such figures one does by chance. Takes about five
minutes for 20 pairs of `opt-125m` with random weights on two cores; needs no network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"

from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure import journal
from mlflow_llmbench.measure.outcome import GroupOutcome
from mlflow_llmbench.measure.task import Task
from mlflow_llmbench.records.results import RunResult
from mlflow_llmbench.stats import t_interval
from mlflow_llmbench.sweeps.executor import OnEvent, OnPause
from mlflow_llmbench.sweeps.local_executor import LocalExecutor
from mlflow_llmbench.sweeps.planning import plan
from mlflow_llmbench.sweeps.sweep import execute
from mlflow_llmbench.system import machine

FIXED = {
    "model": "opt-125m",
    "weights": "random",
    "quant": "fp32",
    "threads": 1,  # the barriers of several threads wait for whatever else runs on the machine
    "prompt_tokens": 16,
    "output_tokens": 8,
    "repetitions": 5,
    "warmup": 2,
    "rerun": True,
}
FIGURES = (
    "throughput/output_tokens_per_s",
    "latency/ttft_ms_mean",
    "latency/tpot_ms_mean",
    "latency/e2e_ms_mean",
    "first warm-up, s",
)


def follows_keeping(number: int) -> bool:
    """Return True if the cell before this one is kept: of the cells 1, 2 | 3, 4 | … the first, then the second."""
    return (number - 1) % 4 in (0, 3)


class EverySecond(LocalExecutor):
    """Executor that lets the sweep keep a cell only before every second one, and remembers how long that took."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.kept_s: list[float] = []

    def wait(self, on_event: OnEvent, on_pause: OnPause) -> tuple[Task, GroupOutcome]:
        """Measure the submitted task."""

        def pause(task: Task, so_far: GroupOutcome) -> None:
            if follows_keeping(len(so_far.measured)):
                started = time.perf_counter()
                on_pause(task, so_far)
                self.kept_s.append(time.perf_counter() - started)

        return super().wait(on_event, pause)


def figures(result: RunResult, folder: Path) -> dict[str, float]:
    """Return the compared figures of one cell."""
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    return {name: metrics[name] for name in FIGURES if name in metrics} | {"first warm-up, s": result.warmup_s[0]}


def ratio(kept: Sequence[float], not_kept: Sequence[float]) -> dict[str, float]:
    """Return the ratio of the geometric means of paired values, with a 95 % interval (t over the logarithms)."""
    logs = [math.log(a / b) for a, b in zip(kept, not_kept, strict=True)]
    low, high = t_interval(logs) or (math.nan, math.nan)
    return {"ratio": math.exp(statistics.fmean(logs)), "ci_low": math.exp(low), "ci_high": math.exp(high)}


def main() -> int:
    """Print one JSON object; exit code 1 if more than one figure differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spec = parse(FIXED | {"output_dir": f"{folder}/results"})
        with contextlib.closing(EverySecond(spec.options, ["auto"])) as executor:
            one = plan(spec, executor.machine)
            names = [f"{one.cells[0].folder}-{number:03}" for number in range(2 * given.pairs + 1)]
            cells = tuple(replace(one.cells[0], folder=name, name=name[-3:]) for name in names)
            repeated = replace(one, cells=cells, groups=(cells,), parent_name="between cells")
            done = execute(repeated, executor, (f"sqlite:///{folder}/mlflow.db", None))
            kept_s = executor.kept_s
        folders = [done.folder / name / "artifacts" for name in names]
        found = [figures(journal.read_result(artifacts), artifacts) for artifacts in folders]
    pairs = [(number, number + 1) for number in range(1, len(found), 2)]
    ordered = [pair if follows_keeping(pair[0]) else pair[::-1] for pair in pairs]
    ratios = {
        name: ratio([found[a][name] for a, _ in ordered], [found[b][name] for _, b in ordered])
        for name in FIGURES
        if name in found[0]
    }
    differ = [name for name, one in ratios.items() if not one["ci_low"] <= 1 <= one["ci_high"]]
    result = {
        "configuration": {name: str(value) for name, value in FIXED.items()},
        "pairs": given.pairs,
        "ratios_kept_to_not_kept": ratios,
        "differ": differ,
        "seconds_of_keeping": {"median": statistics.median(kept_s), "most": max(kept_s), "times": len(kept_s)},
        "outcome": done.outcome,
        "cells": found,
        "environment": machine.environment(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    return int(len(differ) > 1 or done.outcome != "ok")


if __name__ == "__main__":
    sys.exit(main())
