"""Log results as MLflow runs: params, metrics, tags, artifacts.

Everything is sent after the measurement, with the times at which it happened. An upload can be repeated: values that
are already there are not changed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..analysis.layout import weights_of, weights_text
from ..analysis.summary import Point, gpu_of, series, summarize
from ..analysis.verdict import judge
from ..config.choices import WORKLOADS
from ..config.spec import cell_fields
from ..records.cell import Cell, as_text
from ..records.errors import TrackingError
from ..records.metrics import SCHEMA
from ..records.quantizations import COLOURS, quantizing_packages
from ..records.redaction import redact, redact_all
from ..records.results import RunResult, Verdict
from ..records.verdicts import OUTCOMES
from ..reports.result import summary_markdown
from .explanations import plain_errors
from .run_context import fingerprint_tags
from .search import RUN_REFERENCE, require_run
from .store import UPLOADED_TAG, Store

if TYPE_CHECKING:
    from mlflow.entities import Metric

PARENT_TAG = "mlflow.parentRunId"
TABLES_TAG = "mlflow.loggedArtifacts"  # MLflow's own, which `log_table` sets

DARKER, MOST_DOUBLINGS = 0.84, 8
"""Share of brightness that a doubling of rows leaves, and after how many doublings it gets no darker."""

GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")
"""Run names that MLflow generates. Only these are replaced; a name that a person gave is kept."""


def refuse_other_params(store: Store, params: Mapping[str, str]) -> None:
    """Raise TrackingError if the given run has one of these params with another value. Call it before measuring."""
    if store.given_run_id:
        _agreed_params(store, store.given_run_id, params, "was asked for. Use a new run, or unset MLFLOW_RUN_ID.")


def _agreed_params(store: Store, run_id: str, params: Mapping[str, str], otherwise: str) -> dict[str, str]:
    """Return a run's params. Raises TrackingError, ending in `otherwise`, if one differs by more than shell quotes."""
    there: dict[str, str] = store.client.get_run(run_id).data.params
    for key, value in redact_all(params).items():
        if key in there and redact(there[key]) != value and redact(_unquoted(there[key])) != value:
            raise TrackingError(f"The run {run_id} has {key}={there[key]} already, and {value} {otherwise}")
    return there


