"""Records: frozen dataclasses of what was measured and what it means. The request itself is a `Cell`.

They only check themselves. Times are integer nanoseconds of one monotonic clock, sizes are bytes, absent values are
None. `codec` turns them to JSON and back; `FORMAT` is the version of their format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .cell import Cell
from .mixed_plan import QuantPlan
from .noise import OMITTED, Noise

FORMAT = 1
"""Version of the format of result.json. The figures in MLflow have a version of their own, `metrics.SCHEMA`."""

FIRST_RULES, RULES = 1, 2
"""Rules of verdicts. By the first ones, contention was judged from 0.5 s of repetitions on, by CPU times alone, and the
client's lateness by fixed limits: results of that time keep the verdict that they were published with."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model before it is loaded: its location, its commit, its configuration."""

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
    pruned: str | None = field(default=None, metadata=OMITTED)  # what is removed; `config` has the sizes that are left

    @property
    def identity(self) -> list[str]:
        """Identity of the model, however it was named: its Hub repository, or else its name, and revision.

        What is pruned is part of the revision.
        """
        revision = f"{self.revision}+{self.pruned}" if self.pruned else self.revision
        return [self.location if self.source in ("hub", "preset") else self.name, revision]


@dataclass(frozen=True)
class RankLoad:
    """Part of the weights that one rank of a model holds, bytes. `mapped`: of them, those that lie in file mappings."""

    weight_bytes: int
    mapped: int = 0


@dataclass(frozen=True)
class PlacedPart:
    """Part of a model that lies in one place: `cuda:N`, `cpu` (host memory) or `disk`.

    `weight_bytes`: parameters and buffers, tied ones once · `modules`: names of the outermost modules that lie there;
    "" is the whole model.
    """

    place: str
    weight_bytes: int
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadInfo:
    """Properties of the model as loaded. `facts` become dotted params (`quant.kernel`, `model.dtype`, …)."""

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
    made: str | None = None  # file or folder that was run, if made from the checkpoint or one file of a repository
    devices: int | None = field(default=None, metadata=OMITTED)  # that hold the model, if several
    ranks: tuple[RankLoad, ...] | None = field(default=None, metadata=OMITTED)  # if several
    placement: tuple[PlacedPart, ...] | None = field(default=None, metadata=OMITTED)  # with placement=auto


CONTENT, REASONING, TOOLS, REFUSAL = "content", "reasoning", "tools", "refusal"
"""Channels of an answer; others have the name of the field in which their text came."""


