"""Estimates of a cell's memory and time before anything is loaded, and the reasons to refuse a cell unmeasured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..analysis.order import repetitions_to_judge
from ..config import model_shape, pruning
from ..records.backends import capabilities_of
from ..records.cell import SPECULATIVE, Cell, as_text
from ..records.metric import GB
from ..records.quantizations import FLOAT_DTYPES, MIXED
from ..records.results import ModelFacts
from ..records.text import short_number_text
from ..workloads.arrivals import request_count
from ..workloads.prompts import longest_of
from . import gpu, machine, memory

AvailableMemory = tuple[int | None, str]
"""Bytes that a cell may need, None if unknown, and the words that follow them in a message: "are free here"."""


ON_GPU = "are free on the GPU"
"""These words for a GPU."""


@dataclass(frozen=True)
class Refusal:
    """The reason why a cell is not measured, as a sentence for people.

    Its kind: the cell is longer than the model's `context`, its `settings` contradict each other, its `memory` need is
    larger than what is available, or a `package` is not installed.
    """

    kind: Literal["context", "settings", "memory", "package"]
    sentence: str


SPARE = 0.05
"""Share of the machine's memory that an automatic limit keeps free, since swapping starts before the last page."""


def memory_limit(asked: int | None) -> tuple[int | None, str]:
    """Host memory in bytes that a worker may need now, and the name of the limit.

    None if the system does not report free memory.
    """
    if asked is not None:
        return asked, "memory_limit"
    free, total = memory.available_bytes(), memory.total_bytes()
    return (
        None if free is None else int(free - SPARE * (total or free)),
        "memory_limit=auto (what was free, less a twentieth of the machine's memory)",
    )


def _weight_bytes(cell: Cell, model: ModelFacts, shape: model_shape.Shape, dtype: str) -> int:
    """Bytes of the loaded weights: those of the files if these run as they are, else by formula."""
    if _runs_packed(cell, model):
        return model.files_bytes or 0
    return shape.weight_bytes(_quant_loaded(cell), dtype)


def _quant_loaded(cell: Cell) -> str:
    """Quantization for the formulas: `none` for a mixed one, since the whole checkpoint is loaded first."""
    return "none" if cell.quant == MIXED else cell.quant


def predicted_bytes(cell: Cell, model: ModelFacts, shape: model_shape.Shape | None) -> int | None:
    """Estimated peak bytes of a cell, the larger of loading and generating; None if the architecture is unknown."""
    if shape is None:
        dtype = FLOAT_DTYPES.get(cell.quant) if model.source in ("gguf", "hub_gguf") else None
        unpacked = 2 * model_shape.VALUE_BYTES[dtype] if dtype else 1
        return None if model.files_bytes is None else model.files_bytes * unpacked
    dtype, prompt = stored_dtype(model), longest_of(cell)[0] or 512
    peak = _weight_bytes(cell, model, shape, dtype) + sum(besides_weights(cell, model, shape))
    peak += model_shape.PROCESS_BYTES + _more_ranks_bytes(cell, model, shape, dtype, prompt)
    return max(peak, predicted_load_bytes(cell, model, shape) or 0)


def besides_weights(cell: Cell, model: ModelFacts, shape: model_shape.Shape) -> tuple[int, int]:
    """Estimated peak bytes of a cell's KV cache, and of logits, activations and what its decode path adds."""
    (prompt, output), quant = longest_of(cell), _quant_loaded(cell)
    prompt = prompt or 512
    cache, rest = model_shape.bytes_besides_weights(
        shape, quant, stored_dtype(model), cell.batch_size, prompt, output, _cache_value_bytes(cell)
    )
    return cache, rest + _decode_overhead_bytes(cell, model, prompt + output)


def stored_dtype(model: ModelFacts) -> str:
    """Return the dtype of a checkpoint for the formulas: bfloat16 unless it is a type of 16 or 32 bits."""
    return model.dtype if model.dtype in ("float32", "float16", "bfloat16") else "bfloat16"


def predicted_load_bytes(cell: Cell, model: ModelFacts, shape: model_shape.Shape | None) -> int | None:
    """Estimated peak bytes of a cell while its model is loaded; None if the architecture is unknown."""
    if shape is None:
        return None
    dtype = stored_dtype(model)
    if _runs_packed(cell, model):
        return model_shape.PROCESS_BYTES + (model.files_bytes or 0)
    own = model_shape.load_memory_estimate(shape, _quant_loaded(cell), dtype)
    return model_shape.PROCESS_BYTES + own + _more_ranks_bytes(cell, model, shape, dtype, 0)


WHOLE_EMBEDDINGS = ("gpt_neox",)
"""Model types whose input embedding is not divided among ranks: transformers knows it as `embed_tokens` only."""


