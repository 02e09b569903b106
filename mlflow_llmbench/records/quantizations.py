"""Names of quantizations, of weights and of the KV cache, by the library that makes them."""

from __future__ import annotations

PACKAGES = {
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel", "optimum"),
    "torchao": ("torchao",),
    "hqq": ("hqq",),
    "quanto": ("optimum-quanto",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
}
"""Quantization method → packages with which transformers loads it, or makes it while loading."""

COLOURS = {
    "none": "#5f6b7a",
    "fp32": "#1f4e8c",
    "fp16": "#2e86c1",
    "bf16": "#17a2a2",
    "int8": "#e08e0b",
    "int4": "#c0392b",
    "fp4": "#8e44ad",
    "gptq": "#2e8b57",
    "gptq3": "#7a9a01",
    "gptq8": "#5d8aa8",
    "q8_0": "#b9770e",
    "q6_k": "#a0522d",
    "q5_k_m": "#b03a6b",
    "q4_k_m": "#6c3483",
    "q4_0": "#a569bd",
    "q3_k_m": "#34495e",
    "q2_k": "#1b2631",
    "int8-wo": "#d4a017",
    "int4-wo": "#e74c7a",
    "int8-dq": "#a04000",
    "fp8": "#6a5acd",
    "hqq8": "#117a65",
    "hqq4": "#48a999",
    "hqq3": "#7fb3a6",
    "hqq2": "#a3c9bf",
    "quanto8": "#7b5544",
    "quanto4": "#a0826d",
    "quanto2": "#c8b09a",
    "mixed": "#b5476b",
}
"""One colour per quantization, in MLflow (`mlflow.runColor`) and in our charts."""

BITSANDBYTES = ("int8", "int4", "fp4")
GPTQ_BITS = {"gptq": 4, "gptq3": 3, "gptq8": 8}
GGUF_QUANTIZATIONS = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
"""Quantizations that llama.cpp makes and runs."""

TORCHAO = ("int8-wo", "int4-wo", "int8-dq", "fp8")
HQQ_BITS = {"hqq8": 8, "hqq4": 4, "hqq3": 3, "hqq2": 2}
GROUPED = (*GPTQ_BITS, "int4-wo", *HQQ_BITS)
"""Quantizations whose weights share scales in groups of `group_size`."""

QUANTO_BITS = {"quanto8": 8, "quanto4": 4, "quanto2": 2}
MIXED = "mixed"

MADE = (*BITSANDBYTES, *GPTQ_BITS, *TORCHAO, *HQQ_BITS, *QUANTO_BITS, MIXED, *GGUF_QUANTIZATIONS)
"""Quantizations made from a checkpoint that is not quantized yet."""

QUANTIZATIONS = ("none", "fp32", "fp16", "bf16", *MADE)

GGUF_CACHES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
KV_CACHES = ("fp8", "int8", "int4", "int2", *GGUF_CACHES)
"""KV cache types of transformers, then those of llama.cpp."""
