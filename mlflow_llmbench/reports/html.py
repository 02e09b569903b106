"""report.html of a sweep: one self-contained file that makes no requests and runs no script.

Charts are images in `data:` URLs: nothing inside an SVG can act there, and ids of two charts cannot collide. They keep
a light background in a dark page, since their ink is dark. The page's content security policy forbids anything that is
not in the file.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Mapping, Sequence

from .. import __version__
from ..records.verdicts import REASONS
from .escaping import html
from .sweep import AGAIN, ALIKE, Overview, chart_name
from .tables import Table

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root { color-scheme: light dark;
  --page: #fcfcfb; --ink: #1f2430; --quiet: #667080; --line: #e5e7eb; --soft: #f3f4f6; --link: #1f5fa8;
  --good: #17743a; --good-soft: #e7f4ec; --doubt: #8a5800; --doubt-soft: #fdf2d9; --bad: #b3261e; --bad-soft: #fcebea; }
@media screen and (prefers-color-scheme: dark) { :root {
  --page: #15181d; --ink: #e4e7ec; --quiet: #98a1ae; --line: #2c323b; --soft: #1e2229; --link: #82b4ec;
  --good: #74cf97; --good-soft: #183326; --doubt: #e5b454; --doubt-soft: #372c14; --bad: #f2938c; --bad-soft: #3d1f1d;
  } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
main { max-width: 80rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; font-weight: 650; letter-spacing: -.012em; margin: 0 0 .75rem; }
h2 { font-size: 1.05rem; font-weight: 650; margin: 3rem 0 .75rem; }
h3 { font-size: .9rem; font-weight: 600; color: var(--quiet); margin: 1.25rem 0 .5rem; }
p { margin: .5rem 0; max-width: 54rem; text-wrap: pretty; }
.lead { font-size: 1.15rem; line-height: 1.5; }
.note, footer { color: var(--quiet); font-size: .85rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
dl { display: flex; flex-wrap: wrap; gap: .9rem 2rem; margin: 1.25rem 0 0; }
dt { font-size: .75rem; line-height: 1.4; color: var(--quiet); }
dd { margin: 0; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4; min-width: 100%; overflow-wrap: normal; }
th, td { padding: .45rem .6rem; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; }
th { font-size: .75rem; font-weight: 500; color: var(--quiet); vertical-align: bottom; }
td { white-space: nowrap; }
td.long { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
.number { text-align: right; }
.again, .void { color: var(--quiet); }
.void { text-decoration: line-through; }
.best { font-weight: 650; }
.best::before { content: ""; display: inline-block; width: .36em; height: .36em; margin-right: .5em; border-radius: 50%;
  background: var(--good); vertical-align: .15em; }
.state { display: inline-block; padding: .05rem .5rem; border-radius: 1rem; font-size: .75rem; font-weight: 550;
  white-space: nowrap; background: var(--soft); color: var(--quiet); }
.valid { background: var(--good-soft); color: var(--good); }
.suspect { background: var(--doubt-soft); color: var(--doubt); }
.failed { background: var(--bad-soft); color: var(--bad); }
.why { display: block; margin-top: .15rem; font-size: .75rem; color: var(--quiet); }
.why.told { white-space: normal; min-width: 20rem; }
.run { display: block; width: 16.2ch; font: .65rem/1.3 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  color: var(--quiet); white-space: normal; overflow-wrap: anywhere; }
ul { margin: .75rem 0 0; padding: 0; list-style: none; max-width: 64rem; }
li { padding: .3rem 0; font-size: .9rem; }
li .state { margin-right: .5rem; }
pre { margin: .75rem 0; padding: .9rem 1rem; border-radius: .5rem; background: var(--soft); white-space: pre-wrap;
  font: .8125rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .75rem; border: 1px solid var(--line); border-radius: .5rem; background: #fff; }
figure:first-child { grid-column: 1 / -1; }
img { display: block; width: 100%; height: auto; }
@media (max-width: 64rem) {
  table { font-size: .8125rem; } th, td { padding: .45rem .4rem; } .why { white-space: normal; } }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.35rem; } .lead { font-size: 1.05rem; }
  h2 { margin-top: 2.25rem; } }
@media print { @page { margin: 14mm; } body { background: none; font-size: 10pt; } main { max-width: none; padding: 0; }
  .scroll { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: .25rem .4rem; } .run { font-size: 5pt; }
  tr, li, figure, pre { break-inside: avoid; } h2 { break-after: avoid; margin-top: 1.5rem; }
  figure { border: 0; padding: 0; } a { color: inherit; } }
"""

LONG = 40
"""Characters above which a table cell is wrapped."""

DOUBTFUL = {"valid": "valid", "suspect": "suspect", "skipped": "", "refused": "", "interrupted": ""}
"""State of a cell → CSS class of its badge. All other states are failures."""


