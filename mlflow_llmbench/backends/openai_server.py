"""Measure a model behind a server with OpenAI's HTTP interface.

Such servers are vLLM, SGLang, TGI, TensorRT-LLM, llama.cpp, Ollama, `transformers serve`, … The server owns the model.
This module builds requests and interprets answers; `client` sends them and takes the time stamps.
The API key comes only from the environment: LLMBENCH_API_KEY, else OPENAI_API_KEY, which is sent over TLS or to this
machine only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..cell import Cell
from ..client import BuildRequest, Load, LoadClient, Trace, address_of
from ..errors import MeasurementError, ModelError
from ..gpu import process_bytes
from ..http1 import Exchange, Limits
from ..launch import arguments
from ..memory import forget_references, referenced_bytes
from ..prometheus import read_metrics
from ..records import LoadInfo, ModelFacts, RequestRecord, ServerReading
from ..server_process import ServerProcess, free_port, log_end, require_program
from ..sse import EventParser
from ..workload import PromptSet, lengths_of, longest_of
from .base import Capabilities, DeviceMemory, Emit, NothingToFetch, Started
from .client_processes import ClientProcesses, Order, Share
from .server_facts import RESOLVE, api_key, ask_server, http_request, launchable, name_among

PROBE_WORDS = (16, 144)
LEAST_PER_WORD = 0.5
"""Least plausible number of tokens per word in a server's count.

A lower count is ignored: every vocabulary needs at least one token per word, and prompts would get any size.
"""

HEALTH_S = 0.2
"""Seconds between two health checks of a starting server."""

MOST_SAID, MOST_MESSAGE = 2000, 200
"""Characters of a server's error that are read, and of the message that is kept."""

STATE = ("options", "tokens_per_word", "fixed_tokens", "unique", "own_words")
"""Attributes that `load` sets and every sending process needs."""


def limits_of(cell: Cell) -> Limits:
    """Return the limits of a cell's request, so that no answer goes on for ever.

    Each token may take 2 KiB and 8 reads; servers send 0.3 to 0.9 KiB per token, in one read.
    """
    tokens, seconds = longest_of(cell)[1], cell.request_timeout_s
    most_bytes = min((64 << 10) + (2 << 10) * tokens, (16 << 20) + 1024 * tokens)
    return Limits(
        first_s=seconds, gap_s=min(60.0, seconds), total_s=seconds, most_bytes=most_bytes, most_reads=1000 + 8 * tokens
    )


