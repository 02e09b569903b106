"""Measure a model behind a server with OpenAI's HTTP interface.

Such servers are vLLM, SGLang, TGI, TensorRT-LLM, llama.cpp, Ollama, `transformers serve`, … The server owns the model.
This module builds requests and interprets answers; `client` sends them and takes the time stamps.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...config.request_fields import loaded, variables_of
from ...config.server_command import arguments
from ...loadgen.client import BuildRequest, Load, NextRequest, Trace
from ...loadgen.http1 import Exchange, Limits
from ...loadgen.request_board import VARIABLE as BOARD
from ...loadgen.request_board import RequestBoard
from ...loadgen.server_metrics import read_metrics
from ...loadgen.server_process import ServerProcess, free_port, log_end, require_program
from ...records.cell import PARAMETERS, Cell
from ...records.errors import MeasurementError, ModelError
from ...records.results import LoadInfo, ModelFacts, RequestRecord, ServerReading
from ...records.server_names import TEMPLATE_TOKENS
from ...system.gpu import process_bytes
from ...system.memory import HostMemory, forget_references, referenced_bytes
from ...workloads.prompts import PromptSet, lengths_of, lengths_vary, longest_of
from ..base import Capabilities, DeviceMemory, Emit, NothingToFetch, Started
from .answers import answer_of, read_answer, read_embedding
from .client_processes import ClientProcesses, ClientTask, Share
from .conversations import Conversations
from .discovery import RESOLVE, ask_server, launchable, name_among, open_client, server_address
from .endpoints import ENDPOINTS, Prompt
from .http_requests import http_request, secrets_of, user_body, user_headers
from .thinking import FIELDS as OFF_FIELDS
from .thinking import PROBE_TOKENS, shows_thinking

PROBE_WORDS = (16, 144)
REFUSALS = ("HTTP 400", "HTTP 422")
MIN_TOKENS_PER_WORD = 0.5
"""Least plausible number of tokens per word in a server's count.

A lower count is ignored: every vocabulary needs at least one token per word, and prompts would get any size.
"""

HEALTH_S = 0.2
"""Seconds between two health checks of a starting server."""

STATE = (
    "options", "off_field", "length_field", "tokens_per_word", "fixed_tokens", "prompt_prefix", "conversation_prefix"
)  # fmt: skip
"""Attributes that `load` sets and every sending process needs."""


MAX_FACT = 5800
"""Most characters of a fact; MLflow takes 6,000."""


def joined(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of both; theirs count, also field by field within an object that both have."""
    both = {
        name: {**value, **theirs[name]}
        for name, value in ours.items()
        if isinstance(value, dict) and isinstance(theirs.get(name), dict)
    }
    return {**ours, **theirs, **both}


def limits_of(cell: Cell) -> Limits:
    """Return the limits of a cell's request, so that no answer goes on for ever.

    Each token may take 2 KiB and 8 reads; servers send 0.3 to 0.9 KiB per token, in one read.
    """
    tokens, seconds = longest_of(cell)[1], cell.request_timeout_s
    if not cell.generates:
        return Limits(first_s=seconds, gap_s=min(60.0, seconds), total_s=seconds)
    most_bytes = min((64 << 10) + (2 << 10) * tokens, (16 << 20) + 1024 * tokens)
    return Limits(
        first_s=seconds, gap_s=min(60.0, seconds), total_s=seconds, most_bytes=most_bytes, most_reads=1000 + 8 * tokens
    )


def _named_by(refusal: RequestRecord) -> int:
    """Return the number of our own fields that a refusal names."""
    return sum(name in refusal.message for name in (*ENDPOINTS["chat"].refusable, "max_completion_tokens"))


