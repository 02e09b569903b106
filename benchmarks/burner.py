"""Small cells beside programs that burn CPUs: `python benchmarks/burner.py [--times N] [--out FILE]`.

Cells of a real architecture with random weights, and of the fake backend, from a few milliseconds to seconds long, are
measured while one process, and then one for each CPU, computes in a loop. None of them may be called valid. Prints one
JSON object with the verdicts by length. Takes some minutes on two cores; needs no network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlflow_llmbench import load_results, run
from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.analysis.verdict import judge
from mlflow_llmbench.system import machine

SHORT = {"warmup": 1, "max_repetitions": 10}
MODEL = {"model": "pythia-70m", "weights": "random", "prompt_tokens": 8, "output_tokens": "2,8", "threads": "1,2"}
FAKE = {"model": "fake:ttft_ms=2+itl_ms=1", "backend": "fake", "prompt_tokens": 4, "output_tokens": "2,4,16,64,256"}
SWEEPS = {
    "fake, auto": FAKE | SHORT,
    "fake, 5": FAKE | SHORT | {"repetitions": 5},
    "pythia-70m, 5": MODEL | SHORT | {"repetitions": 5},
    "pythia-70m, auto": MODEL | SHORT,
}


@contextmanager
def burners(count: int) -> Iterator[None]:
    """Run processes that each use a whole CPU."""
    code = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # none outlives this program
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for one in started:
            one.kill()
            one.wait()


def verdicts(name: str, parameters: dict[str, Any], seed: int, folder: str) -> list[dict[str, Any]]:
    """Measure one sweep; return for each cell its length, the time of its repetitions, and its verdict."""
    done = run(**parameters, seed=seed, rerun=True, output_dir=f"{folder}/{name.replace(', ', '-')}-{seed}")
    found = []
    for one in load_results(str(done.folder)):
        judged = judge(one, summarize(one))
        wall = sum(r.noise.wall_s for r in one.repetitions if r.noise)
        found.append(
            {
                "sweep": name,
                "output_tokens": one.cell.output_tokens,
                "threads": one.cell.threads,
                "repetitions": len(one.repetitions),
                "seconds": round(wall, 4),
                "verdict": judged.word,
                "reasons": sorted({reason.code for reason in judged.reasons}),
            }
        )
    return found


def table(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cells by burners, sweep and length: how many there are, their shortest time, verdicts and reasons."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in cells:
        groups.setdefault((one["burners"], one["sweep"], one["output_tokens"]), []).append(one)
    return [
        {
            "burners": key[0],
            "sweep": key[1],
            "output_tokens": key[2],
            "cells": len(own),
            "least_seconds": min(one["seconds"] for one in own),
            "verdicts": dict(Counter(one["verdict"] for one in own)),
            "reasons": dict(Counter(code for one in own for code in one["reasons"])),
        }
        for key, own in groups.items()
    ]


def main() -> int:
    """Print one JSON object; exit code 1 if any cell was called valid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        for count in (1, len(machine.usable_cpus())):
            for name, parameters in SWEEPS.items():
                for seed in range(given.times):
                    with burners(count):
                        new = verdicts(name, parameters, seed, folder)
                    cells += [{"burners": count, **one} for one in new]
                    print(count, name, seed, Counter(one["verdict"] for one in new), file=sys.stderr, flush=True)
    valid = [one for one in cells if one["verdict"] == "valid"]
    result = {
        "valid": len(valid),
        "of": len(cells),
        "by_length": table(cells),
        "valid_cells": valid,
        "environment": machine.environment(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    return int(bool(valid))


if __name__ == "__main__":
    sys.exit(main())