def _more_ranks_bytes(cell: Cell, model: ModelFacts, shape: model_shape.Shape, dtype: str, prompt: int) -> int:
    """Bytes that several ranks need together beyond one: of each other one its process, and what is not divided.

    That are norms and biases, some embeddings, the logits, which each rank gathers, and the activations of a prefill of
    `prompt` tokens, which it holds in part; they count whole.
    """
    value_bytes = model_shape.VALUE_BYTES[FLOAT_DTYPES.get(cell.quant) or dtype]
    whole = shape.other_parameters
    whole += shape.embedding_parameters if (model.config or {}).get("model_type") in WHOLE_EMBEDDINGS else 0
    logits = cell.batch_size * shape.vocab_size * 4 if prompt else 0
    activations = 2 * cell.batch_size * prompt * max(shape.intermediate_size, 3 * shape.hidden_size) * 4
    each = model_shape.PROCESS_BYTES + whole * value_bytes + logits + activations
    return (cell.tensor_parallel - 1) * each


KV_VALUE_BYTES = {
    "fp8": 1.0,
    "int8": 1 + 4 / 64,
    "int4": 0.5 + 4 / 64,
    "int2": 0.25 + 4 / 64,
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
}
"""Bytes of a value in the KV cache. In transformers, groups of 64 share two 16-bit numbers; the newest 128 tokens,
which are not quantized, are ignored. llama.cpp's types are blocks of 32 (ggml-common.h)."""


def _cache_value_bytes(cell: Cell) -> float | None:
    """Bytes of a value in the KV cache; None for the dtype of the computation."""
    return KV_VALUE_BYTES.get(cell.kv_cache or capabilities_of(cell.backend).default_kv_cache)


COMPILER_BYTES = 500_000_000
"""Assumed memory that torch.compile leaves in the process: a guess on the safe side, not measured."""


def _decode_overhead_bytes(cell: Cell, model: ModelFacts, tokens: int) -> int:
    """Bytes that a decode path needs besides the model: the compiler, or the draft model with its own cache.

    A static cache holds all prompt and output tokens from the first step on, as much as a growing one at its end.
    """
    own = COMPILER_BYTES if cell.decode == "compiled" else 0
    small = (
        cell.decode == "assisted" and model.assistant and model_shape.Shape.from_config(model.assistant.config or {})
    )
    if not small or not model.assistant:
        return own
    dtype = stored_dtype(model.assistant)
    quant = cell.quant if cell.quant in FLOAT_DTYPES else "none"
    return own + model_shape.memory_estimate(small, quant, dtype, 1, tokens, 0)


def _runs_packed(cell: Cell, model: ModelFacts) -> bool:
    """Return True if the weights take as much memory as their files.

    That holds for those that the backend keeps quantized. It unpacks the others, for example transformers a GGUF file
    and, in the first call, compressed-tensors, so these are estimated as unquantized.
    """
    if model.files_bytes is None or cell.quant != "none":
        return False
    method = ((model.config or {}).get("quantization_config") or {}).get("quant_method")
    if model.source in ("gguf", "hub_gguf"):
        method = "gguf"
    return method in capabilities_of(cell.backend).kept_quantized


LEAST_WARMUP = 3
"""Minimum of discarded runs with `warmup=auto`."""


