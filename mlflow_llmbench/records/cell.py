"""Parameters of a measurement, each declared once: fields of a cell, and options of a whole command."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any

from .backends import DEFAULT_BACKEND, backend_of
from .parameter import Parameter
from .quantizations import MIXED, listed, schemes_with

DRAWN = ("synthetic", "mixed")
"""Workloads without texts: prompts are drawn from the vocabulary."""

SPECULATIVE = ("prompt_lookup", "assisted")
"""Decode paths that check several proposed tokens in one step (speculative decoding)."""


@dataclass(frozen=True)
class Cell:
    """One point of a sweep: every parameter that decides a result. MLproject, CLI and docs derive from it."""

    # fmt: off
    model: str = Parameter(
        "opt-125m", "preset name, Hub id, local folder, or .gguf file", "text", "model", metavar="MODEL",
        sweep=True).field()
    weights: str = Parameter(
        "hub", "weights from the Hub or a local folder, or random ones in the architecture of a preset (seeded)",
        "weights", "model").field()
    revision: str = Parameter(
        "main", "Hub revision; the resolved commit is logged", "text", "model", metavar="REVISION",
        only_with="weights=hub").field()
    backend: str = Parameter(
        DEFAULT_BACKEND, "runtime that runs the model; installed packages can add others", "backend", "model").field()
    quant: str = Parameter("none", listed(), "quant", "quantization", sweep=True).field()
    group_size: int = Parameter(
        128, f"quant={','.join(schemes_with('group_size'))}: weights that share a scale", "count", "quantization",
        metavar="WEIGHTS", low=16, high=1024, only_with=f"quant={','.join(schemes_with('group_size'))}").field()
    int8_threshold: float = Parameter(
        6, f"quant={','.join(schemes_with('int8_threshold'))}: compute activations beyond this magnitude in 16 bits; "
        "0 = none", "number", "quantization", sweep=True, low=0, high=1e6, scenarios="offline batching",
        only_with=f"quant={','.join(schemes_with('int8_threshold'))}").field()
    double_quant: bool = Parameter(
        False, f"quant={','.join(schemes_with('double_quant'))}: quantize the block scales too", "flag", "quantization",
        sweep=True, scenarios="offline batching",
        only_with=f"quant={','.join(schemes_with('double_quant'))}").field()
    quant_budget: str | None = Parameter(
        None, "quant=mixed: most memory for weights, 5.5 (bits per weight) or 300MB (the whole model)", "budget",
        "quantization", unset="none", only_with=f"quant={MIXED}").field()
    quant_plan: str | None = Parameter(
        None, "quant=mixed: quant_plan.json of an earlier run, in place of a budget", "plan_file", "quantization",
        unset="none", only_with=f"quant={MIXED}").field()
    prune: str | None = Parameter(
        None, "structured pruning before any quantization: remove a share of the layers, of each MLP's width, or of "
        "the heads (layers-25%, mlp-25%, heads-50%)", "prune", "quantization", metavar="PART-SHARE%", sweep=True,
        unset="none", scenarios="offline batching", backend_specific=True).field()
    batch_size: int = Parameter(
        1, "rows in one forward pass", "count", "workload", metavar="ROWS", sweep=True, high=4096).field()
    prompt_tokens: int | None = Parameter(
        128, "exact prompt length in tokens; auto = the workload's own lengths", "count", "workload", metavar="TOKENS",
        sweep=True, unset="auto", high=1_000_000).field()
    output_tokens: int = Parameter(
        128, "exact number of generated tokens per row", "count", "workload", metavar="TOKENS", sweep=True,
        high=1_000_000).field()
    workload: str = Parameter(
        "synthetic", "synthetic (seeded ids), mixed (seeded ids of varying lengths), qa, summarization, creative, "
        "code, chat, domain, or a JSONL file", "workload", "workload", metavar="NAME|FILE", sweep=True).field()
    prefix_tokens: int | None = Parameter(
        None, "beginning of each prompt that a group of requests or conversations shares, such as a system prompt; "
        "part of prompt_tokens", "count", "workload", metavar="TOKENS", sweep=True, unset="none", high=1_000_000,
        scenarios="online", only_with="trace=none").field()
    prefix_count: int = Parameter(
        1, "different prefixes of prefix_tokens, each for one group of requests", "count", "workload",
        metavar="PREFIXES", sweep=True, high=100_000, scenarios="online", only_with="prefix_tokens").field()
    history: str = Parameter(
        "none", "conversations: none (each is one prompt), or turn by turn with the history recomputed, kept (in "
        "the KV cache) or sent (to a server)", "history", "workload", sweep=True).field()
    warmup: int | None = Parameter(
        None, "discarded runs: auto (at least 3, until steady) or a number", "count", "measurement", unset="auto",
        high=10_000).field()
    repetitions: int | None = Parameter(
        None, "timed runs: auto (64 or a minute, at least 20; more until the interval is narrow) or a number",
        "count", "measurement", unset="auto", high=1_000_000).field()
    max_repetitions: int = Parameter(
        100, "most repetitions with repetitions=auto", "count", "measurement", low=5, high=1_000_000,
        only_with="repetitions=auto").field()
    precision_target: float = Parameter(
        0.02, "repetitions=auto stops at this relative half-width of the 95 % interval of the throughput", "number",
        "measurement", metavar="RATIO", low=0.0001, high=1, only_with="repetitions=auto").field()
    processes: int = Parameter(1, "fresh worker processes per cell", "count", "measurement", high=1000).field()
    device: str = Parameter("auto", "where the model runs", "device", "model").field()
    threads: int | None = Parameter(
        None, "CPU threads of the worker; auto = physical cores it may use", "count", "model", sweep=True, unset="auto",
        high=4096).field()
    tensor_parallel: int = Parameter(
        1, "ranks that share every layer: one process for each, and one GPU for each where the device is a GPU",
        "count", "model", metavar="RANKS", sweep=True, high=64, scenarios="offline batching",
        backend_specific=True).field()
    placement: str = Parameter(
        "single", "single (the model on one device), or auto: its layers over the visible devices, then host memory, "
        "then the disk", "placement", "model", sweep=True, scenarios="offline batching", backend_specific=True).field()
    worker_python: str | None = Parameter(
        None, "Python of another environment to run the worker with; none = the Python of this command", "interpreter",
        "model", unset="none", scenarios="offline batching").field()
    gpu_layers: int | None = Parameter(
        None, "backend=llama_cpp: layers on the GPU; auto = all with a CUDA device, else none", "count", "model",
        metavar="LAYERS", sweep=True, unset="auto", low=0, high=10_000, scenarios="offline batching",
        backend_specific=True).field()
    mmap: bool = Parameter(
        True, "backend=llama_cpp: map the file into memory instead of reading it whole", "flag", "model",
        scenarios="offline batching", backend_specific=True).field()
    attention: str = Parameter("auto", "implementation of attention", "attention", "model", sweep=True).field()
    kv_cache: str | None = Parameter(
        None, "KV cache type: auto (dtype of the computation), fp8, int8, int4, int2; llama.cpp: f32, f16, bf16, "
        "q8_0, q5_1, q5_0, q4_1, q4_0", "kv_cache", "model", sweep=True, unset="auto",
        scenarios="offline batching").field()
    decode: str = Parameter(
        "generate", "generate, compiled (static cache, torch.compile, CUDA graphs), prompt_lookup, or assisted (by "
        "a draft model)", "decode", "model", sweep=True).field()
    assistant: str | None = Parameter(
        None, "decode=assisted: draft model with the same vocabulary (preset, Hub id or local folder)", "text", "model",
        metavar="MODEL", sweep=True, unset="none", scenarios="offline batching", only_with="decode=assisted").field()
    draft_tokens: int = Parameter(
        10, "decode=prompt_lookup,assisted: most tokens proposed per step", "count", "model", metavar="TOKENS",
        sweep=True, high=1000, scenarios="offline batching", only_with=f"decode={','.join(SPECULATIVE)}").field()
    seed: int = Parameter(
        0, "seed of prompts, random weights and arrival times", "count", "workload", low=0, high=2**31 - 1).field()
    batching: str | None = Parameter(
        None, "batch a request stream in process; batch_size is the maximum", "batching", "workload", sweep=True,
        unset="none", scenarios="batching").field()
    batch_wait_ms: float = Parameter(
        100, "batching=dynamic: longest time a request waits for others, ms", "number", "workload", metavar="MS", low=0,
        high=1e9, scenarios="batching", only_with="batching=dynamic").field()
    trust_remote_code: bool = Parameter(False, "run code that comes with a model; recorded", "flag", "limits").field()
    allow_pickle: bool = Parameter(
        False, "read pickled weights (.bin) if there are no safetensors; recorded", "flag", "limits").field()
    url: str | None = Parameter(
        None, "server to measure, with backend=openai: http://127.0.0.1:8000", "url", "server", unset="none",
        scenarios="online").field()
    launch: str | None = Parameter(
        None, "command that starts the server, with {port} and, where it needs them, {model} and {quant}; separate "
        "several by ' ; '", "launch", "server", sweep=True, unset="none", scenarios="online", separator=" ; ").field()
    endpoint: str = Parameter(
        "completions", "completions (/v1/completions), chat (/v1/chat/completions), responses (/v1/responses), or "
        "embeddings (/v1/embeddings: no output tokens)", "endpoint", "server",
        scenarios="online").field()
    temperature: float = Parameter(
        0, "sampling temperature that requests ask for; 0 = always the likeliest token", "number", "server", low=0,
        high=100, scenarios="online").field()
    ignore_eos: str = Parameter(
        "auto", "answers go on to output_tokens: auto (where the server can), true (needed), or false (they end where "
        "the model ends them)", "ignore_eos", "server", scenarios="online").field()
    thinking: str = Parameter(
        "auto", "auto (as the server does), or off: ask for answers without reasoning, and check that none comes",
        "thinking", "server", scenarios="online", only_with="endpoint=chat").field()
    max_tokens_field: str = Parameter(
        "auto", "field that asks for output_tokens: auto (max_tokens, or where that is refused max_completion_tokens)",
        "max_tokens_field", "server", scenarios="online").field()
    extra_body: str | None = Parameter(
        None, "further fields of each request as JSON, or a file of it: "
        "{\"top_p\": 0.9, \"chat_template_kwargs\": {…}}; a value $NAME comes from the environment", "body", "server",
        unset="none", scenarios="online").field()
    headers: str | None = Parameter(
        None, "further headers as JSON, or a file of it: {\"X-Key\": \"$GATEWAY_KEY\"}; keys only as $NAME, "
        "from the environment", "headers", "server", unset="none", scenarios="online").field()
    tls_ca: str | None = Parameter(
        None, "certificates of the authority that a server's own is verified by (PEM), in place of the system's", "pem",
        "server", unset="none", scenarios="online").field()
    tls_cert: str | None = Parameter(
        None, "certificate that the client shows (PEM), with its key unless tls_key is given", "pem", "server",
        unset="none", scenarios="online").field()
    tls_key: str | None = Parameter(
        None, "key of tls_cert (PEM); its password comes from LLMBENCH_TLS_PASSWORD", "pem", "server", unset="none",
        scenarios="online", only_with="tls_cert").field()
    proxy: str | None = Parameter(
        None, "environment = connect by the proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name", "proxy", "server",
        unset="none", scenarios="online").field()
    concurrency: int = Parameter(
        1, "closed loop: users, each of whom waits for an answer before the next request", "count", "workload",
        metavar="USERS", sweep=True, high=65536, scenarios="online", only_with="request_rate=none trace=none").field()
    request_rate: float | None = Parameter(
        None, "open loop: requests per second, sent whether or not earlier ones are answered", "number", "workload",
        metavar="PER_S", sweep=True, unset="none", low=0.001, scenarios="batching online").field()
    ramp_to: float | None = Parameter(
        None, "open loop: final rate; it rises evenly from request_rate over each repetition", "number", "workload",
        metavar="PER_S", unset="none", low=0.001, scenarios="online", only_with="request_rate").field()
    trace: str | None = Parameter(
        None, "open loop of recorded requests: JSON Lines file of timestamp (ms), input_length, output_length, and "
        "where prompts share blocks of 512 tokens hash_ids, as Mooncake's traces", "trace",
        "workload", unset="none", scenarios="online").field()
    arrival: str = Parameter(
        "poisson", "open loop: distribution of the gaps between requests", "arrival", "workload",
        scenarios="batching online", only_with="request_rate").field()
    burstiness: float = Parameter(
        1, "arrival=gamma: shape; 1 = poisson, below 1 = bursts, above 1 = more even", "number", "workload", low=0.01,
        high=1e6, scenarios="batching online", only_with="arrival=gamma").field()
    client_processes: int | None = Parameter(
        None, "processes that send requests and time answers; auto = each uses less than half its core, and the "
        "server keeps one core", "count", "server", unset="auto", high=256, scenarios="online").field()
    requests: int | None = Parameter(
        None,
        "requests (history=sent: conversations) per repetition; auto = 4 per user, or 10 s at the rate, at least 12",
        "count", "workload", unset="auto", scenarios="batching online").field()
    duration_s: float | None = Parameter(
        None, "start no request later than this many seconds into a repetition", "number", "workload", metavar="S",
        unset="none", low=0.1, high=1e6, scenarios="online").field()
    request_timeout_s: float = Parameter(
        600, "seconds after which a request has failed", "number", "server", metavar="S", low=0.1, high=86400,
        scenarios="online").field()
    slo_ttft_ms: float | None = Parameter(
        None, "goodput: longest time to the first token", "number", "server", metavar="MS", unset="none", low=0,
        scenarios="batching online").field()
    slo_tpot_ms: float | None = Parameter(
        None, "goodput: longest mean time per token after the first", "number", "server", metavar="MS", unset="none",
        low=0, scenarios="batching online").field()
    slo_e2e_ms: float | None = Parameter(
        None, "goodput: longest time for a whole answer", "number", "server", metavar="MS", unset="none", low=0,
        scenarios="batching online").field()

    # fmt: on

    @property
    def mean_rate(self) -> float | None:
        """Mean requests per second of an open loop over a whole repetition."""
        return (
            self.request_rate
            if self.request_rate is None or self.ramp_to is None
            else (self.request_rate + self.ramp_to) / 2
        )

    @property
    def generates(self) -> bool:
        """True if answers have output tokens."""
        return self.endpoint != "embeddings"

    @property
    def open_loop(self) -> bool:
        """True if requests are sent at given times, whether or not earlier ones have been answered."""
        return self.request_rate is not None or self.trace is not None

    @property
    def scenario(self) -> str:
        """`online`: a server is measured. `batching`: a request stream is batched in process. `offline`: neither."""
        return "online" if self.url or self.launch else "batching" if self.batching else "offline"


def differing(cells: Sequence[Cell], without: Collection[str] = ()) -> list[str]:
    """Return the names of parameters in which cells differ.

    `backend` is left out if the quantizations already imply it.
    """
    names = [
        f.name for f in fields(Cell) if f.name not in without and len({getattr(cell, f.name) for cell in cells}) > 1
    ]
    told = "quant" in names and all(cell.backend == backend_of(DEFAULT_BACKEND, cell.quant) for cell in cells)
    return [name for name in names if name != "backend" or not told]


@dataclass(frozen=True)
class Options:
    """Parameters of a whole command; they do not decide a result."""

    # fmt: off
    preset: str | None = Parameter(
        None, "grid of parameters; those given besides override it", "preset", "measurement", unset="none").field()
    output_dir: str = Parameter(
        "llmbench-results", "folder for results (the journal)", "text", "results", metavar="FOLDER").field()
    on: str = Parameter(
        "here", "where to measure: on this machine, on its Ray cluster, or on another cluster", "place",
        "measurement").field()
    price_per_hour: float | None = Parameter(
        None, "price of this machine per hour, for cost metrics", "number", "measurement", metavar="MONEY",
        unset="none", low=0).field()
    nominal_bandwidth: float | None = Parameter(
        None, "memory bandwidth of the device by its data sheet, GB/s; MBU is then relative to it", "number",
        "measurement", metavar="GB/S", unset="none", low=0.001, scenarios="offline batching").field()
    force: bool = Parameter(False, "measure cells that are estimated not to fit in memory", "flag", "limits").field()
    quality: str = Parameter(
        "none", "auto: after timing, measure KL divergence from the unquantized model, top-1 agreement and perplexity",
        "quality", "quality").field()
    quality_text: str = Parameter(
        "bundled", "text for perplexity: bundled, or a text file", "text_file", "quality").field()
    quality_reference: str | None = Parameter(
        None, "unquantized model (Hub id or folder) to compare an already quantized one with; none = the model "
        "without its quantization", "text", "quality", metavar="MODEL", unset="none").field()
    quality_tasks: str | None = Parameter(
        None, "lm-eval tasks to evaluate after timing: names, YAML files or folders, separated by commas", "tasks",
        "quality", metavar="TASK,…", unset="none").field()
    quality_limit: int | None = Parameter(
        None, "most documents per lm-eval task; none = all", "count", "quality", metavar="DOCUMENTS",
        unset="none").field()
    twin: bool = Parameter(
        False,
        "with launch: also measure each configuration without a server, as one batch of the transformers backend",
        "flag", "measurement", scenarios="online").field()
    find: str | None = Parameter(
        None, "goodput = search for the highest request rate that meets the SLOs, starting at request_rate or at "
        "one user's rate", "find", "measurement", unset="none", scenarios="online").field()
    attainment: float = Parameter(
        0.9, "find=goodput: share of requests that must meet every SLO", "number", "measurement", metavar="RATIO",
        low=0.01, high=0.999, scenarios="online").field()
    slo: str | None = Parameter(
        None, "SLOs of an MLPerf benchmark, for those not given", "slo", "server", unset="none",
        scenarios="batching online").field()
    rerun: bool = Parameter(
        False, "measure again even if this configuration, environment and workload were measured before", "flag",
        "measurement").field()
    memory_limit: int | None = Parameter(
        None, "most memory a worker may need, such as 6GB; auto = free memory less a twentieth of the machine's",
        "size", "limits", unset="auto", low=100e6, high=1e15).field()
    load_timeout_s: float | None = Parameter(
        3600, "seconds allowed for loading (downloads have no limit)", "number", "limits", metavar="S", unset="none",
        low=0.1).field()
    first_token_timeout_s: float | None = Parameter(
        3600, "seconds allowed from a cell's start to its first token", "number", "limits", metavar="S", unset="none",
        low=0.1).field()
    repetition_timeout_s: float | None = Parameter(
        3600, "seconds allowed for one run of a cell, warm-up or timed", "number", "limits", metavar="S", unset="none",
        low=0.1).field()
    cell_timeout_s: float | None = Parameter(
        None, "seconds allowed for a whole cell", "number", "limits", metavar="S", unset="none", low=0.1).field()
    # fmt: on


PARAMETERS: dict[str, Field[Any]] = {f.name: f for kind in (Cell, Options) for f in dataclasses.fields(kind)}
"""Name → declaration, in the order of the vocabulary."""

SWEEPABLE = tuple(name for name, f in PARAMETERS.items() if f.metadata["sweep"])

BACKEND_SPECIFIC = tuple(name for name, f in PARAMETERS.items() if f.metadata["backend_specific"])
"""Parameters with a meaning only for backends that declare them."""

LENGTHS = ("prompt_tokens", "output_tokens")
"""Parameters that a trace replaces."""

OF_ANSWERS = (
    "output_tokens",
    "temperature",
    "ignore_eos",
    "thinking",
    "max_tokens_field",
    "slo_ttft_ms",
    "slo_tpot_ms",
)
"""Parameters of answers with tokens, which have no meaning for embeddings."""

ONLY_WITH = {
    name: {
        parameter: tuple(filter(None, values.split(",")))
        for parameter, _, values in (text.partition("=") for text in texts)
    }
    for name, f in PARAMETERS.items()
    if (texts := f.metadata["only_with"].split())
}
"""Parameter → other parameters and their values, as texts, with which it has a meaning. () stands for any but unset."""

DEPENDS_ON = {
    name: next(iter(ONLY_WITH[name].items()))
    for name in ("int8_threshold", "double_quant", "assistant", "draft_tokens")
}
"""Setting → the parameter and values with which it has a meaning. Other cells have it at its default."""


def idle_parameters(values: Mapping[str, Collection[object]]) -> set[str]:
    """Return the parameters without a meaning for cells with these values: those of their settings, `ONLY_WITH`."""

    def holds(parameter: str, texts: tuple[str, ...]) -> bool:
        given = values[parameter]
        return any(as_text(parameter, one) in texts if texts else one is not None for one in given)

    return {name for name, conditions in ONLY_WITH.items() if not all(holds(*one) for one in conditions.items())}


def as_text(name: str, value: object) -> str:
    """Return a value as written on the command line and logged: `auto` or `none` for None, `true`/`false`, 0.02."""
    if value is None:
        return str(PARAMETERS[name].metadata["unset"])
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def list_text(name: str, values: Iterable[object]) -> str:
    r"""Return values as one text that `split_list` splits: with commas between them, and `\,` for those within."""
    metadata = PARAMETERS[name].metadata
    texts = [as_text(name, value) for value in values]
    escaped = metadata["sweep"] and metadata["separator"] == ","
    return str(metadata["separator"]).join(text.replace(",", r"\,") if escaped else text for text in texts)


def split_list(text: str, separator: str = ",") -> list[str]:
    r"""Split a list into its values, without spaces around them. `\,` is a comma within a value."""
    if separator != ",":
        return [part.strip() for part in text.split(separator)]
    return [part.strip().replace(r"\,", ",") for part in re.split(r"(?<!\\),", text)]


def default_text(name: str) -> str:
    """The default of a parameter as text."""
    return as_text(name, PARAMETERS[name].default)
