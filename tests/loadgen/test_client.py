"""The load client against a server that sends every byte by a script and records when it sent it."""

from __future__ import annotations

import http.server
import itertools
import math
import os
import resource
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from mlflow_llmbench.backends.openai.backend import OpenAIBackend
from mlflow_llmbench.backends.openai.discovery import ServerInfo, ask_server
from mlflow_llmbench.backends.openai.http_requests import http_request
from mlflow_llmbench.loadgen.address import address_of
from mlflow_llmbench.loadgen.client import Load, LoadClient, Trace
from mlflow_llmbench.loadgen.http1 import Limits
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import ModelError, UsageError
from mlflow_llmbench.records.results import ModelFacts, RequestRecord
from mlflow_llmbench.workloads.prompts import load_prompts

from .. import bare_client
from ..null_server import null_server, read_log

NONE = ModelFacts("", "none", "", "")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with null_server() as url:
        yield url


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "LLMBENCH_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def send(
    url: str, script: str, load: Load, limits: Limits | None = None, **settings: Any
) -> tuple[list[RequestRecord], Trace]:
    """Return records and raw trace of a load whose requests all have one script."""
    cell = Cell(
        backend="openai", url=url, model=f"null:{script}", **{"output_tokens": 10, "prompt_tokens": 16} | settings
    )
    backend = OpenAIBackend(cell, NONE)
    if limits:
        backend.client.limits = limits
    prompts = load_prompts("synthetic")
    read_log(url)
    try:
        trace = backend.run(lambda number: backend.request(prompts, cell, 0, number), load)
    finally:
        backend.close()
    return [backend.read(exchange) for exchange in trace.exchanges], trace


def one(url: str, script: str, limits: Limits | None = None, **settings: Any) -> RequestRecord:
    return send(url, script, Load(requests=1), limits, **settings)[0][0]


def gaps(stamps: Any) -> list[float]:
    return [b - a for a, b in itertools.pairwise(stamps)]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_stamps_are_the_servers_own(server: str, endpoint: str) -> None:
    """16 streams with uneven gaps. All stamps are of one machine's monotonic clock."""
    records, _ = send(
        server, "ttft_ms=30+gaps_ms=4;19;1;9", Load(requests=32, concurrency=16), endpoint=endpoint, output_tokens=25
    )
    log = read_log(server)
    assert [r.outcome for r in records] == ["complete"] * 32
    assert [(r.tokens, len(r.stamps_ns), r.prompt_tokens) for r in records] == [(25, 25, 16)] * 32
    for number, record in enumerate(records):
        truth = log[str(number)]
        assert truth["chat"] == (endpoint == "chat")
        assert record.t0_ns < truth["received_ns"]
        assert all(
            own > its for own, its in zip(record.stamps_ns, truth["tokens_ns"], strict=True)
        )  # nothing arrives before it is written


