"""Table of all metrics and series. Keys, tables, charts, headlines, tags, limits and the reference page derive from it.

To add a metric, define it here and return its value from the function of its family in `analysis`. A request is sent
at t0; its output tokens arrive at t1 … tN.
"""

from __future__ import annotations

from collections.abc import Mapping

from .metric import (
    RATIO,
    Bars,
    Claim,
    Column,
    Compared,
    Entry,
    ExportComment,
    Gated,
    Goal,
    Line,
    Metric,
    P,
    Panel,
    QualityBound,
    Series,
    Tag,
)
from .server_names import SERVER_COUNTERS, SERVER_GAUGES, SERVER_RATIOS, SERVER_TIMES
from .verdicts import FAILURES

SCHEMA = 2
"""Version of the names of metrics, params and tags, the tag `llmbench.schema`. Figures of results that were logged with
another one are computed again from result.json."""

STAGES = ("baseline", "loading", "loaded", "peak", "steady", "unloaded")
"""The memory stages, in the order of a worker's life cycle."""

SECTIONS = {
    "latency": "times of requests",
    "throughput": "rates over a repetition",
    "memory": "memory of the worker process",
    "efficiency": "use of the hardware",
    "cost": "money",
    "quality": "comparison with the unquantized model, and scores",
    "qat": "gain of a quantization-aware training",
    "load": "loading and compiling",
    "saturation": "a server beyond its capacity",
    "window": "an online load with and without ramp-up and drain",
    "goodput": "requests that met the service level objectives",
    "parallel": "several ranks of a model, and compared with one",
    "twin": "a server compared with the same model without it",
    "errors": "failed requests",
    "lengths": "lengths that were sent and generated",
    "prefix_cache": "beginnings of prompts that requests share",
    "speculation": "speculative decoding, as the server tells it",
    "in_flight": "unfinished requests",
    "client": "the load client itself",
    "server": "the server's own metrics, under its own names",
    "trust": "evidence behind the verdict",
    "settings": "settings as numbers",
}
"""Section of the MLflow UI → its content, in the order of the UI."""

LATENCY = ("mean", "p50", "p90", "p95", "p99")
INTERVAL = ("", "ci_low", "ci_high")
OF_MEAN = ("sd", "mean_ci_low", "mean_ci_high")
"""Standard deviation and 95 % interval of a mean, over the repetitions (the processes if several)."""

# fmt: off
OUTPUT_RATE = Metric(
    "throughput", "output_tokens_per_s",
    "batch · N / (tN − t0): mean over repetitions (over processes if several), with its 95 % t interval",
    "1/s", INTERVAL, "higher", "output throughput", "tokens/s", shown_unit="tokens/s", tolerance=0.05,
    places=(Column(10), Line(10), Claim(10, name="fastest"), Compared(10), Gated(10, name="throughput"),
            Goal(10, name="throughput"), Tag(10), Tag(20, "ci_low"), Tag(30, "ci_high"),
            ExportComment(10, label="output tokens/s"), Panel(10),
            Bars(10, label="throughput", name="throughput", unit="output tokens/s")))
PER_INSTANCE_RATE = Metric(
    "throughput", "per_instance_tokens_per_s", "output throughput ÷ batch size", "1/s", better="higher")
TOTAL_RATE = Metric(
    "throughput", "total_tokens_per_s", "batch · (P + N) / (tN − t0), mean over repetitions", "1/s", better="higher")
PROMPT_RATE = Metric(
    "throughput", "prompt_tokens_per_s",
    "endpoint=embeddings: prompt tokens ÷ (last arrival − first sending), mean over repetitions",
    "1/s", ("",), "higher", "prompt tokens", "prompt tokens/s", shown_unit="tokens/s", places=(Column(15), Line(15)))
PREFILL_RATE = Metric(
    "throughput", "prefill_tokens_per_s",
    "batch · P / (t1 − t0), mean over repetitions; P counts computed prompt tokens only", "1/s", better="higher")
DECODE_RATE = Metric(
    "throughput", "decode_tokens_per_s", "batch · (N − 1)/(tN − t1), mean over repetitions", "1/s", better="higher")
