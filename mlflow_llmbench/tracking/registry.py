"""Model Registry: register the version that serves a measured configuration, with its evidence, and move its aliases.

A version is a models-from-code pyfunc: its code (`serving_code`), the configuration, a signature and pinned
requirements, about 20 KB and no weights. It is linked to the measured run, and its tags hold the figures.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import PACKAGE_DIR
from ..analysis.decisions.deployment import Deployment, Evidence, deployment_of, version_tags
from ..analysis.summary import summarize
from ..analysis.verdict import judge
from ..measure.journal import read_result
from ..records import reading
from ..records.errors import TrackingError, UsageError
from ..records.invocation import command_text
from ..records.reading import Unreadable
from ..records.redaction import redact
from ..records.results import RunResult
from ..reports.result import summary_markdown
from .explanations import plain_errors
from .runs import PARENT_TAG, cell_params, log_model_figures, set_tags
from .search import RUN_REFERENCE, cells_of_run, download_result, runs_of_sweep
from .store import Store

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature


CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
"""Aliases: registered but not promoted, in use, formerly in use."""

REFERENCE = re.compile(r"models:/([^/:@]+)(?:@([\w-]+)|/(\d+))")
RECOMMENDATION = "recommendation.json"
RECOMMENDED = "llmbench.recommended"
"""Tag of the run that a recommendation has chosen, with the goal."""

SERVING_CODE = "serving_model.py"


@dataclass(frozen=True)
class Registered:
    """A version of a registered model and its evidence run.

    `new` is False if the run was already registered, `served` if its backend is scripted and has no answers.
    """

    name: str
    version: str
    run_id: str
    new: bool = False
    served: bool = True

    @property
    def uri(self) -> str:
        """The URI of exactly this version."""
        return f"models:/{self.name}/{self.version}"


def parent_of_sweep(store: Store, sweep: str) -> str | None:
    """Return a sweep's parent run, or its only run if it had one cell. None if the store has no run of it."""
    tops = [run for run in runs_of_sweep(store, sweep) if PARENT_TAG not in run.data.tags] if sweep else []
    return str(tops[0].info.run_id) if tops else None


def mark_recommended(store: Store, sweep: str, config_hash: str, goal: str) -> None:
    """Tag the run of a sweep's cell as recommended for a goal, and no other run of the sweep."""
    chosen = run_of(store, sweep, config_hash)
    with plain_errors(store.uri):
        for run in runs_of_sweep(store, sweep):
            if RECOMMENDED in run.data.tags and run.info.run_id != chosen:
                store.client.delete_tag(run.info.run_id, RECOMMENDED)
    if chosen:
        set_tags(store, chosen, {"recommended": goal})


def run_of(store: Store, sweep: str, config_hash: str) -> str | None:
    """Return the newest run of one cell of a sweep; None if the store has none."""
    runs = runs_of_sweep(store, sweep) if sweep else []
    found = [run for run in runs if run.data.tags.get("llmbench.config_hash") == config_hash and _holds_result(run)]
    return str(max(found, key=lambda run: run.info.start_time or 0).info.run_id) if found else None


def run_behind(store: Store, reference: str, result: RunResult) -> str | None:
    """Return the run that holds a result: `reference` if it is the run of a cell, else by `run_of`."""
    match = RUN_REFERENCE.fullmatch(reference)
    if match and cells_of_run(store, match[1]) == [match[1]]:
        return match[1]
    return run_of(store, result.sweep, result.hashes.config)


def _holds_result(run: Run) -> bool:
    return "llmbench.outcome" in run.data.tags


def log_folder(store: Store, run_id: str, folder: Path) -> None:
    """Log all files of a folder as artifacts of a run. Raises TrackingError."""
    with plain_errors(store.uri):
        store.client.log_artifacts(run_id, str(folder))


def result_of(store: Store, run_id: str) -> RunResult:
    """Return the result that a run holds. Raises TrackingError."""
    with tempfile.TemporaryDirectory() as scratch:
        return read_result(download_result(store, run_id, Path(scratch)))


