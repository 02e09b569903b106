"""Load a checkpoint with transformers, quantize it by a recipe, and name what its linear layers have become.

A recipe is plain JSON data: the `recipe` of a scheme, with the values of its settings.

- `{}`: the checkpoint is loaded as it is.
- `{"class": NAME, …}`: an object that transformers gets as its quantization config. NAME is a class of transformers, or
  a dotted path; the other keys are its arguments, which can be objects of the same form.
- `{"linear": {"class": NAME, …}}`: each linear layer but the output head is replaced by such an object. It gets the
  layer first, then `compute_dtype` and `device`.
- `{"class": "mixed", "layers": {"int8": […], "int4": […]}, "llm_int8_threshold": 6.0}`: the named layers are replaced.
- `{"by_device": {"cuda": …, "cpu": …}}` in any place: the value for the device of the load.

The backend and registered versions load with this module. A version holds a copy of its text
(`tracking.registry.serving_code`), so it imports nothing of mlflow_llmbench.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

RELEASE_S = 0.02
"""Least seconds between two releases of freed memory during a load."""

MOST_NAMES = 3
"""Tensors that an error names."""

GPTQ_WEIGHTS = ("weight", "qweight", "qzeros", "scales")
"""Tensors without which a GPTQ or AWQ layer is not its checkpoint's; its other buffers can be made when it is built."""

KEPT_BESIDE = ("k_scale", "v_scale", "q_scale", "prob_scale", "input_scale", "output_scale")
"""Scales of caches and activations, which a model that computes without them can leave unread."""


class IncompleteCheckpoint(ValueError):
    """The files do not hold exactly the weights of the model. The message names tensors."""


def load(location: str, recipe: Mapping[str, Any], *, device: str, dtype: str, **named: Any) -> tuple[Any, Any]:
    """Return the model of a checkpoint, quantized by a recipe, and transformers' report of the load.

    `dtype` is torch's name or `auto`; `named` are further arguments of `from_pretrained`. Raises IncompleteCheckpoint
    if a weight of the model is not in the files, or has another shape there: transformers would draw it at random.
    """
    import torch

    recipe = _of_today(recipe)
    layers = recipe.get("layers")
    if "class" in recipe and layers is None:
        named["quantization_config"] = made(recipe, device)
    # Layers of a mixed model are quantized on their way to the device, which never holds all of it unquantized.
    place = device if layers is None else "cpu"
    asked = dtype if dtype == "auto" else getattr(torch, dtype)
    with releasing_memory():
        # Ranks have their own devices, and a model that is laid out has several.
        placed = {} if named.keys() & {"distributed_config", "device_map"} else {"device_map": {"": place}}
        model, report = load_complete(location, dtype=asked, **placed, **named)
        if "linear" in recipe:
            _replace_linear(model, recipe["linear"], asked)
        if layers is not None:
            replace_layers(model, layers, recipe["llm_int8_threshold"], device)
            model.to(device)
    return model.eval(), report


@contextlib.contextmanager
def releasing_memory() -> Iterator[None]:
    """Return freed memory to the system all the time while the block runs, where the C library can (glibc).

    Libraries quantize layer by layer, with temporary tensors that they free. Weights that stay are allocated between
    them, so that glibc keeps the freed memory and takes new memory for the next layer: for OPT-1.3B in NF4 5 GB, six
    times its weights. Nothing of the model depends on this.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        trim = None
    if trim is None:
        yield
        return
    done = threading.Event()

    def release() -> None:
        pause = RELEASE_S
        while not done.wait(pause):
            begun = time.monotonic()
            trim(0)
            pause = max(RELEASE_S, 4 * (time.monotonic() - begun))  # at most a fifth of a core

    thread = threading.Thread(target=release, name="release-memory", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        trim(0)


def load_complete(location: str, **named: Any) -> tuple[Any, Any]:
    """Return the model of a checkpoint, and transformers' report of the load. `named`: arguments of `from_pretrained`.

    Raises IncompleteCheckpoint.
    """
    with _conversions():
        loaded: Any = auto_class(location, named).from_pretrained(
            location,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report names them
            **named,
        )
    model, report = loaded
    require_complete(model, report)
    return model, report


def auto_class(location: str, named: Mapping[str, Any]) -> Any:
    """Return the class of transformers that loads a checkpoint to generate text, as `class_of` does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if "gguf_file" in named:
        return AutoModelForCausalLM
    about = {name: value for name, value in named.items() if name in ("revision", "trust_remote_code")}
    return class_of(
        AutoConfig.from_pretrained(location, local_files_only=named.get("local_files_only", False), **about)
    )


