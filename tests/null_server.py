"""A server that sends every byte at a scripted time and records it: `python tests/null_server.py --port 0`.

It speaks HTTP/1.1 as OpenAI-compatible servers do: /v1/completions, /v1/chat/completions and /v1/responses (streaming),
/v1/embeddings (an answer after ttft_ms), /v1/models, /health, /metrics. The script of a request is the name of its
model, `null:` and settings joined by `+`, all optional:

    ttft_ms, itl_ms          delays of the first token, from the request's receipt, and between tokens (default 5, 2)
    gaps_ms=1;20;3           uneven gaps, repeated in turns, instead of itl_ms
    stall_ms, stall_at       an extra delay before token number stall_at
    per_chunk                tokens in one event (default 1)
    per_write                events in one write (default 1)
    reasoning                number of tokens that come in the reasoning channel first
    quiet                    field that switches the reasoning channel off in a request that has it
    field                    field of that channel (default reasoning_content); `parts`: parts of the content
    noise=1                  keep-alives and other objects before each event with tokens
    refuses=NAME;NAME        answer 400 to a request with any of these fields; `tell=0`: without naming it
    stop_after               stop here as at an end token, unless ignore_eos is requested and `eos` is not `always`
    eos=ignorable|always     honour ignore_eos or not (default ignorable)
    cached                   prompt tokens that usage reports as cached (default: not reported)
    hits                     prompt tokens that /metrics counts as found in the prefix cache (default 0)
    cache=told|metrics       a prefix cache without limits, by words; usage reports its hits too, or only /metrics does
    drafted, accepted        tokens that speculative decoding proposed and accepted for each answer, 4 to a draft
    timings=1                tell these in the last event, as llama.cpp does, and not in /metrics
    prompt_extra             tokens that usage counts beyond the words of the prompt (default 0)
    prompt_words             tokens that usage counts per word of the prompt (default 1)
    usage=last|each|none     in an event of its own at the end, in each event, or never (default last, if asked for)
    done=0                   leave out the [DONE]
    eol=lf|crlf|cr           line endings of the events
    comments=1               a comment line before each event
    framing=chunked|length|close    marking of the body's end (default chunked)
    keep=0                   close the connection after the answer
    split                    write the body in pieces of this many bytes
    slots                    number of requests served at once; the others wait (default: all)
    status                   answer with this status, a JSON error and no stream (429: with Retry-After)
    fails=1                  end an answer of /v1/responses as failed
    error_at, bad_at, cut_at an error event, invalid JSON, or a cut connection in place of this token
    cut_byte                 cut the connection after this many bytes of the whole answer
    stale=1                  close the connection without an answer when it is used a second time, after stall_ms
    refuse=1                 close the connection without an answer
    hang=1                   headers, then silence
    flood=line|events|tiny   no end: one line, events, or chunks of one byte
    odd=gzip|204|redirect|html|noise|error|whole    an answer that is not an event stream

A model whose name does not begin with `null:` is answered 404.

GET /log gives, by the header X-Request-Id, the time of receipt of each request, the times of writing its tokens (ns of
CLOCK_MONOTONIC, which all processes of a machine share), and the request itself. POST /log clears it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import gzip
import itertools
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NUMBERS = {
    "ttft_ms": 5.0, "itl_ms": 2.0, "stall_ms": 0.0, "stall_at": 0.0, "per_chunk": 1.0, "per_write": 1.0,
    "reasoning": 0.0, "stop_after": 1e9, "cached": -1.0, "hits": 0.0, "prompt_extra": 0.0, "prompt_words": 1.0,
    "done": 1.0, "comments": 0.0, "keep": 1.0, "split": 0.0, "slots": 1e9, "status": 0.0, "error_at": 0.0,
    "fails": 0.0, "drafted": 0.0, "accepted": 0.0, "timings": 0.0,
    "noise": 0.0, "tell": 1.0, "bad_at": 0.0, "cut_at": 0.0, "cut_byte": -1.0, "stale": 0.0, "refuse": 0.0, "hang": 0.0,
}  # fmt: skip
WORDS = {"gaps_ms": "", "eos": "ignorable", "usage": "last", "eol": "lf", "framing": "chunked", "flood": "", "odd": "",
         "field": "reasoning_content", "quiet": "", "refuses": "", "cache": ""}  # fmt: skip
NOISE = ("null", "", "{}", '{"choices": null}', '{"choices": []}', '{"object": "ping"}', '{"choices": [null]}')
PARTS: dict[str, Any] = {
    "parts": lambda text: {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": text}]}]},
    "reasoning_details": lambda text: {"reasoning_details": [{"type": "reasoning.text", "text": text, "index": 0}]},
    "thinking_blocks": lambda text: {"thinking_blocks": [{"type": "thinking", "thinking": text, "signature": "x"}]},
    "tool_calls": lambda text: {"tool_calls": [{"index": 0, "function": {"arguments": text}}]},
    "audio": lambda text: {"audio": {"id": "a", "data": "AAAA", "transcript": text}},
}
EOLS = {"lf": "\n", "crlf": "\r\n", "cr": "\r"}


class Script:
    def __init__(self, model: str) -> None:
        self.numbers, self.words = dict(NUMBERS), dict(WORDS)
        for setting in filter(None, model.partition(":")[2].split("+")):
            name, _, value = setting.partition("=")
            if name in WORDS:
                self.words[name] = value
            else:
                self.numbers[name] = NUMBERS[name] * 0 + float(value)

    def __getitem__(self, name: str) -> float:
        return self.numbers[name]

    def due_ns(self, tokens: int) -> list[int]:
        """Return the due time of each token, ns after the receipt."""
        cycle = itertools.cycle(
            [float(g) for g in self.words["gaps_ms"].split(";")] if self.words["gaps_ms"] else [self["itl_ms"]]
        )
        found, at = [], self["ttft_ms"]
        for number in range(1, tokens + 1):
            at += next(cycle) if number > 1 else 0.0
            at += self["stall_ms"] if number == self["stall_at"] else 0.0
            found.append(int(at * 1e6))
        return found


class Answer:
    """Return the events of one answer in order, (tokens so far, text of the event), and its end."""

    def __init__(self, script: Script, body: dict[str, Any], chat: bool) -> None:
        self.script, self.body, self.chat = script, body, chat
        names = ("max_tokens", "max_completion_tokens", "max_output_tokens")
        asked = int(next((body[name] for name in names if body.get(name)), 16))
        stopped = script["stop_after"] < asked and not (body.get("ignore_eos") and script.words["eos"] == "ignorable")
        self.tokens = int(min(asked, script["stop_after"])) if stopped else asked
        self.finish = "stop" if stopped else "length"
        prompt = (
            body.get("prompt", body.get("input")) if not chat else " ".join(str(m["content"]) for m in body["messages"])
        )
        self.words = prompt if isinstance(prompt, list) else str(prompt).split()
        self.prompt_tokens = int(len(self.words) * script["prompt_words"]) + int(script["prompt_extra"])
        self.cached = int(script["cached"])  # below 0: not reported

    def usage(self, tokens: int) -> dict[str, Any]:
        found: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
        }
        if self.cached >= 0:
            found["prompt_tokens_details"] = {"cached_tokens": self.cached}
        return found

    def event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        body: dict[str, Any] = {
            "id": "null-1",
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "model": "null",
            "choices": choices,
        }
        return json.dumps(body | ({"usage": usage} if usage else {}))

    def events(self) -> Iterator[tuple[int, int, str]]:
        """Return (tokens in it, tokens so far, its data) of each event with tokens."""
        sofar = 0
        reasoning = 0 if self.script.words["quiet"] in self.body else self.script["reasoning"]
        each = self.script.words["usage"] == "each"
        while sofar < self.tokens:
            size = int(min(self.script["per_chunk"], self.tokens - sofar))
            text = " word" * size
            if "input" in self.body:
                kind = "reasoning_text" if sofar < reasoning else "output_text"
                sofar += size
                yield size, sofar, json.dumps({"type": f"response.{kind}.delta", "delta": text, "output_index": 0})
                continue
            field = self.script.words["field"] if sofar < reasoning else "content"
            delta = PARTS.get(field, lambda text, name=field: {name: text})(text)
            sofar += size
            finish = self.finish if sofar == self.tokens and self.finish == "length" else None
            choice = (
                {"index": 0, "delta": delta, "finish_reason": finish}
                if self.chat
                else {"index": 0, "text": text, "finish_reason": finish}
            )
            yield size, sofar, self.event([choice], self.usage(sofar) if each else None)

    def last(self) -> list[str]:
        """Return the data of the events after the last token."""
        if "input" in self.body:
            return [json.dumps({"type": "response.output_text.done", "text": " word" * self.tokens}), self.response()]
        found = []
        if self.finish == "stop":
            found.append(
                self.event(
                    [{"index": 0, "delta" if self.chat else "text": {} if self.chat else "", "finish_reason": "stop"}]
                )
            )
        if self.script.words["usage"] == "last" and (self.body.get("stream_options") or {}).get("include_usage"):
            found.append(self.event([], self.usage(self.tokens + (self.finish == "stop"))))
        if self.script["timings"]:
            told = {"draft_n": int(self.script["drafted"]), "draft_n_accepted": int(self.script["accepted"])}
            found.append(json.dumps({"choices": [], "timings": told}))
        return found + (["[DONE]"] if self.script["done"] else [])

    def first(self) -> list[str]:
        """Return the data of the events before the first token."""
        kinds = ("response.created", "response.in_progress") if "input" in self.body else ()
        return [json.dumps({"type": kind, "response": {"status": "in_progress", "error": None}}) for kind in kinds]

    def response(self) -> str:
        """Return the data of the last event of a response, with its usage."""
        status = "failed" if self.script["fails"] else "completed" if self.finish == "stop" else "incomplete"
        usage = self.usage(self.tokens + (self.finish == "stop"))
        told: dict[str, Any] = {
            "status": status,
            "error": {"code": "server_error", "message": "Scripted failure."} if status == "failed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "output_tokens": usage["completion_tokens"],
                "input_tokens_details": usage.get("prompt_tokens_details"),
            },
        }
        return json.dumps({"type": f"response.{status}", "response": told})


class Server:
    def __init__(self, models: list[str]) -> None:
        self.models = models
        self.log: dict[str, dict[str, Any]] = {}
        self.running = 0
        self.waiting: list[asyncio.Future[None]] = []
        self.open: set[asyncio.Task[None]] = set()
        self.waits_s: list[float] = []
        self.looked_up = self.found = self.drafted = self.accepted = 0
        self.prompts: dict[str, Any] = {}  # a tree of the words of all prompts

    def cache(self, words: list[str]) -> int:
        """Return how many words an earlier prompt began with too, and keep this one."""
        node, found, known = self.prompts, 0, True
        for word in words:
            known = known and word in node
            found += known
            node = node.setdefault(word, {})
        return found

    def metrics(self) -> str:
        """Return what vLLM reports under these names, for two engines, the second of which is idle."""
        return "\n".join(
            [
                "# HELP vllm:num_requests_running Number of requests.",
                "# TYPE vllm:num_requests_running gauge",
                f'vllm:num_requests_running{{engine="0",model_name="null"}} {float(self.running)}',
                'vllm:num_requests_running{engine="1",model_name="null"} 0.0',
                f'vllm:num_requests_waiting{{engine="0"}} {float(len(self.waiting))} 1395066363000',
                f'vllm:kv_cache_usage_perc{{engine="0"}} {self.running / 100}',
                'vllm:kv_cache_usage_perc{engine="1"} 0.001',
                "vllm:num_preemptions_total 7",
                f"vllm:prefix_cache_queries_total {self.looked_up}",
                f"vllm:prefix_cache_hits_total {self.found}",
                f'vllm:request_queue_time_seconds_bucket{{le="0.1"}} {len(self.waits_s)}',
                f"vllm:request_queue_time_seconds_sum {sum(self.waits_s)}",
                f"vllm:request_queue_time_seconds_count {len(self.waits_s)}",
                *self.speculation(),
                "process_open_fds 12.0",
                "",
            ]
        )

    def speculation(self) -> list[str]:
        names = {"drafts": self.drafted / 4, "draft_tokens": self.drafted, "accepted_tokens": self.accepted}
        return [
            f'vllm:spec_decode_num_{name}_total{{engine="0"}} {value}' for name, value in names.items() if self.drafted
        ]


class Connection(asyncio.Protocol):
    """One connection, with one request after the other."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.received = b""
        self.transport: Any = None
        self.task: asyncio.Task[None] | None = None
        self.can_write = asyncio.Event()
        self.can_write.set()
        self.left = -1
        self.served = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.can_write.set()
        if self.task:
            self.task.cancel()

    def pause_writing(self) -> None:
        self.can_write.clear()

    def resume_writing(self) -> None:
        self.can_write.set()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter_ns()
        self.received += data
        head, found, rest = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        body, self.received = rest[:length], rest[length:]
        method, target, _ = first.split(" ", 2)
        path = f"/{target.split('/', 3)[3]}" if target.startswith("http://") else target  # as a proxy passes it on
        self.task = asyncio.get_running_loop().create_task(self.answer(now, method, path, headers, body))
        self.server.open.add(self.task)
        self.task.add_done_callback(self.server.open.discard)

    async def answer(self, now: int, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        if path.endswith("/embeddings"):
            await self.embed(headers, json.loads(body))
        elif path.endswith(("completions", "/responses")):
            await self.complete(now, path.endswith("chat/completions"), headers, json.loads(body))
        elif path == "/log":
            found = json.dumps(self.server.log)
            if method == "POST":
                self.server.log.clear()
            self.plain(200, found)
        elif path == "/v1/models":
            self.plain(
                200,
                json.dumps(
                    {
                        "object": "list",
                        "data": [{"id": m, "object": "model", "max_model_len": 8192} for m in self.server.models],
                    }
                ),
            )
        elif path == "/version":
            self.plain(200, json.dumps({"version": "1.2.3"}))
        elif path == "/metrics":
            self.plain(200, self.server.metrics(), "text/plain")
        else:
            self.plain(200 if path == "/health" else 404, "{}")

    def plain(self, status: int, text: str, kind: str = "application/json", extra: str = "") -> None:
        head = (
            f"HTTP/1.1 {status} X\r\nServer: null\r\nContent-Type: {kind}\r\n{extra}"
            f"Content-Length: {len(text.encode())}\r\n\r\n"
        )
        self.transport.write(head.encode() + text.encode())

    async def embed(self, headers: dict[str, str], body: dict[str, Any]) -> None:
        script = Script(body["model"])
        self.server.log[headers.get("x-request-id", str(len(self.server.log)))] = {"asked": body, "headers": headers}
        await asyncio.sleep(script["ttft_ms"] / 1000)
        if script["status"]:
            self.plain(int(script["status"]), json.dumps({"error": {"message": "Scripted status."}}))
        elif script.words["odd"]:
            self.odd(script.words["odd"])
        else:
            tokens = Answer(script, body, chat=False).prompt_tokens
            data = [{"object": "embedding", "index": 0, "embedding": [0.25] * 1024}]
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            self.plain(200, json.dumps({"object": "list", "data": data, "usage": usage}))

    async def complete(self, now: int, chat: bool, headers: dict[str, str], body: dict[str, Any]) -> None:
        script = Script(body["model"])
        entry: dict[str, Any] = {
            "received_ns": now,
            "tokens_ns": [],
            "tokens": [],
            "chat": chat,
            "key": headers.get("authorization"),
            "headers": headers,
            "asked": {k: v for k, v in body.items() if k not in ("model",)},
        }
        self.server.log[headers.get("x-request-id", str(len(self.server.log)))] = entry
        self.served += 1
        if script["stale"] and self.served > 1:
            await asyncio.sleep(script["stall_ms"] / 1000)
        if script["refuse"] or (script["stale"] and self.served > 1):
            self.transport.abort()
            return
        if script["status"]:
            self.plain(
                int(script["status"]),
                json.dumps({"error": {"message": f"Scripted status; the key was {headers.get('authorization')}"}}),
                extra="Retry-After: 20\r\n" if script["status"] == 429 else "",
            )
            return
        if not body["model"].startswith("null:"):
            self.plain(404, json.dumps({"error": {"message": f"The model {body['model']} does not exist."}}))
            return
        if unknown := [name for name in script.words["refuses"].split(";") if name in body]:
            what = f"Unsupported parameter: {unknown[0]}" if script["tell"] else "Bad request"
            self.plain(400, json.dumps({"error": {"message": what}}))
            return
        if script.words["odd"]:
            self.odd(script.words["odd"])
            return
        if self.server.running >= script["slots"]:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.server.waiting.append(turn)
            await turn
            now = time.perf_counter_ns()
        self.server.running += 1
        answer = Answer(script, body, chat)
        if not body.get("stream"):
            self.server.running -= 1
            choice = {"index": 0, "text": " word" * answer.tokens, "finish_reason": answer.finish}
            self.plain(200, json.dumps({"choices": [choice], "usage": answer.usage(answer.tokens)}))
            return
        self.server.waits_s.append((time.perf_counter_ns() - entry["received_ns"]) / 1e9)
        self.server.looked_up += answer.prompt_tokens
        hits = self.server.cache(answer.words) if script.words["cache"] else int(script["hits"])
        self.server.found += hits
        if script.words["cache"] == "told":
            answer.cached = hits
        if not script["timings"]:
            self.server.drafted += int(script["drafted"])
            self.server.accepted += int(script["accepted"])
        try:
            await self.stream(now, script, answer, entry)
        finally:
            self.server.running -= 1
            while self.server.waiting:
                turn = self.server.waiting.pop(0)
                if not turn.done():
                    turn.set_result(None)
                    break

    def odd(self, what: str) -> None:
        if what == "gzip":
            data = gzip.compress(b"data: " + b"0" * 100_000_000 + b"\n\n", 1)
            head = (
                "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n"
                f"Content-Length: {len(data)}\r\n\r\n"
            )
            self.transport.write(head.encode() + data)
        elif what == "204":
            self.transport.write(b"HTTP/1.1 204 No Content\r\n\r\ndata: what is this\n\n")
        elif what == "redirect":
            self.plain(307, "", extra="Location: http://127.0.0.1:9/v1/completions\r\n")
        elif what == "error":
            self.plain(200, json.dumps({"error": {"message": "The engine is restarting.", "code": 503}}))
        elif what == "whole":
            self.plain(200, json.dumps({"object": "text_completion", "choices": [{"text": "all at once"}]}))
        elif what == "html":
            self.plain(200, "<html><body>Sign in</body></html>", "text/html")
        else:
            self.transport.write(b"\x00\x01SSH-2.0-noise\r\n\r\n")

    async def stream(self, now: int, script: Script, answer: Answer, entry: dict[str, Any]) -> None:
        eol = EOLS[script.words["eol"]]
        before = f": comment{eol}" if script["comments"] else ""
        before += "".join(f"data: {one}{eol}{eol}" for one in NOISE) if script["noise"] else ""
        self.left = int(script["cut_byte"])
        framing = script.words["framing"]
        events = [(size, sofar, f"{before}data: {data}{eol}{eol}".encode()) for size, sofar, data in answer.events()]
        last = "".join(f"data: {data}{eol}{eol}" for data in answer.last()).encode()
        begin = "".join(f"data: {data}{eol}{eol}" for data in answer.first()).encode()
        head = "HTTP/1.1 200 OK\r\nServer: null/1.0\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
        if framing == "chunked":
            head += "Transfer-Encoding: chunked\r\n"
        elif framing == "length":
            head += f"Content-Length: {len(begin) + sum(len(e[2]) for e in events) + len(last)}\r\n"
        keep = script["keep"] and framing != "close"
        head += "" if keep else "Connection: close\r\n"
        framed = (lambda data: b"%x\r\n%s\r\n" % (len(data), data)) if framing == "chunked" else (lambda data: data)
        if not self.put(f"{head}\r\n".encode(), script):
            return
        if begin and not self.put(framed(begin), script):
            return
        if script["hang"]:
            await asyncio.sleep(3600)
        if script.words["flood"]:
            await self.flood(script.words["flood"], framed)
        due, group = script.due_ns(answer.tokens), max(1, int(script["per_write"]))
        loop = asyncio.get_running_loop()
        base = loop.time() - (time.perf_counter_ns() - now) / 1e9
        for start in range(0, len(events), group):
            part = events[start : start + group]
            # All tokens of a write are ready when its last one is.
            if (left := base + due[part[-1][1] - 1] / 1e9 - loop.time()) > 0:
                await asyncio.sleep(left)
            first = part[0][1] - part[0][0] + 1
            data = b"".join(e[2] for e in part)
            if first <= script["error_at"] <= part[-1][1]:
                error = '{"error": {"message": "Scripted error.", "code": 500}}'
                data = f"event: error{eol}data: {error}{eol}{eol}".encode()
            if first <= script["bad_at"] <= part[-1][1]:
                data = f'data: {{"choices": [{{"text": {eol}{eol}'.encode()
            if first <= script["cut_at"] <= part[-1][1]:
                self.transport.close()
                return
            stamp = time.perf_counter_ns()
            if not self.put(framed(data), script):
                return
            entry["tokens_ns"] += [stamp] * len(part)
            entry["tokens"] += [e[0] for e in part]
        end = b"0\r\n\r\n" if framing == "chunked" else b""
        if self.put((framed(last) if last else b"") + end, script) and not keep:
            self.transport.close()

    def put(self, data: bytes, script: Script) -> bool:
        """Write, in pieces if the script says so; False once the connection is cut."""
        if self.left >= 0 and self.left <= len(data):
            self.transport.write(data[: self.left])
            self.transport.close()
            return False
        self.left -= len(data) if self.left >= 0 else 0
        size = int(script["split"]) or len(data)
        for start in range(0, len(data), size):
            self.transport.write(data[start : start + size])
        return True

    async def flood(self, what: str, framed: Any) -> None:
        piece = {"line": b"data: " + b"x" * 65536, "events": b"data: {}\n\n" * 4096}.get(what)
        data = framed(piece) if piece else framed(b"x") * 10_000
        while not self.transport.is_closing():
            self.transport.write(data)
            await self.can_write.wait()
            await asyncio.sleep(0)


@contextmanager
def null_server(*models: str) -> Iterator[str]:
    """Yield the address of a null server in a separate process, until the block ends."""
    command = [sys.executable, __file__, *itertools.chain.from_iterable(("--model", model) for model in models)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def read_log(url: str) -> dict[str, dict[str, Any]]:
    """Return the server's log by request, and clear it there."""
    with urllib.request.urlopen(urllib.request.Request(f"{url}/log", data=b"", method="POST"), timeout=10) as answer:
        found: dict[str, dict[str, Any]] = json.load(answer)
        return found


async def serve(port: int, models: list[str]) -> None:
    server = Server(models)
    listening = await asyncio.get_running_loop().create_server(
        lambda: Connection(server), "127.0.0.1", port, backlog=4096
    )
    print(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", flush=True)
    gc.freeze()
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", action="append", default=[])
    given = parser.parse_args()
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(given.port, given.model or ["null:"]))


if __name__ == "__main__":
    main()
