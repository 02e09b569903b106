"""The content of a sweep's report: headline, cells with the best of each column, memory limits, and how to repeat it.

`report.md` and `report.html` are both written from one `Overview`, so they agree.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from .. import __version__
from ..analysis.memory_frontier import TRIED, Attempt, Frontier, frontiers
from ..config.cells import LOADED, asked_params, option_params, sweep_name
from ..config.spec import BenchSpec
from ..records.cell import PARAMETERS, Cell, as_text, default_text
from ..records.metric import GB, Claim, interval_keys
from ..records.metrics import (
    DEVICE_MEMORY,
    GAPS,
    ITL,
    KEYS,
    OUTPUT_RATE,
    PEAK_MEMORY,
    RELATIVE_HALF_WIDTH,
    TPOT,
    TTFT,
    by_name,
)
from ..records.text import short_number_text
from .escaping import code_block, markdown
from .result import Row, columns_of, command, command_line, environment_facts, explanations, table_cells
from .tables import Table, markdown_table

ALIKE = (
    "the best of a column and every result that cannot be told from it: overlapping 95 % intervals; latencies and "
    "goodput within 5 %, or within the intervals of the throughput; memory within 1 %. An invalid result is never "
    "marked."
)

AGAIN = "Valid results that are kept are not measured again. To measure them again, add --rerun."

UNREPEATED = ("output_dir", "rerun")
"""Options that do not affect what is measured."""

ALWAYS_TOLD = ("model", "quant", "batch_size", "prompt_tokens", "output_tokens", "workload")
"""Settings that are shown even if they are at their default."""

MOST_LINES = (16, 8, 4)
"""Lines of a table in the parent's description: the first number that makes it short enough is used."""

MOST_CHARACTERS = 7000
"""Characters of the description. MLflow cuts a tag at 8000, and the link to the view comes before the description."""


@dataclass(frozen=True)
class Subject:
    """The subject of a report: the requested parameters, the parent run's name, and the sweep's id.

    `ui` is the address of the MLflow UI, or the command that opens it.
    """

    spec: BenchSpec
    name: str
    sweep: str
    ui: str = ""
    experiment_id: str = ""


@dataclass(frozen=True)
class Overview:
    """The content of a sweep's report.

    `states`, `reasons` and `runs` have one entry per line of `cells`. `reasons` are the verdict's codes, and a note if
    the cell was measured before; `runs` are MLflow run ids, "" if there is none.

    `runs_url` is the address of a run's page without the run id, "" if the UI has no known address.
    """

    name: str
    headline: str
    facts: tuple[tuple[str, str], ...]
    cells: Table
    states: tuple[str, ...]
    reasons: tuple[tuple[str, ...], ...]
    runs: tuple[str, ...]
    frontier: Table
    frontier_notes: tuple[str, ...]
    explanations: tuple[tuple[str, str], ...]
    machines: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    command: str
    not_drawn: str
    ui: str
    runs_url: str


def overview(measured: Sequence[tuple[Row, str]], subject: Subject) -> Overview:
    """Return the content of a sweep's report. `measured` holds rows with their MLflow run ids, "" if unknown."""
    rows, runs, spec, ui = (
        [row for row, _ in measured],
        tuple(run_id for _, run_id in measured),
        subject.spec,
        _without_user(subject.ui),
    )
    groups = _frontiers(rows)
    is_linkable = ui.startswith(("http://", "https://")) and subject.experiment_id
    return Overview(
        name=subject.name,
        headline=headline(rows, spec.varied),
        facts=(*_facts(rows, subject.sweep), *_settings(spec)),
        cells=cells_table(rows, spec.varied),
        states=tuple(row.state for row in rows),
        reasons=tuple(_reasons(row) for row in rows),
        runs=runs,
        frontier=frontier_table(groups),
        frontier_notes=frontier_notes(groups),
        explanations=tuple(explanations(rows)),
        machines=_machines(rows),
        command=_command(rows, subject),
        not_drawn=_not_drawn(rows),
        ui=ui,
        runs_url=f"{ui.rstrip('/')}/#/experiments/{subject.experiment_id}/runs/" if is_linkable else "",
    )


