"""Types of the keyword arguments of `run`, `online` and `tune`, generated from the declarations by `make reference`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal, TypedDict


class SharedParameters(TypedDict, total=False):
    """Parameters of `run` and `online`."""

    model: str | PathLike[str] | Sequence[str | PathLike[str]]
    """preset name, Hub id, local folder, or .gguf file"""

    quant: str | Sequence[str]
    """none (the checkpoint's dtype), fp32, fp16, bf16; bitsandbytes: int8, int4 (NF4), fp4, mixed (chosen per block);
    GPTQ: gptq (4 bits), gptq3, gptq8; torchao: int8-wo, int4-wo, int8-dq, fp8; HQQ: hqq8, hqq4, hqq3, hqq2; Quanto:
    quanto8, quanto4, quanto2; llama.cpp: q8_0, q6_k, q5_k_m, q4_k_m, q4_0, q3_k_m, q2_k"""

    prompt_tokens: int | str | Sequence[int | str]
    """exact prompt length in tokens; auto = the workload's own lengths"""

    output_tokens: int | str | Sequence[int | str]
    """exact number of generated tokens per row"""

    workload: str | PathLike[str] | Sequence[str | PathLike[str]]
    """synthetic (seeded ids), mixed (seeded ids of varying lengths), qa, summarization, creative, code, chat, domain,
    or a JSONL file"""

    history: str | Sequence[str]
    """conversations: none (each is one prompt), or turn by turn with the history recomputed, kept (in the KV cache) or
    sent (to a server)"""

    warmup: int | Literal["auto"]
    """discarded runs: auto (at least 3, until steady) or a number"""

    repetitions: int | Literal["auto"]
    """timed runs: auto (64 or a minute, at least 20; more until the interval is narrow) or a number"""

    max_repetitions: int
    """most repetitions with repetitions=auto"""

    precision_target: float
    """repetitions=auto stops at this relative half-width of the 95 % interval of the throughput"""

    processes: int
    """fresh worker processes per cell"""

    seed: int
    """seed of prompts, random weights and arrival times"""

    request_rate: float | str | Sequence[float | str] | None
    """open loop: requests per second, sent whether or not earlier ones are answered"""

    arrival: Literal["poisson", "constant", "gamma"]
    """open loop: distribution of the gaps between requests"""

    burstiness: float
    """arrival=gamma: shape; 1 = poisson, below 1 = bursts, above 1 = more even"""

    requests: int | Literal["auto"]
    """requests (history=sent: conversations) per repetition; auto = 4 per user, or 10 s at the rate, at least 12"""

    slo_ttft_ms: float | None
    """goodput: longest time to the first token"""

    slo_tpot_ms: float | None
    """goodput: longest mean time per token after the first"""

    slo_e2e_ms: float | None
    """goodput: longest time for a whole answer"""

    output_dir: str | PathLike[str]
    """folder for results (the journal)"""

    price_per_hour: float | None
    """price of this machine per hour, for cost metrics"""

    slo: Literal["llama2-70b", "llama2-70b-interactive", "llama3.1-8b", "llama3.1-8b-interactive"] | None
    """SLOs of an MLPerf benchmark, for those not given"""

    rerun: bool
    """measure again even if this configuration, environment and workload were measured before"""

    load_timeout_s: float | Literal["none"]
    """seconds allowed for loading (downloads have no limit)"""

    first_token_timeout_s: float | Literal["none"]
    """seconds allowed from a cell's start to its first token"""

    repetition_timeout_s: float | Literal["none"]
    """seconds allowed for one run of a cell, warm-up or timed"""

    cell_timeout_s: float | None
    """seconds allowed for a whole cell"""


class RunParameters(SharedParameters, total=False):
    """Parameters of `run`."""

    weights: Literal["hub", "random"]
    """weights from the Hub or a local folder, or random ones in the architecture of a preset (seeded)"""

    revision: str | PathLike[str]
    """Hub revision; the resolved commit is logged"""

    backend: str
    """runtime that runs the model; installed packages can add others"""

    group_size: int
    """quant=gptq,gptq3,gptq8,int4-wo,hqq8,hqq4,hqq3,hqq2: weights that share a scale"""

    int8_threshold: float | str | Sequence[float | str]
    """quant=int8: compute activations beyond this magnitude in 16 bits; 0 = none"""

    double_quant: bool | str | Sequence[bool | str]
    """quant=int4,fp4: quantize the block scales too"""

    quant_budget: float | str | None
    """quant=mixed: most memory for weights, 5.5 (bits per weight) or 300MB (the whole model)"""

    quant_plan: str | PathLike[str] | None
    """quant=mixed: quant_plan.json of an earlier run, in place of a budget"""

    prune: str | Sequence[str] | None
    """structured pruning before any quantization: remove a share of the layers, of each MLP's width, or of the heads
    (layers-25%, mlp-25%, heads-50%)"""

    batch_size: int | str | Sequence[int | str]
    """rows in one forward pass"""

    device: str
    """where the model runs"""

    threads: int | str | Sequence[int | str]
    """CPU threads of the worker; auto = physical cores it may use"""

    tensor_parallel: int | str | Sequence[int | str]
    """ranks that share every layer: one process for each, and one GPU for each where the device is a GPU"""

    placement: str | Sequence[str]
    """single (the model on one device), or auto: its layers over the visible devices, then host memory, then the
    disk"""

    worker_python: str | PathLike[str] | None
    """Python of another environment to run the worker with; none = the Python of this command"""

    gpu_layers: int | str | Sequence[int | str]
    """backend=llama_cpp: layers on the GPU; auto = all with a CUDA device, else none"""

    mmap: bool
    """backend=llama_cpp: map the file into memory instead of reading it whole"""

    attention: str | Sequence[str]
    """implementation of attention"""

    kv_cache: str | Sequence[str]
    """KV cache type: auto (dtype of the computation), fp8, int8, int4, int2; llama.cpp: f32, f16, bf16, q8_0, q5_1,
    q5_0, q4_1, q4_0"""

    decode: str | Sequence[str]
    """generate, compiled (static cache, torch.compile, CUDA graphs), prompt_lookup, or assisted (by a draft model)"""

    assistant: str | PathLike[str] | Sequence[str | PathLike[str]] | None
    """decode=assisted: draft model with the same vocabulary (preset, Hub id or local folder)"""

    draft_tokens: int | str | Sequence[int | str]
    """decode=prompt_lookup,assisted: most tokens proposed per step"""

    batching: str | Sequence[str] | None
    """batch a request stream in process; batch_size is the maximum"""

    batch_wait_ms: float
    """batching=dynamic: longest time a request waits for others, ms"""

    trust_remote_code: bool
    """run code that comes with a model; recorded"""

    allow_pickle: bool
    """read pickled weights (.bin) if there are no safetensors; recorded"""

    preset: Literal["quick", "effillm"] | None
    """grid of parameters; those given besides override it"""

    on: str
    """where to measure: on this machine, on its Ray cluster, or on another cluster"""

    nominal_bandwidth: float | None
    """memory bandwidth of the device by its data sheet, GB/s; MBU is then relative to it"""

    force: bool
    """measure cells that are estimated not to fit in memory"""

    quality: Literal["none", "auto"]
    """auto: after timing, measure KL divergence from the unquantized model, top-1 agreement and perplexity"""

    quality_text: str | PathLike[str]
    """text for perplexity: bundled, or a text file"""

    quality_reference: str | PathLike[str] | None
    """unquantized model (Hub id or folder) to compare an already quantized one with; none = the model without its
    quantization"""

    quality_tasks: str | None
    """lm-eval tasks to evaluate after timing: names, YAML files or folders, separated by commas"""

    quality_limit: int | None
    """most documents per lm-eval task; none = all"""

    memory_limit: int | str
    """most memory a worker may need, such as 6GB; auto = free memory less a twentieth of the machine's"""


class OnlineParameters(SharedParameters, total=False):
    """Parameters of `online`."""

    url: str | None
    """server to measure, with backend=openai: http://127.0.0.1:8000"""

    launch: str | Sequence[str] | None
    """command that starts the server, with {port} and, where it needs them, {model} and {quant}; separate several by '
    ; '"""

    prefix_tokens: int | str | Sequence[int | str] | None
    """beginning of each prompt that a group of requests or conversations shares, such as a system prompt; part of
    prompt_tokens"""

    prefix_count: int | str | Sequence[int | str]
    """different prefixes of prefix_tokens, each for one group of requests"""

    endpoint: Literal["completions", "chat", "responses", "embeddings"]
    """completions (/v1/completions), chat (/v1/chat/completions), responses (/v1/responses), or embeddings
    (/v1/embeddings: no output tokens)"""

    temperature: float
    """sampling temperature that requests ask for; 0 = always the likeliest token"""

    ignore_eos: Literal["auto", "true", "false"]
    """answers go on to output_tokens: auto (where the server can), true (needed), or false (they end where the model
    ends them)"""

    thinking: Literal["auto", "off"]
    """auto (as the server does), or off: ask for answers without reasoning, and check that none comes"""

    max_tokens_field: Literal["auto", "max_tokens", "max_completion_tokens"]
    """field that asks for output_tokens: auto (max_tokens, or where that is refused max_completion_tokens)"""

    extra_body: Mapping[str, object] | str | PathLike[str] | None
    """further fields of each request as JSON, or a file of it: {"top_p": 0.9, "chat_template_kwargs": {…}}; a value
    $NAME comes from the environment"""

    headers: Mapping[str, str] | str | PathLike[str] | None
    """further headers as JSON, or a file of it: {"X-Key": "$GATEWAY_KEY"}; keys only as $NAME, from the environment"""

    tls_ca: str | PathLike[str] | None
    """certificates of the authority that a server's own is verified by (PEM), in place of the system's"""

    tls_cert: str | PathLike[str] | None
    """certificate that the client shows (PEM), with its key unless tls_key is given"""

    tls_key: str | PathLike[str] | None
    """key of tls_cert (PEM); its password comes from LLMBENCH_TLS_PASSWORD"""

    proxy: Literal["environment"] | None
    """environment = connect by the proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name"""

    concurrency: int | str | Sequence[int | str]
    """closed loop: users, each of whom waits for an answer before the next request"""

    ramp_to: float | None
    """open loop: final rate; it rises evenly from request_rate over each repetition"""

    trace: str | PathLike[str] | None
    """open loop of recorded requests: JSON Lines file of timestamp (ms), input_length, output_length, and where prompts
    share blocks of 512 tokens hash_ids, as Mooncake's traces"""

    client_processes: int | Literal["auto"]
    """processes that send requests and time answers; auto = each uses less than half its core, and the server keeps one
    core"""

    duration_s: float | None
    """start no request later than this many seconds into a repetition"""

    request_timeout_s: float
    """seconds after which a request has failed"""

    twin: bool
    """with launch: also measure each configuration without a server, as one batch of the transformers backend"""

    find: Literal["goodput"] | None
    """goodput = search for the highest request rate that meets the SLOs, starting at request_rate or at one user's
    rate"""

    attainment: float
    """find=goodput: share of requests that must meet every SLO"""


class TuneParameters(RunParameters, OnlineParameters, total=False):
    """Parameters of `tune`."""
