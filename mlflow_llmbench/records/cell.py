"""Parameters of a measurement, each declared once: fields of a cell, and options of a whole command."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from .quantizations import backend_of, listed, schemes_with

DRAWN = ("synthetic", "mixed")
"""Workloads without texts: prompts are drawn from the vocabulary."""

SPECULATIVE = ("prompt_lookup", "assisted")
"""Decode paths that check several proposed tokens in one step (speculative decoding)."""


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
    """Declare a parameter: its default, help text, kind (see `spec.PARSERS`), bounds, and the word for None.

    `scenarios`: those in which the parameter has a meaning; other runs do not log it (see `Cell.scenario`).
    `separator`: stands between the values of a list.
    """
    metadata = {"help": help, "kind": kind, "sweep": sweep, "unset": unset, "low": low, "high": high}
    metadata |= {"scenarios": scenarios.split(), "separator": separator}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Cell:
    """One point of a sweep: every parameter that decides a result. MLproject, CLI and docs derive from it."""

    model: str = parameter("opt-125m", "preset name, Hub id, local folder, or .gguf file", kind="text", sweep=True)
    weights: str = parameter(
        "hub", "hub (or local files), or random (architecture of the preset, seeded)", kind="weights"
    )
    revision: str = parameter("main", "Hub revision; the resolved commit is logged", kind="text")
    backend: str = parameter(
        "transformers",
        "runtime: transformers, llama_cpp, vllm, openvino, fake, or one that an installed package adds",
        kind="backend",
    )
    quant: str = parameter(
        "none",
        listed(),
        kind="quant",
        sweep=True,
    )
    group_size: int = parameter(
        128,
        f"quant={','.join(schemes_with('group_size'))}: weights that share a scale",
        kind="count",
        low=16,
        high=1024,
    )
    int8_threshold: float = parameter(
        6,
        f"quant={','.join(schemes_with('int8_threshold'))}: compute activations beyond this magnitude "
        "in 16 bits; 0 = none",
        kind="number",
        sweep=True,
        low=0,
        high=1e6,
        scenarios="offline batching",
    )
    double_quant: bool = parameter(
        False,
        f"quant={','.join(schemes_with('double_quant'))}: quantize the block scales too",
        kind="flag",
        sweep=True,
        scenarios="offline batching",
    )
    quant_budget: str | None = parameter(
        None,
        "quant=mixed: most memory for weights, 5.5 (bits per weight) or 300MB (the whole model)",
        kind="budget",
        unset="none",
    )
    quant_plan: str | None = parameter(
        None, "quant=mixed: quant_plan.json of an earlier run, in place of a budget", kind="plan_file", unset="none"
    )
    batch_size: int = parameter(1, "rows in one forward pass", kind="count", sweep=True, high=4096)
    prompt_tokens: int | None = parameter(
        128,
        "exact prompt length in tokens; auto = the workload's own lengths",
        kind="count",
        sweep=True,
        unset="auto",
        high=1_000_000,
    )
    output_tokens: int = parameter(
        128, "exact number of generated tokens per row", kind="count", sweep=True, high=1_000_000
    )
    workload: str = parameter(
        "synthetic",
        "synthetic (seeded ids), mixed (seeded ids of varying lengths), qa, summarization, creative, code, chat, "
        "domain, or a JSONL file",
        kind="workload",
        sweep=True,
    )
    history: str = parameter(
        "none",
        "conversations: none (each is one prompt), or turn by turn with the history recomputed, kept (in the KV "
        "cache) or sent (to a server)",
        kind="history",
        sweep=True,
    )
    warmup: int | None = parameter(
        None, "discarded runs: auto (at least 3, until steady) or a number", kind="count", unset="auto", high=10_000
    )
    repetitions: int | None = parameter(
        None,
        "timed runs: auto (at least 5, until the interval is narrow) or a number",
        kind="count",
        unset="auto",
        high=1_000_000,
    )
    max_repetitions: int = parameter(30, "most repetitions with repetitions=auto", kind="count", low=5, high=1_000_000)
    precision_target: float = parameter(
        0.02,
        "repetitions=auto stops at this relative half-width of the 95 % interval of the throughput",
        kind="number",
        low=0.0001,
        high=1,
    )
    processes: int = parameter(1, "fresh worker processes per cell", kind="count", high=1000)
    device: str = parameter("auto", "auto, cpu, cuda or cuda:N", kind="device")
    threads: int | None = parameter(
        None,
        "CPU threads of the worker; auto = physical cores it may use",
        kind="count",
        sweep=True,
        unset="auto",
        high=4096,
    )
    worker_python: str | None = parameter(
        None,
        "Python of another environment to run the worker with; none = the Python of this command",
        kind="interpreter",
        unset="none",
        scenarios="offline batching",
    )
    gpu_layers: int | None = parameter(
        None,
        "backend=llama_cpp: layers on the GPU; auto = all with a CUDA device, else none",
        kind="count",
        sweep=True,
        unset="auto",
        low=0,
        high=10_000,
        scenarios="offline batching",
    )
    mmap: bool = parameter(
        True,
        "backend=llama_cpp: map the file into memory instead of reading it whole",
        kind="flag",
        scenarios="offline batching",
    )
    attention: str = parameter(
        "auto",
        "auto, eager, sdpa, flash_attention_2, flash_attention_3 or flex_attention",
        kind="attention",
        sweep=True,
    )
    kv_cache: str | None = parameter(
        None,
        "KV cache type: auto (dtype of the computation), fp8, int8, int4, int2; llama.cpp: f32, f16, bf16, q8_0, "
        "q5_1, q5_0, q4_1, q4_0",
        kind="kv_cache",
        sweep=True,
        unset="auto",
        scenarios="offline batching",
    )
    decode: str = parameter(
        "generate",
        "generate, compiled (static cache, torch.compile, CUDA graphs), prompt_lookup, or assisted (by a draft model)",
        kind="decode",
        sweep=True,
    )
    assistant: str | None = parameter(
        None,
        "decode=assisted: draft model with the same vocabulary (preset, Hub id or local folder)",
        kind="text",
        sweep=True,
        unset="none",
        scenarios="offline batching",
    )
    draft_tokens: int = parameter(
        10,
        "decode=prompt_lookup,assisted: most tokens proposed per step",
        kind="count",
        sweep=True,
        high=1000,
        scenarios="offline batching",
    )
    seed: int = parameter(0, "seed of prompts, random weights and arrival times", kind="count", low=0, high=2**31 - 1)
    batching: str | None = parameter(
        None,
        "batch a request stream in process: static, dynamic or continuous; batch_size is the maximum",
        kind="batching",
        sweep=True,
        unset="none",
        scenarios="batching",
    )
    batch_wait_ms: float = parameter(
        100,
        "batching=dynamic: longest time a request waits for others, ms",
        kind="number",
        low=0,
        high=1e9,
        scenarios="batching",
    )
    trust_remote_code: bool = parameter(False, "run code that comes with a model; recorded", kind="flag")
    allow_pickle: bool = parameter(
        False, "read pickled weights (.bin) if there are no safetensors; recorded", kind="flag"
    )
    url: str | None = parameter(
        None,
        "server to measure, with backend=openai: http://127.0.0.1:8000",
        kind="url",
        unset="none",
        scenarios="online",
    )
    launch: str | None = parameter(
        None,
        "command that starts the server, with {port} and, where it needs them, {model} and {quant}; separate several "
        "by ' ; '",
        kind="launch",
        sweep=True,
        unset="none",
        scenarios="online",
        separator=" ; ",
    )
    endpoint: str = parameter(
        "completions",
        "completions (/v1/completions) or chat (/v1/chat/completions)",
        kind="endpoint",
        scenarios="online",
    )
    concurrency: int = parameter(
        1,
        "closed loop: users, each of whom waits for an answer before the next request",
        kind="count",
        sweep=True,
        high=65536,
        scenarios="online",
    )
    request_rate: float | None = parameter(
        None,
        "open loop: requests per second, sent whether or not earlier ones are answered",
        kind="number",
        sweep=True,
        unset="none",
        low=0.001,
        scenarios="batching online",
    )
    ramp_to: float | None = parameter(
        None,
        "open loop: final rate; it rises evenly from request_rate over each repetition",
        kind="number",
        unset="none",
        low=0.001,
        scenarios="online",
    )
    trace: str | None = parameter(
        None,
        "open loop of recorded requests: JSON Lines file of timestamp (ms), input_length, output_length",
        kind="trace",
        unset="none",
        scenarios="online",
    )
    arrival: str = parameter(
        "poisson",
        "open loop: gaps between requests are poisson, constant or gamma",
        kind="arrival",
        scenarios="batching online",
    )
    burstiness: float = parameter(
        1,
        "arrival=gamma: shape; 1 = poisson, below 1 = bursts, above 1 = more even",
        kind="number",
        low=0.01,
        high=1e6,
        scenarios="batching online",
    )
    client_processes: int | None = parameter(
        None,
        "processes that send requests and time answers; auto = each uses less than half its core, and the server "
        "keeps one core",
        kind="count",
        unset="auto",
        high=256,
        scenarios="online",
    )
    requests: int | None = parameter(
        None,
        "requests (history=sent: conversations) per repetition; auto = 4 per user, or 10 s at the rate, at least 12",
        kind="count",
        unset="auto",
        scenarios="batching online",
    )
    duration_s: float | None = parameter(
        None,
        "start no request later than this many seconds into a repetition",
        kind="number",
        unset="none",
        low=0.1,
        high=1e6,
        scenarios="online",
    )
    request_timeout_s: float = parameter(
        600, "seconds after which a request has failed", kind="number", low=0.1, high=86400, scenarios="online"
    )
    slo_ttft_ms: float | None = parameter(
        None,
        "goodput: longest time to the first token",
        kind="number",
        unset="none",
        low=0,
        scenarios="batching online",
    )
    slo_tpot_ms: float | None = parameter(
        None,
        "goodput: longest mean time per token after the first",
        kind="number",
        unset="none",
        low=0,
        scenarios="batching online",
    )
    slo_e2e_ms: float | None = parameter(
        None,
        "goodput: longest time for a whole answer",
        kind="number",
        unset="none",
        low=0,
        scenarios="batching online",
    )

    @property
    def mean_rate(self) -> float | None:
        """Mean requests per second of an open loop over a whole repetition."""
        return (
            self.request_rate
            if self.request_rate is None or self.ramp_to is None
            else (self.request_rate + self.ramp_to) / 2
        )

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
    told = "quant" in names and all(cell.backend == backend_of("transformers", cell.quant) for cell in cells)
    return [name for name in names if name != "backend" or not told]


@dataclass(frozen=True)
class Options:
    """Parameters of a whole command; they do not decide a result."""

    preset: str | None = parameter(
        None, "grid of parameters: quick or effillm; parameters given besides override it", kind="preset", unset="none"
    )
    output_dir: str = parameter("llmbench-results", "folder for results (the journal)", kind="text")
    on: str = parameter(
        "here", "where to measure: here, ray (this machine's Ray cluster), or ray://host:port", kind="place"
    )
    price_per_hour: float | None = parameter(
        None, "price of this machine per hour, for cost metrics", kind="number", unset="none", low=0
    )
    force: bool = parameter(False, "measure cells that are estimated not to fit in memory", kind="flag")
    quality: str = parameter(
        "none",
        "auto = after timing, measure KL divergence from the unquantized model, top-1 agreement and perplexity",
        kind="quality",
    )
    quality_text: str = parameter("bundled", "text for perplexity: bundled, or a text file", kind="text_file")
    quality_reference: str | None = parameter(
        None,
        "unquantized model (Hub id or folder) to compare an already quantized one with; none = the model without its "
        "quantization",
        kind="text",
        unset="none",
    )
    quality_tasks: str | None = parameter(
        None,
        "lm-eval tasks to evaluate after timing: names, YAML files or folders, separated by commas",
        kind="tasks",
        unset="none",
    )
    quality_limit: int | None = parameter(
        None, "most documents per lm-eval task; none = all", kind="count", unset="none"
    )
    twin: bool = parameter(
        False,
        "with launch: also measure each configuration without a server, as one batch of the transformers backend",
        kind="flag",
        scenarios="online",
    )
    find: str | None = parameter(
        None,
        "goodput = search for the highest request rate that meets the SLOs, starting at request_rate or at one user's "
        "rate",
        kind="find",
        unset="none",
        scenarios="online",
    )
    attainment: float = parameter(
        0.9,
        "find=goodput: share of requests that must meet every SLO",
        kind="number",
        low=0.01,
        high=0.999,
        scenarios="online",
    )
    slo: str | None = parameter(
        None,
        "SLOs of an MLPerf benchmark, for those not given: llama2-70b, llama2-70b-interactive, llama3.1-8b or "
        "llama3.1-8b-interactive",
        kind="slo",
        unset="none",
        scenarios="batching online",
    )
    rerun: bool = parameter(
        False, "measure again even if this configuration, environment and workload were measured before", kind="flag"
    )
    memory_limit: int | None = parameter(
        None,
        "most memory a worker may need, such as 6GB; auto = free memory less a twentieth of the machine's",
        kind="size",
        unset="auto",
        low=100e6,
        high=1e15,
    )
    load_timeout_s: float | None = parameter(
        3600, "seconds allowed for loading (downloads have no limit)", kind="number", unset="none", low=0.1
    )
    first_token_timeout_s: float | None = parameter(
        3600, "seconds allowed from a cell's start to its first token", kind="number", unset="none", low=0.1
    )
    repetition_timeout_s: float | None = parameter(
        3600, "seconds allowed for one run of a cell, warm-up or timed", kind="number", unset="none", low=0.1
    )
    cell_timeout_s: float | None = parameter(
        None, "seconds allowed for a whole cell", kind="number", unset="none", low=0.1
    )


PARAMETERS: dict[str, Field[Any]] = {f.name: f for kind in (Cell, Options) for f in dataclasses.fields(kind)}
"""Name → declaration, in the order of the vocabulary."""

SWEEPABLE = tuple(name for name, f in PARAMETERS.items() if f.metadata["sweep"])

LENGTHS = ("prompt_tokens", "output_tokens")
"""Parameters that a trace replaces."""

MEANT_WITH = {
    **{setting: ("quant", schemes_with(setting)) for setting in ("int8_threshold", "double_quant")},
    "assistant": ("decode", ("assisted",)),
    "draft_tokens": ("decode", SPECULATIVE),
}
"""Setting → the parameter and values with which it has a meaning. Other cells have it at its default."""


def as_text(name: str, value: object) -> str:
    """Return a value as written on the command line and logged: `auto` or `none` for None, `true`/`false`, 0.02."""
    if value is None:
        return str(PARAMETERS[name].metadata["unset"])
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def default_text(name: str) -> str:
    """The default of a parameter as text."""
    return as_text(name, PARAMETERS[name].default)