REQUEST_RATE = Metric(
    "throughput", "requests_per_s", "complete requests ÷ (last arrival − first sending), mean over repetitions",
    "1/s", ("",), "higher", "requests", "requests/s", shown_unit="per s", places=(Column(20), Line(20)))

TTFT = Metric(
    "latency", "ttft_ms", "t1 − t0: prompt ids on the host → first generated id on the host",
    "ms", (*LATENCY, *OF_MEAN), "lower", "time to first token", "TTFT ms", tolerance=0.05,
    places=(Column(40, "p50", name="latency"), Line(40, "p50", name="latency"),
            Claim(30, "p50", name="first token soonest"), Compared(20, "mean"), Gated(20, "mean", name="ttft"),
            Tag(40, "p50"), Tag(50, "p95"), ExportComment(20, "p50", "ms to the first token (median)", unit=""),
            Panel(20, "p50"), Bars(20, "p50", name="ttft"), Goal(50, "p50", name="ttft")))
ITL = Metric(
    "latency", "itl_ms", "gaps t(i) − t(i−1), i ≥ 2, pooled over repetitions and rows",
    "ms", LATENCY, "lower", "inter-token latency", "ITL ms", tolerance=0.05,
    places=(Column(50, "p50"), Line(70, "p50"),
            Line(80, "p99"), Compared(30, "p50"), Gated(30, "p50", name="itl"),
            Tag(60, "p50"), Tag(70, "p95"), Panel(30, "p50"), Bars(30, "p50", name="itl")))
TPOT = Metric(
    "latency", "tpot_ms", "(tN − t1)/(N − 1) per request; absent if N < 2",
    "ms", ("mean", "p50", "p95", *OF_MEAN), "lower", "time per output token", "TPOT ms",
    places=(Compared(40, "mean"), Gated(40, "mean", name="tpot"), Tag(80, "mean"),
            ExportComment(30, "mean", "ms per token after it (mean)", unit=""), Goal(60, "mean", name="tpot")))
E2E = Metric(
    "latency", "e2e_ms", "tN − t0",
    "ms", ("mean", "p50", "p95", "p99", *OF_MEAN), "lower", "end-to-end latency", "end to end ms",
    places=(Column(45, "p50", name="latency"), Line(45, "p50", name="latency"),
            Compared(50, "mean"), Gated(50, "mean", name="e2e"), Tag(90, "p50"), Tag(100, "p95"),
            Goal(20, "p50", "median end-to-end latency", "latency")))
ICL = Metric(
    "latency", "icl_ms", "gaps between chunks or steps that bring several tokens, in place of itl_ms",
    "ms", ("mean", "p50", "p95", "p99"), "lower", places=(Line(50, "p50", "inter-chunk latency, median"),))
TTFO = Metric("latency", "ttfo_ms", "start → first token outside a reasoning channel",
              "ms", ("mean", "p50", "p95", "p99"), "lower")
NATURAL_E2E = Metric(
    "latency", "natural_e2e_ms", "t(n) − t0, n = natural_tokens; texts at batch size 1", "ms", ("mean", "p50"), "lower",
    "end-to-end latency of natural lengths")
FORWARD = Metric(
    "latency", "forward_ms", "one forward pass over the prompts alone, without generate(): ids on the host → done",
    "ms", ("mean", "p50"), "lower", "forward pass")
TOKENIZE = Metric("latency", "tokenize_ms", "prompt text → ids, measured after the repetitions; only for text prompts",
                  "ms", ("p50",), "lower")
DETOKENIZE = Metric("latency", "detokenize_ms", "answer ids → text, measured likewise", "ms", ("p50",), "lower")
E2E_WITH_TEXT = Metric("latency", "e2e_with_text_ms", "e2e_ms + batch · (text → ids + ids → text), all means",
                       "ms", ("mean",), "lower")

DEVICE_MEMORY = Metric(
    "memory", "device_gb", "device memory of our process at each stage",
    "GB", STAGES, "lower", "peak device memory", "device peak GB", tolerance=0.01,
    places=(Column(80, "peak"), Line(90, "peak"), Line(92, "loading", "peak device memory while loading"),
            Claim(40, "peak", name="least memory"), Compared(60, "peak"),
            Gated(60, "peak", name="memory"), Tag(110, "peak"), Panel(40, "peak", name="memory"),
            Bars(40, "peak", name="memory")))
