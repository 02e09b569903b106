"""A sweep's report: best cells, memory limits, the command to repeat it; and the page as a self-contained file."""

from __future__ import annotations

import base64
import dataclasses
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError
from mlflow import MlflowClient

from mlflow_llmbench import run
from mlflow_llmbench.analysis.memory_frontier import frontiers
from mlflow_llmbench.cli.main import parse as parse_call
from mlflow_llmbench.config.cells import LOADED, expand_cells, sweep_name
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure.events import StageMemory
from mlflow_llmbench.measure.outcome import CellSpan, GroupOutcome, timeline_of
from mlflow_llmbench.records.cell import PARAMETERS, Cell
from mlflow_llmbench.records.metrics import ITL
from mlflow_llmbench.records.results import Failure, MemorySample, Reason, Repetition, RequestRecord, RunResult, Verdict
from mlflow_llmbench.reports import artifacts, html, sweep
from mlflow_llmbench.reports.result import Row, explanations, row_of
from mlflow_llmbench.reports.sweep import Overview, Subject, description, headline, leaders
from mlflow_llmbench.sweeps.upload import upload

from ..analysis.test_comparison import MACHINE, MS, result
from ..work import calls

RATE, TTFT, PEAK = "throughput/output_tokens_per_s", "latency/ttft_ms_p50", "memory/host_needed_gb_peak"
VARIED = ["quant", "batch_size"]


def row(quant: str, batch: int, rate: float, verdict: str = "valid", half: float = 0.0, **given: Any) -> Row:
    metrics = {
        RATE: rate,
        f"{RATE}_ci_low": rate - half,
        f"{RATE}_ci_high": rate + half,
        TTFT: 1000 / rate,
        PEAK: 2.0,
        **given.pop("metrics", {}),
    }
    reasons = (Reason("contended", "Others took time."),) if verdict == "suspect" else ()
    return Row(Cell(quant=quant, batch_size=batch), "ok", metrics, Verdict(verdict, reasons), **given)


def failed(quant: str, batch: int, outcome: str = "oom", **given: Any) -> Row:
    return Row(Cell(quant=quant, batch_size=batch), outcome, message=f"{outcome} it was.", **given)


def subject(**parameters: object) -> Subject:
    spec = parse(parameters)
    return Subject(spec, sweep_name(spec), "20261121T104037Z-b3d125")


def told(rows: list[Row], **given: str) -> Overview:
    about = dataclasses.replace(subject(quant="bf16,int8,int4", batch_size="1,4"), **given)
    return sweep.overview([(one, f"{number:032x}") for number, one in enumerate(rows)], about)


def test_the_headline_names_the_best() -> None:
    rows = [
        row("bf16", 1, 20, metrics={PEAK: 2.6}),
        row("int8", 4, 40),
        row("int4", 4, 61.2, metrics={PEAK: 1.3}),
        failed("bf16", 4),
    ]
    assert headline(rows, VARIED) == (
        "3 of 4 cells measured, 1 oom; fastest: int4 b4, 61.2 tokens/s; first token soonest: int4 b4, 16.3 ms; "
        "least memory: int4 b4, 1.30 GB."
    )


def test_the_run_of_a_sweep_has_the_best_of_its_cells() -> None:
    rows = [
        row("bf16", 1, 20, metrics={ITL.key("p50"): 50.0}),
        row("int8", 4, 40, "suspect", metrics={ITL.key("p50"): 99.0}),
        row("int4", 1, 900, "invalid"),
        row("int4", 4, 30, metrics={PEAK: 1.3}),
        failed("bf16", 4),
    ]
    assert sweep.best_figures(rows, VARIED) == (
        {
            "best/output_tokens_per_s": 40,
            "best/ttft_ms_p50": 25.0,
            "best/itl_ms_p50": 50.0,
            "best/host_needed_gb_peak": 1.3,
        },
        {
            "best_output_tokens_per_s": "int8 b4 (suspect)",
            "best_ttft_ms_p50": "int8 b4 (suspect)",
            "best_itl_ms_p50": "bf16 b1",
            "best_host_needed_gb_peak": "int4 b4",
            "cells": "2 valid, 1 suspect, 1 invalid, 1 oom",
        },
    )
    on_device = [row("bf16", 1, 20), row("int4", 1, 20, metrics={"memory/device_gb_peak": 1.0})]
    assert sweep.best_figures(on_device, VARIED)[0].keys() >= {"best/device_gb_peak"}
    assert sweep.best_figures([failed("bf16", 1)], VARIED) == ({}, {"cells": "1 oom"})


