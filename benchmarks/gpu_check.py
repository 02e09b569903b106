"""Check our measurement on a CUDA machine, without mlflow: `python benchmarks/gpu_check.py`.

Runs opt-125m and a 1B shape (llama-3.2-1b) with random weights at batch 1 and 8: bf16, also compiled with CUDA graphs,
the quantizations of bitsandbytes and torchao, and a KV cache in 8-bit floats. It checks the host's stamps against CUDA
events and the allocator's memory against NVML, and prints a JSON line for each cell as it ends, then one with all of
them. Without a GPU it says so and exits with 0.
Needs torch, transformers, accelerate and nvidia-ml-py. Without bitsandbytes or torchao, the configurations that need
them are errors, and the others run.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlflow_llmbench.analysis import efficiency, latency, summary
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.measure.batch import compare_decoding, measure_cell, time_request
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import LlmbenchError
from mlflow_llmbench.records.results import Hashes, RunResult
from mlflow_llmbench.system import gpu, machine
from mlflow_llmbench.workloads.prompts import load_prompts

MODELS = ("opt-125m", "llama-3.2-1b")
CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {"quant": "bf16"},
    {"quant": "bf16", "decode": "compiled"},
    {"quant": "bf16", "kv_cache": "fp8"},
    {"quant": "int8"},
    {"quant": "int8", "int8_threshold": 0.0},
    {"quant": "int4"},
    {"quant": "int8-wo"},
    {"quant": "int8-wo", "decode": "compiled"},
    {"quant": "int4-wo"},
    {"quant": "int4-wo", "decode": "compiled"},
    {"quant": "fp8"},
)
BATCHES = (8, 1)


def against_events(backend: TransformersBackend, cell: Cell, vocabulary: int) -> float:
    """The host's end-to-end time of one request ÷ that of CUDA events recorded around it; 1 if both agree."""
    import torch

    prompts = load_prompts("synthetic").batch(cell, 0, vocabulary, None)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    record, _ = time_request(backend, prompts, cell.output_tokens)
    end.record()
    torch.cuda.synchronize()
    return latency.e2e_ms(record) / float(start.elapsed_time(end))


def check_cell(backend: TransformersBackend, cell: Cell, load: Any, peaks: dict[str, float]) -> dict[str, Any]:
    """Measure one cell and compare its clocks and memory with CUDA's and NVML's."""
    prompts = load_prompts("synthetic").batch(cell, 0, load.vocab_size, None)
    compile_s = backend.compile(prompts, len(prompts[0]), cell.output_tokens)
    backend.device_memory(reset=True)
    measured = measure_cell(backend, cell, load_prompts("synthetic"), load.vocab_size, lambda *_, **__: None)
    held = backend.device_memory()
    result = RunResult(
        cell,
        "ok",
        0,
        0,
        Hashes("", "", "", "", ""),
        backend.facts,
        {},
        load=load,
        repetitions=measured.repetitions,
        peaks=peaks,
    )
    metrics = summary.summarize(result)
    return {
        "model": cell.model,
        "quant": cell.quant,
        "decode": cell.decode,
        "kv_cache": cell.kv_cache,
        "batch_size": cell.batch_size,
        "compile_s": compile_s,
        "same_tokens": compare_decoding(backend, cell, load_prompts("synthetic"), load.vocab_size),
        "tokens_per_s": metrics["throughput/output_tokens_per_s"],
        "ttft_ms": metrics["latency/ttft_ms_p50"],
        "itl_ms": metrics["latency/itl_ms_p50"],
        "mbu": efficiency.model_bandwidth_utilization(result),
        "cv": metrics["trust/cv_ratio"],
        "weight_bytes": load.weight_bytes,
        "host_over_cuda_events": against_events(backend, cell, load.vocab_size),
        "allocated_bytes": held.allocated if held else None,
        "reserved_bytes": held.reserved if held else None,
        "nvml_process_bytes": gpu.process_bytes(os.getpid()),
        "facts": dict(backend.describe().facts),
    }


def main() -> int:
    """Print JSON lines; exit code 0 without a GPU or when every cell ran, else 1."""
    os.environ.update(gpu.PCI_ORDER)
    devices = gpu.gpus()
    if not devices:
        print(json.dumps({"gpu": None, "message": "No NVIDIA GPU answers here, so nothing was checked."}))
        return 0
    cells: list[dict[str, Any]] = []

    def add(cell: dict[str, Any]) -> None:
        cells.append(cell)
        print(json.dumps(cell), flush=True)

    for model in MODELS:
        for settings in CONFIGURATIONS:
            first = Cell(model=model, weights="random", device="cuda", output_tokens=64, max_repetitions=10, **settings)
            try:
                facts = TransformersBackend.resolve(first)
                TransformersBackend.prepare(first, facts)
                backend = TransformersBackend(first, facts)
                peaks = backend.peaks()
                load = backend.load()
                for batch in BATCHES:
                    add(check_cell(backend, replace(first, batch_size=batch), load, peaks))
                backend.close()
            except LlmbenchError as error:
                add({"model": model, **settings, "error": str(error)})
    print(
        json.dumps(
            {"gpu": devices[0]["name"], "driver": devices[0]["driver"], "packages": machine.packages(), "cells": cells}
        )
    )
    return 1 if any("error" in cell for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main())