HOST_NEEDED = Metric(
    "memory", "host_needed_gb", "anonymous pages plus the parameters that live in file mappings",
    "GB", STAGES, "lower", "peak host memory", "host peak GB", tolerance=0.01,
    places=(Column(90, "peak"), Line(100, "peak", "peak host memory needed"),
            Line(102, "loading", "peak host memory needed while loading"), Claim(50, "peak", name="least memory"),
            Compared(70, "peak"), Gated(70, "peak", name="memory"), Tag(120, "peak"), Panel(50, "peak", name="memory"),
            Bars(50, "peak", name="memory")))
HOST_RSS = Metric(
    "memory", "host_rss_gb", "resident memory of the worker at each stage",
    "GB", STAGES, "lower", "peak resident memory", places=(Bars(60, "peak", name="memory"),))
DEVICE_RESERVED = Metric(
    "memory", "device_reserved_gb", "maximum held by the allocator", "GB", ("peak",), "lower")
WEIGHTS = Metric(
    "memory", "weight_gb", "parameters as stored, quantization metadata and inner tensors included",
    "GB", ("",), "lower", "weights", "weights GB",
    places=(Column(100), Line(120, label="weights as stored"), Compared(80),
            # Weights add nothing to a check of the memory.
            Gated(80, name="weights", only_if_limited=True), Tag(130), Bars(70, name="memory")))
RANK_HOST = Metric(
    "memory", "rank_host_needed_gb", "several ranks: host_needed_gb of the rank that needs most",
    "GB", ("loaded", "peak"), "lower")
RANK_DEVICE = Metric(
    "memory", "rank_device_gb", "the same of device memory, each rank on its own device",
    "GB", ("loaded", "peak"), "lower")
RANK_WEIGHTS = Metric("memory", "rank_weight_gb", "several ranks: weight_gb of the rank that holds most",
                      "GB", better="lower")
WEIGHTS_ON_GPUS = Metric("memory", "weight_gpus_gb", "placement=auto: the part of weight_gb on GPUs", "GB")
WEIGHTS_ON_HOST = Metric("memory", "weight_host_gb", "placement=auto: the part in host memory", "GB",
                         ("",), "", "weights in host memory", places=(Line(121),))
WEIGHTS_ON_DISK = Metric(
    "memory", "weight_disk_gb", "placement=auto: the part on the disk, which each pass reads", "GB",
    ("",), "lower", "weights on the disk", "disk GB", places=(Column(101), Line(122)))
PREDICTED_MEMORY = Metric("memory", "predicted_gb", "peak estimated before anything was loaded", "GB")
PREDICTED_LOADING = Metric(
    "memory", "predicted_loading_gb", "peak of the load, estimated before anything was loaded", "GB")
KV_CACHE = Metric("memory", "kv_bytes_per_token", "KV cache per token and row", "bytes", better="lower")

RATE_PER_GB = Metric(
    "efficiency", "tokens_per_s_per_gb",
    "output throughput ÷ peak memory (device if there is one, else host needed)",
    "1/s/GB", better="higher")
MBU = Metric(
    "efficiency", "mbu_ratio",
    "bytes read per decode step ÷ mean TPOT ÷ bandwidth_gb_per_s (÷ nominal_bandwidth if given); absent if doubtful",
    RATIO, ("",), "higher", "model bandwidth utilization", "MBU", places=(Column(110), Line(130)))
BANDWIDTH = Metric(
    "efficiency", "bandwidth_gb_per_s",
    "read bandwidth measured here before the load (best of this and earlier probes)",
    "GB/s", ("",), "higher", "read bandwidth measured here", places=(Line(135),))
MFU = Metric("efficiency", "mfu_ratio",
             "FLOPs of prefill and decode ÷ time ÷ FLOP/s measured here; absent if these are doubtful",
             RATIO, better="higher")
