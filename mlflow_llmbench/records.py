"""The nouns: frozen dataclasses that say what was seen and what it means; what was asked is a `Cell`.

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

from .cell import Cell
from .metrics import SPOILED_CPU_LIMIT
from .quant_plan import QuantPlan

SCHEMA = 1

T = TypeVar("T")


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
    made: str | None = (
        None  # file or folder that was run, where it was made of the checkpoint, or is one file of a repository
    )


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
    finish: str = ""  # why the model stopped, in the server's word; empty without a server
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
        """Whether each stamp is that of one token; of a server that does not tell its count this is not known, and a chunk may hold several."""
        if self.tokens is None and self.finish:
            return False
        return self.output_tokens == len(self.stamps_ns) and (
            self.chunk_tokens is None or max(self.chunk_tokens, default=1) == 1
        )


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
    same_tokens: tuple[
        int, ...
    ] = ()  # per row of the first repetition: output tokens before the first that plain decoding does not give
    same_replies: tuple[
        bool, ...
    ] = ()  # per turn of a conversation with kept history: whether recomputing gives the same reply
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
        return typing.cast(Any, kind)(
            **{key: _build(types_of[key], value) for key, value in data.items() if key in known}
        )
    return data
