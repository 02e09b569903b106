"""What is asked: every parameter, declared once as a field of a cell, or of the options of a whole command."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .quantizations import backend_of

DRAWN = ("synthetic", "mixed")
"""Workloads without texts: their prompts are drawn from the vocabulary."""

SPECULATIVE = ("prompt_lookup", "assisted")
"""Decode paths that check proposed tokens, several of them in one step."""


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
    weights: str = parameter(
        "hub", "hub (or local files), or random (architecture of the preset, seeded)", kind="weights"
    )
    revision: str = parameter("main", "Hub revision; the resolved commit is logged", kind="text")
    backend: str = parameter("transformers", "what runs the model", kind="backend")
    quant: str = parameter(
        "none",
        "none (the checkpoint's dtype), fp32, fp16, bf16, int8, int4 (NF4), fp4, gptq (4 bits), gptq3, gptq8; torchao's int8-wo, int4-wo, int8-dq, fp8; "
        "hqq8 to hqq2; quanto8 to quanto2; mixed (by block); llama.cpp's q8_0, q6_k, q5_k_m, q4_k_m, q4_0, q3_k_m, q2_k",
        kind="quant",
        sweep=True,
    )
    group_size: int = parameter(
        128, "weights that share a scale, for gptq, int4-wo and hqq", kind="count", low=16, high=1024
    )
    int8_threshold: float = parameter(
        6,
        "quant=int8: activations beyond it are computed in 16 bits; 0 = none are",
        kind="number",
        sweep=True,
        low=0,
        high=1e6,
        scenarios="offline batching",
    )
    double_quant: bool = parameter(
        False,
        "quant=int4,fp4: the scales of the blocks are quantized too",
        kind="flag",
        sweep=True,
        scenarios="offline batching",
    )
    quant_budget: str | None = parameter(
        None,
        "quant=mixed: the most that the weights may take, 5.5 (bits per weight) or 300MB (the whole model)",
        kind="budget",
        unset="none",
    )
    quant_plan: str | None = parameter(
        None, "quant=mixed: the quant_plan.json of an earlier run, in place of a budget", kind="plan_file", unset="none"
    )
    batch_size: int = parameter(1, "rows in one forward pass", kind="count", sweep=True, high=4096)
    prompt_tokens: int | None = parameter(
        128,
        "exact prompt length in tokens; auto = as the workload gives it",
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
    max_repetitions: int = parameter(30, "where auto stops", kind="count", low=5, high=1_000_000)
    precision_target: float = parameter(
        0.02,
        "relative half-width of the 95 % interval of the throughput at which auto stops",
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
        "interpreter that runs the worker, of an environment with other packages; none = the one of the command",
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
        "backend=llama_cpp: map the file into memory, instead of reading it whole",
        kind="flag",
        scenarios="offline batching",
    )
    attention: str = parameter(
        "auto", "auto, eager, sdpa, flash_attention_2, … as the library names them", kind="attention", sweep=True
    )
    kv_cache: str | None = parameter(
        None,
        "type of the KV cache; auto = the dtype of the computation; fp8, int8, int4, int2; llama.cpp's f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0",
        kind="kv_cache",
        sweep=True,
        unset="auto",
        scenarios="offline batching",
    )
    decode: str = parameter(
        "generate",
        "generate, compiled (static cache, torch.compile, CUDA graphs), prompt_lookup, or assisted (a small model proposes tokens)",
        kind="decode",
        sweep=True,
    )
    assistant: str | None = parameter(
        None,
        "decode=assisted: the small model that proposes tokens: preset, Hub id or local folder",
        kind="text",
        sweep=True,
        unset="none",
        scenarios="offline batching",
    )
    draft_tokens: int = parameter(
        10,
        "decode=prompt_lookup,assisted: tokens that are proposed for each step, at most",
        kind="count",
        sweep=True,
        high=1000,
        scenarios="offline batching",
    )
    seed: int = parameter(0, "prompts, random weights, arrival schedule", kind="count", low=0, high=2**31 - 1)
    batching: str | None = parameter(
        None,
        "how requests that come one by one are batched here: static, dynamic, continuous, or none",
        kind="batching",
        sweep=True,
        unset="none",
        scenarios="batching",
    )
    batch_wait_ms: float = parameter(
        100,
        "batching=dynamic: the longest that a request waits for others",
        kind="number",
        low=0,
        high=1e9,
        scenarios="batching",
    )
    trust_remote_code: bool = parameter(False, "run code that comes with a model; recorded", kind="flag")
    allow_pickle: bool = parameter(
        False, "read weights that are a pickle (.bin) where there are no safetensors; recorded", kind="flag"
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
        "command that starts the server, with {port} and where it needs them {model} and {quant}; several with ' ; ' between",
        kind="launch",
        sweep=True,
        unset="none",
        scenarios="online",
        separator=" ; ",
    )
    endpoint: str = parameter(
        "completions",
        "completions or chat: /v1/completions or /v1/chat/completions",
        kind="endpoint",
        scenarios="online",
    )
    concurrency: int = parameter(
        1,
        "closed loop: users who each wait for their answer before they ask again",
        kind="count",
        sweep=True,
        high=65536,
        scenarios="online",
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
        None,
        "open loop: the rate rises evenly from request_rate to this one over each repetition",
        kind="number",
        unset="none",
        low=0.001,
        scenarios="online",
    )
    trace: str | None = parameter(
        None,
        "open loop of recorded requests: a JSON Lines file of timestamp (ms), input_length and output_length",
        kind="trace",
        unset="none",
        scenarios="online",
    )
    arrival: str = parameter(
        "poisson", "open loop: poisson, constant or gamma", kind="arrival", scenarios="batching online"
    )
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
        None,
        "no request of a repetition is begun later than this",
        kind="number",
        unset="none",
        low=0.1,
        high=1e6,
        scenarios="online",
    )
    request_timeout_s: float = parameter(
        600, "after this a request has failed", kind="number", low=0.1, high=86400, scenarios="online"
    )
    slo_ttft_ms: float | None = parameter(
        None, "goodput: the most for the first token", kind="number", unset="none", low=0, scenarios="batching online"
    )
    slo_tpot_ms: float | None = parameter(
        None,
        "goodput: the most per token after the first",
        kind="number",
        unset="none",
        low=0,
        scenarios="batching online",
    )
    slo_e2e_ms: float | None = parameter(
        None, "goodput: the most for a whole answer", kind="number", unset="none", low=0, scenarios="batching online"
    )

    @property
    def mean_rate(self) -> float | None:
        """Requests per second of an open loop over a whole repetition."""
        return (
            self.request_rate
            if self.request_rate is None or self.ramp_to is None
            else (self.request_rate + self.ramp_to) / 2
        )

    @property
    def open_loop(self) -> bool:
        """Whether requests come when they come, whatever has been answered."""
        return self.request_rate is not None or self.trace is not None

    @property
    def scenario(self) -> str:
        """`online` where a server is measured, `batching` where a stream of requests is batched in process, else `offline`."""
        return "online" if self.url or self.launch else "batching" if self.batching else "offline"


def differing(cells: Sequence[Cell], without: Collection[str] = ()) -> list[str]:
    """Parameters in which cells differ, to name them by; not their backend where the words for their quantizations tell it."""
    names = [
        f.name for f in fields(Cell) if f.name not in without and len({getattr(cell, f.name) for cell in cells}) > 1
    ]
    told = "quant" in names and all(cell.backend == backend_of("transformers", cell.quant) for cell in cells)
    return [name for name in names if name != "backend" or not told]


@dataclass(frozen=True)
class Options:
    """Parameters of a whole command that do not decide a result."""

    preset: str | None = parameter(
        None, "a grid of parameters: quick or effillm; what is given besides overrides it", kind="preset", unset="none"
    )
    output_dir: str = parameter("llmbench-results", "the journal's folder", kind="text")
    on: str = parameter(
        "here", "where it is measured: here, ray (the Ray cluster of this machine), or ray://host:port", kind="place"
    )
    price_per_hour: float | None = parameter(
        None, "money per hour of this machine, for cost metrics", kind="number", unset="none", low=0
    )
    force: bool = parameter(False, "try cells that are estimated not to fit in memory", kind="flag")
    quality: str = parameter(
        "none",
        "auto = KL divergence and top-1 agreement against the unquantized model, and perplexity, after the measurement",
        kind="quality",
    )
    quality_text: str = parameter(
        "bundled", "what perplexity is measured on: bundled, or a text file", kind="text_file"
    )
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
    quality_limit: int | None = parameter(
        None, "documents of each of these tasks at most; none = all", kind="count", unset="none"
    )
    twin: bool = parameter(
        False,
        "launch: measure each configuration without its server too, as one batch of the transformers backend",
        kind="flag",
        scenarios="online",
    )
    find: str | None = parameter(
        None,
        "goodput = search for the highest request rate that meets the SLOs, from request_rate or from what one user gets",
        kind="find",
        unset="none",
        scenarios="online",
    )
    attainment: float = parameter(
        0.9,
        "find: the share of requests that has to meet every SLO",
        kind="number",
        low=0.01,
        high=0.999,
        scenarios="online",
    )
    slo: str | None = parameter(
        None,
        "SLOs of an MLPerf benchmark where none are given: llama2-70b, llama2-70b-interactive, llama3.1-8b or llama3.1-8b-interactive",
        kind="slo",
        unset="none",
        scenarios="batching online",
    )
    rerun: bool = parameter(
        False,
        "measure again what was measured before with the same configuration, environment and workload",
        kind="flag",
    )
    memory_limit: int | None = parameter(
        None,
        "most memory that a worker may need, such as 6GB; auto = what is free here, less a twentieth",
        kind="size",
        unset="auto",
        low=100e6,
        high=1e15,
    )
    load_timeout_s: float | None = parameter(
        3600, "most seconds for loading (downloads have no limit)", kind="number", unset="none", low=0.1
    )
    first_token_timeout_s: float | None = parameter(
        3600, "most seconds from a cell's start to its first token", kind="number", unset="none", low=0.1
    )
    repetition_timeout_s: float | None = parameter(
        3600, "most seconds for one run of a cell, warm-up or timed", kind="number", unset="none", low=0.1
    )
    cell_timeout_s: float | None = parameter(
        None, "most seconds for a whole cell", kind="number", unset="none", low=0.1
    )
