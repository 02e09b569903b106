"""Compare the predicted peak of host memory while loading with the measured one, for every scheme on several shapes.

The layers of a shape are real, their number is cut where a model is large: the peak follows from the weights and the
largest layer. Random weights. Each load is a fresh worker that ends when the model is loaded.

    python benchmarks/loading_peak.py [--out FILE] [--shapes opt-125m,…] [--schemes int4,…]

Loads that FILE has are not repeated; only their prediction is made again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlflow_llmbench.backends.checkpoints import random_weights
from mlflow_llmbench.config import model_shape
from mlflow_llmbench.config.models import find_preset
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure import interpreter, supervise
from mlflow_llmbench.measure.events import Event, StageMemory
from mlflow_llmbench.measure.outcome import stages_of
from mlflow_llmbench.measure.task import WorkerJob
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MissingError
from mlflow_llmbench.records.quantizations import MIXED, SCHEMES, schemes_of
from mlflow_llmbench.system import estimate

TOLERANCE = 0.15

SHAPES: dict[str, tuple[str, int | None]] = {
    "opt-125m": ("opt-125m", None),
    "gemma-3-270m": ("gemma-3-270m", None),
    "pythia-410m/8": ("pythia-410m", 8),
    "opt-1.3b/4": ("opt-1.3b", 4),
    "qwen3-0.6b/8": ("qwen3-0.6b", 8),
}
"""Name → preset and number of layers, None for all of them."""


def checkpoint(name: str, folder: Path) -> Path:
    """Write the checkpoint of a shape, and return its folder."""
    preset_name, layers = SHAPES[name]
    preset = find_preset(preset_name)
    assert preset
    if layers:
        config = {**preset.config, "num_hidden_layers": layers}
        if "layer_types" in config:
            config["layer_types"] = list(config["layer_types"])[:layers]
        preset = dataclasses.replace(preset, name=f"{preset_name}-{layers}-layers", config=config)
    return random_weights.write_checkpoint(preset, 0)


def cell_of(model: Path, quant: str) -> Cell:
    """Return the cell of a short measurement; a mixed model is given 6 bits per weight."""
    budget = {"quant_budget": "6"} if quant == MIXED else {}
    return parse({"model": str(model), "quant": quant, "prompt_tokens": "8", "output_tokens": "2", **budget}).first


def load(model: Path, quant: str, scratch: Path) -> dict[str, Any]:
    """Return what a load needed at its peak, what was predicted, and the weights, in bytes; or why it failed."""
    cell = cell_of(model, quant)
    facts = interpreter.resolve(cell)
    folder = Path(tempfile.mkdtemp(dir=scratch))

    def report(event: Event) -> None:
        if isinstance(event, StageMemory) and event.stage == "loaded":
            raise KeyboardInterrupt  # the supervisor ends the worker and keeps what it has told

    job = WorkerJob("prepare", (cell,), facts, (folder,))
    prepared = supervise.run_worker(job, folder / "prepare.log")
    if prepared.error:
        return {"error": str(prepared.error)}
    outcome = supervise.run_worker(dataclasses.replace(job, task="measure"), folder / "worker.log", report)
    if outcome.error or outcome.load is None:
        return {"error": str(outcome.error)}
    stages = stages_of(outcome, 0)
    return {
        "load_s": round(outcome.load.load_s, 1),
        "weight_bytes": outcome.load.weight_bytes,
        "mapped_bytes": outcome.load.mapped_weight_bytes,
        "resident_bytes": stages.host_rss["loading"],
        "needed_loaded_bytes": stages.host_needed["loaded"],
        "measured_bytes": stages.host_needed["loading"],
    }


def predicted(model: Path, quant: str) -> int | None:
    """Return the prediction for a load."""
    cell = cell_of(model, quant)
    facts = interpreter.resolve(cell)
    shape = model_shape.Shape.from_config(facts.config or {})
    return estimate.predicted_load_bytes(cell, facts, shape)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, GB."""
    lines = ["| shape | scheme | weights | needed | predicted | predicted ÷ needed |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['shape']} | {row['quant']} | {row['error']} | | | |")
            continue
        sizes = [row["weight_bytes"], row["measured_bytes"], row["predicted_bytes"]]
        shown = " | ".join(f"{size / 1e9:.3f}" for size in sizes)
        lines.append(f"| {row['shape']} | {row['quant']} | {shown} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print. Return 1 if a prediction is off by more than `TOLERANCE`."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/loading-peak-2core-amd-epyc.json"))
    options.add_argument("--shapes", default=",".join(SHAPES))
    options.add_argument("--schemes", default=",".join(schemes_of("transformers")))
    asked = options.parse_args()
    known: list[dict[str, Any]] = json.loads(asked.out.read_text())["rows"] if asked.out.exists() else []
    rows = {(row["shape"], row["quant"]): row for row in known}
    with tempfile.TemporaryDirectory() as scratch:
        for quant in asked.schemes.split(","):
            for name in asked.shapes.split(","):
                with contextlib.suppress(MissingError):
                    model = checkpoint(name, Path(scratch))
                    row = rows.get((name, quant)) or {
                        "shape": name,
                        "quant": quant,
                        **load(model, quant, Path(scratch)),
                    }
                    if "measured_bytes" in row:
                        row["predicted_bytes"] = predicted(model, quant)
                        row["ratio"] = row["predicted_bytes"] / row["measured_bytes"]
                    rows[name, quant] = row
                    print(row, file=sys.stderr, flush=True)
                    ordered = sorted(
                        rows.values(), key=lambda one: ([*SHAPES].index(one["shape"]), [*SCHEMES].index(one["quant"]))
                    )
                    asked.out.write_text(json.dumps({"rows": ordered}, indent=1) + "\n")
    print(table(ordered))
    missed = [row for row in ordered if "ratio" in row and abs(row["ratio"] - 1) > TOLERANCE]
    print(f"{len(missed)} of {len(ordered)} predictions are off by more than {TOLERANCE:.0%}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