def class_of(config: Any) -> Any:
    """Return `AutoModelForCausalLM`, or the class of models that also see, if the text part has no class of its own.

    Such a model is loaded whole, and given texts only.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    own, both = (cls._model_mapping for cls in (AutoModelForCausalLM, AutoModelForImageTextToText))
    return AutoModelForImageTextToText if type(config) not in own and type(config) in both else AutoModelForCausalLM


@contextlib.contextmanager
def _conversions() -> Iterator[None]:
    """Raise IncompleteCheckpoint if transformers cannot put weights together, such as experts of which one is missing.

    It names them in its log only.
    """
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(handler)
    try:
        yield
    except RuntimeError as error:
        found = re.findall(r"(?m)^(\S+) *\|[^|]*CONVERSION", "\n".join(lines))
        if not found:
            raise
        raise IncompleteCheckpoint(
            f"The files do not hold all parts of {_listed(found)}, so they cannot be put together"
        ) from error
    finally:
        logger.removeHandler(handler)


def require_complete(model: Any, report: Mapping[str, Any]) -> None:
    """Raise IncompleteCheckpoint unless each weight of the model was in the files with its shape, and none was left.

    `report` is transformers' report of the load. A head that is tied to the embedding may be missing.
    """
    missing = [name for name in report["missing_keys"] if not _is_made(model, name)]
    if missing:
        raise IncompleteCheckpoint(f"The files lack {len(missing)} of the model's tensors: {_listed(missing)}")
    shapes = [
        f"{name} (stored {tuple(stored)}, needed {tuple(needed)})" for name, stored, needed in report["mismatched_keys"]
    ]
    if wrong := shapes or [*_wrong_shapes(model)]:
        raise IncompleteCheckpoint(f"The files have {len(wrong)} tensors of another shape: {_listed(wrong)}")
    if unread := [name for name in report["unexpected_keys"] if _belongs(model, name)]:
        raise IncompleteCheckpoint(
            f"The files hold {len(unread)} tensors of the model's layers that its configuration leaves out: "
            f"{_listed(unread)}"
        )


def _listed(names: Iterable[str]) -> str:
    """Name a few tensors, weights first."""
    found = sorted(names, key=lambda name: (not name.partition(" ")[0].endswith("weight"), name))
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    return ", ".join(found[:MOST_NAMES]) + more


def _is_made(model: Any, name: str) -> bool:
    """Return True if a missing tensor is one that the library of the checkpoint's quantization makes itself."""
    config = getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return getattr(method, "value", method) in ("gptq", "awq") and name.rpartition(".")[2] not in GPTQ_WEIGHTS


def _wrong_shapes(model: Any) -> Iterator[str]:
    """Yield quantized layers whose weight has not the shape of the layer, which transformers does not compare."""
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if not hasattr(module, "out_features") or not hasattr(weight, "shape"):
            continue
        state = getattr(weight, "quant_state", None)
        if state is None and type(weight).__name__ != "Int8Params" and not hasattr(weight, "__tensor_flatten__"):
            continue
        stored, needed = (
            tuple((weight if state is None else state).shape),
            (int(module.out_features), int(module.in_features)),
        )
        if stored != needed:
            yield f"{name}.weight (stored {stored}, needed {needed})"


