"""Metrics of the vocabulary: one table from which keys, tables, docs and report columns are derived.

In code a metric is named `<metric>_<unit>_<statistic>`. MLflow keys add a section, because the MLflow UI makes one
chart section per prefix: `ttft_ms_p50` is logged as `latency/ttft_ms_p50`.

A request is sent at t0; its output tokens arrive at t1 … tN.
"""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("baseline", "loaded", "peak", "steady", "unloaded")
"""The five memory stages, in the order of a worker's life cycle."""

PERCENTILE_SUPPORT = {50: 1, 90: 29, 95: 59, 99: 299}
"""Smallest number of distinct samples that supports a percentile: n with 1 − q^n ≥ 0.95, so that the largest sample
lies above the percentile with 95 % probability (Wilks 1941)."""

LEAST_REPETITIONS = 5
"""Smallest number of timed repetitions for a confidence interval."""

FOREIGN_CPU_LIMIT = 0.10
"""CPUs that others (processes, hypervisor) may use on average over all repetitions: a tenth of one core."""

SPOILED_CPU_LIMIT = 0.25
"""The same limit for one repetition, above which it counts as spoiled. Higher, because a short one meets bursts."""


@dataclass(frozen=True)
class Metric:
    """One metric: section in MLflow, name, definition, unit, statistics, and the better direction."""

    section: str
    name: str
    definition: str
    unit: str = ""
    statistics: tuple[str, ...] = ("",)
    better: str = ""  # "lower", "higher", or "" for neither
    label: str = ""  # column heading of a table; empty = not in tables
    scale: float = 1.0  # table value = stored value × scale

    def mlflow_keys(self) -> list[str]:
        """MLflow keys, one per statistic."""
        return [f"{self.section}/{self.name}{'_' + s if s else ''}" for s in self.statistics]


FAILURES = ("truncated", "server_error", "timeout", "refused", "malformed")
"""Outcomes of a request to a server other than `complete`."""

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

SERVER_COUNTERS = (
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_queries_total",
    "vllm:gpu_prefix_cache_hits_total",
    "sglang:cached_tokens_total",
    "sglang:num_aborted_requests_total",
)
"""Server counters: preempted or aborted requests, and tokens looked up and found in the prefix cache."""

SERVER_TIMES = ("vllm:request_queue_time_seconds", "sglang:queue_time_seconds", "tgi_request_queue_duration")
"""Server histograms: seconds that requests wait before they are computed."""

PREFIX_CACHES = (
    ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
    ("vllm:gpu_prefix_cache_hits_total", "vllm:gpu_prefix_cache_queries_total"),
)
"""Pairs of server counters: tokens found in the prefix cache, and tokens looked up."""

LATENCY = ("mean", "p50", "p90", "p95", "p99")

ADDED = ("", "ci_low", "ci_high")