def test_an_invalid_result_is_best_at_nothing() -> None:
    rows = [row("bf16", 1, 20), row("int8", 1, 900, "invalid"), row("int4", 1, 40, "suspect")]
    assert headline(rows, VARIED) == (
        "3 of 3 cells measured, 1 invalid; fastest: int4 b1 (suspect), 40.0 tokens/s; "
        "first token soonest: int4 b1 (suspect), 25.0 ms."
    )
    found = told(rows)
    fastest = found.cells.heading.index("tokens/s")
    assert found.cells.best == {(2, fastest), (2, fastest + 1)}
    assert found.not_drawn == "1 invalid result is not drawn."
    everything = sweep.overview_markdown(found) + html.sweep_page(found, {})
    assert "**900**" not in everything and "**40.0**" in everything
    assert '<td class="number void">900</td>' in everything and '<td class="number again">1</td>' not in everything


def test_what_cannot_be_told_apart_is_not_ranked() -> None:
    """Overlapping intervals are alike. So is a difference within the tolerance if a metric has no interval."""
    close = [row("bf16", 1, 100, half=3), row("int8", 1, 104, half=3), row("int4", 1, 90, half=3)]
    assert [one.cell.quant for one in leaders(close, RATE)] == ["int8", "bf16"]
    assert [one.cell.quant for one in leaders(close, TTFT)] == [
        "int8",
        "bf16",
    ]  # 9.6 and 10 ms; 11.1 is more than 5 % away
    assert "fastest: int8 b1 and bf16 b1, 104 tokens/s" in headline(close, VARIED)
    many = [*close, row("fp16", 1, 103, half=3)]
    assert "fastest: int8 b1 and 2 others alike, 104 tokens/s" in headline(many, VARIED)
    same = [row("bf16", 1, 100, half=3), row("int8", 1, 101, half=3)]
    assert headline(same, VARIED) == "2 of 2 cells measured."
    assert leaders(same, PEAK) == []
    assert leaders([row("bf16", 1, 100)], RATE) == []


def test_latencies_of_noisy_cells_are_not_told_apart() -> None:
    noisy = {"trust/relative_half_width": 0.3}
    rows = [
        row("bf16", 1, 100, metrics=noisy),
        row("int8", 1, 70, metrics=noisy),
        row("int4", 1, 50, metrics={**noisy, PEAK: 1.0}),
    ]
    assert [one.cell.quant for one in leaders(rows, TTFT)] == ["bf16", "int8"]  # 10, 14.3 and 20 ms; 60 % is the noise
    assert [one.cell.quant for one in leaders(rows, PEAK)] == ["int4"]


def test_only_what_decides_has_a_best() -> None:
    rows = [row("bf16", 1, 100, metrics={"load/load_s": 1.0}), row("int8", 1, 50, metrics={"load/load_s": 9.0})]
    assert leaders(rows, "load/load_s") == []


def test_what_fits_is_a_table_of_both_sides_of_the_limit() -> None:
    rows = [
        row("bf16", 1, 10, peak_bytes=2_000_000_000, predicted_bytes=2_500_000_000),
        failed("bf16", 4, peak_bytes=3_100_000_000, predicted_bytes=4_000_000_000),
        row("int4", 1, 10, peak_bytes=1_000_000_000, predicted_bytes=1_100_000_000),
        failed("int4", 4, "refused", predicted_bytes=9_000_000_000),
    ]
    found = told(rows).frontier
    assert found.heading == (
        "quant",
        "largest that fits",
        "peak GB",
        "predicted GB",
        "smallest that does not",
        "why",
        "predicted ÷ measured",
        "limit",
    )
    assert found.body == (
        ("bf16", "1 × (128 + 128)", "2.00", "2.50", "4 × (128 + 128)", "oom, 3.10 GB reached", "1.25", "measured"),
        (
            "int4",
            "1 × (128 + 128)",
            "1.00",
            "1.10",
            "4 × (128 + 128)",
            "refused, not tried, 9.00 GB predicted",
            "1.10",
            "predicted",
        ),
    )
    assert "A predicted limit was not tried" in sweep.overview_markdown(told(rows))


