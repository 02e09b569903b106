"""Structured pruning: choose the parts of a checkpoint that matter least, and write what is left as a checkpoint.

Runs in the process that prepares files, so neither its time nor its memory is measured. Any quantization is made from
the pruned checkpoint. The criteria are computed on the same bundled texts for every workload, so that all cells of a
model run the same one. Nothing is trained afterwards.

- Layers: block influence, 1 − mean cos(hidden state before the layer, after it), over all tokens; the layers with the
  lowest go at once (Men et al. 2024, ShortGPT, arXiv:2403.03853).
- Channels of an MLP: ‖W[:, j]‖₂ · ‖x_j‖₂, with W the projection out of the MLP and x_j the channel's values over all
  tokens; the lowest of each layer go. It is the norm of all that the channel adds to the layer's output, and Wanda's
  criterion |W_ij| · ‖x_j‖₂ (Sun et al. 2024, arXiv:2306.11695), summed in squares over the outputs i.
- Heads: ‖X_g · W_gᵀ‖_F, the same norm for a KV group g with its heads, or for one head where all share one KV head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import pruning
from ...config.model_shape import Shape
from ...config.pruning import HEADS, LAYERS, MLP, Family, Pruning
from ...records import reading
from ...records.cell import Cell
from ...records.errors import LlmbenchError, MeasurementError, ModelError, NotRealised, first_line
from ...records.results import ModelFacts, hash16
from ...system import machine
from ...system.estimate import stored_dtype
from ...workloads.prompts import load_prompts
from ..checkpoints.files import SMALL_FILES
from . import passages, recipe
from .quantization import complete

if TYPE_CHECKING:
    import torch

FORMAT = 1
"""Version of the criteria and of what is written; a new one makes new checkpoints."""

PASSAGES, PASSAGE_TOKENS, ROWS = 24, 128, 8
"""Number of passages, tokens of each, and passages in one forward pass."""

RECORD = "llmbench.json"
"""File beside the weights that records how they were made."""

CRITERIA = {
    LAYERS: "block influence (1 - cosine similarity)",
    MLP: "norm of a channel's contribution",
    HEADS: "norm of a head's contribution",
}
"""Part → its criterion in words."""


def planned(cell: Cell, model: ModelFacts) -> ModelFacts:
    """Return the facts of a model as it will be after a cell's pruning; the same if it has none or cannot be pruned."""
    if cell.prune is None or model.config is None or pruning.refusal(cell.model, model.config, cell.prune):
        return model
    return dataclasses.replace(model, config=pruning.pruned_config(model.config, cell.prune), pruned=cell.prune)


def folder_of(cell: Cell, model: ModelFacts) -> Path:
    """Return the cache folder of the pruned checkpoint, named by a hash of everything that decides its content."""
    made_of = {
        "format": FORMAT,
        "model": model.identity,
        "calibration": [load_prompts(name).texts for name in passages.BUNDLED],
        "seed": cell.seed if cell.weights == "random" else None,
        "size": [PASSAGES, PASSAGE_TOKENS],
        "versions": {package: importlib.metadata.version(package) for package in ("transformers", "torch")},
    }
    return machine.cache_folder() / "pruned" / f"{Path(model.name).name}-{cell.prune}-{hash16(made_of)}"


def is_made(cell: Cell, model: ModelFacts) -> bool:
    """Return True if the pruned checkpoint is on this disk."""
    return (folder_of(cell, model) / RECORD).exists()


