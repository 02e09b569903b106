"""Quantization with transformers: what a scheme or a quantized checkpoint needs here, its recipe, and its facts.

Nothing heavy is imported, so that `resolve` and `llmbench doctor` can ask what is missing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from ...records.cell import Cell
from ...records.errors import MissingError, NotRealised, UsageError
from ...records.quantizations import SCHEMES, Library, install_command, library_of_method, resolve
from ...records.results import ModelFacts
from ...system import gpu, machine
from . import recipe


class Maker(Protocol):
    """Module of this folder that calibrates schemes before the load, in the process that prepares files."""

    def is_made(self, cell: Cell, model: ModelFacts) -> bool:
        """Return True if what `make` makes is known to be there."""

    def make(self, cell: Cell, model: ModelFacts, source: str, tokenizer: Callable[[], Any]) -> None:
        """Make and cache it unless it is there. `source`: the checkpoint's folder; `tokenizer` loads its tokenizer."""


class CheckpointMaker(Maker, Protocol):
    """Maker of a scheme with `makes_files`: the checkpoint that it makes is loaded in place of the model's own."""

    def folder_of(self, cell: Cell, model: ModelFacts) -> Path:
        """Return the folder of the quantized checkpoint."""

    def recorded(self, folder: str) -> dict[str, str | int | float]:
        """Return the facts that were recorded when it was made."""


def maker_of(cell: Cell) -> Maker | None:
    """Return the module that calibrates the scheme of a cell; None for schemes that need no calibration."""
    name = SCHEMES[cell.quant].maker
    return cast(Maker, importlib.import_module(f".{name}", __package__)) if name else None


def checkpoint_maker_of(cell: Cell) -> CheckpointMaker | None:
    """Return the module that makes the checkpoint of a cell; None for schemes that load the model's own."""
    return cast(CheckpointMaker, maker_of(cell)) if SCHEMES[cell.quant].makes_files else None


def require(cell: Cell) -> None:
    """Raise MissingError if a cell's quantization lacks something here, UsageError if its groups have no kernel."""
    scheme = SCHEMES[cell.quant]
    if scheme.library:
        _require_packages(f"quant={cell.quant} needs", scheme.packages)
        _require_compiler(cell.quant, scheme.library)
    if scheme.group_sizes and cell.group_size not in scheme.group_sizes:
        raise UsageError(
            f"quant={cell.quant} has no kernel for group_size={cell.group_size}. "
            f"Use group_size={','.join(map(str, scheme.group_sizes))}."
        )
    # For a cell that a cluster will measure, the device is not known here and given as the CPU.
    if cell.device != "cpu" and (lack := lacking_device(cell.quant, cell.device)):
        raise MissingError(f"quant={cell.quant} {lack}")


def _require_packages(needs: str, packages: Collection[str]) -> None:
    for package in packages:
        if not installed(package):
            raise MissingError(
                f"{needs} the package {package}, which is not installed. Run: {install_command(package)}"
            )


def _require_compiler(quant: str, library: Library) -> None:
    compiler = os.environ.get("CXX", "g++").split()[0]
    if library.compiler and not shutil.which(compiler):
        raise MissingError(
            f"quant={quant} needs a C++ compiler, since {library.compiler}, and {compiler} is not installed. "
            "Install g++, or set CXX."
        )


def require_for(model: ModelFacts) -> None:
    """Raise MissingError if a checkpoint that is quantized already cannot be loaded here. Others always pass."""
    if library := _library_of(model):
        _require_packages(f"{model.name} is quantized with {library.method}, and loading it needs", library.ready)


@contextlib.contextmanager
def complete(model: str, facts: ModelFacts | None = None) -> Iterator[None]:
    """Raise NotRealised, naming tensors, if a checkpoint that is loaded does not hold exactly the model's weights.

    transformers would initialize those that are missing at random and continue.
    """
    try:
        yield
    except recipe.IncompleteCheckpoint as error:
        library = _library_of(facts) if facts else None
        advice = "Download it again, or use another one."
        if library:
            advice = f"If it is whole, the installed versions cannot read {library.method}: use another one."
        raise NotRealised(f"The checkpoint {model} cannot be loaded. {error}. {advice}") from error


def _library_of(model: ModelFacts) -> Library | None:
    return library_of_method(((model.config or {}).get("quantization_config") or {}).get("quant_method"))


def lacking_device(quant: str, device: str = "auto") -> str | None:
    """Say what a device of this machine lacks for a quantization, and what to use; None if it lacks nothing.

    A GPU whose driver does not tell its compute capability lacks nothing that is known.
    """
    scheme = SCHEMES[quant]
    if scheme.capability is None or (scheme.runs_on_cpu and machine.require_device(device) == "cpu"):
        return None
    index = int(device.partition(":")[2] or 0)
    found = gpu.compute_capability(index)
    if found >= scheme.capability if found else index < len(gpu.gpus()):
        return None
    has = "this machine has none" if found is None else f"GPU {index} has {found[0]}.{found[1]}"
    needed = ".".join(map(str, scheme.capability))
    return f"needs a GPU of compute capability {needed} or newer, and {has}. Use quant={scheme.instead}."


def installed(package: str) -> bool:
    """Return True if a package is installed, given by its own name or that of its module."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return importlib.util.find_spec(package) is not None if "-" not in package else True


def recipe_of(cell: Cell, dtype: str) -> dict[str, Any]:
    """Return the recipe of a cell as plain data; `dtype` is torch's name of the dtype of the computation."""
    settings = {"dtype": dtype, "int8_threshold": float(cell.int8_threshold)}
    return resolve(SCHEMES[cell.quant].recipe, vars(cell) | settings)


def facts(cell: Cell, model: Any) -> dict[str, str | int | float]:
    """Return method and settings of the loaded model's quantization."""
    carried = getattr(model.config, "quantization_config", None)
    if carried is None:
        return _facts_of_scheme(cell)
    data: dict[str, Any] = carried if isinstance(carried, dict) else carried.to_dict()
    found: dict[str, str | int | float] = {
        "quant.method": str(getattr(data.get("quant_method"), "value", data.get("quant_method")))
    }
    if data.get("load_in_8bit"):
        found |= {"quant.threshold": float(data["llm_int8_threshold"])}
    if data.get("load_in_4bit"):
        found |= {
            "quant.type": data["bnb_4bit_quant_type"],
            "quant.compute_dtype": str(data["bnb_4bit_compute_dtype"]).removeprefix("torch."),
        }
        found["quant.double_quant"] = "true" if data.get("bnb_4bit_use_double_quant") else "false"
    if found["quant.method"] == "torchao":
        kind: Any = getattr(carried, "quant_type", None)
        found["quant.type"] = type(kind).__name__
        if isinstance(size := getattr(kind, "group_size", None), int):
            found["quant.group_size"] = size
    return found | {f"quant.{key}": data[key] for key in ("bits", "group_size") if isinstance(data.get(key), int)}


def _facts_of_scheme(cell: Cell) -> dict[str, str | int | float]:
    """Return the facts of a model whose layers a library has replaced, which transformers does not know."""
    scheme = SCHEMES[cell.quant]
    if not scheme.library or not scheme.made_while_loading or scheme.bits is None:
        return {"quant.method": "none"}
    grouped = {"quant.group_size": cell.group_size} if "group_size" in scheme.settings else {}
    return {"quant.method": scheme.library.method, "quant.bits": scheme.bits, **grouped}
