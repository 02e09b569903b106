"""Results as text: the terminal's table, the one-screen summary, report.md, and the table that the MLflow UI compares."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .metrics import KEYS
from .quality import sentences
from .records import Cell, RunResult, Verdict
from .spec import as_text, default_text
from .stats import classify_outliers
from .summary import e2e_ms, summarize, ttft_ms
from .validity import judge, unsupported_percentiles

Metrics = Mapping[str, float]

TABLE_KEYS = (
    "throughput/output_tokens_per_s", "latency/ttft_ms_p50", "latency/itl_ms_p50", "memory/device_bytes_peak", "memory/host_needed_bytes_peak",
    "memory/weight_bytes", "efficiency/mbu_ratio", "quality/kl_vs_reference", "quality/top1_agreement", "quality/perplexity", "load/load_s",
    "cost/per_million_tokens",
)  # fmt: skip
"""Columns of the terminal's table, where any row has them."""

WORDS = {"valid": "valid", "suspect": "suspect", "invalid": "INVALID"}


@dataclass(frozen=True)
class Row:
    """One cell of a comparison: what was asked, what came out. `metrics` is empty where nothing was measured."""

    cell: Cell
    outcome: str
    metrics: Metrics = dataclasses.field(default_factory=dict)
    verdict: Verdict | None = None
    message: str = ""


def row_of(result: RunResult) -> Row:
    """A result as one row; a cell that failed shows its message and no numbers."""
    if result.failure:
        return Row(result.cell, result.outcome, message=result.failure.message)
    metrics = summarize(result)
    return Row(result.cell, result.outcome, metrics, judge(result, metrics))


def _heading(key: str) -> tuple[str, float]:
    """Column heading and scale of a metric key."""
    return KEYS[key].label or KEYS[key].name, KEYS[key].scale


def _number(value: float) -> str:
    """Three significant digits, and no exponent: 0.000123, 0.0123, 1.23, 12.3, 123, 12346."""
    if value == 0:
        return "0"
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.1 else 4 if size >= 0.01 else 6
    return f"{value:.{digits}f}"


def _figure(key: str, value: float) -> str:
    """A metric with its unit: whole numbers whole, bytes in groups of three digits."""
    unit = KEYS[key].unit if key in KEYS else ""
    text = f"{int(value):,}" if value == int(value) and unit in ("", "bytes") else _number(value)
    return f"{text} {unit}".strip() if unit != "0–1" else text


