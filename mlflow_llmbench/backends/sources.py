"""Where a model's files come from: a preset's random checkpoint, a folder, a GGUF file, or the Hub. No torch until they are needed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .. import models
from ..cell import Cell
from ..errors import ModelError, UsageError, first_line
from ..quantizations import GPTQ_BITS, MADE, MIXED
from ..records import ModelFacts
from . import gguf_file, gptq, mixed, synthetic
from .base import LOCAL_FILES

HUB_TIMEOUT_S = 12.0
"""Longest wait for the Hub before a run; an unreachable one must be known within 15 s."""

GGUF_SOURCES = ("gguf", "hub_gguf")
"""Sources of models that are a GGUF file."""

SAMPLES, BLOCK_BYTES = 128, 1 << 14

T = TypeVar("T")


def find_model(cell: Cell) -> ModelFacts:
    """Find the model of a cell and read its configuration, without its weights.

    Raises ModelError if it cannot be had and UsageError if the request contradicts what it is.
    """
    preset = models.find_preset(cell.model)
    if cell.weights == "random":
        return _random_model(cell, preset)
    path = Path(os.path.expanduser(cell.model))
    if cell.model.endswith(".gguf"):
        named = _hub_gguf_name(cell.model)
        return _hub_gguf(cell, *named) if named and not os.path.isfile(path) else _gguf_file(cell, path)
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        return _folder(cell, path)
    if preset is not None:
        return _hub_model(cell, preset.repository, "preset")
    if cell.model.startswith((".", "/", "~")) or cell.model.count("/") > 1:
        raise ModelError(
            f"There is no model folder {cell.model}. Give a folder with a config.json, a Hub id (owner/name) or a preset (`llmbench models`)."
        )
    if "/" in cell.model and not _is_hub_id(cell.model):
        raise ModelError(
            f"{cell.model} is neither a folder nor a Hub id, which is owner/name in letters, digits, dots, dashes. `llmbench models` lists the presets."
        )
    if "/" in cell.model:
        return _hub_model(cell, cell.model, "hub")
    near = models.suggest_models(cell.model)
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ModelError(f"Unknown model: {cell.model}. {meant}`llmbench models` lists the presets; a Hub id has the form owner/name.")


def assistant_of(cell: Cell) -> Cell:
    """The small model that proposes tokens for a cell, as a cell of its own: as it was published, of the main branch."""
    return dataclasses.replace(cell, model=cell.assistant or "", revision="main", quant="none", decode="generate", assistant=None)


def with_assistant(cell: Cell, model: ModelFacts) -> ModelFacts:
    """The model with the small one that proposes tokens for it, where there is one. Raises UsageError if their vocabularies differ."""
    if cell.decode != "assisted":
        return model
    small = find_model(assistant_of(cell))
    if small.source == "gguf":
        raise UsageError(f"assistant={cell.assistant} is a GGUF file, and transformers takes none to propose tokens. Give a folder or a Hub id.")
    sizes = [shape.vocab_size if (shape := models.Shape.from_config(one.config or {})) else None for one in (model, small)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise UsageError(
            f"assistant={cell.assistant} has a vocabulary of {sizes[1]} tokens, and {cell.model} one of {sizes[0]}: it cannot propose tokens for it. "
            "Give a smaller model of the same family."
        )
    return dataclasses.replace(model, assistant=small)


def _random_model(cell: Cell, preset: models.Preset | None) -> ModelFacts:
    if preset is None:
        near = models.suggest_models(cell.model)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(f"weights=random needs a preset, and {cell.model} is none.{meant} `llmbench models` lists them.")
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
        raise ModelError(f"There is no file {cell.model}. Give the path of a .gguf file, or OWNER/NAME:FILE.gguf for one of the Hub.")
    _refuse_made(cell, path.name)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{cell.model} is not a GGUF file: it does not begin with GGUF. Download it again.")
    parts = gguf_file.parts_of(path)
    if absent := next((part for part in parts if not part.is_file()), None):
        raise ModelError(f"{cell.model} is split, and its part {absent.name} is not beside it. Download all {len(parts)} parts.")
    return ModelFacts(cell.model, "gguf", str(path.resolve()), content_hash(parts), files_bytes=sum(part.stat().st_size for part in parts))


def _refuse_made(cell: Cell, name: str) -> None:
    """Raise UsageError if a GGUF file is to be quantized."""
    if cell.quant in MADE:
        raise UsageError(
            f"quant={cell.quant} cannot be made from {name}, which is quantized already. Use quant=none to run it as it is, or bf16 to unpack it."
        )


def _hub_gguf_name(name: str) -> tuple[str, str] | None:
    """Repository and file of `owner/name:file.gguf`; None where that is not its form."""
    repository, colon, file = name.partition(":")
    if not colon or not _is_hub_id(repository) or file.startswith("/") or ".." in file.split("/"):
        return None
    return repository, file


def _hub_gguf(cell: Cell, repository: str, file: str) -> ModelFacts:
    """A GGUF file of a Hub repository, at its resolved commit; from the local cache if the Hub does not answer."""
    from huggingface_hub import constants, errors, try_to_load_from_cache

    _check_revision(cell)
    _refuse_made(cell, file)
    location = f"{repository}:{file}"
    try:
        if constants.is_offline_mode():
            raise OSError("HF_HUB_OFFLINE is set")
        commit, sizes = _within(HUB_TIMEOUT_S, lambda: _ask_hub_files(repository, cell.revision))
    except errors.RevisionNotFoundError:
        raise _no_revision(cell, repository) from None
    except Exception as error:
        cached = try_to_load_from_cache(repository, file, revision=cell.revision)
        if isinstance(cached, str):
            snapshot = next(parent for parent in Path(cached).parents if parent.parent.name == "snapshots")
            return ModelFacts(cell.model, "hub_gguf", location, snapshot.name, files_bytes=os.path.getsize(cached))
        raise _not_had(error, repository, location, "Check the network, or give a local file.") from None
    parts = [(Path(file).parent / part.name).as_posix() for part in gguf_file.parts_of(Path(file))]
    absent = [part for part in parts if part not in sizes]
    if absent:
        files = ", ".join(sorted(name for name in sizes if name.endswith(".gguf"))[:8]) or "none"
        raise ModelError(f"The repository {repository} has no file {absent[0]}. Its GGUF files: {files}.")
    return ModelFacts(cell.model, "hub_gguf", location, commit, files_bytes=sum(sizes[part] for part in parts) or None)


@functools.cache
def _ask_hub_files(repository: str, revision: str) -> tuple[str, Mapping[str, int]]:
    """Commit of a repository, and its files with their bytes; asked once, so that all cells of a sweep have one commit."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT_S / 2, files_metadata=True)
    return str(info.sha), {s.rfilename: s.size or 0 for s in info.siblings or []}


