"""Inspect a loaded torch model: classes, dtypes, bytes and kernels, read from the model itself.

`get_memory_footprint` misses quantization state and the inner tensors of some tensor subclasses. Settings show only
what was asked for, not what was done.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...records.errors import NotRealised
from ...records.mixed_plan import QUANTIZED
from ...records.quantizations import FLOAT_DTYPES, PADDED, SCHEMES
from ...system import memory
from . import placing, recipe

if TYPE_CHECKING:
    import torch


MOST_LEFT = 0.05
"""Largest share of the linear layers' weights that a quantization, or another dtype, may leave as they are."""


@dataclass(frozen=True)
class LayerClass:
    """The linear layers of one class: their number, weights and stored bytes, and the name of the first.

    `padding`: weights that are stored beside these to fill the kernel's tiles.
    """

    count: int
    weights: int
    bytes: int
    first: str
    padding: int = 0


@dataclass(frozen=True)
class Inspection:
    """Bytes and counts of a loaded model.

    `layers`: its linear layers by class, without the output head · `linear_bits`: mean stored bits per weight of these
    and of the experts, metadata included; None if there are none · `expert_weights`: weights of experts that are not
    linear layers, which no quantization of this package changes · `dtypes`: of all parameters, with their numbers ·
    `matrix_weights`: number of weights of linear layers, experts and embeddings, by dtype · `mapped`: file, begin and
    end of the parameters in file mappings. Layers and experts are those that a text passes, not those of a vision
    tower. Of a model that is sharded over ranks, sizes and the layers' weights are those of this rank. Of one that is
    laid out over several places, they are those of all of them, and `device` is the one that computes.
    """

    parameters: int
    weight_bytes: int
    step_bytes: int
    mapped_bytes: int
    linear_bits: float | None
    layers: dict[str, LayerClass]
    dtypes: dict[str, int]
    device: str
    expert_weights: int = 0
    matrix_weights: dict[str, int] = field(default_factory=dict)
    mapped: tuple[tuple[str, int, int], ...] = ()

    @property
    def linear_classes(self) -> dict[str, int]:
        """Classes of the linear layers with their counts."""
        return {name: one.count for name, one in self.layers.items()}


def inspect_model(model: Any) -> Inspection:
    """Inspect a loaded model without reading the values of its parameters (`touch` does that)."""
    seen: set[int] = set()
    weight_bytes = parameters = 0
    spans: list[tuple[int, int]] = []
    dtypes: Counter[str] = Counter()
    # A decode step reads none of a vision tower, and one row of an embedding.
    skip = (dict(model.named_modules()).keys() - recipe.text_modules(model).keys()) | set(_input_only(model))
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
            pieces = list(_pieces(_read_from(tensor, module, name), module))
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
    device = placing.computing_device(model) or device
    layers = _by_class(recipe.linear_layers(model))
    experts = [*_experts(model)]
    mapped = memory.mapped_parts(spans)
    weights = sum(one.weights for one in layers.values()) + sum(recipe.local(tensor).numel() for tensor in experts)
    stored = sum(one.bytes for one in layers.values()) + sum(map(stored_bytes, experts))
    return Inspection(
        parameters,
        weight_bytes,
        step_bytes,
        memory.union_bytes(mapped),
        8 * stored / weights if weights else None,
        layers,
        dict(dtypes),
        device,
        sum(tensor.numel() for tensor in experts),
        _matrix_weights(model, experts),
        tuple(mapped),
    )


def touch(model: Any) -> None:
    """Read the whole stored model once, so that pages of a mapped checkpoint are resident and copies are finished.

    What lies on the disk (`placement=auto`) stays there.
    """
    import torch

    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            for piece in _pieces(_read_from(tensor, module, name), module):
                flat = piece.detach().reshape(-1)
                if flat.numel() and not flat.is_meta:
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


def _read_from(tensor: torch.Tensor, module: Any, name: str) -> torch.Tensor:
    """Return the tensor itself, or the copy in host memory if it is a meta tensor that is read from there.

    One that lies on the disk stays a meta tensor, which has its size and dtype.
    """
    copy = placing.host_copy(module, name) if tensor.is_meta else None
    return tensor if copy is None else copy


def _pieces(tensor: torch.Tensor, module: Any) -> Iterator[torch.Tensor]:
    """Yield the plain tensors that store a parameter: itself, its quantization state, or those in a tensor subclass."""
    tensor = recipe.local(tensor)
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


