"""Quantization at load time by bitsandbytes, torchao, HQQ or quanto: requirements and settings of each.

Nothing heavy is imported before `config` is called, so that `resolve` and `llmbench doctor` can ask what is missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ...records.cell import Cell
from ...records.errors import MissingError, NotRealised, UsageError
from ...records.quantizations import BITSANDBYTES, HQQ_BITS, MIXED, QUANTO_BITS, TORCHAO
from ...records.results import ModelFacts
from ...system import gpu

if TYPE_CHECKING:
    import torch


INSTALL = {
    "bitsandbytes": "pip install bitsandbytes",
    "torchao": "pip install 'mlflow-llmbench[torchao]'",
    "hqq": "pip install 'mlflow-llmbench[hqq]'",
    "optimum-quanto": "pip install 'mlflow-llmbench[quanto]'",
    "compressed-tensors": "pip install 'mlflow-llmbench[compressed-tensors]'",
}
"""Package → command that installs it."""

PACKAGE = {
    **dict.fromkeys((*BITSANDBYTES, MIXED), "bitsandbytes"),
    **dict.fromkeys(TORCHAO, "torchao"),
    **dict.fromkeys(HQQ_BITS, "hqq"),
    **dict.fromkeys(QUANTO_BITS, "optimum-quanto"),
}
"""Quantization → package that makes it."""

INT4_GROUPS = (32, 64, 128)
"""Group sizes that torchao's kernels for 4-bit weights support, on a CPU and on a GPU."""

FP8_CAPABILITY = (8, 9)
"""Compute capability of the oldest GPUs that multiply 8-bit floats: Ada and Hopper (torchao's own requirement)."""


def require(cell: Cell) -> None:
    """Raise MissingError if a cell's quantization lacks something here, UsageError if its groups have no kernel."""
    package = PACKAGE.get(cell.quant)
    if package and not installed(package):
        raise MissingError(
            f"quant={cell.quant} needs the package {package}, which is not installed. Run: {INSTALL[package]}"
        )
    if cell.quant == "int4-wo" and cell.group_size not in INT4_GROUPS:
        raise UsageError(
            f"quant=int4-wo has no kernel for group_size={cell.group_size}. "
            f"Use group_size={','.join(map(str, INT4_GROUPS))}."
        )
    # For a cell that a cluster will measure, the device is not known here and given as the CPU.
    if cell.device != "cpu" and (lack := lacking_device(cell.quant, int(cell.device.partition(":")[2] or 0))):
        raise MissingError(f"quant={cell.quant} {lack}")


READY = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "compressed-tensors": "compressed-tensors"}
"""Quantization method of a ready checkpoint → package with which transformers loads it; others are in `gptq.READY`."""


def require_for(model: ModelFacts) -> None:
    """Raise MissingError if a checkpoint that one of these packages wrote cannot be loaded here. Others always pass."""
    method = _ready_method(model)
    package = READY.get(method)
    if package and not installed(package):
        raise MissingError(
            f"{model.name} is quantized with {method}, and loading it needs the package {package}, "
            f"which is not installed. Run: {INSTALL[package]}"
        )


def refuse_missing(model: ModelFacts, missing: Collection[str]) -> None:
    """Raise NotRealised if a checkpoint that one of these packages wrote lacks weights.

    transformers would initialize them at random and continue.
    """
    if missing and _ready_method(model) in READY:
        raise NotRealised(
            f"The checkpoint {model.name} lacks {len(missing)} of the weights that its quantization_config "
            f"({_ready_method(model)}) requires, such as {sorted(missing)[0]}. "
            "The installed versions cannot read its format; use another checkpoint."
        )


def _ready_method(model: ModelFacts) -> str:
    return str(((model.config or {}).get("quantization_config") or {}).get("quant_method"))


def lacking_device(quant: str, index: int = 0) -> str | None:
    """Say what GPU `index` of this machine lacks for a quantization, and what to use; None if it lacks nothing."""
    if quant != "fp8":
        return None
    found = gpu.compute_capability(index)
    if found is not None and found >= FP8_CAPABILITY:
        return None
    has = "this machine has none" if found is None else f"GPU {index} has {found[0]}.{found[1]}"
    return f"needs a GPU of compute capability 8.9 or newer, and {has}. Use quant=int8-wo or int8-dq."


def installed(package: str) -> bool:
    """Return True if a package is installed, given by its own name or that of its module."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return importlib.util.find_spec(package) is not None if "-" not in package else True


def config(cell: Cell, device: str, compute: torch.dtype) -> Any:
    """Return the quantization settings of a cell for transformers, None for HQQ. `compute` is the dtype of products."""
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
    """Replace all linear layers but the output head by HQQ's.

    transformers 5 lists the method but cannot load with it.
    """
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
    """Return torchao's settings: scales per output row for 8 bits, per `group_size` weights for 4.

    4-bit weights get the layout of the device's own kernel.
    """
    from torchao import quantization

    if cell.quant == "int8-wo":
        return quantization.Int8WeightOnlyConfig()
    if cell.quant == "int8-dq":
        return quantization.Int8DynamicActivationInt8WeightConfig()
    if cell.quant == "fp8":
        return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    if device.startswith("cuda"):
        return quantization.Int4WeightOnlyConfig(group_size=cell.group_size, int4_packing_format="tile_packed_to_4d")
    # torchao's kernel for CPUs is a prototype.
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=cell.group_size)


def facts(model: Any) -> dict[str, str | int | float]:
    """Return method and settings of the loaded model's quantization."""
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