def test_a_staircase_takes_several_lines_and_what_is_unknown_no_column() -> None:
    spec = parse({"quant": "int4", "batch_size": "1,4", "prompt_tokens": "16,64"})
    outcome = {(1, 16): "ok", (4, 16): "ok", (1, 64): "ok", (4, 64): "oom"}
    rows = [
        Row(cell, outcome[cell.batch_size, cell.prompt_tokens or 0], {RATE: 1.0}, Verdict("valid"))
        for cell in expand_cells(spec)
    ]
    found = sweep.overview([(one, "") for one in rows], Subject(spec, sweep_name(spec), "s")).frontier
    assert found.heading == ("model", "quant", "largest that fits", "peak GB", "smallest that does not", "why", "limit")
    assert found.body == (
        ("opt-125m", "int4", "4 × (16 + 128)", "", "4 × (64 + 128)", "oom", "measured"),
        ("opt-125m", "int4", "1 × (64 + 128)", "", "", "", ""),
    )


def test_notes_say_where_the_limit_is_not_known_or_contradicted() -> None:
    fine = [row("int4", 4, 1)]
    assert told(fine).frontier_notes[1:] == ("Every requested shape fits, so the limit was not reached.",)
    [_, note] = told([*fine, failed("int4", 8), failed("int4", 1, "crashed")]).frontier_notes
    assert (
        note == "opt-125m int4: 1 × (128 + 128) ended with crashed although a shape at least as large fits, "
        "so memory is not the reason."
    )
    none = told([failed("int4", 1), row("int4", 4, 5, "invalid")]).frontier
    assert none.body == (("opt-125m", "int4", "none", "", "1 × (128 + 128)", "oom", "measured"),)
    untried = told([failed("int4", 1, "refused"), failed("bf16", 1, "interrupted")]).frontier
    assert untried.body == (
        ("int4", "", "", "1 × (128 + 128)", "refused, not tried", "predicted"),
        ("bf16", "", "", "", "", "unknown"),
    )
    auto = Cell(prompt_tokens=None, workload="qa", output_tokens=8)
    assert sweep.shape(auto) == "1 × (auto qa + 8)"


def test_the_peak_of_a_cell_that_failed_is_what_it_reached() -> None:
    samples = (MemorySample(1, 500, 300), MemorySample(2, 900, 700), MemorySample(3, 600, 400))
    oom = dataclasses.replace(
        result([1.0]),
        outcome="oom",
        failure=Failure("measuring", "m"),
        timeline=samples,
        memory=type(result([1.0]).memory)(),
    )
    assert row_of(oom).peak_bytes == 700
    on_device = tuple(dataclasses.replace(sample, device=sample.rss * 10) for sample in samples)
    assert row_of(dataclasses.replace(oom, timeline=on_device)).peak_bytes == 9000
    assert row_of(result([1.0])).peak_bytes == 5 * 10**9
    assert row_of(dataclasses.replace(oom, timeline=())).peak_bytes is None


def test_a_failed_cell_does_not_inherit_the_peak_of_the_cell_before_it() -> None:
    outcome = GroupOutcome(samples=[MemorySample(t, rss, rss) for t, rss in ((1, 10), (5, 900), (9, 50))])
    outcome.stages["loaded"] = StageMemory("loaded", None, t_ns=2)
    outcome.cells = {0: CellSpan(3, StageMemory("peak", None, t_ns=7)), 1: CellSpan(8)}
    assert [sample.rss for sample in timeline_of(outcome, 1)] == [10, 50]


