"""Find and fetch a model's files: a preset's random checkpoint, a folder, a GGUF file, or the Hub.

torch is not imported before the files are needed.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from ...config import model_shape, models
from ...records import reading
from ...records.cell import DRAWN, Cell
from ...records.errors import ModelError, UsageError, first_line
from ...records.invocation import command_text
from ...records.reading import Unreadable
from ...records.results import ModelFacts
from ..base import LOCAL_FILES
from ..huggingface import pruning
from ..huggingface.quantization import checkpoint_maker_of, maker_of
from . import architectures, files, gguf_file, hub, random_weights

GGUF_SOURCES = ("gguf", "hub_gguf")
"""Values of `ModelFacts.source` for GGUF files."""


def find_model(cell: Cell) -> ModelFacts:
    """Find the model of a cell and read its configuration, without its weights. Of a pruned one, it has the sizes left.

    Raises ModelError if it cannot be found or used, and UsageError if the request contradicts the model.
    """
    return pruning.planned(cell, _find(cell))


def _find(cell: Cell) -> ModelFacts:
    preset = models.find_preset(cell.model)
    if cell.weights == "random":
        return _random_model(cell, preset)
    path = Path(os.path.expanduser(cell.model))
    if cell.model.endswith(".gguf"):
        named = hub.gguf_name(cell.model)
        return hub.find_gguf(cell, *named) if named and not os.path.isfile(path) else _gguf_file(cell, path)
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        return _folder(cell, path)
    if preset is not None:
        return hub.find_checkpoint(cell, preset.repository, "preset")
    if cell.model.startswith((".", "/", "~")) or cell.model.count("/") > 1:
        raise ModelError(
            f"There is no model folder {cell.model}. Give a folder with a config.json, a Hub id (owner/name) or a "
            f"preset (`{command_text('models')}`)."
        )
    if "/" in cell.model and not hub.is_hub_id(cell.model):
        raise ModelError(
            f"{cell.model} is neither a folder nor a Hub id, which is owner/name in letters, digits, dots, dashes. "
            f"`{command_text('models')}` lists the presets."
        )
    if "/" in cell.model:
        return hub.find_checkpoint(cell, cell.model, "hub")
    near = models.suggest_models(cell.model)
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ModelError(
        f"Unknown model: {cell.model}. {meant}`{command_text('models')}` lists the presets; "
        "a Hub id has the form owner/name."
    )


def assistant_of(cell: Cell) -> Cell:
    """Return the cell of the assistant model that proposes tokens: unquantized, at its main branch."""
    return dataclasses.replace(
        cell,
        model=cell.assistant or "",
        revision="main",
        quant="none",
        prune=None,
        decode="generate",
        assistant=None,
        workload=DRAWN[0],  # it is given ids, so it needs no tokenizer
    )


def with_assistant(cell: Cell, model: ModelFacts) -> ModelFacts:
    """Add the assistant model's facts to the model's, for assisted decoding.

    Raises UsageError if the assistant is a GGUF file or their vocabularies differ in size, else as `find_model`.
    """
    if cell.decode != "assisted":
        return model
    small = find_model(assistant_of(cell))
    if small.source == "gguf":
        raise UsageError(
            f"assistant={cell.assistant} is a GGUF file, which transformers does not accept as an assistant. Give a "
            "folder or a Hub id."
        )
    sizes = [
        shape.vocab_size if (shape := model_shape.Shape.from_config(one.config or {})) else None
        for one in (model, small)
    ]
    if None not in sizes and sizes[0] != sizes[1]:
        raise UsageError(
            f"assistant={cell.assistant} has a vocabulary of {sizes[1]} tokens, but {cell.model} has {sizes[0]}, so it "
            "cannot propose tokens. Give a smaller model of the same family."
        )
    return dataclasses.replace(model, assistant=small)


def _random_model(cell: Cell, preset: models.Preset | None) -> ModelFacts:
    if preset is None:
        near = models.suggest_models(cell.model)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(
            f"weights=random needs a preset, and {cell.model} is not one.{meant} `{command_text('models')}` lists them."
        )
    return ModelFacts(
        name=preset.name,
        source="preset",
        location=preset.repository,
        revision=f"random-seed{cell.seed}",
        config=dict(preset.config),
        dtype=preset.dtype,
        context=preset.context,
        files_bytes=preset.parameters * {"float32": 4}.get(preset.dtype, 2),
    )


def _gguf_file(cell: Cell, path: Path) -> ModelFacts:
    if not os.path.isfile(path):
        raise ModelError(
            f"There is no file {cell.model}. Give the path of a .gguf file, or OWNER/NAME:FILE.gguf for one on the Hub."
        )
    files.refuse_requantization(cell, path.name)
    parts = gguf_file.parts_of(path)
    try:
        for part in filter(Path.is_file, parts):
            reading.require_file(part, files.MOST_WEIGHT_BYTES)
        with reading.open_file(path) as file:
            if file.read(4) != b"GGUF":
                raise Unreadable("it does not begin with GGUF")
    except Unreadable as error:
        advice = "" if error.advises else " Download it again."
        raise ModelError(f"{cell.model} is not a GGUF file: {error}.{advice}") from None
    if absent := next((part for part in parts if not part.is_file()), None):
        raise ModelError(
            f"{cell.model} is split, but its part {absent.name} is not beside it. Download all {len(parts)} parts."
        )
    if why := architectures.no_generator_in_gguf(gguf_file.read_header(path).architecture):
        raise files.no_text(cell, why)
    return ModelFacts(
        cell.model,
        "gguf",
        str(path.resolve()),
        files.content_hash(parts),
        files_bytes=sum(part.stat().st_size for part in parts),
    )


def _folder(cell: Cell, path: Path) -> ModelFacts:
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelError(
            f"The folder {cell.model} has no config.json, so it is not a model. Give a folder that save_pretrained "
            "wrote, or a .gguf file."
        )
    weights = [path / name for name in sorted(files.weight_names(file.name for file in path.iterdir()))]
    if not weights:
        raise ModelError(f"The folder {cell.model} has no weights (*.safetensors). Download them, or check the path.")
    files.refuse_pickle(cell, "folder", [file.name for file in weights])
    files.require_whole(cell.model, path)
    if cell.workload not in DRAWN:
        files.require_tokenizer(cell, path)
    size = sum(file.stat().st_size for file in weights)
    return files.read_facts(
        cell, "folder", str(path.resolve()), files.content_hash([config_file, *weights]), config_file, size
    )


def fetch(cell: Cell, model: ModelFacts) -> None:
    """Put the files on this disk and quantize them if the cell says so.

    Random weights are written, others are downloaded at exactly the resolved commit. Raises ModelError.
    """
    if cell.weights == "random":
        preset = models.find_preset(cell.model)
        if preset is None:
            raise ModelError(
                f"weights=random needs a preset, and {cell.model} is not one. `{command_text('models')}` lists them."
            )
        random_weights.write_checkpoint(preset, cell.seed)
    elif model.source == "hub_gguf":
        hub.download_gguf(cell, model)
    elif model.source in ("hub", "preset") and not files.is_complete(hub.snapshot(model)):
        hub.download(model)
    if model.pruned:
        own = original_files(cell, model)
        pruning.make(cell, model, own[0], lambda: _tokenizer(cell, *own))
    if maker := maker_of(cell):
        maker.make(cell, model, base_files(cell, model)[0], lambda: load_tokenizer(cell, model))


def is_local(cell: Cell, model: ModelFacts) -> bool:
    """Return True if the model's files, before any quantization, are on this disk."""
    if model.pruned:
        return pruning.is_made(cell, model)
    if cell.weights == "random":
        preset = models.find_preset(cell.model)
        return preset is not None and random_weights.is_written(preset, cell.seed)
    if model.source == "hub_gguf":
        return gguf_path(model) is not None
    try:
        return model.source in LOCAL_FILES or files.is_complete(hub.snapshot(model))
    except OSError:  # the model was resolved on another machine
        return False


