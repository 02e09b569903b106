"""Every file of a run, written beside the journal: what MLflow gets as artifacts, and what remains without MLflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from . import charts, report
from .compare import Comparison, comparison_json, comparison_markdown
from .comparison_charts import draw_comparisons
from .journal import samples_csv, write_bytes, write_json
from .records import RunResult
from .summary import summarize
from .validity import judge


def write_cell(result: RunResult, folder: Path) -> None:
    """Write result.json, samples.csv.gz, environment.json, config.yaml, report.md and tables of one cell into `folder`.

    Raises JournalError, for example when the disk is full.
    """
    metrics = summarize(result)
    verdict = judge(result, metrics)
    write_json(folder / "result.json", {**_whole(result), "metrics": metrics, "verdict": verdict})
    write_json(folder / "environment.json", {**result.environment, "hashes": {**result.environment.get("hashes", {}), **vars(result.hashes)}})
    write_bytes(folder / "config.yaml", _config(result).encode())
    if result.repetitions:
        write_bytes(folder / "samples.csv.gz", samples_csv(result))
    write_bytes(folder / "report.md", report.report_markdown(result, metrics, verdict).encode())
    write_json(folder / "tables" / "summary.json", report.summary_table(result, metrics))
    if result.texts:
        rows = [[text["prompt"], text["output"]] for text in result.texts]
        write_json(folder / "tables" / "texts.json", report.split_table(["prompt", "output"], rows))
        write_bytes(folder / "texts.md", _texts_markdown(rows).encode())


def _config(result: RunResult) -> str:
    """config.yaml: what was asked, with the commit that `revision` meant, so that it means the same later."""
    from_hub = result.model.source in ("hub", "preset") and result.cell.weights != "random" and result.cell.backend != "fake"
    resolved = {"revision": result.model.revision} if from_hub else {}
    quality = {"quality": "auto"} if result.quality else {}
    return report.config_yaml(result.cell, {"price_per_hour": result.price_per_hour, **quality, **resolved})


def _whole(result: RunResult) -> dict[str, object]:
    return {name: getattr(result, name) for name in result.__dataclass_fields__}


def _texts_markdown(rows: Sequence[Sequence[str]]) -> str:
    """What the model wrote, prompt by prompt."""
    shown = ((json.dumps(prompt, ensure_ascii=False)[1:-1], output.strip()) for prompt, output in rows)
    return "\n".join(f"**{number}.** {prompt}\n\n> {output}\n" for number, (prompt, output) in enumerate(shown, 1))


def write_sweep(rows: Sequence[report.Row], varied: Sequence[str], folder: Path, draw: bool = True) -> None:
    """Write the comparison of a sweep for its parent: the table as Markdown, CSV and MLflow table, and if `draw` the charts."""
    heading, body = report.table_cells(rows, varied)
    write_bytes(folder / "comparison.md", report.sweep_markdown(rows, varied).encode())
    write_bytes(folder / "comparison.csv", "".join(",".join(_csv_cell(c) for c in line) + "\n" for line in [heading, *body]).encode())
    write_json(folder / "tables" / "comparison.json", report.split_table(heading, body))
    if draw:
        charts.draw_sweep([(row.cell, row.metrics) for row in rows if row.metrics], folder / "charts")


def write_comparisons(comparisons: Sequence[Comparison], folder: Path) -> None:
    """Write comparison.md, comparison.json (a list) and the charts of `llmbench compare` into `folder`. Raises JournalError."""
    write_bytes(folder / "comparison.md", "\n".join(map(comparison_markdown, comparisons)).encode())
    write_json(folder / "comparison.json", list(map(comparison_json, comparisons)))
    draw_comparisons(comparisons, folder / "charts")


def _csv_cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n') else text
