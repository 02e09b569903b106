"""Convert checkpoints to OpenVINO models with optimum-intel, once, and cache them by content.

optimum-intel traces the transformers model, and NNCF compresses its weights. Both run while files are prepared, so
neither their time nor their memory is measured. Facts on the stored weights are read from the model's file.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...records import reading
from ...records.cell import Cell
from ...records.errors import MissingError, ModelError, first_line
from ...records.installation import pip_install
from ...records.results import ModelFacts, hash16
from ...system import machine
from ..huggingface import recipe
from ..huggingface.quantization import complete

MODEL = "openvino_model.xml"
MAKERS = ("optimum-intel", "nncf", "openvino", "transformers", "torch")
BITS = {"int8-wo": 8, "int4-wo": 4}
"""Quantization → bits of NNCF's asymmetric weight compression.

int8 is per output channel, int4 per group; with int4, head and embedding are int8.
"""

PASS_THROUGH_OPS = ("Convert", "Multiply", "Subtract", "Reshape", "Transpose", "Unsqueeze")
"""Operations between stored weights and the operation that computes with them."""

MIN_BYTES = 1024
"""Constants with fewer bytes are not weights."""


@dataclass(frozen=True)
class Stored:
    """Contents of a model's file: bytes of all weights and of those read per step, and the number of parameters.

    `bits` is the mean per weight of matrix products; `kinds` lists their types with the number of each.
    """

    weight_bytes: int
    step_bytes: int
    parameters: int
    bits: float
    kinds: str


def version(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def folder_of(cell: Cell, model: ModelFacts) -> Path:
    """Return the cache folder of the model that a cell runs. Its name depends on all that decides its content."""
    name, revision = model.identity
    made_by = {package: version(package) for package in MAKERS}
    content: dict[str, object] = {"model": name, "revision": revision, "quant": cell.quant, "made_by": made_by}
    content |= {"group_size": cell.group_size} if cell.quant == "int4-wo" else {}
    return machine.cache_folder() / "openvino" / f"{Path(model.name).name}-{cell.quant}-{hash16(content)}"


def is_made(cell: Cell, model: ModelFacts) -> bool:
    """Return True if the cell's OpenVINO model is on this disk."""
    return (folder_of(cell, model) / MODEL).exists()


def require(cell: Cell, model: ModelFacts) -> None:
    """Raise MissingError if the model is not made and cannot be made."""
    if not is_made(cell, model) and version("optimum-intel") is None:
        raise MissingError(
            f"Converting {cell.model} to an OpenVINO model needs optimum-intel, which is not installed. "
            f"Run: {pip_install('optimum-intel')}"
        )


def make(cell: Cell, model: ModelFacts, checkpoint: str) -> None:
    """Write the model of a cell unless it exists. Raises ModelError if optimum-intel fails."""
    target = folder_of(cell, model)
    if (target / MODEL).exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".openvino-") as scratch:
        started = time.perf_counter()
        with _foreign_errors(cell):
            _export(cell, checkpoint, scratch)
        recipe = {"quant.make_s": round(time.perf_counter() - started, 1)}
        (Path(scratch) / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.rename(scratch, target)
        Path(scratch).mkdir()  # TemporaryDirectory removes it


def _export(cell: Cell, checkpoint: str, target: str) -> None:
    with complete(cell.model):  # the export would initialize what is missing at random
        recipe.load_complete(
            checkpoint, local_files_only=True, trust_remote_code=cell.trust_remote_code, dtype="auto"
        )  # no device_map: it needs accelerate, which is not there
    intel: Any = importlib.import_module("optimum.intel")
    how: dict[str, Any] = {"load_in_8bit": False}  # the default is 8 bits for large models
    if cell.quant in BITS:
        grouped = {"group_size": cell.group_size, "ratio": 1.0} if cell.quant == "int4-wo" else {}
        how = {"quantization_config": intel.OVWeightQuantizationConfig(bits=BITS[cell.quant], sym=False, **grouped)}
    model = intel.OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, local_files_only=True, trust_remote_code=cell.trust_remote_code, **how
    )
    model.save_pretrained(target)


def recorded(folder: Path) -> dict[str, str | int | float]:
    """Return the recorded facts on how a model was made."""
    return reading.read_facts(folder / "recipe.json")


def stored(folder: Path, compute_bytes: int) -> Stored:
    """Read the contents of a model's file from its graph. `compute_bytes`: size of a value in the compute precision.

    A step reads every weight of a matrix product once. Packed weights are read as they are stored, with scales and zero
    points. Others are converted on load to at most the compute precision. Lookup tables are left out of a step.
    """
    model = importlib.import_module("openvino").Core().read_model(folder / MODEL)
    whole = step = weights = bits = parameters = 0
    kinds: dict[str, int] = {}
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or _bytes(node) < MIN_BYTES:
            continue
        whole += _bytes(node)
        kind, values = node.get_element_type(), _values(node)
        path = _path(node)
        parameters += values if not path.endswith("scale") else 0
        if not path.startswith("MatMul"):
            continue
        packed = not kind.is_real()
        step += _bytes(node) if packed or path.endswith("scale") else values * min(kind.size, compute_bytes)
        bits += _bytes(node) * 8
        if not path.endswith("scale"):
            weights += values
            kinds[kind.get_type_name()] = kinds.get(kind.get_type_name(), 0) + 1
    named = ", ".join(f"{name} × {count}" for name, count in sorted(kinds.items()))
    return Stored(whole, step, parameters, bits / weights if weights else 0.0, named)


def _path(node: Any) -> str:
    """Return the type of the operation that uses a constant, followed by ` scale` if it scales or shifts weights."""
    role, seen = "", [node]
    for _ in range(8):
        [*users] = [target.get_node() for output in seen[-1].outputs() for target in output.get_target_inputs()]
        matrix = next((user for user in users if user.get_type_name() == "MatMul"), None)
        user = matrix or (users[0] if users else None)
        if user is None or user.get_type_name() not in PASS_THROUGH_OPS:
            return f"{user.get_type_name() if user else ''}{role}"
        if user.get_type_name() in ("Multiply", "Subtract") and user.input_value(1).get_node() == seen[-1]:
            role = " scale"
        seen.append(user)
    return role


def _bytes(node: Any) -> int:
    return int(node.get_byte_size())


def _values(node: Any) -> int:
    count = 1
    for size in node.get_output_shape(0):
        count *= int(size)
    return count


@contextlib.contextmanager
def _foreign_errors(cell: Cell) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"optimum-intel {version('optimum-intel')} with transformers {version('transformers')} cannot convert "
            f"{cell.model} to an OpenVINO model: {first_line(error)}."
        ) from error
