"""The nouns: frozen dataclasses that say what was asked, what was seen and what it means.

They check themselves and do nothing else. Times are integer nanoseconds of one monotonic clock, sizes are bytes,
absent is None. `to_json` and `from_json` are inverse; `SCHEMA` is the version of the format and of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .metrics import SPOILED_CPU_LIMIT
from .quant_plan import QuantPlan

SCHEMA = 1
DRAWN = ("synthetic", "mixed")
"""Workloads without texts: their prompts are drawn from the vocabulary."""

SPECULATIVE = ("prompt_lookup", "assisted")
"""Decode paths that check proposed tokens, several of them in one step."""

T = TypeVar("T")


def parameter(
    default: object,
    help: str,
    *,
    kind: str,
    sweep: bool = False,
    unset: str = "",
    low: float = 1,
    high: float = 1e9,
    scenarios: str = "offline batching online",
    separator: str = ",",
) -> Any:
    """Declare a parameter once: its default, meaning, kind (see `spec.PARSERS`), bounds, and the word that stands for None.

    `scenarios` names those in which it means something, and no other run has it among its params: see `Cell.scenario`. `separator`
    stands between the values of a list.
    """
    metadata = {"help": help, "kind": kind, "sweep": sweep, "unset": unset, "low": low, "high": high}
    metadata |= {"scenarios": scenarios.split(), "separator": separator}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Cell:
    """One point of a sweep: every parameter that decides a result. Declared here once; MLproject, CLI and docs follow."""

    model: str = parameter("opt-125m", "preset name, Hub id, local folder, or .gguf file", kind="text", sweep=True)
    weights: str = parameter("hub", "hub (or local files), or random (architecture of the preset, seeded)", kind="weights")
    revision: str = parameter("main", "Hub revision; the resolved commit is logged", kind="text")
    backend: str = parameter("transformers", "what runs the model", kind="backend")
    quant: str = parameter(
        "none",
        "none (the checkpoint's dtype), fp32, fp16, bf16, int8, int4 (NF4), fp4, gptq (4 bits), gptq3, gptq8; torchao's int8-wo, int4-wo, int8-dq, fp8; "
        "hqq8 to hqq2; quanto8 to quanto2; mixed (by block); llama.cpp's q8_0, q6_k, q5_k_m, q4_k_m, q4_0, q3_k_m, q2_k",
        kind="quant",
        sweep=True,
    )
    group_size: int = parameter(128, "weights that share a scale, for gptq, int4-wo and hqq", kind="count", low=16, high=1024)
    int8_threshold: float = parameter(
        6, "quant=int8: activations beyond it are computed in 16 bits; 0 = none are", kind="number", sweep=True, low=0, high=1e6,
        scenarios="offline batching",
    )  # fmt: skip
    double_quant: bool = parameter(
        False, "quant=int4,fp4: the scales of the blocks are quantized too", kind="flag", sweep=True, scenarios="offline batching"
    )
    quant_budget: str | None = parameter(
        None, "quant=mixed: the most that the weights may take, 5.5 (bits per weight) or 300MB (the whole model)", kind="budget", unset="none"
    )
    quant_plan: str | None = parameter(
        None, "quant=mixed: the quant_plan.json of an earlier run, in place of a budget", kind="plan_file", unset="none"
    )
    batch_size: int = parameter(1, "rows in one forward pass", kind="count", sweep=True, high=4096)
    prompt_tokens: int | None = parameter(
        128, "exact prompt length in tokens; auto = as the workload gives it", kind="count", sweep=True, unset="auto", high=1_000_000
    )
    output_tokens: int = parameter(128, "exact number of generated tokens per row", kind="count", sweep=True, high=1_000_000)
    workload: str = parameter(
        "synthetic",
        "synthetic (seeded ids), mixed (seeded ids of varying lengths), a bundled prompt set, or a JSONL file",
        kind="workload",
        sweep=True,
    )
    history: str = parameter(
        "none",
        "conversations of a workload: none = each is one prompt; turn by turn with the history recomputed, kept in the KV cache, or sent to a server",
        kind="history",
        sweep=True,
    )
    warmup: int | None = parameter(None, "discarded runs: auto (at least 3, until steady) or a number", kind="count", unset="auto", high=10_000)
    repetitions: int | None = parameter(
        None, "timed runs: auto (at least 5, until the interval is narrow) or a number", kind="count", unset="auto", high=1_000_000
    )
    max_repetitions: int = parameter(30, "where auto stops", kind="count", low=5, high=1_000_000)
    precision_target: float = parameter(
        0.02, "relative half-width of the 95 % interval of the throughput at which auto stops", kind="number", low=0.0001, high=1
    )
    processes: int = parameter(1, "fresh worker processes per cell", kind="count", high=1000)
    device: str = parameter("auto", "auto, cpu, cuda or cuda:N", kind="device")
    threads: int | None = parameter(
        None, "CPU threads of the worker; auto = physical cores it may use", kind="count", sweep=True, unset="auto", high=4096
    )
    worker_python: str | None = parameter(
        None, "interpreter that runs the worker, of an environment with other packages; none = the one of the command", kind="interpreter",
        unset="none", scenarios="offline batching",
    )  # fmt: skip
    gpu_layers: int | None = parameter(
        None, "backend=llama_cpp: layers on the GPU; auto = all with a CUDA device, else none", kind="count", sweep=True, unset="auto", low=0, high=10_000,
        scenarios="offline batching",
    )  # fmt: skip
    mmap: bool = parameter(
        True, "backend=llama_cpp: map the file into memory, instead of reading it whole", kind="flag", scenarios="offline batching"
    )
    attention: str = parameter("auto", "auto, eager, sdpa, flash_attention_2, … as the library names them", kind="attention", sweep=True)
    kv_cache: str | None = parameter(
        None, "type of the KV cache; auto = the dtype of the computation; fp8, int8, int4, int2; llama.cpp's f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0",
        kind="kv_cache", sweep=True, unset="auto", scenarios="offline batching",
    )  # fmt: skip
    decode: str = parameter(
        "generate",
        "generate, compiled (static cache, torch.compile, CUDA graphs), prompt_lookup, or assisted (a small model proposes tokens)",
        kind="decode",
        sweep=True,
    )
    assistant: str | None = parameter(
        None, "decode=assisted: the small model that proposes tokens: preset, Hub id or local folder", kind="text", sweep=True, unset="none",
        scenarios="offline batching",
    )  # fmt: skip
    draft_tokens: int = parameter(
        10, "decode=prompt_lookup,assisted: tokens that are proposed for each step, at most", kind="count", sweep=True, high=1000,
        scenarios="offline batching",
    )  # fmt: skip
    seed: int = parameter(0, "prompts, random weights, arrival schedule", kind="count", low=0, high=2**31 - 1)
    batching: str | None = parameter(
        None, "how requests that come one by one are batched here: static, dynamic, continuous, or none", kind="batching", sweep=True, unset="none",
        scenarios="batching",
    )  # fmt: skip
    batch_wait_ms: float = parameter(
        100, "batching=dynamic: the longest that a request waits for others", kind="number", low=0, high=1e9, scenarios="batching"
    )
    trust_remote_code: bool = parameter(False, "run code that comes with a model; recorded", kind="flag")
    allow_pickle: bool = parameter(False, "read weights that are a pickle (.bin) where there are no safetensors; recorded", kind="flag")
    url: str | None = parameter(None, "server to measure, with backend=openai: http://127.0.0.1:8000", kind="url", unset="none", scenarios="online")
    launch: str | None = parameter(
        None, "command that starts the server, with {port} and where it needs them {model} and {quant}; several with ' ; ' between", kind="launch",
        sweep=True, unset="none", scenarios="online", separator=" ; ",
    )  # fmt: skip
    endpoint: str = parameter("completions", "completions or chat: /v1/completions or /v1/chat/completions", kind="endpoint", scenarios="online")
    concurrency: int = parameter(
        1, "closed loop: users who each wait for their answer before they ask again", kind="count", sweep=True, high=65536, scenarios="online"
    )
    request_rate: float | None = parameter(
        None,
        "open loop: requests per second, sent whatever has been answered",
        kind="number",
        sweep=True,
        unset="none",
        low=0.001,
        scenarios="batching online",
    )
    ramp_to: float | None = parameter(
        None, "open loop: the rate rises evenly from request_rate to this one over each repetition", kind="number", unset="none", low=0.001,
        scenarios="online",
    )  # fmt: skip
    trace: str | None = parameter(
        None, "open loop of recorded requests: a JSON Lines file of timestamp (ms), input_length and output_length", kind="trace", unset="none",
        scenarios="online",
    )  # fmt: skip
    arrival: str = parameter("poisson", "open loop: poisson, constant or gamma", kind="arrival", scenarios="batching online")
    burstiness: float = parameter(
        1,
        "arrival=gamma: shape; 1 is poisson, below 1 comes in bursts, above 1 is more even",
        kind="number",
        low=0.01,
        high=1e6,
        scenarios="batching online",
    )
    client_processes: int | None = parameter(
        None,
        "processes that send the load and stamp the answers; auto = as many as keep each below half of its core, and one core for the server",
        kind="count",
        unset="auto",
        high=256,
        scenarios="online",
    )
    requests: int | None = parameter(
        None,
        "requests per repetition (conversations, with history=sent); auto = 4 for each user, or 10 s of the rate, at least 12",
        kind="count",
        unset="auto",
        scenarios="batching online",
    )
    duration_s: float | None = parameter(
        None, "no request of a repetition is begun later than this", kind="number", unset="none", low=0.1, high=1e6, scenarios="online"
    )
    request_timeout_s: float = parameter(600, "after this a request has failed", kind="number", low=0.1, high=86400, scenarios="online")
    slo_ttft_ms: float | None = parameter(
        None, "goodput: the most for the first token", kind="number", unset="none", low=0, scenarios="batching online"
    )
    slo_tpot_ms: float | None = parameter(
        None, "goodput: the most per token after the first", kind="number", unset="none", low=0, scenarios="batching online"
    )
    slo_e2e_ms: float | None = parameter(
        None, "goodput: the most for a whole answer", kind="number", unset="none", low=0, scenarios="batching online"
    )

    @property
    def mean_rate(self) -> float | None:
        """Requests per second of an open loop over a whole repetition."""
        return self.request_rate if self.request_rate is None or self.ramp_to is None else (self.request_rate + self.ramp_to) / 2

    @property
    def open_loop(self) -> bool:
        """Whether requests come when they come, whatever has been answered."""
        return self.request_rate is not None or self.trace is not None

    @property
    def scenario(self) -> str:
        """`online` where a server is measured, `batching` where a stream of requests is batched in process, else `offline`."""
        return "online" if self.url or self.launch else "batching" if self.batching else "offline"


@dataclass(frozen=True)
class Options:
    """Parameters of a whole command that do not decide a result."""

    preset: str | None = parameter(None, "a grid of parameters: quick or effillm; what is given besides overrides it", kind="preset", unset="none")
    output_dir: str = parameter("llmbench-results", "the journal's folder", kind="text")
    on: str = parameter("here", "where it is measured: here, ray (the Ray cluster of this machine), or ray://host:port", kind="place")
    price_per_hour: float | None = parameter(None, "money per hour of this machine, for cost metrics", kind="number", unset="none", low=0)
    force: bool = parameter(False, "try cells that are estimated not to fit in memory", kind="flag")
    quality: str = parameter(
        "none", "auto = KL divergence and top-1 agreement against the unquantized model, and perplexity, after the measurement", kind="quality"
    )
    quality_text: str = parameter("bundled", "what perplexity is measured on: bundled, or a text file", kind="text_file")
    quality_reference: str | None = parameter(
        None,
        "unquantized model to compare with, a Hub id or folder, where the model itself is quantized already; none = the model without its quantization",
        kind="text",
        unset="none",
    )
    quality_tasks: str | None = parameter(
        None,
        "tasks of lm-eval by name, or YAML files or folders of them, with commas; evaluated after the measurement",
        kind="tasks",
        unset="none",
    )
    quality_limit: int | None = parameter(None, "documents of each of these tasks at most; none = all", kind="count", unset="none")
    twin: bool = parameter(
        False, "launch: measure each configuration without its server too, as one batch of the transformers backend", kind="flag", scenarios="online"
    )
    find: str | None = parameter(
        None, "goodput = search for the highest request rate that meets the SLOs, from request_rate or from what one user gets", kind="find",
        unset="none", scenarios="online",
    )  # fmt: skip
    attainment: float = parameter(
        0.9, "find: the share of requests that has to meet every SLO", kind="number", low=0.01, high=0.999, scenarios="online"
    )
    slo: str | None = parameter(
        None, "SLOs of an MLPerf benchmark where none are given: llama2-70b, llama2-70b-interactive, llama3.1-8b or llama3.1-8b-interactive", kind="slo",
        unset="none", scenarios="batching online",
    )  # fmt: skip
    rerun: bool = parameter(False, "measure again what was measured before with the same configuration, environment and workload", kind="flag")
    memory_limit: int | None = parameter(
        None,
        "most memory that a worker may need, such as 6GB; auto = what is free here, less a twentieth",
        kind="size",
        unset="auto",
        low=100e6,
        high=1e15,
    )
    load_timeout_s: float | None = parameter(3600, "most seconds for loading (downloads have no limit)", kind="number", unset="none", low=0.1)
    first_token_timeout_s: float | None = parameter(3600, "most seconds from a cell's start to its first token", kind="number", unset="none", low=0.1)
    repetition_timeout_s: float | None = parameter(3600, "most seconds for one run of a cell, warm-up or timed", kind="number", unset="none", low=0.1)
    cell_timeout_s: float | None = parameter(None, "most seconds for a whole cell", kind="number", unset="none", low=0.1)


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before it is loaded: where it lies, its commit, its configuration."""

    name: str
    source: str  # "preset", "hub", "folder", "gguf", "hub_gguf", or "none" where there are no files
    location: str  # repository id (with :file.gguf for hub_gguf) or absolute path
    revision: str  # commit of the Hub, content hash of local files, or random-seed<N>
    config: Mapping[str, Any] | None = None
    dtype: str | None = None  # of the checkpoint, torch's name
    context: int | None = None  # tokens
    files_bytes: int | None = None  # of the weight files
    assistant: ModelFacts | None = None  # the model that proposes tokens, with decode=assisted
    quant_plan: QuantPlan | None = None  # the one that was given

    @property
    def identity(self) -> list[str]:
        """What the model is, whatever it was called and wherever its files lie: its place on the Hub, else its name, and its revision."""
        return [self.location if self.source in ("hub", "preset") else self.name, self.revision]


