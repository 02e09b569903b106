"""Words that parameters accept: workloads, arrival processes, decode paths, and the like."""

from __future__ import annotations

from ..records.cell import DRAWN, SPECULATIVE
from ..records.quantizations import KV_CACHES, QUANTIZATIONS

WORKLOADS = (*DRAWN, "qa", "summarization", "creative", "code", "chat", "domain")
HISTORIES = ("none", "recomputed", "kept", "sent")
BATCHINGS = ("static", "dynamic", "continuous")
DECODES = ("generate", "compiled", *SPECULATIVE)
QUALITIES = {"none": "none", "auto": "auto", "true": "auto", "false": "none"}
BUNDLED_TEXT = "bundled"
MIN_TEXT_TOKENS = 512
"""Minimum tokens of a text for perplexity. A file with fewer bytes cannot have them."""

ENDPOINTS = ("completions", "chat", "responses", "embeddings")
LENGTH_FIELDS = ("max_tokens", "max_completion_tokens")
PLACEMENTS = ("single", "auto")
ARRIVALS = ("poisson", "constant", "gamma")
ATTENTIONS = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

GRIDS: dict[str, dict[str, str]] = {
    "quick": {"batch_size": "1,4,16", "prompt_tokens": "64,128,256,512", "output_tokens": "64", "repetitions": "5"},
    "effillm": {
        "quant": "fp32,fp16,int8,int4,gptq",
        "batch_size": "1,2,4,8,16,32,64",
        "prompt_tokens": "128,256,512,1024,2048,4096,8192",
        "output_tokens": "256",
        "repetitions": "10",
    },
}
"""Preset → its parameters. `effillm` is the grid of the EffiLLM paper (axes and method), for any models; `quick` has a
twentieth of its cells, with enough batch sizes and lengths for every law."""

SLOS: dict[str, dict[str, str]] = {
    "llama2-70b": {"slo_ttft_ms": "2000", "slo_tpot_ms": "200"},
    "llama2-70b-interactive": {"slo_ttft_ms": "450", "slo_tpot_ms": "40"},
    "llama3.1-8b": {"slo_ttft_ms": "2000", "slo_tpot_ms": "100"},
    "llama3.1-8b-interactive": {"slo_ttft_ms": "500", "slo_tpot_ms": "30"},
}
"""MLPerf Inference benchmark → its server scenario limits (mlperf.conf), which hold there for 99 % of requests."""

CHOICES: dict[str, tuple[str, ...]] = {
    "weights": ("hub", "random"),
    "quant": tuple(QUANTIZATIONS),
    "preset": tuple(GRIDS),
    "slo": tuple(SLOS),
    "find": ("goodput",),
    "history": HISTORIES,
    "decode": DECODES,
    "kv_cache": KV_CACHES,
    "attention": ATTENTIONS,
    "placement": PLACEMENTS,
    "endpoint": ENDPOINTS,
    "ignore_eos": ("auto", "true", "false"),
    "thinking": ("auto", "off"),
    "max_tokens_field": ("auto", *LENGTH_FIELDS),
    "proxy": ("environment",),
    "arrival": ARRIVALS,
    "batching": BATCHINGS,
}
"""Kind of a parameter that takes one of some words → these words."""