def make(cell: Cell, model: ModelFacts, source: str, tokenizer: Callable[[], Any]) -> None:
    """Write the pruned checkpoint unless it exists. `source`: the folder of the model; `tokenizer` loads its tokenizer.

    The folder appears complete or not at all. Raises ModelError if the disk is too full, and MeasurementError if the
    model cannot be pruned.
    """
    if is_made(cell, model):
        return
    target = folder_of(cell, model)
    target.parent.mkdir(parents=True, exist_ok=True)
    _require_room(cell, model, target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pruned-") as scratch:
        try:
            _prune_into(Path(scratch), cell, source, None if cell.weights == "random" else _words(tokenizer))
        except LlmbenchError:
            raise
        except Exception as error:
            raise MeasurementError(
                f"prune={cell.prune} could not be made of {cell.model}: {type(error).__name__}: {first_line(error)}. "
                "Use another share, or prune=none."
            ) from error
        with contextlib.suppress(OSError):  # another process was first, with the same content
            os.rename(scratch, target)
            os.mkdir(scratch)  # so that its context manager can remove it


def _words(tokenizer: Callable[[], Any]) -> Any:
    try:
        return tokenizer()
    except ModelError:  # a checkpoint without a tokenizer runs on drawn ids, and is calibrated with such
        return None


def _require_room(cell: Cell, model: ModelFacts, folder: Path) -> None:
    shape = Shape.from_config(model.config or {})
    needed, free = shape.weight_bytes("none", stored_dtype(model)) if shape else 0, shutil.disk_usage(folder).free
    if free < needed * 1.05 + 1e8:
        raise ModelError(
            f"prune={cell.prune} of {cell.model} needs {needed / 1e9:.1f} GB in {folder}, but only {free / 1e9:.1f} GB "
            "are free. Free some space, or set LLMBENCH_CACHE to a folder on a larger disk."
        )


def _prune_into(folder: Path, cell: Cell, source: str, words: Any) -> None:
    import torch

    started = time.perf_counter()
    with complete(cell.model):
        model, _ = recipe.load_complete(source, local_files_only=True, dtype="auto")
    model.eval()
    vocabulary = int(model.config.vocab_size)
    texts = [load_prompts(name).texts for name in passages.BUNDLED]
    ids = passages.cut(texts, words, PASSAGES, PASSAGE_TOKENS) if words else []
    calibration = "+".join(passages.BUNDLED) if ids else "seeded ids"
    tokens = min(PASSAGE_TOKENS, int(getattr(model.config, "max_position_embeddings", PASSAGE_TOKENS)))
    ids = ids or passages.draw("prune", vocabulary, PASSAGES, tokens)
    before = sum(parameter.numel() for parameter in model.parameters())
    with torch.inference_mode():
        removed = prune(model, str(cell.prune), torch.tensor(ids)[:, :tokens])
    model.save_pretrained(folder, max_shard_size="4GB")
    for file in Path(source).iterdir():  # the tokenizer's
        if file.suffix in SMALL_FILES and not (folder / file.name).exists() and "index" not in file.name:
            shutil.copyfile(file, folder / file.name)
    record = {
        **removed,
        "prune.parameters_before": before,
        "prune.calibration": calibration,
        "prune.calibration_tokens": sum(len(row[:tokens]) for row in ids),
        "prune.make_s": round(time.perf_counter() - started, 1),
    }
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")


def prune(model: Any, text: str, ids: torch.Tensor) -> dict[str, str]:
    """Remove from a loaded model what a value of `prune` names, in place, and return facts on what was removed.

    `ids`: passages to calibrate with, (passages, tokens). The model must be one that `config.pruning.refusal` accepts.
    """
    config = model.config.to_dict()
    shape, asked, family = Shape.from_config(config), pruning.parse(text), pruning.FAMILIES[config["model_type"]]
    assert shape
    kept: list[int] | None = None
    if asked.part == LAYERS:
        kept = _cut_layers(model, family, asked, ids)
        gone = [number for number in range(shape.layers) if number not in kept]
        removed = {"prune.removed": f"{len(gone)} of {shape.layers} layers", "prune.layers": ",".join(map(str, gone))}
    elif asked.part == MLP:
        left = pruning.width_left(shape.intermediate_size, asked)
        _cut_width(model, family, left, ids)
        width = shape.intermediate_size
        removed = {"prune.removed": f"{width - left} of {width} channels of each MLP"}
    else:
        count, unit = pruning.head_units(shape)
        left = asked.kept(count)
        _cut_heads(model, family, shape, left, ids)
        removed = {"prune.removed": f"{count - left} of {count} {unit} of each layer"}
    for name, value in pruning.pruned_config(config, text, kept).items():
        if value != config.get(name):
            setattr(model.config, name, value)
    return removed | {"prune.criterion": CRITERIA[asked.part]}


# Criteria


def block_influence(model: Any, stack: Sequence[Any], ids: torch.Tensor) -> list[float]:
    """Return 1 − the mean cosine similarity of the hidden states before and after each layer, over all tokens."""
    import torch

    alike = [0.0] * len(stack)

    def watch(number: int) -> Callable[..., None]:
        def seen(_: Any, arguments: Any, named: Any, output: Any) -> None:
            before = (arguments[0] if arguments else named["hidden_states"]).float()
            after = (output[0] if isinstance(output, tuple) else output).float()
            alike[number] += float(torch.nn.functional.cosine_similarity(before, after, dim=-1).double().sum())

        return seen

    with contextlib.ExitStack() as hooks:
        for number, layer in enumerate(stack):
            hooks.callback(layer.register_forward_hook(watch(number), with_kwargs=True).remove)
        _run(model, ids)
    return [1 - total / ids.numel() for total in alike]


def channel_norms(model: Any, outs: Sequence[Any], ids: torch.Tensor) -> list[torch.Tensor]:
    """Return ‖W[:, j]‖₂ · ‖x_j‖₂ for each input j of each of these linear layers, over all tokens."""
    squares: list[Any] = [0.0] * len(outs)

    def watch(number: int) -> Callable[..., None]:
        def seen(_: Any, arguments: Any) -> None:
            values = arguments[0].reshape(-1, arguments[0].shape[-1]).double()
            squares[number] = squares[number] + values.pow(2).sum(0)

        return seen

    with _watching(outs, watch):
        _run(model, ids)
    return [squared.sqrt() * _matrix(layer).double().norm(dim=0) for squared, layer in zip(squares, outs, strict=True)]


def head_norms(model: Any, outs: Sequence[Any], units: int, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return ‖X_g · W_gᵀ‖_F for each of `units` equal parts g of the inputs of each linear layer, over all tokens."""
    import torch

    squares = [torch.zeros(units, dtype=torch.float64) for _ in outs]

    def watch(number: int) -> Callable[..., None]:
        def seen(layer: Any, arguments: Any) -> None:
            values = arguments[0].reshape(-1, arguments[0].shape[-1]).float().chunk(units, dim=-1)
            parts = _matrix(layer).float().chunk(units, dim=1)
            added = [(part @ weight.T).double().pow(2).sum() for part, weight in zip(values, parts, strict=True)]
            squares[number] += torch.stack(added)

        return seen

    with _watching(outs, watch):
        _run(model, ids)
    return [squared.sqrt() for squared in squares]


@contextlib.contextmanager
def _watching(layers: Sequence[Any], watch: Callable[[int], Callable[..., None]]) -> Iterator[None]:
    """Call `watch(number)` with each layer and its arguments before it computes."""
    with contextlib.ExitStack() as hooks:
        for number, layer in enumerate(layers):
            hooks.callback(layer.register_forward_pre_hook(watch(number)).remove)
        yield


def _run(model: Any, ids: torch.Tensor) -> None:
    for start in range(0, len(ids), ROWS):
        rows = ids[start : start + ROWS]
        model(input_ids=rows, use_cache=False)


def _matrix(layer: Any) -> torch.Tensor:
    """Return the weight of a linear layer as (outputs, inputs)."""
    weight: torch.Tensor = layer.weight.detach()
    return weight.T if recipe.is_conv1d(layer) else weight


# Cutting


def _require_finite(criterion: torch.Tensor) -> None:
    """Raise MeasurementError unless all values are numbers: others would order the parts at random."""
    if not bool(criterion.isfinite().all()):
        raise MeasurementError(
            "The model overflows on the calibration texts, so it is not known which parts to prune. "
            "Use a checkpoint in bf16 or fp32, or prune=none."
        )


def _cut_layers(model: Any, family: Family, asked: Pruning, ids: torch.Tensor) -> list[int]:
    """Remove the layers with the lowest block influence, and return the numbers of those that are left."""
    import torch

    stack = model.get_submodule(family.stack)
    influence = block_influence(model, stack, ids)
    _require_finite(torch.tensor(influence))
    ranked = sorted(range(len(stack)), key=lambda number: influence[number])
    kept = sorted(ranked[len(stack) - asked.kept(len(stack)) :])
    model.set_submodule(family.stack, torch.nn.ModuleList([stack[number] for number in kept]))
    return kept


def _cut_width(model: Any, family: Family, left: int, ids: torch.Tensor) -> None:
    outs = [layer.get_submodule(family.mlp_out) for layer in model.get_submodule(family.stack)]
    for layer, out, norms in zip(model.get_submodule(family.stack), outs, channel_norms(model, outs, ids), strict=True):
        _require_finite(norms)
        kept = norms.topk(left).indices.sort().values
        for name in family.mlp_in:
            _keep(layer.get_submodule(name), kept, outputs=True)
        _keep(out, kept, outputs=False)


def _cut_heads(model: Any, family: Family, shape: Shape, left: int, ids: torch.Tensor) -> None:
    """Remove whole KV groups with their heads; where all heads share one KV head, heads, and the KV head stays."""
    units, size = pruning.head_units(shape)[0], shape.head_dim
    each = shape.attention_heads // units * size  # inputs of the projection out that belong to one unit
    outs = [layer.get_submodule(family.heads_out) for layer in model.get_submodule(family.stack)]
    query, *keys_and_values = family.heads_in
    for layer, out, norms in zip(
        model.get_submodule(family.stack), outs, head_norms(model, outs, units, ids), strict=True
    ):
        _require_finite(norms)
        kept = norms.topk(left).indices.sort().values
        _keep(layer.get_submodule(query), _spread(kept, each), outputs=True)
        _keep(out, _spread(kept, each), outputs=False)
        for name in keys_and_values if shape.kv_heads > 1 else ():
            _keep(layer.get_submodule(name), _spread(kept, size), outputs=True)


def _spread(units: torch.Tensor, size: int) -> torch.Tensor:
    """Return the positions of the members of units that have `size` each."""
    import torch

    return (units[:, None] * size + torch.arange(size)).flatten()


def _keep(layer: Any, kept: torch.Tensor, outputs: bool) -> None:
    """Keep only some outputs, or some inputs, of a linear layer."""
    import torch

    across = int(not outputs) ^ int(recipe.is_conv1d(layer))
    layer.weight = torch.nn.Parameter(layer.weight.detach().index_select(across, kept), requires_grad=False)
    if outputs and layer.bias is not None:
        layer.bias = torch.nn.Parameter(layer.bias.detach().index_select(0, kept), requires_grad=False)
    names = ("nf", "nx") if recipe.is_conv1d(layer) else ("out_features", "in_features")
    setattr(layer, names[int(not outputs)], len(kept))


# The loaded model


def facts(cell: Cell, model: ModelFacts) -> dict[str, str | int | float]:
    """Return the facts that were recorded when the checkpoint of a cell was pruned; empty if it was not."""
    return reading.read_facts(folder_of(cell, model) / RECORD) if model.pruned and is_made(cell, model) else {}


def verify(cell: Cell, facts: ModelFacts, model: Any) -> dict[str, str | int | float]:
    """Return the sizes of a loaded pruned model, read from its layers, as facts; empty if it is not pruned.

    Raises NotRealised if they are not the planned ones.
    """
    if not facts.pruned or cell.tensor_parallel > 1:  # the layers of a rank have a part of their width
        return {}
    family, shape = pruning.FAMILIES[model.config.model_type], Shape.from_config(facts.config or {})
    assert shape
    stack = model.get_submodule(family.stack)
    wanted = {"layers": shape.layers}
    found: dict[str, set[int]] = {"layers": {len(stack)}}
    for what, name, size in (
        ("channels of each MLP", family.mlp_out, shape.intermediate_size),
        ("inputs from the heads", family.heads_out, shape.attention_heads * shape.head_dim),
    ):
        if name:
            wanted[what] = size
            found[what] = {(recipe.layer_sizes(layer.get_submodule(name)) or (0, 0))[0] for layer in stack}
    for what, size in wanted.items():
        if found[what] != {size}:
            raise NotRealised(
                f"prune={cell.prune} should leave {size} {what} of {cell.model}, but the loaded model has "
                f"{','.join(map(str, sorted(found[what])))}. Delete {folder_of(cell, facts)}, so that it is made again."
            )
    return {"prune.left": ", ".join(f"{size} {what}" for what, size in wanted.items())}