def register(
    store: Store, reference: str, name: str, alias: str = CANDIDATE, accept_suspect: str | None = None
) -> Registered:
    """Register a measured run, or the winner of a recommendation, as a new version of `name`, and point `alias` at it.

    `reference`: a run id, the parent run of a sweep that holds a recommendation, or a recommendation.json. A run that
    is already registered under this name gets the alias but no second version. Raises UsageError for a run that must
    not be registered (invalid, or suspect and not accepted) and for names that MLflow would refuse, TrackingError for
    the store.
    """
    _check_names(name, alias)
    run_id, accepted = _chosen_run(store, reference, accept_suspect)
    result = result_of(store, run_id)
    metrics = summarize(result)
    verdict = judge(result, metrics)
    reason = (accept_suspect or accepted) if verdict.word == "suspect" else None
    deployment = deployment_of(result, metrics, Evidence(run_id, result.sweep, verdict, reason, result.linked))
    with plain_errors(store.uri):
        there = _version_of_run(store, name, run_id)
        version = there or _create(store, name, result, deployment)
        store.client.set_registered_model_alias(name, alias, version)
        for run in filter(None, (run_id, store.given_run_id)):
            store.client.set_tag(run, "llmbench.registered", f"models:/{name}/{version}")
    return Registered(name, version, run_id, new=there is None, served=bool(deployment.config["engine"]))


def check_request(reference: str, name: str, alias: str) -> None:
    """Raise UsageError for names and files that `register` would refuse, before a store is opened."""
    if reference.endswith(".json"):
        _recommendation(reference)
    _check_names(name, alias)


def _check_names(name: str, alias: str) -> None:
    for kind, text in (("name", name), ("alias", alias)):
        if redact(text) != text:
            raise UsageError(
                f"The {kind} has what looks like a key in it, and would be stored: {text}. Give a plain one."
            )
    if not name.strip() or re.search(r"[/:@'\"%]", name) or len(name) > 250:
        raise UsageError(
            f"Not a name for a registered model: {name}. "
            "Give letters, digits, dots and dashes, for example support-bot."
        )
    if not re.fullmatch(r"[\w-]{1,250}", alias) or alias == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise UsageError(
            f"Not an alias: {alias}. "
            f"Give letters, digits and dashes, and neither latest nor v1, for example {CANDIDATE}."
        )
    if alias in (CHAMPION, PREVIOUS):
        raise UsageError(
            f"Only `{command_text('promote')}` moves the alias {alias}. "
            f"Register as {CANDIDATE}, then gate and promote it."
        )


def has_winner(store: Store, run_id: str) -> bool:
    """Return True if a run holds a recommendation that has a winner. Raises TrackingError."""
    data = _logged_recommendation(store, run_id)
    return isinstance(data, dict) and bool(data.get("winner"))


def _chosen_run(store: Store, reference: str, accept_suspect: str | None) -> tuple[str, str | None]:
    """Return the run of a reference, and the reason for which a recommendation accepted suspect results."""
    if reference.endswith(".json"):
        return _winner(store, _recommendation(reference), reference, accept_suspect)
    match = RUN_REFERENCE.fullmatch(reference)
    run_id = match[1] if match else parent_of_sweep(store, reference)
    if run_id is None:
        raise UsageError(
            f"{reference} is neither a run id, nor a sweep of this store, nor a recommendation.json. Give one of them."
        )
    if _holds_result(run_at(store, run_id)):
        return run_id, None
    data = _logged_recommendation(store, run_id)
    if data is None:
        raise UsageError(
            f"The run {run_id} holds neither a result nor a recommendation. "
            f"Run `{command_text('recommend', run_id)}`, or give the run of a cell."
        )
    return _winner(store, data, reference, accept_suspect)


def _logged_recommendation(store: Store, run_id: str) -> Any:
    """Return the recommendation that a run holds; None if it holds none."""
    _without_progress_bars()
    with plain_errors(store.uri):
        if RECOMMENDATION not in {item.path for item in store.client.list_artifacts(run_id)}:
            return None
        with tempfile.TemporaryDirectory() as scratch:
            return reading.read_own_json(store.client.download_artifacts(run_id, RECOMMENDATION, scratch))


def _recommendation(reference: str) -> Any:
    """Return what a recommendation.json holds. Raises UsageError."""
    try:
        return reading.read_own_json(reference)
    except Unreadable as error:
        raise UsageError(
            f"Cannot read the recommendation {reference}: {error}. "
            "Give the file that `llmbench recommend --output FOLDER` wrote."
        ) from None


def _without_progress_bars() -> None:
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def run_at(store: Store, run_id: str) -> Run:
    """Return a run of the store. Raises UsageError if it has none of this id."""
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_run(run_id)
    except MlflowException:
        raise UsageError(f"The run {run_id} is not in the store {redact(store.uri)}. Check --tracking-uri.") from None


