"""Publish a saved view of the MLflow UI that compares the runs of a sweep. Experimental, best effort.

MLflow keeps a saved view of its runs page as one experiment tag, `mlflow.sharedViewState.<id>`: JSON with a name, two
times and the state of the page. The format is private to the UI (seen in 3.17.2 and 3.18.0; saved views came with
3.15), so only this module knows it. If a view cannot be published, the user gets a warning and all results are kept.

Three facts about the UI determine the state:

- The children of a sweep are separate rows only if the runs are sorted by a metric or filtered.
- The UI adds a bar chart for every metric without a chart here, to the section of its prefix. So those sections are
  listed, and closed.
- An address with a filter of its own opens without the view. So the filter is in the state.
"""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..records.errors import first_line
from ..records.metric import Panel
from ..records.metrics import ITL_BY_TOKEN, ITL_PERCENTILES, OUTPUT_RATE, PEAK_MEMORY, SECTIONS, SERIES, TTFT, by_name
from .reach import without_user

if TYPE_CHECKING:
    from ..reports.result import Row
    from .store import Store


TAG = "mlflow.sharedViewState."
OURS = "llmbench-"
"""Prefix of the ids of views that we publish."""

OLDEST_MLFLOW = (3, 15)
MOST_VIEWS = 30
"""Most views of ours in an experiment; the oldest are deleted. With 40 views in all, the UI refuses to save more."""

REFERENCES = ("none", "fp32", "bf16", "fp16")
"""Values of `quant` without quantization; the baseline run is chosen among them."""

SINGLE_VIEW = f"{OURS}single-runs"
SINGLE_RUNS = "tags.`mlflow.parentRunId` IS NULL AND tags.`llmbench.config_hash` LIKE '%'"
"""Id of the view of runs that were made one by one, and the filter that finds them."""

SINGLE_SETTINGS = ("model", "quant", "batch_size", "prompt_tokens", "output_tokens")
"""Parameters in which such runs are expected to differ."""

SYSTEM = "system"
"""Prefix of the metrics that the UI shows as its System metrics."""

State = dict[str, Any]


def comparison_view(
    varied: Sequence[str], has_device: bool, baseline_run_id: str | None, parent_id: str | None = None
) -> State:
    """Return the state of the runs page for a sweep over `varied`: charts in sections, columns, order and filter.

    Shows the cells of `parent_id`, or without it the runs that belong to no sweep, sorted by throughput, best first.
    """
    device_peak, host_peak = PEAK_MEMORY
    memory = device_peak if has_device else host_peak
    names = list(varied) or ["quant"]
    # Without a device, no run has the device's memory: the host's stands in for it.
    shown = [next(e.key for e in entries if has_device or e.key != device_peak) for entries in by_name(Panel).values()]
    sections = [
        _section("Trade-offs", 2, 380),
        _section("Headline", 2, 300),
        _section("Settings and results", 1, 340),
        _section("Inter-token latency", 2, 340),
        _section("Change from the baseline", 1, 560),
    ]
    charts = _charts(shown, names, memory, baseline_run_id)
    closed = dict.fromkeys([*SECTIONS, *(one.section for one in SERIES.values() if one.section != SYSTEM)])
    sections += [_section(name, display=False) for name in [*closed, "Model metrics", "System metrics"]]
    for number, section in enumerate(sections):
        section["uuid"] = f"s{number}"
    columns = [
        *(f"params.`{name}`" for name in names),
        "tags.`llmbench.verdict`",
        "tags.`llmbench.recommended`",
        *(f"metrics.`{key}`" for key in shown),
        "tags.`llmbench.outcome`",
    ]
    return {
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": {column: _width(column) for column in columns},
        "runsHiddenMode": "SHOW_ALL",
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent_id}'" if parent_id else SINGLE_RUNS,
        "orderByKey": f"metrics.`{OUTPUT_RATE.key()}`",
        "orderByAsc": False,
    }


def _width(column: str) -> int:
    """Return the width of a column in pixels: that of its heading, or of the names of models."""
    return 160 if column == "params.`model`" else min(140, max(70, 7 * len(column) - 40))


def _charts(shown: Sequence[str], names: Sequence[str], memory: str, baseline_run_id: str | None) -> list[State]:
    """Return the charts of the view, each in its section: `shown` are metric keys, `names` the varied parameters."""
    rate, first, after = OUTPUT_RATE.key(), TTFT.key("p50"), 2 + len(shown)
    return [
        _chart(0, 0, "SCATTER", xaxis=_axis(first), yaxis=_axis(rate)),
        _chart(1, 0, "SCATTER", xaxis=_axis(memory), yaxis=_axis(rate)),
        *(_chart(2 + i, 1, "BAR", metricKey=key) for i, key in enumerate(shown)),
        _chart(after, 2, "PARALLEL", selectedParams=names, selectedMetrics=shown[::-1], showAllRuns=False),
        _line(after + 1, 3, ITL_BY_TOKEN.key),
        _line(after + 2, 3, ITL_PERCENTILES.key),
        _chart(
            after + 3,
            4,
            "DIFFERENCE",
            chartName="Change from the baseline",
            compareGroups=["Model metrics", "Parameters"],
            showChangeFromBaseline=True,
            showDifferencesOnly=True,
            baselineColumnUuid=baseline_run_id or "",
        ),
    ]


