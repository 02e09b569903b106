"""MLflow's client, such that nothing secret and nothing of another folder reaches the store, whoever calls it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..measure.own_files import copy_own_files, own_files, refused_files
from ..records.redaction import masker

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

TEXTS = frozenset(
    [
        "create_experiment", "create_logged_model", "create_model_version", "create_registered_model", "create_run",
        "log_batch", "log_inputs", "set_experiment_tag", "set_logged_model_tags", "set_tag", "update_run",
    ]
)  # fmt: skip
"""Methods that write texts. Each text in their arguments is masked."""

AT_ONCE = 8
"""Files of a folder that are sent at the same time. A distant store takes seconds for each, however small."""


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
        if name == "log_model_artifacts":
            return lambda model_id, local_dir, *under, **named: _upload_own(
                lambda folder: method(model_id, folder, *under, **named), Path(local_dir)
            )
        return method

    def log_artifacts(self, run_id: str, local_dir: str, artifact_path: str | None = None) -> None:
        """Upload the files of a folder to a run, below `artifact_path`.

        The first is sent alone, so that a store that refuses is asked once.
        """
        folder = Path(local_dir)

        def send(file: Path) -> None:
            under = PurePosixPath(artifact_path or "", file.parent.relative_to(folder).as_posix()).as_posix()
            self._client.log_artifact(run_id, str(file), None if under == "." else under)

        files = own_files(folder)
        for file in files[:1]:
            send(file)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(send, files[1:]))


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


def _upload_own(upload: Callable[[str], Any], folder: Path) -> Any:
    """Upload a folder; if it has links, a copy of its own files."""
    if not refused_files(folder):
        return upload(str(folder))
    with tempfile.TemporaryDirectory() as scratch:
        copy_own_files(folder, Path(scratch, "own"))
        return upload(str(Path(scratch, "own")))