def _winner(store: Store, data: Any, reference: str, accept_suspect: str | None) -> tuple[str, str | None]:
    winner = data.get("winner") if isinstance(data, dict) else None
    if winner and not (
        isinstance(winner, dict) and {type(winner.get(key)) for key in ("sweep", "config_hash")} == {str}
    ):
        raise UsageError(
            f"The winner of {reference} has no sweep and config_hash. "
            "Give the file that `llmbench recommend --output FOLDER` wrote."
        )
    if not winner:
        raise UsageError(f"The recommendation {reference} has no winner. {_why_none(data, accept_suspect)}")
    run_id = run_of(store, winner["sweep"], winner["config_hash"])
    if run_id is None:
        raise UsageError(
            f"The winner of {reference} is not in the store {store.uri}. "
            f"Check --tracking-uri, or upload its folder first: `{command_text('upload', 'FOLDER')}`."
        )
    return run_id, data.get("accepted_suspect")


def _why_none(data: Any, accept_suspect: str | None) -> str:
    """Return what refused the results of a recommendation without a winner, and what to do."""
    given = data.get("refused") if isinstance(data, dict) else None
    refused = [one for one in given or [] if isinstance(one, dict)]
    limited = [one for one in refused if one.get("verdict") == "valid"]
    suspect = [one for one in refused if one.get("verdict") == "suspect"]
    first = next(iter(limited or suspect or refused), None)
    why = f"Refused {first.get('name')}: {first.get('why')} " if first else ""
    if suspect and not limited:
        sweeps = dict.fromkeys(str(one.get("sweep")) for one in suspect)
        command = command_text("recommend", *sweeps, accept_suspect=accept_suspect or "REASON")
        same = ", with the same limits" if data.get("limits") else ""
        return f"{why}To accept suspect results, recommend again{same}: `{command}`."
    return f"{why}Recommend again with other limits, or give the run of a cell."


def _version_of_run(store: Store, name: str, run_id: str) -> str | None:
    versions = store.client.search_model_versions(f"name = '{name}'")
    return next((str(v.version) for v in versions if v.tags.get("llmbench.run_id") == run_id), None)


def _create(store: Store, name: str, result: RunResult, deployment: Deployment) -> str:
    """Log the model with the evidence run as source, create a version of it, and return the version's number."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    client, run_id = store.client, deployment.evidence.run_id
    with contextlib.suppress(MlflowException):
        client.create_registered_model(
            name, description="Measured configurations of a language model; each version links to its evidence."
        )
    tags = version_tags(deployment)
    tags |= {
        "llmbench.configuration_digest": digest_of(deployment.config),
        "llmbench.code_digest": digest_of(serving_code(deployment.config).encode()),
    }
    params = cell_params(result.cell)
    experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(
        experiment, "deployment", source_run_id=run_id, tags=tags, params=params, model_type="llm-deployment"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save(deployment, folder, run_id, logged.model_id)
        client.log_model_artifacts(logged.model_id, str(folder))
    log_model_figures(store, run_id, logged.model_id, result, deployment.figures)
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
    source = f"models:/{logged.model_id}"
    made = client.create_model_version(
        name, source, run_id, tags, description=describe(name, result, deployment), model_id=logged.model_id
    )
    # The UI shows the versions of a logged model by this tag, which `mlflow.register_model` sets too.
    versions = json.dumps([{"name": name, "version": str(made.version)}])
    client.set_logged_model_tags(logged.model_id, {MLFLOW_MODEL_VERSIONS: versions})
    return str(made.version)


def save(deployment: Deployment, folder: Path, run_id: str | None = None, model_id: str | None = None) -> None:
    """Write the pyfunc of a deployment into `folder`, in MLflow's model format."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        warnings.catch_warnings(record=True),  # MLflow's advice on type hints and input examples is not for our users
    ):
        warnings.simplefilter("always")
        import mlflow.pyfunc
        from mlflow.models import Model

        code = Path(scratch, SERVING_CODE)
        code.write_text(serving_code(deployment.config), encoding="utf-8")
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(code),
            model_config=dict(deployment.config),
            signature=signature(int(deployment.config["max_new_tokens"])),
            mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
            pip_requirements=[f"mlflow=={mlflow.__version__}", *deployment.requirements],
        )


def serving_code(config: Mapping[str, Any] | None = None) -> str:
    """Return the text of a version's Python file: `serving_model.py`, with the statements of `recipe.py` in it.

    They replace its import, so a version loads the same way years later, with any release of this package or none.
    `config` is the measured configuration, with which the code compares the stored one.
    """
    recipe = ast.parse((PACKAGE_DIR / "backends" / "huggingface" / "recipe.py").read_text(encoding="utf-8"))
    model = ast.parse((PACKAGE_DIR / "tracking" / SERVING_CODE).read_text(encoding="utf-8"))
    body: list[ast.stmt] = []
    for statement in model.body:
        if isinstance(statement, ast.ImportFrom) and statement.level > 0:
            body += recipe.body[2:]  # without its docstring and its `from __future__`
        elif isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "MEASURED":
            body += ast.parse(f"MEASURED = json.loads({json.dumps(config)!r})").body
        else:
            body.append(statement)
    return ast.unparse(ast.Module(body, [])) + "\n"


