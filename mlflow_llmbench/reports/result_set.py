"""Results of several cells, as a notebook and a script read them: a table, a data frame, the best cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..analysis.decisions.recommend import GOALS
from ..config.spec import cell_fields
from ..records.cell import PARAMETERS, differing
from ..records.errors import MeasurementError, UsageError
from ..records.metrics import ITL, KEYS, PEAK_MEMORY, TPOT, TTFT
from ..records.results import RunResult
from ..records.text import known_words, plural
from . import html
from .result import Row, explanations, row_of
from .sweep import cells_table, headline, ranking, refused_for

if TYPE_CHECKING:
    from pandas import DataFrame

BEST = {name: measure.keys for name, measure in GOALS.items()} | {
    "ttft": (TTFT.key("p50"),),
    "itl": (ITL.key("p50"),),
    "tpot": (TPOT.key("p50"),),
    "memory": PEAK_MEMORY,
}
"""What a cell can be best in → keys of metrics, the first of which that a cell has counts."""

NOT_MEASURED = "not measured"
"""Reason why a cell with a good verdict is not the best in a metric."""


class ResultSet:
    """Rows, one for each cell, and the names of the parameters in which they differ."""

    rows: Sequence[Row]
    varied: Sequence[str]

    def best(self, of: str = "throughput") -> Row:
        """Return the row with the best value of a figure: a name in `BEST`, or the key of a metric.

        An invalid result is best at nothing, and a suspect one not in a metric that the reason spoils. Raises
        UsageError for a figure that cannot be best, MeasurementError, which names the reasons, if no result has one
        that can be trusted.
        """
        keys = BEST.get(of) or ((of,) if of in KEYS and KEYS[of].better else ())
        if not keys:
            raise UsageError(f"No cell can be the best in {of}. {known_words(of, BEST)} The key of a metric does too.")
        found = next((found for key in keys if (found := ranking(self.rows, key))), None)
        if found is None:
            raise MeasurementError(
                f"No cell has a figure for {of} that can be trusted: {self._withheld(keys)}. "
                "The verdict of a row says what to try."
            )
        return found[0]

    def _withheld(self, keys: Sequence[str]) -> str:
        """Return why no cell can be the best in any of these metrics: each reason with its number of cells."""
        reasons = Counter(
            reason
            for row in self.rows
            for reason in refused_for(row, next((key for key in keys if key in row.metrics), keys[0])) or [NOT_MEASURED]
        )
        told = [f"{reason} ({count} of {plural(len(self.rows), 'cell')})" for reason, count in reasons.most_common()]
        return ", ".join(told) or "there are no cells"

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a line for each cell: parameters, outcome, verdict with its reasons, and metrics.

        Parameters have their names, and metrics their keys in MLflow. What a cell does not have is empty.
        """
        from pandas import DataFrame

        known = {name for row in self.rows for name in cell_fields(row.cell)}
        return DataFrame([self._line(number, known) for number in range(len(self.rows))])

    def _line(self, number: int, known: set[str]) -> dict[str, Any]:
        row = self.rows[number]
        own = {*cell_fields(row.cell)}
        reasons = [reason.code for reason in row.verdict.reasons] if row.verdict else []
        return {
            **{name: getattr(row.cell, name) if name in own else None for name in PARAMETERS if name in known},
            "outcome": row.outcome,
            "verdict": row.verdict.word if row.verdict else None,
            "verdict_reasons": ",".join(reasons) or None,
            **row.metrics,
        }

    def _repr_html_(self) -> str:
        rows, more = self.rows, self._more_lines()
        states = [row.state for row in rows]
        notes = [*(f"{title}: {text}" for title, text in explanations(rows)), *more]
        return html.cells(headline(rows, self.varied), cells_table(rows, self.varied), states, notes, self.address)

    @property
    def address(self) -> str:
        """Address of their page in the MLflow UI, "" if there is none."""
        return ""

    def _more_lines(self) -> Sequence[str]:
        """Return lines to show below the table."""
        return ()


class Results(list[RunResult], ResultSet):
    """A list of results that were loaded."""

    @property
    def rows(self) -> list[Row]:  # type: ignore[override]
        """The results as rows of a table, summed up and judged."""
        return [row_of(result) for result in self]

    @property
    def varied(self) -> list[str]:  # type: ignore[override]
        """Names of the parameters in which the results differ."""
        return differing([result.cell for result in self])
