"""What it takes to read many results: `recommend`, `compare` and `study` over one folder of a thousand cells.

The results are computed, not measured: 25 repetitions with noise of 2 %, 50 batch sizes for each of 20 configurations.
Goal: each command reads 1,000 results within 15 s of CPU. CPU time, because others use the machine too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlflow_llmbench.reports.artifacts import write_cell
from tests.results import made
from tests.work import cpu_s

GOAL_S = 15.0
QUANTS = ("none", "bf16", "int8", "int4")
COMMANDS = (
    ("recommend", "{folder}", "--accept-suspect", "computed"),
    ("compare", "{folder}", "--allow", "workload,verdict"),
    ("study", "--of", "{folder}", "--accept-suspect", "computed"),
)


def write_results(folder: Path, count: int, seed: int) -> None:
    """Write `count` results as cells of one sweep: models × quantizations × batch sizes."""
    noise = random.Random(seed)
    for number in range(count):
        quant, batch = QUANTS[number % 4], 1 + number // 20
        model = f"fake:memory_mb={1 + number % 20 // 4}"
        factors = [noise.gauss(1.0, 0.02) for _ in range(25)]
        result = made(quant, batch, step=10.0 + number % 20 + 0.1 * batch, factors=factors)
        result = dataclasses.replace(
            result,
            cell=dataclasses.replace(result.cell, model=model),
            model=dataclasses.replace(result.model, name=model, location=model),
            hashes=dataclasses.replace(result.hashes, config=f"{number:016x}"),
        )
        write_cell(result, folder / f"{number:016x}" / "artifacts")
    (folder / "sweep.json").write_text("{}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=18)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "20260101T000000Z-made"
        write_results(folder, arguments.results, arguments.seed)
        for command, *given in COMMANDS:
            options = [option.format(folder=folder) for option in given]
            used, done = cpu_s([sys.executable, "-m", "mlflow_llmbench", command, *options], cwd=scratch)
            rows.append({"command": command, "results": arguments.results, "cpu_s": round(used, 2),
                         "exit": done.returncode, "met": used <= GOAL_S and done.returncode == 0})  # fmt: skip
            print(json.dumps(rows[-1]), done.stderr[-300:] if done.returncode else "", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"goal_s": GOAL_S, "seed": arguments.seed, "rows": rows}, indent=1) + "\n")
    return not all(row["met"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