def signature(max_new_tokens: int) -> ModelSignature:
    """Return the signature: `prompt` → `text` with its counts, and `max_new_tokens` as the parameter of a request."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    columns = {"text": "string", "prompt_tokens": "long", "output_tokens": "long", "finish": "string"}
    outputs = Schema([ColSpec(kind, name) for name, kind in columns.items()])
    return ModelSignature(
        Schema([ColSpec("string", "prompt")]),
        outputs,
        ParamSchema([ParamSpec("max_new_tokens", "long", max_new_tokens)]),
    )


def describe(name: str, result: RunResult, deployment: Deployment) -> str:
    """Return a version's description: the run's summary, the limits, and how to serve it."""
    config, evidence = deployment.config, deployment.evidence
    metrics = summarize(result)
    rows = "1 row" if config["batch_size"] == 1 else f"{config['batch_size']} rows"
    limits = (
        f"up to {config['max_prompt_tokens']} prompt tokens, {config['max_new_tokens']} output tokens, {rows} at a time"
    )
    place = "/".join(filter(None, [config["location"], config["gguf_file"]]))
    parts = [
        summary_markdown(result, metrics, evidence.verdict).rstrip(),
        *([f"Suspect, and accepted: {evidence.accepted_suspect}"] if evidence.accepted_suspect else []),
        f"Measured for {limits}. Evidence: run `{evidence.run_id}` of the sweep `{evidence.sweep}`.",
        f"Serve it: `mlflow models serve -m models:/{name}@ALIAS --env-manager local`. No weights are stored here: "
        f"they come from `{place}`, revision `{config['revision']}`.",
    ]
    return "\n\n".join(parts) + "\n"


def digest_of(content: Mapping[str, Any] | bytes) -> str:
    """Return the SHA-256 of a file's content, or of a configuration as JSON."""
    data = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def version_at(store: Store, reference: str) -> ModelVersion:
    """Return the version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names.

    Raises UsageError for a malformed or unknown reference, TrackingError if the registry cannot be read.
    """
    from mlflow.exceptions import MlflowException

    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise UsageError(
            f"Not a registered version: {reference}. Give models:/NAME@{CHAMPION} or models:/NAME/VERSION."
        )
    name, alias, number = match.groups()
    try:
        found = (
            store.client.get_model_version_by_alias(name, alias)
            if alias
            else store.client.get_model_version(name, number)
        )
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise TrackingError(f"The registry of {store.uri} cannot be read: {str(error).splitlines()[0]}") from None
        raise UsageError(
            f"There is no {reference} in the store {store.uri}. "
            f"Create a version with `{command_text('register', name=name)}`."
        ) from None
    return found


def registered_at(store: Store, reference: str) -> Registered:
    """Return the version at a reference, with its evidence run.

    Raises UsageError if it was not registered by `llmbench register`.
    """
    found = version_at(store, reference)
    run_id = found.tags.get("llmbench.run_id")
    if not run_id:
        raise UsageError(
            f"{reference} was not registered by `llmbench register`, so it has no evidence. "
            "Register a measured run under this name."
        )
    return Registered(str(found.name), str(found.version), run_id)


def stored_config(store: Store, version: Registered) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a version's `model_config` and its pinned requirements. Raises what `copy_version` raises."""
    with tempfile.TemporaryDirectory() as scratch:
        return copy_version(store, version, Path(scratch))


def copy_version(store: Store, version: Registered, folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Copy the files of a version into a folder, and return its `model_config` and its pinned requirements.

    Raises UsageError if its configuration or its code is not what was registered, TrackingError for the store.
    """
    tags = version_at(store, version.uri).tags
    _without_progress_bars()
    with plain_errors(store.uri):
        import mlflow.artifacts

        mlflow.artifacts.download_artifacts(version.uri, dst_path=str(folder), tracking_uri=store.uri)
        model = reading.read_yaml(folder / "MLmodel")
        requirements = (folder / "requirements.txt").read_text(encoding="utf-8").split()
        config = dict(model["flavors"]["python_function"]["config"])
        found = {"configuration": digest_of(config), "code": digest_of((folder / SERVING_CODE).read_bytes())}
    for name, digest in found.items():
        if tags.get(f"llmbench.{name}_digest", digest) != digest:  # earlier versions have no such tag
            raise UsageError(
                f"The {name} of {version.uri} was changed after its registration, so it is not what was measured. "
                f"Register the run {version.run_id} again, and find out who changed it."
            )
    return config, tuple(requirements)