def gguf_path(model: ModelFacts) -> Path | None:
    """The first file of a GGUF model on this disk; None where not all its parts are there."""
    if model.source == "gguf":
        return Path(model.location)
    from huggingface_hub import try_to_load_from_cache

    repository, names = _gguf_names(model)
    found = [try_to_load_from_cache(repository, name, revision=model.revision) for name in names]
    return Path(str(found[0])) if all(isinstance(path, str) for path in found) else None


def _gguf_names(model: ModelFacts) -> tuple[str, list[str]]:
    """The repository of a GGUF model, and the names of all its parts in it."""
    repository, _, file = model.location.partition(":")
    return repository, [part.as_posix() for part in gguf_file.parts_of(Path(file))]


def _download_gguf(cell: Cell, model: ModelFacts) -> None:
    """Download all parts at exactly the resolved commit, and note in the cache which commit the revision is, as a download by its name would."""
    from huggingface_hub import hf_hub_download

    repository, names = _gguf_names(model)
    try:
        first, *_ = (Path(hf_hub_download(repository, name, revision=model.revision)) for name in names)
    except Exception as error:
        raise ModelError(
            f"The download of {model.location} failed: {first_line(error)}. Run the same command again: what is complete is kept."
        ) from None
    root = next(parent.parent for parent in first.parents if parent.name == "snapshots")
    if cell.revision != model.revision:
        note = root / "refs" / cell.revision
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(model.revision, encoding="utf-8")