class OpenAIBackend(NothingToFetch):
    """One server. `load` finds out which options it accepts; `send` then sends loads of requests."""

    capabilities = Capabilities(online=True, offline_baseline="transformers")
    device = "cpu"

    def __init__(self, cell: Cell, model: ModelFacts) -> None:
        self.cell, self.model, self.endpoint = cell, model, ENDPOINTS[cell.endpoint]
        self.server: ServerProcess | None = None
        self.begun_s = 0.0  # monotonic time at which the server was started
        self.load_s: float | None = None
        self.mapped_bytes = 0
        self._connect()
        self.options: dict[str, Any] = {}
        self.length_field = ""
        self.off_field: dict[str, Any] = {}  # switches thinking off
        self.board: RequestBoard | None = None
        self._adapt(())
        self.facts: dict[str, str | int | float] = {}
        self.tokens_per_word, self.fixed_tokens = 1.0, 0.0
        self.prompt_prefix = ""
        self.others: ClientProcesses | None = None
        self.conversation_prefix = secrets.token_hex(8)  # makes the beginnings of this run's conversations unique

    def _connect(self) -> None:
        self.address = server_address(self.cell)
        self.headers, self.extra = user_headers(self.cell), user_body(self.cell)
        self.secrets = secrets_of(self.cell, self.address)
        self.client = open_client(self.cell, limits_of(self.cell))

    @classmethod
    def resolve(cls, cell: Cell) -> ModelFacts:
        headers, _ = user_headers(cell), user_body(cell)
        if cell.launch:
            return launchable(cell)
        client = open_client(cell, RESOLVE)
        try:
            told = ask_server(client, server_address(cell), headers=headers)
        finally:
            client.close()
        if told.models and cell.model not in told.models:
            cls(cell, ModelFacts(cell.model, "none", cell.url or "", "")).require_answer(list(told.models))
        own = told.models.get(cell.model, {})
        context = own.get("max_model_len")
        return ModelFacts(
            name=cell.model,
            source="none",
            location=cell.url or "",
            revision=told.software(own),
            context=context if isinstance(context, int) and context > 0 else None,
        )

    def require_answer(self, listed: Sequence[str]) -> None:
        """Raise ModelError unless the server answers for a model that it does not list, as routers do.

        The first answer may take as long as `request_timeout_s`: the server may have to load the model.
        """
        try:
            self._probe_options()
        except MeasurementError as error:
            raise ModelError(
                f"The server at {self.cell.url} has no model {self.cell.model}. It has: "
                f"{', '.join(name[:100] for name in listed[:8])}. Give one of them as model. {error}"
            ) from None
        finally:
            self.close()

    def launch(self, log: Path, started: Started) -> None:
        """Start the server by the cell's command and wait until it is healthy.

        `started` is called with the process id of the server's keeper and with its memory at the beginning. Raises
        MeasurementError, with the end of the server's log, if the server exits first. There is no time limit here; the
        process that supervises this worker sets it.
        """
        cell, port, begun = self.cell, free_port(), time.monotonic()
        command = arguments(cell.launch or "", model=self.model.location, port=port, quant=cell.quant)
        hidden = [*variables_of(cell.extra_body, cell.headers), BOARD]
        self.server = ServerProcess([require_program(command[0]), *command[1:]], log, hidden)
        started(self.server.keeper.pid, self.server.beginning)
        self.client.close()
        self.cell = dataclasses.replace(cell, url=f"http://127.0.0.1:{port}", launch=None)
        self._connect()
        while not self._is_healthy():
            self.server.require_running()
            time.sleep(HEALTH_S)
        told = ask_server(self.client, self.address, False, self.headers)
        name = name_among(list(told.models), self.model)
        self.cell = dataclasses.replace(self.cell, model=name)
        self.facts = {"server.software": told.software(told.models.get(name, {}))}
        self.begun_s = begun

    def _is_healthy(self) -> bool:
        """Return True if `/health` answers 200; on a server without it, if `/v1/models` does."""
        status = self.client.ask(self._get("/health")).status
        return status == 200 or (status in (404, 405, 501) and self.client.ask(self._get("/v1/models")).status == 200)

    def _get(self, path: str) -> bytes:
        return http_request(self.address, path, headers=self.headers)

    def load(self) -> LoadInfo:
        """Find out which options the server accepts, its tokens per word, and if it reports prefix cache hits."""
        first = self._probe_options()
        thinking = {"server.thinking_off": self._switch_thinking_off()} if self.cell.thinking == "off" else {}
        if self.server:
            self.load_s = time.monotonic() - self.begun_s
            forget_references(self.server.processes)
        second = self._probe(PROBE_WORDS[1])
        if self.server:
            self.mapped_bytes = referenced_bytes(self.server.processes)
        if first.prompt_tokens and second.prompt_tokens:
            told_per_word = (second.prompt_tokens - first.prompt_tokens) / (PROBE_WORDS[1] - PROBE_WORDS[0])
            if told_per_word >= MIN_TOKENS_PER_WORD:
                self.tokens_per_word = told_per_word
                self.fixed_tokens = first.prompt_tokens - PROBE_WORDS[0] * self.tokens_per_word
        told = second.cached_tokens is not None
        counted = second.tokens if self.cell.generates else second.prompt_tokens
        self.prompt_prefix = "" if told else secrets.token_hex(8)
        self.facts |= {
            "server.endpoint": self.cell.endpoint,
            **(self._generation_facts() if self.cell.generates else {}),
            "server.request_fields": self._request_fields(),
            **thinking,
            **self._route(),
            "server.usage": "not told" if counted is None else "told",
            "server.prefix_cache": "told" if told else "not told, prompts made unique",
            "server.tokens_per_word": round(self.tokens_per_word, 4),
            TEMPLATE_TOKENS: max(0, round(self.fixed_tokens)),
            "client.loop": type(self.client.loop).__module__.partition(".")[0],
        }
        listed = ask_server(self.client, self.address, False, self.headers).models
        if listed and self.cell.model not in listed:
            self.facts["server.model"] = "not listed, but answered for"
        return self.describe()

    def _generation_facts(self) -> dict[str, str | float]:
        return {
            "server.ignore_eos": self._fate("ignore_eos", "asked"),
            "server.temperature": self._fate("temperature", self.options.get("temperature", "")),
            "server.length_field": self.length_field,
        }

    def _fate(self, option: str, sent: str | float) -> str | float:
        never = option == "ignore_eos" and self.cell.ignore_eos == "false"
        return sent if option in self.options else "not asked" if never else "refused"

    def _route(self) -> dict[str, str | int]:
        """Return the proxy and the number of the server's addresses, if there is one and if there are several."""
        proxy, dialer = self.address.proxy, self.client.dialer
        by_proxy = {"server.proxy": f"{proxy.host}:{proxy.port}"} if proxy else {}
        return by_proxy | ({"server.addresses": len(dialer.addresses)} if dialer.several else {})

    def _request_fields(self) -> str:
        """Return the fields that each request has beside its model, prompt and length, as JSON; variables by name."""
        asked = joined(joined(self.options, self.off_field), loaded(self.cell.extra_body))
        streams = {"stream": True} if self.cell.generates else {}
        return json.dumps({**streams, **asked}, ensure_ascii=False)[:MAX_FACT]

    def describe(self) -> LoadInfo:
        return LoadInfo(load_s=self.load_s, facts=self.facts, mapped_weight_bytes=self.mapped_bytes)

    def request(self, prompts: PromptSet, cell: Cell, repetition: int, number: int) -> bytes:
        """Build request `number` of a repetition (negative: warm-up), as near to the wanted length as words allow."""
        prompt_tokens, output_tokens = lengths_of(cell, number)
        words = max(1, round((prompt_tokens - self.fixed_tokens) / self.tokens_per_word))
        self._require_own_words(cell, words)
        text = prompts.words(cell, repetition, number, words, self.prompt_prefix, self.tokens_per_word)
        return self.body(text, output_tokens, number)

    def _require_own_words(self, cell: Cell, words: int) -> None:
        """Raise MeasurementError if a prompt of a given length is no longer than its prefix and the template."""
        prefix = cell.prefix_tokens
        if prefix and cell.prompt_tokens and not lengths_vary(cell) and words <= round(prefix / self.tokens_per_word):
            raise MeasurementError(
                f"prompt_tokens={cell.prompt_tokens} has no room for a prefix of {prefix} tokens and words of its own: "
                f"the server's template adds {self.fixed_tokens:.0f} tokens. Give a smaller prefix_tokens."
            )

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
            return self.send_share(prompts, ClientTask(self.cell, cell, repetition, Share.of(load, 0, 1), expected, {}))
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
                    ClientTask(self.cell, cell, repetition, Share.of(load, index, count), each, state)
                    for index in range(count)
                ]
            )
        except MeasurementError:
            self._end_others()  # some of them may still be sending
            raise
        # The process that reads the server's metrics may have ended before the others, so read them once more.
        last = self.client.scrape_now(self._metrics_request()) if trace.scrapes else None
        return dataclasses.replace(trace, scrapes=(*trace.scrapes, last) if last else ())

    def send_share(self, prompts: PromptSet, task: ClientTask, ready: Callable[[], int] | None = None) -> Trace:
        """Send a share of a load from this process. `ready` is explained at `LoadClient.run`."""
        for name, value in task.state.items():
            setattr(self, name, value)
        share, cell = task.share, task.cell
        talks = Conversations(self, prompts, cell, task.repetition) if cell.history == "sent" else None

        def build(position: int) -> bytes:
            number = share.number(position)
            return talks.begin(number) if talks else self.request(prompts, cell, task.repetition, number)

        def follow_up(exchange: Exchange) -> NextRequest | None:
            if talks is None:
                return None
            exchange.conversation = share.number(exchange.conversation or 0)
            return talks.follow_up(exchange)

        asks = share.index == 0 and task.repetition >= 0
        scrape = self._metrics_request() if asks else b""
        self.board = self.board or RequestBoard.of_environment()
        self.client.board = self.board
        trace = self.client.run(build, share.load, task.expected, follow_up if talks else None, ready, scrape)
        self.client.board = None
        for exchange in trace.exchanges:
            exchange.number = exchange.number * share.count + share.index if talks else share.number(exchange.number)
        return trace

    def _metrics_request(self) -> bytes:
        return self._get("/metrics")

    def run(self, build: BuildRequest, load: Load, expected: int | None = None) -> Trace:
        """Send a load of requests that the caller builds."""
        return self.client.run(build, load, expected)

    def read(self, exchange: Exchange) -> RequestRecord:
        """Return the record of an answer. Secrets of the request that the server repeats in it are removed."""
        return (read_answer if self.cell.generates else read_embedding)(exchange, self.secrets)

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

    def server_memory(self) -> HostMemory | None:
        return self.server.read_memory() if self.server else None

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

    def body(
        self,
        prompt: Prompt,
        output_tokens: int,
        number: int | str,
        more: Mapping[str, Any] | None = None,
    ) -> bytes:
        """Build the whole HTTP request for an answer to a prompt or to messages, with more fields of its own."""
        generating = {self.length_field: output_tokens, "stream": True} if self.cell.generates else {}
        body = {"model": self.cell.model, **generating, **self.added(), **(more or {}), **self.endpoint.prompt(prompt)}
        return http_request(self.address, self.endpoint.path, body, number, self.headers)

    def added(self) -> dict[str, Any]:
        """Return the fields of each request beside model, prompt, length and streaming; the user's replace ours."""
        return joined(joined(self.options, self.off_field), self.extra)

    def _probe(self, words: int) -> RequestRecord:
        return self.read(self._ask(words, self.endpoint.least_output))

    def _ask(self, words: int, output_tokens: int) -> Exchange:
        prompt = PromptSet("synthetic").words(self.cell, -2, words, words, secrets.token_hex(8))
        return self.client.ask(self.body(prompt, output_tokens, -1))

    def _adapt(self, without: Sequence[str]) -> None:
        """Ask for all options of the endpoint but those that a server refuses."""
        cell = self.cell
        every = {
            **({} if cell.ignore_eos == "false" else {"ignore_eos": True}),
            "stream_options": {"include_usage": True},
            "temperature": cell.temperature if cell.temperature % 1 else int(cell.temperature),
        }
        asked = [name for name in self.endpoint.refusable if name not in without]
        self.options = {name: value for name, value in every.items() if name in asked}
        usual = self.endpoint.length_fields[-1 if "max_tokens" in without else 0 :][:1]
        self.length_field = "".join(usual) if cell.max_tokens_field == "auto" else cell.max_tokens_field

    @property
    def _adaptable(self) -> list[str]:
        """Names of fields that may be left out: those that the cell does not ask for."""
        cell = self.cell
        asked = {
            "ignore_eos": cell.ignore_eos != "auto",
            "stream_options": "stream_options" in self.extra,
            "temperature": cell.temperature != 0,
            "max_tokens": cell.max_tokens_field != "auto",
        }
        return [name for name in self.endpoint.refusable if not asked[name]]

    def _probe_options(self) -> RequestRecord:
        """Get a first answer with as many of the options as the server accepts. Raises MeasurementError without one.

        After a refusal each option is left out alone before two are, those first that the server's message names. The
        error has the refusal that names the fewest of our own fields: the others can be left out.
        """
        told = first = self._probe(PROBE_WORDS[0])
        if first.outcome == "complete":
            return first
        names = sorted(self._adaptable, key=lambda name: name not in first.message)
        fewer = (some for size in range(1, len(names) + 1) for some in itertools.combinations(names, size))
        refused = first.message.startswith(REFUSALS)
        for without in fewer if refused else ():
            self._adapt(without)
            record = self._probe(PROBE_WORDS[0])
            if record.outcome == "complete":
                return record
            if not record.message.startswith(REFUSALS):
                break
            told = min(told, record, key=_named_by)
        if self.server:
            self.server.require_running()
        why = f" {log_end(self.server.log)}" if self.server else ""
        said = told.message if told.message.endswith((".", "…")) else f"{told.message}."
        raise MeasurementError(
            f"The server does not answer a first request ({told.outcome}): {said} Check its log, "
            f"{', '.join(['model', *self._asked()])} and endpoint.{why}"
        )

    def _asked(self) -> list[str]:
        """Return the parameters that add to a request what a server may refuse."""
        names = ("temperature", "ignore_eos", "max_tokens_field", "extra_body", "headers")
        return [name for name in names if getattr(self.cell, name) != PARAMETERS[name].default]

    def _switch_thinking_off(self) -> str:
        """Ask for answers without reasoning, by one field after the other, until one has none. Return the field's name.

        Raises MeasurementError if the server refuses or ignores all of them.
        """
        told: list[str] = []
        for field in (*OFF_FIELDS, {}):
            self.off_field, name = field, next(iter(field), "no field")
            exchange = self._ask(PROBE_WORDS[0], PROBE_TOKENS)
            record = self.read(exchange)
            if record.outcome == "complete" and not shows_thinking(record, answer_of(exchange).text):
                return name
            told.append(f"{name} {'ignored' if record.outcome == 'complete' else 'refused'}")
        raise MeasurementError(
            f"thinking=off was asked for, and the model still thinks ({', '.join(told[:-1])}). "
            "Give the server's own field for it in extra_body, or leave thinking out."
        )
