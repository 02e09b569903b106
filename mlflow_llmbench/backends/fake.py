"""A scripted backend: every delay and every fault happens at a known time. Public: users can test their set-up with it.

The script is the model's name: `fake:` and optional settings joined by `+`:

    llmbench run --backend fake --model fake:ttft_ms=50+itl_ms=20 --batch-size 1,4

    load_ms, ttft_ms, itl_ms     delays (default 1, 5, 1)
    row_ms                       more delay per step for each row after the first (default 0)
    prompt_ms                    more delay of the first token for each prompt token that no history holds (default 0)
    memory_mb                    memory that a load really allocates and touches (default 1)
    vocab                        size of the vocabulary (default 32000)
    stop_after                   stop after this many tokens, whatever was asked for
    late=1                       emit each token one step late, as a deferred stop check does
    stall_ms, stall_at           an extra delay before token number stall_at
    compile_ms                   with decode=compiled: delay of compiling for a shape (default 1)
    step_tokens                  with decode=prompt_lookup or assisted: tokens per step of itl_ms (default 2)
    differs_at                   with any decode but generate: tokens from this number on differ from those of generate
    nonfinite_at                 logits from this token number on are NaN
    log_lines                    lines written to the log per call
    fail=oom|error|crash|kill|hang   a fault, at=load|generate (default generate)
    above_batch, below_batch     the fault happens only with more, or fewer, rows than this
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.choices import ATTENTIONS, DECODES
from ..records.cell import SPECULATIVE, Cell
from ..records.errors import MeasurementError, OutOfMemory, UsageError
from ..records.quantizations import schemes_of
from ..records.results import LoadInfo, ModelFacts, hash16
from ..workloads.conversations import turn_texts
from .base import CHECKPOINT, Capabilities, DeviceMemory, Emit, NothingToFetch, Serving, Token

NUMBERS = {
    "load_ms": 1.0,
    "ttft_ms": 5.0,
    "itl_ms": 1.0,
    "row_ms": 0.0,
    "prompt_ms": 0.0,
    "memory_mb": 1.0,
    "vocab": 32000.0,
    "stop_after": 1e9,
    "late": 0.0,
    "stall_ms": 0.0,
    "stall_at": 0.0,
    "compile_ms": 1.0,
    "step_tokens": 2.0,
    "differs_at": 1e9,
    "nonfinite_at": 1e9,
    "log_lines": 0.0,
    "above_batch": 0.0,
    "below_batch": 1e9,
}
WORDS = {"fail": ("oom", "error", "crash", "kill", "hang"), "at": ("load", "generate")}


def parse_script(model: str) -> dict[str, float | str]:
    """Parse the settings in a model name such as `fake:ttft_ms=50+itl_ms=20`. Raises UsageError, naming the setting."""
    script: dict[str, float | str] = dict(NUMBERS)
    _, _, settings = model.partition(":")
    for setting in filter(None, settings.split("+")):
        name, _, text = setting.partition("=")
        if name in WORDS and text in WORDS[name]:
            script[name] = text
            continue
        try:
            if name not in NUMBERS or not 0 <= float(text) < 1e9:
                raise ValueError
            script[name] = float(text)
        except ValueError:
            raise UsageError(
                f"The fake backend does not know the setting {setting}. Known: {', '.join([*NUMBERS, *WORDS])}."
            ) from None
    return script


@dataclass
class FakeHistory:
    """Counts the tokens that a real history would hold."""

    tokens: int = 0


@dataclass
class FakeWatch:
    """Counts the logits that a real watch would see."""

    checked: int = 0
    nonfinite: int = 0
    first_token: int | None = None

    def look(self, rows: int, first: int, last: int, nonfinite_at: int) -> None:
        self.checked += rows * (last - first + 1)
        self.nonfinite += rows * max(last - max(first, nonfinite_at) + 1, 0)
        if self.nonfinite and self.first_token is None:
            self.first_token = max(first, nonfinite_at)

    def weights(self) -> tuple[str, ...]:
        return ()


class FakeBackend(NothingToFetch):
    """Emits tokens on a schedule counted from the start of the call, so that delays do not add up."""

    capabilities = Capabilities(
        tokenizer=True,
        conversations=True,
        padding=True,
        continuous=True,
        scripted=True,
        random_weights=True,
        quantizations=schemes_of("transformers"),
        attentions=ATTENTIONS,
        decodes=DECODES,
        serving=Serving(engine="", packages=CHECKPOINT.packages),  # can be registered, has no answers
    )
    device = "cpu"

    def __init__(self, cell: Cell, model: ModelFacts) -> None:
        self.script = parse_script(cell.model)
        self.cell = cell
        self.memory = bytearray()
        self.load_s = 0.0
        self.watch: FakeWatch | None = None

    @classmethod
    def resolve(cls, cell: Cell) -> ModelFacts:
        parse_script(cell.model)
        return ModelFacts(
            name=cell.model,
            source="none",
            location="fake",
            revision=hash16(cell.model),
            context=1_000_000,
            dtype="float32",
        )

    def load(self) -> LoadInfo:
        started = time.perf_counter()
        _wait_until(time.perf_counter_ns() + int(self.number("load_ms") * 1e6))
        self._fail("load", rows=0)
        self.memory = bytearray(os.urandom(4096) * int(self.number("memory_mb") * 256))
        self.load_s = time.perf_counter() - started
        return self.describe()

    def describe(self) -> LoadInfo:
        return LoadInfo(
            load_s=self.load_s,
            weight_bytes=len(self.memory),
            step_bytes=len(self.memory),
            kv_bytes_per_token=1024,
            facts={"model.parameters": len(self.memory) // 4, "model.dtype": "float32", "quant.method": "fake"},
            vocab_size=int(self.number("vocab")),
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit, history: FakeHistory | None = None
    ) -> None:
        started = time.perf_counter_ns()
        rows = len(prompts)
        for _ in range(int(self.number("log_lines"))):
            logging.getLogger("fake").warning("a line that comes with every call")
        self._fail("generate", rows)
        step = self.number("itl_ms") + self.number("row_ms") * (rows - 1)
        late = step if self.script["late"] else 0.0
        longest = max(len(prompt) for prompt in prompts)
        first = self.number("ttft_ms") + self.number("prompt_ms") * (longest - (history.tokens if history else 0))
        several = int(self.number("step_tokens")) if self.cell.decode in SPECULATIVE else 1
        differs_at = int(self.number("differs_at")) if self.cell.decode != "generate" else output_tokens + 1
        for token in range(0, min(output_tokens, int(self.number("stop_after"))), several):
            stall = self.number("stall_ms") if 0 < self.number("stall_at") <= token + 1 else 0.0
            last = token == output_tokens - 1
            _wait_until(
                started + int((first + token // several * step + stall + (0.0 if last and token else late)) * 1e6)
            )
            ids = [
                [_token(prompt, i) + (i + 1 >= differs_at) for i in range(token, min(token + several, output_tokens))]
                for prompt in prompts
            ]
            if self.watch:
                self.watch.look(rows, token + 1, token + len(ids[0]), int(self.number("nonfinite_at")))
            emit(ids if self.cell.decode in SPECULATIVE else [row[0] for row in ids])
        if history:
            history.tokens = longest + output_tokens - 1

    @contextlib.contextmanager
    def watch_logits(self) -> Iterator[FakeWatch]:
        self.watch = FakeWatch()
        try:
            yield self.watch
        finally:
            self.watch = None

    def compile(self, prompts: Sequence[Sequence[int]], longest: int, output_tokens: int) -> float | None:
        if self.cell.decode != "compiled":
            return None
        started = time.perf_counter()
        _wait_until(time.perf_counter_ns() + int(self.number("compile_ms") * 1e6))
        return time.perf_counter() - started

    def generate_plainly(self, prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit) -> None:
        for token in range(min(output_tokens, int(self.number("stop_after")))):
            emit([_token(prompt, token) for prompt in prompts])

    def new_history(self) -> FakeHistory:
        return FakeHistory()

    def encode_turns(self, messages: Sequence[str]) -> Sequence[Sequence[int]]:
        return [self.encode(text) for text in turn_texts(messages, None)]

    def open_engine(self, rows: int, longest: int, on_step: Callable[[Sequence[Token]], None]) -> FakeEngine:
        return FakeEngine(self, rows, on_step)

    def encode(self, text: str) -> Sequence[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i % 256 for i in ids).decode("utf-8", errors="replace")

    def logits(self, ids: Sequence[int], last: int) -> Any:
        raise MeasurementError("The fake backend has no logits.")

    def device_memory(self, reset: bool = False) -> DeviceMemory | None:
        return None

    def peaks(self) -> dict[str, float]:
        return {}

    def trim(self) -> None: ...

    def close(self) -> None:
        self.memory = bytearray()

    def number(self, name: str) -> float:
        return float(self.script[name])

    def _fail(self, stage: str, rows: int) -> None:
        if "fail" not in self.script or self.script.get("at", "generate") != stage:
            return
        if stage == "generate" and not self.number("above_batch") < rows < self.number("below_batch"):
            return
        match self.script["fail"]:
            case "oom":
                raise OutOfMemory(f"Scripted out-of-memory error with {rows} rows.")
            case "error":
                raise MeasurementError("Scripted error.")
            case "crash":
                os._exit(13)
            case "kill":  # as the kernel does if memory runs out
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(3600)


class FakeEngine:
    """Continuous batching, same schedule. A step takes `ttft_ms` if a request joins, else `itl_ms` and `row_ms`."""

    def __init__(self, backend: FakeBackend, rows: int, on_step: Callable[[Sequence[Token]], None]) -> None:
        self.backend, self.rows, self.on_step = backend, rows, on_step
        self.waiting: deque[tuple[int, Sequence[int], int]] = deque()
        self.open = self.positions = 0
        self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._generate, daemon=True)
        self.thread.start()

    def submit(self, number: int, prompt: Sequence[int], output_tokens: int) -> None:
        with self.changed:
            self.waiting.append((number, prompt, output_tokens))
            self.open += 1
            self.changed.notify_all()

    def wait(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self.open)

    def take_positions(self) -> int | None:
        counted, self.positions = self.positions, 0
        return counted

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join()

    def _generate(self) -> None:
        running: list[tuple[int, Sequence[int], int, int]] = []  # number, prompt, tokens asked, tokens there
        while not self.closed:
            with self.changed:
                if not running:
                    self.changed.wait_for(lambda: self.waiting or self.closed)
                joining = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.rows - len(running)))]
            self.positions += len(running) + sum(len(prompt) for _, prompt, _ in joining)
            running += [(*request, 0) for request in joining]
            step_ms = self.backend.number("itl_ms") + self.backend.number("row_ms") * (len(running) - 1)
            _wait_until(time.perf_counter_ns() + int((self.backend.number("ttft_ms") if joining else step_ms) * 1e6))
            now = time.perf_counter_ns()
            self.on_step([Token(number, _token(prompt, there), now) for number, prompt, _, there in running])
            advanced = [(number, prompt, asked, there + 1) for number, prompt, asked, there in running]
            running = [one for one in advanced if one[3] < one[2]]
            with self.changed:
                self.open -= len(advanced) - len(running)
                self.changed.notify_all()


def _token(prompt: Sequence[int], index: int) -> int:
    """Return the output token at an index: a letter that depends on the prompt and the index."""
    return 97 + (sum(prompt) + index) % 26


def _wait_until(deadline_ns: int) -> None:
    """Sleep to within half a millisecond, then spin: a sleep alone wakes up to 0.1 ms late."""
    while (left := deadline_ns - time.perf_counter_ns()) > 0:
        if left > 1_000_000:
            time.sleep((left - 500_000) / 1e9)
