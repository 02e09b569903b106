"""What uploading costs, by store: `python benchmarks/stores.py [--cells N] [--delay S] [--out FILE]`.

Measures a sweep of N cells of the fake backend once, without a store. Then uploads its folder to a SQLite file, and
through a proxy that counts requests to MLflow's server with PostgreSQL and an S3-compatible object store: as it is,
with basic auth, with clients that write artifacts themselves, and with S more seconds for every request. Each upload is
done twice; the second must find everything there. Prints seconds and requests per cell. Needs Debian's postgresql and
the extra `dev`; takes about eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"

from mlflow_llmbench import run
from mlflow_llmbench.sweeps.upload import upload
from mlflow_llmbench.system import machine
from tests import stores
from tests.tools.proxy import Proxy

ROOT = Path(__file__).resolve().parent.parent
FIXED = {
    "backend": "fake",
    "model": "fake:ttft_ms=2+itl_ms=1",
    "prompt_tokens": 16,
    "output_tokens": 16,
    "repetitions": 10,
    "warmup": 1,
}
DEAD = "http://127.0.0.1:1"
USER = {"MLFLOW_TRACKING_USERNAME": stores.USER, "MLFLOW_TRACKING_PASSWORD": stores.PASSWORD}


def sweep(cells: int, folder: Path) -> Path:
    """Measure a sweep without a store. Returns its folder."""
    done = run(tracking_uri=DEAD, output_dir=str(folder), batch_size=[*range(1, cells + 1)], **FIXED)
    assert done.outcome == "ok", done.outcome
    return done.folder


@contextlib.contextmanager
def variables(given: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a block."""
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def timed(folder: Path, address: str, cells: int, proxies: list[Proxy]) -> dict[str, Any]:
    """Upload a sweep twice. Returns seconds and requests of the first time per cell, and all of the second."""
    found: dict[str, Any] = {}
    for which in ("first", "again"):
        for proxy in proxies:
            proxy.requests.clear()
        started = time.perf_counter()
        done = upload(str(folder), address, "stores")
        took = time.perf_counter() - started
        assert not done.problems, done.problems
        requests = sum(sum(proxy.requests.values()) for proxy in proxies)
        if which == "first":
            assert done.new == cells + 1, done
            found |= {"s_per_cell": round(took / cells, 3), "s": round(took, 2)}
            if proxies:
                kinds = {kind: count for proxy in proxies for kind, count in sorted(proxy.requests.items())}
                found |= {"requests_per_cell": round(requests / cells, 1), "requests": kinds}
        else:
            assert done.there == cells + 1, done
            found |= {"again_s": round(took, 2)} | ({"again_requests": requests} if proxies else {})
    return found


def main() -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--delay", type=float, default=3.0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if lacks := stores.missing():
        print(lacks, file=sys.stderr)
        return 0  # nothing to measure here
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.chdir(scratch)
        folder = sweep(given.cells, scratch / "results")
        upload(str(folder), f"sqlite:///{scratch}/first.db")  # imports what is imported once
        found["SQLite file"] = timed(folder, f"sqlite:///{scratch}/mlflow.db", given.cells, [])
        objects = stack.enter_context(stores.object_store(scratch))
        s3 = stack.enter_context(Proxy(objects.address))
        direct = {**stores.KEYS, "MLFLOW_S3_ENDPOINT_URL": s3.address}
        cases = {
            "PostgreSQL and S3": ({}, {}, 0.0),
            "PostgreSQL and S3, basic auth": ({"auth": True}, USER, 0.0),
            "PostgreSQL and S3, artifacts written by the client": ({"direct": True}, direct, 0.0),
            f"PostgreSQL and S3, {given.delay:g} s more per request": ({}, {}, given.delay),
        }
        for name, (settings, environment, delay_s) in cases.items():
            place = scratch / str(len(found))
            place.mkdir()
            with (
                stores.postgres() as database,
                stores.running(
                    stores.tracking_server(place, database, objects.address, place.name, **settings)
                ) as server,
                Proxy(server.address, delay_s) as proxy,
                variables(environment),
            ):
                proxies = [proxy, s3] if settings.get("direct") else [proxy]
                found[name] = timed(folder, proxy.address, given.cells, proxies)
        os.chdir(ROOT)
    result = {
        "cells": given.cells,
        "configuration": {name: str(value) for name, value in FIXED.items()},
        "stores": found,
        "environment": machine.environment(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
