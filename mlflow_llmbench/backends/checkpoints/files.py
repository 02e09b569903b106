"""Read facts from the files of a checkpoint before it is loaded, and refuse code, pickles and a second quantization."""

from __future__ import annotations

import codecs
import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...config import model_shape
from ...records import reading
from ...records.cell import Cell
from ...records.errors import ModelError, UsageError
from ...records.quantizations import SCHEMES
from ...records.reading import Advised, Unreadable
from ...records.results import ModelFacts
from . import architectures

SAMPLES, BLOCK_BYTES = 128, 1 << 14
MOST_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
MOST_WEIGHT_BYTES, MOST_CONFIG_BYTES = 1 << 50, 20_000_000
SMALL_FILES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
BY_TOKENIZERS = ("tokenizer.json", "vocab.json")
TOKENIZER_NAMES = ("token", "vocab", "merges", "spiece", "sentencepiece", "bpe", ".model", ".tiktoken")
"""Parts of the names of files that tokenizers consist of."""

ADVICE = "Download the model again"


def read_facts(
    cell: Cell, source: str, location: str, revision: str, config_file: Path, files_bytes: int | None
) -> ModelFacts:
    """Read the facts of a checkpoint from its configuration.

    Raises ModelError if it cannot be read, needs its own code, or is of a model that does not generate text, and
    UsageError if it would be quantized a second time.
    """
    config = _read_config(cell, config_file)
    _require_readable(cell, config_file.parent)
    if not cell.trust_remote_code and (code := _code_in(config)):
        raise ModelError(
            f"The model {cell.model} brings code of its own ({code}), which is not run unless you say so. Read it, "
            "then give trust_remote_code=true."
        )
    if why := architectures.no_generator(config):
        raise no_text(cell, why)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method and cell.quant != "none":
        raise UsageError(
            f"quant={cell.quant} cannot be made from {cell.model}, which is quantized already ({method}). Use "
            "quant=none to run it as it is."
        )
    text = config.get("text_config") or config
    shape = model_shape.Shape.from_config(config)
    dtype = text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype")
    name = cell.model if source != "folder" else Path(location).name
    dtype = dtype if isinstance(dtype, str) else None
    return ModelFacts(name, source, location, revision, config, dtype, shape.context if shape else None, files_bytes)


def _read_config(cell: Cell, file: Path) -> dict[str, Any]:
    """Return the configuration of a checkpoint. Raises ModelError if it cannot be one."""
    try:
        config = _json(file, MOST_CONFIG_BYTES)
        if not isinstance(config, dict):
            raise Unreadable("it is not a JSON object")
        if wrong := model_shape.wrong_type(config):
            raise Unreadable(wrong)
    except Unreadable as error:
        raise _unreadable(f"The configuration of {cell.model}", error) from None
    return config


def _require_readable(cell: Cell, folder: Path) -> None:
    """Raise ModelError if transformers would wait for one of a checkpoint's small files, or run out of memory by it.

    Tokenizer and vocabulary are read by a library that has limits of its own.
    """
    for file in sorted(path for path in folder.iterdir() if path.suffix in SMALL_FILES):
        try:
            reading.require_file(file)
            if file.suffix == ".json" and file.name not in BY_TOKENIZERS:
                _json(file, surrogates=True)
        except Unreadable as error:
            raise _unreadable(f"The file {file.name} of {cell.model}", error) from None


def _json(file: Path, most: int = reading.MOST_BYTES, surrogates: bool = False) -> Any:
    """Return the value in a JSON file that transformers will read too. Raises Unreadable."""
    content = reading.read_bytes(file, most)
    if content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Advised(
            "it begins with a byte order mark, which transformers does not read: save it as UTF-8 without one"
        )
    return reading.parse_json(content, surrogates)


def _unreadable(what: str, error: Unreadable) -> ModelError:
    """Return the error for a file of a model that cannot be read, with what to do."""
    return ModelError(f"{what} cannot be read: {error}." + ("" if error.advises else f" {ADVICE}."))


def no_text(cell: Cell, why: str) -> ModelError:
    """Return the error for a model that does not generate text; `why` says what it does."""
    return ModelError(
        f"{cell.model} does not generate text token by token: {why}. Use a causal language model (GPT-2, Llama, …)."
    )


def no_tokenizer(cell: Cell) -> ModelError:
    """Return the error for a model without a tokenizer that is asked for texts."""
    return ModelError(
        f"{cell.model} has no tokenizer, which texts need. Add its files (tokenizer.json), or measure without texts: "
        "workload=synthetic, quality=none, and not quant=mixed."
    )


def require_tokenizer(cell: Cell, folder: Path) -> None:
    """Raise ModelError if no file of a folder can be one of a tokenizer, judged by the names."""
    names = [path.name.lower() for path in folder.iterdir()]
    if not any(part in name for name in names for part in TOKENIZER_NAMES):
        raise no_tokenizer(cell)


def refuse_requantization(cell: Cell, name: str) -> None:
    """Raise UsageError if the cell would quantize a GGUF file."""
    if SCHEMES[cell.quant].library:
        raise UsageError(
            f"quant={cell.quant} cannot be made from {name}, which is quantized already. Use quant=none to run it as "
            "it is, or bf16 to unpack it."
        )


def may_be_pickled(cell: Cell, source: str) -> bool:
    """Return True if pickled weights may be read: with `allow_pickle`, or from a preset's repository at `main`.

    torch reads them without running their code; the fewer are read, the less depends on that. A pull request is a
    revision too and can hold anything, so a preset is trusted at `main` only. (OPT has nothing but pickles there.)
    """
    return cell.allow_pickle or (source == "preset" and cell.revision == "main")


