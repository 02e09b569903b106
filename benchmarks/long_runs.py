"""Whether the cost of a repetition, a cell and a token stays the same in long runs: CPU seconds of whole commands.

    python benchmarks/long_runs.py [--out FILE] [--quick]

Each row measures a backend that computes nothing, in sizes that differ by ten: 200, 2,000 and 20,000 repetitions of
one cell; 50, 500 and 5,000 cells; 1,000, 10,000 and 100,000 tokens of one request. The cost of a unit is what the
larger size takes more, divided by the units more, so that the start of the program is not in it. Goal: between the
upper two sizes it is at most 1.5 times what it is between the lower two. Charts are left out, whose cost per cell is
the same anyhow. It is the CPU time of all processes of the command, because others use the machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.work import cpu_s

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"repetitions": (200, 2_000, 20_000), "cells": (50, 500, 5_000), "tokens": (1_000, 10_000, 100_000)}
MOST_GROWTH = 1.5


def command(unit: str, size: int) -> list[str]:
    """The options that measure `size` repetitions, cells or tokens."""
    given = {
        "--backend": "fake",
        "--model": "fake:ttft_ms=0+itl_ms=0",
        "--repetitions": "5",
        "--output-tokens": "4",
        "--prompt-tokens": "8",
        "--warmup": "1",
    }
    if unit == "repetitions":
        given["--repetitions"] = str(size)
    elif unit == "tokens":
        given["--output-tokens"] = str(size)
    else:
        rows = min(size, 50)
        given["--batch-size"] = ",".join(map(str, range(1, rows + 1)))
        given["--prompt-tokens"] = ",".join(map(str, range(8, 8 + size // rows)))
    options = [part for pair in given.items() for part in pair]
    return [sys.executable, "-m", "mlflow_llmbench", "run", *options]


def measured(unit: str, size: int) -> float:
    """CPU seconds of one command, of its workers too."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "LLMBENCH_CHARTS": "0",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        }
        used, done = cpu_s(command(unit, size), cwd=folder, env=environment)
    if done.returncode:
        sys.exit(f"{unit} {size}: exit code {done.returncode}: {done.stderr[-500:]}")
    return used


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sizes ten times smaller")
    parser.add_argument("--unit", choices=list(SIZES), action="append")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for unit in given.unit or SIZES:
        sizes = [size // 10 if given.quick else size for size in SIZES[unit]]
        spent = [measured(unit, size) for size in sizes]
        low, high = (1e3 * (spent[i + 1] - spent[i]) / (sizes[i + 1] - sizes[i]) for i in range(2))
        row = {"unit": unit, "sizes": sizes, "cpu_s": [round(s, 2) for s in spent]}
        row |= {"ms_each": [round(low, 3), round(high, 3)], "growth": round(high / low, 2)}
        rows.append({**row, "met": high <= MOST_GROWTH * low})
        print(json.dumps(rows[-1]), flush=True)
    if given.out:
        given.out.write_text(json.dumps({"most_growth": MOST_GROWTH, "rows": rows}, indent=1) + "\n")
    return not all(row["met"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