@pytest.mark.parametrize(
    "parameters",
    [
        {"quant": "int8,int4", "batch_size": "1,4"},
        {
            "model": "/models/my model's,opt-125m",
            "prompt_tokens": "auto",
            "workload": "qa",
            "force": "true",
            "price_per_hour": "1.5",
        },
        {
            "threads": "1,2",
            "memory_limit": "6GB",
            "precision_target": "0.05",
            "output_dir": "/elsewhere",
            "rerun": "true",
        },
    ],
)
def test_the_command_asks_for_the_same(parameters: dict[str, str]) -> None:
    """The command, split by a shell and parsed by us, gives the same specification except the output folder."""
    spec = parse(parameters)
    program, *arguments = shlex.split(sweep.sweep_command(spec))
    given = parse_call(arguments).values
    again = parse({name: given[name] for name in PARAMETERS if given.get(name) is not None})
    assert program == "llmbench"
    assert again.axes == spec.axes
    if parameters.get("quant") == "int8,int4":
        assert arguments == ["run", "--model", "opt-125m", "--quant", "int8,int4", "--batch-size", "1,4"]
    assert (
        dataclasses.replace(again.options, output_dir=spec.options.output_dir, rerun=spec.options.rerun) == spec.options
    )


def test_a_server_is_told_without_memory_and_repeated_with_its_own_command() -> None:
    about = subject(model="m", backend="openai", url="http://127.0.0.1:8000", concurrency="1,8")
    cells = expand_cells(about.spec)
    rows = [
        Row(
            cell,
            "ok",
            {RATE: 10.0 * cell.concurrency, "goodput/requests_per_s": 9.0 / cell.concurrency},
            Verdict("valid"),
        )
        for cell in cells
    ]
    found = sweep.overview([(one, "") for one in rows], about)
    assert found.command == "llmbench online --model m --url http://127.0.0.1:8000 --concurrency 1,8"
    assert found.headline == (
        "2 of 2 cells measured; fastest: concurrency=8, 80.0 tokens/s; "
        "most requests within the limits: concurrency=1, 9.00 1/s."
    )
    assert found.frontier.body == ()
    for text in (sweep.overview_markdown(found), html.sweep_page(found, {}), description(rows, ["concurrency"])):
        assert "fits" not in text.partition("</style>")[2 if "</style>" in text else 0]


def test_no_secret_of_the_parameters_is_in_a_report(tmp_path: Path) -> None:
    about = subject(model="https://user:hunter2secret@host/model,other", quant="int4")
    rows = [
        Row(cell, "interrupted", message="hf_abcdefghijklmnopqrstuvwxyz0123456789") for cell in expand_cells(about.spec)
    ]
    artifacts.write_sweep(
        [(one, "") for one in rows], dataclasses.replace(about, ui="http://u:hunter2secret@host"), tmp_path, draw=False
    )
    texts = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) == 5
    assert not [text for text in texts if "hunter2secret" in text or "hf_abcdef" in text]


def test_cells_that_are_no_product_have_a_command_each() -> None:
    about = dataclasses.replace(subject(quant="bf16,int4", threads="1,2"), name="A against B")
    rows = [Row(Cell(quant="bf16", threads=1), "ok"), Row(Cell(quant="int4", threads=2), "ok")]
    found = sweep.overview([(one, "") for one in rows], about)
    assert found.command.splitlines() == [
        "llmbench run --model opt-125m --quant bf16 --threads 1",
        "llmbench run --model opt-125m --quant int4 --threads 2",
    ]
    assert f"<pre>\n{found.command}\n</pre>" in html.sweep_page(found, {})


def test_a_template_cannot_leave_out_a_value_unnoticed() -> None:
    with pytest.raises(UndefinedError, match="'told' is undefined"):
        html.page("sweep.html.j2", title="t", headline="h")


def test_the_description_is_one_screen() -> None:
    rows = [row(quant, batch, 10 + batch, "suspect") for quant in ("bf16", "int8", "int4") for batch in range(1, 101)]
    text = description(rows, VARIED)
    assert len(text) <= sweep.MOST_CHARACTERS
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 16 + 2 + 3
    assert "| bf16 | 100 |" in lines[2]  # the fastest first
    assert "The 16 fastest cells. All 300 are in `report.md` and `report.html`." in text
    assert "contended (300 cells)" in text
    few = description(rows[:3], VARIED)
    assert [line.split("|")[2].strip() for line in few.splitlines() if line.startswith("| bf16 |")][:3] == [
        "1",
        "2",
        "3",
    ]


