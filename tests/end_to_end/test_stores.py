"""Stores as companies run them: PostgreSQL, an S3-compatible object store, basic auth, servers that are slow or die.

Needs what `tests.stores.missing` names: Debian's package `postgresql`, and the extra `dev`. All servers are local.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from mlflow_llmbench import load_results, run
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.measure.events import CellBegun
from mlflow_llmbench.sweeps.sweep import SweepResult
from mlflow_llmbench.sweeps.upload import upload
from mlflow_llmbench.tracking.registry import register
from mlflow_llmbench.tracking.store import open_store
from tests import stores
from tests.sweeps.test_between_cells import At
from tests.sweeps.test_upload import content
from tests.tools.proxy import Proxy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(stores.missing() is not None, reason=stores.missing() or ""),
    pytest.mark.timeout(900),
]

ROOT = Path(__file__).resolve().parents[2]
CELL = {"backend": "fake", "output_tokens": 6, "prompt_tokens": 4, "repetitions": 5, "warmup": 1, "rerun": True}
COMMAND = "run --backend fake --model fake:ttft_ms=1 --repetitions 1 --warmup 1 --prompt-tokens 2 --output-tokens 2"
DEAD = "http://127.0.0.1:1"  # nobody listens there
USER = {"MLFLOW_TRACKING_USERNAME": stores.USER, "MLFLOW_TRACKING_PASSWORD": stores.PASSWORD}


@dataclass(frozen=True)
class Stores:
    """The servers of this module, over one database, so that `plain` can be asked for what another one was given.

    `plain` and `guarded` keep the artifacts, clients of `direct` do it themselves.
    """

    database: str
    s3: Proxy
    plain: stores.Server
    guarded: stores.Server
    direct: stores.Server

    def named(self, name: str, monkeypatch: pytest.MonkeyPatch) -> stores.Server:
        """Return a server, and set what its clients need."""
        keys = {**stores.KEYS, "MLFLOW_S3_ENDPOINT_URL": self.s3.address}
        for key, value in {"plain": {}, "guarded": USER, "direct": keys}[name].items():
            monkeypatch.setenv(key, value)
        return {"plain": self.plain, "guarded": self.guarded, "direct": self.direct}[name]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    plain, guarded, direct, of_s3 = (tmp_path_factory.mktemp(name) for name in ("plain", "guarded", "direct", "s3"))
    with (
        stores.postgres() as database,
        stores.object_store(of_s3) as objects,
        Proxy(objects.address) as s3,
        stores.running(stores.tracking_server(plain, database, s3.address, "plain")) as one,
        stores.running(stores.tracking_server(guarded, database, s3.address, "plain", auth=True)) as two,
        stores.running(stores.tracking_server(direct, database, s3.address, "direct", direct=True)) as three,
    ):
        yield Stores(database, s3, one, two, three)


def sweep(address: str, experiment: str, **parameters: Any) -> SweepResult:
    asked = {"model": "fake:ttft_ms=2+itl_ms=1", "batch_size": "1,2", **CELL, **parameters}
    return run(tracking_uri=address, experiment=experiment, **asked)


def runs_of(server: stores.Server, experiment: str) -> list[Run]:
    client = MlflowClient(server.address)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def states(server: stores.Server, experiment: str) -> list[str]:
    return sorted(one.info.status for one in runs_of(server, experiment))


def unzipped(file: Path) -> bytes:
    """Return the content of a file. From S3, MLflow fetches a `.gz` unzipped, under the same name."""
    content = file.read_bytes()
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


def all_is_there(server: stores.Server, experiment: str, folder: Path, store_uri: str) -> None:
    """Check that a store has what another one gets from the same folder, and the bytes of each artifact."""
    upload(str(folder), store_uri)
    assert content(server.address, experiment) == content(store_uri)
    client = MlflowClient(server.address)
    cells = [one for one in runs_of(server, experiment) if "llmbench.cell" in one.data.tags]
    assert len(cells) == 2
    for one in cells:
        own = folder / one.data.tags["llmbench.cell"] / "artifacts"
        fetched = Path(client.download_artifacts(one.info.run_id, "", str(folder.parent)))
        files = [file for file in own.rglob("*") if file.is_file()]
        assert len(files) >= 7
        for file in files:
            assert unzipped(fetched / file.relative_to(own)) == unzipped(file), file


@pytest.mark.charts
@pytest.mark.parametrize("name", ["plain", "guarded", "direct"])
def test_everything_arrives_and_a_second_upload_changes_nothing(
    servers: Stores, store_uri: str, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server = servers.named(name, monkeypatch)
    done = sweep(server.address, f"whole-{name}")
    assert (done.exit_code, done.not_uploaded) == (0, ())
    assert states(servers.plain, f"whole-{name}") == ["FINISHED"] * 3
    all_is_there(servers.plain, f"whole-{name}", done.folder, store_uri)
    again = upload(str(done.folder), server.address, f"whole-{name}")
    assert (again.new, again.completed, again.there) == (0, 0, 3)
    assert "View run" not in capfd.readouterr().out
    secrets = (stores.PASSWORD, stores.KEYS["AWS_SECRET_ACCESS_KEY"])
    for file in done.folder.rglob("*"):
        assert not file.is_file() or not any(one.encode() in file.read_bytes() for one in secrets), file


def test_a_real_model_is_found_registered_and_loaded(
    servers: Stores, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    server = servers.named("plain", monkeypatch)
    small = {"prompt_tokens": 8, "output_tokens": 4, "repetitions": 5, "warmup": 1, "threads": 1}
    done = run(model=str(tiny_model), device="cpu", tracking_uri=server.address, experiment="real", **small)
    assert done.not_uploaded == ()
    [found] = load_results(f"runs:/{done.run_ids[0]}", tracking_uri=server.address)
    assert found.outcome == "ok" and len(found.repetitions) == 5
    made = register(open_store(server.address, "real"), done.run_ids[0], "tiny", "candidate", "a test")
    client = MlflowClient(server.address)
    assert client.get_model_version_by_alias("tiny", "candidate").run_id == done.run_ids[0]
    mlflow.artifacts.download_artifacts(made.uri, dst_path=str(tmp_path / "v"), tracking_uri=server.address)
    assert (tmp_path / "v" / "MLmodel").exists()


@pytest.mark.parametrize("given", [{}, {**USER, "MLFLOW_TRACKING_PASSWORD": "a-wrong-password"}])
def test_a_server_that_asks_for_a_user_is_told_before_anything_is_measured(
    servers: Stores, given: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    assert main([*COMMAND.split(), "--tracking-uri", servers.guarded.address]) == 1
    out, err = capfd.readouterr()
    told = "it asks for a user (401 Unauthorized). Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or"
    assert told in err and err.count("\n") == 1 and not out
    assert not Path("llmbench-results").exists()


def test_a_user_who_may_not_write_is_told_so_and_loses_nothing(
    servers: Stores, store_uri: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server = servers.named("guarded", monkeypatch)
    asked = urllib.request.Request(
        f"{server.address}/api/2.0/mlflow/users/create",
        json.dumps({"username": "reader", "password": "a-long-reader-password"}).encode(),
        {
            "Content-Type": "application/json",
            "Authorization": f"Basic {base64.b64encode(f'{stores.USER}:{stores.PASSWORD}'.encode()).decode()}",
        },
    )
    urllib.request.urlopen(asked).close()
    MlflowClient(server.address).create_experiment("of-admin")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-reader-password")
    done = sweep(server.address, "of-admin")
    assert done.outcome == "ok" and done.exit_code == 1
    assert "your user may not do this (403 Forbidden)" in done.not_uploaded[0]
    assert upload(str(done.folder), store_uri).new == 3


class Killing:
    """Kills a server at the n-th request of a kind that passes a proxy, and breaks its connection."""

    def __init__(self, server: stores.Server, proxy: Proxy, kind: str, which: int) -> None:
        self.server, self.proxy, self.kind, self.left = server, proxy, kind, which
        proxy.fault = self

    def __call__(self, kind: str) -> str | None:
        self.left -= kind == self.kind
        if self.left > 0:
            return None
        self.server.kill()
        return "cut"

    def bring_back(self) -> None:
        """Start the server again."""
        self.proxy.fault = lambda kind: None
        self.server.start()


KILLS = [
    ("POST runs/create", 2), ("POST runs/log-batch", 1), ("PUT artifacts", 9), ("POST runs/log-batch", 4),
    ("POST runs/update", 3),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "which"), KILLS)
def test_a_server_killed_in_the_middle_of_an_upload(
    servers: Stores, store_uri: str, capfd: pytest.CaptureFixture[str], kind: str, which: int
) -> None:
    """It gets SIGKILL when a request comes. Nothing looks whole that is not, and the next upload completes it."""
    name, folder = f"killed {kind} {which}", sweep(DEAD, "none").folder
    capfd.readouterr()
    with Proxy(servers.plain.address) as proxy:
        killing = Killing(servers.plain, proxy, kind, which)
        command = ["upload", str(folder), "--tracking-uri", proxy.address, "--experiment", name]
        try:
            assert main(command) == 1
        finally:
            killing.bring_back()
        said = capfd.readouterr().err.strip().splitlines()
        assert said and all(line.startswith("llmbench: ") and len(line) < 400 for line in said), said
        for one in runs_of(servers.plain, name):
            assert one.info.status != "FINISHED" or "llmbench.uploaded" in one.data.tags
            assert "llmbench.uploaded" not in one.data.tags or one.data.tags.get("mlflow.note.content")
        assert main(command) == 0
    assert states(servers.plain, name) == ["FINISHED"] * 3
    all_is_there(servers.plain, name, folder, store_uri)


def test_a_server_killed_between_two_cells_and_brought_back_has_everything(servers: Stores, store_uri: str) -> None:
    with Proxy(servers.plain.address) as proxy:
        killing = Killing(servers.plain, proxy, "PUT artifacts", 2)
        done = sweep(proxy.address, "back", batch_size="1,2,3", progress=At(CellBegun, 2, killing.bring_back))
    assert (done.outcome, done.not_uploaded, done.exit_code) == ("ok", (), 0)
    assert states(servers.plain, "back") == ["FINISHED"] * 4
    upload(str(done.folder), store_uri)
    assert content(servers.plain.address, "back") == content(store_uri)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("plain", "the server could not keep an artifact ("),
        ("direct", "does not answer. Check MLFLOW_S3_ENDPOINT_URL and that it runs"),
    ],
)
def test_an_object_store_that_is_away_and_comes_back(
    servers: Stores, store_uri: str, monkeypatch: pytest.MonkeyPatch, name: str, told: str
) -> None:
    server, experiment = servers.named(name, monkeypatch), f"no-objects-{name}"
    servers.s3.shut()
    try:
        done = sweep(server.address, experiment)
    finally:
        servers.s3.open()
    assert (done.outcome, done.exit_code) == ("ok", 1)
    assert told in done.not_uploaded[0]
    found = runs_of(server, experiment)
    assert found and {one.info.status for one in found} == {"FAILED"}
    assert not any("llmbench.uploaded" in one.data.tags for one in found)
    assert main(["upload", str(done.folder), "--tracking-uri", server.address, "--experiment", experiment]) == 0
    all_is_there(servers.plain, experiment, done.folder, store_uri)


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_lost_answer_to_the_beginning_of_a_run_leaves_none_open(servers: Stores, which: int) -> None:
    """MLflow's client asks again, and gets a second run. The first is ended, and nothing is twice."""
    left = [which]

    def lose(kind: str) -> str | None:
        left[0] -= kind == "POST runs/create"
        return "lose" if kind == "POST runs/create" and left[0] == 0 else None

    with Proxy(servers.plain.address) as proxy:
        proxy.fault = lose
        done = sweep(proxy.address, f"lost-{which}")
    assert (done.exit_code, done.not_uploaded) == (0, ())
    found = runs_of(servers.plain, f"lost-{which}")
    assert sorted(one.info.status for one in found) == ["FINISHED"] * 3 + ["KILLED"]
    [stray] = [one for one in found if one.info.status == "KILLED"]
    assert not stray.data.metrics and "llmbench.outcome" not in stray.data.tags
    assert upload(str(done.folder), servers.plain.address, f"lost-{which}").there == 3