def _without_user(address: str) -> str:
    """Return an address without user and password: everyone who may open it has their own."""
    scheme, separator, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def headline(rows: Sequence[Row], varied: Sequence[str]) -> str:
    """Return one sentence: the number of measured cells, and the best cell per claim. No invalid result is best."""
    counts = Counter(row.outcome for row in rows)
    parts = [f"{counts.pop('ok', 0)} of {len(rows)} cells measured"]
    invalid = sum(row.state == "invalid" for row in rows)
    parts[0] += "".join(f", {count} {outcome}" for outcome, count in counts.items()) + (
        f", {invalid} invalid" if invalid else ""
    )
    for claim, entries in by_name(Claim).items():
        entry = next((one for one in entries if any(one.key in row.metrics for row in rows)), None)
        best = leaders(rows, entry.key) if entry else []
        if entry and best:
            names = _listed([_called(row, varied) for row in best])
            parts.append(f"{claim}: {names}, {short_number_text(best[0].metrics[entry.key])} {entry.unit}".rstrip())
    return "; ".join(parts) + "."


SPOILED = {"collapsed_gaps": GAPS, "chunked_stream": (*GAPS, TPOT)}
"""Reason of a verdict → the metrics in which a suspect cell is not called the best: its short gaps would win."""


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} others alike"


def leaders(rows: Sequence[Row], key: str) -> list[Row]:
    """Return the cell with the best value of a metric and those that cannot be told from it, best first.

    Return none if that is all cells. If the metric has an interval, cells whose interval overlaps that of the best are
    alike. Otherwise cells within the metric's tolerance are, or, except for memory, within the sum of both half-widths
    of the throughput's intervals, if that is more. Only the cells of `ranking` count.
    """
    ranked = ranking(rows, key)
    if not ranked or KEYS[key].tolerance is None:
        return []
    best = ranked[0]
    alike = [row for row in ranked if row is best or _is_alike(row, best, key)]
    return alike if len(alike) < len(ranked) else []


def ranking(rows: Sequence[Row], key: str) -> list[Row]:
    """Return the cells that can be called best, the best value of a metric first.

    They are valid or suspect, but not suspect for a reason that spoils this metric (`SPOILED`).
    """
    trusted = [row for row in rows if key in row.metrics and not refused_for(row, key)]
    sign = -1 if KEYS[key].better == "lower" else 1
    return sorted(trusted, key=lambda row: sign * row.metrics[key], reverse=True)


def refused_for(row: Row, key: str) -> tuple[str, ...]:
    """Return the reasons for which a cell is not called the best in a metric; none if it can be.

    They are the outcome if it is not `ok`, all reasons of an invalid verdict, or those of a suspect one that spoil the
    metric (`SPOILED`).
    """
    codes = tuple(reason.code for reason in row.verdict.reasons) if row.verdict else ()
    if row.state in ("valid", "suspect"):
        return tuple(code for code in codes if KEYS[key] in SPOILED.get(code, ()))
    return codes if row.state == "invalid" and codes else (row.state,)


