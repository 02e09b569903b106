"""Results as text: the table for the terminal, the one-screen summary of a run, its report.md, and its MLflow table."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..analysis.efficiency import utilization_doubt
from ..analysis.latency import e2e_ms, ttft_ms
from ..analysis.online_metrics import channel_tokens
from ..analysis.order import correlation, unjudged
from ..analysis.quality import sentences
from ..analysis.repetitions import process_count, requests
from ..analysis.summary import Turn, gpu_of, statistics, summarize, turns_of
from ..analysis.verdict import judge, unsupported_percentiles
from ..config.cells import cell_name
from ..config.spec import cell_fields
from ..records.cell import PARAMETERS, Cell, as_text, default_text, differing, list_text
from ..records.environment import GPU_SOFTWARE, QUOTA, quota_text
from ..records.invocation import option_name
from ..records.metric import RATIO, Column, Entry, Line, first_known, interval_keys
from ..records.metrics import (
    KEYS,
    OUTPUT_RATE,
    REPETITIONS,
    TTFT,
    VARIATION,
    peak_memory,
    shown_in,
)
from ..records.results import CONTENT, REASONING, REFUSAL, TOOLS, RunResult, Verdict
from ..records.text import number_text, short_number_text
from ..stats import classify_outliers
from ..workloads.prompts import MIXED
from .escaping import code_block, markdown, plain
from .layout import layout_sections
from .tables import MISSING, markdown_table, split_table, text_table

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One cell of a comparison with its outcome. `metrics` is empty if nothing was measured.

    `peak_bytes` and `predicted_bytes` are those of `frontier.Attempt`. Times are epoch milliseconds. `linked` names the
    earlier run or folder that holds the measurement of a cell that was not measured again.
    """

    cell: Cell
    outcome: str
    metrics: Metrics = dataclasses.field(default_factory=dict)
    verdict: Verdict | None = None
    message: str = ""
    stage: str = ""
    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    started_ms: int | None = None
    ended_ms: int | None = None
    linked: str = ""
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def state(self) -> str:
        """The verdict of a measured cell (`valid`, `suspect` or `invalid`), else the outcome."""
        return self.verdict.word if self.verdict and self.outcome == "ok" else self.outcome

    def __repr__(self) -> str:
        return f"<Row {cell_name(self.cell, [])}: {row_text(self)}>"


def row_of(result: RunResult) -> Row:
    """Return a result as one row. A failed cell has its message, and figures only of processes that measured it."""
    metrics = summarize(result)
    row = Row(
        result.cell,
        result.outcome,
        peak_bytes=_peak_bytes(result),
        predicted_bytes=result.predicted_bytes,
        started_ms=result.started_ms,
        ended_ms=result.ended_ms,
        linked=result.linked,
        environment=result.environment,
    )
    if result.failure:
        row = dataclasses.replace(row, message=result.failure.message, stage=result.failure.stage)
        return dataclasses.replace(row, metrics=metrics) if result.repetitions else row
    return dataclasses.replace(row, metrics=metrics, verdict=judge(result, metrics))


def with_figures(row: Row, figures: Metrics) -> Row:
    """Return the row with metrics added that come from comparing it with other rows."""
    return dataclasses.replace(row, metrics={**row.metrics, **figures}) if figures else row


def _peak_bytes(result: RunResult) -> int | None:
    """Return the peak memory in bytes, of the load too: of the device, else needed host memory, else of the samples."""
    for stages in (result.memory.device, result.memory.host_needed):
        if peak := max(stages.get("peak", 0), stages.get("loading", 0)):
            return peak
    devices = [sample.device for sample in result.timeline if sample.device is not None]
    return max(devices or [sample.anonymous for sample in result.timeline], default=None)


def _figure(key: str, value: float) -> str:
    """Format a metric with its unit. Whole counts and bytes have no decimals, and their digits are grouped by three."""
    unit = KEYS[key].unit if key in KEYS else ""
    text = f"{int(value):,}" if value == int(value) and unit in ("", "bytes") else short_number_text(value)
    return f"{text} {unit}".strip() if unit != RATIO else text


def columns_of(rows: Sequence[Row]) -> list[Entry[Column]]:
    """Return the metrics in the table of some cells: those that any of them has."""
    return first_known(shown_in(Column), lambda key: any(key in row.metrics for row in rows))


