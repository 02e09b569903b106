"""The published comparison view: its state against a golden file, and the effect of publishing on a store.

The golden file is a state that the UI of MLflow 3.17.2 drew correctly, checked in a browser. After a change that was
checked in the same way: LLMBENCH_WRITE_GOLDEN=1 pytest tests/tracking/test_view.py
"""

import dataclasses
import http.server
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.metrics import KEYS, OUTPUT_RATE, SERIES
from mlflow_llmbench.reports.result import Row
from mlflow_llmbench.tracking import view
from mlflow_llmbench.tracking.store import Store, open_store
from tests.results import made, stored
from tests.servers import serving

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "view.json"
VARIED = ["quant", "batch_size"]
ROWS = [
    Row(Cell(quant="int8"), "ok", {OUTPUT_RATE.key(): 9.0}),
    Row(Cell(quant="bf16"), "oom"),
    Row(Cell(quant="fp16"), "ok", {OUTPUT_RATE.key(): 5.0}),
]
RUN_IDS = ["run-int8", "run-bf16", "run-fp16"]


def example() -> view.State:
    return view.comparison_view(VARIED, False, "run-fp16", "parent")


@pytest.fixture
def store(store_uri: str) -> Store:
    return open_store(store_uri, "views")


def views(store: Store) -> dict[str, dict[str, object]]:
    tags = store.client.get_experiment(store.experiment_id).tags
    return {key.removeprefix(view.TAG): json.loads(value) for key, value in tags.items() if key.startswith(view.TAG)}


def publish(
    store: Store, parent_id: str = "0123456789abcdef0123", name: str = "opt: quant"
) -> tuple[str | None, list[str]]:
    warnings: list[str] = []
    return view.publish(store, parent_id, name, VARIED, ROWS, RUN_IDS, warnings.append), warnings