def begin_run(
    store: Store, name: str, identity: Mapping[str, str], parent_id: str | None = None, started_ms: int | None = None
) -> str:
    """Return the id of a RUNNING run: the one that MLFLOW_RUN_ID names (top level only), or a new one.

    `identity`: tags without their prefix, by which the run is found again: `sweep`, and for a cell `cell` and
    `config_hash`. Raises TrackingError.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE, MLFLOW_USER

    with plain_errors(None):
        tags = {"llmbench.schema": str(SCHEMA)} | {f"llmbench.{key}": value for key, value in identity.items()}
        if parent_id is None and store.given_run_id:
            run = store.client.get_run(store.given_run_id)
            if GENERATED_NAME.fullmatch(run.info.run_name or ""):
                store.client.update_run(run.info.run_id, name=name)
            log_tags(store, run.info.run_id, tags)
            return str(run.info.run_id)
        tags |= {MLFLOW_RUN_NAME: name, MLFLOW_SOURCE_NAME: "llmbench", MLFLOW_SOURCE_TYPE: "LOCAL"}
        with contextlib.suppress(Exception):
            import getpass

            tags[MLFLOW_USER] = getpass.getuser()
        if parent_id:
            tags[PARENT_TAG] = parent_id
        return str(store.client.create_run(store.experiment_id, start_time=started_ms, tags=tags).info.run_id)


def end_run(store: Store, run_id: str, outcome: str, ended_ms: int | None = None) -> None:
    """End a run with the status that belongs to its outcome, at `ended_ms` (Unix time in milliseconds) or now.

    The run that MLFLOW_RUN_ID names ends now: somebody else has begun it, perhaps after what was measured before.
    """
    now = int(time.time() * 1000)
    with _unsaid():
        store.client.set_terminated(
            run_id, OUTCOMES[outcome], now if ended_ms is None or run_id == store.given_run_id else ended_ms
        )


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """Keep MLflow from asking a server for a run that has ended, and printing its address on standard output."""
    name = "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def log_values(store: Store, run_id: str, params: Mapping[str, str], points: Sequence[Point]) -> None:
    """Log the params that a run does not have yet, and points, in as few requests as a server accepts.

    `mlflow run` has already logged the MLproject's parameters, shell-quoted. Raises TrackingError if one has another
    value after unquoting, because then the run belongs to another configuration.
    """
    from mlflow.entities import Param

    there = _agreed_params(store, run_id, params, "was measured. Use a new run.")
    missing = [Param(key, value) for key, value in redact_all(params).items() if key not in there]
    store.client.log_batch(run_id, _as_metrics(points), missing)


def _as_metrics(points: Sequence[Point]) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(p.key, p.value, p.wall_ms, p.step) for p in points]


def _unquoted(text: str) -> str:
    try:
        parts = shlex.split(text)
    except ValueError:
        return text
    return parts[0] if len(parts) == 1 else text


def cell_params(cell: Cell) -> dict[str, str]:
    """Return the params of a cell as text."""
    return {name: as_text(name, getattr(cell, name)) for name in cell_fields(cell)}


def upload_cell(store: Store, run_id: str, result: RunResult, artifacts: Path, asked: Mapping[str, str]) -> None:
    """Upload everything of one cell: params, metrics, series, artifacts, and last the tags with outcome and verdict.

    So a run without all its figures never looks like a result. `asked`: params as `mlflow run` has logged them (`INT4`,
    `08`). Can be repeated: existing params are not changed, and a point with the same key, step, time and value is
    stored once.
    """
    metrics = summarize(result)
    verdict = judge(result, metrics)
    note = _linked(store, result) + summary_markdown(result, metrics, None if result.failure else verdict)
    tables = _log_cell(store, run_id, result, [*_points(result, metrics), *series(result)], artifacts, asked)
    tags = cell_tags(result, verdict) | tables | {"mlflow.note.content": note, UPLOADED_TAG: "true"}
    log_tags(store, run_id, tags)


def upload_figures(store: Store, run_id: str, result: RunResult, artifacts: Path, asked: Mapping[str, str]) -> None:
    """Upload what `upload_cell` does, but no series and neither outcome nor verdict: more of the result is to come."""
    metrics = summarize(result)
    tables = _log_cell(store, run_id, result, _points(result, metrics), artifacts, asked)
    note = summary_markdown(result, metrics, judge(result, metrics))
    log_tags(store, run_id, tables | {"mlflow.note.content": note})


def _points(result: RunResult, metrics: Mapping[str, float]) -> list[Point]:
    return [Point(key, 0, value, result.ended_ms) for key, value in metrics.items()]


def _log_cell(
    store: Store,
    run_id: str,
    result: RunResult,
    points: Sequence[Point],
    artifacts: Path,
    asked: Mapping[str, str],
) -> dict[str, str]:
    """Log params, points, workload and artifacts of a cell. Returns the tag of its tables."""
    facts = {key: str(value) for key, value in (result.load.facts if result.load else {}).items()}
    log_values(store, run_id, {**cell_params(result.cell), **asked, **facts}, points)
    _log_workload(store, run_id, result)
    return _log_artifacts(store, run_id, artifacts)


def _linked(store: Store, result: RunResult) -> str:
    """Say where and when a reused result was measured; empty for one that was measured in this run."""
    source = result.linked or result.resumed
    if not source:
        return ""
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(result.started_ms / 1000))
    where = (
        f"run [{source}](#/experiments/{store.experiment_id}/runs/{source})"
        if RUN_REFERENCE.fullmatch(source)
        else source
    )
    if not result.linked:
        return f"Its first processes were measured in {where}. Measure all again with `rerun=true`.\n\n"
    return (
        f"Measured on {when} in {where}, with the same configuration, environment and workload. "
        "Measure again with `rerun=true`.\n\n"
    )


def cell_tags(result: RunResult, verdict: Verdict) -> dict[str, str]:
    """Return the tags of one cell's run."""
    from .. import __version__

    tags = fingerprint_tags(result.environment, gpu_of(result)) | {
        "schema": str(SCHEMA),
        "version": __version__,
        "quant_package": _quant_package(result),
        "sweep": result.sweep,
        "config_hash": result.hashes.config,
        "env_hash": result.hashes.env,
        "hardware_hash": result.hashes.hardware,
        "software_hash": result.hashes.software,
        "workload_hash": result.hashes.workload,
        "scenario": result.cell.scenario,
        "outcome": result.outcome,
        "verdict": verdict.word,
        "verdict_reasons": ",".join(r.code for r in verdict.reasons),
        "placement": weights_text(weights_of(result)),
        "linked_run": result.linked,
        "failure": f"{result.failure.stage}: {result.failure.message}" if result.failure else None,
    }
    found = {f"llmbench.{key}": redact(str(value))[:5000] for key, value in tags.items() if value}
    return found | {"mlflow.runColor": run_color(result.cell)}


def run_color(cell: Cell) -> str:
    """Return the colour of a run in charts: that of its quantization, darker with each doubling of rows or users."""
    base = COLOURS.get(cell.quant, COLOURS["none"])
    load = cell.concurrency if cell.scenario == "online" else cell.batch_size
    left = DARKER ** min(math.log2(load), MOST_DOUBLINGS)
    return "#" + "".join(f"{round(int(base[at : at + 2], 16) * left):02x}" for at in (1, 3, 5))