@dataclass(frozen=True)
class LoadInfo:
    """What a load really gave. `facts` become dotted params (`quant.kernel`, `model.dtype`, …)."""

    load_s: float | None  # None where a server had loaded it before
    weight_bytes: int | None = None  # as stored, with quantization state and inner tensors
    step_bytes: int | None = None  # the part that one decode step reads
    kv_bytes_per_token: int | None = None  # per row
    flops_per_token: float | None = None  # forward pass of one token without attention and output head
    head_flops: float = 0.0  # output head, computed for output tokens only
    attention_flops_per_context_token: float | None = None  # more FLOPs per token for each token of context
    sliding_window: int | None = None  # tokens that `sliding_share` of the layers look back at most
    sliding_share: float = 0.0
    cache_bytes: int | None = None  # last-level cache of the device
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    vocab_size: int | None = None
    mapped_weight_bytes: int = 0  # bytes of parameters that lie in file mappings
    quant_plan: QuantPlan | None = None  # of a mixed quantization


@dataclass(frozen=True)
class Noise:
    """What the machine did during one repetition, beside the work that was measured.

    `steal_s`: seconds of CPU taken by the hypervisor · `foreign_cpu_s`: seconds of CPU used by processes that are not
    ours · `pressure_s`: seconds in which some task waited for a CPU (PSI) · `energy_j`: of the device, idle included ·
    `throttles`: why the GPU's clock was held back, during the repetition where the driver counts it, and when it ended ·
    `throttled_s`: for how many seconds, by the reason that lasted longest · `gpu_memory_errors`: uncorrected ones (ECC).
    The rest is read once, at the instant when the repetition has ended: `frequency_mhz`: mean over our CPUs, or the GPU's
    SM clock · `memory_clock_mhz`, `power_w`, `temperature_c`, `foreign_gpu_processes`: of the GPU · `utilization_ratio`:
    share of the last sixth of a second to one second in which the GPU ran a kernel.
    """

    wall_s: float
    steal_s: float | None = None
    foreign_cpu_s: float | None = None
    own_cpu_s: float | None = None
    pressure_s: float | None = None
    involuntary_switches: int | None = None
    major_faults: int | None = None
    swapped_pages: int | None = None
    frequency_mhz: float | None = None
    energy_j: float | None = None
    throttles: tuple[str, ...] = ()
    foreign_gpu_processes: int | None = None
    temperature_c: int | None = None
    throttled_s: float | None = None
    memory_clock_mhz: int | None = None
    power_w: float | None = None
    utilization_ratio: float | None = None
    gpu_memory_errors: int | None = None

    @property
    def others_cpus(self) -> float:
        """CPUs' worth of time that others took: processes that are not ours, and the hypervisor."""
        return ((self.foreign_cpu_s or 0.0) + (self.steal_s or 0.0)) / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def spoiled(self) -> bool:
        """Whether others took so much that the repetition is worth repeating; not told of short ones, for /proc/stat counts in 10 ms."""
        return self.wall_s >= 0.2 and self.others_cpus > SPOILED_CPU_LIMIT