def _folder(cell: Cell, path: Path) -> ModelFacts:
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelError(f"The folder {cell.model} has no config.json, so it is no model. Give a folder that save_pretrained wrote, or a .gguf file.")
    weights = [path / name for name in sorted(_weight_names(file.name for file in path.iterdir()))]
    if not weights:
        raise ModelError(f"The folder {cell.model} has no weights (*.safetensors). Download them, or check the path.")
    _refuse_pickle(cell, "folder", [file.name for file in weights])
    size = sum(file.stat().st_size for file in weights)
    return _with_config(cell, "folder", str(path.resolve()), content_hash([config_file, *weights]), config_file, size)


def content_hash(files: Sequence[Path]) -> str:
    """16 hex digits for the content of local files: their names, sizes, beginnings, and `SAMPLES` evenly spaced blocks of each.

    Every byte of tens of gigabytes would take a minute; two checkpoints of one architecture differ in nearly every block.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(1 << 20))
            for number in range(SAMPLES):
                opened.seek(size * number // SAMPLES)
                digest.update(opened.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


def _check_revision(cell: Cell) -> None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", cell.revision, re.ASCII) or ".." in cell.revision:
        raise UsageError(f"revision is not the name of a branch, tag or commit: {cell.revision}. Use revision=main, or one of that repository.")


def _no_revision(cell: Cell, repository: str) -> ModelError:
    return ModelError(f"The model {repository} has no revision {cell.revision}. Use revision=main, or a commit or tag of that repository.")


def _not_had(error: Exception, repository: str, location: str, hint: str, without: str = "") -> ModelError:
    """Why the Hub did not give what lies at `location`; `hint`: what to do if it does not answer, `without`: if its terms are not accepted."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"The model {repository} is gated. Accept its terms at https://huggingface.co/{repository}, then run `hf auth login`{without}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(f"There is no model {repository} on the Hub, or it is private. Check the name, or run `hf auth login`.")
    return ModelError(f"The Hub cannot be reached for {location}, and it is not in the local cache: {first_line(error)}. {hint}")


def _hub_model(cell: Cell, repository: str, source: str) -> ModelFacts:
    """Commit and configuration of a Hub model; from the local cache if the Hub does not answer."""
    from huggingface_hub import constants, errors

    _check_revision(cell)
    hint = "Check the network, give a local folder, or measure speed and memory without the weights: -P weights=random"
    hint += "." if source == "preset" else " (presets only)."
    cached = _cached(repository, cell.revision)
    try:
        if constants.is_offline_mode():
            raise OSError("HF_HUB_OFFLINE is set")
        commit, config_file, sizes = _within(HUB_TIMEOUT_S, lambda: _ask_hub(repository, cell.revision))
    except errors.RevisionNotFoundError:
        raise _no_revision(cell, repository) from None
    except Exception as error:  # connection errors come in many classes, from httpx and from the system
        if cached is not None:
            _refuse_pickle(cell, source, _weight_names(file.name for file in cached.iterdir()))
            return _with_config(cell, source, repository, cached.name, cached / "config.json", None)
        if isinstance(error, errors.EntryNotFoundError):
            message = f"The repository {repository} has no config.json, so it is no transformers model. For a GGUF repository download the .gguf file and give its path."
            raise ModelError(message) from None
        without = "; or measure speed and memory without the weights: -P weights=random"
        raise _not_had(error, repository, repository, hint, without) from None
    _refuse_pickle(cell, source, sizes)
    return _with_config(cell, source, repository, commit, Path(config_file), sum(sizes.values()) or None)