def test_a_description_of_long_messages_still_fits_into_a_tag() -> None:
    rows = [
        Row(Cell(quant="int4", batch_size=batch, model=f"{batch}-" * 60), f"error {batch}", message="m" * 300)
        for batch in range(1, 30)
    ]
    assert len(description(rows, ["model", "batch_size"])) <= 8000


def test_environments_are_told_apart() -> None:
    rows = [
        row("bf16", 1, 1, environment=MACHINE),
        row("int8", 1, 1, environment=MACHINE),
        row("int4", 1, 1, environment={**MACHINE, "python": "3.12"}),
    ]
    assert [(title, dict(facts)["Python"]) for title, facts in told(rows).machines] == [
        ("2 of 3 cells", "3.11.7"),
        ("1 of 3 cells", "3.12"),
    ]
    assert [title for title, _ in told(rows[:2]).machines] == [""]


def test_what_was_measured_before_is_said_and_is_not_timed() -> None:
    rows = [
        row("bf16", 1, 1, started_ms=1_000_000, ended_ms=1_060_000),
        row("int8", 1, 1, started_ms=1, ended_ms=2, linked="f" * 32),
    ]
    assert ("took", "60 s") in told(rows).facts
    assert f"valid (measured before, in {'f' * 32})" in sweep.overview_markdown(told(rows))