ENERGY = Metric(
    "efficiency", "joules_per_token", "energy above idle ÷ output tokens, where a counter exists",
    "J", ("",), "lower", "energy per token",
    places=(Tag(140), Goal(40, name="energy",
                           advice="It needs an energy counter; `llmbench doctor -v` says why there is none.")))
PADDING_WASTE = Metric(
    "efficiency", "padding_waste_ratio",
    "stream batched in process: 1 − Σ (P + N − 1) over requests ÷ token positions computed, including padding "
    "and finished rows",
    RATIO, ("",), "lower", "computed for nothing", "padding",
    places=(Column(120), Line(110, label="computed for nothing (padding, finished rows)", unit="%", scale=100),
            Bars(80, name="padding", unit="share")))
COST = Metric(
    "cost", "per_million_tokens", "price_per_hour ÷ tokens per hour · 10⁶",
    "money", ("",), "lower", "cost per million tokens", "cost/1M", shown_unit="", tolerance=0.05,
    places=(Column(170), Line(200), Tag(150), Goal(30, name="cost", advice="Measure again with price_per_hour.")))

KL = Metric(
    "quality", "kl_vs_reference",
    "KL(unquantized‖this) of the next token, mean over the positions of the unquantized model's own "
    "continuations; interval over prompts",
    "nats", (*INTERVAL, "p50", "p99"), "lower", "KL divergence", "KL nats",
    places=(Column(130), Line(140, label="KL divergence from the unquantized model"), Gated(110, name="kl"),
            QualityBound(10, label="KL divergence from the reference", name="kl"), Tag(170)))
TOP1 = Metric(
    "quality", "top1_agreement",
    "share of positions with the same most probable token as the unquantized model; interval over prompts",
    RATIO, INTERVAL, "higher", "top-1 agreement", "top-1",
    places=(Column(140), Line(150, label="same most probable token as it", unit="%", scale=100),
            Gated(120, name="top1"), QualityBound(30, name="top1"), Tag(180)))
PERPLEXITY = Metric(
    "quality", "perplexity",
    "exp of the mean negative log-likelihood per token of a text, sliding window; interval over windows",
    "", INTERVAL, "lower", "perplexity", "perplexity",
    places=(Column(150), Line(160), Gated(100, name="perplexity"), QualityBound(20, name="perplexity"), Tag(160)))
BITS_PER_BYTE = Metric(
    "quality", "bits_per_byte",
    "−Σ log₂ p(token) ÷ UTF-8 bytes of the same text as the perplexity: comparable between tokenizers; interval over "
    "windows",
    "", INTERVAL, "lower", "bits per byte", "bits/byte",
    places=(Column(155), Line(165), QualityBound(25, name="bits_per_byte")))
PERPLEXITY_RATIO = Metric(
    "quality", "perplexity_ratio", "perplexity ÷ that of the unquantized model, paired by token",
    "", INTERVAL, "lower", "perplexity ÷ that of the unquantized model", places=(Line(170),))

KL_RECOVERED = Metric("qat", "kl_recovered_ratio",
                      "kl_reduction ÷ ptq_kl_vs_reference: share of the divergence that training removed",
                      RATIO, better="higher")
KL_REDUCTION = Metric(
    "qat", "kl_reduction",
    "KL of the untrained quantization − KL of the trained one, mean over the same positions; interval over "
    "prompts, paired", "nats", INTERVAL, "higher")
UNTRAINED_KL = Metric("qat", "ptq_kl_vs_reference", "quality/kl_vs_reference of the same quantization without training",
                      "nats", INTERVAL, "lower")
UNTRAINED_TOP1 = Metric("qat", "ptq_top1_agreement", "quality/top1_agreement of the same quantization without training",
                        RATIO, INTERVAL, "higher")
UNTRAINED_PERPLEXITY = Metric("qat", "ptq_perplexity", "quality/perplexity of the same quantization without training",
                              "", INTERVAL, "lower")
UNQUANTIZED_PERPLEXITY = Metric("qat", "unquantized_perplexity", "quality/perplexity of the unquantized model",
                                "", INTERVAL, "lower")

