"""Lay a model out over several places, with `placement=auto`: the visible GPUs, then host memory, then the disk.

transformers and accelerate fill the places in this order, layer by layer (`infer_auto_device_map`), and read layers
that lie elsewhere when they are computed. They are told how many bytes of weights each place may hold: what is free,
less what the process, the KV cache and the activations need. `predict` does the same by formula, before anything is
loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..analysis.layout import DISK, HOST
from ..config import model_shape
from ..records.cell import Cell
from ..records.metric import GB
from ..records.quantizations import FLOAT_DTYPES
from ..records.results import ModelFacts
from ..records.text import short_number_text
from . import estimate, gpu, machine
from .estimate import Refusal

AUTO = "auto"
"""Value of `placement` that lays a model out; with `single` it lies on one device."""

SPARE = 0.05
"""Share of a place's memory that is left free beside what is known to be needed: fragments, buffers, estimates."""

MOVING_BYTES = 80_000_000
"""Host memory that bringing layers takes beside the largest one: copies in another dtype, and freed memory that the
allocator keeps. 0.05 GB was seen with opt-125m, half of it on the disk."""

UNKNOWN_SHARE = 0.25
"""Share of each place that is left for the KV cache and activations of a model whose architecture is unknown."""

SCORED_TOKENS = 512
"""Most tokens of a text whose logits an evaluation of the quality computes at once."""


@dataclass(frozen=True)
class Working:
    """Bytes that a cell needs besides weights: the KV cache, and what every device needs that computes a layer."""

    cache: int
    each: int


@dataclass(frozen=True)
class Layout:
    """A predicted layout: bytes of weights in each place, in the order of filling, and what it needs beside the disk.

    `needed`: peak bytes of the host if it computes, else of all GPUs · `loading`: of the load alone · `lacking`: what
    even this layout cannot do with the memory there is, as a sentence; empty if it fits.
    """

    weights: Mapping[str, int]
    needed: int
    loading: int
    lacking: str = ""


def working(cells: Iterable[Cell], model: ModelFacts, scores: bool = False) -> Working | None:
    """Return what the most demanding of some cells of one model needs besides weights; None if that is unknown.

    `scores`: the quality is evaluated too.
    """
    shape = model_shape.Shape.from_config(model.config) if model.config else None
    if shape is None:
        return None
    logits = 2 * SCORED_TOKENS * shape.vocab_size * 4 if scores else 0
    every = [estimate.besides_weights(cell, model, shape) for cell in cells]
    return Working(max(cache for cache, _ in every), max(logits, *(each for _, each in every)))


def rooms(device: str, limit: int | None, own: int = 0) -> dict[str, int]:
    """Return the bytes that may be used now of each place but the disk, in the order of filling.

    `device`: of a cell; `cuda` stands for all visible GPUs, `cuda:N` for one · `limit`: most host memory of a worker,
    None for what is free · `own`: host memory that this process has already. Raises MissingError if there is no such
    device. Empty if the system does not tell the free memory.
    """
    named = machine.require_device(device)
    kind, _, number = named.partition(":")
    numbers = ([int(number)] if number else range(len(gpu.gpus()))) if kind == "cuda" else []
    free = {f"cuda:{number}": gpu.free_bytes(number) for number in numbers}
    host, _ = estimate.available_memory(HOST, None)
    host = None if host is None else host + own
    found = {**free, HOST: min(filter(None, (host, limit)), default=None)}
    return {place: size for place, size in found.items() if size is not None}


def budgets(rooms: Mapping[str, int], needs: Working | None) -> dict[str, int]:
    """Return the most bytes of weights for each place.

    Of each the process is taken away (on a GPU, CUDA's context), and a spare share. The KV cache of a layer lies where
    the layer is computed: on the first GPU for those that lie in host memory or on the disk, which could hold it whole.
    """
    gpus = [place for place in rooms if place != HOST]
    found = {}
    for place, size in rooms.items():
        if needs is None:
            own = int(UNKNOWN_SHARE * size)
        elif place == (gpus or [HOST])[0]:
            own = needs.each + needs.cache
        else:
            own = needs.each + needs.cache // len(gpus) if place in gpus else 0
        own += model_shape.PROCESS_BYTES + (MOVING_BYTES if place == HOST else 0)
        found[place] = max(int(size * (1 - SPARE)) - own, 0)
    return found


