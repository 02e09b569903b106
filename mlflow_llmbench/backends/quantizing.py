"""Quantizations that transformers makes while it loads a checkpoint: by bitsandbytes, torchao, HQQ or quanto. What each needs, and its settings.

Nothing heavy is imported before `config` is called, so that `resolve` and `llmbench doctor` can ask what is lacking.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from .. import gpu
from ..cell import Cell
from ..errors import MissingError, NotRealised, UsageError
from ..quantizations import BITSANDBYTES, HQQ_BITS, MIXED, QUANTO_BITS, TORCHAO
from ..records import ModelFacts

if TYPE_CHECKING:
    import torch

INSTALL = {
    "bitsandbytes": "pip install bitsandbytes",
    "torchao": "pip install 'mlflow-llmbench[torchao]'",
    "hqq": "pip install 'mlflow-llmbench[hqq]'",
    "optimum-quanto": "pip install 'mlflow-llmbench[quanto]'",
    "compressed-tensors": "pip install 'mlflow-llmbench[compressed-tensors]'",
}
"""Package → the command that installs it."""

PACKAGE = {
    **dict.fromkeys((*BITSANDBYTES, MIXED), "bitsandbytes"),
    **dict.fromkeys(TORCHAO, "torchao"),
    **dict.fromkeys(HQQ_BITS, "hqq"),
    **dict.fromkeys(QUANTO_BITS, "optimum-quanto"),
}
"""Quantization → the package that makes it."""

INT4_GROUPS = (32, 64, 128)
"""Sizes of groups that torchao's kernels for 4-bit weights know, on a CPU and on a GPU."""

FP8_CAPABILITY = (8, 9)
"""Compute capability of the oldest GPUs with products of 8-bit floats: Ada and Hopper (torchao's own requirement)."""


def require(cell: Cell) -> None:
    """Raise MissingError unless this machine has what the quantization of a cell needs, and UsageError for groups without a kernel."""
    package = PACKAGE.get(cell.quant)
    if package and not installed(package):
        raise MissingError(
            f"quant={cell.quant} needs the package {package}, which is not installed. Run: {INSTALL[package]}"
        )
    if cell.quant == "int4-wo" and cell.group_size not in INT4_GROUPS:
        raise UsageError(
            f"quant=int4-wo has no kernel for group_size={cell.group_size}. Use group_size={','.join(map(str, INT4_GROUPS))}."
        )
    # The device of a cell that a cluster will measure is not known here; it is given as the CPU.
    if cell.device != "cpu" and (lack := lacking_device(cell.quant, int(cell.device.partition(":")[2] or 0))):
        raise MissingError(f"quant={cell.quant} {lack}")


READY = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "compressed-tensors": "compressed-tensors"}
"""Method of a checkpoint that is quantized already → the package through which transformers loads it; see `gptq.READY` for others."""


def require_for(model: ModelFacts) -> None:
    """Raise MissingError unless a checkpoint that one of these packages wrote can be loaded here; nothing is asked of any other model."""
    method = _ready_method(model)
    package = READY.get(method)
    if package and not installed(package):
        raise MissingError(
            f"{model.name} is quantized with {method}, and loading it needs the package {package}, which is not installed. Run: {INSTALL[package]}"
        )


def refuse_missing(model: ModelFacts, missing: Collection[str]) -> None:
    """Raise NotRealised if a checkpoint that one of these packages wrote lacks weights: transformers would draw them at random, and go on."""
    if missing and _ready_method(model) in READY:
        raise NotRealised(
            f"The checkpoint {model.name} does not have {len(missing)} of the weights that its quantization_config ({_ready_method(model)}) speaks of, such as "
            f"{sorted(missing)[0]}. Its format is not one that the installed versions read; use another checkpoint."
        )


def _ready_method(model: ModelFacts) -> str:
    return str(((model.config or {}).get("quantization_config") or {}).get("quant_method"))


def lacking_device(quant: str, index: int = 0) -> str | None:
    """What GPU `index` of this machine lacks for a quantization, and what to use; None if nothing, or if any device will do."""
    if quant != "fp8":
        return None
    found = gpu.compute_capability(index)
    if found is not None and found >= FP8_CAPABILITY:
        return None
    has = "this machine has none" if found is None else f"GPU {index} has {found[0]}.{found[1]}"
    return f"needs a GPU of compute capability 8.9 or newer, and {has}. Use quant=int8-wo or int8-dq."


def installed(package: str) -> bool:
    """Whether a package is installed, by its own name or by that of its module."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return importlib.util.find_spec(package) is not None if "-" not in package else True


def config(cell: Cell, device: str, compute: torch.dtype) -> Any:
    """The settings of a cell's quantization as transformers takes them, None for HQQ. `compute` is the dtype of its products."""
    import transformers

    quant = cell.quant
    if quant == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=float(cell.int8_threshold))
    if quant in BITSANDBYTES:
        kind = "nf4" if quant == "int4" else "fp4"
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=cell.double_quant,
        )
    if quant in HQQ_BITS:
        return None
    if quant in TORCHAO:
        return transformers.TorchAoConfig(_torchao_config(cell, device))
    return transformers.QuantoConfig(weights=f"int{QUANTO_BITS[quant]}")


def quantize_with_hqq(model: Any, cell: Cell, compute: torch.dtype) -> None:
    """Put HQQ's layers in the place of the linear ones, but for the output head: transformers 5 names the method and cannot load with it."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    bits = HQQ_BITS[cell.quant]
    settings = BaseQuantizeConfig(nbits=bits, group_size=cell.group_size, axis=1)
    head = model.get_output_embeddings()
    for name, module in [*model.named_modules()]:
        if isinstance(module, torch.nn.Linear) and module is not head:
            model.set_submodule(
                name, HQQLinear(module, settings, compute_dtype=compute, device=str(module.weight.device))
            )
    model.config.quantization_config = {"quant_method": "hqq", "bits": bits, "group_size": cell.group_size}


def _torchao_config(cell: Cell, device: str) -> Any:
    """Per output row for 8 bits, per `group_size` weights for 4; the layout of 4-bit weights is that of the device's own kernel."""
    from torchao import quantization

    if cell.quant == "int8-wo":
        return quantization.Int8WeightOnlyConfig()
    if cell.quant == "int8-dq":
        return quantization.Int8DynamicActivationInt8WeightConfig()
    if cell.quant == "fp8":
        return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    if device.startswith("cuda"):
        return quantization.Int4WeightOnlyConfig(group_size=cell.group_size, int4_packing_format="tile_packed_to_4d")
    from torchao.prototype.quantization.int4 import (
        PrototypeInt4WeightOnlyConfig,
    )  # where torchao keeps its kernel for CPUs

    return PrototypeInt4WeightOnlyConfig(group_size=cell.group_size)


def facts(model: Any) -> dict[str, str | int | float]:
    """Method and settings of the quantization that the loaded model carries."""
    carried = getattr(model.config, "quantization_config", None)
    if carried is None:
        return {"quant.method": "none"}
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