def sweep_page(told: Overview, charts: Mapping[str, bytes]) -> str:
    """Return the HTML page of a sweep. `charts` maps names to the contents of SVG files."""
    parts = [
        f'<header><h1>{html(told.name)}</h1><p class="lead">{html(told.headline)}</p>{_facts(told.facts)}</header>',
        _section("Cells", _cells(told), _note(f"A dot marks {ALIKE}" if told.cells.best else "")),
        _section("What was seen", _list(f"{_badge(title)}{html(text)}" for title, text in told.explanations))
        if told.explanations
        else "",
        _section("What fits in memory", _table(told.frontier), _list(map(html, told.frontier_notes), "note"))
        if told.frontier.body
        else "",
        _section(
            "Charts",
            f'<div class="charts">{"".join(map(_chart, charts, charts.values()))}</div>',
            _note(told.not_drawn),
        )
        if charts
        else "",
        _section("Run it again", f"<pre>{html(told.command)}</pre>", _places(told)),
        _section(
            "Environment",
            *(f"{f'<h3>{html(title)}</h3>' if title else ''}{_facts(facts)}" for title, facts in told.machines),
        ),
    ]
    return document(told.name, parts)


def document(title: str, parts: Iterable[str]) -> str:
    """Return a whole page. `parts` are HTML already; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html(POLICY)}">\n'
        f"<title>{html(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(f'{part}{chr(10)}' for part in parts if part)}"
        f"<footer>mlflow-llmbench {html(__version__)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, *content: str) -> str:
    return f"<section><h2>{html(title)}</h2>\n{''.join(content)}</section>"


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<div><dt>{html(name)}</dt><dd>{html(value)}</dd></div>' for name, value in facts)}</dl>"


def _list(items: Iterable[str], kind: str = "") -> str:
    """Return a list of items that are HTML already."""
    return f'<ul class="{kind}">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def _note(text: str) -> str:
    return f'<p class="note">{html(text)}</p>' if text else ""


def _badge(title: str) -> str:
    """Return the badge of a state, or of a reason with the class of the verdict that it forces.

    Text after the first word is a count.
    """
    word = title.partition(" ")[0]
    return f'<span class="state {DOUBTFUL.get(REASONS.get(word, word), "failed")}">{html(title)}</span>'


def _chart(name: str, svg: bytes) -> str:
    data = base64.b64encode(svg).decode()
    return f'<figure><img alt="{html(chart_name(name))}" src="data:image/svg+xml;base64,{data}"></figure>'


def _table(table: Table, more: Sequence[tuple[str, Sequence[str]]] = (), void: Collection[int] = ()) -> str:
    """Return an HTML table.

    `more` holds further columns at its end, with cells that are HTML already. `void` holds the lines whose measured
    values are struck through. Settings that repeat the line above are grey.
    """
    heads = [
        f'<th class="{"number" if column in table.numeric else "name"}">{html(text)}</th>'
        for column, text in enumerate(table.heading)
    ]
    heads += [f"<th>{html(text)}</th>" for text, _ in more]
    lines = []
    for number, line in enumerate(table.body):
        above = table.body[number - 1] if number else ()
        same = next((column for column, (a, b) in enumerate(zip(line, above, strict=False)) if a != b), 0)
        cells = []
        for column, text in enumerate(line):
            words = {
                "number" if column in table.numeric else "name": True,
                "best": (number, column) in table.best,
                "again": column < same,
                "void": number in void and column in table.measured,
                "long": len(text) > LONG,
            }
            cells.append(f'<td class="{" ".join(word for word, holds in words.items() if holds)}">{html(text)}</td>')
        cells += [f"<td>{column[number]}</td>" for _, column in more]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead>\n'
        f"<tbody>{chr(10).join(lines)}</tbody></table></div>"
    )


def _cells(told: Overview) -> str:
    notes = ("".join(f'<span class="why">{html(code)}</span>' for code in codes) for codes in told.reasons)
    verdicts = [_badge(state) + note for state, note in zip(told.states, notes, strict=True)]
    more = [("verdict", verdicts)]
    if any(told.runs):
        more.append(("MLflow run", [_run(run_id, told.runs_url) for run_id in told.runs]))
    return _table(told.cells, more, [line for line, state in enumerate(told.states) if state == "invalid"])


def _run(run_id: str, runs_url: str) -> str:
    shown = f'<span class="run">{html(run_id)}</span>'
    return f'<a href="{html(runs_url + run_id)}">{shown}</a>' if runs_url and run_id else shown


def _places(told: Overview) -> str:
    again = _note(f"With mlflow-llmbench {__version__}. {AGAIN}")
    return again + (f'<p class="note">The runs are in MLflow: <code>{html(told.ui)}</code></p>' if told.ui else "")
