"""Hostile names, messages and texts in every report: they are shown as their characters and add no escaping.

Checked with real parsers: Python's `html.parser`, and a CommonMark renderer that passes raw HTML through.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mlflow_llmbench.analysis.comparison import compare
from mlflow_llmbench.analysis.decisions.gate import decide
from mlflow_llmbench.config.spec import parse, read_yaml
from mlflow_llmbench.measure.journal import read_result
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import Failure, Reason, RunResult, Verdict
from mlflow_llmbench.reports import artifacts, escaping, sweep, tables
from mlflow_llmbench.reports import result as result_reports
from mlflow_llmbench.reports.comparison import comparison_markdown
from mlflow_llmbench.reports.gate import gate_junit
from mlflow_llmbench.reports.result import Row, row_of

from ..analysis.test_comparison import BF16, INT4
from ..results import made

markdown_it = pytest.importorskip("markdown_it", reason="comes with rich, which the Hub's client brings")

HOSTILE = (
    "../../x", "/etc/passwd", "</script><img src=x onerror=alert(1)>", "<b>bold</b>", "<!--", "]]>", "<![CDATA[",
    '"><svg onload=alert(1)>', "' onmouseover='alert(1)", "&lt;i&gt; &amp; &#60;u&#62;", "a|b|c",
    "`code` ``more`` ```", "line one\nline two\n\n# heading\n\n- item", "[x](javascript:alert(1))",
    "![x](https://evil.example/x.png)", "<https://evil.example>",
    "https://evil.example www.evil.example a@evil.example @evil", "[x]: https://evil.example",
    "**bold** __bold__ _it_ *it* ~~no~~", "# heading ###", "1. item", "- item", "    code", "---", ":octocat: :+1:",
    "x" * 300, "\x1b[31mred\x1b[0m\x00\x07\r\x7f\x85", "\u202egnp.exe\u2066\u200b\ufeff", "CON", "NUL.txt", "COM1:",
    "=cmd|' /C calc'!A0", "+1+1", "@SUM(A1)", "a;=1+1", "$(touch x) `touch x` ; rm -rf", "%s %n {0} ${x}",
    "\\", "\\|\\`\\[", "trailing\\", "\ud800 lone", "\U0001f600 שלום",
)  # fmt: skip
HARMLESS = "model"


class Elements(HTMLParser):
    """Count every element with the names of its attributes, every comment and declaration; keep the text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[object] = Counter()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[(tag, *sorted(name for name, _ in attrs))] += 1

    def handle_endtag(self, tag: str) -> None:
        self.found[f"/{tag}"] += 1

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.found["comment"] += 1

    def handle_decl(self, decl: str) -> None:
        self.found["declaration"] += 1

    def handle_pi(self, data: str) -> None:
        self.found["instruction"] += 1

    def unknown_decl(self, data: str) -> None:
        self.found["unknown"] += 1


def elements(page: str) -> Counter[object]:
    parser = Elements()
    parser.feed(page)
    parser.close()
    return parser.found


def rendered(text: str) -> str:
    """Convert Markdown to HTML, with raw HTML passed through, and tables and strikethrough enabled."""
    return str(markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text))


def named(result: RunResult, text: str) -> RunResult:
    """Return a result with a text in every place that text from outside can reach."""
    environment = {
        **result.environment,
        "cpu": {"name": text},
        "gpus": [{"name": text, "memory_bytes": 1}],
        "packages": {"torch": text},
    }
    load = dataclasses.replace(result.load, facts={"quant.kernel": text}) if result.load else None
    cell = dataclasses.replace(result.cell, model=text, workload=text, quant=text)
    return dataclasses.replace(
        result,
        cell=cell,
        environment=environment,
        load=load,
        log=(text, text),
        texts=({"prompt": text, "output": text},),
    )


def markdowns(text: str) -> dict[str, str]:
    """Return every Markdown that we write, with a text in every place that text from outside can reach."""
    fine, failed = (
        named(BF16, text),
        dataclasses.replace(named(INT4, text), outcome="oom", failure=Failure(text, text), repetitions=()),
    )
    doubted = Row(fine.cell, "ok", row_of(BF16).metrics, Verdict("suspect", (Reason("contended", text),)), linked=text)
    rows = [row_of(fine), doubted, row_of(failed), Row(fine.cell, "skipped", message=text)]
    told = sweep.overview([(row, text) for row in rows], subject(text))
    metrics = result_reports.summarize(fine)
    verdict = Verdict("suspect", (Reason("contended", text),))
    return {
        "summary": result_reports.summary_markdown(fine, metrics, verdict),
        "summary of a failure": result_reports.summary_markdown(failed, {}, None),
        "report of a cell": result_reports.report_markdown(fine, metrics, verdict),
        "report of a failure": result_reports.report_markdown(failed, {}, None),
        "description": sweep.description(rows, ["model", "workload", "quant"]),
        "comparison of a sweep": sweep.cells_markdown(rows, ["model", "workload", "quant"]),
        "report of a sweep": sweep.overview_markdown(told, ["charts/overview.svg"]),
        "comparison of two": comparison_markdown(
            compare(fine, dataclasses.replace(named(INT4, text), cell=dataclasses.replace(fine.cell, seed=1)))
        ),
    }


