"""The seam to models and servers: what a backend must do, on one page.

A backend is a class. `resolve` is asked first, cheaply and without heavy imports, whether the model of a cell can be
had; then, in a worker process, an instance is made, loaded once, and generates for several cells.

Generation *pushes*: the backend calls `emit(tokens)` the moment one more token per row is really on the host. `measure`
passes an `emit` that stamps its clock first. An iterator would hand each token from a library's callback to another
thread, tens of microseconds late; a call costs a third of one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..cell import Cell
from ..errors import UsageError
from ..records import LoadInfo, ModelFacts, RequestRecord, ServerReading
from ..spec import known_backends

if TYPE_CHECKING:  # what only servers need is not loaded into the worker of a local model
    from ..client import Load, Trace
    from ..http1 import Exchange
    from ..workload import PromptSet


class Token(NamedTuple):
    """One output token of an engine: its request's number, its id, and the engine's own stamp of it, monotonic ns."""

    request: int
    id: int
    engine_ns: int


Emit = Callable[[Any], None]
"""Called once per step with the step's token ids: a sequence of `batch` whole numbers, or an array with `tolist()`.

A step that brings several tokens per row, as where proposed tokens are checked, is a sequence of `batch` sequences of equal length.
"""


Started = Callable[[int, dict[str, int | None] | None], None]
"""Told that a server was started: the process that all of its processes descend from, and its memory then (`memory.HostMemory`), if it can be read."""


LOCAL_FILES = ("folder", "gguf")
"""Sources of models whose files lie where the command was told; there is nothing to fetch, and no other machine may have them."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do, declared; never guessed from its name."""

    tokenizer: bool = False  # `encode` and `decode` work
    logits: bool = False  # `logits` works, so quality can be measured
    heavy: tuple[str, ...] = ()  # modules to import before the *baseline* stage
    variables: tuple[tuple[str, str], ...] = ()  # of the worker's environment, set before they are imported
    harness: bool = False  # `language_model` works, so tasks of lm-eval can be run
    conversations: bool = False  # `encode_turns` and `new_history` work, and `generate` takes a history
    online: bool = False  # a server: takes loads of requests, see `ServerBackend`
    padding: bool = False  # `generate` takes prompts of unequal lengths
    continuous: bool = False  # batches requests as they come, see `EngineBackend`
    decodes: tuple[str, ...] = ("generate",)  # values of `decode`; one with more than this is a `DecodingBackend`
    kv_caches: tuple[str, ...] = ()  # values of `kv_cache` beside auto


@dataclass(frozen=True)
class DeviceMemory:
    """Device memory of this process in bytes: held by tensors, reserved by the allocator now and at most, seen by the driver."""

    allocated: int
    reserved: int
    peak_reserved: int
    driver: int | None = None


class History(Protocol):
    """What a conversation keeps from one call of `generate` to the next."""

    @property
    def tokens(self) -> int:
        """Tokens at the beginning of each row of the next prompt whose keys and values it holds, so that they are not computed again."""