def _section(name: str, columns: int = 3, height: int = 360, display: bool = True) -> State:
    layout = {"columns": columns, "cardHeight": height} if display else {}
    return {
        "uuid": "",
        "name": name,
        "display": display,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
        **layout,
    }


def _chart(number: int, section: int, kind: str, **settings: Any) -> State:
    common = {"uuid": f"chart-{number}", "type": kind, "runsCountToCompare": 100, "metricSectionId": f"s{section}"}
    return {**common, "deleted": False, "isGenerated": False, **settings}


def _axis(key: str) -> State:
    return {"key": key, "type": "METRIC"}


def _line(number: int, section: int, key: str) -> State:
    return _chart(
        number,
        section,
        "LINE",
        metricKey=key,
        selectedMetricKeys=[key],
        xAxisKey="step",
        selectedXAxisMetricKey="",
        useGlobalXaxisKey=False,
        useGlobalLineSmoothing=False,
        lineSmoothness=0,
        scaleType="linear",
        xAxisScaleType="linear",
        ignoreOutliers=False,
    )


def publish(
    store: Store,
    parent_id: str,
    name: str,
    varied: Sequence[str],
    rows: Sequence[Row],
    run_ids: Sequence[str],
    warn: Callable[[str], None],
) -> str | None:
    """Publish the view of a sweep; publishing it again replaces it.

    `run_ids`: the run of each of `rows`. Returns the link to append to the UI's address, or None after calling `warn`.
    Never raises: the view is a convenience, and the runs are complete without it.
    """

    def state() -> State:
        has_device = any(PEAK_MEMORY[0] in row.metrics for row in rows)
        return comparison_view(varied, has_device, baseline_run(rows, run_ids), parent_id)

    return _publish(store, f"{OURS}{parent_id[:16]}", f"{name}, {time.strftime('%Y-%m-%d %H:%M')}", state, warn)


def publish_single_runs(store: Store, has_device: bool) -> str | None:
    """Publish the view of the experiment's runs that were made one by one. Returns its link, None if that failed."""
    return _publish(
        store,
        SINGLE_VIEW,
        "Single runs",
        lambda: comparison_view(SINGLE_SETTINGS, has_device, None),
        lambda text: None,
    )


def _publish(
    store: Store, view_id: str, name: str, state: Callable[[], State], warn: Callable[[str], None]
) -> str | None:
    try:
        _refuse_old(store.uri)
        now = int(time.time() * 1000)
        there = _published(store)
        created = there.get(view_id, {}).get("createdAt", now)
        envelope = {"name": name, "createdAt": created, "updatedAt": now, "state": _text(state())}
        store.client.set_experiment_tag(store.experiment_id, TAG + view_id, _text(envelope))
        oldest_first = sorted((one for one in there if one != view_id), key=lambda one: there[one].get("updatedAt", 0))
        for old in oldest_first[: max(0, len(oldest_first) + 1 - MOST_VIEWS)]:
            store.client.delete_experiment_tag(store.experiment_id, TAG + old)
    except Exception as error:
        warn(
            f"The comparison view was not published: {first_line(error)}. Sort the runs by any metric to compare them."
        )
        return None
    return link(store.experiment_id, view_id)


def link(experiment_id: str, view_id: str) -> str:
    """Return the link to a published view, to append to the UI's address.

    A filter or order in the link would disable the view.
    """
    return (
        f"#/experiments/{experiment_id}/runs"
        f"?compareRunsMode=CHART&workflowType=machine_learning&viewStateShareKey={view_id}"
    )


def baseline_run(rows: Sequence[Row], run_ids: Sequence[str]) -> str | None:
    """Return the baseline's run id: the first measured run without quantization, else the first measured run."""
    measured = [
        (row.cell.quant, run_id) for row, run_id in zip(rows, run_ids, strict=True) if row.outcome == "ok" and run_id
    ]
    return next((run_id for quant, run_id in measured if quant in REFERENCES), measured[0][1] if measured else None)


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _published(store: Store) -> dict[str, Mapping[str, Any]]:
    """Return our published views in the experiment, by id."""
    found: dict[str, Mapping[str, Any]] = {}
    for key, value in store.client.get_experiment(store.experiment_id).tags.items():
        if key.startswith(TAG + OURS):
            try:
                envelope = json.loads(value)
            except ValueError:
                envelope = {}
            found[key.removeprefix(TAG)] = envelope if isinstance(envelope, dict) else {}
    return found


def _refuse_old(uri: str) -> None:
    """Raise RuntimeError if the UI is known to be too old for the view. A server of unknown version counts as new."""
    text = _server_version(uri) if uri.startswith(("http://", "https://")) else _installed_version()
    found = re.match(r"(\d+)\.(\d+)", text)
    if found and (int(found[1]), int(found[2])) < OLDEST_MLFLOW:
        raise RuntimeError(f"MLflow {text} has no saved views; they need {'.'.join(map(str, OLDEST_MLFLOW))} or newer")


def _installed_version() -> str:
    import mlflow

    return str(mlflow.__version__)


def _server_version(uri: str) -> str:
    try:
        with urllib.request.urlopen(f"{without_user(uri).rstrip('/')}/version", timeout=5) as answer:
            return bytes(answer.read(32)).decode("ascii", "replace")
    except (OSError, ValueError):
        return ""