@dataclass(frozen=True)
class RequestRecord:
    """One request: sent at `t0_ns`, output token i arrived at `stamps_ns[i − 1]`. `rows` rows of one forward pass share the stamps.

    Behind a server a stamp is the arrival of a chunk of the stream, and a chunk may hold several tokens: `tokens` is the
    server's own count of the output (None: one token per stamp), `chunk_tokens` that of each chunk where it tells them. A model
    that checks proposed tokens brings several in a step: then `tokens` is their count per row, and `chunk_tokens` that of each step.
    `intended_ns` is when an open loop meant to send it, `visible_ns` the first token outside a reasoning channel,
    `end_ns` the end of the answer, `cached_tokens` the part of the prompt that was not computed again: in the server's prefix
    cache, or in the history that a conversation keeps; `asked` the prompt and output tokens that were asked for where they differ
    from request to request; `conversation` and `turn` (from 1) which turn of which conversation with a server it was.
    """

    t0_ns: int
    stamps_ns: tuple[int, ...]
    rows: int = 1
    prompt_tokens: int | None = None
    intended_ns: int | None = None
    outcome: str = "complete"
    message: str = ""
    tokens: int | None = None
    chunk_tokens: tuple[int, ...] | None = None
    visible_ns: int | None = None
    end_ns: int | None = None
    cached_tokens: int | None = None
    finish: str = ""  # why the model stopped, in the server's word
    asked: tuple[int, int] | None = None
    conversation: int | None = None
    turn: int | None = None

    @property
    def prefilled_tokens(self) -> int | None:
        """Tokens of the prompt, per row, that were computed."""
        return None if self.prompt_tokens is None else self.prompt_tokens - (self.cached_tokens or 0)

    @property
    def output_tokens(self) -> int:
        """Tokens per row."""
        return len(self.stamps_ns) if self.tokens is None else self.tokens

    @property
    def start_ns(self) -> int:
        """What latencies are counted from: the intended time of an open loop, else the sending."""
        return self.t0_ns if self.intended_ns is None else self.intended_ns

    @property
    def single_tokens(self) -> bool:
        """Whether each stamp is that of one token."""
        return self.output_tokens == len(self.stamps_ns) and (self.chunk_tokens is None or max(self.chunk_tokens, default=1) == 1)


