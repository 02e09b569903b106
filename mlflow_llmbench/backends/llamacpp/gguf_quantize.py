"""Make GGUF files from a checkpoint with llama.cpp's converter and quantizer, once, and cache them by content.

The converter is a Python program in llama.cpp's source tree. The source package of llama-cpp-python contains it, an
installed package does not. It runs in a separate process (`gguf_convert`), because it brings its own version of the
package gguf. Both run while files are prepared, so neither their time nor their memory is measured.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ...records import reading
from ...records.cell import Cell
from ...records.errors import MeasurementError, MissingError, ModelError, first_line
from ...records.quantizations import SCHEMES, install_command
from ...records.redaction import excerpt
from ...records.results import ModelFacts, hash16
from ...system import machine
from ...system.python_command import module_command, variables
from ..checkpoints import gguf_file
from ..huggingface import pruning

PACKAGE = "llama-cpp-python"
SOURCE_VARIABLE = "LLMBENCH_LLAMA_CPP"
CONVERTER = "convert_hf_to_gguf.py"
ARCHITECTURES = Path("conversion", "__init__.py")
OUT_TYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""An unquantized `quant`, or the dtype of a checkpoint → the converter's name of it."""


def require() -> None:
    """Raise MissingError unless llama-cpp-python is installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingError(
            f"backend=llama_cpp needs the package {PACKAGE}, which is not installed. Run: {install_command(PACKAGE)}."
        )


def version() -> str:
    """Return the version of llama-cpp-python, which fixes those of llama.cpp, its converter and its quantizer."""
    return importlib.metadata.version(PACKAGE)


def file_of(cell: Cell, model: ModelFacts) -> Path:
    """Return the cache path of the file that a cell runs. Its name depends on everything that decides its content."""
    return _kept(cell, model, cell.quant if SCHEMES[cell.quant].makes_files else out_type(cell, model))


def out_type(cell: Cell, model: ModelFacts) -> str:
    """Return f32, f16 or bf16: the requested type, or for quantized files the checkpoint's own dtype."""
    return OUT_TYPES.get(cell.quant) or OUT_TYPES.get(model.dtype or "", "f16")


def _kept(cell: Cell, model: ModelFacts, kind: str) -> Path:
    name, revision = model.identity
    revision = pruning.folder_of(cell, model).name if model.pruned else revision
    content = {"model": name, "revision": revision, "kind": kind, "version": version()}
    return machine.cache_folder() / "gguf" / f"{Path(model.name).name}-{kind}-{hash16(content)}.gguf"


def make(cell: Cell, model: ModelFacts, checkpoint: str) -> None:
    """Write the file of a cell unless it exists.

    Raises ModelError for an architecture that llama.cpp does not know or a checkpoint that its converter cannot read,
    MissingError without the converter, and MeasurementError or OutOfMemory if a program fails.
    """
    wanted = file_of(cell, model)
    if wanted.exists():
        return
    base = _kept(cell, model, out_type(cell, model))
    base.parent.mkdir(parents=True, exist_ok=True)
    if not base.exists():
        _check_architecture(cell, checkpoint)
        _write(base, lambda scratch: _convert(cell, checkpoint, scratch, out_type(cell, model)))
    if wanted != base:
        _write(wanted, lambda scratch: _quantize(cell, base, scratch))


Facts = dict[str, str | int | float]


