"""Find out whether a store can be reached: its server or database, and the object store of its artifacts.

It is asked once and with a limit, because MLflow's clients ask a dead server for 246 s, a dead database for 100 s, and
notice that the artifacts cannot be written when they are.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import socket
import ssl
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from ..records.errors import StoreAway, TrackingError
from .explanations import KEYS, install_command

LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "AWS_DEFAULTS_MODE": "standard",  # 3 s to connect, not 60
    "AWS_MAX_ATTEMPTS": "2",
}
"""Limits of the clients of MLflow and of S3. Variables that the user set are kept."""

DATABASES = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Databases with a server, by the scheme of their address → their usual port."""

OBJECT_STORES = {"s3": "boto3", "gs": "google.cloud.storage", "wasbs": "azure.storage.blob"}
"""Schemes of artifacts that a client reads and writes itself → the module that it needs."""

AWAY = "The MLflow server {} does not answer."
GOES_ON = "Measuring all the same: results are kept on the disk and uploaded at the end, if it answers then."
_told_away: ContextVar[str] = ContextVar("told_away", default="")


def set_limits() -> None:
    """Set the limits of the store's clients for this process."""
    for name, value in LIMITS.items():
        os.environ.setdefault(name, value)


def patience_s() -> float:
    """Return the seconds without an answer after which a store counts as unreachable, as for MLflow's own requests."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    try:
        return float(os.environ.get(name) or LIMITS[name])
    except ValueError:
        return float(LIMITS[name])


@contextlib.contextmanager
def told_at_once(uri: str | None, warn: Callable[[str], None] | None) -> Iterator[None]:
    """Tell before a command does anything that the server it was given does not answer.

    A command that goes on without it is given as `warn`, which gets the line, so that it is not told again in the
    block (`is_told`). Raises StoreAway without `warn`.
    """
    is_away = bool(uri) and not answers(str(uri))
    if is_away and warn is None:
        raise StoreAway(f"{AWAY.format(uri)} Check the address and that it runs.")
    if is_away and warn is not None:
        warn(f"{AWAY.format(uri)} {GOES_ON}")
    token = _told_away.set(str(uri) if is_away else "")
    try:
        yield
    finally:
        _told_away.reset(token)


def is_told(error: StoreAway) -> bool:
    """Return True if `told_at_once` has told this."""
    told = _told_away.get()
    return bool(told) and str(error) == str(StoreAway(AWAY.format(told)))


def answers(address: str) -> bool:
    """Return True if a server or database answers anything in time; also True for stores that are neither."""
    scheme = address.partition(":")[0].partition("+")[0]
    if scheme in DATABASES:
        return _accepts(address, DATABASES[scheme])
    if scheme not in ("http", "https"):
        return True
    try:
        with urllib.request.urlopen(f"{without_user(address).rstrip('/')}/health", timeout=patience_s()):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # With a TLS error the server is there, and its first use gives the best message.
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return isinstance(error, ValueError | http.client.HTTPException)


def _accepts(address: str, usual_port: int) -> bool:
    """Return True if a database accepts connections, or if its address does not say where it is."""
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = parts.hostname, parts.port or usual_port
    except ValueError:
        return True  # the first use has the best message
    if not host:
        return True
    try:
        socket.create_connection((host, port), timeout=patience_s()).close()
    except OSError:
        return False
    return True


def try_database(address: str) -> None:
    """Connect to a database once. Raises what its driver says, which MLflow would repeat for 100 s."""
    if address.partition(":")[0].partition("+")[0] not in DATABASES:
        return
    from mlflow.store.db.utils import create_sqlalchemy_engine

    engine = create_sqlalchemy_engine(address)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def require_artifact_store(place: str | None) -> None:
    """Raise TrackingError if this process is to write artifacts to an object store and lacks a package or credentials.

    `place`: location of an experiment's or a run's artifacts. A server that keeps them itself gives no such place.
    """
    place = str(place)
    module = OBJECT_STORES.get(place.partition(":")[0])
    if module is None:
        return
    try:
        is_there = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package is missing, or the import is blocked
        is_there = False
    told = f"The artifacts of this experiment are kept in {place}, and are written there by this process:"
    if not is_there:
        raise TrackingError(f"{told} the package {module} is not installed. Run: {install_command(module)}")
    if module == "boto3" and not _has_s3_credentials():
        raise TrackingError(f"{told} there are no credentials for it. Set {KEYS}.")


def _has_s3_credentials() -> bool:
    import boto3

    if os.environ.get("MLFLOW_EXPERIMENTAL_S3_SIGNATURE_VERSION", "").lower() == "unsigned":
        return True
    try:
        return boto3.Session().get_credentials() is not None
    except Exception:  # a damaged or partial configuration; the first use has the best message
        return True


def without_user(address: str) -> str:
    """Remove user and password from an address; urllib takes them for a part of the host's name."""
    host = urllib.parse.urlsplit(address).netloc
    # Not by `geturl`, which makes sqlite:////tmp/x of an absolute path sqlite://tmp/x.
    return address.replace(f"//{host}", f"//{host.rpartition('@')[2]}", 1) if host else address