@dataclass(frozen=True)
class ClientReadings:
    """What the load client saw of itself during one repetition.

    `started_ns`, `ended_ns`: from the first sending to the end of the last answer · `lags_ns`: how late its event loop woke
    up, every 20 ms · `cpu_s`: CPU seconds of its one process · `retries`: requests sent again because the server had closed an idle connection.
    Where several processes sent the load, `parts` are their own readings, and the whole has the sums and no lags.
    """

    started_ns: int
    ended_ns: int
    lags_ns: tuple[int, ...]
    cpu_s: float
    retries: int = 0
    parts: tuple[ClientReadings, ...] = ()

    @property
    def processes(self) -> tuple[ClientReadings, ...]:
        """The readings of each process."""
        return self.parts or (self,)


@dataclass(frozen=True)
class ServerReading:
    """What a server said of itself at `t_ns` (monotonic, when its answer had come): value by the server's own name."""

    t_ns: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class EngineReadings:
    """What batched the requests of one repetition in process.

    `positions`: token positions that were computed, None where they cannot be counted · `needed`: those that the answers need,
    Σ (prompt + output − 1) · `batches`: rows of each batch that was formed once; empty where the batch changes with every pass ·
    `lags_ns`: for each step of an engine with its own thread, our stamp less the engine's own of the step's first token.
    """

    positions: int | None
    needed: int
    batches: tuple[int, ...] = ()
    lags_ns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Repetition:
    """One timed repeat. `wall_ms` is the epoch time of its start in milliseconds, for charts over real time.

    Only complete requests are in `requests`, so that no other enters a latency; those that failed are in `failed`.
    Of a conversation the requests are its turns, in order. `server` is what the server said of itself: before the load, about every
    second while it ran, and after it.
    """

    index: int
    wall_ms: int
    requests: tuple[RequestRecord, ...]
    noise: Noise | None = None
    process: int = 0
    failed: tuple[RequestRecord, ...] = ()
    client: ClientReadings | None = None
    engine: EngineReadings | None = None
    server: tuple[ServerReading, ...] = ()


