"""CPU cost and stamp lag of our load client against httpx and aiohttp: `python benchmarks/client.py [--out FILE]`.

128 streams of 50 tokens a second come from the null server, which records when it wrote each token; monotonic stamps of
one machine are comparable between processes. Each client runs in a fresh process. The clients take turns, and the
median of the rounds' ratios is compared with a goal. The other clients work like common load clients: they stamp an
event, then parse its JSON. For 64 streams that begin at once, our TTFT is also compared with the server's own, from its
receipt to its first write. On a busy machine the server itself is late and several events share a read, which hides the
cost of an event: check `load_average`. Needs httpx and aiohttp (pip install httpx aiohttp), and uvloop for our client,
as installed by the extra `online`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlflow_llmbench.stats import percentile
from mlflow_llmbench.system import machine
from tests.null_server import null_server, read_log

ROOT = Path(__file__).resolve().parent.parent
STREAMS, TOKENS, GAP_MS = 128, 100, 20.0
GOLDEN_STREAMS, GOLDEN_MS = 64, 2.0
CLIENTS = ("ours", "ours, asyncio", "httpx + json", "aiohttp + json", "aiohttp + json, uvloop")
GOALS = {
    ("cpu_us", "httpx + json"): 0.35,
    ("cpu_us", "aiohttp + json"): 0.6,
    ("lag_p50_us", "httpx + json"): 0.15,
    ("lag_p50_us", "aiohttp + json"): 0.5,
    ("lag_p99_us", "httpx + json"): 0.25,
}


def body(number: int) -> dict[str, Any]:
    """Body of request `number`. Streams begin evenly over one gap, like requests of unrelated users."""
    model = f"null:ttft_ms={100 + number * GAP_MS / STREAMS:.3f}+itl_ms={GAP_MS}"
    return {
        "model": model,
        "prompt": "a b c",
        "max_tokens": TOKENS,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }


def ttft_error_ms(url: str) -> float:
    """Median over 64 streams that begin at once: our time to first token minus the server's own, ms.

    Every token count must be exact.
    """
    from mlflow_llmbench.backends.openai.answers import read_answer
    from mlflow_llmbench.backends.openai.http_requests import http_request
    from mlflow_llmbench.loadgen import client as client_loadgen
    from mlflow_llmbench.loadgen.address import address_of

    asked = body(0) | {"model": "null:ttft_ms=50+itl_ms=20", "max_tokens": 20}
    read_log(url)
    address = address_of(url)
    client = client_loadgen.LoadClient(address)
    trace = client.run(
        lambda n: http_request(address, "/v1/completions", asked, n),
        client_loadgen.Load(GOLDEN_STREAMS, GOLDEN_STREAMS),
    )
    client.close()
    log, records = read_log(url), [read_answer(exchange) for exchange in trace.exchanges]
    assert [(r.outcome, r.tokens, len(r.stamps_ns)) for r in records] == [("complete", 20, 20)] * GOLDEN_STREAMS
    return (
        median(
            (r.stamps_ns[0] - r.t0_ns) - (log[str(n)]["tokens_ns"][0] - log[str(n)]["received_ns"])
            for n, r in enumerate(records)
        )
        / 1e6
    )


def run_ours(url: str, uvloop: bool) -> tuple[dict[int, list[int]], float, float]:
    """Stamps by stream, CPU seconds while the streams ran, and with the parsing after them."""
    from mlflow_llmbench.backends.openai.answers import read_answer
    from mlflow_llmbench.backends.openai.http_requests import http_request
    from mlflow_llmbench.loadgen import client as client_loadgen
    from mlflow_llmbench.loadgen.address import address_of

    if not uvloop:
        client_loadgen.new_loop = asyncio.new_event_loop
    address = address_of(url)
    client = client_loadgen.LoadClient(address)
    client.ask(http_request(address, "/health"))
    trace = client.run(
        lambda n: http_request(address, "/v1/completions", body(n), n), client_loadgen.Load(STREAMS, STREAMS)
    )
    before = time.process_time()
    records = [read_answer(exchange) for exchange in trace.exchanges]
    assert {r.outcome for r in records} == {"complete"}
    client.close()
    return (
        {n: list(r.stamps_ns) for n, r in enumerate(records)},
        trace.cpu_s,
        trace.cpu_s + time.process_time() - before,
    )


async def run_httpx(url: str) -> tuple[dict[int, list[int]], float, float]:
    import httpx

    stamps: dict[int, list[int]] = {}
    async with httpx.AsyncClient(
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None), timeout=60
    ) as client:

        async def one(number: int) -> None:
            mine = stamps[number] = []
            async with client.stream(
                "POST", f"{url}/v1/completions", json=body(number), headers={"X-Request-Id": str(number)}
            ) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        now = time.perf_counter_ns()
                        if json.loads(line[6:])["choices"]:
                            mine.append(now)

        await asyncio.gather(*(client.get(f"{url}/health") for _ in range(STREAMS)))
        before = time.process_time()
        await asyncio.gather(*map(one, range(STREAMS)))
        used = time.process_time() - before
    return stamps, used, used


async def run_aiohttp(url: str) -> tuple[dict[int, list[int]], float, float]:
    import aiohttp

    stamps: dict[int, list[int]] = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:

        async def one(number: int) -> None:
            mine, rest = stamps.setdefault(number, []), b""
            async with client.post(
                f"{url}/v1/completions", json=body(number), headers={"X-Request-Id": str(number)}
            ) as answer:
                async for data in answer.content.iter_any():
                    now = time.perf_counter_ns()
                    *events, rest = (rest + data).split(b"\n\n")
                    for event in events:
                        if (
                            event.startswith(b"data: ")
                            and event != b"data: [DONE]"
                            and json.loads(event[6:])["choices"]
                        ):
                            mine.append(now)

        async def warm() -> None:
            async with client.get(f"{url}/health") as answer:
                await answer.read()

        await asyncio.gather(*(warm() for _ in range(STREAMS)))
        before = time.process_time()
        await asyncio.gather(*map(one, range(STREAMS)))
        used = time.process_time() - before
    return stamps, used, used


def run_one(name: str, url: str, out: Path) -> None:
    """Run one client in this process; write its stamps and CPU seconds to a file."""
    if name.startswith("ours"):
        found = run_ours(url, uvloop=name == "ours")
    else:
        if name.endswith("uvloop"):
            import uvloop

            asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        found = asyncio.run(run_httpx(url) if name.startswith("httpx") else run_aiohttp(url))
    out.write_text(json.dumps(found))


def measure(name: str, url: str) -> dict[str, float]:
    """Run one client in a fresh process: CPU per event in µs, and the lag of its stamps behind the server's."""
    read_log(url)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "stamps.json"
        subprocess.run([sys.executable, __file__, "--one", name, "--url", url, "--out", str(out)], check=True)
        stamps, running, whole = json.loads(out.read_text())
    log = read_log(url)
    lags = [
        own - its for number, mine in stamps.items() for own, its in zip(mine, log[number]["tokens_ns"], strict=True)
    ]
    assert len(lags) == STREAMS * TOKENS, (name, len(lags))
    rates = [
        1e9 * (TOKENS - 1) / (truth["tokens_ns"][-1] - truth["tokens_ns"][0])
        for key, truth in log.items()
        if key.isdecimal()
    ]
    return {
        "cpu_us": whole / len(lags) * 1e6,
        "cpu_while_running_us": running / len(lags) * 1e6,
        "lag_p50_us": percentile(lags, 50) / 1e3,
        "lag_p99_us": percentile(lags, 99) / 1e3,
        "server_tokens_per_s_per_stream": median(rates),
    }