def _write(target: Path, make_file: Callable[[Path], Facts]) -> None:
    """Call `make_file` with a temporary path, save the returned facts as JSON, then move the file to `target`."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".gguf-") as folder:
        scratch = Path(folder) / "model.gguf"
        started = time.perf_counter()
        recipe = make_file(scratch)
        recipe["quant.make_s"] = round(time.perf_counter() - started, 1)
        target.with_suffix(".json").write_text(json.dumps(recipe), encoding="utf-8")
        scratch.replace(target)


def recorded(file: Path) -> Facts:
    """Return the recorded facts on how a file was made; empty for a file that was not made here."""
    recipe = file.with_suffix(".json")
    if not recipe.is_file() or machine.cache_folder() / "gguf" != file.parent:
        return {}
    return reading.read_facts(recipe)


# The converter


def source_tree() -> Path:
    """Return the folder of llama.cpp's sources: `LLMBENCH_LLAMA_CPP`, or the source package in the cache.

    Raises MissingError.
    """
    named = os.environ.get(SOURCE_VARIABLE)
    package = Path(named) if named else machine.cache_folder() / f"llama_cpp_python-{version()}.tar.gz"
    if package.is_file():
        package = _unpacked(package)
    for tree in (package, package / "vendor" / "llama.cpp"):
        if (tree / CONVERTER).is_file():
            return tree
    if named:
        raise MissingError(
            f"{SOURCE_VARIABLE}={named} is neither a source tree of llama.cpp, with {CONVERTER}, nor a source package "
            f"of {PACKAGE}. Set it to one of them."
        )
    raise MissingError(
        f"Making a GGUF file needs llama.cpp's converter, which is only in the source package of {PACKAGE}. "
        f"Run: pip download --no-deps --no-binary {PACKAGE} -d {machine.cache_folder()} {PACKAGE}=={version()} "
        f"(or set {SOURCE_VARIABLE} to a source tree of llama.cpp)."
    )


def _unpacked(package: Path) -> Path:
    """Unpack the converter from a source package into the cache and return its folder. Raises MissingError."""
    folder = machine.cache_folder() / "gguf" / f"converter-{package.name.removesuffix('.tar.gz')}"
    if not (folder / CONVERTER).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with (
                tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converter-") as scratch,
                tarfile.open(package) as archive,
            ):
                for member in archive:
                    inner = member.name.partition("/vendor/llama.cpp/")[2]
                    if (
                        member.isfile()
                        and inner.startswith((CONVERTER, "conversion/", "gguf-py/gguf/"))
                        and ".." not in inner
                    ):
                        target = Path(scratch, inner)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        content = archive.extractfile(member)
                        target.write_bytes(content.read() if content else b"")
                with contextlib.suppress(OSError):  # another process was first
                    os.rename(scratch, folder)
                    os.mkdir(scratch)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise MissingError(
                f"The source package {package} cannot be read: {first_line(error)}. Download it again."
            ) from None
    return folder


def architectures(tree: Path) -> set[str]:
    """Return the transformers class names that the converter knows; empty if its table cannot be read.

    The table is parsed, not run.
    """
    try:
        module = ast.parse((tree / ARCHITECTURES).read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return set()
    for node in module.body:
        if (
            isinstance(node, ast.AnnAssign)
            and getattr(node.target, "id", "") == "TEXT_MODEL_MAP"
            and isinstance(node.value, ast.Dict)
        ):
            return {
                key.value for key in node.value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)
            }
    return set()


def _check_architecture(cell: Cell, checkpoint: str) -> None:
    config = reading.read_json(Path(checkpoint, "config.json"))
    check_architecture(cell, str((config.get("architectures") or ["unknown"])[0]))


def check_architecture(cell: Cell, architecture: str) -> None:
    """Raise ModelError unless the converter knows an architecture, given as its transformers class name."""
    known = architectures(source_tree())
    if known and architecture not in known:
        raise ModelError(
            f"llama.cpp has no architecture {architecture}, so {cell.model} cannot become a GGUF file. Use "
            "backend=transformers with one of its quantizations, or another model: Llama, Gemma, Qwen, Mistral, Phi, "
            f"Pythia and BLOOM are among the {len(known)} that llama.cpp {version()} converts."
        )


def _convert(cell: Cell, checkpoint: str, target: Path, kind: str) -> Facts:
    """Convert a checkpoint to an unquantized GGUF file and return facts on it.

    Raises ModelError or MeasurementError.
    """
    tree = source_tree()
    if not list(Path(checkpoint).glob("*.safetensors")) and not list(Path(checkpoint).glob("*.bin")):
        raise ModelError(f"{cell.model} has no weights that llama.cpp's converter can read.")
    module, trusted = "mlflow_llmbench.backends.llamacpp.gguf_convert", str(cell.trust_remote_code).lower()
    done = subprocess.run(
        module_command(sys.executable, module, str(tree), checkpoint, str(target), kind, trusted),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=variables(os.environ),
    )
    sys.stderr.write(done.stderr[-20_000:])  # to the log of the preparing process
    if done.returncode or not target.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise MeasurementError(
            f"llama.cpp's converter could not convert {cell.model}: {excerpt(said, 300)}. "
            "Use backend=transformers, or another model."
        )
    told: Facts = json.loads(done.stdout.strip().splitlines()[-1])
    return told


# The quantizer


def _quantize(cell: Cell, base: Path, target: Path) -> Facts:
    """Quantize a GGUF file with llama.cpp's quantizer, without an importance matrix, and return facts on it."""
    from . import session

    lib = session.library()
    session.forget_log()
    settings = lib.llama_model_quantize_default_params()
    settings.nthread = cell.threads or machine.physical_cores()
    settings.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{SCHEMES[cell.quant].recipe['file_type']}")
    if lib.llama_model_quantize(str(base).encode(), str(target).encode(), ctypes.byref(settings)):
        raise session.failure(f"making {cell.quant} of {cell.model}")
    lines = session.log_lines()
    return recorded(base) | {
        "quant.other_type_tensors": sum("not divisible" in line for line in lines),
        "quant.importance_matrix": "none",
        "quant.made_by": f"{PACKAGE} {version()}",
        "quant.made_from": gguf_file.read_header(base).embedding_type,
    }