def least_seconds(
    cell: Cell, model: ModelFacts, shape: model_shape.Shape | None, peaks: Mapping[str, float]
) -> float | None:
    """Lower bound of the seconds for all runs of a cell, including warm-up, from the machine's measured rates.

    None without these rates or an unknown architecture. A stream of requests takes at least as long as its requests
    take to arrive. Any other run is a prefill and N − 1 steps, each the longer of reading (weights, and for a step the
    KV cache at the mean context) and computing (the roofline of Williams, Waterman & Patterson, CACM 52, 2009).
    Speculative decoding counts as if all proposed tokens were right. Loading, downloads and all overheads come on top.
    """
    if cell.batching and cell.request_rate:
        arrive_s = ((request_count(cell) or 1) - 1) / cell.request_rate
        return cell.processes * _repetitions(cell, arrive_s) * arrive_s
    bandwidth, flops = peaks.get("read_bytes_per_s"), peaks.get("flops_per_s")
    if shape is None or not bandwidth or not flops:
        return None
    devices = cell.tensor_parallel if on_gpus(cell) else 1
    bandwidth, flops = bandwidth * devices, flops * devices
    dtype = stored_dtype(model)
    weights = _weight_bytes(cell, model, shape, dtype)
    rows, prompt = cell.batch_size, cell.prompt_tokens or 512
    context = prompt + cell.output_tokens // 2
    if cell.decode == "compiled":
        context = prompt + cell.output_tokens  # a static cache is read whole
    value_bytes = _cache_value_bytes(cell) or (4 if "float32" in (FLOAT_DTYPES.get(cell.quant), dtype) else 2)
    cache = rows * shape.kv_bytes(context, value_bytes)
    prefill = max(weights / bandwidth, rows * prompt * shape.flops_per_token(prompt // 2) / flops)
    step = max((weights + cache) / bandwidth, rows * shape.flops_per_token(context) / flops)
    steps = cell.output_tokens - 1
    if cell.decode in SPECULATIVE:
        steps = -(-steps // (cell.draft_tokens + 1))
    run_s = prefill + steps * step
    warmups = cell.warmup if cell.warmup is not None else LEAST_WARMUP
    return cell.processes * (warmups + _repetitions(cell, run_s)) * run_s


def on_gpus(cell: Cell) -> bool:
    """Return True if each of several ranks of a cell has a GPU of its own; those on a CPU share the machine."""
    return cell.tensor_parallel > 1 and machine.require_device(cell.device) != "cpu"


def _repetitions(cell: Cell, run_s: float) -> int:
    """Return the least number of repetitions of runs that take `run_s`."""
    return cell.repetitions or min(repetitions_to_judge(run_s), cell.max_repetitions)


def refusal(
    cell: Cell, model: ModelFacts, predicted: int | None, available: AvailableMemory, loading: int | None = None
) -> Refusal | None:
    """Return why a cell cannot be measured, or None.

    `predicted` is its predicted peak in bytes, `loading` that of the load alone, which the message names if it is the
    larger part.
    """
    return impossible(cell, model) or _beyond_memory(cell, predicted, *available, loading)


def impossible(cell: Cell, model: ModelFacts) -> Refusal | None:
    """Return why a cell cannot be measured with its model on any machine, or None."""
    return beyond_context(cell, model) or contradiction(cell) or _not_pruned(cell, model)


def _not_pruned(cell: Cell, model: ModelFacts) -> Refusal | None:
    """Return why a model cannot be pruned as asked, or None. One that can has `pruned` set."""
    if cell.prune is None or model.pruned:
        return None
    own = model.config if model.source not in ("gguf", "hub_gguf") else None
    why = pruning.refusal(cell.model, own, cell.prune)
    return Refusal("settings", why) if why else None


def contradiction(cell: Cell) -> Refusal | None:
    """Return why a cell's settings cannot be measured on any machine, or None."""
    if cell.decode in SPECULATIVE and cell.batch_size > 1:
        return Refusal(
            "settings",
            f"decode={cell.decode} proposes tokens for one row, and batch_size is {cell.batch_size}. "
            "Use batch_size=1, or decode=generate.",
        )
    if cell.kv_cache is not None and cell.decode != "generate":
        return Refusal(
            "settings",
            f"kv_cache={cell.kv_cache} works with decode=generate only: the cache of decode={cell.decode} is not "
            "quantized. Use one of them.",
        )
    return None


def beyond_context(cell: Cell, model: ModelFacts) -> Refusal | None:
    """Return why a cell does not fit its model's context, or None."""
    asked = sum(longest_of(cell))
    if model.context is None or asked <= model.context:
        return None
    if cell.trace:
        prompt, output = longest_of(cell)
        return Refusal(
            "context",
            f"The requests of {cell.trace} have up to {prompt} + {output} tokens, and the context of {cell.model} has "
            f"{model.context}. Leave the longest out.",
        )
    at_most = f" (the medians of workload=mixed, whose longest request has {asked})" if cell.workload == "mixed" else ""
    return Refusal(
        "context",
        f"prompt_tokens={as_text('prompt_tokens', cell.prompt_tokens)} + output_tokens={cell.output_tokens}{at_most} "
        f"is more than the context of {cell.model}, {model.context} tokens. Ask for fewer tokens.",
    )


def available_memory(device: str, limit: int | None) -> AvailableMemory:
    """Return the memory that a cell may need on a device of this machine.

    `limit` in bytes applies to the CPU only. Raises MissingError if there is no such device.
    """
    named = machine.require_device(device)
    if named.startswith("cuda"):
        return gpu.free_bytes(int(device.partition(":")[2] or 0)), ON_GPU
    if named.startswith("xpu"):
        return None, ON_GPU  # there is no reader; an Apple GPU uses the host's memory
    available = memory.available_bytes()
    if limit is not None and (available is None or limit < available):
        return limit, "are allowed by memory_limit"
    return available, "are free here"


def _beyond_memory(
    cell: Cell, predicted: int | None, available: int | None, where: str, loading: int | None
) -> Refusal | None:
    if predicted is None or available is None:
        return None
    ranks = cell.tensor_parallel
    on_each = f" on each of {ranks} GPUs" if ranks > 1 and where == ON_GPU else ""
    size = -(-predicted // ranks) if on_each else predicted
    if size <= available:
        return None
    needed, free = (short_number_text(one / GB) for one in (size, available))
    among = f", tensor_parallel={ranks}" if ranks > 1 else ""
    return Refusal(
        "memory",
        f"{cell.model} with quant={cell.quant}, batch_size={cell.batch_size}{among} needs about {needed} GB{on_each}"
        f"{' while it is loaded' if predicted == loading else ''}, and {free} GB {where}. "
        "Use a smaller model, batch or quantization, or try it all the same with force=true.",
    )