def _belongs(model: Any, name: str) -> bool:
    """Return True if a tensor that was not read belongs to a layer of the model: its bias, its scale, or a layer more.

    Buffers of earlier versions (masks, rotary frequencies), other heads and towers do not.
    """
    modules = dict(model.named_modules())
    path, _, own = name.rpartition(".")
    holder = modules.get(path)
    if holder is not None and next(holder.parameters(recurse=False), None) is not None:
        scales = "scale" in own and own not in KEPT_BESIDE and getattr(model, "hf_quantizer", None) is None
        return own in ("weight", "bias") or scales
    if (numbered := re.match(r"(.*?)\.(\d+)\.", name)) is None:
        return False
    layers = modules.get(numbered[1])
    return layers is not None and type(layers).__name__ == "ModuleList" and int(numbered[2]) >= len(layers)


def made(value: Any, device: str, /, *first: Any, **more: Any) -> Any:
    """Return the object that a part of a recipe describes, made with further arguments; plain values stay the same."""
    if not isinstance(value, Mapping):
        return value
    if choices := value.get("by_device"):
        return made(choices.get(device.partition(":")[0], choices["cpu"]), device, *first, **more)
    arguments = {name: made(inner, device) for name, inner in value.items() if name != "class"}
    module, _, name = value["class"].rpartition(".")
    return getattr(importlib.import_module(module or "transformers"), name)(*first, **arguments, **more)