def _quant_package(result: RunResult) -> str:
    """Return the package that quantized the model, with its version: `bitsandbytes 0.50.2`; empty without one."""
    installed = result.environment.get("packages") or {}
    method = result.load.facts.get("quant.method") if result.load else None
    names = quantizing_packages(result.cell.quant, result.cell.backend, method)
    return ", ".join(f"{name} {installed[name]}" for name in names if name in installed)


def log_tags(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags by their full names, with secrets redacted."""
    from mlflow.entities import RunTag

    store.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in redact_all(tags).items()])


def log_figures(store: Store, run_id: str, figures: Mapping[str, float], at_ms: int) -> None:
    """Log summary metrics that compare a run with other runs. Repeating it changes nothing."""
    store.client.log_batch(run_id, _as_metrics([Point(key, 0, value, at_ms) for key, value in figures.items()]))


def _log_workload(store: Store, run_id: str, result: RunResult) -> None:
    """Log the prompts as the run's dataset, with `workload_hash` as digest.

    `dataset.digest = '…'` finds all runs with the same prompts. The texts themselves are not uploaded. Repeating it
    changes nothing: MLflow identifies a dataset by name and digest.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    cell = result.cell
    own_file = cell.workload not in WORKLOADS
    source = (
        {"uri": redact(cell.workload)}
        if own_file
        else {"tags": {"mlflow.source.name": f"mlflow_llmbench/workloads: {cell.workload}"}}
    )
    lengths = {name: as_text(name, getattr(cell, name)) for name in ("prompt_tokens", "output_tokens")}
    name, digest = _workload_id(result)
    kind = "local" if own_file else "code"
    prompts = Dataset(name, digest, kind, json.dumps(source), profile=json.dumps(lengths))
    store.client.log_inputs(run_id, [DatasetInput(prompts, [InputTag("mlflow.data.context", "benchmark")])])


def _workload_id(result: RunResult) -> tuple[str, str]:
    """Return name and digest of the dataset that a result's prompts are."""
    workload = result.cell.workload
    name = workload if workload in WORKLOADS else Path(workload).stem
    return redact(name), result.hashes.workload


def log_model_figures(
    store: Store, run_id: str, model_id: str, result: RunResult, figures: Mapping[str, float]
) -> None:
    """Log figures of a run as those of a logged model too, with the run's prompts as their dataset."""
    from mlflow.entities import Metric

    name, digest = _workload_id(result)
    points = _points(result, figures)
    values = [Metric(p.key, p.value, p.wall_ms, p.step, model_id, name, digest, run_id) for p in points]
    store.client.log_batch(run_id, values)


def log_dataset(
    store: Store, run_id: str, name: str, digest: str, uri: str, context: str, profile: Mapping[str, object]
) -> None:
    """Log data of a run other than its workload, such as training data.

    The texts themselves are not uploaded. Repeating it changes nothing.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = Dataset(redact(name), digest, "local", json.dumps({"uri": redact(uri)}), profile=json.dumps(profile))
    store.client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])


def upload_parent(
    store: Store,
    run_id: str,
    params: Mapping[str, str],
    note: str,
    artifacts: Path,
    figures: Sequence[Point],
    tags: Mapping[str, str],
) -> None:
    """Upload the parent run of a sweep: its params, the comparison as description and artifacts, figures and tags.

    `tags` are named without the prefix `llmbench.`.
    """
    log_values(store, run_id, params, figures)
    tables = _log_artifacts(store, run_id, artifacts) if artifacts.is_dir() else {}
    named = {f"llmbench.{name}": value for name, value in tags.items()}
    ours = {"mlflow.note.content": note, "llmbench.schema": str(SCHEMA), UPLOADED_TAG: "true"}
    log_tags(store, run_id, tables | named | ours)


def _log_artifacts(store: Store, run_id: str, folder: Path) -> dict[str, str]:
    """Log all files of a folder. Returns the tag that lists its tables for the UI's comparison, `texts.json` first."""
    store.client.log_artifacts(run_id, str(folder))
    tables = sorted(folder.glob("tables/*.json"), key=lambda file: (file.name != "texts.json", file.name))
    named = [{"path": file.relative_to(folder).as_posix(), "type": "table"} for file in tables]
    return {TABLES_TAG: json.dumps(named)} if named else {}


def log_folder(store: Store, run_id: str, folder: Path, under: str) -> None:
    """Log a folder's files as artifacts of a run, below `under`. Raises TrackingError if the run does not exist."""
    require_run(store, run_id)
    with plain_errors(store.uri):
        store.client.log_artifacts(run_id, str(folder), under)


def set_tags(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags on a run, named without the prefix `llmbench.`. Raises TrackingError if the run does not exist."""
    with plain_errors(store.uri):
        log_tags(store, run_id, {f"llmbench.{name}": redact(value)[:5000] for name, value in tags.items()})