def best_figures(rows: Sequence[Row], varied: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the figures and tags of a sweep's own run: the best values with their cells, and how the cells ended.

    Metric `best/ttft_ms_p50` is the least median of the cells, tag `best_ttft_ms_p50` the name of the cell that has it.
    Tag `cells` counts verdicts and outcomes: `6 valid, 1 suspect, 1 oom`.
    """
    memory = [key for key in PEAK_MEMORY if any(key in row.metrics for row in rows)][:1]
    figures, tags = {}, {}
    for key in (OUTPUT_RATE.key(), TTFT.key("p50"), ITL.key("p50"), *memory):
        if ranked := ranking(rows, key):
            name = key.partition("/")[2]
            figures[f"best/{name}"], tags[f"best_{name}"] = ranked[0].metrics[key], _called(ranked[0], varied)
    tags["cells"] = ", ".join(f"{count} {state}" for state, count in Counter(row.state for row in rows).most_common())
    return figures, tags


def _called(row: Row, varied: Sequence[str]) -> str:
    return short_name(row.cell, varied) + (" (suspect)" if row.state == "suspect" else "")


def _is_alike(row: Row, best: Row, key: str) -> bool:
    low, high = interval_keys(key)
    if all(name in one.metrics for name in (low, high) for one in (row, best)):
        return row.metrics[high] >= best.metrics[low] and best.metrics[high] >= row.metrics[low]
    # A time or goodput without an interval of its own is at least as uncertain as the throughput of its repetitions.
    widths = [one.metrics.get(RELATIVE_HALF_WIDTH.key(), 0.0) for one in (row, best)]
    noise = 0.0 if KEYS[key].section == DEVICE_MEMORY.section else sum(widths)
    return abs(row.metrics[key] - best.metrics[key]) <= max(KEYS[key].tolerance or 0.0, noise) * abs(best.metrics[key])


def short_name(cell: Cell, varied: Sequence[str]) -> str:
    """Return a short name of a cell from its varied parameters: `int4 b4`, `opt-125m int8 threads=2`."""

    def part(name: str) -> str:
        text = as_text(name, getattr(cell, name))
        if name == "model":
            return text.rstrip("/").rsplit("/", 1)[-1]
        return f"b{text}" if name == "batch_size" else text if name == "quant" and text != "none" else f"{name}={text}"

    return " ".join(part(name) for name in varied or ["model", "quant"])


def cells_table(rows: Sequence[Row], varied: Sequence[str]) -> Table:
    """Return the cells with their settings and figures, the best of each column marked."""
    heading, body = table_cells(rows, varied)
    columns = columns_of(rows)
    first = len(heading) - 1 - len(columns)
    order = {id(row): line for line, row in enumerate(rows)}
    best = {(order[id(row)], first + column) for column, one in enumerate(columns) for row in leaders(rows, one.key)}
    counts = [
        column
        for column, name in enumerate(heading[:first])
        if PARAMETERS[name].metadata["kind"] in ("count", "number")
    ]
    measured = frozenset(range(first, len(heading) - 1))
    return Table(
        tuple(heading[:-1]), tuple(tuple(line[:-1]) for line in body), measured | set(counts), measured, frozenset(best)
    )


def _reasons(row: Row) -> tuple[str, ...]:
    """Return the codes of a cell's verdict, and the earlier run or folder if it was measured there."""
    codes = [reason.code for reason in row.verdict.reasons] if row.verdict else []
    return (*codes, *([f"measured before, in {row.linked}"] if row.linked else []))


def _frontiers(rows: Sequence[Row]) -> list[Frontier]:
    """Return the frontier of each load. Online cells are left out: the memory of a server is not visible."""
    here = [row for row in rows if row.cell.scenario == "offline"]
    return frontiers(
        (Attempt(row.cell, row.outcome, row.peak_bytes, row.predicted_bytes, row.state != "invalid") for row in here),
        LOADED,
    )


def frontier_table(groups: Sequence[Frontier]) -> Table:
    """Return the largest shapes that fit beside the smallest that do not, per load (model, quantization and so on)."""
    loads = [group.load for group in groups]
    names = [name for name in LOADED if len({load[name] for load in loads}) > 1] or ["model", "quant"]
    predicted = any(
        attempt.predicted_bytes for group in groups for attempt in (*group.fits, *group.failed, *group.untried)
    )
    heading = [*names, "largest that fits", "peak GB", *(["predicted GB"] if predicted else [])]
    heading += ["smallest that does not", "why", *(["predicted ÷ measured"] if predicted else []), "limit"]
    body = []
    for group in groups:
        beyond = [*group.failed, *group.untried]
        for number in range(max(len(group.fits), len(beyond), 1)):
            fit = group.fits[number] if number < len(group.fits) else None
            failed = beyond[number] if number < len(beyond) else None
            line = [as_text(name, group.load[name]) for name in names]
            line += [
                shape(fit.cell) if fit else "none" if group.failed and not group.fits else "",
                _gigabytes(fit.peak_bytes if fit else None),
            ]
            line += [_gigabytes(fit.predicted_bytes if fit else None)] if predicted else []
            line += [shape(failed.cell) if failed else "", _why(failed) if failed else ""]
            line += [_range(group.prediction) if number == 0 else ""] if predicted else []
            body.append((*line, group.boundary if number == 0 else ""))
    numeric = frozenset(column for column, name in enumerate(heading) if name.endswith("GB"))
    return Table(tuple(heading), tuple(body), numeric)


def shape(cell: Cell) -> str:
    """Return rows × (prompt + output tokens) of a cell: `4 × (128 + 64)`."""
    prompt = f"auto {cell.workload}" if cell.prompt_tokens is None else str(cell.prompt_tokens)
    return f"{cell.batch_size} × ({prompt} + {cell.output_tokens})"


def _gigabytes(size: int | None) -> str:
    return "" if size is None else short_number_text(size / GB)


def _range(ratios: tuple[float, float] | None) -> str:
    if ratios is None:
        return ""
    low, high = (f"{ratio:.2f}" for ratio in ratios)
    return low if low == high else f"{low} to {high}"


def _why(attempt: Attempt) -> str:
    """Return the outcome, whether it was tried or only predicted, and the memory reached or predicted."""
    if attempt.outcome in TRIED:
        return attempt.outcome + (f", {_gigabytes(attempt.peak_bytes)} GB reached" if attempt.peak_bytes else "")
    return f"{attempt.outcome}, not tried" + (
        f", {_gigabytes(attempt.predicted_bytes)} GB predicted" if attempt.predicted_bytes else ""
    )


def frontier_notes(groups: Sequence[Frontier]) -> tuple[str, ...]:
    """Explain the table: the shape, and each limit that was not reached, only predicted, or contradicted."""
    notes = ["A shape is rows × (prompt + output tokens). Every shape that is no larger in any of the three fits too."]
    boundaries = {group.boundary for group in groups}
    if boundaries == {"not reached"}:
        notes.append("Every requested shape fits, so the limit was not reached.")
    if any("predicted" in boundary for boundary in boundaries):
        notes.append("A predicted limit was not tried. To try cells refused for their memory, use force=true.")
    for group in groups:
        for attempt in group.contradicted:
            how = "was not tried" if attempt.outcome not in TRIED else f"ended with {attempt.outcome}"
            notes.append(
                f"{attempt.cell.model} {attempt.cell.quant}: {shape(attempt.cell)} {how} although a shape at least as "
                "large fits, so memory is not the reason."
            )
    return tuple(notes)


def _facts(rows: Sequence[Row], sweep: str) -> list[tuple[str, str]]:
    own = [row for row in rows if not row.linked]
    started, ended = [row.started_ms for row in own if row.started_ms], [row.ended_ms for row in own if row.ended_ms]
    facts = [("sweep", sweep)]
    if started and ended:
        facts.append(("measured", f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime(min(started) / 1000))} UTC"))
        facts.append(("took", _duration((max(ended) - min(started)) / 1000)))
    return [*facts, ("by", f"mlflow-llmbench {__version__}")]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _settings(spec: BenchSpec) -> list[tuple[str, str]]:
    """Return the settings that all cells share: those in `ALWAYS_TOLD` and those that are not at their default."""
    asked = {name: text for name, text in asked_params(spec).items() if name not in spec.varied}
    return [(name, text) for name, text in asked.items() if name in ALWAYS_TOLD or text != default_text(name)] + list(
        _options(spec).items()
    )


def drawable(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that charts show: measured in all their processes, and not invalid."""
    return [row for row in rows if row.metrics and row.outcome == "ok" and row.state != "invalid"]


def _not_drawn(rows: Sequence[Row]) -> str:
    count = sum(bool(row.metrics) for row in rows) - len(drawable(rows))
    return f"{count} invalid {'result is' if count == 1 else 'results are'} not drawn." if count else ""


def _machines(rows: Sequence[Row]) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Return each environment in which cells were measured, with the number of cells if there are several."""
    counts: Counter[str] = Counter()
    facts: dict[str, tuple[tuple[str, str], ...]] = {}
    for row in rows:
        if row.environment:
            found = tuple(environment_facts(row.environment))
            key = json.dumps(found)
            facts[key] = found
            counts[key] += 1
    return tuple(
        (f"{counts[key]} of {len(rows)} cells" if len(facts) > 1 else "", found) for key, found in facts.items()
    )


def _command(rows: Sequence[Row], subject: Subject) -> str:
    """Return the command that measures the sweep again; one line per cell if the cells are no product of lists."""
    if subject.name == sweep_name(subject.spec):
        return sweep_command(subject.spec)
    return "\n".join(dict.fromkeys(command(row.cell) for row in rows))


def sweep_command(spec: BenchSpec) -> str:
    """Return the command line that runs a sweep again from its requested parameters, without the output folder."""
    online = spec.scenario == "online"
    asked = {name: text for name, text in asked_params(spec).items() if not (online and name == "backend")}
    return command_line(asked | _options(spec), "online" if online else "run")


def _options(spec: BenchSpec) -> dict[str, str]:
    """Return the options that are not at their default and affect what is measured."""
    return {
        name: text
        for name, text in option_params(spec).items()
        if vars(spec.options)[name] != PARAMETERS[name].default and name not in UNREPEATED
    }


def _markdown(table: Table, more: Mapping[str, Sequence[str]] = MappingProxyType({}), most: int | None = None) -> str:
    """Return a table as Markdown with more columns at its end, the best in bold; at most `most` lines."""
    columns = zip(table.body, *more.values(), strict=True)
    lines = [(*line, *rest) for line, *rest in columns][:most]
    return markdown_table([*table.heading, *more], lines, table.numeric, table.best)


def description(rows: Sequence[Row], varied: Sequence[str]) -> str:
    """Return the parent's one-screen description: the headline, the cells, what fits, failures and verdict reasons.

    A large sweep shows only its fastest cells, as many as fit on a screen and into a tag of MLflow.
    """
    texts = [_description(rows, varied, most) for most in MOST_LINES]
    return next((text for text in texts if len(text) <= MOST_CHARACTERS), texts[-1])


def cells_markdown(rows: Sequence[Row], varied: Sequence[str]) -> str:
    """Return comparison.md: the description with all cells."""
    return _description(rows, varied, len(rows))


def _description(rows: Sequence[Row], varied: Sequence[str], most: int) -> str:
    shown = sorted(rows, key=lambda row: -row.metrics.get(OUTPUT_RATE.key(), 0.0)) if len(rows) > most else rows
    groups = _frontiers(rows)
    limits, notes = frontier_table(groups), _explained(explanations(rows))
    parts = [
        f"**{markdown(headline(rows, varied))}**",
        _markdown(cells_table(shown, varied), {"verdict": [row.state for row in shown]}, most),
    ]
    parts += (
        [f"The {most} fastest cells. All {len(rows)} are in `report.md` and `report.html`."] if len(rows) > most else []
    )
    parts += ["What fits, as rows × (prompt + output tokens):", _markdown(limits, most=most)] if groups else []
    parts += ["\n".join(f"- {line}" for line in notes[:most])] if notes else []
    return "\n\n".join(parts) + "\n"


def _explained(found: Sequence[tuple[str, str]]) -> list[str]:
    return [f"**{markdown(title)}**: {markdown(text)}" for title, text in found]


def overview_markdown(report: Overview, charts: Sequence[str] = ()) -> str:
    """Return report.md of a sweep; `charts` are paths of pictures relative to the report."""
    parts = [f"# {markdown(report.name)}", f"**{markdown(report.headline)}**"]
    parts.append("\n".join(f"- {markdown(name)}: {markdown(value)}" for name, value in report.facts))
    verdicts = [
        f"{state} ({', '.join(codes)})" if codes else state
        for state, codes in zip(report.states, report.reasons, strict=True)
    ]
    parts += ["## Cells", _markdown(report.cells, {"verdict": verdicts, "MLflow run": report.runs})]
    parts += [f"In bold: {ALIKE}"] if report.cells.best else []
    if report.explanations:
        parts += ["## What was seen", "\n".join(f"- {line}" for line in _explained(report.explanations))]
    if report.frontier.body:
        parts += [
            "## What fits in memory",
            _markdown(report.frontier),
            "\n".join(f"- {markdown(note)}" for note in report.frontier_notes),
        ]
    if charts:
        parts += [
            "## Charts",
            *(f"![{chart_name(path)}]({path})" for path in charts),
            *filter(None, [report.not_drawn]),
        ]
    parts += [
        "## Run it again",
        code_block(report.command),
        f"With mlflow-llmbench {__version__}. `llmbench compare RUN_A RUN_B` says whether two runs differ.",
    ]
    if report.ui:
        parts += ["The runs are in MLflow:", code_block(report.ui)]
    parts.append("## Environment")
    for title, facts in report.machines:
        parts += [*([f"### {title}"] if title else []), markdown_table(["what", "version"], facts)]
    return "\n\n".join(parts) + "\n"


def chart_name(path: str) -> str:
    """Return a chart's name in words: `charts/itl_by_token.svg` → `itl by token`."""
    return path.rsplit("/", 1)[-1].partition(".")[0].replace("_", " ")
