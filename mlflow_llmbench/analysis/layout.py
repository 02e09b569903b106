"""Figures of a model that is laid out over several places (`placement=auto`). Pure; empty without a layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from ..records.metric import GB, Series
from ..records.metrics import GPU_WEIGHT_PARTS, WEIGHTS_ON_DISK, WEIGHTS_ON_GPUS, WEIGHTS_ON_HOST
from ..records.results import PlacedPart, RunResult
from ..records.text import short_number_text
from .figures import Figures

HOST, DISK = "cpu", "disk"
"""Names of the places that are no GPU; a GPU is `cuda:N`."""

NAMES = {HOST: "in host memory", DISK: "on the disk"}
"""Place → how sentences name it; GPUs have their own names, `cuda:N`."""


def parts_of(result: RunResult) -> tuple[PlacedPart, ...]:
    """Return what landed where, in the order of filling; empty unless it was laid out."""
    return (result.load.placement if result.load else None) or ()


def weights_of(result: RunResult) -> dict[str, int]:
    """Return the bytes of weights in each place that has some; empty unless it was laid out."""
    return {part.place: part.weight_bytes for part in parts_of(result)}


def layout_figures(result: RunResult) -> Figures:
    """Weights on GPUs, in host memory and on the disk, by MLflow key; those that were possible and are empty are 0."""
    sizes = weights_of(result)
    if not sizes:
        return {}
    on_gpus = sum(size for place, size in sizes.items() if place not in NAMES)
    return {
        WEIGHTS_ON_GPUS.key(): on_gpus / GB if on_gpus else None,
        WEIGHTS_ON_HOST.key(): sizes.get(HOST, 0) / GB,
        WEIGHTS_ON_DISK.key(): sizes.get(DISK, 0) / GB,
    }


def layout_series(result: RunResult) -> Iterator[tuple[Series, int, float]]:
    """Yield the weights on each GPU: series, number of the GPU, and value in GB."""
    for part in parts_of(result):
        if part.place not in NAMES:
            yield GPU_WEIGHT_PARTS, int(part.place.partition(":")[2] or 0), part.weight_bytes / GB


def weights_text(weights: Mapping[str, int]) -> str:
    """Return a layout as text: `cuda:0 70.2 GB, cpu 12.1 GB, disk 57.2 GB`, without empty places."""
    return ", ".join(f"{place} {short_number_text(size / GB)} GB" for place, size in weights.items() if size)


def gpu_count(result: RunResult) -> int:
    """Return the number of GPUs over which a model is laid out; they compute one after another."""
    return sum(part.place not in NAMES for part in parts_of(result))


def moved(result: RunResult) -> str | None:
    """Say which weights are brought to the device that computes them in each pass; None if there are none."""
    parts = [part for part in parts_of(result) if part.place == DISK or (part.place == HOST and gpu_count(result))]
    if not parts:
        return None
    return " and ".join(f"{short_number_text(part.weight_bytes / GB)} GB {NAMES[part.place]}" for part in parts)


def spans(modules: Sequence[str]) -> Iterator[str]:
    """Yield the names of modules, with numbered ones that follow each other as one: `model.layers.0–5`."""
    begun: tuple[str, int, int] | None = None
    for name in [*modules, None]:
        found = re.fullmatch(r"(.*\.)(\d+)", name) if name is not None else None
        if begun and found and found[1] == begun[0] and int(found[2]) == begun[2] + 1:
            begun = (begun[0], begun[1], int(found[2]))
            continue
        if begun:
            yield f"{begun[0]}{begun[1]}" + (f"–{begun[2]}" if begun[2] > begun[1] else "")
        begun = (found[1], int(found[2]), int(found[2])) if found else None
        if found is None and name is not None:
            yield name or "the whole model"