def main() -> int:
    """Measure all, print one line each and one JSON object; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--one", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run_one(given.one, given.url, given.out)
        return 0
    rounds: list[dict[str, dict[str, float]]] = []
    with null_server() as url:
        for number in range(given.rounds):
            order = CLIENTS if number % 2 == 0 else CLIENTS[::-1]
            rounds.append({name: measure(name, url) for name in order})
        errors = [ttft_error_ms(url) for _ in range(given.rounds)]
    late = median(errors) > GOLDEN_MS
    missed = int(late)
    for name in CLIENTS:
        print(f"{name:24}" + "  ".join(f"{key} {median(r[name][key] for r in rounds):9.1f}" for key in rounds[0][name]))
    ratios = {}
    for (key, other), goal in GOALS.items():
        pairs = [r["ours"][key] / r[other][key] for r in rounds]
        least = min(r["ours"][key] for r in rounds) / min(r[other][key] for r in rounds)
        ratios[f"{key}: ours ÷ {other}"] = {
            "ratio": median(pairs),
            "ratio_of_minima": least,
            "goal": goal,
            "pairs": pairs,
        }
        missed += median(pairs) > goal
        print(
            f"{'met   ' if median(pairs) <= goal else 'MISSED'}  {median(pairs):7.3f} (minima {least:.3f})  goal "
            f"{goal:<5g} {key}: ours ÷ {other}"
        )
    told = f"TTFT less the server's own, ms, {GOLDEN_STREAMS} streams"
    print(
        f"{'MISSED' if late else 'met   '}  {median(errors):7.3f} (least {min(errors):.3f})   goal {GOLDEN_MS:<5g} "
        f"{told}"
    )
    environment = machine.environment()
    where = {
        "cpu": environment["cpu"],
        "python": environment["python"],
        "os": environment["os"],
        "load_average": os.getloadavg(),
    }
    load = {"streams": STREAMS, "tokens": TOKENS, "tokens_per_s": 1000 / GAP_MS}
    text = json.dumps({"machine": where, "load": load, "ratios": ratios, "ttft_error_ms": errors, "rounds": rounds})
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
