"""The interface to models and servers: everything a backend must do.

A backend is a class. First, `resolve` finds the model of a cell, cheaply and without heavy imports. Then a worker
process makes an instance, loads it once, and lets it generate for several cells.

Generation *pushes*: the backend calls `emit(tokens)` as soon as one more token per row is on the host. The `emit` that
`measure` passes stamps its clock first. An iterator would hand each token from a library's callback to another thread,
tens of microseconds late; a call costs a third of a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..records.backends import CHECKPOINT as CHECKPOINT
from ..records.backends import GGUF_FILE as GGUF_FILE
from ..records.backends import Capabilities as Capabilities
from ..records.backends import Distribution as Distribution
from ..records.backends import Serving as Serving
from ..records.backends import load_class
from ..records.cell import Cell
from ..records.results import LoadInfo, ModelFacts, RequestRecord, ServerReading

if TYPE_CHECKING:
    from ..loadgen.client import Load, Trace
    from ..loadgen.http1 import Exchange
    from ..system.memory import HostMemory
    from ..system.placement import Working
    from ..workloads.prompts import PromptSet


class Token(NamedTuple):
    """One output token of an engine: number of its request, token id, and the engine's own stamp (monotonic, ns)."""

    request: int
    id: int
    engine_ns: int


Emit = Callable[[Any], None]
"""Called once per step with the step's token ids: a sequence of `batch` whole numbers, or an array with `tolist()`.

A step with several tokens per row, as in speculative decoding, is a sequence of `batch` sequences of equal length.
"""


Started = Callable[[int, dict[str, int | None] | None], None]
"""Called when a server was started: id of the process from which all of its processes descend, and its memory then.

The memory has the fields of `memory.HostMemory`; it is None if it cannot be read.
"""


LOCAL_FILES = ("folder", "gguf")
"""Model sources that are the user's own local files. Nothing is fetched, and other machines may not have them."""


@dataclass(frozen=True)
class DeviceMemory:
    """Device memory of this process in bytes.

    `allocated`: held by tensors. `reserved`, `peak_reserved`: by the allocator, now and at most. `driver`: as the
    driver sees it.
    """

    allocated: int
    reserved: int
    peak_reserved: int
    driver: int | None = None


class History(Protocol):
    """The state of a conversation between two calls of `generate`."""

    @property
    def tokens(self) -> int:
        """Number of tokens at the start of each row of the next prompt whose keys and values are held already."""


class Backend(Protocol):
    """Methods of every backend. They raise errors of `records.errors`; foreign errors are mapped to those."""

    capabilities: Capabilities
    device: str  # of an instance: `cpu`, `cuda` or `cuda:N`

    @classmethod
    def resolve(cls, cell: Cell) -> ModelFacts:
        """Find the model and its commit without loading it, within 15 s and without heavy imports.

        Raises ModelError or MissingError.
        """

    @classmethod
    def prepare(cls, cell: Cell, model: ModelFacts) -> None:
        """Put the model's files on this disk: download them, or write a synthetic checkpoint.

        Runs in a process of its own and is not timed.
        """

    @classmethod
    def is_prepared(cls, cell: Cell, model: ModelFacts) -> bool:
        """Return True if `prepare` would find everything done.

        Called before a process is started for `prepare`, so it imports nothing heavy.
        """

    def __init__(self, cell: Cell, model: ModelFacts) -> None: ...

    def load(self) -> LoadInfo:
        """Load the model, verify that it is what was asked for, and touch every parameter.

        Raises NotRealised or OutOfMemory.
        """

    def describe(self) -> LoadInfo:
        """Describe the loaded model as it is now; some libraries repack weights in their first call."""

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit, history: Any = None) -> None:
        """Generate exactly `output_tokens` tokens for each prompt (ids), greedily; emit each step.

        All prompts have one length, unless `capabilities.padding` is set. `history`, made by `new_history`, holds the
        beginning of the prompts, and afterwards the prompts and all generated tokens but the last. It is passed only
        if `capabilities.conversations` is set, and only with prompts of one length.
        """

    def new_history(self) -> History:
        """Return an empty history."""

    def encode_turns(self, messages: Sequence[str]) -> Sequence[Sequence[int]]:
        """Return the ids that each user message adds to a conversation, in the model's chat template if it has one."""

    def encode(self, text: str) -> Sequence[int]:
        """Convert text to token ids with the model's own tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Convert token ids to text."""

    def logits(self, ids: Sequence[int], last: int) -> Any:
        """Run one forward pass and return the logits after each of the last `last` ids.

        The result is a torch tensor (last, vocabulary) in the dtype in which the model computes it.
        """

    def device_memory(self, reset: bool = False) -> DeviceMemory | None:
        """Return the device memory of this process, None without a device. `reset` starts a new peak."""

    def peaks(self) -> dict[str, float]:
        """Measure the best rates of this device with these threads: `read_bytes_per_s`, `flops_per_s`.

        Called before anything is loaded. May contain the evidence of `analysis.probe` for whether they can be trusted.
        """

    def trim(self) -> None:
        """Free cached device memory, so that memory of one cell is not counted for the next."""

    def close(self) -> None:
        """Delete the model and free its memory."""