@dataclass(frozen=True)
class MemorySample:
    """Memory of the worker, seen from outside at `t_ns` (monotonic): resident, anonymous, and bytes on the device."""

    t_ns: int
    rss: int
    anonymous: int
    device: int | None = None


@dataclass(frozen=True)
class MemoryStages:
    """The five stages of the vocabulary, bytes. `host_rss` is exact (kernel high-water mark); see `metrics` for definitions."""

    host_rss: Mapping[str, int] = field(default_factory=dict)
    host_needed: Mapping[str, int] = field(default_factory=dict)
    device: Mapping[str, int] = field(default_factory=dict)
    device_reserved_peak: int | None = None


@dataclass(frozen=True)
class TextScores:
    """What a model made of a text: negative log-likelihoods in nats, one list per window, one value per token that it scores.

    `reference_nll` are those of the unquantized model, token by token the same, where it could be run.
    """

    text: str
    tokens: int  # of the whole text
    window: int  # tokens that the model sees at most
    stride: int  # tokens that each window after the first scores
    nll: tuple[tuple[float, ...], ...]
    reference_nll: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class TextTimes:
    """Nanoseconds from the text of each prompt to its ids, and from the ids of each answer to its text, by the model's own tokenizer."""

    tokenize_ns: tuple[int, ...]
    detokenize_ns: tuple[int, ...]