def refuse_pickle(cell: Cell, source: str, names: Iterable[str]) -> None:
    """Raise ModelError if the weight files are pickles that may not be read."""
    pickles = sorted(name for name in names if not name.endswith(".safetensors"))
    if pickles and not may_be_pickled(cell, source):
        raise ModelError(
            f"The weights of {cell.model} are a pickle ({pickles[0]}), which can carry code, and are not read "
            "unless you say so. Prefer a model with *.safetensors; or trust its origin and give allow_pickle=true."
        )


def weight_names(names: Iterable[str]) -> set[str]:
    """Return the files that hold the weights: safetensors, else the pickles, which torch reads without running code."""
    # `consolidated` files are the same weights again, in another format.
    top = {name for name in names if "/" not in name and not name.startswith("consolidated")}
    return {n for n in top if n.endswith(".safetensors")} or {
        n for n in top if n.startswith("pytorch_model") and n.endswith(".bin")
    }


def is_complete(folder: Path) -> bool:
    """Return True if a model folder has all its weights: every shard of one of its indices, or a single file."""
    indices = [_shards(index) for index in folder.glob("*.index.json")]
    if indices:
        return any(all((folder / shard).exists() for shard in shards) for shards in indices)
    return (folder / "model.safetensors").exists() or (folder / "pytorch_model.bin").exists()


def require_whole(name: str, folder: Path) -> None:
    """Raise ModelError if a weight file of a model's folder is missing or cut off. Only their headers are read."""
    for index in sorted(folder.glob("*.index.json")):
        try:
            shards = _shards(index)
        except Unreadable as error:
            raise _unreadable(f"The index {index.name} of {name}", error) from None
        absent = sorted(shard for shard in shards if not (folder / shard).is_file())
        if absent and not is_complete(folder):
            raise ModelError(
                f"The model {name} lacks {len(absent)} of its {len(shards)} weight files: {', '.join(absent[:3])}. "
                f"{ADVICE}, or copy them."
            )
    for file in sorted(folder / one for one in weight_names(path.name for path in folder.iterdir())):
        try:
            size, needed = file.stat().st_size, _bytes_needed(file)
        except (OSError, Unreadable) as error:
            why = error if isinstance(error, Unreadable) else Unreadable(error.strerror)
            raise _unreadable(f"The weight file {file.name} of {name}", why) from None
        if needed is None:
            raise ModelError(f"The weight file {file.name} of {name} cannot be read: its header is damaged. {ADVICE}.")
        if size < needed:
            raise ModelError(
                f"The weight file {file.name} of {name} is cut off: it has {size:,} bytes, and its tensors end at "
                f"{needed:,}. {ADVICE}."
            )
        if size > needed and file.suffix == ".safetensors":
            raise ModelError(
                f"The weight file {file.name} of {name} is damaged: it has {size:,} bytes, and its tensors end at "
                f"{needed:,}. {ADVICE}."
            )


def _shards(index: Path) -> set[str]:
    """Return the weight files that an index names. Raises Unreadable."""
    data = reading.read_json(index)
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not all(
        isinstance(shard, str) and "\0" not in shard for shard in shards.values()
    ):
        raise Unreadable("it has no weight_map from tensors to files")
    return set(shards.values())


def _bytes_needed(file: Path) -> int | None:
    """Return the bytes that a weight file needs by its header, None if that cannot be read.

    A safetensors file begins with the length of its header (8 bytes, little endian), which has each tensor's place. A
    pickle of today is a zip archive, whose directory is at its end. Raises Unreadable.
    """
    reading.require_file(file, most=MOST_WEIGHT_BYTES)
    with reading.open_file(file) as opened:
        if file.suffix != ".safetensors":
            return None if opened.read(2) == b"PK" and not zipfile.is_zipfile(file) else 0
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= MOST_HEADER_BYTES:
            return None
        text = opened.read(length)
    if len(text) < length:
        return 8 + length
    try:
        header = reading.parse_json(text, surrogates=True)
        return 8 + length + max((one["data_offsets"][1] for k, one in header.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def weights_format(folder: str) -> str:
    """Return the format that the weights of a folder are read from: `safetensors` or `pickle`."""
    return "safetensors" if any(Path(folder).glob("*.safetensors")) else "pickle"


def content_hash(files: Sequence[Path]) -> str:
    """Return 16 hex digits of SHA-256 over the names, sizes, first MiB and `SAMPLES` evenly spaced blocks of the files.

    Reading every byte of tens of gigabytes would take a minute; two checkpoints of one architecture differ in nearly
    every block.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with reading.open_file(file) as opened:
            digest.update(opened.read(1 << 20))
            for number in range(SAMPLES):
                opened.seek(size * number // SAMPLES)
                digest.update(opened.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


def _code_in(config: Mapping[str, Any]) -> str | None:
    """Return the key by which a configuration would run code from outside transformers; None if there is none.

    Such code is classes for the model's own architecture, and attention kernels named by their address on the Hub,
    which older versions of transformers fetch and run without consent (CVE-2026-4372).
    """
    if config.get("auto_map") and not _is_native(str(config.get("model_type"))):
        return "auto_map"
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    kernels = (
        f"{key}: {value}"
        for part in parts
        for key, value in part.items()
        if "_implementation" in key and "/" in json.dumps(value)
    )
    return next(kernels, None)


def _is_native(model_type: str) -> bool:
    """Return True if transformers has this architecture itself, so that a checkpoint's own code is not needed."""
    from transformers.models.auto import configuration_auto

    names: Sequence[str] = list(getattr(configuration_auto, "CONFIG_MAPPING_NAMES", ()))
    return model_type in names