def test_a_slow_store_gets_everything_and_nothing_is_sent_while_a_cell_is_timed(
    servers: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One question between the cells shows that an upload there would not be quick."""
    seen: list[int] = []
    with Proxy(servers.plain.address, delay_s=0.4) as proxy:
        look = At(CellBegun, 2, lambda: seen.append(sum(proxy.requests.values()) - proxy.requests["GET health"]))
        done = sweep(proxy.address, "slow", batch_size="1,2,3", progress=look)
        times = list(proxy.times)
        assert (done.exit_code, done.not_uploaded) == (0, ())
        assert seen == [5]  # the experiment: asked for, made and read · the parent's run · the first cell's
        assert len(times) > 40
        for run_id in done.run_ids:
            [result] = load_results(run_id, tracking_uri=servers.plain.address)
            for one in result.repetitions:
                begun, ended = one.requests[0].t0_ns, one.requests[-1].stamps_ns[-1]
                assert not [time for time in times if time[0] < ended and time[1] > begun]
    assert states(servers.plain, "slow") == ["FINISHED"] * 4


def without(module: str, arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command in an interpreter that lacks a module."""
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from mlflow_llmbench.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_direct_access_to_artifacts_asks_for_its_package_and_credentials_before_anything_is_measured(
    servers: Stores, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    MlflowClient(servers.direct.address).create_experiment("asking")
    command = [*COMMAND.split(), "--tracking-uri", servers.direct.address, "--experiment", "asking"]
    place = r"The artifacts of this experiment are kept in s3://llmbench/direct/"
    done = without("boto3", command, stores.KEYS)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert place in done.stderr and "the package boto3 is not installed. Run: pip install boto3" in done.stderr
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # not a machine of AWS, which would have a role
    assert main(command) == 1
    err = capfd.readouterr().err
    assert place in err and "no credentials for it. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or" in err
    assert not Path("llmbench-results").exists()


def test_a_database_without_a_server_is_a_store_too(
    servers: Stores, store_uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    done = sweep(servers.database, "plain-database")
    assert (done.exit_code, done.not_uploaded) == (0, ())
    upload(str(done.folder), store_uri)
    assert content(servers.database, "plain-database") == content(store_uri)
    capfd.readouterr()
    assert main([*COMMAND.split(), "--tracking-uri", f"{servers.database}-of-others"]) == 1
    err = capfd.readouterr().err
    assert 'database "postgres-of-others" does not exist. Check user, password and database in the address.' in err
    assert err.count("\n") == 1
    lacks = without("psycopg", [*COMMAND.split(), "--tracking-uri", servers.database], {})
    assert "the package psycopg is not installed. Run: pip install 'psycopg[binary]'\n" in lacks.stderr
    assert lacks.returncode == 1 and lacks.stderr.count("\n") == 1
