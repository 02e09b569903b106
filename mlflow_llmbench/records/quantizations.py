"""Quantization schemes, each declared once: bits, bytes, colour, library, needs, recipe, and the layers it results in.

To add a scheme of a known library, add it to `SCHEMES`. To add a library, add it to `LIBRARIES` too, and its extra to
pyproject.toml. A library that makes checkpoints before the load also gets a module in `backends.huggingface`, which
`Scheme.maker` names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .installation import of_extra, pip_install

Recipe = Mapping[str, Any]
"""Data that a library is given to quantize. `backends.huggingface.recipe` describes the forms that the load reads.

A text such as `$group_size` stands for a setting: a parameter of the cell, `$dtype` (dtype of the computation) or
`$layers` (scheme → names of layers, of a mixed quantization).
"""

ESTIMATED_GROUP = 128
"""Group size that estimates assume: the default of `group_size`."""


@dataclass(frozen=True)
class Library:
    """A library that quantizes, or with which transformers loads checkpoints that are quantized already.

    - `method`: transformers' `quant_method`
    - `packages`: names of the distributions
    - `extra`: our extra that installs them; empty: they need none. `remark`: words after the command that installs them
    - `gives`: features besides its schemes
    - `ready`: packages with which transformers loads a checkpoint that is quantized already
    - `packed`: such a checkpoint takes as much memory as its files
    - `compiler`: why it needs a C++ compiler; empty if it needs none
    """

    name: str
    method: str
    packages: tuple[str, ...]
    extra: str = ""
    remark: str = ""
    gives: str = ""
    ready: tuple[str, ...] = ()
    packed: bool = False
    compiler: str = ""

    @property
    def install(self) -> str:
        """The command that installs its packages."""
        return pip_install(*(of_extra(self.extra, *self.packages) if self.extra else self.packages)) + self.remark


@dataclass(frozen=True)
class Storage:
    """Stored bytes of quantized weights.

    `bits`: of a weight as packed · `group_bits`: of the scale and zero point of a group of weights · `group`: weights
    in a group, if it is fixed · `row_bytes`: of the scale of an output row · `everything`: embeddings, head and norms
    are included, else linear layers only.
    """

    bits: float
    group_bits: float = 0
    group: int | None = None
    row_bytes: int = 0
    everything: bool = False

    def bytes_per_weight(self, group_size: int = ESTIMATED_GROUP) -> float:
        """Bytes of a weight with its share of the group's scale and zero point."""
        return self.bits / 8 + self.group_bits / 8 / (self.group or group_size)


@dataclass(frozen=True)
class Loading:
    """Memory that a load takes at its peak besides the weights that stay, on a CPU.

    `layer_bytes`: temporary tensors per weight of the layer that is being quantized. Layers are quantized one after
    another and freed memory is returned meanwhile (`recipe.releasing_memory`), so the largest layer counts ·
    `unquantized_first`: the whole checkpoint is loaded before the first layer is quantized. That takes memory where it
    is cast to the dtype of the computation; else it stays in the files' mapping, which the kernel can drop.
    """

    layer_bytes: float = 0
    unquantized_first: bool = False


PADDED: Mapping[str, tuple[int, int]] = {"Linear(Int4TilePackedTo4dTensor)": (8, 1024)}
"""Class of a linear layer → the multiples to which its stored weights are padded: outputs and inputs."""


