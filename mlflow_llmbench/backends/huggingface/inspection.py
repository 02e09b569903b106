"""Inspect a loaded torch model: classes, dtypes, bytes and kernels, read from the model itself.

`get_memory_footprint` misses quantization state and the inner tensors of some tensor subclasses. Settings show only
what was asked for, not what was done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...records.errors import NotRealised
from ...records.mixed_plan import QUANTIZED
from ...records.quantizations import FLOAT_DTYPES, SCHEMES
from ...system import memory
from . import recipe

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Inspection:
    """Bytes and counts of a loaded model.

    `linear_bits`: mean stored bits per weight of the decoder's linear layers, metadata included. `expert_weights`:
    weights of experts that are not linear layers. They count in `linear_bits`, and no quantization of this package
    changes them.
    """

    parameters: int
    weight_bytes: int
    step_bytes: int
    mapped_bytes: int
    linear_bits: float
    linear_classes: dict[str, int]
    dtypes: dict[str, int]
    device: str
    expert_weights: int = 0


def inspect_model(model: Any) -> Inspection:
    """Inspect a loaded model without reading the values of its parameters (`touch` does that)."""
    seen: set[int] = set()
    weight_bytes = parameters = 0
    spans: list[tuple[int, int]] = []
    dtypes: Counter[str] = Counter()
    skip = set(_input_only(model))
    step_bytes = 0
    device = "cpu"
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        # GPTQ keeps its weights in buffers.
        if (
            hasattr(module, "in_features")
            and next(module.children(), None) is None
            and not own.keys() & {"weight", "W_q"}
        ):
            parameters += int(module.in_features) * int(module.out_features)
        for name, tensor in [*own.items(), *module.named_buffers(recurse=False)]:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            pieces = list(_pieces(tensor, module))
            size = sum(piece.numel() * piece.element_size() for piece in pieces)
            weight_bytes += size
            spans += [
                (piece.data_ptr(), piece.numel() * piece.element_size())
                for piece in pieces
                if piece.device.type == "cpu"
            ]
            if module_name not in skip:
                step_bytes += size
            if name in own:
                # Other parameters of linear layers are scales and packed weights.
                if not hasattr(module, "in_features") or name in ("weight", "W_q", "bias"):
                    parameters += _logical_count(tensor, module, name)
                dtypes[str(tensor.dtype).removeprefix("torch.")] += 1
                device = str(tensor.device)
    bits, classes, experts = _linear_layers(model)
    return Inspection(
        parameters, weight_bytes, step_bytes, memory.mapped_bytes(spans), bits, classes, dict(dtypes), device, experts
    )


def touch(model: Any) -> None:
    """Read the whole stored model once, so that pages of a mapped checkpoint are resident and copies are finished."""
    import torch

    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            for piece in _pieces(tensor, module):
                flat = piece.detach().reshape(-1)
                if flat.numel():
                    flat.view(torch.uint8)[::1024].max()


def stored_bytes(value: Any, module: Any = None) -> int:
    """Return the stored bytes of a tensor (a parameter of `module`), or of all tensors in tuples, lists and dicts.

    Includes what a tensor subclass wraps. Anything else has 0 bytes.
    """
    if isinstance(value, dict | tuple | list):
        return sum(map(stored_bytes, value.values() if isinstance(value, dict) else value))
    if not hasattr(value, "element_size"):
        return 0
    return sum(piece.numel() * piece.element_size() for piece in _pieces(value, module))


def _pieces(tensor: torch.Tensor, module: Any) -> Iterator[torch.Tensor]:
    """Yield the plain tensors that store a parameter: itself, its quantization state, or those in a tensor subclass."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None and not type(tensor).__module__.startswith("torch.nn"):
        for name in flatten()[0]:
            yield from _pieces(getattr(tensor, name), module)
        return
    yield tensor.data if hasattr(tensor, "data") else tensor
    state = getattr(tensor, "quant_state", None)
    # bitsandbytes 4-bit: block maxima and code table, and both once more if the maxima are quantized themselves.
    if state is not None:
        for holder in (state, getattr(state, "state2", None)):
            for name in ("absmax", "code", "offset"):
                value: Any = getattr(holder, name, None)
                if hasattr(value, "element_size"):
                    yield value
    if tensor is getattr(module, "W_q", None):  # HQQ: scales and zero points
        yield from (value for value in module.meta.values() if hasattr(value, "element_size"))
    for holder in (tensor, getattr(module, "state", None)):  # bitsandbytes 8-bit: row scales
        scale = getattr(holder, "SCB", None)
        if scale is not None and tensor is getattr(module, "weight", None):
            yield scale
            break


def _logical_count(tensor: torch.Tensor, module: Any, name: str) -> int:
    """Return the number of weights that a parameter represents; packed ones hold several in a byte."""
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        return int(state.shape.numel())
    if (
        name in ("weight", "W_q")
        and hasattr(module, "in_features")
        and tensor.dtype.itemsize == 1
        and not tensor.dtype.is_floating_point
    ):
        return int(module.in_features) * int(module.out_features)
    return int(tensor.numel())