def subject(text: str) -> sweep.Subject:
    spec = parse({"model": HARMLESS, "quant": "int8,int4"})
    spec = dataclasses.replace(
        spec, axes={**spec.axes, "model": (text, "other"), "workload": (text, "other"), "revision": (text,)}
    )
    return sweep.Subject(spec, text, text, ui=text)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_markdown_gains_an_element(text: str) -> None:
    harmless = {name: elements(rendered(written)) for name, written in markdowns(HARMLESS).items()}
    assert {name: elements(rendered(written)) for name, written in markdowns(text).items()} == harmless


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_the_page_gains_no_element(text: str, tmp_path: Path) -> None:
    def page(name: str) -> str:
        fine, failed = (
            named(BF16, name),
            dataclasses.replace(named(INT4, name), outcome="oom", failure=Failure(name, name)),
        )
        artifacts.write_sweep(
            [(row_of(fine), name), (row_of(failed), name)], subject(name), tmp_path / "comparison", draw=False
        )
        return (tmp_path / "comparison" / "report.html").read_text(encoding="utf-8")

    assert elements(page(text)) == elements(page(HARMLESS))
    parser = Elements()
    parser.feed(page(text))
    assert escaping.plain(text).split()[0] in parser.text  # shown as its characters


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_value_renders_as_its_characters(text: str) -> None:
    parser = Elements()
    parser.feed(rendered(f"before {escaping.markdown(text)} after"))
    assert parser.text.split() == ["before", *escaping.plain(text).split(), "after"]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_files_of_a_cell_stay_in_its_folder_and_its_texts_are_quoted(text: str, tmp_path: Path) -> None:
    def written(name: str, folder: Path) -> tuple[set[str], Counter[object]]:
        result = dataclasses.replace(named(BF16, name), texts=({"prompt": name, "output": name},))
        artifacts.write_cell(result, folder)
        files = {str(path.relative_to(tmp_path)).partition("/")[2] for path in tmp_path.rglob("*") if path.is_file()}
        assert read_result(folder).cell.model == read_yaml(str(folder / "config.yaml"))["model"] == name
        return files, elements(rendered((folder / "texts.md").read_text(encoding="utf-8")))

    lines = "\n".join("word" if line.strip() else "" for line in text.splitlines())
    assert written(text, tmp_path / "one") == written(lines, tmp_path / "two")


def test_a_quotation_keeps_lines_and_indentation() -> None:
    text = "def f(x):\n    return x\n\n# done | `y`"
    page = rendered(escaping.quotation(text))
    assert elements(page) == Counter({("blockquote",): 1, "/blockquote": 1, ("p",): 2, "/p": 2, ("br",): 1, "/br": 1})
    parser = Elements()
    parser.feed(page)
    assert [line for line in parser.text.split("\n") if line] == [
        "def f(x):",
        "\xa0\xa0\xa0\xa0return x",
        "# done | `y`",
    ]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_cell_of_a_csv_is_a_formula(text: str) -> None:
    for delimiter in ",;":
        [[first, *_], *_] = csv.reader(io.StringIO(tables.csv_table([text], [])), delimiter=delimiter)
        assert first[0] not in "=+-@\t\r"
    [[cell, after]] = csv.reader(io.StringIO(tables.csv_table([text, "after"], [])))
    assert cell in (escaping.plain(text), f"'{escaping.plain(text)}") and after == "after"


def test_numbers_in_a_csv_stay_numbers() -> None:
    assert (
        tables.csv_table(["a"], [["-1.5"], ["+2"], ["1e-5"], ["0.0123"], [""]])
        == '"a"\n"-1.5"\n"+2"\n"1e-5"\n"0.0123"\n""\n'
    )


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_acts_in_a_terminal(text: str) -> None:
    shown = result_reports.format_table(
        [Row(Cell(model=text), "error", message=text), Row(Cell(model="other"), "ok")], ["model"]
    )
    assert all(line.isprintable() for line in shown.split("\n"))
    assert len(shown.split("\n")) == 5


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_junit_is_xml_whatever_a_run_is_called(text: str) -> None:
    gate = decide(made(), made(step=12))
    suites = ElementTree.fromstring(gate_junit(gate, f"models:/{text}", text).encode("utf-8", "surrogatepass"))
    [suite] = suites
    assert suite.get("name") == escaping.plain(f"llmbench gate: {text} against models:/{text}")
    assert {case.tag for case in suite} == {"testcase"}


def test_ordinary_text_stays_readable() -> None:
    text = (
        "opt-125m: 4 × (128 + 64), 12.3 GB (95 % interval) fake:ttft_ms=20+itl_ms=5 meta/Llama-3.2 "
        "prompt_tokens=auto – “so”"
    )
    assert escaping.markdown(text) == escaping.plain(text) == text
    assert escaping.markdown("  a\tb\nc  ") == "a b c"
    assert escaping.plain("a\x1bb\u202ec") == r"a\x1bb\u202ec"
    assert escaping.code_block("one\n\n  two") == "    one\n    \n      two"
    assert tables.markdown_table(["a", "n"], [["x|y", "1"], ["z", "2"]], [1], [(0, 1)]) == (
        "| a | n |\n| --- | ---: |\n| x&#124;y | **1** |\n| z | 2 |"
    )