@dataclass(frozen=True)
class Scheme:
    """A value of `quant`.

    - `bits`: of a weight, without scales; None if the checkpoint or a plan decides
    - `note`: words in the help of `quant`; `definition`: text for the documentation
    - `library`: the one that quantizes; None if nothing is quantized
    - `backend`: the one that makes and runs it
    - `dtype`: of all parameters, if the scheme converts them
    - `storage`: None if no formula holds
    - `loading`: memory of the load, measured by benchmarks/loading_peak.py
    - `layers`: possible classes of its linear layers after the load; empty for any
    - `held_bits`: lowest and highest stored bits per weight after the load; groups may be as small as 16
    - `maker`: module of `backends.huggingface` that calibrates it before the load
    - `makes_files`: a checkpoint or file is made before the load, and loaded as it is
    - `group_sizes`: those that have a kernel; empty for any
    - `capability`: least compute capability of a GPU, without which it cannot run; `instead`: what to use then
    - `runs_on_cpu`: it needs no GPU, so `capability` counts only where it runs on one
    - `engines`: other servers that can make it while loading → their word for it
    """

    name: str
    colour: str
    bits: int | None = None
    note: str = ""
    definition: str = ""
    library: Library | None = None
    backend: str = "transformers"
    dtype: str | None = None
    storage: Storage | None = None
    loading: Loading = Loading()
    layers: tuple[str, ...] = ()
    held_bits: tuple[float, float] | None = None
    recipe: Recipe = field(default_factory=dict, hash=False)
    maker: str = ""
    makes_files: bool = False
    group_sizes: tuple[int, ...] = ()
    capability: tuple[int, int] | None = None
    runs_on_cpu: bool = True
    instead: str = ""
    engines: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the settings in its recipe."""
        texts = (value for value in _values(self.recipe) if isinstance(value, str))
        return tuple(dict.fromkeys(text[1:] for text in texts if text[:1] == "$"))

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages that make it, besides torch and transformers."""
        return self.library.packages if self.library else ()

    @property
    def made_while_loading(self) -> bool:
        """True if transformers or the library quantizes all layers by the recipe while the checkpoint is loaded."""
        return self.library is not None and not self.maker and not self.makes_files