@dataclass(frozen=True)
class Divergence:
    """Next-token distributions beside those of the unquantized model, one list per prompt, one value per position.

    `kl`: KL(reference‖this model) in nats over the whole vocabulary · `agrees`: whether the most probable tokens are the same
    one · `digest`: of the token ids · `is_reference`: whether this is the reference itself, computed a second time.
    """

    reference: str
    digest: str
    kl: tuple[tuple[float, ...], ...]
    agrees: tuple[tuple[bool, ...], ...]
    is_reference: bool = False


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task of the lm-evaluation-harness, with its standard error over documents, as the harness gives them."""

    task: str
    metric: str  # with its filter, where that is not `none`: exact_match.strict-match
    value: float
    stderr: float | None = None
    documents: int | None = None
    version: str = ""
    part: bool = False  # of a group that was asked for and has a score of its own


@dataclass(frozen=True)
class Quality:
    """How good the loaded model still is, raw; `withheld` says in sentences why something is absent. `text_digest`: of the text for perplexity.

    `tasks` holds the scores of lm-eval's tasks, `asked_tasks` which were asked for, `tasks_digest` what decides them.
    """

    text_digest: str = ""
    scores: TextScores | None = None
    divergence: Divergence | None = None
    withheld: tuple[str, ...] = ()
    asked_tasks: str = ""
    tasks_digest: str = ""
    tasks: tuple[TaskScore, ...] = ()


@dataclass(frozen=True)
class Reason:
    """One reason of a verdict: its code in the vocabulary and a sentence: what was seen, the limit, what to try."""

    code: str
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """Can the numbers be trusted: `valid`, `suspect` or `invalid`, and why not."""

    word: str
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a cell has no result: at which stage, and the one-line message."""

    stage: str
    message: str