def gguf_path(model: ModelFacts) -> Path | None:
    """Return the first file of a GGUF model on this disk; None if a part is missing."""
    return Path(model.location) if model.source == "gguf" else hub.cached_gguf(model)


def local_files(cell: Cell, model: ModelFacts) -> tuple[str, str | None]:
    """Return the folder of the prepared files, and the name of the GGUF file in it, if it is one."""
    maker = checkpoint_maker_of(cell)
    return (str(maker.folder_of(cell, model)), None) if maker else base_files(cell, model)


def base_files(cell: Cell, model: ModelFacts) -> tuple[str, str | None]:
    """Return the same as `local_files` for the checkpoint before it is quantized, but pruned. Raises ModelError."""
    return (str(pruning.folder_of(cell, model)), None) if model.pruned else original_files(cell, model)


def original_files(cell: Cell, model: ModelFacts) -> tuple[str, str | None]:
    """Return the same as `local_files` for the model's own files. Raises ModelError."""
    if cell.weights == "random":
        preset = models.find_preset(cell.model)
        assert preset is not None  # find_model checked it
        return str(random_weights.checkpoint_folder(preset, cell.seed)), None
    if model.source in GGUF_SOURCES:
        found = gguf_path(model)
        if found is None:
            raise ModelError(f"{model.location} is not on this disk. Run the command again with a network.")
        return os.path.split(found)
    if model.source == "folder":
        return model.location, None
    return str(hub.snapshot(model)), None


def load_tokenizer(cell: Cell, model: ModelFacts) -> Any:
    """Load the model's own tokenizer. Raises ModelError if the files hold none that can be read."""
    return _tokenizer(cell, *base_files(cell, model))


def _tokenizer(cell: Cell, folder: str, gguf_file: str | None) -> Any:
    from transformers import AutoTokenizer

    keywords: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        found = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=cell.trust_remote_code, **keywords
        )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"The tokenizer of {cell.model} brings code of its own, which is not run unless you say so. "
                "Use workload=synthetic; or read the code, then give trust_remote_code=true."
            ) from None
        raise ModelError(
            f"The tokenizer of {cell.model} cannot be loaded: {first_line(error)}. Use workload=synthetic, or complete "
            "the model's files."
        ) from None
    if len(found) <= len(found.all_special_tokens):  # of some types, transformers makes an empty one without files
        raise files.no_tokenizer(cell)
    return found