def _input_only(model: Any) -> Iterator[str]:
    """Yield the names of embedding modules of which a decode step reads one row only.

    These are all embeddings that do not share their weight with the output head.
    """
    import torch

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and (
            head is None or getattr(head, "weight", None) is not module.weight
        ):
            yield name


def _linear_layers(model: Any) -> tuple[float, dict[str, int], int]:
    """Return mean stored bits per weight, classes with their counts, and the number of weights of experts.

    Covers all linear layers but the output head, and the experts.
    """
    stored = logical = experts = 0
    for module in model.modules():
        for tensor in _experts(module):
            stored += stored_bytes(tensor, module)
            logical += tensor.numel()
            experts += tensor.numel()
    for layer in recipe.linear_layers(model):
        stored += layer_bytes(layer)
        logical += int(layer.in_features) * int(layer.out_features)
    return (8 * stored / logical if logical else 0.0), recipe.layer_classes(model), experts


def _experts(module: Any) -> list[torch.Tensor]:
    """Return the matrices of a mixture's experts, which transformers 5 holds in parameters of three dimensions."""
    # torch.nn: the weight of a convolution has three dimensions too.
    if hasattr(module, "in_features") or type(module).__module__.startswith("torch.nn"):
        return []
    own = module.named_parameters(recurse=False)
    return [tensor for name, tensor in own if tensor.ndim == 3 and tensor.is_floating_point() and "scale" not in name]


def layer_bytes(module: Any) -> int:
    """Return the stored bytes of a linear layer's weight, with quantization state and without bias."""
    weights = [
        t for n, t in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)] if n != "bias"
    ]
    return sum(stored_bytes(tensor, module) for tensor in weights)


def verify(quant: str, device: str, found: Inspection) -> None:
    """Raise NotRealised unless the loaded model has the quantization `quant` and is on `device`."""
    if not found.device.startswith(device.partition(":")[0]):
        raise NotRealised(
            f"The model is on {found.device}, not on {device}. Use device={found.device.partition(':')[0]}."
        )
    scheme = SCHEMES[quant]
    if scheme.held_bits is None:
        return
    low, high = scheme.held_bits
    if scheme.layers and not set(scheme.layers) >= set(found.linear_classes):
        advice = "Use quant=none for a checkpoint that is quantized already"
        if "group_size" in scheme.settings:  # torchao leaves a layer as it is if the groups do not fit
            advice = "Use a group_size that divides the inputs of every layer"
        raise NotRealised(f"quant={quant} was asked for, but the linear layers are {found.linear_classes}. {advice}.")
    if found.expert_weights and high < 16:
        raise NotRealised(
            f"quant={quant} was asked for, but the experts of this model are not linear layers in this version of "
            f"transformers: {found.expert_weights:,} of its {found.parameters:,} weights stay as they are. "
            "Use quant=none, or a GGUF file of the model with backend=llama_cpp."
        )
    if not low - 0.01 <= found.linear_bits <= high + 0.01:
        raise NotRealised(
            f"quant={quant} was asked for, but the linear layers hold {found.linear_bits:.2f} bits per weight, "
            f"not {low:g} to {high:g}. Use quant=none for a checkpoint that is quantized already."
        )
    wanted = FLOAT_DTYPES.get(quant)
    if wanted and set(found.dtypes) - {wanted}:
        raise NotRealised(
            f"quant={quant} was asked for, but the parameters' dtypes are {found.dtypes}. "
            "Use quant=none for this checkpoint."
        )


def verify_plan(schemes: Mapping[str, str], model: Any) -> None:
    """Raise NotRealised unless each linear layer but the output head has the class, dtype and bits of its scheme.

    `schemes` maps names of layers to schemes, as planned.
    """
    head = model.get_output_embeddings()
    quantized = {name for scheme in QUANTIZED for name in SCHEMES[scheme].layers}
    layers = {
        name: module for name, module in model.named_modules() if name in schemes or type(module).__name__ in quantized
    }
    layers |= {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear" and module is not head
    }
    stored: Counter[str] = Counter()
    logical: Counter[str] = Counter()
    for name in {**schemes, **layers}:
        module, scheme = layers.get(name), schemes.get(name)
        found = type(module).__name__
        expected = (SCHEMES[scheme].layers or ("Linear",)) if scheme else ()
        if module is None or scheme is None or module is head or found not in expected:
            raise NotRealised(
                f"The plan has {name} in {scheme or 'no scheme'}, "
                f"but the model has {found if module else 'no such layer'} there."
            )
        wanted = FLOAT_DTYPES.get(scheme)
        if wanted and str(module.weight.dtype) != f"torch.{wanted}":
            raise NotRealised(
                f"The plan has {name} in {scheme}, "
                f"but its weights are {str(module.weight.dtype).removeprefix('torch.')}."
            )
        stored[scheme] += layer_bytes(module)
        logical[scheme] += int(module.in_features) * int(module.out_features)
    for scheme, size in stored.items():
        low, high = SCHEMES[scheme].held_bits or (0.0, 0.0)
        bits = 8 * size / logical[scheme]
        if not low - 0.01 <= bits <= high + 0.01:
            raise NotRealised(
                f"The plan's layers in {scheme} hold {bits:.2f} bits per weight, not {low:g} to {high:g}."
            )