LOAD_TIME = Metric(
    "load", "load_s", "model load: checkpoint on disk → ready", "s", ("",), "lower", "load", "load s",
    places=(Column(160), Line(180), Compared(90),
            # A single load is mostly the disk.
            Gated(90, name="load", only_if_limited=True), Tag(190)))
COMPILE_TIME = Metric(
    "load", "compile_s", "compilation of the decode step for this shape, before its first call; not part of load_s",
    "s", ("",), "lower", "compiling, besides", places=(Line(190),))
FIRST_CALL = Metric("load", "first_call_ms", "first call, cold", "ms", better="lower")

SATURATION_RATE = Metric(
    "saturation", "requests_per_s",
    "open loop beyond the server's capacity: answers per second (in a ramp: of the last third of its "
    "requests); absent if the server kept up", "1/s", better="higher")

FULL_OUTPUT_RATE = Metric("window", "full_output_tokens_per_s",
                          "output tokens per second from the first sending to the last arrival", "1/s", better="higher")
FULL_REQUEST_RATE = Metric("window", "full_requests_per_s", "complete requests per second in the same time",
                           "1/s", better="higher")
FULL_TTFT = Metric("window", "full_ttft_ms", "TTFT of all requests", "ms", ("p50", "p99"), "lower")
FULL_ITL = Metric("window", "full_itl_ms", "ITL of all requests", "ms", ("p50", "p99"), "lower")
STEADY_OUTPUT_RATE = Metric(
    "window", "steady_output_tokens_per_s",
    "tokens that arrive between the end of the first answer and the last sending ÷ that time", "1/s", better="higher")
STEADY_REQUEST_RATE = Metric(
    "window", "steady_requests_per_s",
    "answers ÷ the same time, each counted by the share of its tokens that arrive in it", "1/s", better="higher")
STEADY_TTFT = Metric("window", "steady_ttft_ms", "TTFT of requests begun in the same time",
                     "ms", ("p50", "p99"), "lower")
STEADY_ITL = Metric("window", "steady_itl_ms", "gaps within the same time", "ms", ("p50", "p99"), "lower")
GAPS = (ITL, FULL_ITL, STEADY_ITL)
"""Metrics of the single gaps between tokens."""

GOODPUT = Metric(
    "goodput", "requests_per_s", "requests that met every slo_…_ms, per second",
    "1/s", ("",), "higher", "goodput", "goodput/s", tolerance=0.05,
    places=(Column(30), Line(30, unit="per s"), Claim(20, name="most requests within the limits"),
            Goal(70, name="goodput", advice="Measure a stream of requests with slo_ttft_ms or another SLO.")))
ATTAINMENT = Metric("goodput", "attainment_ratio",
                    "requests that met every slo_…_ms ÷ requests that were sent and can be judged",
                    RATIO, better="higher")
WITHOUT_TPOT = Metric("goodput", "requests_without_tpot", "requests too short to be judged by slo_tpot_ms")
GOODPUT_LIMIT = Metric(
    "goodput", "limit_requests_per_s",
    "find=goodput: highest request rate at which the asked share met every SLO; low: highest rate that surely "
    "does, high: lowest that surely does not", "1/s", ("", "low", "high"), "higher")
KNEE = Metric("goodput", "knee_requests_per_s",
              "of several loads, the one with the highest power: requests per second ÷ mean end-to-end latency", "1/s")

ADDED_TTFT = Metric(
    "twin", "added_ttft_ms", "with the server − without it: median TTFT of a repetition, with Welch's 95 % interval",
    "ms", INTERVAL, "lower")
ADDED_TPOT = Metric("twin", "added_tpot_ms", "the same for the mean time per output token",
                    "ms", INTERVAL, "lower", label="added TPOT ms", places=(Column(60),))
ADDED_E2E = Metric("twin", "added_e2e_ms", "the same for the median end-to-end latency", "ms", INTERVAL, "lower")
ADDED_MEMORY = Metric("twin", "added_host_needed_gb", "the same for peak host memory, one reading each",
                      "GB", better="lower")
THROUGHPUT_RATIO = Metric("twin", "throughput_ratio", "output tokens per second with the server ÷ without it",
                          better="higher")