def _of_today(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a recipe in today's form, also if its version was registered before recipes were stored."""
    form, group_size = recipe.get("class"), recipe.get("group_size")
    if form == "hqq":
        settings = {"nbits": recipe["bits"], "group_size": group_size, "axis": 1}
        quant_config = {"class": "hqq.core.quantize.BaseQuantizeConfig", **settings}
        return {"linear": {"class": "hqq.core.quantize.HQQLinear", "quant_config": quant_config}}
    if form != "TorchAoConfig" or "scheme" not in recipe:
        return recipe
    torchao, prototype = "torchao.quantization", "torchao.prototype.quantization.int4.PrototypeInt4WeightOnlyConfig"
    tiles = {"group_size": group_size, "int4_packing_format": "tile_packed_to_4d"}
    kinds: dict[str, dict[str, Any]] = {  # all that there were; a new scheme does not belong here
        "int8-wo": {"class": f"{torchao}.Int8WeightOnlyConfig"},
        "int8-dq": {"class": f"{torchao}.Int8DynamicActivationInt8WeightConfig"},
        "fp8": {
            "class": f"{torchao}.Float8DynamicActivationFloat8WeightConfig",
            "granularity": {"class": f"{torchao}.PerRow"},
        },
        "int4-wo": {
            "by_device": {
                "cuda": {"class": f"{torchao}.Int4WeightOnlyConfig", **tiles},
                "cpu": {"class": prototype, "group_size": group_size},
            }
        },
    }
    return {"class": form, "quant_type": kinds[recipe["scheme"]]}


def _replace_linear(model: Any, recipe: Mapping[str, Any], compute_dtype: Any) -> None:
    import torch

    head = model.get_output_embeddings()
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            device = str(layer.weight.device)
            model.set_submodule(name, made(recipe, device, layer, compute_dtype=compute_dtype, device=device))


def replace_layers(model: Any, layers: Mapping[str, Sequence[str]], threshold: float, device: str) -> None:
    """Replace linear layers (scheme → names) by quantized ones on the device."""
    for scheme, names in layers.items():
        for name in names:
            model.set_submodule(name, quantized(model.get_submodule(name), scheme, device, threshold))


def quantized(linear: Any, scheme: str, device: str, threshold: float) -> Any:
    """Quantize a linear layer with bitsandbytes as transformers does: LLM.int8 (int8) or NF4 in blocks of 64 (int4)."""
    import bitsandbytes
    import torch

    nn: Any = bitsandbytes.nn
    sizes, biased = layer_sizes(linear), linear.bias is not None
    assert sizes is not None
    weight = linear.weight.data.to("cpu")
    if is_conv1d(linear):
        weight = weight.T.contiguous()
    form: dict[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
    with torch.device("meta"):
        new: Any = (
            nn.Linear8bitLt(*sizes, biased, has_fp16_weights=False, threshold=threshold)
            if scheme == "int8"
            else nn.Linear4bit(*sizes, biased, compute_dtype=weight.dtype, **form)
        )
    if scheme == "int8":
        new.weight = nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        new.weight = nn.Params4bit(weight, requires_grad=False, module=new, **form).to(device)
    new.bias = None if linear.bias is None else torch.nn.Parameter(linear.bias.data.to(device), requires_grad=False)
    return new.requires_grad_(False).eval()


OTHER_SENSES = re.compile(r"(^|[._])(vision|visual|image|audio|speech)")
"""Names of modules that a text never passes: towers of other modalities, and their projections."""


def text_modules(model: Any) -> dict[str, Any]:
    """Return the modules that a text passes, by name: all, or the language model's of one that also sees or hears."""
    modules = dict(model.named_modules())
    composed = model.config.get_text_config(decoder=True) is not model.config
    decoder = model.get_decoder() if composed and hasattr(model, "get_decoder") else model
    if decoder is not model and decoder is not model.base_model:
        inside = {id(module) for module in decoder.modules()} | {id(model.get_output_embeddings())}
        return {name: module for name, module in modules.items() if id(module) in inside}
    return {name: module for name, module in modules.items() if not OTHER_SENSES.search(name)}


def layer_sizes(layer: Any) -> tuple[int, int] | None:
    """Return the numbers of inputs and outputs of a linear layer, which computes x·W + b; None for other modules.

    GPT-2 and its kind hold W the other way round, in transformers' `Conv1D`.
    """
    if next(layer.children(), None) is not None:
        return None
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(layer.in_features), int(layer.out_features)
    return (int(layer.nx), int(layer.nf)) if is_conv1d(layer) else None


def is_conv1d(layer: Any) -> bool:
    """Return True for transformers' `Conv1D`, a linear layer that holds W in the shape (inputs, outputs)."""
    return type(layer).__name__ == "Conv1D"


def linear_layers(model: Any) -> dict[str, Any]:
    """Return the linear layers that a text passes, by name, without the output head."""
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in text_modules(model).items()
        if layer is not head and layer_sizes(layer) is not None
    }


def layer_name(layer: Any) -> str:
    """Return a layer's class name, with that of its weight if it is a tensor subclass, which has another kernel."""
    weight = getattr(layer, "weight", None)
    if not hasattr(weight, "__tensor_flatten__") or is_sharded(weight):
        return type(layer).__name__
    # With act_quant_kwargs, activations are quantized too.
    dynamic = ", dynamic" if getattr(weight, "act_quant_kwargs", None) is not None else ""
    return f"{type(layer).__name__}({type(weight).__name__}{dynamic})"


def is_sharded(tensor: Any) -> bool:
    """Return True for a tensor of which each rank holds a part: torch's `DTensor`."""
    return type(tensor).__name__ == "DTensor"


def local(tensor: Any) -> Any:
    """Return the part of a tensor that this process holds: all of it, unless it is sharded."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


def held_share(layer: Any) -> float:
    """Return the share of a linear layer's weights that this process holds: 1, unless it is sharded over ranks."""
    weight: Any = getattr(layer, "weight", None)
    return local(weight).numel() / weight.numel() if is_sharded(weight) else 1.0


def kernel(classes: Mapping[str, int]) -> str:
    """Return classes of layers with their counts as text: `Linear8bitLt × 14`."""
    return ", ".join(f"{name} × {count}" for name, count in sorted(classes.items()))


def layer_classes(model: Any) -> dict[str, int]:
    """Return the classes of all linear layers but the output head, with their counts."""
    return dict(Counter(map(layer_name, linear_layers(model).values())))
