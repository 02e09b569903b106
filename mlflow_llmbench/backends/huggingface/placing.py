"""Lay a model out over GPUs, host memory and the disk by transformers' `device_map`, and see what landed where.

accelerate puts hooks into such a model. A layer that lies on another GPU is computed there, one after another. One that
lies in host memory beside a GPU, or on the disk, is brought to the first device each time it is computed, and its
parameters are meta tensors in between: they have a shape and a dtype, and no data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...analysis.layout import DISK, HOST, spans
from ...records.cell import Cell
from ...records.errors import NotRealised
from ...records.metric import GB
from ...records.quantizations import FLOAT_DTYPES
from ...records.results import ModelFacts, PlacedPart
from ...records.text import short_number_text
from ...system import memory, placement
from ...system.placement import AUTO, Working
from ..checkpoints import sources

LAID_OUT = ("none", *FLOAT_DTYPES)
"""Quantizations whose layers can lie in host memory or on the disk: none that a library packs."""

LONGEST_FACT = 400
"""Most characters of the modules that a fact names; all of them are in result.json."""


def refusal(cell: Cell, model: ModelFacts) -> str | None:
    """Say why a model cannot be laid out over several places, and what to do; None if it can, or is not to be."""
    if cell.placement != AUTO:
        return None
    if cell.tensor_parallel > 1:
        return (
            f"placement=auto lays whole layers out over devices, and tensor_parallel={cell.tensor_parallel} divides "
            "each. Use one of them."
        )
    if cell.device.startswith(("xpu", "mps")):
        return f"placement=auto knows the memory of NVIDIA GPUs only, not of device={cell.device}. Use device=cpu."
    method = ((model.config or {}).get("quantization_config") or {}).get("quant_method")
    if cell.quant not in LAID_OUT or method or model.source in sources.GGUF_SOURCES:
        what = method or ("a GGUF file" if model.source in sources.GGUF_SOURCES else f"quant={cell.quant}")
        return (
            f"placement=auto cannot lay {what} out: packed weights are not read layer by layer from host memory or the "
            f"disk. Use an unquantized checkpoint with quant={','.join(LAID_OUT)}, or placement=single."
        )
    if cell.decode != "generate":
        return (
            f"placement=auto works with decode=generate only, and decode={cell.decode} is asked for: layers are moved "
            "while they are computed. Use one of them."
        )
    if cell.batching == "continuous":
        return (
            "placement=auto cannot batch continuously, which takes the model's memory for its cache. "
            "Use batching=static,dynamic, or placement=single."
        )
    return None


def devices_of(cell: Cell, device: str) -> tuple[str, ...]:
    """Return the devices that can compute layers of a cell's model: one, or all visible GPUs."""
    if cell.placement != AUTO or device == "cpu":
        return (device,)
    return tuple(place for place in placement.rooms(cell.device, None) if place != HOST) or (device,)


def keywords(cell: Cell, limit: int | None, needs: Working | None, folder: Path | None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that lay a model out; none for one on a single device.

    `limit`: most host memory of this process, None for what is free · `needs`: what the cells need besides weights ·
    `folder`: for weights that are not read from the checkpoint itself, such as pickled ones.
    """
    if cell.placement != AUTO:
        return {}
    own = memory.read()
    room = placement.rooms(cell.device, limit, (own.anonymous or own.rss) if own else 0)
    most = placement.budgets(room, needs)
    numbered = {HOST if place == HOST else int(place.partition(":")[2]): size for place, size in most.items()}
    return {"device_map": "auto", "max_memory": numbered, **({"offload_folder": str(folder)} if folder else {})}


def layout(model: Any) -> dict[str, str]:
    """Return the outermost modules that lie in one place each, with it; "" is the whole model."""
    found = getattr(model, "hf_device_map", None) or {"": next(model.parameters()).device}
    return {name: _named(place) for name, place in found.items()}


def _named(place: Any) -> str:
    text = str(place)
    return f"cuda:{text}" if text.isdigit() else text


def computing_device(model: Any) -> str | None:
    """Return the device that computes the layers that lie in host memory or on the disk; None for one place."""
    places = [*layout(model).values()]
    several = len({*places}) > 1 or DISK in places
    return next((place for place in places if place not in (HOST, DISK)), HOST) if several else None


def parts(model: Any) -> tuple[PlacedPart, ...]:
    """Return the parts of a model by place, in the order of filling: GPUs, host memory, disk."""
    where = layout(model)
    sizes: dict[str, int] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:  # tied ones come once
        place = _place_of(name, where)
        sizes[place] = sizes.get(place, 0) + tensor.numel() * tensor.element_size()
    order = sorted(sizes, key=lambda place: (place in (HOST, DISK), place == DISK, place))
    modules = {place: tuple(name for name, own in where.items() if own == place) for place in order}
    return tuple(PlacedPart(place, sizes[place], modules[place]) for place in order if sizes[place])


def _place_of(name: str, where: Mapping[str, str]) -> str:
    """Return the place of a tensor: that of the innermost module of the layout that it is in."""
    while name not in where:
        if not name:
            return HOST
        name = name.rpartition(".")[0]
    return where[name]


def host_copy(module: Any, name: str) -> Any:
    """Return the tensor in host memory that an offloaded parameter of a module is read from; None if there is none."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        weights = getattr(one, "weights_map", None)
        held = getattr(getattr(weights, "dataset", None), "state_dict", None) or {}
        found = held.get(f"{getattr(weights, 'prefix', '')}{name}")
        if found is not None:
            return found
    return None


def verify(cell: Cell, device: str, model: Any) -> None:
    """Raise NotRealised if a model that was laid out has parameters without data, or no layer on its device."""
    if cell.placement != AUTO:
        return
    where = layout(model)
    lost = [
        name
        for name, tensor in model.named_parameters()
        if tensor.device.type == "meta" and _place_of(name, where) not in (HOST, DISK)
    ]
    if lost:
        raise NotRealised(
            f"placement=auto left {lost[0]} without data on {_place_of(lost[0], where)}. Use placement=single, or "
            "another model."
        )
    if device != "cpu" and {*where.values()} <= {HOST, DISK}:
        raise NotRealised(
            f"placement=auto found no room for a layer on {device}, so that the CPU would compute all of them. "
            "Use device=cpu, or a smaller batch."
        )


def facts(found: Sequence[PlacedPart]) -> dict[str, str]:
    """Return what landed where as facts: `placement.cpu` → `0.31 GB: model.embed_tokens, model.layers.0–5`."""
    return {f"placement.{part.place.replace(':', '_')}": _told(part) for part in found}


def _told(part: PlacedPart) -> str:
    names = ", ".join(spans(part.modules))
    names = names if len(names) <= LONGEST_FACT else f"{names[:LONGEST_FACT]}…"
    return f"{short_number_text(part.weight_bytes / GB)} GB: {names}"
