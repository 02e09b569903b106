"""What errors of stores mean, from their own texts: one line, what is wrong and what to do."""

from __future__ import annotations

import pytest

from mlflow_llmbench.records.errors import TrackingError
from mlflow_llmbench.tracking.explanations import plain_errors, reason

SERVER = "HTTPConnectionPool(host='127.0.0.1', port=5000): Max retries exceeded with url:"
ARTIFACT = (
    f"API request to http://h/api/2.0/mlflow-artifacts/artifacts/1/x/artifacts/a failed with exception {SERVER} /"
)
CALL = f"API request to http://h/api/2.0/mlflow/runs/create failed with exception {SERVER} /api (Caused by"

REASONS = {
    f"{ARTIFACT} (Caused by ResponseError('too many 500 error responses'))": (
        "the server could not keep an artifact (HTTP 500). The reason is in the server's log"
    ),
    f"{ARTIFACT} (Caused by ConnectionResetError(104, 'Connection reset by peer'))": (
        "the server could not keep an artifact (it broke the connection). The reason is in the server's log"
    ),
    f"{CALL} ResponseError('too many 503 error responses'))": (
        "the server failed (HTTP 503). The reason is in the server's log"
    ),
    f"{CALL} NewConnectionError('Failed to establish a new connection: [Errno 111] Connection refused'))": (
        "the server does not answer (Connection refused)"
    ),
    f"{CALL} ReadTimeoutError('Read timed out. (read timeout=10)'))": (
        "the server has not answered in time. Set MLFLOW_HTTP_REQUEST_TIMEOUT to more seconds if it is slow"
    ),
    "API request to endpoint /api failed with error code 401 != 200. Response body: 'no'": (
        "it asks for a user (401 Unauthorized). Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
        "MLFLOW_TRACKING_TOKEN, to those of the server"
    ),
    "403 Client Error: FORBIDDEN for url: http://h/api/2.0/mlflow-artifacts/artifacts/1": (
        "your user may not do this (403 Forbidden). Ask for the permission, or set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD to those of another"
    ),
    "Unable to locate credentials": (
        "the object store asks for credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    ),
    'Could not connect to the endpoint URL: "http://10.0.0.1:9000/b/1/x/artifacts/a.txt"': (
        "the object store http://10.0.0.1:9000 does not answer. Check MLFLOW_S3_ENDPOINT_URL and that it runs"
    ),
    'Connect timeout on endpoint URL: "http://10.0.0.1:9000/b/1"': (
        "the object store http://10.0.0.1:9000 does not answer. Check MLFLOW_S3_ENDPOINT_URL and that it runs"
    ),
    '(psycopg.OperationalError) FATAL:  password authentication failed for user "me"\n(Background': (
        'password authentication failed for user "me"'
    ),
    "Something new.\nand more": "Something new",
}  # fmt: skip


@pytest.mark.parametrize("said", REASONS)
def test_an_error_of_a_store_is_explained(said: str) -> None:
    assert reason(OSError(said)) == REASONS[said]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            'FATAL:  database "x" does not exist',
            'database "x" does not exist. Check user, password and database in the address.',
        ),
        (
            "Connection refused",
            "the server does not answer (Connection refused). Check the address and that the server runs, or",
        ),
        ("no such thing.", "no such thing. Check the address and that the server runs, or leave it out"),
    ],
)
def test_advice_fits_the_error(said: str, told: str) -> None:
    with pytest.raises(TrackingError) as raised, plain_errors("postgresql://127.0.0.1/runs"):
        raise OSError(said)
    assert str(raised.value).startswith(f"The MLflow store postgresql://127.0.0.1/runs cannot be used: {told}")


@pytest.mark.parametrize(
    ("module", "command"),
    [("psycopg", "'psycopg[binary]'"), ("psycopg2", "psycopg2-binary"), ("MySQLdb", "mysqlclient"), ("x", "x")],
)
def test_a_package_that_lacks_is_named_with_the_command_that_installs_it(module: str, command: str) -> None:
    with pytest.raises(TrackingError) as raised, plain_errors("postgresql://127.0.0.1/runs"):
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)
    assert str(raised.value).endswith(f"the package {module} is not installed. Run: pip install {command}")