def test_state_is_the_golden_one() -> None:
    if os.environ.get("LLMBENCH_WRITE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(example(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert example() == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_charts_name_metrics_of_the_vocabulary_and_sections_that_exist() -> None:
    state = example()
    sections = {section["uuid"]: section for section in state["compareRunSections"]}
    assert len(sections) == len(state["compareRunSections"])
    assert len({chart["uuid"] for chart in state["compareRunCharts"]}) == len(state["compareRunCharts"])
    named = []
    for chart in state["compareRunCharts"]:
        assert sections[chart["metricSectionId"]]["display"]
        named += [chart[key]["key"] for key in ("xaxis", "yaxis") if key in chart]
        named += [*chart.get("selectedMetrics", []), *([chart["metricKey"]] if "metricKey" in chart else [])]
    assert set(named) <= {*KEYS, *SERIES}
    prefixes = {key.split("/")[0] for key in [*KEYS, *SERIES]} - {"system"} | {"System metrics"}
    assert prefixes <= {section["name"] for section in sections.values() if not section["display"]}, (
        "the UI would open a section that is not listed"
    )


def test_device_memory_takes_the_place_of_host_memory() -> None:
    text = json.dumps(view.comparison_view(VARIED, True, None))
    assert "memory/device_gb_peak" in text
    assert "host_needed" not in text


def test_without_varied_parameters_and_parent_single_runs_are_shown_by_quantization() -> None:
    state = view.comparison_view([], False, None)
    assert state["searchFilter"] == view.SINGLE_RUNS
    assert state["selectedColumns"][0] == "params.`quant`"


def test_baseline_is_the_first_measured_run_without_quantization() -> None:
    assert view.baseline_run(ROWS, RUN_IDS) == "run-fp16"
    assert view.baseline_run(ROWS[:2], RUN_IDS[:2]) == "run-int8"
    assert view.baseline_run(ROWS[:1], [""]) is None
    assert view.baseline_run([], []) is None


def test_published_view_is_one_tag_with_the_state_and_its_link(store: Store) -> None:
    found, warnings = publish(store)
    assert found == (
        f"#/experiments/{store.experiment_id}/runs?compareRunsMode=CHART&workflowType=machine_learning"
        "&viewStateShareKey=llmbench-0123456789abcdef"
    )
    assert warnings == []
    ((view_id, envelope),) = views(store).items()
    assert view_id == "llmbench-0123456789abcdef"
    assert str(envelope["name"]).startswith("opt: quant, 20")
    assert json.loads(str(envelope["state"])) == view.comparison_view(VARIED, False, "run-fp16", "0123456789abcdef0123")


def test_runs_made_one_by_one_have_a_view_and_no_others_are_in_it(store_uri: str, tmp_path: Path) -> None:
    stored(tmp_path / "sweep", store_uri, made(), made("int8"))
    one, other = (stored(tmp_path / name, store_uri, made(name))[0] for name in ("int8", "int4"))
    store = open_store(store_uri, None)
    [state] = [json.loads(str(one["state"])) for name, one in views(store).items() if name == view.SINGLE_VIEW]
    found = store.client.search_runs([store.experiment_id], state["searchFilter"])
    assert {run.info.run_id for run in found} == {one, other}
    assert state["selectedColumns"][:3] == ["params.`model`", "params.`quant`", "params.`batch_size`"]
    assert "tags.`llmbench.recommended`" in state["selectedColumns"]


def test_publishing_twice_leaves_one_tag(store: Store) -> None:
    publish(store)
    first = views(store)
    assert publish(store, name="renamed")[0]
    (envelope,) = views(store).values()
    assert str(envelope["name"]).startswith("renamed")
    assert envelope["createdAt"] == next(iter(first.values()))["createdAt"]


def test_oldest_views_make_room_and_views_of_others_stay(store: Store) -> None:
    store.client.set_experiment_tag(store.experiment_id, view.TAG + "mine", "{}")
    store.client.set_experiment_tag(store.experiment_id, view.TAG + view.OURS + "broken", "not JSON")
    for number in range(view.MOST_VIEWS):
        envelope = json.dumps({"name": "x", "createdAt": number, "updatedAt": 1 + number, "state": "{}"})
        store.client.set_experiment_tag(store.experiment_id, f"{view.TAG}{view.OURS}{number}", envelope)
    link, warnings = publish(store)
    assert link and not warnings
    left = {
        key.removeprefix(view.TAG)
        for key in store.client.get_experiment(store.experiment_id).tags
        if key.startswith(view.TAG)
    }
    assert left == {
        "mine",
        "llmbench-0123456789abcdef",
        *(f"llmbench-{number}" for number in range(1, view.MOST_VIEWS)),
    }


def test_store_that_refuses_gives_a_warning_and_no_link(store: Store) -> None:
    gone = dataclasses.replace(store, experiment_id="999")
    link, warnings = publish(gone)
    assert link is None
    assert len(warnings) == 1
    assert warnings[0].startswith("The comparison view was not published: ")
    assert "999" in warnings[0]
    assert views(store) == {}


def test_rows_without_their_run_give_a_warning_and_no_link(store: Store) -> None:
    warnings: list[str] = []
    assert view.publish(store, "parent", "x", VARIED, ROWS, ["one"], warnings.append) is None
    assert warnings


@pytest.fixture
def server_of(request: pytest.FixtureRequest) -> Iterator[str]:
    """A loopback server that answers /version with the test's parameter, like MLflow's; 404 if it is empty."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if request.param else 404)
            self.end_headers()
            self.wfile.write(request.param.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Answer) as address:
        yield address


@pytest.mark.parametrize(
    ("server_of", "published"),
    [("3.14.1", False), ("2.22.0", False), ("3.15.0", True), ("4.0.0", True), ("", True)],
    indirect=["server_of"],
)
def test_server_that_says_it_is_too_old_is_left_alone(store: Store, server_of: str, published: bool) -> None:
    link, warnings = publish(dataclasses.replace(store, uri=server_of))
    assert bool(link) is published
    assert bool(views(store)) is published
    assert any("has no saved views; they need 3.15 or newer" in text for text in warnings) is not published