def predict(
    cell: Cell, model: ModelFacts, shape: model_shape.Shape | None, rooms: Mapping[str, int], needs: Working | None
) -> Layout | None:
    """Return the predicted layout of a cell's model; None if the architecture or the free memory is unknown."""
    if shape is None or needs is None or HOST not in rooms:
        return None
    dtype = FLOAT_DTYPES.get(cell.quant) or estimate.stored_dtype(model)
    pieces = _pieces(shape, model_shape.VALUE_BYTES[dtype])
    lying = list(zip(fill(pieces, budgets(rooms, needs)), pieces, strict=True))
    weights = {place: sum(size for where, size in lying if where == place) for place in (*rooms, DISK)}
    gpus = [place for place in rooms if place != HOST]
    process = model_shape.PROCESS_BYTES
    moving = MOVING_BYTES if weights[DISK] or (gpus and weights[HOST]) else 0

    def brought(*places: str) -> int:
        """Bytes of the largest piece that is brought from one of these places, one at a time."""
        return max((size for where, size in lying if where in places), default=0)

    needed = {place: process + needs.each + weights[place] for place in gpus if weights[place]}
    if gpus:
        needed[gpus[0]] = process + needs.each + needs.cache + weights[gpus[0]] + brought(HOST, DISK)
        host = process + moving + weights[HOST] + brought(DISK)
    else:
        host = process + moving + needs.each + needs.cache + weights[HOST] + brought(DISK)
    lacking = next(
        (
            _lacking(cell, place, size, rooms[place])
            for place, size in {**needed, HOST: host}.items()
            if size > rooms[place]
        ),
        "",
    )
    total = sum(needed.values()) if gpus else host
    return Layout(weights, total, total - needs.each - needs.cache, lacking)


def _pieces(shape: model_shape.Shape, value_bytes: int) -> list[int]:
    """Return the bytes of the parts that stay together, in the order of the model: embedding, layers, head."""
    layer = -(-(shape.linear_parameters + shape.other_parameters) // shape.layers)
    parts = [shape.embedding_parameters, *[layer] * shape.layers, shape.head_parameters]
    return [part * value_bytes for part in parts if part]


def fill(pieces: Sequence[int], budgets: Mapping[str, int]) -> list[str]:
    """Return the place of each piece after filling the places in order, as accelerate 1.15 does.

    Several GPUs get about equal parts if all fits on them. A place that was full is not used again. The first GPU and
    the host keep room for the largest piece that is still to come, which may have to be brought there.
    """
    gpus = [place for place in budgets if place != HOST]
    most = dict(budgets)
    for place in gpus[:-1]:
        most[place] = min(most[place], sum(pieces) // len(gpus) + int(1.25 * max(pieces)))
    used = dict.fromkeys(budgets, 0)
    left, found = list(budgets), []
    for number, piece in enumerate(pieces):
        kept = dict.fromkeys([*gpus[:1], HOST], max(pieces[number + 1 :], default=0))
        while left and used[left[0]] + piece > most[left[0]] - kept.get(left[0], 0):
            left.pop(0)
        found.append(left[0] if left else DISK)
        if left:
            used[left[0]] += piece
    return found


def _lacking(cell: Cell, place: str, needed: int, room: int) -> str:
    asked, free = (short_number_text(one / GB) for one in (needed, room))
    where = "of memory" if place == HOST else f"on {place}"
    return (
        f"{cell.model} with batch_size={cell.batch_size} needs about {asked} GB {where} even with placement=auto, for "
        f"the process, the KV cache, activations and one layer, and there are {free} GB. "
        "Use a smaller batch or shorter texts, or try it all the same with force=true."
    )


def refusal(cell: Cell, model: ModelFacts, layout: Layout | None) -> Refusal | None:
    """Return why a cell with placement=auto cannot be measured, or None."""
    lacking = Refusal("memory", layout.lacking) if layout and layout.lacking else None
    return estimate.impossible(cell, model) or lacking