class NothingToFetch:
    """Base of backends whose models are not files."""

    @classmethod
    def prepare(cls, cell: Cell, model: ModelFacts) -> None:
        """Do nothing: there is nothing to fetch."""

    @classmethod
    def is_prepared(cls, cell: Cell, model: ModelFacts) -> bool:
        """Return True."""
        return True


class ServerBackend(Backend, Protocol):
    """A backend whose model runs in another process. It takes loads of requests instead of calls of `generate`."""

    def launch(self, log: Path, started: Started) -> None:
        """Start the server of the cell's command and wait until it is healthy. `close` ends it.

        Called before `load`, only if the cell has a command. Raises MeasurementError if the server ends before it is
        healthy.
        """

    def send(
        self,
        prompts: PromptSet,
        cell: Cell,
        repetition: int,
        load: Load,
        expected: int | None = None,
        processes: int = 1,
    ) -> Trace:
        """Send a load of a cell's requests and wait for the last answer. Negative repetitions are warm-ups.

        `expected` requests are built beforehand. The load comes from `processes` client processes, fewer if there are
        fewer users or requests. Raises MeasurementError.
        """

    def read(self, exchange: Exchange) -> RequestRecord:
        """Parse an answer. Called after the run."""

    def server_memory(self) -> HostMemory | None:
        """Return the memory of all processes of a server that `launch` started; None for any other server.

        The worker calls it at the memory stages. Its parent may handle their events only after the server has ended.
        """

    def readings(self, trace: Trace) -> tuple[ServerReading, ...]:
        """Return the server's own metrics before, during and after a load; empty if it publishes none."""


class DecodingBackend(Backend, Protocol):
    """A backend with more decode paths than the plain one."""

    def compile(self, prompts: Sequence[Sequence[int]], longest: int, output_tokens: int) -> float | None:
        """Prepare to decode prompts of up to `longest` tokens, in as many rows.

        Returns the seconds it took, None if there is nothing to do. Called before the first call of a cell, outside
        every timed region. Raises NotRealised if it cannot be done.
        """

    def generate_plainly(self, prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit) -> None:
        """Generate as with decode=generate and kv_cache=auto, to compare the tokens of another path with. Not timed."""


class PlacingBackend(Backend, Protocol):
    """A backend that can lay a model out over devices, host memory and the disk, with `placement=auto`."""

    def make_room(self, host_bytes: int | None, needs: Working | None, folder: Path) -> None:
        """Tell, before `load`, what the layout must leave.

        `host_bytes`: most host memory of this process, None for what is free · `needs`: what the cells need besides
        weights, None if unknown · `folder`: for weights that are not read from the checkpoint itself. The caller
        deletes it.
        """


class ForwardBackend(Backend, Protocol):
    """A backend that can run the model without generating."""

    def forward(self, prompts: Sequence[Sequence[int]]) -> None:
        """Run one forward pass over all rows, with a new KV cache, and return when the device has done it."""


class EndingBackend(Backend, Protocol):
    """A backend that knows by which tokens its model ends an answer. Generating to a fixed length goes past them."""

    ends: frozenset[int]


class LogitsWatch(Protocol):
    """What was seen of logits: vectors, those with a NaN or an infinite value, and the first token chosen from one."""

    checked: int
    nonfinite: int
    first_token: int | None

    def weights(self) -> tuple[str, ...]:
        """Return the names of a few parameters that are not finite themselves, if logits were not."""


class WatchedBackend(Backend, Protocol):
    """A backend whose logits can be seen as tokens are chosen from them."""

    def watch_logits(self) -> AbstractContextManager[LogitsWatch]:
        """Look at the logits of each step of `generate`, and of an engine that is opened meanwhile. Not for timing."""


class HarnessBackend(Backend, Protocol):
    """A backend whose model lm-evaluation-harness can call."""

    def language_model(self) -> tuple[Any, Any]:
        """Return the loaded model and its tokenizer as transformers objects."""


class Engine(Protocol):
    """Takes requests as they arrive, and generates their tokens together in a thread of its own."""

    def submit(self, number: int, prompt: Sequence[int], output_tokens: int) -> None:
        """Submit a request, which ends after exactly `output_tokens` tokens."""

    def wait(self) -> None:
        """Wait until all requests are answered. Raises MeasurementError if one was not."""

    def take_positions(self) -> int | None:
        """Return the number of token positions computed since the last call; None if they cannot be counted."""

    def close(self) -> None:
        """End the thread and free its memory."""


class EngineBackend(Backend, Protocol):
    """A backend that batches continuously in this process."""

    def open_engine(self, rows: int, longest: int, on_step: Callable[[Sequence[Token]], None]) -> Engine:
        """Start an engine for at most `rows` requests at once, each of at most `longest` tokens including its answer.

        The engine's thread calls `on_step` with the new tokens of each step as soon as they are on the host.
        """


def backend_class(name: str) -> type[Backend]:
    """Return the class of a backend by its name. Raises UsageError as `records.backends.load_class` does."""
    found: type[Backend] = load_class(name)
    return found


COMMAND_PYTHON = "LLMBENCH_COMMAND_PYTHON"
"""Tells a worker in another environment which interpreter certainly has torch: the one that runs the command."""