@dataclass(frozen=True)
class RequestRecord:
    """One request: sent at `t0_ns`, output token i arrived at `stamps_ns[i − 1]`.

    `rows` rows of one forward pass share the stamps. From a server, a stamp is the arrival of a chunk, which may hold
    several tokens: `tokens` is the server's count of output tokens (None: one per stamp), `chunk_tokens` that of each
    chunk if reported. With speculative decoding a step brings several tokens: `tokens` is then the count per row, and
    `chunk_tokens` that of each step. `intended_ns`: intended sending time of an open loop · `visible_ns`: first token
    outside a reasoning channel · `end_ns`: end of the answer · `cached_tokens`: part of the prompt that was not
    recomputed, from the server's prefix cache or the kept history of a conversation · `asked`: requested prompt and
    output tokens, if they differ between requests · `conversation`, `turn` (from 1): position in a conversation with a
    server · `channels`: output tokens (chunks, if their sizes are not known) by channel, if not all are of the answer
    itself · `skipped`: events of the stream without choices and counts, such as keep-alives · `shared_tokens`: tokens
    at the beginning of the prompt that an earlier request of the repetition had too, if the load says what it shares ·
    `draft_tokens`, `accepted_tokens`: tokens that a server with speculative decoding says it proposed and accepted.
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
    channels: dict[str, int] | None = field(default=None, metadata=OMITTED)
    skipped: int | None = field(default=None, metadata=OMITTED)
    shared_tokens: int | None = field(default=None, metadata=OMITTED)
    draft_tokens: int | None = field(default=None, metadata=OMITTED)
    accepted_tokens: int | None = field(default=None, metadata=OMITTED)

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
        """Start for latencies: the intended sending time of an open loop, else the actual one."""
        return self.t0_ns if self.intended_ns is None else self.intended_ns

    @property
    def single_tokens(self) -> bool:
        """True if each stamp is that of one token.

        False if a server does not report its token count: a chunk may then hold several.
        """
        if self.tokens is None and self.finish:
            return False
        return self.output_tokens == len(self.stamps_ns) and (
            self.chunk_tokens is None or max(self.chunk_tokens, default=1) == 1
        )


@dataclass(frozen=True)
class ClientReadings:
    """Self-observation of the load client during one repetition.

    `started_ns`, `ended_ns`: first sending and end of the last answer · `lags_ns`: delays of its event loop's wake-ups,
    every 20 ms · `cpu_s`: CPU seconds of its one process · `retries`: requests resent because the server had closed an
    idle connection. If several processes sent the load, `parts` holds their readings, and the whole has sums and no
    lags.
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
    """Values that a server reported, by its own names, at `t_ns` (monotonic, arrival of its answer)."""

    t_ns: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class EngineReadings:
    """Readings of the engine that batched the requests of one repetition in process.

    `positions`: token positions computed, None if they cannot be counted · `needed`: positions that the answers need,
    Σ (prompt + output − 1) · `batches`: rows of each batch that was formed once; empty if the batch changes with every
    pass · `lags_ns`: per step of an engine with its own thread, our time stamp minus the engine's stamp of the step's
    first token.
    """

    positions: int | None
    needed: int
    batches: tuple[int, ...] = ()
    lags_ns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Repetition:
    """One timed repetition. `wall_ms` is the epoch time of its start in milliseconds, for charts over real time.

    `requests` has only complete requests, so that no other enters a latency; failed ones are in `failed`. The requests
    of a conversation are its turns, in order. `server`: the server's reports before the load, about every second during
    it, and after it.
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
class LogitsCheck:
    """Logits of one untimed pass over the timed shape, seen step by step.

    `checked`: rows × steps that were seen, `nonfinite`: those of them with a NaN or an infinite value ·
    `first_token`: number of the first output token (from 1) that was chosen from such logits · `repetition`: the one
    whose prompts were given · `weights`: a few parameters that are not finite themselves.
    """

    checked: int
    nonfinite: int
    first_token: int | None = None
    repetition: int = 0
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class CellMeasurements:
    """The measurements of one cell, before they are judged.

    `outputs` holds prompt and output ids of each prompt's first repetition, for text workloads. The prompt of a
    conversation is everything before the last answer. `same_replies` and `same_tokens` are the results of
    `compare_replies` and `compare_decoding` in `measure.batch`. `zeros`: for each repetition, the most ids 0 at the end
    of a row, which logits give that are all NaN. `logits`: None if they were not looked at. `forward_ns`: times of the
    forward pass alone. `natural`: of each of `outputs`, the tokens after which the model ends its answer.
    """

    first_call_ms: float
    warmup_s: tuple[float, ...]
    steady: bool
    repetitions: tuple[Repetition, ...]
    outputs: tuple[tuple[list[int], list[int]], ...]
    same_replies: tuple[bool, ...] = ()
    text_times: TextTimes | None = None
    compile_s: float | None = None
    same_tokens: tuple[int, ...] = ()
    zeros: tuple[int, ...] | None = field(default=None, metadata=OMITTED)
    logits: LogitsCheck | None = field(default=None, metadata=OMITTED)
    collective_share: float | None = field(default=None, metadata=OMITTED)  # of a pass of several ranks
    forward_ns: tuple[int, ...] | None = field(default=None, metadata=OMITTED)
    natural: tuple[int | None, ...] | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class MemorySample:
    """Memory of the worker, seen from outside at `t_ns` (monotonic): resident, anonymous, and bytes on the device.

    `cpus`: mean number of CPUs that it used since the sample before.
    """

    t_ns: int
    rss: int
    anonymous: int
    device: int | None = None
    cpus: float | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class RankStages:
    """Memory of one rank at the stages, bytes, counted as that of all ranks together."""

    host_needed: Mapping[str, int] = field(default_factory=dict)
    device: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryStages:
    """Memory at the stages of a worker, bytes, with that of its other ranks if it has any.

    `host_rss` is exact (kernel high-water mark); see `metrics`. `ranks`: each of several ranks by itself.
    """

    host_rss: Mapping[str, int] = field(default_factory=dict)
    host_needed: Mapping[str, int] = field(default_factory=dict)
    device: Mapping[str, int] = field(default_factory=dict)
    device_reserved_peak: int | None = None
    ranks: tuple[RankStages, ...] | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class TextScores:
    """Scores of a text: negative log-likelihoods in nats, one list per window, one value per scored token.

    `reference_nll`: the same tokens scored by the unquantized model, if it could be run · `token_bytes`: UTF-8 bytes of
    the text that each scored token stands for. None if the tokenizer does not give the text back, and in results of
    earlier versions.
    """

    text: str
    tokens: int  # of the whole text
    window: int  # maximum tokens that the model sees
    stride: int  # tokens that each window after the first scores
    nll: tuple[tuple[float, ...], ...]
    reference_nll: tuple[tuple[float, ...], ...] = ()
    token_bytes: tuple[tuple[int, ...], ...] | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class TextTimes:
    """Nanoseconds to tokenize each prompt and to detokenize each answer, with the model's own tokenizer."""

    tokenize_ns: tuple[int, ...]
    detokenize_ns: tuple[int, ...]