METRICS: tuple[Metric, ...] = (
    Metric("latency", "ttft_ms", "t1 − t0: prompt ids on the host → first generated id on the host",
           "ms", LATENCY, "lower", "TTFT ms"),
    Metric("latency", "itl_ms", "gaps t(i) − t(i−1), i ≥ 2, pooled over repetitions and rows",
           "ms", LATENCY, "lower", "ITL ms"),
    Metric("latency", "tpot_ms", "(tN − t1)/(N − 1) per request; absent if N < 2",
           "ms", ("mean", "p50", "p95"), "lower"),
    Metric("latency", "e2e_ms", "tN − t0", "ms", ("mean", "p50", "p95", "p99"), "lower"),
    Metric("latency", "tokenize_ms", "prompt text → ids, measured after the repetitions; only for text prompts",
           "ms", ("p50",), "lower"),
    Metric("latency", "detokenize_ms", "answer ids → text, measured likewise", "ms", ("p50",), "lower"),
    Metric("latency", "e2e_with_text_ms", "e2e_ms + batch · (text → ids + ids → text), all means",
           "ms", ("mean",), "lower"),
    Metric("throughput", "output_tokens_per_s",
           "batch · N / (tN − t0): mean over repetitions (over processes if several), with its 95 % t interval",
           "1/s", ("", "ci_low", "ci_high"), "higher", "tokens/s"),
    Metric("throughput", "per_instance_tokens_per_s", "output throughput ÷ batch size", "1/s", ("",), "higher"),
    Metric("throughput", "total_tokens_per_s", "batch · (P + N) / (tN − t0), mean over repetitions",
           "1/s", ("",), "higher"),
    Metric("throughput", "prefill_tokens_per_s",
           "batch · P / (t1 − t0), mean over repetitions; P counts computed prompt tokens only",
           "1/s", ("",), "higher"),
    Metric("throughput", "decode_tokens_per_s", "batch · (N − 1)/(tN − t1), mean over repetitions",
           "1/s", ("",), "higher"),
    Metric("memory", "host_rss_bytes", "resident memory of the worker at each stage", "bytes", STAGES, "lower"),
    Metric("memory", "host_needed_bytes", "anonymous pages plus the bytes of parameters that live in file mappings",
           "bytes", STAGES, "lower", "host peak GB", 1e-9),
    Metric("memory", "device_bytes", "device memory of our process at each stage",
           "bytes", STAGES, "lower", "device peak GB", 1e-9),
    Metric("memory", "device_reserved_bytes", "maximum held by the allocator", "bytes", ("peak",), "lower"),
    Metric("memory", "weight_bytes", "parameters as stored, quantization metadata and inner tensors included",
           "bytes", ("",), "lower", "weights GB", 1e-9),
    Metric("memory", "predicted_bytes", "peak estimated before anything was loaded", "bytes", ("",)),
    Metric("memory", "kv_bytes_per_token", "KV cache per token and row", "bytes", ("",), "lower"),
    Metric("efficiency", "tokens_per_s_per_gb",
           "output throughput ÷ peak memory in 10⁹ bytes (device if there is one, else host needed)",
           "1/s/GB", ("",), "higher"),
    Metric("efficiency", "mbu_ratio", "bytes read per decode step ÷ mean TPOT ÷ read bandwidth measured here",
           "0–1", ("",), "higher", "MBU"),
    Metric("efficiency", "mfu_ratio", "FLOPs of prefill and decode ÷ time ÷ FLOP/s measured here",
           "0–1", ("",), "higher"),
    Metric("efficiency", "joules_per_token", "energy above idle ÷ output tokens, where a counter exists",
           "J", ("",), "lower"),
    Metric("efficiency", "padding_waste_ratio",
           "stream batched in process: 1 − Σ (P + N − 1) over requests ÷ token positions computed, including padding "
           "and finished rows",
           "0–1", ("",), "lower", "padding"),
    Metric("cost", "per_million_tokens", "price_per_hour ÷ tokens per hour · 10⁶", "money", ("",), "lower", "cost/1M"),
    Metric("quality", "kl_vs_reference",
           "KL(unquantized‖this) of the next token, mean over the positions of the unquantized model's own "
           "continuations; interval over prompts",
           "nats", ("", "ci_low", "ci_high", "p50", "p99"), "lower", "KL nats"),
    Metric("quality", "top1_agreement",
           "share of positions with the same most probable token as the unquantized model; interval over prompts",
           "0–1", ("", "ci_low", "ci_high"), "higher", "top-1"),
    Metric("quality", "perplexity",
           "exp of the mean negative log-likelihood per token of a text, sliding window; interval over windows",
           "", ("", "ci_low", "ci_high"), "lower", "perplexity"),
    Metric("quality", "perplexity_ratio", "perplexity ÷ that of the unquantized model, paired by token",
           "", ("", "ci_low", "ci_high"), "lower"),
    Metric("qat", "kl_recovered_ratio",
           "kl_reduction ÷ ptq_kl_vs_reference: share of the divergence that training removed", "0–1", ("",), "higher"),
    Metric("qat", "kl_reduction",
           "KL of the untrained quantization − KL of the trained one, mean over the same positions; interval over "
           "prompts, paired",
           "nats", ADDED, "higher"),
    Metric("qat", "ptq_kl_vs_reference", "quality/kl_vs_reference of the same quantization without training",
           "nats", ADDED, "lower"),
    Metric("qat", "ptq_top1_agreement", "quality/top1_agreement of the same quantization without training",
           "0–1", ADDED, "higher"),
    Metric("qat", "ptq_perplexity", "quality/perplexity of the same quantization without training", "", ADDED, "lower"),
    Metric("qat", "unquantized_perplexity", "quality/perplexity of the unquantized model", "", ADDED, "lower"),
    Metric("load", "load_s", "model load: checkpoint on disk → ready", "s", ("",), "lower", "load s"),
    Metric("load", "compile_s",
           "compilation of the decode step for this shape, before its first call; not part of load_s",
           "s", ("",), "lower"),
    Metric("load", "first_call_ms", "first call, cold", "ms", ("",), "lower"),
    Metric("config", "batch_size", "setting, as a number to filter and plot by", "", ("",)),
    Metric("config", "prompt_tokens", "setting (with auto: mean of what was sent)", "", ("",)),
    Metric("config", "output_tokens", "setting", "", ("",)),
    Metric("config", "concurrency", "setting of a closed loop: users", "", ("",)),
    Metric("config", "request_rate", "setting of an open loop", "1/s", ("",)),
    Metric("config", "ramp_to", "setting of a ramp: final rate", "1/s", ("",)),
    Metric("saturation", "requests_per_s",
           "open loop beyond the server's capacity: answers per second (in a ramp: of the last third of its "
           "requests); absent if the server kept up",
           "1/s", ("",), "higher"),
    Metric("latency", "icl_ms", "gaps between chunks or steps that bring several tokens, in place of itl_ms",
           "ms", ("mean", "p50", "p95", "p99"), "lower"),
    Metric("latency", "ttfo_ms", "start → first token outside a reasoning channel",
           "ms", ("mean", "p50", "p95", "p99"), "lower"),
    Metric("throughput", "requests_per_s", "complete requests ÷ (last arrival − first sending), mean over repetitions",
           "1/s", ("",), "higher", "requests/s"),
    Metric("window", "full_output_tokens_per_s", "output tokens per second from the first sending to the last arrival",
           "1/s", ("",), "higher"),
    Metric("window", "full_requests_per_s", "complete requests per second in the same time", "1/s", ("",), "higher"),
    Metric("window", "full_ttft_ms", "TTFT of all requests", "ms", ("p50", "p99"), "lower"),
    Metric("window", "full_itl_ms", "ITL of all requests", "ms", ("p50", "p99"), "lower"),
    Metric("window", "steady_output_tokens_per_s",
           "tokens that arrive between the end of the first answer and the last sending ÷ that time",
           "1/s", ("",), "higher"),
    Metric("window", "steady_requests_per_s",
           "answers ÷ the same time, each counted by the share of its tokens that arrive in it",
           "1/s", ("",), "higher"),
    Metric("window", "steady_ttft_ms", "TTFT of requests begun in the same time", "ms", ("p50", "p99"), "lower"),
    Metric("window", "steady_itl_ms", "gaps within the same time", "ms", ("p50", "p99"), "lower"),
    Metric("goodput", "requests_per_s", "requests that met every slo_…_ms, per second",
           "1/s", ("",), "higher", "goodput/s"),
    Metric("goodput", "attainment_ratio",
           "requests that met every slo_…_ms ÷ requests that were sent and can be judged", "0–1", ("",), "higher"),
    Metric("goodput", "requests_without_tpot", "requests too short to be judged by slo_tpot_ms", "", ("",)),
    Metric("goodput", "limit_requests_per_s",
           "find=goodput: highest request rate at which the asked share met every SLO; low: highest rate that surely "
           "does, high: lowest that surely does not",
           "1/s", ("", "low", "high"), "higher"),
    Metric("goodput", "knee_requests_per_s",
           "of several loads, the one with the highest power: requests per second ÷ mean end-to-end latency",
           "1/s", ("",)),
    Metric("twin", "added_ttft_ms",
           "with the server − without it: median TTFT of a repetition, with Welch's 95 % interval",
           "ms", ADDED, "lower"),
    Metric("twin", "added_tpot_ms", "the same for the mean time per output token",
           "ms", ADDED, "lower", "added TPOT ms"),
    Metric("twin", "added_e2e_ms", "the same for the median end-to-end latency", "ms", ADDED, "lower"),
    Metric("twin", "added_host_needed_bytes", "the same for peak host memory, one reading each",
           "bytes", ("",), "lower"),
    Metric("twin", "throughput_ratio", "output tokens per second with the server ÷ without it", "", ("",), "higher"),
    Metric("errors", "failed_ratio", "requests not completed ÷ requests sent", "0–1", ("",), "lower"),
    *(Metric("errors", word, "requests that ended this way", "", ("",), "lower") for word in FAILURES),
    Metric("lengths", "prompt_tokens", "by the server's count", "", ("mean",)),
    Metric("lengths", "output_tokens", "by the server's count", "", ("mean",)),
    Metric("lengths", "tokens_per_chunk", "output tokens ÷ chunks of the stream", "", ("mean",)),
    Metric("lengths", "tokens_per_step", "speculative decoding: output tokens per row ÷ steps of the model",
           "", ("mean",), "higher", "tokens/step"),
    Metric("lengths", "cached_prompt_ratio",
           "share of prompt tokens from the server's prefix cache, where it reports them", "0–1", ("",)),
    Metric("in_flight", "requests", "unfinished requests, over the time of a repetition", "", ("mean", "max")),
    Metric("client", "processes", "client processes that sent the load", "", ("",)),
    Metric("client", "loop_lag_ms",
           "client event loop: actual − expected wake-up; with several processes, that of the latest",
           "ms", ("mean", "p50", "p99"), "lower"),
    Metric("client", "send_delay_ms", "open loop: actual − intended sending time",
           "ms", ("mean", "p50", "p99"), "lower"),
    Metric("client", "cpu_ratio",
           "CPU time of the client, which has one core, ÷ wall time; with several processes, that of the busiest",
           "0–1", ("",), "lower"),
    Metric("client", "cpus", "total CPU time of several client processes ÷ wall time", "", ("",), "lower"),
    Metric("client", "rate_ratio", "open loop: achieved rate ÷ requested rate", "0–1", ("",), "higher"),
    Metric("client", "resent_requests",
           "requests resent because the server had closed an idle connection; their latency counts from the first "
           "sending",
           "", ("",), "lower"),
    Metric("client", "stamp_lag_ms",
           "continuous batching: our time stamp of a step − the engine's stamp of its first token",
           "ms", ("mean", "p50", "p99"), "lower"),
    *(Metric("server", name, "server's own gauge, over its readings during a load", "", ("mean", "max"))
      for name in SERVER_GAUGES),
    *(Metric("server", name, "server's own share, over its readings during a load", "0–1", ("mean", "max"))
      for name in SERVER_RATIOS),
    *(Metric("server", name, "server's own counter: increase over all repetitions", "", ("",))
      for name in SERVER_COUNTERS),
    *(Metric("server", name, "server's own histogram: mean over its requests in the repetitions",
             "s", ("mean",), "lower")
      for name in SERVER_TIMES),
    Metric("trust", "repetitions", "timed repetitions behind the numbers", "", ("",), "higher"),
    Metric("trust", "same_replies_ratio",
           "history=kept: share of answers of the first conversation that are the same, token by token, when its "
           "history is recomputed",
           "0–1", ("",), "higher"),
    Metric("trust", "same_tokens_ratio",
           "other decode path or KV cache: share of the first repetition's output tokens before the first that "
           "differs from plain decoding",
           "0–1", ("",), "higher"),
    Metric("trust", "relative_half_width", "half-width of the 95 % interval of the throughput ÷ its mean",
           "", ("",), "lower"),
    Metric("trust", "cv_ratio",
           "standard deviation of the throughput over repetitions (processes if several) ÷ its mean",
           "", ("",), "lower"),
)  # fmt: skip

