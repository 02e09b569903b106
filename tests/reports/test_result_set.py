"""Results as a notebook and a script read them: a short repr, a table in HTML, a data frame, the best cell."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench import load_results
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MeasurementError, UsageError
from mlflow_llmbench.records.metrics import KEYS
from mlflow_llmbench.records.results import Reason, Verdict
from mlflow_llmbench.reports.result import Row, row_of
from mlflow_llmbench.reports.sweep import best_figures
from mlflow_llmbench.reports.sweep_result import SweepResult

from ..results import made, write_sweep

RATE, TTFT, PEAK = "throughput/output_tokens_per_s", "latency/ttft_ms_p50", "memory/host_needed_gb_peak"


def row(quant: str, rate: float, word: str = "valid", model: str = "opt-125m", memory: float = 2.0) -> Row:
    reasons = (Reason("contended", "Others took <b>time</b>."),) if word == "suspect" else ()
    return Row(
        Cell(model=model, quant=quant), "ok", {RATE: rate, TTFT: 1000 / rate, PEAK: memory}, Verdict(word, reasons)
    )


def result(*rows: Row, **given: Any) -> SweepResult:
    ids = tuple(f"{number:032x}" for number in range(len(rows)))
    ui, page = "mlflow ui --backend-store-uri sqlite:///mlflow.db", "#/experiments/1/runs/2"
    found = SweepResult(
        rows, ("quant",), "ok", Path("llmbench-results/s"), ids, "p", "sqlite:///mlflow.db", "1", ui, page
    )
    return dataclasses.replace(found, **given)


THREE = result(row("bf16", 20), row("int8", 900, "invalid"), row("int4", 40, "suspect", memory=1.0))


class Texts(HTMLParser):
    """Texts and elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.elements: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_repr_says_what_was_measured_and_is_best_in_a_line() -> None:
    assert repr(THREE) == (
        "<SweepResult in llmbench-results/s: 3 of 3 cells measured, 1 invalid; fastest: int4 (suspect), 40.0 tokens/s; "
        "first token soonest: int4 (suspect), 25.0 ms; least memory: int4 (suspect), 1.00 GB.>"
    )
    assert repr(THREE.best()) == "<Row opt-125m int4 b1 128+128: 40.0 tokens/s · TTFT 25.0 ms · 1.00 GB · suspect>"
    assert repr(made(quant="int4", batch=4)) == "<RunResult fake:x int4 b4: ok, 5 repetitions, sweep s>"


def test_a_notebook_shows_the_table_with_its_best_cells_and_where_the_results_are() -> None:
    page = Texts(THREE._repr_html_())
    assert page.elements.count("tr") == 4 and {"script", "style", "b"} & {*page.elements} == {"b"}
    assert {"int4", "suspect", "900", "invalid"} <= {*page.texts}
    assert "contended: Others took <b>time</b>." in page.texts
    assert "Results: llmbench-results/s" in page.texts
    assert "font-weight: bold" in THREE._repr_html_()
    assert "href" not in THREE._repr_html_()
    served = result(row("bf16", 20), ui="http://mlflow:5000")._repr_html_()
    assert '<a href="http://mlflow:5000/#/experiments/1/runs/2">' in served


def test_a_name_cannot_add_an_element_to_a_notebook() -> None:
    hostile = result(
        row("bf16", 20, model="<img src=x onerror=alert(1)>"), row("bf16", 20, model="b"), varied=("model",)
    )
    assert "img" not in Texts(hostile._repr_html_()).elements
    assert "<img src=x onerror=alert(1)>" in "".join(Texts(hostile._repr_html_()).texts)


@pytest.mark.parametrize(
    ("of", "best"), [("throughput", "int4"), ("memory", "int4"), ("ttft", "int4"), (RATE, "int4"), (TTFT, "int4")]
)
def test_the_best_is_never_an_invalid_result(of: str, best: str) -> None:
    assert THREE.best(of).cell.quant == best


def test_the_best_of_what_is_unknown_or_was_not_measured_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"No cell can be the best in troughput\. Did you mean throughput\? Known: "):
        THREE.best("troughput")
    neither = next(key for key, metric in KEYS.items() if not metric.better)
    with pytest.raises(UsageError, match=f"No cell can be the best in {neither}"):
        THREE.best(neither)
    with pytest.raises(MeasurementError, match=r"for itl that can be trusted: not measured \(2 of 3 cells\), invalid "):
        THREE.best("itl")
    failed = Row(Cell(), "oom")
    with pytest.raises(MeasurementError, match=r"throughput that can be trusted: invalid \(1 of 2 cells\), oom \(1 of"):
        result(row("bf16", 1, "invalid"), failed).best()
    with pytest.raises(MeasurementError, match="there are no cells"):
        result().best()


def test_a_reason_withholds_only_the_metrics_that_it_spoils() -> None:
    """Tokens that came in bursts have wrong gaps, but their throughput and the memory are right."""
    itl, tpot = "latency/itl_ms_p50", "latency/tpot_ms_p50"
    figures = {RATE: 20.0, TTFT: 9.0, PEAK: 2.0, itl: 0.1, tpot: 5.0}

    def suspect_for(code: str) -> SweepResult:
        verdict = Verdict("suspect", (Reason("contended", "Others."), Reason(code, "Bursts.")))
        return result(*(Row(Cell(quant=quant), "ok", figures, verdict) for quant in ("bf16", "int4")))

    bursts = suspect_for("collapsed_gaps")
    for of in ("throughput", "memory", "ttft", "tpot"):
        assert bursts.best(of) == bursts.rows[0]
    with pytest.raises(MeasurementError) as error:
        bursts.best("itl")
    assert str(error.value) == (
        "No cell has a figure for itl that can be trusted: collapsed_gaps (2 of 2 cells). "
        "The verdict of a row says what to try."
    )
    at_once = suspect_for("chunked_stream")
    assert at_once.best("throughput") == at_once.rows[0]
    for of in ("itl", "tpot"):
        with pytest.raises(MeasurementError, match=r"chunked_stream \(2 of 2 cells\)"):
            at_once.best(of)
    names = {"best/output_tokens_per_s", "best/ttft_ms_p50", "best/host_needed_gb_peak"}
    assert best_figures(bursts.rows, ["quant"])[0].keys() == names


def test_a_data_frame_has_parameters_verdicts_and_metrics() -> None:
    frame = THREE.to_pandas()
    assert list(frame["quant"]) == ["bf16", "int8", "int4"] and list(frame["batch_size"]) == [1, 1, 1]
    assert list(frame["verdict"]) == ["valid", "invalid", "suspect"]
    assert list(frame["verdict_reasons"])[2] == "contended"
    assert list(frame[RATE]) == [20, 900, 40] and list(frame["run_id"]) == list(THREE.run_ids)
    assert "int8_threshold" in frame and "mmap" not in frame
    assert frame["int8_threshold"].isna().tolist() == [True, False, True]
    assert list(result().to_pandas()) == []


def test_loaded_results_are_a_list_with_the_same(tmp_path: Path) -> None:
    loaded = load_results(write_sweep(tmp_path / "s", [made(quant="int8"), made(quant="int4", step=5)]))
    assert isinstance(loaded, list) and loaded.varied == ["quant"]
    by_name = {one.cell.quant: one for one in loaded}
    assert loaded.best("throughput") == row_of(by_name["int4"])
    assert sorted(loaded.to_pandas()["quant"]) == ["int4", "int8"]
    assert "int4" in Texts(loaded._repr_html_()).texts