PARALLEL_EFFICIENCY = Metric(
    "parallel", "efficiency_ratio",
    "several ranks: output throughput ÷ (ranks · that of the same cell with one rank); interval of the comparison",
    RATIO, INTERVAL, "higher", "parallel efficiency")
TTFT_SPEEDUP = Metric(
    "parallel", "ttft_speedup", "mean TTFT of the same cell with one rank ÷ that of several", "", INTERVAL, "higher")
TPOT_SPEEDUP = Metric("parallel", "tpot_speedup", "the same of the mean TPOT", "", INTERVAL, "higher")
COMMUNICATION = Metric(
    "parallel", "communication_ratio",
    "share of an untimed pass that rank 0 spent in collectives, waiting for other ranks included; only on a CPU",
    RATIO, better="lower")

FAILED_RATIO = Metric("errors", "failed_ratio", "requests not completed ÷ requests sent", RATIO, better="lower")
FAILED = {word: Metric("errors", word, "requests that ended this way", better="lower") for word in FAILURES}
"""Outcome of a failed request → the metric that counts it."""

NATURAL_TOKENS = Metric(
    "lengths", "natural_tokens",
    "texts: tokens of a row up to the one by which the model ends its answer, past which a forced length goes; of "
    "answers that end", "", ("mean",))
ENDED = Metric("lengths", "ended_ratio", "texts: share of answers that the model ends within output_tokens", RATIO)
SENT_PROMPT_TOKENS = Metric("lengths", "prompt_tokens", "by the server's count", "", ("mean",))
MADE_OUTPUT_TOKENS = Metric("lengths", "output_tokens", "by the server's count", "", ("mean",))
REASONING_TOKENS = Metric(
    "lengths", "reasoning_tokens",
    "output tokens of a reasoning channel; with other_tokens, absent if all tokens are of the answer", "", ("mean",))
OTHER_TOKENS = Metric(
    "lengths", "other_tokens", "output tokens of tool calls, refusals, and fields of other names", "", ("mean",))
TOKENS_PER_CHUNK = Metric("lengths", "tokens_per_chunk", "output tokens ÷ chunks of the stream", "", ("mean",))
TOKENS_PER_STEP = Metric(
    "lengths", "tokens_per_step", "speculative decoding: output tokens per row ÷ steps of the model",
    "", ("mean",), "higher", "output tokens per step", "tokens/step", places=(Column(70, "mean"), Line(60, "mean")))
CACHED_PROMPT = Metric("lengths", "cached_prompt_ratio",
                       "share of prompt tokens from the server's prefix cache, where it reports them", RATIO)
IDEAL_HITS = Metric(
    "prefix_cache", "ideal_hit_ratio",
    "share of prompt tokens with which an earlier request of the repetition began too (prefix_tokens, hash_ids of a "
    "trace, history=sent): the hits of a cache without limits, empty at first", RATIO, ("",), "",
    "prompt tokens shared with earlier requests", places=(Line(115, unit="%", scale=100),))
SERVER_HITS = Metric(
    "prefix_cache", "server_hit_ratio",
    "share of prompt tokens found in the server's prefix cache, by the counters of its /metrics; absent without them",
    RATIO, ("",), "", "found in the server's prefix cache", places=(Line(116, unit="%", scale=100),))
ACCEPTANCE = Metric(
    "speculation", "acceptance_ratio", "accepted ÷ proposed tokens, as the server tells; absent if it tells none",
    RATIO, ("",), "higher", "proposed tokens accepted", places=(Line(65, unit="%", scale=100),))
ACCEPTED_LENGTH = Metric(
    "speculation", "tokens_per_draft", "1 + accepted tokens ÷ drafts: tokens that a step with a draft brings",
    "", better="higher")
IN_FLIGHT = Metric("in_flight", "requests", "unfinished requests, over the time of a repetition", "", ("mean", "max"))

CLIENT_PROCESSES = Metric("client", "processes", "client processes that sent the load")
LOOP_LAG = Metric(
    "client", "loop_lag_ms",
    "client event loop: actual − expected wake-up; with several processes, that of the latest",
    "ms", ("mean", "p50", "p99"), "lower")
