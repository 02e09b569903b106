"""HTML pages from the templates in `templates/`: one self-contained file that makes no requests and runs no script.

Charts are images in `data:` URLs: nothing inside an SVG can act there, and ids of two charts cannot collide. They keep
a light background in a dark page, since their ink is dark. The page's content security policy forbids anything that is
not in the file. Templates escape every value; a name that they lack is an error.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from .. import __version__
from ..records.verdicts import REASONS
from .escaping import plain
from .sweep import AGAIN, ALIKE, Overview, chart_name
from .tables import Table

if TYPE_CHECKING:
    from jinja2 import Environment

LONG = 40
"""Characters above which a table cell is wrapped."""

DOUBTFUL = {"valid": "valid", "suspect": "suspect", "skipped": "", "refused": "", "interrupted": ""}
"""State of a cell → CSS class of its badge. All other states are failures."""


def sweep_page(told: Overview, charts: Mapping[str, bytes]) -> str:
    """Return the HTML page of a sweep. `charts` maps names to the contents of SVG files."""
    return page(
        "sweep.html.j2",
        title=told.name,
        headline=told.headline,
        told=told,
        void=[line for line, state in enumerate(told.states) if state == "invalid"],
        charts=charts,
        alike=ALIKE,
        again=AGAIN,
    )


def cells(
    headline: str, table: Table, states: Sequence[str], notes: Sequence[str], link: str = "", last: str = "verdict"
) -> str:
    """Return cells as a part of a page, for the output of a notebook. `last` is the heading of the states.

    `link` is the address of their page in the MLflow UI, "" if there is none.
    """
    values = {"headline": headline, "table": table, "states": states, "notes": notes, "link": link, "last": last}
    return page("cells.html.j2", **values)


def page(template: str, **values: object) -> str:
    """Return a page, or a part of one, made from a template. Every page has a `title` and a `headline`."""
    return _environment().get_template(template).render(version=__version__, **values)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    def shown(value: object) -> object:
        """Make invisible characters of a value visible; parts that are HTML already stay as they are."""
        return value if hasattr(value, "__html__") else plain(value)

    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "chart_name": chart_name,
        "data_url": _data_url,
        "heads": _heads,
        "marked": _marked,
        "side": lambda kind: "right" if "number" in kind.split() else "left",
        "state_class": _state_class,
    }
    return environment


def _data_url(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _state_class(title: str) -> str:
    """Return the CSS class of the badge of a state, or of a reason: that of the verdict that it forces.

    Text after the first word is a count.
    """
    word = title.partition(" ")[0]
    return DOUBTFUL.get(REASONS.get(word, word), "failed")


def _heads(table: Table) -> list[tuple[str, str]]:
    """Return CSS class and text of the heading of each column."""
    return [(_kind(table, column), text) for column, text in enumerate(table.heading)]


def _marked(table: Table, void: Collection[int] = ()) -> Iterator[list[tuple[str, str]]]:
    """Yield CSS classes and text of the cells of each line.

    Measured values of lines in `void` are struck through. Settings that repeat the line above are grey.
    """
    for number, line in enumerate(table.body):
        above = table.body[number - 1] if number else ()
        same = next((column for column, (a, b) in enumerate(zip(line, above, strict=False)) if a != b), 0)
        cells = []
        for column, text in enumerate(line):
            words = {
                _kind(table, column): True,
                "best": (number, column) in table.best,
                "again": column < same,
                "void": number in void and column in table.measured,
                "long": len(text) > LONG,
            }
            cells.append((" ".join(word for word, holds in words.items() if holds), text))
        yield cells


def _kind(table: Table, column: int) -> str:
    return "number" if column in table.numeric else "name"