@functools.cache
def _ask_hub(repository: str, revision: str) -> tuple[str, str, Mapping[str, int]]:
    """Commit, path of config.json, and the files of the weights with their bytes; asked once, so that all cells of a sweep have one commit."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT_S / 2, files_metadata=True)
    # By the name of the revision, so that the cache learns which commit it is; the folder is named by the commit.
    config = hf_hub_download(repository, "config.json", revision=revision, etag_timeout=HUB_TIMEOUT_S / 2)
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
    return Path(config).parent.name, config, {name: sizes[name] for name in _weight_names(sizes)}


def may_be_pickled(cell: Cell, source: str) -> bool:
    """Whether weights that are a pickle may be read: where they were asked for, and of the repositories of our own presets.

    torch reads them without running code in them; the fewer are read, the less depends on that. A pull request can hold
    anything and is a revision too, so that a preset is trusted at `main` only. (OPT has nothing but pickles there.)
    """
    return cell.allow_pickle or (source == "preset" and cell.revision == "main")


def _refuse_pickle(cell: Cell, source: str, names: Iterable[str]) -> None:
    """Raise ModelError if the weight files are pickles that nobody asked for."""
    pickles = sorted(name for name in names if not name.endswith(".safetensors"))
    if pickles and not may_be_pickled(cell, source):
        raise ModelError(
            f"The weights of {cell.model} are a pickle ({pickles[0]}), which can carry code, and are not read unless you say so. "
            "Prefer a model with *.safetensors; or trust its origin and give allow_pickle=true."
        )


def _is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, owner/name, by the Hub's own rules (`huggingface_hub.utils.validate_repo_id`)."""
    return len(name) <= 96 and re.fullmatch(r"(?!.*(?:--|\.\.))\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?", name, re.ASCII) is not None


def _with_config(cell: Cell, source: str, location: str, revision: str, config_file: Path, files_bytes: int | None) -> ModelFacts:
    try:
        config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise ModelError(f"The configuration of {cell.model} cannot be read: {error}. Download the model again.") from None
    if not cell.trust_remote_code and (code := _code_in(config)):
        raise ModelError(
            f"The model {cell.model} brings code of its own ({code}), which is not run unless you say so. Read it, then give trust_remote_code=true."
        )
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method and cell.quant != "none":
        raise UsageError(
            f"quant={cell.quant} cannot be made from {cell.model}, which is quantized already ({method}). Use quant=none to run it as it is."
        )
    text = config.get("text_config") or config
    shape = models.Shape.from_config(config)
    dtype = text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype")
    name = cell.model if source != "folder" else Path(location).name
    return ModelFacts(name, source, location, revision, config, dtype, shape.context if shape else None, files_bytes)


def _code_in(config: Mapping[str, Any]) -> str | None:
    """What a configuration wants to be run that transformers does not have itself; None if there is nothing.

    Classes for an architecture of its own, and attention kernels by their address on the Hub, which older versions of transformers
    fetch and run unasked (CVE-2026-4372).
    """
    if config.get("auto_map") and not _is_native(str(config.get("model_type"))):
        return "auto_map"
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    kernels = (f"{key}: {value}" for part in parts for key, value in part.items() if "_implementation" in key and "/" in json.dumps(value))
    return next(kernels, None)


def _is_native(model_type: str) -> bool:
    """Whether transformers has this architecture itself, so that code which comes with a checkpoint is not needed."""
    from transformers.models.auto import configuration_auto

    names: Sequence[str] = list(getattr(configuration_auto, "CONFIG_MAPPING_NAMES", ()))
    return model_type in names


def _weight_names(names: Iterable[str]) -> set[str]:
    """The files that hold the weights: safetensors, or where there are none the pickled ones, which torch reads without running code."""
    top = {name for name in names if "/" not in name and not name.startswith("consolidated")}  # the same weights again, in another format
    return {n for n in top if n.endswith(".safetensors")} or {n for n in top if n.startswith("pytorch_model") and n.endswith(".bin")}