class OpenAIBackend(NothingToFetch):
    """One server. `load` finds out which options it accepts; `send` then sends loads of requests."""

    capabilities = Capabilities(online=True)
    device = "cpu"

    def __init__(self, cell: Cell, model: ModelFacts) -> None:
        self.cell, self.model = cell, model
        self.server: ServerProcess | None = None
        self.begun_s = 0.0  # monotonic time at which the server was started
        self.load_s: float | None = None
        self.mapped_bytes = 0
        self._connect()
        self.options: dict[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}}
        self.facts: dict[str, str | int | float] = {}
        self.tokens_per_word, self.fixed_tokens = 1.0, 0.0
        self.unique = ""
        self.others: ClientProcesses | None = None
        self.own_words = secrets.token_hex(8)  # makes the beginnings of this run's conversations unique

    def _connect(self) -> None:
        self.address = address_of(self.cell.url or "")
        self.client = LoadClient(self.address, limits_of(self.cell))

    @classmethod
    def resolve(cls, cell: Cell) -> ModelFacts:
        if cell.launch:
            return launchable(cell)
        address = address_of(cell.url or "")
        client = LoadClient(address, RESOLVE)
        try:
            told = ask_server(client, address)
        finally:
            client.close()
        names = list(told.models)
        if names and cell.model not in names:
            raise ModelError(
                f"The server at {cell.url} has no model {cell.model}. "
                f"It has: {', '.join(name[:100] for name in names[:8])}. Give one of them as model."
            )
        own = told.models.get(cell.model, {})
        context = own.get("max_model_len")
        return ModelFacts(
            name=cell.model,
            source="none",
            location=cell.url or "",
            revision=told.software(own),
            context=context if isinstance(context, int) and context > 0 else None,
        )

    def launch(self, log: Path, started: Started) -> None:
        """Start the server by the cell's command and wait until it is healthy.

        `started` is called with the process id of the server's keeper and with its memory at the beginning. Raises
        MeasurementError, with the end of the server's log, if the server exits first. There is no time limit here; the
        process that supervises this worker sets it.
        """
        cell, port, begun = self.cell, free_port(), time.monotonic()
        command = arguments(cell.launch or "", model=self.model.location, port=port, quant=cell.quant)
        self.server = ServerProcess([require_program(command[0]), *command[1:]], log)
        started(self.server.keeper.pid, self.server.beginning)
        self.client.close()
        self.cell = dataclasses.replace(cell, url=f"http://127.0.0.1:{port}", launch=None)
        self._connect()
        while not self._is_healthy():
            self.server.require_running()
            time.sleep(HEALTH_S)
        told = ask_server(self.client, self.address, needed=False)
        name = name_among(list(told.models), self.model)
        self.cell = dataclasses.replace(self.cell, model=name)
        self.facts = {"server.software": told.software(told.models.get(name, {}))}
        self.begun_s = begun

    def _is_healthy(self) -> bool:
        """Return True if `/health` answers 200; on a server without it, if `/v1/models` does."""
        status = self.client.ask(http_request(self.address, "/health")).status
        return status == 200 or (
            status in (404, 405, 501) and self.client.ask(http_request(self.address, "/v1/models")).status == 200
        )

    def load(self) -> LoadInfo:
        """Find out which options the server accepts, its tokens per word, and if it reports prefix cache hits."""
        first = self._probe_options()
        if self.server:
            self.load_s = time.monotonic() - self.begun_s
            forget_references(self.server.processes)
        second = self._probe(PROBE_WORDS[1])
        if self.server:
            self.mapped_bytes = referenced_bytes(self.server.processes)
        if first.prompt_tokens and second.prompt_tokens:
            told_per_word = (second.prompt_tokens - first.prompt_tokens) / (PROBE_WORDS[1] - PROBE_WORDS[0])
            if told_per_word >= LEAST_PER_WORD:
                self.tokens_per_word = told_per_word
                self.fixed_tokens = first.prompt_tokens - PROBE_WORDS[0] * self.tokens_per_word
        told = second.cached_tokens is not None
        self.unique = "" if told else secrets.token_hex(8)
        self.facts |= {
            "server.endpoint": self.cell.endpoint,
            "server.ignore_eos": "asked" if "ignore_eos" in self.options else "refused",
            "server.usage": "told" if second.tokens is not None else "not told",
            "server.prefix_cache": "told" if told else "not told, prompts made unique",
            "server.tokens_per_word": round(self.tokens_per_word, 4),
            "client.loop": type(self.client.loop).__module__.partition(".")[0],
        }
        return self.describe()

    def describe(self) -> LoadInfo:
        return LoadInfo(load_s=self.load_s, facts=self.facts, mapped_weight_bytes=self.mapped_bytes)

    def request(self, prompts: PromptSet, cell: Cell, repetition: int, number: int) -> bytes:
        """Build request `number` of a repetition (negative: warm-up), as near to the wanted length as words allow."""
        prompt_tokens, output_tokens = lengths_of(cell, number)
        words = max(1, round((prompt_tokens - self.fixed_tokens) / self.tokens_per_word))
        return self.body(prompts.words(cell, repetition, number, words, self.unique), output_tokens, number)

    def send(
        self,
        prompts: PromptSet,
        cell: Cell,
        repetition: int,
        load: Load,
        expected: int | None = None,
        processes: int = 1,
    ) -> Trace:
        """Send a load of a cell's requests or conversations.

        Raises MeasurementError if a server that we started has exited, or a client process failed.
        """
        trace = self._send(prompts, cell, repetition, load, expected, processes)
        if self.server:
            self.server.require_running()
        return trace

    def _send(
        self, prompts: PromptSet, cell: Cell, repetition: int, load: Load, expected: int | None, processes: int
    ) -> Trace:
        count = min(processes, load.concurrency if load.arrivals_ns is None else len(load.arrivals_ns))
        if count == 1:
            return self.send_share(prompts, Order(self.cell, cell, repetition, Share.of(load, 0, 1), expected, {}))
        if self.others is None or len(self.others.processes) != count:
            self._end_others()
            self.others = ClientProcesses(count)
        state, each = (
            {name: getattr(self, name) for name in STATE},
            None if expected is None else math.ceil(expected / count),
        )
        try:
            trace = self.others.send(
                [
                    Order(self.cell, cell, repetition, Share.of(load, index, count), each, state)
                    for index in range(count)
                ]
            )
        except MeasurementError:
            self._end_others()  # some of them may still be sending
            raise
        # The process that reads the server's metrics may have ended before the others, so read them once more.
        last = self.client.scrape_now(self._metrics_request()) if trace.scrapes else None
        return dataclasses.replace(trace, scrapes=(*trace.scrapes, last) if last else ())

    def send_share(self, prompts: PromptSet, order: Order, ready: Callable[[], int] | None = None) -> Trace:
        """Send a share of a load from this process. `ready` is explained at `LoadClient.run`."""
        for name, value in order.state.items():
            setattr(self, name, value)
        share, cell = order.share, order.cell
        talks = Dialogues(self, prompts, cell, order.repetition) if cell.history == "sent" else None

        def build(position: int) -> bytes:
            number = share.number(position)
            return talks.begin(number) if talks else self.request(prompts, cell, order.repetition, number)

        def follow_up(exchange: Exchange) -> bytes | None:
            if talks is None:
                return None
            exchange.conversation = share.number(exchange.conversation or 0)
            return talks.follow_up(exchange)

        asks = share.index == 0 and order.repetition >= 0
        scrape = self._metrics_request() if asks else b""
        trace = self.client.run(build, share.load, order.expected, follow_up if talks else None, ready, scrape)
        for exchange in trace.exchanges:
            exchange.number = exchange.number * share.count + share.index if talks else share.number(exchange.number)
        return trace

    def _metrics_request(self) -> bytes:
        return http_request(self.address, "/metrics")

    def run(self, build: BuildRequest, load: Load, expected: int | None = None) -> Trace:
        """Send a load of requests that the caller builds."""
        return self.client.run(build, load, expected)

    def read(self, exchange: Exchange) -> RequestRecord:
        """Return the record of an answer. An API key that the server repeats in it is removed."""
        return read_answer(exchange, api_key(self.address))

    def readings(self, trace: Trace) -> tuple[ServerReading, ...]:
        """Return the server's metrics that we know; empty if there are none."""
        texts = [(scrape.stamps[-1], b"".join(scrape.parts).decode("utf-8", "replace")) for scrape in trace.scrapes]
        found = tuple(ServerReading(at, read_metrics(text)) for at, text in texts)
        return found if any(reading.values for reading in found) else ()

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit) -> None:
        raise MeasurementError("A server takes loads of requests, not single steps. Please report this.")

    def encode(self, text: str) -> Sequence[int]:
        raise MeasurementError("A server's tokenizer cannot be reached. Please report this.")

    def decode(self, ids: Sequence[int]) -> str:
        raise MeasurementError("A server's tokenizer cannot be reached. Please report this.")

    def device_memory(self, reset: bool = False) -> DeviceMemory | None:
        """Return the driver's figure for the processes of a server that we started; its allocator cannot be seen."""
        held = (
            [size for pid in self.server.processes if (size := process_bytes(pid)) is not None] if self.server else []
        )
        return DeviceMemory(allocated=0, reserved=0, peak_reserved=0, driver=sum(held)) if held else None

    def peaks(self) -> dict[str, float]:
        return {}

    def trim(self) -> None: ...

    def close(self) -> None:
        self._end_others()
        self.client.close()
        if self.server:
            self.server.stop()

    def _end_others(self) -> None:
        if self.others is not None:
            self.others.close()
            self.others = None

    def body(self, prompt: str | list[dict[str, str]], output_tokens: int, number: int | str) -> bytes:
        """Build the whole HTTP request for an answer to a prompt or to messages."""
        chat = self.cell.endpoint == "chat"
        body: dict[str, Any] = {
            "model": self.cell.model,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            **self.options,
        }
        body |= (
            {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
            if chat
            else {"prompt": prompt}
        )
        return http_request(self.address, "/v1/chat/completions" if chat else "/v1/completions", body, number)

    def _probe(self, words: int) -> RequestRecord:
        prompt = PromptSet("synthetic").words(self.cell, -2, words, words, secrets.token_hex(8))
        return self.read(self.client.ask(self.body(prompt, 1, -1)))

    def _probe_options(self) -> RequestRecord:
        """Get a first answer with as many of the options as the server accepts. Raises MeasurementError without one."""
        usage = {"stream_options": {"include_usage": True}}
        for options in ({"ignore_eos": True, **usage}, usage, {}):
            self.options = options
            record = self._probe(PROBE_WORDS[0])
            if record.outcome == "complete":
                return record
            if not record.message.startswith(("HTTP 400", "HTTP 422")):
                break
        if self.server:
            self.server.require_running()
        why = f" {log_end(self.server.log)}" if self.server else ""
        raise MeasurementError(
            f"The server does not answer a first request ({record.outcome}): {record.message} Check its log, model and "
            f"endpoint.{why}"
        )


class Dialogues:
    """The conversations of one repetition, turn by turn. Each turn sends all earlier turns and the server's answers.

    An answer is parsed when it has ended, in the client's single thread, because the next turn needs its text. The time
    of that is part of the lag of the client's event loop. A failed turn ends its conversation. Each conversation begins
    with unique words, so that no prefix cache holds it from an earlier repetition. Its later turns may hit the cache,
    as they would in use.
    """

    def __init__(self, backend: OpenAIBackend, prompts: PromptSet, cell: Cell, repetition: int) -> None:
        self.backend, self.prompts, self.cell, self.repetition = backend, prompts, cell, repetition
        self.said: dict[int, list[dict[str, str]]] = {}

    def begin(self, number: int) -> bytes:
        """Build the request of the first turn of a conversation."""
        first = PromptSet("synthetic").words(self.cell, self.repetition, number, 8, self.backend.own_words)
        self.said[number] = [{"role": "user", "content": f"{first} {self._asks(number)[0]}"}]
        return self._turn(number, 1)

    def follow_up(self, exchange: Exchange) -> bytes | None:
        """Build the request of the turn after an answer; None after the last turn or a failure."""
        number, turn = exchange.conversation or 0, exchange.turn or 1
        asks = self._asks(number)
        answer = _answer_of(exchange) if turn < len(asks) else None
        if answer is None or answer.fault:
            del self.said[number]
            return None
        self.said[number] += [
            {"role": "assistant", "content": "".join(answer.text)},
            {"role": "user", "content": asks[turn]},
        ]
        return self._turn(number, turn + 1)

    def _asks(self, number: int) -> tuple[str, ...]:
        return self.prompts.conversations[number % len(self.prompts.conversations)]

    def _turn(self, number: int, turn: int) -> bytes:
        return self.backend.body(self.said[number], self.cell.output_tokens, f"{number}-{turn}")


@dataclasses.dataclass
class _Answer:
    """State of an answer while its events are read."""

    stamps: list[int] = dataclasses.field(default_factory=list)
    told: list[int | None] = dataclasses.field(default_factory=list)  # output tokens so far, as each chunk reports
    usage: dict[str, Any] = dataclasses.field(default_factory=dict)
    visible: int | None = None
    text: list[str] = dataclasses.field(default_factory=list)  # without the reasoning channel
    finish: str = ""
    finish_ns: int | None = None
    finish_has_text: bool = False  # the finish reason came in a chunk with text
    done: bool = False
    fault: str = ""
    message: str = ""


def read_answer(exchange: Exchange, key: str = "") -> RequestRecord:
    """Convert a raw answer to a record: one outcome, the stamps of chunks with tokens, and the server's token counts.

    The outcome `complete` needs at least one token, and either `[DONE]`, or a finish reason and a body that ended
    according to its chunks or length.

    `key` is removed from the server's message before that is cut, since half a key would not be recognised.
    """
    answer = _answer_of(exchange)
    tokens, details = (
        _count(answer.usage.get("completion_tokens")) or None,  # a count of 0 means that the server did not count
        answer.usage.get("prompt_tokens_details"),
    )
    return RequestRecord(
        t0_ns=exchange.t0_ns,
        stamps_ns=tuple(answer.stamps),
        prompt_tokens=_count(answer.usage.get("prompt_tokens")),
        intended_ns=exchange.intended_ns,
        outcome=answer.fault or "complete",
        message=(answer.message.replace(key, "…") if key else answer.message)[:MOST_MESSAGE],
        tokens=tokens,
        chunk_tokens=_chunk_tokens(answer, tokens),
        visible_ns=answer.visible,
        end_ns=exchange.end_ns,
        cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else None,
        finish=answer.finish[:40] or "not told",
        conversation=exchange.conversation,
        turn=exchange.turn,
    )


def _answer_of(exchange: Exchange) -> _Answer:
    """Parse the events of an answer and set its fault, if it has one."""
    answer = _Answer(fault=exchange.fault, message=exchange.message)
    if not answer.fault:
        _check_head(exchange, answer)
    if exchange.status == 200:
        _read_events(exchange, answer)
    if not answer.fault and not (answer.done or (answer.finish and exchange.framed)):
        answer.fault, answer.message = (
            "truncated",
            f"The answer stopped after {len(answer.stamps)} chunks, before its end.",
        )
        if not exchange.status:
            answer.message = "The connection was closed before an answer."
    tokens = _count(answer.usage.get("completion_tokens"))
    if (
        tokens == len(answer.stamps) + 1
        and answer.finish == "stop"
        and answer.finish_ns is not None
        and not answer.finish_has_text
    ):
        answer.stamps.append(answer.finish_ns)  # the end token, which has no text and comes with the finish reason
        answer.told.append(tokens)
    if not answer.fault and not answer.stamps:
        answer.fault, answer.message = "malformed", "The answer was complete but had no token."
    return answer


def _check_head(exchange: Exchange, answer: _Answer) -> None:
    """Set the fault and message of an answer that is not an event stream."""
    status, kind = exchange.status, exchange.headers.get("content-type", "").lower()
    if not status or (status == 200 and kind.startswith("text/event-stream")):
        return
    text = b"".join(exchange.parts)[:MOST_SAID].decode("utf-8", "replace")
    said = f"HTTP {status}: {_error_text(text)}"
    if status >= 500 and status != 503:
        answer.fault, answer.message = "server_error", said
    elif 300 <= status < 400:
        answer.fault, answer.message = (
            "refused",
            f"HTTP {status}: redirects are not followed. Give the final address as url.",
        )
    elif status >= 400:
        answer.fault, answer.message = "refused", said
    else:
        answer.fault, answer.message = (
            "malformed",
            f"HTTP {status} with {kind[:40] or 'no content type'} instead of text/event-stream.",
        )


def _error_text(text: str) -> str:
    """Return the message of a JSON error, else the text itself, on one line."""
    try:
        found: Any = json.loads(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        found = (found.get("message") or found.get("detail") or found) if isinstance(found, dict) else found
    except (ValueError, RecursionError):
        found = text
    return " ".join(str(found)[:MOST_SAID].split())


def _read_events(exchange: Exchange, answer: _Answer) -> None:
    """Read the events of the stream into `answer`, up to its end or the first invalid event."""
    parser = EventParser()
    for stamp, part in zip(exchange.stamps, exchange.parts, strict=True):
        for event in parser.feed(part):
            if event.data == "[DONE]":
                answer.done = True
                return
            try:
                body = json.loads(event.data)
            except (ValueError, RecursionError):
                body = None
            if event.type == "error" or (isinstance(body, dict) and body.get("error")):
                answer.fault = answer.fault or "server_error"
                answer.message = answer.message or f"An error in the stream: {_error_text(event.data)}"
                return
            if not isinstance(body, dict) or not _take_chunk(body, stamp, answer):
                answer.fault, answer.message = (
                    answer.fault or "malformed",
                    answer.message or f"Not an event of a completion: {event.data[:MOST_SAID]!r}.",
                )
                return


def _take_chunk(body: dict[str, Any], stamp: int, answer: _Answer) -> bool:
    """Read one chunk into `answer`. Return False if it is not a chunk."""
    usage = body.get("usage")
    if isinstance(usage, dict):
        answer.usage = usage
    choices = body.get("choices")
    if not isinstance(choices, list):
        return isinstance(usage, dict) or "choices" not in body  # the stream may contain other objects
    for choice in choices:
        if not isinstance(choice, dict):
            return False
        delta = choice.get("delta")
        fields: dict[str, Any] = delta if isinstance(delta, dict) else choice
        visible = fields.get("content") or fields.get("text")
        has_text = bool(
            visible
            or fields.get("reasoning_content")
            or fields.get("reasoning")
            or fields.get("tool_calls")
            or fields.get("refusal")
        )
        if has_text:
            answer.stamps.append(stamp)
            answer.told.append(_count(usage.get("completion_tokens")) if isinstance(usage, dict) else None)
            if visible:
                answer.visible = stamp if answer.visible is None else answer.visible
                answer.text.append(str(visible))
        if choice.get("finish_reason"):
            answer.finish, answer.finish_ns, answer.finish_has_text = str(choice["finish_reason"]), stamp, has_text
    return True


def _chunk_tokens(answer: _Answer, tokens: int | None) -> tuple[int, ...] | None:
    """Return the tokens of each chunk if every chunk reports the count so far; None if not, or if each holds one."""
    told = [count for count in answer.told if count is not None]
    if not told or len(told) != len(answer.stamps) or told[-1] != tokens:
        return None
    found = tuple(b - a for a, b in zip([0, *told[:-1]], told, strict=True))
    return None if all(size == 1 for size in found) or min(found) < 0 else found


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40 else None
