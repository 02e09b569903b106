"""Write every file of a run beside the journal. They become the artifacts in MLflow, and remain without MLflow."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..analysis.comparison import Comparison
from ..analysis.decisions.recommend import Recommendation
from ..analysis.scaling.findings import Findings
from ..analysis.scaling.study import ScalingStudy
from ..analysis.summary import summarize
from ..analysis.verdict import judge
from ..measure.journal import samples_csv, write_bytes, write_json, write_text
from ..records.backends import recorded_capabilities
from ..records.cell import list_text
from ..records.redaction import redact_all
from ..records.results import RunResult
from . import html, mixed_plan, recommendation, sweep
from . import study as study_reports
from .charts.catalogue import DrawnCharts, Subject, draw_charts
from .charts.figure_data import figure_data
from .charts.sweep import SweepPoint, SweepPoints
from .comparison import comparison_json, comparisons_markdown
from .escaping import markdown, quotation
from .result import Row, config_parameters, config_yaml, report_markdown, statistics_cells, summary_table, table_cells
from .scaling import scaling_json, scaling_markdown
from .study import Drawn, study_page
from .tables import csv_table, split_table


def write_cell(result: RunResult, folder: Path) -> None:
    """Write result.json, samples.csv.gz, environment.json, config.yaml, report.md and tables of one cell into `folder`.

    Raises JournalError, for example when the disk is full.
    """
    metrics = summarize(result)
    verdict = judge(result, metrics)
    write_json(folder / "result.json", {**_whole(result), "metrics": metrics, "verdict": verdict})
    write_json(
        folder / "environment.json",
        {**result.environment, "hashes": {**result.environment.get("hashes", {}), **vars(result.hashes)}},
    )
    write_text(
        folder / "config.yaml",
        config_yaml({name: list_text(name, [text]) for name, text in parameters_of(result).items()}),
    )
    if result.repetitions:
        write_bytes(folder / "samples.csv.gz", samples_csv(result))
    write_text(folder / "report.md", report_markdown(result, metrics, verdict))
    write_json(folder / "tables" / "summary.json", summary_table(result, metrics))
    if result.repetitions:
        write_json(folder / "tables" / "statistics.json", split_table(*statistics_cells(result)))
    if result.texts:
        rows = [[text["prompt"], text["output"]] for text in result.texts]
        write_json(folder / "tables" / "texts.json", split_table(["prompt", "output"], rows))
        write_text(folder / "texts.md", _texts_markdown(rows))
    if result.load and result.load.quant_plan:
        write_json(folder / "quant_plan.json", result.load.quant_plan)
        write_text(folder / "quant_plan.md", mixed_plan.plan_markdown(result.load.quant_plan))


def draw_cell(result: RunResult, folder: Path) -> list[Path]:
    """Draw the charts of one cell; return the files."""
    return list(_draw("cell", result, folder).files)


def _draw(subject: Subject, data: object, folder: Path) -> DrawnCharts:
    """Draw the charts of a subject, or none with LLMBENCH_CHARTS=0."""
    off = os.environ.get("LLMBENCH_CHARTS", "").strip().lower() in ("0", "false", "no", "off")
    return DrawnCharts((), ()) if off else draw_charts(subject, data, folder)


def parameters_of(result: RunResult) -> dict[str, str]:
    """Return the requested parameters for config.yaml, with `revision` replaced by the commit that it resolved to."""
    from_hub = (
        result.model.source in ("hub", "preset")
        and result.cell.weights != "random"
        and not recorded_capabilities(result.cell.backend).scripted
    )
    resolved = {"revision": result.model.revision} if from_hub else {}
    quality: dict[str, object] = {}
    if result.quality:
        tasks = result.quality.asked_tasks
        quality = {"quality_tasks": tasks} if tasks else {}
        quality |= {"quality": "auto"} if result.quality.text_digest or not tasks else {}
    options = {"price_per_hour": result.price_per_hour, "nominal_bandwidth": result.nominal_bandwidth}
    return config_parameters(result.cell, {**options, **quality, **resolved})


def _whole(result: RunResult) -> dict[str, object]:
    return {name: getattr(result, name) for name in result.__dataclass_fields__}


def _texts_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return the model's outputs, prompt by prompt."""
    shown = (
        (markdown(json.dumps(prompt, ensure_ascii=False)[1:-1]), quotation(output.strip())) for prompt, output in rows
    )
    return "\n".join(f"**{number}.** {prompt}\n\n{output}\n" for number, (prompt, output) in enumerate(shown, 1))


