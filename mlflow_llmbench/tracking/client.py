"""MLflow's client, such that nothing secret and nothing of another folder reaches the store, whoever calls it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..measure.own_files import copy_own_files, refused_files
from ..records.redaction import masker

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

TEXTS = frozenset(
    [
        "create_experiment", "create_logged_model", "create_model_version", "create_registered_model", "create_run",
        "log_batch", "log_inputs", "set_experiment_tag", "set_tag", "update_run",
    ]
)  # fmt: skip
"""Methods that write texts. Each text in their arguments is masked."""

FOLDERS = {"log_artifacts": 1, "log_model_artifacts": 1}
"""Methods that upload a folder → the position of the folder. Only its own files are uploaded."""


def guarded_client() -> MlflowClient:
    """Return MLflow's client for the current tracking URI, guarded."""
    return cast("MlflowClient", _Guarded())


class _Guarded:
    def __init__(self) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name in TEXTS:
            return lambda *given, **named: _write(method, given, named)
        if name in FOLDERS:
            return lambda *given, **named: _upload(method, FOLDERS[name], given, named)
        return method


def _masked(value: T, mask: Callable[[str], str]) -> T:
    """Return a copy of arguments with each text masked, also within MLflow's entities. Metrics have no text of others.

    `mask`: of `redaction.masker`.
    """
    if isinstance(value, str):
        return cast(T, mask(value))
    if isinstance(value, Mapping):
        return cast(T, {key: _masked(inner, mask) for key, inner in value.items()})
    if isinstance(value, list | tuple):
        return cast(T, type(value)(_masked(inner, mask) for inner in value))
    if type(value).__module__.startswith("mlflow.entities") and type(value).__name__ != "Metric":
        found = copy.copy(value)
        vars(found).update(_masked(vars(value), mask))
        return found
    return value


def _write(method: Callable[..., Any], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    given, named = _masked((given, named), masker())
    return method(*given, **named)


def _upload(method: Any, position: int, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Upload a folder; if it has links, a copy of its own files."""
    folder = Path(given[position])
    if not refused_files(folder):
        return method(*given, **named)
    with tempfile.TemporaryDirectory() as scratch:
        copy_own_files(folder, Path(scratch, "own"))
        return method(*given[:position], str(Path(scratch, "own")), *given[position + 1 :], **named)
