"""Names of the metrics that servers report about themselves and that are recorded."""

from __future__ import annotations

SERVER_GAUGES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "sglang:num_running_reqs",
    "sglang:num_queue_reqs",
    "tgi_batch_current_size",
    "tgi_queue_size",
    "llamacpp:requests_processing",
    "llamacpp:requests_deferred",
)
"""Server gauges: requests being computed, and requests waiting."""

SERVER_RATIOS = (
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "sglang:token_usage",
    "sglang:cache_hit_rate",
    "llamacpp:kv_cache_usage_ratio",
)
"""Server gauges from 0 to 1, whatever their names say: share of the KV cache in use, prefix cache hit rate."""

SERVER_ACCEPTED_LENGTHS = ("sglang:spec_accept_length",)
"""Server gauges: tokens per step of speculative decoding, with the one that the model itself adds; 0 without it."""

SERVER_ACCEPTANCES = ("sglang:spec_accept_rate",)
"""Server gauges: accepted ÷ proposed tokens of speculative decoding."""

SERVER_COUNTERS = (
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_queries_total",
    "vllm:gpu_prefix_cache_hits_total",
    "sglang:cached_tokens_total",
    "sglang:prompt_tokens_total",
    "llamacpp:prompt_tokens_total",
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "sglang:num_aborted_requests_total",
)
"""Server counters: preempted or aborted requests; tokens looked up and found in the prefix cache (SGLang: of all
prompts; llama.cpp: computed); drafts, proposed and accepted tokens of speculative decoding."""

SERVER_TIMES = ("vllm:request_queue_time_seconds", "sglang:queue_time_seconds", "tgi_request_queue_duration")
"""Server histograms: seconds that requests wait before they are computed."""

PREFIX_CACHES = (
    ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
    ("vllm:gpu_prefix_cache_hits_total", "vllm:gpu_prefix_cache_queries_total"),
    ("sglang:cached_tokens_total", "sglang:prompt_tokens_total"),
)
"""Pairs of server counters: tokens found in the prefix cache, and tokens looked up."""

COMPUTED_PROMPTS = "llamacpp:prompt_tokens_total"
"""Server counter: prompt tokens that were computed, without those that were cached."""

DRAFTS, DRAFT_TOKENS, ACCEPTED_TOKENS = (
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
)
"""Server counters of speculative decoding."""

TEMPLATE_TOKENS = "server.template_tokens"
"""Fact of a load: tokens that a server's template adds to a prompt."""