def _by_class(layers: Mapping[str, Any]) -> dict[str, LayerClass]:
    """Return linear layers by class, counted. Of a sharded layer, the weights and bytes that this rank holds count."""
    found: dict[str, LayerClass] = {}
    for name, layer in layers.items():
        inputs, outputs = recipe.layer_sizes(layer) or (0, 0)
        outputs = round(outputs * recipe.held_share(layer))
        before = found.get(kind := recipe.layer_name(layer), LayerClass(0, 0, 0, name))
        rows, columns = PADDED.get(kind, (1, 1))
        stored = -(-outputs // rows) * rows * -(-inputs // columns) * columns
        found[kind] = LayerClass(
            before.count + 1,
            before.weights + inputs * outputs,
            before.bytes + layer_bytes(layer),
            before.first,
            before.padding + stored - inputs * outputs,
        )
    return found


def _experts(model: Any) -> Iterator[torch.Tensor]:
    """Yield the matrices of a mixture's experts, which transformers 5 holds in parameters of all experts together.

    A recurrent model has such parameters too (of its state, of mixing two tokens), but no experts.
    """
    for name, module in recipe.text_modules(model).items():
        if recipe.layer_sizes(module) is not None or type(module).__module__.startswith("torch.nn"):
            continue
        if "expert" not in f"{name} {type(module).__name__}".lower():
            continue
        for own, tensor in module.named_parameters(recurse=False):
            if tensor.ndim >= 2 and tensor.is_floating_point() and not re.search("scale|bias|router|gate$", own):
                yield tensor


def _matrix_weights(model: Any, experts: Sequence[torch.Tensor]) -> dict[str, int]:
    """Count the weights of linear layers, experts and embeddings by their dtype.

    Models keep other parameters in float32 in any case: a recurrent state's decay, a router's correction.
    """
    import torch

    tensors = [getattr(layer, "weight", None) for layer in recipe.linear_layers(model).values()]
    tensors += [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    found: Counter[str] = Counter()
    for tensor in [*tensors, *experts]:
        if tensor is not None and hasattr(tensor, "dtype"):
            found[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return dict(found)


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
    wanted = FLOAT_DTYPES.get(quant)
    if wanted:  # models keep a router or another small layer in float32, by their own code
        high += MOST_LEFT * high
    made = {name: one for name, one in found.layers.items() if not scheme.layers or name in scheme.layers}
    _require_layers(quant, found, made)
    if found.expert_weights and not wanted:
        raise NotRealised(
            f"quant={quant} was asked for, but the experts of this model are not linear layers in this version of "
            f"transformers: {found.expert_weights:,} of its {found.parameters:,} weights stay as they are. "
            "Use quant=none, or a GGUF file of the model with backend=llama_cpp."
        )
    weights = sum(one.weights + one.padding for one in made.values())
    bits = 8 * sum(one.bytes for one in made.values()) / weights if weights else low
    if not low - 0.01 <= bits <= high + 0.01:
        raise NotRealised(
            f"quant={quant} was asked for, but the linear layers hold {bits:.2f} bits per weight, "
            f"not {low:g} to {high:g}. Use quant=none for a checkpoint that is quantized already."
        )
    others = sum(count for name, count in found.matrix_weights.items() if name != wanted)
    if wanted and others > MOST_LEFT * sum(found.matrix_weights.values()):
        raise NotRealised(
            f"quant={quant} was asked for, but the parameters' dtypes are {found.dtypes}. "
            "Use quant=none for this checkpoint."
        )


def _require_layers(quant: str, found: Inspection, made: Mapping[str, LayerClass]) -> None:
    """Raise NotRealised unless nearly all weights are in layers of the scheme's classes, which are `made`.

    Libraries leave small layers as they are, such as routers, and projections whose size they cannot pack.
    """
    scheme = SCHEMES[quant]
    left = {name: one for name, one in found.layers.items() if name not in made}
    weights, total = (sum(one.weights for one in some.values()) for some in (left, found.layers))
    if total and weights <= MOST_LEFT * total:
        return
    library = scheme.library.name if scheme.library else "the library"
    if not found.layers:
        raise NotRealised(
            f"quant={quant} was asked for, but this model has no linear layers that {library} knows. Use quant=none."
        )
    if "Linear" not in left and not made:
        advice = f"{library} does not change layers of the class {', '.join(left)}: use quant=none, or another scheme"
    elif "group_size" in scheme.settings:  # torchao leaves a layer as it is if the groups do not fit
        advice = "Use a group_size that divides the inputs of every layer"
    elif made:
        advice = f"{library} left {next(iter(left.values())).first} and others as they are: use quant=none"
    else:
        advice = "Use quant=none for a checkpoint that is quantized already"
    raise NotRealised(
        f"quant={quant} was asked for, but the linear layers are {found.linear_classes}, and {weights / total:.0%} of "
        f"their weights are not quantized by it. {advice}."
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