SEND_DELAY = Metric("client", "send_delay_ms", "open loop: actual − intended sending time",
                    "ms", ("mean", "p50", "p99"), "lower")
CLIENT_CPU = Metric(
    "client", "cpu_ratio",
    "CPU time of the client, which has one core, ÷ wall time; with several processes, that of the busiest",
    RATIO, better="lower")
CLIENT_CPUS = Metric("client", "cpus", "total CPU time of several client processes ÷ wall time", better="lower")
ACHIEVED_RATE = Metric("client", "rate_ratio", "open loop: achieved rate ÷ requested rate", RATIO, better="higher")
RESENT_REQUESTS = Metric(
    "client", "resent_requests",
    "requests resent because the server had closed an idle connection; their latency counts from the first sending",
    better="lower")
SKIPPED_EVENTS = Metric(
    "client", "skipped_events",
    "events of the streams without choices and counts, such as keep-alives, over all repetitions; absent if none")
STAMP_LAG = Metric(
    "client", "stamp_lag_ms", "continuous batching: our time stamp of a step − the engine's stamp of its first token",
    "ms", ("mean", "p50", "p99"), "lower")

SERVER = {
    **{name: Metric("server", name, "server's own gauge, over its readings during a load", "", ("mean", "max"))
       for name in SERVER_GAUGES},
    **{name: Metric("server", name, "server's own share, over its readings during a load", RATIO, ("mean", "max"))
       for name in SERVER_RATIOS},
    **{name: Metric("server", name, "server's own counter: increase over all repetitions")
       for name in SERVER_COUNTERS},
    **{name: Metric("server", name, "server's own histogram: mean over its requests in the repetitions",
                    "s", ("mean",), "lower")
       for name in SERVER_TIMES},
}
"""Name that a server gives to its metric → ours."""

REPETITIONS = Metric("trust", "repetitions", "timed repetitions behind the numbers", better="higher",
                     places=(Tag(200),))
SAME_REPLIES = Metric(
    "trust", "same_replies_ratio",
    "history=kept: share of answers of the first conversation that are the same, token by token, when its "
    "history is recomputed", RATIO, better="higher")
SAME_TOKENS = Metric(
    "trust", "same_tokens_ratio",
    "other decode path or KV cache: share of the first repetition's output tokens before the first that "
    "differs from plain decoding", RATIO, better="higher")
RELATIVE_HALF_WIDTH = Metric(
    "trust", "relative_half_width", "half-width of the 95 % interval of the throughput ÷ its mean", better="lower")
EFFECTIVE_REPETITIONS = Metric(
    "trust", "effective_repetitions",
    "independent repetitions that would determine the mean throughput as well: fewer than were made if neighbouring "
    "ones are correlated", better="higher")
VARIATION = Metric(
    "trust", "cv_ratio", "standard deviation of the throughput over repetitions (processes if several) ÷ its mean",
    better="lower")

BATCH_SIZE = Metric("settings", "batch_size", "setting, as a number to filter and plot by")
PROMPT_TOKENS = Metric("settings", "prompt_tokens", "setting (with auto: mean of what was sent)")
OUTPUT_TOKENS = Metric("settings", "output_tokens", "setting")
TENSOR_PARALLEL = Metric("settings", "tensor_parallel", "setting: ranks that share every layer")
CONCURRENCY = Metric("settings", "concurrency", "setting of a closed loop: users")
ASKED_RATE = Metric("settings", "request_rate", "setting of an open loop", "1/s")
RAMP_TO = Metric("settings", "ramp_to", "setting of a ramp: final rate", "1/s")

TRAINING_LOSS = Series("qat", "loss", "step = step of the optimizer: mean loss of its sequences", "nats per token")
ITL_BY_TOKEN = Series("steps", "itl_ms", "step = token index i (2 … N): median gap over repetitions", "ms")
TTFT_BY_REPETITION = Series("steps", "ttft_ms", "step = repetition: median over its requests", "ms")
E2E_BY_REPETITION = Series("steps", "e2e_ms", "step = repetition: median over its requests", "ms")
RATE_BY_REPETITION = Series("steps", "output_tokens_per_s", "step = repetition", "1/s")
RAMP_REQUEST_RATE = Series("steps", "ramp_request_rate", "step = tenth of a ramp's time: arrival rate of requests",
                           "1/s")