def table_cells(rows: Sequence[Row], varied: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Heading and body of a comparison: the parameters that vary, the metrics that any row has, and the verdict."""
    keys = [key for key in TABLE_KEYS if any(key in row.metrics for row in rows)]
    names = list(varied) or ["model", "quant", "batch_size"]
    heading = [*names, *(_heading(key)[0] for key in keys), "verdict"]
    body = []
    for row in rows:
        values = [_number(row.metrics[key] * _heading(key)[1]) if key in row.metrics else "–" for key in keys]
        state = WORDS[row.verdict.word] if row.verdict and row.outcome == "ok" else row.outcome
        body.append([*(as_text(name, getattr(row.cell, name)) for name in names), *values, state])
    return heading, body


def format_table(rows: Sequence[Row], varied: Sequence[str]) -> str:
    """The comparison for a terminal: numbers to the right, words to the left, and below it why a cell failed."""
    heading, body = table_cells(rows, varied)
    names = len(varied) or 3
    widths = [max(len(line[i]) for line in [heading, *body]) for i in range(len(heading))]

    def line(cells: Sequence[str]) -> str:
        last = len(cells) - 1
        return "  ".join(c.ljust(w) if i < names or i == last else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))).rstrip()

    notes = explanations(rows)
    return "\n".join([line(heading), *map(line, body), *(["", *notes] if notes else [])])


def explanations(rows: Sequence[Row]) -> list[str]:
    """One line for each kind of failure and each reason of a verdict: how many cells have it, and the sentence of the least steady one."""
    found: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: -row.metrics.get("trust/cv_ratio", 0.0)):
        if row.message:
            found.setdefault(row.outcome, []).append(row.message)
        for reason in row.verdict.reasons if row.verdict else ():
            found.setdefault(reason.code, []).append(reason.sentence)
    return [f"{code}{f' ({len(texts)} cells)' if len(texts) > 1 else ''}: {texts[0]}" for code, texts in found.items()]


def markdown_table(heading: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; pipes in cells are escaped."""
    lines = [heading, ["---"] * len(heading), *body]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def summary_markdown(result: RunResult, metrics: Metrics, verdict: Verdict | None) -> str:
    """The one-screen summary that becomes the run's description in the MLflow UI."""
    cell = result.cell
    what = f"**{cell.model}** · {cell.quant} · batch {cell.batch_size} · {as_text('prompt_tokens', cell.prompt_tokens)} + {cell.output_tokens} tokens"
    where = f"{result.environment.get('cpu', {}).get('name', 'unknown CPU')}"
    gpu = gpu_of(result)
    where = f"{gpu['name']} ({where})" if gpu else where
    if result.failure:
        return f"{what}\n\n**{result.outcome}** at stage {result.failure.stage}: {result.failure.message}\n\n{where}\n"
    rows = [[name, text] for name, text in _headline(metrics) if text]
    lines = [what, "", markdown_table(["measured", ""], rows), "", f"**Verdict: {verdict.word if verdict else 'none'}**"]
    lines += [f"- `{reason.code}`: {reason.sentence}" for reason in (verdict.reasons if verdict else ())]
    if cell.weights == "random":
        lines += ["", "Random weights of the real architecture: speed and memory hold, the text means nothing."]
    lines += ["", *result.quality.withheld] if result.quality and result.quality.withheld else []
    lines += ["", f"{where} · {int(metrics.get('trust/repetitions', 0))} repetitions, {len(result.warmup_s)} warm-up runs"]
    return "\n".join(lines) + "\n"


def gpu_of(result: RunResult) -> dict[str, Any] | None:
    """The GPU that a result was measured on, as in its environment; None for a CPU, whatever else the machine has."""
    device = str(result.load.facts.get("model.device", "cpu")) if result.load else result.cell.device
    gpus: list[dict[str, Any]] = result.environment.get("gpus") or []
    index = int(device.partition(":")[2] or 0)
    return gpus[index] if device.startswith("cuda") and index < len(gpus) else None


def _headline(metrics: Metrics) -> list[tuple[str, str]]:
    def value(key: str, unit: str, scale: float = 1.0) -> str:
        return f"{_number(metrics[key] * scale)} {unit}".strip() if key in metrics else ""

    def interval(key: str, unit: str, scale: float = 1.0) -> str:
        text = value(key, unit, scale)
        if f"{key}_ci_low" in metrics:
            low, high = (_number(metrics[f"{key}_ci_{end}"] * scale) for end in ("low", "high"))
            text += f" (95 % interval {low} to {high})"
        return text

    return [
        ("output throughput", interval("throughput/output_tokens_per_s", "tokens/s")),
        ("time to first token, median", value("latency/ttft_ms_p50", "ms")),
        ("inter-token latency, median", value("latency/itl_ms_p50", "ms")),
        ("inter-token latency, p99", value("latency/itl_ms_p99", "ms")),
        ("peak device memory", value("memory/device_bytes_peak", "GB", 1e-9)),
        ("peak host memory needed", value("memory/host_needed_bytes_peak", "GB", 1e-9)),
        ("weights as stored", value("memory/weight_bytes", "GB", 1e-9)),
        ("model bandwidth utilization", value("efficiency/mbu_ratio", "")),
        ("KL divergence from the unquantized model", interval("quality/kl_vs_reference", "nats")),
        ("same most probable token as it", interval("quality/top1_agreement", "%", 100)),
        ("perplexity", interval("quality/perplexity", "")),
        ("perplexity ÷ that of the unquantized model", interval("quality/perplexity_ratio", "")),
        ("load", value("load/load_s", "s")),
        ("cost per million tokens", value("cost/per_million_tokens", "")),
    ]


def report_markdown(result: RunResult, metrics: Metrics, verdict: Verdict | None) -> str:
    """report.md: the summary, then all figures, what was realised, what the machine did, and how to repeat it."""
    parts = [f"# {result.cell.model} · {result.cell.quant} · batch {result.cell.batch_size}", summary_markdown(result, metrics, verdict)]
    absent = unsupported_percentiles(result)
    if absent:
        parts.append("Percentiles left out, because the sample does not support them: " + ", ".join(absent) + ".")
    if metrics:
        parts += ["## All metrics", markdown_table(["metric", "value"], [[key, _figure(key, value)] for key, value in metrics.items()])]
    if result.quality:
        parts += ["## Quality", "\n".join(f"- {sentence}" for sentence in sentences(result.quality))]
    if result.load:
        parts += ["## What was loaded", markdown_table(["fact", "value"], [[k, str(v)] for k, v in result.load.facts.items()])]
    if result.repetitions:
        parts += ["## Repetitions", _repetitions_table(result)]
    if result.warmup_s:
        parts.append("Warm-up runs, s: " + ", ".join(f"{s:.3f}" for s in result.warmup_s))
    if result.log:
        parts += ["## What libraries printed", "\n".join(f"    {line}" for line in result.log)]
    parts += ["## Repeat it", f"    {command(result.cell)}", "On this environment:", _environment_table(result)]
    return "\n\n".join(parts) + "\n"


def _repetitions_table(result: RunResult) -> str:
    """Each repetition with what the machine did meanwhile, outliers named (Tukey's fences on the end-to-end time)."""
    body = []
    totals = [max(map(e2e_ms, r.requests)) for r in result.repetitions]
    for repetition, total, outlier in zip(result.repetitions, totals, classify_outliers(totals), strict=True):
        noise = repetition.noise
        seen = [noise.foreign_cpu_s, noise.steal_s, noise.involuntary_switches, noise.major_faults] if noise else [None] * 4
        first = _number(median(map(ttft_ms, repetition.requests)))
        shown = ["–" if value is None else _number(float(value)) for value in seen]
        spoiled = "spoiled" if noise and noise.spoiled else ""
        body.append([str(repetition.index + 1), first, _number(total), outlier or "", spoiled, *shown])
    heading = ["#", "TTFT ms", "end to end ms", "outlier", "by others", "CPU s of others", "CPU s stolen", "involuntary switches", "major faults"]
    return markdown_table(heading, body)


def _environment_table(result: RunResult) -> str:
    environment = result.environment
    rows = [
        ["CPU", environment.get("cpu", {}).get("name", "")],
        ["Python", environment.get("python", "")],
        ["OS", environment.get("os", {}).get("release", "")],
    ]
    rows += [["GPU", gpu["name"]] for gpu in environment.get("gpus") or []]
    rows += [[name, version] for name, version in (environment.get("packages") or {}).items()]
    return markdown_table(["what", "version"], rows)


def command(cell: Cell) -> str:
    """The command line that measures this cell again: the parameters that are not at their default."""
    given = [(f.name, as_text(f.name, getattr(cell, f.name))) for f in dataclasses.fields(cell)]
    told = [f"--{name.replace('_', '-')} {shlex.quote(text)}" for name, text in given if text != default_text(name) or name in ("model", "quant")]
    return " ".join(["llmbench run", *told])


def sweep_markdown(rows: Sequence[Row], varied: Sequence[str]) -> str:
    """The parent's description: the comparison, and what each cell that failed said."""
    heading, body = table_cells(rows, varied)
    done = sum(row.outcome == "ok" for row in rows)
    parts = [f"{done} of {len(rows)} cells measured. Sort the child runs by any metric to see them side by side.", markdown_table(heading, body)]
    parts += [f"- {line}" for line in explanations(rows)]
    return "\n\n".join(parts[:2]) + "\n\n" + "\n".join(parts[2:]) + "\n"


def split_table(heading: Sequence[str], body: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """A table in pandas' "split" layout, which the MLflow UI shows and compares between runs."""
    return {"columns": list(heading), "data": [list(row) for row in body]}


def summary_table(result: RunResult, metrics: Metrics) -> dict[str, Any]:
    """tables/summary.json of one run: one row per metric."""
    return split_table(["metric", "value"], [[key, value] for key, value in metrics.items()])


def config_yaml(cell: Cell, extra: Mapping[str, object]) -> str:
    """config.yaml: every parameter as text, in the order of the vocabulary, readable by `llmbench run --config`."""
    lines = {f.name: as_text(f.name, getattr(cell, f.name)) for f in dataclasses.fields(cell)}
    lines |= {name: as_text(name, value) for name, value in extra.items()}
    return "".join(f"{name}: {json.dumps(text, ensure_ascii=False)}\n" for name, text in lines.items())
