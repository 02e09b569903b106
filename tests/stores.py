"""A store as companies run it, on loopback: PostgreSQL, an S3-compatible object store, and MLflow's tracking server.

Needs what `missing` looks for: the server programs of Debian's package `postgresql`, and the packages of the extra
`dev`. The object store is moto's, which keeps all in memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = {"psycopg": "psycopg[binary]", "moto": "moto[s3]", "boto3": "boto3", "flask_wtf": "Flask-WTF"}
"""Modules that the servers need → what to install."""

BUCKET = "llmbench"
USER, PASSWORD = "admin", "a-long-admin-password"  # of MLflow's server with basic auth
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_DEFAULT_REGION": "us-east-1"}
STARTS_WITHIN_S = 180.0


def programs() -> Path | None:
    """Return the folder of PostgreSQL's server programs, None if it is not installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda bin: float(bin.parent.name))
    if found := shutil.which("initdb"):
        folders.append(Path(found).resolve().parent)
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


def missing() -> str | None:
    """Return what must be installed for these servers, as a sentence; None if all is there."""
    packages = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if packages:
        return f"Not installed: {', '.join(packages)}. Run: pip install -c constraints.txt -e '.[dev]'"
    if programs() is None:
        return "Not installed: PostgreSQL. Run: apt-get install postgresql"
    return None


def free_port() -> int:
    """Return a port of loopback that nobody uses."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def answers(address: str) -> bool:
    """Whether a server answers anything."""
    try:
        with urllib.request.urlopen(address, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _wait_for(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while not answers(address):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.1)


@dataclass
class Server:
    """A server process that can be killed and started again on its port. Its output goes to `log`."""

    command: list[str]
    port: int
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Address of the server."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, wait: bool = True) -> None:
        """Start it, and wait until it answers."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "AWS_"))}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", **self.environment}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.log.parent, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        if wait:
            _wait_for(self.process, self.address, self.log)

    def kill(self) -> None:
        """Kill it and its children at once."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """Start a server, and kill it at the end."""
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Start PostgreSQL on loopback with an empty database, and yield its address.

    It refuses to run as root, so root starts it as the user `postgres`.
    """
    found = programs()
    assert found is not None
    with tempfile.TemporaryDirectory(prefix="pg-") as scratch:
        folder, port = Path(scratch), free_port()
        who: dict[str, Any] = {}
        if os.geteuid() == 0:
            account = pwd.getpwnam("postgres")
            os.chown(folder, account.pw_uid, account.pw_gid)
            who = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        settings: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **who}
        data = str(folder / "data")
        initdb = [str(found / "initdb"), "-D", data, "-U", "mlflow", "-A", "trust", "-E", "UTF8", "--locale=C"]
        subprocess.run(initdb, check=True, **settings)
        options = ["-c", "listen_addresses=127.0.0.1", "-k", str(folder), "-p", str(port)]
        process = subprocess.Popen([str(found / "postgres"), "-D", data, *options], **settings)
        try:
            ready = [str(found / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
            deadline = time.monotonic() + STARTS_WITHIN_S
            while subprocess.run(ready, check=False).returncode:
                assert process.poll() is None and time.monotonic() < deadline, "PostgreSQL does not start"
                time.sleep(0.05)
            yield f"postgresql+psycopg://mlflow@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # "fast shutdown"
            process.wait()


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[Server]:
    """Start an S3-compatible object store with an empty bucket."""
    import boto3

    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(Server(command, port, folder / "s3.log")) as server:
        client = boto3.client(
            "s3",
            endpoint_url=server.address,
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            region_name=KEYS["AWS_DEFAULT_REGION"],
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield server


def tracking_server(
    folder: Path, database: str, s3: str, under: str, *, direct: bool = False, auth: bool = False
) -> Server:
    """Return MLflow's server, not started, with its runs in a database and its artifacts in an object store.

    `under`: folder of the bucket. `direct`: clients write artifacts to the object store themselves. `auth`: it asks for
    a user and a password (`USER`, `PASSWORD`).
    """
    port, place = free_port(), f"s3://{BUCKET}/{under}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--port", str(port)]
    command += ["--workers", "1", "--host", "127.0.0.1"]
    command += (
        ["--no-serve-artifacts", "--default-artifact-root", place] if direct else ["--artifacts-destination", place]
    )
    environment = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": s3, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    if auth:
        settings = folder / "auth.ini"
        settings.write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/users.db\n"
            f"admin_username = {USER}\nadmin_password = {PASSWORD}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        command += ["--app-name", "basic-auth"]
        environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-the-tests"}
    return Server(command, port, folder / "mlflow.log", environment)