RAMP_TTFT = Series("steps", "ramp_ttft_ms", "the same: median over requests that arrived in it", "ms")
RAMP_E2E = Series("steps", "ramp_e2e_ms", "the same", "ms")
TURN_TTFT = Series("steps", "turn_ttft_ms", "step = turn of a conversation: median over conversations", "ms")
TURN_E2E = Series("steps", "turn_e2e_ms", "the same", "ms")
TURN_PROMPT_TOKENS = Series("steps", "turn_prompt_tokens", "the same: mean length of the prompt, including its history")
TURN_PREFILLED_TOKENS = Series("steps", "turn_prefilled_tokens", "the same: mean length of its computed part")
RANK_HOST_PEAKS = Series("steps", "rank_host_needed_gb", "step = rank (from 0): its peak needed host memory", "GB")
RANK_DEVICE_PEAKS = Series("steps", "rank_device_gb", "the same: its peak device memory", "GB")
RANK_WEIGHT_PARTS = Series("steps", "rank_weight_gb", "the same: the parameters that it holds", "GB")
GPU_WEIGHT_PARTS = Series("steps", "gpu_weight_gb", "placement=auto: step = GPU: parameters that lie on it", "GB")
HOST_RSS_SAMPLES = Series("steps", "host_rss_gb", "step = sample", "GB")
DEVICE_SAMPLES = Series("steps", "device_gb", "step = sample", "GB")
WORKER_CPU = Series(
    "system", "cpu_utilization_percentage",
    "step = sample: CPU time of the worker ÷ time ÷ usable CPUs (MLflow has this name for the machine's)", "%")
WORKER_MEMORY = Series("system", "system_memory_usage_megabytes",
                       "step = sample: resident memory of the worker (likewise)", "MB")
GPU_UTILIZATION = Series("system", "gpu_{index}_utilization_percentage",
                         "step = repetition: share of the driver's last sample period in which a kernel ran", "%")
GPU_MEMORY = Series("system", "gpu_{index}_memory_usage_megabytes",
                    "step = stage that was reached: device memory of the worker", "MB")
GPU_POWER = Series("system", "gpu_{index}_power_usage_watts", "step = repetition: power of the GPU at its end", "W")
ITL_PERCENTILES = Series("percentiles", "itl_ms", "step = percentile 1 … 99", "ms")
TTFT_PERCENTILES = Series("percentiles", "ttft_ms", "step = percentile 1 … 99", "ms")
# fmt: on

METRICS: tuple[Metric, ...] = (
    *(value for value in tuple(globals().values()) if isinstance(value, Metric)),
    *FAILED.values(),
    *SERVER.values(),
)
"""All metrics of this module."""

KEYS: dict[str, Metric] = {key: metric for metric in METRICS for key in metric.mlflow_keys()}
"""Summary key → its metric."""

SERIES: dict[str, Series] = {one.key: one for one in tuple(globals().values()) if isinstance(one, Series)}
"""Series key → the series."""

PEAK_MEMORY = (DEVICE_MEMORY.key("peak"), HOST_NEEDED.key("peak"))
"""Keys of the peak memory: the device's if the model ran on one, else needed host memory."""


def shown_in(place: type[P]) -> tuple[Entry[P], ...]:
    """Metrics that a place shows, in its order."""
    found = [Entry(metric, one) for metric in METRICS for one in metric.places if isinstance(one, place)]
    return tuple(sorted(found, key=lambda entry: entry.place.order))


def by_name(place: type[P]) -> dict[str, tuple[Entry[P], ...]]:
    """Metrics that a place shows, by their name there. Those of one name stand in for each other, in order."""
    found: dict[str, tuple[Entry[P], ...]] = {}
    for entry in shown_in(place):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def peak_memory(figures: Mapping[str, float | None]) -> float | None:
    """Peak memory in GB: of the device if known, else needed on the host; None if neither is."""
    return next((value for key in PEAK_MEMORY if (value := figures.get(key))), None)