@dataclass(frozen=True)
class Hashes:
    """Identities, 16 hex digits each."""

    config: str
    workload: str
    hardware: str
    software: str
    env: str


@dataclass(frozen=True)
class RunResult:
    """Everything about one measured cell. All figures are pure functions of it."""

    cell: Cell
    outcome: str
    started_ms: int
    ended_ms: int
    hashes: Hashes
    model: ModelFacts
    environment: Mapping[str, Any]
    load: LoadInfo | None = None
    first_call_ms: float | None = None
    warmup_s: tuple[float, ...] = ()
    steady: bool | None = None
    repetitions: tuple[Repetition, ...] = ()
    memory: MemoryStages = field(default_factory=MemoryStages)
    timeline: tuple[MemorySample, ...] = ()
    marks: Mapping[str, int] = field(default_factory=dict)  # stage name → monotonic ns at which it was reached
    peaks: Mapping[str, float] = field(default_factory=dict)  # read_bytes_per_s, flops_per_s
    idle_w: float | None = None  # power of the device before the load
    texts: tuple[Mapping[str, str], ...] = ()
    log: tuple[str, ...] = ()  # what third-party code printed, each message once with its count
    failure: Failure | None = None
    predicted_bytes: int | None = None
    price_per_hour: float | None = None
    compile_s: float | None = None  # for this cell's shape, before its first call; None where nothing is compiled
    same_tokens: tuple[int, ...] = ()  # per row of the first repetition: output tokens before the first that plain decoding does not give
    same_replies: tuple[bool, ...] = ()  # per turn of a conversation with kept history: whether recomputing gives the same reply
    text_times: TextTimes | None = None  # None where the prompts are no texts
    quality: Quality | None = None  # None where it was not asked for
    sweep: str = ""
    linked: str = ""  # the run (or the folder) that this result was measured in, where it was not measured again
    schema: int = SCHEMA


def hash16(value: object) -> str:
    """16 hex digits of SHA-256 over canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_json(record: object) -> Any:
    """A record as plain JSON data: dataclasses and mappings become objects, tuples and lists arrays."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {f.name: to_json(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, Mapping):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_json(value) for value in record]
    return record


def from_json(kind: type[T], data: Any) -> T:
    """The record of class `kind` that `to_json` made `data` of. Unknown fields are ignored (written by a later version)."""
    return typing.cast(T, _build(kind, data))


def _build(kind: Any, data: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if data is None or kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        return _build(inner[0], data) if len(inner) == 1 else data
    if origin is tuple:
        return tuple(_build(arguments[0], item) for item in data)
    if origin in (dict, Mapping):
        return {key: _build(arguments[1], value) for key, value in data.items()}
    if dataclasses.is_dataclass(kind):
        types_of = typing.get_type_hints(kind)
        known = {f.name for f in dataclasses.fields(kind)}
        return typing.cast(Any, kind)(**{key: _build(types_of[key], value) for key, value in data.items() if key in known})
    return data