@dataclass(frozen=True)
class Divergence:
    """Next-token distributions compared with the unquantized model's, one list per prompt, one value per position.

    `kl`: KL(reference‖this model) in nats over the whole vocabulary · `agrees`: True if the most probable tokens are
    the same · `digest`: of the token ids · `is_reference`: True if this is the reference itself, computed again.
    """

    reference: str
    digest: str
    kl: tuple[tuple[float, ...], ...]
    agrees: tuple[tuple[bool, ...], ...]
    is_reference: bool = False


@dataclass(frozen=True)
class TaskScore:
    """One metric of one lm-evaluation-harness task, with its standard error over documents, as reported there."""

    task: str
    metric: str  # with its filter, where that is not `none`: exact_match.strict-match
    value: float
    stderr: float | None = None
    documents: int | None = None
    version: str = ""
    part: bool = False  # of a group that was asked for and has a score of its own


@dataclass(frozen=True)
class Quality:
    """Raw quality figures of the loaded model; `withheld` says in sentences why figures are absent.

    `text_digest`: of the perplexity text · `tasks`: scores of lm-eval's tasks · `asked_tasks`: those asked for ·
    `tasks_digest`: hash of what decides them · `nonfinite`: where logits were not finite, as a sentence; None if
    nowhere.
    """

    text_digest: str = ""
    scores: TextScores | None = None
    divergence: Divergence | None = None
    withheld: tuple[str, ...] = ()
    asked_tasks: str = ""
    tasks_digest: str = ""
    tasks: tuple[TaskScore, ...] = ()
    nonfinite: str | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class Reason:
    """A reason of a verdict: its code in the vocabulary, and a sentence with the observation, the limit and advice."""

    code: str
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """Trust in the figures: `valid`, `suspect` or `invalid`, and the reasons."""

    word: str
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Reason why a cell has no result: the stage, and a one-line message."""

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
    # read_bytes_per_s, flops_per_s, and the evidence of `analysis.probe`
    peaks: Mapping[str, float] = field(default_factory=dict)
    nominal_bandwidth: float | None = None  # of the device by its maker, GB/s, if it was given
    idle_w: float | None = None  # power of the device before the load
    texts: tuple[Mapping[str, str], ...] = ()
    log: tuple[str, ...] = ()  # messages printed by third-party code, each once with its count
    failure: Failure | None = None
    predicted_bytes: int | None = None
    predicted_load_bytes: int | None = None  # None for results of earlier versions too
    # with placement=auto: place → bytes of weights that the plan expected there
    predicted_placement: Mapping[str, int] | None = field(default=None, metadata=OMITTED)
    price_per_hour: float | None = None
    compile_s: float | None = None  # for this cell's shape, before its first call; None where nothing is compiled
    # Per row of the first repetition: output tokens before the first that differs from plain decoding.
    same_tokens: tuple[int, ...] = ()
    # Per turn of a conversation with kept history: True if recomputing gives the same reply.
    same_replies: tuple[bool, ...] = ()
    text_times: TextTimes | None = None  # None if the prompts are not texts
    quality: Quality | None = None  # None where it was not asked for
    logits: LogitsCheck | None = field(default=None, metadata=OMITTED)  # None if they cannot be seen, or were not
    # Of several ranks: share of a pass that was spent in collectives; None if it was not measured.
    collective_share: float | None = field(default=None, metadata=OMITTED)
    forward_ns: tuple[int, ...] | None = field(default=None, metadata=OMITTED)  # of the forward pass alone
    # Of each text, in the order of the repetitions: tokens after which the model ends its answer; None if it does not.
    natural: tuple[int | None, ...] | None = field(default=None, metadata=OMITTED)
    sweep: str = ""
    linked: str = ""  # run (or folder) in which this result was measured, if it was not measured again
    # Run (or folder) in which the first processes were measured, if an earlier command was stopped before the last.
    resumed: str | None = field(default=None, metadata=OMITTED)
    # True if it was kept between cells: quality, unloaded memory, timeline and log come with the end of its group.
    incomplete: bool | None = field(default=None, metadata=OMITTED)
    schema: int = FORMAT
    # Rules of the verdict on the machine and the client. Files of versions before they were recorded have the first.
    rules: int = field(default=RULES, metadata={"absent": FIRST_RULES})

    def __repr__(self) -> str:
        what = f"{self.cell.model} {self.cell.quant} b{self.cell.batch_size}"
        return f"<RunResult {what}: {self.outcome}, {len(self.repetitions)} repetitions, sweep {self.sweep or 'none'}>"


HASH_DIGITS = 16


def hash16(value: object) -> str:
    """16 hex digits of SHA-256 over canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]