class Backend(Protocol):
    """What every backend does. Errors come out as errors of `mlflow_llmbench.errors`, foreign ones are mapped here."""

    capabilities: Capabilities
    device: str  # of an instance: cpu, cuda or cuda:N

    @classmethod
    def resolve(cls, cell: Cell) -> ModelFacts:
        """Find the model and its commit without loading it; within 15 s; no heavy import. Raises ModelError or MissingError."""

    @classmethod
    def prepare(cls, cell: Cell, model: ModelFacts) -> None:
        """Put the model's files on this disk (download, or write a synthetic checkpoint). Runs in a process of its own, untimed."""

    @classmethod
    def is_prepared(cls, cell: Cell, model: ModelFacts) -> bool:
        """Whether `prepare` would find everything done. Asked before a process is started for it, so that it imports nothing heavy."""

    def __init__(self, cell: Cell, model: ModelFacts) -> None: ...

    def load(self) -> LoadInfo:
        """Load the model, verify that it is what was asked for, touch every parameter. Raises NotRealised or OutOfMemory."""

    def describe(self) -> LoadInfo:
        """What the loaded model is now; some libraries repack weights in their first call."""

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit, history: Any = None) -> None:
        """Generate exactly `output_tokens` tokens for each prompt (ids), greedily; emit each step.

        All prompts are of one length, unless `padding` is among the capabilities. `history`, of `new_history`, holds the beginning of
        the prompts, and afterwards the prompts and all but the last token. It is given only where `capabilities.conversations` says
        that it may be, and to prompts of one length.
        """

    def new_history(self) -> History:
        """An empty history."""

    def encode_turns(self, messages: Sequence[str]) -> Sequence[Sequence[int]]:
        """What each message of a user adds to a conversation, as ids, in the model's own chat template where it has one."""

    def encode(self, text: str) -> Sequence[int]:
        """Text → token ids, as the model's own tokenizer does."""

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids → text."""

    def logits(self, ids: Sequence[int], last: int) -> Any:
        """One forward pass: the logits after each of the last `last` ids, a torch tensor (last, vocabulary) as the model computes them."""

    def language_model(self) -> tuple[Any, Any]:
        """The loaded model and its tokenizer, as transformers has them."""

    def device_memory(self, reset: bool = False) -> DeviceMemory | None:
        """Device memory, None without a device. `reset` starts a new peak."""

    def peaks(self) -> dict[str, float]:
        """Best rates seen on this device with these threads: `read_bytes_per_s`, `flops_per_s`. Measured before anything is loaded."""

    def trim(self) -> None:
        """Give cached device memory back, so that what one cell needed is not counted for the next."""

    def close(self) -> None:
        """Delete the model and give memory back."""


class NothingToFetch:
    """What backends have in common whose models are not files."""

    @classmethod
    def prepare(cls, cell: Cell, model: ModelFacts) -> None:
        """Nothing to fetch."""

    @classmethod
    def is_prepared(cls, cell: Cell, model: ModelFacts) -> bool:
        """It always is."""
        return True


class ServerBackend(Backend, Protocol):
    """A backend whose model another process runs. It takes loads of requests instead of `generate`."""

    def launch(self, log: Path, started: Started) -> None:
        """Before `load`, where the cell has a command: start its server and wait until it is healthy. `close` ends it.

        Raises MeasurementError if the server ends before.
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
        """Send a load of a cell's requests and wait for the last answer; `expected` of them are built before (negative repetitions are warm-ups).

        It comes from so many client processes, or from as many as there are users or requests. Raises MeasurementError.
        """

    def read(self, exchange: Exchange) -> RequestRecord:
        """What an answer was. Called after the run."""

    def readings(self, trace: Trace) -> tuple[ServerReading, ...]:
        """What the server said of itself before, during and after a load; empty where it says nothing."""


class DecodingBackend(Backend, Protocol):
    """A backend with other decode paths than the plain one."""

    def compile(self, prompts: Sequence[Sequence[int]], longest: int, output_tokens: int) -> float | None:
        """Do what must be done once before prompts of up to `longest` tokens, in as many rows, are decoded; seconds, None where there is nothing.

        Called before the first call of a cell, outside every timed region. Raises NotRealised where it cannot be done.
        """

    def generate_plainly(self, prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit) -> None:
        """Generate as with decode=generate and kv_cache=auto: what the tokens of another path are compared with. Not timed."""


class Engine(Protocol):
    """Takes requests as they come, and generates them together in a thread of its own."""

    def submit(self, number: int, prompt: Sequence[int], output_tokens: int) -> None:
        """Hand a request over, which ends after exactly that many tokens."""

    def wait(self) -> None:
        """Wait until all requests are answered. Raises MeasurementError where one was not."""

    def take_positions(self) -> int | None:
        """Token positions that were computed since the last call; None where they cannot be counted."""

    def close(self) -> None:
        """End the thread and free what it held."""


class EngineBackend(Backend, Protocol):
    """A backend that batches continuously in this process."""

    def open_engine(self, rows: int, longest: int, on_step: Callable[[Sequence[Token]], None]) -> Engine:
        """An engine for at most `rows` requests at once, of at most `longest` tokens each with their answers.

        `on_step` is called from the engine's thread with the new tokens of each step the moment they are on the host.
        """


def backend_class(name: str) -> type[Backend]:
    """The class of a backend by its name. Raises UsageError for an unknown one or one that cannot be imported."""
    known = known_backends()
    if name not in known:
        raise UsageError(f"Unknown backend: {name}. Known: {', '.join(sorted(known))}.")
    module, _, attribute = known[name].partition(":")
    try:
        found: type[Backend] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"Backend {name} cannot be imported from {known[name]}: {error}. Check the package that declares it."
        ) from None
    return found
