"""The table of presets that `llmbench models` prints: the memory that each needs, and whether it fits here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config.model_shape import load_memory_estimate, memory_estimate
from ..config.models import PRESETS, Preset
from .tables import text_table

TABLE_QUANTIZATIONS = ("none", "fp32", "int8", "int4")


def models_json(available_bytes: int | None, device_bytes: int | None) -> list[dict[str, Any]]:
    """Return all presets with their estimated memory in bytes, at batch 1 with 128 prompt and 128 output tokens.

    `memory` holds for each quantization `run_bytes`, `load_bytes`, and the larger of both as `peak_bytes`. `fits_host`
    tells whether the peak fits into `available_bytes`, `fits_device` into `device_bytes`; each is None if its limit is.
    """
    return [_model_data(preset, available_bytes, device_bytes) for preset in PRESETS.values()]


def models_table(available_bytes: int | None, device_bytes: int | None) -> str:
    """Return all presets as a text table, with the peak in GB (10⁹ bytes).

    A peak that does not fit is marked `no`, or `cpu` if it fits only in host memory.
    """
    models = models_json(available_bytes, device_bytes)
    marks = [[_mark(size) for size in model["memory"].values()] for model in models]
    width = max(len(mark) for row in marks for mark in row)
    heading = ["model", "params", "context", *(f"{quant} {'':{width}}" for quant in TABLE_QUANTIZATIONS), "licence"]
    rows = []
    for model, row in zip(models, marks, strict=True):
        sizes = [
            f"{size['peak_bytes'] / 1e9:.1f} {mark:{width}}"
            for size, mark in zip(model["memory"].values(), row, strict=True)
        ]
        licence = f"{model['licence']}, gated" if model["gated"] else model["licence"]
        rows.append([model["name"], parameters_text(model["parameters"]), str(model["context"]), *sizes, licence])
    table = text_table(heading, rows, range(1, len(heading) - 1))
    return "\n".join([*_legend(available_bytes, device_bytes), "", table])


def parameters_text(count: int) -> str:
    """Format a number of parameters with three digits: `1.32 B`, `125 M`, `70.4 M`."""
    number, unit = (count / 1e9, "B") if count >= 999.5e6 else (count / 1e6, "M")
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f} {unit}"


def _model_data(preset: Preset, available_bytes: int | None, device_bytes: int | None) -> dict[str, Any]:
    sizes = {}
    for quant in TABLE_QUANTIZATIONS:
        run, load = (
            memory_estimate(preset.shape, quant, preset.dtype),
            load_memory_estimate(preset.shape, quant, preset.dtype),
        )
        peak = max(run, load)
        sizes[quant] = {
            "run_bytes": run,
            "load_bytes": load,
            "peak_bytes": peak,
            "fits_host": None if available_bytes is None else peak <= available_bytes,
            "fits_device": None if device_bytes is None else peak <= device_bytes,
        }
    described = ("name", "repository", "parameters", "context", "dtype", "licence", "gated")
    return {**{name: getattr(preset, name) for name in described}, "memory": sizes}


def _mark(size: Mapping[str, Any]) -> str:
    """Return the mark after a size; empty if it fits, or if the available memory is unknown."""
    if size["fits_device"] is None:
        return "no" if size["fits_host"] is False else ""
    return "" if size["fits_device"] else "cpu" if size["fits_host"] else "no"


def _legend(available_bytes: int | None, device_bytes: int | None) -> list[str]:
    host = "" if available_bytes is None else f"{available_bytes / 1e9:.1f} GB free here"
    if device_bytes is not None:
        cpu = f" cpu: only in {host}, with device=cpu." if host else ""
        fits = f"No mark: fits in {device_bytes / 1e9:.1f} GB of device memory.{cpu} no: does not fit."
    else:
        fits = f"No mark: fits in {host}. no: does not fit." if host else "How much memory is free here is not known."
    return [
        "Estimated peak memory in GB, loading included, at batch 1 with 128 + 128 tokens; "
        "none = as published, fp16 or bf16.",
        fits,
    ]