def resolve(recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe as plain JSON data, with the values of its settings. One that is False is left out.

    Raises KeyError for a setting without a value.
    """
    found: dict[str, Any] = {}
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            found[name] = resolve(value, settings)
        elif isinstance(value, str) and value[:1] == "$":
            if (given := settings[value[1:]]) is not False:
                found[name] = given
        else:
            found[name] = value
    return found


def _values(recipe: Recipe) -> Iterator[Any]:
    for value in recipe.values():
        if isinstance(value, Mapping):
            yield from _values(value)
        else:
            yield value


BITSANDBYTES = Library("bitsandbytes", "bitsandbytes", ("bitsandbytes",), ready=("bitsandbytes",), packed=True)
GPTQ = Library(
    "GPTQ", "gptq", ("optimum", "gptqmodel"), "gptq", gives="checkpoints quantized with GPTQ or AWQ",
    ready=("optimum", "gptqmodel"), packed=True, compiler="GPTQModel builds a part of itself",
)  # fmt: skip
AWQ = Library("AWQ", "awq", ("gptqmodel", "optimum"), "gptq", ready=("gptqmodel",), packed=True)
GGUF = Library(
    "llama.cpp", "gguf", ("llama-cpp-python",), "gguf", " (it compiles llama.cpp: C++ compiler, minutes)",
    gives="backend=llama_cpp: GGUF files as they are",
)  # fmt: skip
TORCHAO = Library("torchao", "torchao", ("torchao",), "torchao", ready=("torchao",), packed=True)
HQQ = Library("HQQ", "hqq", ("hqq",), "hqq", gives="kv_cache=int8")
QUANTO = Library("Quanto", "quanto", ("optimum-quanto",), "quanto", gives="kv_cache=int4 and int2")
COMPRESSED_TENSORS = Library(
    "compressed-tensors", "compressed-tensors", ("compressed-tensors",), "compressed-tensors",
    gives="checkpoints in the format compressed-tensors", ready=("compressed-tensors",),
)  # fmt: skip
LIBRARIES = (BITSANDBYTES, GPTQ, AWQ, GGUF, TORCHAO, HQQ, QUANTO, COMPRESSED_TENSORS)

LIBRARY_PACKAGES = tuple(dict.fromkeys(package for library in LIBRARIES for package in library.packages))
"""Packages of all libraries."""


def _converted(name: str, dtype: str, bits: int, colour: str) -> Scheme:
    """All parameters in one dtype."""
    return Scheme(
        name, colour, bits, definition=f"all parameters in {dtype}", dtype=dtype, held_bits=(float(bits), float(bits))
    )


def _blocks_of_64(name: str, kind: str, colour: str, engines: Mapping[str, str]) -> Scheme:
    """4 bits of bitsandbytes, with one fp32 maximum per block of 64; estimates assume no double quantization."""
    return Scheme(
        name, colour, 4, "NF4" if kind == "nf4" else "",
        f"{kind.upper()} of bitsandbytes, in blocks of 64; `double_quant=true` quantizes their scales too",
        BITSANDBYTES, storage=Storage(4, 32, 64), loading=Loading(15), layers=("Linear4bit",), held_bits=(4.0, 5.0),
        recipe={
            "class": "BitsAndBytesConfig", "load_in_4bit": True, "bnb_4bit_quant_type": kind,
            "bnb_4bit_compute_dtype": "$dtype", "bnb_4bit_use_double_quant": "$double_quant",
        },
        engines=engines,
    )  # fmt: skip


def _gptq(name: str, bits: int, colour: str, held_bits: tuple[float, float]) -> Scheme:
    """Checkpoint with a 16-bit scale and a zero point of `bits` bits per group."""
    return Scheme(
        name, colour, bits, "4 bits" if name == "gptq" else "",
        f"{bits} bits in groups of `group_size`, calibrated on the workload's prompts",
        GPTQ, storage=Storage(bits, 16 + bits), held_bits=held_bits, maker="gptq", makes_files=True,
        recipe={"bits": bits, "group_size": "$group_size", "desc_act": False, "sym": True},
    )  # fmt: skip


def _llama_cpp(name: str, bits: int, stored_bits: float, colour: str) -> Scheme:
    """GGUF file; `stored_bits` is the mean from llama.cpp's own table for a Llama of 8 B (mixtures of types)."""
    return Scheme(
        name, colour, bits, "", f"{name.upper()} of llama.cpp, without an importance matrix", GGUF, "llama_cpp",
        storage=Storage(stored_bits, everything=True), makes_files=True, recipe={"file_type": name.upper()},
    )  # fmt: skip


def _torchao(
    name: str, bits: int, colour: str, definition: str, layers: tuple[str, ...], quant_type: Recipe, **other: Any
) -> Scheme:
    """Scheme of torchao; unless `other` says otherwise, with a scale per output row."""
    rows: dict[str, Any] = {
        "loading": Loading(7),
        "storage": Storage(bits, row_bytes=4),
        "held_bits": (float(bits), bits + 0.6),
    }
    recipe = {"class": "TorchAoConfig", "quant_type": quant_type}
    return Scheme(
        name, colour, bits, "", f"torchao, {definition}", TORCHAO, layers=layers, recipe=recipe, **(rows | other)
    )


def _hqq(name: str, bits: int, colour: str, packed_bits: float | None = None) -> Scheme:
    """Layers of HQQ, with a 16-bit scale and zero point per group; transformers 5 cannot load with its `HqqConfig`."""
    packed = packed_bits or bits
    settings = {
        "class": "hqq.core.quantize.BaseQuantizeConfig",
        "nbits": bits,
        "group_size": "$group_size",
        "axis": 1,
    }
    return Scheme(
        name, colour, bits, "", "half-quadratic quantization in groups of `group_size`, by HQQ's own layers", HQQ,
        storage=Storage(packed, 32), layers=("HQQLinear",),
        loading=Loading(40, unquantized_first=True),  # its optimizer holds ten tensors of float32
        held_bits=(float(bits), round(packed + 2.1, 1)),
        recipe={"linear": {"class": "hqq.core.quantize.HQQLinear", "quant_config": settings}},
    )  # fmt: skip


def _quanto(name: str, bits: int, colour: str, definition: str, storage: Storage, *layers: str) -> Scheme:
    return Scheme(
        name, colour, bits, "", f"optimum-quanto, {definition}", QUANTO, storage=storage, loading=Loading(6),
        layers=tuple(f"QLinear({tensor})" for tensor in layers),
        held_bits=(float(bits), bits + (1.0 if storage.group else 0.6)),
        recipe={"class": "QuantoConfig", "weights": f"int{bits}"},
    )  # fmt: skip


_TABLE = (
    Scheme("none", "#5f6b7a", note="the checkpoint's dtype", definition="the checkpoint as it is"),
    _converted("fp32", "float32", 32, "#1f4e8c"),
    _converted("fp16", "float16", 16, "#2e86c1"),
    _converted("bf16", "bfloat16", 16, "#17a2a2"),
    Scheme(
        "int8", "#e08e0b", 8, "",
        "LLM.int8 of bitsandbytes, per row; activations beyond `int8_threshold` in 16 bits, none with 0", BITSANDBYTES,
        storage=Storage(8, row_bytes=4), loading=Loading(10), layers=("Linear8bitLt",), held_bits=(8.0, 8.6),
        recipe={"class": "BitsAndBytesConfig", "load_in_8bit": True, "llm_int8_threshold": "$int8_threshold"},
        engines={"tgi": "bitsandbytes"},
    ),
    _blocks_of_64("int4", "nf4", "#c0392b", {"tgi": "bitsandbytes-nf4", "sglang": "bitsandbytes"}),
    _blocks_of_64("fp4", "fp4", "#8e44ad", {"tgi": "bitsandbytes-fp4"}),
    _gptq("gptq", 4, "#2e8b57", (4.0, 5.5)),
    _gptq("gptq3", 3, "#7a9a01", (3.0, 4.5)),
    _gptq("gptq8", 8, "#5d8aa8", (8.0, 9.5)),
    _llama_cpp("q8_0", 8, 8.5, "#b9770e"),
    _llama_cpp("q6_k", 6, 6.56, "#a0522d"),
    _llama_cpp("q5_k_m", 5, 5.70, "#b03a6b"),
    _llama_cpp("q4_k_m", 4, 4.89, "#6c3483"),
    _llama_cpp("q4_0", 4, 4.66, "#a569bd"),
    _llama_cpp("q3_k_m", 3, 4.00, "#34495e"),
    _llama_cpp("q2_k", 2, 3.16, "#1b2631"),
    _torchao(
        "int8-wo", 8, "#d4a017", "8-bit weights per row", ("Linear(Int8Tensor)",),
        {"class": "torchao.quantization.Int8WeightOnlyConfig"},
    ),
    _torchao(
        "int4-wo", 4, "#e74c7a",
        "4-bit weights in groups of `group_size`, products in bf16; on a CPU its kernel is one of torchao's prototypes",
        ("Linear(Int4OpaqueTensor)", "Linear(Int4TilePackedTo4dTensor)"),
        {"by_device": {  # the layout of the device's own kernel
            "cuda": {
                "class": "torchao.quantization.Int4WeightOnlyConfig",
                "group_size": "$group_size", "int4_packing_format": "tile_packed_to_4d",
            },
            "cpu": {
                "class": "torchao.prototype.quantization.int4.PrototypeInt4WeightOnlyConfig",
                "group_size": "$group_size",
            },
        }},
        storage=Storage(4, 32), held_bits=(4.0, 6.1), group_sizes=(32, 64, 128),
        capability=(8, 0), instead="int4 or hqq4",  # on a GPU; its kernel computes in bfloat16
    ),
    _torchao(
        "int8-dq", 8, "#a04000", "8-bit weights per row, and 8-bit activations, scaled per token as they come",
        ("Linear(Int8Tensor, dynamic)",), {"class": "torchao.quantization.Int8DynamicActivationInt8WeightConfig"},
    ),
    _torchao(  # Ada and Hopper are the oldest GPUs that multiply 8-bit floats: torchao's own requirement
        "fp8", 8, "#6a5acd", "8-bit floats, weights and activations per row", ("Linear(Float8Tensor, dynamic)",),
        {
            "class": "torchao.quantization.Float8DynamicActivationFloat8WeightConfig",
            "granularity": {"class": "torchao.quantization.PerRow"},
        },
        capability=(8, 9), runs_on_cpu=False, instead="int8-wo or int8-dq",
    ),
    _hqq("hqq8", 8, "#117a65"),
    _hqq("hqq4", 4, "#48a999"),
    _hqq("hqq3", 3, "#7fb3a6", 3.2),  # ten weights in 32 bits
    _hqq("hqq2", 2, "#a3c9bf"),
    _quanto(
        "quanto8", 8, "#7b5544", "per row", Storage(8, row_bytes=4), "WeightQBytesTensor", "MarlinF8QBytesTensor"
    ),
    _quanto(
        "quanto4", 4, "#a0826d", "in its own groups of 128", Storage(4, 32, 128), "WeightQBitsTensor",
        "TinyGemmWeightQBitsTensor", "AWQWeightQBitsTensor",
    ),
    _quanto("quanto2", 2, "#c8b09a", "in its own groups of 128", Storage(2, 32, 128), "WeightQBitsTensor"),
    Scheme(
        "mixed", "#b5476b", None, "chosen per block",
        "int8, int4 or 16 bits for each block, chosen for `quant_budget` by measured cost", BITSANDBYTES, maker="mixed",
        recipe={"class": "mixed", "layers": "$layers", "llm_int8_threshold": 6.0},
    ),
)  # fmt: skip

SCHEMES: Mapping[str, Scheme] = MappingProxyType({scheme.name: scheme for scheme in _TABLE})
"""Every scheme by name, in the order of charts."""

QUANTIZATIONS = tuple(sorted(SCHEMES, key=lambda name: SCHEMES[name].library is GGUF))
"""Values of `quant`, those of llama.cpp last."""

COLOURS = {scheme.name: scheme.colour for scheme in _TABLE}
"""One colour per scheme, in MLflow (`mlflow.runColor`) and in our charts."""

CALIBRATED = tuple(name for name in QUANTIZATIONS if SCHEMES[name].maker)
"""Schemes that depend on the seed and the workload, whose prompts calibrate them."""

FLOAT_DTYPES = {scheme.name: scheme.dtype for scheme in _TABLE if scheme.dtype}
"""Scheme that only converts → dtype of all parameters."""

UNPACKED: Recipe = MappingProxyType({"class": "GgufConfig", "dequantize": True})
"""Recipe of a scheme that only converts, if the checkpoint is a GGUF file."""

MIXED = "mixed"

GGUF_CACHES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
KV_CACHES = ("fp8", "int8", "int4", "int2", *GGUF_CACHES)
"""KV cache types of transformers, then those of llama.cpp."""


def schemes_of(backend: str) -> tuple[str, ...]:
    """Return the schemes that only this backend makes and runs."""
    return tuple(name for name in QUANTIZATIONS if SCHEMES[name].backend == backend)


def schemes_with(setting: str) -> tuple[str, ...]:
    """Return the schemes with a setting in their recipe: a parameter such as `group_size`."""
    return tuple(name for name in QUANTIZATIONS if setting in SCHEMES[name].settings)


def library_of_method(method: object) -> Library | None:
    """Return the library of transformers' `quant_method`; None for one that is not known."""
    return next((library for library in LIBRARIES if library.method == method), None)


def quantizing_packages(quant: str, backend: str, method: object) -> tuple[str, ...]:
    """Return the packages that quantize a scheme, or that read a checkpoint of a method (fact `quant.method`).

    A method that is of no library of ours is the name of its package, such as `nncf`, or of none.
    """
    scheme = SCHEMES.get(quant)
    library = scheme.library if scheme and scheme.library and scheme.backend == backend else library_of_method(method)
    return library.packages if library else (str(method),)


def install_command(package: str) -> str:
    """Return the command that installs a package of a library, or any other package."""
    return next((library.install for library in LIBRARIES if package in library.packages), pip_install(package))


def listed() -> str:
    """Return all schemes by library, as in the help of `quant`: `none (…), fp32; bitsandbytes: int8, …`."""
    groups: dict[str, list[str]] = {}
    for scheme in (SCHEMES[name] for name in QUANTIZATIONS):
        library = scheme.library.name if scheme.library else ""
        groups.setdefault(library, []).append(f"{scheme.name} ({scheme.note})" if scheme.note else scheme.name)
    return "; ".join(
        f"{library}: {', '.join(names)}" if library else ", ".join(names) for library, names in groups.items()
    )
