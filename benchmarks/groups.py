"""Time saved by loading once per group: `python benchmarks/groups.py [--model PRESET] [--quant A,B] [--out FILE] …`.

Twelve cells with two loads (two precisions × six shapes) are run as one sweep and as twelve commands, in turns
(`--tokens N`, `--pairs N`). Goals: the sweep takes at most 0.4 of the time of the twelve commands, and at most 1.15 of
its two loads and its measured time. On two cores a command takes about 11 s besides load and measurement. So with a
model that loads in a second, the first goal needs short cells (`--tokens 8`) and the second long ones (24). A model
whose load takes most of a minute meets both: `--model opt-1.3b --quant int4,fp4 --batches 1,2 --prompts 4,8,16 --tokens
2`, 20 minutes. No network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlflow_llmbench.measure.events import CellMeasured
from mlflow_llmbench.measure.journal import read_events
from mlflow_llmbench.system import machine

ROOT = Path(__file__).resolve().parent.parent
FIXED = {"weights": "random", "repetitions": "5", "warmup": "3", "rerun": "true"}
GOALS = {"of_a_process_per_cell": 0.40, "of_loads_and_measured_time": 1.15}


def command(folder: Path, parameters: dict[str, str]) -> float:
    """Seconds of one `llmbench run`, including its start, charts and upload."""
    arguments = [
        text for name, value in (FIXED | parameters).items() for text in (f"--{name.replace('_', '-')}", value)
    ]
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    subprocess.run(
        [sys.executable, "-m", "mlflow_llmbench", "run", *arguments],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - started


def necessary(folder: Path) -> float:
    """Seconds that the newest sweep's workers took from their start to the last repetition: loads and measurements."""
    newest = max((folder / "llmbench-results").iterdir())
    total = 0.0
    for file in newest.glob("*/worker.jsonl"):
        sent = [event for event in read_events(file) if event.t_ns is not None]
        last = [event.sent_ns for event in sent if isinstance(event, CellMeasured)][-1]
        total += (last - sent[0].sent_ns) / 1e9
    return total


def main() -> int:
    """Print one JSON object; exit code 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="opt-125m")
    parser.add_argument("--quant", default="fp32,bf16", help="the two precisions, so the two loads")
    parser.add_argument("--batches", default="1,2,4", help="batch sizes")
    parser.add_argument(
        "--prompts", default="16,32", help="lengths of a prompt, tokens; six shapes with the batch sizes"
    )
    parser.add_argument("--tokens", default="8", help="output tokens of each cell")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    pairs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        length = {"model": given.model, "output_tokens": given.tokens}
        swept = {"quant": given.quant, "batch_size": given.batches, "prompt_tokens": given.prompts}
        axes = {name: tuple(values.split(",")) for name, values in swept.items()}
        command(folder, length | {"quant": axes["quant"][0]})  # writes the checkpoint and makes the store
        for number in range(given.pairs):
            sweep = command(folder, length | {name: ",".join(values) for name, values in axes.items()})
            needed = necessary(folder)
            single = sum(
                command(folder, length | dict(zip(axes, values, strict=True)))
                for values in itertools.product(*axes.values())
            )
            pairs.append({"sweep_s": sweep, "necessary_s": needed, "single_s": single})
            print(f"{number + 1}: {json.dumps(pairs[-1])}", file=sys.stderr, flush=True)
    ratios = {
        "of_a_process_per_cell": median(one["sweep_s"] / one["single_s"] for one in pairs),
        "of_loads_and_measured_time": median(one["sweep_s"] / one["necessary_s"] for one in pairs),
    }
    met = {name: ratios[name] <= goal for name, goal in GOALS.items()}
    result: dict[str, Any] = {
        "model": given.model,
        "quant": given.quant,
        "batches": given.batches,
        "prompts": given.prompts,
        "tokens": given.tokens,
        "ratios": ratios,
        "goals": GOALS,
        "met": met,
        "pairs": pairs,
        "environment": machine.environment(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    return int(not all(met.values()))


if __name__ == "__main__":
    sys.exit(main())