def _cached(repository: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    return folder if _is_complete(folder) else None


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """The result of `ask`, or TimeoutError after `seconds`; a name lookup has no time limit of its own."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(ask())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return outcome[0]


def fetch(cell: Cell, model: ModelFacts) -> None:
    """Put the files on this disk: write the random checkpoint, or download the weights of exactly the resolved commit; then quantize them if asked."""
    if cell.weights == "random":
        preset = models.find_preset(cell.model)
        if preset is None:
            raise ModelError(f"weights=random needs a preset, and {cell.model} is none. `llmbench models` lists them.")
        synthetic.write_checkpoint(preset, cell.seed)
    elif model.source == "hub_gguf":
        _download_gguf(cell, model)
    elif model.source in ("hub", "preset") and not _is_complete(_snapshot(model)):
        _download(model)
    if cell.quant in GPTQ_BITS:
        gptq.quantize(cell, model, base_files(cell, model)[0], None if cell.workload == "synthetic" else _tokenizer(cell, *base_files(cell, model)))
    if cell.quant == MIXED and not mixed.is_prepared(cell, model):
        mixed.prepare(cell, model, base_files(cell, model)[0], None if cell.weights == "random" else load_tokenizer(cell, model))


def is_here(cell: Cell, model: ModelFacts) -> bool:
    """Whether `fetch` would find the model's files on this disk, before a quantization of them."""
    if cell.weights == "random":
        preset = models.find_preset(cell.model)
        return preset is not None and synthetic.is_written(preset, cell.seed)
    if model.source == "hub_gguf":
        return gguf_path(model) is not None
    try:
        return model.source in LOCAL_FILES or _is_complete(_snapshot(model))
    except OSError:  # another machine has it, where the model was found
        return False


def _snapshot(model: ModelFacts) -> Path:
    """The cache's folder of exactly this commit; it has a configuration at least, since the model was found."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model.location, revision=model.revision, local_files_only=True))


def _is_complete(folder: Path) -> bool:
    """Whether a model folder has all its weights: every shard of one of its indices, or a single file."""
    indices = [json.loads(index.read_text(encoding="utf-8"))["weight_map"] for index in folder.glob("*.index.json")]
    if indices:
        return any(all((folder / shard).exists() for shard in set(shards.values())) for shards in indices)
    return (folder / "model.safetensors").exists() or (folder / "pytorch_model.bin").exists()


def _download(model: ModelFacts) -> None:
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = HfApi().list_repo_files(model.location, revision=model.revision)
        other = [n for n in names if "/" not in n and n.endswith((".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"))]
        snapshot_download(model.location, revision=model.revision, allow_patterns=[*_weight_names(names), *other])
    except Exception as error:
        raise ModelError(
            f"The download of {model.location} failed: {first_line(error)}. Run the same command again: what is complete is kept."
        ) from None


def local_files(cell: Cell, model: ModelFacts) -> tuple[str, str | None]:
    """The folder that holds the prepared files, and the name of the GGUF file in it if it is one."""
    return (str(gptq.folder_of(cell, model)), None) if cell.quant in GPTQ_BITS else base_files(cell, model)


def base_files(cell: Cell, model: ModelFacts) -> tuple[str, str | None]:
    """The same of the checkpoint itself, before it is quantized."""
    if cell.weights == "random":
        preset = models.find_preset(cell.model)
        assert preset is not None  # find_model saw to it
        return str(synthetic.checkpoint_folder(preset, cell.seed)), None
    if model.source in GGUF_SOURCES:
        found = gguf_path(model)
        if found is None:
            raise ModelError(f"{model.location} is not on this disk. Run the command again with a network.")
        return os.path.split(found)
    if model.source == "folder":
        return model.location, None
    return str(_snapshot(model)), None


def weights_format(folder: str) -> str:
    """`safetensors` or `pickle`: what the weights of a folder are read from."""
    return "safetensors" if any(Path(folder).glob("*.safetensors")) else "pickle"


def load_tokenizer(cell: Cell, model: ModelFacts) -> Any:
    """The model's own tokenizer. Raises ModelError if the files hold none that can be read."""
    return _tokenizer(cell, *base_files(cell, model))


def _tokenizer(cell: Cell, folder: str, gguf_file: str | None) -> Any:
    from transformers import AutoTokenizer

    keywords: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=cell.trust_remote_code, **keywords)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"The tokenizer of {cell.model} brings code of its own, which is not run unless you say so. Use workload=synthetic; or read it, "
                "then give trust_remote_code=true."
            ) from None
        raise ModelError(
            f"The tokenizer of {cell.model} cannot be loaded: {first_line(error)}. Use workload=synthetic, or complete the model's files."
        ) from None
