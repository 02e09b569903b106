"""GPTQ: quantize a checkpoint once, calibrated with a workload's prompts, and cache the result by content.

The method of Frantar et al. 2023 (arXiv:2210.17323), through optimum and GPTQModel, the maintained successor of
AutoGPTQ. Runs in the process that prepares files, so that neither its time nor its memory is measured. The result is
an ordinary checkpoint.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...records import reading
from ...records.cell import DRAWN, Cell
from ...records.errors import MeasurementError, first_line
from ...records.quantizations import SCHEMES
from ...records.results import ModelFacts, hash16
from ...system import machine
from ...workloads.prompts import load_prompts
from . import passages
from .quantization import complete, recipe_of
from .recipe import load_complete

MOST_SAMPLES = 64
SAMPLE_TOKENS = 256
RECIPE = "llmbench.json"
"""File beside the weights that records how they were made."""


def folder_of(cell: Cell, model: ModelFacts) -> Path:
    """Return the cache folder of the quantized checkpoint, named by a hash of everything that decides its content."""
    packages = (*SCHEMES[cell.quant].packages, "transformers", "torch")
    versions = {package: importlib.metadata.version(package) for package in packages}
    prompts = load_prompts(cell.workload)
    calibration = list(prompts.texts) or {"generator": "uniform-ids-1", "seed": cell.seed}
    name, revision = model.identity
    made_of = {
        "model": name,
        "revision": revision,
        "bits": SCHEMES[cell.quant].bits,
        "group_size": cell.group_size,
        "calibration": calibration,
        "samples": [MOST_SAMPLES, SAMPLE_TOKENS],
        "versions": versions,
    }
    return machine.cache_folder() / "gptq" / f"{Path(model.name).name}-{cell.quant}-{hash16(made_of)}"


def is_made(cell: Cell, model: ModelFacts) -> bool:
    """Return False: a checkpoint is found by its content only, which `make` determines."""
    return False


def make(cell: Cell, model: ModelFacts, source: str, tokenizer: Callable[[], Any]) -> None:
    """Write the quantized checkpoint unless it exists. `tokenizer` loads the tokenizer, for prompts that are texts.

    Raises MeasurementError if it cannot be quantized. The folder appears complete or not at all. An interruption
    leaves a temporary folder, which is removed.
    """
    target = folder_of(cell, model)
    if (target / RECIPE).exists():
        return
    words = None if cell.workload in DRAWN else tokenizer()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".gptq-") as scratch:
        try:
            _quantize_into(Path(scratch), cell, source, words)
        except MeasurementError:
            raise
        except Exception as error:
            raise MeasurementError(
                f"GPTQ could not quantize {cell.model} with {SCHEMES[cell.quant].bits} bits and "
                f"group_size={cell.group_size}: {type(error).__name__}: {first_line(error)}. "
                "Try another group_size, or quant=int4."
            ) from error
        shutil.rmtree(target, ignore_errors=True)
        os.rename(scratch, target)
        os.mkdir(scratch)  # so that its context manager can remove it


def _quantize_into(folder: Path, cell: Cell, source: str, tokenizer: Any) -> None:
    import torch
    from optimum.gptq import GPTQQuantizer

    with complete(cell.model):
        loaded, _ = load_complete(source, local_files_only=True, trust_remote_code=cell.trust_remote_code, dtype="auto")
    samples = [
        torch.tensor([ids], dtype=torch.long)
        for ids in _samples(cell, int(loaded.config.get_text_config().vocab_size), tokenizer)
    ]
    dataset = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in samples]
    quantizer = GPTQQuantizer(**recipe_of(cell, "auto"), dataset=dataset)
    started = time.perf_counter()
    quantized = quantizer.quantize_model(loaded, None)
    seconds = time.perf_counter() - started
    quantizer.dataset = None  # tensors, which cannot be written as JSON
    quantized.config.quantization_config = quantizer.to_dict()
    quantizer.save(quantized, str(folder))
    # optimum writes the configuration before it converts the weights to format version 1, so it names the wrong one.
    config_file = folder / "config.json"
    config = reading.read_json(config_file)
    config["quantization_config"] = quantizer.to_dict()
    config_file.write_text(json.dumps(config, indent=1), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    recipe = {
        "quant.quantize_s": round(seconds, 1),
        "quant.calibration": cell.workload,
        "quant.calibration_samples": len(samples),
    }
    (folder / RECIPE).write_text(json.dumps(recipe), encoding="utf-8")


def _samples(cell: Cell, vocab_size: int, tokenizer: Any) -> list[list[int]]:
    """Return ids to calibrate with: the workload's texts cut to `SAMPLE_TOKENS`, or seeded random ids without any."""
    texts = load_prompts(cell.workload).texts[:MOST_SAMPLES]
    if not texts:
        return passages.draw(f"gptq/{cell.seed}", vocab_size, MOST_SAMPLES // 2, SAMPLE_TOKENS // 2)
    return [list(tokenizer(text)["input_ids"])[:SAMPLE_TOKENS] for text in texts]


def recorded(folder: str) -> dict[str, str | int | float]:
    """Return the facts that `quantize` recorded beside the weights; empty for a checkpoint from elsewhere."""
    file = Path(folder) / RECIPE
    if not file.is_file():
        return {}
    return reading.read_facts(file)