def table_cells(rows: Sequence[Row], varied: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return heading and body of a comparison: the varied parameters, the metrics that any row has, and the verdict."""
    columns = columns_of(rows)
    scenario = rows[0].cell.scenario if rows else "offline"
    plain = {"online": ["model", "concurrency", "request_rate"], "batching": ["model", "batching", "request_rate"]}.get(
        scenario, ["model", "quant", "batch_size"]
    )
    if any(row.cell.trace for row in rows):
        plain = ["model", "trace"]
    names = list(varied) or plain
    heading = [*names, *(entry.heading for entry in columns), "verdict"]
    body = []
    for row in rows:
        values = [short_number_text(row.metrics[one.key]) if one.key in row.metrics else "–" for one in columns]
        known = cell_fields(row.cell)
        body.append(
            [
                *(as_text(name, getattr(row.cell, name)) if name in known else "–" for name in names),
                *values,
                "INVALID" if row.state == "invalid" else row.state,
            ]
        )
    return heading, body


def format_table(rows: Sequence[Row], varied: Sequence[str]) -> str:
    """Format the comparison for a terminal: numbers right-aligned, words left-aligned, reasons of failures below."""
    heading, body = table_cells(rows, varied)
    figures = [column for column, name in enumerate(heading[:-1]) if name not in PARAMETERS]
    notes = [f"{title}: {plain(text)}" for title, text in explanations(rows)]
    return "\n".join([text_table(heading, body, figures), *(["", *notes] if notes else [])])


def row_text(row: Row) -> str:
    """Return the figures of a measured cell in one line: `412 tokens/s · TTFT 31.2 ms · 0.61 GB · valid`."""
    rate, ttft = row.metrics.get(OUTPUT_RATE.key()), row.metrics.get(TTFT.key("p50"))
    memory = peak_memory(row.metrics)
    figures = [
        f"{short_number_text(rate)} tokens/s" if rate else "",
        f"TTFT {short_number_text(ttft)} ms" if ttft else "",
        f"{short_number_text(memory)} GB" if memory else "",
    ]
    return " · ".join([*filter(None, figures), row.state])


def explanations(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (title, sentence) for each kind of failure and each verdict reason.

    The title has the number of cells if there are several. The sentence is that of the cell with the highest variation,
    which it names if those of the others have other numbers.
    """
    found: dict[str, list[tuple[str, Cell]]] = {}
    for row in sorted(rows, key=lambda row: -row.metrics.get(VARIATION.key(), 0.0)):
        if row.message:
            found.setdefault(row.outcome, []).append((row.message, row.cell))
        for reason in row.verdict.reasons if row.verdict else ():
            found.setdefault(reason.code, []).append((reason.sentence, row.cell))
    varied = differing([row.cell for row in rows])
    return [_explanation(code, own, varied) for code, own in found.items()]


def _explanation(code: str, found: Sequence[tuple[str, Cell]], varied: Sequence[str]) -> tuple[str, str]:
    text, cell = found[0]
    title = f"{code} ({len(found)} cells)" if len(found) > 1 else code
    return title, f"{cell_name(cell, varied)}: {text}" if len({own for own, _ in found}) > 1 else text


INCOMPLETE = (
    "Written while other cells of its group were still to be measured: series, charts, quality, and memory after "
    "unloading come with the end of the group."
)


def summary_markdown(result: RunResult, metrics: Metrics, verdict: Verdict | None) -> str:
    """Return the one-screen summary of a run, its description in the MLflow UI."""
    cell = result.cell
    length = (
        "lengths of the trace"
        if cell.trace
        else f"{as_text('prompt_tokens', cell.prompt_tokens)} + {cell.output_tokens} tokens"
        if cell.generates
        else f"embeddings of {as_text('prompt_tokens', cell.prompt_tokens)} tokens"
    )
    if cell.prefix_tokens and not cell.trace:
        groups = f"{cell.prefix_count} groups" if cell.prefix_count > 1 else "all"
        length += f", the first {cell.prefix_tokens} shared by {groups}"
    what = f"**{markdown(cell.model)}** · {markdown(_load(cell))} · {length}"
    cpu, gpu = result.environment.get("cpu", {}).get("name", "unknown CPU"), gpu_of(result)
    where = markdown(f"{gpu['name']} ({cpu})" if gpu else cpu)
    if result.failure:
        return (
            f"{what}\n\n**{markdown(result.outcome)}** at stage {markdown(result.failure.stage)}: "
            f"{markdown(result.failure.message)}\n\n{where}\n"
        )
    lines = [
        what,
        "",
        markdown_table(["measured", ""], _lines(result, metrics)),
        "",
        f"**Verdict: {verdict.word if verdict else 'none'}**",
    ]
    lines += [f"- `{reason.code}`: {markdown(reason.sentence)}" for reason in (verdict.reasons if verdict else ())]
    if result.incomplete:
        lines += ["", INCOMPLETE]
    if cell.workload == "mixed":
        lines += ["", MIXED]
    if cell.weights == "random":
        lines += ["", "Random weights of the real architecture: speed and memory are valid, the text is meaningless."]
    lines += ["", *map(markdown, result.quality.withheld)] if result.quality and result.quality.withheld else []
    lines += [
        "",
        f"{where} · {int(metrics.get(REPETITIONS.key(), 0))} repetitions, {len(result.warmup_s)} warm-up runs",
    ]
    return "\n".join(lines) + "\n"


def _load(cell: Cell) -> str:
    """Describe the quantization and batch of an offline cell, or the load of an online one."""
    if cell.batching:
        return (
            f"{cell.quant} · {cell.batching} batching, at most {cell.batch_size} rows · "
            f"{cell.request_rate:g} requests/s, {cell.arrival}"
        )
    if cell.scenario == "offline":
        return f"{cell.quant} · batch {cell.batch_size}"
    online = f"{cell.quant} · online" if cell.launch else "online"
    if cell.trace:
        return f"{online} · trace {_name_of(cell.trace)}"
    rising = "" if cell.ramp_to is None else f" rising to {cell.ramp_to:g}"
    return (
        f"{online} · {cell.request_rate:g}{rising} requests/s, {cell.arrival}"
        if cell.request_rate
        else f"{online} · concurrency {cell.concurrency}"
    )


def _name_of(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]


def _lines(result: RunResult, metrics: Metrics) -> list[list[str]]:
    """Return the measured figures as names and values with their units and 95 % intervals.

    Processes differ, which a single one cannot show: its interval is called that of this process.
    """
    of = "95 % interval" if process_count(result) > 1 else "95 % interval of this process:"
    known = first_known(shown_in(Line), metrics.__contains__)
    return [[entry.words, _line_text(entry, metrics, of)] for entry in known]


def _line_text(entry: Entry[Line], metrics: Metrics, of: str) -> str:
    text = f"{short_number_text(metrics[entry.key] * entry.scale)} {entry.unit}".strip()
    low, high = (metrics.get(key) for key in interval_keys(entry.key))
    if low is None or high is None:
        return text
    return f"{text} ({of} {short_number_text(low * entry.scale)} to {short_number_text(high * entry.scale)})"


def report_markdown(result: RunResult, metrics: Metrics, verdict: Verdict | None) -> str:
    """Return report.md: the summary, all metrics, the loaded model, the repetitions, and the command to repeat it."""
    parts = [f"# {markdown(f'{result.cell.model} · {_load(result.cell)}')}", summary_markdown(result, metrics, verdict)]
    absent = unsupported_percentiles(result)
    if absent:
        parts.append("Percentiles left out, because the sample does not support them: " + ", ".join(absent) + ".")
    if sentence := correlation(result):
        parts.append(sentence)
    if unseen := unjudged(result):
        parts.append("Not judged, because there are too few repetitions or processes: " + ", ".join(unseen) + ".")
    if why := utilization_doubt(result):
        parts.append(why)
    if metrics:
        parts += [
            "## All metrics",
            markdown_table(["metric", "value"], [[key, _figure(key, value)] for key, value in metrics.items()]),
        ]
    parts += _channels(result)
    if turns := turns_of(result):
        parts += ["## Turn by turn", _turns_table(turns), *_replies(result)]
    parts += _same_tokens(result)
    if result.repetitions:
        parts += ["## Statistics", markdown_table(*statistics_cells(result))]
    if result.quality:
        parts += ["## Quality", "\n".join(f"- {markdown(sentence)}" for sentence in sentences(result.quality))]
    if result.load:
        parts += [
            "## What was loaded",
            markdown_table(["fact", "value"], [[k, str(v)] for k, v in result.load.facts.items()]),
        ]
    parts += layout_sections(result)
    if result.repetitions:
        parts += ["## Repetitions", _repetitions_table(result)]
    if result.warmup_s:
        parts.append("Warm-up runs, s: " + ", ".join(f"{s:.3f}" for s in result.warmup_s))
    if result.log:
        parts += ["## What libraries printed", code_block("\n".join(result.log))]
    parts += [
        "## Repeat it",
        code_block(command(result.cell)),
        "On this environment:",
        markdown_table(["what", "version"], environment_facts(result.environment)),
    ]
    return "\n\n".join(parts) + "\n"


def _turns_table(turns: Sequence[Turn]) -> str:
    heading = ["turn", "conversations", "prompt tokens", "of them computed", "TTFT ms", "end to end ms"]
    body = [
        [
            str(t.number),
            str(t.count),
            *(
                "–" if v is None else short_number_text(v)
                for v in (t.prompt_tokens, t.prefilled_tokens, t.ttft_ms, t.e2e_ms)
            ),
        ]
        for t in turns
    ]
    return markdown_table(heading, body)


def _channels(result: RunResult) -> list[str]:
    """Say how many output tokens came in which channel, if not all are of the answer, and name unknown ones."""
    found = channel_tokens(requests(result))
    if not found:
        return []
    counted = ", ".join(f"{name} {count:,}" for name, count in found.items())
    text = f"Output tokens by channel: {counted}."
    unknown = [name for name in found if name not in (CONTENT, REASONING, TOOLS, REFUSAL)]
    if unknown:
        text += f" Fields of other names, counted as tokens too: {', '.join(unknown)}."
    return [markdown(text)]


def _replies(result: RunResult) -> list[str]:
    """Say whether a kept history changes the model's answers."""
    if not result.same_replies:
        unknown = (
            "It is unknown whether a recomputed history gives the same answers. See worker.log in the results folder."
        )
        return [unknown] if result.cell.history == "kept" and result.outcome == "ok" else []
    same, count = sum(result.same_replies), len(result.same_replies)
    text = (
        "With its history recomputed, the first conversation gave the same answer, token by token, "
        f"in {same} of its {count} turns."
    )
    if same < count:
        text += (
            " A prompt computed in one piece is rounded differently than in several, which matters where two tokens "
            "are about equally probable."
        )
    return [text]


def _same_tokens(result: RunResult) -> list[str]:
    """Say whether another decode path, or a quantized KV cache, changes the model's output."""
    cell = result.cell
    names = [
        f"decode={cell.decode}" if cell.decode != "generate" else "",
        f"kv_cache={cell.kv_cache}" if cell.kv_cache else "",
    ]
    path = " and ".join(filter(None, names))
    if not path or result.outcome != "ok":
        return []
    if not result.same_tokens:
        return [
            f"It is unknown whether {path} gives the tokens of plain decoding. See worker.log in the results folder."
        ]
    same = [count for count in result.same_tokens if count >= cell.output_tokens]
    text = (
        f"Rows of the first repetition with the same {cell.output_tokens} tokens under {path} as under "
        f"decode=generate and kv_cache=auto: {len(same)} of {len(result.same_tokens)}."
    )
    if len(same) < len(result.same_tokens):
        text += f" The first difference is at token {min(result.same_tokens) + 1}."
        text += (
            " A quantized cache changes the model slightly."
            if cell.kv_cache
            else " Sums in another order are rounded differently, which matters where two tokens are about equally "
            "probable."
        )
    return [text]


def _repetitions_table(result: RunResult) -> str:
    """Return a table of the repetitions, their noise, and their outliers (Tukey's fences on the end-to-end time)."""
    body = []
    totals = [max(map(e2e_ms, r.requests)) for r in result.repetitions]
    for repetition, total, outlier in zip(result.repetitions, totals, classify_outliers(totals), strict=True):
        noise = repetition.noise
        seen = (
            [noise.foreign_cpu_s, noise.steal_s, noise.involuntary_switches, noise.major_faults]
            if noise
            else [None] * 4
        )
        first = short_number_text(median(map(ttft_ms, repetition.requests)))
        shown = ["–" if value is None else short_number_text(float(value)) for value in seen]
        spoiled = (
            # Online, the other process may be the server itself.
            "spoiled" if noise and noise.spoiled and result.cell.scenario != "online" else ""
        )
        body.append([str(repetition.index + 1), first, short_number_text(total), outlier or "", spoiled, *shown])
    heading = ["#", "TTFT ms", "end to end ms", "outlier", "by others"]
    heading += ["CPU s of others", "CPU s stolen", "involuntary switches", "major faults"]
    return markdown_table(heading, body)


def environment_facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the machine and the software of a result as names and values. Unknown values are left out."""
    cpu, memory = environment.get("cpu") or {}, environment.get("memory") or {}
    total = f"{memory['total_bytes'] / 1e9:.1f} GB" if memory.get("total_bytes") else None
    facts = [("CPU", cpu.get("name")), ("usable CPUs", cpu.get("usable_cpus"))]
    facts += [(QUOTA, quota_text(environment)), ("memory", total)]
    facts += [("GPU", gpu["name"]) for gpu in environment.get("gpus") or []]
    facts += [(shown, environment.get(name)) for name, shown in GPU_SOFTWARE.items()]
    facts += [("OS", (environment.get("os") or {}).get("release")), ("Python", environment.get("python"))]
    facts += list((environment.get("packages") or {}).items())
    return [(name, str(value)) for name, value in facts if value is not None]


def command(cell: Cell) -> str:
    """Return the command line that measures this cell again, with the parameters that are not at their default."""
    online = cell.scenario == "online"
    asked = {
        name: list_text(name, [getattr(cell, name)]) for name in cell_fields(cell) if not (online and name == "backend")
    }
    return command_line(asked, "online" if online else "run")


def command_line(asked: Mapping[str, str], command: str = "run") -> str:
    """Return `llmbench <command>` with parameters as text (a list with commas), quoted for a shell.

    Parameters at their default are left out, except `model` and `quant`.
    """
    told = [
        f"{option_name(name)} {shlex.quote(text)}"
        for name, text in asked.items()
        if text != default_text(name) or name in ("model", "quant")
    ]
    return " ".join([f"llmbench {command}", *told])


def summary_table(result: RunResult, metrics: Metrics) -> dict[str, Any]:
    """Return tables/summary.json of one run: one row per metric."""
    return split_table(["metric", "value"], [[key, value] for key, value in metrics.items()])


def config_parameters(cell: Cell, extra: Mapping[str, object]) -> dict[str, str]:
    """Return every parameter of a cell as text, in the order of the vocabulary, followed by the `extra` ones."""
    lines = {name: as_text(name, getattr(cell, name)) for name in cell_fields(cell)}
    return lines | {name: as_text(name, value) for name, value in extra.items()}


def config_yaml(parameters: Mapping[str, str]) -> str:
    """Return config.yaml, which `llmbench run --config` reads."""
    return "".join(
        f"{name}: {json.dumps(text, ensure_ascii=not text.isprintable())}\n" for name, text in parameters.items()
    )


def statistics_cells(result: RunResult) -> tuple[list[str], list[list[str]]]:
    """Return heading and body of the table of `statistics`; a dash for an absent value."""

    def text(value: float | None) -> str:
        return MISSING if value is None else number_text(value)

    def interval(low: float | None, high: float | None) -> str:
        return MISSING if low is None or high is None else f"{number_text(low)} to {number_text(high)}"

    heading = ["metric", "values", "mean", "95 % interval (t)", "median", "95 % interval (bootstrap)", "sd", "MAD"]
    body = []
    for s in statistics(result):
        means, medians = (
            [text(s.mean), interval(s.mean_low, s.mean_high)],
            [text(s.median), interval(s.median_low, s.median_high)],
        )
        counted = f"{s.n} {s.values}" if s.n > 1 else f"1 {s.values.removesuffix('s')}"
        body.append([s.key, counted, *means, *medians, text(s.sd), text(s.mad)])
    return heading, body