def bare(url: str, script: str, streams: int, tokens: int) -> list[tuple[int, list[int]]]:
    """Return the stamps of a minimal client on the same streams."""
    body = {"model": f"null:{script}", "prompt": "a b c", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    requests = [http_request(address_of(url), "/v1/completions", body, number) for number in range(streams)]
    read_log(url)
    return bare_client.stamps(url, requests)


def test_the_golden_accuracy_at_sixty_four_streams(server: str) -> None:
    """Every count is exact, and a TTFT is as near to the server's own as that of a client that only reads.

    benchmarks/client.py gives milliseconds, on a machine that is not shared. Here both clients take turns, and the best
    of each counts.
    """
    script, best = "ttft_ms=50+itl_ms=20", {"ours": math.inf, "bare": math.inf}
    for _ in range(10):
        records, _ = send(server, script, Load(requests=64, concurrency=64), output_tokens=20)
        log = read_log(server)
        assert [r.outcome for r in records] == ["complete"] * 64
        assert [(r.tokens, len(r.stamps_ns), r.prompt_tokens) for r in records] == [(20, 20, 16)] * 64
        found = {"ours": (log, [(record.t0_ns, record.stamps_ns[0]) for record in records])}
        least = bare(server, script, 64, 20)
        found["bare"] = read_log(server), [(sent, stamps[0]) for sent, stamps in least]
        for name, (truths, firsts) in found.items():
            its = [truths[str(number)]["tokens_ns"][0] - truths[str(number)]["received_ns"] for number in range(64)]
            errors = [first - sent - own for (sent, first), own in zip(firsts, its, strict=True)]
            assert min(errors) > 0
            best[name] = min(best[name], median(errors))
        if best["ours"] < 3 * best["bare"]:
            break
    assert best["ours"] < 3 * best["bare"]


def test_one_stream_alone_is_stamped_as_it_comes(server: str) -> None:
    """The gaps of one stream are as near to the server's own as those of a client that only reads."""
    script, best = "ttft_ms=20+itl_ms=10", {"ours": math.inf, "bare": math.inf}
    for _ in range(10):
        records, _ = send(server, script, Load(requests=1), output_tokens=50)
        found = {"ours": (read_log(server)["0"], records[0].stamps_ns)}
        [(_, stamps)] = bare(server, script, 1, 50)
        found["bare"] = read_log(server)["0"], tuple(stamps)
        for name, (truth, own) in found.items():
            error = median(abs(a - b) for a, b in zip(gaps(own), gaps(truth["tokens_ns"]), strict=True))
            best[name] = min(best[name], error)
        if best["ours"] < 3 * best["bare"]:
            break
    assert best["ours"] < 3 * best["bare"]


def test_a_stall_is_in_its_gap(server: str) -> None:
    record = one(server, "ttft_ms=5+itl_ms=2+stall_ms=200+stall_at=7")
    found = gaps(record.stamps_ns)
    assert found.index(max(found)) == 5
    assert max(found) > 190e6


def test_chunks_of_several_tokens_are_counted_by_the_server(server: str) -> None:
    record = one(server, "per_chunk=4")
    assert (record.outcome, record.tokens, record.output_tokens, len(record.stamps_ns)) == ("complete", 10, 10, 3)
    assert record.chunk_tokens is None
    assert not record.single_tokens
    told = one(server, "per_chunk=4+usage=each")
    assert told.chunk_tokens == (4, 4, 2)
    assert not told.single_tokens
    assert one(server, "usage=each").single_tokens


def test_several_events_in_one_write_share_a_stamp_and_stay_single_tokens(server: str) -> None:
    record = one(server, "per_write=5+itl_ms=5")
    assert record.single_tokens
    assert len(set(record.stamps_ns)) == 2


def test_one_token_answers(server: str) -> None:
    record = one(server, "ttft_ms=3", output_tokens=1)
    assert (record.outcome, record.tokens, len(record.stamps_ns), record.finish) == ("complete", 1, 1, "length")


def test_an_early_end_is_counted_with_its_end_token(server: str) -> None:
    record = one(server, "stop_after=4+eos=always")
    assert (record.outcome, record.finish, record.tokens, len(record.stamps_ns)) == ("complete", "stop", 5, 5)
    assert record.single_tokens
    assert one(server, "stop_after=4").tokens == 10  # ignore_eos is asked for, and honoured
    assert read_log(server)["0"]["asked"]["ignore_eos"] is True


def test_a_reasoning_channel_has_the_first_token_and_the_content_the_first_visible_one(server: str) -> None:
    record = one(server, "ttft_ms=10+itl_ms=20+reasoning=5", endpoint="chat")
    assert (record.tokens, len(record.stamps_ns)) == (10, 10)
    assert record.visible_ns == record.stamps_ns[5]
    assert one(server, "", endpoint="chat").visible_ns is not None
    assert record.channels == {"reasoning": 5, "content": 5}
    never = one(server, "reasoning=10", endpoint="chat")
    assert (never.outcome, never.visible_ns) == ("complete", None)
    for field in ("reasoning_details", "parts", "thinking_blocks", "tool_calls", "audio", "musings"):
        other = one(server, f"reasoning=4+noise=1+field={field}", endpoint="chat")
        assert (other.tokens, len(other.stamps_ns), other.visible_ns) == (10, 10, other.stamps_ns[4])
        assert other.channels and other.channels["content"] == 6 and other.skipped == 60


def test_usage_tells_of_the_prefix_cache_and_of_prompts_that_grew(server: str) -> None:
    record = one(server, "cached=12+prompt_extra=3")
    assert (record.cached_tokens, record.prompt_tokens) == (12, 19)
    record = one(server, "usage=none")
    assert (record.outcome, record.tokens, record.prompt_tokens, record.cached_tokens, record.output_tokens) == (
        "complete",
        None,
        None,
        None,
        10,
    )


WHOLE = [
    "eol=crlf",
    "eol=cr",
    "comments=1",
    "noise=1",
    "framing=length",
    "framing=close",
    "keep=0",
    "split=1+output=1",
    "split=7+eol=crlf",
    "done=0",
]


@pytest.mark.parametrize("script", [s.replace("+output=1", "") for s in WHOLE])
def test_every_way_to_write_the_same_stream(server: str, script: str) -> None:
    records, _ = send(server, script, Load(requests=6, concurrency=2))
    assert [(r.outcome, r.tokens, len(r.stamps_ns)) for r in records] == [("complete", 10, 10)] * 6


FAULTS = {
    "status=500": "server_error", "status=502": "server_error", "status=429": "refused", "status=503": "refused",
    "status=401": "refused", "status=404": "refused", "error_at=4": "server_error", "error_at=1": "server_error",
    "bad_at=3": "malformed", "cut_at=4": "truncated", "cut_at=1": "truncated", "cut_byte=0": "truncated",
    "cut_byte=20": "truncated", "cut_byte=500": "truncated", "refuse=1": "truncated",
    "framing=close+cut_at=5": "truncated", "framing=length+cut_at=5": "truncated", "odd=204": "malformed",
    "odd=redirect": "refused", "odd=html": "malformed", "odd=noise": "malformed", "odd=gzip": "malformed",
    "odd=error": "server_error", "odd=whole": "malformed",
}  # fmt: skip


@pytest.mark.parametrize("script", FAULTS)
def test_every_request_has_the_outcome_of_what_happened(server: str, script: str) -> None:
    records, _ = send(server, script, Load(requests=3, concurrency=2))
    assert [r.outcome for r in records] == [FAULTS[script]] * 3
    assert all(r.message and len(r.message) <= 200 for r in records)


def test_a_server_that_is_away_refuses(server: str) -> None:
    records, _ = send(server, "", Load(requests=1))
    assert records[0].outcome == "complete"
    client = LoadClient(address_of("http://127.0.0.1:9"))
    exchange = client.ask(b"")
    client.close()
    assert (exchange.fault, exchange.status) == ("refused", 0)
    assert "No connection" in exchange.message


@pytest.mark.parametrize(
    ("script", "limits", "message"),
    [
        ("hang=1", Limits(first_s=0.3), "No token arrived within 0.3 s."),
        ("stall_ms=60000+stall_at=5", Limits(gap_s=0.3), "paused for longer than 0.3 s"),
        ("itl_ms=50", Limits(total_s=0.4), "took longer than 0.4 s"),
    ],
)
def test_limits_of_time_end_a_request(server: str, script: str, limits: Limits, message: str) -> None:
    records, _ = send(server, script, Load(requests=2, concurrency=2), limits, output_tokens=100)
    assert [r.outcome for r in records] == ["timeout"] * 2
    assert message in records[0].message


def peak_kb(reset: bool = False) -> int:
    """Return the peak resident memory of this process in kB, reset first because earlier tests had their own peaks."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("script", "users"), [("flood=line", 64), ("flood=events", 64), ("flood=tiny", 64), ("odd=gzip", 4)]
)
def test_endless_answers_end_within_64_mb(server: str, script: str, users: int) -> None:
    before = peak_kb(reset=True)
    records, _ = send(server, script, Load(requests=users, concurrency=users), output_tokens=128)
    assert [r.outcome for r in records] == ["malformed"] * users
    assert peak_kb() - before < 64 << 10


def test_a_closed_loop_keeps_its_users_busy_and_no_more(server: str) -> None:
    records, trace = send(server, "ttft_ms=5+itl_ms=1", Load(requests=20, concurrency=4))
    events = sorted([(r.t0_ns, 1) for r in records] + [(r.end_ns or 0, -1) for r in records])
    flight, most = 0, 0
    for _, change in events:
        flight += change
        most = max(most, flight)
    assert most == 4
    assert trace.retries == 0
    assert all(r.intended_ns is None and r.start_ns == r.t0_ns for r in records)


def test_a_duration_ends_the_sending_and_waits_for_the_answers(server: str) -> None:
    records, trace = send(server, "ttft_ms=5+itl_ms=5", Load(concurrency=2, duration_s=0.3))
    assert len(records) >= 4
    assert {r.outcome for r in records} == {"complete"}
    assert sum(r.t0_ns - trace.started_ns > 0.3e9 for r in records) <= 2  # asked in time, stamped after it
    assert trace.ended_ns >= max(r.end_ns or 0 for r in records)


def test_an_open_loop_sends_when_it_is_due_and_counts_from_there(server: str) -> None:
    """With one slot of 50 ms and an arrival every 10 ms, an open loop's latency includes the queue.

    It grows by 50 ms for every four requests.
    """
    arrivals = tuple(number * 10_000_000 for number in range(12))
    records, trace = send(server, "ttft_ms=41+itl_ms=1+slots=1", Load(arrivals_ns=arrivals))
    assert [r.intended_ns for r in records] == [trace.started_ns + offset for offset in arrivals]
    assert all(r.t0_ns >= (r.intended_ns or 0) for r in records)
    first, last = ((r.stamps_ns[0] - r.start_ns) / 1e6 for r in (records[0], records[-1]))
    assert last - first > 11 * 35
    assert median([r.t0_ns - r.start_ns for r in records]) / 1e6 < (last - first) / 4  # it does not wait for answers
    assert trace.ended_ns - trace.started_ns > 12 * 45e6


def test_a_connection_that_the_server_had_closed_is_replaced_and_counted(server: str) -> None:
    records, trace = send(server, "stale=1", Load(requests=6, concurrency=2))
    assert [r.outcome for r in records] == ["complete"] * 6
    assert trace.retries == 4
    records, trace = send(server, "stale=1+stall_ms=300", Load(requests=2))
    assert trace.retries == 1
    assert records[1].stamps_ns[0] - records[1].t0_ns > 300e6  # what was lost by it is waited for as the rest is
    assert (
        send(server, "refuse=1", Load(requests=2))[0][1].outcome == "truncated"
    )  # a new connection is not tried without end
    records, trace = send(
        server, "stale=1+stall_ms=1500", Load(requests=2)
    )  # it had the request for 1.5 s, and dropped it
    assert ([r.outcome for r in records], trace.retries) == (["complete", "truncated"], 0)


def test_a_lack_of_open_files_is_the_clients_own(server: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = {int(name) for name in os.listdir("/proc/self/fd")}  # by everything that ran in this process before
    fortieth_free = [number for number in range(len(opened) + 40) if number not in opened][39]
    resource.setrlimit(resource.RLIMIT_NOFILE, (fortieth_free, before[1]))
    try:
        records, _ = send(server, "itl_ms=10", Load(requests=100, concurrency=100))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "This is the client's limit: raise it with `ulimit -n`" in next(
        r.message for r in records if r.outcome == "refused"
    )


def test_halves_of_characters_that_a_server_sent_are_no_end_of_the_run() -> None:
    assert b'"? a"' in http_request(address_of("http://h"), "/v1/chat/completions", {"content": "\ud83d a"})
    assert ServerInfo({}, {"version": "1\ud83d"}, "odd\x1b[2J").software({}) == r"odd\x1b[2J 1\ud83d"


def told_by(models: str) -> ServerInfo:
    """Ask a server that answers every request with this JSON."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(models)))
            self.end_headers()
            self.wfile.write(models.encode())

        def log_message(self, *_: Any) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as odd:
        thread = threading.Thread(target=odd.serve_forever)
        thread.start()
        address = address_of(f"http://127.0.0.1:{odd.server_port}")
        client = LoadClient(address)
        try:
            return ask_server(client, address)
        finally:
            client.close()
            odd.shutdown()
            thread.join()


@pytest.mark.parametrize("models", ['{"data": 5}', '{"data": {"a": 1}}', "[1]", '{"data": [1]}', "5"])
def test_a_list_of_models_that_is_none_is_as_if_it_were_empty(models: str) -> None:
    assert told_by(models).models == {}


def test_the_clients_lag_is_seen(server: str) -> None:
    """A thread that holds the interpreter for 30 ms at a time delays the loop, and the measured lag shows it."""
    stop = threading.Event()

    def hold() -> None:
        while not stop.is_set():
            sum(range(2_000_000))
            time.sleep(0.001)

    quiet = send(server, "itl_ms=10", Load(requests=1), output_tokens=30)[1].lags_ns
    thread = threading.Thread(target=hold)
    thread.start()
    try:
        held = send(server, "itl_ms=10", Load(requests=1), output_tokens=30)[1].lags_ns
    finally:
        stop.set()
        thread.join()
    assert len(quiet) >= 10
    assert median(held) > 2 * median(quiet)


def test_a_key_comes_from_the_environment_and_goes_nowhere_else(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "sk-canary-1234567890"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    record = one(server, "status=401")
    assert read_log(server)["0"]["key"] == f"Bearer {secret}"  # the server repeats it in its message
    assert "…" in record.message
    assert secret not in repr(record)
    for url, sent in (("http://example.com", False), ("https://example.com", True)):
        assert (secret.encode() in http_request(address_of(url), "/v1/models")) is sent
    for url, here in (
        ("http://127.0.0.1.example.com", False),
        ("http://127.example", False),
        ("http://127.1.2.3:80", True),
        ("http://[::1]", True),
    ):
        assert (secret.encode() in http_request(address_of(url), "/v1/models")) is here
    monkeypatch.setenv("LLMBENCH_API_KEY", "sk-own\n")  # as a file that is read whole ends
    assert b"Bearer sk-own\r\n" in http_request(address_of("http://example.com"), "/v1/models")
    monkeypatch.setenv("LLMBENCH_API_KEY", "sk-ow\u20ac")
    with pytest.raises(UsageError, match="LLMBENCH_API_KEY has a character that no HTTP header can hold"):
        http_request(address_of("http://example.com"), "/v1/models")
    monkeypatch.setenv("LLMBENCH_API_KEY", "sk-own")
    assert b"sk-own" in http_request(address_of("http://example.com"), "/v1/models")


def test_a_certificate_that_nobody_signed_is_refused(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [
        *"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout".split(),
        key,
        "-out",
        certificate,
    ]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        client = LoadClient(address_of(f"https://localhost:{server.server_port}"))
        exchange = client.ask(b"")
        client.close()
        server.shutdown()
        thread.join()
    assert exchange.fault == "refused"
    assert "CERTIFICATE_VERIFY_FAILED" in exchange.message


def test_resolve_says_what_the_server_is_or_why_not(server: str) -> None:
    def cell(**settings: Any) -> Cell:
        return Cell(**{"backend": "openai", "url": server, "model": "null:"} | settings)

    found = OpenAIBackend.resolve(cell())
    assert (found.name, found.location, found.revision, found.context) == ("null:", server, "null 1.2.3", 8192)
    with pytest.raises(
        ModelError, match="has no model opt-125m. It has: null:. Give one of them .*: HTTP 404: The mod"
    ):
        OpenAIBackend.resolve(cell(model="opt-125m"))
    assert OpenAIBackend.resolve(cell(model="null:ttft_ms=1")).name == "null:ttft_ms=1"  # not listed, but answered for
    with pytest.raises(
        ModelError, match="Cannot reach the server at http://127.0.0.1:9: No connection: .* Start it, or correct url"
    ):
        OpenAIBackend.resolve(cell(url="http://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("refused", "length", "asked"),
    [
        ("", "max_tokens", {"ignore_eos", "stream_options", "temperature"}),
        ("stream_options", "max_tokens", {"ignore_eos", "temperature"}),
        ("ignore_eos", "max_tokens", {"stream_options", "temperature"}),
        ("temperature;max_tokens", "max_completion_tokens", {"ignore_eos", "stream_options"}),
        ("ignore_eos;stream_options;temperature;max_tokens", "max_completion_tokens", set()),
    ],
)
@pytest.mark.parametrize("tell", [1, 0])
def test_only_what_a_server_refuses_is_left_out(
    server: str, refused: str, length: str, asked: set[str], tell: int
) -> None:
    """Whether or not its message names the field."""
    cell = Cell(backend="openai", url=server, model=f"null:ttft_ms=0+refuses={refused}+tell={tell}", output_tokens=2)
    backend = OpenAIBackend(cell, NONE)
    facts = backend.load().facts
    backend.close()
    assert (backend.options.keys(), facts["server.length_field"]) == (asked, length)
    assert facts["server.model"] == "not listed, but answered for"
    assert facts["server.ignore_eos"] == ("asked" if "ignore_eos" in asked else "refused")
    assert facts["server.temperature"] == (0 if "temperature" in asked else "refused")


def test_a_probe_finds_how_many_tokens_a_word_has_and_what_the_server_tells(server: str) -> None:
    def loaded(script: str) -> tuple[OpenAIBackend, int]:
        cell = Cell(backend="openai", url=server, model=f"null:{script}", prompt_tokens=50, output_tokens=2)
        backend = OpenAIBackend(cell, NONE)
        backend.load()
        prompts = load_prompts("synthetic")
        (exchange,) = backend.run(lambda number: backend.request(prompts, cell, 0, number), Load(requests=1)).exchanges
        backend.close()
        return backend, backend.read(exchange).prompt_tokens or 0

    backend, sent = loaded("prompt_extra=11")
    assert (backend.fixed_tokens, backend.tokens_per_word, sent) == (11, 1, 50)
    assert backend.facts["server.prefix_cache"] == "not told, prompts made unique"
    backend, sent = loaded("prompt_words=0.0625+prompt_extra=20")  # 9 for 144 words: no prompt is made huge for that
    assert (backend.fixed_tokens, backend.tokens_per_word, sent) == (0, 1, 23)
    backend, _ = loaded("cached=0")
    assert backend.facts["server.prefix_cache"] == "told"
    assert backend.prompt_prefix == ""