class Links(HTMLParser):
    """Return everything in a page that refers to something outside or acts."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.active: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given.get("content") or ""
        for name, value in attrs:
            if name == "src":
                self.images.append(value or "")
            elif name == "href":
                self.links.append(value or "")
            elif name.startswith("on") or name in ("style", "action", "srcset", "poster", "data"):
                self.active.append(name)


def test_the_page_needs_nobody() -> None:
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script><g id="a"/></svg>'
    text = html.sweep_page(told([row("int4", 1, 5)]), {"overview": svg, "itl": svg})
    found = Links()
    found.feed(text)
    assert found.tags & {"script", "link", "iframe", "object", "svg", "base", "form"} == set()
    assert (found.active, found.links) == ([], [])
    assert [base64.b64decode(one.partition("base64,")[2]) for one in found.images] == [svg, svg]
    assert all(one.startswith("data:image/svg+xml;base64,") for one in found.images)
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert not re.search(r"url\(|@import|//", style)
    assert found.policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
    assert "prefers-color-scheme: dark" in style and "@media print" in style and "width=device-width" in text


@pytest.mark.parametrize(
    ("ui", "linked"),
    [
        ("https://mlflow.example.org/", "https://mlflow.example.org/#/experiments/7/runs/"),
        ("http://user:secret@host:5000", "http://host:5000/#/experiments/7/runs/"),
        ("mlflow ui --backend-store-uri sqlite:////data/mlflow.db", None),
        ("mlflow ui --backend-store-uri postgresql://user:secret@host/db", None),
        ("javascript:alert(1)//http://", None),
    ],
)
def test_runs_are_text_and_links_where_the_ui_has_an_address(ui: str, linked: str | None) -> None:
    text = html.sweep_page(told([row("int4", 1, 5)], ui=ui, experiment_id="7"), {})
    found = Links()
    found.feed(text)
    assert "0" * 32 in text
    assert found.links == ([f"{linked}{'0' * 32}"] if linked else [])
    assert "secret" not in text + sweep.overview_markdown(told([row("int4", 1, 5)], ui=ui))


@pytest.mark.charts
def test_the_parent_holds_the_report_and_a_late_upload_names_its_own_runs(
    store_uri: str, store_template: Path, tmp_path: Path
) -> None:
    import shutil

    model = "fake:ttft_ms=1+itl_ms=1+row_ms=3+fail=oom+above_batch=2"
    given = {"backend": "fake", "output_tokens": 6, "prompt_tokens": 4, "repetitions": 5, "warmup": 1}
    done = run(model=model, batch_size="1,2,4,8", tracking_uri=store_uri, **given)
    client = MlflowClient(store_uri)
    assert done.parent_id
    assert {"report.md", "report.html", "comparison.md", "comparison.csv", "charts"} <= {
        item.path for item in client.list_artifacts(done.parent_id)
    }
    note = client.get_run(done.parent_id).data.tags["mlflow.note.content"]
    assert "2 of 4 cells measured, 2 oom" in note
    assert "| 2 × (4 + 6) |" in note and "| 4 × (4 + 6) | oom, " in note and "| measured |" in note
    written = {
        name: (done.folder / "comparison" / name).read_text(encoding="utf-8") for name in ("report.md", "report.html")
    }
    for text in written.values():
        assert all(run_id in text for run_id in done.run_ids)
        assert f"llmbench run --model {model} --backend fake --quant none --batch-size 1,2,4,8 " in text
        assert "mlflow ui --backend-store-uri sqlite" in text
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", written["report.md"])
    assert pictures[0] == "charts/overview.svg"
    assert all((done.folder / "comparison" / path).is_file() for path in pictures)
    assert written["report.html"].count('<img alt="') == len(pictures)

    shutil.copy(store_template, tmp_path / "elsewhere.db")
    elsewhere = f"sqlite:///{tmp_path}/elsewhere.db"
    shutil.rmtree(done.folder / "comparison")  # as after a kill
    late = upload(str(done.folder), elsewhere)
    other = MlflowClient(elsewhere)
    assert late.parent_id
    text = Path(other.download_artifacts(late.parent_id, "report.html", str(tmp_path))).read_text(encoding="utf-8")
    assert all(run_id in text for run_id in late.run_ids.values()) and not any(
        run_id in text for run_id in done.run_ids
    )
    assert text.count('<img alt="') == len(pictures)


def plain_result(number: int) -> RunResult:
    """A cell of the smallest realistic size: 5 repetitions of 64 tokens, and five seconds of memory samples."""
    base = result([1.0], "int4")
    cell = dataclasses.replace(base.cell, batch_size=number + 1, output_tokens=64, repetitions=5)
    repetitions = []
    for index in range(5):
        stamps = tuple((index * 10_000 + 20 + 9 * i) * MS + number for i in range(64))
        repetitions.append(Repetition(index, index, (RequestRecord(index * 10_000 * MS, stamps, number + 1, 8),)))
    timeline = tuple(MemorySample(i * 50 * MS, 10**9 + i, 10**9) for i in range(100))
    return dataclasses.replace(
        base, cell=cell, repetitions=tuple(repetitions), timeline=timeline, predicted_bytes=6 * 10**9
    )


def test_the_work_of_a_report_grows_with_its_cells(tmp_path: Path) -> None:
    def work(count: int) -> int:
        about = subject(quant="int4", batch_size=",".join(str(number + 1) for number in range(count)))
        rows = [(row_of(plain_result(number)), "0" * 32) for number in range(count)]
        return calls(lambda: artifacts.write_sweep(rows, about, tmp_path / "comparison", draw=False))

    work(2)  # what is loaded at first use
    few, many = work(25), work(100)
    assert (tmp_path / "comparison" / "report.html").read_text(encoding="utf-8").count("<tr>") > 100
    assert many < 6 * few


def test_the_work_of_finding_what_fits_grows_with_the_cells() -> None:
    """Incomparable cells of one load are the worst case of the frontier."""

    def work(batches: int, lengths: int) -> int:
        cells = expand_cells(parse({"batch_size": [*range(1, batches + 1)], "output_tokens": [*range(1, lengths + 1)]}))
        attempts = [sweep.Attempt(cell, "ok") for cell in cells]

        def find() -> None:
            [found] = frontiers(iter(attempts), LOADED)
            assert [one.cell.batch_size for one in found.fits] == [batches]

        return calls(find)

    assert work(40, 50) < 8 * work(20, 25)


def test_a_reason_of_several_cells_names_the_cell_whose_numbers_it_gives() -> None:
    def doubtful(batch: int, text: str) -> Row:
        return Row(Cell(batch_size=batch), "ok", verdict=Verdict("suspect", (Reason("high_variation", text),)))

    differ = explanations([doubtful(1, "It varies by 9 %."), doubtful(4, "It varies by 7 %.")])
    assert differ == [("high_variation (2 cells)", "opt-125m b1: It varies by 9 %.")]
    alike = explanations([doubtful(1, "Give more."), doubtful(4, "Give more.")])
    assert alike == [("high_variation (2 cells)", "Give more.")]
    assert explanations([doubtful(1, "It varies by 9 %.")]) == [("high_variation", "It varies by 9 %.")]