def write_sweep(measured: Sequence[tuple[Row, str]], subject: sweep.Subject, folder: Path, draw: bool = True) -> None:
    """Write the files of a sweep's parent run into `folder`.

    These are the report as Markdown and HTML, the comparison as Markdown, CSV and MLflow table, and the charts.
    `measured` holds rows with their MLflow run ids, "" if unknown. Without `draw`, the existing charts are used.
    Raises JournalError, for example when the disk is full.
    """
    measured, subject = redact_all((tuple(measured), subject))
    rows, varied = [row for row, _ in measured], subject.spec.varied
    heading, body = table_cells(rows, varied)
    write_text(folder / "comparison.md", sweep.cells_markdown(rows, varied))
    write_text(
        folder / "comparison.csv",
        csv_table(heading, [["" if cell == "–" else cell for cell in line] for line in body]),
    )
    write_json(folder / "tables" / "comparison.json", split_table(heading, body))
    if draw:
        points = [SweepPoint(row.cell, row.metrics, row.state == "suspect") for row in sweep.drawable(rows)]
        _draw("sweep", SweepPoints(points, subject.spec.options.attainment), folder / "charts")
    pictures = sorted((folder / "charts").glob("*.svg"), key=lambda path: (path.stem != "overview", path.stem))
    told = sweep.overview(measured, subject)
    write_text(folder / "report.md", sweep.overview_markdown(told, [f"charts/{path.name}" for path in pictures]))
    write_text(folder / "report.html", html.sweep_page(told, {path.stem: path.read_bytes() for path in pictures}))


def write_comparisons(comparisons: Sequence[Comparison], folder: Path) -> None:
    """Write comparison.md, comparison.json (a list) and the charts of `llmbench compare` into `folder`.

    Raises JournalError.
    """
    write_text(folder / "comparison.md", comparisons_markdown(comparisons))
    write_json(folder / "comparison.json", list(map(comparison_json, comparisons)))
    _draw("comparisons", comparisons, folder / "charts")


def write_recommendation(found: Recommendation, folder: Path) -> None:
    """Write recommendation.json, recommendation.md and the chart of a recommendation into `folder`.

    Raises JournalError.
    """
    write_json(folder / "recommendation.json", recommendation.recommendation_json(found))
    write_text(folder / "recommendation.md", recommendation.recommendation_markdown(found))
    _draw("recommendation", found, folder / "charts")


def write_scaling(study: ScalingStudy, folder: Path) -> list[Path]:
    """Write scaling.json, scaling.md and the charts of a scaling study; return the files.

    Raises JournalError, for example when the disk is full.
    """
    drawn = _draw("scaling", study, folder / "charts").files
    write_json(folder / "scaling.json", scaling_json(study))
    shown = [f"charts/{file.name}" for file in drawn if file.suffix == ".svg"]
    write_text(folder / "scaling.md", scaling_markdown(study, shown))
    return [folder / "scaling.json", folder / "scaling.md", *drawn]


def write_study(found: Findings, folder: Path) -> list[Path]:
    """Write a study into `folder`: study/ with report.md, report.html, study.json and the figures, and scaling/.

    `write_scaling` writes scaling/. Returns the files. Raises JournalError, for example when the disk is full.
    """
    home = folder / "study"
    scaled = write_scaling(found.scaling, folder / "scaling")
    figures = _draw("study", figure_data(found), home / "charts")
    drawn = Drawn(
        {file.stem: (file.read_bytes(), f"charts/{file.name}") for file in figures.files if file.suffix == ".svg"},
        {file.stem: (file.read_bytes(), f"../scaling/charts/{file.name}") for file in scaled if file.suffix == ".svg"},
        figures.missing,
    )
    write_json(home / "study.json", study_reports.study_json(found, figures.missing))
    told = study_reports.sections(found, drawn)
    write_text(home / "report.md", study_reports.study_markdown(found, told))
    write_text(home / "report.html", study_page(found, told))
    return [*scaled, *figures.files, home / "study.json", home / "report.md", home / "report.html"]