SERIES = {
    "qat/loss": "step = step of the optimizer: mean loss of its sequences, nats per token",
    "steps/itl_ms": "step = token index i (2 … N): median gap over repetitions",
    "steps/ttft_ms": "step = repetition",
    "steps/e2e_ms": "step = repetition",
    "steps/output_tokens_per_s": "step = repetition",
    "steps/ramp_request_rate": "step = tenth of a ramp's time: arrival rate of requests",
    "steps/ramp_ttft_ms": "the same: median over requests that arrived in it",
    "steps/ramp_e2e_ms": "the same",
    "steps/turn_ttft_ms": "step = turn of a conversation: median over conversations",
    "steps/turn_e2e_ms": "the same",
    "steps/turn_prompt_tokens": "the same: mean length of the prompt, including its history",
    "steps/turn_prefilled_tokens": "the same: mean length of its computed part",
    "steps/host_rss_bytes": "step = sample",
    "steps/device_bytes": "step = sample",
    "percentiles/itl_ms": "step = percentile 1 … 99",
    "percentiles/ttft_ms": "step = percentile 1 … 99",
}
"""Series keys and what a step means."""

KEYS: dict[str, Metric] = {key: metric for metric in METRICS for key in metric.mlflow_keys()}
"""Summary key → its metric."""

REASONS: dict[str, str] = {
    "wrong_token_count": "invalid",
    "unfinished": "invalid",
    "client_bound": "invalid",
    "mbu_above_one": "invalid",
    "negative_gap": "invalid",
    "not_steady": "suspect",
    "not_converged": "suspect",
    "too_few_samples": "suspect",
    "contended": "suspect",
    "throttled": "suspect",
    "high_variation": "suspect",
    "length_drift": "suspect",
    "prefix_cache_hits": "suspect",
    "chunked_stream": "suspect",
    "swapping": "suspect",
    "failed_requests": "suspect",
    "saturated": "suspect",
}
"""Reason code → the verdict it forces."""

OUTCOMES = {
    "ok": "FINISHED",
    "oom": "FAILED",
    "crashed": "FAILED",
    "timeout": "FAILED",
    "refused": "FAILED",
    "error": "FAILED",
    "interrupted": "KILLED",
    "skipped": "KILLED",
}
"""Outcome of a cell → status of its MLflow run."""
